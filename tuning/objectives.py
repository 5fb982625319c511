"""Losses as recipes name them, and what each asks of training: the names of its parameters say.

A loss is a plain function. Its positional parameters are tensors by name (TENSORS), its keyword-only parameters are its
options. One that names a `ref_…` tensor gets the reference's log-probabilities; one that does not costs none.
"""

import inspect
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from ..curation.folder import HouseError
from .losses import LOSSES
from .settings import Loss as Wanted
from .settings import Option
from .units import Family

FAMILIES: dict[str, Family] = {"rejected": "pairs", "desirable": "unpaired", "rewards": "lists", "weights": "tokens"}
TENSORS: dict[Family, tuple[str, ...]] = {
    "tokens": ("logps", "weights", "owners", "balance"),
    "pairs": ("chosen", "rejected", "ref_chosen", "ref_rejected", "chosen_tokens", "rejected_tokens"),
    "unpaired": ("logps", "ref_logps", "tokens", "desirable", "kl"),
    "lists": ("logps", "ref_logps", "tokens", "rewards", "owners", "lists"),
}
LEARNT = ("logps", "chosen", "rejected")  # what gradients flow to
OBJECTIVES: dict[str, tuple[Family, ...]] = {"sft": ("tokens",), "dpo": ("pairs", "lists"), "kto": ("unpaired",)}
DEFAULTS = {"sft": "nll", "dpo": "dpo", "kto": "kto"}


@dataclass(frozen=True)
class Loss:
    """A loss with its options, defaults included. tensors: what it is called with, in order."""

    name: str
    family: Family
    function: Callable[..., Any]
    tensors: tuple[str, ...]
    options: Mapping[str, Any]

    @property
    def reference(self) -> bool:
        """Whether it needs log-probabilities under the weights that the stage starts from."""
        return any(name.startswith("ref_") for name in self.tensors)

    @property
    def beta(self) -> float:
        """Its option `beta`, the scale of an implicit reward; 1 where it has none."""
        return float(self.options.get("beta", 1.0))

    def __call__(self, given: Mapping[str, Any], size: int) -> Tensor:
        """Its values, (size,), of the tensors that it asks for. HouseError for another shape, and where a loss of the
        user's own raises."""
        try:
            found = self.function(*(given[name] for name in self.tensors), **self.options)
        except Exception as error:
            if "." not in self.name or isinstance(error, MemoryError | torch.OutOfMemoryError):
                raise
            frame = traceback.extract_tb(error.__traceback__)[-1]
            raise HouseError(
                f"loss {self.name} fails on {size} {self.family}: {type(error).__name__}: {error} "
                f"({frame.filename}, line {frame.lineno})"
            ) from error
        if not isinstance(found, Tensor) or found.shape != (size,):
            shown = tuple(found.shape) if isinstance(found, Tensor) else type(found).__name__
            raise HouseError(f"loss {self.name} returned {shown}; a loss of {self.family} returns a tensor ({size},)")
        return found


def family_of(function: Callable[..., Any]) -> Family | None:
    """What a loss is a loss of, by the names of its positional parameters; None: it is no loss."""
    names = _parameters(function)[0]
    return next((family for mark, family in FAMILIES.items() if mark in names), None)


def find_loss(wanted: Wanted | None, objective: str) -> Loss:
    """The loss that a stage of `objective` (sft, dpo, kto) names; None: the one that is called like it.

    HouseError for a name that nothing has, an option that the loss does not have, and a loss of another objective.
    """
    if isinstance(wanted, Mapping):
        if len(wanted) != 1:
            raise HouseError(f"loss: one name with its options, {{ipo: {{beta: 0.2}}}}, not {len(wanted)} names")
        ((name, options),) = wanted.items()
    else:
        name, options = wanted or DEFAULTS[objective], {}
    function = _imported(name) if "." in name else _named(name, objective)
    family = family_of(function)
    if family is None:
        marks = ", ".join(f"{mark} ({family})" for mark, family in FAMILIES.items())
        raise HouseError(f"loss {name}: none of its parameters says what it is a loss of: {marks}")
    if family not in OBJECTIVES[objective]:
        home = next(key for key, families in OBJECTIVES.items() if family in families)
        raise HouseError(
            f"loss {name} is one of {family}; {objective} trains on {_or(OBJECTIVES[objective])}: use {home}"
        )
    tensors, defaults = _parameters(function)
    foreign = [tensor for tensor in tensors if tensor not in TENSORS[family]]
    if foreign:
        raise HouseError(f"loss {name} asks for {foreign[0]!r}; a loss of {family} gets {', '.join(TENSORS[family])}")
    missing = [
        key for key, value in defaults.items() if value is inspect.Parameter.empty and key not in (options or {})
    ]
    if missing:
        raise HouseError(f"loss {name} needs its option {missing[0]!r}")
    return _probed(Loss(name, family, function, tensors, defaults | _options(name, options or {}, defaults)))


def _probed(loss: Loss) -> Loss:
    """`loss`, once two units have gone through it and back: options out of bounds are told at once, and so are a shape,
    an error or a missing gradient that a loss of one's own gives."""
    two = torch.tensor([-1.0, -2.0])
    given: dict[str, Any] = dict.fromkeys(loss.tensors, two)
    given |= {"weights": torch.ones(2), "owners": torch.arange(2), "balance": torch.ones(2), "kl": torch.zeros(())}
    given |= {"desirable": torch.tensor([True, False]), "rewards": torch.tensor([1.0, 0.0]), "lists": 2}
    given |= dict.fromkeys([name for name in loss.tensors if name.endswith("tokens")], torch.tensor([1.0, 2.0]))
    learnt = [name for name in loss.tensors if name in LEARNT]
    try:
        with torch.enable_grad():
            # tanh keeps what it returned for its gradient, as a model does: changed in place, it fails here
            given |= {name: torch.tensor([-0.5, -1.5], requires_grad=True).tanh() for name in learnt}
            values = loss(given, 2)
        if not values.requires_grad:
            raise HouseError(f"no gradient flows from what it returns to {' or '.join(learnt)}")
        torch.autograd.backward(values.sum())
    except HouseError as error:
        if str(error).startswith(f"loss {loss.name} "):
            raise
        raise HouseError(f"loss {loss.name}: {error}") from error
    except Exception as error:  # whatever a function of the user's own raises
        raise HouseError(f"loss {loss.name} fails on two {loss.family}: {type(error).__name__}: {error}") from error
    return loss


def _named(name: str, objective: str) -> Callable[..., Any]:
    if name not in LOSSES:
        fitting = [key for key, function in LOSSES.items() if family_of(function) in OBJECTIVES[objective]]
        near = _nearest(name, list(LOSSES))
        raise HouseError(f"unknown loss {name!r}; {near}known for {objective}: {', '.join(sorted(fitting))}")
    return LOSSES[name]


def _imported(path: str) -> Callable[..., Any]:
    """A function of the user's own by its dotted path."""
    module, _, name = path.rpartition(".")
    try:
        found = getattr(import_module(module), name, None)
    except ImportError as error:
        raise HouseError(f"loss {path}: cannot import {module}: {error}") from error
    if not inspect.isfunction(found):
        raise HouseError(f"loss {path}: {module} has no function {name}")
    return found


def _parameters(function: Callable[..., Any]) -> tuple[tuple[str, ...], dict[str, Any]]:
    """Names of the positional parameters, and the keyword-only ones with their defaults."""
    parameters = inspect.signature(function).parameters.values()
    positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    names = tuple(p.name for p in parameters if p.kind in positional)
    return names, {p.name: p.default for p in parameters if p.kind is inspect.Parameter.KEYWORD_ONLY}


def _options(name: str, options: Mapping[str, Option], defaults: Mapping[str, Any]) -> dict[str, Any]:
    """The options given, of their defaults' types."""
    found: dict[str, Any] = {}
    for key, value in options.items():
        if key not in defaults:
            known = f"it has {', '.join(defaults)}" if defaults else "it has none"
            raise HouseError(f"loss {name} has no option {key!r}; {_nearest(key, list(defaults))}{known}")
        kind = type(defaults[key])
        if kind is float and isinstance(value, int) and not isinstance(value, bool):
            value = float(value)
        if kind in (bool, int, float, str) and type(value) is not kind:
            raise HouseError(f"loss {name}: {key} is of type {kind.__name__}, not {value!r}")
        found[key] = value
    return found


def _nearest(word: str, known: list[str]) -> str:
    close = get_close_matches(word, known, n=1, cutoff=0.5)
    return f"did you mean {close[0]!r}? " if close else ""


def _or(words: tuple[str, ...]) -> str:
    return " or ".join(words)


def unit_losses(loss: Loss, scored: "Scored") -> tuple[Tensor, Tensor]:
    """Losses (U,) of a pack's units, and (U,) of each, detached, what is worth knowing besides: the margin (pairs and
    lists: of the best answer's implicit reward over the worst's), the implicit reward (unpaired), or zeros (tokens)."""
    return {"tokens": _tokens, "pairs": _pairs, "unpaired": _unpaired, "lists": _lists}[loss.family](loss, scored)


@dataclass(frozen=True)
class Scored:
    """A pack's M entries under the policy, and what is known of its D answers in U units.

    logps, weights, owners: (M,) as `pack_logps` gives them. first: (U + 1,) places of each unit's answers, on the CPU,
    so that no size waits for a GPU. reference: (D,) weighted sums of log-probabilities. desirable: (D,) of KTO's rows.
    kl: of KTO's step. rewards: (D,) of lists. balance: (D,) factors of the answers' tasks.
    """

    logps: Tensor
    weights: Tensor
    owners: Tensor
    first: Tensor
    reference: Tensor | None = None
    desirable: Tensor | None = None
    kl: Tensor | None = None
    rewards: Tensor | None = None
    balance: Tensor | None = None

    @property
    def answers(self) -> int:
        return int(self.first[-1])

    def by_answer(self, values: Tensor) -> Tensor:
        """(D,) sums of entries by their answer."""
        zeros = torch.zeros(self.answers, dtype=values.dtype, device=values.device)
        return zeros.index_add(0, self.owners, values)

    def by_unit(self, values: Tensor) -> Tensor:
        """(U,) sums of answers by their unit."""
        zeros = torch.zeros(len(self.first) - 1, dtype=values.dtype, device=values.device)
        return zeros.index_add(0, self.lists, values)

    @property
    def lists(self) -> Tensor:
        """(D,) the unit of each answer."""
        units = torch.arange(len(self.first) - 1).repeat_interleave(self.first.diff())
        return units.to(self.owners.device)


def _tokens(loss: Loss, scored: Scored) -> tuple[Tensor, Tensor]:
    given = {"logps": scored.logps, "weights": scored.weights, "owners": scored.owners}
    if scored.balance is not None:
        given["balance"] = scored.balance[scored.owners]
    losses = scored.by_unit(scored.by_answer(loss(given, len(scored.logps))))
    return losses, torch.zeros_like(losses.detach())


def _pairs(loss: Loss, scored: Scored) -> tuple[Tensor, Tensor]:
    sums, tokens = scored.by_answer(scored.logps * scored.weights).view(-1, 2), _lengths(scored).view(-1, 2)
    given = {
        "chosen": sums[:, 0], "rejected": sums[:, 1], "chosen_tokens": tokens[:, 0], "rejected_tokens": tokens[:, 1]
    }  # fmt: skip
    gained = sums.detach()
    if scored.reference is not None:
        reference = scored.reference.view(-1, 2)
        given |= {"ref_chosen": reference[:, 0], "ref_rejected": reference[:, 1]}
        gained = gained - reference
    elif "chosen_tokens" in loss.tensors:  # what has no reference and asks for lengths compares means (SimPO, ORPO)
        gained = gained / tokens
    return loss(given, len(sums)), loss.beta * (gained[:, 0] - gained[:, 1])


def _unpaired(loss: Loss, scored: Scored) -> tuple[Tensor, Tensor]:
    sums = scored.by_answer(scored.logps * scored.weights)
    given = {
        "logps": sums, "ref_logps": scored.reference, "tokens": _lengths(scored), "desirable": scored.desirable,
        "kl": scored.kl,
    }  # fmt: skip
    return loss(given, len(sums)), loss.beta * _gained(sums, scored)


def _lists(loss: Loss, scored: Scored) -> tuple[Tensor, Tensor]:
    sums, units = scored.by_answer(scored.logps * scored.weights), len(scored.first) - 1
    rewards, owners = scored.rewards, scored.lists
    assert rewards is not None
    given = {
        "logps": sums, "ref_logps": scored.reference, "tokens": _lengths(scored), "rewards": rewards, "owners": owners,
        "lists": units,
    }  # fmt: skip
    gained = _gained(sums, scored)
    order = torch.argsort(rewards, stable=True)
    order = order[torch.argsort(owners[order], stable=True)]  # by list, and in each from the worst to the best
    return loss(given, units), loss.beta * (gained[order[scored.first[1:] - 1]] - gained[order[scored.first[:-1]]])


def _gained(sums: Tensor, scored: Scored) -> Tensor:
    """(D,) log-probability of each answer, over the reference's where there is one."""
    return sums.detach() if scored.reference is None else sums.detach() - scored.reference


def _lengths(scored: Scored) -> Tensor:
    """(D,) sums of the answers' target weights."""
    return scored.by_answer(scored.weights)
