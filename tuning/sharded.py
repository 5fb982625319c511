"""One model over several ranks: whole on each (ddp), or its decoder blocks in pieces (fsdp).

fsdp is torch's `fully_shard` (FSDP2; arXiv 2304.11277) on every decoder block. A block's frozen weights (bf16 and fp32
as they are, NF4 as its bytes) and its trained ones lie in rows on the ranks, are gathered for its forward and again for
its backward, and their gradients are summed to the rank that holds the rows, as is the optimizer's state. fully_shard
takes parameters alone and gathers parameters of several dtypes as bytes, so that NF4's packed codes and block constants
become frozen uint8 and fp32 parameters; buffers would stay whole. Embeddings, last norm and output layer stay whole on
every rank, since `target_logprobs` needs the head outside the model's forward (1 GB for 128,256 x 4,096 in bf16).

Each rank reads the whole model before it keeps its rows: an NF4 base quantised on its GPU as it is read (41 GB of a
70B), any other base whole in the host's memory first. `memory.loading` says how much.

Every rank must run the same number of forwards and backwards: `Spread.turns` gives one that has no pack left two tokens
whose loss counts nothing.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from ..curation.folder import HouseError
from .adapted import FrozenLinear
from .attention import hidden_states
from .ranks import World, sum_gradients

Parallel = Literal["ddp", "fsdp"]
SMALL = 1 << 12  # numbers of an NF4 tensor (nested constants, code books) that is not worth a piece on each rank


@dataclass(frozen=True)
class Rows:
    """The rows start to start + count, of `total`, of a parameter's first dimension, that this rank holds."""

    start: int
    count: int
    total: int

    def of(self, whole: Tensor) -> Tensor:
        """This rank's rows of a whole tensor."""
        return whole.narrow(0, self.start, self.count)


@dataclass(frozen=True)
class Spread:
    """A model over ranks. parameters: what the optimizer of this rank updates, by the names of the model's trainable
    parameters: the parameter itself or, where `rows` names it, a plain view of this rank's rows of it."""

    here: World
    model: PreTrainedModel
    parameters: dict[str, nn.Parameter]
    rows: dict[str, Rows] = field(default_factory=dict)

    @property
    def sharded(self) -> bool:
        return isinstance(self.model.base_model, FSDPModule)

    def turns(self, shares: Sequence[Sequence[int]], learn: bool) -> Iterator[int]:
        """What of `shares` (one for each rank) falls to this rank. A rank of a sharded model that is done before others
        goes on with forwards, and where it learns backwards, that count nothing; the last backward sums gradients."""
        mine = shares[self.here.rank]
        rounds = max(map(len, shares)) if self.sharded else len(mine)
        for turn in range(rounds):
            if isinstance(self.model.base_model, FSDPModule):
                self.model.base_model.set_requires_gradient_sync(turn == rounds - 1)
            if turn < len(mine):
                yield mine[turn]
            else:
                self._idle(learn)

    def _idle(self, learn: bool) -> None:
        device = next(self.model.parameters()).device
        with torch.set_grad_enabled(learn):
            states = hidden_states(
                self.model, torch.zeros(2, dtype=torch.int64, device=device), torch.arange(2, device=device), [2]
            )
            if learn:
                torch.autograd.backward((states * 0).sum())

    def own(self, name: str, whole: Tensor) -> Tensor:
        """Of a whole tensor, called ROLE/PARAMETER, what this rank holds: its rows of a sharded parameter's."""
        rows = self.rows.get(name.rpartition("/")[2])
        return whole if rows is None or not whole.ndim else rows.of(whole)

    def pieces(self, tensors: Mapping[str, Tensor]) -> set[str]:
        """Names, ROLE/PARAMETER, of those tensors of which this rank holds its rows alone."""
        return {name for name, tensor in tensors.items() if name.rpartition("/")[2] in self.rows and tensor.ndim}

    def sum_gradients(self) -> None:
        """After the last backward of a step: the sum over ranks of every gradient, in `parameters`."""
        for name, parameter in self.model.named_parameters() if self.rows else ():
            if name in self.rows:
                own, grad = self.parameters[name], parameter.grad
                own.grad = torch.zeros_like(own) if grad is None else _local(grad)
                parameter.grad = None
        sum_gradients(self.here, (p for name, p in self.parameters.items() if name not in self.rows))

    def clip(self, largest: float) -> float:
        """The norm of all gradients over all ranks, before they are scaled so that it is at most `largest`.

        As nn.utils.clip_grad_norm_ does; the squares are summed in fp32 within a tensor, in fp64 over tensors.
        """
        gradients = {name: p.grad for name, p in self.parameters.items() if p.grad is not None}
        squares = {name: grad.square().sum(dtype=torch.float32).double().cpu() for name, grad in gradients.items()}
        zero = torch.zeros((), dtype=torch.float64)
        pieces = sum((square for name, square in squares.items() if name in self.rows), zero)
        whole = sum((square for name, square in squares.items() if name not in self.rows), zero)
        norm = float((self.here.total(pieces) + whole).sqrt())
        scale = min(1.0, largest / (norm + 1e-6))
        for gradient in gradients.values():
            gradient.mul_(scale)
        return norm

    @contextmanager
    def whole(self) -> Iterator[None]:
        """Inside, on rank 0, every trained parameter of the model is whole and, if sharded, on the CPU: to save it."""
        kept = {name: _owner(self.model, name) for name in self.rows}
        shards = {name: module._parameters[leaf] for name, (module, leaf) in kept.items()}
        try:
            for name, (module, leaf) in kept.items():
                shard = shards[name]
                assert isinstance(shard, DTensor)
                full = shard.detach().full_tensor()
                module._parameters[leaf] = nn.Parameter(full.cpu() if self.here.main else full.new_empty(0))
            yield
        finally:
            for name, (module, leaf) in kept.items():
                module._parameters[leaf] = shards[name]


def spread(model: PreTrainedModel, here: World, parallel: Parallel) -> Spread:
    """`model`, with its adapters if any and on its device, over the ranks of `here`; ddp leaves it as it is."""
    if parallel == "fsdp" and here.size > 1:
        return _sharded(model, here)
    return Spread(here, model, {name: p for name, p in model.named_parameters() if p.requires_grad})


def _sharded(model: PreTrainedModel, here: World) -> Spread:
    blocks: Any = getattr(model.base_model, "layers", None)
    if not isinstance(blocks, nn.ModuleList):
        raise HouseError(f"{type(model).__name__} has no decoder blocks at base_model.layers: train it with ddp")
    mesh = init_device_mesh(next(model.parameters()).device.type, (here.size,))
    for block in blocks:
        _bytes_as_parameters(block)
        shard = fully_shard(block, mesh=mesh)
        shard.set_gradient_divide_factor(1.0)  # sums: the loss is divided by the step's weight over all ranks already
        shard.set_force_sum_reduction_for_comms(True)  # gloo knows no scaled sum
    root: Any = model.base_model
    inside = {parameter for block in blocks for parameter in block.parameters()}
    fully_shard(root, mesh=mesh, ignored_params=set(root.parameters()) - inside)
    parameters, rows = {}, {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            parameters[name] = parameter
            if isinstance(parameter, DTensor):
                parameters[name] = nn.Parameter(_local(parameter.detach()))
                rows[name] = rows_of(parameter.shape[0], here)
    return Spread(here, model, parameters, rows)


def rows_of(total: int, here: World) -> Rows:
    """The rows that fully_shard gives a rank: equal pieces, rounded up, from the first rank on."""
    piece = -(-total // here.size)
    start = min(here.rank * piece, total)
    return Rows(start, min(piece, total - start), total)


def _bytes_as_parameters(block: nn.Module) -> None:
    """Turns the large NF4 buffers of a block into frozen parameters of the same names."""
    for module in block.modules():
        if not isinstance(module, FrozenLinear) or module._nf4 is None:
            continue
        large = {name: tensor for name, tensor in module._nf4.tensors().items() if tensor.numel() >= SMALL}
        for name in large:
            buffer = module._buffers.pop(f"nf4_{name}")
            assert buffer is not None
            module.register_parameter(f"nf4_{name}", nn.Parameter(buffer, requires_grad=False))
        gone: dict[str, Any] = {name: tensor.new_empty(0) for name, tensor in large.items()}
        module._nf4 = replace(module._nf4, **gone)  # it would hold all bytes until the first forward


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _owner(model: nn.Module, name: str) -> tuple[nn.Module, str]:
    path, _, leaf = name.rpartition(".")
    return model.get_submodule(path), leaf
