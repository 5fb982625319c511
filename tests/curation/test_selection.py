"""What every selection stands on: draws by (seed, row_id), ranks, quotas, budgets in whole rows, verdicts as arrays."""

import json
import math
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gristmill.curation.folder import HouseError
from gristmill.curation.measures.length import Length
from gristmill.curation.measures.perplexity import ResponsePerplexity
from gristmill.curation.rows import digest
from gristmill.curation.selecting.selection import (
    Pool,
    all_kept,
    canonical,
    codes,
    cost_of,
    descending,
    gumbel,
    hashes,
    only_column,
    quotas,
    ranks,
    reads,
    row_keys,
    selected,
    shared,
    spend,
    spend_in_groups,
    uniform,
    value_name,
)
from gristmill.curation.steps import VERDICT

NAMES = [digest(str(n)) for n in range(500)]


def test_keys_are_what_the_ids_spell() -> None:
    names = pa.chunked_array([NAMES[:7], [], NAMES[7:50]], pa.string())
    spelled = [(int(name[:16], 16), int(name[16:], 16)) for name in NAMES[:50]]
    assert [tuple(key) for key in row_keys(names).tolist()] == spelled
    assert (row_keys(pa.array(NAMES).slice(20, 30)) == row_keys(names)[20:]).all()
    assert [NAMES[i] for i in canonical(row_keys(names))] == sorted(NAMES[:50])


def test_other_names_have_the_keys_of_their_digests() -> None:
    odd = ["", "n", "z" * 32, "A" * 32, "日本"]
    found = row_keys(pa.array([NAMES[0], *odd, NAMES[1]]))
    assert (found == row_keys(pa.array([NAMES[0], *map(digest, odd), NAMES[1]]))).all()
    assert row_keys(pa.array([], pa.string())).shape == (0, 2)


def test_draws_depend_on_seed_and_id_alone() -> None:
    keys = row_keys(pa.array(NAMES))
    order = np.random.default_rng(0).permutation(len(keys))
    assert (gumbel(keys[order], 3) == gumbel(keys, 3)[order]).all()
    assert len(np.unique(hashes(keys, 3))) == len(keys)
    assert not (hashes(keys, 3) == hashes(keys, 4)).any()
    assert abs(np.corrcoef(uniform(keys, 3), uniform(keys, 4))[0, 1]) < 0.15  # 3.3 deviations of 1/sqrt(500)


def test_draws_are_uniform_over_rows_and_over_seeds() -> None:
    """64 bins of 500 x 200 draws; chi-square of 63 degrees, 103 at one in a thousand."""
    keys = row_keys(pa.array(NAMES))
    drawn = np.concatenate([uniform(keys, seed) for seed in range(200)])
    counts = np.bincount((drawn * 64).astype(int), minlength=64)
    assert drawn.min() > 0 and drawn.max() < 1
    assert ((counts - len(drawn) / 64) ** 2 / (len(drawn) / 64)).sum() < 103


def test_equal_scores_draw_uniformly() -> None:
    """2,000 draws of 5 of 20: each row 500 times; chi-square of 19 degrees, 43.8 at one in a thousand."""
    keys = row_keys(pa.array([f"row{i}" for i in range(20)]))
    counts = np.zeros(20)
    for seed in range(2000):
        counts[np.argsort(-gumbel(keys, seed))[:5]] += 1
    assert ((counts - 500) ** 2 / 500).sum() < 43.8
    assert counts.sum() == 10_000


def test_draws_follow_the_softmax() -> None:
    logits = np.log([0.1, 0.2, 0.3, 0.4])
    keys = row_keys(pa.array(list("abcd")))
    first = np.array([np.argmax(logits + gumbel(keys, seed)) for seed in range(5000)])
    shares = np.bincount(first, minlength=4) / 5000
    assert np.abs(shares - [0.1, 0.2, 0.3, 0.4]).max() < 4 * math.sqrt(0.25 / 5000)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 4)), max_size=40))
def test_ranks_equal_plain_counting(drawn: list[tuple[int, int]]) -> None:
    groups = np.array([g for g, _ in drawn], np.int64)
    scores = np.array([s for _, s in drawn], np.float64)
    ties = hashes(row_keys(pa.array(NAMES[: len(drawn)])), 0)
    open_rows = scores > 0
    order = descending(scores, ties, open_rows)
    assert order.tolist() == sorted(np.flatnonzero(open_rows), key=lambda i: (-scores[i], ties[i]))
    seen: dict[int, int] = {}
    expected = [0] * len(drawn)
    for i in order.tolist():
        seen[drawn[i][0]] = expected[i] = seen.get(drawn[i][0], 0) + 1
    assert ranks(order, groups).tolist() == expected


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
    # fairness: a group that is neither full nor at its least has no less than a smaller one minus rounding
    free = (found < available) & (found > 1)
    for i in np.flatnonzero(free):
        assert (found[sizes < sizes[i]] <= found[i] + 1).all()


def test_quotas_are_proportional_with_the_largest_remainders_first() -> None:
    sizes = np.array([50, 30, 20])
    assert quotas(sizes, sizes, 10).tolist() == [5, 3, 2]
    assert quotas(sizes, sizes, 9).tolist() == [4, 3, 2]  # 4.5, 2.7, 1.8
    assert quotas(sizes, sizes, 2).tolist() == [1, 1, 0]  # 1.0, 0.6, 0.4
    assert quotas(np.array([97, 2, 1]), np.array([97, 2, 1]), 10).tolist() == [8, 1, 1]
    assert quotas(sizes, np.array([1, 30, 20]), 11).tolist() == [1, 6, 4]
    assert quotas(np.zeros(2), np.array([3, 5]), 4).sum() == 4
    assert quotas(np.array([1.0, 0.0]), np.array([3, 5]), 6).tolist() == [3, 3]  # no weight, but the other runs dry
    assert quotas(shared(sizes, "equal"), sizes, 30).tolist() == [10, 10, 10]
    assert quotas(shared(np.array([100, 25]), "sqrt"), np.array([100, 25]), 30).tolist() == [20, 10]


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(1, 60), max_size=40), st.integers(1, 400))
def test_spending_equals_going_down_the_list(costs: list[int], budget: int) -> None:
    keep, left = [], budget
    for cost in costs:
        keep.append(cost <= left)
        left -= cost if cost <= left else 0
    assert spend(np.arange(len(costs)), np.array(costs, np.int64), budget).tolist() == keep


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 4), st.integers(1, 30)), min_size=1, max_size=60), st.integers(1, 500))
def test_a_budget_in_tokens_is_never_passed_and_filled_by_whole_rows(drawn: list[tuple[int, int]], budget: int) -> None:
    groups = np.array([g for g, _ in drawn], np.int64)
    costs = np.array([c for _, c in drawn], np.int64)
    order = np.arange(len(drawn))
    keep, rank, quota = spend_in_groups(order, groups, costs, np.bincount(groups, minlength=5).astype(float), budget)
    left = budget - costs[keep].sum()
    assert left >= 0 and (keep.all() or costs[~keep].min() > left)
    best = [int(np.flatnonzero(groups == g)[0]) for g in set(groups.tolist())]
    if costs[best].sum() <= budget:
        assert keep[best].all()
    assert quota.sum() == min(budget, costs.sum()) and (rank > 0).all()


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(0, 4), min_size=1, max_size=60), st.integers(1, 70))
def test_a_budget_in_rows_is_exact_and_kept_by_rank_and_quota(drawn: list[int], budget: int) -> None:
    groups = np.array(drawn, np.int64)
    ones = np.ones(len(drawn), np.int64)
    keep, rank, quota = spend_in_groups(np.arange(len(drawn)), groups, ones, np.ones(5), budget)
    assert keep.sum() == min(budget, len(drawn))
    assert (keep == (rank <= quota[groups])).all()


def small_pool(scores: list[float]) -> Pool:
    values = np.array(scores)
    return Pool(row_keys(pa.array(NAMES[: len(scores)])), values, np.ones(len(scores), np.int64), np.isfinite(values))


def test_verdicts_say_why() -> None:
    rows = small_pool([1.0, math.nan, 3.0])
    names = pa.array(['a "quoted"\n name', "b", "\\ö"])
    found = selected(rows, np.array([True, False, False]), {"stratum": names, "rank": np.array([1, 0, 2])})
    assert found.schema == VERDICT
    assert found["reason"].to_pylist() == [None, "not_scorable", "not_selected"]
    assert found["score"].to_pylist() == [1.0, None, 3.0]
    assert json.loads(found["evidence"][0].as_py()) == {"stratum": 'a "quoted"\n name', "rank": 1}
    assert json.loads(found["evidence"][2].as_py()) == {"stratum": "\\ö", "rank": 2}
    assert found["evidence"][1].as_py() is None
    blank = selected(rows, np.array([True, False, False]), {"rank": pa.array([None, None, 2])})
    assert blank["evidence"].to_pylist() == ["{}", None, '{"rank": 2}']


def test_a_budget_above_the_rows_keeps_them_and_says_so() -> None:
    rows = small_pool([1.0, math.nan, 3.0])
    assert all_kept(rows, rows, 1, "rows") is None
    with pytest.warns(UserWarning, match="Pool: budget 2 of 2 rows: all kept"):
        found = all_kept(rows, rows, 2, "rows")
    assert found is not None and found["keep"].to_pylist() == [True, False, True]
    assert json.loads(found["evidence"][0].as_py()) == {"note": "budget 2 of 2 rows: all kept"}


@dataclass(frozen=True)
class Fake:
    version: ClassVar[int] = 1
    columns: ClassVar[dict[str, pa.DataType]] = {"tokens": pa.int32(), "beauty": pa.float64()}
    models: ClassVar[tuple[str, ...]] = ()

    def measure(self, rows: pa.Table, tools: Any, progress: Any) -> pa.Table:
        raise NotImplementedError


def test_what_a_step_reads() -> None:
    assert cost_of("s", "rows", None) == ()
    assert cost_of("s", "words", None) == ((Length(), "response_words"),)
    assert cost_of("s", "tokens", Fake()) == ((Fake(), "tokens"),)
    with pytest.raises(HouseError, match="needs the measure that counts them"):
        cost_of("s", "tokens", None)
    assert reads("s", (Length(), "turns"), (Length(), "response_words")) == (Length(),)
    assert reads("s", (Fake(), "beauty"), (ResponsePerplexity("m"), "nll")) == (Fake(), ResponsePerplexity("m"))
    needs = (Fake(), ResponsePerplexity("m"), Length())
    names = [
        value_name(needs, Fake(), "tokens"),
        value_name(needs, Fake(), "beauty"),
        value_name(needs, needs[1], "tokens"),
    ]
    assert names == ["tokens#0", "beauty", "tokens"]
    with pytest.raises(HouseError, match="no column 'beast'"):
        reads("s", (Fake(), "beast"))
    with pytest.raises(HouseError, match="name a column"):
        only_column("s", Fake(), None)


def test_codes_follow_the_names() -> None:
    numbered, names = codes(["b", None, "a", "b"])
    assert names == ["", "a", "b"] and numbered.tolist() == [2, 0, 1, 2]
