"""Lexical diversity of many texts at once, from the hashes of their words."""

import numpy as np
import numpy.typing as npt

from ..duplicates.shingles import Hashes, compiled
from .spans import Ints

THRESHOLD = 0.72  # type-token ratio at which a factor ends (McCarthy and Jarvis, 2010)


def mtld(words: Hashes, offsets: Ints, threshold: float = THRESHOLD) -> npt.NDArray[np.float64]:
    """MTLD of each text r, whose words are `words[offsets[r]:offsets[r + 1]]`; NaN without words."""
    found = np.full(len(offsets) - 1, np.nan)
    most = int(np.diff(offsets).max(initial=0))
    size = 1 << (2 * most + 2).bit_length()
    _mtld(words, offsets, threshold, np.zeros(size, np.uint64), np.full(size, -1, np.int64), found)
    return found


@compiled
def _mtld(words, offsets, threshold, slots, stamps, found):  # type: ignore[no-untyped-def]
    stamp, mask = np.int64(0), np.uint64(len(slots) - 1)
    for row in range(len(found)):
        first, last = offsets[row], offsets[row + 1]
        if first == last:
            continue
        total = 0.0
        for backwards in range(2):
            factors, tokens, types = 0.0, 0, 0
            stamp += 1
            for step in range(last - first):
                word = words[last - 1 - step] if backwards else words[first + step]
                place = np.int64((word ^ (word >> np.uint64(29))) & mask)
                while stamps[place] == stamp and slots[place] != word:
                    place = np.int64(np.uint64(place + 1) & mask)
                tokens += 1
                if stamps[place] != stamp:
                    stamps[place], slots[place] = stamp, word
                    types += 1
                if types / tokens < threshold:
                    factors, tokens, types = factors + 1.0, 0, 0
                    stamp += 1
            if tokens:
                factors += (1.0 - types / tokens) / (1.0 - threshold)
            total += (last - first) / (factors if factors > 0 else 1.0)
        found[row] = total / 2.0
