"""Selection in rounds: what a model learnt from one round decides which clusters the next one draws from."""

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from ..embeddings import vectors
from ..folder import HouseError
from ..keys import Found
from ..selecting.selection import (
    Bools,
    Budgeted,
    Pool,
    Reals,
    Shares,
    Unit,
    all_kept,
    descending,
    gumbel,
    hashes,
    paid,
    pool,
    row_ids,
    row_keys,
    selected,
    shared,
    spend_in_groups,
    value_name,
)
from ..steps import Corpus, Measure
from ..text.view import View
from .kmeans_quality import KMeansQuality, clusters

if TYPE_CHECKING:
    from ..text.spans import Ints


@dataclass(frozen=True)
class IterativeQuality(Budgeted):
    """Keeps `budget` rows in `rounds` of k-means-quality sampling, each round drawing from the clusters that the model
    gained most from (Diversify and Conquer, iterative form, arXiv 2409.11378).

    Each round spends budget / rounds. The first shares it out among the clusters as KMeansQuality does. After a round
    a model is tuned on it and answers the round's prompts; a cluster's score is the mean of reward(given answer) -
    reward(own answer) over its rows of that round, and the next round's quotas follow softmax(score /
    `reward_temperature`): rewards in [-1, 1] want 0.25, with 1 the weights are nearly flat. A cluster without a row
    in the round keeps its former weight; rows already chosen are out. With fewer rows a round than clusters, not
    every cluster is served.

    rewards: Parquet file, or folder of such files, with the columns `row_id`, `gold` and `own` (the two rewards; null
    or NaN: unknown) of rows chosen so far. The judge repeats the rounds whose rows are found there and adds one more:
    with none it draws round 1, with those of round 1 also round 2, and so on; so a flow alternates judging and tuning,
    under another name of file or folder each time. budget, k, quality, prefer, model, dims, view, temperature, seed,
    embedding, of, column, shares, unit, tokens: as in KMeansQuality.

    Reasons: not_selected; not_scorable as in KMeansQuality. Evidence: {cluster} of each scored row, and of a kept one
    {round, weight}, the round (from 1) and its cluster's share in it. Before the last round the rows kept are those of
    the rounds so far, with a warning. Memory: as KMeansQuality.
    """

    budget: int
    rounds: int = 3
    rewards: str | None = None
    reward_temperature: float = 0.25
    k: int = 128
    quality: str = "response_words"
    prefer: Literal["high", "low"] = "high"
    model: str | None = None
    dims: int = 64
    view: View = "prompt"
    temperature: float = 1.0
    seed: int = 0
    embedding: str | None = None
    of: Measure | None = None
    column: str | None = None
    shares: Shares = "proportional"
    unit: Unit = "rows"
    tokens: Measure | None = None

    def __post_init__(self) -> None:
        self.one_round  # noqa: B018 - a HouseError where its fields do not go together
        if not 1 <= self.rounds <= self.budget or not self.reward_temperature > 0:
            raise HouseError(f"{self}: rounds is at least 1 and at most the budget, reward_temperature is above 0")

    @property
    def one_round(self) -> KMeansQuality:
        """The selection that each round does."""
        return KMeansQuality(
            self.budget, self.k, self.quality, self.prefer, self.model, self.dims, self.view, self.temperature,
            self.seed, self.embedding, self.of, self.column, self.shares, self.unit, self.tokens,
        )  # fmt: skip

    @property
    def needs(self) -> tuple[Measure, ...]:
        return self.one_round.needs

    def judge(self, corpus: Corpus) -> pa.Table:
        """Verdicts for all live rows, in the order of `corpus.tables()`."""
        once = self.one_round
        rows = pool(corpus, self.unit, self.tokens, value_name(self.needs, *once.read), self.needs)
        everything = all_kept(self, rows, self.budget, self.unit)
        if everything is not None:
            return everything
        labels = clusters(vectors(corpus, self.embedding, self.view, self.dims), rows, self.k)
        known = None if self.rewards is None else _rewards(self, self.rewards, row_ids(corpus))

        def tuned(chosen: "Ints") -> Reals | None:
            return None if known is None or np.isnan(known[chosen]).all() else known[chosen]

        weights = shared(np.bincount(labels, weights=rows.costs), self.shares)
        plan = DiversifyAndConquer(self.budget, self.rounds, self.reward_temperature, self.seed)
        done = plan.run(rows, once.logits(rows), labels, weights, tuned)
        if len(done) < self.rounds:
            warnings.warn(f"IterativeQuality: {len(done)} of {self.rounds} rounds done", stacklevel=2)
        turn, share = np.zeros(len(rows), np.int64), np.zeros(len(rows))
        for number, each in enumerate(done, 1):
            turn[each.chosen], share[each.chosen] = number, each.weights[labels[each.chosen]]
        kept = turn > 0
        proof: dict[str, Any] = {"round": pa.array(turn, mask=~kept), "weight": pa.array(share.round(6), mask=~kept)}
        return selected(rows, kept, {"cluster": labels, **proof, **paid(self.unit, rows.costs)})


@dataclass(frozen=True)
class Round:
    """chosen: rows of a round, ascending; weights: share of each cluster in it, summing to 1."""

    chosen: "Ints"
    weights: Reals


@dataclass(frozen=True)
class DiversifyAndConquer:
    """The rounds of Diversify and Conquer over clustered rows; see IterativeQuality for what each field means."""

    budget: int
    rounds: int
    reward_temperature: float = 0.25
    seed: int = 0

    def run(
        self,
        rows: Pool,
        logits: Reals,
        labels: "Ints",
        weights: Reals,
        tune: "Callable[[Ints], Sequence[float] | Reals | None]",
    ) -> list[Round]:
        """Rounds until the budget is spent, or until `tune` gives nothing. logits: with which rows are drawn inside
        their cluster; weights: of the clusters in the first round; tune: the rows of a round -> reward(given answer) -
        reward(own answer) of each, NaN where unknown, or None to stop."""
        keys = logits + gumbel(rows.keys, self.seed)
        ties = hashes(rows.keys, self.seed)
        share = weights / weights.sum()
        free: Bools = rows.open.copy()
        done: list[Round] = []
        spent = 0
        for number in range(1, self.rounds + 1):
            money = self.budget * number // self.rounds - spent
            order = descending(keys, ties, free)
            keep, _, _ = spend_in_groups(order, labels, rows.costs, share, money)
            chosen = np.flatnonzero(keep)
            done.append(Round(chosen, share))
            spent += int(rows.costs[chosen].sum())
            free &= ~keep
            gains = tune(chosen) if number < self.rounds else None
            if gains is None:
                break
            share = reweighted(share, labels[chosen], np.asarray(gains, np.float64), self.reward_temperature)
        return done


def reweighted(share: Reals, labels: "Ints", gains: Reals, temperature: float) -> Reals:
    """The clusters' shares of the next round: those that have a row in this one share what they had together by
    softmax(mean gain / temperature); the others keep theirs."""
    known = np.isfinite(gains)
    counts = np.bincount(labels[known], minlength=len(share))
    served = counts > 0
    if not served.any():
        return share
    totals = np.bincount(labels[known], weights=gains[known], minlength=len(share))
    logits = totals[served] / counts[served] / temperature
    softmax = np.exp(logits - logits.max())
    found = share.copy()
    found[served] = share[served].sum() * softmax / softmax.sum()
    return found


def _rewards(step: object, path: str, names: pa.ChunkedArray) -> Reals:
    """reward(given answer) - reward(own answer) of each row, NaN where the files say nothing of it."""
    place = Path(path)
    files = sorted(place.glob("*.parquet")) if place.is_dir() else [place]
    found = np.full(len(names), np.nan)
    mine = Found.of(row_keys(names))
    for file in files:
        try:
            table = pq.read_table(file, columns=["row_id", "gold", "own"])
        except (OSError, pa.ArrowInvalid, KeyError) as error:
            raise HouseError(f"{step}: {file} is no Parquet file with row_id, gold and own: {error}") from error
        gains = table["gold"].cast(pa.float64()).to_numpy() - table["own"].cast(pa.float64()).to_numpy()
        where = mine.places(row_keys(table["row_id"].cast(pa.string())))
        found[where[where >= 0]] = gains[where >= 0]
    return found
