"""Loading a model for QLoRA: peak memory and seconds, ours beside the model loaded whole and bitsandbytes' own.

    python benchmarks/loading.py [--params 1B|8B|70B|tiny] [--layers N] [--dtype bf16|fp32] [--threads 1]
        [--repeat 1] [--folder DIR] [--json PATH]

Makes a random Llama checkpoint of the shape in shards, a tensor at a time (in DIR, where it stays; else in a temporary
folder). Each contender loads it in a process of its own on the CPU, adapters of rank 16 included: ours
(load_model(base="nf4"), add_lora), whole (the same after from_pretrained) and transformers with bitsandbytes'
load_in_4bit and PEFT. Of memory are told the most that was resident (VmHWM), which counts pages of the files that are
mapped, and the most that was the process's own (RssAnon, looked at every 5 ms), each less what the process had before.
The files lie in the system's cache for all of them. An embedding that is mapped and not read yet is in neither figure:
ours and whole hold it on top after a first step. bitsandbytes' preparation by PEFT makes it fp32.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from statistics import median
from typing import Any

import torch
from machine import installed, processor
from tables import show

SHAPES: dict[str, dict[str, int]] = {
    "tiny": {"hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 4, "vocab_size": 8192},
    "1B": {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "vocab_size": 128_256},
    "8B": {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "vocab_size": 128_256},
    "70B": {"hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, "vocab_size": 128_256},
}
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
WHO = ("ours", "whole", "bitsandbytes")


def main() -> None:
    options = arguments()
    if options.who:
        print(json.dumps(measured(options.who, Path(options.folder), options.threads)))
        return
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(options.folder or temporary)
        about = make(folder, options)
        rows = []
        for who in WHO:
            rows.append({"who": who, **once(who, folder, options)})
            show(rows)
    record = {
        "date": datetime.now(UTC).date().isoformat(), "hardware": hardware(), "versions": versions(),
        "threads": options.threads, "repeat": options.repeat, "model": about, "rows": rows,
    }  # fmt: skip
    if options.json:
        Path(options.json).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--params", choices=sorted(SHAPES), default="1B")
    parser.add_argument("--layers", type=int, help="other than the shape's")
    parser.add_argument("--dtype", choices=sorted(DTYPES), default="bf16", help="of the checkpoint")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeat", type=int, default=1, help="processes of each contender; medians are told")
    parser.add_argument("--folder")
    parser.add_argument("--json")
    parser.add_argument("--who", choices=WHO, help=argparse.SUPPRESS)
    return parser.parse_args()


def make(folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Writes the checkpoint, unless one of this shape lies there."""
    from transformers import AutoConfig, AutoModelForCausalLM

    from gristmill.tuning.weight_files import write_weights

    shape = SHAPES[options.params] | ({"num_hidden_layers": options.layers} if options.layers else {})
    heads = max(shape["hidden_size"] // 128, 4)
    config = AutoConfig.for_model(
        "llama", **shape, num_attention_heads=heads, num_key_value_heads=max(heads // 4, 1), tie_word_embeddings=True
    )
    with torch.device("meta"):
        model: Any = AutoModelForCausalLM.from_config(config)
    dtype, state = DTYPES[options.dtype], dict(model.named_parameters())
    asked = {"shape": shape, "dtype": options.dtype}
    note = folder / "made.json"
    if not note.is_file() or json.loads(note.read_text()) != asked:
        folder.mkdir(parents=True, exist_ok=True)
        config.save_pretrained(folder)
        draw = torch.Generator().manual_seed(0)

        def part(name: str, shape: torch.Size) -> tuple[int, Callable[[], dict[str, torch.Tensor]]]:
            many = shape.numel() * dtype.itemsize
            return many, lambda: {name: torch.empty(shape, dtype=dtype).normal_(0, 0.02, generator=draw)}

        write_weights(folder, [part(name, tensor.shape) for name, tensor in state.items()], 2**29)
        note.write_text(json.dumps(asked))
    params = sum(tensor.numel() for tensor in state.values())
    return {
        **shape, "params": params, "dtype": options.dtype, "bytes": params * dtype.itemsize,
        "files": len(list(folder.glob("*.safetensors"))),
    }  # fmt: skip


def once(who: str, folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Medians over fresh processes."""
    command = [sys.executable, __file__, "--who", who, "--folder", str(folder), "--threads", str(options.threads)]
    environment = os.environ | {"OMP_NUM_THREADS": str(options.threads), "HF_HUB_OFFLINE": "1"}
    found = []
    for _ in range(options.repeat):
        said = subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE, text=True).stdout
        found.append(json.loads(said.splitlines()[-1]))
    return {name: round(median(one[name] for one in found), 2) for name in found[0]}


def measured(who: str, folder: Path, threads: int) -> dict[str, Any]:
    torch.set_num_threads(threads)
    load = {"ours": ours, "whole": whole, "bitsandbytes": bitsandbytes}[who]()
    before = memory()
    with most_of_its_own() as own:
        began, used = time.perf_counter(), time.process_time()
        model = load(folder)
        seconds, processor = time.perf_counter() - began, time.process_time() - used
    after = memory()
    assert sum(parameter.requires_grad for parameter in model.parameters()) > 0
    return {
        "seconds": seconds, "processor_seconds": processor, "peak_mb": after["VmHWM"] - before["VmRSS"],
        "own_peak_mb": own[0] - before["RssAnon"], "own_mb": after["RssAnon"] - before["RssAnon"],
    }  # fmt: skip


def ours() -> Callable[[Path], Any]:
    from gristmill.tuning.lora import add_lora
    from gristmill.tuning.models import load_model
    from gristmill.tuning.settings import Lora

    def load(folder: Path) -> Any:
        model = load_model(folder, dtype="bf16", device="cpu", base="nf4")
        add_lora(model, Lora(rank=16, base="nf4"), 0)
        return model

    warm()
    return load


def whole() -> Callable[[Path], Any]:
    from transformers import AutoModelForCausalLM

    from gristmill.tuning.lora import add_lora
    from gristmill.tuning.settings import Lora

    def load(folder: Path) -> Any:
        model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
        add_lora(model, Lora(rank=16, base="nf4"), 0)
        return model

    warm()
    return load


def warm() -> None:
    """Compiles what quantises, once in a process."""
    from gristmill.kernels.nf4 import quantise

    quantise(torch.ones(4096, dtype=torch.bfloat16))


def bitsandbytes() -> Callable[[Path], Any]:
    from bitsandbytes.functional import quantize_4bit
    from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    how = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )  # fmt: skip

    def load(folder: Path) -> Any:
        model = AutoModelForCausalLM.from_pretrained(folder, quantization_config=how, dtype=torch.bfloat16)
        model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
        return get_peft_model(model, LoraConfig(r=16, target_modules="all-linear", task_type="CAUSAL_LM"))

    quantize_4bit(torch.ones(4096, dtype=torch.bfloat16), quant_type="nf4", compress_statistics=True)
    return load


def memory() -> dict[str, float]:
    """MB that this process holds: VmRSS and VmHWM (its highest) all, RssAnon what is no page of a file."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return {line.split(":")[0]: int(line.split()[1]) * 1024 / 1e6 for line in lines if line.endswith(" kB")}


@contextmanager
def most_of_its_own() -> Iterator[list[float]]:
    """The largest RssAnon inside, in MB, when it is left."""
    most, done = [0.0], threading.Event()

    def look() -> None:
        while not done.wait(0.005):
            most[0] = max(most[0], memory()["RssAnon"])

    thread = threading.Thread(target=look, daemon=True)
    thread.start()
    try:
        yield most
    finally:
        done.set()
        thread.join()
        most[0] = max(most[0], memory()["RssAnon"])


def hardware() -> str:
    return f"{processor()}, {os.cpu_count()} processors"


def versions() -> dict[str, str]:
    names = ("torch", "transformers", "safetensors", "bitsandbytes", "peft")
    return {"python": platform.python_version(), **installed(*names)}


if __name__ == "__main__":
    main()
