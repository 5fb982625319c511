"""Lists and lone instructions out of what a language model wrote, however it wrote them: JSON or JSON lines, numbers,
bullets, headings with points below them, a bare line each, or one line with commas."""

import ast
import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

from .view import normal, words

MOST = 100_000  # characters that are read of an answer
TRIES = 100  # brackets that begin no JSON until an answer counts as none
DEEPEST = 8  # lists in lists that are read
SHORT = 8  # words of an entry of a list with commas
NAME_WORDS = 14  # a name of more words is a sentence about something


@dataclass
class Item:
    """One entry. name: what stands before a colon or dash, rest: what stands after it. points: the entries below it.
    whole: the line without its mark. marked: it has a number or a bullet; a heading has none."""

    name: str
    rest: str = ""
    points: list["Item"] = field(default_factory=list)
    whole: str = ""
    marked: bool = True

    @property
    def below(self) -> list[str]:
        """Names of the entries below it, those under a label such as `Key concepts:` too, or else what its rest lists
        with commas; each once."""
        found: list[str] = []
        for point in self.points:
            if _LABEL.fullmatch(point.name):
                found += point.below or [point.rest]
            else:
                found.append(point.name)
        return distinct_names(found or (_split(self.rest) if len(_split(self.rest)) > 1 else []))


def outline(text: str) -> list[Item]:
    """The entries of an answer, in order, with what stands below each; empty where it lists nothing."""
    text = bare(text[:MOST])
    found = _from_json(text) or _tree(text)
    while len(found) == 1 and any(point.points or point.rest for point in found[0].points) and not found[0].marked:
        found = found[0].points  # a title above the whole list
    return [item for item in found if _says(item.name)]


def names(text: str, most_words: int = NAME_WORDS) -> list[str]:
    """The entries of an answer as a flat list of names, each once: of headings what stands below them; longer ones are
    no names and are left out."""
    found: list[str] = []
    for item in outline(text):
        found += item.below if item.points and not item.marked else [item.name]
    return [name for name in distinct_names(found) if len(name.split()) <= most_words]


def bare(text: str) -> str:
    """An answer without the reasoning before it and the fences around it."""
    said = re.sub(r"\A.*</think>|\A\s*<think>.*", "", text, flags=re.DOTALL)
    return "\n".join(line for line in said.split("\n") if not re.fullmatch(r"\s*(```\w*|[-*_=]{3,})\s*", line)).strip()


def distinct_names(found: Iterable[str]) -> list[str]:
    """Without empty ones, and those that say an earlier one but for case, width and white space."""
    first: dict[str, str] = {}
    for name in found:
        if _says(name):
            first.setdefault(normal(name), name)
    return list(first.values())


def _says(name: str) -> bool:
    return any(letter.isalpha() for letter in name)


def name_key(name: str) -> str:
    """By which names that say the same with other endings or in another order are one: its words without articles,
    prepositions and plural endings, sorted."""
    kept = sorted({_singular(word) for word in words(name)} - _SMALL)
    return " ".join(kept) or normal(name)


def _singular(word: str) -> str:
    if len(word) > 4 and word.endswith("ies"):
        return word[:-3] + "y"
    return word[:-1] if len(word) > 3 and word.endswith("s") and not word.endswith(("ss", "us", "is")) else word


_SMALL = set("a an and for in of on or the to with".split())  # noqa: SIM905
_MARK = re.compile(r"(\s*)(?:[-*+•–—‣·]\s+|\(?(?:\d{1,3}|[a-zA-Z])[.)](?:\s+|(?=\*\*)))(.*)")
_BOLD_NUMBER = re.compile(r"^(\s*)\*\*(?=\(?\d{1,3}[.)])")
_NUMBERED = re.compile(r"\s*\(?\d")
_HEADING = re.compile(r"\s*#{1,6}\s+(.*)")
_PART = re.compile(
    r"(?:class\s+|course\s+)?(?:session|week|lecture|lesson|unit|module|chapter|day|subject|skill|topic|discipline|field"
    r"|sub-?field|persona|concept)s?\s*#?\d+\s*(?:[:.)–—-]\s*|$)",
    re.IGNORECASE,
)
_LABEL = re.compile(
    r"(?:the\s+)?(?:key|main|core|important)?\s*(?:concepts?|topics?|sub-?topics?|points?|ideas?|terms?)"
    r"(?:\s+(?:covered|include|are))?",
    re.IGNORECASE,
)
_PREFACE = re.compile(
    r"(?:sure|certainly|of course|okay|ok|here(?:'s| is| are)|below|the following|i hope|let me|as an?)\b",
    re.IGNORECASE,
)
_PARTED = re.compile(r"(.+?)(?:\s*:\s+|\s*:$|\s+[–—-]{1,2}\s+)(.*)", re.DOTALL)


def _tree(text: str) -> list[Item]:
    """Entries by their marks and how far they are moved in."""
    lines = [_BOLD_NUMBER.sub(r"\1", _narrow(line)) for line in text.split("\n") if line.strip()]
    marked = any(_MARK.fullmatch(line) or _HEADING.fullmatch(line) for line in lines)
    root = Item("")
    open_: list[tuple[int, Item]] = [(-9, root)]
    for line in lines:
        place = _place(line, marked)
        if place is None:
            continue
        depth, item = place
        while depth <= open_[-1][0]:
            open_.pop()
        open_[-1][1].points.append(item)
        open_.append((depth, item))
    if not marked and len(root.points) == 1 and not root.points[0].points:
        return _one_line(root.points[0])
    return root.points


def _narrow(line: str) -> str:
    """A line with single spaces after what it is moved in by."""
    said = line.lstrip()
    return line[: len(line) - len(said)] + " ".join(said.split())


def _place(line: str, marked: bool) -> tuple[int, Item] | None:
    """How deep a line stands, and what it says; None where it is no entry. Headings stand above numbers, and numbers
    above bullets that are moved in as far."""
    heading, mark = _HEADING.fullmatch(line), _MARK.fullmatch(line)
    said = line.strip()
    if heading is not None:
        level = len(said) - len(said.lstrip("#"))
        return level - 9 if level < 9 else 0, _item(heading[1], marked=False)
    if mark is not None:
        return 2 * len(mark[1].expandtabs(4)) + (not _NUMBERED.match(line)) + 1, _item(mark[2])
    if _PREFACE.match(said):
        return None
    if _PART.match(said) or re.fullmatch(r"\*\*[^*]+\*\*:?", said):
        return 0, _item(said, marked=False)
    if ":" in said and _LABEL.fullmatch(said.split(":", 1)[0].replace("*", "").strip()):
        return 10**6, _item(said)
    if not marked:
        return 1, _item(said)
    return (0, _item(said, marked=False)) if said.endswith(":") and len(said.split()) <= NAME_WORDS else None


def _one_line(item: Item) -> list[Item]:
    """A lone line: what it lists with commas, or itself where it may be a name."""
    parts = _split(item.whole)
    if len(parts) > 2 and max(len(part.split()) for part in parts) <= SHORT:
        return [_item(part) for part in parts]
    return [item] if len(item.whole.split()) <= NAME_WORDS else []


def _item(said: str, marked: bool = True) -> Item:
    said = _clean(said)
    part = _PART.match(said)
    if part is not None and said[part.end() :].strip():
        said = said[part.end() :]
    parted = _PARTED.fullmatch(said)
    name, rest = (parted[1], parted[2]) if parted is not None else (said, "")
    return Item(_clean(name), _clean(rest), [], _clean(said), marked)


def _clean(said: str) -> str:
    """Without emphasis, quotes and what ends a line of a list."""
    said = " ".join(re.sub(r"\*\*|__|`", "", said).split())
    said = said.rstrip(",;").strip()
    if len(said) > 1 and said[0] in "\"'“‘" and said[-1] in "\"'”’":
        said = said[1:-1].strip()
    return said.rstrip(".").strip() if said.count(".") == 1 and len(said.split()) <= NAME_WORDS else said


def _split(said: str) -> list[str]:
    """What commas or semicolons part, but not inside brackets."""
    mark = ";" if ";" in said else ","
    parts, depth, start = [], 0, 0
    for at, letter in enumerate(said):
        depth = max(0, depth + (letter in "([{") - (letter in ")]}"))
        if letter == mark and not depth:
            parts.append(said[start:at])
            start = at + 1
    parts.append(said[start:])
    cleaned = [_clean(re.sub(r"^\s*(?:and|or)\s+", "", part)) for part in parts]
    return [part for part in cleaned if part]


def _from_json(text: str) -> list[Item]:
    """Entries of JSON values, where JSON is most of the answer."""
    values, used = [], 0
    decoder, at, tries = json.JSONDecoder(), 0, TRIES
    while (start := _next(text, at)) is not None:
        try:
            value, at = decoder.raw_decode(text, start)
        except RecursionError:
            return []
        except ValueError:
            at, tries = start + 1, tries - 1
            if not tries:
                return []
            continue
        used += at - start
        values.append(value)
    if not values:
        values, used = _as_python(text)
    items = [item for value in values for item in _items_of(value)]
    return items if 2 * used > len(text.strip()) else []


def _next(text: str, at: int) -> int | None:
    found = re.compile(r"[\[{]").search(text, at)
    return None if found is None else found.start()


def _as_python(text: str) -> tuple[list[Any], int]:
    """A list between single quotes, as Python writes it."""
    start, end = text.find("["), text.rfind("]") + 1
    try:
        return ([ast.literal_eval(text[start:end])], end - start) if 0 <= start < end else ([], 0)
    except (ValueError, SyntaxError, RecursionError, MemoryError):
        return [], 0


def _items_of(value: Any, depth: int = 0) -> Iterator[Item]:
    """A JSON value as entries: strings; objects by their first text, with the list below it; objects that hold lists
    by name. What lies deeper than DEEPEST says nothing."""
    deeper = depth + 1
    if deeper > DEEPEST:
        return
    if isinstance(value, str):
        if value.strip():
            yield _item(value)
    elif isinstance(value, list):
        for one in value:
            yield from _items_of(one, deeper)
    elif isinstance(value, dict):
        texts = [said for said in value.values() if isinstance(said, str) and said.strip()]
        lists = [said for said in value.values() if isinstance(said, list | dict) and said]
        if texts:
            first = _item(texts[0])
            rest = "; ".join([first.rest, *texts[1:]]).strip("; ")
            yield Item(first.name, rest, [point for one in lists for point in _items_of(one, deeper)], first.whole)
        elif len(value) == 1 and lists and any(isinstance(one, dict) for one in lists[0]):
            yield from _items_of(lists[0], deeper)  # {"sessions": [{…}, {…}]}
        else:
            for name, below in value.items():
                yield Item(_item(name).name, "", list(_items_of(below, deeper)), name, marked=len(value) > 1)


def lone_instruction(text: str) -> str | None:
    """The one instruction that an answer holds, without what introduces it and without an answer to it; None where it
    holds none."""
    said = bare(text)
    first, _, rest = said.partition("\n")
    if rest.strip() and _PREFACE.match(first.strip()) and first.rstrip().endswith((":", "!")):
        said = rest.strip()
    said = _NAMED.sub("", said, count=1)
    said = _ANSWERED.split(said, maxsplit=1)[0].strip()
    if len(said) > 2 and (said[0], said[-1]) in (('"', '"'), ("“", "”"), ("'", "'")) and said[0] not in said[1:-1]:
        said = said[1:-1].strip()
    return said if any(letter.isalpha() for letter in said) else None


_DRESS = r"[ \t>*_#]*"
_NAMED = re.compile(
    rf"\A{_DRESS}(?:the\s+)?(?:new\s+|user(?:'s)?\s+|homework\s+|maths?\s+|logic\s+|reasoning\s+|coding\s+|programming\s+|generated\s+)*"
    r"(?:instruction|question|query|prompt|problem|puzzle|request|task|exercise)(?:\s+\d{1,3})?[*_]*\s*[:：][*_]*\s*",
    re.IGNORECASE,
)
_ANSWERED = re.compile(
    rf"^{_DRESS}(?:sample\s+|model\s+|example\s+)?(?:answer|solution|response|explanation)[*_]*\s*[:：].*",
    re.IGNORECASE | re.MULTILINE | re.DOTALL,
)
