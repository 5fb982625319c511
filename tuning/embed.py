"""Texts as vectors: the Embedder that curation's Embedding measure asks for, by a local model.

Any sentence-transformers folder serves. Encoders of the BERT family (all-MiniLM, e5, bge, gte, multilingual MiniLM)
run through our own forward: equal texts once, sorted by length, no padding, in int8 on a CPU that multiplies int8
natively. A static model is a table lookup (static.py). Every other model runs through sentence-transformers itself.
"""

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import AutoTokenizer

from ..curation.door import Embedder, Progress
from ..curation.folder import HouseError
from .digests import model_digest
from .encoder import Encoder, load_encoder, pooled, states
from .models import check_model, check_vocabulary, no_bars
from .wordpiece import WordPieces, special_ends

WINDOW = 4096  # texts tokenised, sorted and packed together
TOKENS = {"cpu": 1024, "cuda": 65_536}  # of one batch: on a CPU its widest states stay in the cache

Vectors = NDArray[np.float32]
Forward = Callable[[Sequence[NDArray[np.int32]]], Vectors]
"""Texts as token ids, sorted by length -> one pooled vector a text."""


def load_embedder(
    folder: Path, adapter: Path | None = None, *, dtype: str = "auto", device: str | None = None
) -> Embedder:
    """The embedding model in `folder`: a sentence-transformers, model2vec or bare encoder folder, or a causal language
    model, whose representations are those of RDS+ (only such a model may have an adapter).

    dtype: fp32, fp16 (CUDA), int8 (a CPU with VNNI), or auto: the fastest of them that this machine computes natively,
    of a cosine of at least 0.999 to fp32 in the mean. HouseError where the folder is absent or holds no such model.
    """
    if not folder.is_dir():
        raise HouseError(f"there is no model folder {folder}")
    try:
        return _embedder(folder, adapter, dtype, device)
    except (HouseError, MemoryError):
        raise
    except Exception as error:  # transformers lets through whatever safetensors, json and its own checks raise
        raise HouseError(f"{folder} holds no embedding model that can be loaded: {error}") from error


def _embedder(folder: Path, adapter: Path | None, dtype: str, device: str | None) -> Embedder:
    if is_causal(folder):
        from .representation import RepresentationEmbedder

        return RepresentationEmbedder(folder, adapter, dtype=dtype, device=device)
    if adapter is not None:
        raise HouseError(f"{folder} is no causal language model, so that the adapter {adapter} does not fit it")
    if is_static(folder):
        from .static import StaticEmbedder

        return StaticEmbedder(folder)
    check_folder(folder)
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    pooling = simple_pooling(folder)
    found = None if pooling is None else _encoder(folder, dtype, device)
    if found is None or pooling is None:
        return SentenceEmbedder(folder, device)
    return EncoderEmbedder(folder, found, pooling, dtype)


def _encoder(folder: Path, dtype: str, device: str) -> Encoder | None:
    exact = dtype != "fp16" and (dtype != "auto" or device == "cpu")
    home = next((folder / m["path"] for m in modules(folder) if m["type"].endswith("Transformer")), folder)
    return load_encoder(home, torch.float32 if exact else torch.float16, device)


def is_static(folder: Path) -> bool:
    """Whether the folder is one of model2vec: a table of token vectors."""
    return _json(folder / "config.json").get("model_type") == "model2vec"


def is_causal(folder: Path) -> bool:
    """Whether the folder is a bare causal language model."""
    named = _json(folder / "config.json").get("architectures") or []
    return not modules(folder) and any(name.endswith("ForCausalLM") for name in named)


def check_folder(folder: Path) -> None:
    """HouseError unless `folder` holds an embedding model's files."""
    if not modules(folder):
        check_model(folder)


def modules(folder: Path) -> list[dict[str, Any]]:
    """What modules.json lists; nothing for a bare transformer."""
    path = folder / "modules.json"
    return list(json.loads(path.read_text(encoding="utf-8"))) if path.is_file() else []


def simple_pooling(folder: Path) -> str | None:
    """mean or cls where the model is a transformer, that pooling and at most a normalisation; None where it is more
    (a projection, another pooling, a prompt put before every text)."""
    listed = modules(folder)
    kinds = [module["type"].rsplit(".", 1)[-1] for module in listed]
    if not listed:
        return "mean"  # as sentence-transformers takes a bare transformer
    if kinds not in (["Transformer", "Pooling"], ["Transformer", "Pooling", "Normalize"]):
        return None
    if _json(folder / "config_sentence_transformers.json").get("default_prompt_name") is not None:
        return None
    said = _json(folder / listed[1]["path"] / "config.json")
    chosen = [key.removeprefix("pooling_mode_") for key, on in said.items() if key.startswith("pooling_mode_") and on]
    if isinstance(said.get("pooling_mode"), str):
        chosen = [said["pooling_mode"]]
    return {"mean_tokens": "mean", "mean": "mean", "cls_token": "cls", "cls": "cls"}.get(",".join(chosen))


def _json(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    return found


class EncoderEmbedder:
    """Embedder by our own forward of an encoder of the BERT family. A text's vector does not depend on the texts
    beside it: in int8 not at all, in fp32 by less than 1e-6."""

    def __init__(self, folder: Path, encoder: Encoder, pooling: str, dtype: str = "auto") -> None:
        """folder: of the tokenizer and its settings. dtype: as in load_embedder, the encoder being on its device."""
        self.digest = model_digest(folder)
        self.dims = encoder.dims
        self.tokenise = Tokenise(folder, encoder.longest)
        self.dtype, self._forward = choose(encoder, pooling, dtype)
        self._tokens = TOKENS["cuda" if encoder.words.is_cuda else "cpu"]
        self._each = in_threads if self.dtype == "int8" else map

    def embed(self, texts: Sequence[str], progress: Progress | None = None) -> Vectors:
        """Shape (len(texts), dims), each of unit length."""
        distinct = {text: place for place, text in enumerate(dict.fromkeys(texts))}
        said = list(distinct)
        found = np.zeros((len(said), self.dims), np.float32)
        for start in range(0, len(said), WINDOW):
            window = said[start : start + WINDOW]
            found[start : start + len(window)] = unit(self.pooled(self.tokenise(window)))
            if progress is not None:
                progress((start + len(window)) * len(texts) // len(said), len(texts))
        return found[np.array([distinct[text] for text in texts], np.int64)]

    def pooled(self, ids: Sequence[NDArray[np.int32]]) -> Vectors:
        """One pooled vector for each sequence of token ids, as it leaves the model."""
        order = np.argsort([len(text) for text in ids], kind="stable")
        cuts = list(batches(np.array([len(ids[i]) for i in order]), self._tokens))
        made = self._each(self._forward, ([ids[i] for i in order[places]] for places in cuts))
        found = np.zeros((len(ids), self.dims), np.float32)
        for places, vectors in zip(cuts, made, strict=True):
            found[order[places]] = vectors
        return found


class Tokenise:
    """Texts -> token ids as sentence-transformers makes them: special tokens included, cut at the model's limit."""

    def __init__(self, folder: Path, longest: int) -> None:
        home = next((folder / m["path"] for m in modules(folder) if m["type"].endswith("Transformer")), folder)
        settings = _json(home / "sentence_bert_config.json")
        tokenizer: Any = AutoTokenizer.from_pretrained(home, local_files_only=True)
        limit = settings.get("max_seq_length") or min(longest, tokenizer.model_max_length)
        check_vocabulary(tokenizer, home)
        self.inner = tokenizer.backend_tokenizer
        self.inner.no_padding()
        self.inner.no_truncation()
        self.before, self.after = special_ends(self.inner)
        self._room = min(limit, longest) - len(self.before) - len(self.after)
        self._ids = WordPieces(self.inner)
        self._lower = bool(settings.get("do_lower_case"))

    def __call__(self, texts: Sequence[str]) -> list[NDArray[np.int32]]:
        found = self._ids([text.lower() for text in texts] if self._lower else texts)
        return [np.array([*self.before, *ids[: self._room], *self.after], np.int32) for ids in found]


def choose(encoder: Encoder, pooling: str, dtype: str) -> tuple[str, Forward]:
    """(the arithmetic's name, the forward) for this encoder on its device. HouseError for one that is not there."""
    if (encoder.words.is_cuda and dtype == "int8") or dtype not in ("auto", "fp32", "fp16", "int8"):
        raise HouseError(f"dtype {dtype!r}: an embedding model runs in auto, fp32, fp16 (CUDA) or int8 (CPU)")
    if encoder.words.is_cuda:
        name = "fp16" if encoder.words.dtype == torch.float16 else "fp32"
    else:
        from .encoder_int8 import Int8Encoder, fits, native

        if dtype == "int8" and not fits(encoder):
            raise HouseError("dtype int8: this encoder's sizes are no multiples of 16; take auto or fp32")
        name = "int8" if dtype == "int8" or (dtype == "auto" and native() and fits(encoder)) else "fp32"
    inner = Int8Encoder(encoder).states if name == "int8" else partial(states, encoder)

    def forward(texts: Sequence[NDArray[np.int32]]) -> Vectors:
        with torch.inference_mode():
            return pooled(*inner(texts), pooling)

    return name, forward


def in_threads(work: Forward, items: Iterable[Sequence[NDArray[np.int32]]]) -> Iterator[Vectors]:
    """`work` on each item, in order; every thread of torch's takes whole items, so that none waits for another."""
    threads = torch.get_num_threads()
    try:
        with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            yield from pool.map(work, items)
    finally:
        torch.set_num_threads(threads)


def batches(lengths: NDArray[np.int64], tokens: int) -> Iterator[slice]:
    """Runs of texts of at most `tokens` tokens together; a longer text goes alone."""
    ends = np.cumsum(lengths)
    start = 0
    while start < len(lengths):
        before = ends[start - 1] if start else 0
        stop = max(start + 1, int(np.searchsorted(ends, before + tokens, side="right")))
        yield slice(start, stop)
        start = stop


def unit(vectors: Vectors) -> Vectors:
    """Rows of unit length; a row of zeros stays one."""
    lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
    return np.asarray(vectors / np.maximum(lengths, 1e-12), np.float32)


class SentenceEmbedder:
    """Embedder by sentence-transformers' own `encode`, for models that are not of the BERT family."""

    def __init__(self, folder: Path, device: str) -> None:
        from sentence_transformers import SentenceTransformer

        self.digest = model_digest(folder)
        with no_bars():
            self._model = SentenceTransformer(str(folder), device=device, local_files_only=True)
        if hasattr(self._model.tokenizer, "all_special_ids"):
            check_vocabulary(self._model.tokenizer, folder)
        self.dims = int(self._model.get_embedding_dimension() or 0)

    def embed(self, texts: Sequence[str], progress: Progress | None = None) -> Vectors:
        """Shape (len(texts), dims), each of unit length."""
        distinct = {text: place for place, text in enumerate(dict.fromkeys(texts))}
        said = list(distinct)
        found = np.zeros((len(said), self.dims), np.float32)
        for start in range(0, len(said), WINDOW):
            window = said[start : start + WINDOW]
            made = self._model.encode(window, show_progress_bar=False, convert_to_numpy=True)
            found[start : start + len(window)] = unit(np.asarray(made, np.float32))
            if progress is not None:
                progress((start + len(window)) * len(texts) // len(said), len(texts))
        return found[np.array([distinct[text] for text in texts], np.int64)]
