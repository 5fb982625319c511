"""What each maker of a run cost and gave: its requests, as it counted them, and its rows, as the ledger has them.

asked = answered + failed; answered = parsed + unparsed; rows made = kept + held out + dropped. What its verifier asked
of a model is counted apart, by the same rules. `faults` names every place where that does not hold."""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from .folder import RunFolder
from .views import Json, steps

JUDGED = "judged_"  # how the view's columns of what a verifier asked begin


@dataclass(frozen=True)
class Judged:
    """What the verifier of a maker asked of a model itself; all as in Account."""

    model: str
    asked: int
    answered: int
    parsed: int
    cached: int
    prompt_tokens: int
    tokens: int
    cost: float
    failed: Mapping[str, int] = field(default_factory=dict)
    unparsed: Mapping[str, int] = field(default_factory=dict)

    def line(self) -> str:
        """In words."""
        return (
            f"{self.model}: asked {self.asked:,}, answered {self.answered:,}, parsed {self.parsed:,},"
            f" {self.prompt_tokens:,} + {self.tokens:,} tokens, cost {self.cost:,.6g}"
        )


@dataclass(frozen=True)
class Account:
    """One maker of one set. model and all counts of requests: None for a maker that asks no model. failed, unparsed,
    refused: by reason. kept: live at the set's end (or after its last finished step); dropped: by (judge, reason).
    tokens: of prompts and answers, those that were paid for before too; cost: of those that were not; a kept row's
    hold what its verifier asked too. judged: None where the verifier, if there is one, asks no model."""

    set: str
    step: int
    maker: str
    model: str | None
    licence: str | None
    asked: int | None
    answered: int | None
    parsed: int | None
    verified: int | None
    made: int
    kept: int
    held_out: int
    cached: int | None
    prompt_tokens: int | None
    tokens: int | None
    cost: float | None
    tokens_per_row: float | None
    cost_per_row: float | None
    failed: Mapping[str, int] = field(default_factory=dict)
    unparsed: Mapping[str, int] = field(default_factory=dict)
    refused: Mapping[str, int] = field(default_factory=dict)
    dropped: Mapping[tuple[str, str], int] = field(default_factory=dict)
    judged: Judged | None = None

    def lost(self) -> Iterator[tuple[str, str]]:
        """What became of all else, in words: ("failed", "timeout 3, server 1"), …"""
        for name in ("failed", "unparsed", "refused"):
            if reasons := getattr(self, name):
                yield name, _listed(reasons)
        if self.judged is not None:
            for name in ("failed", "unparsed"):
                if reasons := getattr(self.judged, name):
                    yield f"judge {name}", _listed(reasons)
        if self.dropped:
            said = (f"{reason} {count:,} ({judge})" for (judge, reason), count in self.dropped.items())
            yield "dropped", ", ".join(said)
        if self.held_out:
            yield "held out", f"{self.held_out:,}"


def accounts(con: Any, folder: RunFolder) -> tuple[Account, ...]:
    """The account of every maker of the run, by set and step. con: a connection of views.connect."""
    reasons: dict[tuple[str, int], dict[str, dict[Any, int]]] = {}
    sql = 'SELECT "set", step, what, reason, judge, rows FROM maker_reasons ORDER BY rows DESC, judge, reason'
    for name, step, what, reason, judge, rows in con.execute(sql).fetchall():
        mine = reasons.setdefault((name, step), {}).setdefault(what, {})
        mine[(judge, reason) if what == "dropped" else reason] = rows
    answer = con.execute("FROM makers")
    names = [column[0] for column in answer.description]
    found = [dict(zip(names, row, strict=True)) for row in answer.fetchall()]
    made = {(one["set"], one["step"]): _account(one, reasons.get((one["set"], one["step"]), {})) for one in found}
    return tuple(made[key] for one in steps(folder) if (key := (one["set"], one["step"])) in made)


def _account(one: Json, reasons: Mapping[str, Any]) -> Account:
    """A row of the view `makers`, its sums of reasons replaced by the reasons."""
    apart: Json = {name.removeprefix(JUDGED): value for name, value in one.items() if name.startswith(JUDGED)}
    why = {name.removeprefix(JUDGED): value for name, value in reasons.items() if name.startswith(JUDGED)}
    judged = None if apart["asked"] is None else Judged(**_without_sums(apart), **why)
    own = {name: value for name, value in one.items() if not name.startswith(JUDGED)}
    given = {name: value for name, value in reasons.items() if not name.startswith(JUDGED)}
    return Account(**_without_sums(own), **given, judged=judged)


def _without_sums(one: Json) -> Json:
    return {name: value for name, value in one.items() if name not in ("failed", "unparsed", "refused", "dropped")}


def faults(folder: RunFolder, found: Sequence[Account]) -> list[str]:
    """A sentence for each sum that does not come out."""
    claimed = {(one["set"], one["step"]): one.get("synthesis", {}).get("made") for one in steps(folder)}
    said = []
    for one in found:
        where = f"set {one.set}, step {one.step} {one.maker}"
        left = {"kept": one.kept, "held out": one.held_out, "dropped": sum(one.dropped.values())}
        said += _unequal(where, "made", one.made, left)
        if one.asked is None or one.answered is None or one.parsed is None:
            continue
        for whose, told in ((where, one), (f"{where}, its judge", one.judged)):
            if told is not None:
                failed, unparsed = sum(told.failed.values()), sum(told.unparsed.values())
                said += _unequal(whose, "asked", told.asked or 0, {"answered": told.answered or 0, "failed": failed})
                parts = {"parsed": told.parsed or 0, "unparsed": unparsed}
                said += _unequal(whose, "answered", told.answered or 0, parts)
        if claimed[one.set, one.step] != one.made:
            said.append(f"{where}: it counted {claimed[one.set, one.step]:,} rows, the ledger holds {one.made:,}")
    return said


def _listed(reasons: Mapping[str, int]) -> str:
    return ", ".join(f"{reason} {count:,}" for reason, count in reasons.items())


def _unequal(where: str, what: str, whole: int, parts: Mapping[str, int]) -> list[str]:
    if whole == sum(parts.values()):
        return []
    return [f"{where}: {what} {whole:,} is not " + " + ".join(f"{name} {count:,}" for name, count in parts.items())]


def origin(meta: str | None) -> Json:
    """Where a made row says it comes from (synthesis.Session.origin); empty where it says nothing."""
    try:
        said = json.loads(meta or "{}")
    except ValueError:
        return {}
    made = said.get("made") if isinstance(said, dict) else None
    return made if isinstance(made, dict) else {}


def origin_lines(meta: str | None) -> list[str]:
    """The same in words: which model under which licence, which prompt, which sampling."""
    made = origin(meta)
    if not made:
        return []
    digest = str(made.get("model_digest", ""))[:12]
    lines = [f"by {made.get('model')} (digest {digest}…; licence or terms: {made.get('licence')})"]
    prompt = made.get("prompt")
    lines.append(
        f"prompt {prompt} (digest {str(made.get('prompt_digest'))[:12]}…)"
        if prompt
        else "prompt: its parent's own words"
    )
    sampling = ", ".join(
        f"{name} {value}" for name, value in sorted(made.get("sampling", {}).items()) if value is not False
    )
    lines.append(f"sampling: {sampling}, seed {made.get('seed')}")
    if made.get("tokens"):
        lines.append(f"{made['tokens']:,} tokens" + ("" if made.get("finished") else ", cut by max_tokens"))
    return lines
