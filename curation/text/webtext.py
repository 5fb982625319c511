"""Counts for the rules of web text (Gopher, C4) by compiled kernels: words, lines, repeated n-grams of every row.

A word is a run of characters without white space; lengths are in characters (code points).
"""

import sys
import unicodedata
from functools import lru_cache

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from ..duplicates.shingles import compiled, mixed
from .spans import Bytes, Ints

SPACE, ALPHA, MEANT = 1, 2, 4  # MEANT: neither punctuation nor a symbol nor a control character
QUALITY = ("words", "spoken", "letters", "hashes", "ellipses", "lines", "bullets", "open_lines", "alphabetic", "stops")
NGRAMS = tuple(range(2, 11))
REPETITION = (
    *("chars", "lines", "paragraphs", "again_lines", "again_paragraphs", "again_line_chars", "again_paragraph_chars"),
    *(f"ngram_{n}" for n in NGRAMS),
)
_LAST = 0x20000  # above are Han, tags and private use alone
_STOPS = ("the", "be", "to", "of", "and", "that", "have", "with")
_FNV_START, _FNV = np.uint64(0xCBF29CE484222325), np.uint64(0x100000001B3)
_0, _1 = np.uint64(0), np.uint64(1)


@lru_cache
def kinds() -> npt.NDArray[np.uint8]:
    """Flags of every code point."""
    table = np.full(sys.maxunicode + 1, MEANT, np.uint8)
    table[_LAST:0x40000] = ALPHA | MEANT  # Han
    for code in range(_LAST):
        letter = chr(code)
        flags = SPACE * letter.isspace() + ALPHA * letter.isalpha()
        table[code] = flags + MEANT * (unicodedata.category(letter)[0] in "LMNZ" and not letter.isspace())
    return table


def buffers(texts: pa.Array) -> tuple[Bytes, Ints]:
    """Bytes and offsets of a large_string array without nulls."""
    _, offsets, data = texts.buffers()
    size = len(texts)
    if size == 0 or offsets is None:
        return np.zeros(0, np.uint8), np.zeros(1, np.int64)
    found = np.frombuffer(offsets, np.int64)[texts.offset : texts.offset + size + 1]
    return (np.zeros(0, np.uint8) if data is None else np.frombuffer(data, np.uint8)), found


def quality(texts: pa.Array) -> dict[str, Ints]:
    """The counts QUALITY of each text. spoken: words with anything meant, letters: their characters, open_lines: lines
    that end in an ellipsis, stops: how many of the eight English stop words occur."""
    data, offsets = buffers(texts)
    found = np.zeros((len(texts), len(QUALITY)), np.int64)
    stops = np.array([_hash(word) for word in _STOPS], np.uint64)
    _quality(data, offsets, kinds(), stops, found)
    return dict(zip(QUALITY, found.T, strict=True))


def repetition(texts: pa.Array) -> dict[str, Ints]:
    """The counts REPETITION of each text. again_…: lines and paragraphs that stood before, and their characters.
    ngram_2 to ngram_4: characters (single spaces included) in the commonest n-gram, if it occurs twice; ngram_5 to
    ngram_10: characters of words in n-grams that occurred before, each character once."""
    data, offsets = buffers(texts)
    found = np.zeros((len(texts), len(REPETITION)), np.int64)
    most = int(np.diff(offsets).max(initial=0)) // 2 + 2
    size = 1 << max(4, int(2 * most).bit_length())
    hashes, lengths = np.zeros(most, np.uint64), np.zeros(most, np.int64)
    slots, counts, firsts = np.zeros(size, np.uint64), np.zeros(size, np.int64), np.zeros(size, np.int64)
    _repetition(data, offsets, kinds(), hashes, lengths, slots, counts, firsts, np.full(size, -1, np.int64), found)
    return dict(zip(REPETITION, found.T, strict=True))


def sentences(texts: pa.Array, words: int, longest: int) -> Ints:
    """Sentences of each text in lines of at least `words` words, none longer than `longest` characters, that end in one
    of . ? ! " ' and not in three dots."""
    data, offsets = buffers(texts)
    found = np.zeros(len(texts), np.int64)
    _sentences(data, offsets, kinds(), words, longest, found)
    return found


def _hash(word: str) -> np.uint64:
    value = int(_FNV_START)
    for letter in word:
        value = ((value ^ ord(letter)) * int(_FNV)) & (2**64 - 1)
    return np.uint64(value)


@compiled
def _code(data, at, end):  # type: ignore[no-untyped-def]
    """(code point, next position)."""
    byte = np.int64(data[at])
    if byte < 0x80:
        return byte, at + 1
    size = 2 if byte < 0xE0 else 3 if byte < 0xF0 else 4
    if at + size > end:
        return np.int64(0xFFFD), end
    code = byte & (0x7F >> size)
    for k in range(1, size):
        code = (code << 6) | (np.int64(data[at + k]) & 0x3F)
    return code, at + size


@compiled
def _quality(data, offsets, table, stops, found):  # type: ignore[no-untyped-def]
    for row in range(len(found)):
        at, end = offsets[row], offsets[row + 1]
        counts = found[row]
        size, meant, alpha, fold, stopped, seen = 0, False, False, _FNV_START, False, 0
        first, dots, last_dots, line = np.int64(-1), 0, False, False
        run = 0
        while at <= end:
            code, step = (np.int64(10), at + 1) if at == end else _code(data, at, end)
            flags = table[code]
            if flags & 1:
                if size:
                    counts[0] += 1
                    counts[1] += meant
                    counts[2] += size if meant else 0
                    counts[8] += alpha
                    if size < 9:  # four letters, and signs around them
                        for k in range(len(stops)):
                            if fold == stops[k]:
                                seen |= 1 << k
                size, meant, alpha, fold, stopped = 0, False, False, _FNV_START, False
                run = 0
            else:
                size += 1
                meant |= (flags & 4) != 0
                alpha |= (flags & 2) != 0
                if flags & 4:
                    lower = code | 32 if 65 <= code <= 90 else code
                    fold = np.uint64(0) if stopped else (fold ^ np.uint64(lower)) * _FNV
                elif fold != _FNV_START:
                    stopped = True  # punctuation within a word makes it another
                if code == 35:
                    counts[3] += 1
                run = run + 1 if code == 46 else 0
                if run == 3:
                    counts[4] += 1
                    run = 0
                if code == 0x2026:
                    counts[4] += 1
                if first < 0:
                    first = code
                dots = dots + 1 if code == 46 else 0
                last_dots = dots >= 3 or code == 0x2026
            if flags & 1 and code != 10 and code != 13:
                dots = 0
            if code == 10 and (at < end or line):
                counts[5] += 1
                counts[6] += first == 45 or first == 0x2022
                counts[7] += last_dots
                first, dots, last_dots, line = np.int64(-1), 0, False, False
            else:
                line = True
            at = step
        for k in range(len(stops)):
            counts[9] += (seen >> k) & 1


@compiled
def _slot(slots, stamps, stamp, key):  # type: ignore[no-untyped-def]
    """(place of `key` in the table, whether it is new there); places of other stamps are empty."""
    mask = len(slots) - 1
    place = np.int64(mixed(key) & np.uint64(mask))
    while stamps[place] == stamp:
        if slots[place] == key:
            return place, False
        place = (place + 1) & mask
    stamps[place] = stamp
    slots[place] = key
    return place, True


@compiled
def _repetition(data, offsets, table, hashes, lengths, slots, counts, firsts, stamps, found):  # type: ignore[no-untyped-def]
    stamp = np.int64(0)
    for row in range(len(found)):
        begin, end = offsets[row], offsets[row + 1]
        for paragraphs in range(2):
            stamp += 1
            _pieces(data, begin, end, table, paragraphs, slots, stamps, stamp, found[row])
        words = _words(data, begin, end, table, hashes, lengths)
        for n in range(2, 11):
            stamp += 1
            if n < 5:
                found[row, 5 + n] = _commonest(hashes, lengths, words, n, slots, counts, firsts, stamps, stamp)
            else:
                found[row, 5 + n] = _repeated(hashes, lengths, words, n, slots, stamps, stamp)
            if found[row, 5 + n] == 0:  # no n-gram comes twice, so no longer one does
                break


@compiled
def _pieces(data, at, end, table, paragraphs, slots, stamps, stamp, out):  # type: ignore[no-untyped-def]
    """Lines (parted by one or more line ends) or paragraphs (by two or more, the text stripped): all, those that stood
    before, and the characters of these."""
    if paragraphs:
        while at < end and table[data[at]] & 1 and data[at] < 128:
            at += 1
        while at < end and table[data[end - 1]] & 1 and data[end - 1] < 128:
            end -= 1
    size, fold, total = 0, _FNV_START, 0
    while at <= end:
        gap = at
        while gap < end and data[gap] == 10:
            gap += 1
        if at == end or gap - at > paragraphs:
            total += 1
            _, fresh = _slot(slots, stamps, stamp, fold)
            if not fresh:
                out[3 + paragraphs] += 1
                out[5 + paragraphs] += size
            size, fold = 0, _FNV_START
            if at == end:
                break
            at = gap
            if at == end:  # an empty last piece, as when Python splits
                total += 1
                _, fresh = _slot(slots, stamps, stamp, fold)
                out[3 + paragraphs] += not fresh
                break
            continue
        code, step = _code(data, at, end)
        fold = (fold ^ np.uint64(code)) * _FNV
        size += 1
        at = step
    out[1 + paragraphs] = total


@compiled
def _words(data, at, end, table, hashes, lengths):  # type: ignore[no-untyped-def]
    count, size, fold = 0, 0, _FNV_START
    while at < end:
        code, step = _code(data, at, end)
        if table[code] & 1:
            if size:
                hashes[count], lengths[count] = mixed(fold), size
                count += 1
            size, fold = 0, _FNV_START
        else:
            fold = (fold ^ np.uint64(code)) * _FNV
            size += 1
        at = step
    if size:
        hashes[count], lengths[count] = mixed(fold), size
        count += 1
    return count


@compiled
def _key(hashes, at, n):  # type: ignore[no-untyped-def]
    key = np.uint64(n)
    for k in range(at, at + n):
        key = mixed(key * _FNV + hashes[k])
    return key


@compiled
def _commonest(hashes, lengths, words, n, slots, counts, firsts, stamps, stamp):  # type: ignore[no-untyped-def]
    best = np.int64(-1)
    for at in range(words - n + 1):
        place, fresh = _slot(slots, stamps, stamp, _key(hashes, at, n))
        if fresh:
            counts[place], firsts[place] = 0, at
        counts[place] += 1
    for at in range(words - n + 1):  # of equally common ones the first
        place, _ = _slot(slots, stamps, stamp, _key(hashes, at, n))
        if firsts[place] == at and (best < 0 or counts[place] > counts[best]):
            best = place
    if best < 0 or counts[best] < 2:
        return 0
    size = n - 1
    for k in range(firsts[best], firsts[best] + n):
        size += lengths[k]
    return size * counts[best]


@compiled
def _repeated(hashes, lengths, words, n, slots, stamps, stamp):  # type: ignore[no-untyped-def]
    at, size = 0, 0
    while at < words - n + 1:
        _, fresh = _slot(slots, stamps, stamp, _key(hashes, at, n))
        if fresh:
            at += 1
            continue
        for k in range(at, at + n):
            size += lengths[k]
        at += n
    return size


@compiled
def _sentences(data, offsets, table, least, longest, found):  # type: ignore[no-untyped-def]
    for row in range(len(found)):
        at, end = offsets[row], offsets[row + 1]
        words, size, long, ends, closed, before, dots = 0, 0, False, 0, False, False, 0
        while at <= end:
            code, step = (np.int64(10), at + 1) if at == end else _code(data, at, end)
            if table[code] & 1:
                if size:
                    words += 1
                    long |= size > longest
                    ends += before
                size, before = 0, False
            else:
                size += 1
                dots = (dots if size > 1 else 0) + 1 if code == 46 else 0
                mark = code == 46 or code == 63 or code == 33
                closer = code == 34 or code == 39 or code == 41 or code == 93 or code == 0x201D or code == 0x2019
                before = mark or (before and closer)
                closed = mark or code == 34 or code == 39
            if code == 10:
                if words >= least and not long and closed and dots < 3:
                    found[row] += max(ends, 1)
                words, ends, long, closed, dots = 0, 0, False, False, 0
            at = step
