"""Density-based pruning and SimCore against plain definitions."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gristmill.curation.judges.concept_density import DensityBasedPruning, complexities
from gristmill.curation.judges.similarity_coreset import SimCore, rounds_of_nearest
from gristmill.curation.rows import table
from tests.curation.test_contracts import Rows

Make = Callable[..., dict[str, Any]]


def unit(vectors: Any) -> Any:
    return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)


def test_complexity_is_intra_times_inter() -> None:
    random = np.random.default_rng(0)
    points, centres = unit(random.normal(size=(60, 5))), unit(random.normal(size=(4, 5)))
    labels = random.integers(0, 4, 60)
    distance = 1 - (points * centres[labels]).sum(axis=1)
    found = complexities(distance, labels, centres, neighbours=2)
    for c in range(4):
        intra = np.mean([1 - float(points[i] @ centres[c]) for i in range(60) if labels[i] == c])
        others = sorted(1 - float(centres[c] @ centres[o]) for o in range(4) if o != c)
        assert found[c] == pytest.approx(intra * np.mean(others[:2]), rel=1e-5)


def test_complex_clusters_give_more_and_their_least_typical_rows_first(tmp_path: Path, make_row: Make) -> None:
    rows = [make_row("a", i, "Tell me the exact time now please" + " ok" * (i % 2), "noon") for i in range(50)]
    topics = ["river boats", "stone walls", "music halls", "green tea", "old clocks", "paper birds", "salt lakes"]
    rows += [
        make_row("a", 50 + i, f"Explain {topics[i % 7]} and {topics[(i * 3 + 1) % 7]} number {i}", "words")
        for i in range(50)
    ]
    judge = DensityBasedPruning(budget=30, k=2, dims=8, temperature=0.05)
    found = judge.judge(Rows(table(rows), judge, tmp_path))
    keep = np.array(found["keep"].to_pylist())
    proof = [json.loads(text) for text in found["evidence"].to_pylist()]
    assert keep.sum() == 30 and sum({p["cluster"]: p["quota"] for p in proof}.values()) == 30
    simple = proof[0]["cluster"]
    assert keep[50:].sum() > keep[:50].sum() and {p["cluster"] for p in proof[:50]} == {simple}
    for cluster in (0, 1):
        members = [i for i in range(100) if proof[i]["cluster"] == cluster]
        scores = found["score"].to_pylist()
        kept = [scores[i] for i in members if keep[i]]
        lost = [scores[i] for i in members if not keep[i]]
        assert not kept or not lost or min(kept) >= max(lost)
    order = np.random.default_rng(1).permutation(100)
    again = judge.judge(Rows(table([rows[i] for i in order]), judge, tmp_path))
    assert np.array(again["keep"].to_pylist()).tolist() == keep[order].tolist()


def plain_rounds(points: Any, centres: Any, ties: Any, open_rows: Any) -> Any:
    """Each centre in turn takes its nearest free row, round after round."""
    taken = np.zeros(len(points), int)
    number = 0
    while (free := open_rows & (taken == 0)).any():
        number += 1
        for centre in centres:
            free = np.flatnonzero(open_rows & (taken == 0))
            if len(free):
                best = min(free, key=lambda i: (-np.float32(centre @ points[i]), ties[i]))
                taken[best] = number
    return taken


def test_rounds_of_nearest_equal_the_plain_rule() -> None:
    random = np.random.default_rng(4)
    points, centres = unit(random.normal(size=(90, 6))), unit(random.normal(size=(7, 6)))
    points[10] = points[11]
    ties, open_rows = random.permutation(90).astype(np.uint64), random.random(90) > 0.1
    taken, near = rounds_of_nearest(points, centres, ties, open_rows)
    assert taken.tolist() == plain_rounds(points, centres, ties, open_rows).tolist()
    chosen = np.flatnonzero(taken)
    np.testing.assert_allclose(near.best[chosen], (points[chosen] * centres[near.centre[chosen]]).sum(1), atol=1e-6)


def test_simcore_takes_what_is_near_and_may_stop_early(tmp_path: Path, make_row: Make) -> None:
    rows = [make_row("a", i, f"Compute the sum of {i} and {i + 3} in arithmetic", "3") for i in range(20)]
    rows += [make_row("a", 20 + i, f"Write a poem about river number {i} in spring", "roses") for i in range(60)]
    target = tmp_path / "wanted.jsonl"
    lines = [{"prompt": f"Compute the sum of {i} and 8 in arithmetic", "completion": "x"} for i in range(40, 50)]
    target.write_text("".join(json.dumps(line) + "\n" for line in lines))
    judge = SimCore(budget=15, targets=(str(target),), k=3, dims=8)
    found = judge.judge(Rows(table(rows), judge, tmp_path))
    keep = np.array(found["keep"].to_pylist())
    assert keep.sum() == 15 and not keep[20:].any()
    patient = SimCore(budget=60, targets=(str(target),), k=3, dims=8, ratio=0.8)
    with pytest.warns(UserWarning, match="rows are near the targets; the budget was 60 rows"):
        stopped = np.array(patient.judge(Rows(table(rows), patient, tmp_path))["keep"].to_pylist())
    assert 3 <= stopped.sum() <= 20 and stopped[20:].sum() == 0
