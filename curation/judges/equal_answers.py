"""A judge of preference pairs: the two answers must differ."""

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import pyarrow as pa

from ..steps import Unmeasured, verdicts
from ..text import normal


@dataclass(frozen=True)
class EqualAnswers(Unmeasured):
    """Drops preference rows whose `chosen` equals `rejected` in normal form (NFKC, case-folded, white space collapsed):
    such a pair teaches nothing. Reason: equal_answers. Rows that are no preference pair are kept."""

    scope: ClassVar[Literal["row"]] = "row"

    def judge(self, rows: pa.Table, values: pa.Table) -> pa.Table:
        """Verdicts, aligned with `rows`."""
        pairs = zip(rows["chosen"].to_pylist(), rows["rejected"].to_pylist(), strict=True)
        return verdicts([a is None or b is None or not _equal(a, b) for a, b in pairs], "equal_answers")


def _equal(chosen: list[dict[str, Any]], rejected: list[dict[str, Any]]) -> bool:
    return [_turn(turn) for turn in chosen] == [_turn(turn) for turn in rejected]


def _turn(turn: dict[str, Any]) -> tuple[str | None, ...]:
    reasoning = normal(turn["reasoning_content"] or "")
    return turn["role"], normal(turn["content"] or ""), reasoning, turn["tool_calls"]
