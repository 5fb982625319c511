"""Units: what is packed as one. An example, an answer that is good or bad, or all answers to one prompt.

Of a prompt's answers, what they have in common (the prompt and the answers' own common beginning) is counted and packed
once, unless `shared` is False; either way they are the same documents to every loss.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Literal

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from .chat import Tokens
from .packing import Ints, Pack, build_pack, shared_tokens, target_tokens, tree_size, tree_square

Family = Literal["tokens", "pairs", "unpaired", "lists"]
"""What a loss is a loss of: weighted tokens (SFT), chosen and rejected, single answers with a label (KTO), or lists of
answers with rewards."""


@dataclass(frozen=True)
class Units:
    """U units over D documents, in the order of their rows; unit u is documents[first[u] : first[u + 1]].

    A document is an example or a prompt with one answer; a pair's are chosen, then rejected; a list's are its distinct
    answers in the order of its rows. labels: whether a document is desirable (unpaired). rewards: of each document
    (lists). tasks: index of each unit's source in task_names (where the rows name sources). members: ids of all rows
    of each unit (lists; else each unit is of its one row). shared: whether a pack holds what documents of a unit have
    in common once.

    excluded: row_id, reason (too_long, no_target, equal_answers, equal_rewards, no_label), tokens of the row's longest
    unit. truncated: row_id, tokens that were left, tokens that were cut from the head of each document.
    """

    row_ids: list[str]  # (U,)
    documents: list[Tokens]  # (D,)
    first: Ints  # (U + 1,)
    excluded: pa.Table
    truncated: pa.Table
    shared: bool = True
    labels: NDArray[np.bool_] | None = None  # (D,)
    rewards: NDArray[np.float32] | None = None  # (D,)
    tasks: NDArray[np.int32] | None = None  # (U,)
    task_names: tuple[str, ...] = ()
    members: list[tuple[str, ...]] | None = None  # (U,)

    @cached_property
    def widths(self) -> Ints:
        """(U,) documents of each unit."""
        return np.diff(self.first)

    @cached_property
    def lengths(self) -> Ints:
        """(U,) tokens of each unit in a pack."""
        return np.asarray([tree_size(*tree) for tree in self._trees], np.int64)

    @cached_property
    def squares(self) -> NDArray[np.float64]:
        """(U,) what attention costs over each unit (packing.tree_square)."""
        return np.asarray([tree_square(*tree) for tree in self._trees], np.float64)

    @cached_property
    def document_lengths(self) -> Ints:
        """(D,) tokens of each document, its prompt included."""
        return np.asarray([len(document.ids) for document in self.documents], np.int64)

    @cached_property
    def weights(self) -> NDArray[np.float64]:
        """(U,) sum of each unit's target weights, over all its documents."""
        return self._sums([float(document.weights[1:].sum(dtype=np.float64)) for document in self.documents])

    @cached_property
    def targets(self) -> Ints:
        """(U,) target tokens of each unit, over all its documents."""
        return self._sums([target_tokens(document) for document in self.documents]).astype(np.int64)

    def documents_of(self, units: Ints) -> Ints:
        """Indices of the documents of these units, in their order."""
        starts, widths = self.first[units], self.widths[units]
        inside = np.arange(widths.sum()) - np.repeat(np.cumsum(widths) - widths, widths)
        places: Ints = np.repeat(starts, widths) + inside
        return places

    def rows_of(self, units: Ints) -> tuple[list[str], Ints]:
        """Ids of all rows of these units, and for each the place of its unit in `units`."""
        if self.members is None:
            return [self.row_ids[unit] for unit in units], np.arange(len(units))
        own = [self.members[unit] for unit in units]
        return [row_id for some in own for row_id in some], np.repeat(
            np.arange(len(units)), [len(some) for some in own]
        )

    def pack(self, units: Ints, pad_to: int | None = None) -> Pack:
        """These units' documents as one pack, in order."""
        trees = self.widths[units].tolist() if self.shared else None
        return build_pack(self.documents, self.documents_of(units), pad_to, trees=trees)

    @cached_property
    def _trees(self) -> list[tuple[list[int], int]]:
        """Of each unit the lengths of its documents and the tokens that they share."""
        ends = self.first.tolist()
        units = [self.documents[start:stop] for start, stop in pairwise(ends)]
        return [([len(d.ids) for d in own], shared_tokens(own) if self.shared else 0) for own in units]

    def _sums(self, of_documents: Sequence[float]) -> NDArray[np.float64]:
        sums = np.concatenate([[0.0], np.cumsum(np.asarray(of_documents, np.float64))])
        exact: NDArray[np.float64] = np.diff(sums[self.first])
        return exact


def kl_units(units: Units, chosen: Ints, capacity: int, context: int | None = None) -> Units:
    """Mismatched documents for KTO's KL term (arXiv 2402.01306, section 4.1): each chosen unit's prompt before the
    answer of another one.

    units: unpaired ones. chosen: those to match with each other, in order (of a step; or all, so that what a reference
    says of them can be kept on disk). Row i's prompt gets the answer of row i + r of them, cyclically, where r is the
    least shift under which fewest rows meet an answer to their own prompt (data sets list a prompt's good and bad
    answers side by side); of one row alone it is the row's own. An answer begins at its first target token. Where
    prompt and answer exceed `capacity` or `context`, the prompt loses its head. Unit i of the result is of chosen[i]'s
    row, labelled as that row is.
    """
    limit = capacity if context is None else min(capacity, context)
    documents = [units.documents[place] for place in units.documents_of(chosen)]
    starts = [int(np.flatnonzero(document.weights)[0]) for document in documents]
    prompts = [document.ids[:start] for document, start in zip(documents, starts, strict=True)]
    shift = _shift([prompt.tobytes() for prompt in prompts])
    mixed = []
    for place, prompt in enumerate(prompts):
        other = (place + shift) % len(documents)
        answer, weights = documents[other].ids[starts[other] :], documents[other].weights[starts[other] :]
        prompt = prompt[max(0, len(prompt) + len(answer) - limit) :]
        mixed.append(
            Tokens(np.concatenate([prompt, answer]), np.concatenate([np.zeros(len(prompt), np.float32), weights]))
        )
    return Units(
        row_ids=[units.row_ids[unit] for unit in chosen],
        documents=mixed,
        first=np.arange(len(mixed) + 1),
        excluded=units.excluded.slice(0, 0),
        truncated=units.truncated.slice(0, 0),
        labels=None if units.labels is None else units.labels[units.documents_of(chosen)],
    )


def _shift(prompts: Sequence[bytes]) -> int:
    """The least shift, from 1, that brings fewest prompts onto an equal one."""
    kinds = np.unique(np.asarray(prompts, object), return_inverse=True)[1]
    met = [int((kinds == np.roll(kinds, -shift)).sum()) for shift in range(1, min(len(kinds), 64))]
    return 1 + int(np.argmin(met)) if met else 0
