"""TF-IDF/SVD embeddings: what they promise about shape, length, determinism and meaning; measured ones as arrays."""

import random
from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from gristmill.curation import embeddings
from gristmill.curation.embeddings import tfidf_svd
from gristmill.curation.folder import HouseError

TOPICS = {
    "bread": "knead dough yeast flour bake rye loaf oven proof crust".split(),  # noqa: SIM905
    "stars": "nova parsec star orbit comet planet light dwarf telescope sky".split(),  # noqa: SIM905
    "rivers": "delta meander weir bank flood source stream lake current ford".split(),  # noqa: SIM905
}


def texts(count: int, seed: int = 0) -> tuple[list[str], list[str]]:
    draw = random.Random(seed)
    labels = [draw.choice(sorted(TOPICS)) for _ in range(count)]
    return [" ".join(["please tell me of", *draw.choices(TOPICS[label], k=6)]) for label in labels], labels


def test_texts_of_one_topic_lie_together() -> None:
    said, labels = texts(300)
    vectors = tfidf_svd(said, dims=8)
    assert vectors.shape == (300, 8) and vectors.dtype == np.float32
    assert np.allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-6)
    same = np.equal.outer(labels, labels)
    cosines = vectors @ vectors.T
    assert cosines[same].mean() > cosines[~same].mean() + 0.3


def test_cosines_are_those_of_the_full_matrix_when_nothing_is_cut() -> None:
    """With as many directions as words, an SVD is a rotation."""
    from sklearn.feature_extraction.text import TfidfVectorizer

    said, _ = texts(40)
    full = TfidfVectorizer(sublinear_tf=True, token_pattern=r"\w+").fit_transform(said)
    vectors = tfidf_svd(said, dims=64)
    assert np.abs(vectors @ vectors.T - (full @ full.T).toarray()).max() < 1e-5


def test_equal_input_gives_equal_bytes_on_any_number_of_threads() -> None:
    from threadpoolctl import threadpool_limits

    said, _ = texts(400)
    first = tfidf_svd(said, dims=16, seed=3)
    with threadpool_limits(4):
        assert tfidf_svd(said, dims=16, seed=3).tobytes() == first.tobytes()


@pytest.mark.parametrize("said", [[], [""], ["", "…", "  "], ["one"], ["one", "", "one two"], ["word"] * 5])
def test_small_and_empty_texts(said: list[str]) -> None:
    vectors = tfidf_svd(said, dims=16)
    assert vectors.shape == (len(said), 16) and np.isfinite(vectors).all()
    lengths = np.linalg.norm(vectors, axis=1)
    known = np.array([any(letter.isalnum() for letter in text) for text in said], bool)
    assert np.allclose(lengths, known)


def test_beyond_the_sample_all_rows_are_projected(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(embeddings, "FIT_ROWS", 100)
    said, labels = texts(300)
    vectors = tfidf_svd(said, dims=8)
    assert np.allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-6)
    same = np.equal.outer(labels, labels)
    assert (vectors @ vectors.T)[same].mean() > (vectors @ vectors.T)[~same].mean() + 0.3


class Column:
    """A corpus of one value column."""

    def __init__(self, column: pa.ChunkedArray) -> None:
        self.column = column

    def values(self, columns: Sequence[str]) -> pa.Table:
        return pa.table(dict.fromkeys(columns, self.column))


def test_measured_vectors_are_unit_and_nulls_zeros_in_any_chunks() -> None:
    draw = np.random.default_rng(0)
    halves = draw.normal(size=(10, 5)).astype(np.float16)
    lists: list[Any] = [None if n in (2, 9) else row for n, row in enumerate(halves)]
    kind = pa.list_(pa.float16())
    chunked = pa.chunked_array([pa.array(lists[:3], kind), pa.array([], kind), pa.array(lists[3:], kind)])
    for column in (chunked, pa.chunked_array([pa.array(lists[:1], kind), pa.array(lists, kind).slice(1)])):
        found = embeddings.vectors(Column(column), "m", "prompt")  # type: ignore[arg-type]
        want = halves.astype(np.float32)
        want[[2, 9]] = 0
        want /= np.maximum(np.linalg.norm(want, axis=1, keepdims=True), 1e-9)
        assert found.dtype == np.float32 and np.allclose(found, want, atol=1e-6)
    none = embeddings.vectors(Column(pa.chunked_array([], kind)), "m", "prompt")  # type: ignore[arg-type]
    assert none.shape[0] == 0
    mixed = pa.chunked_array([pa.array([[1.0], [1.0, 2.0]], kind)])
    with pytest.raises(HouseError, match="2 sizes"):
        embeddings.vectors(Column(mixed), "m", "prompt")  # type: ignore[arg-type]
