"""ROUGE-L between short texts, and the texts so far that a new one is too like."""

import re
import unicodedata
from array import array
from collections.abc import Iterable, Sequence

import numpy as np

from .view import words

_CHARACTERS = "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff"  # kana and han: written without spaces, each counts as a word
_PIECE = re.compile(rf"[{_CHARACTERS}]|[^\W{_CHARACTERS}]+")


def pieces(text: str) -> list[str]:
    """The text's words, case-folded; of scripts written without spaces each character."""
    return words(text) if text.isascii() else _PIECE.findall(unicodedata.normalize("NFKC", text).casefold())


def common(one: Sequence[str], other: Sequence[str]) -> int:
    """Length of the longest common subsequence: one row of the table as the bits of an integer (Hyyrö, 2004)."""
    places: dict[str, int] = {}
    for place, word in enumerate(one):
        places[word] = places.get(word, 0) | 1 << place
    whole = (1 << len(one)) - 1
    row = whole
    for word in other:
        met = row & places.get(word, 0)
        row = ((row + met) | (row - met)) & whole
    return len(one) - row.bit_count()


def rouge_l(one: str, other: str) -> float:
    """ROUGE-L F1: twice the longest common subsequence of words, over the words of both."""
    left, right = pieces(one), pieces(other)
    return 2 * common(left, right) / (len(left) + len(right)) if left and right else 0.0


class Alike:
    """Texts so far, and which of them is most like a new one by ROUGE-L, where it is at least `limit`.

    A longest common subsequence has at most as many words as the two texts share, counted with their repetitions: the
    n-th time of a word in a text is a feature, an index of features counts what a new text shares with all others, and
    only those that this bound leaves are compared exactly."""

    def __init__(self, limit: float, texts: Iterable[str] = ()) -> None:
        self.limit = limit
        self._said: list[list[str]] = []
        self._lengths = array("q")
        self._found: dict[tuple[str, int], array[int]] = {}  # feature -> places of the texts that have it
        for text in texts:
            self.add(text)

    def __len__(self) -> int:
        return len(self._said)

    def add(self, text: str) -> None:
        said = pieces(text)
        for feature in _features(said):
            self._found.setdefault(feature, array("q")).append(len(self._said))
        self._said.append(said)
        self._lengths.append(len(said))

    def nearest(self, text: str) -> tuple[float, int] | None:
        """(ROUGE-L, place) of the text most like this one, the first of equals; None where all are below `limit`."""
        said = pieces(text)
        lists = [np.frombuffer(found, np.int64) for feature in _features(said) if (found := self._found.get(feature))]
        if not lists:
            return None
        shared = np.bincount(np.concatenate(lists), minlength=len(self))
        bound = 2 * shared / (np.frombuffer(self._lengths, np.int64) + len(said))
        best: tuple[float, int] | None = None
        for place in np.flatnonzero((bound >= self.limit) & (shared > 0)).tolist():
            if best is not None and bound[place] <= best[0]:
                continue
            other = self._said[place]
            score = 2 * common(said, other) / (len(said) + len(other))
            if score >= self.limit and (best is None or score > best[0]):
                best = score, place
        return best


def _features(said: Sequence[str]) -> list[tuple[str, int]]:
    times: dict[str, int] = {}
    features = []
    for word in said:
        times[word] = time = times.get(word, 0) + 1
        features.append((word, time))
    return features
