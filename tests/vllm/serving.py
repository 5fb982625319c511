"""vLLM serves what was trained here: greedy tokens and prompt log-probabilities equal ours; its rules are what we say.

Not among the tests that `pytest` collects by itself: `make test-vllm` makes an environment for it and runs it.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from transformers import AutoConfig

from gristmill.tuning.chat import conversation_ids
from gristmill.tuning.models import load_model, load_tokenizer
from gristmill.tuning.servable import ARCHITECTURES, RANKS, TARGETS, check_servable, needed_rank
from tests.vllm.conftest import RANK, TALK

vllm = pytest.importorskip("vllm", reason="vLLM is not installed here: run `make test-vllm`")

pytestmark = pytest.mark.timeout(3600)  # an engine takes a minute to start, on a busy machine many
NEW = 12


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
        how |= {"lora_target_modules": sorted(TARGETS)}  # not the head: on a CPU, prompt_logprobs would end the engine
        request = LoRARequest("tuned", 1, str(home / adapter))
    engine = vllm.LLM(model=str(home / folder), **how)
    sampling = vllm.SamplingParams(temperature=0.0, max_tokens=NEW, prompt_logprobs=0)
    asked = [{"prompt_token_ids": prompt} for prompt in prompts(home)]
    try:
        return list(engine.generate(asked, sampling, lora_request=request, use_tqdm=False))
    finally:
        engine.llm_engine.engine_core.shutdown(timeout=10)


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
