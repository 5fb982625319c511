"""`gristmill score`: any model's losses on any data, by row_id, as a Parquet file that a recipe reads as a measure."""

import heapq
import math
import tempfile
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from ..curation.folder import HouseError, RunFolder, parquet_writer
from ..curation.reading.source import Source, read_source
from ..curation.rows import content_id, message, table
from ..curation.shards import read_manifest, read_split
from .progress import Done, Silent, interrupts_wait, timed

SHOWN = 5  # rows of the highest loss that are told


def score_command(
    model: str, data: str, adapter: Path | None, out: Path | None, per_token: bool, source: str, show: Silent
) -> dict[str, Any]:
    """Scores `data` under `model`, writes OUT (or OUT/scores.parquet where it is a folder) and returns what is told:
    rows, scored, tokens, loss (nats a token, over all rows), problems (reason -> rows), worst (row_id, loss), path.

    data: a curated folder, a run's folder, or anything that can be read; source: what rows of the latter come from, by
    the name that a recipe gives it, so that row_ids are the same."""
    with interrupts_wait():
        from ..tuning.hub import model_folder
        from ..tuning.row_scores import row_scores, schema_of
        from ..tuning.score import PackedScorer

    path = out if out is None or out.suffix == ".parquet" else out / "scores.parquet"
    with tempfile.TemporaryDirectory(prefix="gristmill-score-") as scratch:
        tables, total = _rows(data, RunFolder(scratch), source, show)
        scorer = PackedScorer(model_folder(model), adapter)

        def do(progress: Any) -> Done:
            summary = _Summary()
            with _writer(path, schema_of(per_token)) as write:
                for rows in tables:
                    before = summary.rows
                    told = lambda done, _, before=before: progress(before + done, total)  # noqa: E731
                    for found in row_scores(scorer, rows, per_token=per_token, progress=told):
                        write(found)
                        summary.add(found)
            return Done(summary.text(path), data=summary.record(path))

        return timed("score", show, do).data


def curated_rows(folder: Path) -> pa.Table:
    """All rows of a curated folder, in every split, as rows (schema ROW) under their own row_ids."""
    manifest = read_manifest(folder)
    kind = str(manifest["kind"])
    names = {"sft": ("messages",), "preference": ("prompt", "chosen", "rejected"), "kto": ("prompt", "completion")}
    made: list[dict[str, Any]] = []
    for split in dict.fromkeys(file["split"] for file in manifest["files"]):
        for row in read_split(folder, split).to_pylist():
            turns = {
                name: [message(**turn) for turn in row[name]] for name in names.get(kind, ()) if row[name] is not None
            }
            new = {"row_id": row["row_id"], "source": folder.name, "position": len(made), "text": row.get("text")}
            new |= {"messages": turns.get("messages", turns.get("prompt")), "rejected": turns.get("rejected")}
            new |= {"chosen": turns.get("chosen", turns.get("completion")), "label": row.get("label")}
            new |= {"tools": row.get("tools"), "spans": row.get("spans")}
            made.append(new | {"content_id": content_id(new)})
    return table(made)


def _rows(data: str, scratch: RunFolder, source: str, show: Silent) -> tuple[Iterator[pa.Table], int]:
    """Rows of `data`, table by table, and how many they are."""
    folder = Path(data)
    if (folder / "manifest.json").is_file():
        rows = curated_rows(folder)
        return iter([rows]), rows.num_rows
    home = RunFolder(folder).rows if (folder / "rows").is_dir() else scratch.rows
    if home == scratch.rows:
        timed("read data", show, lambda progress: _read(data, source, scratch, progress))
    parts = sorted(home.glob("*.parquet"))
    if not parts:
        raise HouseError(f"{home} holds no rows")
    return (pq.read_table(part) for part in parts), sum(pq.read_metadata(part).num_rows for part in parts)


def _read(data: str, source: str, scratch: RunFolder, progress: Callable[[int, int], None]) -> Done:
    record = read_source(Source(source, data, licence="unknown"), scratch, lambda rows: progress(rows, 0))
    return Done(f"{record['rows']:,} rows ({record['shape']}), {record['quarantined']:,} could not be read")


def _writer(path: Path | None, schema: pa.Schema) -> AbstractContextManager[Callable[[pa.Table], None]]:
    return nullcontext(lambda found: None) if path is None else parquet_writer(path, schema)


@dataclass
class _Summary:
    rows: int = 0
    scored: int = 0
    tokens: int = 0
    nats: float = 0.0
    problems: dict[str, int] = field(default_factory=dict)
    worst: list[tuple[float, str]] = field(default_factory=list)

    def add(self, found: pa.Table) -> None:
        there = found.filter(found["loss"].is_valid())
        self.rows += found.num_rows
        self.scored += there.num_rows
        self.tokens += pc.sum(there["tokens"]).as_py() or 0
        self.nats -= pc.sum(there["logp"]).as_py() or 0.0
        for reason in found["problem"].drop_null().to_pylist():
            self.problems[reason] = self.problems.get(reason, 0) + 1
        losses = zip(there["loss"].to_pylist(), there["row_id"].to_pylist(), strict=True)
        self.worst = heapq.nlargest(SHOWN, [*self.worst, *losses])

    @property
    def loss(self) -> float | None:
        return self.nats / self.tokens if self.tokens else None

    def text(self, path: Path | None) -> str:
        lines = [f"{self.scored:,} of {self.rows:,} rows, {self.tokens:,} tokens"]
        if self.loss is not None:
            lines[0] += f", loss {self.loss:.4f}, perplexity {math.exp(min(self.loss, 700)):.2f}"
        lines += [f"  {path}"] if path is not None else []
        lines += [f"  highest loss {loss:.3f}: {row_id}" for loss, row_id in self.worst]
        reasons = sorted(self.problems.items(), key=lambda item: (-item[1], item[0]))
        return "\n".join([*lines, *(f"  {count:,} not scored: {reason}" for reason, count in reasons[:SHOWN])])

    def record(self, path: Path | None) -> dict[str, Any]:
        worst = [{"row_id": row_id, "loss": loss} for loss, row_id in self.worst]
        told = {"rows": self.rows, "scored": self.scored, "tokens": self.tokens, "loss": self.loss}
        return told | {"problems": self.problems, "worst": worst, "path": None if path is None else str(path)}
