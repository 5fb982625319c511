"""The processes that train together: which of them this is, sums over all of them, and who does which packs.

torchrun starts them and says so in the environment; without it there is one, and torch.distributed is never touched.
Gradients are summed once per optimizer step, in one flat fp32 all-reduce over all parameters in the order of their
names, and not by torch's DistributedDataParallel: its hooks fire in each backward pass, so that accumulating over packs
needs no_sync and the same number of packs on every rank; it sums in buckets in the order of the graph; it divides by
the ranks instead of by the target weight; and adapters are small (42 million numbers for rank 16 on 8B: some
milliseconds between GPUs, after seconds of computing), so that there is nothing to hide behind the backward pass.
"""

import logging
import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from functools import cache
from itertools import count
from typing import Any, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import nn
from torch.distributed.distributed_c10d import PrefixStore, Store
from torch.distributed.rendezvous import rendezvous

from ..curation.folder import HouseError

T = TypeVar("T")

BUCKET = 1 << 26  # numbers of one flat all-reduce: 256 MB in fp32
PATIENCE = timedelta(days=7)  # how long ranks wait for rank 0 to curate; one that dies closes its sockets at once
COURTESY = 2.0  # seconds that silent ranks live on: torchrun ends every rank once one has ended, the speaker too
_ENVIRONMENT = (("RANK", "0"), ("WORLD_SIZE", "1"), ("LOCAL_RANK", "0"))
_opened = count()  # a world opened after another has keys of its own in the store


@dataclass(frozen=True)
class World:
    """The processes of one training; this one is `rank` of `size`, and of those on its machine the `local`th."""

    rank: int = 0
    size: int = 1
    local: int = 0

    @property
    def main(self) -> bool:
        """Whether this is the one that writes files and talks."""
        return self.rank == 0

    def total(self, tensor: torch.Tensor) -> torch.Tensor:
        """The sum of every rank's `tensor` (equal shapes and dtypes), with the same bits on every rank."""
        if self.size == 1:
            return tensor
        summed = tensor.detach().clone(memory_format=torch.contiguous_format)
        dist.all_reduce(summed)
        return summed

    def barrier(self) -> None:
        """Returns once every rank is here."""
        self.total(torch.zeros(1))

    def told(self, value: T) -> T:
        """Rank 0's `value` (anything that pickles) on every rank."""
        if self.size == 1:
            return value
        box: list[Any] = [value]
        dist.broadcast_object_list(box, src=0, device=torch.device("cpu"))
        found: T = box[0]
        return found

    def first(self, work: Callable[[], T]) -> T:
        """What `work()` returns on rank 0, on every rank; the others wait. Where it fails, all end."""
        return self.told(work() if self.main else None)  # type: ignore[return-value]


ALONE = World()


@contextmanager
def world() -> Iterator[World]:
    """This process among those that torchrun started; alone where it did not. Inside another `world()`, that one's.

    Where one rank fails, it alone says why: it claims the word at the store that all share, and the others, whose
    collectives break when it goes, end without a message. Only rank 0 logs warnings.
    """
    rank, size, local = (int(os.environ.get(name, alone)) for name, alone in _ENVIRONMENT)
    here = World(rank, size, local) if size > 1 else ALONE
    if size == 1 or dist.is_initialized():
        yield here
        return
    store = _join(here)
    logger = logging.getLogger(__package__.partition(".")[0])
    before = logger.level
    try:
        if not here.main:
            logger.setLevel(logging.CRITICAL)
        yield here
        here.barrier()  # nobody leaves, and closes the store, while another still has something to say
    except (Exception, KeyboardInterrupt) as error:
        if not _speaks(store):
            time.sleep(COURTESY)
            raise SystemExit(1) from error
        if _peer_lost(error):
            raise HouseError(
                f"rank {here.rank} of {size}: another process of this training has ended without a word (killed, or "
                "out of memory?). The same command continues from the last checkpoint"
            ) from error
        raise
    finally:
        logger.setLevel(before)
        if dist.is_initialized():
            dist.destroy_process_group()


def _join(here: World) -> Store:
    """Joins the process group (gloo for tensors on the CPU, nccl for those on CUDA) and returns its store."""
    backend = "gloo"
    if torch.cuda.is_available():
        if here.local >= torch.cuda.device_count():
            raise HouseError(
                f"rank {here.rank}: torchrun started more processes on this machine than it has GPUs "
                f"({torch.cuda.device_count()}); start as many as there are"
            )
        torch.cuda.set_device(here.local)
        backend = "cpu:gloo,cuda:nccl"
    store = PrefixStore(f"gristmill{next(_opened)}", _store())
    dist.init_process_group(backend, store=store, rank=here.rank, world_size=here.size, timeout=PATIENCE)
    return store


@cache
def _store() -> Store:
    """The store at MASTER_ADDR, held for the life of the process."""
    store: Store = next(rendezvous("env://", timeout=timedelta(minutes=10)))[0]
    store.set_timeout(PATIENCE)
    return store


def _speaks(store: Store) -> bool:
    """Whether this rank is the first to fail."""
    try:
        return int(store.add("failed", 1)) == 1
    except RuntimeError:  # the store went with the rank that held it, and that rank may have said nothing
        return True


def _peer_lost(error: BaseException) -> bool:
    lost = ("connection closed by peer", "connection reset", "gloo", "nccl", "broken pipe")
    return isinstance(error, RuntimeError) and any(word in str(error).lower() for word in lost)


def divided(costs: Sequence[float] | NDArray[np.float64], size: int) -> list[list[int]]:
    """For each of `size` ranks the places, ascending, of the packs that it does of one optimizer step.

    costs: of the step's packs, in its order (the sum of squared lengths: what attention costs; the rest costs the same
    in each full pack). Each rank gets the same number of packs, or one fewer; within that the dearest pack goes to the
    rank with least to do. A pure function of its arguments.
    """
    shares: list[list[int]] = [[] for _ in range(size)]
    loads = [0.0] * size
    rooms = [-(-(len(costs) - rank) // size) for rank in range(size)]
    for place in np.argsort(-np.asarray(costs, np.float64), kind="stable").tolist():
        rank = min((r for r in range(size) if len(shares[r]) < rooms[r]), key=lambda r: (loads[r], r))
        shares[rank].append(place)
        loads[rank] += float(costs[place])
    return [sorted(share) for share in shares]


def sum_gradients(here: World, parameters: Iterable[nn.Parameter]) -> None:
    """Puts the sum over ranks into every parameter's gradient; a rank without one adds zeros.

    Parameters come in the same order on every rank. Summed in fp32, in flat pieces of up to BUCKET numbers.
    """
    if here.size == 1:
        return
    for bucket in _buckets(list(parameters)):
        flat = torch.cat([_gradient(p).reshape(-1).float() for p in bucket])
        for parameter, summed in zip(bucket, torch.split(here.total(flat), [p.numel() for p in bucket]), strict=True):
            parameter.grad = summed.view_as(parameter).to(parameter.dtype)


def _gradient(parameter: nn.Parameter) -> torch.Tensor:
    return torch.zeros_like(parameter) if parameter.grad is None else parameter.grad


def _buckets(parameters: list[nn.Parameter]) -> Iterator[list[nn.Parameter]]:
    """Neighbours of up to BUCKET numbers together; a larger parameter alone."""
    bucket: list[nn.Parameter] = []
    size = 0
    for parameter in parameters:
        if bucket and size + parameter.numel() > BUCKET:
            yield bucket
            bucket, size = [], 0
        bucket.append(parameter)
        size += parameter.numel()
    if bucket:
        yield bucket
