"""LoRA on the linear layers of a transformers decoder, over an NF4 or plain base, saved as PEFT files."""

import hashlib
import json
import re
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
from ..kernels.glu import activation_of
from .adapted import GATED, FrozenLinear, LoraLinear, LoraMlp, SharedInput, gated
from .settings import Lora

BaseKind = Literal["nf4", "nf4-single", "bf16", "fp32"]
SHARING = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))  # children of one module that read one input
_PREFIX = "base_model.model."
# fields of PEFT's LoraConfig that ask for more than LoraLinear computes
_FOREIGN = (
    "modules_to_save", "layer_replication", "lora_bias", "target_parameters",
    "trainable_token_indices", "use_qalora", "alora_invocation_tokens",
)  # fmt: skip
_WEIGHTS, _CONFIG, _OURS = "adapter_model.safetensors", "adapter_config.json", "gristmill.json"


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


def _check(settings: Lora) -> None:
    if settings.rank < 1 or not 0 <= settings.dropout < 1 or not settings.lora_plus_ratio > 0:
        raise HouseError(
            f"LoRA needs rank >= 1, 0 <= dropout < 1 and lora_plus_ratio > 0, not {settings.rank}, "
            f"{settings.dropout} and {settings.lora_plus_ratio}"
        )


def linear_names(model: PreTrainedModel) -> list[str]:
    """Names of the linear layers inside the decoder blocks. HouseError where there are none."""
    blocks = getattr(model.base_model, "layers", None)
    if not isinstance(blocks, nn.ModuleList):
        raise HouseError(f"{type(model).__name__} has no decoder blocks at base_model.layers to adapt")
    inside = {id(module) for module in blocks.modules()}
    names = [name for name, module in model.named_modules() if isinstance(module, nn.Linear) and id(module) in inside]
    if not names:
        raise HouseError(f"the decoder blocks of {type(model).__name__} hold no torch.nn.Linear to adapt")
    return names


def _targeted(names: list[str], targets: tuple[str, ...]) -> set[str]:
    """Those of `names` that end in one of `targets`. HouseError for a target that none does."""
    found = {target: {name for name in names if f".{name}".endswith(f".{target}")} for target in targets}
    missing = [target for target, matches in found.items() if not matches]
    if missing:
        known = ", ".join(sorted({name.rpartition(".")[2] for name in names}))
        raise HouseError(f"lora.targets: no linear layer is called {', '.join(missing)}; the model has {known}")
    return set().union(*found.values()) if targets else set(names)


def add_lora(model: PreTrainedModel, settings: Lora, seed: int) -> None:
    """Replaces the linear layers of the decoder blocks by adapted ones (those of `settings.targets`) and frozen ones,
    and freezes everything else.

    Output layer and embeddings stay as they are. B starts at zero, so the model's output is the base's (NF4 rounding
    aside). q, k and v, and gated MLPs, then run as one operation each; names of modules and parameters stay. HouseError
    where the model has an adapter already, no decoder blocks to adapt, or no layer of a target's name.
    """
    _check(settings)
    names = _names_without_adapter(model)
    chosen = _targeted(names, settings.targets)
    _replace(model, names, dict.fromkeys(chosen, settings), settings.base, seed)


def _names_without_adapter(model: PreTrainedModel) -> list[str]:
    if any(isinstance(module, FrozenLinear) for module in model.modules()):
        raise HouseError("the model carries an adapter already; load the base again to start another")
    return linear_names(model)


def _replace(model: PreTrainedModel, names: list[str], adapters: dict[str, Lora], base: str, seed: int) -> None:
    """One layer after another, so that no more than one weight is held twice."""
    model.requires_grad_(False)
    acts = _gated_mlps(model, names)
    for name in names:
        parent, _, leaf = name.rpartition(".")
        linear = cast(nn.Linear, model.get_submodule(name))
        settings = adapters.get(name)
        layer = FrozenLinear(linear, base) if settings is None else LoraLinear(linear, settings, _generator(seed, name))
        setattr(model.get_submodule(parent), leaf, layer.train(linear.training))
    for parent in dict.fromkeys(name.rpartition(".")[0] for name in names):
        _join(model, parent, acts.get(parent))


def _gated_mlps(model: PreTrainedModel, names: list[str]) -> dict[str, str]:
    """Activation, of those that the fused MLP knows, of each module that computes what `gated` does. One module of each
    class is tried on numbers: a name says nothing of a forward."""
    found, tried = {}, {}
    for parent in dict.fromkeys(name.rpartition(".")[0] for name in names):
        module = model.get_submodule(parent)
        if [name for name, _ in module.named_children()] != list(GATED):
            continue
        if type(module) not in tried:
            gate, act = cast(nn.Linear, module.gate_proj), activation_of(cast(nn.Module, module.act_fn))
            probe = torch.linspace(-1, 1, 2 * gate.in_features).view(2, -1).to(gate.weight)
            with torch.no_grad():
                same = act is not None and torch.equal(module(probe), gated(module, probe))
            tried[type(module)] = act if same else None
        act = tried[type(module)]
        if act is not None:
            found[parent] = act
    return found


def _join(model: PreTrainedModel, name: str, act: str | None) -> None:
    """Lets the adapted layers under the module `name` that read one input run together."""
    module = model.get_submodule(name)
    layers = {child: layer for child, layer in module.named_children() if isinstance(layer, LoraLinear)}
    if act is not None and all(child in layers for child in GATED[:3]):
        grandparent, _, leaf = name.rpartition(".")
        gate, up, down = (layers[child] for child in GATED[:3])
        mlp = LoraMlp(gate, up, down, cast(nn.Module, module.act_fn), act)
        setattr(model.get_submodule(grandparent), leaf, mlp.train(module.training))
        return
    for together in SHARING:
        members = [layers[child] for child in together if child in layers]
        if len(members) > 1:
            shared = SharedInput(members)
            for layer in members:
                layer.shared = shared


def trainable(model: PreTrainedModel) -> dict[str, nn.Parameter]:
    """Every parameter that requires a gradient, by name, in the model's order."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def unpack(model: PreTrainedModel) -> None:
    """Stores every NF4 base dequantised: the same function, more memory, faster small calls (generation)."""
    for module in model.modules():
        if isinstance(module, FrozenLinear):
            module.unpack()


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
        "init_lora_weights": "gaussian" if settings.init == "gaussian" else True,
        "lora_alpha": settings.alpha,
        "lora_dropout": settings.dropout,
        "modules_to_save": None,
        "peft_type": "LORA",
        "r": settings.rank,
        "target_modules": list(_leaves(model) or sorted(layers)),
        "task_type": "CAUSAL_LM",
        "use_dora": False,
        "use_rslora": settings.rslora,
    }
    ranks = {name: layer.rank for name, layer in layers.items() if layer.rank != settings.rank}
    alphas = {name: layer.alpha for name, layer in layers.items() if layer.alpha != settings.alpha}
    config |= {key: value for key, value in (("rank_pattern", ranks), ("alpha_pattern", alphas)) if value}
    with whole_folder(folder) as temporary:
        save_file(tensors, temporary / _WEIGHTS, metadata={"format": "pt"})
        write_json(temporary / _CONFIG, config)
        write_json(temporary / _OURS, {"base": settings.base})


def _leaves(model: PreTrainedModel) -> tuple[str, ...]:
    """Last parts of the adapted layers' names; () where they would name a layer that is not adapted too."""
    linears = {name: module for name, module in model.named_modules() if isinstance(module, FrozenLinear)}
    leaves = {name.rpartition(".")[2] for name, module in linears.items() if isinstance(module, LoraLinear)}
    named = [module for name, module in linears.items() if name.rpartition(".")[2] in leaves]
    return tuple(sorted(leaves)) if all(isinstance(module, LoraLinear) for module in named) else ()


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
    return config, weights, noted_base(folder)


def noted_base(folder: Path) -> str | None:
    """How the base of the adapter in `folder` was stored when it was trained; None where nothing notes it."""
    ours = folder / _OURS
    return json.loads(ours.read_text(encoding="utf-8"))["base"] if ours.is_file() else None


def _settings(config: dict[str, Any], folder: Path) -> Lora:
    """The adapter's settings, patterns aside; HouseError for what LoraLinear does not compute."""
    plain = {"peft_type": "LORA", "bias": "none", "use_dora": False, "fan_in_fan_out": False}
    odd = [f"{key}={config[key]!r}" for key, value in plain.items() if config.get(key, value) != value]
    odd += [f"{key}={config[key]!r}" for key in _FOREIGN if config.get(key)]
    init = config.get("init_lora_weights", True)
    if init not in (True, False, "gaussian"):  # the others change the base
        odd.append(f"init_lora_weights={init!r}")
    if odd:
        raise HouseError(f"{folder / _CONFIG}: cannot load an adapter with {', '.join(odd)}")
    return Lora(
        rank=int(config["r"]),
        alpha=float(config["lora_alpha"]),
        dropout=float(config.get("lora_dropout", 0.0)),
        rslora=bool(config.get("use_rslora")),
        init="gaussian" if init == "gaussian" else "kaiming",
    )


def _of_layer(config: dict[str, Any], name: str, settings: Lora) -> Lora:
    """`settings` as PEFT's rank_pattern and alpha_pattern change them for one layer."""
    found: dict[str, Any] = {}
    for field, patterns in (("rank", config.get("rank_pattern")), ("alpha", config.get("alpha_pattern"))):
        for pattern, value in (patterns or {}).items():
            if re.match(rf"(.*\.)?({pattern})$", name):
                found[field] = type(getattr(settings, field))(value)
                break
    return replace(settings, **found)


def load_adapter(model: PreTrainedModel, folder: Path, base: str | None = None, trainable: bool = False) -> Lora:
    """Puts the PEFT adapter in `folder` on `model` and returns its settings.

    base: how to store the frozen weights; None: as gristmill.json says, else plain in the model's own dtype. The layers
    that the adapter's weights name are adapted, the others frozen. trainable: let A and B require gradients. HouseError
    where the adapter is of a kind that cannot be loaded or does not fit the model.
    """
    folder = Path(folder)
    config, weights, noted = _read(folder)
    kind = base or noted or ("bf16" if model.dtype == torch.bfloat16 else "fp32")
    if kind not in get_args(BaseKind):
        raise HouseError(f"base {kind!r} of {folder} is none of {', '.join(get_args(BaseKind))}")
    settings = replace(_settings(config, folder), base=cast(BaseKind, kind))
    names = _names_without_adapter(model)
    named = {weight.rpartition(".")[0] for weight in weights}
    adapters = {name: _of_layer(config, name, settings) for name in names if name in named}
    _fits(model, adapters, weights, folder)
    _replace(model, names, adapters, kind, seed=0)
    layers = _layers(model)
    with torch.no_grad():
        for weight, tensor in weights.items():
            name, _, letter = weight.rpartition(".")
            getattr(layers[name], letter).copy_(tensor)
    for layer in layers.values():
        layer.A.requires_grad_(trainable)
        layer.B.requires_grad_(trainable)
    return settings if len(layers) == len(names) else replace(settings, targets=_leaves(model) or tuple(sorted(layers)))


def check_continued(model: PreTrainedModel, found: Lora, wanted: Lora, folder: Path) -> None:
    """HouseError where the adapter of `found` that `model` was given is not of the rank, scale and layers that `wanted`
    asks for; dropout, LoRA+'s ratio and the start are free."""
    for field in ("rank", "alpha", "rslora"):
        ours, theirs = getattr(wanted, field), getattr(found, field)
        if ours != theirs:
            raise HouseError(f"{folder} has {field} {theirs}, the stage that continues it {ours}: set it to {theirs}")
    names = [name for name, module in model.named_modules() if isinstance(module, FrozenLinear)]
    if _targeted(names, wanted.targets) != set(_layers(model)):
        theirs, ours = (", ".join(one.targets) or "all linear layers" for one in (found, wanted))
        raise HouseError(
            f"{folder} adapts {theirs}, the stage that continues it {ours}: set lora.targets to {list(found.targets)}"
        )


def _fits(model: PreTrainedModel, adapters: dict[str, Lora], weights: dict[str, Tensor], folder: Path) -> None:
    """HouseError where a weight has no layer or another shape, or a layer lacks one of its two."""
    wanted: dict[str, tuple[int, ...]] = {}
    for name, settings in adapters.items():
        linear = cast(nn.Linear, model.get_submodule(name))
        wanted[f"{name}.A"] = (settings.rank, linear.in_features)
        wanted[f"{name}.B"] = (linear.out_features, settings.rank)
    found = {name: tuple(tensor.shape) for name, tensor in weights.items()}
    wrong = sorted(name for name in {*wanted, *found} if wanted.get(name) != found.get(name))
    if wrong or not found:
        raise HouseError(f"{folder} does not fit this model: {', '.join(wrong[:3])} ({len(wrong)} of {len(weights)})")
