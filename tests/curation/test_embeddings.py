"""TF-IDF/SVD embeddings: what they promise about shape, length, determinism and meaning."""

import random

import numpy as np
import pytest

from gristmill.curation import embeddings
from gristmill.curation.embeddings import tfidf_svd

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
