"""Mixtures of sources and tasks as pure functions: which group a row is of, shares by size and temperature, quotas, and
subsets for ablations. Every draw is a function of (seed, row_id)."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from ..folder import HouseError
from ..rows import ROW
from ..steps import Corpus
from ..text.spans import Ints
from .selection import Bools, Hashes, Reals, codes, quotas, row_keys, shuffled, spend_in_groups

Weights = Mapping[str, float] | Literal["proportional", "equal"]


# ---- which group a row is of


def group_column(by: str) -> str:
    """The column of the schema ROW that tells the group: `source` or `maker`; for any other name `meta`, whose key it
    is (such as task)."""
    return by if by in ("source", "maker") else "meta"


def group_names(rows: pa.Table, by: str) -> pa.Array:
    """The group of each row as a string; empty where it has none. `rows` carries group_column(by)."""
    column = rows[group_column(by)].combine_chunks()
    column = column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column
    if by in ROW.names:
        return pc.fill_null(column.cast(pa.string()), "")
    coded = column.dictionary_encode()
    named = pa.array([_named(meta, by) for meta in coded.dictionary.to_pylist()], pa.string())
    return pc.fill_null(named.take(coded.indices), "")


def _named(meta: str | None, key: str) -> str:
    found = json.loads(meta) if meta else None
    value = found.get(key) if isinstance(found, dict) else None
    return "" if value is None else value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def groups(corpus: Corpus, by: str) -> tuple[Ints, list[str]]:
    """(number of each live row's group, the groups in sorted order)."""
    return codes(pa.chunked_array([group_names(part, by) for part in corpus.tables([group_column(by)])], pa.string()))


# ---- shares


def shares(
    weights: Weights, names: Sequence[str], sizes: Ints, temperature: float = 1.0, cap: int | None = None
) -> Reals:
    """Share of each group in the mixture, summing to 1: w^(1 / temperature) over its sum, where w is the stated weight,
    the group's size, at most `cap` (T5, arXiv 1910.10683, section 3.5.2), or 1. Groups of size 0, and groups that a
    mapping does not name, get none."""
    if isinstance(weights, Mapping):
        whole = np.array([float(weights.get(name, 0.0)) for name in names])
    elif weights == "proportional":
        whole = np.minimum(sizes, cap or np.iinfo(np.int64).max).astype(np.float64)
    else:
        whole = np.ones(len(names))
    whole = np.where(sizes > 0, whole, 0.0)
    largest = whole.max(initial=0.0)
    if largest <= 0:
        return np.zeros(len(names))
    raised = (whole / largest) ** (1 / temperature)  # 0 stays 0
    made: Reals = raised / raised.sum()
    return made


def largest_budget(share: Reals, sizes: Ints) -> int:
    """The most rows that can be drawn with these shares before the first group runs dry."""
    wanted = share > 0
    return int(np.floor((sizes[wanted] / share[wanted]).min() + 1e-9)) if wanted.any() else 0


def mixture_quotas(share: Reals, sizes: Ints, budget: int) -> Ints:
    """Rows of each group: `budget` in all, by `share`, rounded by largest remainders. What a group cannot fill goes to
    the others that have a share, in proportion; where all of those are dry the budget stays unmet."""
    able = np.where(share > 0, sizes, 0)
    return quotas(share, able, budget, np.zeros_like(able))


# ---- ablations (Camels, arXiv 2306.04751)


@dataclass(frozen=True)
class Subset:
    """One set of rows to train on and compare: `only` a source, all `without` it, or `all` of them. rows: indices."""

    kind: Literal["all", "only", "without"]
    source: str | None
    rows: Ints
    cost: int

    @property
    def name(self) -> str:
        return self.kind if self.source is None else f"{self.kind}-{self.source}"


def subset(
    keys: Hashes, group: Ints, costs: Ints, open_groups: Bools, budget: int, seed: int
) -> tuple[Bools, Ints, Ints]:
    """(kept rows, rank in its group, quota of each group) of a draw that spends `budget` on the open groups in
    proportion to what they hold."""
    order = shuffled(keys, seed, open_groups[group])
    held = np.asarray(np.bincount(group, weights=costs, minlength=len(open_groups)), np.float64)
    held[~open_groups] = 0.0
    return spend_in_groups(order, group, costs, held, budget)


def ablation_budget(group: Ints, costs: Ints) -> int:
    """The most that every subset of an ablation can spend: what the smallest source holds, or all but the largest."""
    held = np.bincount(group, weights=costs).astype(np.int64)
    held = held[held > 0]
    return int(min(held.min(), held.sum() - held.max())) if len(held) > 1 else int(held.sum())


def ablations(
    row_ids: pa.Array | pa.ChunkedArray,
    sources: Sequence[str],
    costs: Ints | None = None,
    budget: int | None = None,
    seed: int = 0,
) -> list[Subset]:
    """For each source the rows of it alone and those of all others, and a subset of all, each drawn to the same cost:
    in rows, or in what `costs` counts, such as the tokens of each row. budget: the cost (default: the most that every
    subset can spend). A HouseError where a subset cannot spend it: then the comparison would not be one at equal
    tokens. Subsets in tokens end within one row of the budget."""
    coded = pa.array(sources, pa.string()).dictionary_encode()
    group, names = coded.indices.to_numpy(zero_copy_only=False).astype(np.int64), coded.dictionary.to_pylist()
    spent = np.ones(len(group), np.int64) if costs is None else np.asarray(costs, np.int64)
    most = ablation_budget(group, spent)
    budget = most if budget is None else budget
    if budget > most:
        raise HouseError(f"an ablation at equal budgets can spend {most} on each of its subsets, not {budget}")
    keys = row_keys(row_ids)
    found = []
    by_name = sorted(range(len(names)), key=names.__getitem__)
    wanted: list[tuple[Literal["all", "only", "without"], int]] = [("all", -1)]
    wanted += [("only", one) for one in by_name] + ([("without", one) for one in by_name] if len(names) > 1 else [])
    for kind, one in wanted:
        here = np.arange(len(names)) == one
        kept, _, _ = subset(keys, group, spent, here if kind == "only" else ~here, budget, seed)
        rows = np.flatnonzero(kept)
        found.append(Subset(kind, None if one < 0 else names[one], rows, int(spent[rows].sum())))
    return found
