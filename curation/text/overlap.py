"""How much of evaluation items each training row holds: n-grams of the items in one hash table, training rows streamed
past it by a compiled kernel that reads Arrow's buffers.

Words are those of `shingles.py`. A hash only proposes a match; every match is verified word by word (on 64-bit hashes
of the words). Memory: some 60 bytes a word of the evaluation sets, and 16 more for each thread.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from ..duplicates.shingles import Hashes, _code_point, _turn_words, compiled, folding, in_threads
from .benchmark_sets import BRIEF, EvaluationSet, Item, items
from .spans import Ints, Spans, string_spans

Reals = npt.NDArray[np.float64]
Spare = TypeVar("Spare")
COVERAGE, WORDS, NOTHING = 0, 1, -1  # columns of what a row matched best, by coverage and by the longest run
BLOCK = 1 << 21  # bytes of training text of one piece of work
_BITS = 16  # of the filter for each n-gram, which sets 2 of them: some 2 % of lookups pass it in vain
_0, _1, _6, _63 = np.uint64(0), np.uint64(1), np.uint64(6), np.uint64(63)
_SALT = np.uint64(0x9E3779B97F4A7C15)


class Table(NamedTuple):
    """The evaluation fields as the kernel reads them. words: hashes of the fields' words one after another; field_of:
    the field of each; used[k]: whether fields are looked for by k-grams; places of n-gram s are order[first[s]:first[s
    + 1]], ascending; slots: an open-addressed table of n-grams; present: a filter, two bits of one of its words (which
    the hash's top bits name) for each n-gram."""

    words: Hashes
    field_of: Ints
    item: Ints
    kind: Ints
    length: Ints
    kinds: Ints  # of an item: 1 prompt, 2 answer, 3 both
    used: npt.NDArray[np.bool_]
    factors: Hashes
    hashes: Hashes
    first: Ints
    order: Ints
    slots: Ints
    present: Hashes
    shift: Ints


class Scratch(NamedTuple):
    """What one thread needs: for each word of the fields the last place that met it and the run up to there, the row
    that covered it; for each field and item what the row at hand has of it."""

    last: Ints
    run: npt.NDArray[np.int32]
    mark: npt.NDArray[np.int32]
    field_row: npt.NDArray[np.int32]
    covered: npt.NDArray[np.int32]
    longest: npt.NDArray[np.int32]
    start: Ints
    fields: Ints
    item_row: npt.NDArray[np.int32]
    share: Reals  # (items, 2)
    item_run: npt.NDArray[np.int32]
    item_start: Ints
    items: Ints
    clock: Ints  # place in all the text that the thread has seen, rows seen


@dataclass(frozen=True)
class Index:
    """Evaluation items to look for in sequences of n words. sizes: items of each set; unsought: items of each set of
    which no field is long enough or has any word."""

    items: list[Item]
    sizes: dict[str, int]
    unsought: dict[str, int]
    n: int
    table: Table

    spare: list[Scratch] = field(default_factory=list, compare=False, repr=False)  # of threads that are done


@dataclass(frozen=True)
class Best:
    """For each row what it shares with the item that it covers best (column COVERAGE), and with the one of which it has
    the longest run of words in sequence (column WORDS): item (NOTHING where no n-gram is shared), its coverage, words
    of the longest run, the word of the row at which that begins."""

    item: Ints
    coverage: Reals
    words: Ints
    start: Ints


# ---- the index


def read_index(sets: Sequence[EvaluationSet], n: int, threads: int = 0) -> Index:
    """The index of evaluation sets; a HouseError where one of them, or an item of it, cannot be read."""
    found = [item for one in sets for item in items(one)]
    fields = [(number, each) for number, item in enumerate(found) for each in item.fields if each.text]
    said, counts = _words(string_spans(pa.array([each.text for _, each in fields], pa.string())), threads)
    sought = counts >= np.array([each.least for _, each in fields], np.int64)
    said = said[np.repeat(sought, counts)]
    owner = np.array([number for number, _ in fields], np.int64)[sought]
    kind = np.array([each.kind for _, each in fields], np.int64)[sought]
    table = _table(said, counts[sought], owner, kind, len(found), n)
    sizes: dict[str, int] = {}
    unsought: dict[str, int] = {}
    for number, item in enumerate(found):
        sizes[item.set] = sizes.get(item.set, 0) + 1
        unsought[item.set] = unsought.get(item.set, 0) + (not table.kinds[number])
    return Index(found, sizes, unsought, n, table)


def _words(text: Spans, threads: int) -> tuple[Hashes, Ints]:
    """Word hashes of all rows, one after another, and the words of each row."""
    table, several = folding()

    def block(rows: tuple[int, int]) -> tuple[Hashes, Ints]:
        low, high = rows
        out, counts = np.empty(text.capacity(low, high)[0], np.uint64), np.empty(high - low, np.int64)
        filled = _row_words(text.text, text.starts, text.ends, text.ranges[low:high], table, several, out, counts)
        return out[:filled].copy(), counts

    made = in_threads(block, text.blocks(), threads)
    none: tuple[Hashes, Ints] = (np.zeros(0, np.uint64), np.zeros(0, np.int64))
    return np.concatenate([none[0], *(one for one, _ in made)]), np.concatenate([none[1], *(one for _, one in made)])


def _table(words: Hashes, length: Ints, item: Ints, kind: Ints, item_count: int, n: int) -> Table:
    field_of = np.repeat(np.arange(len(length)), length)
    sizes = np.minimum(length, n)
    left = (np.cumsum(length))[field_of] - np.arange(len(words))  # words from here to the field's end
    used = np.zeros(n + 1, np.bool_)
    used[sizes] = True
    factors = word_factors(n)
    pieces = []
    for size in np.unique(sizes).tolist():
        places = np.flatnonzero((sizes[field_of] == size) & (left >= size))
        total = np.full(len(places), _salt(size), np.uint64)
        for step in range(size):
            total += words[places + step] * factors[step]
        pieces.append((total, places))
    hashes = np.concatenate([np.zeros(0, np.uint64), *(total for total, _ in pieces)])
    places = np.concatenate([np.zeros(0, np.int64), *(at for _, at in pieces)])
    by_hash = np.lexsort((places, hashes))
    distinct, first = np.unique(hashes[by_hash], return_index=True)
    bits = max(12, int(_BITS * len(distinct)).bit_length())
    present = np.zeros(1 << (bits - 6), np.uint64)
    slots = np.full(1 << max(4, int(2 * len(distinct)).bit_length()), -1, np.int64)
    shift = np.array([64 - bits], np.int64)
    _fill(distinct, slots, present, shift)
    kinds = np.zeros(item_count, np.int64)
    np.bitwise_or.at(kinds, item, 1 << kind)
    return Table(words, field_of, item, kind, length, kinds, used, factors, distinct,
                 np.append(first, len(places)).astype(np.int64), places[by_hash], slots, present, shift)  # fmt: skip


def word_factors(n: int) -> Hashes:
    """Odd factors of an n-gram's words."""
    return np.random.default_rng(n).integers(0, 2**64, n, np.uint64) | np.uint64(1)


def _salt(size: int) -> np.uint64:
    with np.errstate(over="ignore"):
        return np.uint64(size) * _SALT


def _scratch(table: Table) -> Scratch:
    words, fields, count = len(table.words), len(table.length), len(table.kinds)
    return Scratch(
        np.full(words, -1, np.int64), np.zeros(words, np.int32), np.zeros(words, np.int32),
        np.zeros(fields, np.int32), np.zeros(fields, np.int32), np.zeros(fields, np.int32),
        np.zeros(fields, np.int64), np.zeros(fields, np.int64),
        np.zeros(count, np.int32), np.zeros((count, 2), np.float64), np.zeros(count, np.int32),
        np.zeros(count, np.int64), np.zeros(count, np.int64), np.zeros(2, np.int64),
    )  # fmt: skip


# ---- training rows


def best(index: Index, text: Spans, source: Ints | None = None, top: "Tops | None" = None, threads: int = 0) -> Best:
    """What each row of `text` shares with evaluation items. The result does not depend on `threads`.

    top: gathers for each source (numbered by `source`, one number a row) the best that any row of it has of an item."""
    rows = len(text)
    table, several = folding()
    found = Best(np.full((rows, 2), NOTHING), np.zeros((rows, 2)), np.zeros((rows, 2), np.int64),
                 np.zeros((rows, 2), np.int64))  # fmt: skip
    of = np.zeros(rows, np.int64) if source is None else source

    def block(span: tuple[int, int]) -> None:
        low, high = span
        words, sums = (np.empty(text.capacity(low, high)[1], np.uint64) for _ in range(2))
        scratch = _taken(index.spare, lambda: _scratch(index.table))
        tables = (np.zeros((0, 0)), np.zeros((0, 0), np.int64)) if top is None else top.take()
        _scan(text.text, text.starts, text.ends, text.ranges[low:high], table, several, index.table, scratch,
              words, sums, of[low:high], *tables, found.item[low:high], found.coverage[low:high],
              found.words[low:high], found.start[low:high])  # fmt: skip
        index.spare.append(scratch)
        if top is not None:
            top.spare.append(tables)

    if len(index.table.words):
        in_threads(block, text.blocks(BLOCK), threads)
    return found


class Tops:
    """The best of each item that any row of a source has: coverage, and words in sequence. As many pairs of tables as
    threads (16 bytes a source and item each), put together at the end."""

    def __init__(self, sources: int, item_count: int) -> None:
        self.shape = (sources, item_count)
        self.spare: list[tuple[Reals, Ints]] = []

    def take(self) -> tuple[Reals, Ints]:
        return _taken(self.spare, lambda: (np.zeros(self.shape), np.zeros(self.shape, np.int64)))

    def whole(self) -> tuple[Reals, Ints]:
        share, run = np.zeros(self.shape), np.zeros(self.shape, np.int64)
        for one, other in self.spare:
            np.maximum(share, one, out=share)
            np.maximum(run, other, out=run)
        return share, run


def _taken(spare: list[Spare], make: Callable[[], Spare]) -> Spare:
    """One that no thread uses, or a new one."""
    try:
        return spare.pop()
    except IndexError:
        return make()


def passages(texts: pa.Array, first: Ints, count: Ints) -> list[str]:
    """Of each text its `count` words from word `first` on, as they are written."""
    table, several = folding()
    text = string_spans(texts.cast(pa.string()))
    begin, end = np.zeros(len(text), np.int64), np.zeros(len(text), np.int64)
    _places(text.text, text.starts, text.ends, table, several, first, count, begin, end)
    return [bytes(text.text[low:high]).decode() for low, high in zip(begin.tolist(), end.tolist(), strict=True)]


# ---- kernels


@compiled
def _row_words(text, starts, ends, ranges, table, several, out, counts):  # type: ignore[no-untyped-def]
    top = np.uint64(0)
    for row in range(ranges.shape[0]):
        before = top
        for part in range(3):
            for turn in range(ranges[row, 2 * part], ranges[row, 2 * part + 1]):
                top = _turn_words(text, np.uint64(starts[turn]), np.uint64(ends[turn]), table, several, out, top)
        counts[row] = np.int64(top - before)
    return np.int64(top)


@compiled
def _fill(hashes, slots, present, shift):  # type: ignore[no-untyped-def]
    mask, by = np.uint64(slots.size - 1), np.uint64(shift[0])
    for index in range(hashes.size):
        probe = hashes[index] >> by
        present[probe >> _6] |= _1 << (probe & _63) | _1 << (hashes[index] & _63)
        slot = hashes[index] & mask
        while slots[slot] >= 0:
            slot = (slot + _1) & mask
        slots[slot] = index


@compiled
def _scan(  # type: ignore[no-untyped-def]
    text, starts, ends, ranges, table, several, index, scratch, words, sums, source, top_share, top_run,
    best_item, best_share, best_words, best_start,
):  # fmt: skip
    """For each row the sums that hash its k-grams grow by one word at a time; where fields of k words (n: of n or more)
    are looked for, the filter is asked, then the table, then the words themselves. Brief fields must be whole turns."""
    n, mask, by = index.factors.size, np.uint64(index.slots.size - 1), np.uint64(index.shift[0])
    present = index.present
    for row in range(ranges.shape[0]):
        base, met, top = scratch.clock[0] + 1, 0, np.uint64(0)
        scratch.clock[1] += 1
        stamp = scratch.clock[1]
        for part in range(3):
            for turn in range(ranges[row, 2 * part], ranges[row, 2 * part + 1]):
                first = np.int64(top)
                top = _turn_words(text, np.uint64(starts[turn]), np.uint64(ends[turn]), table, several, words, top)
                count = np.int64(top) - first
                if count < BRIEF and index.used[count]:
                    key = np.uint64(count) * _SALT
                    for k in range(count):
                        key += words[first + k] * index.factors[k]
                    gram = _gram(index, key, mask)
                    if gram >= 0:
                        met = _meet(index, scratch, words, first, count, gram, base, stamp, met)
        size = np.int64(top)
        scratch.clock[0] += size + 1
        sums[:size] = _0
        for k in range(min(n, size)):
            factor, shifted = index.factors[k], words[k:size]
            some = sums[: size - k]
            for at in range(size - k):
                some[at] += shifted[at] * factor
            if k + 1 < BRIEF or not index.used[k + 1]:
                continue
            salt = np.uint64(k + 1) * _SALT
            for at in range(size - k):
                key = some[at] + salt
                probe = key >> by
                bits = _1 << (probe & _63) | _1 << (key & _63)
                if present[probe >> _6] & bits == bits:  # here: a call for each word took five times as long
                    gram = _gram(index, key, mask)
                    if gram >= 0:
                        met = _meet(index, scratch, words, at, k + 1, gram, base, stamp, met)
        if met:
            _rank(index, scratch, met, stamp, source[row], top_share, top_run,
                  best_item[row], best_share[row], best_words[row], best_start[row])  # fmt: skip


@compiled
def _gram(index, key, mask):  # type: ignore[no-untyped-def]
    """The number of the n-gram of this hash, or -1."""
    slot = key & mask
    while index.slots[slot] >= 0 and index.hashes[index.slots[slot]] != key:
        slot = (slot + _1) & mask
    return index.slots[slot]


@compiled
def _meet(index, scratch, words, at, size, gram, base, stamp, met):  # type: ignore[no-untyped-def]
    """Notes the words words[at:at + size] of a row in every field that has them; `met`: fields met so far. Places go
    downwards, so that the run that ended one word before is still there where a field repeats itself."""
    for position in range(index.first[gram + 1] - 1, index.first[gram] - 1, -1):
        there = index.order[position]
        equal = True
        for k in range(size):
            if index.words[there + k] != words[at + k]:
                equal = False
                break
        field = index.field_of[there]
        if not equal or min(index.factors.size, index.length[field]) != size:
            continue
        if scratch.field_row[field] != stamp:
            scratch.field_row[field] = stamp
            scratch.covered[field], scratch.longest[field], scratch.start[field] = 0, 0, 0
            scratch.fields[met] = field
            met += 1
        run = size
        if there > 0 and scratch.last[there - 1] == base + at - 1 and index.field_of[there - 1] == field:
            run = scratch.run[there - 1] + 1
        scratch.last[there], scratch.run[there] = base + at, run
        if run > scratch.longest[field]:
            scratch.longest[field], scratch.start[field] = run, at + size - run
        for word in range(there, there + size):
            if scratch.mark[word] != stamp:
                scratch.mark[word] = stamp
                scratch.covered[field] += 1
    return met


@compiled
def _rank(index, scratch, met, stamp, source, top_share, top_run, item, share, words, start):  # type: ignore[no-untyped-def]
    """Of the fields met, the items: each field's best form, the mean of prompt and answer where that is more than the
    prompt alone. The best item by coverage (then run, then number) and by run (then coverage, then number)."""
    count = 0
    for k in range(met):
        field = scratch.fields[k]
        one, kind = index.item[field], index.kind[field]
        if scratch.item_row[one] != stamp:
            scratch.item_row[one] = stamp
            scratch.share[one, 0], scratch.share[one, 1], scratch.item_run[one] = 0.0, 0.0, 0
            scratch.items[count] = one
            count += 1
        scratch.share[one, kind] = max(scratch.share[one, kind], scratch.covered[field] / index.length[field])
        longest = scratch.longest[field]
        if longest > scratch.item_run[one] or (
            longest == scratch.item_run[one] and scratch.start[field] < scratch.item_start[one]
        ):
            scratch.item_run[one], scratch.item_start[one] = longest, scratch.start[field]
    for k in range(count):
        one = scratch.items[k]
        asked, told, run = scratch.share[one, 0], scratch.share[one, 1], scratch.item_run[one]
        covered = max(asked, (asked + told) / 2) if index.kinds[one] == 3 else asked + told
        if top_share.size:
            top_share[source, one] = max(top_share[source, one], covered)
            top_run[source, one] = max(top_run[source, one], run)
        for by in range(2):
            first, second = (covered, float(run)) if by == 0 else (float(run), covered)
            first_now, second_now = (share[by], float(words[by])) if by == 0 else (float(words[by]), share[by])
            more = first > first_now or (first == first_now and second > second_now)
            tie = first == first_now and second == second_now and one < item[by]
            if item[by] < 0 or more or tie:
                item[by], share[by], words[by], start[by] = one, covered, run, scratch.item_start[one]


@compiled
def _places(text, starts, ends, table, several, first, count, begin, end):  # type: ignore[no-untyped-def]
    """Bytes from the start of word first[row] to the end of the last of count[row] words, counted as _turn_words does
    (a test holds them together)."""
    for row in range(starts.size):
        at, last = np.uint64(starts[row]), np.uint64(ends[row])
        word, letters, wanted = -1, False, first[row] + count[row]
        while at < last:
            here = at
            code = np.uint32(text[at])
            if code < 128:
                at += _1
            else:
                code, at = _code_point(text, at, last)
            entry = table[code] if code < table.size else np.uint32(0)
            low, high = np.uint64(0), np.uint64(1)
            if entry & np.uint32(1 << 30):
                low, high = np.uint64((entry ^ np.uint32(1 << 30)) >> np.uint32(5)), np.uint64(entry & np.uint32(31))
            for k in range(low, low + high):
                if high > _1:
                    entry = several[k]
                alone = (entry & np.uint32(1 << 31)) != 0
                if entry == 0 or alone:
                    letters = False
                if entry == 0:
                    continue
                if alone or not letters:
                    word += 1
                    if word == first[row]:
                        begin[row] = here
                letters = not alone
                if word >= first[row] and word < wanted:
                    end[row] = at
