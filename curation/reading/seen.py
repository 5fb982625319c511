"""How often each key came before, for millions of keys: sorted runs that are merged, 12 bytes a distinct key."""

import numpy as np
import numpy.typing as npt

Keys = npt.NDArray[np.uint64]
Counts = npt.NDArray[np.int64]


class Seen:
    """A multiset of 64-bit keys that tells of each new key how many equal ones it has met."""

    def __init__(self) -> None:
        self.runs: list[tuple[Keys, npt.NDArray[np.uint32]]] = []  # distinct keys ascending, how often; shrinking runs

    def add(self, keys: Keys) -> Counts:
        """For each key the number of equal keys added before it, in earlier calls and in this one."""
        order = np.argsort(keys, kind="stable")
        ordered = keys[order]
        new = np.r_[True, ordered[1:] != ordered[:-1]] if len(keys) else np.zeros(0, np.bool_)
        first = np.flatnonzero(new)
        distinct, sizes = ordered[first], np.diff(np.r_[first, len(keys)])
        before = np.zeros(len(distinct), np.int64)
        for known, counts in self.runs:
            at = np.minimum(np.searchsorted(known, distinct), len(known) - 1)
            before += np.where(known[at] == distinct, counts[at], 0)
        found = np.empty(len(keys), np.int64)
        found[order] = np.arange(len(keys)) - np.repeat(first, sizes) + np.repeat(before, sizes)
        if len(distinct):
            self.runs.append((distinct, sizes.astype(np.uint32)))
            while len(self.runs) > 1 and len(self.runs[-2][0]) <= 2 * len(self.runs[-1][0]):
                self.runs.append(_merged(self.runs.pop(-2), self.runs.pop()))
        return found


def _merged(
    left: tuple[Keys, npt.NDArray[np.uint32]], right: tuple[Keys, npt.NDArray[np.uint32]]
) -> tuple[Keys, npt.NDArray[np.uint32]]:
    keys, counts = np.concatenate([left[0], right[0]]), np.concatenate([left[1], right[1]])
    order = np.argsort(keys, kind="stable")
    keys, counts = keys[order], counts[order]
    first = np.flatnonzero(np.r_[True, keys[1:] != keys[:-1]])
    return keys[first], np.add.reduceat(counts, first, dtype=np.uint32)
