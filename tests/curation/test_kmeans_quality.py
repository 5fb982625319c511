"""kMQ: the budget is exact, every cluster is served, draws follow the softmax and depend on (seed, row_id) alone."""

import json
import math
import random
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gristmill.curation.folder import HouseError
from gristmill.curation.judges.kmeans_quality import KMeansQuality, clusters, gumbel, quotas, standardised
from gristmill.curation.measures.length import Length
from gristmill.curation.measures.perplexity import ResponsePerplexity
from gristmill.curation.rows import table

Make = Callable[..., dict[str, Any]]
TOPICS = ("knead dough yeast", "nova parsec comet", "delta meander weir", "verb noun tense", "rook pawn queen")


class Rows:
    """A corpus in parts, with one value column."""

    def __init__(self, rows: list[dict[str, Any]], values: Sequence[float | None], part: int = 1000) -> None:
        self.all, self.scores, self.part = rows, list(values), part

    def tables(self, columns: Sequence[str]) -> Iterator[pa.Table]:
        for start in range(0, len(self.all), self.part):
            yield table(self.all[start : start + self.part]).select(list(columns))

    def values(self, columns: Sequence[str]) -> pa.Table:
        (name,) = columns
        kind = (Length.columns | ResponsePerplexity.columns)[name]
        return pa.table({name: pa.array(self.scores, kind)})


@pytest.fixture
def rows(make_row: Make) -> list[dict[str, Any]]:
    """120 rows of five topics: 60, 30, 15, 10 and 5 rows."""
    sizes = [60, 30, 15, 10, 5]
    labels = [topic for topic, size in enumerate(sizes) for _ in range(size)]
    return [make_row("a", n, f"{TOPICS[label]} {TOPICS[label]} item{n}", "x") for n, label in enumerate(labels)]


def topic(row: dict[str, Any]) -> int:
    return TOPICS.index(" ".join(row["messages"][0]["content"].split()[:3]))


def judged(judge: KMeansQuality, rows: list[dict[str, Any]], values: Sequence[float | None] | None = None,
           part: int = 1000) -> list[dict[str, Any]]:  # fmt: skip
    values = [10] * len(rows) if values is None else values
    found: list[dict[str, Any]] = judge.judge(Rows(rows, values, part)).to_pylist()  # type: ignore[arg-type]
    return found


def kept(judge: KMeansQuality, rows: list[dict[str, Any]], values: Sequence[float | None] | None = None) -> set[str]:
    return {row["row_id"] for row, v in zip(rows, judged(judge, rows, values), strict=True) if v["keep"]}


@pytest.mark.parametrize(
    ("budget", "k"), [*((budget, 5) for budget in (1, 2, 4, 5, 6, 37, 60, 119)), (1, 1), (37, 1), (5, 500), (37, 500)]
)
def test_keeps_exactly_the_budget(rows: list[dict[str, Any]], budget: int, k: int) -> None:
    found = judged(KMeansQuality(budget, k=k, dims=8), rows)
    assert sum(row["keep"] for row in found) == budget
    assert {row["reason"] for row in found if not row["keep"]} == {"not_selected"}
    proof = [json.loads(row["evidence"]) for row in found]
    assert all(row["keep"] == (p["rank"] <= p["quota"]) for row, p in zip(found, proof, strict=True))
    ranks: dict[int, list[int]] = {}
    for p in proof:
        ranks.setdefault(p["cluster"], []).append(p["rank"])
    assert all(sorted(found) == list(range(1, len(found) + 1)) for found in ranks.values())


def test_every_topic_gets_its_share(rows: list[dict[str, Any]]) -> None:
    """Quotas of 24 rows over clusters of 60, 30, 15, 10 and 5 are 12, 6, 3, 2 and 1."""
    chosen = kept(KMeansQuality(24, k=5, dims=8), rows)
    assert Counter(topic(row) for row in rows if row["row_id"] in chosen) == {0: 12, 1: 6, 2: 3, 3: 2, 4: 1}
    six = kept(KMeansQuality(6, k=5, dims=8), rows)
    assert {topic(row) for row in rows if row["row_id"] in six} == {0, 1, 2, 3, 4}


def test_the_seed_decides_and_order_and_parts_do_not(rows: list[dict[str, Any]]) -> None:
    values = [(7 * n) % 40 + 1 for n in range(len(rows))]
    judge = KMeansQuality(30, k=5, dims=8, seed=1)
    first = dict(zip([row["row_id"] for row in rows], judged(judge, rows, values), strict=True))
    order = random.Random(0).sample(range(len(rows)), len(rows))
    again = judged(judge, [rows[i] for i in order], [values[i] for i in order], part=7)
    assert {rows[i]["row_id"]: verdict for i, verdict in zip(order, again, strict=True)} == first
    assert kept(KMeansQuality(30, k=5, dims=8, seed=2), rows, values) != kept(judge, rows, values)


def test_cold_takes_the_best_of_each_cluster(rows: list[dict[str, Any]]) -> None:
    values = [(7 * n) % 113 + 1 for n in range(len(rows))]
    for prefer, sign in (("high", -1), ("low", 1)):
        judge = KMeansQuality(24, k=5, dims=8, temperature=1e-6, prefer=prefer)  # type: ignore[arg-type]
        chosen = kept(judge, rows, values)
        for label, quota in enumerate([12, 6, 3, 2, 1]):
            mine = [i for i, row in enumerate(rows) if topic(row) == label]
            best = sorted(mine, key=lambda i: sign * values[i])[:quota]
            assert {rows[i]["row_id"] for i in best} == {rows[i]["row_id"] for i in mine} & chosen


def test_a_better_row_is_drawn_more_often(rows: list[dict[str, Any]]) -> None:
    values = [100 if n % 2 else 10 for n in range(len(rows))]
    seeds = [kept(KMeansQuality(40, k=5, dims=8, seed=seed), rows, values) for seed in range(10)]
    better = {row["row_id"] for n, row in enumerate(rows) if n % 2}
    share = sum(len(chosen & better) for chosen in seeds) / 400
    # half the rows are better and e² = 7.4 times as likely; without replacement that makes 0.80 of a third of the rows
    assert 0.74 < share < 0.90


def test_what_cannot_be_scored_is_dropped_and_its_share_goes_to_the_others(rows: list[dict[str, Any]]) -> None:
    """All rows of the largest cluster but two have no perplexity: it runs dry, the budget is spent elsewhere."""
    values: list[float | None] = [2.0 + n % 5 for n in range(len(rows))]
    for n in range(2, 60):
        values[n] = [None, math.nan, math.inf][n % 3]
    judge = KMeansQuality(24, k=5, dims=8, quality="perplexity", prefer="low", model="m")
    found = judged(judge, rows, values)
    assert [row["reason"] for row in found[2:60]] == ["not_scorable"] * 58
    assert sum(row["keep"] for row in found) == 24
    chosen = kept(judge, rows, values)
    counts = Counter(topic(row) for row in rows if row["row_id"] in chosen)
    assert counts == {0: 2, 1: 11, 2: 5, 3: 4, 4: 2}  # 22 over 30, 15, 10 and 5
    assert judge.needs == (ResponsePerplexity("m"),)


@pytest.mark.parametrize("budget", [120, 500])
def test_a_budget_above_the_rows_keeps_them_and_says_so(rows: list[dict[str, Any]], budget: int) -> None:
    with pytest.warns(UserWarning, match=f"budget {budget} of 119 rows: all kept"):
        found = judged(KMeansQuality(budget), rows, [None, *[3] * 119])
    assert [row["keep"] for row in found] == [False, *[True] * 119]
    assert found[0]["reason"] == "not_scorable" and found[0]["evidence"] is None
    assert json.loads(found[1]["evidence"]) == {"note": f"budget {budget} of 119 rows: all kept"}


@pytest.mark.parametrize(
    ("wrong", "message"),
    [({"budget": 0}, "at least 1"), ({"temperature": 0}, "above 0"), ({"temperature": math.nan}, "above 0"),
     ({"quality": "beauty"}, "no value column"), ({"quality": "perplexity"}, "needs a model")],
)  # fmt: skip
def test_refuses_what_cannot_be_done(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(HouseError, match=message):
        KMeansQuality(**{"budget": 5} | wrong)


CLUSTERS = st.lists(st.tuples(st.integers(1, 400), st.floats(0, 1)), min_size=1, max_size=40)


@settings(max_examples=200, deadline=None)
@given(CLUSTERS, st.integers(1, 5000))
def test_quotas_spend_the_budget_within_their_bounds(drawn: list[tuple[int, float]], budget: int) -> None:
    sizes = np.array([size for size, _ in drawn])
    available = np.array([int(size * share) for size, share in drawn])
    found = quotas(sizes, available, budget)
    assert found.sum() == min(budget, available.sum())
    assert (found >= 0).all() and (found <= available).all()
    if budget >= np.count_nonzero(available):
        assert (found[available > 0] >= 1).all()
    # fairness: a cluster that is neither full nor at its least has no less than a smaller one minus rounding
    free = (found < available) & (found > 1)
    for i in np.flatnonzero(free):
        smaller = sizes < sizes[i]
        assert (found[smaller] <= found[i] + 1).all()


def test_quotas_are_proportional_with_the_largest_remainders_first() -> None:
    sizes = np.array([50, 30, 20])
    assert quotas(sizes, sizes, 10).tolist() == [5, 3, 2]
    assert quotas(sizes, sizes, 9).tolist() == [4, 3, 2]  # 4.5, 2.7, 1.8
    assert quotas(sizes, sizes, 2).tolist() == [1, 1, 0]  # 1.0, 0.6, 0.4
    assert quotas(np.array([97, 2, 1]), np.array([97, 2, 1]), 10).tolist() == [8, 1, 1]
    assert quotas(sizes, np.array([1, 30, 20]), 11).tolist() == [1, 6, 4]


def test_equal_qualities_draw_uniformly() -> None:
    """4,000 draws of 5 of 20: each row 1,000 times; chi-square of 19 degrees, 43.8 at one in a thousand."""
    names = [f"row{i}" for i in range(20)]
    counts = np.zeros(20)
    for seed in range(4000):
        counts[np.argsort(-gumbel(names, seed))[:5]] += 1
    assert ((counts - 1000) ** 2 / 1000).sum() < 43.8
    assert counts.sum() == 20_000


def test_draws_follow_the_softmax() -> None:
    logits = np.log([0.1, 0.2, 0.3, 0.4])
    names = list("abcd")
    first = np.array([np.argmax(logits + gumbel(names, seed)) for seed in range(20_000)])
    shares = np.bincount(first, minlength=4) / 20_000
    assert np.abs(shares - [0.1, 0.2, 0.3, 0.4]).max() < 4 * math.sqrt(0.25 / 20_000)


def test_standardised_values() -> None:
    found = standardised(np.array([math.e - 1, math.e**3 - 1, math.nan, math.inf]), "perplexity", "high")
    assert np.allclose(found[:2], [-1, 1]) and np.isnan(found[2:]).all()
    assert np.allclose(standardised(np.array([1.0, 3.0]), "mean_prob", "low"), [1, -1])
    assert standardised(np.array([5.0, 5.0, math.nan]), "response_words", "high")[:2].tolist() == [0, 0]


def test_clusters_are_numbered_in_order_of_appearance_without_gaps() -> None:
    vectors = np.repeat(np.eye(4, 8, dtype=np.float32), 5, axis=0)[::-1].copy()
    assert clusters(vectors, 4, 0).tolist() == [n // 5 for n in range(20)]
    assert clusters(vectors, 100, 0).max() == 3  # four distinct points
    assert clusters(np.zeros((6, 8), np.float32), 3, 0).tolist() == [0] * 6
