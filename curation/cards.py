"""The data card of a curated set: README.md with Hugging Face's card YAML on top, made from the manifest alone.

Equal manifests give equal cards, so that a card can be made again from the manifest beside it.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

import yaml

_KINDS = {
    "sft": ("conversations", "`messages` (list of role and content)"),
    "preference": ("preference pairs", "`prompt`, `chosen` and `rejected` (message lists)"),
    "kto": ("judged answers", "`prompt`, `completion` (message lists) and `label`"),
    "text": ("documents", "`text`"),
}
_COMMANDS = {"sft": "sft", "preference": "dpo"}
# Identifiers that the Hub's card schema knows under its own spelling; any other goes to `license: other`
_HUB_LICENCES = {
    *("apache-2.0", "mit", "bsd", "bsd-2-clause", "bsd-3-clause", "cc0-1.0", "cc-by-2.0", "cc-by-2.5", "cc-by-3.0"),
    *("cc-by-4.0", "cc-by-sa-3.0", "cc-by-sa-4.0", "cc-by-nc-2.0", "cc-by-nc-3.0", "cc-by-nc-4.0", "cc-by-nc-sa-2.0"),
    *("cc-by-nc-sa-3.0", "cc-by-nc-sa-4.0", "cc-by-nc-nd-3.0", "cc-by-nc-nd-4.0", "cc-by-nd-4.0", "odc-by", "pddl"),
    *("gpl-2.0", "gpl-3.0", "lgpl-2.1", "lgpl-3.0", "agpl-3.0", "mpl-2.0", "isc", "unlicense", "wtfpl", "psfl"),
}
_SIZES = (
    *((10**3, "n<1K"), (10**4, "1K<n<10K"), (10**5, "10K<n<100K"), (10**6, "100K<n<1M")),
    *((10**7, "1M<n<10M"), (10**8, "10M<n<100M"), (10**9, "100M<n<1B")),
)


def card(manifest: Mapping[str, Any], language: str | None = None) -> str:
    """README.md of a curated folder, from its whole manifest (files included).

    language: a code such as "en", where it is known; curation does not guess it."""
    head = yaml.safe_dump(front_matter(manifest, language), sort_keys=False, allow_unicode=True, width=1000)
    parts = [_about(manifest), _sources(manifest)]
    parts += [_models(manifest)] if manifest.get("models") else []
    parts += [_funnel(manifest)]
    parts += [_audits(manifest)] if manifest.get("audits") else []
    parts += [_loading(manifest), _making(manifest), _limitations(manifest)]
    return f"---\n{head}---\n\n" + "\n\n".join(parts) + "\n"


def front_matter(manifest: Mapping[str, Any], language: str | None = None) -> dict[str, Any]:
    """The card's YAML as a value (Hugging Face's dataset card metadata)."""
    splits = split_rows(manifest)
    total = sum(splits.values())
    size = next((name for limit, name in _SIZES if total < limit), "1B<n<10B")
    files = [{"split": name, "path": f"data/{name}-*.parquet"} for name, rows in splits.items() if rows]
    config = {"configs": [{"config_name": "default", "data_files": files}]} if files else {}
    return {
        "pretty_name": " ".join(manifest["name"].split()),
        **({"language": [language]} if language else {}),
        **merged_licence([source.get("licence") for source in manifest["sources"]]),
        "task_categories": ["text-generation"],
        "size_categories": [size],
        "tags": ["gristmill", manifest["kind"], "curated"],
        **config,
    }


def merged_licence(licences: Sequence[str | None]) -> dict[str, str]:
    """Card fields for the licences of all sources: their one common identifier, or `other` with all of them named."""
    named = sorted({licence or "unknown" for licence in licences})
    if len(named) == 1 and named[0].lower() in _HUB_LICENCES:
        return {"license": named[0].lower()}
    if named in ([], ["unknown"]):
        return {"license": "unknown"}
    return {"license": "other", "license_name": "-and-".join(_slug(name) for name in named), "license_link": "#sources"}


def _slug(text: str) -> str:
    return re.sub(r"[^a-z0-9.]+", "-", text.lower()).strip("-")


def split_rows(manifest: Mapping[str, Any]) -> dict[str, int]:
    """Rows of each split, from the manifest's files."""
    rows: dict[str, int] = {}
    for file in manifest["files"]:
        rows[file["split"]] = rows.get(file["split"], 0) + file["rows"]
    return rows


def _about(manifest: Mapping[str, Any]) -> str:
    what, columns = _KINDS[manifest["kind"]]
    splits = split_rows(manifest)
    counts = ", ".join(f"{rows:,} in `{name}`" for name, rows in splits.items()) or "none"
    held_out = (
        "\n\nSplit `test` holds rows whose prompts were held out by a hash before any judge looked at them."
        if splits.get("test")
        else ""
    )
    loop = f" It is the work of round {manifest['round']} of a loop." if manifest.get("round") else ""
    return (
        f"# {_cell(manifest['name'])}\n\nA curated set of {what} for tuning language models: {counts}.\n"
        f"Columns: {columns} and `row_id`, which names the row in the ledger of the run that made this set."
        f"{loop}{held_out}"
    )


def _sources(manifest: Mapping[str, Any]) -> str:
    head = "## Sources\n\n| source | licence | curated rows | digest |\n|---|---|---:|---|\n"
    lines = [
        f"| {_cell(s['name'])} | {_cell(s.get('licence') or 'unknown')} | {s['rows']:,} | `{str(s['digest'])[:16]}` |"
        for s in manifest["sources"]
    ]
    return head + "\n".join(lines) + "\n\nEach source keeps its own licence; a row is under the licence of its source."


def _models(manifest: Mapping[str, Any]) -> str:
    """Whose answers the rows are."""
    head = "## Models that made rows\n\n| maker | model | what it is | digest |\n|---|---|---|---|\n"
    lines = []
    for one in manifest["models"]:
        base, number = one.get("base"), one.get("round")
        what = "as it came" if base is None else f"`{_cell(base)}` after the stage of that name"
        what += f", round {number}" if number else ""
        lines.append(f"| {_cell(one['maker'])} | `{_cell(one['model'])}` | {what} | `{_cell(one['digest'])}` |")
    return head + "\n".join(lines)


def _funnel(manifest: Mapping[str, Any]) -> str:
    head = "## From raw to curated\n\n| step | judge | came | made | kept | dropped | reasons |\n"
    head += "|---:|---|---:|---:|---:|---:|---|\n"
    lines = []
    for step in manifest["funnel"]:
        reasons = ", ".join(f"{reason} {count:,}" for reason, count in step.get("reasons", {}).items())
        counts = " | ".join(f"{step[name]:,}" for name in ("came", "made", "kept", "dropped"))
        lines.append(f"| {step['step']} | `{_cell(step['judge'])}` | {counts} | {_cell(reasons)} |")
    return head + "\n".join(lines) + "\n\nIn every step, came + made = kept + dropped."


def _audits(manifest: Mapping[str, Any]) -> str:
    head = (
        "## Audits\n\nOf blind samples, labelled by people, reweighted to the corpus; 95 % intervals in brackets.\n\n"
    )
    head += "| judge | labelled | dropped rows that are bad | bad rows it keeps | good rows it drops |\n"
    head += "|---|---:|---:|---:|---:|\n"
    lines = []
    for audit in manifest["audits"]:
        labelled = audit["dropped"]["labelled"] + audit["kept"]["labelled"]
        figures = " | ".join(_estimate(audit[name]) for name in ("precision", "missed", "lost"))
        by = "" if audit.get("labeller") is None else " (by a model, corrected by people's labels)"
        lines.append(f"| `{_cell(audit['judge'])}` | {labelled}{by} | {figures} |")
    return head + "\n".join(lines)


def _estimate(figure: Mapping[str, Any]) -> str:
    if figure["value"] is None:
        return "unknown"
    low, high = ("?" if figure[name] is None else f"{figure[name]:.0%}" for name in ("low", "high"))
    return f"{figure['value']:.0%} ({low} to {high})"


def _cell(text: str) -> str:
    return " ".join(str(text).replace("|", "\\|").replace("<", "&lt;").split())


def _loading(manifest: Mapping[str, Any]) -> str:
    command = _COMMANDS.get(manifest["kind"])
    tune = f"\n\n```sh\ngristmill {command} FOLDER\n```" if command else ""
    return (
        "## Loading\n\n```python\nimport datasets\n\n"
        f'rows = datasets.load_dataset("FOLDER", split="train")  # FOLDER: where this file lies\n```{tune}'
    )


def _making(manifest: Mapping[str, Any]) -> str:
    facts = [
        ("recipe digest", f"`{manifest['recipe_digest']}`"),
        ("seed", manifest["seed"]),
        ("gristmill", manifest["gristmill"]),
        ("created", manifest["created"]),
        ("version", manifest.get("version")),
        ("previous release", manifest.get("previous")),
        ("ledger digest", f"`{manifest['ledger_digest']}`" if manifest.get("ledger_digest") else None),
    ]
    lines = [f"- {name}: {value}" for name, value in facts if value is not None]
    return (
        "## How it was made\n\nBy gristmill, with the recipe in `manifest.json`."
        " The same recipe, sources and seed make the same bytes.\n\n" + "\n".join(lines)
    )


def _limitations(manifest: Mapping[str, Any]) -> str:
    made = sum(step["made"] for step in manifest["funnel"] if not step["judge"].startswith("Overrides"))
    lines = [
        "- The judges named above are heuristics and measurements by models: they drop good rows and keep bad ones. How"
        " often " + ("stands under Audits." if manifest.get("audits") else "is not known until the set is audited."),
        "- Nothing here was checked for truth, for bias, or for personal data beyond what a judge above names.",
        "- Near-duplicates and overlaps with evaluation sets are removed as far as the steps above say, and no further:"
        " paraphrases and translations are not found.",
    ]
    if made:
        lines.append(
            f"- {made:,} rows were made by the makers above, not written by people, before later steps judged."
        )
    said = dict.fromkeys(one["caution"] for one in manifest.get("models", ()) if one.get("caution"))
    lines += [f"- {_cell(one)}." for one in said]
    return "## Limitations\n\n" + "\n".join(lines)
