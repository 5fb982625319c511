"""vLLM serves what was trained here: greedy tokens and prompt log-probabilities equal ours; its rules are what we say.

Not among the tests that `pytest` collects by itself: `make test-vllm` makes an environment for it and runs it.
"""

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from gristmill.curation.rows import content_id, counted_row_id, message, table
from gristmill.curation.shards import write_curated
from gristmill.tuning.chat import conversation_ids
from gristmill.tuning.export import export
from gristmill.tuning.loop import train
from gristmill.tuning.models import load_model, load_tokenizer, train_tokenizer
from gristmill.tuning.servable import ARCHITECTURES, RANKS, check_servable, needed_rank
from gristmill.tuning.settings import Lora, Training

os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ.setdefault("VLLM_EXECUTE_MODEL_TIMEOUT_SECONDS", "3600")  # 300 by default: too few on a busy machine
vllm = pytest.importorskip("vllm", reason="vLLM is not installed here: run `make test-vllm`")

pytestmark = pytest.mark.timeout(3600)  # an engine takes a minute to start, on a busy machine many
TALK = [("What grinds?", "The mill."), ("What turns it?", "The river."), ("And then?", "Flour, then bread.")]
RANK, NEW = 4, 12


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base, a run that learns TALK by heart, and what is exported of it."""
    home = tmp_path_factory.mktemp("vllm")
    tokenizer = train_tokenizer([" ".join(word for pair in TALK for word in pair) * 20], 300, 128)
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        "qwen3", hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=32, vocab_size=len(tokenizer), max_position_embeddings=128,
        eos_token_id=0, initializer_range=0.1,
    )  # fmt: skip
    AutoModelForCausalLM.from_config(config).save_pretrained(home / "base")
    tokenizer.save_pretrained(home / "base")
    rows = []
    for ask, say in TALK:
        row: dict[str, Any] = {"messages": [message("user", ask), message("assistant", say)]}
        row |= {"source": "talk", "position": 0, "content_id": content_id(row)}
        rows.append(row | {"row_id": counted_row_id("talk", row["content_id"], 0)})
    write_curated(home / "data", "sft", {"train": [table(rows)]}, {}, lambda manifest: {})
    how = Training(
        capacity=128, packs_per_step=1, max_steps=60, learning_rate=1e-2, dtype="fp32", threads=1,
        lora=Lora(rank=RANK, base="fp32"),
    )  # fmt: skip
    train("sft", home / "data", home / "base", home / "run", how)
    for kind in ("adapter", "merged"):
        manifest = export(home / "run", home / kind, kind, device="cpu")  # type: ignore[arg-type]
        assert manifest["vllm"] == []
    return home


def prompts(home: Path) -> list[list[int]]:
    asked = [[{"role": "user", "content": ask}] for ask, _ in TALK]
    found = conversation_ids(load_tokenizer(home / "base"), asked, prompt=True)
    return [ids.tolist() for ids in found if not isinstance(ids, Exception)]


def ours(home: Path) -> Iterator[tuple[list[int], list[float]]]:
    """Greedy tokens, the stop token included, and log-probabilities of the prompt's tokens, by the trained model."""
    model: Any = load_model(home / "base", dtype="fp32", device="cpu", adapter=home / "run/adapter")
    model.set_attn_implementation("eager")
    stop = load_tokenizer(home / "base").convert_tokens_to_ids("<|im_end|>")
    for prompt in prompts(home):
        ids = list(prompt)
        with torch.no_grad():
            while len(ids) < len(prompt) + NEW and (len(ids) == len(prompt) or ids[-1] != stop):
                logits = model(torch.tensor([ids]), use_cache=False).logits[0]
                ids.append(int(logits[-1].argmax()))
        logps = logits.log_softmax(-1)
        yield ids[len(prompt) :], [float(logps[t - 1, prompt[t]]) for t in range(1, len(prompt))]


def theirs(home: Path, folder: str, adapter: str | None) -> list[Any]:
    how: dict[str, Any] = {"dtype": "float32", "enforce_eager": True, "max_model_len": 128, "seed": 0}
    request = None
    if adapter is not None:
        from vllm.lora.request import LoRARequest

        how |= {"enable_lora": True, "max_lora_rank": needed_rank(RANK)}
        request = LoRARequest("tuned", 1, str(home / adapter))
    engine = vllm.LLM(model=str(home / folder), **how)
    sampling = vllm.SamplingParams(temperature=0.0, max_tokens=NEW, prompt_logprobs=0)
    asked = [{"prompt_token_ids": prompt} for prompt in prompts(home)]
    return list(engine.generate(asked, sampling, lora_request=request, use_tqdm=False))


@pytest.mark.parametrize(("folder", "adapter"), [("merged", None), ("base", "adapter")], ids=["merged", "adapter"])
def test_vllm_says_what_we_say(folder: str, adapter: str | None, home: Path) -> None:
    texts = []
    for found, (tokens, logps) in zip(theirs(home, folder, adapter), ours(home), strict=True):
        (answer,) = found.outputs
        assert list(answer.token_ids) == tokens
        assert answer.finish_reason == "stop"  # at <|im_end|>, which the base's generation configuration lacks
        said = [place[token].logprob for place, token in zip(found.prompt_logprobs, found.prompt_token_ids, strict=True)
                if place is not None]  # fmt: skip
        assert said == pytest.approx(logps, abs=2e-3)
        texts.append(answer.text)
    assert texts == [say for _, say in TALK]


PEFT = {"r": 8, "lora_alpha": 16, "bias": "none", "target_modules": ["q_proj"], "peft_type": "LORA"}
CASES: dict[str, dict[str, Any]] = {
    "plain": {}, "rslora": {"use_rslora": True}, "odd rank": {"r": 9}, "largest rank": {"r": 512},
    "rank": {"r": 513}, "dora": {"use_dora": True}, "whole modules": {"modules_to_save": ["lm_head"]},
    "pissa": {"init_lora_weights": "pissa"}, "gaussian": {"init_lora_weights": "gaussian"},
    "layers twice": {"layer_replication": [[0, 2]]}, "bias of B": {"lora_bias": True},
    "bias": {"bias": "lora_only"}, "alora": {"alora_invocation_tokens": [1]}, "qalora": {"use_qalora": True},
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_our_rules_are_vllm_s(name: str, tmp_path: Path) -> None:
    from vllm.config.lora import LoRAConfig
    from vllm.lora.peft_helper import PEFTHelper

    fields = PEFT | CASES[name]
    config = AutoConfig.for_model("qwen3", architectures=["Qwen3ForCausalLM"])
    (tmp_path / "adapter_config.json").write_text(json.dumps(fields))
    try:
        helper = PEFTHelper.from_local_dir(str(tmp_path), None)
        helper.validate_legal(LoRAConfig(max_lora_rank=needed_rank(fields["r"]) or RANKS[-1]))
        takes = True
    except ValueError:
        takes = False
    assert (check_servable(config, fields) == []) == takes


def test_ranks_and_architectures_are_vllm_s() -> None:
    from vllm.config.lora import MaxLoRARanks

    assert get_args(MaxLoRARanks) == RANKS
    assert not set(ARCHITECTURES) - set(vllm.ModelRegistry.get_supported_archs())
