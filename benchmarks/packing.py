"""Packing: the plan of a million rows beside TRL's, and pairs that share their prompt beside pairs that do not.

    python benchmarks/packing.py [--rows 1000000] [--pairs 1000] [--capacity 4096] [--device cuda] [--json PATH]

The plan. Lengths are log-normal, and those of real instruction rows drawn again and again. Ours is `pack_plan`: which
row goes into which pack. TRL's is `pack_dataset` (bfd) on rows of one column of token ids in memory, which also moves
the ids (ours does that pack by pack while it trains); it plans each thousand rows on their own.

Shared prompts. Pairs of ultrafeedback_sample1000 and hh_rlhf_harmless_test of GRISTMILL_DATA (default: ../shared/data
beside the repository) under a byte-level BPE trained on them. tokens: unshared over shared; bound: the same where only
prompts are shared, 2(p + r) / (p + 2r) summed over pairs of p prompt and r mean answer tokens (arXiv 2410.20305). Where
answers begin alike the ratio passes the bound. step: seconds of forward and backward of DPO's loss over packs of the
same pairs, unshared over shared, by a Qwen3-shaped model of random weights; of the bound: step over it.
"""

import argparse
import json
import os
import re
import statistics
import sys
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from machine import installed, processor
from numpy.typing import NDArray
from torch.nn.functional import logsigmoid
from transformers import AutoConfig, AutoModelForCausalLM

from gristmill.curation.rows import MESSAGES, message
from gristmill.tuning.attention import isolate
from gristmill.tuning.chat import tokenise_rows
from gristmill.tuning.data import read_units
from gristmill.tuning.forward import answer_logps
from gristmill.tuning.models import train_tokenizer
from gristmill.tuning.packing import pack_plan
from gristmill.tuning.units import Units

PAIRS = ("ultrafeedback_sample1000", "hh_rlhf_harmless_test")
ROWS = ("alpaca_raw_random5000", "dolly_sample2000", "codealpaca_2k")
COLUMNS = (("instruction", "prompt"), ("input", "context"), ("output", "response", "completion"))
SHAPES = {  # hidden, layers, heads, key heads, head size, feed-forward, vocabulary
    "tiny": (64, 2, 4, 2, 16, 192, 4096),
    "110M": (640, 14, 10, 5, 64, 1920, 32768),
    "8B": (4096, 32, 32, 8, 128, 14336, 128256),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1_000_000, help="of the plan; 0: no plan")
    parser.add_argument("--pairs", type=int, default=1000, help="of each preference set; 0: none")
    parser.add_argument("--capacity", type=int, default=4096, help="tokens of a pack")
    parser.add_argument("--shape", choices=SHAPES, default="tiny", help="of the model whose steps are timed")
    parser.add_argument("--layers", type=int, default=0, help="of the model, where not all of the shape's")
    parser.add_argument("--packs", type=int, default=8, help="shared packs that are timed")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--json", type=Path, help="write the result here")
    options = parser.parse_args()
    home = Path(os.environ.get("GRISTMILL_DATA", Path(__file__).parents[1] / "../shared/data")).resolve()
    if not home.is_dir():
        sys.exit(f"no real data at {home}: set GRISTMILL_DATA")
    result: dict[str, Any] = {"machine": machine(options.device), "command": " ".join(sys.argv)}
    if options.rows:
        result["plan"] = planned(home, options.rows, options.capacity, options.repeats)
    if options.pairs:
        result["pairs"] = {name: shared(home / f"{name}.parquet", options) for name in PAIRS}
    print(json.dumps(result, indent=2))
    if options.json:
        options.json.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


def machine(device: str) -> dict[str, Any]:
    gpu = torch.cuda.get_device_name() if device.startswith("cuda") else None
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "processor": processor(),
        "processors": os.cpu_count(),
        "gpu": gpu,
        "versions": installed("torch", "transformers", "trl", "numpy"),
    }


def planned(home: Path, rows: int, capacity: int, repeats: int) -> dict[str, Any]:
    """Seconds and fill of the plan, ours and TRL's, by distribution."""
    draw = np.random.default_rng(0)
    found = {}
    for name, lengths in {
        "log-normal": draw.lognormal(5.5, 1.0, rows).astype(np.int64) + 1,
        "real": draw.choice(real_lengths(home), rows),
    }.items():
        lengths = np.clip(lengths, 1, capacity)
        wall, processor, plan = timed(lambda of=lengths: pack_plan(of, capacity), repeats)
        places = np.concatenate(plan)
        assert len(places) == rows and np.array_equal(np.sort(places), np.arange(rows)), "a row is lost"
        ours = {"seconds": wall, "processor_seconds": processor, "packs": len(plan)}
        ours["fill"] = round(float(lengths.sum()) / (len(plan) * capacity), 6)
        found[name] = {"rows": rows, "capacity": capacity, "tokens": int(lengths.sum()), "ours": ours}
        found[name]["trl"] = trl_plan(lengths, capacity)
    return found


def trl_plan(lengths: NDArray[np.int64], capacity: int) -> dict[str, Any] | None:
    """TRL's bfd on the same lengths; None where it is not installed."""
    try:
        from datasets import Dataset, disable_progress_bars
        from trl import pack_dataset
    except ImportError:
        return None
    disable_progress_bars()
    offsets = pa.array(np.concatenate([[0], np.cumsum(lengths)]), pa.int64())
    ids = pa.LargeListArray.from_arrays(offsets, pa.array(np.zeros(int(lengths.sum()), np.int32)))
    rows = Dataset(pa.table({"input_ids": ids}))
    keep = {"keep_in_memory": True, "load_from_cache_file": False}
    wall, processor, packed = timed(lambda: pack_dataset(rows, capacity, "bfd", keep), 1)
    held = int(np.sum([len(own) for own in packed.with_format("numpy")["input_ids"]])) if len(packed) < 2000 else None
    found = {"seconds": wall, "processor_seconds": processor, "packs": len(packed), "tokens": held}
    return found | {"fill": round(float(lengths.sum()) / (len(packed) * capacity), 6)}


def real_lengths(home: Path) -> NDArray[np.int64]:
    """Tokens of real instruction rows."""
    turns = []
    for file in (home / f"{name}.parquet" for name in ROWS):
        read = pq.read_table(file).slice(0, 1000)
        names = [next((name for name in some if name in read.column_names), "") for some in COLUMNS]
        for row in read.to_pylist():
            ask, more, answer = (str(row.get(name) or "") for name in names)
            turns.append([message("user", f"{ask}\n\n{more}".strip()), message("assistant", answer)])
    tokenizer = train_tokenizer(turns, 4096, 4096)
    table = pa.table({"row_id": [str(i) for i in range(len(turns))], "messages": pa.array(turns, MESSAGES)})
    return np.asarray([len(tokens.ids) for own in tokenise_rows(tokenizer, table) for tokens in own], np.int64)


def shared(path: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Token and step ratios of one preference set."""
    rows = preference_rows(path, options.pairs)
    vocab = SHAPES[options.shape][-1]
    corpus = [[*row["prompt"], *row["chosen"]] for row in rows]
    tokenizer = train_tokenizer(corpus, min(vocab, 8192), options.capacity)
    columns = {name: pa.array([row[name] for row in rows], MESSAGES) for name in ("prompt", "chosen", "rejected")}
    table = pa.table({"row_id": [str(i) for i in range(len(rows))], **columns})
    both = [read_units("dpo", tokenizer, table, options.capacity, "drop", shared=kind) for kind in (False, True)]
    fitting = set(both[0].row_ids)
    apart, together = (chosen(units, fitting) for units in both)  # the pairs that fit a pack either way
    prompts = sum(int(np.flatnonzero(document.weights)[0]) for document in together.documents[::2])
    unshared, once = int(apart.lengths.sum()), int(together.lengths.sum())
    found: dict[str, Any] = {"pairs": len(together.row_ids), "prompt_tokens": prompts, "unshared_tokens": unshared}
    found |= {
        "tokens": once,
        "token_ratio": round(unshared / once, 4),
        "bound": round(unshared / (unshared - prompts), 4),
    }
    plans = [pack_plan(units.lengths, options.capacity) for units in (apart, together)]
    found |= {"packs": [len(plan) for plan in plans]}
    model = made(options)
    drawn = np.random.default_rng(0).permutation(len(plans[1]))[: options.packs]
    pairs = np.sort(np.concatenate([plans[1][place] for place in drawn]))
    times = []
    for units in (apart, together):
        own = chosen(units, {units.row_ids[pair] for pair in pairs})
        packs = pack_plan(own.lengths, options.capacity)
        wall, processor, _ = timed(lambda own=own, packs=packs: step(model, own, packs), options.repeats, warm=True)
        times.append((wall, processor))
    ratios = [times[0][i] / times[1][i] for i in (0, 1)]
    own_bound = bound_of(chosen(together, {together.row_ids[pair] for pair in pairs}))
    found |= {"timed_pairs": len(pairs), "seconds": [wall for wall, _ in times], "processor": [own for _, own in times]}
    found |= {"step_ratio": round(ratios[0], 4), "step_ratio_processor": round(ratios[1], 4)}
    return found | {"timed_bound": round(own_bound, 4), "of_the_bound": round(ratios[0] / own_bound, 4)}


def chosen(units: Units, row_ids: set[str]) -> Units:
    """Those pairs alone."""
    places = [place for place, row_id in enumerate(units.row_ids) if row_id in row_ids]
    documents = [document for place in places for document in units.documents[2 * place : 2 * place + 2]]
    names = [units.row_ids[place] for place in places]
    first = np.arange(0, len(documents) + 1, 2)
    return Units(names, documents, first, units.excluded, units.truncated, shared=units.shared)


def bound_of(units: Units) -> float:
    whole = int(units.document_lengths.sum())
    return whole / (whole - sum(int(np.flatnonzero(document.weights)[0]) for document in units.documents[::2]))


def step(model: Any, units: Units, packs: list[NDArray[np.int64]]) -> None:
    """Gradients of DPO's loss over these packs, against a reference of zeros."""
    model.zero_grad(set_to_none=True)
    for pack in packs:
        sums = answer_logps(model, units.pack(pack))
        torch.autograd.backward(-logsigmoid(0.1 * (sums[:, 0] - sums[:, 1])).sum() / len(units.row_ids))
    if next(model.parameters()).is_cuda:
        torch.cuda.synchronize()


def made(options: argparse.Namespace) -> Any:
    hidden, layers, heads, keys, size, inner, vocab = SHAPES[options.shape]
    config = AutoConfig.for_model(
        "qwen3", hidden_size=hidden, num_hidden_layers=options.layers or layers, num_attention_heads=heads,
        num_key_value_heads=keys, head_dim=size, intermediate_size=inner, vocab_size=vocab, tie_word_embeddings=False,
        max_position_embeddings=options.capacity,
    )  # fmt: skip
    dtype = torch.bfloat16 if options.device.startswith("cuda") else torch.float32
    torch.manual_seed(0)
    with torch.device(options.device):
        model: Any = AutoModelForCausalLM.from_config(config, dtype=dtype)
    isolate(model)
    model.get_input_embeddings().requires_grad_(False)
    model.get_output_embeddings().requires_grad_(False)
    return model.train()


def preference_rows(path: Path, count: int) -> list[dict[str, Any]]:
    """prompt, chosen and rejected as messages: of message lists, or of HH's transcripts."""
    rows = []
    for row in pq.read_table(path).slice(0, count).to_pylist():
        sides = [turns(row[name]) for name in ("chosen", "rejected")]
        if all(len(side) > 1 and side[-1]["role"] == "assistant" for side in sides) and sides[0][:-1] == sides[1][:-1]:
            rows.append({"prompt": sides[0][:-1], "chosen": sides[0][-1:], "rejected": sides[1][-1:]})
    return rows


def turns(said: str | list[dict[str, str]]) -> list[dict[str, Any]]:
    if not isinstance(said, str):
        return [message(turn["role"], turn["content"]) for turn in said]
    pieces = re.split(r"\n\n(Human|Assistant): ", said)[1:]
    roles = {"Human": "user", "Assistant": "assistant"}
    return [message(roles[who], text.strip()) for who, text in zip(pieces[::2], pieces[1::2], strict=True)]


def timed(work: Callable[[], Any], repeats: int, *, warm: bool = False) -> tuple[float, float, Any]:
    """Medians of wall-clock and processor seconds, and the last result."""
    result = work() if warm else None
    walls, owns = [], []
    for _ in range(repeats):
        wall, own = time.perf_counter(), time.process_time()
        result = work()
        walls.append(time.perf_counter() - wall)
        owns.append(time.process_time() - own)
    return round(statistics.median(walls), 4), round(statistics.median(owns), 4), result


if __name__ == "__main__":
    main()
