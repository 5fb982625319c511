"""Makers of preferences: who is chosen and why, lengths and margins, the same rows whatever the order of answers."""

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pyarrow as pa
import pytest

from gristmill.curation.door import ChatAnswer, ChatError, ChatRequest
from gristmill.curation.folder import HouseError
from gristmill.curation.makers.best_against_worst import BestAgainstWorst, best_pair
from gristmill.curation.makers.clear_correction import ClearCorrection
from gristmill.curation.makers.on_policy_preference import OnPolicyPreference
from gristmill.curation.preferring import list_pairs, matched, of_length
from gristmill.curation.rows import ROW, message, table
from gristmill.curation.verifiers.matches import Matches

Make = Callable[..., dict[str, Any]]
Answer = Callable[[ChatRequest], str | ChatAnswer | ChatError]


class Door:
    """Says what `answer` says; the last request's answer comes first."""

    digest, licence, price = "d", "MIT", (0.0, 0.0)

    def __init__(self, name: str, answer: Answer) -> None:
        self.name, self.answer, self.requests = name, answer, []  # type: ignore[var-annotated]

    def complete(self, requests: Sequence[ChatRequest], progress: Any = None) -> list[Any]:
        return [answer for _, answer in sorted(self.stream(requests))]

    def stream(self, requests: Sequence[ChatRequest]) -> Iterator[tuple[int, ChatAnswer | ChatError]]:
        self.requests += requests
        for place in reversed(range(len(requests))):
            said = self.answer(requests[place])
            yield place, ChatAnswer(said, 5, 3, True) if isinstance(said, str) else said


class Corpus:
    """Rows of this set and of an earlier one, and models by name."""

    seed = 0

    def __init__(self, rows: Sequence[dict[str, Any]], **doors: Answer) -> None:
        self.all, self.rows, self.tools, self.facts = list(rows), len(rows), self, {}  # type: ignore[var-annotated]
        self.doors = {name: Door(name, answer) for name, answer in doors.items()}

    def chat(self, model: str) -> Door:
        return self.doors[model]

    def curated(self, set_name: str, split: str) -> Iterator[pa.Table]:
        yield table(self.all if split == "train" else [])

    def tables(self, columns: Sequence[str] | None = None) -> Iterator[pa.Table]:
        yield table(self.all).select(list(columns or ROW.names))

    def progress(self, done: int, total: int) -> None:
        assert 0 <= done <= total

    def record(self, **facts: Any) -> None:
        self.facts |= facts

    @property
    def told(self) -> dict[str, Any]:
        return dict(self.facts["synthesis"])


def made_by(maker: Any, corpus: Corpus) -> list[dict[str, Any]]:
    return [row for part in maker.make(corpus) for row in part.cast(ROW).to_pylist()]


def said(row: dict[str, Any], side: str) -> str:
    return str(row[side][0]["content"])


@pytest.fixture
def rows(make_row: Make) -> list[dict[str, Any]]:
    return [make_row("q", n, f"question {n}", f"reference {n}") for n in range(6)]


def some(request: ChatRequest) -> str:
    """A third of the answers are right; each is its own."""
    return f"{'yes' if request.seed % 3 == 0 else 'no'} {request.seed % 97}"


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_right_answers_are_chosen_against_wrong_ones_in_any_order(rows: list[dict[str, Any]]) -> None:
    maker = OnPolicyPreference("policy", Matches("^yes"), prompts=6, answers=8, pairs=2)
    corpus = Corpus(rows, policy=some)
    made = made_by(maker, corpus)
    assert made and all(said(row, "chosen")[:3] == "yes" and said(row, "rejected")[:2] == "no" for row in made)
    ids = [row["parents"][0] for row in made]
    assert max(map(ids.count, ids)) == 2 and set(ids) <= {row["row_id"] for row in rows}
    meta = json.loads(made[0]["meta"])
    assert (meta["score_chosen"], meta["score_rejected"]) == (1.0, 0.0) and 0 < meta["right_share"] < 1
    assert meta["made"]["model"] == meta["rejected_made"]["model"] == "policy"
    assert meta["made"]["seed"] != meta["rejected_made"]["seed"] and meta["made"]["licence"] == "MIT"
    assert meta["verified"]["chosen"].endswith(" found")
    assert made_by(maker, Corpus(rows[::-1], policy=some)) == made or {r["row_id"] for r in made} == {
        r["row_id"] for r in made_by(maker, Corpus(rows[::-1], policy=some))
    }
    told = corpus.told
    assert told["asked"] == 48 == told["verified"] and told["made"] == len(made)
    assert len(set(ids)) + sum(told["refused"].values()) == 6  # each prompt gives a pair, or says why not


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_prompts_that_teach_nothing_say_why(rows: list[dict[str, Any]]) -> None:
    told = {
        "question 0": "yes",
        "question 1": "no",
        "question 2": ChatAnswer("yes, and on and on", 5, 3, False),
        "question 3": " ",
        "question 4": ChatError("timeout", "60 s"),
    }

    def answer(request: ChatRequest) -> Any:
        return told.get(request.messages[-1][1]) or ("yes" * 40 if request.seed % 2 else "no")

    corpus = Corpus(rows, policy=answer)
    assert made_by(OnPolicyPreference("policy", Matches("^yes"), length_ratio=2.0), corpus) == []
    assert corpus.told["refused"] == {"all_right": 1, "all_wrong": 1, "length": 1}
    assert corpus.told["unparsed"] == {"cut": 8, "empty": 8} and corpus.told["failed"] == {"timeout": 8}
    with pytest.raises(HouseError, match="answers is at least 2"):
        OnPolicyPreference("policy", Matches("a"), answers=1)


def test_pairs_repeat_an_answer_only_where_they_must() -> None:
    pairs = matched(["a", "b"], ["c", "d", "e"], 3, (0,))
    assert len(pairs) == 3 and {j for _, j in pairs} == {0, 1, 2} and {i for i, _ in pairs} == {0, 1}
    assert matched(["aaaa"], ["b", "cc"], 5, (0,), ratio=2.0) == [(0, 1)]
    assert len(set(matched(["a", "b"], ["c", "d"], 99, (0,)))) == 4
    assert of_length("ab ", "abcd", 2.0) and not of_length("ab", "abcde", 2.0) and of_length("", "a", None)


def test_lists_are_read_back_from_their_pairs() -> None:
    for rewards in ([0.1, 0.9, 0.9, 0.5, 0.1], [1.0, 0.0], [0.5, 0.5, 0.2]):
        pairs = list_pairs(rewards)
        assert {place for pair in pairs for place in pair} == set(range(len(rewards)))
        assert len(pairs) == len(rewards) - 1 and all(rewards[i] > rewards[j] for i, j in pairs)
    assert list_pairs([0.5, 0.5]) == [] == list_pairs([])


def test_the_widest_gap_that_fits_is_the_pair() -> None:
    texts, scores = ["aaaaaaaaaa", "bbbb", "cc", "dddd"], [5.0, 4.0, 1.0, None]
    assert best_pair(texts, scores, margin=1.0) == ((0, 2), "")
    assert best_pair(texts, scores, margin=1.0, ratio=2.0) == ((1, 2), "")
    assert best_pair(texts, scores, margin=5.0) == (None, "margin")
    assert best_pair(texts, [3.0, 3.0, 3.0, 3.0], margin=0.0) == (None, "margin")  # ties are no preference
    assert best_pair(texts, [3.0, None, None, None], margin=0.0) == (None, "judge_abstains")
    assert best_pair(texts, scores, margin=1.0, ratio=1.5) == (None, "length")
    drawn = {best_pair(texts, scores, margin=0.5, against="random", seed=(seed,))[0] for seed in range(20)}
    assert drawn == {(0, 1), (0, 2)}


def worth(text: str) -> int:
    return len(text.split("worth ")[1].split()[0])


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("how", ["scores", "pairs"])
def test_the_judge_decides_and_places_do_not(rows: list[dict[str, Any]], how: Any) -> None:
    def author(request: ChatRequest) -> str:
        return f"worth {'x' * (1 + request.seed % 5)} said {request.seed % 11}"

    def judge(request: ChatRequest) -> str:
        text = request.messages[-1][1]
        if how == "scores":
            return f"score: {worth(text)}" if "said 3" not in text else "I would rather not."
        first, second = text.split("Answer B:")
        a, b = worth(first), worth(second)
        return f"better: {'tie' if a == b else 'A' if a > b else 'B'}"

    maker = BestAgainstWorst("policy", "judge", ("other",), answers=3, how=how, margin=0.1)
    corpus = Corpus(rows, policy=author, other=author, judge=judge)
    made = made_by(maker, corpus)
    assert len(made) + sum(corpus.told["refused"].values()) == 6 and made
    assert {json.loads(row["meta"])["made"]["model"] for row in made} <= {"policy", "other"}
    for row in made:
        meta = json.loads(row["meta"])
        assert worth(said(row, "chosen")) > worth(said(row, "rejected"))
        assert meta["score_chosen"] > meta["score_rejected"] and meta["judge"]["model"] == "judge"
    answers = len(corpus.doors["policy"].requests) + len(corpus.doors["other"].requests)
    assert answers == 36 and corpus.told["asked"] == answers + len(corpus.doors["judge"].requests)
    if how == "scores":  # each answer that could not be read was asked for twice, then left out
        lost = corpus.told["unparsed"]["no_verdict"]
        assert lost and lost % 2 == 0 and all("said 3" not in said(row, "chosen") for row in made)


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_taste_for_the_first_place_prefers_nothing(rows: list[dict[str, Any]]) -> None:
    corpus = Corpus(rows, policy=lambda request: f"a {request.seed}", judge=lambda request: "better: A")
    assert made_by(BestAgainstWorst("policy", "judge", answers=3, how="pairs", margin=0.0), corpus) == []
    assert corpus.told["refused"] == {"margin": 6}


def clear_judge(request: ChatRequest) -> str:
    """Likes a candidate ("tuned …") in both places, the more surely the higher its number; question 5 abstains."""
    text = request.messages[-1][1]
    first = text.split("Answer A:\n")[1].split("\n")[0]
    number = int(text.split("tuned ")[1].split()[0])
    if number == 5:
        return "Hard to say."
    if "Someone compared" in text:
        return f"answer: {'A' if number > 2 else 'C'}"
    likes = number > 0 and request.seed % 5 < (5 if request.sampling.temperature == 0 else number + 1)
    return f"better: {'A' if first.startswith('tuned') == likes else 'B'}"


def clear(rows: list[dict[str, Any]], threshold: float) -> tuple[dict[str, dict[str, Any]], Corpus]:
    corpus = Corpus(rows, sft=lambda request: f"tuned {request.messages[-1][1][-1]} x", judge=clear_judge)
    return {row["parents"][0]: row for row in made_by(ClearCorrection("sft", "judge", threshold), corpus)}, corpus


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_clear_corrects_above_its_threshold_alone(rows: list[dict[str, Any]]) -> None:
    rows[4] = replace_meta(rows[4], {"topic": "t"})
    found = [clear(rows, threshold) for threshold in (0.0, 0.5, 0.8, 0.95, 1.0)]
    names = [set(made) for made, _ in found]
    assert all(later <= earlier for earlier, later in pairwise(names))
    assert len(names[0]) == 4 and names[-1] == set() and len(names[1]) > len(names[3])
    asked = [[door.requests for door in corpus.doors.values()] for _, corpus in found]
    assert all(requests == asked[0] for requests in asked)  # what is asked does not depend on the threshold
    assert found[0][1].told["refused"] == {"judge_prefers_target": 1, "judge_abstains": 1}
    by_id = {row["row_id"]: row for row in rows}
    for (made, _), threshold in zip(found, (0.0, 0.5, 0.8, 0.95, 1.0), strict=True):
        for parent, row in made.items():
            told = json.loads(row["meta"])["corrected"]
            assert told["confidence"] > threshold and told["reason"] == "judge_prefers_candidate"
            assert told["old"] == by_id[parent]["messages"][-1]["content"]
            assert row["messages"][:-1] == by_id[parent]["messages"][:-1]
            assert row["messages"][-1]["content"].startswith("tuned ")
    assert json.loads(found[0][0][rows[4]["row_id"]]["meta"])["topic"] == "t"
    assert not hasattr(ClearCorrection, "rewrites") and ClearCorrection.consumes == "corrected"  # held-out rows stay
    with pytest.raises(HouseError, match="threshold"):
        ClearCorrection("sft", "judge", 1.5)


def replace_meta(row: dict[str, Any], meta: dict[str, Any]) -> dict[str, Any]:
    return row | {"meta": json.dumps(meta)}


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_clear_leaves_equal_answers_and_other_rows_alone(rows: list[dict[str, Any]], make_row: Make) -> None:
    pair = make_row("q", 9, "q", None, chosen=[message("assistant", "x")], rejected=[message("assistant", "y")])
    corpus = Corpus([rows[0], pair], sft=lambda request: "  Reference 0\n", judge=clear_judge)
    assert made_by(ClearCorrection("sft", "judge"), corpus) == []
    assert corpus.told["asked"] == 1 and corpus.told["refused"] == {"equal": 1}
    assert replace(ClearCorrection("sft", "judge"), samples=2).asked == ("judge",)
