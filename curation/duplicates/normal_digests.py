"""128-bit digests of rows under `text.normal`: a compiled kernel reads ASCII text in Arrow's buffers; only rows with
other characters are normalised in Python, and then meet the same kernel."""

from collections.abc import Iterable
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from ..text.spans import Ints, Spans, Units, spans, string_spans, turn_spans
from ..text.view import VIEW_COLUMNS, View, normal
from .groups import Said, groups, same_only
from .shingles import Hashes, compiled, in_threads, mixed

_P1, _P2 = np.uint64(0x9E3779B97F4A7C15), np.uint64(0xD6E8FEB86659FD93)
_SPACE = np.uint64(32)


def said_digests(tables: Iterable[pa.Table], units: Units, least: int, threads: int = 0) -> tuple[Said, Ints, Hashes]:
    """What the rows of `tables` say, equal where their normal forms are; the characters that each row says; and the
    digest of each text (the second half is 0 where a text equals no other)."""
    keys, lengths, owners = [np.zeros((0, 2), np.uint64)], [np.zeros(0, np.int32)], [np.zeros(0, np.int32)]
    seen = 0
    for rows in tables:
        for batch in rows.select(VIEW_COLUMNS).to_batches():
            if units == "turn":
                text, owner = turn_spans(batch, least)
                said, empty, length = _normal_digests(text, threads)
                keys.append(said[~empty])
                owners.append((owner[~empty] + seen).astype(np.int32))
                length = np.bincount(owner, length, batch.num_rows)
            else:
                said, empty, length = normal_digests(batch, units, threads)
                blank = np.flatnonzero(empty)
                if units != "pair" and len(blank):  # alone, unless the whole row is empty
                    blank = blank[~normal_digests(batch.take(pa.array(blank)), "pair")[1]]
                    said[blank] = np.stack([blank + seen, np.zeros(len(blank), np.int64)], axis=1)
                keys.append(said)
            lengths.append(length.astype(np.int32))
            seen += batch.num_rows
    row = np.concatenate(owners) if units == "turn" else None
    digests = np.concatenate(keys)
    texts = Said(seen, same_only(groups(digests)), row)
    return texts, np.concatenate(lengths), digests[texts.first()]


def normal_digests(rows: pa.RecordBatch, which: View, threads: int = 0) -> tuple[Hashes, npt.NDArray[np.bool_], Ints]:
    """For each row: a digest (two columns) of the normal form of its view; whether that is empty; and the characters of
    the view before normalising. Digests of unequal normal forms are equal with a probability of 2^-128 a pair."""
    return _normal_digests(spans(rows, which), threads)


def _normal_digests(text: Spans, threads: int) -> tuple[Hashes, npt.NDArray[np.bool_], Ints]:
    keys, empty, ascii_only, lengths = _digests(text, threads)
    other = np.flatnonzero(~ascii_only)
    if len(other):
        again = string_spans(pa.array([normal(_text(text, unit)) for unit in other], pa.string()))
        keys[other], empty[other], _, _ = _digests(again, threads)
    return keys, empty, lengths


def _text(text: Spans, unit: int) -> str:
    """The turns of a unit parted by white space: `normal` takes any white space for the same."""
    pieces = [
        bytes(text.text[text.starts[turn] : text.ends[turn]]).decode("utf-8", "replace")
        for part in range(3)
        for turn in range(text.ranges[unit, 2 * part], text.ranges[unit, 2 * part + 1])
    ]
    return "\n\n".join(pieces)


def _digests(text: Spans, threads: int) -> tuple[Hashes, Any, Any, Ints]:
    count = len(text)
    keys, lengths = np.empty((count, 2), np.uint64), np.empty(count, np.int64)
    empty, ascii_only = np.empty(count, np.bool_), np.empty(count, np.bool_)

    def block(rows: tuple[int, int]) -> None:
        part = slice(*rows)
        results = (keys[part], empty[part], ascii_only[part], lengths[part])
        _digest_rows(text.text, text.starts, text.ends, text.ranges[part], *results)

    in_threads(block, text.blocks(), threads)
    return keys, empty, ascii_only, lengths


@compiled
def _digest_rows(text, starts, ends, ranges, keys, empty, ascii_only, lengths):  # type: ignore[no-untyped-def]
    """ASCII as `normal` has it: lower case, white space (9-13, 28-32) collapsed, a turn's end being white space; other
    bytes as they are."""
    for row in range(ranges.shape[0]):
        one, two, met, characters = _P1, _P2, np.uint64(0), 0
        gap, begun = False, False
        for part in range(3):
            for turn in range(ranges[row, 2 * part], ranges[row, 2 * part + 1]):
                gap = True
                for at in range(np.uint64(starts[turn]), np.uint64(ends[turn])):
                    byte = np.uint64(text[at])
                    met |= byte
                    characters += (byte & np.uint64(0xC0)) != np.uint64(0x80)
                    if byte <= 32 and (byte >= 28 or (byte >= 9 and byte <= 13)):
                        gap = True
                        continue
                    if gap and begun:
                        one, two = (one ^ _SPACE) * _P1, (two + _SPACE) * _P2
                    if byte >= 65 and byte <= 90:
                        byte += _SPACE
                    one, two = (one ^ byte) * _P1, (two + byte) * _P2
                    one ^= one >> _SPACE
                    gap, begun = False, True
        keys[row, 0], keys[row, 1] = mixed(one), mixed(two)
        empty[row], ascii_only[row], lengths[row] = not begun, met < 128, characters
