"""Mixing by source and task against plain Python: caps, shares, temperatures, stages, ablations."""

import json
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from gristmill.curation.folder import HouseError
from gristmill.curation.judges.mixing import Cap, Mixture, SourceAblation, StageMixture
from gristmill.curation.measures.length import Length
from gristmill.curation.rows import ROW, table
from gristmill.curation.selecting.mixing import ablations, groups, largest_budget, mixture_quotas, shares
from gristmill.curation.steps import VERDICT

Make = Callable[..., dict[str, Any]]
SIZES = {"code": 40, "maths": 160, "talk": 600}


class Given:
    """A corpus of rows that lie in memory, in parts."""

    seed, scratch, kept = 0, Path(), Path()

    def __init__(self, *parts: pa.Table, first: pa.Table | None = None) -> None:
        self.parts, self.first, self.tools = parts, first, self
        self.rows = sum(part.num_rows for part in parts)

    def tables(self, columns: Sequence[str] | None = None) -> Iterator[pa.Table]:
        return (part if columns is None else part.select(list(columns)) for part in self.parts)

    def values(self, columns: Sequence[str]) -> pa.Table:
        found = [Length().measure(part, self, lambda done, total: None) for part in self.parts]  # type: ignore[arg-type]
        return pa.concat_tables(found).select(list(columns))

    def curated(self, set_name: str, split: str) -> Iterator[pa.Table]:
        assert (set_name, split) == ("skills", "train") and self.first is not None
        yield self.first


@pytest.fixture
def rows(make_row: Make) -> pa.Table:
    made = []
    for source, size in SIZES.items():
        for n in range(size):
            task = json.dumps({"task": f"t{n % 3}", "level": n % 2})
            made.append(make_row(source, n, f"{source} {n}", "word " * (n % 7), meta=task if n % 10 else None))
    return table(made)


def judged(step: Any, *parts: pa.Table, first: pa.Table | None = None) -> list[dict[str, Any]]:
    found = step.judge(Given(*parts, first=first))
    assert found.schema == VERDICT and found.num_rows == sum(part.num_rows for part in parts)
    said: list[dict[str, Any]] = found.to_pylist()
    for verdict in said:
        verdict["evidence"] = verdict["evidence"] and json.loads(verdict["evidence"])
        assert verdict["keep"] == (verdict["reason"] is None)
    return said


def kept(step: Any, *parts: pa.Table, first: pa.Table | None = None) -> list[dict[str, Any]]:
    whole = pa.concat_tables(parts)
    said = judged(step, *parts, first=first)
    return [row for row, verdict in zip(whole.to_pylist(), said, strict=True) if verdict["keep"]]


def of(chosen: list[dict[str, Any]]) -> dict[str, int]:
    return dict(Counter(row["source"] for row in chosen))


STEPS = [
    Cap(50),
    Cap({"talk": 7}),
    Cap(30, by="task"),
    Mixture(100),
    Mixture(99, {"code": 1, "talk": 2}),
    Mixture(temperature=3.0),
    Mixture(500, unit="words"),
    SourceAblation(only="maths"),
    SourceAblation(without="talk"),
]


@pytest.mark.parametrize("step", STEPS, ids=repr)
def test_order_and_parts_do_not_matter_and_the_seed_does(step: Any, rows: pa.Table) -> None:
    names = {row["row_id"] for row in kept(step, rows)}
    turned = rows.take(np.random.default_rng(1).permutation(rows.num_rows))
    assert names == {row["row_id"] for row in kept(step, turned.slice(0, 111), turned.slice(111))}
    other = {row["row_id"] for row in kept(type(step)(**{**vars(step), "seed": 9}), rows)}
    assert names != other and 0 < len(names) < rows.num_rows
    assert judged(step, ROW.empty_table()) == []


def test_caps_by_source_task_and_key(rows: pa.Table) -> None:
    assert of(kept(Cap(50), rows)) == {"code": 40, "maths": 50, "talk": 50}
    assert of(kept(Cap({"talk": 7, "maths": 0}), rows)) == {"code": 40, "talk": 7}
    tasks = Counter(json.loads(row["meta"])["task"] if row["meta"] else "" for row in rows.to_pylist())
    chosen = Counter(json.loads(row["meta"])["task"] if row["meta"] else "" for row in kept(Cap(30, "task"), rows))
    assert set(tasks) == {"", "t0", "t1", "t2"} and min(tasks.values()) > 30
    assert chosen == dict.fromkeys(tasks, 30) | {"": tasks[""]}  # rows without a task are not of one
    with pytest.warns(UserWarning, match="no row is of nobody"):
        assert len(kept(Cap({"nobody": 1}), rows)) == rows.num_rows
    for verdict in judged(Cap(50), rows):
        if verdict["keep"]:
            assert verdict["evidence"] is None
        else:
            assert verdict["reason"] == "over_cap" and verdict["evidence"]["cap"] == 50
            assert 50 < verdict["evidence"]["rank"] <= SIZES[verdict["evidence"]["group"]]
    with pytest.raises(HouseError, match="at least 0"):
        Cap(-1)


def test_every_row_is_as_likely_to_be_kept_under_a_cap(rows: pa.Table) -> None:
    counts = Counter(row["row_id"] for seed in range(200) for row in kept(Cap(10, seed=seed), rows.slice(0, 40)))
    drawn = np.array([counts[name] for name in rows["row_id"].to_pylist()[:40]])
    assert drawn.sum() == 2000
    assert ((drawn - 50) ** 2 / 50).sum() < 72.1  # chi squared, 39 degrees of freedom, p = 0.001


def test_groups_of_meta_values_that_are_no_text(rows: pa.Table) -> None:
    number, names = groups(Given(rows), "level")  # type: ignore[arg-type]
    assert names == ["", "0", "1"]
    said = [json.loads(row["meta"])["level"] if row["meta"] else "" for row in rows.to_pylist()]
    assert [names[n] for n in number] == [str(value) for value in said]


def test_shares_by_size_weight_and_temperature() -> None:
    names, sizes = list(SIZES), np.array(list(SIZES.values()))
    assert shares("proportional", names, sizes) == pytest.approx(sizes / 800)
    assert shares("proportional", names, sizes, cap=100) == pytest.approx(np.array([40, 100, 100]) / 240)
    root = np.sqrt(sizes)
    assert shares("proportional", names, sizes, temperature=2) == pytest.approx(root / root.sum())
    assert shares("proportional", names, sizes, temperature=1e9) == pytest.approx([1 / 3] * 3, abs=1e-6)
    assert shares("equal", names, sizes) == pytest.approx([1 / 3] * 3)
    assert shares({"code": 3, "talk": 1, "none": 5}, names, sizes) == pytest.approx([0.75, 0, 0.25])
    assert shares("equal", names, np.array([0, 1, 1])) == pytest.approx([0, 0.5, 0.5])
    assert np.isfinite(shares("proportional", names, np.array([10**15, 1, 0]), temperature=0.01)).all()


def test_quotas_are_exact_shares_and_dry_groups_leave_theirs_to_the_others() -> None:
    sizes = np.array([40, 160, 600])
    assert mixture_quotas(np.array([0.25, 0.25, 0.5]), sizes, 100).tolist() == [25, 25, 50]
    assert mixture_quotas(np.array([0.5, 0.25, 0.25]), sizes, 400).tolist() == [40, 160, 200]
    assert mixture_quotas(np.array([0.5, 0.5, 0.0]), sizes, 10_000).tolist() == [40, 160, 0]
    assert mixture_quotas(np.array([0.999, 0.001, 0.0]), sizes, 10).tolist() == [10, 0, 0]
    random = np.random.default_rng(0)
    for _ in range(200):
        share = random.dirichlet(np.ones(4))
        held, budget = random.integers(0, 50, 4), int(random.integers(1, 120))
        found = mixture_quotas(share, held, budget)
        assert found.sum() == min(budget, held.sum()) and (found >= 0).all() and (found <= held).all()
        if (np.ceil(share * budget) <= held).all():  # nobody runs dry: largest remainders
            whole = np.floor(share * budget).astype(int)
            extra = np.argsort(-(share * budget - whole), kind="stable")[: budget - whole.sum()]
            whole[extra] += 1
            assert found.tolist() == whole.tolist()


def test_mixtures(rows: pa.Table) -> None:
    assert of(kept(Mixture(80), rows)) == {"code": 4, "maths": 16, "talk": 60}
    assert of(kept(Mixture(120, "equal"), rows)) == {"code": 40, "maths": 40, "talk": 40}
    assert of(kept(Mixture(300, "equal"), rows)) == {"code": 40, "maths": 130, "talk": 130}
    assert of(kept(Mixture(100, {"code": 1, "talk": 3}), rows)) == {"code": 25, "talk": 75}
    assert of(kept(Mixture(None, {"code": 1, "talk": 3}), rows)) == {"code": 40, "talk": 120}
    assert of(kept(Mixture(240, cap=100), rows)) == {"code": 40, "maths": 100, "talk": 100}
    with pytest.warns(UserWarning, match="budget 900 of 200 rows"):
        assert of(kept(Mixture(900, {"code": 1, "maths": 3}), rows)) == {"code": 40, "maths": 160}
    for verdict in judged(Mixture(80), rows):
        proof = verdict["evidence"]
        assert proof["quota"] == SIZES[proof["group"]] // 10 and verdict["keep"] == (proof["rank"] <= proof["quota"])
    with (
        pytest.raises(HouseError, match="no row is of a group that has a weight; there are code, maths, talk"),
        pytest.warns(UserWarning, match="no row is of nobody"),
    ):
        judged(Mixture(9, {"nobody": 1}), rows)
    for bad in ({"budget": 0}, {"temperature": 0}, {"weights": {"a": -1}}, {"weights": {"a": 0}}, {"cap": 0},
                {"cap": 5, "weights": "equal"}, {"unit": "tokens"}):  # fmt: skip
        with pytest.raises(HouseError):
            Mixture(**{"budget": 10} | bad)  # type: ignore[arg-type]


def test_a_budget_in_words_is_spent_by_shares(rows: pa.Table) -> None:
    chosen = kept(Mixture(600, "equal", unit="words"), rows)
    spent: Counter[str] = Counter()
    for row in chosen:
        spent[row["source"]] += max(1, len(row["messages"][1]["content"].split()))
    assert sum(spent.values()) in range(594, 601)
    assert spent["maths"] == pytest.approx(spent["talk"], abs=14)


def test_largest_budget() -> None:
    assert largest_budget(np.array([0.25, 0.75, 0]), np.array([40, 600, 5])) == 160
    assert largest_budget(np.zeros(2), np.array([1, 2])) == 0


def test_the_second_stage_takes_a_share_of_what_the_first_trained_on(rows: pa.Table) -> None:
    first = rows.slice(0, 180)  # of code all, of maths 140
    step = StageMixture("skills", share=0.1)
    chosen = kept(step, rows, first=first)
    learnt = set(first["row_id"].to_pylist())
    assert len([row for row in chosen if row["row_id"] in learnt]) == 18
    assert of(chosen)["talk"] == 600 and len(chosen) == 618
    said = judged(step, rows, first=first)
    reasons = Counter(verdict["reason"] for verdict in said)
    assert reasons == {None: 618, "not_selected": 162, "not_in_first_stage": 20}
    for verdict in said:
        if verdict["evidence"]:
            assert verdict["evidence"]["quota"] == 18 and verdict["keep"] == (verdict["evidence"]["rank"] <= 18)
    assert sum(verdict["evidence"] is not None for verdict in said) == 180
    assert len(kept(StageMixture("skills", share=0), rows, first=first)) == 600
    assert len(kept(StageMixture("skills", share=1), rows, first=first)) == 780
    with pytest.raises(HouseError, match="between 0 and 1"):
        StageMixture("skills", share=2)


def test_ablations_are_equal_in_size_and_never_mix_what_they_part(rows: pa.Table) -> None:
    ids, sources = rows["row_id"], rows["source"].to_pylist()
    found = {one.name: one for one in ablations(ids, sources)}
    assert list(found) == ["all", "only-code", "only-maths", "only-talk", "without-code", "without-maths",
                           "without-talk"]  # fmt: skip
    assert {one.cost for one in found.values()} == {40} and {len(one.rows) for one in found.values()} == {40}
    for one in found.values():
        held = {sources[i] for i in one.rows}
        expected = {one.source} if one.kind == "only" else set(SIZES) - {one.source}
        assert held == expected and len(set(one.rows.tolist())) == 40
    costs = np.arange(800) % 13 + 1
    for one in ablations(ids, sources, costs, budget=200):
        assert 200 - 13 < one.cost <= 200 and one.cost == costs[one.rows].sum()
    with pytest.raises(HouseError, match="can spend 40"):
        ablations(ids, sources, budget=41)
    for kind in ("only", "without"):
        for name in SIZES:
            chosen = {row["row_id"] for row in kept(SourceAblation(**{kind: name}), rows)}  # type: ignore[arg-type]
            assert chosen == set(ids.take(pa.array(found[f"{kind}-{name}"].rows)).to_pylist())
    assert of(kept(SourceAblation(), rows)).keys() == SIZES.keys()
    with pytest.raises(HouseError, match="no row is of source 'x'; there are code, maths, talk"):
        judged(SourceAblation(only="x"), rows)
    with pytest.raises(HouseError, match="can spend 40 rows, not 50"):
        judged(SourceAblation(only="talk", budget=50), rows)
