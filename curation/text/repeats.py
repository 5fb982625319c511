"""How much of a text repeats itself: word n-grams, lines, and a loop at its end, counted by compiled kernels.

Words are those of `shingles` (case-folded; each letter of a script without spaces is a word).
"""

import numpy as np
import pyarrow as pa

from ..duplicates.shingles import _turn_words, compiled, folding, in_threads, mixed
from .spans import Spans, spans
from .view import View

TOP = (2, 3, 4)  # n-grams of which the most frequent counts
REPEATED = (5, 10)  # n-grams of which every one that occurs twice counts
NAMES = (*(f"top_{n}gram" for n in TOP), *(f"repeated_{n}gram" for n in REPEATED), "repeated_lines", "loop")
LONGEST_LOOP = 400  # bytes of one turn of a loop


def repeats(rows: pa.Table, which: View, threads: int = 0) -> pa.Table:
    """The columns NAMES (float32, shares of the text's words; of lines and loop, of its bytes) and `words` (int32) of
    each row: a text of no words has shares of 0."""
    tables = [_repeats(spans(batch, which), threads) for batch in rows.to_batches()]
    schema = pa.schema([("words", pa.int32()), *((name, pa.float32()) for name in NAMES)])
    return pa.concat_tables([schema.empty_table(), *tables])


def _repeats(said: Spans, threads: int) -> pa.Table:
    size = len(said)
    counts, shares = np.zeros(size, np.int32), np.zeros((size, len(NAMES)), np.float32)
    table, several = folding()

    def block(rows: tuple[int, int]) -> None:
        low, high = rows
        most = said.capacity(low, high)[1] + 1
        room = 1 << max(4, int(2 * most - 1).bit_length())
        words, keys = np.empty(most, np.uint64), np.empty(room, np.uint64)
        owners, firsts, tally = np.full(room, -1, np.int64), np.empty(room, np.int64), np.empty(room, np.int32)
        covered = np.empty(most, np.bool_)
        grams = np.array([*TOP, *REPEATED])
        slots = (keys, owners, firsts, tally)
        _measure_rows(
            said.text, said.starts, said.ends, said.ranges[low:high], table, several, grams, len(TOP), words, slots,
            covered, counts[low:high], shares[low:high],
        )  # fmt: skip

    in_threads(block, said.blocks(), threads)
    return pa.table({"words": counts, **{name: shares[:, k] for k, name in enumerate(NAMES)}})


@compiled
def _slot(key, stamp, size, slots):  # type: ignore[no-untyped-def]
    """Where `key` lies or goes in a table of `size` (a power of two) slots, of which those of another stamp are
    free."""
    keys, owners, _, _ = slots
    at = np.int64(mixed(key) & np.uint64(size - 1))
    while owners[at] == stamp and keys[at] != key:
        at = (at + 1) & (size - 1)
    return at


@compiled
def _gram_share(words, count, n, every, stamp, size, slots, covered):  # type: ignore[no-untyped-def]
    """Share of the words that lie in n-grams which occur twice (`every`), or in the most frequent of these."""
    keys, owners, firsts, tally = slots
    last = count - n + 1
    if last < 2:
        return 0.0
    best, most = -1, 1
    for index in range(last):
        key = np.uint64(n)
        for k in range(n):
            key = key * np.uint64(0x9E3779B97F4A7C15) + words[index + k]
        at = _slot(key, stamp, size, slots)
        if owners[at] != stamp:
            owners[at], keys[at], firsts[at], tally[at] = stamp, key, index, 1
        else:
            tally[at] += 1
            if tally[at] > most or (tally[at] == most and firsts[at] < firsts[best]):
                best, most = at, tally[at]
    if best < 0:
        return 0.0
    covered[:count] = False
    for index in range(last):
        key = np.uint64(n)
        for k in range(n):
            key = key * np.uint64(0x9E3779B97F4A7C15) + words[index + k]
        at = _slot(key, stamp, size, slots)
        if at == best or (every and tally[at] > 1):
            covered[index : index + n] = True
    return covered[:count].sum() / count


@compiled
def _line_share(text, starts, ends, first, last, stamp, size, slots):  # type: ignore[no-untyped-def]
    """Share of the bytes of lines (white space at their ends left out, blank ones too) that are in lines which came
    before."""
    keys, owners, _, _ = slots
    total, again = 0, 0
    for turn in range(first, last):
        at, end = starts[turn], ends[turn]
        while at < end:
            stop = at
            while stop < end and text[stop] != 10:
                stop += 1
            low, high = at, stop
            while low < high and text[low] <= 32:
                low += 1
            while high > low and text[high - 1] <= 32:
                high -= 1
            at = stop + 1
            if low == high:
                continue
            key = np.uint64(high - low)
            for k in range(low, high):
                key = (key ^ np.uint64(text[k])) * np.uint64(0x100000001B3)
            place = _slot(key, stamp, size, slots)
            total += high - low
            if owners[place] == stamp:
                again += high - low
            else:
                owners[place], keys[place] = stamp, key
    return again / total if total else 0.0


@compiled
def _loop_share(text, start, end):  # type: ignore[no-untyped-def]
    """Share of text[start:end], white space at its end left out, that is its longest end of period p (1 to LONGEST_LOOP
    bytes) with at least four turns and 24 bytes."""
    while end > start and text[end - 1] <= 32:
        end -= 1
    best = 0
    for period in range(1, min(LONGEST_LOOP, (end - start) // 4) + 1):
        at = end - 1
        while at - period >= start and text[at] == text[at - period]:
            at -= 1
        length = end - 1 - at + period
        if length >= 4 * period and length >= 24 and length > best:
            best = length
    return best / (end - start) if best else 0.0


@compiled
def _measure_rows(  # type: ignore[no-untyped-def]
    text, starts, ends, ranges, table, several, grams, tops, words, slots, covered, counts, shares
):
    stamp = 0
    for row in range(ranges.shape[0]):
        top = np.uint64(0)
        for part in range(3):
            for turn in range(ranges[row, 2 * part], ranges[row, 2 * part + 1]):
                top = _turn_words(text, np.uint64(starts[turn]), np.uint64(ends[turn]), table, several, words, top)
        count = np.int64(top)
        counts[row] = count
        lines, longest = 1, 0
        for part in range(3):
            for turn in range(ranges[row, 2 * part], ranges[row, 2 * part + 1]):
                longest = max(longest, ends[turn] - starts[turn])
                for at in range(starts[turn], ends[turn]):
                    lines += text[at] == 10
        size = 16
        while size < 2 * count:
            size *= 2
        for k in range(grams.size):
            stamp += 1
            shares[row, k] = _gram_share(words, count, grams[k], k >= tops, stamp, size, slots, covered)
        while size < 2 * lines:
            size *= 2
        weight, again, loop = 0, 0.0, 0.0
        for part in range(3):
            first, last = ranges[row, 2 * part], ranges[row, 2 * part + 1]
            if first == last:
                continue
            stamp += 1
            spoken = 0
            for turn in range(first, last):
                spoken += ends[turn] - starts[turn]
            again += spoken * _line_share(text, starts, ends, first, last, stamp, size, slots)
            weight += spoken
            loop = max(loop, _loop_share(text, starts[last - 1], ends[last - 1]))
        shares[row, grams.size] = again / weight if weight else 0.0
        shares[row, grams.size + 1] = loop
