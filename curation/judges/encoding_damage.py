"""A judge of text that went through a wrong encoding."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from ..folder import HouseError
from ..steps import Unmeasured
from ..text.view import VIEW_COLUMNS


@dataclass(frozen=True)
class EncodingDamage(Unmeasured):
    """Drops rows with mojibake ("âˆš3", "LÃ©opold"), replacement characters (U+FFFD) or control characters.

    most: share of a row's characters that may be damaged, 0 to 1; the default lets one of a thousand pass, so one is
    too many in an answer of a hundred words. All turns are looked at. Mojibake is counted by ftfy's badness, the number
    of sequences that only a wrong encoding makes. Reason: encoding_damage; score: the damaged share, of rows with any;
    evidence {damaged, characters, field, turn} of the first damaged turn. To repair instead of dropping:
    RepairEncoding, which leaves U+FFFD as it is, for what it stood for is lost.
    """

    most: float = 0.001

    scope: ClassVar[Literal["row"]] = "row"
    reads: ClassVar[tuple[str, ...]] = VIEW_COLUMNS

    def __post_init__(self) -> None:
        if not 0 <= self.most <= 1:
            raise HouseError(f"{self}: most is a share, from 0 to 1")

    def judge(self, rows: pa.Table, values: pa.Table) -> pa.Table:
        """Verdicts, aligned with `rows`."""
        from ..flags import flagged
        from ..steps import VERDICT
        from ..text.contents import said
        from ..text.encoding import damage, suspicious
        from ..text.texts import matching

        damaged, size = np.zeros(rows.num_rows, np.int64), np.zeros(rows.num_rows, np.int64)
        first: dict[int, Mapping[str, Any]] = {}
        for one in said(rows, ("content", "reasoning_content")):
            np.add.at(size, one.rows, np.asarray(pc.fill_null(pc.utf8_length(one.strings), 0)))
            for index in np.flatnonzero(matching(one.strings, suspicious())).tolist():
                count = damage(one.strings[index].as_py())
                damaged[one.rows[index]] += count
                if count:
                    first.setdefault(int(one.rows[index]), {"field": one.field, "turn": int(one.turns[index])})
        share = damaged / np.maximum(size, 1)
        found = {
            row: ("encoding_damage", {"damaged": int(damaged[row]), "characters": int(size[row]), **first[row]})
            for row in np.flatnonzero(share > self.most).tolist()
        }
        score = pa.array(share, mask=damaged == 0)
        return flagged(rows.num_rows, found).set_column(2, VERDICT.field("score"), score)
