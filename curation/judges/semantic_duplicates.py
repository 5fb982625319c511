"""Semantic duplicates: of rows that mean the same one stays."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from ..duplicates.survivors import PLACE, Places, Rule, drops, json_column, row_ids
from ..embeddings import embedding_needs, vectors
from ..folder import HouseError
from ..steps import Corpus, Measure
from ..text.view import VIEW_COLUMNS, View

if TYPE_CHECKING:
    from ..duplicates.groups import Said
    from ..text.spans import Ints

EXACT_ROWS = 20_000  # up to so many rows all pairs are compared: two seconds
Reals = npt.NDArray[np.float64]


@dataclass(frozen=True)
class SemanticDuplicate:
    """Drops rows whose embedding is near that of another row: pairs of cosine similarity at least `threshold`, exact
    within k-means clusters (SemDeDup, arXiv 2303.09540; SemHash).

    model: an embedding model of the recipe; None: TF-IDF/SVD of `dims` dimensions, whose cosines lie lower. view: the
    text that is embedded. threshold: cosine from which two rows mean the same; 0.9 is SemHash's, 0.95 takes paraphrases
    of little difference alone. k: clusters that pairs are looked for within, a pair across two being missed; None
    compares all rows; 0 (the default) all up to 20,000 rows, and beyond the square root of the rows. floor: cosine from
    which pairs are kept beside the verdicts, so that any threshold from there on can be decided again; default 0.05
    below the threshold. survivor: of each group of linked rows stays the longest (by characters of the view), the first
    (source, then position), the one farthest from its cluster's centre (SemDeDup's choice) or the nearest to it.

    Reason `semantic_duplicate`. Evidence {duplicate_of, cluster, similarity} where the similarity with the survivor is
    at least the floor; where it is below the threshold, {via, via_similarity}: the row through which this one is
    linked. Rows without text are never duplicates. Results depend neither on the rows' order nor on the number of
    threads. Memory: 4 bytes a dimension and row, 33 a pair above the floor.
    """

    model: str | None = None
    view: View = "prompt"
    threshold: float = 0.9
    k: int | None = 0
    floor: float | None = None
    survivor: Literal["longest", "first", "farthest", "nearest"] = "longest"
    dims: int = 256
    seed: int = 0

    scope: ClassVar[Literal["corpus"]] = "corpus"
    score: ClassVar[str | None] = None

    def __post_init__(self) -> None:
        if not 0 < self.threshold <= 1:
            raise HouseError(f"SemanticDuplicate: threshold is {self.threshold}; a cosine similarity lies in (0, 1]")
        if not 0 < self._floor() <= self.threshold:
            raise HouseError(f"SemanticDuplicate: floor is {self.floor}; it must be above 0 and at most the threshold")
        if (self.k is not None and self.k < 0) or self.dims < 1:
            raise HouseError(f"{self}: k is at least 1 (0: by the number of rows), dims is at least 1")

    @property
    def needs(self) -> tuple[Measure, ...]:
        return embedding_needs(self.model, self.view)

    def limits(self) -> tuple[float | None, float | None]:
        return None, self.threshold

    def judge(self, corpus: Corpus) -> pa.Table:
        """Verdicts for all live rows, in the order of `corpus.tables()`."""
        from ..duplicates.files import write_said
        from ..duplicates.groups import Said
        from ..duplicates.minhash import Pairs
        from ..duplicates.near_vectors import near_vectors
        from ..selecting.selection import canonical, row_keys

        places, lengths, names = self._places(corpus)
        order = canonical(row_keys(names))
        found = vectors(corpus, self.model, self.view, self.dims, self.seed)[order]
        labels, centred = self._clustered(found)
        pairs = near_vectors(found, labels, self._floor())
        group, nearness = np.empty_like(pairs.group), np.empty(len(order))
        group[order], nearness[order] = pairs.group, centred
        said = Said(len(order), Pairs(group, *(getattr(pairs, name) for name in _OTHERS)))
        write_said(corpus.kept, json.dumps(self._settings()), said, lengths, nearness, "")
        return self._decided(corpus, said, places, lengths, nearness)

    def rejudge(self, corpus: Corpus, kept: Path, came: npt.NDArray[np.bool_]) -> pa.Table | None:
        """What `judge` gives on the rows of `corpus`, from what an earlier judging left in `kept`: those of its rows
        that `came` marks, in order. None where the kept files are of other settings, or where rows are gone and with
        them what clusters, centres or TF-IDF were fitted on."""
        from ..duplicates.files import read_said

        found = read_said(kept, json.dumps(self._settings()), "", len(came))
        fitted = self.model is None or self._k(len(came)) > 1 or self.survivor in ("farthest", "nearest")
        if found is None or (fitted and not came.all()) or self._k(int(came.sum())) != self._k(len(came)):
            return None
        said, lengths, nearness, _ = found
        some = said.only(came)
        if some is None or nearness is None:
            return None
        return self._decided(corpus, some, self._places(corpus)[0], lengths[came], nearness[came])

    def _floor(self) -> float:
        return round(max(self.threshold - 0.05, 0.01), 6) if self.floor is None else self.floor

    def _k(self, rows: int) -> int:
        if self.k is None or (self.k == 0 and rows <= EXACT_ROWS):
            return 1
        return self.k or round(rows**0.5)

    def _settings(self) -> dict[str, Any]:
        return {"judge": "semantic", "model": self.model, "view": self.view, "k": self.k, "floor": self._floor(),
                "dims": self.dims if self.model is None else 0, "seed": self.seed}  # fmt: skip

    def _places(self, corpus: Corpus) -> "tuple[Places, Ints, pa.ChunkedArray]":
        """Where rows stand, the characters of their views, and their names."""
        from ..text.texts import texts

        places, lengths, names = Places(), [np.zeros(0, np.int64)], []
        for rows in corpus.tables(["row_id", *PLACE, *VIEW_COLUMNS]):
            places.add(rows)
            lengths.append(pc.utf8_length(texts(rows, self.view)).to_numpy(zero_copy_only=False).astype(np.int64))
            names += rows["row_id"].chunks
            corpus.progress(len(places), corpus.rows)
        return places, np.concatenate(lengths), pa.chunked_array(names, pa.string())

    def _clustered(self, found: np.ndarray) -> "tuple[Ints, Reals]":
        """Cluster of each row, and its cosine with the cluster's centre."""
        from ..selecting.kmeans import kmeans, means, one_blas_thread

        k = self._k(len(found))
        with one_blas_thread():
            if k > 1:
                clusters = kmeans(found, k, self.seed)
                labels, centres = clusters.labels, clusters.centres
            else:
                labels = np.zeros(len(found), np.int64)
                centres = means(found, labels, 1)[0]
            centres = centres / np.maximum(np.linalg.norm(centres, axis=1, keepdims=True), 1e-12)
            return labels, np.einsum("ij,ij->i", found, centres[labels]).astype(np.float64)

    def _decided(self, corpus: Corpus, said: "Said", places: Places, lengths: "Ints", nearness: Reals) -> pa.Table:
        from ..duplicates.groups import decided

        by = {"farthest": Rule("measure", prefer="low"), "nearest": Rule("measure", prefer="high")}
        rule = by.get(self.survivor, Rule("longest" if self.survivor == "longest" else "first"))
        rank = places.rank(rule, lengths, nearness, lambda wanted: row_ids(corpus.tables(["row_id"]), wanted))
        found = decided(said, rank, self.threshold)
        names = row_ids(corpus.tables(["row_id"]), np.r_[found.survivor, found.via])
        count, indirect = len(found.dropped), found.via >= 0
        evidence = {
            "duplicate_of": names[:count],
            "similarity": pa.array(np.round(found.similarity, 6), mask=np.isnan(found.similarity)),
            "cluster": pa.array(found.cluster),
            "via": names[count:],
            "via_similarity": pa.array(np.round(found.via_similarity, 6), mask=~indirect),
        }
        score = np.where(indirect, found.via_similarity, found.similarity)
        return drops(said.rows, found.dropped, "semantic_duplicate", score, json_column(evidence))


_OTHERS = ("left", "right", "similarity", "light", "sizes", "members")
