"""Exact and near duplicates: one row of each group stays."""

import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from ..duplicates.survivors import PLACE, Places, Rule, Survivor, drops, json_column, row_ids
from ..folder import HouseError
from ..steps import Corpus, Measure, Unmeasured
from ..text.view import VIEW_COLUMNS

if TYPE_CHECKING:
    from ..duplicates.groups import Decision, Said
    from ..duplicates.index import Index
    from ..text.spans import Ints


@dataclass(frozen=True)
class ExactDuplicate(Unmeasured):
    """Drops rows whose text equals that of another row after NFKC, case folding and collapse of white space.

    view: the text compared: pair (prompt and response, of a preference row also the rejected one), prompt, response, or
    turn: a row is a duplicate if any of its user or assistant turns (of messages, chosen or rejected; or its raw text)
    equals any of another row, where turns of fewer than `turn_bytes` bytes of UTF-8 ("Thanks!", "Please go on") do not
    count: 48 are some eight words of English or sixteen letters of Chinese. Rows whose view is empty are never
    duplicates of each other, unless the whole row says nothing.

    survivor: which row of each group stays. first: by source in corpus order, then position. longest: the most
    characters of the view (of all turns). source: the row whose source comes first in `sources`; sources not named come
    after all that are. measure: the row of the highest (prefer: high) or lowest (low) value in `column` of the measure
    `of`; rows without a value come last. Ties go to the first.

    index: as in NearDuplicate.

    Reason `exact_duplicate`, score 1, evidence {duplicate_of, view, cluster} and of an
    index {release}; where rows are linked through others, as
    only turns can be, also {via: the row that it shares a turn with}. Holds some 60 bytes a row; what it keeps beside
    its verdicts lets another survivor rule decide again without reading a text.
    """

    view: Literal["pair", "prompt", "response", "turn"] = "pair"
    survivor: Survivor = "first"
    sources: tuple[str, ...] = ()
    of: Measure | None = None
    column: str | None = None
    prefer: Literal["high", "low"] = "high"
    turn_bytes: int = 48
    index: str | None = None

    scope: ClassVar[Literal["corpus"]] = "corpus"

    def __post_init__(self) -> None:
        _check(self)

    @property
    def needs(self) -> tuple[Measure, ...]:
        return () if self.of is None else (self.of,)

    def judge(self, corpus: Corpus) -> pa.Table:
        from ..duplicates.normal_digests import said_digests

        places = Places()
        said, lengths, keys = said_digests(_seen(corpus, places), self.view, self.turn_bytes)
        index = _index(self, corpus)
        if index is not None:
            from ..duplicates.index import equal

            earlier, near = equal(index, keys)
            said = replace(said, earlier=earlier, earlier_near=near)
        verdicts = _judged(self, corpus, said, lengths, places, index)
        if index is not None:
            texts, units = _kept_texts(said, verdicts)
            sayable = keys[texts, 1] != 0
            texts, units = texts[sayable], units[sayable]
            _extend(corpus, index, said, units, {"keys": [keys[texts]]})
        return verdicts

    def rejudge(self, corpus: Corpus, kept: Path, came: npt.NDArray[np.bool_]) -> pa.Table | None:
        """What `judge` gives on the rows of `corpus`, from what an earlier judging left in `kept`: those of its rows
        (in their order) that `came` marks are the rows of the corpus. None where another view was kept."""
        return _rejudged(self, corpus, kept, came)

    def _settings(self) -> dict[str, Any]:
        return {"judge": "exact", "view": self.view, "turn_bytes": self.turn_bytes if self.view == "turn" else 0}

    def _threshold(self) -> float:
        return 1.0

    def _verdicts(self, rows: int, found: "Decision", corpus: Corpus, index: "Index | None") -> pa.Table:
        owners, releases, via = _names(found, corpus, index)
        count = len(found.dropped)
        evidence = {
            "duplicate_of": owners,
            "release": releases,
            "view": pa.array([self.view] * count, pa.string()),
            "cluster": pa.array(found.cluster),
            "via": via,
        }
        return drops(rows, found.dropped, "exact_duplicate", np.ones(count), json_column(evidence))


@dataclass(frozen=True)
class NearDuplicate(Unmeasured):
    """Drops rows that share most of their word n-grams with another row: MinHash-LSH, each pair verified by the true
    Jaccard similarity of the two sets of n-grams (Broder 1997; Lee et al., arXiv 2107.06499).

    threshold: Jaccard from which two rows are near duplicates. ngram: words of a shingle; each letter of a script
    without spaces (Han, kana, Thai, …) is a word. A text of fewer words is one shingle, near only to the same words, so
    that distinct short rows stay; or, with `chars`, it has its runs of so many letters as shingles and is compared with
    other short texts (at 5, "2 plus 2 is 4" and "2 plus 2 is 5" have Jaccard 0.8: take care). A row without words is
    near to none. view, turn_bytes: as in ExactDuplicate; of `turn`, the nearest two turns count.

    floor: Jaccard from which verified pairs are kept beside the verdicts, so that any threshold from there on can be
    decided again without measuring; default: the threshold rounded down to a tenth, at most 0.7. bands, rows_per_band:
    a pair of Jaccard J is found with probability 1 - (1 - J^rows_per_band)^bands. Default: derived from the floor so
    that a pair at the floor is found with probability 0.989: 25 bands of 5 at 0.7, 31 of 3 at 0.5. Conventions, on
    request: {bands: 14, rows_per_band: 8} (FineWeb; 0.92 at 0.8), 256 permutations {bands: 32, rows_per_band: 8}.
    seed: of the hash functions. survivor, sources, of, column, prefer: as in ExactDuplicate, longest by words.

    index: a folder of earlier releases (begun where there is none), which nightly runs share. A row near one that an
    earlier release kept goes, with all of its cluster, {release} in the evidence; what stays is added as release
    OUT/SET, also if a later step drops it: so put this step last. A run that is done again sees the releases before its
    own alone and replaces its own. On disk 8 bytes a word and 240 a row.

    Reason `near_duplicate`. Evidence {duplicate_of, cluster, similarity} where the similarity with the survivor is at
    least the floor; where it is below the threshold, {via, via_similarity}: the row through which this one is linked,
    following `via` from row to row ends at the survivor. Score: the similarity, else via_similarity. Results depend
    neither on the rows' order (but for `first`) nor on the number of processors. Holds some 60 bytes a row; shingles (8
    bytes a word) and band keys (8 a band and row) beyond 128 MB each lie in files beside the run.
    """

    threshold: float = 0.7
    ngram: int = 5
    view: Literal["pair", "prompt", "response", "turn"] = "pair"
    bands: int | None = None
    rows_per_band: int | None = None
    seed: int = 0
    survivor: Survivor = "first"
    sources: tuple[str, ...] = ()
    of: Measure | None = None
    column: str | None = None
    prefer: Literal["high", "low"] = "high"
    chars: int | None = None
    floor: float | None = None
    turn_bytes: int = 48
    index: str | None = None

    scope: ClassVar[Literal["corpus"]] = "corpus"

    def __post_init__(self) -> None:
        if not 0 < self.threshold <= 1:
            raise HouseError(f"NearDuplicate: threshold is {self.threshold}; a Jaccard similarity lies in (0, 1]")
        if not 0 < self._floor() <= self.threshold:
            raise HouseError(f"NearDuplicate: floor is {self.floor}; it must be above 0 and at most the threshold")
        if (self.bands is None) != (self.rows_per_band is None):
            raise HouseError("NearDuplicate: bands and rows_per_band go together; leave both out to have them derived")
        if min(self.ngram, self.bands or 1, self.rows_per_band or 1, 1 if self.chars is None else self.chars) < 1 or (
            self.bands == 0 or self.rows_per_band == 0
        ):
            raise HouseError(f"{self}: ngram, bands, rows_per_band and chars must be at least 1")
        _check(self)

    @property
    def needs(self) -> tuple[Measure, ...]:
        return () if self.of is None else (self.of,)

    def limits(self) -> tuple[float | None, float | None]:
        return None, self.threshold

    def judge(self, corpus: Corpus) -> pa.Table:
        from ..duplicates.groups import Said
        from ..duplicates.minhash import near_pairs
        from ..duplicates.shingles import shingle_sets

        places = Places()
        shingles = shingle_sets(
            _seen(corpus, places), self.view, self.ngram, self.chars, self.turn_bytes, corpus.scratch
        )
        bands, width = self._bands()
        index = _index(self, corpus)
        pairs = near_pairs(shingles, self._floor(), bands, width, self.seed, corpus.scratch)
        lengths = shingles.words.astype(np.int64)
        if shingles.row is not None:
            lengths = np.bincount(shingles.row, shingles.words, len(places)).astype(np.int64)
        said = Said(len(places), pairs, shingles.row)
        if index is None:
            return _judged(self, corpus, said, lengths, places)
        from ..duplicates.index import nearest, shingle_pieces
        from ..duplicates.minhash import band_keys

        how = (bands, width, self.seed, corpus.scratch)
        earlier, near = nearest(index, shingles, said.first(), self._floor(), *how)
        said = replace(said, earlier=earlier, earlier_near=near)
        verdicts = _judged(self, corpus, said, lengths, places, index)
        _, units = _kept_texts(said, verdicts)
        hashes, offsets = shingle_pieces(shingles, units)
        keys = band_keys(shingles, units, *how, name="own-keys.u64")
        _extend(corpus, index, said, units, {"keys": [keys], "hashes": hashes, "offsets": [offsets]})
        return verdicts

    def rejudge(self, corpus: Corpus, kept: Path, came: npt.NDArray[np.bool_]) -> pa.Table | None:
        """What `judge` gives on the rows of `corpus`, from what an earlier judging left in `kept`: those of its rows
        (in their order) that `came` marks are the rows of the corpus.

        None where the kept files cannot serve: another floor, banding, view, ngram, chars or seed; or so many rows gone
        that a bucket of many near texts is left without those that the others were compared with."""
        return _rejudged(self, corpus, kept, came)

    def _floor(self) -> float:
        lowest = min(self.threshold, max(0.1, np.floor(self.threshold * 10 + 1e-9) / 10), 0.7)
        return float(lowest) if self.floor is None else self.floor

    def _bands(self) -> tuple[int, int]:
        from ..duplicates.minhash import banding

        if self.bands is None or self.rows_per_band is None:
            return banding(self._floor())
        return self.bands, self.rows_per_band

    def _settings(self) -> dict[str, Any]:
        least = self.turn_bytes if self.view == "turn" else 0
        return {
            "judge": "near", "view": self.view, "turn_bytes": least, "ngram": self.ngram, "chars": self.chars,
            "floor": self._floor(), "bands": self._bands(), "seed": self.seed,
        }  # fmt: skip

    def _threshold(self) -> float:
        return self.threshold

    def _verdicts(self, rows: int, found: "Decision", corpus: Corpus, index: "Index | None") -> pa.Table:
        owners, releases, via = _names(found, corpus, index)
        indirect = found.via >= 0
        evidence = {
            "duplicate_of": owners,
            "release": releases,
            "similarity": pa.array(found.similarity, mask=np.isnan(found.similarity)),
            "cluster": pa.array(found.cluster),
            "via": via,
            "via_similarity": pa.array(found.via_similarity, mask=~indirect),
        }
        score = np.where(indirect, found.via_similarity, found.similarity)
        return drops(rows, found.dropped, "near_duplicate", score, json_column(evidence))


Judge = ExactDuplicate | NearDuplicate


def _index(step: Judge, corpus: Corpus) -> "Index | None":
    from ..duplicates.index import open_index

    if step.index is None:
        return None
    return open_index(Path(step.index), json.dumps(step._settings()), getattr(corpus, "home", None))


def _kept_texts(said: "Said", verdicts: pa.Table) -> "tuple[Ints, Ints]":
    """Numbers of the texts of the rows that stay, and of each a unit of such a row."""
    stays = verdicts["keep"].to_numpy()
    units = np.flatnonzero((stays if said.row is None else stays[said.row]) & (said.pairs.group >= 0))
    texts, first = np.unique(said.pairs.group[units], return_index=True)
    return texts.astype(np.int64), units[first]


def _extend(corpus: Corpus, index: "Index", said: "Said", units: "Ints", arrays: Any) -> None:
    """Adds the rows that stay to the index, unless the corpus is of no run (a preview)."""
    from ..duplicates.index import extend

    home = getattr(corpus, "home", None)
    if home is not None:
        rows = units if said.row is None else said.row[units].astype(np.int64)
        extend(index, home, row_ids(corpus.tables(["row_id"]), rows), arrays)


def _names(found: "Decision", corpus: Corpus, index: "Index | None") -> tuple[pa.Array, pa.Array, pa.Array]:
    """row_id and release of each survivor (release: null where it is of this run), and row_id of each `via`."""
    count = len(found.dropped)
    ids = row_ids(corpus.tables(["row_id"]), np.r_[np.where(found.earlier, -1, found.survivor), found.via])
    if index is None:
        return ids[:count], pa.nulls(count, pa.string()), ids[count:]
    names, releases = index.names(np.where(found.earlier, found.survivor, -1))
    return pc.coalesce(ids[:count], names), releases, ids[count:]


def _check(step: Judge) -> None:
    name = type(step).__name__
    if step.turn_bytes < 1:
        raise HouseError(f"{name}: turn_bytes is {step.turn_bytes}; it must be at least 1")
    if (step.survivor == "source") != bool(step.sources):
        raise HouseError(f"{name}: survivor: source goes with sources: [the sources, the best first]")
    measured = step.of is not None and step.column is not None
    if (step.survivor == "measure") != measured or (step.of is None) != (step.column is None):
        raise HouseError(f"{name}: survivor: measure goes with of: a measure, and column: one of its columns")
    if step.of is not None and step.column not in step.of.columns:
        known = ", ".join(step.of.columns)
        raise HouseError(f"{name}: {type(step.of).__name__} has no column {step.column}; it has {known}")


def _judged(
    step: Judge, corpus: Corpus, said: "Said", lengths: "Ints", places: Places, index: "Index | None" = None
) -> pa.Table:
    """Keeps what was measured, and decides."""
    from ..duplicates.files import write_said

    values = _values(step, corpus)
    write_said(corpus.kept, json.dumps(step._settings()), said, lengths, values, _measure(step))
    verdicts = _decided(step, corpus, said, np.ones(len(places), np.bool_), lengths, values, places, index)
    assert verdicts is not None, "all rows are there"
    return verdicts


def _rejudged(step: Judge, corpus: Corpus, kept: Path, came: npt.NDArray[np.bool_]) -> pa.Table | None:
    from ..duplicates.files import read_said

    if step.index is not None:  # it must be asked anew, and extended
        return None
    found = read_said(kept, json.dumps(step._settings()), _measure(step), len(came))
    if found is None:
        return None
    said, lengths, values, same = found
    if step.survivor != "measure":
        values = None
    elif same and values is not None:
        values = values[came]
    else:
        try:
            values = _values(step, corpus)
        except KeyError:  # nobody measured it
            return None
    places = Places()
    for rows in corpus.tables(PLACE):
        places.add(rows)
    return _decided(step, corpus, said, came, lengths[came], values, places)


def _decided(
    step: Judge,
    corpus: Corpus,
    said: "Said",
    came: npt.NDArray[np.bool_],
    lengths: "Ints",
    values: npt.NDArray[np.float64] | None,
    places: Places,
    index: "Index | None" = None,
) -> pa.Table | None:
    from ..duplicates.groups import decided

    some = said.only(came)
    if some is None:
        return None
    rule = Rule(step.survivor, step.sources, step.prefer)
    rank = places.rank(rule, lengths, values, lambda wanted: row_ids(corpus.tables(["row_id"]), wanted))
    return step._verdicts(some.rows, decided(some, rank, step._threshold()), corpus, index)


def _measure(step: Judge) -> str:
    return "" if step.of is None else f"{step.of!r}.{step.column}"


def _values(step: Judge, corpus: Corpus) -> npt.NDArray[np.float64] | None:
    """The values that a survivor is chosen by; null is NaN."""
    if step.survivor != "measure" or step.column is None:
        return None
    column = corpus.values([step.column])[step.column].cast(pa.float64())
    values: npt.NDArray[np.float64] = column.to_numpy()
    return values


def _seen(corpus: Corpus, places: Places) -> Iterator[pa.Table]:
    """The corpus part by part, its places noted; the next part is read while one is worked on."""
    from ..duplicates.shingles import ahead

    for rows in ahead(corpus.tables([*PLACE, *VIEW_COLUMNS])):
        places.add(rows)
        yield rows
        corpus.progress(len(places), corpus.rows)
