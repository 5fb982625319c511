"""Near-duplicate pairs: MinHash-LSH finds candidates, the true Jaccard of their shingle sets decides.

Broder 1997 (On the resemblance and containment of documents); bands after Leskovec, Rajaraman, Ullman (Mining of
Massive Datasets, 3.4). A pair of Jaccard J is a candidate with probability 1 - (1 - J^rows)^bands.
"""

import math

import numpy as np
import numpy.typing as npt

from .shingles import Hashes, Shingles, compiled, in_threads, joined, mixed
from .spans import Ints

Reals = npt.NDArray[np.float64]
Bools = npt.NDArray[np.bool_]
BUCKET = 16  # rows of a bucket that the others are compared with
LANES = 64  # hash functions that one inner loop computes
BLOCK = 4096  # rows or pairs of one piece of work
_1, _32 = np.uint64(1), np.uint64(32)
_LOW = np.uint64(0xFFFFFFFF)


def near_pairs(
    shingles: Shingles,
    threshold: float,
    bands: int = 25,
    rows_per_band: int = 5,
    seed: int = 0,
    threads: int = 0,
) -> tuple[Ints, Ints, Reals]:
    """Pairs (i, j, Jaccard) of rows with i < j and Jaccard >= threshold, sorted; each verified on the sets of 64-bit
    shingle hashes.

    Rows of equal shingle sequence are linked with the first of them alone (Jaccard 1), and only that one is compared
    with others. In a bucket of more than BUCKET + 1 distinct rows each is compared with the BUCKET whose hashes are
    smallest, so the work stays linear; smaller buckets are compared in full. Which texts are found near each other
    depends neither on the rows' order nor on `threads`. Rows without words are in no pair. Beside the shingles it holds
    8 bytes a distinct row and band (200 MB a million rows at 25 bands).
    """
    rows, group = _distinct(shingles, 0, len(shingles))
    left, right, similarity = _similar(
        shingles, rows, 0, len(rows), BUCKET, threshold, bands, rows_per_band, seed, threads
    )
    repeated = np.flatnonzero((group >= 0) & (rows[group] != np.arange(len(group))) if len(rows) else group >= 0)
    ends = np.stack([np.r_[rows[left], rows[group[repeated]]], np.r_[rows[right], repeated]])
    low, high = ends.min(axis=0), ends.max(axis=0)
    similarity = np.r_[similarity, np.ones(len(repeated))]
    order = np.lexsort((high, low))
    return low[order], high[order], similarity[order]


def near_pairs_between(
    left: Shingles,
    right: Shingles,
    threshold: float,
    bands: int = 25,
    rows_per_band: int = 5,
    seed: int = 0,
    threads: int = 0,
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
    found = _similar(both, rows, split, split, 4 * BUCKET, threshold, bands, rows_per_band, seed, threads)
    members = np.argsort(group, kind="stable")  # rows of `right`, group by group, those without words (-1) first
    bounds = np.searchsorted(group[members], np.arange(len(rows_right) + 1))
    which = found[1] - split
    sizes = bounds[which + 1] - bounds[which]
    pair = np.repeat(np.arange(len(which)), sizes)
    within = np.arange(len(pair)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    i, j = rows[found[0]][pair], members[bounds[which][pair] + within]
    order = np.lexsort((i, j))
    return i[order], j[order], found[2][pair][order]


def banding(threshold: float, recall: float = 0.99, most: int = 32) -> tuple[int, int]:
    """(bands, rows a band) with which a pair of Jaccard `threshold` is a candidate with probability `recall`: the
    longest bands of which at most `most` are enough; bands of one row, as many as it takes, where none are."""
    if threshold >= 1:
        return 1, 8

    def needed(rows: int) -> int:
        return math.ceil(math.log(1 - recall) / math.log1p(-(threshold**rows)))

    rows = max([rows for rows in range(1, 17) if needed(rows) <= most], default=1)
    return needed(rows), rows


def jaccards(shingles: Shingles, left: Ints, right: Ints, threads: int = 0) -> Reals:
    """The Jaccard similarity of the shingle sets of each pair of rows (left[k], right[k])."""
    result = np.empty(len(left))

    def compare(low: int) -> None:
        part = slice(low, low + BLOCK)
        _jaccards(shingles.hashes, shingles.offsets, left[part], right[part], result[part])

    in_threads(compare, range(0, len(left), BLOCK), threads)
    return result


def clusters(rows: int, left: Ints, right: Ints) -> Ints:
    """For each row the smallest row that it is linked with, directly or through others."""
    root = np.arange(rows, dtype=np.int64)
    _unite(root, left, right)
    return root


def _distinct(shingles: Shingles, low: int, high: int) -> tuple[Ints, Ints]:
    """Of the rows low:high that have words: the first row of each shingle sequence, in the order of the sequences'
    hashes; and for each row low:high the index of its own among them, -1 without words."""
    present = np.flatnonzero(shingles.words[low:high])
    _, first, inverse = np.unique(shingles.sequence[low:high][present], return_index=True, return_inverse=True)
    group = np.full(high - low, -1, np.int64)
    group[present] = inverse
    return present[first] + low, group


def _similar(
    shingles: Shingles,
    rows: Ints,
    emit_from: int,
    insert_until: int,
    bucket: int,
    threshold: float,
    bands: int,
    rows_per_band: int,
    seed: int,
    threads: int,
) -> tuple[Ints, Ints, Reals]:
    """Verified pairs of indices into `rows`: those before insert_until with those from emit_from on."""
    keys = _band_keys(shingles, rows, bands, rows_per_band, seed, threads)
    found = in_threads(lambda band: _candidates(keys[band], emit_from, insert_until, bucket), range(bands), threads)
    pairs = np.sort(np.concatenate(found))
    pairs = pairs[np.r_[True, pairs[1:] != pairs[:-1]]] if len(pairs) else pairs
    left, right = (pairs >> _32).astype(np.int64), (pairs & _LOW).astype(np.int64)
    similarity = jaccards(shingles, rows[left], rows[right], threads)
    near = similarity >= threshold
    return left[near], right[near], similarity[near]


def _band_keys(shingles: Shingles, rows: Ints, bands: int, width: int, seed: int, threads: int) -> Hashes:
    """(bands, rows): one 64-bit key of the `width` minima of each band."""
    random = np.random.default_rng(seed)
    lanes = -(-bands * width // LANES) * LANES  # whole vectors: a scalar remainder of 13 took half the time
    scale = random.integers(0, 2**32, lanes, np.uint32) | np.uint32(1)
    shift = random.integers(0, 2**32, lanes, np.uint32)
    factors = random.integers(0, 2**64, width, np.uint64) | np.uint64(1)
    keys = np.empty((bands, len(rows)), np.uint64)

    def block(low: int) -> None:
        part = slice(low, low + BLOCK)
        _minima(shingles.hashes, shingles.offsets, rows[part], scale, shift, factors, keys[:, part])

    in_threads(block, range(0, len(rows), BLOCK), threads)
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
def _candidates(keys, emit_from, insert_until, bucket):  # type: ignore[no-untyped-def]
    """left << 32 | right for rows of equal key, left among the first `bucket` rows of that key: an open-addressed table
    of the first row of each key, which leads a chain of the others."""
    size = 16
    while size < 2 * insert_until:
        size *= 2
    head, mask = np.full(size, -1, np.int32), np.uint64(size - 1)
    after = np.full(insert_until, -1, np.int32)
    tail, held = np.empty(insert_until, np.int32), np.empty(insert_until, np.int32)  # of a head
    out, filled = np.empty(1024, np.uint64), 0
    for row in range(keys.size):
        slot = keys[row] & mask
        first = head[slot]
        while first >= 0 and keys[first] != keys[row]:
            slot = (slot + _1) & mask
            first = head[slot]
        if row >= emit_from:
            at = first
            while at >= 0:
                if filled == out.size:
                    grown = np.empty(2 * filled, np.uint64)
                    grown[:filled] = out
                    out = grown
                out[filled] = np.uint64(at) << _32 | np.uint64(row)
                filled += 1
                at = after[at]
        if row < insert_until:
            if first < 0:
                head[slot], tail[row], held[row] = row, row, 1
            elif held[first] < bucket:
                after[tail[first]] = row
                tail[first] = row
                held[first] += 1
    return out[:filled]


@compiled
def _jaccards(hashes, offsets, left, right, result):  # type: ignore[no-untyped-def]
    """By one open-addressed table for each pair, which takes the left shingles, then the right ones: sorting the sets
    took more than twice as long. `seen` tells old entries (below 2 pair) from those of the left row alone (2 pair) and
    those that the right row has met (2 pair + 1)."""
    most = 0
    for pair in range(left.size):
        count = offsets[left[pair] + 1] - offsets[left[pair]] + offsets[right[pair] + 1] - offsets[right[pair]]
        most = max(most, count)
    size = 16
    while size < 2 * most:
        size *= 2
    keys, seen = np.empty(size, np.uint64), np.full(size, -1, np.int64)
    for pair in range(left.size):
        count = offsets[left[pair] + 1] - offsets[left[pair]] + offsets[right[pair] + 1] - offsets[right[pair]]
        size = 16
        while size < 2 * count:
            size *= 2
        mask, new = np.uint64(size - 1), 2 * pair
        total, shared = 0, 0
        for side in range(2):
            row = right[pair] if side else left[pair]
            for at in range(offsets[row], offsets[row + 1]):
                key = hashes[at]
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


@compiled
def _unite(root, left, right):  # type: ignore[no-untyped-def]
    """Union-find towards the smaller row; afterwards every row points at its root."""
    for pair in range(left.size):
        a, b = left[pair], right[pair]
        while root[a] != a:
            root[a] = root[root[a]]
            a = root[a]
        while root[b] != b:
            root[b] = root[root[b]]
            b = root[b]
        root[max(a, b)] = min(a, b)
    for row in range(root.size):
        root[row] = root[root[row]]
