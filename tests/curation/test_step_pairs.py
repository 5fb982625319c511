"""Step pairs, sentence masks, trees and ranks: what is told apart, and which characters weigh what."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from gristmill.curation.door import ChatRequest
from gristmill.curation.makers.message_trees import MessageTreeRanks, ranked, scores
from gristmill.curation.makers.preference_tree import PreferenceTree, rewards
from gristmill.curation.makers.sentence_masks import (
    MarkedErrors,
    SentenceMasks,
    labels_of,
    mask_spans,
    parse_labels,
    told_in,
)
from gristmill.curation.makers.step_pairs import StatedSteps, StepPairs, parse_step, without_prefix
from gristmill.curation.reading.source import Source, iter_rows
from gristmill.curation.rows import message
from gristmill.curation.text.sentences import sentences, steps
from gristmill.curation.verifiers.matches import Matches

from .late import Late, Telling
from .test_preferences import Corpus, made_by, said

Make = Callable[..., dict[str, Any]]
Row = dict[str, Any]


def weighing(row: Row, side: str) -> str:
    """The characters of an answer that weigh more than nothing; a last "$" where the turn's end does."""
    text = said(row, side)
    weights = [1.0] * (len(text) + 1)
    for span in row["spans"] or ():
        if span["field"] == side:
            stop = len(weights) if span["end"] >= len(text) else span["end"]
            weights[span["start"] : stop] = [span["weight"]] * (stop - span["start"])
    return "".join(letter for letter, weight in zip(text + "$", weights, strict=True) if weight)


def test_sentences_and_steps_are_the_whole_text() -> None:
    text = "Dr. Smith paid $3.50 in the U.S. in May. Why? Nobody knows!\n\n1. First item.\n2. Second (e.g. this). End"
    cut = [text[i:j] for i, j in sentences(text)]
    assert "".join(cut) == text and [one.strip() for one in cut] == [
        "Dr. Smith paid $3.50 in the U.S. in May.", "Why?", "Nobody knows!", "1. First item.",
        "2. Second (e.g. this).", "End",
    ]  # fmt: skip
    assert sentences("") == [] and sentences("一。二。") == [(0, 2), (2, 4)]
    assert steps("a\n\nb\nc") == ["a\n\n", "b\n", "c"] and "".join(steps("\n a\nb \n")) == "\n a\nb \n"


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("It adds wrongly.\nFirst wrong step: 3", 3), ("**first wrong step:** Step 12.", 12), ("2", 2), ("Step 2.", 2),
        ("first wrong step: none", 0), ("The first incorrect step is step 4, not first wrong step: 1", 1),
        ("first wrong step: 0", None), ("I see no problem.", None), ("", None), ("3 and 4 are wrong", None),
    ],
)  # fmt: skip
def test_the_first_wrong_step_is_heard(text: str, number: int | None) -> None:
    assert parse_step(text) == number


def test_repeated_steps_are_taken_off_a_continuation() -> None:
    prefix = "One.\nTwo.\n"
    for said_again in ("Three.", "One.\nTwo.\nThree.", "Two.\n\nThree."):
        assert without_prefix(said_again, prefix) == "Three."
    assert without_prefix("One. More", "") == "One. More"


def solver(request: ChatRequest) -> str:
    """Solves in four steps, the third wrong where nobody stops it; from right steps on, every other time right."""
    text = request.messages[-1][1]
    if "Check each step" in text:
        return "The third one.\nfirst wrong step: 3"
    right = ["one", "two", "three", "so: yes"]
    if "beginning of a solution" not in text:
        return "one\ntwo\nthird\nso: no"
    given = text.split("right so far:\n")[1].split("\n\nGo on")[0].splitlines()
    if "third" in given or request.seed % 2:
        return "bad\nso: no"
    return "\n".join(right[len(given) :])


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("judge", ["big", None])
def test_only_the_step_weighs(make_row: Make, judge: str | None) -> None:
    rows = [make_row("q", n, f"question {n}", "yes") for n in range(4)]
    maker = StepPairs("policy", Matches("yes$"), judge, answers=2, rollouts=8, continuations=8)
    corpus = Corpus(rows, policy=solver, big=solver)
    made = made_by(maker, corpus)
    assert {row["parents"][0] for row in made} == {row["row_id"] for row in rows} and len(made) == 4
    for row in made:
        assert (said(row, "chosen"), said(row, "rejected")) == ("one\ntwo\nthree", "one\ntwo\nthird")
        assert (weighing(row, "chosen"), weighing(row, "rejected")) == ("three", "third")
        meta = json.loads(row["meta"])
        assert meta["step"] == 3 and meta["made"]["prompt"] == "continue_solution"
    assert made == made_by(maker, Corpus(rows, policy=solver, big=solver))
    told = corpus.told
    assert told["asked"] == told["answered"] == sum(len(door.requests) for door in corpus.doors.values())


def test_continuations_are_verified_while_others_are_still_asked_for(make_row: Make) -> None:
    rows = [make_row("q", n, f"question {n}", "yes") for n in range(5)]
    right = Telling("so: yes")
    maker = StepPairs("policy", right, answers=8, rollouts=8, continuations=8)
    corpus = Corpus(rows)
    late = corpus.doors["policy"] = Late(solver, right)  # type: ignore[assignment]
    assert len(made_by(maker, corpus)) == 5 and late.waited == 4  # answers, two rounds of bisection, continuations


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_without_a_prefix_a_step_is_the_first(make_row: Make) -> None:
    def answer(request: ChatRequest) -> str:
        return "right\nso: yes" if request.seed % 2 else "wrong\nso: no"

    rows = [make_row("q", n, f"question {n}", "yes") for n in range(6)]
    made = made_by(StepPairs("policy", Matches("yes$"), "big"), Corpus(rows, policy=answer, big=lambda r: "1"))
    assert made and all(weighing(row, "chosen") == "right" == said(row, "chosen") for row in made)
    assert all(json.loads(row["meta"])["made"]["prompt"] is None for row in made)
    silent = Corpus(rows, policy=answer, big=lambda r: "who knows")
    assert made_by(StepPairs("policy", Matches("yes$"), "big"), silent) == []
    assert silent.told["refused"]["judge_abstains"] > 0


def test_stated_steps_stand_after_their_prefix(make_row: Make) -> None:
    answers = {side: [message("assistant", f" {side} step.")] for side in ("chosen", "rejected")}
    meta = json.dumps({"initial_reason_steps": "Step 1: a\nStep 2:"})
    rows = [make_row("q", 0, "q", None, meta=meta, **answers), make_row("q", 1, "q", None, **answers)]
    (row,) = made_by(StatedSteps(), Corpus(rows))
    assert said(row, "chosen") == "Step 1: a\nStep 2: chosen step." and row["parents"] == [rows[0]["row_id"]]
    assert (weighing(row, "chosen"), weighing(row, "rejected")) == (" chosen step.", " rejected step.")
    assert json.loads(row["meta"]) == json.loads(meta) and StatedSteps.rewrites


def test_labels_of_sentences_are_heard() -> None:
    assert parse_labels("1: right\n2) WRONG\n- 3. correct, as far as I know\n**4**: false") == {
        1: True, 2: False, 3: True, 4: False,
    }  # fmt: skip
    assert parse_labels("Sentence 1: right\n1: wrong\n2: right") == {2: True}
    assert parse_labels("all of them are right") == {} == parse_labels("")


def test_masks_follow_mask_dpo() -> None:
    good, bad = "Right one. Wrong two.", "Wrong one. Right two. Right three."
    row = {side: [message("assistant", text)] for side, text in (("chosen", good), ("rejected", bad))}
    spans = mask_spans(good, [True, False], bad, [False, True, True])
    assert (weighing(row | {"spans": spans}, "chosen"), weighing(row | {"spans": spans}, "rejected")) == (
        "Right one. $", "Wrong one. $",
    )  # fmt: skip
    assert mask_spans(good, [True, True], bad, [False, False, False]) is None  # masks of ones are no masks
    assert labels_of(bad, [(12, 13)]) == (True, False, True) and told_in({"a": '{"b-c": 1}'}, "a.b-c") == 1
    with pytest.raises(ValueError, match="2 sentences and 1 labels"):
        mask_spans(good, [True], bad, [True, True, True])


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_judge_masks_what_it_can_label(make_row: Make) -> None:
    def pair(number: int, good: str, bad: str) -> Row:
        sides = {"chosen": [message("assistant", good)], "rejected": [message("assistant", bad)]}
        return make_row("q", number, f"q {number}", None, meta='{"k": ["known"]}', **sides)

    def judge(request: ChatRequest) -> str:
        text = request.messages[-1][1]
        assert "is given: known" in text
        listed = text.split("sentence by sentence:\n")[1].split("\n\nCheck")[0].splitlines()
        return "\n".join(f"{at}: {'wrong' if 'no' in line else 'right'}" for at, line in enumerate(listed, 1))

    rows = [
        pair(0, "So. no.\nSo.", "no. So."),
        pair(1, "no.", "no."),
        pair(2, "So.", "So."),
        pair(3, "So.", "So. no. "),
    ]
    corpus = Corpus(rows, big=judge)
    made = made_by(SentenceMasks("big", reference="k"), corpus)
    assert [row["parents"][0] for row in made] == [rows[0]["row_id"], rows[3]["row_id"]] or len(made) == 1
    assert corpus.told["refused"]["no_right_sentence"] == 1 and corpus.told["refused"]["no_wrong_sentence"] >= 1
    for row in made:
        assert "no" not in weighing(row, "chosen") and weighing(row, "rejected").strip()[-1] == "$"
        assert json.loads(row["meta"])["sentences"]["chosen"].count(True) > 0


def test_marked_errors_of_real_feedback(data: Path) -> None:
    path = str(data / "finegrained_rlhf_dev500.parquet")
    columns = {"question": "question", "answer": "prediction 1"}
    source = Source("marked", path, "Apache-2.0", "question_answer", columns, limit=200)
    rows = [row for row in iter_rows(source) if isinstance(row, dict)]
    made = made_by(MarkedErrors(kinds=("Wrong-Grounding", "Unverifiable")), Corpus(rows))
    by_id = {row["row_id"]: row for row in rows}
    assert 50 < len(made) < 200
    for row in made:
        parent = by_id[row["parents"][0]]
        feedback = json.loads(json.loads(parent["meta"])["feedback"])
        answer = parent["messages"][-1]["content"]
        assert said(row, "rejected") == answer and said(row, "chosen") == feedback["corrected-prediction"]
        assert weighing(row, "chosen") == said(row, "chosen") + "$"
        left = weighing(row, "rejected")
        assert left.endswith("$") and len(left) > 1
        for mark in feedback["errors"]:
            if mark["error type"] in ("Wrong-Grounding", "Unverifiable"):
                assert answer[mark["start"] : mark["end"]].strip() in left
    assert any(weighing(row, "rejected") != said(row, "rejected") + "$" for row in made)


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_trees_are_lists_in_which_right_beats_wrong(make_row: Make) -> None:
    def answer(request: ChatRequest) -> str:
        text = request.messages[-1][1]
        word = f"w{request.seed % 4}"
        end = "so: yes" if request.seed % 3 else f"so: no {request.seed % 5}"
        return end if "beginning of a solution" in text else f"{word}\n{end}"

    rows = [make_row("q", n, f"question {n}", "yes") for n in range(5)]
    made = made_by(PreferenceTree("policy", Matches("yes$"), branches=(4, 4)), Corpus(rows, policy=answer))
    assert made
    worth: dict[tuple[str, str], set[float]] = {}
    for row in made:
        meta = json.loads(row["meta"])
        assert meta["score_chosen"] > meta["score_rejected"]
        for side in ("chosen", "rejected"):
            worth.setdefault((row["parents"][0], said(row, side)), set()).add(meta[f"score_{side}"])
    assert all(len(own) == 1 for own in worth.values())  # an answer is worth one thing wherever it stands
    assert all((min(own) >= 0.5) == text.endswith("yes") for (_, text), own in worth.items())
    assert len(made) == len(worth) - len({name for name, _ in worth})  # n - 1 rows a list


def test_rewards_of_a_tree() -> None:
    paths = [("a",), ("a",), ("b",), ("b",), ()]
    assert rewards(paths, [True, False, False, False, True]) == [0.75, 0.25, 0.0, 0.0, 1.0]


def test_ranks_of_real_trees_become_pairs(data: Path) -> None:
    source = Source("oasst", str(data / "oasst_en_100_trees.parquet"), "Apache-2.0", "tree_preference")
    rows = [row for row in iter_rows(source) if isinstance(row, dict)]
    every, nearest, lists = (made_by(MessageTreeRanks(pairs), Corpus(rows)) for pairs in ("all", "adjacent", "list"))  # type: ignore[arg-type]
    assert len(every) > len(nearest) > len(rows) and len(lists) >= len(rows)
    for row in every:
        meta = json.loads(row["meta"])
        assert meta["rank_chosen"] < meta["rank_rejected"] and meta["score_chosen"] > meta["score_rejected"]
    firsts = {(row["row_id"], said(row, "chosen"), said(row, "rejected")) for row in rows}
    assert firsts <= {(row["parents"][0], said(row, "chosen"), said(row, "rejected")) for row in every}
    widest = made_by(MessageTreeRanks(most=1), Corpus(rows))
    assert (
        len(widest) == len(rows)
        and {(row["parents"][0], said(row, "chosen"), said(row, "rejected")) for row in widest} == firsts
    )


def test_ranks_are_told_evenly() -> None:
    assert scores([0, 2, 2, 5]) == [1.0, 0.5, 0.5, 0.0] and scores([]) == []
    assert ranked([{"rank": 1, "text": "b"}, {"rank": None, "text": "c"}, {"rank": 0, "text": "a"}, "x"]) == [
        (0, "a"), (1, "b"),
    ]  # fmt: skip
