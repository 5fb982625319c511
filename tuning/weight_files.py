"""Weights in a model's folder, read one tensor at a time and written in shards: a model is never held whole."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..curation.folder import HouseError, read_json, write_json

SHARD_BYTES = 4 * 2**30  # of one file; also about what is held in memory while one is made
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "U8": torch.uint8, "I8": torch.int8}

Make = Callable[[], Mapping[str, Tensor]]


class WeightFiles:
    """The tensors of a model's folder by name: of safetensors files, or of torch's .bin where there are none."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._open: dict[str, Any] = {}
        files = sorted(folder.glob("*.safetensors"))
        if (folder / INDEX).is_file():
            listed = set(read_json(folder / INDEX)["weight_map"].values())
            files = [folder / name for name in sorted(listed)]
        if lost := [path.name for path in files if not path.is_file()]:
            raise HouseError(f"{folder}: {INDEX} names {lost[0]}, which is not there: get the model again")
        for path in files:
            file: Any = safe_open(path, "pt")
            self._open |= dict.fromkeys(file.keys(), file)
        if not files:
            for path in sorted(folder.glob("pytorch_model*.bin")):
                tensors = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
                self._open |= dict.fromkeys(tensors, tensors)
        if not self._open:
            raise HouseError(f"{folder} holds no weights (*.safetensors or pytorch_model*.bin)")

    def __contains__(self, name: str) -> bool:
        return name in self._open

    def names(self) -> list[str]:
        """All names, in the files' order."""
        return list(self._open)

    def get(self, name: str) -> Tensor:
        """The tensor `name`, on the CPU. KeyError where there is none."""
        file = self._open[name]
        tensor: Tensor = file[name] if isinstance(file, Mapping) else file.get_tensor(name)
        return tensor

    def floating_dtype(self) -> torch.dtype:
        """Of the first floating-point matrix; fp32 where there is none."""
        found = (self.about(name) for name in self._open)
        return next((dtype for shape, dtype in found if len(shape) > 1 and dtype.is_floating_point), torch.float32)

    def about(self, name: str) -> tuple[tuple[int, ...], torch.dtype]:
        """Shape and dtype of `name`, without reading it."""
        file = self._open[name]
        if isinstance(file, Mapping):
            return tuple(file[name].shape), file[name].dtype
        piece = file.get_slice(name)
        return tuple(piece.get_shape()), _DTYPES.get(piece.get_dtype(), torch.float32)


def write_weights(folder: Path, parts: Iterable[tuple[int, Make]], shard_bytes: int = SHARD_BYTES) -> int:
    """Writes what each part makes, in order, as model.safetensors, or as shards of some `shard_bytes` with an index.

    parts: expected bytes of what is made, and what makes it (name -> tensor), called once. Returns the bytes."""
    shards = list(_shards(list(parts), shard_bytes))
    where: dict[str, str] = {}
    total = 0
    for number, shard in enumerate(shards, 1):
        file = SINGLE if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        tensors: dict[str, Tensor] = {}
        for make in shard:
            tensors |= {name: tensor.cpu().contiguous() for name, tensor in make().items()}
        save_file(tensors, folder / file, metadata={"format": "pt"})
        total += sum(tensor.nbytes for tensor in tensors.values())
        where |= dict.fromkeys(tensors, file)
    if len(shards) > 1:
        write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": dict(sorted(where.items()))})
    return total


def _shards(parts: list[tuple[int, Make]], limit: int) -> Iterator[list[Make]]:
    shard: list[Make] = []
    size = 0
    for expected, make in parts:
        if shard and size + expected > limit:
            yield shard
            shard, size = [], 0
        shard.append(make)
        size += expected
    yield shard
