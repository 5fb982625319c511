"""Decontamination: training rows that hold the items of evaluation sets are dropped, with the matched text as evidence.

The evaluation sets' n-grams are indexed and the training rows streamed past them (overlap.py).
"""

import json
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from ..folder import HouseError, read_json, write_json, write_parquet
from ..steps import VERDICT, Corpus, Unmeasured
from ..text.benchmark_sets import BRIEF, EvaluationSet, resolved, sets_digest
from ..text.spans import Ints
from ..text.view import VIEW_COLUMNS, View

if TYPE_CHECKING:
    from ..text.overlap import Best, Index, Tops

Bools = npt.NDArray[np.bool_]
SHOWN_WORDS = 200  # of the matched text, in the evidence
_FACTS, _MATCHES, _TOPS = "decontaminate.json", "matches.parquet", "tops.parquet"  # in `kept`
_BEST = [("item", pa.int32()), ("coverage", pa.float64()), ("words", pa.int32()), ("matched", pa.string())]
MATCHES = pa.schema([("row", pa.int64()), *_BEST, *((f"run_{name}", kind) for name, kind in _BEST)])
TOPS = pa.schema([("source", pa.string()), ("item", pa.int32()), ("coverage", pa.float64()), ("words", pa.int32())])


@dataclass(frozen=True)
class Decontaminate(Unmeasured):
    """Drops rows that hold an item of an evaluation set, by two rules: TÜLU 3's coverage (arXiv 2411.15124, section
    3.2) and GPT-3's 13-gram overlap (arXiv 2005.14165, appendix C).

    against: evaluation sets, each a path that reading knows or {path, name, prompt, options, answer} with the columns
    to look for. sets: usual ones by name (gsm8k, mmlu, humaneval, …; `benchmark_sets.KNOWN`), each with its path; their
    columns are known. n: words of an n-gram (case-folded runs of letters and digits, so that punctuation and case hide
    nothing; each letter of a script without spaces is a word). coverage: a field of an item is covered by the share of
    its words that lie in n-grams found in the one training row; an item by its prompt, or, where that is more, by the
    mean of prompt and answer; a row with an item covered above `coverage` is dropped (1: rule off). overlap: a row that
    shares so many words in sequence with an item is dropped too (0: rule off). view: the side of the training rows that
    is looked at. level: row, or source: where the rows of a source cover more than `source_share` of the items of a set
    above `coverage`, the whole source is dropped (with the coverage rule off: share `overlap` words with them. Idioms
    of code share 13 words with many items, so that this rule alone would cost whole sources of code).

    An answer counts from 13 words on, and so does a question without its options, or one of several turns. A field
    shorter than n words matches as a whole; below 4 words only where it is a whole turn. Score: the highest coverage of
    an item; null where no n-gram is shared and where only the other rules drop the row. Reasons: contaminated,
    contaminated_ngram13 (the number is `overlap`), contaminated_source. Evidence: set, item (its number there from 0),
    id (its own, where it has one), rule, threshold, coverage, words (of the longest common run) and matched (that run
    in the row); of a whole source: set, items, of_items, share, threshold. Memory: some 60 bytes a word of the
    evaluation sets, and what is shown of the rows that share an n-gram with an item.
    """

    against: tuple[str | EvaluationSet, ...] = ()
    sets: Mapping[str, str] | None = None
    n: int = 8
    coverage: float = 0.5
    overlap: int = 13
    view: View = "pair"
    level: Literal["row", "source"] = "row"
    source_share: float = 0.02
    scope: ClassVar[Literal["corpus"]] = "corpus"

    def __post_init__(self) -> None:
        if self.n < BRIEF:
            raise HouseError(f"Decontaminate: n is {self.n}, it is at least {BRIEF}")
        if self.overlap and self.overlap < self.n:
            raise HouseError(f"Decontaminate: overlap is {self.overlap}, it is 0 (off) or at least n = {self.n}")
        for name in ("coverage", "source_share"):
            if not 0 <= getattr(self, name) <= 1:
                raise HouseError(f"Decontaminate: {name} is {getattr(self, name)}, it is a share between 0 and 1")
        resolved(self.against, self.sets or {})

    def limits(self) -> tuple[float | None, float | None]:
        """Covered items up to `coverage` are let through; rows that another rule drops have no score."""
        return None, self.coverage

    def judge(self, corpus: Corpus) -> pa.Table:
        """Verdicts for all live rows; a HouseError where an evaluation set cannot be read whole."""
        from ..text.overlap import Tops, read_index

        sets = resolved(self.against, self.sets or {})
        if not sets:
            warnings.warn("Decontaminate: no evaluation set is named, nothing was looked for", stacklevel=2)
        index = read_index(sets, self.n)
        _warn_unsought(index)
        sources = _sources(corpus) if self.level == "source" else []
        tops = Tops(len(sources), len(index.items)) if self.level == "source" else None
        pieces, done = [MATCHES.empty_table()], 0
        for part in corpus.tables(["source", *VIEW_COLUMNS]):
            for batch in part.to_batches():
                pieces.append(_matches(index, batch, self.view, sources, tops, done))
                done += batch.num_rows
            corpus.progress(done, corpus.rows)
        facts = {
            "sets": sets_digest(sets), "n": self.n, "view": self.view, "rows": done, "sizes": index.sizes,
            "items": [[item.set, item.number, item.id] for item in index.items],
        }  # fmt: skip
        matches = pa.concat_tables(pieces).combine_chunks()
        best = None if tops is None else _tops_table(tops, sources)
        _keep(corpus.kept, facts, matches, best)
        return self._verdicts(corpus, facts, matches, best)

    def rejudge(self, corpus: Corpus, kept: Path, came: Bools) -> pa.Table | None:
        """Verdicts by other thresholds, from what each row matched best. None where the sets, n or the view are others,
        or where whole sources are judged that were not before, or not by all of their rows."""
        sets = resolved(self.against, self.sets or {})
        if not (kept / _FACTS).is_file():
            return None
        facts = read_json(kept / _FACTS)
        same = (facts["n"], facts["view"], facts["rows"]) == (self.n, self.view, len(came))
        whole = self.level == "row" or (came.all() and (kept / _TOPS).is_file())
        if not same or not whole or facts["sets"] != sets_digest(sets) or corpus.rows != int(came.sum()):
            return None
        matches = pq.read_table(kept / _MATCHES, schema=MATCHES)
        rows = matches["row"].to_numpy()
        place = pa.array(np.cumsum(came)[rows] - 1)
        matches = matches.set_column(0, "row", place).filter(pa.array(came[rows]))
        best = pq.read_table(kept / _TOPS, schema=TOPS) if self.level == "source" else None
        return self._verdicts(corpus, facts, matches.combine_chunks(), best)

    def _verdicts(self, corpus: Corpus, facts: Mapping[str, Any], matches: pa.Table, tops: pa.Table | None) -> pa.Table:
        rows = matches["row"].to_numpy()
        covered = matches["coverage"].to_numpy() > self.coverage
        shared = (matches["run_words"].to_numpy() >= self.overlap) & (self.overlap > 0) & ~covered
        score = np.full(corpus.rows, np.nan)
        score[rows] = np.where(shared, np.nan, matches["coverage"].to_numpy())
        keep = np.ones(corpus.rows, np.bool_)
        keep[rows[covered | shared]] = False
        reasons = ["contaminated", f"contaminated_ngram{self.overlap}", "contaminated_source"]
        reason, proof = np.full(corpus.rows, -1), np.full(corpus.rows, -1)
        reason[rows[covered]], reason[rows[shared]] = 0, 1
        said = [*self._proofs(facts, matches.filter(pa.array(covered)), "coverage", ""),
                *self._proofs(facts, matches.filter(pa.array(shared)), f"ngram{self.overlap}", "run_")]  # fmt: skip
        proof[np.r_[rows[covered], rows[shared]]] = np.arange(len(said))
        for source, evidence in self._whole_sources(facts, tops).items():
            whole = keep & _of_source(corpus, source)
            score[whole], keep[whole], reason[whole], proof[whole] = np.nan, False, 2, len(said)
            said.append(evidence)
        columns = [
            pa.array(keep),
            pa.array(reasons, pa.string()).take(pa.array(reason, mask=reason < 0)),
            pa.array(score, pa.float64(), from_pandas=True),
            pa.array(said, pa.string()).take(pa.array(proof, mask=proof < 0)),
        ]
        return pa.Table.from_arrays(columns, schema=VERDICT)

    def _proofs(self, facts: Mapping[str, Any], matches: pa.Table, rule: str, which: str) -> list[str]:
        """Evidence of rows that `rule` drops, from the columns that begin with `which`."""
        threshold = self.coverage if rule == "coverage" else self.overlap
        columns = [matches[which + name].to_pylist() for name, _ in _BEST]
        said = []
        for number, covered, words, matched in zip(*columns, strict=True):
            name, place, own = facts["items"][number]
            proof = {"set": name, "item": place} | ({} if own is None else {"id": own})
            proof |= {"rule": rule, "threshold": threshold, "coverage": round(covered, 4), "words": words}
            said.append(json.dumps(proof | {"matched": matched}, ensure_ascii=False))
        return said

    def _whole_sources(self, facts: Mapping[str, Any], tops: pa.Table | None) -> dict[str, str]:
        """Evidence of each source that goes as a whole: the set of which it holds the largest share."""
        if tops is None:
            return {}
        by_words = (tops["words"].to_numpy() >= self.overlap) & (self.overlap > 0) & (self.coverage == 1)
        hit = (tops["coverage"].to_numpy() > self.coverage) | by_words
        held: dict[str, dict[str, int]] = {}
        for source, item in zip(
            tops["source"].filter(hit).to_pylist(), tops["item"].filter(hit).to_pylist(), strict=True
        ):
            of = held.setdefault(source, {})
            name = facts["items"][item][0]
            of[name] = of.get(name, 0) + 1
        found = {}
        for source, counts in held.items():
            share, name = max((count / facts["sizes"][name], name) for name, count in counts.items())
            if share > self.source_share:
                proof = {"set": name, "items": counts[name], "of_items": facts["sizes"][name], "share": round(share, 4),
                         "threshold": self.source_share, "rule": "source"}  # fmt: skip
                found[source] = json.dumps(proof, ensure_ascii=False)
        return found


def _sources(corpus: Corpus) -> list[str]:
    return sorted({name for part in corpus.tables(["source"]) for name in pc.unique(part["source"]).to_pylist()})


def _warn_unsought(index: "Index") -> None:
    for name, count in index.unsought.items():
        if count and count == index.sizes[name]:
            raise HouseError(
                f"evaluation set {name}: none of its {count} items says anything that could be looked for. Look into"
                " the file, and name its columns: {path: …, prompt: [COLUMN], answer: [COLUMN]}"
            )
        if count:
            said = f"{count} of {index.sizes[name]} items say nothing that could be looked for"
            warnings.warn(f"evaluation set {name}: {said}", stacklevel=3)


def _matches(
    index: "Index", batch: pa.RecordBatch, view: View, sources: list[str], tops: "Tops | None", before: int
) -> pa.Table:
    """What the rows of a batch that share an n-gram with an item have of it (schema MATCHES)."""
    from ..text.overlap import NOTHING, best
    from ..text.spans import spans

    of = None if tops is None else pc.index_in(batch["source"], pa.array(sources)).to_numpy().astype(np.int64)
    found = best(index, spans(batch, view), of, tops)
    rows = np.flatnonzero(found.item[:, 0] != NOTHING)
    if not len(rows):
        return MATCHES.empty_table()
    columns: list[Any] = [pa.array(rows + before)]
    columns += _best(found, rows, batch.take(pa.array(rows)), view)
    return pa.Table.from_arrays([pa.array(one, kind) for one, kind in zip(columns, MATCHES.types, strict=True)],
                                schema=MATCHES)  # fmt: skip


def _best(found: "Best", rows: Ints, batch: pa.RecordBatch, view: View) -> list[Any]:
    from ..text.overlap import passages
    from ..text.texts import texts

    said = texts(batch, view)
    columns: list[Any] = []
    for by in range(2):
        words, start = found.words[rows, by], found.start[rows, by]
        shown = passages(said, start, np.minimum(words, SHOWN_WORDS))
        columns += [found.item[rows, by], found.coverage[rows, by], words, shown]
    return columns


def _tops_table(tops: "Tops", sources: list[str]) -> pa.Table:
    share, run = tops.whole()
    source, item = np.nonzero(run)
    columns = [pa.array(sources, pa.string()).take(pa.array(source)), item, share[source, item], run[source, item]]
    return pa.Table.from_arrays([pa.array(one, kind) for one, kind in zip(columns, TOPS.types, strict=True)],
                                schema=TOPS)  # fmt: skip


def _keep(kept: Path, facts: Mapping[str, Any], matches: pa.Table, tops: pa.Table | None) -> None:
    write_parquet(kept / _MATCHES, matches)
    if tops is not None:
        write_parquet(kept / _TOPS, tops)
    write_json(kept / _FACTS, facts)


def _of_source(corpus: Corpus, name: str) -> Bools:
    pieces = [np.asarray(pc.equal(part["source"], name)) for part in corpus.tables(["source"])]
    return np.concatenate([np.zeros(0, np.bool_), *pieces])
