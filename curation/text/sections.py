"""Long documents cut into sections on the borders of their paragraphs, nothing lost between them."""

import re

from .sentences import sentences

Places = list[tuple[int, int]]
_FENCE = re.compile(r"[ \t]*(?:```|~~~)")
_HEADING = re.compile(r"#{1,6}[ \t]\S.*|\S.*\n[ \t]*([=\-~^*+\"'`])\1{2,}[ \t]*|([=\-~^*+])\2{2,}\n.*\n\2{3,}[ \t]*")


def paragraphs(text: str) -> Places:
    """(start, end) of each paragraph, in order; together they are the whole text, blank lines belong to what they end.
    Blank lines between code fences end none, and a heading belongs to the paragraph after it."""
    cuts, place, fenced, blank = [0], 0, False, False
    for line in text.split("\n"):
        if not line.strip():
            blank = True
        else:
            ended = blank and not fenced and bool(text[cuts[-1] : place].strip())
            if ended and not _HEADING.fullmatch(text[cuts[-1] : place].strip()):
                cuts.append(place)
            blank = False
            fenced ^= bool(_FENCE.match(line))
        place += len(line) + 1
    return list(zip(cuts, [*cuts[1:], len(text)], strict=True)) if text else []


def sections(text: str, window: int) -> Places:
    """(start, end) of each section, in order; together they are the whole text, each of at most `window` characters: as
    many paragraphs as fit; a longer one is cut between sentences, a longer sentence between words, a longer word
    anywhere."""
    found: Places = []
    for start, end in _fitting(text, window):
        if found and end - found[-1][0] <= window:
            found[-1] = (found[-1][0], end)
        else:
            found.append((start, end))
    return found


def _fitting(text: str, window: int) -> Places:
    """Paragraphs, and what has to be cut smaller."""
    found: Places = []
    for start, end in paragraphs(text):
        if end - start <= window:
            found.append((start, end))
            continue
        for low, high in sentences(text[start:end]):
            found += _words(text, start + low, start + high, window)
    return found


def _words(text: str, start: int, end: int, window: int) -> Places:
    found: Places = []
    while end - start > window:
        space = max(text.rfind(mark, start + 1, start + window) for mark in (" ", "\n", "\t"))
        cut = start + window if space < 0 else space + 1
        found.append((start, cut))
        start = cut
    return [*found, (start, end)]
