"""A fresh random subset for each epoch."""

import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from ..folder import HouseError
from ..selecting.selection import (
    Budgeted,
    Hashes,
    Pool,
    Unit,
    check_budget,
    cost_of,
    paid,
    pool,
    reads,
    selected,
    shuffled,
    spend,
)
from ..steps import Corpus, Measure

if TYPE_CHECKING:
    from ..text.spans import Ints


@dataclass(frozen=True)
class RepeatedRandom(Budgeted):
    """Keeps the rows of `epochs` random subsets of `budget` each, a fresh one for each epoch of training (RS2, repeated
    random sampling, arXiv 2305.18424): at equal compute the baseline that few selections beat.

    replacement = False: no row comes again before all have come once; then the rows are shuffled anew. True: each
    epoch draws from all rows. Inside an epoch no row comes twice. Draws go by a hash of (seed, epoch, row_id). unit:
    what the budget of an epoch counts: rows, words (of the response) or tokens (by the measure `tokens`); words and
    tokens are never passed: a row that no longer fits is passed over.

    Kept is the union of all epochs. Evidence: {epochs}, the list of the epochs, from 0, that a row belongs to: a
    trainer takes in epoch e the rows whose list holds e. Reasons: not_selected; not_scorable where the cost is
    unknown. Holds some 60 bytes a row, and 8 a row and epoch of the subsets.
    """

    budget: int
    epochs: int = 3
    replacement: bool = False
    seed: int = 0
    unit: Unit = "rows"
    tokens: Measure | None = None

    def __post_init__(self) -> None:
        check_budget(self, self.budget, self.unit, self.tokens)
        if self.epochs < 1:
            raise HouseError(f"{self}: epochs is at least 1")

    @property
    def needs(self) -> tuple[Measure, ...]:
        return reads(self, *cost_of(self, self.unit, self.tokens))

    def judge(self, corpus: Corpus) -> pa.Table:
        """Verdicts for all live rows, in the order of `corpus.tables()`."""
        rows = pool(corpus, self.unit, self.tokens)
        subsets = epoch_subsets(rows, self.budget, self.epochs, self.replacement, self.seed)
        total = int(rows.costs[rows.open].sum())
        if self.budget >= total:
            warnings.warn(
                f"RepeatedRandom: budget {self.budget} of {total} {self.unit}: all in each epoch", stacklevel=2
            )
        keep = np.zeros(len(rows), np.bool_)
        keep[np.concatenate(subsets)] = True
        proof = {"epochs": _lists(subsets, len(rows))} | paid(self.unit, rows.costs)
        return selected(rows, keep, proof)


def epoch_subsets(rows: Pool, budget: int, epochs: int, replacement: bool, seed: int) -> "list[Ints]":
    """The rows of each epoch, ascending. Without replacement an epoch that a shuffle's last rows do not fill goes on
    with a new shuffle, without the rows it already has."""
    subsets, shuffles = [], 0
    left = np.zeros(0, np.int64)
    for _ in range(epochs):
        taken, money = np.zeros(len(rows), np.bool_), budget
        for fresh in (replacement, True):
            if fresh:
                left = shuffled(_mixed_keys(rows.keys, shuffles), seed, rows.open)
                shuffles += 1
            bought = spend(left[~taken[left]], rows.costs, money)
            taken |= bought
            money -= int(rows.costs[bought].sum())
            left = left[~bought[left]]
            if replacement or money == 0 or len(left):
                break
        subsets.append(np.flatnonzero(taken))
    return subsets


def _mixed_keys(keys: Hashes, shuffle: int) -> Hashes:
    """Keys of the `shuffle`-th shuffle; those of shuffle 0 are the rows' own, so that it draws as RandomSample does."""
    return keys ^ np.array([0, shuffle], np.uint64)


def _lists(subsets: "list[Ints]", rows: int) -> pa.Array:
    """Of each row the JSON list of the subsets that it belongs to. large_string: JSON that json_column leaves alone."""
    row = np.concatenate(subsets)
    epoch = np.repeat(np.arange(len(subsets)), [len(subset) for subset in subsets])
    order = np.lexsort((epoch, row))
    offsets = np.r_[0, np.cumsum(np.bincount(row, minlength=rows))].astype(np.int32)
    text = pa.ListArray.from_arrays(pa.array(offsets), pa.array(epoch[order]).cast(pa.string()))
    joined = pc.binary_join(text, ", ")
    return pc.binary_join_element_wise("[", joined, "]", "").cast(pa.large_string())
