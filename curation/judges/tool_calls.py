"""A judge of tool use: each call well-formed and answered, each answer to a call."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from ..flags import flagged
from ..steps import Unmeasured

_COLUMNS = ("messages", "chosen", "rejected", "tools")


@dataclass(frozen=True)
class ToolCalls(Unmeasured):
    """Drops rows whose tool calls do not add up, so that a model would learn to call tools that nobody can run.

    Reasons: malformed_tools (`tools` is no JSON list of functions with names), malformed_call (`tool_calls` is no JSON
    list of calls, a call has no function name, or its arguments are no JSON object), unknown_tool (a function that
    `tools` does not list), unanswered_call (another turn than the tool's follows a call), unmatched_result (a tool turn
    answers no open call; by tool_call_id where it has one, else in order). Calls of the last turn need no answer: they
    are what is learnt. Evidence: {field, turn (from 0), call}. Rows without tools are kept.
    """

    scope: ClassVar[Literal["row"]] = "row"

    def judge(self, rows: pa.Table, values: pa.Table) -> pa.Table:
        """Verdicts, aligned with `rows`."""
        found: dict[int, tuple[str, dict[str, Any]]] = {}
        start = 0
        for batch in rows.select(_COLUMNS).to_batches():
            use = np.flatnonzero(_uses_tools(batch))
            for row, item in zip(use.tolist(), batch.take(pa.array(use)).to_pylist(), strict=True):
                one = tool_fault(item)
                if one is not None:
                    found[start + row] = one
            start += batch.num_rows
        return flagged(rows.num_rows, found)


def _uses_tools(batch: pa.RecordBatch) -> Any:
    use = batch["tools"].is_valid().to_numpy(zero_copy_only=False).copy()
    for name in ("messages", "chosen", "rejected"):
        turns = batch[name].flatten()  # of rows that are not null
        of_tool = pc.or_(
            pc.is_valid(turns.field("tool_calls")), pc.fill_null(pc.equal(turns.field("role"), "tool"), False)
        )
        if pc.any(of_tool).as_py():
            use[pc.list_parent_indices(batch[name]).filter(of_tool).to_numpy()] = True
    return use


def tool_fault(row: Mapping[str, Any]) -> tuple[str, dict[str, Any]] | None:
    """The first fault of a row's tools and calls and its evidence, or None."""
    known = _known(row["tools"])
    if known is not None and not known:
        return "malformed_tools", {"field": "tools"}
    answers = [name for name in ("chosen", "rejected") if row[name] is not None]
    for name in answers or ["messages"]:
        asked = row["messages"] or []
        fault = _walk([*asked, *(row[name] if answers else [])], known)
        if fault is not None:
            reason, turn, call = fault
            inside = turn < len(asked)
            place = {"field": "messages" if inside else name, "turn": turn if inside else turn - len(asked)}
            return reason, place | ({} if call is None else {"call": call[:200]})
    return None


def _known(tools: str | None) -> set[str] | None:
    """Names of the functions that a row lists; None where it lists none, empty where the list cannot be read."""
    if tools is None:
        return None
    try:
        listed = json.loads(tools)
        return {str((tool.get("function") or tool)["name"]) for tool in listed} if listed else None
    except (ValueError, AttributeError, KeyError, TypeError):
        return set()


def _walk(turns: Sequence[Mapping[str, Any]], known: set[str] | None) -> tuple[str, int, str | None] | None:
    open_calls: list[tuple[str | None, str]] = []  # id and name, in order
    asked_at = 0
    for index, turn in enumerate(turns):
        if turn["role"] == "tool":
            if not _answered(open_calls, turn["tool_call_id"]):
                return "unmatched_result", index, turn["tool_call_id"]
            continue
        if open_calls:
            return "unanswered_call", asked_at, open_calls[0][1]
        if turn["tool_calls"] is None:
            continue
        calls = read_calls(turn["tool_calls"])
        if calls is None:
            return "malformed_call", index, turn["tool_calls"]
        stranger = next((name for _, name in calls if known is not None and name not in known), None)
        if stranger is not None:
            return "unknown_tool", index, stranger
        open_calls, asked_at = calls, index
    last_asks = bool(turns) and asked_at == len(turns) - 1
    return ("unanswered_call", asked_at, open_calls[0][1]) if open_calls and not last_asks else None


def _answered(open_calls: list[tuple[str | None, str]], call_id: str | None) -> bool:
    """Takes the call that a tool turn answers out of the open ones; false where there is none."""
    named = any(own is not None for own, _ in open_calls)
    for place, (own, _) in enumerate(open_calls):
        if own == call_id or call_id is None or not named:
            del open_calls[place]
            return True
    return False


def read_calls(text: str) -> list[tuple[str | None, str]] | None:
    """Id and function name of each call of a `tool_calls` field; None where it is malformed."""
    try:
        calls = json.loads(text)
        if not isinstance(calls, list):
            return None
        found = []
        for call in calls:
            function = call.get("function") or call
            arguments = function.get("arguments", {})
            if isinstance(arguments, str):
                arguments = json.loads(arguments or "{}")
            if not isinstance(arguments, dict) or not isinstance(function["name"], str) or not function["name"]:
                return None
            found.append((call.get("id"), function["name"]))
        return found
    except (ValueError, AttributeError, KeyError, TypeError):
        return None
