"""Answers that choose the right option."""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from ..steps import Tools
from ..text.view import normal
from ..verifying import Case, Finding

LETTER = r"[(\[]?\b([A-Z])\b[)\].:]?"
CHOSEN = re.compile(
    r"(?:\b(?:answer|option|choice|choose|pick)\b(?:\s+(?:is|would be|should be))?|^\s*A(?:nswer)?\s*:)[\s:*(]*"
    rf"{LETTER}",
    re.MULTILINE | re.IGNORECASE,
)
ALONE = re.compile(rf"^[\s*]*{LETTER}[\s*]*(?:$|[^\w\s'])", re.MULTILINE)
MARKED = re.compile(r"^\s*[(\[]?([A-Za-z])[)\].:]\s*(.*)", re.DOTALL)


@dataclass(frozen=True)
class MultipleChoice:
    r"""Right where the option that the answer chooses is the reference.

    The options stand in the row's meta under `options`: a list of texts (with or without `A)` before them), or texts by
    letter; without them letters alone are compared. The reference is a letter, the text of an option, or an option's
    number from 0 (as MMLU has it). The answer chooses by the last `\boxed{B}`, "the answer is (B)", a line that begins
    with the letter alone, or by saying exactly one option's text. Abstains where no option or several are chosen so.
    value: the letter.
    """

    options: str = "options"

    model: ClassVar[None] = None

    def verify(self, cases: Sequence[Case], tools: Tools) -> list[Finding]:
        """One finding a case. detail: both letters."""
        return [self._one(case) for case in cases]

    def _one(self, case: Case) -> Finding:
        options = read_options(case.meta.get(self.options))
        wanted = None if case.reference is None else letter_of(case.reference, options)
        if wanted is None:
            return Finding(None, f"the reference {case.reference!r} is no option")
        said = chosen_letter(case.answer, options)
        if said is None:
            return Finding(None, f"no single option is chosen; wanted {wanted}")
        return Finding(said == wanted, f"{said} against {wanted}", said)


def read_options(said: Any) -> dict[str, str]:
    """Options by letter, of a list, a mapping or JSON of either."""
    if isinstance(said, str):
        try:
            said = json.loads(said)
        except ValueError:
            said = [line for line in said.splitlines() if line.strip()]
    if isinstance(said, Mapping):
        if set(said) >= {"label", "text"}:  # ARC and CommonsenseQA
            return {str(label): str(text) for label, text in zip(said["label"], said["text"], strict=False)}
        return {str(letter).strip().upper(): str(text) for letter, text in said.items()}
    options = {}
    for place, text in enumerate(said or ()):
        match = MARKED.match(str(text))
        marked = match is not None and match[1].upper() == chr(65 + place)
        options[chr(65 + place)] = match[2] if match is not None and marked else str(text)
    return options


def letter_of(reference: str, options: Mapping[str, str]) -> str | None:
    """The letter of a reference, or None."""
    said = reference.strip()
    bare = said.strip("()[]. :").upper()
    if len(bare) == 1 and bare.isalpha() and (not options or bare in options):
        return bare
    same = [letter for letter, text in options.items() if normal(text) == normal(said)]
    if len(same) == 1:
        return same[0]
    if said.isdigit() and int(said) < len(options):
        return list(options)[int(said)]
    return chosen_letter(reference, options)


def chosen_letter(answer: str, options: Mapping[str, str]) -> str | None:
    """The option that an answer chooses, or None."""
    from ..text.final_answers import final_answer, plain

    marked = final_answer(answer, last_number=False)
    found = []
    if marked is not None:
        found = [plain(marked).strip("()[]. *:")]
        same = [letter for letter, text in options.items() if normal(text) == normal(plain(marked))]
        found = same if len(same) == 1 else [found[0].upper()] if len(found[0]) == 1 else []
    for pattern in (CHOSEN, ALONE):
        if not found:
            found = [match[1].upper() for match in pattern.finditer(answer)][-1:]
    found = [letter for letter in found if letter.isalpha() and (not options or letter in options)]
    if found:
        return found[0]
    told = normal(answer)
    said = [letter for letter, text in options.items() if normal(text) and f" {normal(text)} " in f" {told} "]
    longest = [one for one in said if not any(normal(options[one]) in normal(options[o]) for o in said if o != one)]
    return longest[0] if len(longest) == 1 else None
