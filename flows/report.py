"""report.html: what happened in a run, for people. One file that loads nothing and runs nothing.

This module gathers numbers and places points; report.html (a Jinja template that escapes all it is given) draws them.
Row text is untrusted: it goes through the template's escaping alone, and a content security policy forbids the page
every script and every request. Equal folders give equal bytes.
"""

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
import yaml

from ..curation.cards import split_rows
from ..curation.folder import RunFolder, read_json, whole_file
from ..curation.look import Funnel, conserved, cut, funnel, plain, records, verdict_of
from ..curation.text.view import prompt_of, response_of
from ..curation.views import Json, connect, evaluations, stages, steps
from .report_makers import makers
from .training_text import unmeasured_text

BINS = 40
MAP_ROWS = 3000
MAP_DIMS = 32  # of TF-IDF/SVD, before the two directions of largest variance are drawn
CURVES = ("loss", "held_out_loss", "margin", "accuracy", "held_out_accuracy", "held_out_auc")  # of a stage
SAMPLES = 3  # of each drop reason in each set
TEXT = 420  # characters of a sample's prompt and response
WIDTH, HEIGHT = 460, 150  # of a chart, in SVG units
COLOURS = 9  # of drop reasons in the template's palette; the last one is for all others


def write_report(folder: RunFolder) -> Path:
    """Writes OUT/report.html from what lies in the folder, finished or not, and returns its path."""
    found = funnel(folder)
    colours = _colours(found)
    with connect(folder) as con:
        content = {
            "head": _head(folder, found),
            "funnel": _funnel(folder, found, colours),
            "faults": found.faults,
            "conserved": conserved(found),
            "sources": found.sources,
            "makers": makers(con, folder, found),
            "histograms": [one for step in steps(folder) if (one := _histogram(con, step)) is not None],
            "maps": [_map(con, one.name, colours) for one in found.sets],
            "samples": _samples(con, folder, found, colours),
            "quarantine": _quarantine(con),
        }
    content |= {
        "training": [_stage(folder, run) for run in stages(folder)],
        "evaluation": _evaluation(evaluations(folder)),
        "files": _files(folder),
    }
    with whole_file(folder.report) as temporary:
        temporary.write_text(_template().render(content), encoding="utf-8")
    return folder.report


@cache
def _template() -> jinja2.Template:
    house = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    house.filters |= {"count": lambda n: f"{n:,}", "num": number}
    return house.from_string(Path(__file__).with_name("report.html").read_text(encoding="utf-8"))


def number(value: Any) -> str:
    """A number for people: four significant digits, thousands apart; other values as they are."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return "–" if value is None else plain(str(value))
    if isinstance(value, int) or (abs(value) >= 1000 and math.isfinite(value)):
        return f"{value:,.0f}"
    return f"{value:.4g}"


# --- head and funnel -------------------------------------------------------------------------------------------------


def _head(folder: RunFolder, found: Funnel) -> Json:
    recipe = yaml.safe_load(folder.recipe.read_text(encoding="utf-8")) if folder.recipe.is_file() else {}
    started = folder.root / "started.json"
    manifests = [read_json(path) for path in sorted(folder.root.glob("curated/[!.]*/manifest.json"))]
    begun = read_json(started) if started.is_file() else manifests[0] if manifests else {}
    read, bad = (sum(source[name] for source in found.sources) for name in ("read", "quarantined"))
    totals = [("rows read", f"{read:,}"), ("quarantined", f"{bad:,}")]
    totals += [
        (f"curated into {one.name}", f"{one.curated['train']:,}") for one in found.sets if "train" in one.curated
    ]
    for line in _evaluation(evaluations(folder))["lines"]:
        values = [number(value) for value in line["values"].values()]
        totals.append((f"held-out {line['metric']}, {line['set']}", " → ".join(values) or line["note"] or "–"))
    return {
        "name": plain(str(recipe.get("name", folder.root.name))),
        "begun": begun.get("created", ""),
        "version": manifests[0]["gristmill"] if manifests else "",
        "seed": recipe.get("seed", ""),
        "digest": manifests[0]["recipe_digest"][:16] if manifests else "",
        "previous": begun.get("previous"),
        "totals": totals,
    }


def _colours(found: Funnel) -> dict[str, int]:
    """Palette number of each drop reason, the commonest first; 0 is held out, the last number is for the rest."""
    counts: dict[str, int] = {}
    for one in found.sets:
        for step in one.steps:
            for reason, rows in step["reasons"].items():
                counts[reason] = counts.get(reason, 0) + rows
    counts.pop("held_out", None)
    ranked = sorted(counts, key=lambda reason: (-counts[reason], reason))
    return {"held_out": 0} | {reason: min(place, COLOURS) for place, reason in enumerate(ranked, 1)}


def _funnel(folder: RunFolder, found: Funnel, colours: Mapping[str, int]) -> list[Json]:
    sets = []
    for one in found.sets:
        widest = max([step["came"] + step["made"] for step in one.steps], default=0) or 1
        drawn = []
        for step in one.steps:
            reasons = [
                {"reason": reason, "rows": rows, "colour": colours[reason], "share": 100 * rows / widest}
                for reason, rows in step["reasons"].items()
            ]
            drawn.append({**step, "drops": reasons, "share": 100 * step["kept"] / widest})
        sets.append(
            {"name": one.name, "kind": one.kind, "steps": drawn, "curated": one.curated, "planned": one.planned,
             "about": list(_about(folder, one.name))}
        )  # fmt: skip
    return sets


def _about(folder: RunFolder, name: str) -> Iterator[str]:
    """Which round of a loop made a set, by which models' answers, and what is to be expected of them."""
    path = folder.curated(name) / "manifest.json"
    manifest = read_json(path) if path.is_file() else {}
    if manifest.get("round"):
        yield f"Round {manifest['round']} of a loop."
    for one in manifest.get("models", ()):
        yield f"{one['maker']} asked {one['model']} ({one['digest']})."
    yield from dict.fromkeys(f"{one['caution']}." for one in manifest.get("models", ()) if one.get("caution"))


# --- scores ----------------------------------------------------------------------------------------------------------


def _histogram(con: Any, step: Mapping[str, Any]) -> Json | None:
    """Scores of all rows that reached a step, kept and dropped, in BINS bins, with the step's limits; None where the
    step has no scores. Logarithmic where the scores span much more than their median; the outer bins hold what lies
    beyond the middle 99.8 percent."""
    if not step["score"]:
        return None
    where = 'WHERE "set" = ? AND step = ? AND isfinite(score)'
    here = [step["set"], step["step"]]
    sql = f"SELECT count(*), min(score), quantile_cont(score, [0.001, 0.5, 0.999]) FROM verdicts {where}"
    rows, least, marks = con.execute(sql, here).fetchone()
    if not rows:
        return None
    low, middle, high = marks
    limits = [limit for limit in step["limits"] if limit is not None] or _cuts(con, step)
    high = max([high, *(limit for limit in limits if low < limit < 4 * high)])
    low = min([low, *(limit for limit in limits if limit < low and (limit > 0) == (least > 0) and limit > low / 4)])
    scale = "log" if least > 0 and high > 6 * middle else "linear"
    if high <= low:
        low, high = low - 0.5, high + 0.5
    ends = (math.log(low), math.log(high)) if scale == "log" else (low, high)
    value = "ln(score)" if scale == "log" else "score"
    share = f"floor(({value} - {ends[0]!r}) / {ends[1] - ends[0]!r} * {BINS})"
    sql = f"SELECT keep, least({BINS - 1}, greatest(0, {share}))::INT, count(*) FROM verdicts {where} GROUP BY ALL"
    counts = np.zeros((2, BINS), np.int64)
    for keep, at, n in con.execute(sql, here).fetchall():
        counts[int(keep), at] = n

    def place(x: float) -> float:
        share = ((math.log(x) if scale == "log" else x) - ends[0]) / (ends[1] - ends[0])
        return round(min(1.0, max(0.0, share)) * WIDTH, 2)

    tallest = counts.sum(0).max()
    bars = [
        {"x": round(i * WIDTH / BINS, 2), "kept": round(float(HEIGHT * counts[1, i] / tallest), 2),
         "dropped": round(float(HEIGHT * counts[0, i] / tallest), 2), "rows": int(counts[:, i].sum())}
        for i in range(BINS)
    ]  # fmt: skip
    return {
        **{name: step[name] for name in ("set", "step", "name", "score")},
        "rows": rows, "scale": scale, "bars": bars, "tallest": int(tallest),
        "limits": [{"x": place(limit), "value": limit} for limit in limits if ends[0] == low or limit > 0],
        "ticks": [{"x": place(tick), "value": tick} for tick in _ticks(low, high, scale)],
    }  # fmt: skip


def _cuts(con: Any, step: Mapping[str, Any]) -> list[float]:
    """The thresholds that a judge of ranks found in the corpus, as its evidence states them (`cut`)."""
    sql = (
        "SELECT DISTINCT try_cast(json_extract_string(evidence, '$.cut') AS DOUBLE) AS cut FROM verdicts"
        ' WHERE "set" = ? AND step = ? AND NOT keep AND isfinite(cut) ORDER BY cut LIMIT 4'
    )
    return [cut for (cut,) in con.execute(sql, [step["set"], step["step"]]).fetchall()]


def _ticks(low: float, high: float, scale: str = "linear", most: int = 5) -> list[float]:
    """Round numbers between low and high."""
    if scale == "log":
        span = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
        every = [10.0**power * lead for power in span for lead in ((1, 3) if len(span) < 4 else (1,))]
        return [tick for tick in every if low <= tick <= high]
    step = 10.0 ** math.floor(math.log10((high - low) / most))
    step *= next(lead for lead in (1, 2, 5, 10) if (high - low) / (step * lead) <= most)
    return [round(i * step, 12) for i in range(math.ceil(low / step), math.floor(high / step) + 1)]


# --- map and samples -------------------------------------------------------------------------------------------------


def _map(con: Any, set_name: str, colours: Mapping[str, int]) -> Json:
    """A seeded sample of the set's rows in the plane: TF-IDF of the prompts (of documents, the text), reduced by SVD,
    then the two directions of largest variance."""
    from ..curation.embeddings import tfidf_svd

    fate = (
        'SELECT row_id, arg_max(keep, step) AS keep, arg_max(reason, step) AS reason FROM verdicts WHERE "set" = ?'
        " GROUP BY row_id"
    )
    sql = (
        f"SELECT f.keep, f.reason, r.messages, r.chosen, r.rejected, r.text FROM ({fate}) f JOIN rows r USING (row_id)"
        f" ORDER BY md5('map' || row_id) LIMIT {MAP_ROWS}"
    )
    rows = records(con, sql, [set_name])
    texts = [prompt_of(row) or response_of(row) for row in rows]
    places = (
        _plane(tfidf_svd([text[:4000] for text in texts], MAP_DIMS, 0)) if len(rows) > 2 else np.zeros((len(rows), 2))
    )
    points = [
        {"x": round(12 + float(x) * (940 - 24), 1), "y": round(12 + (1 - float(y)) * (440 - 24), 1),
         "fate": "kept" if row["keep"] else f"r{colours.get(row['reason'], COLOURS)}",
         "title": f"{'kept' if row['keep'] else row['reason']}: {cut(' '.join(plain(text).split()), 110)}"}
        for row, text, (x, y) in zip(rows, texts, places, strict=True)
    ]  # fmt: skip
    shown = {row["reason"] for row in rows if not row["keep"]}
    legend = sorted((number, reason) for reason, number in colours.items() if reason in shown)
    return {"set": set_name, "points": points, "kept": sum(bool(row["keep"]) for row in rows), "legend": legend}


def _plane(vectors: np.ndarray) -> np.ndarray:
    """(n, 2) coordinates in 0..1, the outermost 0.5 percent at each end moved to the border: the two directions of
    largest variance, each with its largest weight positive."""
    centred = (vectors - vectors.mean(0)).astype(np.float64)
    _, _, directions = np.linalg.svd(centred.T @ centred)
    axes = directions[:2]
    axes *= np.sign(axes[np.arange(2), np.abs(axes).argmax(1)])[:, None]
    flat = centred @ axes.T
    low, high = np.quantile(flat, 0.005, axis=0), np.quantile(flat, 0.995, axis=0)
    return np.asarray(np.clip((flat - low) / np.maximum(high - low, 1e-9), 0, 1))


def _samples(con: Any, folder: RunFolder, found: Funnel, colours: Mapping[str, int]) -> list[Json]:
    """At most SAMPLES rows of each drop reason of each set, the commonest reasons first."""
    known = {(step["set"], step["step"]): step for step in steps(folder)}
    sql = (
        "SELECT v.*, r.* EXCLUDE (row_id) FROM verdicts v JOIN rows r USING (row_id) WHERE NOT keep"
        f' QUALIFY row_number() OVER (PARTITION BY "set", reason ORDER BY row_id) <= {SAMPLES} ORDER BY v.row_id'
    )
    rows = records(con, sql)
    groups = []
    for one in found.sets:
        counts: dict[str, int] = {}
        for step in one.steps:
            for reason, n in step["reasons"].items():
                counts[reason] = counts.get(reason, 0) + n
        for reason in sorted(counts, key=lambda reason: (reason == "held_out", -counts[reason], reason)):
            mine = [row for row in rows if (row["set"], row["reason"]) == (one.name, reason)]
            drawn = [_sample(con, known[row["set"], row["step"]], row) for row in mine]
            groups.append({"set": one.name, "reason": reason, "rows": counts[reason], "samples": drawn,
                           "colour": colours[reason]})  # fmt: skip
    return groups


def _sample(con: Any, step: Mapping[str, Any], row: Mapping[str, Any]) -> Json:
    verdict = verdict_of(con, step, row)
    return {
        "row_id": row["row_id"],
        "source": row["source"],
        "step": step["name"],
        "prompt": cut(plain(prompt_of(row)), TEXT),
        "response": cut(plain(response_of(row)), TEXT),
        "verdict": verdict.sentence(),
        "proof": [cut(plain(line), TEXT) for line in verdict.proof()],
    }


def _quarantine(con: Any) -> Json:
    sql = "SELECT source, step, error, count(*) AS rows FROM quarantine GROUP BY ALL"
    found = records(con, f"{sql} ORDER BY rows DESC, source, step, error LIMIT 20")
    groups = [{**one, "error": cut(plain(one["error"] or ""), 200)} for one in found]
    first = records(con, "SELECT * FROM quarantine ORDER BY source, file, line, row_id LIMIT 5")
    total = con.execute("SELECT count(*) FROM quarantine").fetchone()[0]
    return {
        "rows": total,
        "groups": groups,
        "first": [one | {"raw": cut(plain(one["raw"] or ""), 240)} for one in first],
    }


# --- training and files ----------------------------------------------------------------------------------------------


def _stage(folder: RunFolder, run: Mapping[str, Any]) -> Json:
    """One training stage: its curves, and what its plan and settings say."""
    path = folder.stage(run["stage"]) / "metrics.jsonl"
    text = path.read_text(encoding="utf-8") if path.is_file() else ""
    lines = [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]
    curves = [curve for name in CURVES if (curve := _curve(lines, name)) is not None]
    keys = ("rows", "tokens", "target_tokens", "packs", "fill", "steps", "epochs", "truncated", "not_reached")
    facts = [(name.replace("_", " "), run.get("plan", {}).get(name)) for name in keys]
    facts += [(f"left out: {reason}", rows) for reason, rows in run.get("plan", {}).get("excluded", {}).items()]
    facts += [
        (name.replace("_", " "), run.get(name)) for name in ("tokens_per_s", "seconds", "device", "dtype", "threads")
    ]
    settings = run.get("settings", {})
    lora = settings.get("lora")
    facts += [("learning rate", settings.get("learning_rate")), ("capacity", settings.get("capacity"))]
    facts.append(("weights", f"LoRA rank {lora['rank']} over {lora['base']}" if lora else "all" if settings else None))
    return {
        "name": run["stage"],
        "objective": run.get("objective", ""),
        "status": run.get("status", ""),
        "curves": curves,
        "facts": [(name, number(value)) for name, value in facts if value is not None],
    }


def _curve(lines: Sequence[Mapping[str, Any]], name: str) -> Json | None:
    """Points of one metric over the steps, as measured and smoothed (exponentially, over a twentieth of the run)."""
    pairs = [(line["step"], float(line[name])) for line in lines if math.isfinite(line.get(name, math.nan))]
    if len(pairs) < 2:
        return None
    values = np.asarray([value for _, value in pairs])
    smooth = values.copy()
    share = 1 / max(1.0, len(values) / 20)
    for i in range(1, len(smooth)):
        smooth[i] = smooth[i - 1] + share * (values[i] - smooth[i - 1])
    low, high = float(values.min()), float(values.max())
    if high - low < 1e-12:
        low, high = low - 0.5, high + 0.5
    first, last = pairs[0][0], pairs[-1][0]

    def line(ys: np.ndarray) -> str:
        return " ".join(
            f"{(step - first) / (last - first) * WIDTH:.1f},{HEIGHT * (1 - (y - low) / (high - low)):.1f}"
            for (step, _), y in zip(pairs, ys, strict=True)
        )

    ticks = [
        {"y": round(HEIGHT * (1 - (tick - low) / (high - low)), 1), "value": tick} for tick in _ticks(low, high, most=4)
    ]
    return {
        "name": name.replace("_", " "), "raw": line(values), "smooth": line(smooth), "ticks": ticks,
        "first": first, "last": last, "begin": float(smooth[0]), "end": float(smooth[-1]),
    }  # fmt: skip


def _evaluation(rows: Sequence[Mapping[str, Any]]) -> Json:
    """One line per set and metric, one column per model in the order they were measured; the best value marked, where
    one is better than another; why a number is missing."""
    models = list(dict.fromkeys(row["model"] for row in rows))
    lines = []
    for name, metric in dict.fromkeys((row["set"], row["metric"]) for row in rows):
        mine = {row["model"]: row for row in rows if (row["set"], row["metric"]) == (name, metric)}
        values = {model: row["value"] for model, row in mine.items() if row["value"] is not None}
        pick = min if "loss" in metric else max
        ranked = len(set(values.values())) > 1 and metric != "logp_undesirable"
        best = pick(values, key=lambda model: values[model]) if ranked else None
        notes = dict.fromkeys(row["note"] for row in mine.values() if row.get("note"))
        rows_of = sorted({row["rows"] for row in mine.values()})  # models of other capacities may score other rows
        lines.append({"set": name, "metric": metric, "values": values, "best": best, "note": "; ".join(notes),
                      "rows": " to ".join(f"{n:,}" for n in {rows_of[0]: 0, rows_of[-1]: 0})})  # fmt: skip
    return {"models": models, "lines": lines, "unmeasured": unmeasured_text(rows)}


def _files(folder: RunFolder) -> list[Json]:
    """What the run hands over: curated shards with their digests, adapters and models."""
    found = []
    for path in sorted(folder.root.glob("curated/[!.]*/manifest.json")):
        manifest = read_json(path)
        home = path.parent.relative_to(folder.root)
        counts = ", ".join(f"{name} {rows:,}" for name, rows in split_rows(manifest).items())
        found.append({"path": f"{home}/manifest.json", "what": f"{manifest['kind']}: {counts}", "sha256": ""})
        found += [
            {"path": f"{home}/{file['path']}", "what": f"{file['rows']:,} rows, {file['bytes']:,} bytes",
             "sha256": file["sha256"][:16]}
            for file in manifest["files"]
        ]  # fmt: skip
    for run in stages(folder):
        if run.get("result"):
            what = f"{run['objective']} {run['result']} on {Path(str(run.get('model', ''))).name}"
            digest = str(run.get("result_digest", ""))[:16]
            found.append({"path": f"{run['stage']}/{run['result']}/", "what": what, "sha256": digest})
    return found
