"""Shapes: what each becomes, how each is recognised, on small records and on the real sets."""

import json
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from gristmill.curation.reading.shapes import recognise
from gristmill.curation.reading.source import Source, Unreadable, iter_rows
from gristmill.curation.reading.turns import Unfit
from gristmill.curation.text.view import prompt_of, response_of

U, A = {"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}
HH = "\n\nHuman: a\n\nAssistant: b\n\nHuman: c\n\nAssistant: "


def short(turns: list[dict[str, Any]] | None) -> list[tuple[str, str | None]] | None:
    return None if turns is None else [(turn["role"], turn["content"]) for turn in turns]


def said(record: dict[str, Any], shape: str = "auto") -> tuple[Any, ...]:
    """(shape, messages, chosen, rejected) of a record."""
    found = recognise(shape, [record], "s")
    content = found.convert(record)
    return (found.name, *(short(content.get(name)) for name in ("messages", "chosen", "rejected")))


PROMPTED = [("user", "p")]
CASES: list[tuple[dict[str, Any], tuple[Any, ...]]] = [
    ({"instruction": "p", "input": " ", "response": "r"}, ("alpaca", [*PROMPTED, ("assistant", "r")])),
    ({"Instruction": "p", "context": "q", "Output": "r"}, ("alpaca", [("user", "p\n\nq"), ("assistant", "r")])),
    (
        {"instruction": "p", "output": "r", "system": "s", "history": [["a", "b"]]},
        ("alpaca", [("system", "s"), ("user", "a"), ("assistant", "b"), *PROMPTED, ("assistant", "r")]),
    ),
    ({"instruction": "p", "output": ["good", "bad"]}, ("alpaca_ranked", PROMPTED, "good", "bad")),
    ({"prompt": "p", "completion": "r"}, ("prompt_completion", [*PROMPTED, ("assistant", "r")])),
    ({"prompt": [U], "completion": [A]}, ("prompt_completion", [("user", "hi"), ("assistant", "hello")])),
    ({"question": "p", "answer": "r"}, ("question_answer", [*PROMPTED, ("assistant", "r")])),
    ({"input": "p", "target": 39.0}, ("question_answer", [*PROMPTED, ("assistant", "39")])),
    ({"problem": "p", "solution": "r", "answer": "1"}, ("question_answer", [*PROMPTED, ("assistant", "r")])),
    ({"text": "p", "code": "r"}, ("question_answer", [*PROMPTED, ("assistant", "r")])),
    ({"messages": [U, A]}, ("messages", [("user", "hi"), ("assistant", "hello")])),
    ({"messages": json.dumps([U, A])}, ("messages", [("user", "hi"), ("assistant", "hello")])),
    (
        {"conversations": [{"from": "human", "value": "p"}, {"from": "gpt", "value": "r"}], "system": "s"},
        ("sharegpt", [("system", "s"), *PROMPTED, ("assistant", "r")]),
    ),
    ({"prompt": "p", "chosen": "good", "rejected": "bad"}, ("preference", PROMPTED, "good", "bad")),
    (
        {"prompt": "hi", "chosen": [U, A], "rejected": [U, A | {"content": "no"}]},
        ("preference", [("user", "hi")], "hello", "no"),
    ),
    ({"prompt": [U], "chosen": [A], "rejected": [A]}, ("preference", [("user", "hi")], "hello", "hello")),
    (
        {"chosen": [U, A], "rejected": [U, A | {"content": "no"}]},
        ("preference_implicit", [("user", "hi")], "hello", "no"),
    ),
    ({"chosen": [U, A], "rejected": [U, A]}, ("preference_implicit", [("user", "hi")], "hello", "hello")),
    (
        {"instruction": "p", "input": "", "output": "x", "chosen": "good", "rejected": "bad"},
        ("preference_alpaca", PROMPTED, "good", "bad"),
    ),
    (
        {"chosen": HH + "good\n", "rejected": HH + "bad"},
        ("hh_rlhf", [("user", "a"), ("assistant", "b"), ("user", "c")], "good", "bad"),
    ),
    (
        {"conversations": [{"from": "human", "value": "p"}], "chosen": '{"from": "gpt", "value": "good"}',
         "rejected": {"from": "gpt", "value": "bad"}},
        ("preference_sharegpt", PROMPTED, "good", "bad"),
    ),
    ({"messages": [U, A], "label": True}, ("kto", [("user", "hi")], "hello", None)),
    ({"prompt": "p", "completion": "r", "label": "0"}, ("kto", PROMPTED, "r", None)),
    (
        {"question": "q", "A": "x", "B": "y", "answer": "B"},
        ("multiple_choice", [("user", "q\n\nA. x\nB. y"), ("assistant", "B")]),
    ),
    (
        {"question": "q", "options": ["A)1", "B)2"], "correct": "A"},
        ("multiple_choice", [("user", "q\n\nA)1\nB)2"), ("assistant", "A")]),
    ),
    ({"question": "q", "choices": ["x", 2], "answer": 1},
     ("multiple_choice", [("user", "q\n\nA. x\nB. 2"), ("assistant", "B")])),
    ({"instruction": "p", "instances": [{"input": "i", "output": "r"}]},
     ("self_instruct", [("user", "p\n\ni"), ("assistant", "r")])),
    ({"prompt": "p", "key": 1}, ("prompt", PROMPTED)),
    ({"turns": ["a", "b"], "category": "x"}, ("prompt", [("user", "a"), ("user", "b")])),
    ({"text": "d", "path": "x"}, ("text", None)),
]  # fmt: skip


@pytest.mark.parametrize(("record", "want"), CASES, ids=[f"{want[0]}-{n}" for n, (_, want) in enumerate(CASES)])
def test_each_shape_is_recognised_and_converted(record: dict[str, Any], want: tuple[Any, ...]) -> None:
    shape, messages, *answers = (*want, None, None)[:4]
    assert said(record) == (shape, messages, *(None if a is None else [("assistant", a)] for a in answers))


def test_label_text_and_named_prompt() -> None:
    assert (
        recognise("auto", [{"messages": [U, A], "label": 0}], "s").convert({"messages": [U, A], "label": 0})["label"]
        is False
    )
    assert recognise("auto", [{"text": "d"}], "s").convert({"text": "d"}) == {"text": "d"}
    assert said({"text": "p", "code": "c"}, "prompt") == ("prompt", [("user", "p")], None, None)
    assert said({"messages": [U, A], "label": "polite"})[0] == "messages"


BAD: list[tuple[dict[str, Any], str]] = [
    ({"messages": []}, "messages has no turn"),
    ({"messages": [{"role": "alien", "content": "x"}]}, "messages[0] has the unknown role 'alien'"),
    ({"messages": [U, {"role": "assistant", "content": None}]}, "no messages[1].content"),
    ({"messages": [{"content": "x"}]}, "messages[0] has no role"),
    ({"messages": "no json"}, "text that is no JSON"),
    ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "a part that is no text"),
    ({"instruction": None, "output": "r"}, "no instruction"),
    ({"prompt": "p", "chosen": 3, "rejected": "b"}, "chosen is a number, not text"),
    ({"chosen": "Hello", "rejected": "Hi"}, "does not begin with 'Human:'"),
    ({"chosen": [U, A], "rejected": [A]}, "not an assistant turn of both"),
    ({"chosen": [A], "rejected": [A]}, "share no prompt"),
    ({"prompt": "other", "chosen": [U, A], "rejected": [U, A]}, "another prompt"),
    ({"messages": [A, U], "label": True}, "does not end with an assistant turn"),
    ({"question": "q", "choices": ["x"], "answer": 0}, "not a list of options"),
    ({"instruction": "p", "output": "r", "history": "x"}, "history is text that is no JSON"),
]


@pytest.mark.parametrize(("record", "error"), BAD, ids=lambda case: str(case)[:30])
def test_records_that_do_not_fit(record: dict[str, Any], error: str) -> None:
    with pytest.raises(Unfit) as raised:
        said(record)
    assert error in str(raised.value)


def test_tools_calls_and_turn_fields(tmp_path: Path) -> None:
    call = [{"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}]
    turns = [
        U | {"weight": 0},
        {"role": "assistant", "content": None, "tool_calls": call, "reasoning_content": "hm"},
        {"role": "tool", "content": "2", "tool_call_id": "c", "name": "f"},
        {"role": "assistant", "content": [{"type": "text", "text": "two"}]},
    ]
    record = {"messages": turns, "tools": [{"name": "f"}], "n": float("nan"), "lang": "en", "none": None}
    (tmp_path / "a.jsonl").write_text(json.dumps(record))
    (row,) = iter_rows(Source("s", str(tmp_path / "a.jsonl"), "MIT"))
    assert not isinstance(row, Unreadable)
    assert [turn["role"] for turn in row["messages"]] == ["user", "assistant", "tool", "assistant"]
    assert json.loads(row["messages"][1]["tool_calls"]) == call and row["messages"][1]["reasoning_content"] == "hm"
    assert row["messages"][2]["tool_call_id"] == "c" and row["messages"][3]["content"] == "two"
    assert json.loads(row["tools"]) == [{"name": "f"}]
    assert json.loads(row["meta"]) == {"n": None, "lang": "en", "turn_fields": [{"weight": 0}, {}, {}, {}]}


def test_sharegpt_function_calls() -> None:
    record = {"conversations": [
        {"from": "human", "value": "p"}, {"from": "function_call", "value": '{"name": "f", "arguments": {}}'},
        {"from": "observation", "value": "2"}, {"from": "gpt", "value": "two"},
    ]}  # fmt: skip
    turns = recognise("auto", [record], "s").convert(record)["messages"]
    assert [turn["role"] for turn in turns] == ["user", "assistant", "tool", "assistant"]
    assert json.loads(turns[1]["tool_calls"])[0]["function"]["name"] == "f"


REAL = {
    "alpaca_raw_partial": "alpaca", "alpaca_gpt4_comparison_1095": "alpaca_ranked", "aqua_dev_test": "multiple_choice",
    "bbh": "question_answer", "dolly_sample2000": "alpaca", "flan_cot": "question_answer", "docs_til": "text",
    "gpteacher_roleplay": "alpaca", "gsm8k_test": "question_answer", "hh_rlhf_harmless_test": "hh_rlhf",
    "humaneval164": "prompt_completion", "ifeval541": "prompt", "lf_dpo_en_demo300": "preference_sharegpt",
    "lf_kto_en_demo300": "kto", "math500": "question_answer", "mawps_parts": "question_answer",
    "mbpp974": "question_answer", "mmlu": "multiple_choice", "mt_bench80": "prompt", "vicuna80": "prompt",
    "rasbt_preference1100": "preference_alpaca", "self_instruct_user_oriented252": "self_instruct",
    "t0_templates_sample": "prompt_completion", "ultrafeedback_sample1000": "preference_implicit",
    "wizardlm_testset218": "prompt",
}  # fmt: skip


@pytest.mark.parametrize("name", REAL)
def test_real_sets(name: str, data: Path) -> None:
    path = data / f"{name}.parquet"
    given = pq.read_table(path).slice(0, 600).to_pylist()
    assert recognise("auto", given[:100], name).name == REAL[name]
    rows = list(iter_rows(Source(name, str(path), "MIT", limit=600)))
    assert len(rows) == len(given)
    for row, record in zip(rows, given, strict=True):
        assert not isinstance(row, Unreadable)
        ask = next(record[key] for key in ("instruction", "question", "prompt", "input", "problem", "text", "chosen",
                   "conversations", "messages", "turns", "Instruction") if key in record)  # fmt: skip
        if isinstance(ask, str) and "chosen" not in record and REAL[name] != "text":
            assert prompt_of(row).startswith(ask)
        if REAL[name] in ("question_answer", "alpaca", "prompt_completion") and name != "mawps_parts":
            assert response_of(row) in record.values()
        if row["chosen"] is not None and row["rejected"] is not None:
            assert row["messages"][-1]["role"] == "user" and row["chosen"][0]["role"] == "assistant"


def test_equal_answers_are_readable(data: Path) -> None:
    rows = list(iter_rows(Source("u", str(data / "ultrafeedback_sample1000.parquet"), "MIT")))
    assert sum(not isinstance(row, Unreadable) and row["chosen"] == row["rejected"] for row in rows) == 12


def test_columns_by_name(data: Path) -> None:
    columns = {"prompt": "instructions", "completion": "example_solution"}
    rows = list(iter_rows(Source("e", str(data / "exercism_python.parquet"), "MIT", columns=columns, id="slug")))
    assert len(rows) == 140
    assert all(not isinstance(row, Unreadable) and json.loads(row["meta"])["slug"] for row in rows)
