"""Corpora in memory for the tests of duplicates. Load by path: `runpy.run_path(...)`."""

import random
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa

from gristmill.curation.rows import message, table

Row = dict[str, Any]
WORDS = [f"{a}{b}" for a in "bcdfghjklmnp" for b in range(40)]


class Live:
    """A corpus in memory, in two parts."""

    seed, tools = 0, None

    def __init__(
        self, rows: Sequence[Row], folder: Path, values: pa.Table | None = None, home: Path | None = None
    ) -> None:
        self.rows, self.measured, self.home = len(rows), values, home
        self.scratch = self.kept = Path(tempfile.mkdtemp(dir=folder))
        half = -(-len(rows) // 2)
        self.parts = [table(rows[:half]), table(rows[half:])] if rows else []

    def progress(self, done: int, total: int) -> None:
        assert 0 < done <= total

    def tables(self, columns: Sequence[str] | None = None) -> Iterator[pa.Table]:
        for part in self.parts:
            yield part if columns is None else part.select(list(columns))

    def held_out(self, columns: Sequence[str] | None = None) -> Iterator[pa.Table]:
        yield from ()

    def values(self, columns: Sequence[str]) -> pa.Table:
        if self.measured is None:
            raise KeyError(columns)
        return self.measured.select(list(columns))


def row(name: str, source: str, position: int, turns: Sequence[str]) -> Row:
    roles = ("user", "assistant")
    messages = [message(roles[i % 2], text) for i, text in enumerate(turns)]
    return {"row_id": name, "content_id": name, "source": source, "position": position, "messages": messages}


def edited(text: str, share: float, rng: random.Random) -> str:
    return " ".join(rng.choice(WORDS) if rng.random() < share else word for word in text.split())


def corpus(seed: int, families: int = 90, template: int = 60) -> list[Row]:
    """Conversations of 2 or 4 turns, copies edited more and less, equal rows, short turns, and rows of one template (a
    full bucket in most bands)."""
    rng = random.Random(seed)
    said: list[list[str]] = []
    for _ in range(families):
        turns = [" ".join(rng.choices(WORDS, k=rng.randint(2, 40))) for _ in range(rng.choice([2, 4]))]
        said += [[edited(t, share, rng) for t in turns] for share in (0, *rng.choices([0, 0.01, 0.03, 0.06], k=3))]
        said.append([turns[0], "Thanks!", *turns[:1]])
    frame = rng.choices(WORDS, k=60)
    said += [[" ".join(frame), " ".join([*frame, *rng.choices(WORDS, k=rng.randint(1, 12))])] for _ in range(template)]
    rng.shuffle(said)
    return [row(f"r{i:04d}", rng.choice("abc"), i, turns) for i, turns in enumerate(said)]
