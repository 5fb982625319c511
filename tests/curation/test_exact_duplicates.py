"""Exact duplicates against grouping by `text.normal` in plain Python."""

import json
import random
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gristmill.curation.judges.duplicates import ExactDuplicate
from gristmill.curation.rows import message, table
from gristmill.curation.text.view import View, normal, view

pytest.importorskip("numba")

Row = dict[str, Any]
HOME = tempfile.TemporaryDirectory()


class Parts:
    """A corpus of tables in memory."""

    seed, tools = 0, None

    def __init__(self, rows: Sequence[Row], size: int) -> None:
        self.rows = len(rows)
        self.scratch = self.kept = Path(tempfile.mkdtemp(dir=HOME.name))
        self.parts = [table(rows[low : low + size]) for low in range(0, len(rows), size)]

    def progress(self, done: int, total: int) -> None:
        assert 0 < done <= total

    def tables(self, columns: Sequence[str] | None = None) -> Iterator[pa.Table]:
        for part in self.parts:
            yield part if columns is None else part.select(list(columns))

    def held_out(self, columns: Sequence[str] | None = None) -> Iterator[pa.Table]:
        yield from ()

    def values(self, columns: Sequence[str]) -> pa.Table:
        raise AssertionError("this judge needs no measure")


def row(position: int, prompt: str | None, answer: str | None, source: str = "a", **more: Any) -> Row:
    turns = [message("user", prompt), message("assistant", answer)]
    base = {"row_id": f"{source}{position}", "content_id": "c", "source": source, "position": position}
    return base | {"messages": turns} | more


def verdicts(rows: Sequence[Row], size: int = 1000, **fields: Any) -> list[Row]:
    found: list[Row] = ExactDuplicate(**fields).judge(Parts(rows, size)).to_pylist()
    return found


def kept(rows: Sequence[Row], **fields: Any) -> list[str]:
    return [r["row_id"] for r, v in zip(rows, verdicts(rows, **fields), strict=True) if v["keep"]]


def plain(rows: Sequence[Row], which: View) -> list[str | None]:
    """duplicate_of of each row by the definition, rows taken in order."""
    first: dict[str, str] = {}
    found: list[str | None] = []
    texts, pairs = view(table(rows), which), view(table(rows), "pair")
    for r, text, pair in zip(rows, texts, pairs, strict=True):
        lonely = not normal(text) and normal(pair)
        owner = first.setdefault(r["row_id"] if lonely else f"={normal(text)}", r["row_id"])
        found.append(None if owner == r["row_id"] else owner)
    return found


PIECES = ["a", "A", "ﬁ", "fi", "FI", " ", "\n\n", "\t", "\xa0", "\u2028", "\x1c", "\x00", "é", "e\u0301", "E\u0301",
          "ß", "SS", "①", "1", "İ", "字", "", "Ａ", "\u200b", "."]  # fmt: skip
TEXT = st.none() | st.lists(st.sampled_from(PIECES), max_size=4).map("".join)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(TEXT, TEXT), max_size=25), st.sampled_from(["pair", "prompt", "response"]))
def test_groups_are_those_of_the_normal_form(texts: list[tuple[str | None, str | None]], which: View) -> None:
    rows = [row(i, *pair) for i, pair in enumerate(texts)]
    for size in (1000, 7):
        found = verdicts(rows, size, view=which)
        owners = [json.loads(v["evidence"])["duplicate_of"] if v["evidence"] else None for v in found]
        assert owners == plain(rows, which)
        assert [v["keep"] for v in found] == [owner is None for owner in owners]


def test_a_verdict_says_what_and_where() -> None:
    found = verdicts([row(0, "Hi", "there"), row(1, "hi ", "There"), row(2, "hi", "you")])
    evidence = json.dumps({"cluster": 0, "duplicate_of": "a0", "view": "pair"})
    assert found[1] == {"keep": False, "reason": "exact_duplicate", "score": 1.0, "evidence": evidence}
    assert found[0] == found[2] == {"keep": True, "reason": None, "score": None, "evidence": None}


def test_who_survives() -> None:
    rows = [row(5, "q", "an  answer", "b"), row(2, "q", "an answer", "b"), row(9, "q", "an answer", "a")]
    assert kept(rows) == ["b2"]
    assert kept(rows[::-1]) == ["a9"]
    assert kept(rows, survivor="longest") == ["b5"]
    assert kept([row(0, "q", "e\u0301"), row(1, "q", "é")], survivor="longest") == ["a0"]  # characters, not bytes


def test_views() -> None:
    good, bad = [message("assistant", "yes")], [message("assistant", "no")]
    rows = [
        row(0, "q", "yes"),
        row(1, "q", "no"),
        row(2, "q", None, messages=[message("user", "q")], chosen=good, rejected=bad),
        row(3, "q", None, messages=[message("user", "q")], chosen=good, rejected=[message("assistant", "never")]),
        row(4, None, None, messages=None, text="yes"),
    ]
    assert kept(rows) == ["a0", "a1", "a2", "a3", "a4"]
    assert kept(rows, view="prompt") == ["a0", "a4"]
    assert kept(rows, view="response") == ["a0", "a1"]


def test_empty_prompts_are_no_duplicates_but_empty_rows_are() -> None:
    rows = [row(0, "", "x"), row(1, None, "y"), row(2, "", ""), row(3, None, None), row(4, " ", "\n")]
    assert kept(rows, view="prompt") == ["a0", "a1", "a2"]
    assert kept(rows) == ["a0", "a1", "a2"]
    assert verdicts([]) == [] and kept(rows[:1]) == ["a0"]


def test_order_decides_only_who_survives() -> None:
    rng = random.Random(0)
    rows = [row(i, rng.choice("abc"), rng.choice(["x", "X ", "é", "e\u0301", "z"])) for i in range(200)]
    same = dict(zip((r["row_id"] for r in rows), verdicts(rows), strict=True))
    shuffled = rng.sample(rows, len(rows))
    assert dict(zip((r["row_id"] for r in shuffled), verdicts(shuffled), strict=True)) == same


def test_any_turn() -> None:
    long, other = "A long enough question, is it not?  Well, it is one.", "And this is an answer of many words, see it?"

    def talk(position: int, *turns: str) -> Row:
        roles = ("user", "assistant")
        return row(position, None, None, messages=[message(roles[i % 2], text) for i, text in enumerate(turns)])

    rows = [
        talk(0, long, "Thanks!"),
        talk(1, "Thanks!", "Thanks!"),
        talk(2, "x", long.upper().replace("  ", " ")),
        talk(3, "x", "y", long.replace("A l", "\uff21\u00a0l"), other * 2),
        talk(4, "é" + other * 2, other * 2),
        talk(5, "é" + other * 3),
        talk(6, "e\u0301" + other * 3),
    ]
    found = verdicts(rows, view="turn")
    assert [v["keep"] for v in found] == [True, True, False, False, False, True, False]
    assert json.loads(found[2]["evidence"]) == {"duplicate_of": "a0", "view": "turn", "cluster": 0}
    assert json.loads(found[4]["evidence"]) == {"duplicate_of": "a0", "view": "turn", "cluster": 0, "via": "a3"}
    assert kept(rows, view="turn", turn_bytes=100) == ["a0", "a1", "a2", "a3", "a4", "a5"]
    assert kept(rows, view="turn", turn_bytes=7)[0] == "a0" and "a1" not in kept(rows, view="turn", turn_bytes=7)
    assert kept(rows, view="turn", survivor="longest") == ["a1", "a4", "a6"]


def test_sources_by_priority() -> None:
    rows = [row(i, "q", "an answer", source) for i, source in enumerate("abcd")]
    assert kept(rows, survivor="source", sources=("c", "b")) == ["c2"]
    assert kept([rows[0], rows[3]], survivor="source", sources=("c", "b")) == ["a0"]
