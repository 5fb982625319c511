"""Verifiers of answers: mathematics against published labels and a table of results, options, JSON, IFEval, a judge."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from gristmill.curation.door import ChatAnswer, ChatError, ChatRequest
from gristmill.curation.text.final_answers import final_answer, normal_form
from gristmill.curation.verifiers.constraints import CHECKS, Constraints, sentences
from gristmill.curation.verifiers.exact_maths import ExactMaths
from gristmill.curation.verifiers.json_schema import JsonSchema
from gristmill.curation.verifiers.judge import JudgedRight, parse_verdict
from gristmill.curation.verifiers.multiple_choice import MultipleChoice
from gristmill.curation.verifying import Case, Verifier

MODELS = ("6b_finetuning", "6b_verification", "175b_finetuning", "175b_verification")


def right(verifier: Any, answer: str, reference: str | None = None, tools: Any = None, **meta: Any) -> bool | None:
    found = verifier.verify([Case("q", answer, reference, meta)], tools)[0].right
    assert found is None or isinstance(found, bool)
    return found


def test_published_gsm8k_labels_are_met(data: Path) -> None:
    import pyarrow.parquet as pq

    rows = pq.read_table(data / "gsm8k_model_solutions.parquet").to_pylist()
    agreed = total = 0
    for model in MODELS:
        said = [json.loads(row[model]) for row in rows]
        cases = [
            Case(row["question"], one["solution"], row["ground_truth"]) for row, one in zip(rows, said, strict=True)
        ]
        found = ExactMaths().verify(cases, None)  # type: ignore[arg-type]
        agreed += sum(one["is_correct"] == (told.right is True) for one, told in zip(said, found, strict=True))
        total += len(rows)
    assert total == 5276 and agreed / total >= 0.99


def test_math_solutions_have_their_own_result(data: Path) -> None:
    import pyarrow.parquet as pq

    rows = pq.read_table(data / "math500.parquet").to_pylist()
    plain = [row for row in rows if len(row["answer"]) <= 4]  # without algebra, which is tried below
    cases = [Case("", row["solution"], row["answer"]) for row in plain]
    assert len(plain) > 200 and all(found.right for found in ExactMaths().verify(cases, None))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("text", "result"),
    [
        ("48/2 = 24\n#### 72", "72"),
        ("#### $1,080.50 dollars", "2161/2"),
        ("first \\boxed{1}, then \\boxed{\\frac{1}{2}}.", "1/2"),
        ("so \\boxed{\\text{odd}}", "odd"),
        ("\\boxed 7", "7"),
        ("A: -5", "-5"),
        ("**Answer:** 12 apples", "12"),
        ("The answer is $x = 3$.", "x=3"),
        ("The answer is 3 * 4 = 12.", "12"),
        ("It weighs 3 kg, then 4.", "4"),
        ("\\boxed{11,\\! 111}", "11111"),
        ("\\boxed{2 million}", "2000000"),
        ("\\boxed{never closed 5", "5"),
        ("\\boxed{5x}", "5x"),
        ("nothing", None),
        ("", None),
        ("#### ", None),
    ],
)
def test_results_are_found_by_convention(text: str, result: str | None) -> None:
    found = final_answer(text)
    assert (None if found is None else normal_form(found)) == result


def test_numbers_are_compared_exactly_and_nothing_read_abstains() -> None:
    verifier = ExactMaths()
    assert isinstance(verifier, Verifier)
    assert right(verifier, "#### 1,000", "1000.00") is True and right(verifier, "A: 0.5", "#### 1/2") is True
    assert right(verifier, "\\boxed{25\\%}", "25") is True and right(verifier, "\\boxed{25\\%}", "0.25") is True
    assert right(verifier, "#### 0.3333", "#### 1/3") is False and right(verifier, "#### 71", "#### 72") is False
    assert right(verifier, "no number", "#### 72") is None and right(verifier, "#### 72", None) is None
    assert right(ExactMaths(last_number=False), "it is 72", "#### 72") is None
    assert right(verifier, "\\boxed{on}", "\\boxed{no}") is False  # letters are no factors here
    assert right(verifier, "#### " + "9" * 5000, "#### 9") is not True


@pytest.mark.parametrize(
    ("said", "reference", "expected"),
    [
        ("(1, 2)", "(1,2)", True),
        ("(2, 1)", "(1,2)", False),
        ("{2, 1}", "\\{1,2\\}", True),
        ("1, 2", "1", False),
        ("pi/2", "\\frac{\\pi}{2}", True),
        ("sqrt(8)", "2\\sqrt{2}", True),
        ("(-inf, 3]", "(-\\infty, 3]", True),
        ("10^3", "1000", True),
        ("10^3", "10", False),
        ("(x+1)^2", "x^2+2x+1", True),
        ("5x", "5", False),
        ("3-4", "3", False),
        ("2 1/2", "2.5", True),
        ("1e3", "1000", True),
        ("3:30", "3:30", True),
        ("5 m", "5", True),
        ("5 m^2", "5", True),
        ("5m", "5", True),
        ("18 (6*3)", "18", True),
        ("(18)", "18", True),
        ("3 apples, 5 pears", "3", True),
        ("10^10^10^10^10", "10", False),
    ],
)
def test_a_result_of_several_numbers_is_not_its_first_one(said: str, reference: str, expected: bool | None) -> None:
    """Read as its first number, 10^3 would be right where 10 is, and (1, 2) wrong where it is asked for."""
    assert right(ExactMaths(), f"step\nA: {said}", reference) is expected


def test_algebra_is_decided_in_processes_that_may_die() -> None:
    pytest.importorskip("math_verify")
    pairs = [("2+3x", "3x+2"), ("\\frac{1}{\\sqrt3}", "\\frac{\\sqrt{3}}{3}"), ("x^2", "x^3")]
    pairs += [("\\{1,2\\}", "\\{2,1\\}"), ("x", "9^{9^{9^9}}+1"), ("\\sqrt{4}", "2")]
    cases = [Case("", f"\\boxed{{{said}}}", f"\\boxed{{{wanted}}}") for said, wanted in pairs]
    told = ExactMaths().verify(cases, None)  # type: ignore[arg-type]
    assert [one.right for one in told] == [True, True, False, True, None, True]
    assert "not decided" in told[4].detail


OPTIONS = ["A)21", "B)21.5", "C)22", "D)22.5", "E)23"]


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("The answer is (B).", True),
        ("\\boxed{B}", True),
        ("B", True),
        ("B) 21.5", True),
        ("I choose option C", False),
        ("After some thought, it is 21.5", True),
        ("A or B, hard to say", None),
        ("Answer: b", True),
        ("", None),
    ],
)
def test_options_are_chosen_by_letter_or_text(answer: str, expected: bool | None) -> None:
    assert right(MultipleChoice(), answer, "B", options=OPTIONS) is expected


def test_references_of_options_in_their_usual_forms() -> None:
    texts = ["Paris", "London"]
    for reference in ("B", "(b)", "London", "1"):
        assert right(MultipleChoice(), "The answer is B", reference, options=texts) is True
    assert right(MultipleChoice(), "The answer is B", "Rome", options=texts) is None
    assert right(MultipleChoice(), "The answer is C", "C") is True  # letters alone
    arc = {"label": ["A", "B"], "text": texts}
    assert right(MultipleChoice(), "London", "B", options=arc) is True


def test_json_is_held_to_its_schema() -> None:
    pytest.importorskip("jsonschema")
    schema = {"type": "object", "properties": {"age": {"type": "integer", "minimum": 0}}, "required": ["age"]}
    verifier = JsonSchema(json.dumps(schema))
    found = verifier.verify([Case("", '{"age": -1}')], None)[0]  # type: ignore[arg-type]
    assert found.right is False and found.detail.startswith("$.age")
    assert right(verifier, 'Here you are:\n```json\n{"age": 3}\n```') is True
    assert right(verifier, 'It is {"age": 3}.') is True
    assert right(JsonSchema(json.dumps(schema), bare=True), 'It is {"age": 3}') is False
    assert right(verifier, "{") is False and right(verifier, "[" * 100_000) is False
    assert right(JsonSchema(), "{}", schema={"type": "object"}) is True
    assert right(JsonSchema(), "{}") is None and right(JsonSchema(), "{}", schema={"type": 7}) is None
    assert right(JsonSchema(), "{}", schema={"$ref": "http://127.0.0.1:9/none"}) is None  # nothing is fetched


HELD: list[tuple[str, dict[str, Any], str, str]] = [
    ("keywords:existence", {"keywords": ["mom"]}, "My Mom.", "My dad."),
    ("keywords:frequency", {"keyword": "war", "relation": "at least", "frequency": 2}, "War, war", "war"),
    ("keywords:forbidden_words", {"forbidden_words": ["rock"]}, "A rocket.", "A rock."),
    ("keywords:letter_frequency", {"letter": "#", "let_relation": "less than", "let_frequency": 2}, "#", "##"),
    ("language:response_language", {"language": "de"}, "Das ist ein langer Satz.", "This is a long sentence."),
    (
        "length_constraints:number_sentences",
        {"relation": "less than", "num_sentences": 2},
        "Dr. Who ran.",
        "A. B c. D.",
    ),
    ("length_constraints:number_paragraphs", {"num_paragraphs": 2}, "a\n***\nb", "a\n\nb"),
    ("length_constraints:number_words", {"relation": "at least", "num_words": 3}, "one two three", "one two"),
    (
        "length_constraints:nth_paragraph_first_word",
        {"first_word": "weekend", "num_paragraphs": 2, "nth_paragraph": 2},
        "a\n\nWeekend, at last",
        "weekend\n\na",
    ),
    ("detectable_content:number_placeholders", {"num_placeholders": 2}, "[name] [age]", "[name]"),
    ("detectable_content:postscript", {"postscript_marker": "P.P.S"}, "Hi\nP.P.S. Bye", "Hi\nP.S. Bye"),
    ("detectable_format:number_bullet_lists", {"num_bullets": 2}, "* a\n- b", "* a\n- b\n- c"),
    ("detectable_format:constrained_response", {}, "My answer is maybe.", "Perhaps."),
    ("detectable_format:number_highlighted_sections", {"num_highlights": 2}, "*a* **b**", "*a* b"),
    (
        "detectable_format:multiple_sections",
        {"section_spliter": "Section", "num_sections": 2},
        "Section 1\na\nSection 2\nb",
        "Section 1",
    ),
    ("detectable_format:json_format", {}, '```json\n{"a": 1}\n```', "a: 1"),
    ("detectable_format:title", {}, "<<A title>>\nText", "<< >>"),
    ("combination:two_responses", {}, "one\n******\ntwo", "one\n******\none"),
    ("combination:repeat_prompt", {"prompt_to_repeat": "Say it."}, "say it. It.", "It. Say it."),
    ("startend:end_checker", {"end_phrase": "The end."}, 'x the end."', "The end. x"),
    ("startend:quotation", {}, '"x"', '"x'),
    (
        "change_case:capital_word_frequency",
        {"capital_relation": "at least", "capital_frequency": 2},
        "A BIG dog",
        "BIG dog",
    ),
    ("change_case:english_capital", {}, "THIS IS AN ENGLISH SENTENCE.", "This is an English sentence."),
    ("change_case:english_lowercase", {}, "this is an english sentence.", "This is an English sentence."),
    ("punctuation:no_comma", {}, "a b", "a, b"),
]


@pytest.mark.parametrize(("name", "given", "good", "bad"), HELD, ids=[one[0] for one in HELD])
def test_each_instruction_is_held_and_broken(name: str, given: dict[str, Any], good: str, bad: str) -> None:
    meta = {"instruction_id_list": [name], "kwargs": json.dumps([given])}
    assert right(Constraints(), good, **meta) is True and right(Constraints(), bad, **meta) is False
    assert right(Constraints(), "", **meta) is False


def test_all_instructions_have_to_be_held() -> None:
    assert {one[0] for one in HELD} == set(CHECKS) and len(CHECKS) == 25
    both = {"instruction_id_list": ["punctuation:no_comma", "startend:quotation"], "kwargs": [{}, {}]}
    found = Constraints().verify([Case("", "a, b", None, both)], None)[0]  # type: ignore[arg-type]
    assert found.right is False and "no_comma" in found.detail and "quotation" in found.detail and found.value == "0/2"
    assert right(Constraints(), "x") is None
    assert right(Constraints(), "x", instruction_id_list=["new:kind"], kwargs=[{}]) is None
    assert right(Constraints(), "x", instruction_id_list=["keywords:existence"], kwargs=[{}]) is None
    quoted = {"instruction_id_list": ["startend:quotation"], "kwargs": [{}]}
    assert right(Constraints(), 'Sure:\n"x"', **quoted) is False
    assert right(Constraints(loose=True), 'Sure:\n"x"', **quoted) is True
    assert sentences("Mr. Smith paid $3.50. He left! Why? ...") == 3


def test_every_instruction_of_ifeval_can_be_read(data: Path) -> None:
    import pyarrow.parquet as pq

    rows = pq.read_table(data / "ifeval541.parquet").to_pylist()
    cases = [Case(row["prompt"], "A short answer in English that holds little.", None, row) for row in rows]
    found = Constraints().verify(cases, None)  # type: ignore[arg-type]
    assert len(found) == 541 and all(one.right is not None for one in found)


class Judge:
    """Says what `says` makes of the two texts."""

    name, digest, licence, price = "judge", "d", "MIT", (0.0, 0.0)

    def __init__(self, says: Callable[[str], str | ChatError]) -> None:
        self.says, self.asked = says, []  # type: ignore[var-annotated]

    def chat(self, model: str) -> "Judge":
        return self

    def complete(self, requests: Sequence[ChatRequest], progress: Any = None) -> list[ChatAnswer | ChatError]:
        self.asked += requests
        told = [self.says(request.messages[-1][1]) for request in requests]
        return [one if isinstance(one, ChatError) else ChatAnswer(one, 1, 1, True) for one in told]


def test_a_judge_reads_both_orders_and_abstains_where_they_differ() -> None:
    def first(said: str) -> str:  # favours a place
        return "Verdict: YES" if said.index("good") < said.index("other") else "Verdict: NO"

    verifier = JudgedRight("j")
    assert right(verifier, "good", "other", Judge(first)) is None
    assert right(verifier, "good", "other", Judge(lambda said: "So.\n**Verdict:** yes")) is True
    assert right(verifier, "good", "other", Judge(lambda said: "Verdict: NO")) is False
    assert right(verifier, "good", "other", Judge(lambda said: "Verdict: UNSURE")) is None
    assert right(verifier, "good", "other", Judge(lambda said: ChatError("timeout", ""))) is None
    idle = Judge(lambda said: "Verdict: NO")
    assert right(verifier, " Good", "good", idle) is True and right(verifier, "x", None, idle) is None
    assert right(verifier, " ", "x", idle) is None and idle.asked == []
    assert parse_verdict("Verdict: yes. No, Verdict: no") == "several_verdicts"
    assert parse_verdict("I cannot tell") == "no_verdict" and parse_verdict("Yes, they agree") is True
