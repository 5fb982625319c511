"""`gristmill decide`: what a finished run would have kept under other settings, and a new release of it on request."""

import os
import shutil
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from ..curation.decide import Again, SetAgain
from ..curation.decide import decide as decide_set
from ..curation.folder import HouseError, RunFolder, read_json, stored_folder
from .models import Workshop, set_plan
from .progress import Silent
from .recipe import Recipe, load_text


@dataclass(frozen=True)
class Decision:
    """What other settings would make of a run. unsure: sets built from the rows of a set that changes."""

    recipe: Recipe
    sets: tuple[SetAgain, ...]
    unsure: tuple[str, ...]
    seconds: float

    @property
    def waiting(self) -> int:
        return sum(one.waiting for one in self.sets)


def decide(out: str | Path, overrides: Sequence[str]) -> Decision:
    """Decides every set of the finished run `out` again, its recipe changed by `overrides` (key=value). Asks no model,
    reads what the steps kept, and writes nothing but measures that need no model.

    Raises HouseError where the change is of another kind than thresholds, quotas and budgets, or the run is not
    finished."""
    started = time.monotonic()
    folder = stored_folder(out)
    text = stored_recipe(folder)
    old, new = (load_text(text, str(folder.recipe), changes) for changes in ((), overrides))
    shop = Workshop(new, folder)
    found: list[SetAgain] = []
    unsure: list[str] = []
    for name, stage in old.sets().items():
        if name not in new.sets():
            raise HouseError(f"the set {name!r} has gone from the recipe: run it into a new --out")
        moved = [one.name for one in found if one.gained or one.lost or one.waiting]
        if any(getattr(step, "set_name", None) in [*moved, *unsure] for step in stage.steps):
            unsure.append(name)
            continue
        again = decide_set(folder, set_plan(old, stage), set_plan(new, new.sets()[name]), shop, _silent)
        found.append(again)
    return Decision(new, tuple(found), tuple(unsure), time.monotonic() - started)


def write_release(out: str | Path, decision: Decision, new: str | Path, show: Silent) -> None:
    """Curates the decided recipe into the folder `new`: rows are linked, measures shared, what waited is measured. The
    manifests name the release before."""
    from .run import run

    old, fresh = stored_folder(out), Path(new)
    if fresh.exists() and any(fresh.iterdir()):
        raise HouseError(f"{fresh} is not empty: a new release wants a folder of its own")
    names = [source.name for source in decision.recipe.sources]
    for room in (old.rows, old.quarantine):
        (fresh / room.name).mkdir(parents=True, exist_ok=True)
        for path in sorted(path for name in names for path in _of_source(room, name)):
            _link(path, fresh / room.name / path.name)
    run(decision.recipe, fresh, cache=old.measures.parent, parts="curate", previous=str(old.root.name), show=show)


def stored_recipe(folder: RunFolder) -> str:
    if not folder.recipe.is_file():
        raise HouseError(f"{folder.root} holds no recipe.yaml: give the --out of a run")
    return folder.recipe.read_text(encoding="utf-8")


def _of_source(room: Path, name: str) -> Iterator[Path]:
    parts = read_json(room / f"{name}.json")["parts"] if (room / f"{name}.json").is_file() else []
    yield from (path for path in (room / f"{name}.json", room / f"{name}.parquet") if path.is_file())
    yield from (room / part for part in parts)


def _link(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except OSError:  # another file system, or one without hard links
        shutil.copy2(source, target)


def _silent(done: int, total: int) -> None:
    pass


# ---- what is shown


def print_decision(decision: Decision, console: Console, *, writes: bool = False) -> None:
    """The new funnel beside the old one, what waits and its price, and what changes in the end."""
    for one in decision.sets:
        if not any(step.changed for step in one.steps):
            console.print(Text(f"set {one.name}: nothing changes", style="dim"))
            continue
        console.print(_funnel(one))
        for line in _sentences(one):
            console.print(Text(line))
    for name in decision.unsure:
        console.print(Text(f"set {name} is built from the rows of a set that changes: only a run can tell"))
    written = "" if writes else "; no release was written"
    console.print(Text(f"decided in {decision.seconds:.1f} s{written}", style="dim"))


def _funnel(one: SetAgain) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 2, 0, 0))
    for name in ("", f"set {one.name}"):
        table.add_column(name)
    for name in ("kept", "now", "change", "waiting"):
        table.add_column(name, justify="right")
    table.add_column("dropped for, now")
    for step in one.steps:
        change = step.kept - step.before["kept"]
        cells = [str(step.step), step.name, f"{step.before['kept']:,}", f"{step.kept:,}",
                 f"{change:+,}" if change else "", f"{step.waiting:,}" if step.waiting else "",
                 ", ".join(f"{reason} {count:,}" for reason, count in step.reasons.items())]  # fmt: skip
        table.add_row(*map(Text, cells), style="bold" if step.changed else None)
    return table


def _sentences(one: SetAgain) -> Iterator[str]:
    for step in one.steps:
        if step.changed:
            yield f"{step.before.get('brief', step.before['judge'])}\n  becomes {step.brief}"
        for note in step.notes:
            yield f"! {note}"
    yield f"{one.gained:,} rows come in, {one.lost:,} leave"
    for step in one.steps:
        if step.waiting:
            yield (
                f"{step.waiting:,} rows have never met {step.name}: measuring them takes about {_time(step)};"
                " they are neither kept nor dropped here"
            )


def _time(step: Again) -> str:
    seconds = step.seconds or 0.0
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.0f} min"
