"""One optimizer step of a stage, however its units are packed, accumulated and spread over processes.

A pack's losses come in sum form and are multiplied by each unit's share of the whole step, which the plan alone says.
So a step equals one big batch, and the same step on one process or on many.
"""

import hashlib
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedModel

from .data import Plan
from .forward import inference, pack_logps
from .losses_tokens import task_weights
from .losses_unpaired import kto_kl
from .noise import masked_share, masked_thought, neftune
from .objectives import Loss, Scored, unit_losses
from .packing import Ints, pack_plan
from .ranks import divided
from .reference import Reference, document_sums
from .settings import Training
from .sharded import Spread

VALUES = ("loss", "gain", "prob")
"""What each step says of a unit: its loss; what `unit_losses` says besides; its targets' summed probabilities."""


@dataclass(frozen=True)
class Stage:
    """What the steps of one stage share. key: digest of its inputs and plan. spread: the policy over processes, and the
    parameters that learn. reference: None where the loss needs none. mask_token: what masked_thought puts in place of a
    token."""

    key: str
    loss: Loss
    plan: Plan
    spread: Spread
    reference: Reference | None
    settings: Training
    out: Path
    mask_token: int = 0

    @property
    def policy(self) -> PreTrainedModel:
        return self.spread.model

    @property
    def device(self) -> torch.device:
        return next(iter(self.spread.parameters.values())).device


class Seen(NamedTuple):
    """values: (3, U) VALUES of a step's units, in the order of `plan.units_of(step)`. kl: KTO's reference point."""

    values: Tensor
    kl: float | None


def accumulate(stage: Stage, step: int) -> Seen:
    """Gradients of one optimizer step, summed over its packs and over processes. Returns `step_values`."""
    seen = step_values(stage, step, learn=True)
    stage.spread.sum_gradients()
    return seen


def step_values(stage: Stage, step: int, *, learn: bool = False) -> Seen:
    """What the step's units are worth now; `learn`: gradients as well, of this process's packs."""
    plan, here = stage.plan, stage.spread.here
    chosen = [plan.packs[pack] for pack in plan.steps[step][1]]
    units = plan.units_of(step)
    shares = torch.from_numpy(shares_of(stage, step)).to(stage.device, torch.float32)
    kl, balance = _kl(stage, units), _balance(stage, units)
    ends = np.cumsum([len(members) for members in chosen])
    values = torch.zeros(len(VALUES), len(units), device=stage.device)
    shares_of_ranks = divided([float(plan.units.squares[members].sum()) for members in chosen], here.size)
    for place in stage.spread.turns(shares_of_ranks, learn):
        members = chosen[place]
        inside = slice(int(ends[place]) - len(members), int(ends[place]))
        torch.manual_seed(step_seed(stage.settings.seed, step, place))
        with torch.set_grad_enabled(learn):
            scored = score(stage, members, step, kl, balance)
            losses, gains = unit_losses(stage.loss, scored)
            if learn:
                torch.autograd.backward((losses * shares[inside]).sum())
        probs = scored.by_unit(scored.by_answer(scored.logps.detach().exp()))
        values[:, inside] = torch.stack([losses.detach(), gains, probs]).float()
    return Seen(here.total(values).cpu(), None if kl is None else float(kl))


def score(stage: Stage, members: Ints, step: int, kl: Tensor | None, balance: Tensor | None) -> Scored:
    """The policy's log-probabilities of a pack of units, and what is known of them."""
    units, settings = stage.plan.units, stage.settings
    pack = units.pack(members)
    with ExitStack() as noise:
        if stage.policy.training and stage.loss.family == "tokens":
            seed = step_seed(settings.seed, step)
            if settings.masked_thought:
                share = masked_share(step, len(stage.plan.steps), settings.masked_thought)
                pack = masked_thought(pack, seed, share, mask_token=stage.mask_token)
            if settings.neftune_alpha:
                noise.enter_context(neftune(stage.policy, pack, seed, settings.neftune_alpha))
        logps, weights, owners = pack_logps(stage.policy, pack)
    answers = units.documents_of(members)

    def picked(values: NDArray[np.generic] | None, places: Ints = answers) -> Tensor | None:
        return None if values is None else torch.from_numpy(values[places]).to(logps.device)

    return Scored(
        logps=logps,
        weights=weights,
        owners=owners,
        first=torch.from_numpy(np.concatenate([[0], np.cumsum(units.widths[members])])),
        reference=None if stage.reference is None else picked(stage.reference.answers),
        desirable=picked(units.labels),
        kl=kl,
        rewards=picked(units.rewards),
        balance=None if balance is None else balance[torch.from_numpy(members)].to(logps.device),
    )


def shares_of(stage: Stage, step: int) -> NDArray[np.float64]:
    """(U,) what each unit's summed loss is multiplied by: one over the step's target weight (tokens) or its units."""
    units = stage.plan.units_of(step)
    whole = float(stage.plan.units.weights[units].sum()) if stage.loss.family == "tokens" else float(len(units))
    return np.full(len(units), 1.0 / whole)


def step_seed(seed: int, step: int, place: int = -1) -> int:
    """A seed of its own for each step, and for each pack of it, so that neither checkpoints nor processes hold a
    generator's state."""
    return int.from_bytes(hashlib.blake2b(f"{seed} {step} {place}".encode(), digest_size=7).digest())


def _kl(stage: Stage, units: Ints) -> Tensor | None:
    """KTO's reference point: of the step's prompts with strangers' answers, before the step, without gradient."""
    if "kl" not in stage.loss.tensors:
        return None
    assert stage.reference is not None
    strangers, known, here = stage.reference.strangers, stage.reference.stranger_logps, stage.spread.here
    assert strangers is not None and known is not None
    packs = [units[pack] for pack in pack_plan(strangers.lengths[units], stage.settings.capacity)]
    ratios = [torch.zeros(2, 0, device=stage.device)]
    with inference(stage.policy):
        parts = divided([float(strangers.squares[pack].sum()) for pack in packs], here.size)
        for place in stage.spread.turns(parts, learn=False):
            reference = torch.from_numpy(known[packs[place]]).to(stage.device)
            ratios.append(torch.stack([document_sums(stage.policy, strangers, packs[place]), reference]))
    policy, reference = torch.cat(ratios, 1)
    return kto_kl(policy, reference, here.total)


def _balance(stage: Stage, units: Ints) -> Tensor | None:
    """(U,) over all units of the stage: the factor of each one's task in this step."""
    if "balance" not in stage.loss.tensors:
        return None
    of = stage.plan.units
    tasks = np.zeros(len(of.row_ids), np.int64) if of.tasks is None else of.tasks.astype(np.int64)
    totals = np.bincount(tasks[units], weights=of.weights[units], minlength=int(tasks.max()) + 1)
    return task_weights(torch.from_numpy(totals))[torch.from_numpy(tasks)].float()
