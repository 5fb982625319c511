"""Makers that work on documents: nothing of a text lost or changed, ugly answers counted, the same rows again."""

import json
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from gristmill.curation.door import ChatAnswer, ChatError, ChatRequest
from gristmill.curation.folder import HouseError
from gristmill.curation.makers.document_tasks import DocumentTasks, check_bonito, read_bonito, task_prompt
from gristmill.curation.rows import ROW, content_id, table
from gristmill.curation.text.labelled import labelled
from gristmill.curation.text.sections import paragraphs, sections
from gristmill.curation.text_tasks import TASKS, Exercise, exercise, options, read

Say = Callable[[ChatRequest], str | ChatAnswer | ChatError]
DOCUMENTS = ("docs_peps", "docs_til", "docs_18f_guides")


class Corpus:
    """Rows, and a model that says what `say` says."""

    name, digest, licence, price = "scripted", "d", "MIT", (0.0, 0.0)

    def __init__(self, rows: list[dict[str, Any]], say: Say, test: Sequence[dict[str, Any]] = ()) -> None:
        self.live, self.test, self.say, self.tools = rows, list(test), say, self
        self.facts: dict[str, Any] = {}
        self.seen: list[ChatRequest] = []

    def chat(self, model: str) -> "Corpus":
        return self

    def complete(self, requests: Sequence[ChatRequest], progress: Any = None) -> list[ChatAnswer | ChatError]:
        self.seen += requests
        said = [self.say(request) for request in requests]
        return [ChatAnswer(one, 9, 5, True) if isinstance(one, str) else one for one in said]

    def progress(self, done: int, total: int) -> None:
        assert 0 < done <= total

    def record(self, **facts: Any) -> None:
        json.dumps(facts)
        self.facts |= facts

    def tables(self, columns: Sequence[str] | None = None) -> Iterator[pa.Table]:
        yield table(self.live).select(list(columns or ROW.names))

    def curated(self, set_name: str, split: str) -> Iterator[pa.Table]:
        yield table(self.live if split == "train" else self.test)

    @property
    def told(self) -> dict[str, Any]:
        """The tally; every request is in it once."""
        told: dict[str, Any] = self.facts["synthesis"]
        assert told["asked"] == len(self.seen) == told["answered"] + sum(told["failed"].values())
        assert told["answered"] == told["parsed"] + sum(told["unparsed"].values())
        return told


def document(position: int, text: str) -> dict[str, Any]:
    row: dict[str, Any] = dict.fromkeys(ROW.names) | {"source": "docs", "position": position, "text": text}
    return row | {"content_id": content_id(row), "row_id": f"{position:032x}"}


def made_by(maker: Any, corpus: Any) -> list[dict[str, Any]]:
    return [row for part in maker.make(corpus) for row in part.to_pylist()]


def real(data: Path, name: str) -> list[str]:
    return pq.read_table(data / f"{name}.parquet", columns=["text"])["text"].to_pylist()


# ---- sections


def test_sections_of_real_documents_lose_nothing(data: Path) -> None:
    for name in DOCUMENTS:
        for text in real(data, name):
            places = sections(text, 2000)
            assert "".join(text[low:high] for low, high in places) == text
            assert max(high - low for low, high in places) <= 2000
            assert all(a + b > 2000 for a, b in sums(places, text))  # no two neighbours would fit in one


def sums(places: Sequence[tuple[int, int]], text: str) -> Iterator[tuple[int, int]]:
    """Lengths of a section and of the first paragraph after it that was not cut itself."""
    starts = dict(paragraphs(text))
    for (low, high), (after, _) in pairwise(places):
        if after in starts and starts[after] - after <= 2000:
            yield high - low, starts[after] - after


def test_paragraphs_keep_fences_whole_and_headings_with_what_they_head() -> None:
    text = "# Title\n\nOne.\n\n\n```py\na = 1\n\nb = 2\n```\n\nName\n====\n\nTwo\nlines.\n  \nThree."
    assert [text[low:high] for low, high in paragraphs(text)] == [
        "# Title\n\nOne.\n\n\n", "```py\na = 1\n\nb = 2\n```\n\n", "Name\n====\n\nTwo\nlines.\n  \n", "Three.",
    ]  # fmt: skip
    assert paragraphs("") == [] == sections("", 10)
    long = "word " * 6 + "x" * 30
    assert [long[low:high] for low, high in sections(long, 20)] == ["word " * 4, "word " * 2, "x" * 20, "x" * 10]


# ---- tasks

TEXT = (
    "The mill stands by the river. It was built in 1790 by Anna Weber. Its wheel turns slowly, and the stones grind"
    " rye. In 1850 the bank burned down, but the mill on the river bank was saved. People still buy its flour today."
)
GOOD = {
    "exqa": "Question: Who built the mill?\nAnswer: Anna Weber",
    "mcqa": "Question: What is ground?\nOptions:\nA) wheat\nB) rye\nC) oats\nD) maize\nAnswer: B",
    "qg": "Question: When was the mill built?",
    "qa": "Question: Was anything lost?\nAnswer: Yes: the bank burned down,\nbut the mill was saved.",
    "ynqa": "Question: Is it a windmill?\nAnswer: No.",
    "coref": "Sentence: It was built in 1790 by Anna Weber.\nWord: It\nAnswer: The mill",
    "paraphrase": "Sentence: The mill stands by the river.\nParaphrase: Next to the river there is a mill.",
    "paraphrase_id": "Sentence 1: The mill stands by the river.\nSentence 2: A river runs past it.\nAnswer: yes",
    "sent_comp": "Beginning: People still buy\nEnding: its flour today.",
    "sentiment": "Answer: Neutral",
    "summarization": "Summary: A mill of 1790 survived a fire and still works.",
    "text_gen": "Instruction: Describe an old mill.\nText: It creaks.\n\nIt grinds.",
    "topic_class": "Topics: sport, an old mill, music, tax\nAnswer: an old mill",
    "wsd": "Word: bank\nSentence 1: In 1850 the bank burned down, but the mill on the river bank was saved.\n"
    "Sentence 2: I sat on the bank and fished.\nAnswer: no",
    "te": "Hypothesis: The mill is more than a century old.\nAnswer: Yes, it follows.",
    "nli": "Hypothesis: The mill has two wheels.\nAnswer: **Neutral**",
}  # fmt: skip
RESPONSES = {
    "mcqa": "B) rye", "ynqa": "No", "coref": "The mill", "sent_comp": "its flour today.", "te": "Yes", "nli": "Neutral",
    "qg": "When was the mill built?", "text_gen": "It creaks.\n\nIt grinds.", "wsd": "No", "topic_class": "an old mill",
    "qa": "Yes: the bank burned down,\nbut the mill was saved.",
}  # fmt: skip


def short_of(request: ChatRequest) -> str:
    """The task type that a request asks for."""
    return next(short for short in TASKS if request.messages == task_prompt(short).turns(context=TEXT))


def test_every_type_becomes_a_row() -> None:
    assert GOOD.keys() == TASKS.keys() and len(TASKS) == 16
    corpus = Corpus([document(0, TEXT + "\n")], lambda request: GOOD[short_of(request)])
    made = made_by(DocumentTasks("m", rows=1), corpus)
    rows = {json.loads(row["meta"])["task"]: row for row in made}
    assert rows.keys() == TASKS.keys() and corpus.told["parsed"] == corpus.told["made"] == 16
    for short, row in rows.items():
        user, assistant = row["messages"]
        assert (user["role"], assistant["role"]) == ("user", "assistant") and row["parents"] == [f"{0:032x}"]
        assert assistant["content"] == RESPONSES.get(short, assistant["content"])
        assert "{" not in user["content"] and json.loads(row["meta"])["section"] == [0, len(TEXT) + 1]
    assert all(TEXT in rows[short]["messages"][0]["content"] for short in ("exqa", "mcqa", "qg", "qa", "ynqa", "nli"))
    assert "A) wheat\nB) rye" in rows["mcqa"]["messages"][0]["content"]
    assert json.loads(rows["exqa"]["meta"])["made"]["prompt"] == "document_tasks/exqa"
    assert corpus.told["verified"] == 3 and corpus.facts["short_of_wanted"] == {}


UGLY = [
    ("exqa", "", "empty"),
    ("exqa", "I cannot do that.", "no_answer"),
    ("exqa", "Question: <the question>\nAnswer: rye", "placeholder"),
    ("exqa", "Question: Who?\nAnswer: Otto Weber", "not_in_text"),
    ("mcqa", "Question: Who?\nOptions: rye or oats\nAnswer: A", "few_options"),
    ("mcqa", "Question: Who?\nOptions:\nA) rye\nB) Rye\nAnswer: A", "few_options"),
    ("mcqa", "Question: Who?\nOptions:\nA) rye\nC) oats\nAnswer: A", "few_options"),
    ("mcqa", "Question: Who?\nOptions:\nA) rye\nB) oats\nAnswer: D", "no_option"),
    ("mcqa", "Question: Who?\nOptions:\nA) rye\nB) oats\nAnswer: A) oats", "no_option"),
    ("qg", "Question: The mill is old.", "no_question"),
    ("qa", f"Question: What?\nAnswer: {TEXT}", "copied"),
    ("ynqa", "Question: Is it?\nAnswer: No one knows", "no_choice"),
    ("ynqa", "Question: Is it?\nAnswer:", "no_answer"),
    ("coref", "Sentence: It was built in 1790 by Anna Weber.\nWord: She\nAnswer: The mill", "word_not_in_sentence"),
    ("coref", "Sentence: It was built in 1790 by Anna Weber.\nWord: It\nAnswer: it", "same_word"),
    ("paraphrase", "Sentence: Mills are old.\nParaphrase: Old are mills.", "not_in_text"),
    ("paraphrase", "Sentence: The mill stands by the river.\nParaphrase: the  mill stands by the river", "copied"),
    ("paraphrase_id", "Sentence 1: Rye is grain.\nSentence 2: Grain.\nAnswer: no", "not_in_text"),
    ("sent_comp", "Beginning: People still buy\nEnding: its bread today.", "not_in_text"),
    ("sentiment", "Answer: mixed", "no_choice"),
    ("summarization", f"Summary: {TEXT} And more.", "too_long"),
    ("summarization", "Summary: The mill stands by the river.", "copied"),
    ("topic_class", "Topics: mills\nAnswer: mills", "few_options"),
    ("topic_class", "Topics: sport, music\nAnswer: mills", "no_option"),
    ("wsd", "Word: bank\nSentence 1: The mill stands by the river.\nSentence 2: A bank.\nAnswer: no",
     "word_not_in_sentence"),
    ("te", "Hypothesis: People still buy its flour today.\nAnswer: yes", "copied"),
]  # fmt: skip


@pytest.mark.parametrize(("short", "said", "reason"), UGLY)
def test_ugly_answers_are_told_apart(short: str, said: str, reason: str) -> None:
    corpus = Corpus([document(0, TEXT)], lambda request: said)
    with pytest.warns(UserWarning, match=f"made no row: 1 requests; 1 {reason}"):
        assert made_by(DocumentTasks("m", rows={short: 1}), corpus) == []
    assert {**corpus.told["unparsed"], **corpus.told["refused"]} == {reason: 1}


def test_labels_are_read_with_patience() -> None:
    dressed = "Sure!\n\n**Question:** Who?\n2. *Answer*: **Anna\nQuestion: Another?\nAnswer: No"
    assert labelled(dressed, ("Question", "Answer")).values == {"Question": "Who?", "Answer": "**Anna"}
    assert labelled(dressed, ("Question", "Answer")).last is None
    bare = labelled("Who built it?\nanswer： `__init__`", ("Question", "Answer"))
    assert bare.values == {"Question": "Who built it?", "Answer": "`__init__`"} and bare.last == "Answer"
    assert read(TASKS["exqa"], 'Who?\nAnswer: "Anna Weber"\n\nIt says so.', False) == {
        "Question": "Who?", "Answer": "Anna Weber",
    }  # fmt: skip
    assert read(TASKS["exqa"], "Question: Who?\nAnswer: Anna W", False) == "cut"
    assert read(TASKS["qa"], "Question: Who?\nAnswer: Anna.\nAnd then", False) == "cut"
    assert options("(a) one\n b. two\n* C: three") == ["one", "two", "three"]
    braces = exercise(TASKS["qa"], {"Question": "What is {x}?", "Answer": "{y}"}, "A {z} text", (0,))
    assert "{z}" in braces.instruction and "{x}" in braces.instruction and braces.response == "{y}"


def test_quotas_are_filled_in_rounds_and_sections_drawn_by_hash() -> None:
    rows = [document(n, f"{TEXT} It is number {n}.") for n in range(12)]

    def say(request: ChatRequest) -> str:
        return GOOD["ynqa"] if request.seed % 3 else "Nothing."

    maker = DocumentTasks("m", rows={"ynqa": 4, "qg": 0}, tries=3)
    corpus = Corpus(rows, say)
    made = made_by(maker, corpus)
    assert len(made) == 4 and 4 < len(corpus.seen) <= 12 and corpus.facts["short_of_wanted"] == {}
    assert corpus.told["unparsed"] == {"no_answer": len(corpus.seen) - 4}
    assert made_by(maker, Corpus(rows[::-1], say)) == made  # whatever order the documents come in
    none = Corpus(rows, lambda request: ChatError("timeout", "1 s"))
    with pytest.warns(UserWarning, match="made no row: 12 requests; 12 timeout"):
        assert made_by(maker, none) == []
    assert none.told["failed"] == {"timeout": 12} and none.facts["short_of_wanted"] == {"ynqa": 4}


def test_an_earlier_sets_held_out_documents_are_not_read() -> None:
    corpus = Corpus([document(0, TEXT)], lambda request: GOOD["qg"], test=[document(1, TEXT)])
    made = made_by(DocumentTasks("m", rows={"qg": 5}, set_name="docs"), corpus)
    assert [row["parents"] for row in made] == [[f"{0:032x}"]] and corpus.facts["documents"]["documents"] == 1


def test_the_model_bonitos_own_form() -> None:
    corpus = Corpus([document(0, TEXT)], lambda request: "Read: {{context}} Who built it?<|pipe|>Anna Weber")
    made = made_by(DocumentTasks("m", rows={"exqa": 1}, form="bonito"), corpus)
    said = f"<|tasktype|>\nextractive question answering\n<|context|>\n{TEXT}\n<|task|>\n"
    assert corpus.seen[0].messages == (("user", said),)
    assert made[0]["messages"][0]["content"] == f"Read: {TEXT} Who built it?"
    assert read_bonito("Who?", TEXT, True) == read_bonito("a<|pipe|>b<|pipe|>c", TEXT, True) == "no_pipe"
    assert (
        read_bonito("Who?<|pipe|>Ann", TEXT, False) == "cut" and read_bonito("Who?<|pipe|> ", TEXT, True) == "no_answer"
    )
    checked = {"exqa": "Otto", "ynqa": "perhaps", "mcqa": "oats", "qa": TEXT, "qg": "Who?", "coref": TEXT}
    found = {short: check_bonito(TASKS[short], Exercise("Say. Who?", said), TEXT) for short, said in checked.items()}
    told = {"exqa": "not_in_text", "ynqa": "no_choice", "mcqa": "no_option", "qa": "copied", "qg": None, "coref": None}
    assert found == told


def test_what_a_recipe_may_not_say() -> None:
    with pytest.raises(HouseError, match="no task type summary; there are exqa, mcqa"):
        DocumentTasks("m", rows={"summary": 1})
    with pytest.raises(HouseError, match="rows is at least 0"):
        DocumentTasks("m", rows={"qa": -1})
    with pytest.raises(HouseError, match="least at most window"):
        DocumentTasks("m", window=100)
