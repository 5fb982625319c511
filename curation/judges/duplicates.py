"""Exact and near duplicates: one row of each group stays."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

import numpy as np
import pyarrow as pa

from ..folder import HouseError
from ..steps import Corpus, Unmeasured
from ..survivors import PLACE, Places, Survivor, drops, json_column, survivors
from ..text import VIEW_COLUMNS, View

if TYPE_CHECKING:
    from ..minhash import Bools, Reals
    from ..shingles import Hashes
    from ..spans import Ints


@dataclass(frozen=True)
class ExactDuplicate(Unmeasured):
    """Drops rows whose text equals that of another row after NFKC, case folding and collapse of white space.

    view: the text compared, pair (prompt and response, of a preference row also the rejected one), prompt or response.
    survivor: of each group stays the first (sources in corpus order, then position) or the one whose text has most
    characters. Rows whose view is empty are never duplicates of each other, unless the whole row
    says nothing. Reason `exact_duplicate`, score 1, evidence {duplicate_of, view}. Holds some 100 bytes a row.
    """

    view: View = "pair"
    survivor: Survivor = "first"

    scope: ClassVar[Literal["corpus"]] = "corpus"

    def judge(self, corpus: Corpus) -> pa.Table:
        from ..normal_digests import normal_digests

        places, keys, lengths = Places(), [np.zeros((0, 2), np.uint64)], [np.zeros(0, np.int64)]
        seen = 0
        for rows in _seen(corpus, places):
            for batch in rows.select(VIEW_COLUMNS).to_batches():
                said, empty, length = normal_digests(batch, self.view)
                blank = np.flatnonzero(empty)
                if self.view != "pair" and len(blank):  # alone, unless the whole row is empty
                    blank = blank[~normal_digests(batch.take(pa.array(blank)), "pair")[1]]
                    said[blank] = np.stack([blank + seen, np.zeros(len(blank), np.int64)], axis=1)
                seen += batch.num_rows
                keys.append(said)
                lengths.append(length)
        stays = survivors(_groups(np.concatenate(keys)), places.preference(self.survivor, np.concatenate(lengths)))
        dropped = np.flatnonzero(stays != np.arange(len(stays)))
        names = pa.array([self.view] * len(dropped), pa.string())
        evidence = json_column({"duplicate_of": places.ids(stays[dropped]), "view": names})
        return drops(len(places), dropped, "exact_duplicate", np.ones(len(dropped)), evidence)


@dataclass(frozen=True)
class NearDuplicate(Unmeasured):
    """Drops rows that share most of their word n-grams with another row: MinHash-LSH, each pair verified by the true
    Jaccard similarity of the two sets of n-grams (Broder 1997; Lee et al., arXiv 2107.06499).

    threshold: Jaccard from which two rows are near duplicates. ngram: words of a shingle; a row with fewer words is one
    shingle, near only to rows of the same words; a row without words is near to none. view: as in ExactDuplicate.
    bands, rows_per_band: a pair of Jaccard J is found with probability 1 - (1 - J^rows_per_band)^bands (defaults: 0.99
    at 0.7, 0.999 at 0.75; a lower threshold wants shorter bands). seed: of the hash functions. survivor: of each
    cluster of linked rows stays the first (sources in corpus order, then position) or the one with most words.

    Reason `near_duplicate`. Score: similarity with the survivor or, where that is below the threshold, with the row
    through which this one is linked to it. Evidence {duplicate_of, similarity, cluster}, and in the second case {via,
    via_similarity}: following `via` from row to row ends at the survivor. Holds some 8 bytes a word and 300 a row.
    """

    threshold: float = 0.7
    ngram: int = 5
    view: View = "pair"
    bands: int = 25
    rows_per_band: int = 5
    seed: int = 0
    survivor: Survivor = "first"

    scope: ClassVar[Literal["corpus"]] = "corpus"

    def __post_init__(self) -> None:
        if not 0 < self.threshold <= 1:
            raise HouseError(f"NearDuplicate: threshold is {self.threshold}; a Jaccard similarity lies in (0, 1]")
        if min(self.ngram, self.bands, self.rows_per_band) < 1:
            raise HouseError(f"{self}: ngram, bands and rows_per_band must be at least 1")

    def limits(self) -> tuple[float | None, float | None]:
        return None, self.threshold

    def judge(self, corpus: Corpus) -> pa.Table:
        from ..minhash import clusters, jaccards, near_pairs
        from ..shingles import shingle_sets

        places = Places()
        shingles = shingle_sets(_seen(corpus, places), self.view, self.ngram)
        left, right, similarity = near_pairs(shingles, self.threshold, self.bands, self.rows_per_band, self.seed)
        rank = places.preference(self.survivor, shingles.words)
        stays = survivors(clusters(len(shingles), left, right), rank)
        dropped = np.flatnonzero(stays != np.arange(len(stays)))
        direct = jaccards(shingles, dropped, stays[dropped])
        linked = np.zeros(len(stays), np.bool_)
        linked[stays] = True
        linked[dropped[direct < self.threshold]] = False
        linked[dropped[direct >= self.threshold]] = True
        via, closeness = _links(linked, left, right, similarity, rank)
        indirect = ~linked[dropped]
        _, cluster = np.unique(rank[stays[dropped]], return_inverse=True)
        evidence = json_column(
            {
                "duplicate_of": places.ids(stays[dropped]),
                "similarity": pa.array(direct),
                "cluster": pa.array(cluster),
                "via": places.ids(via[dropped], only=indirect),
                "via_similarity": pa.array(closeness[dropped], mask=~indirect),
            }
        )
        return drops(len(stays), dropped, "near_duplicate", np.where(indirect, closeness[dropped], direct), evidence)


def _seen(corpus: Corpus, places: Places) -> Iterator[pa.Table]:
    """The corpus part by part, its places noted."""
    for rows in corpus.tables([*PLACE, *VIEW_COLUMNS]):
        places.add(rows)
        yield rows
        corpus.progress(len(places), corpus.rows)


def _links(linked: "Bools", left: "Ints", right: "Ints", similarity: "Reals", rank: "Ints") -> tuple["Ints", "Reals"]:
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


def _groups(keys: "Hashes") -> "Ints":
    """Equal rows of `keys` have equal numbers, from 0 up."""
    order = np.lexsort(keys.T)
    new = np.r_[False, (keys[order[1:]] != keys[order[:-1]]).any(axis=1)] if len(keys) else np.zeros(0, np.bool_)
    groups = np.empty(len(keys), np.int64)
    groups[order] = np.cumsum(new)
    return groups
