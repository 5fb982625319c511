"""Rows of a matrix that a CPU works on at once, so that the tensors of several operations stay in its cache."""

from torch import Tensor

BYTES = 1 << 18  # of one tensor's rows: each of some four of them stays in a core's second cache


def rows_in_cache(matrix: Tensor) -> list[slice]:
    """The rows of `matrix` (N, width), in order, in pieces of BYTES or of one row."""
    step = max(1, BYTES // max(1, matrix.shape[1] * matrix.element_size()))
    return [slice(start, start + step) for start in range(0, matrix.shape[0], step)]
