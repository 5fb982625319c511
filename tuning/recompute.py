"""Activation checkpointing: which decoder layers keep their input alone and are computed again in the backward pass.

torch's non-reentrant checkpoints, through the door of transformers' layers, with the generators' state put back, so
that dropout draws the same again and gradients are those without checkpoints.
"""

from collections.abc import Callable
from typing import Any

from torch import nn
from torch.autograd.graph import save_on_cpu
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from ..curation.folder import HouseError
from .settings import Training


def recompute(model: PreTrainedModel, settings: Training) -> int:
    """Checkpoints the first layers of `model`, as many as the settings say, and returns how many.

    With offload, what a checkpoint keeps lies in pinned host memory until it is needed: on CUDA alone, and only where
    layers are checkpointed. HouseError for a model whose layers cannot be checkpointed.
    """
    layers = getattr(model.base_model, "layers", None)
    found = list(layers) if isinstance(layers, nn.ModuleList) else []
    wanted = settings.checkpointing
    count = {"none": 0, "layers": len(found)}[wanted] if isinstance(wanted, str) else min(wanted, len(found))
    on_cuda = next(model.parameters()).device.type == "cuda"
    if settings.offload and not (count and on_cuda):
        where = "runs on a CPU, whose memory is all there is" if count else "checkpoints no layer"
        raise HouseError(
            f"offload: what checkpointed layers keep moves off the GPU, and this stage {where}; leave it out"
        )
    for layer in found[:count]:
        if not isinstance(layer, GradientCheckpointingLayer):
            raise HouseError(f"checkpointing: {type(layer).__name__} of {type(model).__name__} cannot be checkpointed")
        layer.gradient_checkpointing = True
        door: Any = layer  # nn.Module's attributes are typed as tensors and modules
        door._gradient_checkpointing_func = _offloaded if settings.offload else _checkpointed
    return count


def _checkpointed(run: Callable[..., Any], *inputs: Any) -> Any:
    return checkpoint(run, *inputs, use_reentrant=False, preserve_rng_state=True)


def _offloaded(run: Callable[..., Any], *inputs: Any) -> Any:
    with save_on_cpu(pin_memory=True):
        return _checkpointed(run, *inputs)
