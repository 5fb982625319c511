"""k-means over float32 vectors by blocked matrix products: equal bytes on any number of threads.

Lloyd's algorithm from greedy k-means++ seeds (Arthur and Vassilvitskii 2007), drawn and first refined on a sample. Work
is cut into blocks of fixed size, each multiplied by one BLAS thread, and sums run in the order of the rows: threads
decide who computes a block, never what comes out.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from threadpoolctl import threadpool_limits

from ..duplicates.shingles import in_threads
from ..text.spans import Ints

Vectors = npt.NDArray[np.float32]
BLOCK = 512  # rows a product: with 1,024 centres 2 MB of scores, which stay in the cache
SAMPLE = 20  # rows a centre, and at least LEAST in all, that seeds are drawn from and refined on
LEAST = 20_000
BATCH = 16  # seeds drawn at once
ROUNDS = 15  # of Lloyd over all rows: the last ones gain less than a thousandth each
SMALL = 2**22  # rows times centres from which on rounds and restarts cost more than a blink


@dataclass(frozen=True)
class Clusters:
    """labels: cluster of each row, numbered without gaps in the order of their first rows. centres: their means.
    inertia: sum of squared distances of the rows to their centres."""

    labels: Ints
    centres: Vectors
    inertia: float


def kmeans(vectors: Vectors, k: int, seed: int = 0, rounds: int = ROUNDS) -> Clusters:
    """At most `k` clusters of the rows of `vectors`, fewer where fewer rows differ. Small problems get three starts and
    as many rounds as they need. Hand rows over in an order of their own (of row_id): seeds follow the order."""
    vectors = np.ascontiguousarray(vectors, np.float32)
    if not len(vectors):
        return Clusters(np.zeros(0, np.int64), vectors, 0.0)
    small = len(vectors) * k <= SMALL
    with one_blas_thread():
        starts = [_start(vectors, k, seed + 1_000_003 * n) for n in range(3 if small else 1)]
        found = [lloyd(vectors, centres, 100 if small else rounds) for centres in starts]
    labels, centres, inertia = min(found, key=lambda each: each[2])
    _, first, inverse = np.unique(labels, return_index=True, return_inverse=True)
    order = np.argsort(first)
    place = np.empty(len(order), np.int64)
    place[order] = np.arange(len(order))
    return Clusters(place[inverse], centres[np.unique(labels)[order]], inertia)


@contextmanager
def one_blas_thread() -> Iterator[None]:
    """Inside, each product runs on the thread that asks for it: its result does not depend on how many there are."""
    with threadpool_limits(1):
        yield


def blocks(rows: int, size: int = BLOCK) -> list[slice]:
    return [slice(start, min(start + size, rows)) for start in range(0, rows, size)]


def in_blocks(work: Callable[[slice], None], rows: int, size: int = BLOCK) -> None:
    """`work` on each block of rows, in threads."""
    in_threads(work, blocks(rows, size))


def nearest(vectors: Vectors, centres: Vectors) -> tuple[Ints, Vectors]:
    """Index of the nearest centre of each row (the lower of equals), and the squared distance to it."""
    columns, half = np.ascontiguousarray(centres.T), (squares(centres) / 2).astype(np.float32)
    labels, score = np.empty(len(vectors), np.int64), np.empty(len(vectors), np.float32)

    def block(rows: slice) -> None:
        scores = vectors[rows] @ columns
        scores -= half
        labels[rows] = best = scores.argmax(axis=1)
        score[rows] = np.take_along_axis(scores, best[:, None], axis=1)[:, 0]

    in_blocks(block, len(vectors))
    return labels, np.maximum(squares(vectors) - 2 * score, 0).astype(np.float32)


def squares(vectors: Vectors) -> Vectors:
    """Squared length of each row."""
    found: Vectors = np.einsum("ij,ij->i", vectors, vectors)
    return found


def means(vectors: Vectors, labels: Ints, k: int) -> tuple[Vectors, Ints]:
    """Mean of each cluster's rows (zeros for an empty one) and its number of rows."""
    from scipy.sparse import csr_matrix

    counts = np.bincount(labels, minlength=k)
    order = np.argsort(labels, kind="stable")
    offsets = np.r_[0, np.cumsum(counts)]
    member = csr_matrix((np.ones(len(labels), np.float32), order, offsets), shape=(k, len(vectors)))
    return np.asarray(member @ vectors / np.maximum(counts, 1)[:, None], np.float32), counts


def lloyd(vectors: Vectors, centres: Vectors, rounds: int) -> tuple[Ints, Vectors, float]:
    """(labels, centres, inertia) after at most `rounds` rounds; ends where a round gains less than 1e-4 of the inertia.
    A centre without rows moves to the row that is farthest from its own."""
    before = np.inf
    for left in range(rounds, -1, -1):
        labels, distance = nearest(vectors, centres)
        inertia = float(distance.sum(dtype=np.float64))
        if left == 0 or before - inertia <= 1e-4 * inertia:
            break
        before = inertia
        moved, counts = means(vectors, labels, len(centres))
        empty = np.flatnonzero(counts == 0)
        if len(empty):
            far = np.argsort(-distance, kind="stable")[: len(empty)]
            moved[empty] = vectors[far]
            before = np.inf if distance[far[0]] > 1e-6 else before
        centres = moved
    return labels, centres, inertia


def _start(vectors: Vectors, k: int, seed: int) -> Vectors:
    """Seeds, refined by a few rounds on the sample that they were drawn from."""
    random = np.random.default_rng(seed)
    size = max(SAMPLE * k, LEAST)
    if len(vectors) <= size:
        return seeds(vectors, k, random)
    sample = vectors[np.sort(random.choice(len(vectors), size, replace=False))]
    return lloyd(sample, seeds(sample, k, random), 5)[1]


def seeds(vectors: Vectors, k: int, random: np.random.Generator) -> Vectors:
    """Rows drawn by greedy k-means++: of a few rows drawn by squared distance to the nearest seed so far, the one that
    lowers their sum most. Draws come in batches of an eighth of the seeds so far, at most BATCH, so that distances are
    products of matrices. Fewer than `k` where the rest coincides with seeds."""
    size, tries = squares(vectors), 2 + int(np.log(k))
    chosen = [int(random.integers(len(vectors)))]
    distance = _distances(vectors, size, np.array(chosen))[0]
    least = 1e-6 * max(float(size.mean()), 1e-30)  # rounding of float32 products
    while len(chosen) < min(k, len(vectors)):
        total = np.cumsum(np.where(distance > least, distance, 0), dtype=np.float64)
        if not total[-1] > 0:
            break
        batch = min(max(len(chosen) // 8, 1), BATCH, k - len(chosen))
        drawn = np.searchsorted(total, random.random(batch * tries) * total[-1], side="right")
        drawn = np.minimum(drawn, np.searchsorted(total, total[-1]))
        found = _distances(vectors, size, drawn)
        for start in range(0, len(drawn), tries):
            mine = start + np.flatnonzero(distance[drawn[start : start + tries]] > least)
            if len(mine):
                lowered = np.minimum(found[mine], distance)
                best = int(lowered.sum(axis=1).argmin())
                chosen.append(int(drawn[mine[best]]))
                distance = lowered[best]
    return vectors[chosen]


def _distances(vectors: Vectors, size: Vectors, rows: Ints) -> Vectors:
    """Squared distances from `rows` to all, shape (len(rows), len(vectors))."""
    found, picked = np.empty((len(rows), len(vectors)), np.float32), -2 * vectors[rows]

    def block(there: slice) -> None:
        part = picked @ vectors[there].T
        part += size[there]
        part += size[rows][:, None]
        np.maximum(part, 0, out=found[:, there])

    in_blocks(block, len(vectors), 4096)
    return found
