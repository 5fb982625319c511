"""What a translation must leave as it is: code, addresses, placeholders, numbers."""

import re
from collections import Counter

from .sections import sections

_FENCED = re.compile(r"^[ \t]*(`{3,}|~{3,})[^\n]*\n.*?(?:^[ \t]*\1[ \t]*(?:\n|\Z)|\Z)", re.M | re.S)
_KEPT = re.compile(
    r"(?P<code>`[^`\n]+`)"
    r"|(?P<url>\b(?:https?|ftp)://[^\s<>\"'`)\]]*[\w/]|\bwww\.[\w.\-]+\.\w+[^\s<>\"'`)\]]*|[\w.+\-]+@[\w\-]+\.[\w.\-]*\w)"
    r"|(?P<placeholder>\{\{?[\w .\-]*\}\}?|%\(\w+\)[sdifg]|%[sdifg]\b|\$\{\w+\}|\$[A-Za-z_]\w*|</?[A-Za-z][^<>\n]*>)"
    r"|(?P<number>\d+(?:[.,:/]\d+)*)"
)


def kept(text: str) -> dict[str, Counter[str]]:
    """What has to stay, by kind (code, url, placeholder, number), and how often it is there."""
    found: dict[str, Counter[str]] = {kind: Counter() for kind in _KEPT.groupindex}
    for match in _KEPT.finditer(text):
        if match.lastgroup is not None:
            found[match.lastgroup][match.group()] += 1
    return found


def changed(source: str, translation: str) -> str | None:
    """The first kind of what has to stay that a translation has lost, added or altered, or None."""
    before, after = kept(source), kept(translation)
    return next((kind for kind in before if before[kind] != after[kind]), None)


def translatable(text: str, window: int) -> list[tuple[str, bool]]:
    """A text in pieces, joined the text: (piece, whether it is to be translated). Fenced code, and pieces without a
    letter besides what has to stay, are not; the others have at most `window` characters, and no white space at their
    ends."""
    pieces: list[tuple[str, bool]] = []
    place = 0
    for match in _FENCED.finditer(text):
        pieces += _prose(text[place : match.start()], window)
        pieces.append((match.group(), False))
        place = match.end()
    return [*pieces, *_prose(text[place:], window)]


def _prose(text: str, window: int) -> list[tuple[str, bool]]:
    pieces: list[tuple[str, bool]] = []
    for start, end in sections(text, window):
        whole = text[start:end]
        said = whole.strip()
        if not re.search(r"[^\W\d_]", _KEPT.sub("", said)):
            pieces.append((whole, False))
            continue
        at = whole.index(said)
        around = (whole[:at], whole[at + len(said) :])
        pieces += [(around[0], False)] * bool(around[0]) + [(said, True)] + [(around[1], False)] * bool(around[1])
    return pieces
