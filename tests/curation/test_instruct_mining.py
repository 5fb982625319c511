"""InstructMining: MTLD against plain Python, least squares against the textbook's formulas, the budget met exactly."""

import json
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from gristmill.curation.folder import HouseError
from gristmill.curation.judges.instruct_mining import InstructMining
from gristmill.curation.measures.indicators import Indicators
from gristmill.curation.measures.length import Length
from gristmill.curation.rows import ROW, table
from gristmill.curation.selecting.loss_rule import FIRST, fit_rule, neighbour_distance

Make = Callable[..., dict[str, Any]]


def naive_mtld(words: list[str]) -> float | None:
    def factors(words: list[str]) -> float:
        count, seen = 0.0, []
        for word in words:
            seen.append(word)
            if len(set(seen)) / len(seen) < 0.72:
                count, seen = count + 1, []
        if seen:
            count += (1 - len(set(seen)) / len(seen)) / (1 - 0.72)
        return len(words) / (count or 1)

    return (factors(words) + factors(words[::-1])) / 2 if words else None


def measured(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = Indicators().measure(table(rows), None, lambda done, total: None).to_pylist()  # type: ignore[arg-type]
    return found


def test_diversity_equals_plain_python(make_row: Make) -> None:
    draw = np.random.default_rng(0)
    texts = ["", "one", "one two three", "the the the the", "A a B b, a!"]
    texts += [" ".join(f"w{n}" for n in draw.zipf(1.5, size)) for size in draw.integers(1, 400, 60)]
    rows = [make_row("a", n, "some words here", text) for n, text in enumerate(texts)]
    for text, found in zip(texts, measured(rows), strict=True):
        words = text.lower().replace(",", "").replace("!", "").split()
        assert found["mtld"] == pytest.approx(naive_mtld(words)) and found["output_length"] == len(words)
        assert found["input_length"] == 3


def runs(seed: int, size: int, noise: float) -> tuple[list[dict[str, float]], dict[str, float]]:
    draw = np.random.default_rng(seed)
    truth = {"reward": -0.15, "output_length": 8e-5, "knn_6": -0.9}
    made = []
    for _ in range(size):
        run = {"reward": draw.normal(0, 2), "output_length": draw.uniform(50, 900), "knn_6": draw.uniform(0.4, 1)}
        log_loss = 1.07 + sum(truth[name] * run[name] for name in truth) + draw.normal(0, noise)
        made.append(run | {"loss": float(np.exp(log_loss))})
    return made, truth


def test_recovers_a_planted_rule() -> None:
    made, truth = runs(0, 20, 0.0)
    rule = fit_rule(made, list(truth))
    assert dict(rule.terms) == pytest.approx(truth, rel=1e-9) and rule.intercept == pytest.approx(1.07)
    assert rule.r2 == pytest.approx(1) and rule.spread < 1e-12


def test_errors_are_those_of_least_squares() -> None:
    made, truth = runs(1, 60, 0.05)
    rule = fit_rule(made, list(truth))
    design = np.array([[1, *(run[name] for name in truth)] for run in made])
    target = np.log([run["loss"] for run in made])
    weights, squares, *_ = np.linalg.lstsq(design, target, rcond=None)
    variance = squares[0] / (60 - 4)
    errors = np.sqrt(variance * np.diag(np.linalg.inv(design.T @ design)))
    assert [rule.intercept, *dict(rule.terms).values()] == pytest.approx(weights.tolist(), rel=1e-8)
    assert [rule.intercept_error, *rule.errors] == pytest.approx(errors.tolist(), rel=1e-6)
    assert rule.spread == pytest.approx(np.sqrt(variance)) and rule.r2 == pytest.approx(
        1 - squares[0] / target.var() / 60
    )


def test_errors_cover_the_truth() -> None:
    inside = []
    for seed in range(200):
        made, truth = runs(seed, 30, 0.05)
        rule = fit_rule(made, list(truth))
        inside += [abs(w - truth[n]) < 2.056 * e for (n, w), e in zip(rule.terms, rule.errors, strict=True)]  # t(26)
    assert 0.92 < np.mean(inside) < 0.98


def test_refuses_runs_that_tell_nothing() -> None:
    made, _ = runs(0, 20, 0.1)
    twins = [run | {"twin": 2 * run["reward"] + 1} for run in made]
    for bad, names in ((made[:3], ["reward", "knn_6"]), (twins, ["reward", "twin"]), (made, ["mtld"]),
                       ([run | {"loss": 0.0} for run in made], ["reward"])):  # fmt: skip
        with pytest.raises(HouseError):
            fit_rule(bad, names)


def test_neighbours_are_those_of_brute_force() -> None:
    vectors = np.random.default_rng(0).normal(size=(300, 8))
    vectors = (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)
    all_pairs = np.linalg.norm(vectors[:, None] - vectors[None], axis=2)
    truth = np.sort(all_pairs, axis=1)[:, 6]
    assert np.allclose(neighbour_distance(vectors, 6, block=64), truth, atol=1e-3)
    assert np.isnan(neighbour_distance(vectors[:6], 6)).all()


class Rows:
    """A corpus in parts, its measures made on demand."""

    seed = 0

    def __init__(self, rows: list[dict[str, Any]], judge: InstructMining, part: int = 1000) -> None:
        self.all, self.part, self.rows, self.needs = rows, part, len(rows), judge.needs

    def tables(self, columns: Sequence[str] | None = None) -> Iterator[pa.Table]:
        for start in range(0, len(self.all), self.part):
            yield table(self.all[start : start + self.part]).select(list(columns or ROW.names))

    def values(self, columns: Sequence[str]) -> pa.Table:
        found: dict[str, Any] = {}
        for measure in self.needs:
            values = measure.measure(table(self.all), None, lambda done, total: None)  # type: ignore[arg-type]
            found |= {name: values[name] for name in values.column_names}
        return pa.table(found).select(list(columns))


def judged(rows: list[dict[str, Any]], judge: InstructMining, part: int = 1000) -> dict[str, dict[str, Any]]:
    verdicts = judge.judge(Rows(rows, judge, part)).to_pylist()  # type: ignore[arg-type]
    return {row["row_id"]: verdict for row, verdict in zip(rows, verdicts, strict=True)}


def test_keeps_the_lowest_predictions_exactly(make_row: Make) -> None:
    draw = np.random.default_rng(0)
    rows = [
        make_row("a", n, f"q{n % 7}", " ".join(f"w{k}" for k in draw.integers(0, 50, draw.integers(0, 60))))
        for n in range(80)
    ]
    judge = InstructMining(25, rule=(("output_length", 0.01), ("mtld", -0.02), ("prompt_words", 1.0)), of=(Length(),))
    found = judged(rows, judge)
    wanted = {}
    for row, values in zip(rows, measured(rows), strict=True):
        if values["mtld"] is not None:
            wanted[row["row_id"]] = 1.0694 + 0.01 * values["output_length"] - 0.02 * values["mtld"] + 1
    best = sorted(wanted, key=wanted.__getitem__)
    kept = {name for name, verdict in found.items() if verdict["keep"]}
    assert len(kept) == 25 and max(wanted[name] for name in kept) <= min(
        wanted[name] for name in best if name not in kept
    )
    for name, verdict in found.items():
        if name in wanted:
            assert verdict["score"] == pytest.approx(wanted[name]) and json.loads(verdict["evidence"])["quota"] == 25
        else:
            assert verdict["reason"] == "not_scorable" and verdict["evidence"] is None
    assert found == judged(rows[::-1], judge, part=13)


def test_the_default_prefers_rows_apart_from_others(make_row: Make) -> None:
    same = [make_row("a", n, "How do I bake good bread at home?", "Knead it.") for n in range(20)]
    others = [f"{w} {w}er {w}ing" for w in ("ocean", "violin", "quark", "tax", "goat", "glacier", "sonnet", "enzyme")]
    rows = [*same, *(make_row("a", 20 + n, text, "Knead it.") for n, text in enumerate(others))]
    found = judged(rows, InstructMining(8))
    assert {name for name, verdict in found.items() if verdict["keep"]} == {row["row_id"] for row in rows[20:]}
    assert dict(FIRST[1])["knn_6"] == dict(InstructMining(8).rule)["knn_6"]
    for wrong in ({"rule": (("nothing", 1.0),)}, {"rule": ()}, {"rule": (("mtld", 1.0), ("mtld", 2.0))}):
        with pytest.raises(HouseError):
            InstructMining(8, **wrong)
