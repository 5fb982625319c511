"""Sentences and steps of a text with their places, so that spans can be laid on them."""

import re

_END = re.compile(r"(?<=[.!?])[\"'”’)\]*_]*[ \t]+(?=[\"'“‘(\[*_]*[A-Z0-9\u00c0-\u024f])|(?<=[。！？])|\n+[ \t]*")
_NO_END = re.compile(
    r"(?:\b(?:[A-Z]|Mr|Mrs|Ms|Dr|Prof|St|Sr|Jr|No|Nos|Vol|Fig|Eq|vs|cf|ca|approx|e\.g|i\.e|etc|al|U\.S|U\.K|a\.m|p\.m"
    r"|Jan|Feb|Mar|Apr|Jun|Jul|Aug|Sep|Sept|Oct|Nov|Dec|Inc|Ltd|Co|Corp)|^\W*\d+)\.$"
)


def sentences(text: str) -> list[tuple[int, int]]:
    """(start, end) of each sentence, in order; together they are the whole text, white space belongs to what it ends. A
    line break ends one, and . ! ? before white space and a capital or a digit, but for initials, common abbreviations
    and numbers of lists."""
    cuts = [0]
    for match in _END.finditer(text):
        before = text[cuts[-1] : match.start()]
        newline = "\n" in match.group()
        if not before.strip() or (not newline and _NO_END.search(before)):
            continue
        if match.end() > cuts[-1] and text[match.end() :].strip():
            cuts.append(match.end())
    return list(zip(cuts, [*cuts[1:], len(text)], strict=True)) if text else []


def steps(text: str, separator: str = "\n") -> list[str]:
    """The steps of a solution: its pieces between `separator`, with what follows them; joined they are the text. Pieces
    of white space belong to the step before."""
    pieces = text.split(separator)
    found: list[str] = []
    for place, piece in enumerate(pieces):
        whole = piece + (separator if place < len(pieces) - 1 else "")
        if found and (not piece.strip() or not found[-1].strip()):
            found[-1] += whole
        elif whole:
            found.append(whole)
    return found
