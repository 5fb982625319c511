"""Round robin over targets against a plain loop: turns, exact budgets, ties, independence of order and parts."""

import json
import random
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from gristmill.curation.folder import HouseError
from gristmill.curation.judges.representative import RepresentationSimilarity
from gristmill.curation.rows import table
from gristmill.curation.selecting import round_robin as module
from gristmill.curation.selecting.round_robin import round_robin

Make = Callable[..., dict[str, Any]]


def plain(
    cosines: np.ndarray, costs: np.ndarray, budget: int, open_rows: np.ndarray, ties: np.ndarray
) -> list[tuple[int, int]]:
    """(row, target) in the order of taking."""
    taken: list[tuple[int, int]] = []
    free = set(np.flatnonzero(open_rows).tolist())
    while True:
        before = len(taken)
        for target in range(len(cosines)):
            able = [row for row in free if costs[row] <= budget]
            if able:
                row = min(able, key=lambda r: (-cosines[target, r], ties[r]))
                taken.append((row, target))
                free.discard(row)
                budget -= int(costs[row])
        if len(taken) == before:
            return taken


@pytest.mark.parametrize("seed", range(12))
def test_turns_are_those_of_a_plain_loop(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    draw = np.random.default_rng(seed)
    monkeypatch.setattr(module, "SPARE", 1)  # lists that are too short at first
    rows, targets = int(draw.integers(1, 300)), int(draw.integers(1, 9))
    points = draw.integers(-2, 3, (rows, 3)).astype(np.float32)  # whole numbers: exact products, many ties
    wanted = draw.integers(-2, 3, (targets, 3)).astype(np.float32)
    costs = np.ones(rows, np.int64) if seed % 2 else draw.integers(1, 9, rows)
    open_rows = draw.random(rows) < 0.9
    ties = draw.permutation(rows).astype(np.uint64)
    budget = int(draw.integers(1, 200))
    found = round_robin(points, wanted, costs, budget, open_rows, ties)
    want = plain(wanted @ points.T, costs, budget, open_rows, ties)
    assert [(int(row), int(found.target[row])) for row in found.rows] == want
    assert all(found.similarity[row] == wanted[target] @ points[row] for row, target in want)
    rest = np.setdiff1d(np.arange(rows), found.rows)
    assert np.array_equal(found.similarity[rest], (wanted @ points.T).max(axis=0)[rest])


class Rows:
    """A corpus in parts."""

    seed = 0

    def __init__(self, rows: list[dict[str, Any]], part: int = 1000) -> None:
        self.all, self.part, self.rows = rows, part, len(rows)

    def tables(self, columns: Sequence[str]) -> Iterator[pa.Table]:
        for start in range(0, len(self.all), self.part):
            yield table(self.all[start : start + self.part]).select(list(columns))


@pytest.fixture
def rows(make_row: Make) -> list[dict[str, Any]]:
    topics = ["knead dough yeast oven", "nova comet orbit dwarf", "rook pawn queen bishop"]
    return [make_row("a", n, f"{topics[n % 3]} item{n} {'more ' * (n % 5)}", f"answer {n}") for n in range(90)]


@pytest.fixture
def targets(tmp_path: Path) -> str:
    path = tmp_path / "targets.jsonl"
    asked = ["how long must dough and yeast stand in the oven", "which comet has an orbit near a dwarf"]
    path.write_text("".join(json.dumps({"prompt": text, "response": ""}) + "\n" for text in asked))
    return str(path)


@pytest.mark.parametrize("budget", [1, 2, 7, 40, 89])
def test_each_target_gets_its_share_of_an_exact_budget(rows: list[dict[str, Any]], targets: str, budget: int) -> None:
    judge = RepresentationSimilarity(budget, (targets,), dims=32, view="prompt")
    found = judge.judge(Rows(rows)).to_pylist()  # type: ignore[arg-type]
    proof = [json.loads(verdict["evidence"]) for verdict in found]
    kept = [index for index, verdict in enumerate(found) if verdict["keep"]]
    assert len(kept) == budget and sorted(proof[index]["rank"] for index in kept) == list(range(1, budget + 1))
    assert all(proof[index]["target"] == (proof[index]["rank"] - 1) % 2 for index in kept), "they take turns"
    assert {verdict["reason"] for verdict in found if not verdict["keep"]} == {"not_selected"}
    assert all(p["budget"] == budget for p in proof)
    if budget <= 40:
        assert all(index % 3 == proof[index]["target"] for index in kept), "bread for bread, stars for stars"


def test_order_and_parts_do_not_matter(rows: list[dict[str, Any]], targets: str) -> None:
    judge = RepresentationSimilarity(25, (targets,), dims=16)
    first = judge.judge(Rows(rows)).to_pylist()  # type: ignore[arg-type]
    order = random.Random(0).sample(range(len(rows)), len(rows))
    again = judge.judge(Rows([rows[i] for i in order], part=7)).to_pylist()  # type: ignore[arg-type]
    assert [first[i] for i in order] == again


def test_refuses_what_cannot_be_done(rows: list[dict[str, Any]], tmp_path: Path) -> None:
    for wrong in ({"budget": 0}, {"dims": 0}, {"unit": "tokens"}):
        with pytest.raises(HouseError):
            RepresentationSimilarity(**{"budget": 5, "targets": ("x",)} | wrong)
    with pytest.raises(HouseError):
        RepresentationSimilarity(5, (str(tmp_path / "absent.jsonl"),)).judge(Rows(rows))  # type: ignore[arg-type]
