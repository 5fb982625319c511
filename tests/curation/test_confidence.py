"""CLEAR's confidence with a chat model that knows the truth to a stated degree, and the filter over it."""

import json
import math
import random
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from gristmill.curation.door import ChatAnswer, ChatError, ChatRequest
from gristmill.curation.folder import HouseError
from gristmill.curation.judges.confidence import ConfidenceFilter
from gristmill.curation.measures.confidence import REFLECT, REFLECT_AGAIN, Confidence, certainty
from gristmill.curation.measures.length import Length
from gristmill.curation.rows import message, table

Make = Callable[..., dict[str, Any]]
Answer = Callable[[ChatRequest], ChatAnswer | ChatError]


class Tools:
    """A chat model by a function, and an NLI model that finds unequal texts to contradict each other by `against`."""

    def __init__(self, answer: Answer, against: Callable[[str, str], float] = lambda one, two: 0.9) -> None:
        self.answer, self.against = answer, against
        self.requests: list[ChatRequest] = []
        self.pairs: list[tuple[str, str]] = []

    def chat(self, model: str) -> Any:
        return self

    def entailment(self, model: str) -> Any:
        return self

    def complete(self, requests: Sequence[ChatRequest], progress: Any = None) -> list[ChatAnswer | ChatError]:
        self.requests += requests
        return [self.answer(request) for request in requests]

    def probabilities(self, pairs: Sequence[tuple[str, str]], progress: Any = None) -> Any:
        self.pairs += pairs
        return np.array([[self.against(*pair), 0.0, 1 - self.against(*pair)] for pair in pairs], np.float32)


def say(text: str) -> ChatAnswer:
    return ChatAnswer(text, 1, 1, True)


def reflects(request: ChatRequest) -> bool:
    return "Proposed answer:" in request.messages[0][1]


def measured(measure: Confidence, rows: pa.Table, tools: Tools) -> list[dict[str, Any]]:
    found = measure.measure(rows, tools, lambda done, total: None)  # type: ignore[arg-type]
    assert {field.name: field.type for field in found.schema} == Confidence.columns
    return found.to_pylist()


def test_confidence_is_bsdetectors_sum(make_row: Make) -> None:
    """By hand: two samples, one equal but for case, one that contradicts by 0.6 and 0.2; reflections A and C."""
    samples = iter(["PARIS ", "Lyon"])
    told = iter(["It is. answer: A", "Hm.\nanswer: (C)"])
    tools = Tools(
        lambda request: say(next(told) if reflects(request) else next(samples)),
        lambda one, two: {("Paris", "Lyon"): 0.6, ("Lyon", "Paris"): 0.2}.get((one, two), 0.1),
    )
    rows = table([make_row("a", 0, "Capital of {France}?", "Paris")])
    (found,) = measured(Confidence("m", "n", samples=2, alpha=0.75, beta=0.6), rows, tools)
    consistency = ((0.75 * (1 - 0.1) + 0.25) + 0.75 * (1 - 0.4)) / 2
    assert found["consistency"] == pytest.approx(consistency, abs=1e-6) and found["reflection"] == 0.75
    assert found["confidence"] == pytest.approx(0.6 * consistency + 0.4 * 0.75, abs=1e-6)
    assert (found["sampled"], found["reflected"]) == (2, 2)
    assert [request.messages for request in tools.requests[:2]] == [(("user", "Capital of {France}?"),)] * 2
    fields = {"question": "Capital of {France}?", "response": "Paris"}
    asked = [request.messages[0][1] for request in tools.requests[2:]]
    assert asked == [REFLECT.format(**fields), REFLECT_AGAIN.format(**fields)]
    assert len({request.seed for request in tools.requests}) == 4


READ = {
    "answer: A": 1.0, "Answer is (B)": 0.0, "because of that.\n**Answer:** C": 0.5, "(B)": 0.0, "A": 1.0, " C. ": 0.5,
    "Not (A) but\nanswer: B": 0.0, "A good answer to a question.": None, "": None, "answer: D": None,
    "answer: A or answer: B": None, "explanation: fine, answer: [A]": 1.0, "I choose option B": 0.0,
}  # fmt: skip


@pytest.mark.parametrize("text", READ)
def test_reflections_are_read_tolerantly_but_never_guessed(text: str) -> None:
    assert certainty(text) == READ[text]


def test_failures_are_null_and_counted_and_asked_once_more(make_row: Make) -> None:
    """Row 0: all fails. Row 1: one sample of two fails, one reflection is readable at the second try."""

    def answer(request: ChatRequest) -> ChatAnswer | ChatError:
        text = request.messages[0][1]
        if "first" in text:
            return ChatError("timeout", "")
        if reflects(request):
            return say("answer: B" if request.sampling.temperature and "really" in text else "well")
        return say("x") if request.seed % 2 else ChatError("timeout", "")

    rows = table([make_row("a", 0, "first", "x"), make_row("a", 1, "second", "x"), make_row("a", 2, "third", None)])
    measure = next(
        one
        for one in (Confidence("m", "n", samples=2, seed=seed) for seed in range(99))
        if [r.seed % 2 for r in sampled(one, rows)[2:]] == [0, 1]
    )
    with pytest.warns(UserWarning, match="3 of 4 sampled answers failed, and 3 of 4 reflections could not be read"):
        found = measured(measure, rows, Tools(answer))
    assert found[0] == dict.fromkeys(Confidence.columns) | {"sampled": 0, "reflected": 0}
    assert found[1]["consistency"] == 1.0 and found[1]["reflection"] == 0.0 and found[1]["sampled"] == 1
    assert found[1]["confidence"] == pytest.approx(0.7) and found[1]["reflected"] == 1
    assert found[2] == dict.fromkeys(Confidence.columns)


def sampled(measure: Confidence, rows: pa.Table) -> list[ChatRequest]:
    tools = Tools(lambda request: say("answer: A"))
    measured(measure, rows, tools)
    return [request for request in tools.requests if not reflects(request)]


def test_confidence_does_not_depend_on_the_other_rows(make_row: Make) -> None:
    rows = table([make_row("a", i, f"question {i}", f"answer {i}") for i in range(9)])
    measure = Confidence("m", "n", samples=3)
    tools = Tools(lambda r: say(f"answer: {'ABC'[r.seed % 3]}" if reflects(r) else f"answer {r.seed % 9}"))
    whole = measured(measure, rows, tools)
    assert len({row["confidence"] for row in whole}) > 3
    assert measured(measure, rows.take(list(range(8, -1, -1))), tools) == whole[::-1]


def test_conversations_show_who_speaks_and_preference_rows_are_judged_by_chosen(make_row: Make) -> None:
    turns = [message("user", "hi"), message("assistant", "yes?"), message("user", "2+2?"), message("assistant", "4")]
    rows = [make_row("a", 0, "", None, messages=turns)]
    rows += [make_row("a", 1, "q", None, chosen=[message("assistant", "good")], rejected=[message("assistant", "x")])]
    tools = Tools(lambda request: say("answer: A"))
    measured(Confidence("m", "n", samples=1), table(rows), tools)
    assert tools.requests[0].messages == (("user", "hi"), ("assistant", "yes?"), ("user", "2+2?"))
    assert "assistant: yes?\n\nuser: 2+2?" in tools.requests[2].messages[0][1]
    assert "Proposed answer: good" in tools.requests[4].messages[0][1]


def auroc(good: Sequence[float], bad: Sequence[float]) -> float:
    return sum((g > b) + (g == b) / 2 for g in good for b in bad) / (len(good) * len(bad))


def test_shuffled_targets_have_low_confidence(make_row: Make) -> None:
    """A model that answers rightly in 70 % of its samples and judges rightly in 75 % of its reflections, an NLI model
    that is right in 80 %: of 200 targets, 30 % shuffled, AUROC at least 0.9, and clean recall at the best cut too."""
    draw = random.Random(0)
    truth = {f"question {i}": f"fact number {i}" for i in range(200)}
    told = list(truth.values())
    bad = sorted(draw.sample(range(200), 60))
    for place, other in zip(bad, bad[1:] + bad[:1], strict=True):
        told[place] = f"fact number {other}"
    rows = table([make_row("a", i, question, told[i]) for i, question in enumerate(truth)])

    def answer(request: ChatRequest) -> ChatAnswer:
        chance = random.Random(request.seed)
        text = request.messages[0][1]
        if not reflects(request):
            right = chance.random() < 0.7
            return say(f"It is {truth[text]}." if right else f"It is {chance.choice(list(truth.values()))}.")
        question, _, rest = text.removeprefix("Question: ").partition("\n\nProposed answer: ")
        right = rest.partition("\n")[0] == truth[question]
        return say(f"answer: {'AB'[right == (chance.random() >= 0.75)]}")

    def against(one: str, two: str) -> float:
        same = one.strip(".").removeprefix("It is ") == two.strip(".").removeprefix("It is ")
        wrong = random.Random(one + two).random() < 0.2
        return 0.1 if same != wrong else 0.9

    sure = [row["confidence"] for row in measured(Confidence("m", "n"), rows, Tools(answer, against))]
    good = [value for place, value in enumerate(sure) if place not in set(bad)]
    assert auroc(good, [sure[place] for place in bad]) >= 0.9
    limit = sorted(sure)[60]
    assert sum(value >= limit for value in good) / len(good) >= 0.9


class Rows:
    def __init__(self, sure: Sequence[float | None]) -> None:
        self.rows, part = len(sure), pa.array(sure, pa.float64())
        self.measured = pa.table({"confidence": part, "consistency": part, "reflection": part})

    def tables(self, columns: Sequence[str]) -> Iterator[pa.Table]:
        yield pa.table({"row_id": [str(i) for i in range(self.rows)]})

    def values(self, columns: Sequence[str]) -> pa.Table:
        return self.measured.select(list(columns))


def kept(threshold: Any, sure: Sequence[float | None]) -> list[dict[str, Any]]:
    judge = ConfidenceFilter(Confidence("m", "n"), threshold)
    found: list[dict[str, Any]] = judge.judge(Rows(sure)).to_pylist()  # type: ignore[arg-type]
    return found


def test_filter_is_monotone_and_never_touches_at_or_above_the_threshold() -> None:
    draw = random.Random(0)
    sure: list[float | None] = [round(draw.random(), 2) for _ in range(300)] + [None, math.nan, 0.0, 1.0]
    before: set[int] = set()
    for threshold in [step / 20 for step in range(21)]:
        found = kept(threshold, sure)
        gone = {i for i, row in enumerate(found) if row["reason"] == "low_confidence"}
        assert gone == {i for i, value in enumerate(sure) if value is not None and value < threshold}
        assert before <= gone
        before = gone
        assert [i for i, row in enumerate(found) if row["reason"] == "not_scorable"] == [300, 301]
        assert all(row["keep"] == (row["reason"] is None) for row in found)
    assert not any(row["reason"] == "low_confidence" for row in kept(0.0, sure))


def test_the_median_is_of_the_rows_that_have_a_confidence() -> None:
    found = kept("median", [0.1, 0.2, None, 0.3, 0.4, 0.5])
    assert [row["keep"] for row in found] == [False, False, False, True, True, True]
    assert json.loads(found[0]["evidence"]) == {"consistency": 0.1, "reflection": 0.1, "threshold": 0.3}
    assert found[0]["score"] == 0.1 and found[3]["evidence"] is None
    assert [row["reason"] for row in kept("median", [None, None])] == ["not_scorable"] * 2


def test_wrong_settings_are_refused() -> None:
    with pytest.raises(HouseError, match="threshold"):
        ConfidenceFilter(Confidence("m", "n"), 1.5)
    with pytest.raises(HouseError, match="Length measures no confidence"):
        ConfidenceFilter(Length())
    with pytest.raises(HouseError, match="samples"):
        Confidence("m", "n", samples=0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ConfidenceFilter(Confidence("m", "n"), 0.5)
