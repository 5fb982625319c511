"""Looking into a run: `funnel` says what became of all rows, `why` tells the whole life of one.

Both return values; `print_funnel`, `print_why` and `print_query` show them in a terminal. Row text is untrusted: it is
shown without its control characters and never read as markup.
"""

import json
import os
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text
from rich.tree import Tree

from .accounts import Account, accounts, origin_lines
from .accounts import faults as account_faults
from .explain import TWINS, pictures
from .folder import HouseError, RunFolder
from .text.view import prompt_of, response_of
from .views import Json, connect, query, sets, sources, steps

ROW_ID = re.compile(r"[0-9a-f]{32}")
CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")
MOST_ROWS = 1000  # of a query's answer on the screen
MOST_MEMBERS = 5  # of a group that are shown
MOST_RELATIVES = 50  # parents or children of one row that are told


# --- the funnel ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class SetFunnel:
    """One set: its finished steps (step.json), rows of each curated split (empty before the end), steps in all."""

    name: str
    kind: str
    steps: tuple[Json, ...]
    curated: dict[str, int]
    planned: int

    @property
    def held_out(self) -> int:
        """Those of them that a later step rewrote are counted once."""
        return sum(step["reasons"].get("held_out", 0) - step.get("replaced", 0) for step in self.steps)


@dataclass(frozen=True)
class Funnel:
    """What was read, what each set kept of it, what each maker asked and gave. faults: a sentence for each place where
    rows or requests are not conserved."""

    sources: tuple[Json, ...]
    sets: tuple[SetFunnel, ...]
    faults: tuple[str, ...]
    makers: tuple[Account, ...] = ()


def funnel(folder: RunFolder) -> Funnel:
    """The funnel of a run, finished or not, checked for conservation from what lies on disk."""
    read, done = sources(folder), steps(folder)
    with connect(folder) as con:
        splits = con.execute('SELECT "set", split, count(*) FROM curated GROUP BY ALL ORDER BY ALL').fetchall()
        makers = accounts(con, folder)
    found = []
    for record in sets(folder):
        mine = tuple(step for step in done if step["set"] == record["set"])
        curated = {split: rows for name, split, rows in splits if name == record["set"]}
        # the split of training first
        curated = dict(sorted(curated.items(), key=lambda item: (item[0] != "train", item[0])))
        found.append(SetFunnel(record["set"], record["kind"], mine, curated, len(record["steps"])))
    faults = [fault for one, record in zip(found, sets(folder), strict=True) for fault in _faults(one, record, read)]
    lost = [f"source {s['name']}: read {s['read']:,} is not rows {s['rows']:,} + quarantined {s['quarantined']:,}"
            for s in read if s["read"] != s["rows"] + s["quarantined"]]  # fmt: skip
    return Funnel(tuple(read), tuple(found), (*lost, *faults, *account_faults(folder, makers)), makers)


def _faults(one: SetFunnel, record: Mapping[str, Any], read: Sequence[Json]) -> list[str]:
    """Every place where the set's numbers do not follow from one another."""
    came = sum(source["rows"] for source in read if source["name"] in record["sources"])
    faults = []
    for step in one.steps:
        where = f"set {one.name}, step {step['step']} {step['name']}"
        if step["came"] != came:
            faults.append(f"{where}: {step['came']:,} came, but {came:,} were left before it")
        if step["came"] + step["made"] != step["kept"] + step["dropped"]:
            faults.append(
                f"{where}: came {step['came']:,} + made {step['made']:,} is not kept {step['kept']:,}"
                f" + dropped {step['dropped']:,}"
            )
        came = step["kept"]
    if one.curated and one.curated.get("train", 0) != came:
        faults.append(f"set {one.name}: {came:,} rows were kept, {one.curated.get('train', 0):,} are in split train")
    if one.curated and one.curated.get("test", 0) != one.held_out:
        faults.append(f"set {one.name}: {one.held_out:,} held out, {one.curated.get('test', 0):,} are in split test")
    return faults


def wide_console() -> Console:
    """The terminal as it is; 120 columns where the output goes to a file or a pipe (rich would take 80)."""
    piped = not sys.stdout.isatty() and "COLUMNS" not in os.environ
    return Console(width=120 if piped else None)


def print_funnel(folder: RunFolder, console: Console | None = None) -> None:
    """The funnel as tables, and a last line that says whether every row is accounted for."""
    console = console or wide_console()
    found = funnel(folder)
    if not found.sources and not found.sets:
        console.print(Text(f"{folder.root} holds no rows yet: nothing was read to its end."))
        return
    console.print(_source_table(found.sources))
    for one in found.sets:
        console.print()
        console.print(_set_table(one, console.width))
        _print_makers([maker for maker in found.makers if maker.set == one.name], console)
        if one.curated:
            said = " and ".join(f"{rows:,} rows in split {split}" for split, rows in one.curated.items())
            console.print(Text(f"curated/{one.name}: {said}", style="bold green"))
        else:
            console.print(Text(f"not finished: {len(one.steps)} of {one.planned} steps are done", style="yellow"))
    console.print()
    for fault in found.faults:
        console.print(Text(f"NOT CONSERVED: {fault}", style="bold red"))
    if not found.faults:
        console.print(Text(conserved(found), style="green"))


def _print_makers(found: Sequence[Account], console: Console) -> None:
    """A line of numbers for each maker, and below it in words what became of the rest."""
    if not found:
        return
    numbers = ("asked", "answered", "parsed", "verified", "made", "kept", "tokens/kept", "cost/kept")
    table = _table(("", "maker"), numbers)
    for one in found:
        counts = (one.asked, one.answered, one.parsed, one.verified, one.made, one.kept)
        each = [None if value is None else f"{value:,.6g}" for value in (one.tokens_per_row, one.cost_per_row)]
        table.add_row(Text(str(one.step)), *_cells(one.maker, *counts, *each))
    console.print(table)
    for one in found:
        if one.judged is not None:
            console.print(Text(f"{one.step} {one.maker}: judged by {plain(one.judged.line())}", style="dim"))
        lost = "; ".join(f"{what} {reasons}" for what, reasons in one.lost())
        if lost:
            console.print(Text(f"{one.step} {one.maker}: {plain(lost)}", style="dim"))


def conserved(found: Funnel) -> str:
    """The sentence that closes a sound funnel."""
    read, rows, bad = (sum(s[name] for s in found.sources) for name in ("read", "rows", "quarantined"))
    number = sum(len(one.steps) for one in found.sets)
    return (
        f"Every row is accounted for: read {read:,} = rows {rows:,} + quarantined {bad:,};"
        f" came + made = kept + dropped in all {number} steps."
    )


def _source_table(read: Sequence[Json]) -> Table:
    table = _table(("source", "shape", "licence"), ("read", "rows", "quarantined"))
    for s in read:
        table.add_row(*_cells(s["name"], s["shape"], s["licence"], s["read"], s["rows"], s["quarantined"]))
    if len(read) > 1:
        table.add_section()
        table.add_row(*_cells("all", "", "", *(sum(s[n] for s in read) for n in ("read", "rows", "quarantined"))))
    return table


def _set_table(one: SetFunnel, width: int) -> Table:
    """`width`: of the console; what the numbers leave of it goes to judges and reasons alike."""
    table = _table(("", f"set {one.name}"), ("came", "made", "kept", "dropped"), ("reasons",))
    table.columns[1].no_wrap = True
    for step in one.steps:
        reasons = ", ".join(f"{reason} {count:,}" for reason, count in step["reasons"].items())
        counts = (step["came"], step["made"] or "", step["kept"], step["dropped"] or "")
        judge = cut(step.get("brief") or step["judge"], max(20, (width - 44) // 2))
        table.add_row(Text(str(step["step"])), *_cells(judge, *counts, reasons))
    return table


def _table(left: Sequence[str], right: Sequence[str], tail: Sequence[str] = ()) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 2, 0, 0))
    for name in left:
        table.add_column(Text(name), overflow="fold")
    for name in right:
        table.add_column(Text(name), justify="right", no_wrap=True)
    for name in tail:
        table.add_column(Text(name), overflow="fold")
    return table


def _cells(*values: Any) -> list[Text]:
    return [Text(f"{value:,}" if isinstance(value, int) else plain(str(value or ""))) for value in values]


# --- the life of one row ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Verdict:
    """One verdict on a row, and the texts of the rows that its evidence names."""

    set: str
    step: int
    name: str
    judge: str
    keep: bool
    reason: str | None
    score: float | None
    measure: str | None  # what `score` is
    limits: tuple[float | None, float | None]
    evidence: Json
    texts: dict[str, str]
    members: tuple[str, ...] = ()  # of its group of duplicates or its cluster: others of them, MOST_MEMBERS at most
    group: int = 0  # how many others there are

    def sentence(self) -> str:
        """The verdict in words, without its evidence."""
        said = "kept" if self.keep else "dropped"
        said += f": {self.reason}" if self.reason else ""
        if self.reason == "not_scorable":
            said += (
                f", for it has no {self.measure or 'score'} (nothing to measure, or longer than the model's context)"
            )
        if self.score is None:
            return said
        said += f"; {self.measure or 'score'} {self.score:.6g}"
        low, high = self.limits
        if (low, high) != (None, None):
            span = f"from {low:g} to {high:g}" if low is not None and high is not None else ""
            span = span or (
                f"from {low:g}"
                if low is not None
                else f"{'below' if not self.keep and self.score == high else 'up to'} {high:g}"
            )
            said += f", kept {span}"
        return said

    def proof(self) -> list[str]:
        """The evidence in words, one line a fact, with the text of each row that it names."""
        lines = [
            f"{name.replace('_', ' ')}: {value}" + (f"  {self.texts[value]}" if value in self.texts else "")
            for name, value in ((key, _word(item)) for key, item in self.evidence.items())
        ]
        if self.group:
            lines.append(
                f"with it in the group: {self.group:,} more" + (", such as" if self.group > len(self.members) else "")
            )
            lines += [f"  {member}  {self.texts.get(member, '')}" for member in self.members]
        return lines


def _word(value: Any) -> str:
    return value if isinstance(value, str) else f"{value:.6g}" if isinstance(value, float) else json.dumps(value)


@dataclass(frozen=True)
class Relative:
    """A row that another was made from or that was made from it. depth: generations between them. fates: what became
    of it, a phrase for each set that it came into."""

    row_id: str
    depth: int
    source: str
    position: int
    maker: str | None
    text: str
    fates: tuple[str, ...] = ()


@dataclass(frozen=True)
class Life:
    """All that a run knows of one row. `source` is the record of where it was read (None for made rows)."""

    row: Json
    source: Json | None
    parents: tuple[Relative, ...]
    children: tuple[Relative, ...]
    verdicts: tuple[Verdict, ...]
    curated: tuple[tuple[str, str, str], ...]  # set, split, file
    trained: tuple[Json, ...]  # stage, steps, and what the stage wrote of the row; or stage, excluded
    faults: tuple[Json, ...]  # of the quarantine: step, error, raw (a traceback)
    stands_for: tuple[tuple[str, int, str, str], ...] = ()  # set, step, row_id and text of what it was kept instead of


def why(folder: RunFolder, row_id: str) -> Life:
    """The life of the row whose id is, or alone begins with, `row_id`. HouseError where there is none or several."""
    with connect(folder) as con:
        return life(con, folder, row_id)


def life(con: Any, folder: RunFolder, row_id: str) -> Life:
    """`why` on a connection that stands (views.connect)."""
    full = find_row(con, row_id)
    row = records(con, "SELECT * FROM rows WHERE row_id = ? LIMIT 1", [full])[0]
    parents, children = _ancestors(con, row), _children(con, full)
    known = _fates(con, [one.row_id for one in (*parents, *children)])
    named = {source["name"]: source for source in sources(folder)}
    return Life(
        row=row,
        source=named.get(row["source"]) if row["maker"] is None else None,
        parents=tuple(replace(one, fates=tuple(known.get(one.row_id, ()))) for one in parents),
        children=tuple(replace(one, fates=tuple(known.get(one.row_id, ()))) for one in children),
        verdicts=_verdicts(con, folder, row),
        curated=tuple(
            con.execute('SELECT "set", split, file FROM curated WHERE row_id = ? ORDER BY ALL', [full]).fetchall()
        ),
        trained=_trained(con, full),
        faults=tuple(records(con, "SELECT step, error, raw FROM quarantine WHERE row_id = ? ORDER BY ALL", [full])),
        stands_for=_stands_for(con, full),
    )


def _stands_for(con: Any, row_id: str) -> tuple[tuple[str, int, str, str], ...]:
    sql = """SELECT "set", step, row_id FROM judged WHERE json_extract_string(evidence, '$.duplicate_of') = ?
             ORDER BY ALL LIMIT ?"""
    found = con.execute(sql, [row_id, MOST_RELATIVES]).fetchall()
    said = {row["row_id"]: gist(row) for row in rows_of(con, [one for _, _, one in found])}
    return tuple((name, step, one, said.get(one, "")) for name, step, one in found)


def find_row(con: Any, row_id: str) -> str:
    """The whole id of the row whose id is, or alone begins with, `row_id`."""
    wanted = row_id.strip().lower()
    sql = "SELECT DISTINCT row_id FROM rows WHERE starts_with(row_id, ?) ORDER BY row_id LIMIT 5"
    found = [one for (one,) in con.execute(sql, [wanted]).fetchall()] if wanted else []
    if len(found) == 1 or wanted in found:
        return wanted if wanted in found else str(found[0])
    if found:
        raise HouseError(f"several rows begin with {row_id!r}, such as {', '.join(found)}. Give more of the id.")
    raise HouseError(
        f"no row has the id {row_id!r}. Ids stand in the report and in the curated files (column row_id); or ask:"
        " gristmill sql OUT \"select row_id, reason from verdicts where not keep limit 20\""
    )  # fmt: skip


def _verdicts(con: Any, folder: RunFolder, row: Mapping[str, Any]) -> tuple[Verdict, ...]:
    known = {(step["set"], step["step"]): step for step in steps(folder)}
    order = {key: place for place, key in enumerate(known)}
    judged = records(con, "SELECT * FROM judged WHERE row_id = ?", [row["row_id"]])
    measured = con.execute('SELECT "set", step, score FROM scores WHERE content_id = ?', [row["content_id"]]).fetchall()
    scores = {(name, step): score for name, step, score in measured}
    found = []
    for one in sorted(judged, key=lambda one: order[one["set"], one["step"]]):
        key = (one["set"], one["step"])
        if one["score"] is None:
            one["score"] = scores.get(key)
        found.append(verdict_of(con, known[key], one, group=True))
    return tuple(found)


def verdict_of(con: Any, step: Mapping[str, Any], one: Mapping[str, Any], *, group: bool = False) -> Verdict:
    """One record of the view `verdicts` with what its step (step.json) and the rows it names add to it. group: also who
    else is in its cluster or group of duplicates, which reads all verdicts."""
    evidence = json.loads(one["evidence"] or "{}")
    low, high = step["limits"]
    if group and (low, high) == (None, None) and "rank" in evidence:
        low, high = _cuts(con, one)
    members, size = _members(con, one, evidence) if group else ((), 0)
    return Verdict(
        set=one["set"],
        step=one["step"],
        name=step["name"],
        judge=step.get("brief", one["judge"]),
        keep=one["keep"],
        reason=one["reason"],
        score=one["score"],
        measure=step["score"],
        limits=(low, high),
        evidence=evidence,
        texts=_texts(con, evidence, members),
        members=members,
        group=size,
    )


def _cuts(con: Any, one: Mapping[str, Any]) -> tuple[float | None, float | None]:
    """Lowest and highest score that a judge of ranks kept, as the evidence of what it dropped states them (`cut`)."""
    cut_of = "any_value(try_cast(json_extract_string(evidence, '$.cut') AS DOUBLE)) FILTER (ends_with(reason, ?))"
    sql = f'SELECT {cut_of}, {cut_of} FROM stored WHERE "set" = ? AND step = ? AND NOT keep'
    low, high = con.execute(sql, ["_low", "_high", one["set"], one["step"]]).fetchone()
    return low, high


def _texts(con: Any, evidence: Mapping[str, Any], members: Sequence[str] = ()) -> dict[str, str]:
    """Texts of the rows that evidence names, and of `members`."""
    ids = [value for value in evidence.values() if isinstance(value, str) and ROW_ID.fullmatch(value)]
    return {row["row_id"]: gist(row) for row in rows_of(con, [*ids, *members])}


def _members(con: Any, one: Mapping[str, Any], evidence: Mapping[str, Any]) -> tuple[tuple[str, ...], int]:
    """Others of the row's group of duplicates (beside the survivor), or of its cluster: some, and how many."""
    key = "duplicate_of" if "duplicate_of" in evidence else "cluster" if "cluster" in evidence else None
    if key is None:
        return (), 0
    where = """FROM judged WHERE "set" = ? AND step = ? AND row_id <> ? AND json_extract_string(evidence, ?) = ?"""
    values = [one["set"], one["step"], one["row_id"], f"$.{key}", str(evidence[key])]
    found = con.execute(f"SELECT row_id {where} ORDER BY row_id LIMIT {MOST_MEMBERS}", values).fetchall()
    count = con.execute(f"SELECT count(*) {where}", values).fetchone()[0] if found else 0
    return tuple(row_id for (row_id,) in found), int(count)


def _ancestors(con: Any, row: Mapping[str, Any]) -> tuple[Relative, ...]:
    """Parents, their parents, and so on to what was read."""
    found: list[Relative] = []
    seen, wanted, depth = {row["row_id"]}, list(row["parents"] or ()), 1
    while wanted and len(found) < MOST_RELATIVES:
        rows = rows_of(con, [one for one in dict.fromkeys(wanted) if one not in seen][:MOST_RELATIVES])
        found += [_relative(one, depth) for one in rows]
        seen |= {one["row_id"] for one in rows}
        wanted = [parent for one in rows for parent in one["parents"] or ()]
        depth += 1
    return tuple(found)


def _children(con: Any, row_id: str) -> tuple[Relative, ...]:
    sql = "SELECT * FROM rows WHERE maker IS NOT NULL AND list_contains(parents, ?) ORDER BY row_id LIMIT ?"
    return tuple(_relative(row, 1) for row in records(con, sql, [row_id, MOST_RELATIVES]))


def _fates(con: Any, ids: Sequence[str]) -> dict[str, list[str]]:
    """What became of these rows in each set: kept, or which step dropped them and why."""
    sql = """
SELECT l.row_id, l."set", s.name, v.reason
FROM (SELECT "set", row_id, arg_max_null(dropped_at, entry) AS last
      FROM lives WHERE row_id IN (SELECT unnest(?)) GROUP BY ALL) l
LEFT JOIN steps s ON s."set" = l."set" AND s.step = l.last
LEFT JOIN stored v ON v."set" = l."set" AND v.step = l.last AND v.row_id = l.row_id
ORDER BY ALL"""
    found: dict[str, list[str]] = {}
    for row_id, name, judge, reason in con.execute(sql, [list(ids)]).fetchall() if ids else ():
        said = f"kept in set {name}" if judge is None else f"dropped from set {name} by {judge}: {reason}"
        found.setdefault(row_id, []).append(said)
    return found


def _relative(row: Mapping[str, Any], depth: int) -> Relative:
    return Relative(row["row_id"], depth, row["source"], row["position"], row["maker"], gist(row))


def _trained(con: Any, row_id: str) -> tuple[Json, ...]:
    losses = {one["stage"]: one for one in records(con, "SELECT * FROM row_losses WHERE row_id = ?", [row_id])}
    sql = "SELECT stage, list(DISTINCT step ORDER BY step) AS steps FROM trained WHERE row_id = ? GROUP BY stage"
    found = [one | {"losses": losses.get(one["stage"], {})} for one in records(con, sql, [row_id])]
    found += records(con, "SELECT stage, reason AS excluded FROM excluded WHERE row_id = ?", [row_id])
    return tuple(sorted(found, key=lambda one: str(one["stage"])))


def rows_of(con: Any, ids: Sequence[str]) -> list[Json]:
    """The rows of these ids, in their order; ids that no row has are passed over."""
    if not ids:
        return []
    found = {row["row_id"]: row for row in records(con, "SELECT * FROM rows WHERE row_id IN (SELECT unnest(?))", [ids])}
    return [found[one] for one in ids if one in found]


def records(con: Any, sql: str, values: Sequence[Any] = ()) -> list[Json]:
    """The answer to `sql` as one dict a row."""
    answer = con.execute(sql, list(values))
    names = [column[0] for column in answer.description]
    return [dict(zip(names, row, strict=True)) for row in answer.fetchall()]


def gist(row: Mapping[str, Any], most: int = 160) -> str:
    """Prompt and response on one line, cut to `most` characters."""
    said = " → ".join(piece for piece in (prompt_of(row), response_of(row)) if piece)
    return cut(" ".join(plain(said).split()), most)


def cut(text: str, most: int) -> str:
    return text if len(text) <= most else text[: most - 1] + "…"


def plain(text: str) -> str:
    """`text` with control characters other than tab and newline, and those that turn the direction of writing, shown as
    `·`: a terminal must not obey row text."""
    return CONTROL.sub("·", text)


def print_why(folder: RunFolder, row_id: str, console: Console | None = None) -> None:
    """The life of one row: what it says, where it came from, what each step said of it, what became of it."""
    console = console or wide_console()
    with connect(folder) as con:
        found = life(con, folder, row_id)
        twins = [str(one.evidence[name]) for one in found.verdicts for name in TWINS if name in one.evidence]
        others = {row["row_id"]: row for row in rows_of(con, twins)}
    tree = Tree(Text(f"row {found.row['row_id']}", style="bold"))
    _show_text(tree, found.row)
    _show_origin(tree, found)
    for name in dict.fromkeys(verdict.set for verdict in found.verdicts):
        _show_set(tree, found, name, others)
    if not found.verdicts:
        tree.add(Text("no step has judged it yet", style="yellow"))
    for one in found.trained:
        _show_trained(tree, one)
    if found.stands_for:
        branch = tree.add(Text("kept instead of", style="bold"))
        for name, step, one_id, text in found.stands_for:
            branch.add(Text(f"{one_id} (set {name}, step {step})\n{text}"))
    if found.children:
        branch = tree.add(Text("made from it", style="bold"))
        for child in found.children:
            fate = "".join(f"; {plain(one)}" for one in child.fates)
            branch.add(Text(f"{child.row_id} by {plain(child.maker or '')}{fate}\n{child.text}"))
    for fault in found.faults:
        tree.add(Text(f"quarantine: {plain(fault['error'] or '')}", style="bold red")).add(
            Text(plain(fault["raw"] or ""))
        )
    console.print(tree)


def _show_text(tree: Tree, row: Mapping[str, Any]) -> None:
    branch = tree.add(Text("what it says", style="bold"))
    for name in ("messages", "chosen", "rejected"):
        for turn in row[name] or ():
            head = turn["role"] if name == "messages" else f"{name} {turn['role']}"
            branch.add(Text.assemble((f"{plain(head)}: ", "cyan"), cut(plain(turn["content"] or ""), 1200)))
    if row["text"] is not None:
        branch.add(Text(cut(plain(row["text"]), 1200)))


def _show_origin(tree: Tree, found: Life) -> None:
    row = found.row
    if found.source is not None:
        s = found.source
        licence = s["licence"] or "no licence stated"
        tree.add(Text(f"read from source {s['name']}, position {row['position']:,} ({s['path']}; {licence})"))
        return
    branch = tree.add(Text(f"made by {plain(row['maker'] or 'an unknown maker')}", style="bold"))
    for line in origin_lines(row["meta"]):
        branch.add(Text(plain(line)))
    branch = tree.add(Text("made from", style="bold"))
    for parent in found.parents:
        made = (
            f"made by {plain(parent.maker)}"
            if parent.maker
            else f"source {parent.source}, position {parent.position:,}"
        )
        fate = "".join(f"; {plain(one)}" for one in parent.fates)
        branch.add(Text(f"{'  ' * (parent.depth - 1)}{parent.row_id} ({made}{fate})\n{parent.text}"))
    for lost in [one for one in row["parents"] or () if one not in {parent.row_id for parent in found.parents}]:
        branch.add(Text(f"{lost} (not a row of this run)"))
    if not row["parents"]:
        branch.add(Text("no row: its maker begins with what the model says, or with words of the recipe"))


def _show_set(tree: Tree, found: Life, name: str, others: Mapping[str, Json]) -> None:
    branch = tree.add(Text(f"set {name}", style="bold"))
    for verdict in found.verdicts:
        if verdict.set != name:
            continue
        style = "green" if verdict.keep else "bold red"
        leaf = branch.add(Text.assemble(f"{verdict.step:>2} {verdict.name} ", (verdict.sentence(), style)))
        if not verdict.keep:
            leaf.add(Text(plain(verdict.judge), style="dim"))
        for line in verdict.proof():
            leaf.add(Text(plain(line)))
        for shown in pictures(found.row, verdict.evidence, others):
            leaf.add(shown)
    for _, split, file in (one for one in found.curated if one[0] == name):
        branch.add(Text(f"curated: split {split}, curated/{name}/{file}", style="bold green"))


def _show_trained(tree: Tree, one: Mapping[str, Any]) -> None:
    if "excluded" in one:
        tree.add(Text(f"stage {one['stage']}: left out of training, {one['excluded']}", style="yellow"))
        return
    shown = ", ".join(str(step) for step in one["steps"][:12]) + (", …" if len(one["steps"]) > 12 else "")
    values = [f"{k} {_word(v)}" for k, v in one["losses"].items() if k not in ("stage", "row_id") and v is not None]
    tree.add(Text(f"stage {one['stage']}: trained in step {shown}" + (f"; {', '.join(values)}" if values else "")))


def print_query(folder: RunFolder, sql: str, console: Console | None = None) -> None:
    """The answer to one SELECT as a table, its first MOST_ROWS rows."""
    console = console or wide_console()
    columns, rows = query(folder, sql, MOST_ROWS + 1)
    numbers = [
        all(row[i] is None or isinstance(row[i], int | float) for row in rows) and bool(rows)
        for i in range(len(columns))
    ]
    table = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 2, 0, 0))
    for name, number in zip(columns, numbers, strict=True):
        table.add_column(Text(plain(name)), justify="right" if number else "left", overflow="fold")
    for row in rows[:MOST_ROWS]:
        table.add_row(*(Text("null", style="dim") if value is None else Text(plain(str(value))) for value in row))
    console.print(table)
    if len(rows) > MOST_ROWS:
        console.print(Text(f"only the first {MOST_ROWS:,} rows are shown; add a limit or an aggregate", style="yellow"))
