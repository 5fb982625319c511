"""Models whose checkpoint is NF4 already (bitsandbytes' keys): loaded without bitsandbytes, bytes kept as found."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from ..curation.folder import HouseError
from ..kernels.lora_linear import frozen_linear
from ..kernels.nf4 import NF4, STATE, dequantise, from_tensors
from .weight_files import WeightFiles


class NF4Linear(nn.Linear):
    """A frozen linear layer over a stored NF4 weight. `weight` is dequantised at each reading, in `dtype`."""

    def __init__(self, q: NF4, bias: Tensor | None, dtype: torch.dtype) -> None:
        nn.Module.__init__(self)
        self.out_features, self.in_features = q.shape
        self.dtype, self._q = dtype, q
        for name, tensor in q.tensors().items():
            self.register_buffer(f"nf4_{name}", tensor, persistent=False)
        self.register_parameter("bias", None if bias is None else nn.Parameter(bias, requires_grad=False))

    @property
    def nf4(self) -> NF4:
        """The weight as stored, on the module's device."""
        tensors: dict[str, Any] = {name: getattr(self, f"nf4_{name}") for name in self._q.tensors()}
        if tensors["packed"] is not self._q.packed:
            self._q = replace(self._q, **tensors)
        return self._q

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        return dequantise(self.nf4, self.dtype)

    def forward(self, x: Tensor) -> Tensor:
        return frozen_linear(x, self.nf4, self.bias)


def is_nf4(config: Any) -> bool:
    """Whether a model of this configuration is stored in NF4. HouseError where it is quantised in another way."""
    found = getattr(config, "quantization_config", None)
    if found is None:
        return False
    stated = found if isinstance(found, dict) else found.to_dict()
    kind = (stated.get("quant_method"), stated.get("load_in_4bit"), stated.get("bnb_4bit_quant_type"))
    if kind == ("bitsandbytes", True, "nf4"):
        return True
    raise HouseError(
        f"this model is quantised as {', '.join(f'{key} {value}' for key, value in sorted(stated.items()) if value)}; "
        "known is NF4 of bitsandbytes alone: name the unquantised model, which is quantised as it is loaded"
    )


def load_nf4(folder: Path, config: Any, dtype: torch.dtype) -> PreTrainedModel:
    """The model in `folder`, its quantised layers as NF4Linear, all else in `dtype`."""
    files = WeightFiles(folder)
    quantised = [name.removesuffix(f".{STATE}") for name in files.names() if name.endswith(STATE)]
    if not quantised:
        raise HouseError(f"{folder}: config.json says NF4, but no weight there has a {STATE}")
    stored = config.quantization_config
    del config.quantization_config
    with torch.device("meta"):
        model: Any = AutoModelForCausalLM.from_config(config, dtype=dtype)  # type: ignore[no-untyped-call]
    config.quantization_config = stored
    side = set()
    for key in quantised:
        own = [name for name in files.names() if name == key or name.startswith(f"{key}.")]
        side |= {*own}
        name = key.removesuffix(".weight")
        bias = files.get(f"{name}.bias").to(dtype) if f"{name}.bias" in files else None
        layer = NF4Linear(from_tensors({item: files.get(item) for item in own}, key), bias, dtype)
        model.set_submodule(name, layer)
    rest = {name: files.get(name).to(dtype) for name in files.names() if name not in side}
    model.load_state_dict(rest, strict=False, assign=True)
    model.tie_weights()
    _materialise_buffers(model, config)
    if absent := [name for name, tensor in model.named_parameters() if tensor.is_meta]:
        raise HouseError(f"{folder} lacks the weights {', '.join(absent[:3])} ({len(absent)} in all): get it again")
    return model.requires_grad_(False)  # type: ignore[no-any-return]


def _materialise_buffers(model: Any, config: Any) -> None:
    """Rotary frequencies and the like, which no checkpoint holds, made on the CPU."""
    for name, module in model.named_modules():
        if any(buffer.is_meta for buffer in module.buffers(recurse=False)):
            with torch.device("cpu"):
                fresh = type(module)(config)
            model.set_submodule(name, fresh)
