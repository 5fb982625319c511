from dataclasses import dataclass

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gristmill.tuning.packing import build_pack, pack_costs, pack_plan, plan_digest, step_plan, target_tokens


@dataclass(frozen=True)
class Tokens:
    ids: np.ndarray
    weights: np.ndarray


def tokens(ids, weights):
    return Tokens(np.asarray(ids, np.int32), np.asarray(weights, np.float32))


def naive_best_fit(lengths, capacity):
    """Room left in each pack of best-fit decreasing, by looking at every pack."""
    rooms = []
    for length in sorted(lengths, reverse=True):
        fits = [i for i, room in enumerate(rooms) if room >= length]
        if fits:
            rooms[min(fits, key=lambda i: rooms[i])] -= length
        else:
            rooms.append(capacity - length)
    return sorted(rooms)


@settings(max_examples=150, deadline=None)
@given(st.integers(1, 97).flatmap(lambda c: st.tuples(st.just(c), st.lists(st.integers(1, c), max_size=80))))
def test_every_document_is_in_one_pack_and_no_pack_overflows(case: tuple[int, list[int]]) -> None:
    capacity, lengths = case
    plan = pack_plan(np.asarray(lengths), capacity)
    assert sorted(index for pack in plan for index in pack) == list(range(len(lengths)))
    rooms = [capacity - sum(lengths[index] for index in pack) for pack in plan]
    assert all(room >= 0 for room in rooms)
    assert sorted(rooms) == naive_best_fit(lengths, capacity)
    again = pack_plan(np.asarray(lengths), capacity)
    assert [pack.tolist() for pack in plan] == [pack.tolist() for pack in again]


def plain_plan(lengths, capacity):
    """Best-fit decreasing, unit by unit: a stack of packs for each room that is left."""
    packs, stacks = [], {}
    for unit in np.argsort(-lengths, kind="stable").tolist():
        length = int(lengths[unit])
        room = min((room for room, stack in stacks.items() if room >= length and stack), default=None)
        pack = stacks[room].pop() if room is not None else len(packs)
        if room is None:
            packs.append([])
        packs[pack].append(unit)
        stacks.setdefault((capacity if room is None else room) - length, []).append(pack)
    return [pack[::-1] for pack in packs]


@settings(max_examples=150, deadline=None)
@given(
    st.integers(1, 200).flatmap(
        lambda c: st.tuples(
            st.just(c), st.lists(st.integers(1, c) | st.sampled_from([1, 1 + c // 3, 1 + c // 2]), max_size=120)
        )
    )
)
def test_runs_of_equal_lengths_are_packed_as_unit_by_unit(case: tuple[int, list[int]]) -> None:
    """Bit for bit the sequential rule, ties included."""
    capacity, lengths = case
    plan = pack_plan(np.asarray(lengths, np.int64), capacity)
    assert [pack.tolist() for pack in plan] == plain_plan(np.asarray(lengths, np.int64), capacity)


@pytest.mark.parametrize("capacity", [100, 4096, 1_000_003])
def test_many_lengths_are_packed_as_unit_by_unit(capacity: int) -> None:
    """Rooms over several words of the bitmap."""
    lengths = np.clip(np.random.default_rng(2).lognormal(np.log(capacity) - 2, 1.2, 1500).astype(int) + 1, 1, capacity)
    assert [pack.tolist() for pack in pack_plan(lengths, capacity)] == plain_plan(lengths, capacity)


@pytest.mark.parametrize("capacity", [1000, 1024, 1531])
def test_log_normal_lengths_fill_nearly_all(capacity: int) -> None:
    lengths = np.clip(np.random.default_rng(0).lognormal(4.8, 0.8, 20_000).astype(int) + 1, 1, capacity)
    plan = pack_plan(lengths, capacity)
    assert lengths.sum() / (len(plan) * capacity) >= 0.995


def test_bad_lengths_are_refused() -> None:
    with pytest.raises(ValueError, match="12"):
        pack_plan(np.asarray([3, 12]), 11)
    with pytest.raises(ValueError, match="from 0"):
        pack_plan(np.asarray([3, 0]), 11)
    assert pack_plan(np.asarray([], int), 11) == []


def test_pack_places_documents_end_to_end() -> None:
    examples = [tokens([5, 6, 7], [1, 0, 1]), tokens([8], [0]), tokens([9, 4], [0.0, 0.5])]
    pack = build_pack(examples, [2, 0], pad_to=8)
    assert pack.tokens.tolist() == [9, 4, 5, 6, 7, 0, 0, 0]
    assert pack.positions.tolist() == [0, 1, 0, 1, 2, 0, 1, 2]
    assert pack.lengths.tolist() == [2, 3, 3]
    assert pack.parents.tolist() == [-1, -1, -1]
    assert pack.documents.tolist() == [2, 0]
    assert pack.targets.tolist() == [1, 4]  # the first token of a document is never a target
    assert pack.sources.tolist() == [0, 3]
    assert pack.ids.tolist() == [4, 7]
    assert pack.entries.tolist() == [0, 1]
    assert pack.weights.tolist() == [0.5, 1.0]
    assert pack.owners.tolist() == [0, 1]
    assert (pack.size, pack.padding) == (5, 3)
    assert [target_tokens(example) for example in examples] == [1, 0, 1]
    assert build_pack(examples, [2, 0], pad_to=5).padding == 0
    with pytest.raises(ValueError, match="do not fit"):
        build_pack(examples, [2, 0], pad_to=4)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.floats(1, 1e6), max_size=60), st.integers(1, 9), st.integers(0, 3), st.integers(0, 3))
def test_steps_hold_every_pack_once(costs: list[float], packs_per_step: int, epoch: int, seed: int) -> None:
    steps = step_plan(np.asarray(costs, np.float64), packs_per_step, epoch, seed)
    assert sorted(pack for step in steps for pack in step) == list(range(len(costs)))
    assert all(len(step) == packs_per_step for step in steps[:-1])
    assert steps == step_plan(np.asarray(costs, np.float64), packs_per_step, epoch, seed)


def test_steps_differ_by_epoch_and_cost_about_the_same() -> None:
    lengths = np.clip(np.random.default_rng(1).lognormal(4.8, 1.0, 6000).astype(int) + 1, 1, 1024)
    costs = pack_costs(pack_plan(lengths, 1024), lengths.astype(float) ** 2)
    assert costs.sum() == pytest.approx((lengths.astype(float) ** 2).sum())
    first, second = step_plan(costs, 8, 0, 0), step_plan(costs, 8, 1, 0)
    assert first != second
    balanced = np.std([costs[step].sum() for step in first[:-1]])
    order = np.random.default_rng(0).permutation(len(costs))
    shuffled = np.std([costs[order[i : i + 8]].sum() for i in range(0, len(costs) - 7, 8)])
    assert balanced < 0.5 * shuffled


def test_digest_names_all_that_the_plan_depends_on() -> None:
    lengths = np.asarray([3, 4])
    base = plan_digest(lengths, 8, "refuse", 0)
    others = [
        plan_digest(np.asarray([4, 3]), 8, "refuse", 0),
        plan_digest(lengths, 9, "refuse", 0),
        plan_digest(lengths, 8, "drop", 0),
        plan_digest(lengths, 8, "refuse", 1),
    ]
    assert len({base, *others}) == 5
    assert base == plan_digest(np.asarray([3, 4], np.int32), 8, "refuse", 0)
