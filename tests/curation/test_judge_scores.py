"""Scores and verdicts of an LLM judge: what is read of its answers, and what is not."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import pytest

from gristmill.curation.door import ChatAnswer, ChatError, ChatRequest
from gristmill.curation.folder import HouseError
from gristmill.curation.measures.judge_scores import JudgeScores, PairPreference, better, expectation, rating
from gristmill.curation.rows import message, table

Make = Callable[..., dict[str, Any]]


class Tools:
    def __init__(self, answer: Callable[[ChatRequest], ChatAnswer | ChatError]) -> None:
        self.answer = answer
        self.requests: list[ChatRequest] = []

    def chat(self, model: str) -> Any:
        assert model == "m"
        return self

    def complete(self, requests: Sequence[ChatRequest], progress: Any = None) -> list[ChatAnswer | ChatError]:
        self.requests += requests
        return [self.answer(request) for request in requests]


def say(text: str, options: tuple[float, ...] | None = None) -> ChatAnswer:
    return ChatAnswer(text, 1, 1, True, options=options)


def measured(measure: Any, rows: Sequence[dict[str, Any]], tools: Tools) -> list[dict[str, Any]]:
    found = measure.measure(table(rows), tools, lambda done, total: None)
    assert {field.name: field.type for field in found.schema} == measure.columns
    return list(found.to_pylist())


RATED = {
    "score: 4.5\nIt is fine.": 4.5, "4": 4.0, "**Score:** 3/5": 3.0, "I'd say 2 out of 5.": 2.0, "Score is 0": 0.0,
    "Of 3 claims two hold.\nRating: 1": 1.0, "6": None, "-1": None, "none": None, "": None, "score: 55": None,
    "The score I give is high": None, "GPT4 says": None, "90% right": None,
}  # fmt: skip


@pytest.mark.parametrize("text", RATED)
def test_ratings_are_read_on_their_scale(text: str) -> None:
    assert rating(text, 0, 5) == RATED[text]


JUDGED = {
    "Both.\nbetter: A": 1.0, "better: B": 0.0, "**Better:** tie": 0.5, "[[A]]": 1.0, "[[C]]": 0.5, "B.": 0.0,
    "A is better": None, "better: A\nno,\nbetter: answer B": 0.0, "": None, "Tie": 0.5,
}  # fmt: skip


@pytest.mark.parametrize("text", JUDGED)
def test_verdicts_are_read_or_left(text: str) -> None:
    assert better(text) == JUDGED[text]


def test_the_expectation_over_the_options() -> None:
    assert expectation([math.log(p / 2) for p in (0.1, 0.2, 0.3, 0.1, 0.1, 0.2)], 1) == pytest.approx(3.5)
    assert expectation([-math.inf, -800.0, -math.inf], 4) == 5.0
    assert expectation([-math.inf] * 3, 1) is None and expectation([math.nan, 0.0], 1) is None


def test_an_unreadable_answer_is_asked_for_once_more_then_null(make_row: Make) -> None:
    def answer(request: ChatRequest) -> ChatAnswer | ChatError:
        text = request.messages[0][1]
        if "never" in text:
            return ChatError("timeout", "")
        return say("score: 3" if "good" in text or request.sampling.temperature else "hard to say")

    rows = [make_row("a", i, text, "r {x}") for i, text in enumerate(["good", "later", "never"])]
    rows.append(make_row("a", 3, "no answer", None))
    tools = Tools(answer)
    with pytest.warns(UserWarning, match="1 of 3 answers failed or could not be read"):
        found = measured(JudgeScores("m"), rows, tools)
    assert [row["judge_score"] for row in found] == [3.0, 3.0, None, None]
    first, second = tools.requests[1], tools.requests[3]
    assert len(tools.requests) == 5 and first.messages == second.messages and first.seed != second.seed
    assert first.sampling.temperature == 0.0 < second.sampling.temperature
    assert "later" in first.messages[0][1] and "r {x}" in first.messages[0][1] and "from 0 to 5" in first.messages[0][1]


def test_deita_scores_are_expectations_where_the_door_tells_probabilities(make_row: Make) -> None:
    rows = [make_row("a", 0, "q", "r")]
    tools = Tools(lambda request: say("6", tuple(math.log(1 / 6) for _ in request.sampling.options)))
    assert measured(JudgeScores("m", "deita_complexity"), rows, tools) == [{"judge_score": pytest.approx(3.5)}]
    assert tools.requests[0].sampling.options == ("1", "2", "3", "4", "5", "6")
    tools = Tools(lambda request: say("5"))
    assert measured(JudgeScores("m", "deita_quality", high=10), rows, tools) == [{"judge_score": 5.0}]
    assert measured(JudgeScores("m", "difficulty"), rows, tools) == [{"judge_score": 5.0}]
    assert tools.requests[1].sampling.options == ()
    with pytest.raises(HouseError, match="no rubric"):
        JudgeScores("m", "beauty")  # type: ignore[arg-type]
    with pytest.raises(HouseError, match="low < high"):
        JudgeScores("m", high=0)


def test_a_taste_for_the_first_place_is_a_tie(make_row: Make) -> None:
    def pair(position: int, chosen: str, rejected: str) -> dict[str, Any]:
        one, two = ([message("assistant", text)] for text in (chosen, rejected))
        return make_row("a", position, "q", None, chosen=one, rejected=two)

    def answer(request: ChatRequest) -> ChatAnswer:
        first, second = request.messages[0][1].partition("Answer A:\n")[2].split("\n\nAnswer B:\n")
        second = second.partition("\n\n")[0]
        if "same" in first:
            return say("better: tie")
        if "first place" in first + second:
            return say("better: A")
        if "lost" in first:
            return say("no idea")
        return say("better: A" if "right" in first else "better: B")

    rows = [pair(0, "right", "wrong"), pair(1, "wrong", "right"), pair(2, "first place", "x"), pair(3, "same", "same")]
    rows += [pair(4, "lost", "right"), make_row("a", 5, "q", "no pair"), pair(6, "", "x")]
    with pytest.warns(UserWarning, match="1 of 10 answers"):
        found = measured(PairPreference("m"), rows, Tools(answer))
    assert [row["preference"] for row in found] == [1.0, 0.0, 0.5, 0.5, None, None, None]
    assert [row["consistent"] for row in found] == [True, True, False, True, None, None, None]
