"""A conversation's form: roles, empty turns, tool calls, code fences, echoes; what may stand is kept."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gristmill.curation.judges.code_fences import CodeFences, open_fence
from gristmill.curation.judges.echo import Echo, echo
from gristmill.curation.judges.tool_calls import ToolCalls, tool_fault
from gristmill.curation.judges.turns import EmptyTurn, RoleOrder, role_fault
from gristmill.curation.rows import ROW, message, table
from gristmill.curation.text.view import view

from .real import real_rows

Make = Callable[..., dict[str, Any]]
SHORT = {"s": "system", "d": "developer", "u": "user", "a": "assistant", "t": "tool", "x": "critic"}


def talk(roles: str | None) -> list[dict[str, Any]] | None:
    return None if roles is None else [message(SHORT[role], "said") for role in roles]


def row(messages: Any, chosen: Any = None, rejected: Any = None, **more: Any) -> dict[str, Any]:
    base: dict[str, Any] = dict.fromkeys(ROW.names) | {"row_id": "r", "content_id": "c", "source": "s", "position": 0}
    return base | {"messages": messages, "chosen": chosen, "rejected": rejected} | more


ORDERS = [
    ("ua", None, None, None),
    ("sua", None, None, None),
    ("sduaua", None, None, None),
    ("uattaua", None, None, None),
    ("u", "a", "a", None),
    ("uau", "ata", "a", None),
    ("u", "a", None, None),
    (None, None, None, None),
    ("usa", None, None, ("system_not_first", "messages", 1)),
    ("uua", None, None, ("not_alternating", "messages", 1)),
    ("uaa", None, None, ("not_alternating", "messages", 2)),
    ("sa", None, None, ("starts_with_assistant", "messages", 1)),
    ("uta", None, None, ("stray_tool_turn", "messages", 1)),
    ("uatua", None, None, ("not_alternating", "messages", 3)),
    ("uxa", None, None, ("unknown_role", "messages", 1)),
    ("uau", None, None, ("ends_without_assistant", "messages", 2)),
    ("", None, None, ("ends_without_assistant", "messages", -1)),
    ("u", "a", "u", ("not_alternating", "rejected", 0)),
    ("ua", "a", "a", ("not_alternating", "chosen", 0)),
    ("u", "at", "a", ("ends_without_assistant", "chosen", 1)),
]


@pytest.mark.parametrize(("messages", "chosen", "rejected", "fault"), ORDERS, ids=[str(n) for n in range(len(ORDERS))])
def test_roles_in_order(messages: Any, chosen: Any, rejected: Any, fault: Any) -> None:
    rows = table([row(talk("ua")), row(talk(messages), talk(chosen), talk(rejected)), row(talk("ua"))])
    found = RoleOrder().judge(rows, rows).to_pylist()
    assert found[0]["keep"] and found[2]["keep"] and found[1]["keep"] == (fault is None)
    if fault:
        proof = json.loads(found[1]["evidence"])
        assert (found[1]["reason"], proof["field"], proof["turn"]) == fault


def test_an_open_end_may_be_allowed() -> None:
    rows = table([row(talk("uau"))])
    assert RoleOrder(ends_with_assistant=False).judge(rows, rows)["keep"].to_pylist() == [True]


turns = st.one_of(st.none(), st.text("sduatx", max_size=5))


@settings(deadline=None, max_examples=150)
@given(st.lists(st.tuples(turns, turns, turns), max_size=6), st.booleans())
def test_the_flat_look_equals_the_plain_rule(rows: list[Any], ends: bool) -> None:
    found = table([row(*map(talk, item)) for item in rows])
    plain = [role_fault(item, ends) for item in found.to_pylist()]
    assert RoleOrder(ends).judge(found, found)["reason"].to_pylist() == [one and one[0] for one in plain]
    tail = RoleOrder(ends).judge(found.slice(1), found)["reason"].to_pylist()
    assert tail == [one and one[0] for one in plain][1:]


said = st.one_of(st.none(), st.sampled_from(["", " \n", "\u3000\u00a0", "\u200b", "x", "é"]))
spoken = st.one_of(st.none(), st.lists(st.tuples(st.sampled_from("suat"), said, st.booleans()), max_size=4))


@settings(deadline=None, max_examples=150)
@given(st.lists(st.tuples(spoken, spoken), max_size=5))
def test_empty_turns(rows: list[Any]) -> None:
    def of(items: Any) -> Any:
        return items and [message(SHORT[r], text, tool_calls="[]" if call else None) for r, text, call in items]

    found = table([row(of(messages), of(chosen)) for messages, chosen in rows])
    plain = []
    for item in found.to_pylist():
        silent = [
            (name, n)
            for name in ("messages", "chosen")
            for n, turn in enumerate(item[name] or ())
            if turn["role"] in ("user", "assistant", "tool") and not (turn["content"] or "").strip()
            and not (turn["role"] == "assistant" and turn["tool_calls"] is not None)
        ]  # fmt: skip
        plain.append(silent[0] if silent else None)
    judged = EmptyTurn().judge(found, found).to_pylist()
    proofs = [item["evidence"] and json.loads(item["evidence"]) for item in judged]
    assert [proof and (proof["field"], proof["turn"]) for proof in proofs] == plain


CALL = '[{"id": "1", "type": "function", "function": {"name": "add", "arguments": "{\\"a\\": 1}"}}]'
BARE = '[{"name": "add", "arguments": {"a": 1}}]'
TOOLS = '[{"type": "function", "function": {"name": "add", "parameters": {}}}]'


def use(*turns: tuple[str, str | None, str | None]) -> list[dict[str, Any]]:
    return [message(SHORT[r], "x", tool_calls=calls, tool_call_id=ident) for r, calls, ident in turns]


U, A = ("u", None, None), ("a", None, None)
CALLS = [
    ([U, ("a", CALL, None), ("t", None, "1"), A], TOOLS, None),
    ([U, ("a", CALL, None), ("t", None, None), A], None, None),
    ([U, ("a", BARE, None), ("t", None, "any"), A], TOOLS, None),
    ([U, ("a", CALL, None)], TOOLS, None),
    ([U, A], TOOLS, None),
    ([U, A], "[]", None),
    ([U, ("a", CALL, None), ("t", None, "2"), A], TOOLS, "unmatched_result"),
    ([U, A, ("t", None, "1"), A], None, "unmatched_result"),
    ([U, ("a", CALL, None), ("t", None, "1"), ("t", None, "1"), A], TOOLS, "unmatched_result"),
    ([U, ("a", CALL, None), U, A], TOOLS, "unanswered_call"),
    ([U, ("a", CALL[:-1] + ", " + CALL[1:].replace('"1"', '"2"'), None), ("t", None, "1")], None, "unanswered_call"),
    ([U, ("a", '{"name": "add"}', None)], None, "malformed_call"),
    ([U, ("a", "[{", None)], None, "malformed_call"),
    ([U, ("a", CALL.replace('{\\"a\\": 1}', "{a}"), None)], None, "malformed_call"),
    ([U, ("a", CALL.replace("add", "mul"), None)], TOOLS, "unknown_tool"),
    ([U, A], "[{]", "malformed_tools"),
    ([U, A], '{"name": "add"}', "malformed_tools"),
]


@pytest.mark.parametrize(("turns", "tools", "reason"), CALLS, ids=[f"{n}-{case[2]}" for n, case in enumerate(CALLS)])
def test_tool_calls(turns: Any, tools: str | None, reason: str | None) -> None:
    rows = table([row(talk("ua")), row(use(*turns), tools=tools), row(use(U), use(*turns[1:]), tools=tools)])
    found = ToolCalls().judge(rows, rows)["reason"].to_pylist()
    assert found == [None, reason, reason]
    assert [one and one[0] for one in map(tool_fault, rows.to_pylist())] == found


FENCES = [
    ("no code", None),
    ("```python\nx\n```", None),
    ("```\nx\n```\n~~~\ny\n~~~", None),
    ("````md\n```\nx\n```\n````", None),
    ("1. so:\n    ```js\n    x\n    ```", None),
    ("use ```inline``` code", None),
    ("```inline``` at the start", None),
    ("> ```\n> x\n> ```", None),
    ("text\n```python\nx", ("```python", 2)),
    ("```\nx\n```\n```\ny", ("```", 4)),
    ("~~~\nx\n```", ("~~~", 1)),
    ("```a\nx\n```b\ny", ("```a", 1)),
]


@pytest.mark.parametrize(("text", "fence"), FENCES, ids=[str(n) for n in range(len(FENCES))])
def test_code_fences(make_row: Make, text: str, fence: Any) -> None:
    assert open_fence(text) == fence
    rows = table([make_row("a", 0, "```", text)])
    assert CodeFences().judge(rows, rows)["reason"].to_pylist() == [fence and "open_fence"]


ECHOES = [
    ("Say something about the sea.", "say  something about the SEA.", "answer_is_prompt"),
    ("Mend it.\n\nShe go to school every day.", "She go to school every day.", "answer_copies_input"),
    ("Mend it.\n\nShe go to school every day.", "she go to school every day.", None),
    ("Which is larger?\n\ncat, dog", "cat, dog", None),
    ("Pick one.\n\nThe first of five words.\n\nThe second of five words.", "The second of five words.", None),
    ("日本語で一つの文を書いてください a b c d e", "日本語で一つの文を書いてください A B C D E", "answer_is_prompt"),
    ("Hi", "Hi", None),
    ("", "", None),
]


@pytest.mark.parametrize(("prompt", "response", "reason"), ECHOES, ids=[str(n) for n in range(len(ECHOES))])
def test_echoes(make_row: Make, prompt: str, response: str, reason: str | None) -> None:
    assert echo(prompt, response) == reason
    rows = table([make_row("a", 0, prompt, response), make_row("a", 1, "q", "another answer")])
    assert Echo().judge(rows, rows)["reason"].to_pylist() == [reason, None]


@pytest.mark.parametrize("name", ["alpaca_raw_first5000", "self_instruct_predictions", "ultrafeedback_sample1000"])
def test_quick_looks_miss_nothing(data: Path, name: str) -> None:
    rows = real_rows(data, name)
    prompts, responses = view(rows, "prompt"), view(rows, "response")
    echoed = [echo(*pair) for pair in zip(prompts, responses, strict=True)]
    assert Echo().judge(rows, rows)["reason"].to_pylist() == echoed
    fences = [open_fence(response) and "open_fence" for response in responses]
    assert CodeFences().judge(rows, rows)["reason"].to_pylist() == fences
    items = rows.to_pylist()
    assert RoleOrder().judge(rows, rows)["keep"].to_pylist() == [role_fault(item) is None for item in items]
