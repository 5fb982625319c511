"""Ids as numbers: 128-bit digests in hexadecimal as two columns of 64 bits, and finding them among millions."""

from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import pyarrow as pa

Words = npt.NDArray[np.uint64]
Places = npt.NDArray[np.int64]
_HEX = 32  # characters of an id
_NIBBLE = np.full(256, 255, np.uint8)
_NIBBLE[np.frombuffer(b"0123456789abcdef", np.uint8)] = np.arange(16, dtype=np.uint8)


def keys_of(ids: pa.ChunkedArray | pa.Array) -> Words:
    """Shape (len(ids), 2): the first and the last 64 bits of each id (curation.rows.digest). ValueError where one is
    none."""
    chunks = ids.chunks if isinstance(ids, pa.ChunkedArray) else [ids]
    return np.concatenate([np.zeros((0, 2), np.uint64), *(_of_array(chunk) for chunk in chunks)])


def _of_array(ids: pa.Array) -> Words:
    if not len(ids):
        return np.zeros((0, 2), np.uint64)
    width = np.int64 if pa.types.is_large_string(ids.type) else np.int32
    _, offsets, data = ids.buffers()
    bounds = np.frombuffer(offsets, width)[ids.offset : ids.offset + len(ids) + 1]
    raw = np.frombuffer(data or b"", np.uint8)[bounds[0] : bounds[-1]]
    if ids.null_count or len(raw) != _HEX * len(ids) or (np.diff(bounds) != _HEX).any():
        raise ValueError("an id is not of 32 hexadecimal digits")
    digits = _NIBBLE[raw]
    if (digits == 255).any():
        raise ValueError("an id is not of 32 hexadecimal digits")
    packed = (digits[0::2] << 4) | digits[1::2]
    return packed.view(">u8").astype(np.uint64).reshape(-1, 2)


@dataclass(frozen=True)
class Found:
    """Keys sorted, with the place of each: 24 bytes a key. Of equal keys the first place counts."""

    high: Words = field(default_factory=lambda: np.zeros(0, np.uint64))
    low: Words = field(default_factory=lambda: np.zeros(0, np.uint64))
    place: Places = field(default_factory=lambda: np.zeros(0, np.int64))

    @classmethod
    def of(cls, keys: Words) -> "Found":
        """The keys at places 0, 1, 2, …"""
        order = np.lexsort((keys[:, 1], keys[:, 0]))
        return cls(keys[order, 0], keys[order, 1], order.astype(np.int64))

    def __len__(self) -> int:
        return len(self.place)

    def places(self, keys: Words) -> Places:
        """The place of each key, -1 where it is not among these."""
        if not len(self) or not len(keys):
            return np.full(len(keys), -1, np.int64)
        at = np.searchsorted(self.high, keys[:, 0])
        open_ = np.arange(len(keys))
        found = np.full(len(keys), -1, np.int64)
        while len(open_):  # one round, but for keys that share their first 64 bits
            where = at[open_]
            inside = where < len(self)
            open_, where = open_[inside], where[inside]
            same = self.high[where] == keys[open_, 0]
            open_, where = open_[same], where[same]
            hit = self.low[where] == keys[open_, 1]
            found[open_[hit]] = self.place[where[hit]]
            open_ = open_[~hit]
            at[open_] += 1
        return found


def firsts(keys: Words) -> Places:
    """The first place of each distinct key, ascending."""
    order = np.lexsort((keys[:, 1], keys[:, 0]))
    ordered = keys[order]
    new = np.r_[True, (ordered[1:] != ordered[:-1]).any(axis=1)] if len(keys) else np.zeros(0, np.bool_)
    return np.sort(order[new])
