"""LoRA on every linear layer of a transformers decoder, over an NF4 or plain base, saved as PEFT files."""

import hashlib
import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, cast, get_args

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..curation.folder import HouseError, whole_folder, write_json
from ..kernels.lora_linear import Base, frozen_linear, lora_linear
from ..kernels.nf4 import NF4, dequantise, quantise
from .settings import Lora

BaseKind = Literal["nf4", "nf4-single", "bf16", "fp32"]
_PLAIN = {"bf16": torch.bfloat16, "fp32": torch.float32}
_PREFIX = "base_model.model."
# fields of PEFT's LoraConfig that ask for more than LoraLinear computes
_FOREIGN = (
    "rank_pattern", "alpha_pattern", "modules_to_save", "layer_replication", "lora_bias", "target_parameters",
    "trainable_token_indices", "use_qalora", "alora_invocation_tokens",
)  # fmt: skip
_WEIGHTS, _CONFIG, _OURS = "adapter_model.safetensors", "adapter_config.json", "gristmill.json"


class LoraLinear(nn.Module):
    """A frozen linear layer with a low-rank update: y = x Wᵀ + bias + alpha / rank · (drop(x) Aᵀ) Bᵀ.

    The base is a frozen parameter `weight` (out, in) or, in NF4, buffers. A (rank, in) and B (out, rank) are fp32
    parameters. Dropout draws from torch's global generator, which each training step seeds.
    """

    def __init__(self, linear: nn.Linear, settings: Lora, generator: torch.Generator) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.scale, self.dropout = settings.alpha / settings.rank, settings.dropout
        self.active = True
        self._nf4: NF4 | None = None
        self.weight: nn.Parameter | None = None
        weight, device = linear.weight.detach(), linear.weight.device
        if settings.base in _PLAIN:
            self.weight = nn.Parameter(weight.to(_PLAIN[settings.base]), requires_grad=False)
        else:
            self._keep(quantise(weight, double=settings.base == "nf4"))
        self.bias = None if linear.bias is None else nn.Parameter(linear.bias.detach(), requires_grad=False)
        a = torch.empty(settings.rank, linear.in_features)
        nn.init.kaiming_uniform_(a, a=math.sqrt(5), generator=generator)
        self.A = nn.Parameter(a.to(device))
        self.B = nn.Parameter(torch.zeros(linear.out_features, settings.rank, device=device))

    def _keep(self, q: NF4) -> None:
        self._nf4 = q
        for name, tensor in q.tensors().items():
            self.register_buffer(f"nf4_{name}", tensor, persistent=False)

    @property
    def base(self) -> Base:
        """The frozen weight, as stored."""
        if self._nf4 is None:
            assert self.weight is not None
            return self.weight
        tensors: dict[str, Any] = {name: getattr(self, f"nf4_{name}") for name in self._nf4.tensors()}
        if tensors["packed"] is not self._nf4.packed:  # the module was moved
            self._nf4 = replace(self._nf4, **tensors)
        return self._nf4

    def unpack(self) -> None:
        """Stores an NF4 base dequantised: the same values, without the work of each call."""
        if self._nf4 is None:
            return
        q = self.base
        assert isinstance(q, NF4)
        self.weight = nn.Parameter(dequantise(q), requires_grad=False)
        for name in q.tensors():
            delattr(self, f"nf4_{name}")
        self._nf4 = None

    def forward(self, x: Tensor) -> Tensor:
        if not self.active:
            return frozen_linear(x, self.base, self.bias)
        keep, rate = None, 1.0 - self.dropout
        if self.training and self.dropout:
            keep = torch.empty(x.shape, dtype=torch.bool, device=x.device).bernoulli_(rate)
        return lora_linear(x, self.base, self.A, self.B, self.scale, self.bias, keep, rate)

    def extra_repr(self) -> str:
        kind = "nf4" if self._nf4 is not None else "plain"
        return f"{self.in_features} -> {self.out_features}, rank {self.A.shape[0]}, base {kind}"


def _layers(model: PreTrainedModel) -> dict[str, LoraLinear]:
    """Adapted layers by module name, in the model's order. HouseError where there are none."""
    layers = {name: module for name, module in model.named_modules() if isinstance(module, LoraLinear)}
    if not layers:
        raise HouseError("the model carries no adapter: call tuning.lora.add_lora or load_adapter first")
    return layers


def _generator(seed: int, name: str) -> torch.Generator:
    """A generator of its own for each layer, so that no layer's start depends on another's."""
    raw = hashlib.blake2b(f"{seed} {name}".encode(), digest_size=7).digest()
    return torch.Generator().manual_seed(int.from_bytes(raw, "big"))


def add_lora(model: PreTrainedModel, settings: Lora, seed: int) -> None:
    """Replaces every linear layer of the decoder blocks by a LoraLinear and freezes everything else.

    Output layer and embeddings stay as they are. B starts at zero, so the model's output is the base's (NF4 rounding
    aside). HouseError where the model has an adapter already or no decoder blocks to adapt.
    """
    if settings.rank < 1 or not 0 <= settings.dropout < 1:
        raise HouseError(f"LoRA needs rank >= 1 and 0 <= dropout < 1, not {settings.rank} and {settings.dropout}")
    if any(isinstance(module, LoraLinear) for module in model.modules()):
        raise HouseError("the model carries an adapter already; load the base again to start another")
    blocks = getattr(model.base_model, "layers", None)
    if not isinstance(blocks, nn.ModuleList):
        raise HouseError(f"{type(model).__name__} has no decoder blocks at base_model.layers to adapt")
    inside = {id(module) for module in blocks.modules()}
    linears = [(n, m) for n, m in model.named_modules() if isinstance(m, nn.Linear) and id(m) in inside]
    if not linears:
        raise HouseError(f"the decoder blocks of {type(model).__name__} hold no torch.nn.Linear to adapt")
    model.requires_grad_(False)
    for name, linear in linears:
        parent, _, leaf = name.rpartition(".")
        layer = LoraLinear(linear, settings, _generator(seed, name)).train(linear.training)
        setattr(model.get_submodule(parent), leaf, layer)


def trainable(model: PreTrainedModel) -> dict[str, nn.Parameter]:
    """Every parameter that requires a gradient, by name, in the model's order."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def unpack(model: PreTrainedModel) -> None:
    """Stores every NF4 base dequantised: the same function, more memory, faster small calls (generation)."""
    for layer in _layers(model).values():
        layer.unpack()


@contextmanager
def adapter_off(model: PreTrainedModel) -> Iterator[None]:
    """Inside, the model is its base bit for bit (an NF4 base as dequantised). Not for two threads at once."""
    layers = [layer for layer in _layers(model).values() if layer.active]
    for layer in layers:
        layer.active = False
    try:
        yield
    finally:
        for layer in layers:
            layer.active = True


def save_adapter(model: PreTrainedModel, folder: Path, settings: Lora, base_model: str) -> None:
    """Writes PEFT's adapter_model.safetensors and adapter_config.json, and gristmill.json (how the base was stored).

    base_model: name or path of the base, for PEFT's base_model_name_or_path. The folder appears whole; equal weights
    give equal bytes.
    """
    layers = _layers(model)
    tensors = {}
    for name, layer in layers.items():
        tensors[f"{_PREFIX}{name}.lora_A.weight"] = layer.A.detach().cpu().contiguous()
        tensors[f"{_PREFIX}{name}.lora_B.weight"] = layer.B.detach().cpu().contiguous()
    config = {
        "base_model_name_or_path": base_model,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "lora_alpha": settings.alpha,
        "lora_dropout": settings.dropout,
        "modules_to_save": None,
        "peft_type": "LORA",
        "r": settings.rank,
        "target_modules": sorted({name.rpartition(".")[2] for name in layers}),
        "task_type": "CAUSAL_LM",
        "use_dora": False,
        "use_rslora": False,
    }
    with whole_folder(folder) as temporary:
        save_file(tensors, temporary / _WEIGHTS, metadata={"format": "pt"})
        write_json(temporary / _CONFIG, config)
        write_json(temporary / _OURS, {"base": settings.base})


def _read(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor], str | None]:
    """PEFT config, weights by module name and letter ("model.layers.0.mlp.up_proj.A"), and the base that we noted."""
    for name in (_WEIGHTS, _CONFIG):
        if not (folder / name).is_file():
            raise HouseError(f"{folder} holds no {name}: not a PEFT adapter, or its training did not finish")
    config: dict[str, Any] = json.loads((folder / _CONFIG).read_text(encoding="utf-8"))
    weights = {}
    for key, tensor in load_file(folder / _WEIGHTS).items():
        name = key.removeprefix(_PREFIX)
        for letter in "AB":
            name = name.replace(f".lora_{letter}.weight", f".{letter}")
        weights[name] = tensor
    ours = folder / _OURS
    return config, weights, json.loads(ours.read_text(encoding="utf-8"))["base"] if ours.is_file() else None


def _settings(config: dict[str, Any], folder: Path) -> Lora:
    """The adapter's settings; HouseError for what LoraLinear does not compute."""
    plain = {"peft_type": "LORA", "bias": "none", "use_dora": False, "fan_in_fan_out": False}
    odd = [f"{key}={config[key]!r}" for key, value in plain.items() if config.get(key, value) != value]
    odd += [f"{key}={config[key]!r}" for key in _FOREIGN if config.get(key)]
    if config.get("init_lora_weights", True) not in (True, False, "gaussian"):  # the others change the base
        odd.append(f"init_lora_weights={config['init_lora_weights']!r}")
    if odd:
        raise HouseError(f"{folder / _CONFIG}: cannot load an adapter with {', '.join(odd)}")
    rank, alpha = int(config["r"]), float(config["lora_alpha"])
    alpha = alpha * math.sqrt(rank) if config.get("use_rslora") else alpha  # rsLoRA scales by alpha / √rank
    return Lora(rank=rank, alpha=alpha, dropout=float(config.get("lora_dropout", 0.0)))


def load_adapter(model: PreTrainedModel, folder: Path, base: str | None = None, trainable: bool = False) -> Lora:
    """Puts the PEFT adapter in `folder` on `model` and returns its settings.

    base: how to store the frozen weights; None: as gristmill.json says, else plain in the model's own dtype. Linear
    layers that the adapter leaves out get an update of zero. trainable: let A and B require gradients. HouseError where
    the adapter is of a kind that cannot be loaded or does not fit the model.
    """
    folder = Path(folder)
    config, weights, noted = _read(folder)
    kind = base or noted or ("bf16" if model.dtype == torch.bfloat16 else "fp32")
    if kind not in get_args(BaseKind):
        raise HouseError(f"base {kind!r} of {folder} is none of {', '.join(get_args(BaseKind))}")
    settings = replace(_settings(config, folder), base=cast(BaseKind, kind))
    add_lora(model, settings, seed=0)
    layers = _layers(model)
    slots = {f"{name}.{letter}": getattr(layer, letter) for name, layer in layers.items() for letter in "AB"}
    wrong = sorted(name for name, tensor in weights.items() if name not in slots or slots[name].shape != tensor.shape)
    if wrong:
        raise HouseError(f"{folder} does not fit this model: {', '.join(wrong[:3])} ({len(wrong)} of {len(weights)})")
    with torch.no_grad():
        for name, tensor in weights.items():
            slots[name].copy_(tensor)
    for parameter in slots.values():
        parameter.requires_grad_(trainable)
    return settings
