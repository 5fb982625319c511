"""The ledger of one set: which rows live, what each step said, and the proof that none was lost.

`ledger/SET/NN-Name/` holds verdicts.parquet (all but the plain keeps), alive.npy (one bit per row of the set's parts in
order) and step.json, written last. A folder without step.json is not finished and is done again.
"""

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from .folder import HouseError, RunFolder, read_json

Mask = npt.NDArray[np.bool_]
StepRecord = dict[str, Any]
LEDGER = pa.schema(
    [
        pa.field("row_id", pa.string(), nullable=False),
        pa.field("keep", pa.bool_(), nullable=False),
        pa.field("reason", pa.string()),
        pa.field("score", pa.float64()),
        pa.field("evidence", pa.string()),
    ]
)


@dataclass(frozen=True)
class State:
    """The parts of a set after some step, and which of their rows live."""

    parts: tuple[Path, ...]
    sizes: tuple[int, ...]
    alive: Mask

    @property
    def rows(self) -> int:
        return int(self.alive.sum())

    def masks(self) -> Iterator[tuple[Path, Mask]]:
        """Each part with the mask of its live rows."""
        start = 0
        for part, size in zip(self.parts, self.sizes, strict=True):
            yield part, self.alive[start : start + size]
            start += size

    def tables(self, columns: Sequence[str] | None = None) -> Iterator[pa.Table]:
        """Live rows, one table per part; parts without live rows are passed over."""
        for part, mask in self.masks():
            if mask.any():
                yield pq.read_table(part, columns=None if columns is None else list(columns)).filter(pa.array(mask))

    def grown(self, parts: Sequence[Path], alive: Mask) -> "State":
        """This state with further parts, and `alive` over old and new ones."""
        sizes = [pq.read_metadata(part).num_rows for part in parts]
        return State((*self.parts, *parts), (*self.sizes, *sizes), alive)


def source_parts(folder: RunFolder, sources: Sequence[str]) -> State:
    """All rows of the named sources, all alive."""
    parts = [folder.rows / name for source in sources for name in read_json(folder.rows / f"{source}.json")["parts"]]
    sizes = tuple(pq.read_metadata(part).num_rows for part in parts)
    return State(tuple(parts), sizes, np.ones(sum(sizes), dtype=np.bool_))


def load_state(folder: RunFolder, before: State, step: Path, record: StepRecord) -> State:
    """The state after a finished step."""
    parts = [folder.rows / name for name in record["made_parts"]]
    packed = np.load(step / "alive.npy")
    total = sum(before.sizes) + sum(pq.read_metadata(part).num_rows for part in parts)
    return before.grown(parts, np.unpackbits(packed, count=total).astype(np.bool_))


@dataclass(frozen=True)
class Passage:
    """A finished step: its record, and the set's rows before and after it."""

    record: StepRecord
    before: State
    after: State


def passages(folder: RunFolder, set_name: str) -> Iterator[Passage]:
    """The finished steps of a set, in order."""
    state = source_parts(folder, read_json(folder.ledger / set_name / "set.json")["sources"])
    for home in step_folders(folder, set_name):
        record = read_json(home / "step.json")
        after = load_state(folder, state, home, record)
        yield Passage(record, state, after)
        state = after


def save_alive(path: Path, alive: Mask) -> None:
    np.save(path, np.packbits(alive), allow_pickle=False)


def ledger_rows(row_ids: pa.ChunkedArray, judged: pa.Table, *, keep_scores: bool) -> pa.Table:
    """The verdicts worth storing: drops, changes, evidence; scores of plain keeps only where no measure holds them."""
    table = pa.table({"row_id": row_ids, **{name: judged[name] for name in LEDGER.names[1:]}})
    worth = pc.or_(pc.invert(table["keep"]), pc.is_valid(table["evidence"]))
    worth = pc.or_(worth, pc.is_valid(table["reason"]))
    if keep_scores:
        worth = pc.or_(worth, pc.is_valid(table["score"]))
    return table.filter(worth).cast(LEDGER)


def read_verdicts(step: Path, columns: Sequence[str]) -> Iterator[pa.Table]:
    """The ledger rows of a finished step, a row group at a time."""
    with pq.ParquetFile(step / "verdicts.parquet") as file:
        for group in range(file.num_row_groups):
            yield file.read_row_group(group, columns=list(columns))


def reasons(tables: Iterable[pa.Table]) -> dict[str, int]:
    """Dropped rows by reason, the commonest first."""
    counted: dict[str, int] = {}
    for table in tables:
        for item in pc.value_counts(table.filter(pc.invert(table["keep"]))["reason"]).to_pylist():
            reason = str(item["values"])
            counted[reason] = counted.get(reason, 0) + item["counts"]
    return dict(sorted(counted.items(), key=lambda item: (-item[1], item[0])))


def check_conservation(where: str, came: int, made: int, kept: int, step: Path, total: int) -> int:
    """Number of dropped rows, from what lies on disk; a HouseError unless came + made = kept + dropped there."""
    keeps = (table["keep"] for table in read_verdicts(step, ["keep"]))
    dropped = sum(len(keep) - (pc.sum(keep).as_py() or 0) for keep in keeps)
    bits = int(np.unpackbits(np.load(step / "alive.npy"), count=total).sum())
    if came + made != kept + dropped or bits != kept:
        raise HouseError(
            f"{where} does not conserve rows: came {came} + made {made} is not kept {kept} + dropped {dropped}"
            f" ({bits} alive on disk). The run stops here; this is a fault of the step, not of your data."
        )
    return dropped


def ledger_digest(folder: RunFolder, set_name: str) -> str:
    """sha256 over every verdict and every live bit of a set, in step order."""
    state = hashlib.sha256()
    for step in step_folders(folder, set_name):
        for name in ("verdicts.parquet", "alive.npy"):
            state.update(f"{step.name}/{name}".encode())
            with (step / name).open("rb") as file:
                while piece := file.read(2**20):
                    state.update(piece)
    return state.hexdigest()


def records(folder: RunFolder, set_name: str) -> list[StepRecord]:
    """Records of the set's finished steps, in order."""
    return [read_json(step / "step.json") for step in step_folders(folder, set_name)]


def step_folders(folder: RunFolder, set_name: str) -> list[Path]:
    """Folders of the finished steps in order; what a killed run left half-written begins with a dot and is none."""
    return [path.parent for path in sorted((folder.ledger / set_name).glob("[0-9]*/step.json"))]
