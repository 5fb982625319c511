"""Quotas of makers: the rows that stay are the best or a fixed draw, shares hold of what is left, evidence says why."""

import json
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gristmill.curation.folder import HouseError
from gristmill.curation.judges.maker_quota import MakerQuota, shares_kept
from gristmill.curation.measures.length import Length
from gristmill.curation.rows import made_row, message, table


class Corpus:
    """Live rows in two parts; the value column is the length of the answer in words."""

    def __init__(self, rows: list[dict[str, Any]]) -> None:
        self.all = rows
        half = len(rows) // 2
        self.parts = [table(rows[:half]), table(rows[half:])]

    def tables(self, columns: Any = None) -> Any:
        return iter(part.select(columns or part.column_names) for part in self.parts)

    def values(self, columns: Any) -> pa.Table:
        said = [row["messages"][-1]["content"] for row in self.all]
        return pa.table({"response_words": pa.array([len(text.split()) or None for text in said], pa.int32())})


def made(maker: str, number: int, words: int = 1, meta: dict[str, Any] | None = None) -> dict[str, Any]:
    turns = [message("user", f"q {number}"), message("assistant", "w " * words)]
    return made_row(
        f"{maker}(seed=0)", [], number, "x", messages=turns, meta=None if meta is None else json.dumps(meta)
    )


@pytest.fixture
def rows(make_row: Any) -> list[dict[str, Any]]:
    read = [make_row("s", number, f"p {number}", "a") for number in range(6)]
    eager = [made("Eager", number, number) for number in range(10)]
    masked = [made("Mask", 20 + n, n, {"made": {"maker": "Eager"}}) for n in range(2)]
    return [*read[:3], *eager, *read[3:], *masked, made("Shy", 0), made("Shy", 1)]


def kept(judge: MakerQuota, rows: list[dict[str, Any]]) -> list[int]:
    found = judge.judge(Corpus(rows))  # type: ignore[arg-type]
    return [place for place, keep in enumerate(found["keep"].to_pylist()) if keep]


def test_the_best_stay_and_the_evidence_says_why(rows: list[dict[str, Any]]) -> None:
    judge = MakerQuota(most={"Eager": 3}, of=Length(), column="response_words")
    found = judge.judge(Corpus(rows)).to_pylist()  # type: ignore[arg-type]
    assert [place for place, one in enumerate(found) if one["keep"]] == [0, 1, 2, 10, 11, 12, 13, 14, 15, 18, 19]
    lost = found[3]  # no words: no value, so the last of twelve, the masked ones among them
    assert lost["reason"] == "over_quota" and lost["score"] is None
    assert json.loads(lost["evidence"])["quota"] == 3 and json.loads(lost["evidence"])["maker"] == "Eager"
    assert sorted(json.loads(found[place]["evidence"])["rank"] for place in (3, 16)) == [11, 12]
    assert all(one["evidence"] is None for one in found if one["keep"])
    short = MakerQuota(most={"Eager": 3}, of=Length(), column="response_words", prefer="low")
    assert {4, 17} < set(kept(short, rows)) and 12 not in kept(short, rows)


def test_without_a_score_the_draw_depends_on_seed_and_row_alone(rows: list[dict[str, Any]]) -> None:
    judge = MakerQuota(most=2)
    ids = {rows[place]["row_id"] for place in kept(judge, rows)}
    back = rows[::-1]
    assert {back[place]["row_id"] for place in kept(judge, back)} == ids and len(ids) == 6 + 2 + 2
    assert any({rows[place]["row_id"] for place in kept(MakerQuota(most=2, seed=s), rows)} != ids for s in range(1, 5))


def test_a_share_is_of_what_stays(rows: list[dict[str, Any]]) -> None:
    stay = kept(MakerQuota(None, share={"Eager": 0.5}), rows)
    assert len([place for place in stay if 3 <= place <= 12 or place in (16, 17)]) == 8 and len(stay) == 16
    both = kept(MakerQuota(most={"Eager": 5}, share={"Eager": 0.5}), rows)
    assert len(both) == 8 + 5


@given(st.lists(st.tuples(st.integers(0, 60), st.floats(0.01, 1.0)), min_size=1, max_size=5))
def test_quotas_by_share_are_the_largest(groups: list[tuple[int, float]]) -> None:
    most, share = np.array([n for n, _ in groups], np.int64), np.array([s for _, s in groups])
    found = shares_kept(most, share)
    assert (found <= most).all() and (found[share < 1] <= share[share < 1] * found.sum() + 1e-6).all()
    for place in range(len(groups)):  # one row more of any group alone breaks a bound
        more = found.copy()
        more[place] += 1
        assert more[place] > most[place] or (share[place] < 1 and more[place] > share[place] * more.sum() + 1e-6)


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"most": None}, "give `most`"),
        ({"most": -1}, "at least 0"),
        ({"most": None, "share": 1.0}, "below 1"),
        ({"most": 1, "of": Length()}, "column"),
    ],
)
def test_what_makes_no_sense_is_said(fields: dict[str, Any], said: str) -> None:
    with pytest.raises(HouseError, match=said):
        MakerQuota(**fields)


def test_shares_that_no_set_can_keep_are_an_error() -> None:
    with pytest.raises(HouseError, match=r"sum to 0\.7"):
        MakerQuota(None, share={"A": 0.3, "B": 0.4}).judge(Corpus([made("A", 1), made("B", 2), made("A", 3)]))  # type: ignore[arg-type]
    with pytest.warns(UserWarning, match="no row is made by Nobody"):
        assert MakerQuota(most={"Nobody": 1}).judge(Corpus([made("A", 1)]))["keep"].to_pylist() == [True]  # type: ignore[arg-type]


def test_an_empty_set_has_no_verdicts() -> None:
    assert MakerQuota(most=1).judge(Corpus([])).num_rows == 0  # type: ignore[arg-type]
