"""Texts as the representations that a causal language model has of them (RDS+, arXiv 2503.01807): the mean of its last
hidden states, weighted by position, for in a causal model only late tokens have seen the text. Texts are packed without
padding, as for training."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import AutoTokenizer

from ..curation.door import Progress
from ..curation.folder import HouseError
from .attention import hidden_states
from .digests import model_digest
from .embed import batches, unit
from .forward import context_of
from .models import load_model

CAPACITY = {"cpu": 4096, "cuda": 32_768}  # tokens of one pack
LONGEST = 2048  # tokens of a text: RDS+'s limit
WINDOW = 4096  # texts tokenised, sorted and packed together

Vectors = NDArray[np.float32]


class RepresentationEmbedder:
    """Embedder by a causal LM. A text is taken as it is, without a chat template, and cut at the model's context."""

    def __init__(
        self, model: Path, adapter: Path | None = None, *, dtype: str = "auto", device: str | None = None
    ) -> None:
        """model: folder of the model; adapter: folder of a LoRA adapter on it. HouseError where it cannot be loaded or
        packed."""
        self.digest = model_digest(model) + ("" if adapter is None else "+" + model_digest(adapter))
        self._model = load_model(model, dtype=dtype, device=device, adapter=adapter)
        try:
            self._tokenizer: Any = AutoTokenizer.from_pretrained(model, local_files_only=True)
        except Exception as error:  # as in models.load_tokenizer
            raise HouseError(f"{model} holds no tokenizer that transformers can load: {error}") from error
        self.dims = int(self._model.config.get_text_config().hidden_size)
        self._longest = min(context_of(self._model.config) or LONGEST, LONGEST)

    def embed(self, texts: Sequence[str], progress: Progress | None = None) -> Vectors:
        """Shape (len(texts), dims), each of unit length; zeros for a text without a token."""
        found = np.zeros((len(texts), self.dims), np.float32)
        capacity = CAPACITY[self._model.device.type] if self._model.device.type in CAPACITY else CAPACITY["cpu"]
        for start in range(0, len(texts), WINDOW):
            said = list(texts[start : start + WINDOW])
            ids = self._tokenizer(said, truncation=True, max_length=self._longest, return_attention_mask=False)
            tokens = [np.array(each, np.int64) for each in ids["input_ids"]]
            order = np.array([i for i in np.argsort(list(map(len, tokens)), kind="stable") if len(tokens[i])], np.int64)
            for places in batches(np.array([len(tokens[i]) for i in order]), capacity):
                mine = order[places]
                found[start + mine] = unit(self._pack([tokens[i] for i in mine]))
            if progress is not None:
                progress(start + len(said), len(texts))
        return found

    def _pack(self, texts: Sequence[NDArray[np.int64]]) -> Vectors:
        """The position-weighted mean of each text's states."""
        lengths = np.array([len(text) for text in texts])
        starts = np.cumsum(lengths) - lengths
        positions = np.arange(lengths.sum()) - np.repeat(starts, lengths)
        device = self._model.device
        with torch.inference_mode():
            states = hidden_states(
                self._model, torch.from_numpy(np.concatenate(texts)).to(device),
                torch.from_numpy(positions).to(device), lengths.tolist(),
            )  # fmt: skip
        weights = (positions + 1) / np.repeat(lengths * (lengths + 1) / 2, lengths)
        weighted = states.float().cpu().numpy() * weights[:, None].astype(np.float32)
        return np.asarray(np.add.reduceat(weighted, starts), np.float32)
