"""Judges of what must not be learnt by heart: secrets and personal data."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import pyarrow as pa

from ..flags import flagged
from ..folder import HouseError
from ..steps import Unmeasured
from ..text.view import VIEW_COLUMNS

_SHOWN = 10  # hits in the evidence of one row


@dataclass(frozen=True)
class Secrets(Unmeasured):
    """Drops rows that hold a secret: keys of AWS, Google, Stripe, OpenAI, Anthropic and SendGrid, tokens of GitHub,
    GitLab, Slack, Hugging Face, npm, PyPI and Telegram, JSON web tokens, private key blocks, passwords in addresses,
    and random values assigned to an api_key, secret, token or password.

    All turns are looked at, tool calls and reasoning included. Stand-ins ("YOUR_API_KEY", "sk-xxxx…", the documented
    examples) are no secrets. without: kinds that are let through. Reason: the kind of the first hit; evidence {count,
    hits: [{kind, field, turn, part, start, end, shape}]}, at most 10, with the shape of the secret and never itself.
    """

    without: tuple[str, ...] = ()

    scope: ClassVar[Literal["row"]] = "row"
    reads: ClassVar[tuple[str, ...]] = VIEW_COLUMNS

    def __post_init__(self) -> None:
        _check(self.without, self)

    def judge(self, rows: pa.Table, values: pa.Table) -> pa.Table:
        """Verdicts, aligned with `rows`."""
        from ..text.private import SECRETS

        return _judged(rows, [kind for kind in SECRETS if kind not in self.without])


@dataclass(frozen=True)
class PersonalData(Unmeasured):
    """Drops rows that hold data of a person: e-mail addresses, telephone numbers, credit cards (issuer, check digit),
    bank accounts (IBAN with its remainder), US social security numbers, public internet addresses.

    All turns are looked at. What belongs to nobody is kept: example.com and the like, john.doe@…, 555 numbers, test
    cards, private and documentation networks, version numbers. Telephones are found where they are written as in North
    America, (212) 736-5000 or 212-736-5000, or begin with + and a country's code. Names are not looked for. without:
    kinds that are let through. Reason and evidence as of Secrets. To mask and keep the row: MaskPersonalData.
    """

    without: tuple[str, ...] = ()

    scope: ClassVar[Literal["row"]] = "row"
    reads: ClassVar[tuple[str, ...]] = VIEW_COLUMNS

    def __post_init__(self) -> None:
        _check(self.without, self)

    def judge(self, rows: pa.Table, values: pa.Table) -> pa.Table:
        """Verdicts, aligned with `rows`."""
        from ..text.private import PERSONAL

        return _judged(rows, [kind for kind in PERSONAL if kind not in self.without])


def _check(without: Sequence[str], step: object) -> None:
    if without:  # most recipes name none: spare them the import
        from ..text.private import PERSONAL, SECRETS

        known = SECRETS if isinstance(step, Secrets) else PERSONAL
        unknown = sorted(set(without) - set(known))
        if unknown:
            raise HouseError(f"{step}: no kind {', '.join(unknown)}; known are {', '.join(known)}")


def _judged(rows: pa.Table, kinds: Sequence[str]) -> pa.Table:
    from ..text.private import found_in, rules_of, shape

    fates: dict[int, tuple[str, dict[str, Any]]] = {}
    for row, found in found_in(rows, rules_of(kinds)).items():
        shown = [
            {"kind": hit.kind, "field": field, "turn": turn, "part": part, "start": hit.start, "end": hit.end,
             "shape": shape(text[hit.start : hit.end])}
            for (field, turn, part), hit, text in found[:_SHOWN]
        ]  # fmt: skip
        fates[row] = found[0][1].kind, {"count": len(found), "hits": shown}
    return flagged(rows.num_rows, fates)
