"""The end of a set's curation: what lives becomes shards of split train, what was held out becomes split test."""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from .cards import card
from .croissant import croissant
from .folder import RunFolder, read_json, whole_file, write_json
from .ledger import State, ledger_digest, records
from .shards import Tables, columns_of, write_curated
from .sift import SetPlan, full_steps, held_out_rows, state_before


def finish(folder: RunFolder, plan: SetPlan, release: Mapping[str, Any]) -> dict[str, Any]:
    """Writes curated/SET from the rows that live after the last step (split train) and those held out (split test).

    release: name, version, created, recipe (resolved, text), recipe_digest, seed, gristmill, previous."""
    home = folder.curated(plan.name)
    ledger = ledger_digest(folder, plan.name)
    if (home / "manifest.json").is_file():
        manifest = read_json(home / "manifest.json")
        if manifest["ledger_digest"] == ledger and manifest["recipe_digest"] == release["recipe_digest"]:
            return with_audits(folder, plan.name)
    steps = full_steps(plan)
    state = state_before(folder, plan, len(steps))
    held = any(record["reasons"].get("held_out") for record in records(folder, plan.name))
    columns = columns_of(plan.kind)
    splits: dict[str, Tables] = {"train": partial(state.tables, columns)}
    if held:
        splits["test"] = partial(held_out_rows, folder, plan, len(steps), state, columns)
    fields = ("set", "step", "judge", "came", "made", "kept", "dropped", "reasons")
    manifest = {
        **release,
        "name": f"{release['name']}-{plan.name}",
        "sources": _sources(folder, _whence(state, partial(held_out_rows, folder, plan, len(steps), state))),
        "funnel": [{name: record[name] for name in fields} for record in records(folder, plan.name)],
        "ledger_digest": ledger,
    }
    if audits := audit_reports(folder, plan.name):
        manifest["audits"] = audits
    return write_curated(home, plan.kind, splits, manifest, _beside)


def audit_reports(folder: RunFolder, set_name: str) -> list[dict[str, Any]]:
    """What audits of the set's judges found (curation.audit.Report), in the order of the steps."""
    found = [read_json(path) for path in sorted((folder.root / "audits").glob("*/report.json"))]
    return sorted((report for report in found if report["set"] == set_name), key=lambda report: report["step"])


def with_audits(folder: RunFolder, set_name: str) -> dict[str, Any]:
    """The manifest of a curated set, it and the card made anew where audits have been taken since."""
    home = folder.curated(set_name)
    manifest = read_json(home / "manifest.json")
    audits = audit_reports(folder, set_name)
    if manifest.get("audits", []) == audits:
        return manifest
    manifest["audits"] = audits
    with whole_file(home / "README.md") as temporary:
        temporary.write_text(card(manifest), encoding="utf-8")
    write_json(home / "manifest.json", manifest)
    return manifest


def _beside(whole: Mapping[str, Any]) -> dict[str, str]:
    """The files that tell people and machines what a curated folder holds."""
    return {"README.md": card(whole), "croissant.json": croissant(whole, whole["columns"])}


def _whence(state: State, held_out: Callable[[Sequence[str]], Iterator[pa.Table]]) -> Iterator[pa.Table]:
    """source and parents of every curated row."""
    columns = ["source", "parents"]
    yield from state.tables(columns)
    yield from held_out(columns)


def _sources(folder: RunFolder, tables: Iterator[pa.Table]) -> list[dict[str, Any]]:
    """Where curated rows come from, made rows through their parents: name, licence, rows, digest of each source."""
    named = {record["name"]: record for path in sorted(folder.rows.glob("*.json")) if (record := read_json(path))}
    counts: dict[str, int] = {}
    made: Counter[tuple[str, ...]] = Counter()
    for table in tables:
        read = pc.is_in(table["source"], value_set=pa.array(list(named), pa.string()))
        for item in pc.value_counts(table["source"].filter(read)).to_pylist():
            counts[item["values"]] = counts.get(item["values"], 0) + item["counts"]
        made.update(tuple(parents or ()) for parents in table["parents"].filter(pc.invert(read)).to_pylist())
    origin = _origins(folder, {parent for parents in made for parent in parents})
    for parents, rows in made.items():
        for name in {origin[parent] for parent in parents if parent in origin}:
            counts[name] = counts.get(name, 0) + rows
    return [
        {"name": n, "licence": named[n]["licence"], "rows": counts[n], "digest": named[n]["digest"]}
        for n in named
        if n in counts
    ]


def _origins(folder: RunFolder, wanted: set[str]) -> dict[str, str]:
    """For each of these rows and their ancestors, the name of the source it was read from."""
    found: dict[str, tuple[str, list[str]]] = {}
    while wanted - found.keys():
        before = len(found)
        value_set = pa.array(sorted(wanted - found.keys()), pa.string())
        for part in sorted(folder.rows.glob("*.parquet")):
            table = pq.read_table(part, columns=["row_id", "source", "parents"])
            for row in table.filter(pc.is_in(table["row_id"], value_set=value_set)).to_pylist():
                found[row["row_id"]] = (row["source"], row["parents"] or [])
                wanted |= set(row["parents"] or ())
        if len(found) == before:
            break

    def root(row_id: str) -> str:
        source, parents = found[row_id]
        return root(parents[0]) if parents and parents[0] in found else source

    return {row_id: root(row_id) for row_id in found}
