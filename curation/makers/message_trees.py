"""Ranked replies of message trees as preferences (OASST)."""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations, pairwise
from typing import Any, ClassVar, Literal

import pyarrow as pa

from ..folder import HouseError
from ..preferring import list_pairs, of_length
from ..rows import message
from ..steps import Corpus
from ..unfolding import unfolded


@dataclass(frozen=True)
class MessageTreeRanks:
    """All ranked replies to a turn of a message tree (OpenAssistant Conversations, arXiv 2304.07327) as preferences,
    where the source's shape `tree_preference` gives the best against the worst alone.

    Rows: those whose meta holds `replies`, the ranked replies as such a source reads them ({text, rank}, rank 0 the
    best). pairs: `adjacent` each reply against the next worse one, `all` each against each worse one, `list` the fewest
    pairs from which losses of lists read all replies back. most: pairs of one turn at most, the widest gap of ranks
    first (None: any; not of lists). length_ratio: the longer reply has at most so many times the characters of the
    shorter one (None: any; not of lists).

    meta: message_tree_id, lang, ranks of both, score_chosen and score_rejected: 1 for the best rank of the turn, 0 for
    the worst, evenly between. The parent leaves with reason `unfolded`; of its held-out kin the first pair stays.
    """

    pairs: Literal["adjacent", "all", "list"] = "all"
    most: int | None = None
    length_ratio: float | None = None

    scope: ClassVar[Literal["maker"]] = "maker"
    consumes: ClassVar[str | None] = "unfolded"
    model: ClassVar[None] = None

    def __post_init__(self) -> None:
        if self.pairs not in ("adjacent", "all", "list"):
            raise HouseError(f"{self}: pairs is adjacent, all or list")
        if (self.most is not None and self.most < 1) or (self.length_ratio is not None and self.length_ratio < 1):
            raise HouseError(f"{self}: most and length_ratio are at least 1")

    def make(self, corpus: Corpus) -> Iterator[pa.Table]:
        """Tables of new rows, one for each part that gave any."""
        wanted = "it wants ranked replies in meta, as a source read with `shape: tree_preference` has them"
        return unfolded(self, corpus, self._contents, "message_tree_ranks", wanted)

    def _contents(self, row: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
        meta = json.loads(row["meta"] or "{}")
        told = meta.get("replies") if isinstance(meta, dict) else None
        replies = ranked(told) if isinstance(told, list) and row["chosen"] is not None else []
        about = {name: meta[name] for name in ("message_tree_id", "lang") if replies and name in meta}
        worth = scores([rank for rank, _ in replies])
        for i, j in self._drawn(replies, worth):
            ranks = {"rank_chosen": replies[i][0], "rank_rejected": replies[j][0]}
            scored = {"score_chosen": worth[i], "score_rejected": worth[j]}
            yield {
                "messages": row["messages"],
                "chosen": [message("assistant", replies[i][1])],
                "rejected": [message("assistant", replies[j][1])],
                "meta": json.dumps(about | ranks | scored, ensure_ascii=False, sort_keys=True),
            }

    def _drawn(self, replies: Sequence[tuple[int, str]], worth: Sequence[float]) -> list[tuple[int, int]]:
        if self.pairs == "list":
            return list_pairs(worth)
        order = range(len(replies))
        every = pairwise(order) if self.pairs == "adjacent" else combinations(order, 2)
        fitting = [
            (i, j)
            for i, j in every
            if replies[i][0] < replies[j][0] and of_length(replies[i][1], replies[j][1], self.length_ratio)
        ]
        return sorted(fitting, key=lambda pair: replies[pair[0]][0] - replies[pair[1]][0])[: self.most]


def ranked(replies: Sequence[Any]) -> list[tuple[int, str]]:
    """(rank, text) of the replies that have both, best first."""
    fit = [one for one in replies if isinstance(one, Mapping) and type(one.get("rank")) is int]
    told = [(one["rank"], one["text"]) for one in fit if isinstance(one.get("text"), str) and one["text"].strip()]
    return sorted(told, key=lambda one: one[0])


def scores(ranks: Sequence[int]) -> list[float]:
    """1 for the least rank, 0 for the greatest, evenly between by place among the distinct ones."""
    places = {rank: place for place, rank in enumerate(sorted(set(ranks)))}
    last = max(1, len(places) - 1)
    return [1 - places[rank] / last for rank in ranks]
