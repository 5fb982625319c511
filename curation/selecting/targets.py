"""The target set of a selection: rows that show what the tuned model is for, beside the pool in one space."""

from collections.abc import Sequence

import numpy as np

from ..embeddings import fitted_vectors, vectors
from ..folder import HouseError, about
from ..reading.formats import Unreadable
from ..reading.source import Source, iter_rows
from ..rows import table
from ..steps import Corpus
from ..text.view import View, view


def target_texts(paths: Sequence[str], which: View, limit: int | None = None) -> list[str]:
    """The view `which` of every row of the files or folders `paths`, in order. A HouseError where one cannot be read,
    holds a record that cannot, or says nothing in that view."""
    texts: list[str] = []
    for number, path in enumerate(paths):
        rows = []
        with about(f"target set {path}"):
            for row in iter_rows(Source(f"target{number}", path, "unknown", limit=limit)):
                if isinstance(row, Unreadable):
                    raise HouseError(f"{row.error} ({row.file}:{row.line}). Mend that record, or remove it")
                rows.append(row)
        said = [text for text in view(table(rows), which) if text.strip()]
        if not said:
            raise HouseError(f"target set {path}: no row has a {which}. Give rows that have one, or another `view`")
        texts += said
    if not texts:
        raise HouseError("a selection by targets needs at least one file of them: targets: [PATH]")
    return texts


def pool_and_targets(
    corpus: Corpus, texts: Sequence[str], model: str | None, which: View, dims: int, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """Unit vectors of the live rows, in the order of `corpus.tables()`, and of `texts`: by the embedding model `model`
    (in the judge's `needs`), or TF-IDF/SVD fitted on both together."""
    if model is not None:
        return vectors(corpus, model, which), corpus.tools.embedder(model).embed(texts)
    return fitted_vectors(corpus, texts, which, dims, seed)
