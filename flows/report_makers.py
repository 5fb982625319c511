"""The report's part on makers: what each asked, what became of every request and row, what a kept row cost, samples."""

from collections.abc import Sequence
from typing import Any

from ..curation.accounts import Account, Judged, origin_lines
from ..curation.folder import RunFolder
from ..curation.look import Funnel, Life, cut, life, plain, records
from ..curation.text.view import prompt_of, response_of
from ..curation.views import Json

SAMPLES = 3  # of each maker
TEXT = 420  # characters of a sample's prompt and of each answer


def makers(con: Any, folder: RunFolder, found: Funnel) -> list[Json]:
    """The accounts of all makers, each with its samples. con: a connection of views.connect."""
    shown = []
    for one in found.makers:
        requests = [*_requests(one), ("verified", one.verified), ("refused", _sum(one, one.refused))]
        rows = [("made", one.made), ("kept", one.kept), ("held out", one.held_out)]
        rows.append(("dropped", sum(one.dropped.values())))
        price = [*_price(one), ("tokens a kept row", one.tokens_per_row), ("cost a kept row", one.cost_per_row)]
        judged = [] if one.judged is None else [*_requests(one.judged), *_price(one.judged)]
        samples = [_sample(life(con, folder, row_id)) for row_id in _drawn(con, one)]
        shown.append(
            {"account": one, "requests": requests, "rows": rows, "price": price, "judged": judged,
             "lost": list(one.lost()), "samples": samples}
        )  # fmt: skip
    return shown


def _requests(one: Account | Judged) -> list[tuple[str, int | None]]:
    return [
        ("asked", one.asked),
        ("answered", one.answered),
        ("failed", _sum(one, one.failed)),
        ("parsed", one.parsed),
        ("not parsed", _sum(one, one.unparsed)),
    ]


def _price(one: Account | Judged) -> list[tuple[str, float | None]]:
    return [
        ("tokens of prompts", one.prompt_tokens),
        ("of answers", one.tokens),
        ("paid for before", one.cached),
        ("cost", one.cost),
    ]


def _sum(one: Account | Judged, reasons: Any) -> int | None:
    return None if one.asked is None else sum(reasons.values())


def _drawn(con: Any, one: Account) -> list[str]:
    """row_ids of SAMPLES made rows, the lowest: one of the dropped where there is one, else kept ones."""
    sql = (
        'SELECT row_id, dropped_at IS NULL AS kept FROM made_fates WHERE "set" = ? AND step = ?'
        f" QUALIFY row_number() OVER (PARTITION BY kept ORDER BY row_id) <= {SAMPLES} ORDER BY row_id"
    )
    rows = records(con, sql, [one.set, one.step])
    kept, lost = ([row["row_id"] for row in rows if row["kept"] is which] for which in (True, False))
    return [*kept[: SAMPLES - bool(lost)], *lost][:SAMPLES]


def _sample(found: Life) -> Json:
    row = found.row
    near = [one for one in found.parents if one.depth == 1]
    known = {one.row_id for one in near}
    return {
        "row_id": row["row_id"],
        "fate": _fate(found),
        "said": _said(row),
        "origin": origin_lines(row["meta"]),
        "parents": [(one.row_id, cut(one.text, TEXT), "; ".join(one.fates)) for one in near],
        "strangers": [one for one in row["parents"] or () if one not in known],
        "verdicts": [
            {"name": one.name, "keep": one.keep, "said": plain(one.sentence()), "proof": _proof(one.proof())}
            for one in found.verdicts
        ],
    }


def _fate(found: Life) -> str:
    last = found.verdicts[-1]
    return "kept" if last.keep else "held out" if last.reason == "held_out" else "dropped"


def _said(row: Json) -> list[tuple[str, str]]:
    """The row's texts with what they are; of a preference both answers."""
    prompt, response = prompt_of(row), response_of(row)
    texts = [("prompt", prompt), ("response" if row["rejected"] is None else "chosen", response)]
    if row["rejected"] is not None:
        texts.append(("rejected", "\n".join(turn["content"] or "" for turn in row["rejected"])))
    return [(name, cut(plain(text), TEXT)) for name, text in texts if text]


def _proof(lines: Sequence[str]) -> list[str]:
    return [cut(plain(line), TEXT) for line in lines]
