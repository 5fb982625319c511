"""QLoRA training end to end: our trainer beside TRL + PEFT + bitsandbytes and a bare torch loop with PEFT.

    python benchmarks/qlora.py [--objective sft dpo] [--contenders ours bare trl trl-packed] [--shape 110m]
                               [--rows 160] [--capacity 1024] [--packs-per-step 2] [--threads 0] [--json PATH]
    python benchmarks/qlora.py --device cuda --shape llama8b [--json PATH]      (qlora_cuda.py; also llama70b)

On a CPU: a Qwen3 of random weights, a tokenizer made on the spot, and the same rows of GRISTMILL_DATA (default:
../shared/data) for all: dolly_sample2000 for SFT, ultrafeedback_sample1000 for DPO, those that fit `--capacity` tokens
whole. Rank 16 on all linear layers over NF4 with double quantisation, AdamW, fp32 (bf16 where the CPU has it natively
is for all contenders alike: --dtype). Each contender runs in a process of its own: that process's peak of resident
memory. Tokens are real ones of the rows, prompts of pairs counted with each answer, for all contenders alike; seconds
are those of the optimizer steps after the first `--warm`; ours in DPO also those of the reference pass.

trl: SFTTrainer and DPOTrainer with their defaults (batches of 8 padded, activation checkpointing on). trl-packed: its
best: packing (bfd) to `--capacity`, no checkpointing; for DPO, which it cannot pack, no checkpointing. bare: batches of
8 rows padded to the longest, no checkpointing, transformers' own loss. share: of the rate of matrix products measured
in our process, by the FLOP of tuning/roofline.py.
"""

import argparse
import json
import os
import platform
import resource
import subprocess
import sys
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from machine import installed, processor

os.environ.setdefault("HF_HUB_OFFLINE", "1")

SHAPES = {  # of Qwen3: hidden, layers, heads, key heads, intermediate, vocabulary
    "tiny": (64, 2, 4, 2, 160, 1024),
    "30m": (384, 8, 6, 2, 1024, 16000),
    "110m": (768, 12, 12, 4, 2048, 32000),
}
CONTENDERS = ("ours", "bare", "trl", "trl-packed")
TARGETS = {"sft": {"trl": 4.0, "bare": 1.8}, "dpo": {"trl": 3.0}, "memory": 0.7, "share": 0.35}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--objective", nargs="+", choices=("sft", "dpo"), default=["sft", "dpo"])
    parser.add_argument("--contenders", nargs="+", default=list(CONTENDERS))
    parser.add_argument("--shape", default="110m", help=f"{', '.join(SHAPES)}; on cuda: llama8b, llama70b, tiny")
    parser.add_argument("--rows", type=int, default=160)
    parser.add_argument("--capacity", type=int, default=1024)
    parser.add_argument("--packs-per-step", type=int, default=2)
    parser.add_argument("--batch", type=int, default=8, help="rows of a batch of the others")
    parser.add_argument("--warm", type=int, default=2, help="optimizer steps that are not counted")
    parser.add_argument("--steps", type=int, default=10, help="cuda: optimizer steps that are counted")
    parser.add_argument("--tokens", type=int, default=16384, help="cuda: tokens of a micro-batch")
    parser.add_argument("--dtype", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--json", type=Path, help="write the result here")
    parser.add_argument("--worker", nargs=3, metavar=("NAME", "OBJECTIVE", "FOLDER"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker is not None:
        print("RESULT " + json.dumps(work(*options.worker, options)), flush=True)
        return
    result = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": " ".join(["python", *sys.argv]),
        "hardware": hardware(options.device),
        "versions": installed("torch", "transformers", "trl", "peft", "bitsandbytes"),
        **(on_cuda(options) if options.device == "cuda" else on_cpu(options)),
    }
    show(result)
    if options.json:
        options.json.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


def on_cpu(options: argparse.Namespace) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        counts = prepare(folder, options)
        runs = [started(who, what, folder) for what in options.objective for who in options.contenders]
    for run in runs:
        mine = [one for one in runs if one["contender"] == "ours" and one["objective"] == run["objective"]]
        if run["contender"] != "ours" and "tokens_per_s" in run and mine and "share" in mine[0]:
            part = mine[0]["share"]["share"] * run["tokens_per_s"] / mine[0]["tokens_per_s_without_reference"]
            run["share"] = {"of": mine[0]["share"]["of"], "share": round(part, 3)}
    return {"shape": options.shape, "rows": counts, "runs": runs, "targets": TARGETS}


def on_cuda(options: argparse.Namespace) -> dict[str, Any]:
    from qlora_cuda import contenders

    names = contenders(options.shape)
    return {"shape": options.shape, "runs": [started(who, "sft", Path(options.shape)) for who in names]}


def started(who: str, objective: str, folder: Path) -> dict[str, Any]:
    """One contender in its own process."""
    command = [sys.executable, *sys.argv, "--worker", who, objective, str(folder)]
    found = subprocess.run(command, capture_output=True, text=True)
    lines = [line for line in found.stdout.splitlines() if line.startswith("RESULT ")]
    said: dict[str, Any] = {"contender": who, "objective": objective}
    if found.returncode or not lines:
        return said | {"failed": (found.stderr.strip().splitlines() or ["nothing said"])[-1][:300]}
    return said | json.loads(lines[-1].removeprefix("RESULT "))


def work(who: str, objective: str, folder: str, options: argparse.Namespace) -> dict[str, Any]:
    if options.device == "cuda":
        import qlora_cuda

        measured: dict[str, Any] = qlora_cuda.work(who, options)
        return measured
    import torch

    if options.threads:
        torch.set_num_threads(options.threads)
    if who == "ours":
        measured = ours(objective, Path(folder), options)
    else:
        import qlora_peers

        measured = qlora_peers.work(who, objective, Path(folder), options)
    used = resource.getrusage(resource.RUSAGE_SELF)
    return measured | {"peak_mb": peak_mb(), "processor_s": round(used.ru_utime + used.ru_stime, 1)}


def peak_mb() -> int:
    """Of this process alone: getrusage's maximum would hold that of the process that started it."""
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return round(int(line.split()[1]) / 1024)


def prepare(folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """model/, and for each objective a curated set and OBJECTIVE.json with the same rows for the others."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from gristmill.curation.rows import table
    from gristmill.curation.shards import write_curated
    from gristmill.tuning.data import read_rows, read_units
    from gristmill.tuning.models import train_tokenizer

    data = Path(os.environ.get("GRISTMILL_DATA", Path(__file__).parents[1] / "../shared/data")).resolve()
    if not data.is_dir():
        sys.exit(f"no real data at {data}: set GRISTMILL_DATA")
    rows = {"sft": supervised(data), "dpo": pairs(data)}
    hidden, layers, heads, key_heads, intermediate, vocabulary = SHAPES[options.shape]
    texts = [message["content"] for row in rows["sft"] for message in row["messages"]]
    tokenizer = train_tokenizer(texts, vocabulary, 2 * options.capacity)
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        "qwen3",
        hidden_size=hidden, num_hidden_layers=layers, num_attention_heads=heads, num_key_value_heads=key_heads,
        head_dim=hidden // heads, intermediate_size=intermediate, vocab_size=vocabulary, tie_word_embeddings=True,
        max_position_embeddings=2 * options.capacity, pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id, bos_token_id=None,
    )  # fmt: skip
    AutoModelForCausalLM.from_config(config).save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    counts = {}
    for objective in options.objective:
        kind = "sft" if objective == "sft" else "preference"
        write_curated(folder / "all" / kind, kind, {"train": [table(rows[objective])]}, {}, lambda manifest: {})
        found = read_rows(objective, folder / "all" / kind)
        units = read_units(objective, tokenizer, found, options.capacity, "drop", None, shared=False)
        whole = {unit: index for index, unit in enumerate(units.row_ids)}
        kept = [row for row in rows[objective] if row["row_id"] in whole][: options.rows]
        write_curated(folder / objective, kind, {"train": [table(kept)]}, {}, lambda manifest: {})
        peers = []
        for row in kept:
            first, end = units.first[whole[row["row_id"]]], units.first[whole[row["row_id"]] + 1]
            peers.append(for_peers(row, units.documents[first:end]))
        (folder / f"{objective}.json").write_text(json.dumps(peers), encoding="utf-8")
        counts[objective] = {"rows": len(peers), "tokens": sum(row["tokens"] for row in peers)}
    return counts


def for_peers(row: dict[str, Any], documents: list[Any]) -> dict[str, Any]:
    """The very tokens and targets that we train on; for pairs the texts, for TRL tokenizes those itself."""
    found: dict[str, Any] = {
        "tokens": sum(len(document.ids) for document in documents),
        "targets": sum(int((document.weights > 0).sum()) for document in documents),
        "ids": [document.ids.tolist() for document in documents],
        "labels": [
            [int(token) if weight else -100 for token, weight in zip(document.ids, document.weights, strict=True)]
            for document in documents
        ],
    }
    if row.get("chosen"):
        found |= {"prompt": plain(row["messages"]), "chosen": plain(row["chosen"]), "rejected": plain(row["rejected"])}
    return found


def plain(messages: list[dict[str, Any]]) -> list[dict[str, str]]:
    return [{"role": message["role"], "content": message["content"]} for message in messages]


def supervised(data: Path) -> list[dict[str, Any]]:
    import pyarrow.parquet as pq

    from gristmill.curation.rows import made_row, message

    rows = []
    for place, row in enumerate(pq.read_table(data / "dolly_sample2000.parquet").to_pylist()):
        prompt = "\n\n".join(text for text in (row["instruction"], row["input"]) if text)
        if prompt.strip() and row["output"].strip():
            said = [message("user", prompt), message("assistant", row["output"])]
            rows.append(made_row("benchmark", [], place, "dolly", messages=said))
    return distinct(rows)


def pairs(data: Path) -> list[dict[str, Any]]:
    import ast

    import pyarrow.parquet as pq

    from gristmill.curation.rows import made_row, message

    rows = []
    for place, row in enumerate(pq.read_table(data / "ultrafeedback_sample1000.parquet").to_pylist()):
        sides = [ast.literal_eval(v) if isinstance(v, str) else v for v in (row["chosen"], row["rejected"])]
        *prompt, chosen = [message(turn["role"], turn["content"]) for turn in sides[0]]
        rejected = message(sides[1][-1]["role"], sides[1][-1]["content"])
        if chosen["content"] != rejected["content"] and chosen["content"].strip() and rejected["content"].strip():
            rows.append(
                made_row("benchmark", [], place, "ultrafeedback", messages=prompt, chosen=[chosen], rejected=[rejected])
            )
    return distinct(rows)


def distinct(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return list({row["row_id"]: row for row in rows}.values())


def ours(objective: str, folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """By `train`, from its metrics.jsonl."""
    from gristmill.tuning.loop import train
    from gristmill.tuning.settings import Lora, Training

    settings = Training(
        capacity=options.capacity, packs_per_step=options.packs_per_step, lora=Lora(rank=16), dtype=options.dtype,
        threads=options.threads, checkpoint_every=10**6,
    )  # fmt: skip
    seen: dict[str, float] = {}

    def note(event: dict[str, Any]) -> None:
        seen.setdefault(event["event"], time.perf_counter())
        seen[f"last {event['event']}"] = time.perf_counter()

    run = train(objective, folder / objective, folder / "model", folder / f"out-{objective}", settings, progress=note)  # type: ignore[arg-type]
    lines = [json.loads(line) for line in (folder / f"out-{objective}" / "metrics.jsonl").read_text().splitlines()]
    rows = json.loads((folder / f"{objective}.json").read_text())
    counted = lines[min(options.warm, len(lines) - 1) :]
    part = sum(line["tokens"] for line in counted) / sum(line["tokens"] for line in lines)
    seconds = sum(line["seconds"] for line in counted)
    reference = seen.get("last reference", seen["plan"]) - seen["plan"]  # over all rows, once
    tokens = part * sum(row["tokens"] for row in rows)
    return {
        "tokens_per_s": round(tokens / (seconds + part * reference), 1),
        "tokens_per_s_without_reference": round(tokens / seconds, 1),
        "tokens": round(tokens), "seconds": round(seconds, 2), "reference_seconds": round(reference, 2),
        "steps": len(lines), "loss": lines[-1]["loss"], "share": share(tokens / seconds, rows, folder, options),
        "stated_share": run.get("roofline_share"),
    }  # fmt: skip


def share(rate: float, rows: list[dict[str, Any]], folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Of the machine's rate of matrix products, by the FLOP that the rows need unshared."""
    import torch
    from transformers import AutoConfig

    from gristmill.tuning.roofline import decoder_shape, flop, load_of, machine_peak

    shape = decoder_shape(AutoConfig.from_pretrained(folder / "model"))
    load = load_of([len(ids) for row in rows for ids in row["ids"]], sum(row["targets"] for row in rows))
    need = flop(shape, load, adapters=shape.adapters(16)).per_token
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[options.dtype]
    peak = machine_peak(shape, device="cpu", dtype=dtype, tokens=options.capacity)
    return {"of": peak.source, "gflop_s": round(peak.rate / 1e9, 1), "share": round(rate * need / peak.rate, 3)}


def hardware(device: str) -> dict[str, Any]:
    if device == "cuda":
        import torch

        return {"gpu": torch.cuda.get_device_name(), "cuda": torch.version.cuda}
    return {"cpu": processor(), "cores": os.cpu_count(), "machine": platform.machine()}


def show(result: dict[str, Any]) -> None:
    runs = result["runs"]
    print(f"{'objective':<10}{'contender':<28}{'tokens/s':>10}{'peak MB':>10}{'ours/it':>9}  share")
    for run in runs:
        if "failed" in run:
            print(f"{run['objective']:<10}{run['contender']:<28}failed: {run['failed']}")
            continue
        mine = [one for one in runs if one["contender"].startswith("ours") and one["objective"] == run["objective"]]
        ratio = f"{mine[0]['tokens_per_s'] / run['tokens_per_s']:.2f}" if mine and "failed" not in mine[0] else "-"
        part = run.get("share") or {}
        print(
            f"{run['objective']:<10}{run['contender']:<28}{run['tokens_per_s']:>10.1f}{run['peak_mb']:>10}{ratio:>9}  "
            f"{part.get('share', '')}"
        )


if __name__ == "__main__":
    main()
