"""Judges of any number of any measure: the same rules as perplexity's, and errors that name the columns."""

from collections.abc import Callable
from typing import Any

import pyarrow as pa
import pytest

from gristmill.curation.folder import HouseError
from gristmill.curation.judges.score import ScoreQuantile, ScoreRange
from gristmill.curation.measures.embedding import Embedding
from gristmill.curation.measures.length import Length
from gristmill.curation.measures.perplexity import ResponsePerplexity
from gristmill.curation.rows import ROW


def test_range_keeps_both_limits() -> None:
    judge = ScoreRange(Length(), "response_words", low=2, high=4)
    values = pa.table({"response_words": pa.array([1, 2, 4, 5, None], pa.int32())})
    found = judge.judge(ROW.empty_table(), values).to_pylist()
    assert [row["reason"] for row in found] == [
        "response_words_low", None, None, "response_words_high", "not_scorable",
    ]  # fmt: skip
    assert [row["score"] for row in found] == [1, 2, 4, 5, None]
    assert judge.limits() == (2, 4) and judge.needs == (Length(),) and judge.score == "response_words"
    only = ScoreRange(ResponsePerplexity("m"), "mean_prob", low=0.5)
    values = pa.table({"mean_prob": [0.4, 0.5, float("nan"), 9e99]})
    assert only.judge(ROW.empty_table(), values)["reason"].to_pylist() == ["mean_prob_low", None, "not_scorable", None]


class Rows:
    def __init__(self, names: list[str], scores: list[Any]) -> None:
        self.names, self.scores = names, scores

    def tables(self, columns: Any = None) -> Any:
        yield pa.table({"row_id": self.names[:2]})
        yield pa.table({"row_id": self.names[2:]})

    def values(self, columns: Any) -> pa.Table:
        return pa.table({columns[0]: pa.array(self.scores, pa.int32())})


def test_quantile_is_exact_and_ties_go_by_row_id() -> None:
    judge = ScoreQuantile(Length(), "turns", drop_lowest=0.25, drop_highest=0.25)
    found = judge.judge(Rows(list("dcbaef"), [2, 2, 2, 2, None, 2])).to_pylist()  # type: ignore[arg-type]
    assert [row["reason"] for row in found] == [None, None, None, "turns_low", "not_scorable", "turns_high"]
    assert (
        found[3]["evidence"] == '{"cut": 2.0, "rank": 1, "rows": 5}'
        and found[1]["evidence"] == '{"rank": 3, "rows": 5}'
    )
    assert found[4]["evidence"] is None


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ScoreRange(Length(), "words"), "no number column 'words'; it has prompt_words, response_words"),
        (lambda: ScoreQuantile(Embedding("m"), "embedding"), "no number column 'embedding'"),
        (lambda: ScoreRange(Length(), "turns", low=3, high=2), "low <= high"),
        (lambda: ScoreRange(Length(), "turns", low=float("nan")), "low <= high"),
        (lambda: ScoreQuantile(Length(), "turns", 0.5, 0.5), "shares"),
    ],
)
def test_errors_name_what_is_wrong(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(HouseError, match=message):
        make()
