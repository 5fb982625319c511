"""Preference rows whose sentences count by whether what they say is true (Mask-DPO)."""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import pyarrow as pa

from ..door import Sampling
from ..folder import HouseError
from ..preferring import heard
from ..rows import Row, message, table
from ..steps import Corpus
from ..synthesis import Ask, Session, asking, prompt
from ..text.sentences import sentences
from ..unfolding import unfolded

Labels = Sequence[bool]
"""Of each sentence of an answer, whether it is right."""


@dataclass(frozen=True)
class SentenceMasks:
    """Mask-DPO (arXiv 2503.02846): in the chosen answer sentences that are wrong weigh 0, in the rejected answer those
    that are right; what the template closes the turn with stays in the loss. A model that reads the answers labels
    their sentences.

    model: the judge, asked about each answer with its sentences numbered (temperature 0, max_tokens; once more where a
    sentence stays without a label). reference: where in meta something lies that is known to be true (a text, or a
    list of texts), to check against. Rows: each preference row of this set whose two answers of one turn could be
    labelled, with spans; the old row leaves with reason `masked` and is the new one's parent. A pair whose chosen
    answer has no right sentence, or whose rejected one has no wrong sentence, would teach by its template alone: it
    stays as it is, as do rows that the judge abstains on, and both are counted. meta: the old one's with `sentences`:
    {chosen, rejected}, the labels. Texts do not change; held-out rows stay without masks.
    """

    model: str
    reference: str | None = None
    max_tokens: int = 512
    seed: int = 0

    scope: ClassVar[Literal["maker"]] = "maker"
    consumes: ClassVar[str | None] = "masked"

    def __post_init__(self) -> None:
        if self.max_tokens < 1:
            raise HouseError(f"{self}: max_tokens is at least 1")

    def make(self, corpus: Corpus) -> Iterator[pa.Table]:
        """One table of new rows."""
        rows = [row for part in corpus.tables() for row in part.to_pylist() if _two_answers(row)]
        made: list[Row] = []
        with Session(self, corpus, self.model, "sentence_masks") as session:
            asks = [self._ask(row, name) for row in rows for name in ("chosen", "rejected")]
            told = self._heard(session, asks)
            for at, row in enumerate(rows):
                good, bad = told[2 * at], told[2 * at + 1]
                if good is None or bad is None:
                    session.refused("judge_abstains")
                    continue
                session.tally.verified += 2
                if not any(good) or all(bad):
                    session.refused("no_right_sentence" if not any(good) else "no_wrong_sentence")
                    continue
                spans = mask_spans(row["chosen"][0]["content"], good, row["rejected"][0]["content"], bad)
                meta = _meta(row) | {"sentences": {"chosen": list(good), "rejected": list(bad)}}
                content = {name: row[name] for name in ("messages", "chosen", "rejected", "tools")}
                made.append(session.row(asks[2 * at], None, meta, **content, spans=spans))
        if made:
            yield table(made)

    def _ask(self, row: Mapping[str, Any], name: str) -> Ask:
        form = prompt("sentence_facts")
        text = row[name][0]["content"]
        places = sentences(text)
        listed = "\n".join(f"{at}. {' '.join(text[i:j].split())}" for at, (i, j) in enumerate(places, 1))
        asked = "\n\n".join(turn["content"] or "" for turn in row["messages"])
        known = told_in(_meta(row), self.reference) if self.reference else None
        given = "\n".join(map(_line, known)) if isinstance(known, list) else known
        turns = form.turns(question=asked, reference=given or "nothing is given", sentences=listed)
        sampling = Sampling(temperature=0.0, max_tokens=self.max_tokens)
        seed = ("facts", self.seed, row["row_id"], name)
        return asking(form, turns, sampling, seed, (row["row_id"],), len(places))

    def _heard(self, session: Session, asks: Sequence[Ask]) -> list[tuple[bool, ...] | None]:
        """Labels of each answer; how many sentences it has depends on the request, so each number is read alone."""
        texts = heard(session, asks, lambda answer: answer.text if parse_labels(answer.text) else None)
        told: list[tuple[bool, ...] | None] = []
        for ask, text in zip(asks, texts, strict=True):
            labels = parse_labels(text) if text else {}
            size = ask.about
            told.append(
                tuple(labels[n] for n in range(1, size + 1)) if set(range(1, size + 1)) <= set(labels) else None
            )
        return told


@dataclass(frozen=True)
class MarkedErrors:
    """Mask-DPO's rows (arXiv 2503.02846) out of answers in which people marked errors and which they corrected, as
    fine-grained RLHF collected them (arXiv 2306.01693): the correction is chosen, the answer rejected, and of the
    rejected answer only the sentences weigh that hold a marked error.

    errors, corrected: where in meta the marks and the correction lie, with dots between keys; a text on the way is read
    as JSON. A mark is {start, end} in characters of the answer, and `kind` says under which key its type stands; kinds:
    the types that count (empty: all). What of the correction is wrong nobody marked, so all of it weighs 1. Rows are
    conversations whose last turn is the answer; those without a counting mark, or without a correction that differs,
    stay as they are. The parent leaves with reason `marked`.
    """

    errors: str = "feedback.errors"
    corrected: str = "feedback.corrected-prediction"
    kind: str = "error type"
    kinds: tuple[str, ...] = ()

    scope: ClassVar[Literal["maker"]] = "maker"
    consumes: ClassVar[str | None] = "marked"
    model: ClassVar[None] = None

    def make(self, corpus: Corpus) -> Iterator[pa.Table]:
        """Tables of new rows, one for each part that gave any."""
        wanted = f"it wants marked errors in meta, under {self.errors!r}, and a correction under {self.corrected!r}"
        return unfolded(self, corpus, self._contents, "marked_errors", wanted)

    def _contents(self, row: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
        content = self._content(row)
        if content is not None:
            yield content

    def _content(self, row: Mapping[str, Any]) -> dict[str, Any] | None:
        turns = list(row["messages"] or ())
        meta = _meta(row)
        marks, better = told_in(meta, self.errors), told_in(meta, self.corrected)
        if len(turns) < 2 or turns[-1]["role"] != "assistant" or not isinstance(marks, list):
            return None
        answer = turns[-1]["content"] or ""
        if not isinstance(better, str) or not better.strip() or better.split() == answer.split():
            return None
        places = [mark for mark in marks if isinstance(mark, Mapping) and self._counts(mark)]
        labels = labels_of(answer, [(mark["start"], mark["end"]) for mark in places])
        if all(labels):
            return None
        good = [True] * len(sentences(better))
        return {
            "messages": turns[:-1],
            "chosen": [message("assistant", better)],
            "rejected": [turns[-1]],
            "tools": row["tools"],
            "spans": mask_spans(better, good, answer, labels),
            "meta": row["meta"],
        }

    def _counts(self, mark: Mapping[str, Any]) -> bool:
        placed = all(type(mark.get(name)) is int for name in ("start", "end"))
        return placed and (not self.kinds or mark.get(self.kind) in self.kinds)


def labels_of(text: str, errors: Sequence[tuple[int, int]]) -> tuple[bool, ...]:
    """Of each sentence whether it holds no character of an error (start, end)."""
    return tuple(not any(start < j and i < end for start, end in errors) for i, j in sentences(text))


def mask_spans(chosen: str, good: Labels, rejected: str, bad: Labels) -> list[dict[str, Any]] | None:
    """Spans of weight 0 on the wrong sentences of `chosen` and the right ones of `rejected`, each answer one turn; what
    closes the turn keeps its weight. None where nothing is masked."""
    spans: list[dict[str, Any]] = []
    for field, text, masked in (("chosen", chosen, [not one for one in good]), ("rejected", rejected, list(bad))):
        places = sentences(text)
        if len(places) != len(masked):
            raise ValueError(f"{field} has {len(places)} sentences and {len(masked)} labels")
        own = [
            {"field": field, "turn": 0, "start": i, "end": j, "weight": 0.0}
            for (i, j), hidden in zip(places, masked, strict=True)
            if hidden
        ]
        if own and own[-1]["end"] == len(text):  # a span up to the end takes the end of the turn with it
            own.append({"field": field, "turn": 0, "start": len(text), "end": len(text), "weight": 1.0})
        spans += own
    return spans or None


_LABEL = re.compile(
    r"^\W*(?:sentence\W{0,3})?(\d+)\W{1,6}?.*?\b(right|correct|true|wrong|incorrect|false)\b", re.IGNORECASE
)


def parse_labels(text: str) -> dict[int, bool]:
    """Which sentences, by number from 1, an answer calls right (True) and wrong (False); a sentence that is called both
    has no label."""
    told: dict[int, set[bool]] = {}
    for line in text.splitlines():
        found = _LABEL.match(line)
        if found:
            told.setdefault(int(found[1]), set()).add(found[2].lower() in ("right", "correct", "true"))
    return {number: said.pop() for number, said in told.items() if len(said) == 1}


def told_in(meta: Mapping[str, Any], path: str) -> Any:
    """What lies at a dotted path of meta, None where nothing does; a text on the way is read as JSON."""
    value: Any = meta
    for key in path.split("."):
        if isinstance(value, str):
            try:
                value = json.loads(value)
            except ValueError:
                return None
        value = value.get(key) if isinstance(value, Mapping) else None
    return value


def _line(value: Any) -> str:
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)


def _meta(row: Mapping[str, Any]) -> dict[str, Any]:
    meta = json.loads(row["meta"] or "{}")
    return meta if isinstance(meta, dict) else {}


def _two_answers(row: Mapping[str, Any]) -> bool:
    """Whether a row is a pair of answers of one turn each that say something, without weights of its own."""
    if row["spans"] or not row["messages"]:
        return False
    sides = [row[name] for name in ("chosen", "rejected")]
    return all(side is not None and len(side) == 1 and (side[0]["content"] or "").strip() for side in sides)
