"""k-means: as good as scikit-learn's, equal bytes on any number of threads, exact on what can be counted by hand."""

import warnings
from collections.abc import Callable

import numpy as np
import pytest

from gristmill.curation.selecting import kmeans as house
from gristmill.curation.selecting.kmeans import Clusters, kmeans, lloyd, means, nearest, one_blas_thread


def blobs(rows: int, dims: int, centres: int, spread: float, seed: int = 0) -> np.ndarray:
    random = np.random.default_rng(seed)
    weights = 1 / np.arange(1, centres + 1)
    label = random.choice(centres, rows, p=weights / weights.sum())
    found = random.standard_normal((centres, dims))[label] + spread * random.standard_normal((rows, dims))
    return np.asarray(found / np.linalg.norm(found, axis=1, keepdims=True), np.float32)


def test_nearest_centres_and_means_equal_plain_numpy() -> None:
    vectors, centres = blobs(1300, 16, 9, 0.5), blobs(7, 16, 7, 0.1, 1)
    gaps = ((vectors[:, None, :].astype(float) - centres[None]) ** 2).sum(axis=2)
    labels, distance = nearest(vectors, centres)
    assert (labels == gaps.argmin(axis=1)).all()
    assert np.abs(distance - gaps.min(axis=1)).max() < 1e-5
    found, counts = means(vectors, labels, 8)
    assert counts.tolist() == np.bincount(labels, minlength=8).tolist() and (found[7] == 0).all()
    for label in range(7):
        assert np.abs(found[label] - vectors[labels == label].mean(axis=0)).max() < 1e-5


@pytest.mark.parametrize(
    ("rows", "dims", "k", "spread"), [(3000, 24, 40, 0.5), (3000, 24, 40, 3.0), (2000, 16, 300, 0.3)]
)
def test_inertia_is_within_two_percent_of_scikit_learn(rows: int, dims: int, k: int, spread: float) -> None:
    from sklearn.cluster import KMeans

    vectors = blobs(rows, dims, k, spread)
    with one_blas_thread(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = KMeans(k, n_init=1, random_state=0).fit(vectors).inertia_
    ours = kmeans(vectors, k)
    true = float(((vectors - ours.centres[ours.labels]).astype(float) ** 2).sum())
    assert len(ours.centres) == k and abs(ours.inertia / true - 1) < 0.01
    assert ours.inertia < 1.02 * theirs


def test_seeds_of_a_sample_serve_all_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    vectors = blobs(4000, 16, 30, 0.4)
    whole = kmeans(vectors, 30)
    monkeypatch.setattr(house, "LEAST", 600)
    monkeypatch.setattr(house, "SMALL", 0)
    sampled = kmeans(vectors, 30)
    assert sampled.inertia < 1.1 * whole.inertia


def same(one: Clusters, other: Clusters) -> bool:
    return (one.labels.tobytes(), one.centres.tobytes(), one.inertia) == (
        other.labels.tobytes(), other.centres.tobytes(), other.inertia)  # fmt: skip


def test_the_number_of_threads_changes_no_byte(monkeypatch: pytest.MonkeyPatch) -> None:
    vectors = blobs(3000, 24, 40, 1.0)
    kinds: list[Callable[[], int]] = [lambda: 1, lambda: 2, lambda: 5]
    found = []
    for processors in kinds:
        monkeypatch.setattr("gristmill.curation.duplicates.shingles.processors", processors)
        found.append(kmeans(vectors, 40))
    assert same(found[0], found[1]) and same(found[0], found[2])
    assert not same(found[0], kmeans(vectors, 40, seed=1))


def test_fewer_distinct_rows_than_clusters() -> None:
    found = kmeans(np.repeat(np.eye(3, 5, dtype=np.float32), 4, axis=0), 8)
    assert found.labels.tolist() == [0] * 4 + [1] * 4 + [2] * 4
    assert (found.centres == np.eye(3, 5)).all() and found.inertia < 1e-6
    assert kmeans(np.zeros((0, 5), np.float32), 3).labels.tolist() == []
    assert kmeans(np.ones((1, 5), np.float32), 3).labels.tolist() == [0]


def test_a_centre_without_rows_moves_to_the_farthest_row() -> None:
    vectors = np.array([[0.0], [0.1], [0.2], [9.0]], np.float32)
    labels, centres, inertia = lloyd(vectors, np.array([[0.1], [-50.0]], np.float32), 10)
    assert labels.tolist() == [0, 0, 0, 1] and abs(inertia - 0.02) < 1e-6
    assert np.allclose(centres, [[0.1], [9.0]])
