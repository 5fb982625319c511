"""Training rows near held-out rows, against the Jaccard of all pairs in plain Python."""

import json
import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from gristmill.curation.folder import HouseError
from gristmill.curation.judges.near_held_out import NearHeldOut
from gristmill.curation.rows import message, table
from gristmill.curation.text.view import View, view, words

pytest.importorskip("numba")

Row = dict[str, Any]
VOCABULARY = [f"{a}{b}" for a in "bcdfghjklm" for b in range(40)]


class Parts:
    """A corpus of two tables, and held-out rows."""

    seed, scratch, tools = 0, Path(), None

    def __init__(self, rows: Sequence[Row], held: Sequence[Row]) -> None:
        self.rows, half = len(rows), -(-len(rows) // 2)
        self.parts = [table(rows[:half]), table(rows[half:])] if rows else []
        self.held = [table([r]) for r in held]

    def progress(self, done: int, total: int) -> None:
        assert 0 < done <= total

    def tables(self, columns: Sequence[str] | None = None) -> Iterator[pa.Table]:
        for part in self.parts:
            yield part if columns is None else part.select(list(columns))

    def held_out(self, columns: Sequence[str] | None = None) -> Iterator[pa.Table]:
        for part in self.held:
            yield part if columns is None else part.select(list(columns))

    def values(self, columns: Sequence[str]) -> pa.Table:
        raise AssertionError("this judge needs no measure")


def row(name: str, prompt: str | None, answer: str | None, **more: Any) -> Row:
    turns = [message("user", prompt), message("assistant", answer)]
    base = {"row_id": name, "content_id": "c", "source": "a", "position": 0}
    return base | {"messages": turns} | more


def verdicts(rows: Sequence[Row], held: Sequence[Row], **fields: Any) -> list[Row]:
    found: list[Row] = NearHeldOut(**fields).judge(Parts(rows, held)).to_pylist()
    return found


def plain_sets(rows: Sequence[Row], which: View) -> list[set[tuple[str, ...]]]:
    texts = [words(text) for text in view(table(rows), which)]
    return [{tuple(said[i : i + 5]) for i in range(max(1, len(said) - 4))} if said else set() for said in texts]


def plain_best(rows: Sequence[Row], held: Sequence[Row]) -> list[float]:
    """Of each row the greatest Jaccard with any held-out row, by pair or by prompt."""
    best = [0.0] * len(rows)
    views: tuple[View, ...] = ("pair", "prompt")
    for which in views:
        others = plain_sets(held, which)
        for index, a in enumerate(plain_sets(rows, which)):
            best[index] = max(best[index], *(len(a & b) / len(a | b) for b in others if a & b), 0.0)
    return best


def test_a_row_goes_if_its_pair_or_its_prompt_is_near() -> None:
    prompt, answer, other = (" ".join(VOCABULARY[low : low + 40]) for low in (0, 40, 80))
    held = [row("h0", "nothing like it at all here", "no"), row("h1", prompt, answer)]
    found = verdicts(
        [row("same", prompt, answer), row("asked", prompt + " please", other), row("answered", other, answer)], held
    )
    assert [v["keep"] for v in found] == [False, False, True]
    assert [v["reason"] for v in found] == ["near_held_out", "near_held_out", None]
    assert json.loads(found[0]["evidence"]) == {"held_out": "h1", "similarity": 1, "view": "pair"}
    assert json.loads(found[1]["evidence"]) == {"held_out": "h1", "similarity": 36 / 37, "view": "prompt"}
    assert [v["score"] for v in found] == [1.0, 36 / 37, None]


def test_edited_rows_go_as_the_true_jaccard_says() -> None:
    rng = random.Random(4)

    def edited(text: str) -> str:
        return " ".join(rng.choice(VOCABULARY) if rng.random() < 0.04 else word for word in text.split())

    held = [row(f"h{i}", " ".join(rng.choices(VOCABULARY, k=30)), " ".join(rng.choices(VOCABULARY, k=30)))
            for i in range(60)]  # fmt: skip
    rows = []
    for i, source in enumerate(held * 3):
        asked, told = (turn["content"] for turn in source["messages"])
        rows.append(row(f"t{i}", edited(asked), edited(told) if i % 2 else " ".join(rng.choices(VOCABULARY, k=30))))
    truth = plain_best(rows, held)
    found = verdicts(rows, held)
    assert all(v["keep"] for v, best in zip(found, truth, strict=True) if best < 0.7)
    sure = [v for v, best in zip(found, truth, strict=True) if best >= 0.75]
    assert len(sure) > 60 and sum(not v["keep"] for v in sure) >= 0.98 * len(sure)
    assert all(v["keep"] or v["score"] == best for v, best in zip(found, truth, strict=True))


def test_short_empty_and_repeated_texts() -> None:
    held = [row("h0", "What is AI?", "x"), row("h1", "what is ai", "y"), row("h2", "", "")]
    rows = [row("t0", "What is AI", "z"), row("t1", "What is", "AI x"), row("t2", "", ""), row("t3", "What is", "z")]
    found = verdicts(rows, held)
    assert [v["keep"] for v in found] == [False, False, True, True]
    assert json.loads(found[0]["evidence"])["held_out"] == "h0"
    assert json.loads(found[1]["evidence"]) == {"held_out": "h0", "similarity": 1, "view": "pair"}


def test_without_held_out_rows_or_training_rows() -> None:
    rows = [row("t0", "q", "r"), row("t1", "q", "r")]
    assert [v["keep"] for v in verdicts(rows, [])] == [True, True]
    assert verdicts([], rows) == []
    for fields in ({"threshold": 0.0}, {"threshold": 2.0}, {"ngram": 0}):
        with pytest.raises(HouseError):
            NearHeldOut(**fields)
