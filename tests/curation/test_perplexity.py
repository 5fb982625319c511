"""Perplexity: the measure over a scorer whose numbers are known, and both judges, NaN and null included."""

import json
import math
import random
from collections.abc import Iterator, Sequence
from typing import Any

import pyarrow as pa
import pytest

from gristmill.curation.folder import HouseError
from gristmill.curation.judges.perplexity import PerplexityQuantile, PerplexityRange
from gristmill.curation.measures.perplexity import ResponsePerplexity
from gristmill.curation.rows import ROW

NAN, INF = math.nan, math.inf


class Tools:
    """A model that scores what it is given to score."""

    def __init__(self, tokens: list[int | None], nll: list[float | None]) -> None:
        prob = [None if n is None else 0.25 for n in nll]
        self.scores = pa.table(
            {"tokens": pa.array(tokens, pa.int32()), "nll": pa.array(nll, pa.float64()),
             "mean_prob": pa.array(prob, pa.float64()), "min_prob": pa.array(prob, pa.float64())}
        )  # fmt: skip
        self.asked: list[str] = []

    def scorer(self, model: str) -> Any:
        self.asked.append(model)
        return self

    def response_scores(self, rows: pa.Table, progress: Any = None) -> pa.Table:
        return self.scores


class Rows:
    """A corpus of perplexities, in parts."""

    def __init__(self, names: Sequence[str], scores: Sequence[float | None], part: int = 100) -> None:
        self.names, self.scores, self.part = list(names), list(scores), part

    def tables(self, columns: Sequence[str] | None = None) -> Iterator[pa.Table]:
        for start in range(0, len(self.names), self.part):
            yield pa.table({"row_id": self.names[start : start + self.part]})

    def values(self, columns: Sequence[str]) -> pa.Table:
        assert list(columns) == ["perplexity"]
        return pa.table({"perplexity": pa.array(self.scores, pa.float64())})


def judged(judge: PerplexityQuantile, names: Sequence[str], scores: Sequence[float | None], part: int = 100) -> Any:
    return judge.judge(Rows(names, scores, part)).to_pylist()  # type: ignore[arg-type]


def test_perplexity_is_the_exponential_of_the_mean_loss() -> None:
    tools = Tools([2, 4, None, 0, 1, 3], [2 * math.log(8), 4 * math.log(3), None, 0.0, 1e6, NAN])
    found = ResponsePerplexity("small").measure(ROW.empty_table(), tools, lambda a, b: None)  # type: ignore[arg-type]
    assert {field.name: field.type for field in found.schema} == ResponsePerplexity.columns
    assert tools.asked == ["small"]
    values = found["perplexity"].to_pylist()
    assert values[:2] == pytest.approx([8.0, 3.0], rel=1e-12)
    assert values[2:5] == [None, None, INF]  # nothing scored, no token, beyond a double
    assert math.isnan(values[5])
    assert found["mean_prob"].to_pylist() == [0.25, 0.25, None, 0.25, 0.25, 0.25]


def test_range_drops_with_a_reason_and_lets_no_nan_through() -> None:
    scores = [1.0, 0.99, 50.0, 50.1, INF, NAN, None]
    judge = PerplexityRange("m", low=1.0, high=50.0)
    values = pa.table({"perplexity": pa.array(scores, pa.float64())})
    found = judge.judge(ROW.empty_table(), values).to_pylist()
    high = "perplexity_high"
    assert [row["reason"] for row in found] == [
        None, "perplexity_low", None, high, high, "not_scorable", "not_scorable",
    ]  # fmt: skip
    assert [row["keep"] for row in found] == [row["reason"] is None for row in found]
    assert [row["score"] for row in found] == [1.0, 0.99, 50.0, 50.1, INF, None, None]
    assert judge.limits() == (1.0, 50.0) and judge.needs == (ResponsePerplexity("m"),)


@pytest.mark.parametrize(("share", "rows", "dropped"), [(0.29, 100, 29), (0.05, 100, 5), (0.1, 19, 1), (0.0, 9, 0)])
def test_quantile_drops_exactly_its_share(share: float, rows: int, dropped: int) -> None:
    """0.29 · 100 is 28.999… in binary; the number of rows is exact all the same."""
    scores = [float(i) for i in range(rows)]
    random.Random(0).shuffle(scores)
    found = judged(PerplexityQuantile("m", drop_highest=share), [f"{i:03}" for i in range(rows)], scores)
    gone = sorted(row["score"] for row in found if not row["keep"])
    assert gone == [float(i) for i in range(rows - dropped, rows)]
    assert {row["reason"] for row in found if not row["keep"]} <= {"perplexity_high"}


def test_quantile_ranks_ties_by_row_id_in_any_order_and_part() -> None:
    names = [f"{i:02}" for i in range(20)]
    judge = PerplexityQuantile("m", drop_lowest=0.1, drop_highest=0.2)
    first = dict(zip(names, judged(judge, names, [7.0] * 20), strict=True))
    assert [name for name in names if not first[name]["keep"]] == ["00", "01", "16", "17", "18", "19"]
    assert [first[name]["reason"] for name in ("00", "19")] == ["perplexity_low", "perplexity_high"]
    shuffled = random.Random(1).sample(names, 20)
    assert dict(zip(shuffled, judged(judge, shuffled, [7.0] * 20, part=3), strict=True)) == first


def test_quantile_shows_rank_and_cut_and_counts_only_what_was_scored() -> None:
    scores = [5.0, NAN, 1.0, None, 3.0, 2.0, 4.0, INF]
    found = judged(PerplexityQuantile("m", 0.2, 0.4), "abcdefgh", scores)
    assert [row["reason"] for row in found] == [
        "perplexity_high", "not_scorable", "perplexity_low", "not_scorable", None, None, None, "perplexity_high",
    ]  # fmt: skip
    proof = [json.loads(row["evidence"]) if row["evidence"] else None for row in found]
    assert proof[0] == {"rank": 5, "rows": 6, "cut": 4.0}
    assert proof[2] == {"rank": 1, "rows": 6, "cut": 2.0}
    assert proof[4] == {"rank": 3, "rows": 6} and proof[1] is None


@pytest.mark.parametrize("shares", [(0.5, 0.5), (-0.1, 0.0), (0.0, NAN)])
def test_quantile_refuses_shares_that_leave_nothing(shares: tuple[float, float]) -> None:
    with pytest.raises(HouseError, match="shares"):
        PerplexityQuantile("m", *shares)
    with pytest.raises(HouseError, match="low <= high"):
        PerplexityRange("m", low=NAN)
