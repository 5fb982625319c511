from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from gristmill.curation.folder import HouseError
from gristmill.curation.rows import MESSAGE, message, table
from gristmill.curation.shards import write_curated
from gristmill.tuning import data
from gristmill.tuning.chat import Tokens
from gristmill.tuning.data import kl_units, make_plan, read_rows, read_units, summary, write_plan
from gristmill.tuning.models import train_tokenizer
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


def answer(prompt, own, weights=None):
    """A document of these prompt and answer tokens."""
    ids = np.asarray([*prompt, *own], np.int32)
    return Tokens(ids, np.asarray([0.0] * len(prompt) + (weights or [1.0] * len(own)), np.float32))


def test_a_pair_is_as_long_as_its_tree(monkeypatch: pytest.MonkeyPatch) -> None:
    pair = (answer([1, 2, 3, 4], [7, 8, 9]), answer([1, 2, 3, 4], [7, 5]))
    units = units_of(monkeypatch, [pair], "dpo", capacity=8)
    assert (units.lengths.tolist(), units.targets.tolist(), units.widths.tolist()) == ([8], [5], [2])
    assert units.squares.tolist() == [49 + 36 - 25]  # the second answer's one own token sees 5 shared ones and itself
    assert units.document_lengths.tolist() == [7, 6]
    with pytest.raises(HouseError, match=r"capacity of 7 tokens, the longest has 8: r0 \(8\)"):
        units_of(monkeypatch, [pair], "dpo", capacity=7)
    with pytest.raises(HouseError, match=r"model's context: 6.*r0 \(8\)"):  # the longer document alone has 7
        units_of(monkeypatch, [pair], "dpo", capacity=20, context=6)


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("context", [None, 9])
def test_over_long_trees_lose_just_enough_of_their_prompt(
    monkeypatch: pytest.MonkeyPatch, shared: bool, context: int | None
) -> None:
    draw = np.random.default_rng(0)
    pairs = []
    for _ in range(60):
        prompt = draw.integers(1, 50, draw.integers(1, 12)).tolist()
        common = draw.integers(1, 50, draw.integers(0, 4)).tolist()
        own = [draw.integers(1, 50, draw.integers(1, 6)).tolist() for _ in range(2)]
        pairs.append((answer(prompt, [*common, 51, *own[0]]), answer(prompt, [*common, 52, *own[1]])))
    whole = units_of(monkeypatch, pairs, "dpo", capacity=100, shared=shared)
    cut = units_of(monkeypatch, pairs, "dpo", 14, "truncate_prompt", context, shared)
    assert cut.lengths.max() <= 14 and max(len(d.ids) for d in cut.documents) <= (context or 14)
    cuts = {row["row_id"]: row["cut"] for row in cut.truncated.to_pylist()}
    assert cuts and cut.excluded.num_rows and len(cut.row_ids) + cut.excluded.num_rows == 60
    fits = [size <= 14 and max(len(d.ids) for d in pairs[i]) <= (context or 14) for i, size in enumerate(whole.lengths)]
    for place, row_id in enumerate(cut.row_ids):
        row = int(row_id[1:])
        assert (row_id in cuts) != fits[row]
        for ours, theirs in zip(cut.documents[2 * place : 2 * place + 2], pairs[row], strict=True):
            lost = len(theirs.ids) - len(ours.ids)
            assert lost == cuts.get(row_id, 0) and ours.ids.tolist() == theirs.ids[lost:].tolist()
            assert np.count_nonzero(ours.weights[1:]) == np.count_nonzero(theirs.weights)
        longest = max(len(d.ids) for d in cut.documents[2 * place : 2 * place + 2])
        if row_id in cuts:  # a token less would not have been enough
            assert longest == context or cut.lengths[place] > 14 - (1 if shared else 2)


LISTS = [  # rows of (prompt, chosen, rejected)
    (1, [10], [11]), (2, [20], [21]), (1, [10], [12, 13]), (1, [14], [11]), (2, [21], [20]), (3, [30], [30]),
]  # fmt: skip


def lists_of(monkeypatch, rows=LISTS, **more):
    pairs = [(answer([5, prompt], chosen), answer([5, prompt], rejected)) for prompt, chosen, rejected in rows]
    prompts = [[{"role": "user", "content": str(prompt)}] for prompt, _, _ in rows]
    return units_of(monkeypatch, pairs, "lists", capacity=30, prompt=prompts, **more)


def test_lists_hold_the_distinct_answers_of_all_rows_of_a_prompt(monkeypatch: pytest.MonkeyPatch) -> None:
    units = lists_of(monkeypatch)
    assert units.row_ids == ["r0"] and units.members == [("r0", "r2", "r3")]
    assert [d.ids[2:].tolist() for d in units.documents] == [[10], [11], [12, 13], [14]]
    assert units.rewards is not None and units.rewards.tolist() == [1.0, 0.0, 0.0, 1.0]
    assert units.first.tolist() == [0, 4] and units.lengths.tolist() == [2 + 1 + 1 + 2 + 1]
    excluded = [(row["row_id"], row["reason"]) for row in units.excluded.to_pylist()]
    assert excluded == [("r1", "equal_rewards"), ("r4", "equal_rewards"), ("r5", "equal_answers")]
    assert units.rows_of(np.asarray([0])) == (["r0", "r2", "r3"], pytest.approx([0, 0, 0]))


def test_lists_take_the_rewards_that_rows_state(monkeypatch: pytest.MonkeyPatch) -> None:
    scores = {"score_chosen": [9.0, 2.0, 7.0, 5.0, 5.0, 1.0], "score_rejected": [1.0, 1.0, 3.0, 2.0, 3.0, 1.0]}
    units = lists_of(monkeypatch, **scores)
    assert units.rewards is not None and units.first.tolist() == [0, 4, 6]
    assert units.rewards.tolist() == [8.0, 1.5, 3.0, 5.0, 2.5, 3.0]  # the mean of what rows say of an answer
    scores["score_chosen"][2] = None  # of the first prompt, whose rewards are then 1 and 0
    units = lists_of(monkeypatch, **scores)
    assert units.rewards is not None and units.rewards.tolist() == [1.0, 0.0, 0.0, 1.0, 2.5, 3.0]
    meta = [f'{{"score_chosen": {i * i + 1}, "score_rejected": {i}}}' for i in range(5)] + [None]
    units = lists_of(monkeypatch, meta=meta)
    assert units.rewards is not None and units.rewards.tolist() == [3.0, 1.5, 2.0, 10.0, 3.0, 9.0]


def test_lists_of_other_tools_are_other_lists_and_weights_are_averaged(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [(1, [10], [11]), (1, [10], [12])]
    assert len(lists_of(monkeypatch, rows).row_ids) == 1
    assert len(lists_of(monkeypatch, rows, tools=["[]", None]).row_ids) == 2
    pairs = [
        (answer([5, 1], [7, 8], [1.0, 0.0]), answer([5, 1], [9])),
        (answer([5, 1], [7, 8], [0.0, 1.0]), answer([5, 1], [6])),
    ]
    units = units_of(monkeypatch, pairs, "lists", prompt=["p", "p"])
    assert units.documents[0].weights.tolist() == [0, 0, 0.5, 0.5]


def test_over_long_lists_are_listed_row_by_row(monkeypatch: pytest.MonkeyPatch) -> None:
    pairs = [(answer([5, 6], [7] * n), answer([5, 6], [8] * n)) for n in (3, 4)]
    units = units_of(monkeypatch, pairs, "lists", 14, "drop", prompt=["p", "p"])
    assert [(row["row_id"], row["reason"], row["tokens"]) for row in units.excluded.to_pylist()] == [
        ("r0", "too_long", 16), ("r1", "too_long", 16)
    ]  # fmt: skip
    pairs = [(answer([5, 6, 4], [7] * n), answer([5, 6, 4], [8] * n)) for n in (3, 4)]
    units = units_of(monkeypatch, pairs, "lists", 16, "truncate_prompt", prompt=["p", "p"])
    assert units.truncated.to_pylist() == [{"row_id": f"r{i}", "tokens": 16, "cut": 1} for i in (0, 1)]
    assert units.members == [("r0", "r1")] and units.lengths.tolist() == [16]


def test_the_plan_of_lists_names_every_row(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    rows = [(p, [10 + i], [20 + i]) for p in range(7) for i in range(1 + p % 3)]
    units = lists_of(monkeypatch, rows)
    plan = make_plan(units, Training(capacity=30, packs_per_step=2, overlong="drop"))
    numbers = write_plan(plan, 30, tmp_path)
    assert (numbers["rows"], numbers["units"]) == (len(rows), 7)
    assert numbers["unshared_tokens"] == 3 * 2 * len(rows) > numbers["tokens"]
    for name in ("plan", "steps"):
        assert sorted(pq.read_table(tmp_path / f"{name}.parquet")["row_id"].to_pylist()) == sorted(
            f"r{i}" for i in range(len(rows))
        )


def test_single_answers_keep_their_labels(monkeypatch: pytest.MonkeyPatch) -> None:
    groups = [answer([1, i], [7, 8 + i]) for i in range(4)]
    units = units_of(monkeypatch, groups, "kto", label=[True, False, None, True])
    assert units.labels is not None and units.labels.tolist() == [True, False, True]
    assert units.row_ids == ["r0", "r1", "r3"]
    assert [(row["row_id"], row["reason"]) for row in units.excluded.to_pylist()] == [("r2", "no_label")]


def test_mismatched_answers_of_the_kl_term(monkeypatch: pytest.MonkeyPatch) -> None:
    prompts = [[1, 2], [1, 2], [3], [4, 5, 6], [4, 5, 6]]  # side by side, as data sets list good and bad answers
    groups = [answer(prompt, [10 + i] * (i + 1)) for i, prompt in enumerate(prompts)]
    units = units_of(monkeypatch, groups, "kto", label=[True, False, True, False, True])
    mixed = kl_units(units, np.asarray([4, 3, 2, 1, 0]), capacity=7)
    assert mixed.row_ids == ["r4", "r3", "r2", "r1", "r0"]
    assert mixed.labels is not None and mixed.labels.tolist() == [True, False, True, False, True]
    answers = [document.ids[np.flatnonzero(document.weights)].tolist() for document in mixed.documents]
    assert sorted(map(len, answers)) == [1, 2, 3, 4, 5]  # each answer once
    for place, document in enumerate(mixed.documents):
        own = prompts[4 - place]
        start = int(np.flatnonzero(document.weights)[0])
        other = prompts[len(answers[place]) - 1]
        assert own != other
        assert document.ids[:start].tolist() == own[len(own) - start :] and len(document.ids) <= 7
        assert start == min(len(own), 7 - len(answers[place]))
    alone = kl_units(units, np.asarray([3]), capacity=10)
    assert alone.documents[0].ids.tolist() == units.documents[3].ids.tolist()
    again = kl_units(units, np.asarray([4, 3, 2, 1, 0]), capacity=7)
    assert all(np.array_equal(a.ids, b.ids) for a, b in zip(mixed.documents, again.documents, strict=True))


def test_tasks_are_the_rows_sources(monkeypatch: pytest.MonkeyPatch) -> None:
    groups = [[tokens(1, 2), tokens(2, 2)], [tokens(1, 0)], [tokens(1, 3)]]
    units = units_of(monkeypatch, groups, source=["maths", "none", "code"])
    assert units.task_names == ("code", "maths")
    assert units.tasks is not None and units.tasks.tolist() == [1, 1, 0]
    assert units_of(monkeypatch, groups).tasks is None


def test_rows_of_each_family_are_read_from_their_kind(tmp_path: Path, make_row: Callable[..., dict[str, Any]]) -> None:
    """Preference rows with spans and KTO rows: shards to units by a real template."""
    corpus = [[message("user", "good bad"), message("assistant", "very good")]] * 3
    tokenizer = train_tokenizer(corpus, 300, 64)
    said = {name: [message("assistant", f"so {name}")] for name in ("good", "bad")}
    spans = [
        {"field": "chosen", "turn": 0, "start": 0, "end": 3, "weight": 0.25},
        {"field": "rejected", "turn": 0, "start": 0, "end": 3, "weight": 0.5},
    ]
    pairs = [
        make_row("a", i, "q", None, chosen=said["good"], rejected=said["bad"], spans=spans if i else None, meta=None)
        for i in range(2)
    ]
    singles = [make_row("a", i, f"q{i}", None, chosen=said["good"], label=bool(i)) for i in range(3)]
    for kind, rows in (("preference", pairs), ("kto", singles)):
        write_curated(tmp_path / kind, kind, {"train": [table(rows)]}, {"name": "x"}, lambda whole: {})
    units = read_units("dpo", tokenizer, read_rows("dpo", tmp_path / "preference"), 100, "refuse")
    assert units.row_ids == [row["row_id"] for row in pairs]
    plain, weighted = units.documents[:2], units.documents[2:]
    assert [np.array_equal(a.ids, b.ids) for a, b in zip(plain, weighted, strict=True)] == [True, True]
    assert set(weighted[0].weights) == {0.0, 0.25, 1.0} and set(weighted[1].weights) == {0.0, 0.5, 1.0}
    pack = units.pack(np.asarray([1]))
    assert len(pack.targets) < len(pack.entries)
    for owner in (0, 1):  # the shared beginning " so" has weights of its own in each answer
        ours = pack.weights[pack.owners == owner].tolist()
        assert ours == weighted[owner].weights[np.flatnonzero(weighted[owner].weights)].tolist()
    units = read_units("kto", tokenizer, read_rows("kto", tmp_path / "kto"), 100, "refuse")
    assert units.labels is not None and units.labels.tolist() == [False, True, True]
    trained = units.documents[0].ids[np.flatnonzero(units.documents[0].weights)]
    assert tokenizer.decode(trained) == "so good<|im_end|>"
    with pytest.raises(HouseError, match="kto trains on data of kind 'kto'"):
        read_rows("kto", tmp_path / "preference")


def test_trap_all_rows_empty_or_masked_is_an_error_that_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    """trl 6970 (a crash), 6668 (loss 0.0), unsloth 2900: nothing to train on stops the run before its first step."""
    empty = Tokens(np.zeros(0, np.int32), np.zeros(0, np.float32))
    for objective, group in (("sft", [empty]), ("dpo", (empty, tokens(3, 2))), ("lists", (tokens(3, 0), tokens(3, 2)))):
        units = units_of(monkeypatch, [group] * 3, objective, prompt=["p"] * 3)
        assert units.row_ids == [] and units.excluded["reason"].to_pylist() == ["no_target"] * 3
        assert units.lengths.tolist() == [] and units.weights.tolist() == []
        with pytest.raises(HouseError, match=r"no row is left to train on; excluded: no_target 3$"):
            make_plan(units, Training())


def test_trap_eos_is_trained_though_pad_is_the_same_token() -> None:
    """trl 1623, unsloth 416: weights come from the template's text and padding is no document, so that a pad equal to
    EOS masks nothing."""
    corpus = [[message("user", "one"), message("assistant", "two")]]
    tokenizer = train_tokenizer(corpus, 300, 64)
    tokenizer.pad_token = tokenizer.eos_token
    rows = pa.table({"row_id": ["a"], "messages": pa.array(corpus, pa.list_(MESSAGE))})
    units = read_units("sft", tokenizer, rows, 64, "refuse")
    pack = units.pack(np.asarray([0]), 64)
    assert pack.ids[-1] == tokenizer.eos_token_id and pack.weights[-1] == 1
    assert pack.targets.max() < pack.size < 64


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
    with pytest.raises(HouseError, match=r"no row is left to train on; excluded: no_target 1$"):
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
    assert numbers["not_reached"] == 0
    short = make_plan(units, Training(capacity=40, packs_per_step=4, max_steps=3))
    reached = {row for step in range(3) for row in units.rows_of(short.units_of(step))[0]}
    assert len(short.steps) == 3 and summary(short, 40)["not_reached"] == 50 - len(reached) > 0
    assert len(make_plan(units, Training(capacity=40, packs_per_step=4, epochs=0.01)).steps) == 1
