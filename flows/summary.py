"""What the command line prints at the end of a run, and of the steps that exist."""

import inspect
import re
from dataclasses import MISSING, fields
from typing import Any

from rich.console import Console
from rich.table import Table

from ..curation.folder import HouseError
from ..curation.steps import find_steps
from .progress import Silent
from .recipe import Recipe
from .run import Result
from .stages import cautions, nearest
from .training_text import unmeasured_text

SENTENCE_END = re.compile(r"\.\s+(?=[A-Z`])")
KINDS = {
    "row judge": "Row judges",
    "corpus judge": "Corpus judges",
    "maker": "Makers",
    "measure": "Measures",
    "verifier": "Verifiers",
}


def show_result(recipe: Recipe, result: Result, show: Silent) -> None:
    """Funnel, evaluation table, what waits, and where the report lies."""
    console = Console(highlight=False, soft_wrap=True)
    if result.cached:
        console.print(f"Everything that {recipe.name} says is done already.", markup=False)
    else:
        from ..curation.look import print_funnel

        print_funnel(result.folder)
    rows = result.evaluation()
    if rows:
        console.print(_evaluation_table(rows))
        for line in unmeasured_text(rows):
            console.print(line, markup=False)
    for caution in cautions(recipe):
        console.print(f"! {caution}", markup=False, style="yellow")
    for name in result.waiting:
        console.print(f"The set {name} needs a trained model: `gristmill run` makes it.", markup=False)
    console.print(f"Report: {result.folder.report.resolve()}", markup=False)


def _evaluation_table(rows: list[dict[str, Any]]) -> Table:
    table = Table("set", "metric", "model", "value", "rows", title="Evaluation on held-out rows", title_justify="left")
    for column in table.columns[3:]:
        column.justify = "right"
    for row in rows:
        value = row.get("note", "nothing to score") if row["value"] is None else f"{row['value']:.4f}"
        table.add_row(row["set"], row["metric"], row["model"], value, f"{row['rows']:,}")
    return table


def show_steps(name: str | None = None) -> None:
    """Every step by kind, with its fields and its docstring's first sentence; or one with its whole docstring."""
    console = Console(highlight=False, soft_wrap=True)
    known = find_steps()
    if name is not None and name not in known:
        raise HouseError(f"no judge, maker or measure is called {name!r}; {nearest(name, list(known))}")
    if name is not None:
        kind = known[name]
        console.print(_signature(name, kind), style="bold", markup=False)
        console.print(f"{_scope(kind)}: {inspect.getdoc(kind) or ''}", markup=False)
        return
    for scope, title in KINDS.items():
        mine = {each: kind for each, kind in sorted(known.items()) if _scope(kind) == scope}
        console.print(f"{title} ({len(mine)})", style="bold cyan", markup=False)
        for each, kind in mine.items():
            console.print(f"  {_signature(each, kind)}", style="bold", markup=False)
            console.print(f"    {first_sentence(inspect.getdoc(kind) or '')}", markup=False)


def first_sentence(doc: str) -> str:
    """The first sentence of a docstring on one line: it ends at a full stop outside brackets."""
    text = " ".join(doc.split("\n\n", 1)[0].split())
    for end in SENTENCE_END.finditer(text):
        if text.count("(", 0, end.start()) == text.count(")", 0, end.start()):
            return text[: end.start() + 1]
    return text


def _signature(name: str, kind: type[Any]) -> str:
    return f"{name}({', '.join(_field(item) for item in fields(kind))})"


def _scope(kind: type[Any]) -> str:
    scope = getattr(kind, "scope", None)
    if scope is None:
        return "measure" if hasattr(kind, "measure") else "verifier"
    return "maker" if scope == "maker" else f"{scope} judge"


def _field(item: Any) -> str:
    if item.default is not MISSING:
        return f"{item.name}={item.default!r}"
    return f"{item.name}={item.default_factory()!r}" if item.default_factory is not MISSING else str(item.name)
