"""Norms of loaded decoders, fused: which are found, and that nothing else about the model changes."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

from gristmill.kernels import rms_norm
from gristmill.tuning.attention import ARCHITECTURES, hidden_states, isolate
from gristmill.tuning.lora import add_lora
from gristmill.tuning.models import load_model
from gristmill.tuning.norms import RmsNorm, fuse_norms
from gristmill.tuning.settings import Lora

WITHOUT = {"phi", "starcoder2", "cohere", "cohere2", "olmo"}  # layer norms, with a mean or without a weight
FORMS = {
    "llama": "rounded", "qwen2": "rounded", "qwen3": "rounded", "mistral": "rounded", "phi3": "rounded",
    "gemma": "shifted", "gemma2": "shifted", "gemma3_text": "shifted", "olmo2": "plain", "helium": "plain",
}  # fmt: skip
IDS = torch.randint(3, 90, (24,), generator=torch.Generator().manual_seed(1))


@pytest.fixture(autouse=True)
def _however_small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rms_norm, "LEAST", 0)


def made(kind: str, dtype: torch.dtype = torch.float32) -> Any:
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        kind, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, vocab_size=96, max_position_embeddings=64, pad_token_id=0,
        bos_token_id=1, eos_token_id=2, initializer_range=0.1, attention_dropout=0.0,
    )  # fmt: skip
    model: Any = AutoModelForCausalLM.from_config(config, dtype=dtype)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name and parameter.ndim == 1:
                parameter.add_(torch.linspace(-0.4, 0.4, parameter.numel()))
    isolate(model)
    return model.eval()


def states(model: Any) -> Tensor:
    return hidden_states(model, IDS, torch.cat([torch.arange(14), torch.arange(10)]), [14, 10])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_every_architecture_says_the_same_bit_for_bit(kind: str, dtype: torch.dtype) -> None:
    model = made(kind, dtype)
    before = {name: parameter.shape for name, parameter in model.named_parameters()}
    with torch.no_grad():
        right = states(model)
        count = fuse_norms(model)
        assert torch.equal(states(model), right)
    assert {name: parameter.shape for name, parameter in model.named_parameters()} == before
    assert (count == 0) == (kind in WITHOUT)
    found = {module.form for module in model.modules() if isinstance(module, RmsNorm)}
    assert kind not in FORMS or found == {FORMS[kind]}
    if kind not in WITHOUT:
        left = [n for n, m in model.named_modules() if type(m).__name__.endswith("RMSNorm") and list(m.parameters())]
        assert left == []


@pytest.mark.parametrize("kind", ["llama", "qwen3", "gemma3_text", "olmo2"])
@pytest.mark.parametrize("adapted", [True, False])
def test_gradients_are_those_without(kind: str, adapted: bool) -> None:
    found: list[dict[str, Tensor]] = []
    for fused in (False, True):
        model = made(kind)
        if fused:
            fuse_norms(model)
        if adapted:
            add_lora(model, Lora(rank=4, base="fp32"), 0)
            with torch.no_grad():
                for name, parameter in model.named_parameters():
                    if name.endswith(".B"):
                        parameter.add_(0.01)
        model.train()
        (states(model) * torch.linspace(-1, 1, 32)).sum().backward()
        found.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    assert found[0].keys() == found[1].keys() and found[0]
    for name, theirs in found[0].items():
        torch.testing.assert_close(found[1][name], theirs, rtol=1e-4, atol=1e-5 * float(theirs.abs().max()))


def test_a_loaded_model_has_them_and_saves_as_before(tmp_path: Path) -> None:
    made("qwen3").save_pretrained(tmp_path / "model")
    model = load_model(tmp_path / "model", dtype="fp32", device="cpu")
    assert sum(isinstance(module, RmsNorm) for module in model.modules()) == 2 * 4 + 1  # two norms, q and k; the last
    assert not model.training and not any(module.training for module in model.modules())
    model.save_pretrained(tmp_path / "again")
    again = load_model(tmp_path / "again", dtype="fp32", device="cpu").state_dict()
    assert all(torch.equal(tensor, again[name]) for name, tensor in model.state_dict().items())


def test_a_norm_that_computes_something_else_stays() -> None:
    """Of the right shape and name, but its weight is squared."""

    class OddRMSNorm(nn.Module):
        def __init__(self, width: int) -> None:
            super().__init__()
            self.weight, self.eps = nn.Parameter(torch.ones(width)), 1e-6

        def forward(self, x: Tensor) -> Tensor:
            return self.weight**2 * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps)

    model = made("llama")
    model.model.norm = OddRMSNorm(32)
    assert fuse_norms(model) == 4
    assert isinstance(model.model.norm, OddRMSNorm)
