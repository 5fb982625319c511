"""Mixing: how many rows of each source or task stay."""

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from ..folder import HouseError
from ..selecting.mixing import ablation_budget, groups, largest_budget, mixture_quotas, shares, subset
from ..selecting.selection import (
    Bools,
    Pool,
    Unit,
    check_budget,
    cost_of,
    dropped,
    paid,
    pool,
    ranks,
    selected,
    shuffled,
    spend_in_groups,
)
from ..steps import VERDICT, Corpus, Measure, Unmeasured
from ..text.spans import Ints


@dataclass(frozen=True)
class Cap(Unmeasured):
    """Keeps at most so many rows of each source or task (OPT-IML, arXiv 2212.12017; T5, arXiv 1910.10683).

    most: rows of each group, or a mapping of groups to rows (groups that it does not name are not capped). by: source,
    maker, or a key of the rows' `meta`, such as task; rows without it are not capped. Which rows stay is drawn
    by a hash of (`seed`, row_id). Reason: over_cap. Evidence of the dropped rows: {group, cap, rank}, the rank in the
    draw, above the cap. Holds some 60 bytes a row.
    """

    most: int | Mapping[str, int]
    by: str = "source"
    seed: int = 0
    scope: ClassVar[Literal["corpus"]] = "corpus"

    def __post_init__(self) -> None:
        caps = self.most.values() if isinstance(self.most, Mapping) else [self.most]
        if any(cap < 0 for cap in caps):
            raise HouseError(f"{self}: a cap is a number of rows, at least 0")

    def judge(self, corpus: Corpus) -> pa.Table:
        group, names = groups(corpus, self.by)
        rows = pool(corpus, "rows", None)
        if isinstance(self.most, Mapping):
            _warn_unknown(self, self.most, names)
            cap = np.array([self.most.get(name, len(rows)) for name in names], np.int64)
        else:
            cap = np.array([self.most if name else len(rows) for name in names], np.int64)
        rank = ranks(shuffled(rows.keys, self.seed, rows.open), group)
        keep = rank <= cap[group]
        return dropped(rows, keep, "over_cap", {"group": _of(names, group), "cap": cap[group], "rank": rank})


@dataclass(frozen=True)
class Mixture:
    """Keeps exactly `budget` rows in stated shares of sources or tasks (temperature mixing: T5, arXiv 1910.10683; mT5,
    arXiv 2010.11934).

    weights: a mapping of groups to numbers (groups that it does not name go), proportional (to the rows of the group)
    or equal. temperature: a group's share is its weight^(1 / temperature) over their sum: 1 leaves the weights as they
    are, a high one makes them equal. cap: for proportional, no group counts for more rows (T5's K). by: source, maker,
    or a key of the rows' `meta`, such as task (rows without it are a group named ""). budget: rows; null: the most that
    these shares allow before the first group runs dry. unit: rows, words or tokens; tokens: the measure that counts
    them.

    Shares are rounded by largest remainders. Where a group runs dry its quota goes to the others; no row is taken
    twice. Rows are drawn by a hash of (`seed`, row_id). Reasons: not_selected; not_scorable where a row's tokens are
    unknown. Evidence of every row: {group, quota, rank}, in rows kept where rank <= quota.
    """

    budget: int | None = None
    weights: Mapping[str, float] | Literal["proportional", "equal"] = "proportional"
    by: str = "source"
    temperature: float = 1.0
    cap: int | None = None
    unit: Unit = "rows"
    tokens: Measure | None = None
    seed: int = 0
    scope: ClassVar[Literal["corpus"]] = "corpus"
    score: ClassVar[str | None] = None

    def __post_init__(self) -> None:
        check_budget(self, 1 if self.budget is None else self.budget, self.unit, self.tokens)
        if not self.temperature > 0 or (self.cap is not None and self.cap < 1):
            raise HouseError(f"{self}: temperature is above 0, cap at least 1")
        if self.cap is not None and self.weights != "proportional":
            raise HouseError(f"{self}: cap bounds proportional weights; leave one of them out")
        if isinstance(self.weights, Mapping):
            given = list(self.weights.values())
            if not any(weight > 0 for weight in given) or not all(0 <= weight < np.inf for weight in given):
                raise HouseError(f"{self}: weights are numbers from 0 on, at least one of them above 0")

    @property
    def needs(self) -> tuple[Measure, ...]:
        return tuple(measure for measure, _ in cost_of(self, self.unit, self.tokens))

    def limits(self) -> tuple[float | None, float | None]:
        return None, None

    def judge(self, corpus: Corpus) -> pa.Table:
        group, names = groups(corpus, self.by)
        rows = pool(corpus, self.unit, self.tokens)
        if isinstance(self.weights, Mapping):
            _warn_unknown(self, self.weights, names)
        held = np.bincount(group[rows.open], weights=rows.costs[rows.open], minlength=len(names)).astype(np.int64)
        counted = np.bincount(group[rows.open], minlength=len(names))
        share = shares(self.weights, names, counted, self.temperature, self.cap)
        budget = largest_budget(share, held) if self.budget is None else self.budget
        if not share.any() and len(rows):
            raise HouseError(f"{self}: no row is of a group that has a weight; there are {', '.join(names)}")
        if budget > (most := int(held[share > 0].sum())):
            warnings.warn(f"Mixture: budget {budget} of {most} {self.unit}: all are kept, in the shares they have",
                          stacklevel=2)  # fmt: skip
        keep, rank, quota = self._drawn(rows, group, share, held, budget)
        evidence = {"group": _of(names, group), "quota": quota[group], "rank": rank}
        return selected(rows, keep, evidence | paid(self.unit, rows.costs))

    def _drawn(self, rows: Pool, group: Ints, share: np.ndarray, held: Ints, budget: int) -> tuple[Bools, Ints, Ints]:
        order = shuffled(rows.keys, self.seed, rows.open)
        if self.unit == "rows":
            rank, quota = ranks(order, group), mixture_quotas(share, held, budget)
            return (rank > 0) & (rank <= quota[group]), rank, quota
        wanted = order[share[group[order]] > 0]
        keep, _, quota = spend_in_groups(wanted, group, rows.costs, share, min(budget, int(held[share > 0].sum())))
        return keep, ranks(order, group), quota


@dataclass(frozen=True)
class StageMixture(Unmeasured):
    """Keeps a small share of the specialised rows beside all general ones: the second stage of DMT, dual-stage mixed
    fine-tuning (arXiv 2310.05492).

    DMT trains first on specialised data (mathematics, code), then on general data with a share k of the specialised
    rows, which keeps what the first stage taught. So a recipe curates two sets: the first of the specialised sources;
    the second of all sources, with this step, `set_name` naming the first. share: k, of the rows that the first set
    trains on (default 1/256, the paper's). A row of a source of the first set stays only if that set trains on it and
    it is drawn, by a hash of (`seed`, row_id); rows of other sources stay. The number drawn is exact: share times the
    rows that the first set trains on and that are here, rounded half up.

    Reasons: not_selected; not_in_first_stage. Evidence of the specialised rows: {group, quota, rank}.
    """

    set_name: str
    share: float = 1 / 256
    seed: int = 0
    scope: ClassVar[Literal["corpus"]] = "corpus"

    def __post_init__(self) -> None:
        if not 0 <= self.share <= 1:
            raise HouseError(f"{self}: share lies between 0 and 1")

    def judge(self, corpus: Corpus) -> pa.Table:
        source, names = groups(corpus, "source")
        rows = pool(corpus, "rows", None)
        special, learnt = self._first_stage(corpus, source, names)
        quota = int(np.floor(self.share * learnt.sum() + 0.5))
        rank = ranks(shuffled(rows.keys, self.seed, learnt), np.zeros(len(rows), np.int64))
        keep = ~special | (learnt & (rank <= quota))
        told = {"group": _of(names, source), "quota": np.full(len(rows), quota), "rank": rank}
        said = dropped(rows, keep, "not_selected", told, shown=learnt)
        absent = pa.array(special & ~learnt)
        return said.set_column(1, VERDICT.field("reason"), pc.if_else(absent, "not_in_first_stage", said["reason"]))

    def _first_stage(self, corpus: Corpus, source: Ints, names: list[str]) -> tuple[Bools, Bools]:
        """Rows of a source of the first set, and those of them that it trains on."""
        trained = [(part["row_id"], part["source"]) for part in corpus.tools.curated(self.set_name, "train")]
        ids = pa.chunked_array([chunk for one, _ in trained for chunk in one.chunks], pa.string())
        sources = {item for _, one in trained for item in pc.unique(one).to_pylist()}
        special = np.isin(source, [number for number, item in enumerate(names) if item in sources])
        known = [np.asarray(pc.is_in(part["row_id"], value_set=ids.combine_chunks()))
                 for part in corpus.tables(["row_id"])]  # fmt: skip
        return special, special & np.concatenate([np.zeros(0, np.bool_), *known])


@dataclass(frozen=True)
class SourceAblation:
    """Keeps one of the subsets by which sources are compared at equal size: a source alone, or all but one (Camels,
    arXiv 2306.04751).

    only: the group that is left alone; without: the one that is left out; neither: a draw from all. One curated set for
    each, and the runs tell what a source gives and costs. by: source, maker, or a key of the rows' `meta`. budget: rows
    (or words, or tokens of the measure `tokens`); null: the most that every such subset of these rows can spend, so
    that sets with equal steps before come out equal. Rows are drawn by a hash of (`seed`, row_id), of several groups in
    proportion to what they hold. Reasons: not_selected; not_scorable where a row's tokens are unknown. Evidence:
    {group, quota, rank}.
    """

    only: str | None = None
    without: str | None = None
    budget: int | None = None
    by: str = "source"
    unit: Unit = "rows"
    tokens: Measure | None = None
    seed: int = 0
    scope: ClassVar[Literal["corpus"]] = "corpus"
    score: ClassVar[str | None] = None

    def __post_init__(self) -> None:
        check_budget(self, 1 if self.budget is None else self.budget, self.unit, self.tokens)
        if self.only is not None and self.without is not None:
            raise HouseError(f"{self}: give `only` or `without`, not both")

    @property
    def needs(self) -> tuple[Measure, ...]:
        return tuple(measure for measure, _ in cost_of(self, self.unit, self.tokens))

    def limits(self) -> tuple[float | None, float | None]:
        return None, None

    def judge(self, corpus: Corpus) -> pa.Table:
        group, names = groups(corpus, self.by)
        rows = pool(corpus, self.unit, self.tokens)
        for name in (self.only, self.without):
            if len(rows) and name is not None and name not in names:
                raise HouseError(f"{self}: no row is of {self.by} {name!r}; there are {', '.join(names)}")
        most = ablation_budget(group[rows.open], rows.costs[rows.open]) if rows.open.any() else 0
        budget = most if self.budget is None else self.budget
        if budget > most:
            raise HouseError(
                f"{self}: at equal budgets each subset of these {len(names)} groups can spend {most} {self.unit}, "
                f"not {budget}. Lower the budget"
            )
        wanted = [name == self.only if self.only is not None else name != self.without for name in names]
        taken = np.array([*wanted, False])
        shut = np.where(rows.open, group, len(names))  # rows of unknown cost are of no group
        keep, rank, quota = subset(rows.keys, shut, rows.costs, taken, budget, self.seed)
        return selected(rows, keep, {"group": _of(names, group), "quota": quota[group], "rank": rank})


def _of(names: list[str], group: Ints) -> pa.Array:
    return pa.array(names, pa.string()).take(pa.array(group))


def _warn_unknown(step: object, named: Mapping[str, float], names: list[str]) -> None:
    unknown = [name for name in named if name not in names]
    if unknown:
        warnings.warn(f"{type(step).__name__}: no row is of {', '.join(unknown)}", stacklevel=3)
