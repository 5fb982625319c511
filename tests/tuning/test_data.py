from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from gristmill.curation.folder import HouseError
from gristmill.tuning import data
from gristmill.tuning.chat import Tokens
from gristmill.tuning.data import make_plan, read_units, summary, write_plan
from gristmill.tuning.settings import Training


def tokens(prompt, answer, first=10):
    """A document of `prompt` tokens without a loss, then `answer` with one."""
    ids = np.arange(first, first + prompt + answer, dtype=np.int32)
    return Tokens(ids, np.asarray([0.0] * prompt + [1.0] * answer, np.float32))


def units_of(monkeypatch, groups, objective="sft", capacity=10, overlong="refuse", context=None, shared=True, **more):
    """read_units over ready documents: groups[i] are the documents of row `ri` (for dpo, its pair)."""
    rows = pa.table({"row_id": [f"r{i}" for i in range(len(groups))]} | more)
    monkeypatch.setattr(data, "tokenise_rows", lambda tokenizer, rows: groups)
    monkeypatch.setattr(data, "tokenise_pairs", lambda tokenizer, rows: groups)
    monkeypatch.setattr(data, "tokenise_completions", lambda tokenizer, rows: groups)
    return read_units(objective, None, rows, capacity, overlong, context, shared=shared)


LONG = [[tokens(3, 4)], [tokens(8, 4)], [tokens(2, 9)], [tokens(4, 6)]]


def test_over_long_rows_are_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(HouseError, match=r"2 rows are longer .*10 tokens, the longest has 12: r1 \(12\), r2 \(11\)\."):
        units_of(monkeypatch, LONG)
    with pytest.raises(HouseError, match=r"1 rows .*capacity of 20 tokens \(model's context: 11\).*r1 \(12\)"):
        units_of(monkeypatch, LONG, capacity=20, context=11)


def test_over_long_rows_are_dropped_and_listed(monkeypatch: pytest.MonkeyPatch) -> None:
    units = units_of(monkeypatch, LONG, overlong="drop")
    assert units.row_ids == ["r0", "r3"]
    assert units.excluded.to_pylist() == [
        {"row_id": "r1", "reason": "too_long", "tokens": 12},
        {"row_id": "r2", "reason": "too_long", "tokens": 11},
    ]


def test_prompts_are_cut_at_the_head_and_no_target_is_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    units = units_of(monkeypatch, LONG, overlong="truncate_prompt")
    assert units.row_ids == ["r0", "r1", "r2", "r3"]
    assert units.truncated.to_pylist() == [
        {"row_id": "r1", "tokens": 10, "cut": 2},
        {"row_id": "r2", "tokens": 10, "cut": 1},
    ]
    assert units.documents[1].ids.tolist() == LONG[1][0].ids[2:].tolist()
    assert units.targets.tolist() == [4, 4, 9, 6]
    # one token more, and the answer's first token would have nothing before it
    short = units_of(monkeypatch, LONG, overlong="truncate_prompt", context=9)
    assert short.excluded.to_pylist() == [{"row_id": "r2", "reason": "too_long", "tokens": 11}]
    assert short.lengths.tolist() == [7, 9, 9]


def test_both_documents_of_a_pair_lose_the_same_head(monkeypatch: pytest.MonkeyPatch) -> None:
    pair = (tokens(6, 2), tokens(6, 3))
    units = units_of(monkeypatch, [pair], "dpo", capacity=14, overlong="truncate_prompt", shared=False)
    assert units.truncated.to_pylist() == [{"row_id": "r0", "tokens": 13, "cut": 2}]
    assert [len(document.ids) for document in units.documents] == [6, 7]
    assert units.targets.tolist() == [5]
    with pytest.raises(HouseError, match=r"r0 \(17\)"):
        units_of(monkeypatch, [pair], "dpo", capacity=16, shared=False)
    assert units_of(monkeypatch, [pair], "dpo", capacity=17, shared=False).lengths.tolist() == [17]


def test_rows_that_teach_nothing_are_excluded_with_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    groups = [
        [tokens(4, 0)],
        [],
        [tokens(3, 2), tokens(5, 0)],
        [Tokens(np.zeros(0, np.int32), np.zeros(0, np.float32))],
    ]
    units = units_of(monkeypatch, groups)
    assert units.row_ids == ["r2"] and units.lengths.tolist() == [5]
    assert [(row["row_id"], row["reason"]) for row in units.excluded.to_pylist()] == [
        ("r0", "no_target"),
        ("r1", "no_target"),
        ("r3", "no_target"),
    ]
    pairs = [(tokens(2, 3), tokens(2, 3)), (tokens(2, 3), tokens(2, 3, first=50)), (tokens(2, 3), tokens(5, 0))]
    units = units_of(monkeypatch, pairs, "dpo")
    assert units.row_ids == ["r1"]
    assert data.counted(units.excluded) == {"equal_answers": 1, "no_target": 1}


def test_no_row_left_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(HouseError, match=r"no row is left to train on; excluded: \{'no_target': 1\}"):
        make_plan(units_of(monkeypatch, [[tokens(4, 0)]]), Training())
    with pytest.raises(HouseError, match="no rows"):
        make_plan(units_of(monkeypatch, []), Training())


def test_the_plan_trains_every_row_once_an_epoch(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    draw = np.random.default_rng(0)
    groups = [[tokens(int(p), int(a)) for p, a in draw.integers(1, 20, (1 + i % 2, 2))] for i in range(50)]
    units = units_of(monkeypatch, groups, capacity=40)
    settings = Training(capacity=40, packs_per_step=4, epochs=2.5)
    plan = make_plan(units, settings)
    an_epoch = -(-len(plan.packs) // 4)
    assert len(plan.steps) == round(2.5 * an_epoch)
    for epoch in (0, 1):
        trained = [u for step in range(epoch * an_epoch, (epoch + 1) * an_epoch) for u in plan.units_of(step).tolist()]
        assert sorted(trained) == list(range(75))
    assert plan.steps[0][1] != plan.steps[an_epoch][1]
    numbers = write_plan(plan, 40, tmp_path)
    assert numbers == summary(plan, 40)
    assert (numbers["rows"], numbers["units"], numbers["tokens"]) == (50, 75, int(units.lengths.sum()))
    assert numbers["target_tokens"] == sum(int(t.weights.sum()) for group in groups for t in group)
    assert len(make_plan(units, Training(capacity=40, packs_per_step=4, max_steps=3)).steps) == 3
    assert len(make_plan(units, Training(capacity=40, packs_per_step=4, epochs=0.01)).steps) == 1
