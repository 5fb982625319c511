"""Chat templates that only put contents between fixed texts, found out once and then rendered without Jinja.

A template is run with contents that refuse to be looked at: they may be printed, joined to other text, stripped, and
asked whether they hold or start with some fixed text (the answer is no, and is checked of every real content). Whatever
else a template does to them makes it no plain template, and it is then rendered by Jinja itself, row by row.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, NoReturn

from jinja2 import Template as Jinja
from jinja2 import nodes
from jinja2.visitor import NodeTransformer

Shape = tuple[tuple[str, bool], ...]
"""Of a conversation of roles and contents alone: each turn's role, and whether it says anything."""

# a stripped, escaped, quoted, or re-cased mark is no longer found in the output
_HEAD, _TAIL = ' \t"<\\\ue000', "\ue001Aß&' \n"
# these could put a content into other text behind its back (in C), where what happens to it next is not seen
_FORBIDDEN = (
    nodes.Macro, nodes.CallBlock, nodes.FilterBlock, nodes.AssignBlock, nodes.Block, nodes.Include, nodes.Import,
    nodes.FromImport, nodes.Extends,
)  # fmt: skip
_FILTERS = frozenset(
    ("trim", "tojson", "default", "d", "length", "count", "list", "first", "last", "selectattr", "rejectattr", "string",
     "upper", "lower")
)  # fmt: skip
_METHODS = frozenset({"join", "format", "format_map", "replace", "translate", "center", "ljust", "rjust"})

Step = tuple[str, tuple[str, ...]]
"""A method of str and its arguments."""


class _Seen(BaseException):
    """The template looked into a content. No Exception: Jinja's own tests swallow those."""


def _refuse(*_: Any, **__: Any) -> NoReturn:
    raise _Seen


class _Text(str):
    """Text that holds marks, and can only be printed or joined."""

    def __add__(self, other: str) -> "_Text":
        return _Text(str.__add__(self, other)) if isinstance(other, str) else _refuse()

    def __radd__(self, other: str) -> "_Text":
        return _Text(str.__add__(other, self)) if isinstance(other, str) else _refuse()

    def __str__(self) -> str:
        return self


class _Content(_Text):
    """The content of one turn, after some stripping."""

    run: "_Run"
    turn: int
    steps: tuple[Step, ...]

    def __bool__(self) -> bool:
        return _refuse() if self.steps else True  # a turn that says nothing is of another shape

    def __contains__(self, part: object) -> bool:
        return self._lacks("__contains__", part)

    def startswith(self, part: Any, *more: Any) -> bool:
        return _refuse() if more else self._lacks("startswith", part)

    def endswith(self, part: Any, *more: Any) -> bool:
        return _refuse() if more else self._lacks("endswith", part)

    def strip(self, chars: Any = None) -> "_Content":
        return self._stripped("strip", chars)

    def lstrip(self, chars: Any = None) -> "_Content":
        return self._stripped("lstrip", chars)

    def rstrip(self, chars: Any = None) -> "_Content":
        return self._stripped("rstrip", chars)

    def _lacks(self, test: str, part: object) -> bool:
        if type(part) is not str:
            _refuse()
        self.run.guards.append((self.turn, self.steps, test, part))
        return False

    def _stripped(self, how: str, chars: Any) -> "_Content":
        if chars is not None and type(chars) is not str:
            _refuse()
        return self.run.content(self.turn, (*self.steps, (how, () if chars is None else (chars,))))


_OWN = {"__new__", "__init__", "__class__", "__getattribute__", "__setattr__", "__delattr__", "__doc__", "__dict__"}
_OWN |= {"__init_subclass__", "__subclasshook__", "__add__", "__radd__", "__str__", "__module__", "__weakref__"}
for _name in set(dir(str)) - _OWN | {"__rmod__", "__bool__"}:
    setattr(_Text, _name, _refuse)


@dataclass
class _Run:
    """One rendering with marks: where each came from, and what was asked of the contents."""

    marks: list[tuple[int, tuple[Step, ...]]] = field(default_factory=list)
    guards: list[tuple[int, tuple[Step, ...], str, str]] = field(default_factory=list)

    def content(self, turn: int, steps: tuple[Step, ...] = ()) -> _Content:
        made = _Content(f"{_HEAD}{len(self.marks)}{_TAIL}")
        made.run, made.turn, made.steps = self, turn, steps
        self.marks.append((turn, steps))
        return made


@dataclass(frozen=True)
class Plain:
    """texts[0], content of turn slots[0] after its steps, texts[1], … for every conversation of one shape whose
    contents pass `guards`: (turn, steps, method of str, text) that must be false."""

    texts: tuple[str, ...]
    slots: tuple[tuple[int, tuple[Step, ...]], ...]
    guards: tuple[tuple[int, tuple[Step, ...], str, str], ...]

    def render(self, contents: Sequence[str]) -> str | None:
        """The conversation as Jinja renders it; None where a guard asks for Jinja itself."""
        for turn, steps, test, part in self.guards:
            if getattr(_after(contents[turn], steps), test)(part):
                return None
        pieces = [self.texts[0]]
        for (turn, steps), text in zip(self.slots, self.texts[1:], strict=True):
            pieces += (_after(contents[turn], steps) if steps else contents[turn], text)
        return "".join(pieces)


def _after(content: str, steps: tuple[Step, ...]) -> str:
    for method, arguments in steps:
        content = getattr(content, method)(*arguments)
    return content


def plain(template: str, shape: Shape, variables: dict[str, Any]) -> Plain | None:
    """How `template` renders every conversation of this shape, or None where only Jinja can tell."""
    probe = _probe(template)
    if probe is None:
        return None
    run = _Run()
    messages = [{"role": role, "content": run.content(turn) if says else ""} for turn, (role, says) in enumerate(shape)]
    try:
        text = probe.render(messages=messages, **variables)
    except (_Seen, Exception):  # a template that refuses this order of roles says so through Jinja
        return None
    texts, slots, at = [], [], 0
    for place, mark in _found(text, len(run.marks)):
        texts.append(text[at:place])
        slots.append(run.marks[mark])
        at = place + len(f"{_HEAD}{mark}{_TAIL}")
    texts.append(text[at:])
    changed = ("\ue000", "\ue001", "ue000")  # left of a mark that is no longer itself, or was escaped
    if any(left in piece for piece in texts for left in changed):
        return None
    return Plain(tuple(texts), tuple(slots), tuple(dict.fromkeys(run.guards)))


def _found(text: str, marks: int) -> list[tuple[int, int]]:
    """(place, mark) of every whole mark in `text`, in order."""
    found = []
    for mark in range(marks):
        whole = f"{_HEAD}{mark}{_TAIL}"
        place = text.find(whole)
        while place >= 0:
            found.append((place, mark))
            place = text.find(whole, place + len(whole))
    return sorted(found)


class _Joined(NodeTransformer):
    """a ~ b ~ c as a + b + c, which a content sees."""

    def visit_Concat(self, node: nodes.Concat) -> nodes.Expr:
        self.generic_visit(node)
        whole = node.nodes[0]
        for part in node.nodes[1:]:
            whole = nodes.Add(whole, part, lineno=node.lineno)
        return whole


@lru_cache(maxsize=16)
def _probe(template: str) -> Jinja | None:
    """The template, compiled so that contents see all that is done to them; None where that cannot be had."""
    try:
        from transformers.utils.chat_template_utils import _compile_jinja_template
    except ImportError:  # it is transformers' own; without it every row goes through Jinja
        return None
    environment = _compile_jinja_template(template).environment
    tree = environment.parse(template)
    numbers = (isinstance(one.right, nodes.Const) and type(one.right.value) is int for one in tree.find_all(nodes.Mod))
    silent = (
        any(True for _ in tree.find_all(_FORBIDDEN))
        or any(one.name not in _FILTERS for one in tree.find_all(nodes.Filter))
        or any(one.attr in _METHODS for one in tree.find_all(nodes.Getattr))
        or not all(numbers)
    )
    if silent:
        return None
    code = environment.compile(_Joined().visit(tree))
    return Jinja.from_code(environment, code, environment.make_globals(None))
