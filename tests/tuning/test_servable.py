"""vLLM's rules asked before training: what it serves, and each reason why not; tests/vllm asks vLLM itself."""

from typing import Any

import pytest
from transformers import AutoConfig

from gristmill.tuning.servable import check_servable, needed_rank
from gristmill.tuning.settings import Lora


def config(kind: str = "qwen3", *names: str) -> Any:
    made = AutoConfig.for_model(kind)
    made.architectures = list(names or ("Qwen3ForCausalLM",))
    return made


def test_our_own_settings_are_servable() -> None:
    assert check_servable(config(), Lora()) == []
    assert check_servable(config(), Lora(rank=512)) == []
    assert check_servable(config(), None) == []


PEFT = {"r": 8, "lora_alpha": 16, "bias": "none", "target_modules": ["q_proj", "model.layers.0.mlp.up_proj"]}
REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "rank": ({"r": 513}, "rank 513 is more than vLLM's largest max_lora_rank 512"),
    "a rank of one layer": ({"rank_pattern": {"q_proj": 600}}, "rank 600"),
    "dora": ({"use_dora": True}, "no DoRA adapter: export it merged"),
    "bias": ({"bias": "lora_only"}, "bias 'lora_only'"),
    "whole modules": ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
    "pissa": ({"init_lora_weights": "pissa"}, "changes the base's weights"),
    "layers twice": ({"layer_replication": [[0, 2]]}, "layer_replication"),
    "head": ({"target_modules": ["q_proj", "lm_head"]}, "no module called lm_head"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_vllm_refuses_is_said_with_what_to_do(name: str) -> None:
    change, said = REFUSED[name]
    assert check_servable(config(), PEFT) == []
    (problem,) = check_servable(config(), PEFT | change)
    assert said in problem and any(word in problem for word in ("merge", "leave it out", "weights"))


def test_an_architecture_that_vllm_is_not_known_to_serve_is_named() -> None:
    (problem,) = check_servable(config("mamba", "MambaForCausalLM"), Lora())
    assert "MambaForCausalLM" in problem and "Qwen3ForCausalLM" in problem


def test_the_rank_that_the_server_needs() -> None:
    assert [needed_rank(rank) for rank in (1, 2, 8, 9, 300, 512, 513)] == [1, 8, 8, 16, 320, 512, None]
