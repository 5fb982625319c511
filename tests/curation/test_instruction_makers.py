"""Makers of instructions: what is asked and eliminated, ROUGE-L against every pair, parents of each generation, the
same rows in any haste, every request accounted for."""

import json
import random
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from itertools import combinations
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from gristmill.curation import instructing
from gristmill.curation.door import ChatAnswer, ChatError, ChatRequest
from gristmill.curation.folder import HouseError
from gristmill.curation.instructing import drawn, listed, seeds
from gristmill.curation.makers.evol_instruct import (
    OPERATORS,
    EvolInstruct,
    answer_problem,
    draft_problem,
    operator_prompt,
    parse_equal,
)
from gristmill.curation.makers.explanation import LaMini, OrcaExplanation, system_turns
from gristmill.curation.makers.self_instruct import KEYWORDS, SelfInstruct, task_problem
from gristmill.curation.rows import ROW, message, table
from gristmill.curation.text.instances import fitting, parse_instances, parse_yes
from gristmill.curation.text.rouge import rouge_l
from gristmill.curation.verifiers.exact_maths import ExactMaths

Make = Callable[..., dict[str, Any]]
Said = str | ChatAnswer | ChatError
_WORDS = (
    "write name compare explain list story river seven reasons clock teacher planet recipe winter train letter violin"
    " bridge garden copper harbour sentence history market colour animal number island question city"
)
WORDS = _WORDS.split()


class Door:
    """Says what `answer` says, in order."""

    digest, licence, price = "d", "MIT", (0.0, 1.0)

    def __init__(self, answer: Callable[[ChatRequest], Said], name: str = "m") -> None:
        self.answer, self.name, self.requests = answer, name, []  # type: ignore[var-annotated]

    def said(self, request: ChatRequest) -> ChatAnswer | ChatError:
        self.requests.append(request)
        told = self.answer(request)
        return ChatAnswer(told, 9, 4, True) if isinstance(told, str) else told

    def complete(self, requests: Sequence[ChatRequest], progress: Any = None) -> list[ChatAnswer | ChatError]:
        return [self.said(request) for request in requests]


class Hasty(Door):
    """Answers come in any order."""

    def stream(self, requests: Sequence[ChatRequest]) -> Iterator[tuple[int, ChatAnswer | ChatError]]:
        places = list(range(len(requests)))
        random.Random(len(requests)).shuffle(places)
        for place in places:
            yield place, self.said(requests[place])


class Corpus:
    """Rows of this set, with the split `test` of an earlier one, and doors by name."""

    def __init__(self, rows: Sequence[dict[str, Any]], *doors: Door, held_out: Sequence[dict[str, Any]] = ()) -> None:
        self.all, self.held, self.tools, self.facts = list(rows), list(held_out), self, {}  # type: ignore[var-annotated]
        self.doors = {door.name: door for door in doors}

    def chat(self, model: str) -> Door:
        return self.doors[model]

    def progress(self, done: int, total: int) -> None:
        assert done <= total

    def record(self, **facts: Any) -> None:
        self.facts |= json.loads(json.dumps(facts))

    def tables(self, columns: Sequence[str] | None = None) -> Iterator[pa.Table]:
        for start in range(0, len(self.all), 50):
            yield table(self.all[start : start + 50]).select(list(columns or ROW.names))

    def curated(self, set_name: str, split: str) -> Iterator[pa.Table]:
        yield table(self.all if split == "train" else self.held)


def made_by(maker: Any, corpus: Any) -> list[dict[str, Any]]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        return [row for part in maker.make(corpus) for row in part.cast(ROW).to_pylist()]


def meta(row: dict[str, Any]) -> dict[str, Any]:
    return json.loads(row["meta"])  # type: ignore[no-any-return]


def accounted(corpus: Corpus, *doors: Door) -> dict[str, Any]:
    """The tally, which agrees with the doors."""
    told: dict[str, Any] = corpus.facts["synthesis"]
    assert told["asked"] == sum(len(door.requests) for door in doors)
    assert told["asked"] == told["answered"] + sum(told["failed"].values())
    assert told["answered"] == told["parsed"] + sum(told["unparsed"].values())
    return told


def user(request: ChatRequest) -> str:
    return request.messages[-1][1]


# --- what makers share


def test_seeds_are_train_rows_of_one_turn_whatever_their_order(make_row: Make) -> None:
    rows = [make_row("s", n, f"Task {n % 20}", f"answer {n}") for n in range(40)]
    chat = [message("user", "a"), message("assistant", "b"), message("user", "c"), message("assistant", "d")]
    system = [message("system", "Be kind."), message("user", "Sum it up.\n\nA long text."), message("assistant", "S")]
    rows += [make_row("s", 40, "", "x"), make_row("s", 41, "q", "r", messages=chat)]
    rows += [make_row("s", 42, "q", "r", messages=system)]
    found, lost = seeds(Corpus(rows), None, None, 0)  # type: ignore[arg-type]
    again, _ = seeds(Corpus(rows[::-1]), None, None, 0)  # type: ignore[arg-type]
    assert found == again and len(found) == 21
    assert lost == {"same_prompt": 20, "no_question": 1, "several_turns": 1}
    few, _ = seeds(Corpus(rows), "earlier", 5, 0)  # type: ignore[arg-type]
    other, _ = seeds(Corpus(rows), "earlier", 5, 1)  # type: ignore[arg-type]
    assert few == found[:5] != other
    assert {one.task for one in found} == {"Sum it up."} | {f"Task {n}" for n in range(20)}
    held, _ = seeds(Corpus([], held_out=rows), "earlier", None, 0)  # type: ignore[arg-type]
    assert held == [], "held-out rows are no seeds"


def test_a_few_seeds_of_many_are_those_that_all_of_them_begin_with(
    make_row: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [make_row("s", n, f"Task {n % 90}", f"answer {n}") for n in range(120)]
    every, lost = seeds(Corpus(rows), None, None, 3)  # type: ignore[arg-type]
    monkeypatch.setattr(instructing, "SPARE", 2)
    few, lost_again = seeds(Corpus(rows), None, 7, 3)  # type: ignore[arg-type]
    assert few == every[:7] and len(every) == 90 and lost == lost_again == {"same_prompt": 30}


def test_places_are_drawn_without_repetition_and_evenly() -> None:
    counts = Counter(place for key in range(600) for place in drawn(10, 3, "key", key))
    assert sum(counts.values()) == 1800 and set(counts) == set(range(10))
    assert all(120 < count < 240 for count in counts.values())
    assert sorted(drawn(4, 9, "x")) == [0, 1, 2, 3] and drawn(0, 2, "x") == []
    assert drawn(10, 3, "x") == drawn(10, 3, "x") != drawn(10, 3, "y")


@pytest.mark.parametrize(
    ("text", "items"),
    [
        ("9. Name a river.\n10. Why is\n   the sea salt?", ["Name a river.", "Why is the sea salt?"]),
        ("Sure! Here they are:\n\nTask 9: A\nTask 10: B\n\nI hope this helps!", ["A", "B"]),
        ("**1.** Bold one\n**2)** Two", ["Bold one", "Two"]),
        ("- a\n* b\n• c", ["a", "b", "c"]),
        ("1. Choose:\n - x\n - y\n2. Other", ["Choose: - x - y", "Other"]),
        ("1.\n2. only this", ["only this"]),
        ("no list at all. 1999 was a year", []),
        ("", []),
        ("  \n", []),
    ],
)
def test_lists_are_read_out_of_ugly_answers(text: str, items: list[str]) -> None:
    assert listed(text) == items
    assert listed(text, finished=False) in (items[:-1], items)  # an empty item may have been the last


# --- Self-Instruct


@pytest.mark.parametrize(
    ("task", "problem"),
    [
        ("Explain why the sky is blue.", None),
        ("Name a river", "too_short"),
        ("word " * 151, "too_long"),
        ("word " * 150, None),
        ("Describe what this image shows, please.", "keyword"),
        ("Explain the imagery of this poem.", None),
        ("Go to the market and buy bread.", "keyword"),
        ("Draw a house with a red roof.", "keyword"),
        ("Write a program that sorts numbers.", "program"),
        ("Write a programme for a school concert.", None),
        ('"To be" or not to be said who?', "punctuation"),
        ("- list the four seasons", "punctuation"),
        ("Ärgert dich das Wetter heute sehr?", None),
        ("", "punctuation"),
    ],
)
def test_tasks_are_turned_down_by_how_they_look(task: str, problem: str | None) -> None:
    assert task_problem(task, 4, 150, KEYWORDS) == problem


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("Example 1\nInput: a b\nOutput: b a\nExample 2\nInput: c\nOutput: d", [("a b", "b a"), ("c", "d")]),
        ("**Example 1**\n**Input:** a\n**Output:** b\nc", [("a", "b\nc")]),
        ("Output: whole", [("", "whole")]),
        ("Input: none\nOutput: x", [("", "x")]),
        ("Input: <noinput>\nOutput: x", [("", "x")]),
        ("Example 1\nInput: a\nOutput: x\nExample 2\nOutput: y", [("a", "x"), ("", "y")]),
        (
            "Label: spam\nInput: Buy now!\nClass label: ham\nInput: See you.",
            [("Buy now!", "spam"), ("See you.", "ham")],
        ),
        ("Label: yes\nLabel: no\nInput: i", [("", "yes"), ("i", "no")]),
        ("Input: a", "no_instance"),
        ("Label:\nInput: a", "no_instance"),
        ("The input and the output are clear.", "no_instance"),
        ("", "empty"),
    ],
)
def test_instances_are_read_out_of_ugly_answers(text: str, found: Any) -> None:
    assert parse_instances(text) == found
    cut = parse_instances(text, finished=False)
    assert cut == (found if isinstance(found, str) else found[:-1] or "no_instance")


def test_instances_that_teach_nothing_are_turned_down() -> None:
    kept, refused = fitting(
        [("a", "1"), ("b", "2"), ("B ", "3"), ("c", "c"), ("d", ""), ("e:", "5"), ("f", "6:"), ("a", "1"), ("g", "7")]
    )
    assert kept == [("a", "1"), ("g", "7")]
    assert refused == {"same_input": 2, "echo": 1, "no_output": 1, "colon": 2, "duplicate": 1}
    assert fitting([("", "1"), ("", "2")])[0] == [("", "1"), ("", "2")], "a task without input may have two answers"
    assert [parse_yes(text) for text in ("Yes", "no.", "**Yes**, it is", "I know not", "")] == [
        True,
        False,
        True,
        None,
        None,
    ]


def writer(request: ChatRequest) -> Said:
    """A model that invents tasks, some of them ugly, and instances, by the request's seed."""
    rng, said = random.Random(request.seed), user(request)
    chance = rng.random()
    if chance < 0.08:
        return rng.choice([ChatError("timeout", "60 s"), "", "I cannot do that", ChatAnswer("1. a", 9, 4, False)])
    if "Go on with" in said:
        shown = [line.partition(". ")[2] for line in said.splitlines() if line[:1].isdigit()]
        ugly = ["Draw a map of the town", "Too short", "? what is this good for", rng.choice(shown)]
        tasks = [" ".join(rng.choices(WORDS, k=rng.randrange(4, 12))) for _ in range(6)]
        tasks += [rng.choice(ugly), f"{rng.choice(shown)} please"]
        return "\n".join(f"{number}. {task}" for number, task in enumerate(tasks, 9))
    if "Classification:" in said:
        return rng.choice(["Yes", "No", "no", "That depends"])
    if "Label:" in said:
        return f"Label: a\nInput: {chance}\nLabel: b\nInput: other {chance}\nLabel: b\nInput: {chance}"
    return f"Example 1\nInput: {chance}\nOutput: it is {chance}\nExample 2\nInput: same\nOutput: same"


@pytest.fixture
def tasks(make_row: Make) -> list[dict[str, Any]]:
    rng = random.Random(5)
    return [make_row("s", n, " ".join(rng.choices(WORDS, k=9)), f"answer {n}") for n in range(30)]


def test_self_instruct_keeps_only_tasks_unlike_all_others(tasks: list[dict[str, Any]]) -> None:
    maker = SelfInstruct(model="m", rounds=4, requests=6)
    door, hasty = Door(writer), Hasty(writer)
    corpus = Corpus(tasks, door)
    made = made_by(maker, corpus)
    told = accounted(corpus, door)
    assert made == made_by(maker, Corpus(tasks[::-1], hasty)), "rows depend on neither haste nor the order of the seeds"
    new = list(dict.fromkeys(meta(row)["task"] for row in made))
    every = [row["messages"][0]["content"] for row in tasks] + new
    assert len(new) > 50 and max(rouge_l(a, b) for a, b in combinations(every, 2)) < 0.7
    assert {"similar", "keyword", "too_short", "punctuation", "same_input", "echo"} <= told["refused"].keys()
    assert (
        told["failed"].keys() == {"timeout"}
        and {"no_list", "empty", "no_class", "no_instance"} >= told["unparsed"].keys()
    )
    assert told["made"] == len(made) and corpus.facts["tasks"]["with_rows"] == len(new)
    assert len(made) == len({row["row_id"] for row in made}) == len({row["messages"][0]["content"] for row in made})


def test_self_instruct_shows_six_seeds_and_two_of_its_own(tasks: list[dict[str, Any]]) -> None:
    door = Door(writer)
    made = made_by(SelfInstruct(model="m", rounds=3, requests=5), Corpus(tasks, door))
    seed_rows = {row["row_id"]: row["messages"][0]["content"] for row in tasks}
    by_id = {row["row_id"]: row for row in made}
    asked = [user(request) for request in door.requests if "Go on with" in user(request)]
    assert len(asked) == 15 == len(set(asked))
    for row in made:
        own = [parent for parent in row["parents"] if parent in by_id]
        assert len(set(row["parents"])) == 8 and len(own) == (0 if meta(row)["round"] == 0 else 2)
        assert all(meta(by_id[parent])["round"] < meta(row)["round"] for parent in own)
        shown = [seed_rows.get(p) or meta(by_id[p])["task"] for p in row["parents"]]
        assert any(all(f"{at}. {task}\n" in said for at, task in enumerate(shown, 1)) for said in asked)
        origin = meta(row)["instruction_made"]
        assert origin["prompt"] == "self_instruct_tasks" and origin["model"] == "m" and origin["prompt_digest"]


def test_classification_tasks_get_their_labels_first(tasks: list[dict[str, Any]]) -> None:
    def model(request: ChatRequest) -> Said:
        said = user(request)
        if "Go on with" in said:
            return "9. Is this mail spam or not?\n10. Tell a joke about it now."
        if "Classification:" in said:
            return "Yes" if said.rstrip().split("Task: ")[-1].startswith("Is this mail") else "No"
        return "Label: spam\nInput: Buy!" if "Label:" in said else "Input: rain\nOutput: Drip."

    corpus = Corpus(tasks, door := Door(model))
    made = made_by(SelfInstruct(model="m", rounds=2, requests=1), corpus)
    assert [[turn["content"] for turn in row["messages"]] for row in made] == [
        ["Is this mail spam or not?\n\nBuy!", "spam"],
        ["Tell a joke about it now.\n\nrain", "Drip."],
    ]
    assert [meta(row)["classification"] for row in made] == [True, False]
    assert accounted(corpus, door)["refused"] == {"similar": 2}  # of the second round


def test_more_than_was_asked_for_is_counted_and_left_out(tasks: list[dict[str, Any]]) -> None:
    def model(request: ChatRequest) -> Said:
        said = user(request)
        if "Go on with" in said or "Here are examples" in said:
            return "\n".join(f"{n}. What is so special about {word}?" for n, word in enumerate("abcd"))
        return "No" if "Classification:" in said else "\n".join(f"Input: i{n}\nOutput: o{n}" for n in range(3))

    asked = {"model": "m", "requests": 1}
    corpus = Corpus(tasks, Door(model))
    made = made_by(SelfInstruct(**asked, rounds=1, tasks=2, instances=2, similarity=1.0), corpus)
    assert len(made) == 4 and corpus.facts["synthesis"]["refused"] == {"too_many": 4}
    made = made_by(LaMini(**asked, wanted=3), corpus)
    assert len(made) == 3 and corpus.facts["synthesis"]["refused"] == {"too_many": 1}


def test_self_instruct_on_the_papers_own_seed_tasks(data: Path, make_row: Make) -> None:
    read = pq.read_table(data / "self_instruct_seed_tasks.parquet").to_pylist()
    rows = []
    for n, one in enumerate(read):
        first = one["instances"][0]
        asked = f"{one['instruction']}\n\n{first['input']}" if first["input"] else one["instruction"]
        rows.append(make_row("seeds", n, asked, first["output"]))
    corpus = Corpus(rows, door := Door(writer))
    made = made_by(SelfInstruct(model="m", rounds=3, requests=6), corpus)
    told = accounted(corpus, door)
    assert corpus.facts["tasks"]["seeds"] == 175 and told["refused"]["similar"] > 5
    new = list(dict.fromkeys(meta(row)["task"] for row in made))
    for task in new:
        assert all(rouge_l(task, one["instruction"]) < 0.7 for one in read if "\n\n" not in one["instruction"])


# --- Evol-Instruct


def evolver(request: ChatRequest) -> Said:
    """Adds a word to an instruction; is equal, sorry, lost or beside the point by the request's seed."""
    rng, said = random.Random(request.seed), user(request)
    chance = rng.random()
    if chance < 0.05:
        return ChatError("server", "500")
    if "Are they equal?" in said:
        return "Equal" if chance < 0.2 else rng.choice(["Not equal", "They are NOT EQUAL.", "Hm."])
    if "The instruction:\n" in said:
        parent = said.split("The instruction:\n")[1]
        ugly = ["", parent, f"#Rewritten Prompt#: {parent}", ChatAnswer(parent, 1, 1, False)]
        return rng.choice(ugly) if chance < 0.25 else f"{parent} And {rng.choice(WORDS)} {chance:.6f}?"
    return ("Sorry, no.", "The of and!", "...")[request.seed % 3] if chance < 0.25 else f"Because {chance}, of course."


def test_evolved_rows_carry_their_chain_and_the_eliminated_return(tasks: list[dict[str, Any]]) -> None:
    maker = EvolInstruct(model="m", generations=4)
    corpus = Corpus(tasks, door := Door(evolver))
    made = made_by(maker, corpus)
    told = accounted(corpus, door)
    assert made == made_by(maker, Corpus(tasks[::-1], Hasty(evolver)))
    assert {"copied_prompt", "no_gain", "sorry", "stop_words"} == told["refused"].keys() and told["made"] == len(made)
    rows = {row["row_id"]: row for row in [*tasks, *made]}
    assert len(rows) == len(tasks) + len(made)
    lengths = Counter()
    for row in made:
        about, (parent,) = meta(row), row["parents"]
        chain = about["chain"]
        assert chain[-1]["row_id"] == parent and chain[-1]["instruction"] == rows[parent]["messages"][0]["content"]
        assert row["messages"][0]["content"].startswith(chain[-1]["instruction"])
        generations = [link["generation"] for link in chain] + [about["generation"]]
        assert generations == sorted(set(generations)) and generations[0] == 0
        if rows[parent]["parents"]:
            assert chain[:-1] == meta(rows[parent])["chain"]
        lengths[len(chain)] += 1
        assert about["instruction_made"]["prompt"] == operator_prompt(about["operator"]).name
        assert about["made"]["prompt_digest"] and about["made"]["licence"] == "MIT"
    assert set(lengths) == {1, 2, 3, 4}
    skipped = [row for row in made if meta(row)["generation"] > len(meta(row)["chain"])]
    assert skipped, "an instruction that was eliminated is evolved again from its parent in a later generation"
    asked = [request for request in door.requests if "The instruction:\n" in user(request)]
    assert len(asked) == 4 * len(tasks) and len({request.seed for request in asked}) == len(asked)
    assert {meta(row)["operator"] for row in made} == set(OPERATORS)


def test_what_is_eliminated_and_evolved_again_step_by_step(make_row: Make) -> None:
    asked: list[str] = []

    def model(request: ChatRequest) -> Said:
        said = user(request)
        if "The instruction:\n" in said:
            asked.append(said.split("The instruction:\n")[1])
            return ["Name two.", "Name three.", "Name four.", "Name two."][len(asked) - 1]
        return {"Name two.": "Fine: one, two.", "Name three.": "Sorry.", "Name four.": "A, b, c, d."}[said]

    def judge(request: ChatRequest) -> Said:
        return "Not equal"

    doors = Door(model), Door(judge, "j")
    corpus = Corpus([make_row("s", 0, "Name one.", "One.")], *doors)
    made = made_by(EvolInstruct(model="m", judge="j", generations=4), corpus)
    assert asked == ["Name one.", "Name two.", "Name two.", "Name four."]
    assert [row["messages"][0]["content"] for row in made] == ["Name two.", "Name four."]
    assert made[1]["parents"] == [made[0]["row_id"]] and [meta(row)["gain"] for row in made] == [True, True]
    told = accounted(corpus, *doors)
    assert told["refused"] == {"sorry": 1, "duplicate": 1} and len(doors[1].requests) == 3
    generations = corpus.facts["generations"]
    assert [one["made"] for one in generations] == [1, 0, 1, 0] and generations[2]["generation"] == 3


def test_what_eliminates_an_instruction_or_its_answer() -> None:
    parent = "Rewrite the given prompt for a child."
    assert draft_problem("Rewrite the given prompt for a child, in rhyme.", parent) is None
    assert draft_problem("Rewritten instruction: Name four.", "Name two.") == "copied_prompt"
    assert draft_problem("#Given Prompt# Name four.", "Name two.") == "copied_prompt"
    assert draft_problem("name  TWO.", "Name two.") == "no_gain"
    long = "I am sorry to say that this is so, because " + "reasons follow " * 40
    texts = ["Sorry, I cannot.", long, "...", "Of the and", "", "Paris", "Sorrel grows here."]
    assert [answer_problem(text) for text in texts] == [
        "sorry",
        None,
        "stop_words",
        "stop_words",
        "stop_words",
        None,
        None,
    ]
    said = ["Equal", "Not equal", "Not Equal.", "unequal", "They seem equal, but no: not equal", "I think so", ""]
    assert [parse_equal(text) for text in said] == [True, False, False, False, False, None, None]
    assert len({operator_prompt(one).digest for one in OPERATORS}) == 6
    turns = [operator_prompt(one).turns(instruction="Count {x}.") for one in OPERATORS]
    assert all(len(one) == 2 and one[1][1].endswith("Count {x}.") and "{how}" not in one[1][1] for one in turns)
    with pytest.raises(HouseError, match=r"operators are of constrain, .*given \['widen'\]"):
        EvolInstruct(model="m", operators=("widen",))


# --- LaMini and Orca


def test_lamini_asks_by_examples_and_by_topics_and_answers(tasks: list[dict[str, Any]]) -> None:
    def model(request: ChatRequest) -> Said:
        rng, said = random.Random(request.seed), user(request)
        if "Here are examples" not in said:
            return ChatAnswer("cut", 1, 1, False) if rng.random() < 0.1 else f"Answer to: {said}"
        if rng.random() < 0.1:
            return rng.choice(["", "Certainly!", ChatError("timeout", "")])
        shown = [line[2:] for line in said.splitlines() if line.startswith("- ")]
        return "\n".join(f"{n}. {text}" for n, text in enumerate([*rng.choices(WORDS, k=5), shown[0].upper()], 1))

    maker = LaMini(model="m", requests=30, topics=("rivers", "clocks", "bread", "law", "rust"))
    corpus = Corpus(tasks, door := Door(model))
    made = made_by(maker, corpus)
    told = accounted(corpus, door)
    assert made == made_by(maker, Corpus(tasks, Hasty(model)))
    prompts = [user(request) for request in door.requests if "Here are examples" in user(request)]
    guided = [said for said in prompts if "one of these topics" in said]
    assert (len(prompts), len(guided)) == (30, 15) and all(said.count("; ") == 2 for said in guided)
    texts = [row["messages"][0]["content"] for row in made]
    assert len(texts) == len(set(texts)) > 20 and set(texts) <= set(WORDS)
    assert told["refused"]["duplicate"] > 30 and told["unparsed"]["cut"] >= 1
    given = {row["row_id"] for row in tasks}
    for row in made:
        assert len(row["parents"]) == 3 and set(row["parents"]) <= given
        assert row["messages"][1]["content"] == f"Answer to: {row['messages'][0]['content']}"
        guide = meta(row)["instruction_made"]["prompt"]
        assert guide == ("lamini_topics" if meta(row)["topics"] else "lamini_examples")


def test_orca_explains_rows_under_system_turns(make_row: Make) -> None:
    rows = [make_row("g", n, f"What is {n} plus 1?", f"#### {n + 1}") for n in range(40)]

    def model(request: ChatRequest) -> Said:
        number = int(user(request).split()[2])
        if number % 10 == 9:
            return ""
        return f"One more than {number}.\n#### {number + 1 + (number % 4 == 0)}"

    corpus = Corpus(rows, door := Door(model))
    made = made_by(OrcaExplanation(model="m", verifier=ExactMaths(), each=2), corpus)
    told = accounted(corpus, door)
    right = [n for n in range(40) if n % 10 != 9 and n % 4]
    assert len(made) == 2 * len(right) == told["verified"] and told["unparsed"] == {"empty": 8}
    assert told["refused"] == {"wrong": 20}
    for row in made:
        system, asked, answer = row["messages"]
        assert system["role"] == "system" and system["content"] in system_turns()
        assert answer["content"].startswith("One more than") and meta(row)["verdict"]
        assert asked == next(one["messages"][0] for one in rows if one["row_id"] == row["parents"][0])
    assert len({row["messages"][0]["content"] for row in made}) == len(system_turns())
    shown = {tuple(request.messages) for request in door.requests}
    assert len(shown) == 80, "each row is explained under two different system turns"


def test_orca_may_know_the_answer_and_does_not_say_so(make_row: Make) -> None:
    rows = [make_row("g", 0, "Why {is} it?", "Because {so}."), make_row("g", 1, "And why not?", None)]
    corpus = Corpus(rows, door := Door(lambda request: "It follows."))
    (row,) = made_by(OrcaExplanation(model="m", known=True), corpus)
    assert "Because {so}." in user(door.requests[0]) and "Why {is} it?" in user(door.requests[0])
    assert row["messages"][1]["content"] == "Why {is} it?" and meta(row)["made"]["prompt"] == "orca_known"
    assert corpus.facts["not_asked"] == {"no_reference": 1}
    both = made_by(replace(OrcaExplanation(model="m"), known=False), Corpus(rows, door))
    assert len(both) == 2 and meta(both[0])["made"]["prompt"] == "ask"


@pytest.mark.parametrize("maker", [SelfInstruct("m"), EvolInstruct("m"), LaMini("m"), OrcaExplanation("m")])
def test_without_seeds_and_without_answers_makers_say_why(maker: Any, make_row: Make) -> None:
    corpus = Corpus([make_row("s", 0, "", "x")], Door(writer))
    with pytest.warns(UserWarning, match=r"made no row: 0 requests; nothing to ask"):
        assert not list(maker.make(corpus))
    assert corpus.facts["not_asked"] == {"no_question": 1}
    failing = Corpus([make_row("s", 0, "Why is it so?", "x")], Door(lambda request: ChatError("connection", "reset")))
    with pytest.warns(UserWarning, match=r"made no row: \d+ requests; \d+ connection"):
        assert not list(maker.make(failing))
