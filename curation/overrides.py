"""People overrule machines: OUT/overrides.parquet is applied last in every run and shows in `why`.

Columns: `row_id` or `content_id` (the other null; a content_id means every row that says the same), `action` (keep,
drop or edit), `content` (edit alone: JSON of the fields to replace, such as {"messages": [...]}), `who`, `why`.
A kept row comes back whatever dropped it, held-out rows excepted; an edit is a new row whose parent is the old one.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from .folder import HouseError, RunFolder, read_parquet, write_parquet
from .ledger import LEDGER, Mask, State
from .rows import CONTENT, made_row, table

OVERRIDES = pa.schema([(n, pa.string()) for n in ("row_id", "content_id", "action", "content", "who", "why")])
Action = Literal["keep", "drop", "edit"]
Fate = tuple[str, bool, str | None, dict[str, Any]]  # row_id, keep, reason, evidence


@dataclass(frozen=True)
class Overrides:
    """Applies overrides.parquet, the last step of every set. Reasons: override_drop, rewritten; override_keep on a row
    that comes back (the funnel counts it as made)."""

    scope: ClassVar[Literal["overrides"]] = "overrides"

    def digest(self, folder: RunFolder) -> str:
        """sha256 of the file, or the empty string: another file makes the step stale."""
        path = folder.root / "overrides.parquet"
        return hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else ""


def read_overrides(folder: RunFolder) -> list[dict[str, Any]]:
    """The overrides in file order; a HouseError names a line that says nothing or names no row."""
    path = folder.root / "overrides.parquet"
    if not path.is_file():
        return []
    found = read_parquet(path, ["action"], "Restore it, or remove it to do without overrides")
    rows: list[dict[str, Any]] = [
        {name: row.get(name) for name in OVERRIDES.names} for row in found.select(_known(found)).to_pylist()
    ]
    for number, row in enumerate(rows, 1):
        if row["action"] not in ("keep", "drop", "edit") or (row["row_id"] is None) == (row["content_id"] is None):
            raise HouseError(
                f"{path} row {number}: needs one of row_id and content_id, and an action of keep, drop or edit;"
                f" has row_id {row['row_id']!r}, content_id {row['content_id']!r}, action {row['action']!r}"
            )
        if row["action"] == "edit":
            _edited_content(path, number, row)
    return rows


def add_override(
    folder: RunFolder, row_id: str, action: Action, why: str, who: str, content: Mapping[str, Any] | None = None
) -> None:
    """Writes one more line into overrides.parquet; of several for a row the last rules. content: for `edit`, the fields
    of the row to replace. Nothing is curated anew before the next run of the recipe."""
    path = folder.root / "overrides.parquet"
    said = None if content is None else json.dumps(content, ensure_ascii=False)
    line = {"row_id": row_id, "content_id": None, "action": action, "content": said, "who": who, "why": why}
    if action == "edit" and content is None:
        raise HouseError(f"override of {row_id}: `edit` needs the new fields (--content)")
    if action != "edit" and content is not None:
        raise HouseError(f"override of {row_id}: new content belongs to `edit` alone, not to `{action}`")
    if action == "edit":
        _edited_content(path, 1, line)
    write_parquet(path, pa.Table.from_pylist([*read_overrides(folder), line], schema=OVERRIDES))


def _known(found: pa.Table) -> list[str]:
    return [name for name in OVERRIDES.names if name in found.column_names]


def _edited_content(path: Path, number: int, row: Mapping[str, Any]) -> dict[str, Any]:
    try:
        content = json.loads(row["content"] or "null")
    except json.JSONDecodeError as error:
        raise HouseError(f"{path} row {number}: content is not JSON ({error})") from error
    if not isinstance(content, dict) or not content or not content.keys() <= set(CONTENT):
        raise HouseError(f"{path} row {number}: content must be a JSON object with fields of {list(CONTENT)}")
    return content


def apply_overrides(
    folder: RunFolder, set_name: str, index: int, before: State, held_out: pa.Array
) -> tuple[list[Path], pa.Table, Mask]:
    """Made parts (edits), ledger rows, and the new live mask. The last override of a row wins."""
    alive = before.alive.copy()
    fates: list[Fate] = []
    edits: list[dict[str, Any]] = []
    for position, row, rule, fate in overruled(folder, before, held_out):
        alive[position] = fate[1]
        fates.append(fate)
        if rule["action"] == "edit":
            edits.append(_edit(row, rule, len(edits)))
    parts = []
    if edits:
        parts = [folder.rows / f"made-{set_name}-{index:02d}-00000.parquet"]
        write_parquet(parts[0], table(edits))
    rows = [
        {"row_id": row_id, "keep": keep, "reason": reason, "evidence": json.dumps(evidence, ensure_ascii=False)}
        for row_id, keep, reason, evidence in fates
    ]
    return parts, pa.Table.from_pylist(rows, schema=LEDGER), np.concatenate([alive, np.ones(len(edits), np.bool_)])


def overruled(
    folder: RunFolder, before: State, held_out: pa.Array
) -> Iterator[tuple[int, dict[str, Any], dict[str, Any], Fate]]:
    """Each row that an override changes or speaks of: its position in the set, itself, the override, and its fate."""
    overrides = read_overrides(folder)
    by_row = {row["row_id"]: row for row in overrides if row["row_id"] is not None}
    by_content = {row["content_id"]: row for row in overrides if row["content_id"] is not None}
    start = 0
    for part, mask in before.masks() if overrides else ():
        for offset, row, rule in _matches(part, by_row, by_content):
            fate = _fate(row, rule, bool(mask[offset]), held_out)
            if fate is not None:
                yield start + offset, row, rule, fate
        start += len(mask)


def _matches(
    part: Path, by_row: Mapping[str, Any], by_content: Mapping[str, Any]
) -> list[tuple[int, dict[str, Any], dict[str, Any]]]:
    ids = pq.read_table(part, columns=["row_id", "content_id"])
    hit = pc.or_(
        pc.is_in(ids["row_id"], value_set=pa.array(list(by_row), pa.string())),
        pc.is_in(ids["content_id"], value_set=pa.array(list(by_content), pa.string())),
    ).to_numpy()
    if not hit.any():
        return []
    rows = pq.read_table(part).filter(pa.array(hit)).to_pylist()
    rules = [by_row.get(row["row_id"]) or by_content[row["content_id"]] for row in rows]
    return list(zip(np.flatnonzero(hit).tolist(), rows, rules, strict=True))


def _fate(row: Mapping[str, Any], rule: Mapping[str, Any], live: bool, held_out: pa.Array) -> Fate | None:
    """What an override does to one row of the set, or None where there is nothing left to do."""
    evidence = {"who": rule["who"], "why": rule["why"], "action": rule["action"]}
    if rule["action"] == "keep":
        if not live and pc.is_in(pa.scalar(row["row_id"]), value_set=held_out).as_py():
            raise HouseError(
                f"overrides.parquet keeps row {row['row_id']}, which is held out for evaluation: remove that line"
            )
        return row["row_id"], True, None if live else "override_keep", evidence
    if not live:
        return None
    return row["row_id"], False, "override_drop" if rule["action"] == "drop" else "rewritten", evidence


def _edit(row: Mapping[str, Any], rule: Mapping[str, Any], position: int) -> dict[str, Any]:
    content = {name: row[name] for name in (*CONTENT, "meta")} | json.loads(rule["content"])
    return made_row(f"Override(who={rule['who']!r})", [row["row_id"]], position, row["source"], **content)
