"""Targets that take turns: each takes its nearest free row, until a budget is spent."""

from dataclasses import dataclass

import numpy as np

from ..duplicates.shingles import in_threads
from ..text.spans import Ints
from .kmeans import Vectors, blocks, one_blas_thread
from .selection import Bools, Hashes, Reals

BLOCK = 4096  # rows of one product
SPARE = 8  # times the rows that a target would take if all took as many


@dataclass(frozen=True)
class Taken:
    """rows: those taken, in the order of taking. target: of each row of the pool the target that took it, else the
    nearest one; similarity: the cosine with that."""

    rows: Ints
    target: Ints
    similarity: Reals


def round_robin(points: Vectors, targets: Vectors, costs: Ints, budget: int, open_rows: Bools, ties: Hashes) -> Taken:
    """The targets in turn take their nearest open row that is free and costs no more than what is left of `budget`;
    equal similarities go by `ties`. Memory: some 12 bytes for each entry of the targets' lists, which are as long as
    the budget asks for."""
    with one_blas_thread():
        best, similarity = _nearest(points, targets)
        length = min(len(points), SPARE * (budget // len(targets) + 1))
        while True:
            lists = _lists(points, targets, open_rows, ties, length)
            rows, by, enough = _turns(lists, costs, budget, open_rows, len(lists[0][0]) == int(open_rows.sum()))
            if enough:
                break
            length = min(len(points), 4 * length)
    target, said = best.copy(), similarity.astype(np.float64)
    target[rows] = by
    cosine = {number: dict(zip(*map(np.ndarray.tolist, lists[number]), strict=True)) for number in set(by.tolist())}
    said[rows] = [cosine[number][row] for row, number in zip(rows.tolist(), by.tolist(), strict=True)]
    return Taken(rows, target, said)


def _nearest(points: Vectors, targets: Vectors) -> tuple[Ints, Vectors]:
    """Nearest target of each row (the first of equals), and the cosine with it."""
    best, similarity = np.zeros(len(points), np.int64), np.zeros(len(points), np.float32)

    def block(part: slice) -> None:
        cosines = points[part] @ targets.T
        best[part], similarity[part] = cosines.argmax(axis=1), cosines.max(axis=1)

    in_threads(block, blocks(len(points), BLOCK))
    return best, similarity


def _lists(
    points: Vectors, targets: Vectors, open_rows: Bools, ties: Hashes, length: int
) -> list[tuple[Ints, Vectors]]:
    """Of each target the `length` nearest open rows, the nearest first, and their cosines."""
    parts = blocks(len(points), BLOCK)

    def some(those: slice) -> list[tuple[Ints, Vectors]]:
        found = [(np.zeros(0, np.int64), np.zeros(0, np.float32)) for _ in range(*those.indices(len(targets)))]
        for part in parts:
            rows = part.start + np.flatnonzero(open_rows[part])
            cosines = (points[part] @ targets[those].T)[rows - part.start].T
            for number, (known, near) in enumerate(found):
                worth = cosines[number] >= near[-1] if len(known) == length else np.ones(len(rows), np.bool_)
                every, all_near = np.r_[known, rows[worth]], np.r_[near, cosines[number][worth]]
                order = np.lexsort((ties[every], -all_near))[:length]
                found[number] = every[order], all_near[order]
        return found

    return [one for group in in_threads(some, blocks(len(targets), 64)) for one in group]


def _turns(
    lists: list[tuple[Ints, Vectors]], costs: Ints, budget: int, open_rows: Bools, whole: bool
) -> tuple[Ints, Ints, bool]:
    """(rows in the order of taking, who took each, whether the lists were long enough). whole: they hold all rows."""
    free, at = open_rows.copy(), [0] * len(lists)
    orders = [rows.tolist() for rows, _ in lists]
    rows: list[int] = []
    by: list[int] = []
    left, cheapest = budget, int(costs[open_rows].min(initial=np.iinfo(np.int64).max))
    while left >= cheapest:
        before = len(rows)
        for number, order in enumerate(orders):
            place = at[number]
            while place < len(order) and not (free[order[place]] and costs[order[place]] <= left):
                place += 1
            at[number] = place + 1
            if place >= len(order):
                if whole:
                    continue
                return np.array(rows, np.int64), np.array(by, np.int64), False
            rows.append(order[place])
            by.append(number)
            free[order[place]] = False
            left -= int(costs[order[place]])
        if len(rows) == before:
            break
    return np.array(rows, np.int64), np.array(by, np.int64), True
