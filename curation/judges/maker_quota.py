"""How many rows of each maker stay."""

import math
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from ..accounts import origin
from ..folder import HouseError
from ..selecting.selection import (
    Reals,
    codes,
    descending,
    dropped,
    hashes,
    only_column,
    pool,
    ranks,
    reads,
)
from ..steps import Corpus, Measure
from ..text.spans import Ints


@dataclass(frozen=True)
class MakerQuota:
    """Keeps of each maker's rows at most so many, or at most a share of the set, so that what one maker makes easily
    does not crowd out the rest. Rows that were read, not made, all stay.

    most: rows of each maker, or a mapping of makers (by class name) to rows; null: no such limit. share: of all rows
    that stay, above 0 and below 1, of each maker or a mapping. A maker that neither names is not capped; where both
    name it the smaller number holds. Shares are of what is left after all quotas: the largest numbers of rows that keep
    every share.

    of: the measure by whose `column` a maker's rows rank (prefer: the high or the low ones stay; rows without a value
    come last); without it they rank by a hash of (`seed`, row_id), as do equal values. A row that a later step said
    better (masking, repair) still counts for the maker that asked a model for it. Reason: over_quota. Evidence of the
    dropped rows: {maker, quota, rank}; rank above the quota. Holds some 60 bytes a row.
    """

    most: int | Mapping[str, int] | None
    share: float | Mapping[str, float] | None = None
    of: Measure | None = None
    column: str | None = None
    prefer: Literal["high", "low"] = "high"
    seed: int = 0

    scope: ClassVar[Literal["corpus"]] = "corpus"
    score: ClassVar[str | None] = None

    def __post_init__(self) -> None:
        if self.most is None and self.share is None:
            raise HouseError(f"{self}: give `most` (rows), `share` (of the set), or both")
        if any(rows < 0 for rows in _values(self.most)):
            raise HouseError(f"{self}: most is a number of rows, at least 0")
        if not all(0 < share < 1 for share in _values(self.share)):
            raise HouseError(f"{self}: a share lies above 0 and below 1")
        self.needs  # noqa: B018 - a HouseError where the columns do not go together

    @property
    def needs(self) -> tuple[Measure, ...]:
        return () if self.of is None else reads(self, (self.of, only_column(self, self.of, self.column)))

    def limits(self) -> tuple[float | None, float | None]:
        return None, None

    def judge(self, corpus: Corpus) -> pa.Table:
        """Verdicts for all live rows, in the order of `corpus.tables()`."""
        group, names = codes(pa.chunked_array(list(_makers(corpus)), pa.string()))
        column = None if self.of is None else only_column(self, self.of, self.column)
        rows = pool(corpus, "rows", None, column)
        worth = np.nan_to_num(rows.scores if self.prefer == "high" else -rows.scores, nan=-math.inf)
        rows = replace(rows, open=np.ones(len(rows), np.bool_))  # a row without a value may stay too
        quota = self._quotas(names, np.bincount(group, minlength=len(names)))
        rank = ranks(descending(worth, hashes(rows.keys, self.seed), rows.open), group)
        told = {"maker": pa.array(names, pa.string()).take(pa.array(group)), "quota": quota[group], "rank": rank}
        return dropped(rows, rank <= quota[group], "over_quota", told)

    def _quotas(self, names: list[str], sizes: Ints) -> Ints:
        """Rows of each maker that may stay; of rows without a maker, all."""
        for named in (self.most, self.share):
            unknown = [name for name in named if name not in names] if isinstance(named, Mapping) else []
            if unknown:
                warnings.warn(f"MakerQuota: no row is made by {', '.join(unknown)}", stacklevel=3)
        caps = [_of(self.most, name, size) if name else size for name, size in zip(names, sizes.tolist(), strict=True)]
        most = np.minimum(sizes, np.array(caps, np.int64)) if names else sizes
        share = np.array([_of(self.share, name, 1.0) if name else 1.0 for name in names])
        quota = shares_kept(most, share)
        if most.sum() and not quota.sum():
            raise HouseError(
                f"{self}: the set holds only rows of these makers, {', '.join(names)}, whose shares sum to"
                f" {share.sum():.3g}: no set of them can keep them. Raise the shares to 1 in all, or name fewer makers"
            )
        return quota


def shares_kept(most: Ints, share: Reals) -> Ints:
    """The largest numbers of rows, at most `most` of each group, of which none is above its share of their sum."""
    rows = most.copy()
    while True:
        fewer = np.minimum(rows, np.floor(share * rows.sum() + 1e-9).astype(np.int64))
        fewer = np.where(share >= 1, rows, fewer)
        if (fewer == rows).all():
            return rows
        rows = fewer


def _values(stated: float | Mapping[str, float] | None) -> list[float]:
    return [] if stated is None else list(stated.values()) if isinstance(stated, Mapping) else [stated]


def _of(stated: float | Mapping[str, float] | None, name: str, default: float) -> float:
    return default if stated is None else stated.get(name, default) if isinstance(stated, Mapping) else stated


def _makers(corpus: Corpus) -> Iterator[pa.Array]:
    """The class name of each live row's maker; null for rows that were read. Of rows that were said better by another
    step, the maker that asked a model for them, which their meta names."""
    for part in corpus.tables(["maker", "meta"]):
        made = pc.is_valid(part["maker"]).to_numpy()
        names: list[str | None] = [None] * part.num_rows
        rows = part.filter(pa.array(made))
        for place, maker, meta in zip(
            np.flatnonzero(made).tolist(), rows["maker"].to_pylist(), rows["meta"].to_pylist(), strict=True
        ):
            names[place] = str(origin(meta).get("maker") or maker.partition("(")[0])
        yield pa.array(names, pa.string())
