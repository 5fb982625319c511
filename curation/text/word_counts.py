r"""How many words (`text.words`) a string has, counted in Arrow's buffers.

A string of which every code point is its own NFKC form and cannot combine with a neighbour has as many words as it has
runs of word characters; others (decomposed accents, ligatures, Hangul letters: rare) are counted in Python.
"""

import unicodedata
from functools import lru_cache

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from ..duplicates.shingles import LAST_LETTER, compiled, in_threads
from .spans import Ints, Spans, string_spans
from .view import words

_LETTER, _UNSURE = 1, 2


def word_counts(strings: pa.Array, threads: int = 0) -> tuple[Ints, Ints]:
    """Words and characters (code points) of each string (large_string or string); null has none."""
    said = _spans(strings)
    counts, characters, unsure = (
        np.zeros(len(said), np.int64),
        np.zeros(len(said), np.int64),
        np.zeros(len(said), np.bool_),
    )
    table = kinds()

    def block(rows: tuple[int, int]) -> None:
        part = slice(*rows)
        _count(said.text, said.starts[part], said.ends[part], table, counts[part], characters[part], unsure[part])

    in_threads(block, said.blocks(), threads)
    for row in np.flatnonzero(unsure).tolist():
        counts[row] = len(words(strings[row].as_py()))
    return counts, characters


def _spans(strings: pa.Array) -> Spans:
    if pa.types.is_string(strings.type):
        return string_spans(strings)
    _, offsets, data = strings.buffers()
    size = len(strings)
    ends = np.zeros(1, np.int64) if offsets is None else np.frombuffer(offsets, np.int64)
    ends = ends[strings.offset : strings.offset + size + 1]
    text = np.zeros(0, np.uint8) if data is None else np.frombuffer(data, np.uint8)
    none = np.zeros((size, 6), np.int64)
    starts, stops = ends[:size], ends[1 : size + 1]
    if strings.null_count:
        stops = np.where(strings.is_valid().to_numpy(zero_copy_only=False), stops, starts)
    return Spans(text, starts, stops, none, stops - starts)


@lru_cache
def kinds() -> npt.NDArray[np.uint8]:
    r"""Of each code point up to the last letter: _LETTER where \w, 0 where not, _UNSURE where NFKC or case folding may
    change that beside a neighbour. Built in about 0.3 s."""
    table = np.zeros(LAST_LETTER + 1, np.uint8)
    seconds = set()
    for code in range(LAST_LETTER + 1):
        letter = chr(code)
        parts = unicodedata.decomposition(letter).split()
        if len(parts) == 2 and not parts[0].startswith("<"):
            seconds.add(int(parts[1], 16))
        folded = letter.casefold()
        of_word = {piece.isalnum() or piece == "_" for piece in folded}
        moved = code > 127 and unicodedata.normalize("NFKC", letter) != letter
        if moved or unicodedata.combining(letter) or len(of_word) > 1 or 0x1160 <= code <= 0x11FF:
            table[code] = _UNSURE
        elif of_word == {True}:
            table[code] = _LETTER
    table[list(seconds)] = _UNSURE
    return table


@compiled
def _count(text, starts, ends, table, counts, characters, unsure):  # type: ignore[no-untyped-def]
    """Runs of letters and code points of each text[start:end]."""
    for row in range(starts.shape[0]):
        found, size, inside = 0, 0, False
        at, end = np.uint64(starts[row]), np.uint64(ends[row])
        while at < end:
            byte = np.uint32(text[at])
            size += 1
            code, width = byte, np.uint64(1)
            if byte >= 0x80:
                width = np.uint64(2 if byte < 0xE0 else 3 if byte < 0xF0 else 4)
                code = byte & np.uint32(0x7F >> width)
                for k in range(np.uint64(1), width):
                    code = np.uint32(code << np.uint32(6)) | np.uint32(text[at + k] & 0x3F)
            kind = table[code] if code < table.size else 0
            at += width
            unsure[row] |= kind == 2
            found += (kind == 1) and not inside
            inside = kind == 1
        counts[row], characters[row] = found, size
