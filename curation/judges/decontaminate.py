"""Decontamination: training rows that hold the items of evaluation sets are dropped, with the matched text as evidence.

The evaluation sets' n-grams are indexed and the training rows streamed past them. A hash only proposes a match: every
match is verified word by word, so that there are no false ones.
"""

import itertools
import json
import re
import unicodedata
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from ..folder import HouseError
from ..reading.source import Source, Unreadable, iter_rows
from ..steps import Corpus, Unmeasured, verdicts
from ..text import VIEW_COLUMNS, WORD, prompt_of, response_of, view, words

Ints = npt.NDArray[np.int64]

PROMPT, ANSWER = 0, 1  # kinds of fields
LEAST_WORDS = 4  # shorter fields ("yes") are not looked for
LONG_FIELD = 13  # words from which on an answer, or a question without its options, is looked for by itself
SHOWN_WORDS = 200  # of the matched text, in the evidence
_BLOCK = 4096  # training rows at a time
_FILTER_BITS = 24  # 16 MB: one byte per bucket, 0.07 of them set by a million n-grams


@dataclass(frozen=True)
class Decontaminate(Unmeasured):
    """Drops rows that hold an item of an evaluation set (TÜLU 3, arXiv 2411.15124, section 3.2).

    against: files or addresses of evaluation sets, of any shape that reading knows. n: words of an n-gram (case-folded
    runs of letters and digits, so that punctuation and case hide nothing). coverage: a field of an item is covered by
    the share of its words that lie in n-grams found in the one training row; an item by its prompt, or, where that is
    more, by the mean of prompt and answer; a row with an item covered above `coverage` is dropped. overlap: a row that
    shares so many words in sequence with an item is dropped too (GPT-3's rule, arXiv 2005.14165; 0: off).

    A training row is all that it says: prompt, response and, of a preference row, the rejected answer. An answer counts
    from 13 words on, and so does the question of a multiple-choice item without its options. A field shorter than n
    words matches as a whole; below 4 words it is not looked for. Score: the highest coverage. Reason: contaminated.
    Evidence: set, item (its number in the set, from 0), rule, coverage, words and matched text of the longest run.
    """

    against: tuple[str, ...]
    n: int = 8
    coverage: float = 0.5
    overlap: int = 13
    scope: ClassVar[Literal["corpus"]] = "corpus"

    def __post_init__(self) -> None:
        if self.n < LEAST_WORDS:
            raise HouseError(f"Decontaminate: n is {self.n}, it is at least {LEAST_WORDS}")
        if self.overlap and self.overlap < self.n:
            raise HouseError(f"Decontaminate: overlap is {self.overlap}, it is 0 (off) or at least n = {self.n}")
        if not 0 <= self.coverage <= 1:
            raise HouseError(f"Decontaminate: coverage is {self.coverage}, it is a share between 0 and 1")

    def limits(self) -> tuple[float | None, float | None]:
        """Covered items up to `coverage` are let through (where no run of `overlap` words is shared)."""
        return None, self.coverage

    def judge(self, corpus: Corpus) -> pa.Table:
        """Verdicts for all live rows; a HouseError where an evaluation set cannot be read whole."""
        index = read_index(self.against, self.n)
        keep, score, evidence = [], [], []
        done = 0
        for part in corpus.tables(VIEW_COLUMNS):
            for start in range(0, part.num_rows, _BLOCK):
                texts = view(part.slice(start, _BLOCK), "pair")
                found = self._look(index, texts)
                keep += [not proof for _, proof in found]
                score += [share for share, _ in found]
                evidence += [proof for _, proof in found]
                done += len(texts)
                corpus.progress(done, corpus.rows)
        return verdicts(keep, "contaminated", score, evidence)

    def _look(self, index: "Index", texts: list[str]) -> list[tuple[float, dict[str, Any] | None]]:
        """For each text the highest coverage of an item, and the evidence where it is contaminated."""
        block = index.tokens(texts)
        result: list[tuple[float, dict[str, Any] | None]] = [(0.0, None)] * len(texts)
        matches = index.matches(block)
        for row, group in itertools.groupby(matches, key=lambda match: match.row):
            best: tuple[Any, ...] | None = None
            top = 0.0
            for item, of_item in itertools.groupby(group, key=lambda match: match.item):
                found = list(of_item)
                covered = index.covered(item, found)
                longest = max(found, key=lambda match: match.run)
                top = max(top, covered)
                shared = 0 < self.overlap <= longest.run
                if covered > self.coverage or shared:
                    rank = (covered > self.coverage, covered, longest.run, -item)
                    best = max(best, (*rank, longest), key=lambda other: other[:4]) if best else (*rank, longest)
            proof = None if best is None else self._proof(index, best[-1], best[1], texts[row], block)
            result[row] = (top, proof)
        return result

    def _proof(self, index: "Index", match: "Match", covered: float, text: str, block: "Block") -> dict[str, Any]:
        name, number = index.items[match.item]
        return {
            "set": name,
            "item": number,
            "rule": "coverage" if covered > self.coverage else "overlap",
            "coverage": round(covered, 4),
            "words": match.run,
            "matched": original(text, match.start - int(block.starts[match.row]), min(match.run, SHOWN_WORDS)),
        }


@dataclass(frozen=True)
class Block:
    """Word ids of some rows, one after another, each followed by an unknown word; starts: where each row begins."""

    ids: Ints
    starts: Ints


@dataclass(frozen=True)
class Match:
    """What one row shares with one field: the covered share, and the longest run of common words, which begins at
    `start` of the block."""

    row: int
    item: int
    kind: int
    covered: float
    run: int
    start: int


@dataclass(frozen=True)
class Grams:
    """The n-grams of all fields that are looked for by n-grams of one size: their sorted distinct hashes, the places of
    each in the field words (`order` between `first` and the next), and a filter by the hashes' top bits."""

    size: int
    hashes: npt.NDArray[np.uint64]
    first: Ints
    order: Ints
    filter: npt.NDArray[np.bool_]


@dataclass(frozen=True)
class Index:
    """Fields of evaluation items as word ids. items: (set, number) of each; the other arrays go by field; ids holds the
    fields' words one after another, and field_of the field of each."""

    items: list[tuple[str, int]]
    vocabulary: Mapping[str, int]
    mixed: npt.NDArray[np.uint64]  # a hash of each word id
    ids: Ints
    field_of: Ints
    item: Ints
    kind: Ints
    length: Ints
    grams: list[Grams]
    kinds: Mapping[int, set[int]]  # item -> kinds of its fields

    def tokens(self, texts: list[str]) -> Block:
        """Texts as word ids; words that no evaluation set has are one unknown id."""
        unknown = len(self.vocabulary)
        get = self.vocabulary.get
        ids: list[int] = []
        starts: list[int] = []
        for text in texts:
            starts.append(len(ids))
            ids.extend(map(get, words(text), itertools.repeat(unknown)))
            ids.append(unknown)
        return Block(np.array(ids, np.int64), np.array(starts, np.int64))

    def matches(self, block: Block) -> list[Match]:
        """What the block's rows share with fields, sorted by row, item and field."""
        found = [match for grams in self.grams for match in self._of_size(grams, block)]
        return sorted(found, key=lambda match: (match.row, match.item, match.kind))

    def _of_size(self, grams: Grams, block: Block) -> Iterator[Match]:
        here, there = self._pairs(grams, block)
        if not len(here):
            return
        row = np.searchsorted(block.starts, here, side="right") - 1
        field = self.field_of[there]
        group = row * len(self.item) + field
        covered = _covered(group, there, grams.size)
        for (key, share), (_, run, start) in zip(covered, _longest(group, here, there, grams.size), strict=True):
            which = key % len(self.item)
            yield Match(
                key // len(self.item), int(self.item[which]), int(self.kind[which]),
                share / int(self.length[which]), run, start,
            )  # fmt: skip

    def _pairs(self, grams: Grams, block: Block) -> tuple[Ints, Ints]:
        """Places of equal n-grams: (in the block, in the fields), verified word by word."""
        hashes, places = _hashes(self.mixed, block.ids, grams.size, len(self.vocabulary))
        likely = grams.filter[hashes >> np.uint64(64 - _FILTER_BITS)]
        hashes, places = hashes[likely], places[likely]
        slot = np.searchsorted(grams.hashes, hashes)
        slot[slot == len(grams.hashes)] = 0
        equal = grams.hashes[slot] == hashes
        slot, places = slot[equal], places[equal]
        count = grams.first[slot + 1] - grams.first[slot]
        here = np.repeat(places, count)
        begin = np.repeat(grams.first[slot] - np.cumsum(count) + count, count)
        there = grams.order[begin + np.arange(len(here))]
        same = np.ones(len(here), np.bool_)
        for step in range(grams.size):
            same &= block.ids[here + step] == self.ids[there + step]
        return here[same], there[same]

    def covered(self, item: int, matches: list[Match]) -> float:
        """Coverage of an item: its prompt's, or the mean of prompt and answer where that is more; each the best of its
        forms. A field that is too short to be looked for does not count."""
        best = {kind: max((m.covered for m in matches if m.kind == kind), default=0.0) for kind in self.kinds[item]}
        return max(best.get(PROMPT, 0.0), sum(best.values()) / len(best))


def read_index(against: tuple[str, ...], n: int) -> Index:
    """The index of evaluation sets; a HouseError where one of them, or a row of it, cannot be read."""
    items: list[tuple[str, int]] = []
    fields: list[tuple[int, int, int]] = []  # item, kind, words
    vocabulary: dict[str, int] = defaultdict(itertools.count().__next__)
    ids: list[int] = []
    for name, number, row in _items(against):
        for kind, said in fields_of(row):
            fields.append((len(items), kind, len(said)))
            ids.extend(map(vocabulary.__getitem__, said))
        items.append((name, number))
    item, kind_of, length = np.array(fields, np.int64).reshape(-1, 3).T
    return _index(items, dict(vocabulary), np.array(ids, np.int64), item, kind_of, length, n)


def _items(against: tuple[str, ...]) -> Iterator[tuple[str, int, Mapping[str, Any]]]:
    """(set, number in the set, row) of every item."""
    for address in against:
        name = re.sub(r"(\.\w+)+$", "", address.rstrip("/").rsplit("/", 1)[-1]) or address
        for number, row in enumerate(iter_rows(Source(re.sub(r"\W", "_", f"evaluation_{name}"), address, ""))):
            if isinstance(row, Unreadable):
                raise HouseError(
                    f"evaluation set {address}: line {row.line} of {row.file} cannot be read: {row.error}. "
                    "Mend or remove it: nothing is decontaminated against half a set."
                )
            yield name, number, row


def fields_of(row: Mapping[str, Any]) -> list[tuple[int, list[str]]]:
    """(kind, words) of an item's fields that are long enough to be looked for."""
    asked, answer = words(prompt_of(row)), words(response_of(row))
    if row["text"] is not None:
        asked, answer = answer, []
    found = [(PROMPT, asked)] if len(asked) >= LEAST_WORDS else []
    meta = json.loads(row["meta"]) if row["meta"] else {}
    if "question" in meta and "choices" in meta:  # multiple choice
        question = words(str(meta["question"]))
        found += [(PROMPT, question)] if len(question) >= LONG_FIELD else []
    return found + ([(ANSWER, answer)] if len(answer) >= LONG_FIELD else [])


def _index(
    items: list[tuple[str, int]], vocabulary: dict[str, int], ids: Ints, item: Ints, kind: Ints, length: Ints, n: int
) -> Index:
    mixed = _mix(np.arange(len(vocabulary) + 1, dtype=np.uint64))
    starts = np.cumsum(length) - length
    field_of = np.repeat(np.arange(len(length)), length)
    sizes = np.minimum(length, n)
    left = (starts + length)[field_of] - np.arange(len(ids))  # words from here to the field's end
    grams = []
    for size in np.unique(sizes).tolist():
        places = np.flatnonzero((sizes[field_of] == size) & (left >= size))
        grams.append(_grams(size, _hash_at(mixed, ids, places, size), places))
    kinds: dict[int, set[int]] = {}
    for number, what in zip(item.tolist(), kind.tolist(), strict=True):
        kinds.setdefault(number, set()).add(what)
    return Index(items, vocabulary, mixed, ids, field_of, item, kind, length, grams, kinds)


def _grams(size: int, hashes: npt.NDArray[np.uint64], places: Ints) -> Grams:
    by_hash = np.argsort(hashes, kind="stable")
    distinct, first = np.unique(hashes[by_hash], return_index=True)
    present = np.zeros(1 << _FILTER_BITS, np.bool_)
    present[distinct >> np.uint64(64 - _FILTER_BITS)] = True
    return Grams(size, distinct, np.append(first, len(places)).astype(np.int64), places[by_hash], present)


def _mix(values: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """splitmix64: 64 well-mixed bits of each value."""
    values = values + np.uint64(0x9E3779B97F4A7C15)
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def _hash_at(mixed: npt.NDArray[np.uint64], ids: Ints, places: Ints, size: int) -> npt.NDArray[np.uint64]:
    """Hashes of the n-grams that begin at `places`."""
    total = np.zeros(len(places), np.uint64)
    for step in range(size):
        total = total * np.uint64(0xD6E8FEB86659FD93) + mixed[ids[places + step]]
    return _mix(total)


def _hashes(mixed: npt.NDArray[np.uint64], ids: Ints, size: int, unknown: int) -> tuple[npt.NDArray[np.uint64], Ints]:
    """Hashes and places of all n-grams without an unknown word."""
    bad = np.concatenate([[0], np.cumsum(ids == unknown)])
    places = np.flatnonzero(bad[size:] == bad[:-size]) if len(ids) >= size else np.zeros(0, np.int64)
    return _hash_at(mixed, ids, places, size), places


def _covered(group: Ints, there: Ints, size: int) -> list[tuple[int, int]]:
    """(group, words of the field that lie in a matched n-gram), sorted by group."""
    order = np.lexsort((there, group))
    group, there = group[order], there[order]
    new = np.flatnonzero(np.append(True, group[1:] != group[:-1]))
    step = np.minimum(np.diff(there, append=0), size)  # an n-gram adds the words up to the next one's begin
    step[np.append(new[1:], len(group)) - 1] = size
    return list(zip(group[new].tolist(), np.add.reduceat(step, new).tolist(), strict=True))


def _longest(group: Ints, here: Ints, there: Ints, size: int) -> list[tuple[int, int, int]]:
    """(group, words of the longest run that both sides have in sequence, its place in the block), sorted by group."""
    order = np.lexsort((here, here - there, group))
    group, here, lag = group[order], here[order], (here - there)[order]
    broken = (group[1:] != group[:-1]) | (lag[1:] != lag[:-1]) | (here[1:] != here[:-1] + 1)
    start = np.flatnonzero(np.append(True, broken))
    run = np.diff(start, append=len(group)) + size - 1
    best = np.lexsort((here[start], -run, group[start]))
    head = best[np.append(True, np.diff(group[start][best]) != 0)]
    return list(zip(group[start][head].tolist(), run[head].tolist(), here[start][head].tolist(), strict=True))


def original(text: str, first: int, count: int) -> str:
    """`count` words of `text` from the `first` on (as `words` counts), as they were written."""
    composed = unicodedata.normalize("NFKC", text)
    spans = [match.span() for match in WORD.finditer(composed)]
    folded = words(text)
    if len(spans) != len(folded):  # case folding parted a word, such as İ
        return " ".join(folded[first : first + count])
    return composed[spans[first][0] : spans[first + count - 1][1]]
