"""The end of a set's curation: what lives becomes shards of split train, what was held out becomes split test."""

from collections.abc import Mapping, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from .cards import card
from .folder import RunFolder, read_json
from .ledger import ledger_digest, records
from .shards import write_curated
from .sift import SetPlan, full_steps, held_out_rows, state_before


def finish(folder: RunFolder, plan: SetPlan, release: Mapping[str, Any]) -> dict[str, Any]:
    """Writes curated/SET from the rows that live after the last step (split train) and those held out (split test).

    release: name, version, created, recipe (resolved, text), recipe_digest, seed, gristmill, previous."""
    home = folder.curated(plan.name)
    ledger = ledger_digest(folder, plan.name)
    if (home / "manifest.json").is_file():
        manifest = read_json(home / "manifest.json")
        if manifest["ledger_digest"] == ledger and manifest["recipe_digest"] == release["recipe_digest"]:
            return manifest
    steps = full_steps(plan)
    state = state_before(folder, plan, len(steps))
    test = list(held_out_rows(folder, plan, len(steps), state))
    train = list(state.tables())
    fields = ("set", "step", "judge", "came", "made", "kept", "dropped", "reasons")
    manifest = {
        **release,
        "name": f"{release['name']}-{plan.name}",
        "sources": _sources(folder, [*train, *test]),
        "funnel": [{name: record[name] for name in fields} for record in records(folder, plan.name)],
        "ledger_digest": ledger,
    }
    splits = {"train": train, "test": test} if test else {"train": train}
    return write_curated(home, plan.kind, splits, manifest, lambda whole: {"README.md": card(whole)})


def _sources(folder: RunFolder, tables: Sequence[pa.Table]) -> list[dict[str, Any]]:
    """Where curated rows come from, made rows through their parents: name, licence, rows, digest of each source."""
    named = {record["name"]: record for path in sorted(folder.rows.glob("*.json")) if (record := read_json(path))}
    origin = _origins(folder, tables)
    counts: dict[str, int] = {}
    for table in tables:
        for row_id, source, parents in zip(
            *(table[n].to_pylist() for n in ("row_id", "source", "parents")), strict=True
        ):
            for name in {source} if source in named else {origin[p] for p in parents or () if p in origin}:
                counts[name] = counts.get(name, 0) + 1
            if row_id not in origin:
                origin[row_id] = source
    return [
        {"name": n, "licence": named[n]["licence"], "rows": counts[n], "digest": named[n]["digest"]}
        for n in named
        if n in counts
    ]


def _origins(folder: RunFolder, tables: Sequence[pa.Table]) -> dict[str, str]:
    """For every ancestor of a made row, the name of the source it was read from."""
    wanted = {p for table in tables for parents in table["parents"].to_pylist() for p in parents or ()}
    if not wanted:
        return {}
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
