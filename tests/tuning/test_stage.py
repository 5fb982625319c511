from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from gristmill.curation.folder import HouseError
from gristmill.tuning.data import kl_units
from gristmill.tuning.lora import add_lora
from gristmill.tuning.models import load_model
from gristmill.tuning.objectives import Scored, unit_losses
from gristmill.tuning.outlook import load_of_plan
from gristmill.tuning.ranks import World
from gristmill.tuning.recompute import recompute
from gristmill.tuning.reference import Reference
from gristmill.tuning.settings import Lora, Training
from gristmill.tuning.sharded import spread
from gristmill.tuning.stage import accumulate, shares_of, step_values

from .small_stage import SMALL, alone, close, make_home, parameters_of, plain, stage_of

CASES = [("sft", "nll"), ("sft", "mft"), ("dpo", "dpo"), ("dpo", "simpo"), ("dpo", "tpo"), ("kto", "kto")]
FULL = replace(SMALL, lora=None, capacity=220, packs_per_step=4)


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    return make_home(tmp_path_factory.mktemp("home"))


def referred(stage):
    """The stage with a made-up reference, where its loss wants one."""
    draw = np.random.default_rng(0)
    units = stage.plan.units
    answers = -30 * draw.random(len(units.documents)).astype(np.float32)
    strangers = None
    if "kl" in stage.loss.tensors:
        strangers = kl_units(units, np.arange(len(units.row_ids)), 220, 256)
    others = None if strangers is None else -200 - 30 * draw.random(len(units.row_ids)).astype(np.float32)
    return replace(stage, reference=Reference(answers, strangers, others)) if stage.loss.reference else stage


def one_batch(stage, step, model):
    """The step's loss as of one batch of documents that no pack holds, by transformers' own forward pass."""
    units, of = stage.plan.units_of(step), stage.plan.units
    places = of.documents_of(units)
    logps = [alone(model, of.documents[place]) for place in places]
    weights = [torch.from_numpy(of.documents[place].weights[of.documents[place].weights > 0]) for place in places]
    kl = None
    if "kl" in stage.loss.tensors:
        with torch.no_grad():
            found = [alone(model, stage.reference.strangers.documents[unit]).sum() for unit in units]
        kl = (torch.stack(found) - torch.from_numpy(stage.reference.stranger_logps[units])).mean().clamp(min=0)
        assert kl > 0
    balance = None
    if stage.loss.name == "mft":
        tasks = torch.from_numpy(of.tasks[units].astype(np.int64))
        totals = torch.zeros(2, dtype=torch.float64).index_add(0, tasks, torch.from_numpy(of.weights[units]))
        balance = (totals.sum() / 2 / totals)[tasks].float()
    known = [stage.reference and stage.reference.answers, of.labels, of.rewards]
    reference, labels, rewards = (None if one is None else torch.from_numpy(one[places]) for one in known)
    owners = torch.arange(len(places)).repeat_interleave(torch.tensor([len(one) for one in logps]))
    first = torch.from_numpy(np.concatenate([[0], np.cumsum(of.widths[units])]))
    scored = Scored(torch.cat(logps), torch.cat(weights), owners, first, reference, labels, kl, rewards, balance)
    losses, gains = unit_losses(stage.loss, scored)
    divisor = float(torch.cat(weights).sum()) if stage.loss.family == "tokens" else len(units)
    return losses.sum() / divisor, losses.detach(), gains


@pytest.mark.parametrize(("objective", "name"), CASES)
def test_trap_11_a_partial_last_window_of_ragged_packs_equals_one_batch(home: Path, objective: str, name: str) -> None:
    stage = referred(stage_of(home, objective, replace(FULL, loss=name)))
    step = -1 + -(-len(stage.plan.packs) // 4)  # of the first epoch the last
    if len(stage.plan.steps[step][1]) in (1, 4):
        step = 0
        stage.plan.steps[step][1].pop()  # a partial window all the same
    assert (
        1 < len(stage.plan.steps[step][1]) < 4
        and len(set(stage.plan.units.lengths[stage.plan.units_of(step)].tolist())) > 2
    )
    naive = plain(home)
    loss, losses, gains = one_batch(stage, step, naive)
    loss.backward()
    seen = accumulate(stage, step)
    torch.testing.assert_close(seen.values[0], losses, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(seen.values[1], gains, rtol=1e-4, atol=1e-3)
    assert float(seen.values[0].double().sum()) * shares_of(stage, step)[0] == pytest.approx(loss.item(), rel=1e-5)
    close(parameters_of(stage), dict(naive.named_parameters()))


@pytest.mark.parametrize("objective", ["sft", "kto"])
def test_other_packs_give_the_same_step(home: Path, objective: str) -> None:
    """Many small packs against one that holds the whole epoch."""
    small = referred(stage_of(home, objective, replace(FULL, packs_per_step=1000)))
    large = referred(stage_of(home, objective, replace(FULL, packs_per_step=1000, capacity=4000)))
    assert len(small.plan.packs) > 5 and len(large.plan.packs) == 1
    found = {}
    for name, stage in (("small", small), ("large", large)):
        values = accumulate(stage, 0).values
        found[name] = values[:, torch.from_numpy(np.argsort(stage.plan.units_of(0)))]
    torch.testing.assert_close(found["small"], found["large"], rtol=1e-4, atol=1e-4)
    close(parameters_of(small), parameters_of(large))


def test_weights_of_the_rows_normalise_the_step(home: Path) -> None:
    """Half the weight on every target changes neither loss nor gradient."""
    stage = stage_of(home, "sft", FULL)
    halved = [replace(document, weights=document.weights / 2) for document in stage.plan.units.documents]
    other = replace(stage, plan=replace(stage.plan, units=replace(stage.plan.units, documents=halved)))
    accumulate(stage, 0)
    before = {name: parameter.grad.clone() for name, parameter in parameters_of(stage).items()}
    stage.policy.zero_grad()
    values = accumulate(other, 0).values
    torch.testing.assert_close({n: p.grad for n, p in parameters_of(stage).items()}, before)
    assert shares_of(other, 0)[0] == 2 * shares_of(stage, 0)[0] > 0
    assert values[0].sum() > 0


def adapted(home, **settings):
    settings = replace(FULL, lora=Lora(rank=4, alpha=8.0, dropout=0.3), **settings)
    stage = stage_of(home, "sft", settings)
    policy = load_model(home / "model", dtype="fp32", device="cpu")
    add_lora(policy, settings.lora, 0)
    for name, parameter in policy.named_parameters():
        if name.endswith(".B"):
            torch.nn.init.normal_(parameter, std=0.1, generator=torch.Generator().manual_seed(len(name)))
    return replace(stage, spread=spread(policy.train(), World(), "ddp")), recompute(policy, settings)


def gradients(stage):
    stage.policy.zero_grad()
    values = accumulate(stage, 0).values
    return values, {name: parameter.grad.clone() for name, parameter in parameters_of(stage).items()}


def test_checkpointed_layers_draw_the_same_dropout_and_give_the_same_gradients(home: Path) -> None:
    kept, count = adapted(home)
    assert count == 0
    values, expected = gradients(kept)
    assert not torch.equal(values, accumulate(replace(kept, settings=replace(kept.settings, seed=1)), 0).values)
    for asked, layers in (("layers", 2), (1, 1), (99, 2)):
        stage, count = adapted(home, checkpointing=asked)
        flags = [layer.gradient_checkpointing for layer in stage.policy.base_model.layers]
        assert count == layers and flags == [place < layers for place in range(2)]
        again, found = gradients(stage)
        assert torch.equal(again, values)
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-7)


def test_offload_is_for_checkpointed_layers_on_a_gpu(home: Path) -> None:
    policy = load_model(home / "model", dtype="fp32", device="cpu")
    with pytest.raises(HouseError, match="this stage checkpoints no layer"):
        recompute(policy, Training(offload=True))
    with pytest.raises(HouseError, match="runs on a CPU"):
        recompute(policy, Training(offload=True, checkpointing="layers"))


def test_noise_is_on_while_it_learns_and_off_while_it_measures(home: Path) -> None:
    plain_stage = stage_of(home, "sft", FULL)
    noisy = replace(plain_stage, settings=replace(FULL, neftune_alpha=10.0, masked_thought=0.4), mask_token=1)
    plain_stage.policy.train()
    clean = step_values(plain_stage, 0).values
    first, again = (step_values(noisy, 0).values for _ in range(2))
    assert torch.equal(first, again) and not torch.allclose(first[0], clean[0], rtol=1e-4)
    noisy.policy.train(False)
    assert torch.equal(step_values(noisy, 0).values, clean)


def test_the_load_counts_a_shared_prompt_once(home: Path) -> None:
    plan = stage_of(home, "dpo", FULL).plan
    load = load_of_plan(plan)
    segments = [plan.units.pack(pack) for pack in plan.packs]
    assert load.tokens == sum(len(pack.tokens) for pack in segments)
    area = 0
    for pack in segments:
        ends = pack.lengths + np.where(pack.parents >= 0, pack.lengths[pack.parents], 0)
        area += float((ends**2 - (ends - pack.lengths) ** 2).sum()) / 2
    assert load.area(None) == pytest.approx(area)
