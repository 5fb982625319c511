"""Rows that stand for all rows: k-centre, facility location, and score-then-distance, over float32 vectors.

Each function takes vectors in an order in which ties go to the lower index, so that what it picks depends on that order
alone, and costs with a budget: a row that costs more than what is left is passed over. Nothing depends on the number of
threads.
"""

import heapq
from dataclasses import dataclass

import numpy as np

from ..duplicates.shingles import compiled, in_threads
from ..text.spans import Ints
from .kmeans import BLOCK, Vectors, blocks, kmeans, nearest, one_blas_thread, squares

NEAR = 4096  # rows looked at between two passes over all: 6 MB at 384 dimensions
SAME = 1e-6  # squared distance of unit vectors below which float32 products cannot tell them apart
EXACT = 8192  # rows up to which every pair is compared
CELL, PROBES = 512, 12  # rows of a cell, cells searched for neighbours beyond that


@dataclass(frozen=True)
class Picks:
    """chosen: rows in the order in which they were picked, with the `gain` of each. value, other: of every row, its
    distance to or similarity with the closest picked row, and which that is (-1: not compared with any)."""

    chosen: Ints
    gain: Vectors
    value: Vectors
    other: Ints


def farthest_first(vectors: Vectors, costs: Ints, budget: int, near: int = NEAR) -> Picks:
    """Greedy k-centre: first row 0, then always the row farthest from all picked ones; gains and values are distances.

    Exact, though only the `near` rows that were farthest at the last pass are compared with each pick: while the
    farthest of them lies beyond what any other row could reach, it is the farthest of all. Then a pass compares all
    rows with the picks since the last one, as a product of matrices."""
    size = squares(vectors)
    distance, other = np.full(len(vectors), np.inf, np.float32), np.full(len(vectors), -1, np.int64)
    free, left = np.ones(len(vectors), np.bool_), budget
    chosen: list[int] = []
    gain: list[float] = []
    with one_blas_thread():
        while left > 0 and (free & (costs <= left)).any():
            open_rows = np.flatnonzero(free & (costs <= left))
            if chosen and distance[open_rows].max() <= SAME:  # the rest coincides with picks
                picked = _prefix(open_rows, costs, left)
                gain += [0.0] * len(picked)
            else:
                picked, gaps = _farthest_of(vectors, size, distance, costs, left, open_rows, near)
                gain += gaps
            chosen += picked
            free[picked] = False
            left -= int(costs[picked].sum())
            label, found = nearest(vectors, vectors[picked])
            closer = np.flatnonzero(found < distance)
            distance[closer], other[closer] = found[closer], np.array(picked, np.int64)[label[closer]]
            distance[picked], other[picked] = 0, picked
    distance[distance <= SAME] = 0
    radius = np.sqrt(np.array(gain, np.float32))
    return Picks(np.array(chosen, np.int64), radius, np.sqrt(distance), other)


def _farthest_of(
    vectors: Vectors, size: Vectors, distance: Vectors, costs: Ints, left: int, rows: Ints, near: int
) -> tuple[list[int], list[float]]:
    """The next picks that are certain, and their squared distances at that time. `rows`: those that may be picked."""
    if np.isinf(distance[rows[0]]):
        return [int(rows[0])], [np.inf]
    far = distance[rows]
    limit = -1.0  # no row outside reaches beyond
    if len(rows) > near:
        limit = float(np.partition(far, len(far) - near)[len(far) - near])
        equal = np.flatnonzero(far == limit)[: near - int((far > limit).sum())]
        mask = far > limit
        mask[equal] = True
        rows, far = rows[mask], far[mask]
    block, lengths, cost = vectors[rows], size[rows], costs[rows]
    picked: list[int] = []
    gaps: list[float] = []
    while True:
        best = int(far.argmax())
        if far[best] <= SAME or (picked and far[best] <= limit) or len(picked) == BLOCK:
            return picked, gaps
        picked.append(int(rows[best]))
        gaps.append(float(far[best]))
        left -= int(cost[best])
        gap = block @ block[best]
        gap *= -2
        gap += lengths
        gap += lengths[best]
        np.minimum(far, gap, out=far)
        far[best] = -1
        far[cost > left] = -1


def _prefix(rows: Ints, costs: Ints, left: int) -> list[int]:
    picked = []
    for row in rows.tolist():
        if costs[row] <= left:
            picked.append(row)
            left -= int(costs[row])
    return picked


def diverse(vectors: Vectors, costs: Ints, budget: int, threshold: float) -> Picks:
    """Down the rows, best first: a row is picked where its cosine with every picked row is below `threshold`. Values
    are the greatest of those cosines, of unit vectors (-1 before the first pick); gains are 1 less the same. Rows that
    come when the budget is spent are compared with none."""
    value, other = np.full(len(vectors), -1, np.float32), np.full(len(vectors), -1, np.int64)
    picked = np.empty((min(len(vectors), 1024), vectors.shape[1]), np.float32)
    chosen: list[int] = []
    with one_blas_thread():
        for rows in blocks(len(vectors)):
            if budget <= 0:
                break
            best, who = _most_similar(vectors[rows], picked[: len(chosen)])
            found = np.array(chosen, np.int64)
            where = np.where(who < 0, -1, found[who] if len(found) else -1)
            within = vectors[rows] @ vectors[rows].T
            for i in range(len(best)):
                if best[i] < threshold and costs[rows.start + i] <= budget:
                    chosen.append(rows.start + i)
                    budget -= int(costs[rows.start + i])
                    closer = i + 1 + np.flatnonzero(within[i, i + 1 :] > best[i + 1 :])
                    best[closer], where[closer] = within[i, closer], rows.start + i
            if len(chosen) > len(picked):
                grown = np.empty((2 * len(chosen), vectors.shape[1]), np.float32)
                grown[: len(found)] = picked[: len(found)]
                picked = grown
            picked[len(found) : len(chosen)] = vectors[chosen[len(found) :]]
            value[rows], other[rows] = best, where
    return Picks(np.array(chosen, np.int64), 1 - value[chosen], value, other)


def _most_similar(rows: Vectors, picked: Vectors) -> tuple[Vectors, Ints]:
    """Greatest cosine with a picked row, and which; -1 and -1 where none is picked."""

    def part(there: slice) -> tuple[Vectors, Ints]:
        found = rows @ picked[there].T
        who = found.argmax(axis=1)
        return np.take_along_axis(found, who[:, None], axis=1)[:, 0], who + there.start

    best, other = np.full(len(rows), -1, np.float32), np.full(len(rows), -1, np.int64)
    for found, who in in_threads(part, blocks(len(picked), 2048)):
        closer = found > best
        best[closer], other[closer] = found[closer], who[closer]
    return best, other


def facility_location(vectors: Vectors, costs: Ints, budget: int, count: int = 64) -> Picks:
    """Lazy greedy facility location: always the row that adds most to the sum, over all rows, of the cosine (at least
    0) with the most similar picked row. Of each row only its `count` nearest neighbours are counted (see
    `neighbours`). Values are those cosines (0 where no neighbour was picked)."""
    from scipy.sparse import csr_matrix

    indices, similar = neighbours(vectors, count)
    starts = np.arange(0, indices.size + 1, indices.shape[1])
    graph = csr_matrix((similar.reshape(-1), indices.reshape(-1), starts), shape=(len(vectors), len(vectors))).tocsc()
    order, gain, value, other = _lazy_greedy(
        graph.indptr.astype(np.int64), graph.indices.astype(np.int64), graph.data, costs, budget
    )
    return Picks(order, gain, value, other)


def neighbours(vectors: Vectors, count: int) -> tuple[Ints, Vectors]:
    """The `count` rows of greatest cosine of each row (itself among them), and the cosines, at least 0; both of shape
    (rows, count). Exact up to EXACT rows; beyond, the best within the row's own k-means cell and the cells whose
    centres are nearest to it, PROBES in all."""
    count = min(count, len(vectors))
    indices, similar = np.empty((len(vectors), count), np.int64), np.empty((len(vectors), count), np.float32)
    if len(vectors) <= EXACT:
        cells, lists = [np.arange(len(vectors))], [np.arange(len(vectors))]
    else:
        found = kmeans(vectors, -(-len(vectors) // CELL), rounds=4)
        order = np.argsort(found.labels, kind="stable")
        cells = np.split(order, np.cumsum(np.bincount(found.labels))[:-1])
        size = squares(found.centres)
        gaps = size[:, None] + size - 2 * found.centres @ found.centres.T
        np.fill_diagonal(gaps, -1)
        lists = [np.concatenate([cells[c] for c in np.argsort(row, kind="stable")[:PROBES]]) for row in gaps]

    def cell(number: int) -> None:
        candidates = vectors[lists[number]]
        for part in blocks(len(cells[number])):
            rows = cells[number][part]
            cosines = vectors[rows] @ candidates.T
            width = min(count, cosines.shape[1])
            best = np.argpartition(-cosines, width - 1, axis=1)[:, :width]
            indices[rows], similar[rows] = rows[:, None], 0  # a list that falls short is filled with nothing
            indices[rows, :width] = lists[number][best]
            similar[rows, :width] = np.maximum(np.take_along_axis(cosines, best, axis=1), 0)

    with one_blas_thread():
        in_threads(cell, list(range(len(cells))))
    return indices, similar


@compiled
def _lazy_greedy(starts, rows, similar, costs, budget):  # type: ignore[no-untyped-def]
    """Picks by greatest gain, gains being recomputed only at the top of the heap: sums of terms that only shrink, added
    in the same order, never grow, so that a stale gain is an upper bound to the last bit."""
    size = len(costs)
    value, other = np.zeros(size, np.float32), np.full(size, -1, np.int64)
    chosen, gains = np.empty(size, np.int64), np.empty(size, np.float32)
    heap = [(0.0, 0) for _ in range(size)]
    for row in range(size):
        total = 0.0
        for at in range(starts[row], starts[row + 1]):
            total += similar[at]
        heap[row] = (-total, row)
    heapq.heapify(heap)
    picked = 0
    while len(heap) > 0 and budget > 0:
        row = heapq.heappop(heap)[1]
        if costs[row] > budget:
            continue
        total = 0.0
        for at in range(starts[row], starts[row + 1]):
            total += max(similar[at] - value[rows[at]], np.float32(0.0))
        if len(heap) > 0 and (-total, row) > heap[0]:
            heapq.heappush(heap, (-total, row))
            continue
        for at in range(starts[row], starts[row + 1]):
            if similar[at] > value[rows[at]]:
                value[rows[at]], other[rows[at]] = similar[at], row
        chosen[picked], gains[picked] = row, total
        picked += 1
        budget -= costs[row]
    return chosen[:picked].copy(), gains[:picked].copy(), value, other
