"""Skill-It: a case by hand, and a simulated learner that learns sooner with it than with equal shares."""

import math
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from gristmill.curation.folder import HouseError
from gristmill.curation.rows import digest
from gristmill.curation.selecting.selection import row_keys
from gristmill.curation.selecting.skill_it import Shelf, online_mixture, skill_it, skills_graph, updated

SKILLS = ("count", "add", "solve")


def shelf(sizes: list[int], seed: int = 0) -> Shelf:
    skill = np.repeat(np.arange(len(sizes)), sizes)
    names = pa.array([digest(str(n)) for n in range(len(skill))])
    return Shelf(row_keys(names), skill, np.ones(len(skill), np.bool_), seed)


def test_one_step_by_hand() -> None:
    graph = np.array([[1.0, 0.5], [0.0, 1.0]])
    found = updated(np.array([0.25, 0.75]), graph, np.array([2.0, 1.0]), 0.2)
    first, second = 0.25 * math.exp(0.2 * (1 * 2 + 0.5 * 1)), 0.75 * math.exp(0.2 * (0 * 2 + 1 * 1))
    assert found == pytest.approx([first / (first + second), second / (first + second)], rel=1e-12)
    assert updated(np.array([0.5, 0.5]), graph, np.array([1e6, 0.0]), 1.0) == pytest.approx([1, 0])
    assert updated(np.array([0.3, 0.7]), graph, np.zeros(2), 0.2) == pytest.approx([0.3, 0.7])


def test_rounds_multiply_and_windows_forget() -> None:
    graph = [[1, 0.5, 0], [0, 1, 0], [0, 0, 1]]
    told = [{"count": 1.0, "add": 2.0, "solve": 0.5}, {"count": 0.5, "add": 1.0, "solve": 3.0}]
    sums = np.array([[1 + 1, 2, 0.5], [0.5 + 0.5, 1, 3]])
    state, window = skill_it(SKILLS, graph, 0.3), skill_it(SKILLS, graph, 0.3, window=1)
    assert state.mixture() == pytest.approx(dict.fromkeys(SKILLS, 1 / 3))
    for losses in told:
        state, window = state.observed(losses), window.observed(losses)
    raised = np.exp(0.3 * sums.sum(axis=0))
    assert state.shares == pytest.approx(raised / raised.sum())
    last = np.exp(0.3 * sums[1])
    assert window.shares == pytest.approx(last / last.sum())
    assert skill_it(SKILLS, graph, 0.3, told[0]).shares == pytest.approx(
        skill_it(SKILLS, graph, 0.3).observed(told[0]).shares
    )


def test_the_graph_is_the_relative_drop_of_a_loss() -> None:
    after: dict[tuple[str, ...], list[float]] = {
        (): [4.0, 2.0, 1.0],
        ("count",): [1.0, 1.5, 1.0],
        ("add",): [4.5, 1.0, 0.9],
        ("solve",): [4.0, 2.0, 0.8],
    }
    runs: list[tuple[str, ...]] = []

    def run(skills: tuple[str, ...]) -> dict[str, float]:
        runs.append(skills)
        return dict(zip(SKILLS, after[skills], strict=True))

    assert skills_graph(SKILLS, run) == pytest.approx(np.array([[0.75, 0.25, 0], [0, 0.5, 0.1], [0, 0, 0.2]]))
    assert sorted(runs) == sorted(after)
    after |= {(a, b): [2.0, 0.5, 0.6] for a in SKILLS for b in SKILLS if a != b}
    pairs = skills_graph(SKILLS, run, pairs=True)
    assert pairs[0] == pytest.approx([0.75, 0.5, 0.25]) and pairs[2] == pytest.approx([0, 0.5, 0.2])
    assert skills_graph(SKILLS, run, targets=["solve"]) == pytest.approx(np.array([[0], [0.1], [0.2]]))


def test_rows_are_handed_out_once_and_dry_skills_leave_their_part() -> None:
    stock = shelf([10, 50, 200])
    seen: list[int] = []
    for expected in ([10, 15, 15], [0, 20, 20], [0, 15, 25], [0, 0, 40]):
        rows, stock = stock.drawn(np.full(3, 1 / 3), 40)
        counts = np.bincount(stock.skill[rows], minlength=3)
        assert counts.sum() == 40 and np.abs(counts - expected).max() <= 1
        seen += rows.tolist()
    assert len(set(seen)) == len(seen) == 160
    rows, stock = stock.drawn(np.array([1.0, 0, 0]), 1000)
    assert len(rows) == 100 and not stock.left.any()
    again, _ = shelf([10, 50, 200]).drawn(np.full(3, 1 / 3), 40)
    other, _ = shelf([10, 50, 200], seed=1).drawn(np.full(3, 1 / 3), 40)
    assert sorted(again.tolist()) == sorted(seen[:40]) != sorted(other.tolist())


class Learner:
    """The dynamics that the paper assumes: a row of skill i lowers the loss on skill j by a share of it,
    its influence A_ij."""

    def __init__(self, influence: np.ndarray) -> None:
        self.influence, self.loss = influence, np.ones(len(influence))

    def see(self, counts: np.ndarray) -> dict[str, float]:
        self.loss = self.loss * np.exp(-counts @ self.influence)
        return {f"s{j}": float(loss) for j, loss in enumerate(self.loss)}


def test_a_simulated_learner_ends_lower_than_with_equal_shares() -> None:
    names = [f"s{n}" for n in range(6)]
    won = []
    for seed in range(20):
        random = np.random.default_rng(seed)
        influence = np.diag(random.uniform(0.0005, 0.003, 6))
        influence += random.uniform(0, 0.002, (6, 6)) * (random.random((6, 6)) < 0.3)

        def run(skills: tuple[str, ...], influence: np.ndarray = influence) -> dict[str, float]:
            counts = np.array([100 / len(skills) if name in skills else 0.0 for name in names])
            return Learner(influence).see(counts)

        graph = skills_graph(names, run)
        assert graph == pytest.approx(1 - np.exp(-100 * influence))
        ends = []
        for eta in (1e-9, 0.5):
            learner, stock = Learner(influence), shelf([2000] * 6, seed)

            def train(rows: Any, number: int, learner: Learner = learner, stock: Shelf = stock) -> dict[str, float]:
                return learner.see(np.bincount(stock.skill[rows], minlength=6))

            start = skill_it(names, graph, eta, dict.fromkeys(names, 1.0))
            _, told = online_mixture(start, stock, 3000, 10, train)
            assert sum(len(one["rows"]) for one in told) == 3000
            assert len({row for one in told for row in one["rows"].tolist()}) == 3000
            ends.append(sum(told[-1]["losses"].values()))
        won.append(ends[1] < ends[0])
    assert sum(won) >= 15  # p = 0.02 by chance


def test_what_is_refused() -> None:
    with pytest.raises(HouseError, match="shape"):
        skill_it(SKILLS, np.ones((2, 3)))
    with pytest.raises(HouseError, match="no number below 0"):
        skill_it(SKILLS, -np.ones((3, 3)))
    with pytest.raises(HouseError, match="names of their own"):
        skill_it(("a", "a"), np.ones((2, 2)))
    with pytest.raises(HouseError, match="eta"):
        skill_it(SKILLS, np.ones((3, 3)), 0.0)
    with pytest.raises(HouseError, match="no finite loss of add, solve"):
        skill_it(SKILLS, np.ones((3, 3))).observed({"count": 1.0, "add": math.nan})
