"""Requests for lists and for instructions: their answers read, and every one of them counted."""

from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

from .instructing import Instruction
from .synthesis import Ask, Session
from .text.outlines import lone_instruction
from .text.view import normal

T = TypeVar("T")


def listings(
    session: Session, asks: Sequence[Ask], read: Callable[[str], list[T]], problem: str
) -> Iterator[tuple[Ask, list[T]]]:
    """What each answer lists, with its request; of one that was cut off the last entry is left out. Answers that list
    nothing are unparsed: `problem`."""
    for ask, answer in session.ask(asks):
        found = read(answer.text)
        if not answer.finished:
            found = found[:-1]
        if found:
            session.tally.parsed += 1
            yield ask, found
        else:
            session.unparsed(problem)


def lone_instructions(session: Session, asks: Sequence[Ask]) -> list[Instruction]:
    """The instruction of each answer; `about` of its request is what its row says of it. One that is cut off or that
    says what an earlier one says is turned down."""
    made: dict[str, Instruction] = {}
    for ask, answer in session.ask(asks):
        text = lone_instruction(answer.text)
        if text is None or not answer.finished:
            session.unparsed("no_instruction" if text is None else "cut")
            continue
        session.tally.parsed += 1
        if normal(text) in made:
            session.refused("same_instruction")
        else:
            made[normal(text)] = Instruction(text, ask, answer, ask.parents, ask.about)
    return list(made.values())
