"""Answers that match a regular expression."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from ..folder import HouseError
from ..steps import Tools
from ..verifying import Case, Finding


@dataclass(frozen=True)
class Matches:
    """Right where a regular expression (RE2: linear time, no look-around) is found in the answer.

    pattern: searched anywhere; write ^ and $ for the whole answer. none: right where it is not found.
    """

    pattern: str
    none: bool = False

    model: ClassVar[None] = None

    def __post_init__(self) -> None:
        import pyarrow as pa
        import pyarrow.compute as pc

        try:
            pc.match_substring_regex(pa.array([""]), self.pattern)
        except pa.ArrowInvalid as error:
            raise HouseError(f"Matches: {self.pattern!r} is no regular expression that RE2 knows: {error}") from error

    def verify(self, cases: Sequence[Case], tools: Tools) -> list[Finding]:
        """One finding a case; none abstains."""
        import pyarrow as pa
        import pyarrow.compute as pc

        found = pc.match_substring_regex(pa.array([case.answer for case in cases], pa.string()), self.pattern)
        said = f"/{self.pattern}/"
        return [Finding(hit != self.none, f"{said} {'found' if hit else 'not found'}") for hit in found.to_pylist()]
