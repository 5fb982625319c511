"""Rejection sampling: the budget's formula by simulated doors, caps, what is counted, the same rows in any haste."""

import json
import random
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pyarrow as pa
import pytest

from gristmill.curation.door import ChatAnswer, ChatError, ChatRequest
from gristmill.curation.folder import HouseError
from gristmill.curation.makers.rejection_sampling import RejectionSampling, RightAgainstWrong
from gristmill.curation.rows import ROW, table
from gristmill.curation.sampling import Budget
from gristmill.curation.verifiers.exact_maths import ExactMaths

Make = Callable[..., dict[str, Any]]
DIFFICULTIES = (0.0, 0.25, 0.5, 0.75, 0.9, 1.0)  # of question n: DIFFICULTIES[n % 6]


class Door:
    """Solves question n with probability 1 - DIFFICULTIES[n % 6], drawn by the request's seed; every answer differs."""

    name, digest, licence, price = "solver", "d", "MIT", (0.0, 1.0)

    def __init__(self, fails: Callable[[ChatRequest], bool] = lambda request: False) -> None:
        self.fails, self.requests = fails, []  # type: ignore[var-annotated]

    def answer(self, request: ChatRequest) -> ChatAnswer | ChatError:
        if self.fails(request):
            return ChatError("timeout", "60 s")
        number = int(request.messages[-1][1].split()[1])
        draw = random.Random(request.seed)
        wrong = draw.random() < DIFFICULTIES[number % len(DIFFICULTIES)]
        return ChatAnswer(f"Path {draw.random()}\n#### {number + wrong}", 10, 7, True)

    def complete(self, requests: Sequence[ChatRequest], progress: Any = None) -> list[ChatAnswer | ChatError]:
        self.requests += requests
        return [self.answer(request) for request in requests]


class Hasty(Door):
    """Answers come in any order."""

    def stream(self, requests: Sequence[ChatRequest]) -> Iterator[tuple[int, ChatAnswer | ChatError]]:
        self.requests += requests
        places = list(range(len(requests)))
        random.Random(len(requests)).shuffle(places)
        for place in places:
            yield place, self.answer(requests[place])


class Corpus:
    def __init__(self, door: Door, rows: list[dict[str, Any]], part: int = 1000) -> None:
        self.door, self.rows, self.part, self.tools, self.facts = door, rows, part, self, {}  # type: ignore[var-annotated]

    def chat(self, model: str) -> Door:
        return self.door

    def progress(self, done: int, total: int) -> None:
        assert done <= total

    def record(self, **facts: Any) -> None:
        self.facts |= facts

    def tables(self, columns: Sequence[str] | None = None) -> Iterator[pa.Table]:
        for start in range(0, len(self.rows), self.part):
            yield table(self.rows[start : start + self.part]).select(list(columns or ROW.names))

    def curated(self, set_name: str, split: str) -> Iterator[pa.Table]:
        half = len(self.rows) // 2
        yield table(self.rows[:half] if split == "train" else self.rows[half:])


@pytest.fixture
def asked(make_row: Make) -> list[dict[str, Any]]:
    return [make_row("q", n, f"Question {n} ?", f"It is so.\n#### {n}") for n in range(60)]


def made_by(maker: Any, corpus: Any) -> list[dict[str, Any]]:
    return [row for part in maker.make(corpus) for row in part.to_pylist()]


def number_of(row: dict[str, Any]) -> int:
    return int(row["messages"][0]["content"].split()[1])


def sampler(**fields: Any) -> RejectionSampling:
    return RejectionSampling(model="m", verifier=ExactMaths(), **fields)


def test_kept_answers_are_proportional_to_the_fail_rate(asked: list[dict[str, Any]]) -> None:
    door = Door()
    corpus = Corpus(door, asked)
    made = made_by(sampler(k=6, trials=8, most_trials=1000), corpus)
    first = _first_trials(door, 8)
    kept = Counter(number_of(row) for row in made)
    for number, outcomes in first.items():
        fails = outcomes.count(False)
        solvable = DIFFICULTIES[number % 6] < 1
        # k times the fail rate of the first eight trials, rounded up
        assert kept[number] == (-(-6 * fails // 8) if solvable else 0)
    assert all(row["messages"][1]["content"].endswith(f"#### {number_of(row)}") for row in made)
    assert corpus.facts["budget"]["without_right_answer"] == 10  # those of difficulty 1
    assert corpus.facts["budget"]["short_of_wanted"] == 10
    tally = corpus.facts["synthesis"]
    assert tally["made"] == len(made) == sum(kept.values())
    assert tally["answered"] == tally["parsed"] + sum(tally["unparsed"].values()) == len(door.requests)
    assert tally["parsed"] == tally["made"] + sum(tally["refused"].values())


def _first_trials(door: Door, trials: int) -> dict[int, list[bool]]:
    outcomes: dict[int, list[bool]] = {}
    for request in door.requests:
        number = int(request.messages[-1][1].split()[1])
        answer = door.answer(request)
        assert isinstance(answer, ChatAnswer)
        outcomes.setdefault(number, []).append(answer.text.endswith(f"#### {number}"))
    return {number: one[:trials] for number, one in outcomes.items()}


def test_caps_and_rules(asked: list[dict[str, Any]]) -> None:
    for rule, k, most in (("uniform", 3, 12), ("prop2diff", 6, 10), ("vanilla", 4, 4)):
        door = Door()
        corpus = Corpus(door, asked)
        made = made_by(sampler(budget=rule, k=k, trials=4, most_trials=most), corpus)
        trials = Counter(request.messages[-1][1] for request in door.requests)
        assert max(trials.values()) <= most and corpus.facts["budget"]["trials"] == len(door.requests)
        assert len({request.seed for request in door.requests}) == len(door.requests)
        kept = Counter(number_of(row) for row in made)
        if rule == "uniform":
            assert set(kept.values()) <= {1, 2, 3} and all(kept[n] == 3 for n in range(60) if n % 6 == 0)
            assert max(trials.values()) == 12  # the hopeless ones went to the cap
        if rule == "vanilla":
            assert set(trials.values()) == {4} and all(kept[n] == 4 for n in range(60) if n % 6 == 0)
            rights = sum(map(sum, _first_trials(door, 4).values()))
            assert len(made) == rights
    least = made_by(sampler(k=2, trials=2, least=1), Corpus(Door(), asked))
    assert all(any(number_of(row) == n for row in least) for n in range(60) if n % 6 == 0)


def test_same_rows_whatever_the_haste_and_the_parts(asked: list[dict[str, Any]]) -> None:
    maker = sampler(k=4, trials=3, most_trials=16)
    rows = made_by(maker, Corpus(Door(), asked))
    assert made_by(maker, Corpus(Hasty(), asked, part=7)) == rows
    assert made_by(sampler(k=4, trials=3, most_trials=16, seed=1), Corpus(Door(), asked)) != rows
    assert {row["parents"][0] for row in rows} <= {row["row_id"] for row in asked}
    origin = json.loads(rows[0]["meta"])["made"]
    assert origin["model"] == "solver" and origin["licence"] == "MIT" and origin["prompt"] == "solve"
    from_set = made_by(sampler(k=4, trials=3, most_trials=16, set_name="s"), Corpus(Door(), asked))
    assert [row["content_id"] for row in from_set] == [row["content_id"] for row in rows]


def test_failures_are_no_trials_and_nothing_made_says_why(asked: list[dict[str, Any]]) -> None:
    hopeless = [row for n, row in enumerate(asked) if n % 6 == 5]
    with pytest.warns(UserWarning, match=r"RejectionSampling made no row: 60 requests; 60 wrong"):
        assert made_by(sampler(k=2, trials=2, most_trials=6), Corpus(Door(), hopeless)) == []
    failing = Corpus(Door(fails=lambda request: True), asked[:3])
    with pytest.warns(UserWarning, match=r"12 timeout"):
        assert made_by(sampler(), failing) == []
    assert failing.facts["budget"]["unanswered"] == 3 and failing.facts["budget"]["without_right_answer"] == 0
    odd = Corpus(Door(fails=lambda request: request.seed % 2 == 0), asked)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for row in made_by(sampler(trials=4), odd):
            meta = json.loads(row["meta"])
            assert 0 <= meta["fail_rate"] <= 1 and meta["right"] <= meta["trials"] <= 32
    with pytest.raises(HouseError, match="RejectionSampling: k 0"):
        sampler(k=0)
    assert Budget("prop2diff", 5, 4, 4).wanted(4, 1) == 2 and Budget("prop2diff", 5, 4, 4).wanted(0, 0) == 0


def test_answers_that_say_the_same_count_once_and_rows_without_reference_are_told(make_row: Make) -> None:
    class Same(Door):
        def answer(self, request: ChatRequest) -> ChatAnswer:
            return ChatAnswer("#### 0", 1, 1, True)

    rows = [make_row("q", 0, "Question 0 ?", "#### 0"), make_row("q", 1, "Question 1 ?", None)]
    rows += [make_row("q", 2, "Question 0 ?", "The same again.\n#### 0")]
    corpus = Corpus(Same(), rows)
    with pytest.warns(UserWarning, match="1 no_question|1 no_reference"):
        made = made_by(sampler(budget="uniform", k=3, trials=2, most_trials=8), corpus)
    assert len(made) == 1 and corpus.facts["budget"]["trials"] == 8
    assert corpus.facts["synthesis"]["refused"] == {"duplicate": 7}
    assert corpus.facts["budget"]["not_asked"]["same_question"] == 1


def test_pairs_set_right_against_wrong_and_share_the_requests(asked: list[dict[str, Any]]) -> None:
    one, two = Door(), Door()
    made_by(sampler(budget="vanilla", trials=6), Corpus(one, asked))
    maker = RightAgainstWrong(model="m", verifier=ExactMaths(), trials=6, pairs=3)
    corpus = Corpus(two, asked)
    made = made_by(maker, corpus)
    assert one.requests == two.requests  # kept answers serve both
    outcomes = _first_trials(two, 6)
    counts = Counter(number_of(row) for row in made)
    for number, told in outcomes.items():
        assert counts[number] == min(3, sum(told) * (len(told) - sum(told)))
    for row in made:
        right, wrong = row["chosen"][0]["content"], row["rejected"][0]["content"]
        assert right.endswith(f"#### {number_of(row)}") and wrong.endswith(f"#### {number_of(row) + 1}")
        meta = json.loads(row["meta"])
        assert meta["fail_rate"] == (6 - sum(outcomes[number_of(row)])) / 6 and meta["trials"] == 6
    assert corpus.facts["without_pair"] and made_by(maker, Corpus(Hasty(), asked)) == made
    hopeless = [row for n, row in enumerate(asked) if n % 6 == 5]
    anyway = RightAgainstWrong(model="m", verifier=ExactMaths(), trials=2, most_trials=2, reference_chosen=True)
    rows = made_by(anyway, Corpus(Door(), hopeless))
    assert len(rows) == 20 and all(row["chosen"][0]["content"].startswith("It is so.") for row in rows)
