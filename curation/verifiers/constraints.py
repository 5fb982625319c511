"""Answers that hold the instructions of a prompt which a program can check (IFEval, arXiv 2311.07911)."""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from ..steps import Tools
from ..verifying import Case, Finding

Given = Mapping[str, Any]
Check = Callable[[str, Given], bool | None]

SENTENCE_END = re.compile(r"(?<=[.!?])[\"')\]]*\s+(?=[\"'(\[]*[A-Z0-9])|\n\s*\n")
ABBREVIATION = re.compile(r"\b(?:Mr|Mrs|Ms|Dr|Prof|St|Jr|Sr|vs|etc|e\.g|i\.e|Inc|Ltd|[A-Z])\.$")
WORD = re.compile(r"\w+")
BULLET = re.compile(r"^\s*(?:\*[^*]|-).*$", re.MULTILINE)
HIGHLIGHT = re.compile(r"\*\*([^\n*]+)\*\*|\*([^\n*]+)\*")
FENCE = re.compile(r"^```(?:json)?\s*|\s*```$", re.IGNORECASE)
ANSWERS = ("My answer is yes.", "My answer is no.", "My answer is maybe.")


@dataclass(frozen=True)
class Constraints:
    """Right where the answer holds every one of its prompt's instructions, as IFEval's 25 kinds say them.

    The row's meta names the kinds under `instruction_id_list` and what each is given under `kwargs` (a list, or its
    JSON). loose: an answer also holds an instruction that it holds without its first line, its last line, or its
    asterisks, as IFEval's loose score has it. Abstains where a row has no instructions, where one is of an unknown kind
    or lacks what it needs, and where a language cannot be told. value: how many of how many are held.

    Sentences end at . ! or ? before a capital letter or digit, abbreviations left out (IFEval takes NLTK's Punkt, which
    has to be downloaded); languages are told by fastText's lid.176 (IFEval takes langdetect).
    """

    loose: bool = False

    model: ClassVar[None] = None

    def verify(self, cases: Sequence[Case], tools: Tools) -> list[Finding]:
        """One finding a case. detail: the instructions that are not held."""
        return [self._one(case) for case in cases]

    def _one(self, case: Case) -> Finding:
        asked = instructions(case.meta)
        if not asked:
            return Finding(None, "the row has no instructions in meta.instruction_id_list")
        held = [(name, self._held(name, given, case.answer)) for name, given in asked]
        value = f"{sum(one is True for _, one in held)}/{len(held)}"
        broken = [name for name, one in held if one is False]
        if broken:
            return Finding(False, f"not held: {', '.join(broken)}", value)
        unsure = [name for name, one in held if one is None]
        if unsure:
            return Finding(None, f"cannot be checked: {', '.join(unsure)}", value)
        return Finding(True, f"all {len(held)} are held", value)

    def _held(self, name: str, given: Given, answer: str) -> bool | None:
        check = CHECKS.get(name)
        if check is None:
            return None
        if not answer.strip():
            return False
        try:
            told = [check(said, given) for said in (variants(answer) if self.loose else (answer,)) if said.strip()]
        except (KeyError, TypeError, ValueError, re.error):
            return None
        return True if True in told else None if None in told else False


def instructions(meta: Mapping[str, Any]) -> list[tuple[str, Given]]:
    """Kinds and what they are given, of a row's meta; empty where they do not fit together."""
    names, given = meta.get("instruction_id_list"), meta.get("kwargs")
    try:
        names = json.loads(names) if isinstance(names, str) else names
        given = json.loads(given) if isinstance(given, str) else given
    except ValueError:
        return []
    given = given or [{}] * len(names or ())
    if not names or len(names) != len(given):
        return []
    return [
        (str(name), {k: v for k, v in (one or {}).items() if v is not None})
        for name, one in zip(names, given, strict=True)
    ]


def variants(answer: str) -> list[str]:
    """The answer, and what it is without its first line, last line, both, each with and without asterisks."""
    lines = answer.split("\n")
    cut = [answer, *("\n".join(part).strip() for part in (lines[1:], lines[:-1], lines[1:-1]))]
    return [*cut, *(one.replace("*", "") for one in cut)]


def sentences(text: str) -> int:
    """How many sentences a text has."""
    count, joined = 0, False
    for piece in SENTENCE_END.split(text.strip()):
        count += bool(WORD.search(piece)) and not joined
        joined = ABBREVIATION.search(piece.strip()) is not None
    return count


def _compare(count: int, relation: str, wanted: int) -> bool:
    if relation not in ("at least", "less than"):
        raise ValueError(relation)
    return count >= wanted if relation == "at least" else count < wanted


def _language(text: str) -> str | None:
    from ..measures.language import language_of

    found = language_of(text)
    return found[0] if found and found[1] >= 0.3 else None


def _is_language(text: str, given: Given) -> bool | None:
    found = _language(text)
    return None if found is None else found == str(given["language"]).split("-")[0]


def _english(text: str) -> bool | None:
    found = _language(text.lower())  # the model knows few texts in capitals
    return None if found is None else found == "en"


def _capitals(text: str, given: Given) -> bool | None:
    return _english(text) if text.isupper() else False


def _lowercase(text: str, given: Given) -> bool | None:
    return _english(text) if text.islower() else False


def _pieces(text: str, mark: str) -> list[str] | None:
    """What stands between marks, an empty first or last piece left out; None where another one is empty."""
    pieces = [piece.strip() for piece in text.split(mark)]
    pieces = pieces[not pieces[0] :]
    pieces = pieces[: len(pieces) - (bool(pieces) and not pieces[-1])]
    return pieces if all(pieces) else None


def _paragraphs(text: str, given: Given) -> bool:
    pieces = _pieces(text, "***")
    return pieces is not None and len(pieces) == given["num_paragraphs"]


def _first_word(text: str, given: Given) -> bool:
    pieces = [piece.strip() for piece in text.split("\n\n") if piece.strip()]
    place = given["nth_paragraph"]
    if len(pieces) != given["num_paragraphs"] or place > len(pieces):
        return False
    first = pieces[place - 1].split()[0].lstrip("'\"")
    return re.split(r"[.,?!'\"]", first)[0].lower() == str(given["first_word"]).lower()


def _postscript(text: str, given: Given) -> bool:
    marker = re.escape(str(given["postscript_marker"]).strip().rstrip(".")).replace(r"\.", r"\.\s?")
    return re.search(rf"^\s*{marker}.*$", text, re.MULTILINE | re.IGNORECASE) is not None


def _json(text: str, given: Given) -> bool:
    try:
        json.loads(FENCE.sub("", text.strip()).strip())
    except ValueError:
        return False
    return True


def _two(text: str, given: Given) -> bool:
    pieces = _pieces(text, "******")
    return pieces is not None and len(pieces) == 2 and pieces[0] != pieces[1]


def _sections(text: str, given: Given) -> bool:
    mark = re.escape(str(given["section_spliter"]).strip())
    return len(re.findall(rf"\s?{mark}\s?\d+\s?", text)) >= int(given["num_sections"])


def _has(text: str, word: str) -> bool:
    return re.search(re.escape(word), text, re.IGNORECASE) is not None


def _whole(text: str, word: str) -> bool:
    return re.search(rf"(?<!\w){re.escape(word)}(?!\w)", text, re.IGNORECASE) is not None


CHECKS: dict[str, Check] = {
    "keywords:existence": lambda text, given: all(_has(text, word) for word in given["keywords"]),
    "keywords:frequency": lambda text, given: _compare(
        len(re.findall(re.escape(given["keyword"].strip()), text, re.IGNORECASE)), given["relation"], given["frequency"]
    ),
    "keywords:forbidden_words": lambda text, given: not any(_whole(text, word) for word in given["forbidden_words"]),
    "keywords:letter_frequency": lambda text, given: _compare(
        text.lower().count(given["letter"].lower()), given["let_relation"], given["let_frequency"]
    ),
    "language:response_language": _is_language,
    "length_constraints:number_sentences": lambda text, given: _compare(
        sentences(text), given["relation"], given["num_sentences"]
    ),
    "length_constraints:number_paragraphs": _paragraphs,
    "length_constraints:number_words": lambda text, given: _compare(
        len(WORD.findall(text)), given["relation"], given["num_words"]
    ),
    "length_constraints:nth_paragraph_first_word": _first_word,
    "detectable_content:number_placeholders": lambda text, given: (
        len(re.findall(r"\[[^\n\]]*\]", text)) >= given["num_placeholders"]
    ),
    "detectable_content:postscript": _postscript,
    "detectable_format:number_bullet_lists": lambda text, given: len(BULLET.findall(text)) == given["num_bullets"],
    "detectable_format:constrained_response": lambda text, given: any(said in text for said in ANSWERS),
    "detectable_format:number_highlighted_sections": lambda text, given: (
        sum(bool((bold or plain).strip()) for bold, plain in HIGHLIGHT.findall(text)) >= given["num_highlights"]
    ),
    "detectable_format:multiple_sections": _sections,
    "detectable_format:json_format": _json,
    "detectable_format:title": lambda text, given: re.search(r"<<\s*[^\s>][^\n]*>>", text) is not None,
    "combination:two_responses": _two,
    "combination:repeat_prompt": lambda text, given: (
        text.strip().lower().startswith(given["prompt_to_repeat"].strip().lower())
    ),
    "startend:end_checker": lambda text, given: (
        text.strip().strip('"').lower().endswith(given["end_phrase"].strip().lower())
    ),
    "startend:quotation": lambda text, given: len(text.strip()) > 1 and text.strip()[0] == '"' == text.strip()[-1],
    "change_case:capital_word_frequency": lambda text, given: _compare(
        sum(word.isupper() for word in re.findall(r"[\w'-]+", text)),
        given["capital_relation"],
        given["capital_frequency"],
    ),
    "change_case:english_capital": _capitals,
    "change_case:english_lowercase": _lowercase,
    "punctuation:no_comma": lambda text, given: "," not in text,
}
