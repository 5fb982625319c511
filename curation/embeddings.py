"""Rows as vectors: of an embedding model, measured and cached; or, with nothing to download, TF-IDF reduced by a
truncated SVD (latent semantic analysis)."""

from collections.abc import Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from .folder import HouseError
from .measures.embedding import Embedding
from .steps import Corpus
from .text.view import VIEW_COLUMNS, View, view

FIT_ROWS = 20_000  # beyond it more rows move the leading directions little and cost time


def embedding_needs(model: str | None, which: View) -> tuple[Embedding, ...]:
    """What a judge that clusters rows says as its `needs`."""
    return () if model is None else (Embedding(model, which),)


def vectors(corpus: Corpus, model: str | None, which: View, dims: int = 64, seed: int = 0) -> np.ndarray:
    """Unit vectors of all live rows, float32, in the order of `corpus.tables()`: the measured embedding of `model` (in
    the judge's `needs`), or, where it is None, tfidf_svd of `dims` dimensions, fitted in the order of row_id."""
    if model is None:
        return fitted_vectors(corpus, (), which, dims, seed)[0]
    return _measured(corpus.values(["embedding"])["embedding"])


def fitted_vectors(
    corpus: Corpus, more: Sequence[str], which: View, dims: int, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """tfidf_svd of all live rows, in the order of `corpus.tables()`, and of the texts `more`, fitted on both together:
    rows in the order of row_id, then `more`."""
    names: list[str] = []
    texts: list[str] = []
    for table in corpus.tables(["row_id", *VIEW_COLUMNS]):
        names += table["row_id"].to_pylist()
        texts += view(table, which)
    order = np.array(sorted(range(len(names)), key=names.__getitem__), np.int64)
    both = tfidf_svd([*(texts[i] for i in order), *more], dims, seed)
    found = np.empty((len(names), dims), np.float32)
    found[order] = both[: len(names)]
    return found, both[len(names) :]


def _measured(column: pa.ChunkedArray) -> np.ndarray:
    """A column of lists of float16 as unit vectors, chunk by chunk into one array: float32 is held once. A null (a row
    that could not be measured) is all zeros. A HouseError where vectors differ in length."""
    sizes = {int(size) for size in pc.unique(pc.list_value_length(column)).to_pylist() if size is not None}
    if len(sizes) > 1:
        raise HouseError(f"an embedding model gave vectors of {len(sizes)} sizes: {sorted(sizes)}; remove its measures")
    found = np.zeros((len(column), *(sizes or {1})), np.float32)
    start = 0
    for chunk in column.chunks:
        rows = found[start : start + len(chunk)]
        rows[np.asarray(chunk.is_valid())] = chunk.flatten().to_numpy(zero_copy_only=False).reshape(-1, found.shape[1])
        for part in range(0, len(rows), 65_536):  # squares of all rows at once would be a second copy
            some = rows[part : part + 65_536]
            lengths = np.linalg.norm(some, axis=1, keepdims=True)
            np.divide(some, lengths, out=some, where=lengths > 1e-6)
        start += len(chunk)
    return found


def tfidf_svd(texts: Sequence[str], dims: int = 64, seed: int = 0, max_features: int = 50_000) -> np.ndarray:
    r"""Vectors of unit length, float32, shape (len(texts), dims); a text without a known word is all zeros.

    Words are runs of \w characters, lower-cased, weighted by (1 + log tf) · idf; of them the `max_features` most
    frequent. Vocabulary, idf and directions are fitted on at most FIT_ROWS texts, drawn without replacement by
    `seed`; then all texts are projected. Equal texts in equal order give equal bytes on any number of threads:
    everything runs on one, and each direction's sign is such that its largest weight is positive. Where fewer than
    `dims` directions exist, the rest is zero. Order matters to the last bits (and to the sample): sort first where it
    must not.
    """
    from scipy.sparse import csr_matrix
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.utils.extmath import randomized_svd
    from threadpoolctl import threadpool_limits

    vectors = np.zeros((len(texts), dims), np.float32)
    drawn = np.random.default_rng(seed).permutation(len(texts))[:FIT_ROWS]
    sample = [texts[i] for i in np.sort(drawn)]
    words = TfidfVectorizer(
        sublinear_tf=True, token_pattern=r"\w+", max_features=max_features, dtype=np.float32,
        min_df=2 if len(sample) > 1000 else 1,  # at scale a word of one text is mostly a name or a number
    )  # fmt: skip
    try:
        fitted = words.fit_transform(sample)
    except ValueError as error:
        if "empty vocabulary" in str(error) or "no terms remain" in str(error):
            return vectors
        raise
    matrix: csr_matrix = fitted if len(sample) == len(texts) else words.transform(texts)
    with threadpool_limits(1):
        rank = min(dims, *fitted.shape)
        _, sizes, directions = randomized_svd(fitted, rank, n_iter=4, random_state=seed)
        strongest = directions[np.arange(rank), np.abs(directions).argmax(axis=1)]
        known = sizes > 1e-6 * sizes[0]  # directions beyond the matrix's rank are rounding noise
        vectors[:, :rank] = matrix @ (directions * (np.sign(strongest) * known)[:, None]).T.astype(np.float32)
    lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
    unit: np.ndarray = np.divide(vectors, lengths, out=np.zeros_like(vectors), where=lengths > 1e-6)
    return unit
