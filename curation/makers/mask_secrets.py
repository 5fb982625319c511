"""A maker that takes secrets and personal data out of rows and keeps the rest."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np
import pyarrow as pa

from ..folder import HouseError
from ..rows import table
from ..steps import Corpus


@dataclass(frozen=True)
class MaskPersonalData:
    """Rows in which each secret and each piece of personal data (as the judges Secrets and PersonalData find them)
    stands masked: [EMAIL_ADDRESS], [PHONE_NUMBER], [GITHUB_TOKEN], …

    without: kinds that are left as they are. All turns, tool calls and reasoning are masked; spans move with the text;
    source, position and meta stay. The old row leaves the set with reason `masked` and is the new one's parent;
    held-out rows are masked too and stay held out. meta itself is not looked at.
    """

    without: tuple[str, ...] = ()

    scope: ClassVar[Literal["maker"]] = "maker"
    consumes: ClassVar[str | None] = "masked"
    model: ClassVar[None] = None
    rewrites: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.without:
            from ..text.private import PERSONAL, SECRETS

            unknown = sorted(set(self.without) - {*SECRETS, *PERSONAL})
            if unknown:
                raise HouseError(f"{self}: no kind {', '.join(unknown)}; known are {', '.join((*SECRETS, *PERSONAL))}")

    def make(self, corpus: Corpus) -> Iterator[pa.Table]:
        """Tables of new rows, one for each part that gave any."""
        from ..text.edits import Edit, Place, edited_row
        from ..text.private import RULES, found_in

        rules = [rule for rule in RULES if rule.kind not in self.without]
        done = 0
        for part in corpus.tables():
            found = found_in(part, rules)
            hit = sorted(found)
            made = []
            for row, index in zip(part.take(np.array(hit, np.int64)).to_pylist(), hit, strict=True):
                edits: dict[Place, list[Edit]] = {}
                for place, what, _ in found[index]:
                    edits.setdefault(place, []).append(Edit(what.start, what.end, f"[{what.kind.upper()}]"))
                made.append(edited_row(row, edits, repr(self)))
            done += part.num_rows
            corpus.progress(done, corpus.rows)
            if made:
                yield table(made)
