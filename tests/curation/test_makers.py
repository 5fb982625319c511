"""Makers: questions fit their answers; preference pairs come from a model's own words, none lost in silence."""

import json
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pyarrow as pa
import pytest

from gristmill.curation.door import ChatAnswer, ChatError, ChatRequest
from gristmill.curation.folder import HouseError
from gristmill.curation.makers.docstring_questions import DocstringQuestions, ask, read_document
from gristmill.curation.makers.preference_from_model import PreferenceFromModel
from gristmill.curation.rows import ROW, content_id, message, source_row_id, table

Make = Callable[..., dict[str, Any]]

INDEX = """index(value, [start, [stop]]) -> integer

Return first index of value.

Raises ValueError if the value is not present. Nothing else is said about it.

Args:
    value: what to look for, compared
        by equality
    start: where to begin

Returns:
    The position, from 0.

Example::

>>> [3, 1].index(1)
1
"""


def document(name: str, text: str, kind: str = "function", signature: str = "(a, b=1)", **more: Any) -> dict[str, Any]:
    meta = {"qualified_name": name, "signature": signature, "kind": kind, "module": name.rpartition(".")[0]}
    row: dict[str, Any] = dict.fromkeys(ROW.names) | {"source": "docs", "position": 0, "text": text}
    row |= {"meta": json.dumps(meta | more), "row_id": source_row_id("docs", name)}
    return row | {"content_id": content_id(row)}


class Rows:
    """A corpus in parts."""

    def __init__(self, rows: list[dict[str, Any]], part: int = 1000, tools: Any = None) -> None:
        self.all, self.part, self.tools, self.seen = rows, part, tools, [(0, 0)]
        self.facts: dict[str, Any] = {}
        self.rows = len(rows)

    def record(self, **facts: Any) -> None:
        self.facts |= facts

    def progress(self, done: int, total: int) -> None:
        self.seen.append((done, total))

    def tables(self, columns: Sequence[str] | None = None) -> Iterator[pa.Table]:
        for start in range(0, len(self.all), self.part):
            yield table(self.all[start : start + self.part]).select(list(columns or ROW.names))


def made_by(maker: Any, corpus: Rows) -> list[dict[str, Any]]:
    return [row for part in maker.make(corpus) for row in part.to_pylist()]


def forms(row: dict[str, Any]) -> dict[str, tuple[str, str]]:
    found = read_document(row)
    assert found is not None
    return {form: (question, answer) for form, question, answer in ask(found, 200)}


def test_each_form_answers_with_what_the_docstring_says_on_it() -> None:
    found = forms(document("list.index", INDEX, "method", "(value, start=0)"))
    assert found["purpose"][1] == "Return first index of value."
    assert found["errors"][1] == "Raises ValueError if the value is not present."
    assert found["arguments"][1].startswith("value: what to look for") and "Returns" not in found["arguments"][1]
    assert found["returns"][1] == "The position, from 0."
    assert found["example"][1] == "```python\n>>> [3, 1].index(1)\n1\n```"
    assert found["call"][1] == "`list.index(value, start=0)`\n\nReturn first index of value."
    assert found["docstring"][0].endswith("```python\ndef index(value, start=0):\n```")
    assert not found["docstring"][1].startswith("index(")  # the C signature line says what the question said
    assert "which" not in found  # its first sentence names the method
    assert all("list.index" in question for form, (question, _) in found.items() if form != "docstring")


def test_forms_that_would_not_fit_are_not_asked() -> None:
    found = forms(document("os.sync", "Force write of everything to disk.", signature=""))
    assert set(found) == {"purpose", "which"}
    assert found["which"][1] == "This describes `os.sync`."
    assert "docstring" not in forms(document("a.f", "Give back a thing or two.", signature="(x=<object at 0x7f12>)"))
    assert read_document(document("a.f", "f(x) -> y")) is None  # nothing but the call
    for said in ("f: gives a thing back", "f(x): gives a thing back", "f(x, y) -> z\n\ngives a thing back"):
        assert forms(document("a.f", said))["purpose"][1] == "gives a thing back"
    assert all(answer.count("word") <= 200 for _, answer in forms(document("a.f", "word " * 300)).values())


def test_numpy_and_sphinx_sections_are_read() -> None:
    numpy = "Sum up.\n\nParameters\n----------\nx : int\n    The first.\ny : int\n    The second.\n\n"
    numpy += "Returns\n-------\nint\n    It is the sum."
    found = forms(document("a.f", numpy))
    assert found["arguments"][1] == "x : int\n    The first.\ny : int\n    The second."
    assert found["returns"][1] == "int\n    It is the sum."
    sphinx = "Sum up.\n\n:param x: the first\n    of two\n:param int y: the second\n"
    sphinx += ":return: the sum of both\n:raises ValueError: never at all"
    found = forms(document("a.f", sphinx))
    assert found["arguments"][1] == "- x: the first\n    of two\n- int y: the second"
    assert found["returns"][1] == "- the sum of both"
    assert found["errors"][1] == "- ValueError: never at all"


def test_an_explanation_ends_where_a_paragraph_does() -> None:
    text = "First paragraph here.\n\n" + "word " * 30 + "\n\nFor example::\n\n    " + "code " * 40
    found = read_document(document("a.f", text))
    assert found is not None
    answers = {form: answer for form, _, answer in ask(found, 50)}
    assert answers["explanation"] == "First paragraph here.\n\n" + " ".join(["word"] * 30)


def test_classes_are_documented_as_classes() -> None:
    assert (
        "class C:\n    def __init__(self, a, b=1): ..."
        in forms(document("m.C", "A C of all C.", "class"))["docstring"][0]
    )
    plain = forms(document("m.C", "A C of all C.", "class", "()"))
    assert "class C:\n    def __init__(self): ..." in plain["docstring"][0]


def test_made_rows_have_their_document_as_parent(make_row: Make) -> None:
    texts = [f"Do the thing number {n} and give it back.\n\nIt is done at once." for n in range(40)]
    documents = [document(f"m.f{n}", text) for n, text in enumerate(texts)]
    others = [make_row("a", 0, "q", "r"), document("m.empty", ""), dict(documents[0], row_id="plain", meta=None)]
    corpus = Rows([*documents, *others], part=9)
    maker = DocstringQuestions(questions=2)
    made = made_by(maker, corpus)
    assert len(made) == 80 and len({row["row_id"] for row in made}) == 80
    assert {row["parents"][0] for row in made} == {row["row_id"] for row in documents}
    assert {row["maker"] for row in made} == {repr(maker)} and {row["source"] for row in made} == {
        "docstring_questions"
    }
    assert [row["position"] for row in made] == list(range(80))
    assert all([turn["role"] for turn in row["messages"]] == ["user", "assistant"] for row in made)
    assert len({json.loads(row["meta"])["form"] for row in made}) >= 4  # variety
    again = made_by(maker, Rows([*others, *documents[::-1]]))
    assert {row["row_id"] for row in again} == {row["row_id"] for row in made}
    assert len(made_by(DocstringQuestions(), corpus)) == 40


def test_a_limit_takes_the_same_documents_in_any_order() -> None:
    documents = [document(f"m.f{n}", f"Do the thing number {n}.") for n in range(30)]
    first = {row["parents"][0] for row in made_by(DocstringQuestions(limit=7), Rows(documents))}
    assert len(first) == 7
    assert {row["parents"][0] for row in made_by(DocstringQuestions(limit=7), Rows(documents[::-1], 4))} == first
    with pytest.warns(UserWarning, match=r"DocstringQuestions made no row of 30: it wants documents"):
        assert made_by(DocstringQuestions(limit=0), Rows(documents)) == []


class Chat:
    name, digest, licence, price = "small", "d", "MIT", (0.0, 0.0)

    def __init__(self, answer: Callable[[ChatRequest], ChatAnswer | ChatError]) -> None:
        self.answer, self.requests = answer, []  # type: ignore[var-annotated]

    def complete(self, requests: Sequence[ChatRequest], progress: Any = None) -> list[ChatAnswer | ChatError]:
        self.requests += requests
        return [self.answer(request) for request in requests]


class Tools:
    def __init__(self, chat: Chat, train: list[dict[str, Any]], test: list[dict[str, Any]]) -> None:
        self.model, self.rows, self.asked = chat, {"train": train, "test": test}, []  # type: ignore[var-annotated]

    def chat(self, model: str) -> Chat:
        self.asked.append(model)
        return self.model

    def curated(self, set_name: str, split: str) -> Iterator[pa.Table]:
        self.asked.append(set_name)
        rows = self.rows[split]
        for start in range(0, len(rows), 7):
            yield table(rows[start : start + 7])


def echo(request: ChatRequest) -> ChatAnswer:
    return ChatAnswer(f"I say {request.messages[-1][1]}", 5, 9, finished=False)


@pytest.fixture
def train(make_row: Make) -> list[dict[str, Any]]:
    return [make_row("t", n, f"question {n}", f"reference {n}") for n in range(30)]


def test_pairs_hold_reference_and_sampled_answer(make_row: Make, train: list[dict[str, Any]]) -> None:
    turns = [message("system", "Be kind."), message("user", "One?"), message("assistant", "1"), message("user", "Two?")]
    several = make_row("t", 99, "", "", messages=[*turns, message("assistant", "2")])
    tools = Tools(Chat(echo), train, [several])
    maker = PreferenceFromModel("tuned", set_name="first", prompts=10, test_prompts=5, max_tokens=9, temperature=0.5)
    made = made_by(maker, Rows([], tools=tools))
    assert len(made) == 11 and set(tools.asked) == {"tuned", "first"}
    origin = {row["row_id"]: row for row in [*train, several]}
    for row in made:
        (parent,) = row["parents"]
        before = origin[parent]["messages"]
        assert row["messages"] == before[:-1] and row["chosen"] == [before[-1]]
        assert [(turn["role"], turn["content"]) for turn in row["rejected"]] == [
            ("assistant", f"I say {before[-2]['content']}")
        ]
        meta = json.loads(row["meta"])
        assert {"sampled_tokens": 9, "finished": False, "model": "small"}.items() <= meta.items()
        assert {"model": "small", "licence": "MIT", "maker": "PreferenceFromModel"}.items() <= meta["made"].items()
        assert row["maker"] == repr(maker) and row["source"] == "preference_from_model"
    (last,) = [request for request in tools.model.requests if len(request.messages) == 4]
    assert last.messages == (("system", "Be kind."), ("user", "One?"), ("assistant", "1"), ("user", "Two?"))
    assert (last.sampling.max_tokens, last.sampling.temperature) == (9, 0.5)


def test_rows_and_seeds_do_not_depend_on_order(train: list[dict[str, Any]]) -> None:
    def run(rows: list[dict[str, Any]], **more: Any) -> tuple[set[str], dict[str, int]]:
        chat = Chat(echo)
        made = made_by(PreferenceFromModel("m", prompts=12, **more), Rows([], tools=Tools(chat, rows, [])))
        return {row["row_id"] for row in made}, {r.messages[-1][1]: r.seed for r in chat.requests}

    ids, seeds = run(train)
    assert run(train[::-1]) == (ids, seeds) and len(ids) == 12
    assert len(set(seeds.values())) == 12
    other = run(train, seed=1)[1]
    assert other.keys() != seeds.keys() and all(other[key] != seeds[key] for key in other.keys() & seeds.keys())


def test_what_gives_no_pair_is_counted(make_row: Make, train: list[dict[str, Any]]) -> None:
    answers = {"question 0": ChatAnswer("Reference  0\n", 1, 2, True), "question 1": ChatAnswer(" ", 1, 0, True)}
    answers |= {f"question {n}": ChatError("too_long", "900 tokens") for n in (2, 3)}  # type: ignore[misc]
    chat = Chat(lambda request: answers.get(request.messages[-1][1]) or echo(request))
    rows = [*train[:8], make_row("t", 50, "unanswered", None), make_row("t", 51, "q", " ")]
    maker = PreferenceFromModel("m", prompts=100, test_prompts=0)
    corpus = Rows([], tools=Tools(chat, rows, []))
    with pytest.warns(UserWarning, match="PreferenceFromModel: 2 too_long of 8 requests failed"):
        made = made_by(maker, corpus)
    told = corpus.facts["synthesis"]
    assert (told["asked"], told["made"], told["failed"]) == (8, 4, {"too_long": 2})
    assert told["unparsed"] == {"empty": 1, "equal": 1} and told["refused"] == {"no_reference": 2}
    assert [row["position"] for row in made] == [0, 1, 2, 3]
    assert {row["messages"][0]["content"] for row in made} == {f"question {n}" for n in range(4, 8)}


def test_no_rows_ask_nothing(train: list[dict[str, Any]]) -> None:
    chat = Chat(echo)
    with pytest.warns(UserWarning, match="made no row: 0 requests; nothing to ask"):
        assert (
            made_by(PreferenceFromModel("m", prompts=0, test_prompts=0), Rows([], tools=Tools(chat, train, []))) == []
        )
    assert chat.requests == []
    with pytest.raises(HouseError, match="max_tokens"):
        PreferenceFromModel("m", max_tokens=0)
