"""Skill-It (arXiv 2307.14430): a mixture of skills that follows their losses, through a graph of which skill helps
which. Training and evaluation are the caller's: callables here, so that nothing is trained in this room."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from ..folder import HouseError
from ..text.spans import Ints
from .mixing import mixture_quotas
from .selection import Hashes, Reals, ranks, shuffled

Losses = Mapping[str, float]
Run = Callable[[tuple[str, ...]], Losses]
"""Trains a fresh copy of the model briefly on these skills in equal parts (on none: not at all) and gives its held-out
loss on every skill."""


def skills_graph(skills: Sequence[str], run: Run, targets: Sequence[str] | None = None, pairs: bool = False) -> Reals:
    """The graph A, shape (skills, targets): how much training on skill i lowers the loss on skill j, as a share of it,
    at least 0.

    pairs false: against the untrained model, one run a skill. pairs true: what skill i adds to skill j, training on
    both against training on j alone, one run for each two skills; the diagonal is j's own, against the untrained model.
    targets: skills that count (default: all of them)."""
    wanted = list(skills if targets is None else targets)
    _check_names(skills)
    before = _losses(run(()), wanted)
    graph = np.zeros((len(skills), len(wanted)))
    alone = {name: _losses(run((name,)), wanted) for name in dict.fromkeys([*skills, *(wanted if pairs else ())])}
    for i, skill in enumerate(skills):
        for j, target in enumerate(wanted):
            if pairs and skill != target:
                start, end = alone[target][j], _losses(run((skill, target)), wanted)[j]
            else:
                start, end = before[j], alone[skill][j]
            graph[i, j] = max(0.0, (start - end) / start) if start > 0 else 0.0
    return graph


def updated(shares: Reals, graph: Reals, losses: Reals, eta: float) -> Reals:
    """One step of online mirror descent: p_i exp(eta sum_j A_ij L_j), normalised. Finite for any losses."""
    with np.errstate(divide="ignore"):
        logits = np.log(shares) + eta * (graph @ losses)
    raised = np.exp(logits - logits.max())
    made: Reals = raised / raised.sum()
    return made


@dataclass(frozen=True)
class SkillIt:
    """The mixture of the round at hand; each round makes a new one.

    skills: their names, in the order of the graph's rows. graph: shape (skills, targets). targets: whose losses count
    (default: the skills). eta: step size. shares: of the round at hand. seen: losses of earlier rounds, the last one
    last. window: a mixture follows from the losses of so many last rounds alone, beginning with equal shares; None:
    p_t+1 from p_t.
    """

    skills: tuple[str, ...]
    graph: Reals
    eta: float
    shares: Reals
    targets: tuple[str, ...]
    seen: tuple[Losses, ...] = ()
    window: int | None = None

    def observed(self, losses: Losses) -> "SkillIt":
        """The next round's mixture, from the model's held-out loss on every target after this round."""
        seen = (*self.seen, losses)
        if self.window is None:
            shares = updated(self.shares, self.graph, _losses(losses, self.targets), self.eta)
        else:
            recent = sum((_losses(one, self.targets) for one in seen[-self.window :]), np.zeros(len(self.targets)))
            shares = updated(_equal(len(self.skills)), self.graph, recent, self.eta)
        return SkillIt(self.skills, self.graph, self.eta, shares, self.targets, seen, self.window)

    def mixture(self) -> dict[str, float]:
        """Share of each skill in this round."""
        return dict(zip(self.skills, self.shares.tolist(), strict=True))


def skill_it(
    skills: Sequence[str], graph: npt.ArrayLike, eta: float = 0.2, losses: Losses | None = None,
    targets: Sequence[str] | None = None, window: int | None = None,
) -> SkillIt:  # fmt: skip
    """The first round: shares proportional to exp(eta sum_j A_ij L_j) with the losses before training; equal shares
    where they are not given."""
    _check_names(skills)
    wanted = tuple(skills if targets is None else targets)
    matrix = np.asarray(graph, np.float64)
    if matrix.shape != (len(skills), len(wanted)) or not np.isfinite(matrix).all() or (matrix < 0).any():
        raise HouseError(
            f"Skill-It: the graph has the shape {matrix.shape}; wanted are {len(skills)} skills by {len(wanted)}"
            " targets, no number below 0"
        )
    if not eta > 0 or (window is not None and window < 1):
        raise HouseError(f"Skill-It: eta {eta} is above 0 and window {window} at least 1")
    first = SkillIt(tuple(skills), matrix, eta, _equal(len(skills)), wanted, (), window)
    return first if losses is None else first.observed(losses)


@dataclass(frozen=True)
class Shelf:
    """Rows of each skill that no round has had yet. keys: of `selection.row_keys`; skill: number of each row's."""

    keys: Hashes
    skill: Ints
    left: npt.NDArray[np.bool_]
    seed: int = 0

    def drawn(self, shares: Reals, budget: int) -> tuple[Ints, "Shelf"]:
        """`budget` rows (fewer where fewer are left) in these shares, in a random order that depends on (seed, row_id)
        alone, and the shelf without them. A skill that has run dry leaves its part to the others."""
        order = shuffled(self.keys, self.seed, self.left)
        sizes = np.bincount(self.skill[order], minlength=len(shares))
        quota = mixture_quotas(np.maximum(shares, 1e-12), sizes, budget)
        chosen = order[ranks(order, self.skill)[order] <= quota[self.skill[order]]]
        left = self.left.copy()
        left[chosen] = False
        return chosen, Shelf(self.keys, self.skill, left, self.seed)


def online_mixture(
    start: SkillIt, shelf: Shelf, budget: int, rounds: int, train: Callable[[Ints, int], Losses]
) -> tuple[SkillIt, list[dict[str, Any]]]:
    """Runs Skill-It: in each of `rounds` rounds a `budget / rounds` part of the rows is drawn by the mixture and handed
    to `train(rows, round)`, which goes on training and gives the held-out losses. The state after the last round, and
    of each round {round, shares, rows, losses}. No row is handed out twice."""
    parts = np.diff(np.linspace(0, budget, rounds + 1).round().astype(np.int64))
    state, told = start, []
    for number, part in enumerate(parts.tolist()):
        rows, shelf = shelf.drawn(state.shares, part)
        losses = dict(train(rows, number))
        told.append({"round": number, "shares": state.mixture(), "rows": rows, "losses": losses})
        state = state.observed(losses)
    return state, told


def _losses(losses: Losses, names: Sequence[str]) -> Reals:
    missing = [name for name in names if not np.isfinite(losses.get(name, np.nan))]
    if missing:
        raise HouseError(f"Skill-It: no finite loss of {', '.join(missing)}")
    return np.array([losses[name] for name in names], np.float64)


def _check_names(skills: Sequence[str]) -> None:
    if not skills or len(set(skills)) != len(skills):
        raise HouseError(f"Skill-It: skills have names of their own, at least one; given {list(skills)}")


def _equal(count: int) -> Reals:
    return np.full(count, 1 / count)
