"""Frozen weights made plain for a matrix product, in buffers that layers share.

Forward and backward of a layer each make its weight once, into one buffer that the next layer overwrites. Where the
forward runs a second time inside a backward pass (activation checkpointing), the weight it makes is kept until that
layer's own backward has used it, so that both take one dequantisation. What is kept is dropped at the end of the pass.
"""

import threading
from dataclasses import dataclass, field

import torch
from torch import Tensor

from .nf4 import NF4, dequantise

Base = Tensor | NF4


@dataclass
class _Kept:
    """A weight made plain, and what it was made from: held, so that nothing else can come to lie at its address."""

    source: Tensor
    buffer: Tensor


@dataclass
class _Buffers:
    """shared: one growing buffer per device and dtype. kept: by the address of the base. free: buffers once kept.
    task: the backward pass that all this belongs to."""

    shared: dict[tuple[torch.device, torch.dtype], Tensor] = field(default_factory=dict)
    kept: dict[tuple[int, torch.dtype], _Kept] = field(default_factory=dict)
    free: list[Tensor] = field(default_factory=list)
    task: int = -1

    def close(self) -> None:
        self.kept.clear()
        self.free.clear()
        self.task = -1


class _Local(threading.local):  # two threads would overwrite each other's weights
    def __init__(self) -> None:
        self.buffers = _Buffers()


_local = _Local()


def _empty(n: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    with torch.inference_mode(False):  # a buffer born in inference mode could not be written in training
        return torch.empty(n, dtype=dtype, device=device)


def _shared(n: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    buffers = _local.buffers.shared
    buffer = buffers.get((device, dtype))
    if buffer is None or buffer.numel() < n:
        buffer = buffers[device, dtype] = _empty(n, dtype, device)
    return buffer


def _source(base: Base) -> Tensor:
    return base.packed if isinstance(base, NF4) else base


def _made(base: Base, dtype: torch.dtype, buffer: Tensor) -> Tensor:
    weight = buffer[: torch.Size(base.shape).numel()].view(tuple(base.shape))
    return dequantise(base, dtype, out=weight) if isinstance(base, NF4) else weight.copy_(base.detach())


def _ready(base: Base, dtype: torch.dtype) -> bool:
    return not isinstance(base, NF4) and base.dtype == dtype


def plain_weight(base: Base, dtype: torch.dtype) -> Tensor:
    """`base` as a tensor of `dtype`; where that takes a conversion, in the shared buffer, valid until the next call."""
    if _ready(base, dtype):
        assert isinstance(base, Tensor)
        return base.detach()
    return _made(base, dtype, _shared(torch.Size(base.shape).numel(), dtype, base.device))


def forward_weight(base: Base, dtype: torch.dtype) -> Tensor:
    """`plain_weight`; inside a backward pass, where a forward is a recomputation, kept for `backward_weight`."""
    task = torch._C._current_graph_task_id()  # -1: no backward pass is running
    if task == -1 or _ready(base, dtype):
        return plain_weight(base, dtype)
    buffers = _local.buffers
    if buffers.task != task:
        buffers.close()
        buffers.task = task
        torch.autograd.Variable._execution_engine.queue_callback(buffers.close)
    source, n = _source(base), torch.Size(base.shape).numel()
    fits = [(buffer.numel(), at) for at, buffer in enumerate(buffers.free) if _fits(buffer, n, dtype, base.device)]
    buffer = buffers.free.pop(min(fits)[1]) if fits else _empty(n, dtype, base.device)
    buffers.kept[source.data_ptr(), dtype] = _Kept(source, buffer)
    return _made(base, dtype, buffer)


def _fits(buffer: Tensor, n: int, dtype: torch.dtype, device: torch.device) -> bool:
    return buffer.dtype == dtype and buffer.device == device and n <= buffer.numel() <= 2 * n


def backward_weight(base: Base, dtype: torch.dtype) -> Tensor:
    """The weight that the recomputation of this layer made a moment ago, else `plain_weight`. Valid until the next call
    of any function here."""
    source = _source(base)
    kept = _local.buffers.kept.pop((source.data_ptr(), dtype), None)
    if kept is None or kept.source.data_ptr() != source.data_ptr():  # fully_shard frees storage that is still held
        return plain_weight(base, dtype)
    _local.buffers.free.append(kept.buffer)
    return kept.buffer[: torch.Size(base.shape).numel()].view(tuple(base.shape))
