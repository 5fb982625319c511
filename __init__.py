"""gristmill turns raw instruction data into curated data, and curated data into a tuned model, every row accounted for."""

__version__ = "0.1.0"
