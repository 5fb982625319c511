"""Static embedding models: a table of token vectors, a text being the mean of its tokens'. Some hundred times as fast
as the sentence-transformer that the table is distilled from (Model2Vec; van Dongen and Tulkens 2024).

Distilling: every token of the vocabulary goes through the teacher between its special tokens; the vectors are reduced
by PCA and weighted by smooth inverse frequency, frequencies being Zipf's law over the order of the vocabulary. No data
is needed. The folder is model2vec's, so that model2vec and sentence-transformers load it too.
"""

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file
from tokenizers import Tokenizer

from ..curation.door import Progress
from ..curation.folder import HouseError, whole_folder
from .digests import model_digest
from .wordpiece import WordPieces

DIMS = 256  # of a distilled model, Model2Vec's default
SIF = 1e-4  # a of a / (a + p(token)), Model2Vec's default
LONGEST = 512  # tokens, where a model of model2vec states nothing
WINDOW = 16_384  # texts at a time
UNUSED = re.compile(r"\[unused\d+\]")

Vectors = NDArray[np.float32]


class StaticEmbedder:
    """Embedder by a model2vec folder; equal to model2vec's own `encode` but for rounding."""

    def __init__(self, folder: Path) -> None:
        try:
            held = load_file(folder / "model.safetensors")
            config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
            tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
            table = held["embeddings"].astype(np.float32)
        except (OSError, ValueError, KeyError, SafetensorError) as error:
            raise HouseError(f"{folder} holds no static embedding model of model2vec: {error}") from error
        except Exception as error:  # tokenizers raises a bare Exception
            raise HouseError(f"{folder} holds no tokenizer that can be loaded: {error}") from error
        vocabulary = tokenizer.get_vocab_size()
        mapping = held.get("mapping", np.arange(len(table)))
        if len(mapping) != vocabulary or (len(mapping) and int(mapping.max()) >= len(table)):
            raise HouseError(f"{folder}: {len(table)} vectors do not fit a vocabulary of {vocabulary} tokens")
        table = table[mapping] * held.get("weights", np.ones(len(mapping), np.float32))[:, None].astype(np.float32)
        self.digest, self.dims = model_digest(folder), int(table.shape[1])
        self._table = torch.from_numpy(np.ascontiguousarray(table))
        tokenizer.no_padding()
        tokenizer.no_truncation()
        self._ids = WordPieces(tokenizer)
        self._unknown = _unknown(tokenizer)
        self._longest: int | None = config.get("max_length", LONGEST)
        lengths = [len(token) for token in tokenizer.get_vocab()]
        self._characters = None if self._longest is None else self._longest * int(np.median(lengths))

    def embed(self, texts: Sequence[str], progress: Progress | None = None) -> Vectors:
        """Shape (len(texts), dims), each of unit length; zeros for a text without a known token."""
        found = np.zeros((len(texts), self.dims), np.float32)
        for start in range(0, len(texts), WINDOW):
            said = [text[: self._characters] for text in texts[start : start + WINDOW]]
            found[start : start + len(said)] = self._means(self._ids(said))
            if progress is not None:
                progress(start + len(said), len(texts))
        return found

    def _means(self, ids: list[list[int]]) -> Vectors:
        kept = [[id for id in text if id != self._unknown] for text in (each[: self._longest] for each in ids)]
        offsets = np.zeros(len(kept) + 1, np.int64)
        np.cumsum([len(text) for text in kept], out=offsets[1:])
        flat = np.fromiter((id for text in kept for id in text), np.int64, int(offsets[-1]))
        with torch.inference_mode():
            bags = F.embedding_bag(torch.from_numpy(flat), self._table, torch.from_numpy(offsets[:-1]), mode="mean")
            found: Vectors = F.normalize(bags, dim=1).numpy()
        return found


def _unknown(tokenizer: Tokenizer) -> int:
    """The id of the unknown token, which counts for nothing; -1 where there is none."""
    token = getattr(tokenizer.model, "unk_token", None)
    found = None if token is None else tokenizer.token_to_id(token)
    return -1 if found is None else found


def distil(teacher: Path, folder: Path, dims: int = DIMS, progress: Progress | None = None) -> dict[str, Any]:
    """Distils the sentence-transformer in `teacher` into a static model, written whole into `folder`.

    dims: at most the teacher's. Equal teachers give equal tables on any number of threads up to rounding. Returns what
    config.json holds. HouseError where the teacher is static itself or not an encoder of the BERT family."""
    from .embed import EncoderEmbedder, load_embedder

    model = load_embedder(teacher, dtype="fp32")
    if not isinstance(model, EncoderEmbedder):
        raise HouseError(
            f"{teacher} cannot be distilled: the teacher is an encoder of the BERT family with its tokenizer"
        )
    tokenizer: Tokenizer = model.tokenise.inner
    size = tokenizer.get_vocab_size()
    used = _used(tokenizer, size)
    before, after = model.tokenise.before, model.tokenise.after
    made = []
    for start in range(0, len(used), WINDOW // 4):
        some = used[start : start + WINDOW // 4]
        made.append(model.pooled([np.array([*before, token, *after], np.int32) for token in some]))
        if progress is not None:
            progress(start + len(some), len(used))
    table = np.zeros((size, min(dims, model.dims)), np.float32)
    table[used] = reduced(np.concatenate(made), dims) * zipf_weights(len(used))[:, None]
    config = {
        "model_type": "model2vec", "architectures": ["StaticModel"], "tokenizer_name": teacher.name,
        "teacher_digest": model.digest, "apply_pca": dims, "sif_coefficient": SIF, "hidden_dim": table.shape[1],
        "seq_length": 1_000_000, "max_length": None, "normalize": True, "pooling": "mean", "embedding_dtype": "float32",
    }  # fmt: skip
    with whole_folder(folder) as work:
        save_file({"embeddings": table}, work / "model.safetensors")
        tokenizer.save(str(work / "tokenizer.json"))
        modules = [("StaticEmbedding", "."), ("Normalize", "1_Normalize")]
        listed = [
            {"idx": place, "name": str(place), "path": path, "type": f"sentence_transformers.models.{kind}"}
            for place, (kind, path) in enumerate(modules)
        ]
        (work / "modules.json").write_text(json.dumps(listed, indent=2) + "\n", encoding="utf-8")
        (work / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    return config


def _used(tokenizer: Tokenizer, size: int) -> NDArray[np.int64]:
    """Tokens that texts can hold, in the order of the vocabulary: neither special nor set aside."""
    special = {id for id, token in tokenizer.get_added_tokens_decoder().items() if token.special}
    names = {id: token for token, id in tokenizer.get_vocab().items()}
    kept = [id for id in range(size) if id in names and id not in special and not UNUSED.fullmatch(names[id])]
    return np.array(kept, np.int64)


def reduced(vectors: Vectors, dims: int) -> Vectors:
    """The first `dims` principal components, each signed so that its largest score is positive; all the vectors' own
    dimensions where there are fewer vectors than `dims`."""
    dims = min(dims, vectors.shape[1])
    if dims >= len(vectors):
        return vectors[:, :dims]
    centred = vectors.astype(np.float64) - vectors.mean(axis=0, dtype=np.float64)
    directions = np.linalg.eigh(centred.T @ centred)[1][:, ::-1][:, :dims]
    scores = centred @ directions
    largest = scores[np.abs(scores).argmax(axis=0), np.arange(dims)]
    return np.asarray(scores * np.sign(largest), np.float32)


def zipf_weights(size: int) -> Vectors:
    """Smooth inverse frequency a / (a + p) of tokens whose frequencies fall as 1 / rank, the first rank being 2."""
    inverse = 1 / np.arange(2, size + 2)
    return np.asarray(SIF / (SIF + inverse / inverse.sum()), np.float32)
