"""SelectiveSelfSft and ReGenesis: whose words a row holds, and what becomes of those that are wrong."""

import json
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pyarrow as pa

from gristmill.curation.door import ChatAnswer, ChatRequest
from gristmill.curation.makers.re_genesis import ReGenesis
from gristmill.curation.makers.selective_self_sft import SelectiveSelfSft
from gristmill.curation.rows import ROW, table
from gristmill.curation.verifiers.exact_maths import ExactMaths

Make = Callable[..., dict[str, Any]]


class Corpus:
    """Its model knows the result of questions 0 to 2, can say that of 3 again, and gets all others wrong."""

    name, digest, licence, price = "solver", "d", "MIT", (0.0, 0.0)

    def __init__(self, rows: list[dict[str, Any]]) -> None:
        self.rows, self.facts, self.tools, self.seen = rows, {}, self, []  # type: ignore[var-annotated]

    def chat(self, model: str) -> "Corpus":
        return self

    def complete(self, requests: Sequence[ChatRequest], progress: Any = None) -> list[ChatAnswer]:
        self.seen += requests
        return [ChatAnswer(self.say(request.messages[-1][1]), 1, 1, True) for request in requests]

    def say(self, asked: str) -> str:
        number = next(n for n in range(99) if f"Question {n}?" in asked)
        if "Do not solve" in asked:
            return f"Plan for {number}"
        if "in your own words" in asked:
            return f"Said again: #### {number if number == 3 else -1}"
        return f"I think #### {number if number < 3 else -1}"

    def progress(self, done: int, total: int) -> None:
        pass

    def record(self, **facts: Any) -> None:
        self.facts |= facts

    def tables(self, columns: Sequence[str] | None = None) -> Iterator[pa.Table]:
        yield table(self.rows).select(list(columns or ROW.names))

    def curated(self, set_name: str, split: str) -> Iterator[pa.Table]:
        yield table(self.rows if split == "train" else [])


def made_by(maker: Any, corpus: Any) -> list[dict[str, Any]]:
    return [row for part in maker.make(corpus) for row in part.to_pylist()]


def test_right_words_are_the_models_own_and_others_the_references(make_row: Make) -> None:
    rows = [make_row("q", n, f"Question {n}?", f"Known.\n#### {n}") for n in range(6)]
    corpus = Corpus(rows)
    made = made_by(SelectiveSelfSft("m", ExactMaths(), tries=2), corpus)
    assert [row["messages"][1]["content"] for row in made] == [
        *(f"I think #### {n}" for n in range(3)),
        "Said again: #### 3",
    ]
    assert [row["parents"] for row in made] == [[row["row_id"]] for row in rows[:4]]  # the other two stay themselves
    assert corpus.facts["words"] == {"own": 3, "paraphrase": 1, "reference": 2}
    assert len(corpus.seen) == 6 + 3 + 3  # a second try and a paraphrase for those that were wrong
    told = corpus.facts["synthesis"]
    assert told["answered"] == told["parsed"] == 12 and told["verified"] == 4 and told["refused"] == {"wrong": 8}
    apart = made_by(SelectiveSelfSft("m", ExactMaths(), set_name="s", paraphrase=False), Corpus(rows))
    assert [json.loads(row["meta"])["words"] for row in apart] == ["own"] * 3 + ["reference"] * 3
    assert apart[5]["messages"][1]["content"] == "Known.\n#### 5"


def test_paths_lead_from_guidelines_to_right_answers(make_row: Make) -> None:
    rows = [make_row("q", n, f"Question {n}?", f"#### {n}") for n in range(5)]
    corpus = Corpus(rows)
    made = made_by(ReGenesis("m", ExactMaths(), paths=2), corpus)
    assert len(made) == 3 and corpus.facts["synthesis"]["refused"] == {"duplicate": 3, "wrong": 4}
    assert len(corpus.seen) == 30 and corpus.facts["synthesis"]["answered"] == 30
    meta = json.loads(made[0]["meta"])
    assert meta["structure"] == meta["adapted"] == "Plan for 0" and meta["guideline"].endswith(".")
    paths = [request.messages[-1][1] for request in corpus.seen if "Follow this plan" in request.messages[-1][1]]
    assert len(paths) == 10 and all("Plan for" in path for path in paths)
    assert made_by(ReGenesis("m", ExactMaths(), paths=2), Corpus(rows)) == made
