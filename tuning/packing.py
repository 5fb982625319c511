"""The packing plan and its packs: which units share a pack, how a unit's answers share their prompt, and which packs
share an optimizer step.

A pure function of lengths, capacity, policy and seed. No unit is split, cut or lost. Best-fit decreasing over all units
at once (arXiv 2404.10830 motivates it; arXiv 2107.02027 measures what padding costs without it). The answers of one
prompt form a tree: what they have in common lies once in the pack, and each answer continues it (arXiv 2410.20305).
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]
Floats = NDArray[np.float32]


class Example(Protocol):
    """What a pack is built of: token ids and, aligned with them, each token's weight as a target of the loss."""

    @property
    def ids(self) -> NDArray[np.int32]: ...

    @property
    def weights(self) -> Floats: ...


@dataclass(frozen=True)
class Pack:
    """One row of T tokens: S segments end to end, which hold D documents (answers after their prompts).

    A document is one segment, or a segment that others share and its own that continues it. Every document has an entry
    for each token that it is trained on; a token that several documents share and train is one target with an entry
    for each. So M entries are what the documents would have unshared, and each of the N targets is predicted once.
    Padding is one more segment, without a document.
    """

    tokens: Ints  # (T,) as the model reads them; a corruption of the input may replace them
    positions: Ints  # (T,) from 0 in each document
    lengths: Ints  # (S,) of the segments, sum T
    parents: Ints  # (S,) the segment, before it, that a segment continues; -1: none. Parents have no parents
    targets: Ints  # (N,) ascending places of the tokens that carry a loss; never a document's first token
    sources: Ints  # (N,) places of the tokens whose final hidden state predicts them
    ids: Ints  # (N,) the target tokens themselves
    entries: Ints  # (M,) indices into targets, document after document
    weights: Floats  # (M,) of the entry in the loss, never 0
    owners: Ints  # (M,) the entry's document, 0 … D-1 in the pack's order, ascending
    documents: Ints  # (D,) indices into the examples
    padding: int  # tokens of the last segment where it is padding, else 0

    @property
    def size(self) -> int:
        """Tokens, padding left out."""
        return len(self.tokens) - self.padding


def pack_plan(lengths: NDArray[np.integer], capacity: int) -> list[Ints]:
    """Global best-fit decreasing: units in descending length, each into the fullest pack that still holds it.

    lengths: tokens of each unit, at least 1. capacity: tokens of one pack, any positive number.
    Returns for each pack the indices of its units, shortest first (attention batches equal lengths); every unit is in
    exactly one pack. Equal input gives an equal plan. ValueError for a unit that fits in no pack.

    Units of one length are interchangeable: the rule puts them into the fullest pack that holds one until it holds no
    more, then into the next of equal room. So packs of equal room take their units of one length in one go, and a
    million units cost some hundred thousand operations.
    """
    lengths = np.asarray(lengths, np.int64)
    if not len(lengths):
        return []
    if not 1 <= lengths.min() <= lengths.max() <= capacity:
        raise ValueError(f"lengths from {lengths.min()} to {lengths.max()} do not fit packs of 1 to {capacity} tokens")
    rooms, filled, shares = _Rooms(capacity), list[int](), list[int]()  # packs in the order of filling, units of each
    packs = 0
    sizes, counts = np.unique(lengths, return_counts=True)
    for length, left in zip(sizes[::-1].tolist(), counts[::-1].tolist(), strict=True):
        while left:
            room = rooms.least(length)
            if room is None:
                room, many = capacity, max(1, left // (capacity // length))
                taken = list(range(packs, packs + many))
                packs += many
            else:
                taken = rooms.take(room, max(1, left // (room // length)))
            share = min(left, room // length)
            filled += taken
            shares += [share] * len(taken)
            left -= share * len(taken)
            rooms.put(room - share * length, taken)
    order = np.argsort(-lengths, kind="stable")
    pack_of = np.repeat(np.asarray(filled, np.int64), np.asarray(shares, np.int64))
    by_pack = order[::-1][np.argsort(pack_of[::-1], kind="stable")]
    ends = list(accumulate(np.bincount(pack_of, minlength=packs).tolist()))
    return [by_pack[start:stop] for start, stop in zip([0, *ends], ends, strict=False)]


class _Rooms:
    """Open packs by the tokens that they still hold: stacks, and a bitmap of two levels over the rooms with one."""

    def __init__(self, capacity: int) -> None:
        self._stacks: dict[int, list[int]] = {}
        self._shift = max(6, capacity.bit_length() // 2)
        self._low = (1 << self._shift) - 1
        self._words: dict[int, int] = {}
        self._summary = 0

    def least(self, length: int) -> int | None:
        """The least room of any open pack that holds `length` tokens."""
        index = length >> self._shift
        place = length & self._low
        word = self._words.get(index, 0) >> place
        if not word:
            above = self._summary >> (index + 1)
            if not above:
                return None
            index += (above & -above).bit_length()
            word, place = self._words[index], 0
        return (index << self._shift) + place + (word & -word).bit_length() - 1

    def take(self, room: int, most: int) -> list[int]:
        """At most `most` packs of that room, the one put last first."""
        stack = self._stacks[room]
        taken = stack[-most:]
        taken.reverse()
        del stack[-most:]
        if not stack:
            index = room >> self._shift
            self._words[index] ^= 1 << (room & self._low)
            if not self._words[index]:
                self._summary ^= 1 << index
        return taken

    def put(self, room: int, packs: list[int]) -> None:
        if room:
            self._stacks.setdefault(room, []).extend(packs)
            index = room >> self._shift
            self._words[index] = self._words.get(index, 0) | 1 << (room & self._low)
            self._summary |= 1 << index


def shared_tokens(examples: Sequence[Example]) -> int:
    """Tokens from the first on that all of these documents have in common, so that one of each stays its own."""
    if len(examples) == 1:
        return 0
    first, *others = (example.ids for example in examples)
    common = max(0, min(len(first), *(len(ids) for ids in others)) - 1)
    for ids in others:
        differing = first[:common] != ids[:common]
        common = int(differing.argmax()) if differing.any() else common
    return common


def tree_size(lengths: Sequence[int], shared: int) -> int:
    """Tokens of a tree of documents of these lengths, of which `shared` lie once."""
    return sum(lengths) - shared * (len(lengths) - 1)


def tree_square(lengths: Sequence[int], shared: int) -> int:
    """What attention costs over a tree, as the squared length of a document of equal cost: shared tokens see
    themselves, each answer's own see both."""
    return sum(length**2 for length in lengths) - (len(lengths) - 1) * shared**2


def build_pack(
    examples: Sequence[Example],
    documents: Sequence[int] | Ints,
    pad_to: int | None = None,
    *,
    trees: Sequence[int] | None = None,
) -> Pack:
    """The examples named by `documents`, in that order, as one pack, padded with token 0 to `pad_to` tokens.

    trees: how many documents in a row share their common beginning, again and again; None: none does. ValueError where
    they are too long for `pad_to`, or trees do not sum to the documents."""
    names = [int(index) for index in documents]
    chosen = [examples[index] for index in names]
    widths = [1] * len(names) if trees is None else [int(width) for width in trees]
    if sum(widths) != len(names):
        raise ValueError(f"trees of {sum(widths)} documents do not fit {len(names)} documents")
    layout = _Layout()
    start = 0
    for width in widths:
        layout.add(chosen[start : start + width])
        start += width
    padding = 0 if pad_to is None else pad_to - layout.size
    if padding < 0:
        raise ValueError(f"{layout.size} tokens do not fit a pack of {pad_to}")
    if padding:
        layout.segment(np.zeros(padding, np.int32), 0, -1)
    tokens, lengths = _joined(layout.tokens, np.int64), np.asarray(layout.lengths, np.int64)
    begins = np.cumsum(lengths) - lengths
    places = _joined(layout.places, np.int64)
    targets, first, entries = np.unique(places, return_index=True, return_inverse=True)
    return Pack(
        tokens=tokens,
        positions=np.arange(len(tokens)) + np.repeat(np.asarray(layout.offsets, np.int64) - begins, lengths),
        lengths=lengths,
        parents=np.asarray(layout.parents, np.int64),
        targets=targets,
        sources=_joined(layout.sources, np.int64)[first],
        ids=tokens[targets],
        entries=entries.astype(np.int64),
        weights=_joined(layout.weights, np.float32),
        owners=np.repeat(np.arange(len(chosen)), [len(weights) for weights in layout.weights]),
        documents=np.asarray(names, np.int64),
        padding=padding,
    )


class _Layout:
    """Segments and entries of a pack while it is put together; entries document by document."""

    def __init__(self) -> None:
        self.size = 0
        self.tokens: list[NDArray[np.int32]] = []
        self.lengths: list[int] = []
        self.offsets: list[int] = []  # position of each segment's first token
        self.parents: list[int] = []
        self.places: list[Ints] = []
        self.sources: list[Ints] = []
        self.weights: list[Floats] = []

    def segment(self, ids: NDArray[np.int32], offset: int, parent: int) -> int:
        """Appends a segment; where it starts."""
        start = self.size
        self.tokens.append(ids)
        self.lengths.append(len(ids))
        self.offsets.append(offset)
        self.parents.append(parent)
        self.size += len(ids)
        return start

    def add(self, examples: Sequence[Example]) -> None:
        """Appends documents that share their common beginning."""
        shared = shared_tokens(examples)
        parent, root = -1, 0
        if shared:
            root = self.segment(examples[0].ids[:shared], 0, -1)
            parent = len(self.lengths) - 1
        for example in examples:
            if not len(example.ids):
                self._entries(np.empty(0, np.int64), np.empty(0, np.int64), np.empty(0, np.float32))
                continue
            start = self.segment(example.ids[shared:], shared, parent)
            trained = np.flatnonzero(example.weights)
            trained = trained[trained > 0]
            places = np.where(trained < shared, root, start - shared) + trained
            sources = np.where(trained == shared, root + shared, places) - 1  # a first own token follows the shared
            self._entries(places, sources, example.weights[trained].astype(np.float32))

    def _entries(self, places: Ints, sources: Ints, weights: Floats) -> None:
        self.places.append(places)
        self.sources.append(sources)
        self.weights.append(weights)


def _joined(parts: Sequence[NDArray[Any]], dtype: type[np.generic]) -> NDArray[Any]:
    joined: NDArray[Any] = np.concatenate([np.empty(0, dtype), *parts]).astype(dtype)
    return joined


def target_tokens(example: Example) -> int:
    """Tokens of the example that carry a loss: those of a weight other than 0, the first token never."""
    return int(np.count_nonzero(example.weights[1:]))


def pack_costs(plan: Sequence[Ints], squares: NDArray[np.float64]) -> NDArray[np.float64]:
    """What attention costs in each pack: the sum of its units' squared lengths. squares: of each unit (tree_square)."""
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
