"""A random sample with a share for each source, task, or other label."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from ..folder import HouseError
from ..selecting.selection import (
    Budgeted,
    Shares,
    Unit,
    all_kept,
    check_budget,
    codes,
    cost_of,
    paid,
    pool,
    reads,
    selected,
    shared,
    shuffled,
    spend_in_groups,
)
from ..steps import Corpus, Measure


@dataclass(frozen=True)
class StratifiedSample(Budgeted):
    """Keeps `budget` rows, drawn at random inside each stratum, the budget shared out among the strata.

    by: what a row's stratum is: `source`, or a key of the row's `meta` (what the source had besides, such as `task` or
    `category`); rows without that key are a stratum of their own, with the empty name. shares: of a stratum equal, or
    proportional to its size or to the square root of it; at least 1 row (or its first row) where the budget allows.
    What a stratum cannot fill goes to the others. unit: what the budget counts: rows, words (of the response) or
    tokens (by the measure `tokens`); words and tokens are never passed: rows come in the order of how full they make
    their stratum's quota, and one that no longer fits is passed over.

    Rows rank inside a stratum by a hash of (seed, row_id). Reasons: not_selected; not_scorable where the cost is
    unknown. Evidence: {stratum, quota, rank} and the row's cost where that is not a row; with a budget in rows, kept
    where rank <= quota. A `by` that no row has is an error. Holds some 80 bytes a row.
    """

    budget: int
    by: str = "source"
    shares: Shares = "equal"
    seed: int = 0
    unit: Unit = "rows"
    tokens: Measure | None = None

    def __post_init__(self) -> None:
        check_budget(self, self.budget, self.unit, self.tokens)

    @property
    def needs(self) -> tuple[Measure, ...]:
        return reads(self, *cost_of(self, self.unit, self.tokens))

    def judge(self, corpus: Corpus) -> pa.Table:
        """Verdicts for all live rows, in the order of `corpus.tables()`."""
        rows = pool(corpus, self.unit, self.tokens)
        everything = all_kept(self, rows, self.budget, self.unit)
        if everything is not None:
            return everything
        labels, names = codes(pa.chunked_array(list(strata(corpus, self.by)), pa.string()))
        if self.by != "source" and names == [""]:
            raise HouseError(f"{self}: no row has {self.by!r} in its meta; `by` is source or a key that meta holds")
        order = shuffled(rows.keys, self.seed, rows.open)
        weights = shared(np.bincount(labels, weights=rows.costs, minlength=len(names)), self.shares)
        keep, rank, quota = spend_in_groups(order, labels, rows.costs, weights, self.budget)
        proof: dict[str, Any] = {
            "stratum": pa.array(names).take(pa.array(labels)),
            "quota": quota[labels],
            "rank": rank,
        }
        return selected(rows, keep, proof | paid(self.unit, rows.costs))


def strata(corpus: Corpus, by: str) -> Iterator[pa.Array]:
    """The stratum of each live row: its source, or a key of its meta; equal metas are read once."""
    column = "source" if by == "source" else "meta"
    for table in corpus.tables([column]):
        for chunk in table[column].chunks:
            if by == "source":
                yield chunk
                continue
            coded = pc.dictionary_encode(chunk)
            named = pa.array([_label(meta, by) for meta in coded.dictionary.to_pylist()], pa.string())
            yield named.take(coded.indices)


def _label(meta: str | None, key: str) -> str | None:
    try:
        found = json.loads(meta or "{}")
    except ValueError:
        return None
    value = found.get(key) if isinstance(found, dict) else None
    if value is None or isinstance(value, str):
        return value
    return json.dumps(value, sort_keys=True, ensure_ascii=False)
