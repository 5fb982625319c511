"""Evidence as one sees it: a duplicate beside the row that stays, what was matched where it stands in the text."""

import difflib
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from .text.view import pair_of, words

MOST_WORDS = 120  # of each side that are shown
TWINS = {"duplicate_of": "the row that stays", "held_out": "the row that is held out"}  # evidence that names a row
CONTEXT = 80  # characters shown on either side of a match


def pictures(
    row: Mapping[str, Any], evidence: Mapping[str, Any], others: Mapping[str, Mapping[str, Any]]
) -> Iterator[RenderableType]:
    """What shows the evidence: two texts side by side where it names a duplicate whose row is in `others`, and the
    row's own text around what was `matched` (or the `ngram`)."""
    for name, title in TWINS.items():
        twin = others.get(str(evidence.get(name)))
        if twin is not None:
            yield side_by_side(pair_of(row), pair_of(twin), title)
    matched = evidence.get("matched", evidence.get("ngram"))
    if isinstance(matched, str):
        found = highlighted(pair_of(row), matched)
        if found is not None:
            yield found


def side_by_side(mine: str, other: str, title: str = TWINS["duplicate_of"]) -> Table:
    """Both texts, the words that only one of them has in bold; from a little before the first difference on where they
    are long."""
    left, right = mine.split(), other.split()
    blocks = (
        difflib.SequenceMatcher(None, left, right, autojunk=False).get_matching_blocks() if _short(left, right) else []
    )
    same = [{i for block in blocks for i in range(block[side], block[side] + block.size)} for side in (0, 1)]
    first = next((i for i, (a, b) in enumerate(zip(left, right, strict=False)) if a != b), min(len(left), len(right)))
    start = max(0, first - MOST_WORDS // 3) if max(len(left), len(right)) > MOST_WORDS else 0
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), expand=True)
    for name in ("this row", title):
        table.add_column(Text(name, style="cyan"), ratio=1, overflow="fold")
    table.add_row(_marked(left, same[0], start), _marked(right, same[1], start))
    return table


def _short(left: Sequence[str], right: Sequence[str]) -> bool:
    return len(left) * len(right) <= 2_000_000  # difflib is quadratic: beyond it takes seconds


def _marked(said: Sequence[str], same: set[int], start: int) -> Text:
    shown = Text("… " if start else "", style="dim")
    for index in range(start, min(len(said), start + MOST_WORDS)):
        shown.append(_safe(said[index]) + " ", style="not dim" if index in same else "bold yellow not dim")
    if start + MOST_WORDS < len(said):
        shown.append(f"… {len(said) - start - MOST_WORDS} more words")
    return shown


def highlighted(text: str, matched: str) -> Text | None:
    """The text around the first place whose words are those of `matched`, these in bold; None where they do not stand
    in it in this order (a set of separate n-grams, say)."""
    wanted = words(matched)
    if not wanted:
        return None
    pattern = r"\W+".join(map(re.escape, wanted))
    place = re.search(rf"(?<!\w){pattern}(?!\w)", text, re.IGNORECASE)
    if place is None:
        return None
    low, high = max(0, place.start() - CONTEXT), min(len(text), place.end() + CONTEXT)
    shown = Text("…" if low else "")
    shown.append(_safe(text[low : place.start()]))
    shown.append(_safe(place.group()), style="bold yellow")
    shown.append(_safe(text[place.end() : high]) + ("…" if high < len(text) else ""))
    return shown


def _safe(text: str) -> str:
    """One line without control characters."""
    return "".join(c if c >= " " and not "\x7f" <= c <= "\x9f" else " " for c in text)
