"""The engine of curation: one step at a time over all live rows of a set, its verdicts in the ledger, none lost.

`advance` does one step or finds it done: a killed run goes on where the last marker stands and ends in the same bytes.
"""

import ctypes
import shutil
import tempfile
import time
import traceback
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from .cache import Broken, Taken, measure_key
from .door import Progress
from .folder import (
    FULL,
    HouseError,
    RunFolder,
    parquet_writer,
    read_json,
    whole_file,
    whole_folder,
    write_json,
    write_parquet,
)
from .judges.gates import HeldOut, Trainable, is_held_out, untrainable
from .judges.near_held_out import NearHeldOut
from .judging import KEPT, Write, judge
from .keys import Found, keys_of
from .ledger import (
    LEDGER,
    Mask,
    State,
    StepRecord,
    check_conservation,
    ledger_rows,
    load_state,
    read_verdicts,
    reasons,
    records,
    save_alive,
    source_parts,
)
from .overrides import Overrides, apply_overrides
from .pool import INLINE, Pool
from .rows import PART_GROUP, ROW, digest
from .steps import CorpusJudge, Maker, RowJudge, Tools, brief, verdicts
from .text.view import prompt_of

AnyStep = RowJudge | CorpusJudge | Maker | Overrides
FAULT = pa.schema(
    [
        ("source", pa.string()),
        ("file", pa.string()),
        ("line", pa.int64()),
        ("error", pa.string()),
        ("raw", pa.string()),
        ("row_id", pa.string()),
        ("step", pa.string()),
    ]
)


@dataclass(frozen=True)
class SetPlan:
    """One named set of a recipe: its sources, its steps in order, the share of prompts held out of it."""

    name: str
    kind: str  # sft | preference | kto | text
    sources: tuple[str, ...]
    steps: tuple[RowJudge | CorpusJudge | Maker, ...]
    held_out: float = 0.02
    seed: int = 0


def full_steps(plan: SetPlan) -> tuple[AnyStep, ...]:
    """The plan's steps with the gates put in: HeldOut first; Trainable and NearHeldOut before the first judge (after
    the makers that lead), and NearHeldOut again after later makers, unless the recipe lists them; Overrides last."""
    named = {type(step) for step in plan.steps}
    lead = len(list(takewhile(lambda step: step.scope == "maker", plan.steps)))
    gates: list[AnyStep] = [Trainable(plan.kind)]
    gates += [NearHeldOut()] if plan.held_out > 0 else []
    steps: list[AnyStep] = [HeldOut(plan.held_out, plan.kind), *plan.steps[:lead]]
    steps += [gate for gate in gates if type(gate) not in named]
    rest = plan.steps[lead:]
    for place, step in enumerate(rest, 1):
        steps.append(step)
        last_of_its_kind = place == len(rest) or rest[place].scope != "maker"
        if step.scope == "maker" and last_of_its_kind and plan.held_out > 0:
            steps.append(NearHeldOut())
    return (*steps, Overrides())


def step_name(index: int, step: AnyStep) -> str:
    return f"{index:02d}-{type(step).__name__}"


def begin(folder: RunFolder, plan: SetPlan) -> None:
    """Writes ledger/SET/set.json: what the views need to know of the set before its first step."""
    steps = [
        {"step": i, "judge": repr(s), "name": type(s).__name__, "scope": s.scope}
        for i, s in enumerate(full_steps(plan))
    ]
    write_json(
        folder.ledger / plan.name / "set.json",
        {"set": plan.name, "kind": plan.kind, "sources": list(plan.sources), "steps": steps},
    )


def advance(
    folder: RunFolder, plan: SetPlan, index: int, tools: Tools, progress: Progress, pool: Pool = INLINE
) -> StepRecord:
    """Does step `index` of the plan, or finds it done (record["cached"]). A HouseError when rows are not conserved or
    none is left. The record and the ledger are the same whatever the pool."""
    step = full_steps(plan)[index]
    home = folder.ledger / plan.name / step_name(index, step)
    record = _finished(folder, home, step)
    if record is None:
        before = state_before(folder, plan, index)
        started = time.monotonic()
        shutil.rmtree(home, ignore_errors=True)
        with whole_folder(home) as work:
            with warnings.catch_warnings(record=True) as said:
                warnings.simplefilter("always", UserWarning)
                live = LiveRows(folder, plan, index, before, tools, progress, work, pool)
                try:
                    record = _do(step, live, work)
                except Exception as error:
                    raise _told(folder, plan, index, step, error) from error
                finally:
                    live.close()
                    _give_back()
            record["notes"] = list(dict.fromkeys(str(note.message) for note in said if note.category is UserWarning))
            record["seconds"] = round(time.monotonic() - started, 3)
            write_json(work / "step.json", record)
        (folder.quarantine / f"{plan.name}-{step_name(index, step)}.txt").unlink(missing_ok=True)
        record = record | {"cached": False}
    begins_later = record["came"] == 0 and any(later.scope == "maker" for later in full_steps(plan)[index + 1 :])
    if record["kept"] == 0 and not begins_later:  # a set without sources begins with its first maker
        raise HouseError(
            f"step {index} {record['name']} of set {plan.name} left no row: {record['came']} came. What came, and why"
            f" it went:\n{_funnel(folder, plan.name)}\n{_advice(folder, plan)}"
            " and run into a new --out; this one stays as it is, for `gristmill funnel` and `why`."
        )
    return record


def _funnel(folder: RunFolder, set_name: str) -> str:
    """came -> kept of each finished step with the reasons, and what it warned of, a line each."""
    lines = []
    for step in records(folder, set_name):
        made = f" + {step['made']:,}" if step["made"] else ""
        why = "".join(f", {reason} {count:,}" for reason, count in step["reasons"].items())
        lines.append(f"  {step['step']:02d} {step['name']}: {step['came']:,}{made} -> {step['kept']:,}{why}")
        lines += [f"     ! {note}" for note in step["notes"]]
    return "\n".join(lines)


def _advice(folder: RunFolder, plan: SetPlan) -> str:
    """What to do about a set without rows."""
    makers = [step for step in full_steps(plan) if step.scope == "maker"]
    if makers and not any(step["made"] for step in records(folder, plan.name)):
        return "No maker made a row: mend what is told above (with --cache no answer is paid for twice)"
    return "Loosen the thresholds"


def _told(folder: RunFolder, plan: SetPlan, index: int, step: AnyStep, error: Exception) -> Exception:
    """What is raised where a step raises: an error for the user as it is, of any other the traceback kept in
    quarantine/ and its last line told."""
    disk = isinstance(error, OSError) and error.errno in FULL
    if disk or (isinstance(error, HouseError | MemoryError) and not isinstance(error, Broken)):
        return error
    path = folder.quarantine / f"{plan.name}-{step_name(index, step)}.txt"
    whole = "".join(traceback.format_exception(error))
    with whole_file(path) as temporary:
        temporary.write_text(error.trace if isinstance(error, Broken) else whole, encoding="utf-8")
    said = str(error) if isinstance(error, Broken) else f"it raised {whole.strip().splitlines()[-1]}"
    return HouseError(
        f"step {index} {type(step).__name__} of set {plan.name}: {said}\nThis is a fault of the step or of what it is"
        f" given, not of single rows: the traceback lies in {path}. The steps before it are finished; when it is"
        " mended, run the same command again."
    )


def state_before(folder: RunFolder, plan: SetPlan, index: int) -> State:
    """The rows that reach step `index`."""
    state = source_parts(folder, plan.sources)
    for earlier, step in enumerate(full_steps(plan)[:index]):
        home = folder.ledger / plan.name / step_name(earlier, step)
        state = load_state(folder, state, home, read_json(home / "step.json"))
    return state


def _finished(folder: RunFolder, home: Path, step: AnyStep) -> StepRecord | None:
    if not (home / "step.json").is_file():
        return None
    record = read_json(home / "step.json")
    stale = isinstance(step, Overrides) and record["inputs"] != step.digest(folder)
    return None if stale or record["judge"] != repr(step) else record | {"cached": True}


def _do(step: AnyStep, live: "LiveRows", work: Path) -> StepRecord:
    """Runs the step, writes its ledger into `work`, checks conservation, and returns the record."""
    folder, plan, index, before = live.folder, live.plan, live.index, live.state
    for stale in folder.rows.glob(f"made-{plan.name}-{index:02d}-*.parquet"):
        stale.unlink()
    made: list[Path] = []
    replaced = 0
    with parquet_writer(work / "verdicts.parquet", LEDGER) as write:
        if isinstance(step, Overrides):
            held_out = held_out_ids(folder, plan, index)
            made, fates, alive = apply_overrides(folder, plan.name, index, before, held_out)
            write(fates)
        elif step.scope == "maker":
            made, alive, replaced = _make(step, live, write)
        else:
            alive = _judge(step, live, write)
    where = f"step {index} {type(step).__name__} of set {plan.name}"
    after = before.grown(made, alive)
    save_alive(work / "alive.npy", alive)
    added = sum(after.sizes) - sum(before.sizes) + (_brought_back(work) if isinstance(step, Overrides) else 0)
    dropped = check_conservation(where, before.rows, added, after.rows, work, len(alive))
    judge = step if step.scope == "row" or step.scope == "corpus" else None
    keys = [] if judge is None else [measure_key(measure, live.tools) for measure in judge.needs]
    return {
        "set": plan.name, "step": index, "name": type(step).__name__, "judge": repr(step), "brief": brief(step),
        "scope": step.scope,
        "came": before.rows, "made": added, "kept": after.rows, "dropped": dropped,
        "reasons": reasons(read_verdicts(work, ["keep", "reason"])),
        "score": None if judge is None else judge.score,
        "limits": [None, None] if judge is None else list(judge.limits()),
        "measures": keys,
        "measured": {key: taken.measured for key, taken in zip(keys, live.taken, strict=False)},
        "reused": {key: taken.reused for key, taken in zip(keys, live.taken, strict=False)},
        "made_parts": [part.name for part in made],
        "replaced": replaced,
        "emptied_sources": _emptied(before, after),
        "inputs": step.digest(folder) if isinstance(step, Overrides) else "",
        **live.facts,
    }  # fmt: skip


def _give_back() -> None:
    """Hands freed memory back to the system. glibc and Arrow keep it for later: after a step over a million rows 200 to
    600 MB, on top of which the next step would reach its own peak."""
    pa.default_memory_pool().release_unused()
    with suppress(OSError, AttributeError):  # another C library than glibc
        ctypes.CDLL(None).malloc_trim(0)


def _brought_back(work: Path) -> int:
    """Rows that were dropped before and that a person's override keeps."""
    return sum(
        pc.sum(pc.equal(table["reason"], "override_keep")).as_py() or 0 for table in read_verdicts(work, ["reason"])
    )


class LiveRows:
    """The rows that reach a step (protocol steps.Corpus)."""

    def __init__(
        self,
        folder: RunFolder,
        plan: SetPlan,
        index: int,
        state: State,
        tools: Tools,
        progress: Progress,
        work: Path,
        pool: Pool,
    ) -> None:
        self.folder, self.plan, self.index, self.state = folder, plan, index, state
        self.tools, self.progress, self.pool = tools, progress, pool
        self.kept = work / KEPT
        self.kept.mkdir()
        self.rows, self.seed = state.rows, plan.seed
        # beside the run, where there is room, and swept away with what else a killed run leaves
        self.scratch = Path(tempfile.mkdtemp(prefix=f".{plan.name}-", suffix=".tmp", dir=folder.root))
        self.home = folder.root.resolve() / plan.name  # what an index of earlier releases calls these rows
        self.measured: pa.Table | None = None
        self.taken: list[Taken] = []
        self.facts: dict[str, Any] = {}

    def tables(self, columns: Sequence[str] | None = None) -> Iterator[pa.Table]:
        return self.state.tables(columns)

    def values(self, columns: Sequence[str]) -> pa.Table:
        if self.measured is None:
            raise KeyError(f"no measures were asked for by the step's `needs`; wanted {list(columns)}")
        return self.measured.select(list(columns))

    def held_out(self, columns: Sequence[str] | None = None) -> Iterator[pa.Table]:
        return held_out_rows(self.folder, self.plan, self.index, self.state, columns)

    def record(self, **facts: Any) -> None:
        self.facts |= facts

    def close(self) -> None:
        shutil.rmtree(self.scratch, ignore_errors=True)
        with suppress(OSError):  # unless a judge kept something there
            self.kept.rmdir()


class HeldOutRows:
    """The set's held-out rows, to a maker that rewrites rows one by one."""

    def __init__(self, live: LiveRows) -> None:
        self.rows, self.seed, self.tools = len(held_out_ids(live.folder, live.plan, live.index)), live.seed, live.tools
        self.scratch, self.kept = live.scratch, live.kept
        self.tables = self.held_out = live.held_out
        self.record = live.record
        self.progress: Progress = _silent  # the live rows' has been told to its end

    def values(self, columns: Sequence[str]) -> pa.Table:
        raise KeyError(f"held-out rows are not measured; wanted {list(columns)}")


def _silent(done: int, total: int) -> None:
    pass


def held_out_rows(
    folder: RunFolder, plan: SetPlan, index: int, state: State, columns: Sequence[str] | None = None
) -> Iterator[pa.Table]:
    """Rows that a step before `index` held out, one table per part."""
    held = Found.of(keys_of(held_out_ids(folder, plan, index)))
    for part in state.parts if len(held) else ():
        mask = held.places(keys_of(pq.read_table(part, columns=["row_id"])["row_id"])) >= 0
        if mask.any():
            yield pq.read_table(part, columns=None if columns is None else list(columns)).filter(pa.array(mask))


def held_out_ids(folder: RunFolder, plan: SetPlan, index: int) -> pa.Array:
    """row_ids of the rows that a step before `index` held out, those that a later one rewrote left out."""
    ids, replaced = [pa.array([], pa.string())], [pa.array([], pa.string())]
    for earlier, step in enumerate(full_steps(plan)[:index]):
        home = folder.ledger / plan.name / step_name(earlier, step)
        record = read_json(home / "step.json")
        if "held_out" in record["reasons"]:
            for table in read_verdicts(home, ["row_id", "reason"]):
                ids += table.filter(pc.equal(table["reason"], "held_out"))["row_id"].chunks
        if record.get("replaced"):
            for name in record["made_parts"]:
                replaced += pc.list_flatten(pq.read_table(folder.rows / name, columns=["parents"])["parents"]).chunks
    found = pa.concat_arrays(ids)
    return found.filter(pc.invert(pc.is_in(found, value_set=pa.concat_arrays(replaced))))


def _judge(step: RowJudge | CorpusJudge, live: "LiveRows", write: Write) -> Mask:
    """The new live mask after a row judge or a corpus judge; its ledger rows go to `write`."""
    faults: list[dict[str, Any]] = []
    kept = judge(step, live, write, faults)
    _quarantine(live.folder, live.plan, live.index, step, faults)
    alive = live.state.alive.copy()
    alive[np.flatnonzero(alive)] = kept
    return alive


def _quarantine(folder: RunFolder, plan: SetPlan, index: int, step: AnyStep, faults: list[dict[str, Any]]) -> None:
    path = folder.quarantine / f"{plan.name}-{step_name(index, step)}.parquet"
    path.unlink(missing_ok=True)
    if faults:
        write_parquet(path, pa.Table.from_pylist(faults, schema=FAULT))


def _make(step: Maker, live: LiveRows, write: Write) -> tuple[list[Path], Mask, int]:
    """Made parts on disk, the live mask over old and new rows, and how many held-out rows were replaced. A made row
    that is held out or cannot be trained on is dropped in the same step; a parent that the maker consumes leaves with
    its reason. What a maker that rewrites rows makes is held out where its parent was, whatever its new prompt."""
    folder, plan, index = live.folder, live.plan, live.index
    parts: list[Path] = []
    keeps: list[Mask] = []
    parents: set[str] = set()
    seen: dict[str, int] = {}
    for part in live.state.parts:
        if part.name.startswith(f"made-{plan.name}-"):  # the same maker may stand in a recipe twice
            seen |= dict.fromkeys(pq.read_table(part, columns=["row_id"])["row_id"].to_pylist(), 1)
    replaced = 0
    for rows, held in _makings(step, live):
        rows = _distinct(rows.cast(ROW), seen)
        if not rows.num_rows:
            continue
        replaced += held * rows.num_rows
        path = folder.rows / f"made-{plan.name}-{index:02d}-{len(parts):05d}.parquet"
        write_parquet(path, rows, PART_GROUP)
        parts.append(path)
        share = 0.0 if getattr(step, "rewrites", False) else plan.held_out
        fate = ["held_out" if held else _fate(row, plan.kind, share) for row in rows.to_pylist()]
        keeps.append(np.array([reason is None for reason in fate], dtype=np.bool_))
        write(ledger_rows(rows["row_id"], verdicts(list(keeps[-1]), fate), keep_scores=False))
        if step.consumes is not None and not held:
            parents |= {parent for row in rows["parents"].to_pylist() for parent in row or ()}
    alive = live.state.alive.copy()
    if step.consumes is not None and parents:
        consumed, left = _consume(live.state, parents, step.consumes)
        write(consumed)
        alive &= left
    return parts, np.concatenate([alive, *keeps]), replaced


def _makings(step: Maker, live: LiveRows) -> Iterator[tuple[pa.Table, bool]]:
    """What the maker makes, and whether it replaces held-out rows."""
    for rows in step.make(live):
        yield rows, False
    for rows in step.make(HeldOutRows(live)) if getattr(step, "rewrites", False) else ():
        yield rows, True


def _fate(row: Mapping[str, Any], kind: str, held_out: float) -> str | None:
    reason = untrainable(row, kind)
    if reason is None and held_out and is_held_out(prompt_of(row), held_out):
        return "held_out"
    return reason


def _distinct(rows: pa.Table, seen: dict[str, int]) -> pa.Table:
    """Rows whose ids none of `seen` (id -> how often) has: the n-th repetition of an id gets one of its own."""
    ids = []
    for row_id in rows["row_id"].to_pylist():
        own = row_id
        while own in seen:
            seen[row_id] += 1
            own = digest("again", row_id, str(seen[row_id]))
        seen[own] = 1
        ids.append(own)
    return rows.set_column(0, ROW.field("row_id"), pa.array(ids, pa.string()))


def _consume(state: State, parents: set[str], reason: str) -> tuple[pa.Table, Mask]:
    """Ledger rows of the live parents that leave the set, and the mask of the rows that stay."""
    wanted = pa.array(sorted(parents), pa.string())
    left = np.ones(len(state.alive), dtype=np.bool_)
    ids = []
    start = 0
    for part, mask in state.masks():
        column = pq.read_table(part, columns=["row_id"])["row_id"]
        gone = pc.is_in(column, value_set=wanted).to_numpy() & mask
        left[start : start + len(mask)] = ~gone
        ids += column.filter(pa.array(gone)).to_pylist()
        start += len(mask)
    return ledger_rows(
        pa.chunked_array([pa.array(ids, pa.string())]), verdicts([False] * len(ids), reason), keep_scores=False
    ), left


def _emptied(before: State, after: State) -> list[str]:
    """Sources that had live rows before the step and have none after it (a part's name begins with its source's)."""

    def living(state: State) -> set[str]:
        return {part.name.rsplit("-", 1)[0] for part, mask in state.masks() if mask.any()}

    return sorted(living(before) - living(after))
