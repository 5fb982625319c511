"""Deciding again: other thresholds, quotas and budgets over what a finished run has measured. Writes no release.

A step before the first change stands as it is. After it each step meets other rows than before. What it said of a row
that it saw stays true where it looks at that row alone and did not change itself; everything else is judged again from
the values and pairs that the step kept. Rows that now come through to a measure which never saw them wait: they are
counted, priced by the pace of the run, and guessed about by nobody.
"""

import tempfile
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from .cache import measure_key, measured, stored
from .door import Progress
from .folder import HouseError, RunFolder, read_json
from .judging import KEPT, VALUES, tried
from .ledger import Mask, State, StepRecord, load_state, source_parts
from .overrides import Overrides, overruled
from .sift import AnyStep, SetPlan, full_steps, held_out_ids, held_out_rows, step_name
from .steps import Corpus, CorpusJudge, Measure, RowJudge, Tools, brief, columns_read, value_names

JUDGE_ERROR = "judge_error"


@runtime_checkable
class Rejudge(Protocol):
    """A corpus judge whose verdicts can be taken again from the files that it kept."""

    def rejudge(self, corpus: Corpus, kept: Path, came: Mask) -> pa.Table | None:
        """Verdicts (schema VERDICT) for the rows of `corpus`, as `judge` would give them, from what an earlier judging
        by the same class, perhaps with another threshold, left in `kept`. came: which of the rows that it judged
        then, in order, are in `corpus` now. None where those files cannot serve."""


@dataclass(frozen=True)
class Again:
    """One step decided again: came + made = kept + dropped + waiting.

    waiting: rows that came through to a measure or maker which never saw them. seconds: what they would take at the
    pace of the run; None where nothing waits. before: the step's record in the run."""

    step: int
    name: str
    judge: str
    brief: str  # the judge with the fields that its recipe sets
    changed: bool
    came: int
    made: int
    kept: int
    dropped: int
    waiting: int
    reasons: dict[str, int]
    seconds: float | None
    before: StepRecord
    notes: tuple[str, ...] = ()  # what the step warned of


@dataclass(frozen=True)
class SetAgain:
    """A set decided again. gained, lost: rows that only the new decision keeps, and only the old one."""

    name: str
    steps: tuple[Again, ...]
    gained: int
    lost: int

    @property
    def waiting(self) -> int:
        return sum(step.waiting for step in self.steps)


def decide(folder: RunFolder, old: SetPlan, new: SetPlan, tools: Tools, progress: Progress) -> SetAgain:
    """The set `old` of a finished run, decided by the steps of `new`: the same steps in the same order with other
    settings. Raises HouseError where the two differ in more than that, or the run has not finished the set."""
    pairs = _comparable(folder, old, new)
    state = source_parts(folder, old.sources)
    alive = state.alive.copy()
    found: list[Again] = []
    with tempfile.TemporaryDirectory(prefix=f"gristmill-decide-{old.name}-") as scratch:
        for index, (was, now) in enumerate(pairs):
            home = folder.ledger / old.name / step_name(index, was)
            record = read_json(home / "step.json")
            after = load_state(folder, state, home, record)
            place = _Place(folder, new, index, home, record, state, after, alive, tools, progress, Path(scratch))
            with warnings.catch_warnings(record=True) as said:
                warnings.simplefilter("always", UserWarning)
                alive, again = _step(place, was, now)
            notes = tuple(str(note.message) for note in said if note.category is UserWarning)
            state = after
            found.append(replace(again, notes=notes))
    gained, lost = int((alive & ~state.alive).sum()), int((state.alive & ~alive).sum())
    return SetAgain(old.name, tuple(found), gained, lost)


def _comparable(folder: RunFolder, old: SetPlan, new: SetPlan) -> list[tuple[AnyStep, AnyStep]]:
    for name in ("sources", "kind", "held_out", "seed"):
        if getattr(old, name) != getattr(new, name):
            raise HouseError(
                f"set {old.name}: {name} was {getattr(old, name)!r} and would be {getattr(new, name)!r}. Deciding again"
                " changes thresholds, quotas and budgets; for anything else run the recipe into a new --out"
            )
    was, now = full_steps(old), full_steps(new)
    if [type(step) for step in was] != [type(step) for step in now]:
        raise HouseError(f"set {old.name}: the steps are not the same any more: run the recipe into a new --out")
    for index, step in enumerate(was):
        if not (folder.ledger / old.name / step_name(index, step) / "step.json").is_file():
            raise HouseError(f"set {old.name} of {folder.root} is not finished: `gristmill run` first")
        if step.scope == "maker" and repr(step) != repr(now[index]):
            raise HouseError(f"set {old.name}: {type(step).__name__} makes rows: run the recipe into a new --out")
    return list(zip(was, now, strict=True))


@dataclass(frozen=True)
class _Place:
    """One step of the old run (state before and after it), and the rows that reach it now."""

    folder: RunFolder
    plan: SetPlan
    index: int
    home: Path
    record: StepRecord
    before: State
    after: State
    alive: Mask
    tools: Tools
    progress: Progress
    scratch: Path

    def reasons_then(self) -> tuple[Any, Any]:
        """Positions of the rows that the step dropped in the run, and their reasons, in order."""
        where = np.flatnonzero(self.before.alive & ~self.after.alive[: len(self.before.alive)])
        table = pq.read_table(self.home / "verdicts.parquet", columns=["keep", "reason"])
        reasons = table.filter(pc.invert(table["keep"]))["reason"].combine_chunks()
        return where, reasons.slice(len(reasons) - len(where))  # a maker tells of its made rows first

    def again(self, step: AnyStep, kept: int, made: int, reasons: Counter[str], waiting: int, changed: bool) -> Again:
        pace = self.record["seconds"] / max(1, self.record["came"])
        ordered = dict(sorted(reasons.items(), key=lambda item: (-item[1], item[0])))
        return Again(
            self.index, type(step).__name__, repr(step), brief(step), changed, int(self.alive.sum()), made, kept,
            sum(reasons.values()), waiting, ordered, waiting * pace if waiting else None, self.record,
        )  # fmt: skip


def _step(place: _Place, was: AnyStep, now: AnyStep) -> tuple[Mask, Again]:
    """The rows that live after the step, over its parts and those it made, and what is told of it."""
    changed = repr(was) != repr(now)
    if isinstance(now, Overrides):
        return _overrides(place, now)
    if not changed and np.array_equal(place.alive, place.before.alive):
        reasons: Counter[str] = Counter(place.record["reasons"])
        return place.after.alive, place.again(now, place.after.rows, place.record["made"], reasons, 0, False)
    if now.scope == "maker":
        return _maker(place, now)
    judged = _row_judge(place, was, now, changed) if now.scope == "row" else _corpus_judge(place, was, now)
    keep, reasons, waiting = judged
    return keep, place.again(now, int(keep.sum()), 0, reasons, waiting, changed)


def _row_judge(place: _Place, was: AnyStep, now: RowJudge, changed: bool) -> tuple[Mask, Counter[str], int]:
    keep = np.zeros(len(place.alive), np.bool_)
    reasons: Counter[str] = Counter()
    ask = place.alive.copy()
    if not changed:  # what it said of the rows that it saw stands
        ask &= ~place.before.alive
        keep |= place.alive & place.after.alive
        where, why = place.reasons_then()
        reasons.update(why.filter(pa.array(place.alive[where])).to_pylist())
    elif JUDGE_ERROR in place.record["reasons"]:
        where, why = place.reasons_then()
        raised = where[pc.equal(why, JUDGE_ERROR).to_numpy(zero_copy_only=False)]
        reasons.update([JUDGE_ERROR] * int(ask[raised].sum()))
        ask[raised] = False
    if not ask.any():
        return keep, reasons, 0
    values, known = _values(place, was, now, ask)
    where = np.flatnonzero(ask)[known]
    if not len(where):
        return keep, reasons, int(ask.sum())
    judged = _judge_rows(place, now, where, values)
    keep[where] = judged["keep"].to_numpy()
    reasons.update(judged.filter(pc.invert(judged["keep"]))["reason"].to_pylist())
    return keep, reasons, int((~known).sum())


def _judge_rows(place: _Place, judge: RowJudge, where: Any, values: pa.Table) -> pa.Table:
    """Verdicts on the rows at these positions; rows that raise are dropped as judge_error."""
    mask = np.zeros(len(place.alive), np.bool_)
    mask[where] = True
    columns = columns_read(judge)
    tables: Iterator[pa.Table] | Sequence[pa.Table]
    if columns:
        tables = State(place.before.parts, place.before.sizes, mask).tables(columns)
    else:
        tables = [pa.table({"_none": pa.nulls(len(where))})]
    found, start = [], 0
    for rows in tables:
        said = values.slice(start, rows.num_rows)
        start += rows.num_rows
        table, errors = tried(judge, rows, said)
        verdict = table.select(["keep", "reason"])
        if errors:
            raised = pa.array([i in errors for i in range(rows.num_rows)])
            fate = [pc.if_else(raised, False, verdict["keep"]), pc.if_else(raised, JUDGE_ERROR, verdict["reason"])]
            verdict = pa.table(dict(zip(("keep", "reason"), fate, strict=True)))
        found.append(verdict)
    return pa.concat_tables(found)


def _corpus_judge(place: _Place, was: AnyStep, now: CorpusJudge) -> tuple[Mask, Counter[str], int]:
    values, known = _values(place, was, now, place.alive)
    live = np.zeros(len(place.alive), np.bool_)
    live[np.flatnonzero(place.alive)[known]] = True
    corpus = _Rows(place, live, values)
    judged = None
    kept = place.home / KEPT
    if isinstance(now, Rejudge) and kept.is_dir() and not (live & ~place.before.alive).any():
        judged = now.rejudge(corpus, kept, live[place.before.alive])
    if judged is None:
        judged = now.judge(corpus)
    keep = np.zeros(len(live), np.bool_)
    keep[live] = judged["keep"].to_numpy()
    reasons = Counter(judged.filter(pc.invert(judged["keep"]))["reason"].to_pylist())
    return keep, reasons, int((~known).sum())


def _maker(place: _Place, now: AnyStep) -> tuple[Mask, Again]:
    """Made rows whose parents in this set all live stay, with what the maker did to those parents; rows that it never
    met wait."""
    size = len(place.before.alive)
    made = State(place.after.parts[len(place.before.parts) :], place.after.sizes[len(place.before.sizes) :],
                 np.ones(len(place.after.alive) - size, np.bool_))  # fmt: skip
    gone = _ids(place.before, place.before.alive & ~place.alive)
    orphan = np.array([_any_of(parents, gone) for table in made.tables(["parents"]) for parents in table["parents"]],
                      np.bool_)  # fmt: skip
    waits = place.alive & ~place.before.alive
    alive = np.concatenate([place.alive & place.after.alive[:size], ~orphan & place.after.alive[size:]])
    reasons: Counter[str] = Counter()
    where, why = place.reasons_then()
    reasons.update(why.filter(pa.array(place.alive[where])).to_pylist())
    stillborn = int((~orphan & ~place.after.alive[size:]).sum())
    if stillborn:
        told = pq.read_table(place.home / "verdicts.parquet", columns=["reason"])["reason"]
        first = told.slice(0, int((~place.after.alive[size:]).sum())).filter(
            pa.array(~orphan[~place.after.alive[size:]])
        )
        reasons.update(first.to_pylist())
    again = place.again(now, int(alive.sum()), int((~orphan).sum()), reasons, int(waits.sum()), False)
    return alive, again


def _any_of(parents: pa.Scalar, gone: set[str]) -> bool:
    return any(parent in gone for parent in parents.as_py() or ())


def _ids(state: State, mask: Mask) -> set[str]:
    tables = State(state.parts, state.sizes, mask).tables(["row_id"]) if mask.any() else ()
    return {row_id for table in tables for row_id in table["row_id"].to_pylist()}


def _overrides(place: _Place, now: Overrides) -> tuple[Mask, Again]:
    before = State(place.before.parts, place.before.sizes, place.alive)
    alive = place.alive.copy()
    reasons: Counter[str] = Counter()
    back = edited = 0
    for position, row, rule, fate in overruled(
        place.folder, before, held_out_ids(place.folder, place.plan, place.index)
    ):
        del row
        back += fate[2] == "override_keep"
        edited += rule["action"] == "edit"
        if not fate[1]:
            reasons[str(fate[2])] += 1
        alive[position] = fate[1]
    added = len(place.after.alive) - len(place.before.alive)
    again = place.again(now, int(alive.sum()) + edited, back + edited, reasons, 0, False)
    return np.concatenate([alive, np.ones(added, np.bool_)]), again


# ---- values


def _values(place: _Place, was: Any, now: Any, mask: Mask) -> tuple[pa.Table, Any]:
    """Value columns that `now` needs for the rows of `mask` that have them all, in order; and which rows those are."""
    size = int(mask.sum())
    if not now.needs:
        return pa.table({"_none": pa.nulls(size)}), np.ones(size, np.bool_)
    wanted = [name for names in value_names([measure.columns for measure in now.needs]) for name in names]
    path = place.home / KEPT / VALUES
    same = [repr(measure) for measure in was.needs] == [repr(measure) for measure in now.needs]
    seen = place.before.alive[mask]
    if same and path.is_file() and set(wanted) <= set(pq.read_schema(path).names):
        rank = np.cumsum(place.before.alive) - 1
        old = pq.read_table(path, columns=wanted)
        if seen.all():
            return (old if size == old.num_rows else old.take(pa.array(rank[mask]))), np.ones(size, np.bool_)
        kept = old.take(pa.array(rank[mask][seen]))
        looked, known = _looked_up(place, now.needs, mask & ~place.before.alive)
        every = seen.copy()
        every[~seen] = known
        order = np.argsort(np.r_[np.flatnonzero(seen), np.flatnonzero(~seen)[known]], kind="stable")
        return pa.concat_tables([kept, looked.select(wanted).cast(kept.schema)]).take(pa.array(order)), every
    return _looked_up(place, now.needs, mask)


def _looked_up(place: _Place, needs: Sequence[Measure], mask: Mask) -> tuple[pa.Table, Any]:
    """Values from the cache by content; a measure that needs no model is taken where it is missing."""
    rows = State(place.before.parts, place.before.sizes, mask)
    ids = pa.chunked_array([chunk for table in rows.tables(["content_id"]) for chunk in table["content_id"].chunks],
                           pa.string())  # fmt: skip
    known = np.ones(len(ids), np.bool_)
    columns: dict[str, Any] = {}
    for measure, names in zip(needs, value_names([measure.columns for measure in needs]), strict=True):
        if not measure.models:
            for table in rows.tables():
                measured(place.folder, measure, table, place.tools, place.progress)
        found = stored(place.folder.measures / measure_key(measure, place.tools), measure)
        index = pc.index_in(ids, value_set=found["content_id"].combine_chunks())
        if measure.models:
            known &= (
                index.is_valid().to_numpy(zero_copy_only=False)
                if isinstance(index, pa.Array)
                else np.asarray(pc.is_valid(index))
            )
        columns |= {called: found[name].take(index) for name, called in zip(measure.columns, names, strict=True)}
    return pa.table(columns).filter(pa.array(known)), known


@dataclass
class _Rows:
    """The rows that reach a step now (protocol steps.Corpus)."""

    place: _Place
    mask: Mask
    measured: pa.Table
    kept: Path = field(init=False)
    scratch: Path = field(init=False)

    def __post_init__(self) -> None:
        self.rows, self.seed = int(self.mask.sum()), self.place.plan.seed
        self.tools, self.progress = self.place.tools, self.place.progress
        self.scratch = Path(tempfile.mkdtemp(dir=self.place.scratch))
        self.kept = Path(tempfile.mkdtemp(dir=self.place.scratch))

    def tables(self, columns: Sequence[str] | None = None) -> Iterator[pa.Table]:
        return State(self.place.before.parts, self.place.before.sizes, self.mask).tables(columns)

    def values(self, columns: Sequence[str]) -> pa.Table:
        return self.measured.select(list(columns))

    def held_out(self, columns: Sequence[str] | None = None) -> Iterator[pa.Table]:
        return held_out_rows(self.place.folder, self.place.plan, self.place.index, self.place.before, columns)

    def record(self, **facts: Any) -> None:
        """A decision that is tried leaves no record."""
