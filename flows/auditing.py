"""`gristmill audit`: is a judge right? Draws the blind sample, takes labels, reports, and keeps what people said."""

import csv
import getpass
import io
import json
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast, get_args

import pyarrow as pa
from rich.console import Console
from rich.table import Table
from rich.text import Text

from ..curation.audit import (
    SAMPLE,
    Label,
    Report,
    add_labels,
    audit_folder,
    check_labels,
    corrected,
    draw_sample,
    find_step,
    read_labels,
    report,
    write_report,
)
from ..curation.door import ChatAnswer, ChatModel, ChatRequest, Sampling
from ..curation.folder import HouseError, RunFolder, read_parquet, whole_file, write_parquet
from ..curation.ledger import StepRecord
from ..curation.look import plain, rows_of, wide_console
from ..curation.overrides import add_override
from ..curation.release import with_audits
from ..curation.text.view import prompt_of, response_of
from ..curation.views import connect

KEYS: dict[str, Label] = {"g": "good", "b": "bad", "u": "unsure"}
SHEET = "to_label.jsonl"
QUESTION = """\
You check training data for an assistant. Judge this one example: would it teach the assistant to answer well?
Bad: the response is wrong, empty, off the point, garbled, unsafe, or does not do what the prompt asks.
Good: the response does what the prompt asks.

### Prompt
{prompt}

### Response
{response}

Answer with one word, good or bad."""


@dataclass(frozen=True)
class Audit:
    """A drawn audit: its folder, the step it is of, the sample, and the labels so far (row_id -> label)."""

    home: Path
    record: StepRecord
    sample: pa.Table
    labels: dict[str, Label]

    @property
    def missing(self) -> list[str]:
        return [row_id for row_id in self.sample["row_id"].to_pylist() if row_id not in self.labels]


def begin(folder: RunFolder, judge: str | None, set_name: str | None = None, size: int = 50, seed: int = 0) -> Audit:
    """The audit of that judge: its sample as it was drawn first, or drawn now, with the labels that lie there."""
    record = find_step(folder, judge, set_name)
    home = audit_folder(folder, record)
    path = home / f"sample-{size}-{seed}.parquet"
    if not path.is_file():
        write_parquet(path, draw_sample(folder, record, size, seed))
    return _audit(home, record, read_parquet(path, SAMPLE.names, "Remove it: the same rows are drawn again"))


def _audit(home: Path, record: StepRecord, sample: pa.Table) -> Audit:
    wanted = set(sample["row_id"].to_pylist())
    return Audit(home, record, sample, {i: said["label"] for i, said in read_labels(home).items() if i in wanted})


def label(audit: Audit, said: Iterable[tuple[str, Label, str | None]], who: str) -> Audit:
    """The audit with these labels (row_id, label, note) added, each written at once."""
    contents = dict(zip(*(audit.sample[name].to_pylist() for name in ("row_id", "content_id")), strict=True))
    for row_id, value, note in said:
        line = {"row_id": row_id, "content_id": contents[row_id], "label": value, "who": who, "note": note}
        add_labels(audit.home, [line])
    return _audit(audit.home, audit.record, audit.sample)


def audit_command(
    folder: RunFolder,
    judge: str | None,
    set_name: str | None,
    size: int,
    seed: int,
    labels: Path | None,
    model: str | None,
    budget: float,
    apply: bool,
    who: str | None,
) -> None:
    """What the command does: takes labels from a file, else from the terminal, else writes a sheet to fill; then
    reports what is labelled."""
    console = wide_console()
    audit, name = begin(folder, judge, set_name, size, seed), who or getpass.getuser()
    if labels is not None:
        audit = label(audit, read_sheet(labels, audit), name)
    elif model is None and audit.missing and sys.stdin.isatty():
        audit = label(audit, ask(folder, audit, console, _typed), name)
    if audit.missing and model is None:
        sheet = write_sheet(folder, audit)
        console.print(Text(f"{len(audit.missing)} of {size} rows have no label. Fill in {sheet} and give it back with"
                           " --labels"))  # fmt: skip
    if audit.labels:
        said = None if model is None else ask_model(folder, audit, _chat(folder, model))
        print_report(conclude(audit, budget, said), console)
        if (folder.curated(audit.record["set"]) / "manifest.json").is_file():
            with_audits(folder, audit.record["set"])
    elif model is not None:
        raise HouseError("a judge model is calibrated by people's labels: label some rows first, without --model")
    if apply:
        count = overrule_mistakes(folder, audit, name)
        console.print(Text(f"{count} overrides written: run the recipe into the same --out to apply them"))


def _typed() -> str:
    return sys.stdin.readline() or "q"


def _chat(folder: RunFolder, model: str) -> ChatModel:
    from .deciding import stored_recipe
    from .models import Workshop
    from .recipe import load_text

    return Workshop(load_text(stored_recipe(folder), str(folder.recipe)), folder).chat(model)


# ---- where labels come from


def ask(folder: RunFolder, audit: Audit, console: Console, key: Callable[[], str]) -> Iterator[tuple[str, Label, None]]:
    """Shows each row without a label, blind, and yields what `key` says of it: g, b, u; q ends."""
    with connect(folder) as con:
        rows = rows_of(con, audit.missing)
    for number, row in enumerate(rows, len(audit.labels) + 1):
        console.rule(Text(f"{number} of {audit.sample.num_rows}"))
        console.print(Text(plain(prompt_of(row)), style="bold"))
        console.print(Text("→ " + plain(response_of(row))))
        console.print(Text("[g]ood  [b]ad  [u]nsure  [q]uit", style="dim"))
        while (said := key().strip().lower()[:1]) not in (*KEYS, "q"):
            console.print(Text("g, b, u or q"))
        if said == "q":
            return
        yield row["row_id"], KEYS[said], None


def write_sheet(folder: RunFolder, audit: Audit) -> Path:
    """The rows without a label as JSON lines to fill in (label: good, bad or unsure), blind."""
    path = audit.home / SHEET
    with connect(folder) as con:
        rows = rows_of(con, audit.missing)
    lines = [
        {"row_id": row["row_id"], "prompt": prompt_of(row), "response": response_of(row), "label": None, "note": None}
        for row in rows
    ]
    with whole_file(path) as temporary:
        temporary.write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines), encoding="utf-8")
    return path


def read_sheet(path: Path, audit: Audit) -> list[tuple[str, Label, str | None]]:
    """Labels of a filled sheet: JSON lines or CSV with row_id, label and perhaps note. Lines without a label are passed
    over; an unknown row or label is a HouseError with its line."""
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise HouseError(f"labels {path}: {error.strerror}") from error
    known = set(audit.sample["row_id"].to_pylist())
    found: list[tuple[str, Label, str | None]] = []
    for number, line in _lines(path, text):
        row_id, said = line.get("row_id"), line.get("label")
        if not said:
            continue
        if row_id not in known:
            raise HouseError(f"{path}:{number}: row {row_id!r} is not in this audit's sample")
        if said not in get_args(Label):
            raise HouseError(f"{path}:{number}: label {said!r}; say good, bad or unsure")
        found.append((str(row_id), cast(Label, said), line.get("note") or None))
    return found


def _lines(path: Path, text: str) -> Iterator[tuple[int, Mapping[str, Any]]]:
    if path.suffix == ".csv":
        yield from enumerate(csv.DictReader(io.StringIO(text)), 2)
        return
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            try:
                yield number, json.loads(line)
            except json.JSONDecodeError as error:
                raise HouseError(f"{path}:{number}: not JSON ({error})") from error


def ask_model(folder: RunFolder, audit: Audit, model: ChatModel) -> dict[str, Label]:
    """The judge model's label of each row of the sample; `unsure` where its answer is neither good nor bad."""
    with connect(folder) as con:
        rows = rows_of(con, audit.sample["row_id"].to_pylist())
    sampling = Sampling(temperature=0.0, max_tokens=8)
    asked = [
        ChatRequest((("user", QUESTION.format(prompt=prompt_of(row), response=response_of(row))),), 0, sampling)
        for row in rows
    ]
    answers = model.complete(asked)
    return {row["row_id"]: _label_in(answer) for row, answer in zip(rows, answers, strict=True)}


def _label_in(answer: object) -> Label:
    words = answer.text.lower().replace(".", " ").replace("*", " ").split() if isinstance(answer, ChatAnswer) else []
    said = [word for word in words if word in ("good", "bad")]
    return cast(Label, said[0]) if said else "unsure"


# ---- what becomes of them


def conclude(audit: Audit, budget: float = 0.02, model: Mapping[str, Label] | None = None) -> Report:
    """The report of what is labelled, written beside the labels. model: a judge model's labels of the sample, then
    corrected by those of people."""
    if model is None:
        found = report(audit.sample, audit.labels, audit.record, loss_budget=budget)
    else:
        found = corrected(audit.sample, audit.labels, model, audit.record, loss_budget=budget)
    write_report(audit.home, found)
    return found


def overrule_mistakes(folder: RunFolder, audit: Audit, who: str) -> int:
    """An override for each row that people call bad and the judge kept, or good and it dropped; how many."""
    dropped = dict(zip(*(audit.sample[name].to_pylist() for name in ("row_id", "dropped")), strict=True))
    wrong = [(i, said) for i, said in audit.labels.items() if said != "unsure" and dropped[i] == (said == "good")]
    for row_id, said in wrong:
        action = "keep" if said == "good" else "drop"
        add_override(folder, row_id, action, f"labelled {said} in the audit of {audit.record['name']}", who)  # type: ignore[arg-type]
    return len(wrong)


def print_report(found: Report, console: Console) -> None:
    """The figures with their intervals, and what they mean."""
    console.print(Text(f"Audit of {found.judge} (set {found.set}, step {found.step})", style="bold"))
    for name, side in (("dropped", found.dropped), ("kept", found.kept)):
        unsure = f", {side.unsure} unsure" if side.unsure else ""
        console.print(Text(f"  {name}: {side.labelled} labelled of {side.rows:,} rows, {side.bad} bad{unsure}"))
    table = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 2, 0, 0))
    for column in ("for the whole corpus", "estimate", "95 % interval"):
        table.add_column(column)
    lines = {
        "dropped rows that are bad (precision)": found.precision,
        "bad rows that it keeps (missed)": found.missed,
        "good rows that it drops (lost)": found.lost,
    }
    for name, each in lines.items():
        table.add_row(name, _percent(each.value), f"{_percent(each.low)} to {_percent(each.high)}")
    price = found.price
    table.add_row(
        "good rows lost for a bad one caught", _number(price.value), f"{_number(price.low)} to {_number(price.high)}"
    )
    console.print(table)
    if found.threshold is not None:
        at, loss = found.threshold, found.threshold["loss"]
        console.print(
            Text(
                f"To lose at most {at['budget']:.0%} of the good rows: {at['limit']} = {at['value']:.6g} (now"
                f" {at['now']:g}); that loses {_percent(loss['value'])} ({_percent(loss['low'])} to"
                f" {_percent(loss['high'])})"
            )
        )
    if found.labeller is not None:
        said = found.labeller
        console.print(
            Text(
                f"Labelled by a model that finds {said['sensitivity']:.0%} of bad rows and spares"
                f" {said['specificity']:.0%} of good ones ({said['calibrated_on']} rows labelled by people too);"
                " the figures are corrected for that"
            )
        )


def _percent(value: float | None) -> str:
    return "unknown" if value is None else f"{value:.1%}"


def _number(value: float | None) -> str:
    return "unknown" if value is None else "∞" if value == float("inf") else f"{value:.2f}"


def print_check(folder: RunFolder, earlier: RunFolder, console: Console) -> int:
    """Labels of an earlier run held against this one; the number of rows that go against them."""
    checked = check_labels(folder, earlier).to_pylist()
    wrong = [row for row in checked if not row["right"]]
    console.print(
        Text(f"{len(checked)} labelled rows came in again: {len(checked) - len(wrong)} are treated as labelled")
    )
    for row in wrong[:20]:
        console.print(Text(f"  {row['set']}: row {row['row_id']} is {row['label']}, and {row['fate']}"))
    if len(wrong) > 20:
        console.print(Text(f"  and {len(wrong) - 20} more"))
    return len(wrong)
