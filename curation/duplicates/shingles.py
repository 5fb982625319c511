"""Word n-gram shingles of rows as 64-bit hashes, by compiled kernels that read Arrow's buffers.

Words are those of `text.words` with two differences. NFKC and case folding are applied to each code point by itself, so
that a letter followed by a combining accent is not composed. And each letter of a script that is written without spaces
(Han, kana, Bopomofo, Yi, Thai, Lao, Tibetan, Myanmar, Khmer) is a word of its own.
"""

import unicodedata
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeVar

import numba
import numpy as np
import numpy.typing as npt
import pyarrow as pa

from ..pool import processors
from ..text.spans import Ints, Spans, Units, spans, turn_spans
from ..text.view import VIEW_COLUMNS
from .spill import Spool

Hashes = npt.NDArray[np.uint64]
Item = TypeVar("Item")
Result = TypeVar("Result")

SOLO, SEVERAL = 1 << 31, 1 << 30  # flags of a folding-table entry
LAST_LETTER = 0x323AF  # no letter or digit lies above (Unicode 14 to 16)
SPACELESS = (
    (0x0E00, 0x0FFF),  # Thai, Lao, Tibetan
    (0x1000, 0x109F),  # Myanmar
    (0x1780, 0x17FF),  # Khmer
    (0x3005, 0x3007),
    (0x3021, 0x312F),  # kana, Bopomofo
    (0x31A0, 0x31FF),
    (0x3400, 0x4DBF),
    (0x4E00, 0xA4CF),  # Han, Yi
    (0xF900, 0xFAFF),
    (0x1AFF0, 0x1B2FF),
    (0x20000, LAST_LETTER),
)
_FNV_START, _FNV = np.uint64(0xCBF29CE484222325), np.uint64(0x100000001B3)
_MIX_1, _MIX_2, _33 = np.uint64(0xFF51AFD7ED558CCD), np.uint64(0xC4CEB9FE1A85EC53), np.uint64(33)
_0, _1 = np.uint32(0), np.uint64(1)
_SOLO, _SEVERAL = np.uint32(SOLO), np.uint32(SEVERAL)


@dataclass(frozen=True)
class Shingles:
    """Unit u has the shingles `hashes[offsets[u]:offsets[u + 1]]`, in text order, repeats included. `sequence`: a hash
    of them all; `words`: words of each unit. A unit is a row, or a turn: then `row` says of which row."""

    hashes: Hashes
    offsets: Ints
    sequence: Hashes
    words: npt.NDArray[np.int32]
    row: npt.NDArray[np.int32] | None = None

    def __len__(self) -> int:
        return len(self.words)


def shingle_sets(
    tables: pa.Table | Iterable[pa.Table],
    units: Units,
    ngram: int,
    chars: int | None = None,
    least: int = 0,
    scratch: Path | None = None,
    threads: int = 0,
) -> Shingles:
    """Shingles of all rows of `tables` (schema ROW, at least VIEW_COLUMNS), taken one table after the other.

    A unit of w words has w - ngram + 1 shingles. A shorter one has one, all of it, whose hash also depends on w, so
    that it equals only the same short unit; or, with `chars`, its runs of so many letters (words parted by one space).
    One without words has none. Of `turn` units those of at least `least` bytes are taken. Holds 8 bytes a word, beyond
    spill.LIMIT in a file of `scratch` (None: the system's), and 20 a unit. threads: 0 for all processors; the result
    does not depend on it.
    """
    if min(ngram, 1 if chars is None else chars) < 1:
        raise ValueError(f"ngram is {ngram}, chars {chars}; they must be at least 1")
    hashes = Spool(scratch, f"shingles-{units}.u64", np.uint64)
    counts, words, sequence = [np.zeros(1, np.int64)], [np.zeros(0, np.int32)], [np.zeros(0, np.uint64)]
    owners, rows = [np.zeros(0, np.int32)], 0
    for table in [tables] if isinstance(tables, pa.Table) else tables:
        for batch in table.select(VIEW_COLUMNS).to_batches():  # without copying chunks together
            if units == "turn":
                text, owner = turn_spans(batch, least)
                owners.append((owner + rows).astype(np.int32))
            else:
                text = spans(batch, units)
            rows += batch.num_rows
            for made, count, size, whole in _shingle_blocks(text, ngram, chars, threads):
                hashes.append(made)
                counts.append(count)
                words.append(size)
                sequence.append(whole)
    row = np.concatenate(owners) if units == "turn" else None
    return Shingles(
        hashes.array(), np.cumsum(np.concatenate(counts)), np.concatenate(sequence), np.concatenate(words), row
    )


def joined(parts: Sequence[Shingles]) -> Shingles:
    """The rows of all parts in order."""
    counts = [np.zeros(1, np.int64), *(np.diff(part.offsets) for part in parts)]
    return Shingles(
        np.concatenate([np.zeros(0, np.uint64), *(part.hashes for part in parts)]),
        np.cumsum(np.concatenate(counts)),
        np.concatenate([np.zeros(0, np.uint64), *(part.sequence for part in parts)]),
        np.concatenate([np.zeros(0, np.int32), *(part.words for part in parts)]),
    )


def _shingle_blocks(
    text: Spans, ngram: int, chars: int | None, threads: int
) -> list[tuple[Hashes, Ints, npt.NDArray[np.int32], Hashes]]:
    """Of each block of units the shingles; of each unit how many they are, its words and its sequence."""
    table, several = folding()
    factors = np.random.default_rng(ngram).integers(0, 2**64, ngram, np.uint64) | np.uint64(1)
    letters = np.random.default_rng([chars or 0, 1]).integers(0, 2**64, chars or 0, np.uint64) | np.uint64(1)

    def block(rows: tuple[int, int]) -> tuple[Hashes, Ints, npt.NDArray[np.int32], Hashes]:
        low, high = rows
        size = high - low
        hashes, scratch = (np.empty(most + 8, np.uint64) for most in text.capacity(low, high))
        counts, words, sequence = np.empty(size, np.int64), np.empty(size, np.int32), np.empty(size, np.uint64)
        where = (text.text, text.starts, text.ends, text.ranges[low:high])
        filled = _shingle_rows(*where, table, several, factors, letters, scratch, hashes, counts, words, sequence)
        return hashes[:filled], counts, words, sequence

    return in_threads(block, text.blocks(), threads)


def ahead(items: Iterable[Item]) -> Iterator[Item]:
    """The items in order, the next one made in a thread while the last one is worked on."""
    source = iter(items)
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(next, source, None)
        while (item := waiting.result()) is not None:
            waiting = pool.submit(next, source, None)
            yield item


def in_threads(work: Callable[[Item], Result], items: Sequence[Item], threads: int = 0) -> list[Result]:
    """`work` of each item, in order; kernels release the GIL. Threads of our own and not numba's: its default layer
    ends the process when two threads enter it at once, as flows may."""
    threads = min(threads or processors(), len(items))
    if threads <= 1:
        return [work(item) for item in items]
    with ThreadPoolExecutor(threads) as pool:
        return list(pool.map(work, items))


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """Compiled without the GIL, the machine code cached beside the source, else in NUMBA_CACHE_DIR or numba's user
    folder, else not at all."""
    try:
        kernel: Callable[..., Any] = numba.njit(function, nogil=True, cache=True)
    except RuntimeError:  # no folder to cache in
        kernel = numba.njit(function, nogil=True)
    return kernel


@lru_cache
def folding() -> tuple[npt.NDArray[np.uint32], npt.NDArray[np.uint32]]:
    """(table, several): `table[code point]` is 0 where a word ends, else the folded code point, with SOLO where it is a
    word by itself; or SEVERAL | start << 5 | length of such entries in `several`. Built in about 0.1 s."""
    table = np.zeros(LAST_LETTER + 1, np.uint32)
    several: list[int] = []
    for code in range(LAST_LETTER + 1):
        folded = unicodedata.normalize("NFKC", chr(code)).casefold()
        if len(folded) == 1:
            table[code] = _entry(folded)
        else:
            table[code] = SEVERAL | len(several) << 5 | len(folded)
            several.extend(map(_entry, folded))
    return table, np.array(several, np.uint32)


def _entry(letter: str) -> int:
    if not (letter.isalnum() or letter == "_"):
        return 0
    code = ord(letter)
    return code | SOLO if any(low <= code <= high for low, high in SPACELESS) else code


@compiled
def mixed(value: np.uint64) -> np.uint64:
    """MurmurHash3's 64-bit finaliser."""
    value = (value ^ (value >> _33)) * _MIX_1
    value = (value ^ (value >> _33)) * _MIX_2
    return value ^ (value >> _33)


@compiled
def _code_point(text, at, end):  # type: ignore[no-untyped-def]
    """(code point, next position) of a character of two or more bytes; one that is cut off is a separator."""
    byte = np.uint32(text[at])
    size = np.uint64(2 if byte < 0xE0 else 3 if byte < 0xF0 else 4)
    if at + size > end:
        return np.uint32(0), end
    code = byte & np.uint32(0x7F >> size)
    for k in range(np.uint64(1), size):
        code = np.uint32(code << np.uint32(6)) | np.uint32(text[at + k] & 0x3F)
    return code, at + size


@compiled
def _turn_words(text, at, end, table, several, words, top):  # type: ignore[no-untyped-def]
    """Appends the word hashes of text[at:end] to `words` from `top` on; returns the new top. Positions are unsigned:
    numba tests a signed index for being negative, which cost a fifth of the time."""
    word, letters = _FNV_START, False
    while at < end:
        byte = text[at]
        if byte < 128:
            at += _1
            entry = table[byte]
            if entry != _0:
                word, letters = (word ^ np.uint64(entry)) * _FNV, True
                while at < end:
                    byte = text[at]
                    if byte >= 128:
                        break
                    at += _1
                    entry = table[byte]
                    if entry == _0:
                        break
                    word = (word ^ np.uint64(entry)) * _FNV
            if entry == _0 and letters:
                words[top] = mixed(word)
                top += _1
                word, letters = _FNV_START, False
            continue
        code, at = _code_point(text, at, end)
        entry = table[code] if code < table.size else _0
        first, count = np.uint64(0), np.uint64(1)
        if entry & _SEVERAL:
            first, count = np.uint64((entry ^ _SEVERAL) >> np.uint32(5)), np.uint64(entry & np.uint32(31))
        for k in range(first, first + count):
            if count > _1:
                entry = several[k]
            if (entry == _0 or entry & _SOLO) and letters:
                words[top] = mixed(word)
                top += _1
                word, letters = _FNV_START, False
            if entry & _SOLO:
                words[top] = mixed((word ^ np.uint64(entry ^ _SOLO)) * _FNV)
                top += _1
            elif entry != _0:
                word = (word ^ np.uint64(entry)) * _FNV
                letters = True
    if letters:
        words[top] = mixed(word)
        top += _1
    return top


@compiled
def _turn_letters(text, at, end, table, several, letters, top):  # type: ignore[no-untyped-def]
    """Appends the folded letters of text[at:end] to `letters` from `top` on, runs of others and the end as one 0."""
    while at < end:
        if text[at] < 128:
            code = np.uint32(text[at])
            at += _1
        else:
            code, at = _code_point(text, at, end)
        entry = table[code] if code < table.size else _0
        first, count = np.uint64(0), np.uint64(1)
        if entry & _SEVERAL:
            first, count = np.uint64((entry ^ _SEVERAL) >> np.uint32(5)), np.uint64(entry & np.uint32(31))
        for k in range(first, first + count):
            if count > _1:
                entry = several[k]
            letter = np.uint64(entry & ~_SOLO)
            if letter or (top and letters[top - _1]):
                letters[top] = letter
                top += _1
    if top and letters[top - _1]:
        letters[top] = np.uint64(0)
        top += _1
    return top


@compiled
def _shingle_rows(  # type: ignore[no-untyped-def]
    text, starts, ends, ranges, table, several, factors, letters, words, out, counts, lengths, sequence
):
    """Writes the rows' shingles to `out`, one row after the other, and returns how many there are. `words` is scratch;
    the loops over it have no branches, so that LLVM makes vectors of them."""
    base = 0
    for row in range(ranges.shape[0]):
        top = np.uint64(0)
        for part in range(3):
            for turn in range(ranges[row, 2 * part], ranges[row, 2 * part + 1]):
                top = _turn_words(text, np.uint64(starts[turn]), np.uint64(ends[turn]), table, several, words, top)
        size, scale, start = np.int64(top), factors, np.uint64(0)
        lengths[row] = size
        if letters.size and 0 < size < factors.size:
            top = np.uint64(0)
            for part in range(3):
                for turn in range(ranges[row, 2 * part], ranges[row, 2 * part + 1]):
                    said = np.uint64(starts[turn]), np.uint64(ends[turn])
                    top = _turn_letters(text, said[0], said[1], table, several, words, top)
            size, scale, start = np.int64(top) - 1, letters, _FNV
            for index in range(size):
                words[index] = mixed(words[index] + _FNV)
        width = min(size, scale.size)
        count = size - width + 1 if size else 0
        shingles = out[base : base + count]
        shingles[:] = start + np.uint64(width)
        for k in range(width):
            factor, shifted = scale[k], words[k : k + count]
            for index in range(count):
                shingles[index] += shifted[index] * factor
        whole = np.uint64(size)
        for index in range(count):
            shingles[index] = mixed(shingles[index])
            whole += shingles[index] * (_FNV_START + _FNV * np.uint64(index))
        counts[row], sequence[row] = count, mixed(whole)
        base += count
    return base
