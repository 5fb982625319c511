"""New rows that say almost what their parents said: some stretches of text replaced, spans moved along."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..rows import Row, made_row

KEPT = ("messages", "chosen", "rejected", "label", "text", "tools", "spans", "meta")


@dataclass(frozen=True)
class Edit:
    """`text` in place of the characters from `start` to `end` (exclusive)."""

    start: int
    end: int
    text: str


Place = tuple[str, int, str]  # field (messages, chosen, rejected, text), turn, part of the turn


def edited(text: str, edits: Sequence[Edit]) -> str:
    """`text` after `edits`, which are in order and do not overlap."""
    pieces, at = [], 0
    for edit in edits:
        pieces += [text[at : edit.start], edit.text]
        at = edit.end
    return "".join([*pieces, text[at:]])


def moved(position: int, edits: Sequence[Edit], *, end: bool) -> int:
    """Where a character position of the old text lies in the new one; inside an edit it goes to the edit's beginning,
    or, for the end of a span, to its end."""
    shift = 0
    for edit in edits:
        if position <= edit.start:
            break
        if position < edit.end:
            return edit.start + shift + (len(edit.text) if end else 0)
        shift += len(edit.text) - (edit.end - edit.start)
    return position + shift


def edited_row(row: Mapping[str, Any], edits: Mapping[Place, Sequence[Edit]], maker: str) -> Row:
    """The row that `maker` (its repr) makes of `row`: source, position and all else as they were, spans moved with the
    text of the turns' contents."""
    content: dict[str, Any] = {name: row[name] for name in KEPT}
    for field in ("messages", "chosen", "rejected"):
        if any(place[0] == field for place in edits):
            content[field] = [dict(turn) for turn in row[field]]
    for (field, turn, part), changes in edits.items():
        if field == "text":
            content["text"] = edited(row["text"], changes)
        else:
            content[field][turn][part] = edited(row[field][turn][part], changes)
    content["spans"] = None if row["spans"] is None else [_moved_span(span, edits) for span in row["spans"]]
    return made_row(maker, [row["row_id"]], row["position"], row["source"], **content)


def _moved_span(span: Mapping[str, Any], edits: Mapping[Place, Sequence[Edit]]) -> dict[str, Any]:
    changes = edits.get((span["field"], span["turn"], "content"), ())
    ends = {"start": moved(span["start"], changes, end=False), "end": moved(span["end"], changes, end=True)}
    return dict(span) | ends
