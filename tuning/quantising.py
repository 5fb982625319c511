"""Checkpoints read one tensor at a time, each linear layer of the decoder blocks quantised to NF4 as it is read.

transformers maps the checkpoint's keys to the model's, splits and joins what its WeightConverters say, and puts every
tensor in its place; its hook for quantisation calls ours with each finished weight. Held at once are the NF4 bytes, the
tensors that stay as they are, and one weight with what it was made from. The result is bit for bit that of loading
whole and quantising then.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedModel
from transformers.core_model_loading import ConversionOps
from transformers.quantizers.auto import register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils import CONFIG_NAME, GENERATION_CONFIG_NAME
from transformers.utils.quantization_config import QuantizationConfigMixin

from ..curation.folder import HouseError, read_json
from ..kernels.nf4 import NF4, quantise
from .attention import isolate
from .lora import linear_names
from .quantised import NF4Linear
from .weight_files import INDEX, SINGLE

NAME = "gristmill_nf4"  # under which transformers finds the quantiser
BASES = ("nf4", "nf4-single")


@dataclass(frozen=True)
class Stored:
    """A tensor of a safetensors file. Its file is mapped while the tensor lives and no longer: through one mapping of
    a whole checkpoint every page that was read would count as this process's memory."""

    path: Path
    name: str

    def __getitem__(self, where: Any) -> Tensor:
        try:
            with safe_open(self.path, "pt") as file:
                return file.get_tensor(self.name)[where]  # type: ignore[no-any-return]
        except Exception as error:  # safetensors raises its own, and what the file system does
            raise _damaged(self.path, error) from error


def stored_tensors(folder: Path) -> dict[str, Stored]:
    """The tensors, by name, of the safetensors files that transformers would load from `folder`; none where its weights
    are torch's .bin. HouseError for a file that is absent or cut off."""
    paths = [folder / SINGLE] if (folder / SINGLE).is_file() else []
    if not paths and (folder / INDEX).is_file():
        paths = [folder / name for name in sorted(set(read_json(folder / INDEX)["weight_map"].values()))]
    found: dict[str, Stored] = {}
    for path in paths:
        if not path.is_file():
            raise HouseError(f"{folder}: {INDEX} names {path.name}, which is not there: get this file again")
        try:
            with safe_open(path, "pt") as file:
                found |= {name: Stored(path, name) for name in file.keys()}  # noqa: SIM118 (no iterator of its own)
        except Exception as error:  # as above
            raise _damaged(path, error) from error
    return found


def _damaged(path: Path, error: Exception) -> HouseError:
    return HouseError(f"{path} is damaged or not whole: get this file again ({error})")


def load_causal(folder: Path, config: Any, dtype: torch.dtype, device: str, base: str | None) -> PreTrainedModel:
    """The causal LM in `folder`, of this configuration and not quantised, read with `dtype`.

    base: one of BASES: its decoder blocks' linear layers come quantised so, on `device`, as NF4Linear, and all else on
    the CPU; None: all as stored. HouseError where a file is damaged, or a weight absent, of another shape or not
    finite.
    """
    stored = stored_tensors(folder)
    how: dict[str, Any] = {"local_files_only": True, "dtype": dtype, "output_loading_info": True}
    door: Any = AutoModelForCausalLM
    where: Path | None = folder
    asked = WhileLoading(folder=str(folder), device=device, double=base == "nf4")
    if base in BASES:
        how["quantization_config"] = asked
        if stored:  # transformers takes tensors or a folder
            with torch.device("meta"):
                empty = door.from_config(config)
            where, door = None, type(empty)
            how |= {"config": empty.config, "state_dict": stored, "generation_config": _generation(folder)}
    try:
        model, told = door.from_pretrained(where, **how)
    except Exception:
        if asked.faults:  # transformers goes on without the weight that failed, and tells of it by name alone
            raise asked.faults[0] from None
        raise
    if absent := sorted(told["missing_keys"]):
        raise HouseError(f"{folder} lacks the weights {', '.join(absent[:3])} ({len(absent)} in all): get it again")
    model.name_or_path = model.config.name_or_path = str(folder)
    return model  # type: ignore[no-any-return]


def _generation(folder: Path) -> GenerationConfig:
    """How the model generates, as its own file says or, where there is none, its configuration."""
    if (folder / GENERATION_CONFIG_NAME).is_file():
        return GenerationConfig.from_pretrained(folder)
    return GenerationConfig.from_pretrained(folder, config_file_name=CONFIG_NAME, _from_model_config=True)


@dataclass(kw_only=True)
class WhileLoading(QuantizationConfigMixin):
    """What from_pretrained is asked for: quantise to NF4 on `device`. faults: what went wrong in doing so."""

    folder: str
    device: str
    double: bool = True
    quant_method: str = NAME  # type: ignore[assignment]
    faults: list[Exception] = field(default_factory=list)


@register_quantizer(NAME)
class Nf4Quantizer(HfQuantizer):
    """transformers' side of `load_causal`."""

    def __init__(self, quantization_config: WhileLoading, **options: Any) -> None:
        super().__init__(quantization_config, **options)
        self.asked = quantization_config
        self.shapes: dict[str, torch.Size] = {}
        self.wanted: set[str] = set()
        self.done: dict[str, NF4] = {}

    def _process_model_before_weight_loading(self, model: PreTrainedModel, **_: Any) -> None:
        isolate(model)  # refuses what cannot be trained before anything is read
        self.shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
        self.wanted = {f"{name}.weight" for name in linear_names(model)}

    def param_needs_quantization(self, model: PreTrainedModel, param_name: str, **_: Any) -> bool:
        return param_name in self.wanted

    def get_quantize_ops(self) -> ConversionOps:
        return _Quantise(self)

    def quantised(self, name: str, weight: Tensor) -> nn.Parameter:
        """Quantises a weight, and gives what stands in its place until the layers are made."""
        try:
            weight = weight.to(self.asked.device)
            self.done[name] = quantise(weight, double=self.asked.double)
        except Exception as error:
            refused = isinstance(error, ValueError)
            self.asked.faults.append(HouseError(f"{self.asked.folder}: {name}: {error}") if refused else error)
            raise
        return nn.Parameter(self.done[name].packed, requires_grad=False)

    def postprocess_model(self, model: PreTrainedModel, **_: Any) -> None:
        """Makes the layers, and leaves no sign on the model that it was quantised by transformers."""
        found = {name: parameter.shape for name, parameter in model.named_parameters()}
        found |= {name: torch.Size(q.shape) for name, q in self.done.items()}
        for name, shape in self.shapes.items():
            if name in found and found[name] != shape:
                raise HouseError(
                    f"{self.asked.folder}: {name} has shape {tuple(found[name])}, config.json asks for {tuple(shape)}:"
                    " its files are not of one model"
                )
        for key, q in self.done.items():
            name = key.removesuffix(".weight")
            linear: Any = model.get_submodule(name)
            bias = None if linear.bias is None else linear.bias.detach()
            model.set_submodule(name, NF4Linear(q, bias, q.dtype).train(linear.training))
        self.remove_quantization_config(model)  # type: ignore[no-untyped-call]

    def is_serializable(self) -> bool:
        return False

    @property
    def is_trainable(self) -> bool:
        return True


class _Quantise(ConversionOps):
    """Quantises, of the tensors that a checkpoint's keys were made into, those that are linear layers'."""

    def __init__(self, quantizer: Nf4Quantizer) -> None:
        self.quantizer = quantizer

    def convert(self, input_dict: Mapping[str, Any], *_: Any, **__: Any) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for name, value in input_dict.items():
            weight = value[0] if isinstance(value, list) else value
            found[name] = self.quantizer.quantised(name, weight) if name in self.quantizer.wanted else weight
        return found
