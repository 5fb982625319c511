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
from gristmill.curation.makers.extend_conversation import ExtendConversation
from gristmill.curation.makers.non_instructional import NonInstructional, border
from gristmill.curation.makers.rephrase import Rephrase, copied_share
from gristmill.curation.makers.translate import Translate
from gristmill.curation.rows import ROW, content_id, message, table
from gristmill.curation.text.labelled import labelled
from gristmill.curation.text.sections import paragraphs, sections
from gristmill.curation.text.verbatim import changed, translatable
from gristmill.curation.text.view import normal
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


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        (
            [document(0, "word " * 20), document(1, "short")],
            "none of 2 documents has a section of 150 to 160 characters",
        ),
        ([], "there is no document: name a set of kind text"),
    ],
)
def test_documents_of_which_no_section_can_be_asked_about_are_told(rows: list[dict[str, Any]], said: str) -> None:
    corpus = Corpus(rows, lambda request: "never")
    with pytest.warns(UserWarning) as caught:
        assert made_by(DocumentTasks("m", window=160, least=150), corpus) == []
    assert said in str(caught[0].message) and "0 requests; nothing to ask" in str(caught[1].message)


def real(data: Path, name: str) -> list[str]:
    return pq.read_table(data / f"{name}.parquet", columns=["text"])["text"].to_pylist()


# ---- sections


def test_sections_of_real_documents_lose_nothing(data: Path) -> None:
    for name in DOCUMENTS:
        for text in real(data, name)[::3]:
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


def test_tasks_of_real_documents_speak_of_their_documents(data: Path) -> None:
    said = [text for name in DOCUMENTS for text in real(data, name)[:40]]
    rows = [document(n, text) for n, text in enumerate(said)]

    def say(request: ChatRequest) -> str:
        context, _, asked = request.messages[1][1].removeprefix("Text:\n").rpartition("\n\n")
        line = max(context.split("\n"), key=len)
        half = len(line) // 2
        if "Beginning:" in asked:
            return f"Beginning: {line[:half]}\nEnding: {line[half:]}"
        return (
            f"**Question**: What is said?\n\n**Answer**: {line}\n\n**Question**: And what else?\n**Answer**: Nothing."
        )

    maker = DocumentTasks("m", rows={"exqa": 30, "sent_comp": 30}, window=1500)
    corpus = Corpus(rows, say)
    made = made_by(maker, corpus)
    told, read_in = corpus.told, corpus.facts["documents"]
    assert told["parsed"] == told["made"] + sum(told["refused"].values()) and told["verified"] == told["made"] >= 50
    assert read_in["characters"] + read_in["short_characters"] == sum(map(len, said)) and read_in["documents"] == 120
    for row in made:
        start, end = json.loads(row["meta"])["section"]
        section = said[int(row["parents"][0], 16)][start:end]
        assert normal(row["messages"][1]["content"]) in normal(section) and end - start <= 1500
    assert made_by(maker, Corpus(rows[::-1], say)) == made


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


# ---- rephrasing

SAID_AGAIN = (
    "Next to the river is a mill that Anna Weber put up in 1790. Slow water moves it and rye becomes flour between"
    " heavy stones. Fire took the bank in 1850, yet spared the mill, and its flour is sold to this day."
)
PAIRS = (
    "Sure:\n\n**Question 1:** Who built the mill?\n**Answer:** Anna Weber did,\nin 1790.\n\n"
    "Q: What does it grind?\nA: Rye.\nQ: Why?"
)


def rephrased(said: str | ChatAnswer, **fields: Any) -> tuple[list[dict[str, Any]], Corpus]:
    corpus = Corpus([document(0, TEXT)], lambda request: said)
    return made_by(Rephrase("m", **fields), corpus), corpus


def test_rephrased_sections_are_documents_and_questions_a_conversation() -> None:
    made, corpus = rephrased(f"Here is a simplified version of the text:\n\n{SAID_AGAIN}", styles=("easy", "hard"))
    assert [row["text"] for row in made] == [SAID_AGAIN] * 2 and corpus.told["made"] == 2
    assert [json.loads(row["meta"])["style"] for row in made] == ["easy", "hard"] and made[0]["messages"] is None
    assert json.loads(made[0]["meta"])["copied"] == 0 and made[0]["parents"] == [f"{0:032x}"]
    asked, _ = rephrased(PAIRS, styles=("qa",))
    turns = [(turn["role"], turn["content"]) for turn in asked[0]["messages"]]
    assert asked[0]["text"] is None and turns == [
        ("user", "Who built the mill?"), ("assistant", "Anna Weber did,\nin 1790."),
        ("user", "What does it grind?"), ("assistant", "Rye."),
    ]  # fmt: skip
    as_text, _ = rephrased(PAIRS, styles=("qa",), qa_text=True)
    assert as_text[0]["text"].endswith("\nQuestion: What does it grind?\nAnswer: Rye.")


@pytest.mark.filterwarnings("ignore:Rephrase made no row")
def test_copies_and_runaways_are_no_rephrasing() -> None:
    halves = f"{TEXT[:150]} Else nothing at all is known of it, they say, nor of its owners."
    cases: list[tuple[str | ChatAnswer, str, dict[str, Any]]] = [
        (TEXT, "copied", {}), (halves, "copied", {}), ("A mill.", "too_short", {}),
        ("new words " * 200, "too_long", {}),
        ("", "empty", {}), (ChatAnswer(SAID_AGAIN, 1, 1, False), "cut", {}),
        (SAID_AGAIN, "no_pairs", {"styles": ("qa",)}),
        ("Answer: Rye.\nQuestion: What?", "no_pairs", {"styles": ("qa",)}),
    ]  # fmt: skip
    for said, reason, fields in cases:
        made, corpus = rephrased(said, **fields)
        assert made == [] and {**corpus.told["unparsed"], **corpus.told["refused"]} == {reason: 1}, said
    assert copied_share("a b c d e f", "x a b c d e y") == 0.5 and copied_share("b c", "a b c") == 1
    assert copied_share("c b", "a b c") == copied_share("", "a") == 0


def test_a_limit_takes_the_same_sections_in_any_order() -> None:
    rows = [document(n, f"{TEXT} It is number {n}.") for n in range(20)]
    maker = Rephrase("m", styles=("easy", "medium"), limit=4)
    made = made_by(maker, Corpus(rows, lambda request: SAID_AGAIN))
    assert len(made) == 8 and made_by(maker, Corpus(rows[::-1], lambda request: SAID_AGAIN)) == made
    by_style = [{row["parents"][0] for row in made if f'"style": "{style}"' in row["meta"]} for style in maker.styles]
    assert by_style[0] != by_style[1]  # each style draws its own


# ---- halves


def test_halves_of_real_documents_are_the_documents(data: Path) -> None:
    for name in DOCUMENTS:
        said = real(data, name)[:150]
        rows = [document(n, text) for n, text in enumerate(said)]
        corpus = Corpus(rows, lambda request: None)  # type: ignore[arg-type,return-value]
        made = made_by(NonInstructional(window=200_000), corpus)
        told, read_in = corpus.facts["synthesis"], corpus.facts["documents"]
        assert told["made"] == len(made) == told["asked"] - sum(told["refused"].values()) > 100
        assert read_in["documents"] == len(rows) == told["asked"] + read_in["short_sections"]
        assert read_in["characters"] + read_in["short_characters"] == sum(map(len, said))
        for row in made:
            text, place = said[int(row["parents"][0], 16)].strip(), json.loads(row["meta"])["border"]
            first, second = (turn["content"] for turn in row["messages"])
            assert first + second == text and len(first) == place
            assert 0.25 * len(text) <= place <= 0.75 * len(text) and first[-1].isspace() and not second[0].isspace()


def test_borders_lie_between_sentences_near_the_middle() -> None:
    text = "One two three. Four five six. Seven eight nine. Ten eleven."
    assert text[border(text) :] == "Seven eight nine. Ten eleven."
    assert border("One sentence and no more.") is None and border(f"A. {'b' * 99}") is None


@pytest.mark.filterwarnings("ignore:NonInstructional made no row")
def test_a_model_continues_the_first_half() -> None:
    def made(said: str, finished: bool = True) -> tuple[list[dict[str, Any]], Corpus]:
        corpus = Corpus([document(0, TEXT)], lambda request: ChatAnswer(said, 1, 1, finished))
        return made_by(NonInstructional("m", least=100), corpus), corpus

    rows, corpus = made("It went on grinding. It never sto", finished=False)
    first = TEXT[: border(TEXT)]
    assert [turn["content"] for turn in rows[0]["messages"]] == [first, "It went on grinding."]
    assert first.rstrip() in corpus.seen[0].messages[-1][1] and TEXT not in corpus.seen[0].messages[-1][1]
    for said, finished, reason in [
        ("It never sto", False, "no_sentence"),
        (TEXT, True, "copied"),
        (" ", True, "empty"),
    ]:
        rows, corpus = made(said, finished)
        assert rows == [] and {**corpus.told["unparsed"], **corpus.told["refused"]} == {reason: 1}


# ---- conversations


def talk(position: int, *said: str, **more: Any) -> dict[str, Any]:
    turns = [message(role, text) for role, text in zip(("user", "assistant") * len(said), said, strict=False)]
    row: dict[str, Any] = dict.fromkeys(ROW.names) | {"source": "t", "position": position, "messages": turns} | more
    return row | {"content_id": content_id(row), "row_id": f"{position:032x}"}


def extended(says: list[str], *rows: dict[str, Any], **fields: Any) -> tuple[list[dict[str, Any]], Corpus]:
    """Of one conversation: what user and assistant say by turns."""
    told = iter(says)
    corpus = Corpus(list(rows) or [talk(0, "What is a mill?", "A machine that grinds.")], lambda request: next(told))
    return made_by(ExtendConversation("m", **fields), corpus), corpus


def test_conversations_go_on_and_their_old_turns_stay() -> None:
    spans = [{"field": "messages", "turn": 2, "start": 0, "end": 4, "weight": 0.5}]
    turns = [
        message("system", " Be brief. "),
        message("user", "What is a mill?\n"),
        message("assistant", " A machine. "),
    ]
    old = talk(0, messages=turns, spans=spans, tools="[]", meta='{"topic": "mills"}')
    made, corpus = extended(["User: What drives it?", "Water.", "And where?", "At rivers."], old, user="u")
    row = made[0]
    assert row["messages"][:3] == turns and row["spans"] == spans and row["tools"] == "[]"
    assert [turn["role"] for turn in row["messages"][3:]] == ["user", "assistant"] * 2
    assert [turn["content"] for turn in row["messages"][3:]] == [
        "What drives it?",
        "Water.",
        "And where?",
        "At rivers.",
    ]
    assert row["parents"] == [old["row_id"]] and ExtendConversation.consumes == "extended"
    meta = json.loads(row["meta"])
    assert meta["topic"] == "mills" and meta["extended"] == 2 and len(meta["turns_made"]) == 4
    assert len({one["seed"] for one in meta["turns_made"]}) == 4 and meta["turns_made"][0]["prompt"] == "extend_user"
    to_user, to_model = corpus.seen[0].messages, corpus.seen[1].messages
    assert [role for role, _ in to_user] == ["system", "user", "assistant", "user"]
    assert to_user[2:] == (("assistant", "What is a mill?\n"), ("user", " A machine. "))  # roles exchanged, no system
    assert to_model == (("system", " Be brief. "), *SAID_SO_FAR)
    assert corpus.told["parsed"] == 4 and ExtendConversation("m", user="u").models == ("u",)


SAID_SO_FAR = (("user", "What is a mill?\n"), ("assistant", " A machine. "), ("user", "What drives it?"))


@pytest.mark.filterwarnings("ignore:ExtendConversation made no row")
def test_conversations_end_cleanly() -> None:
    cases = [
        (["Thank you so much!"], "parting"), (["what is a  MILL?"], "repeats"), (["A machine that grinds."], "repeats"),
        (["Assistant: Sure, here"], "plays_assistant"), ([""], "empty"), (["Who?", " "], "empty"),
        (["Who?", "I'm sorry, but I can't help with that."], "refusal"),
        (["Who?", "a machine that grinds."], "repeats_answer"),
    ]  # fmt: skip
    for says, reason in cases:
        made, corpus = extended(says)
        assert made == [] and {**corpus.told["unparsed"], **corpus.told["refused"]} == {reason: 1}, says
        begun, corpus = extended(["Thanks, but who owns it?", "Anna Weber.", *says], turns=3)  # thanks and a question
        assert corpus.facts["rounds"] == {"1": 1} and len(begun[0]["messages"]) == 4
        assert begun[0]["messages"][-1]["content"] == "Anna Weber."
        assert {**corpus.told["unparsed"], **corpus.told["refused"]} == {reason: 1}, says


def test_only_plain_conversations_are_extended() -> None:
    call = [message("user", "q"), message("assistant", None, tool_calls="[]")]
    others = [
        talk(1, "q"), talk(2, messages=call), talk(3, messages=[message("assistant", "a"), message("user", "q")]),
        talk(4, "q", "a", chosen=[message("assistant", "b")]), talk(5, "q", " "), document(6, "text"),
    ]  # fmt: skip
    made, corpus = extended(["Go on?", "Yes."], *others, talk(0, "What is it?", "This."), turns=1)
    assert len(made) == 1 and corpus.facts["not_extended"] == 6


# ---- translation

GERMAN = "Die Mühle steht seit vielen Jahren am Fluss und mahlt das Korn der Bauern aus dem Tal."
SOURCE = "See `run()` at https://example.org/a_b (100%), {name}.\n\n```py\nprint('the mill')\n\nx = 1\n```\n\n1, 2, 3\n"


def translated(said: Callable[[str], str], *rows: dict[str, Any], **fields: Any) -> tuple[list[dict[str, Any]], Corpus]:
    corpus = Corpus(list(rows), lambda request: said(request.messages[-1][1].split("\n\n", 1)[1]))
    return made_by(Translate("m", "German", "de", **fields), corpus), corpus


def test_code_stays_and_pieces_come_back_in_place() -> None:
    old = talk(0, SOURCE, "The mill stands by the river.", meta='{"a": 1}')

    def say(text: str) -> str:
        return text.replace("See", "Siehe") if "See" in text else GERMAN

    made, corpus = translated(say, old)
    first, second = made[0]["messages"]
    assert first["content"] == SOURCE.replace("See", "Siehe") and second["content"] == GERMAN
    assert all("print" not in request.messages[-1][1] for request in corpus.seen) and len(corpus.seen) == 2
    assert made[0]["parents"] == [old["row_id"]] and json.loads(made[0]["meta"])["translated"] == {
        "to": "de",
        "pieces": 2,
    }
    assert Translate("m", "German", "de").consumes is None
    assert Translate("m", "German", "de", replace=True).consumes == "translated"
    answers, _ = translated(say, old, what=("assistant",))
    assert answers[0]["messages"][0] == old["messages"][0]


@pytest.mark.filterwarnings("ignore:Translate made no row")
def test_what_a_translation_may_not_change() -> None:
    spans = [{"field": "messages", "turn": 1, "start": 0, "end": 2, "weight": 0.0}]
    english = "The mill has stood by the river for many years and grinds the corn of the farmers."
    cases = [
        ("Run `a` now", "Starte `b` nun", "code_changed"),
        ("At http://a.b/c now", "Nun auf http://a.b/d", "url_changed"),
        ("Hi {name}", "Hallo {Name}", "placeholder_changed"), ("It costs 1,000", "Es kostet 1.000", "number_changed"),
        ("The mill is old", "Die Mühle ist 1 Mühle", "number_changed"), (english, english, "copied"),
        ("The mill is old", english, "other_language"), ("The mill", " ", "empty"),
        ("1, 2, 3", "", "nothing_to_translate"),
    ]  # fmt: skip
    for source, said, reason in cases:
        made, corpus = translated(lambda text, said=said: said, document(0, source))  # type: ignore[misc]
        told = {**corpus.told["unparsed"], **corpus.told["refused"]}
        assert made == [] and told.pop("piece_missing", 1) == 1 and list(told) == [reason], source
    made, corpus = translated(lambda text: GERMAN, talk(0, "A mill", "A machine", spans=spans))
    assert made == [] and corpus.told["refused"] == {"spans": 1}
    assert len(translated(lambda text: GERMAN, talk(0, "A mill", "A machine", spans=spans), what=("user",))[0]) == 1


def test_real_documents_come_through_translation_unchanged_but_for_their_prose(data: Path) -> None:
    for name in DOCUMENTS:
        for text in real(data, name)[:30]:
            pieces = translatable(text, 1500)
            assert "".join(piece for piece, _ in pieces) == text
            assert all(piece == piece.strip() and 0 < len(piece) <= 1500 for piece, sent in pieces if sent)
            assert changed(text, text) is None
