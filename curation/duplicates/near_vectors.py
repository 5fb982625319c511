"""Pairs of near vectors: exact within clusters, by blocked matrix products that give equal bytes on any number of
threads."""

import numpy as np

from ..selecting.kmeans import Vectors, one_blas_thread
from ..text.spans import Ints
from .groups import groups
from .minhash import Pairs, Reals
from .shingles import in_threads

BLOCK = 512  # rows of one product
WIDE = 8192  # columns of one: 16 MB of cosines


def near_vectors(vectors: Vectors, labels: Ints, floor: float) -> Pairs:
    """Pairs of distinct vectors (of unit length) of one cluster whose cosine is at least `floor`; equal vectors are one
    text of any cluster. A vector of zeros is near to none. Hand rows over in an order of their own (of row_id)."""
    known = vectors.any(axis=1)
    group = np.full(len(vectors), -1, np.int32)
    group[known] = groups(_digests(vectors[known]))
    first = np.full(int(group.max(initial=-1)) + 1, len(vectors), np.int64)
    np.minimum.at(first, group[known], np.flatnonzero(known))
    tasks = []
    for members in _members(labels[first]):
        for row in range(0, len(members), BLOCK):
            tasks += [(members, row, column) for column in range(row, len(members), WIDE)]

    def compare(task: tuple[Ints, int, int]) -> tuple[Ints, Ints, Reals]:
        members, row, column = task
        one, two = members[row : row + BLOCK], members[column : column + WIDE]
        cosines = vectors[first[one]] @ vectors[first[two]].T
        a, b = np.nonzero(cosines >= floor)
        later = column + b > row + a
        a, b = a[later], b[later]
        return one[a], two[b], cosines[a, b].astype(np.float64)

    with one_blas_thread():
        found = [(np.zeros(0, np.int64), np.zeros(0, np.int64), np.zeros(0)), *in_threads(compare, tasks)]
    left, right, cosine = (np.concatenate(column) for column in zip(*found, strict=True))
    left, right = np.minimum(left, right), np.maximum(left, right)
    order = np.lexsort((right, left))
    none = np.zeros(0, np.int32)
    return Pairs(
        group, left[order].astype(np.int32), right[order].astype(np.int32), np.minimum(cosine[order], 1.0),
        np.ones(len(order), np.bool_), none, none,
    )  # fmt: skip


def _members(labels: Ints) -> list[Ints]:
    """The places of each cluster's members, ascending."""
    order = np.argsort(labels, kind="stable")
    return np.split(order, np.flatnonzero(np.diff(labels[order])) + 1) if len(order) else []


def _digests(vectors: Vectors) -> np.ndarray:
    """128 bits of each row, equal for equal rows: sums of its bits by random odd numbers."""
    random = np.random.default_rng(0)
    odd = random.integers(0, 2**63, (vectors.shape[1], 2), np.uint64) * np.uint64(2) + np.uint64(1)
    found = np.zeros((len(vectors), 2), np.uint64)
    for start in range(0, len(vectors), 8192):
        bits = np.ascontiguousarray(vectors[start : start + 8192] + np.float32(0)).view(np.uint32).astype(np.uint64)
        bits ^= bits >> np.uint64(15)
        found[start : start + 8192] = bits @ odd
    return found
