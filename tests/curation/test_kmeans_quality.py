"""kMQ: the budget is exact, every cluster is served, draws follow the softmax and depend on (seed, row_id) alone."""

import json
import math
import random
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from gristmill.curation.folder import HouseError
from gristmill.curation.judges.kmeans_quality import KMeansQuality, clusters, standardised
from gristmill.curation.measures.embedding import Embedding
from gristmill.curation.measures.length import Length
from gristmill.curation.measures.perplexity import ResponsePerplexity
from gristmill.curation.rows import table
from gristmill.curation.selecting.selection import Pool, row_keys

Make = Callable[..., dict[str, Any]]
HOME = tempfile.TemporaryDirectory()  # removed when the tests end
TOPICS = ("knead dough yeast", "nova parsec comet", "delta meander weir", "verb noun tense", "rook pawn queen")


class Rows:
    """A corpus in parts, with one value column."""

    def __init__(
        self, rows: list[dict[str, Any]], values: Sequence[float | None], part: int = 1000, kept: Path | None = None
    ) -> None:
        self.all, self.scores, self.part = rows, list(values), part
        self.kept = Path(tempfile.mkdtemp(dir=HOME.name)) if kept is None else kept

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


def test_standardised_values() -> None:
    found = standardised(np.array([math.e - 1, math.e**3 - 1, math.nan, math.inf]), "perplexity", "high")
    assert np.allclose(found[:2], [-1, 1]) and np.isnan(found[2:]).all()
    assert np.allclose(standardised(np.array([1.0, 3.0]), "mean_prob", "low"), [1, -1])
    assert standardised(np.array([5.0, 5.0, math.nan]), "response_words", "high")[:2].tolist() == [0, 0]


def test_clusters_are_numbered_in_the_order_of_the_ids_without_gaps() -> None:
    found = np.repeat(np.eye(4, 8, dtype=np.float32), 5, axis=0)[::-1].copy()
    names = [f"{n:032x}" for n in range(20)]
    pool = Pool(row_keys(pa.array(names)), np.zeros(20), np.ones(20, np.int64), np.ones(20, np.bool_))
    assert clusters(found, pool, 4).tolist() == [n // 5 for n in range(20)]
    assert clusters(found, pool, 100).max() == 3  # four distinct points
    assert clusters(np.zeros((20, 8), np.float32), pool, 3).tolist() == [0] * 20


def test_other_budgets_are_decided_from_what_was_kept(rows: list[dict[str, Any]], tmp_path: Path) -> None:
    values: list[float | None] = [None if n % 11 == 0 else (7 * n) % 40 + 1 for n in range(len(rows))]
    first = KMeansQuality(30, k=5, dims=8)
    first.judge(Rows(rows, values, kept=tmp_path))  # type: ignore[arg-type]
    came = np.ones(len(rows), np.bool_)
    for change in ({"budget": 12}, {"temperature": 0.1}, {"seed": 5}, {"shares": "equal"}, {"prefer": "low"}):
        other = replace(first, **change)  # type: ignore[arg-type]
        again = other.rejudge(Rows(rows, values), tmp_path, came)  # type: ignore[arg-type]
        assert again is not None and again.to_pylist() == judged(other, rows, values)
    for change in ({"k": 4}, {"dims": 9}, {"view": "pair"}, {"quality": "prompt_words"}, {"unit": "words"}):
        assert replace(first, **change).rejudge(Rows(rows, values), tmp_path, came) is None  # type: ignore[arg-type]
    came[3] = False
    assert first.rejudge(Rows(rows, values), tmp_path, came) is None  # type: ignore[arg-type]


def test_equal_shares_and_budgets_in_words(rows: list[dict[str, Any]]) -> None:
    chosen = kept(KMeansQuality(25, k=5, dims=8, shares="equal"), rows)
    assert Counter(topic(row) for row in rows if row["row_id"] in chosen) == dict.fromkeys(range(5), 5)
    values = [(7 * n) % 40 + 1 for n in range(len(rows))]
    words = judged(KMeansQuality(500, k=5, dims=8, unit="words"), rows, values)
    left = 500 - sum(value for value, found in zip(values, words, strict=True) if found["keep"])
    assert 0 <= left < min(value for value, found in zip(values, words, strict=True) if not found["keep"])
    proof = [json.loads(found["evidence"]) for found in words]
    assert [each["words"] for each in proof] == values
    assert {each["cluster"] for each, found in zip(proof, words, strict=True) if found["keep"]} == set(range(5))


def test_any_measure_and_any_embedding(rows: list[dict[str, Any]]) -> None:
    judge = KMeansQuality(5, embedding="e", of=ResponsePerplexity("m"), column="min_prob", prefer="low")
    assert judge.needs == (ResponsePerplexity("m"), Embedding("e", "prompt"))
    assert judge.read == (ResponsePerplexity("m"), "min_prob")
    with pytest.raises(HouseError, match="name a column"):
        KMeansQuality(5, of=ResponsePerplexity("m"))
