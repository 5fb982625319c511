"""A small but whole run folder, written by the on-disk contract alone (docs/architecture.md), and the full log of its
verdicts as an oracle. Load it by path: `write_run = runpy.run_path(...)["write_run"]`."""

import json
import math
import random
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from gristmill.curation.cards import card
from gristmill.curation.folder import RunFolder, write_json, write_parquet
from gristmill.curation.ledger import LEDGER
from gristmill.curation.rows import content_id, made_row, message, source_row_id, table
from gristmill.curation.shards import write_curated

EVIL = '<script>alert("x")</script><img src="http://evil.example/x.png" onerror=alert(1)></style></textarea>'
TOPICS = {
    "bread": ["knead the dough", "feed a sourdough starter", "bake a rye loaf", "proof the dough overnight"],
    "python": ["sort a list", "read a csv file", "open a socket", "profile a loop", "merge two dictionaries"],
    "stars": ["how far is Sirius", "why stars twinkle", "how a nova forms", "what a parsec is"],
    "rivers": ["name the longest river", "how deltas form", "why rivers meander", "what a weir is for"],
    "sums": ["add 17 and 25", "halve 342", "find 12 percent of 80", "solve 3x = 21"],
}
ASKS = [
    "Explain how to {}.",
    "In one sentence, {}.",
    "{}, step by step.",
    "I am new to this: {}?",
    "Please {} briefly.",
]
FILLER = "first then because therefore water stone light slowly number each other part whole small large".split()  # noqa: SIM905
LENGTH, PERPLEXITY = "Length-0123456789ab", "ResponsePerplexity-ba9876543210"

Fate = tuple[bool, str | None, float | None, dict[str, Any] | None]


@dataclass
class Fake:
    folder: RunFolder
    rows: list[dict[str, Any]] = field(default_factory=list)
    log: dict[tuple[str, int], dict[str, Fate]] = field(default_factory=dict)  # every verdict, plain keeps included
    by_name: dict[str, str] = field(default_factory=dict)  # rows that a test asks for
    words: dict[str, int] = field(default_factory=dict)  # by content_id
    perplexity: dict[str, float] = field(default_factory=dict)


def write_run(root: Path, size: int = 240) -> Fake:
    """A finished run: sets sft (with a maker and an override) and dpo, two training stages, an evaluation."""
    fake = Fake(RunFolder(root))
    rng = random.Random(0)
    alpaca = _source(fake, "alpaca", "CC-BY-NC-4.0", [_chat(rng, i) for i in range(size)], quarantined=3)
    notes = _source(fake, "notes", "MIT", [_chat(rng, i) for i in range(size // 3)], quarantined=0)
    pairs = _source(fake, "pairs", "MIT", [_pair(rng, i) for i in range(size // 4)], quarantined=1)
    made = _sift_sft(fake, [*alpaca, *notes])
    _sift_dpo(fake, pairs)
    _measures(fake)
    for stage, objective, name in (("sft", "sft", "sft"), ("dpo", "dpo", "dpo")):
        _stage(fake, stage, objective, name)
    _evaluation(fake)
    fake.by_name["made"] = made[0]["row_id"]
    (root / "recipe.yaml").write_text("name: fake\nseed: 7\nsets: {sft: {}, dpo: {}}\n", encoding="utf-8")
    return fake


def _answer(rng: random.Random, words: int) -> str:
    return " ".join(rng.choice(FILLER) for _ in range(words)).capitalize() + "."


def _ask(rng: random.Random, index: int) -> str:
    topic = rng.choice(list(TOPICS))
    return f"{rng.choice(ASKS).format(rng.choice(TOPICS[topic]))} ({topic} {index})"


def _chat(rng: random.Random, index: int) -> dict[str, Any]:
    words = max(1, int(rng.lognormvariate(3.2, 0.9)))
    answer = f"{EVIL} {_answer(rng, 3)}" if index % 40 == 7 else _answer(rng, words)
    return {"messages": [message("user", _ask(rng, index)), message("assistant", answer)]}


def _pair(rng: random.Random, index: int) -> dict[str, Any]:
    return {
        "messages": [message("user", _ask(rng, index))],
        "chosen": [message("assistant", _answer(rng, 20))],
        "rejected": [message("assistant", _answer(rng, 6))],
    }


def _source(
    fake: Fake, name: str, licence: str, contents: list[dict[str, Any]], quarantined: int
) -> list[dict[str, Any]]:
    rows = []
    for position, content in enumerate(contents):
        row = {"source": name, "position": position, "row_id": source_row_id(name, str(position)), **content}
        rows.append(row | {"content_id": content_id(row), "meta": json.dumps({"line": position})})
    half = len(rows) // 2
    parts = []
    for index, piece in enumerate((rows[:half], rows[half:])):
        parts.append(f"{name}-{index:05d}.parquet")
        write_parquet(fake.folder.rows / parts[-1], table(piece))
    if quarantined:
        bad = [
            {"source": name, "file": f"/data/{name}.jsonl", "line": 11 * (i + 1), "error": "not JSON: Expecting value",
             "raw": '{"instruction": ' + EVIL}
            for i in range(quarantined)
        ]  # fmt: skip
        write_parquet(fake.folder.quarantine / f"{name}.parquet", pa.Table.from_pylist(bad))
    write_json(
        fake.folder.rows / f"{name}.json",
        {"name": name, "path": f"/data/{name}.jsonl", "shape": "alpaca", "licence": licence, "digest": f"{name}0" * 4,
         "rows": len(rows), "quarantined": quarantined, "read": len(rows) + quarantined, "parts": parts},
    )  # fmt: skip
    fake.rows += rows
    _value(fake, rows)
    return [table(rows).to_pylist()[i] for i in range(len(rows))]


def _value(fake: Fake, rows: list[dict[str, Any]]) -> None:
    rng = random.Random(len(fake.rows))
    for row in rows:
        said = (row.get("chosen") or row["messages"])[-1]["content"]
        fake.words[row["content_id"]] = len(said.split())
        fake.perplexity[row["content_id"]] = round(math.exp(rng.gauss(4.0, 0.8)), 3)


def _step(
    fake: Fake, name: str, judge: str, number: int, alive: list[dict[str, Any]], fates: dict[str, Fate], **more: Any
) -> list[dict[str, Any]]:
    """Writes one finished step: `fates` of the rows that came or were made, plain keeps left out on disk."""
    made: list[dict[str, Any]] = more.pop("made", [])
    back: list[dict[str, Any]] = more.pop("back", [])
    here = [*alive, *made, *back]
    log = {row["row_id"]: fates.get(row["row_id"], (True, None, None, None)) for row in here}
    fake.log[name, number] = log
    stored = [
        {"row_id": i, "keep": k, "reason": r, "score": s, "evidence": None if e is None else json.dumps(e)}
        for i, (k, r, s, e) in log.items()
        if not k or r is not None or e is not None
    ]
    home = fake.folder.ledger / name / f"{number:02d}-{judge.split('(')[0]}"
    write_parquet(home / "verdicts.parquet", pa.Table.from_pylist(stored, schema=LEDGER))
    parts = []
    if made:
        parts = [f"made-{name}-{number:02d}-00000.parquet"]
        write_parquet(fake.folder.rows / parts[0], table(made))
    dropped = Counter(r for k, r, _, _ in log.values() if not k)
    kept = [row for row in here if log[row["row_id"]][0]]
    record = {"set": name, "step": number, "name": judge.split("(")[0], "judge": judge, "scope": "row",
              "came": len(alive), "made": len(made) + len(back), "kept": len(kept), "dropped": dropped.total(),
              "reasons": dict(dropped.most_common()), "score": None, "limits": [None, None], "measures": [],
              "made_parts": parts, "seconds": round(0.11 * (number + 1), 3)}  # fmt: skip
    np.save(home / "alive.npy", np.packbits(np.ones(8, np.bool_)))
    write_json(home / "step.json", record | more)
    return kept


def _scored(fake: Fake, rows: list[dict[str, Any]], values: dict[str, Any], low: float, high: float, tag: str) -> Any:
    fates: dict[str, Fate] = {}
    for row in rows:
        score = float(values[row["content_id"]])
        reason = f"{tag}_low" if score < low else f"{tag}_high" if score > high else None
        fates[row["row_id"]] = (reason is None, reason, score, None)
    return fates


def _sift_sft(fake: Fake, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    folder, name = fake.folder, "sft"
    alive = _step(fake, name, "HeldOut(share=0.1, kind='sft')", 0, rows,
                  {r["row_id"]: (False, "held_out", None, None) for r in rows[::10]})  # fmt: skip
    fake.by_name["held_out"] = rows[0]["row_id"]
    twin, first = alive[4]["row_id"], alive[1]["row_id"]
    fake.by_name |= {"duplicate": twin, "original": first}
    near = {r["row_id"]: (False, "near_duplicate", 0.81, {"duplicate_of": alive[1]["row_id"], "similarity": 0.81})
            for r in alive[4::13]}  # fmt: skip
    alive = _step(fake, name, "NearDuplicates(threshold=0.75, ngram=5)", 1, alive, near, scope="corpus",
                  limits=[None, 0.75])  # fmt: skip
    leak = {"ngram": "natalia sold clips to 48 of her friends", "benchmark": "gsm8k_test", "item": 0}
    fake.by_name["contaminated"] = alive[2]["row_id"]
    alive = _step(fake, name, "Decontaminate(ngram=8)", 2, alive,
                  {r["row_id"]: (False, "contaminated", None, leak) for r in alive[2::31]}, scope="corpus")  # fmt: skip
    fates = _scored(fake, alive, fake.words, 4, 90, "length")
    fake.by_name["short"] = next(i for i, f in fates.items() if f[1] == "length_low")
    alive = _step(fake, name, "ResponseLength(low=4, high=90)", 3, alive, fates, score="response_words",
                  limits=[4, 90], measures=[LENGTH])  # fmt: skip
    made = [_rewrite(row, i) for i, row in enumerate(alive[5:60:9])]
    old = {row["parents"][0]: (False, "rewritten", None, None) for row in made}
    fake.by_name["rewritten"] = made[0]["parents"][0]
    fake.rows += made
    _value(fake, made)
    born: dict[str, Fate] = {made[-1]["row_id"]: (False, "held_out", None, None)}
    asked = {"asked": 12, "answered": 10, "failed": {"timeout": 2}, "parsed": 9, "unparsed": {"empty": 1},
             "verified": 8, "refused": {"wrong": 1, "same": 1}, "made": len(made), "cached": 4,
             "prompt_tokens": 900, "tokens": 300, "cost": 0.06, "model": "small", "licence": "MIT"}  # fmt: skip
    alive = _step(fake, name, "Rewrite(model='small')", 4, alive, old | born, scope="maker", made=made, synthesis=asked)
    fates = _scored(fake, alive, fake.perplexity, 6, 190, "perplexity")
    broken = alive[3]["row_id"]
    fates[broken] = (False, "judge_error", None, {"error": "ValueError: no tokens"})
    fake.by_name |= {"judge_error": broken, "too_high": next(i for i, f in fates.items() if f[1] == "perplexity_high")}
    alive = _step(fake, name, "PerplexityRange(model='small', low=6, high=190)", 5, alive, fates, score="perplexity",
                  limits=[6, 190], measures=[PERPLEXITY])  # fmt: skip
    trace = f"Traceback (most recent call last):\n  {EVIL}\nValueError: no tokens"
    write_parquet(folder.quarantine / "sft-05-PerplexityRange.parquet", pa.Table.from_pylist([
        {"row_id": broken, "step": "PerplexityRange(model='small', low=6, high=190)", "error": "ValueError: no tokens",
         "raw": trace, "source": None, "file": None, "line": None}], schema=pa.schema(
        [("source", pa.string()), ("file", pa.string()), ("line", pa.int64()), ("error", pa.string()),
         ("raw", pa.string()), ("row_id", pa.string()), ("step", pa.string())])))  # fmt: skip
    back = [row for row in fake.rows if row["row_id"] == fake.by_name["short"]]
    saved = {
        fake.by_name["short"]: (True, "override_keep", None, {"who": "ada", "why": "short but right", "action": "keep"})
    }
    fake.by_name["kept"] = alive[-1]["row_id"]
    alive = _step(fake, name, "Overrides()", 6, alive, saved, scope="overrides", back=back)
    _finish(fake, name, "sft", ["alpaca", "notes"], alive)
    return made


def _rewrite(row: dict[str, Any], position: int) -> dict[str, Any]:
    turns = [row["messages"][0], message("assistant", "Better said: " + row["messages"][1]["content"][:60])]
    origin = {"maker": "Rewrite", "model": "small", "model_digest": "d" * 32, "licence": "MIT", "prompt": "rewrite",
              "prompt_digest": "e" * 32, "sampling": {"temperature": 0.8, "max_tokens": 64}, "seed": 7,
              "finished": True, "tokens": 30}  # fmt: skip
    meta = json.dumps({"made": origin})
    return made_row("Rewrite(model='small')", [row["row_id"]], position, row["source"], messages=turns, meta=meta)


def _sift_dpo(fake: Fake, rows: list[dict[str, Any]]) -> None:
    alive = _step(fake, "dpo", "HeldOut(share=0.1, kind='preference')", 0, rows,
                  {r["row_id"]: (False, "held_out", None, None) for r in rows[::8]})  # fmt: skip
    ranks = {r["row_id"]: (i < 40, None if i < 40 else "over_budget", None, {"rank": i + 1, "quota": 40})
             for i, r in enumerate(alive)}  # fmt: skip
    alive = _step(fake, "dpo", "KMeansQuality(budget=40)", 1, alive, ranks, scope="corpus")
    alive = _step(fake, "dpo", "Overrides()", 2, alive, {}, scope="overrides")
    _finish(fake, "dpo", "preference", ["pairs"], alive)


def _finish(fake: Fake, name: str, kind: str, names: list[str], alive: list[dict[str, Any]]) -> None:
    folder = fake.folder
    records = [json.loads(p.read_text()) for p in sorted((folder.ledger / name).glob("*/step.json"))]
    steps = [{k: r[k] for k in ("step", "judge", "name", "scope")} for r in records]
    write_json(folder.ledger / name / "set.json", {"set": name, "kind": kind, "sources": names, "steps": steps})
    out = {i for (s, _), log in fake.log.items() if s == name for i, f in log.items() if f[1] == "held_out"}
    held = [row for row in fake.rows if row["row_id"] in out]
    sources = [json.loads((folder.rows / f"{n}.json").read_text()) for n in names]
    funnel = ("set", "step", "judge", "came", "made", "kept", "dropped", "reasons")
    manifest = {
        "name": f"fake-{name}", "version": "1", "created": "2026-01-05T02:00:00Z", "recipe": "name: fake\n",
        "recipe_digest": "f" * 64, "seed": 7, "gristmill": "0.1.0", "previous": None, "ledger_digest": "e" * 64,
        "sources": [{k: s[k] for k in ("name", "licence", "rows", "digest")} for s in sources],
        "funnel": [{k: r[k] for k in funnel} for r in records],
    }  # fmt: skip
    splits = {"train": [table(alive)], "test": [table(held)]}
    write_curated(folder.curated(name), kind, splits, manifest, lambda whole: {"README.md": card(whole)})


def _measures(fake: Fake) -> None:
    words = pa.table(
        {"content_id": list(fake.words), "response_words": pa.array(list(fake.words.values()), pa.int32())}
    )
    home = fake.folder.measures
    write_parquet(home / LENGTH / "a.parquet", words.slice(0, 100))
    write_parquet(home / LENGTH / "b.parquet", words.slice(100))
    write_json(
        home / LENGTH / "measure.json", {"name": "Length", "repr": "Length()", "columns": {"response_words": "int32"}}
    )
    values = pa.table({"content_id": list(fake.perplexity), "perplexity": list(fake.perplexity.values())})
    write_parquet(home / PERPLEXITY / "a.parquet", values)
    name, columns = "ResponsePerplexity", {"perplexity": "double"}
    write_json(home / PERPLEXITY / "measure.json", {"name": name, "repr": f"{name}('small')", "columns": columns})


def _stage(fake: Fake, stage: str, objective: str, set_name: str) -> None:
    home = fake.folder.stage(stage)
    files = sorted((fake.folder.curated(set_name) / "data").glob("train-*.parquet"))
    ids = [i for file in files for i in pq.read_table(file)["row_id"].to_pylist()]
    steps = 40
    rng = random.Random(len(stage) + len(ids))
    home.mkdir()
    with (home / "metrics.jsonl").open("w", encoding="utf-8") as lines:
        for step in range(steps):
            value: dict[str, float] = {
                "step": step + 1,
                "tokens_per_s": 3100.0 + step,
                "learning_rate": 2e-4 * (1 - step / steps),
            }
            if objective == "sft":
                value["loss"] = 2.1 + 5.8 * math.exp(-step / 9) + rng.gauss(0, 0.08)
            else:
                value |= {"margin": 0.02 * step + rng.gauss(0, 0.05), "accuracy": min(1.0, 0.5 + 0.012 * step)}
                value["loss"] = math.log(1 + math.exp(-value["margin"]))
            lines.write(json.dumps(value) + "\n")
    losses = {
        "row_id": ids,
        "loss": [round(2 + rng.random(), 4) for _ in ids],
        "tokens": [20 + i % 9 for i in range(len(ids))],
    }
    write_parquet(home / "row_losses" / "train.parquet", pa.table(losses))
    seen = {"step": pa.array([1 + i * steps // len(ids) for i in range(len(ids))], pa.int32()), "row_id": ids}
    write_parquet(home / "steps.parquet", pa.table(seen))
    left_out = {"row_id": [ids[0]], "reason": ["too_long"], "tokens": [4000]}
    write_parquet(home / "excluded.parquet", pa.table(left_out))
    write_json(home / "run.json", {
        "objective": objective, "status": "complete", "loss": 2.14,
        "tokens_per_s": 3122.0, "seconds": 61.5, "result": "adapter", "device": "cpu", "dtype": "fp32", "threads": 2,
        "settings": {"learning_rate": 2e-4, "capacity": 1024, "lora": {"rank": 16, "base": "nf4"}},
        "plan": {"rows": len(ids) - 1, "units": len(ids) - 1, "tokens": 30211, "target_tokens": 20100, "longest": 400,
                 "packs": 31, "fill": 0.951, "steps": steps, "epochs": 1, "excluded": {"too_long": 1},
                 "truncated": 0}})  # fmt: skip


def _evaluation(fake: Fake) -> None:
    rows = [
        {"model": model, "set": name, "metric": metric, "value": value, "rows": n}
        for model, name, metric, value, n in (
            ("small", "sft", "loss", 7.91, 33), ("sft", "sft", "loss", 2.31, 33),
            ("dpo", "sft", "loss", 2.36, 33), ("sft", "dpo", "accuracy", 0.5, 8),
            ("dpo", "dpo", "accuracy", 0.875, 8), ("sft", "dpo", "margin", 0.0, 8),
            ("dpo", "dpo", "margin", 0.41, 8),
        )
    ]  # fmt: skip
    write_json(fake.folder.root / "evaluation.json", {"rows": rows})
