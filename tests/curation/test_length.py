"""Length: the measure, against counts made by hand, and its judge."""

from collections.abc import Callable
from typing import Any

import pyarrow as pa
import pytest

from gristmill.curation.folder import HouseError
from gristmill.curation.judges.length import ResponseLength
from gristmill.curation.measures.length import Length
from gristmill.curation.rows import message, table

Make = Callable[..., dict[str, Any]]


def measured(rows: list[dict[str, Any]]) -> pa.Table:
    return Length().measure(table(rows), None, lambda done, total: None)  # type: ignore[arg-type]


def test_counts_words_characters_and_turns(make_row: Make) -> None:
    several = [message("system", "Be brief."), message("user", "Name a gas, please."), message("assistant", "Neon")]
    several += [message("user", "And another?"), message("assistant", "Argon, or xenon.")]
    rows = [
        make_row("a", 0, "What is 2 + 2?", "It's four."),
        make_row("a", 1, "", "", messages=several),
        make_row("a", 2, "Hi", None, chosen=[message("assistant", "Good day")], rejected=[message("assistant", "No")]),
        make_row("a", 3, "", "", messages=None, text="ﬁve words in this text"),
    ]
    assert measured(rows).to_pylist() == [
        {"prompt_words": 4, "response_words": 3, "response_chars": 10, "turns": 2},  # It, s, four
        {"prompt_words": 9, "response_words": 3, "response_chars": 16, "turns": 5},  # all before the last answer
        {"prompt_words": 1, "response_words": 2, "response_chars": 8, "turns": 2},
        {"prompt_words": 0, "response_words": 5, "response_chars": 22, "turns": 0},
    ]


def test_limits_are_included(make_row: Make) -> None:
    rows = [make_row("a", n, "q", "word " * n) for n in range(7)]
    judge = ResponseLength(low=2, high=5)
    found = judge.judge(table(rows), measured(rows)).to_pylist()
    assert [row["keep"] for row in found] == [False, False, True, True, True, True, False]
    assert [row["reason"] for row in found] == ["too_short", "too_short", None, None, None, None, "too_long"]
    assert [row["score"] for row in found] == [0, 1, 2, 3, 4, 5, 6]
    assert judge.limits() == (2, 5)


def test_typographic_answers_have_no_words(make_row: Make) -> None:
    rows = [make_row("a", n, "q", answer) for n, answer in enumerate(["…!?", "—", "42", "日本"])]
    assert [row["keep"] for row in ResponseLength().judge(table(rows), measured(rows)).to_pylist()] == [0, 0, 1, 1]


@pytest.mark.parametrize("limits", [(5, 2), (-1, 3)])
def test_refuses_limits_that_keep_nothing(limits: tuple[int, int]) -> None:
    with pytest.raises(HouseError, match="low <= high"):
        ResponseLength(*limits)
