"""From raw instruction data to curated data and a tuned model, with every row accounted for."""

__version__ = "0.1.0"
