"""The packing plan: which documents share a pack, and which packs share an optimizer step.

A pure function of lengths, capacity, policy and seed. No document is split, cut or lost. Best-fit decreasing over all
documents at once (arXiv 2404.10830 motivates it; arXiv 2107.02027 measures what padding costs without it).
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]


class Example(Protocol):
    """What a pack is built of: token ids and, aligned with them, each token's weight as a target of the loss."""

    @property
    def ids(self) -> NDArray[np.int32]: ...

    @property
    def weights(self) -> NDArray[np.float32]: ...


@dataclass(frozen=True)
class Pack:
    """Documents end to end. T tokens, D documents.

    weights[t] is the weight of tokens[t] as a target; a document's first token has none, since nothing precedes it.
    Padding is one more document of weight 0, named -1 in `documents`.
    """

    tokens: Ints  # (T,)
    positions: Ints  # (T,) from 0 in each document
    weights: NDArray[np.float32]  # (T,)
    lengths: Ints  # (D,), sum T
    documents: Ints  # (D,) indices into the examples

    @property
    def targets(self) -> Ints:
        """Indices t, ascending, of the tokens that carry a loss; the hidden state that predicts tokens[t] is t - 1."""
        return np.flatnonzero(self.weights)

    @property
    def owners(self) -> Ints:
        """(T,) for each token the place (0 to D-1) of its document in the pack."""
        return np.repeat(np.arange(len(self.lengths)), self.lengths)

    @property
    def size(self) -> int:
        """Tokens, padding left out."""
        return int(self.lengths[self.documents >= 0].sum())


def pack_plan(lengths: NDArray[np.integer], capacity: int) -> list[Ints]:
    """Global best-fit decreasing: documents in descending length, each into the fullest pack that still holds it.

    lengths: tokens of each document, at least 1. capacity: tokens of one pack, any positive number.
    Returns for each pack the indices of its documents, shortest first (attention batches equal lengths); every document
    is in exactly one pack. Equal input gives an equal plan. A million documents take some seconds. ValueError for a
    document that fits in no pack.
    """
    lengths = np.asarray(lengths, np.int64)
    if len(lengths) and not 1 <= lengths.min() <= lengths.max() <= capacity:
        raise ValueError(f"lengths from {lengths.min()} to {lengths.max()} do not fit packs of 1 to {capacity} tokens")
    packs: list[list[int]] = []
    by_room: list[list[int]] = [[] for _ in range(capacity + 1)]  # packs by the tokens that they still hold
    open_rooms = 0  # bit r is set where by_room[r] is not empty: the best fit is one shift and one lowest bit
    order = np.argsort(-lengths, kind="stable")
    for document, length in zip(order.tolist(), lengths[order].tolist(), strict=True):
        fitting = open_rooms >> length
        if fitting:
            room = length + (fitting & -fitting).bit_length() - 1
            pack = by_room[room].pop()
            if not by_room[room]:
                open_rooms ^= 1 << room
            packs[pack].append(document)
        else:
            room, pack = capacity, len(packs)
            packs.append([document])
        room -= length
        if room:
            by_room[room].append(pack)
            open_rooms |= 1 << room
    return [np.asarray(pack[::-1], np.int64) for pack in packs]


def build_pack(examples: Sequence[Example], documents: Sequence[int] | Ints, pad_to: int | None = None) -> Pack:
    """The examples named by `documents`, in that order, as one pack, padded with token 0 to `pad_to` tokens."""
    chosen = [examples[index] for index in documents]
    lengths = [len(example.ids) for example in chosen]
    names = [int(index) for index in documents]
    missing = 0 if pad_to is None else pad_to - sum(lengths)
    if missing < 0:
        raise ValueError(f"{sum(lengths)} tokens do not fit a pack of {pad_to}")
    tokens = [example.ids for example in chosen]
    weights = [example.weights for example in chosen]
    if missing:
        lengths.append(missing)
        names.append(-1)
        tokens.append(np.zeros(missing, np.int32))
        weights.append(np.zeros(missing, np.float32))
    sizes = np.asarray(lengths, np.int64)
    starts = np.cumsum(sizes) - sizes
    weight = np.concatenate(weights).astype(np.float32)
    weight[starts] = 0.0
    return Pack(
        tokens=np.concatenate(tokens).astype(np.int64),
        positions=np.arange(sizes.sum()) - np.repeat(starts, sizes),
        weights=weight,
        lengths=sizes,
        documents=np.asarray(names, np.int64),
    )


def target_tokens(example: Example) -> int:
    """Tokens of the example that carry a loss: those of a weight other than 0, the first token never."""
    return int(np.count_nonzero(example.weights[1:]))


def pack_costs(plan: Sequence[Ints], squares: NDArray[np.float64]) -> NDArray[np.float64]:
    """What attention costs in each pack: the sum of its documents' squared lengths. squares: of each document."""
    return np.asarray([squares[pack].sum() for pack in plan], np.float64)


def step_plan(costs: NDArray[np.float64], packs_per_step: int, epoch: int, seed: int) -> list[list[int]]:
    """One epoch's optimizer steps: every pack once, in an order drawn from (seed, epoch).

    costs: of each pack (pack_costs). Packs are cut by cost into `packs_per_step` classes and each full step takes one
    pack of each class, so that steps cost about the same; the packs left over make a partial last step.
    """
    draw = np.random.default_rng([seed, epoch])
    order = draw.permutation(len(costs))
    full = len(costs) // packs_per_step
    whole, rest = order[: full * packs_per_step], order[full * packs_per_step :]
    classes = whole[np.argsort(-costs[whole], kind="stable")].reshape(packs_per_step, full)
    steps = [sorted(step) for step in draw.permuted(classes, axis=1).T.tolist()]
    return [*steps, sorted(rest.tolist())] if len(rest) else steps


def plan_digest(lengths: NDArray[np.integer], capacity: int, policy: str, seed: int) -> str:
    """SHA-256 of all that a plan is a function of."""
    state = hashlib.sha256(f"{capacity} {policy} {seed} {len(lengths)} ".encode())
    state.update(np.ascontiguousarray(lengths, np.int64).tobytes())
    return state.hexdigest()
