"""Judges of a conversation's form: the order of its roles, turns that say nothing."""

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from ..flags import flagged
from ..steps import Unmeasured

ROLES = ("system", "developer", "user", "assistant", "tool")
ORDER = ("unknown_role", "system_not_first", "not_alternating", "starts_with_assistant", "stray_tool_turn")
OPEN = "ends_without_assistant"
_START = len(ROLES)
# _FAULT[role before, role]: index into ORDER, or -1. A role that is not known is the last row and column.
_FAULT = np.array(
    [  # system, developer, user, assistant, tool, unknown
        [-1, -1, -1, 3, 4, 0],  # after system
        [-1, -1, -1, 3, 4, 0],  # after developer
        [1, 1, 2, -1, 4, 0],  # after user
        [1, 1, -1, 2, -1, 0],  # after assistant
        [1, 1, 2, -1, -1, 0],  # after tool
        [-1, -1, -1, 3, 4, 0],  # at the start; after an unknown role
    ]
)


@dataclass(frozen=True)
class RoleOrder(Unmeasured):
    """Drops conversations whose roles stand in an order that no chat template was made for.

    System and developer turns come first; user and assistant alternate (a tool turn follows an assistant's or another
    tool turn, and an assistant's follows it); the last turn is the assistant's unless `ends_with_assistant` is false.
    Of a preference or KTO row `chosen`, and then `rejected`, continue the messages. Reasons: unknown_role,
    system_not_first, not_alternating, starts_with_assistant, stray_tool_turn, ends_without_assistant. Evidence: {field,
    turn (from 0), role, after}. Raw documents are kept.
    """

    ends_with_assistant: bool = True

    scope: ClassVar[Literal["row"]] = "row"

    def judge(self, rows: pa.Table, values: pa.Table) -> pa.Table:
        """Verdicts, aligned with `rows`."""
        found: dict[int, tuple[str, dict[str, Any]]] = {}
        start = 0
        for batch in rows.select(["messages", "chosen", "rejected"]).to_batches():
            for row in self._suspects(batch).tolist():
                one = role_fault(batch.slice(row, 1).to_pylist()[0], self.ends_with_assistant)
                if one is not None:
                    found[start + row] = one
            start += batch.num_rows
        return flagged(rows.num_rows, found)

    def _suspects(self, batch: pa.RecordBatch) -> Any:
        """Rows that `role_fault` says something of, found by looking at neighbours in the flat column of roles."""
        size = batch.num_rows
        fault = np.zeros(size, np.bool_)
        roles, first, last, present = _codes(batch["messages"])
        before_answer = np.where(last > first, _at(roles, last - 1), _START)
        fault |= _bad_pairs(roles, first, last, np.full(size, _START))
        answered = np.zeros(size, np.bool_)
        ends = before_answer
        for name in ("chosen", "rejected"):
            codes, begin, end, valid = _codes(batch[name])
            fault |= valid & _bad_pairs(codes, begin, end, before_answer)
            final = np.where(end > begin, _at(codes, end - 1), before_answer)
            fault |= valid & (final != 3) & self.ends_with_assistant
            answered |= valid
        fault |= ~answered & (ends != 3) & self.ends_with_assistant
        return np.flatnonzero(fault & present)


def role_fault(row: dict[str, Any], ends_with_assistant: bool = True) -> tuple[str, dict[str, Any]] | None:
    """The first fault in the order of a row's roles and its evidence, or None."""
    if row["messages"] is None:
        return None
    asked = [turn["role"] for turn in row["messages"]]
    answers = [(name, [turn["role"] for turn in row[name]]) for name in ("chosen", "rejected") if row[name] is not None]
    for name, roles in answers or [("messages", [])]:
        whole = [*asked, *roles]
        before = _START
        for index, role in enumerate(whole):
            code = ROLES.index(role) if role in ROLES else _START
            if _FAULT[before, code] >= 0:
                inside = index < len(asked)
                place = {"field": "messages" if inside else name, "turn": index if inside else index - len(asked)}
                after = whole[index - 1] if index else None
                return ORDER[_FAULT[before, code]], place | {"role": role, "after": after}
            before = code
        if ends_with_assistant and before != 3:
            return OPEN, {"field": name, "turn": len(roles or asked) - 1, "role": whole[-1] if whole else None}
    return None


def _codes(column: pa.Array) -> tuple[Any, Any, Any, Any]:
    """Role codes of all turns of a list column, each row's first and last turn in them, and which rows are not null."""
    valid = column.is_valid().to_numpy(zero_copy_only=False)
    if not valid.any():
        none = np.zeros(len(column), np.int64)
        return none[:0], none, none, valid
    offsets = column.offsets.to_numpy().astype(np.int64)
    turns = column.values.slice(int(offsets[0]), int(offsets[-1] - offsets[0]))
    codes = pc.fill_null(pc.index_in(turns.field("role"), value_set=pa.array(ROLES)), _START).to_numpy()
    offsets -= offsets[0]
    return codes, offsets[:-1], np.where(valid, offsets[1:], offsets[:-1]), valid


def _at(codes: Any, places: Any) -> Any:
    return codes[np.clip(places, 0, None)] if len(codes) else np.full(len(places), _START)


def _bad_pairs(codes: Any, first: Any, last: Any, before: Any) -> Any:
    """Rows in which a turn may not follow the one before it; `before`: what stands before the row's first turn."""
    if not len(codes):
        return np.zeros(len(first), np.bool_)
    previous = np.concatenate([[_START], codes[:-1]])
    filled = last > first
    previous[first[filled]] = before[filled]
    bad = np.concatenate([[0], np.cumsum(_FAULT[previous, codes] >= 0)])
    return bad[last] > bad[first]


@dataclass(frozen=True)
class EmptyTurn(Unmeasured):
    """Drops conversations in which a turn holds nothing but white space: a question or an answer that got lost.

    An assistant's turn with tool calls may be without content, and so may a system turn. Reason: empty_turn; evidence:
    {field: messages | chosen | rejected, turn (from 0), role}. Raw documents are kept.
    """

    scope: ClassVar[Literal["row"]] = "row"

    def judge(self, rows: pa.Table, values: pa.Table) -> pa.Table:
        """Verdicts, aligned with `rows`."""
        found: dict[int, tuple[str, dict[str, Any]]] = {}
        start = 0
        for batch in rows.select(["messages", "chosen", "rejected"]).to_batches():
            for name in ("messages", "chosen", "rejected"):
                for row, turn, role in _empty(batch[name]):
                    found.setdefault(start + row, ("empty_turn", {"field": name, "turn": turn, "role": role}))
            start += batch.num_rows
        return flagged(rows.num_rows, found)


def _empty(column: pa.Array) -> list[tuple[int, int, str | None]]:
    """Row, turn and role of the turns that say nothing, of each row the first."""
    from ..text.texts import blank

    codes, first, last, _ = _codes(column)
    if not len(codes):
        return []
    offsets = column.offsets.to_numpy().astype(np.int64)
    turns = column.values.slice(int(offsets[0]), int(offsets[-1] - offsets[0]))
    silent = blank(turns.field("content")) & (codes > 1)
    silent &= ~((codes == 3) & turns.field("tool_calls").is_valid().to_numpy(zero_copy_only=False))
    places = np.flatnonzero(silent)
    rows = np.searchsorted(first, places, "right") - 1
    rows, index = np.unique(rows, return_index=True)
    inside = places[index] < last[rows]  # a null row may hide turns
    return [
        (int(row), int(place - first[row]), turns.field("role")[int(place)].as_py())
        for row, place in zip(rows[inside], places[index][inside], strict=True)
    ]
