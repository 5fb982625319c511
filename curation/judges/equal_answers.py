"""A judge of preference pairs: the two answers must differ."""

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import pyarrow as pa

from ..flags import flagged
from ..steps import Unmeasured
from ..text.view import VIEW_COLUMNS, normal


@dataclass(frozen=True)
class EqualAnswers(Unmeasured):
    """Drops preference rows whose `chosen` equals `rejected` in normal form (NFKC, case-folded, white space collapsed):
    such a pair teaches nothing. Reason: equal_answers. Rows that are no preference pair are kept."""

    scope: ClassVar[Literal["row"]] = "row"

    def judge(self, rows: pa.Table, values: pa.Table) -> pa.Table:
        """Verdicts, aligned with `rows`."""
        found: dict[int, tuple[str, None]] = {}
        start = 0
        for batch in rows.select(VIEW_COLUMNS).to_batches():
            look = _alike(batch)
            pairs = batch.select(["chosen", "rejected"]).take(pa.array(look)).to_pylist()
            for row, pair in zip(look.tolist(), pairs, strict=True):
                if _equal(pair["chosen"], pair["rejected"]):
                    found[start + row] = "equal_answers", None
            start += batch.num_rows
        return flagged(rows.num_rows, found)


def _alike(batch: pa.RecordBatch) -> Any:
    """Rows whose two answers have contents of one normal form: what `_equal` has to look at."""
    from ..duplicates.normal_digests import normal_digests

    both = (batch["chosen"].is_valid().to_numpy(False) & batch["rejected"].is_valid().to_numpy(False)).nonzero()[0]
    if not len(both):
        return both
    pairs = batch.take(pa.array(both))
    other = pairs.set_column(pairs.schema.get_field_index("chosen"), "chosen", pairs["rejected"])
    keys = [normal_digests(side, "response")[0] for side in (pairs, other)]
    return both[(keys[0] == keys[1]).all(axis=1)]


def _equal(chosen: list[dict[str, Any]], rejected: list[dict[str, Any]]) -> bool:
    return [_turn(turn) for turn in chosen] == [_turn(turn) for turn in rejected]


def _turn(turn: dict[str, Any]) -> tuple[str | None, ...]:
    reasoning = normal(turn["reasoning_content"] or "")
    return turn["role"], normal(turn["content"] or ""), reasoning, turn["tool_calls"]
