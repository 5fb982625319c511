"""Near-duplicate pairs: MinHash-LSH finds candidates, the true Jaccard of their shingle sets decides.

Broder 1997 (On the resemblance and containment of documents); bands after Leskovec, Rajaraman, Ullman (Mining of
Massive Datasets, 3.4). A pair of Jaccard J is a candidate with probability 1 - (1 - J^rows)^bands.
"""

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from ..pool import processors
from ..text.spans import Ints
from .shingles import Hashes, Shingles, compiled, in_threads, joined, mixed
from .spill import let_go, matrix, spilled

Reals = npt.NDArray[np.float64]
Bools = npt.NDArray[np.bool_]
Short = npt.NDArray[np.int32]
RECALL = 0.989  # of pairs at the threshold: above 0.98 with room for what a full bucket misses; 25 bands of 5 at 0.7
BUCKET = 16  # units of a full bucket that the others are compared with
SPARE = 2 * BUCKET  # and those that are compared besides, for the day when some of the first are gone
LANES = 64  # hash functions that one inner loop computes
BLOCK = 256  # rows or pairs of one piece of work
ROWS = 1 << 16  # rows between two times that mapped files are let go
PAIRS = 1 << 20  # candidates that are verified at a time: 80 bytes each for a moment
MAPPED = 512  # pairs between two times that a mapped file is let go: each faults in some 250 kB, so 128 MB
_1, _32, _33 = np.uint64(1), np.uint64(32), np.uint64(33)
_LOW, _LOW_31 = np.uint64(0xFFFFFFFF), np.uint64(0x7FFFFFFF)


@dataclass(frozen=True)
class Pairs:
    """What was measured of a corpus, as another decision needs it.

    group: for each unit the number of its text (shingle sequence), -1 without words; texts are numbered in the order of
    their hashes. left < right, similarity: pairs of texts of Jaccard >= the floor, sorted. light: whether they met in a
    bucket of at most BUCKET + 1 texts, so that any corpus that holds both compares them. sizes, members: the other,
    full buckets of all bands, one after the other, members ascending."""

    group: Short
    left: Short
    right: Short
    similarity: Reals
    light: Bools
    sizes: Short
    members: Short

    def texts(self) -> int:
        return int(self.group.max(initial=-1)) + 1


def near_pairs(
    shingles: Shingles,
    floor: float,
    bands: int,
    width: int,
    seed: int = 0,
    scratch: Path | None = None,
    threads: int = 0,
) -> Pairs:
    """Pairs of texts of Jaccard >= floor that share the `width` minima of one of `bands` bands, each verified on the
    sets of 64-bit shingle hashes.

    In a bucket of more than BUCKET + 1 texts each is compared with the SPARE whose hashes are smallest, so the work
    stays linear; smaller buckets are compared in full. Which texts are found near each other depends neither on the
    rows' order nor on `threads`. Beside the shingles it holds 8 bytes a text and band (beyond spill.LIMIT in a file of
    `scratch`) and the candidates of some 2 million texts' bands, or of two bands.
    """
    first, group = _distinct(shingles, 0, len(shingles))
    ascending = np.argsort(first)  # so that the shingles are read from front to back
    keys = band_keys(shingles, first[ascending], bands, width, seed, scratch, threads)
    column = np.empty(len(first), np.int64)
    column[ascending] = np.arange(len(first))
    known, near, full = np.zeros(0, np.uint64), np.zeros(0), []

    def band(index: int) -> tuple[Hashes, Short, Short]:
        found: tuple[Hashes, Short, Short] = _buckets(keys[index][column], BUCKET, SPARE)
        return found

    at_once = max(processors(), (1 << 21) // (len(first) + 1))  # bands whose candidates are held together
    for low in range(0, bands, at_once):
        found = in_threads(band, range(low, min(low + at_once, bands)), threads)
        let_go(keys)
        full += [(sizes, members) for _, sizes, members in found]
        known, near = _verified(shingles, first, found, known, near, floor, threads)
    pairs = known >> _1
    return Pairs(
        group,
        (pairs >> _32).astype(np.int32),
        (pairs & _LOW).astype(np.int32),
        near,
        (known & _1) == 0,
        np.concatenate([np.zeros(0, np.int32), *(sizes for sizes, _ in full)]),
        np.concatenate([np.zeros(0, np.int32), *(members for _, members in full)]),
    )


def _verified(
    shingles: Shingles,
    first: Ints,
    found: list[tuple[Hashes, Short, Short]],
    known: Hashes,
    near: Reals,
    floor: float,
    threads: int,
) -> tuple[Hashes, Reals]:
    """`known` pairs (left << 33 | right << 1 | heavy, sorted) and their Jaccard, with those of some more bands."""
    some = np.concatenate([pairs for pairs, _, _ in found])
    some.sort()
    some = some[np.r_[True, some[1:] >> _1 != some[:-1] >> _1]] if len(some) else some  # the light one of two
    place = np.searchsorted(known >> _1, some >> _1)
    old = place < len(known)
    old[old] = known[place[old]] >> _1 == some[old] >> _1
    known = known.copy()
    known[place[old]] &= some[old]  # light in one band is light
    some = some[~old]
    pairs, similarities = [known], [near]
    for low in range(0, len(some), PAIRS):
        part = some[low : low + PAIRS]
        left, right = first[(part >> _33).astype(np.int64)], first[(part >> _1 & _LOW_31).astype(np.int64)]
        similarity = jaccards(shingles, left, right, threads)
        good = similarity >= floor
        pairs.append(part[good])
        similarities.append(similarity[good])
    known, near = np.concatenate(pairs), np.concatenate(similarities)
    order = np.argsort(known)
    return known[order], near[order]


def near_pairs_between(
    left: Shingles,
    right: Shingles,
    threshold: float,
    bands: int,
    width: int,
    seed: int = 0,
    threads: int = 0,
    scratch: Path | None = None,
) -> tuple[Ints, Ints, Reals]:
    """Pairs (row of left, row of right, Jaccard) with Jaccard >= threshold, sorted by the right row.

    As near_pairs; of left rows of equal shingle sequence only the first is reported, every right row is, and a right
    row is compared with at most 4 BUCKET left rows of a bucket.
    """
    both = joined([left, right])
    rows_left, _ = _distinct(both, 0, len(left))
    rows_right, group = _distinct(both, len(left), len(both))
    split = len(rows_left)
    rows = np.r_[rows_left, rows_right]
    found = _similar(both, rows, split, 4 * BUCKET, threshold, bands, width, seed, threads, scratch)
    members = np.argsort(group, kind="stable")  # rows of `right`, group by group, those without words (-1) first
    bounds = np.searchsorted(group[members], np.arange(len(rows_right) + 1))
    which = found[1] - split
    sizes = bounds[which + 1] - bounds[which]
    pair = np.repeat(np.arange(len(which)), sizes)
    within = np.arange(len(pair)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    i, j = rows[found[0]][pair], members[bounds[which][pair] + within]
    order = np.lexsort((i, j))
    return i[order], j[order], found[2][pair][order]


def banding(threshold: float, recall: float = RECALL, most: int = 32) -> tuple[int, int]:
    """(bands, rows a band) with which a pair of Jaccard `threshold` is a candidate with probability `recall`: the
    longest bands of which at most `most` are enough; bands of one row, as many as it takes, where none are."""
    if threshold >= 1:
        return 1, 8

    def needed(rows: int) -> int:
        return math.ceil(math.log(1 - recall) / math.log1p(-(threshold**rows)))

    rows = max([rows for rows in range(1, 17) if needed(rows) <= most], default=1)
    return needed(rows), rows


def jaccards(
    shingles: Shingles, left: Ints, right: Ints, threads: int = 0, others: tuple[Hashes, Ints] | None = None
) -> Reals:
    """The Jaccard similarity of the shingle sets of each pair of units (left[k], right[k]); the right ones are of
    `others` (hashes, offsets) where that is given."""
    result = np.empty(len(left))
    hashes, offsets = (shingles.hashes, shingles.offsets) if others is None else others

    def compare(low: int) -> None:
        part = slice(low, low + BLOCK)
        _jaccards(shingles.hashes, shingles.offsets, hashes, offsets, left[part], right[part], result[part])

    if not spilled(shingles.hashes) and not spilled(hashes):
        in_threads(compare, range(0, len(left), BLOCK), threads)
        return result
    if others is None:
        left, right = np.minimum(left, right), np.maximum(left, right)
    order = np.lexsort((right, left))  # one end from front to back
    left, right = left[order], right[order]
    for low in range(0, len(left), MAPPED):
        in_threads(compare, range(low, min(low + MAPPED, len(left)), BLOCK), threads)
        let_go(shingles.hashes)
        let_go(hashes)
    unordered = np.empty(len(left))
    unordered[order] = result
    return unordered


def _distinct(shingles: Shingles, low: int, high: int) -> tuple[Ints, Short]:
    """Of the rows low:high that have words: the first row of each shingle sequence, in the order of the sequences'
    hashes; and for each row low:high the index of its own among them, -1 without words."""
    present = np.flatnonzero(shingles.words[low:high])
    _, first, inverse = np.unique(shingles.sequence[low:high][present], return_index=True, return_inverse=True)
    group = np.full(high - low, -1, np.int32)
    group[present] = inverse
    return present[first] + low, group


def _similar(
    shingles: Shingles,
    rows: Ints,
    split: int,
    bucket: int,
    threshold: float,
    bands: int,
    width: int,
    seed: int,
    threads: int,
    scratch: Path | None,
) -> tuple[Ints, Ints, Reals]:
    """Verified pairs of indices into `rows`: those before `split` with those from it on."""
    keys = band_keys(shingles, rows, bands, width, seed, scratch, threads)
    found = in_threads(lambda band: matches(keys[band, :split], keys[band, split:], bucket), range(bands), threads)
    pairs = np.unique(np.concatenate(found))
    left, right = (pairs >> _32).astype(np.int64), (pairs & _LOW).astype(np.int64) + split
    similarity = jaccards(shingles, rows[left], rows[right], threads)
    near = similarity >= threshold
    return left[near], right[near], similarity[near]


def band_keys(
    shingles: Shingles,
    rows: Ints,
    bands: int,
    width: int,
    seed: int,
    scratch: Path | None,
    threads: int = 0,
    name: str = "band-keys.u64",
) -> Hashes:
    """(bands, rows): one 64-bit key of the `width` minima of each band."""
    random = np.random.default_rng(seed)
    lanes = -(-bands * width // LANES) * LANES  # whole vectors: a scalar remainder of 13 took half the time
    scale = random.integers(0, 2**32, lanes, np.uint32) | np.uint32(1)
    shift = random.integers(0, 2**32, lanes, np.uint32)
    factors = random.integers(0, 2**64, width, np.uint64) | np.uint64(1)
    keys = matrix(scratch, name, (bands, len(rows)), np.uint64)

    def block(low: int) -> None:
        part = slice(low, low + BLOCK)
        found = np.empty((bands, len(rows[part])), np.uint64)
        _minima(shingles.hashes, shingles.offsets, rows[part], scale, shift, factors, found)
        keys[:, part] = found

    for low in range(0, len(rows), ROWS):
        in_threads(block, range(low, min(low + ROWS, len(rows)), BLOCK), threads)
        let_go(keys)
        let_go(shingles.hashes)
    return keys


@compiled
def _minima(hashes, offsets, rows, scale, shift, factors, keys):  # type: ignore[no-untyped-def]
    """Minima of (scale x + shift) mod 2^32 over the low halves x of a row's shingles, folded band by band into keys."""
    width = factors.size
    minima = np.empty(scale.size, np.uint32)
    for index in range(rows.size):
        minima[:] = np.uint32(0xFFFFFFFF)
        first, last = offsets[rows[index]], offsets[rows[index] + 1]
        for lane in range(0, scale.size, LANES):
            some, factor, term = minima[lane : lane + LANES], scale[lane : lane + LANES], shift[lane : lane + LANES]
            for at in range(first, last, 4):  # four shingles a pass, the last repeated: 15 ns a shingle, not 21
                a, b = np.uint32(hashes[at]), np.uint32(hashes[min(at + 1, last - 1)])
                c, d = np.uint32(hashes[min(at + 2, last - 1)]), np.uint32(hashes[min(at + 3, last - 1)])
                for k in range(LANES):
                    f, t = factor[k], term[k]
                    low = min(np.uint32(a * f + t), np.uint32(b * f + t))
                    some[k] = min(some[k], low, np.uint32(c * f + t), np.uint32(d * f + t))
        for band in range(keys.shape[0]):
            key = np.uint64(0)
            for k in range(width):
                key += np.uint64(minima[band * width + k]) * factors[k]
            keys[band, index] = mixed(key)


@compiled
def _buckets(keys, bucket, spare):  # type: ignore[no-untyped-def]
    """Rows of equal key. (1) left << 33 | right << 1 | heavy, left among the first `spare` rows of the key, heavy where
    more than `bucket` + 1 rows have it; (2) rows of each such key and (3) who they are. First rows whose key nobody
    shares are passed over by one byte a slot (most rows, in a third of the time); then an open-addressed table of the
    first row of each key, which leads a chain of the others."""
    size = 16
    while size < 4 * keys.size:
        size *= 2
    crowd, mask = np.zeros(size, np.uint8), np.uint64(size - 1)
    for row in range(keys.size):
        slot = keys[row] >> _32 & mask
        crowd[slot] = min(crowd[slot] + 1, 2)
    shared, some = np.empty(keys.size, np.int32), 0
    for row in range(keys.size):
        shared[some] = row
        some += crowd[keys[row] >> _32 & mask] > 1
    size = 16
    while size < 2 * some:
        size *= 2
    table, mask = np.full(size, -1, np.int32), np.uint64(size - 1)
    after, held = np.full(keys.size, -1, np.int32), np.zeros(keys.size, np.int32)
    tail = np.empty(keys.size, np.int32)
    filled = 0
    for row in shared[:some]:
        slot = keys[row] & mask
        first = table[slot]
        while first >= 0 and keys[first] != keys[row]:
            slot = (slot + _1) & mask
            first = table[slot]
        if first < 0:
            table[slot], tail[row], held[row] = row, row, 1
        else:
            filled += min(held[first], spare)
            after[tail[first]] = row
            tail[first] = row
            held[first] += 1
    out, full = np.empty(filled, np.uint64), 0
    members = 0
    for row in shared[:some]:
        if held[row] > bucket + 1:
            full += 1
            members += held[row]
    sizes, member = np.empty(full, np.int32), np.empty(members, np.int32)
    filled = full = members = 0
    for row in shared[:some]:
        if held[row] < 2:
            continue
        heavy = held[row] > bucket + 1
        left = row
        for _ in range(min(held[row], spare)):
            right = after[left]
            while right >= 0:
                out[filled] = np.uint64(left) << _33 | np.uint64(right) << _1 | np.uint64(heavy)
                filled += 1
                right = after[right]
            left = after[left]
        if heavy:
            sizes[full] = held[row]
            full += 1
            at = row
            while at >= 0:
                member[members] = at
                members += 1
                at = after[at]
    return out, sizes, member


@compiled
def matches(left, right, bucket):  # type: ignore[no-untyped-def]
    """l << 32 | r for left[l] == right[r], l among the first `bucket` of its key."""
    size = 16
    while size < 2 * left.size:
        size *= 2
    table, mask = np.full(size, -1, np.int32), np.uint64(size - 1)
    after = np.full(left.size, -1, np.int32)
    tail, held = np.empty(left.size, np.int32), np.empty(left.size, np.int32)
    out, filled = np.empty(1024, np.uint64), 0
    for row in range(left.size):
        slot = left[row] & mask
        first = table[slot]
        while first >= 0 and left[first] != left[row]:
            slot = (slot + _1) & mask
            first = table[slot]
        if first < 0:
            table[slot], tail[row], held[row] = row, row, 1
        elif held[first] < bucket:
            after[tail[first]] = row
            tail[first] = row
            held[first] += 1
    for row in range(right.size):
        slot = right[row] & mask
        at = table[slot]
        while at >= 0 and left[at] != right[row]:
            slot = (slot + _1) & mask
            at = table[slot]
        while at >= 0:
            if filled == out.size:
                grown = np.empty(2 * filled, np.uint64)
                grown[:filled] = out
                out = grown
            out[filled] = np.uint64(at) << _32 | np.uint64(row)
            filled += 1
            at = after[at]
    return out[:filled]


@compiled
def _jaccards(hashes, offsets, others, bounds, left, right, result):  # type: ignore[no-untyped-def]
    """By one open-addressed table for each pair, which takes the left shingles, then the right ones: sorting the sets
    took more than twice as long. `seen` tells old entries (below 2 pair) from those of the left row alone (2 pair) and
    those that the right row has met (2 pair + 1)."""
    most = 0
    for pair in range(left.size):
        count = offsets[left[pair] + 1] - offsets[left[pair]] + bounds[right[pair] + 1] - bounds[right[pair]]
        most = max(most, count)
    size = 16
    while size < 2 * most:
        size *= 2
    keys, seen = np.empty(size, np.uint64), np.full(size, -1, np.int64)
    for pair in range(left.size):
        count = offsets[left[pair] + 1] - offsets[left[pair]] + bounds[right[pair] + 1] - bounds[right[pair]]
        size = 16
        while size < 2 * count:
            size *= 2
        mask, new = np.uint64(size - 1), 2 * pair
        total, shared = 0, 0
        for side in range(2):
            some, ends, row = (others, bounds, right[pair]) if side else (hashes, offsets, left[pair])
            for at in range(ends[row], ends[row + 1]):
                key = some[at]
                slot = key & mask
                while seen[slot] >= new and keys[slot] != key:
                    slot = (slot + _1) & mask
                if seen[slot] < new:
                    keys[slot], seen[slot] = key, new + side
                    total += 1
                elif seen[slot] == new and side:
                    seen[slot] = new + 1
                    shared += 1
        result[pair] = shared / total if total else 0.0
