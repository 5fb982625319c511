"""Who goes, given which rows say the same and which pairs are near: arrays only, so that a decision over a million rows
is a fraction of a second, today as well as on another day with another threshold or with fewer rows."""

from dataclasses import dataclass

import numpy as np

from ..text.spans import Ints
from .minhash import BUCKET, SPARE, Bools, Pairs, Reals, Short
from .shingles import compiled
from .survivors import survivors

_1, _32 = np.uint64(1), np.uint64(32)


@dataclass(frozen=True)
class Said:
    """What rows say: unit u, a text of `pairs.group`, is of row `row[u]` (None: unit r is row r). `earlier`,
    `earlier_near`: for each text the row of an earlier release nearest to it (-1: none) and their Jaccard."""

    rows: int
    pairs: Pairs
    row: Short | None = None
    earlier: Ints | None = None
    earlier_near: Reals | None = None

    def only(self, came: Bools) -> "Said | None":
        """The same of the rows that `came` marks, as if only these had been measured; None where what was measured does
        not tell: of the rows that a full bucket was compared with, too many are gone."""
        alive = came if self.row is None else came[self.row]
        pairs = _only(self.pairs, alive)
        if pairs is None:
            return None
        number = np.cumsum(came, dtype=np.int32) - np.int32(1)
        row = None if self.row is None else number[self.row[alive]]
        here = _alive(self.pairs, alive)
        earlier = None if self.earlier is None else self.earlier[here]
        near = None if self.earlier_near is None else self.earlier_near[here]
        return Said(int(came.sum()), pairs, row, earlier, near)

    def first(self) -> Ints:
        """Of each text its first unit."""
        unit = np.flatnonzero(self.pairs.group >= 0)[::-1]
        first = np.empty(self.pairs.texts(), np.int64)
        first[self.pairs.group[unit]] = unit
        return first


@dataclass(frozen=True)
class Decision:
    """The rows that go (`dropped`, ascending) and of each of them: the survivor (a row; of an earlier release where
    `earlier`), the number of its cluster, the similarity with the survivor (NaN: not measured, so below the floor), and
    where that is below the threshold the row `via` which it is linked, and the similarity with that (else -1, NaN)."""

    dropped: Ints
    survivor: Ints
    earlier: Bools
    cluster: Ints
    similarity: Reals
    via: Ints
    via_similarity: Reals


def decided(said: Said, rank: Ints, threshold: float) -> Decision:
    """Clusters of rows that say the same or are linked by pairs of Jaccard >= threshold, directly or through others; of
    each the row of smallest rank stays, or none where a row of an earlier release is near one of its rows."""
    pairs = said.pairs
    group, row = pairs.group, said.row
    unit = np.flatnonzero(group >= 0)
    text, owner = group[unit].astype(np.int64), (unit if row is None else row[unit].astype(np.int64))
    face = np.full(pairs.texts(), said.rows, np.int64)  # of each text the row of smallest rank, by its rank
    np.minimum.at(face, text, rank[owner])
    by_rank = np.empty(said.rows, np.int64)
    by_rank[rank] = np.arange(said.rows)
    face = by_rank[face]
    again = owner != face[text]
    near = pairs.similarity >= threshold
    left = np.r_[face[pairs.left[near]], face[text[again]]]
    right = np.r_[face[pairs.right[near]], owner[again]]
    similarity = np.r_[pairs.similarity[near], np.ones(int(again.sum()))]
    other = left != right  # two turns of one row
    left, right, similarity = left[other], right[other], similarity[other]
    stays = survivors(clusters(said.rows, left, right), rank)
    earlier, earlier_near = _earlier(said, owner, text)
    met = earlier_near >= threshold
    ousted = np.zeros(said.rows, np.bool_)  # by survivor: its cluster has a row near one of an earlier release
    ousted[stays[met]] = True
    dropped = np.flatnonzero((stays != np.arange(said.rows)) | ousted[stays])
    gone = ousted[stays[dropped]]
    direct = np.full(said.rows, np.nan)
    mine = dropped[~gone]
    direct[mine] = _similarities(said, owner, text, mine, stays[mine])
    direct[earlier >= 0] = np.where(ousted[stays[earlier >= 0]], earlier_near[earlier >= 0], direct[earlier >= 0])
    linked = (stays == np.arange(said.rows)) & ~ousted
    linked[dropped] = direct[dropped] >= threshold
    via, closeness = _links(linked, left, right, similarity, rank)
    root = via
    while not np.array_equal(further := root[root], root):
        root = further
    owner_of = np.where(gone, earlier[root[dropped]], stays[dropped])
    _, cluster = np.unique(rank[stays[dropped]], return_inverse=True)
    indirect = ~linked[dropped]
    shown = direct[dropped]
    shown[gone & indirect] = np.nan
    return Decision(
        dropped, owner_of, gone, cluster, shown,
        np.where(indirect, via[dropped], -1), np.where(indirect, closeness[dropped], np.nan),
    )  # fmt: skip


def clusters(rows: int, left: Ints, right: Ints) -> Ints:
    """For each row the smallest row that it is linked with, directly or through others."""
    root = np.arange(rows, dtype=np.int64)
    _unite(root, left, right)
    return root


def groups(keys: np.ndarray) -> Short:
    """Equal rows of `keys` (two columns) have equal numbers, from 0 up in the order of the keys."""
    order = np.lexsort(keys.T)
    new = np.r_[False, (keys[order[1:]] != keys[order[:-1]]).any(axis=1)] if len(keys) else np.zeros(0, np.bool_)
    numbers = np.empty(len(keys), np.int32)
    numbers[order] = np.cumsum(new)
    return numbers


def same_only(group: Short) -> Pairs:
    """Texts of which no two are near each other."""
    none, short = np.zeros(0), np.zeros(0, np.int32)
    return Pairs(group, short, short, none, np.zeros(0, np.bool_), short, short)


def _links(linked: Bools, left: Ints, right: Ints, similarity: Reals, rank: Ints) -> tuple[Ints, Reals]:
    """For rows that are not `linked`: the neighbour one step nearer to a linked row, and the similarity with it."""
    reached = linked.copy()
    via, closeness = np.arange(len(linked)), np.ones(len(linked))
    here, there, near = np.r_[left, right], np.r_[right, left], np.r_[similarity, similarity]
    while True:
        open_edges = ~reached[there]
        here, there, near = here[open_edges], there[open_edges], near[open_edges]
        step = np.flatnonzero(reached[here])
        if not len(step):
            return via, closeness
        step = step[np.lexsort((rank[here[step]], -near[step], there[step]))]
        step = step[np.unique(there[step], return_index=True)[1]]
        via[there[step]], closeness[there[step]] = here[step], near[step]
        reached[there[step]] = True


def _earlier(said: Said, owner: Ints, text: Ints) -> tuple[Ints, Reals]:
    """For each row the nearest row of an earlier release (-1: none; the first of equals) and their similarity."""
    found, near = np.full(said.rows, -1, np.int64), np.zeros(said.rows)
    if said.earlier is None or said.earlier_near is None:
        return found, near
    some = np.flatnonzero(said.earlier[text] >= 0)
    some = some[np.lexsort((said.earlier[text[some]], -said.earlier_near[text[some]], owner[some]))]
    some = some[np.unique(owner[some], return_index=True)[1]]
    found[owner[some]], near[owner[some]] = said.earlier[text[some]], said.earlier_near[text[some]]
    return found, near


def _similarities(said: Said, owner: Ints, text: Ints, one: Ints, two: Ints) -> Reals:
    """The greatest similarity of a text of row one[k] and a text of row two[k]; NaN where none was measured."""
    first = np.r_[0, np.cumsum(np.bincount(owner, minlength=said.rows))]
    sizes = first[1:] - first[:-1]
    counts = sizes[one] * sizes[two]
    pair = np.repeat(np.arange(len(one)), counts)
    within = np.arange(len(pair)) - np.repeat(np.cumsum(counts) - counts, counts)
    a = text[first[one[pair]] + within // np.maximum(sizes[two[pair]], 1)]
    b = text[first[two[pair]] + within % np.maximum(sizes[two[pair]], 1)]
    keys = said.pairs.left.astype(np.int64) << 32 | said.pairs.right
    wanted = np.minimum(a, b) << 32 | np.maximum(a, b)
    place = np.searchsorted(keys, wanted)
    known = place < len(keys)
    known[known] = keys[place[known]] == wanted[known]
    found = np.full(len(wanted), -1.0)
    found[known] = said.pairs.similarity[place[known]]
    found[a == b] = 1.0
    best = np.full(len(one), -1.0)
    np.maximum.at(best, pair, found)
    best[best < 0] = np.nan
    return best


def _alive(pairs: Pairs, units: Bools) -> Bools:
    """Which texts one of these units says."""
    texts = np.zeros(pairs.texts(), np.bool_)
    texts[pairs.group[units & (pairs.group >= 0)]] = True
    return texts


def _only(pairs: Pairs, alive: Bools) -> Pairs | None:
    """The pairs that `near_pairs` would give of the units that are alive alone."""
    texts = _alive(pairs, alive)
    use = pairs.light.copy()
    ends = np.searchsorted(pairs.left, np.arange(len(texts) + 1))
    sizes, members = pairs.sizes.copy(), pairs.members
    light = pairs.light.copy()
    if not _full_buckets(sizes, members, texts, ends, pairs.right, use, light):
        return None
    use &= texts[pairs.left] & texts[pairs.right]
    number = (np.cumsum(texts) - 1).astype(np.int32)
    group = pairs.group[alive]
    group = np.where(group >= 0, number[group] if len(number) else group, group).astype(np.int32)
    still = np.repeat(sizes > 0, pairs.sizes) & texts[members]
    left, right = number[pairs.left[use]], number[pairs.right[use]]
    return Pairs(group, left, right, pairs.similarity[use], light[use], sizes[sizes > 0], number[members[still]])


@compiled
def _full_buckets(sizes, members, alive, ends, right, use, light):  # type: ignore[no-untyped-def]
    """Marks the pairs that meet in a full bucket in `use`, and in `light` those whose bucket is full no more; sets
    `sizes` to what is left of each full bucket. False where a bucket's pairs were never compared."""
    base = 0
    here, place = np.empty(members.size, np.int32), np.empty(members.size, np.int32)
    for bucket in range(sizes.size):
        count = 0
        for at in range(base, base + sizes[bucket]):
            if alive[members[at]]:
                here[count], place[count] = members[at], at - base
                count += 1
        base += sizes[bucket]
        full = count > BUCKET + 1
        leaders = BUCKET if full else max(count - 1, 0)
        if leaders and place[leaders - 1] >= SPARE:  # not one of those that all others were compared with
            return False
        for k in range(leaders):
            low, high = ends[here[k]], ends[here[k] + 1]
            for other in range(k + 1, count):
                if low == high:
                    break
                a, b = low, high
                while a < b:
                    middle = (a + b) // 2
                    if right[middle] < here[other]:
                        a = middle + 1
                    else:
                        b = middle
                if a < high and right[a] == here[other]:
                    use[a] = True
                    if not full:
                        light[a] = True
        sizes[bucket] = count if full else 0
    return True


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
