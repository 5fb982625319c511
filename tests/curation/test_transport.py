"""Optimal transport against a dense solver in float64, a linear program and its own symmetries; GOT-D on topics."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy.optimize import linear_sum_assignment
from scipy.special import logsumexp

from gristmill.curation.folder import HouseError
from gristmill.curation.judges.optimal_transport import GotD
from gristmill.curation.rows import table
from gristmill.curation.selecting import transport as module
from gristmill.curation.selecting.transport import gradient, transport
from tests.curation.test_contracts import Rows

Make = Callable[..., dict[str, Any]]


def cloud(seed: int, n: int, d: int = 8, shift: float = 0.0) -> Any:
    return (np.random.default_rng(seed).normal(size=(n, d)) + shift).astype(np.float32)


def dense(x: Any, y: Any, a: Any, b: Any, epsilon: float, passes: int = 5000) -> tuple[Any, Any]:
    """Sinkhorn in the log domain on the whole matrix, in float64."""
    cost = ((x[:, None, :].astype(np.float64) - y[None]) ** 2).sum(-1)
    epsilon = epsilon * float(a @ cost @ b)
    g = np.zeros(len(y))
    for _ in range(passes):
        f = -epsilon * logsumexp((g - cost) / epsilon + np.log(b), axis=1)
        g = -epsilon * logsumexp((f[:, None] - cost) / epsilon + np.log(a)[:, None], axis=0)
    return f, g


@pytest.mark.parametrize("epsilon", [0.02, 0.1])
def test_potentials_equal_a_dense_solver(epsilon: float) -> None:
    x, y = cloud(0, 700), cloud(1, 60, shift=0.5)
    random = np.random.default_rng(2)
    a, b = (weights / weights.sum() for weights in (random.random(700) + 0.1, random.random(60) + 0.1))
    found = transport(x, y, a, b, epsilon, tolerance=1e-6, most=3000)
    f, g = dense(x, y, a, b, epsilon)
    assert found.error <= 1e-6
    np.testing.assert_allclose(gradient(found.rows), gradient(f), atol=1e-3)
    np.testing.assert_allclose(found.columns - found.columns.mean(), g - g.mean(), atol=1e-3)


def test_the_dual_reaches_the_linear_program() -> None:
    x, y = cloud(3, 50), cloud(4, 50, shift=0.3)
    cost = ((x[:, None, :].astype(np.float64) - y[None]) ** 2).sum(-1)
    rows, columns = linear_sum_assignment(cost)
    found = transport(x, y, epsilon=2e-4, tolerance=1e-4, most=20_000)
    assert found.rows.mean() + found.columns.mean() == pytest.approx(cost[rows, columns].mean(), rel=2e-3)


def test_symmetries(monkeypatch: pytest.MonkeyPatch) -> None:
    x, y = cloud(5, 1500), cloud(6, 40)
    found = transport(x, y, tolerance=1e-5)
    order = np.random.default_rng(0).permutation(1500)
    np.testing.assert_allclose(transport(x[order], y, tolerance=1e-5).rows, found.rows[order], atol=1e-4)
    np.testing.assert_allclose(gradient(found.rows + 7.0), gradient(found.rows), atol=1e-9)
    monkeypatch.setattr(module, "KEEP", 0)  # costs computed again in each pass
    assert (transport(x, y, tolerance=1e-5).rows == found.rows).all()
    monkeypatch.setattr("gristmill.curation.duplicates.shingles.processors", lambda: 1)
    assert (transport(x, y, tolerance=1e-5).rows == found.rows).all()


def test_far_clouds_stay_finite() -> None:
    x = np.concatenate([cloud(7, 300), cloud(8, 3, shift=100.0)])
    y = np.concatenate([cloud(9, 20), cloud(10, 20, shift=-60.0)])
    found = transport(x, y, epsilon=0.005)
    assert np.isfinite(found.rows).all() and np.isfinite(found.columns).all() and found.error <= 1e-3
    # one potential follows from the other, so mass that must travel is told apart from mass that need not
    assert gradient(found.rows)[300:].min() > gradient(found.rows)[:300].max()


def energy(x: Any, y: Any) -> float:
    """Energy distance between two samples: 0 only for equal distributions."""

    def mean(p: Any, q: Any) -> float:
        return float(np.sqrt(np.maximum(((p[:, None] - q[None]) ** 2).sum(-1), 0)).mean())

    return 2 * mean(x, y) - mean(x, x) - mean(y, y)


def test_the_mix_comes_nearer_to_the_target_than_by_nearest_or_random_rows() -> None:
    """METHODS: six Gaussian topics, the target's mix inverted; half base mix, half selection, in most of ten seeds."""
    wins_random = wins_nearest = 0
    for seed in range(10):
        random = np.random.default_rng(seed)
        centres = random.normal(size=(6, 8)) * 2
        share = np.array([0.4, 0.25, 0.15, 0.1, 0.06, 0.04])
        topic = random.choice(6, 1500, p=share)
        wanted = random.choice(6, 150, p=share[::-1])
        x = (centres[topic] + random.normal(size=(1500, 8))).astype(np.float32)
        y = (centres[wanted] + random.normal(size=(150, 8))).astype(np.float32)
        held = centres[random.choice(6, 300, p=share[::-1])] + random.normal(size=(300, 8))
        order = np.argsort(gradient(transport(x, y).rows))[:150]
        near = np.argsort(((x[:, None] - y[None]) ** 2).sum(-1).min(axis=1))[:150]
        drawn = random.permutation(1500)[:150]
        base = x[random.permutation(1500)[:150]]
        by = [energy(np.concatenate([base, x[some]]), held) for some in (order, near, drawn)]
        wins_nearest += by[0] < by[1]
        wins_random += by[0] < by[2]
    assert wins_random >= 8 and wins_nearest >= 8, (wins_random, wins_nearest)


def test_rows_like_the_targets_are_selected(tmp_path: Path, make_row: Make) -> None:
    rows = [make_row("a", i, f"Compute the sum of {i} and {i + 3} in arithmetic", str(2 * i + 3)) for i in range(30)]
    rows += [make_row("a", 30 + i, f"Write a poem about the river number {i} in spring", "roses") for i in range(70)]
    target = tmp_path / "wanted.jsonl"
    target.write_text(
        "".join(json.dumps({"prompt": f"Compute the sum of {i} and 8 in arithmetic", "completion": "x"}) + "\n"
                for i in range(40, 60))
    )  # fmt: skip
    judge = GotD(budget=12, targets=(str(target),), dims=8, rounds=3)
    found = judge.judge(Rows(table(rows), judge, tmp_path))
    keep = np.array(found["keep"].to_pylist())
    assert keep.sum() == 12 and keep[:30].sum() >= 11
    proof = [json.loads(text) for text in found["evidence"].to_pylist()]
    assert sorted(p["rank"] for p in proof) == list(range(1, 101))
    assert {p.get("round") for p, kept in zip(proof, keep, strict=True) if kept} == {1, 2, 3}
    assert all((p["rank"] <= 12) == kept for p, kept in zip(proof, keep, strict=True))
    order = np.random.default_rng(1).permutation(100)
    again = judge.judge(Rows(table([rows[i] for i in order]), judge, tmp_path))
    assert np.array(again["keep"].to_pylist()).tolist() == keep[order].tolist()
    with pytest.raises(HouseError, match="no row has a prompt"):
        (tmp_path / "t.jsonl").write_text('{"text": "just a document"}\n')
        GotD(budget=3, targets=(str(tmp_path / "t.jsonl"),)).judge(Rows(table(rows), judge, tmp_path))
