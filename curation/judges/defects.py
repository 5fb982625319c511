"""A judge of the defects that instruction data is known for: answers that are none, prompts that ask the impossible."""

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np
import pyarrow as pa

from ..flags import flagged
from ..steps import Unmeasured
from ..text.arithmetic import wrong_arithmetic
from .requests import MEDIA, absent_code, attached_content, known_classes, may_ask, request, url_content

_NO = r"no[ _-]?(?:in|out)puts?e?"
# A bracketed marker with whatever follows, the bare words alone, or the bare words with a reason.
_NO_OUTPUT = re.compile(
    rf"\W{{0,2}}[<\[]\s*{_NO}\b[^\n]*|{_NO}(?: (?:is )?(?:required|needed|possible|available))?\W*\Z"
    r"|no output(?: possible)?,? (?:as|because|since|this|-)[^\n]*|\W?n/a\W*\Z",
    re.IGNORECASE,
)
_NOT_AVAILABLE = re.compile(r"\bn/a\b", re.IGNORECASE)
# The prompt's last paragraph or line is nothing but the marker ("No input required.", "`<noinput>`", "<none>").
_NOINPUT = re.compile(
    rf"(?:\A|\n)[^\w\n]*(?:{_NO}(?:[^\w\n]*(?:is )?(?:required|needed|provided|necessary))?(?:>? \d+)?"
    r"|<\s*(?:none|empty|n/a)\s*>|n/a)[^\w\n]*\Z",
    re.IGNORECASE,
)
# The generator's next item, run into this one: "\n##\n18. Instruction: …", "### Instruction: …".
_MERGED = re.compile(r"\n[^\w\n]*(?:\d{1,3}\. ?|#{2,} ?)Instruction ?:[^\n]*", re.IGNORECASE)
_INSERT = re.compile(
    r"\[(?:insert|paste)\b[^\]\n]{1,60}\]|<(?:insert|paste)\b[^>=\n]{1,60}>|\[(?:your|add|enter)\b[^\]\n]{1,40} here\]",
    re.I,
)
_TEMPLATE = re.compile(
    r"\b(?:templates?|placeholders?|blanks?|forms?|outline|insert|fill[ -]in|boilerplate|skeleton)\b", re.I
)
# What a letter or an advertisement may leave open: "Dear [insert name]".
_OPEN_FIELD = re.compile(
    r"\W(?:insert|paste)\b.*\b(?:names?|dates?|times?|e-?mail|address|phone|numbers?|company|location|city|link|url|website|signature|logo|title)\W*\Z",
    re.I,
)
# The answer is nothing but a stand-in for a picture or a file: "<cropped image attached>", "[Image of structure]".
_STAND_IN = re.compile(
    rf"(?:\[[^\]\n(]{{0,60}}\b{MEDIA}\b[^\]\n]{{0,60}}\]|<[^>=\n]{{0,40}}\b{MEDIA}\b[^>=\n]{{0,40}}>)\Z", re.I
)
# A fenced block or element without code, or a stand-in for code.
_EMPTY_CODE = re.compile(
    r"^[ \t]*```[^\n`]*\n\s*```[ \t]*$|<code>\s*</code>|<pre>\s*</pre>"
    r"|\A\W*(?:your code|code goes|insert code|code|add code)(?: goes)? here\W*\Z|\A[\[<](?:code|code snippet)[\]>]\Z",
    re.IGNORECASE | re.MULTILINE,
)
_CONTROLS = re.compile(r"[\x00-\x08\x0e-\x1b\x7f-\x84\x86-\x9f]")  # C0 and C1 but for what is white space
# An escape that was never undone: "first line\nSecond line". Not a lower-case letter after it, as in LaTeX's \nu, \tan.
_ESCAPE = re.compile(r"\\r?\\n|\\n(?=[A-Z\d\s*-]|\Z)|\\t(?=[A-Z\d\s])|\\u[0-9a-fA-F]{4}")
_SPEAKS_OF_ESCAPES = re.compile(
    r"[{};`=]|\b(?:print\w*|code|program|function|script|python|java\w*|regex\w*|regular|escape\w*|new ?lines?"
    r"|string|split|json"
    r"|unicode|cout|latex|c\+\+|sql|tabs?|character)\b|\\(?:frac|text|begin|left|cdot|times)",
    re.IGNORECASE,
)
_UNCLEAR = re.compile(  # a prompt that says nothing, or a template whose slots were never filled
    r"\A[\W_]*(?:(?:undefined|none|null|nan|todo|tbd|lorem ipsum|asdf\w*|instruction|input|n/?a)[\W_]*)?\Z"
    r"|\A\W*(?:instruction|prompt|question)\W*\Z|^\s*(?:\{\{ ?\w+ ?\}\}|\{(?:instruction|input|prompt|question"
    r"|text)\})\s*$",
    re.IGNORECASE | re.MULTILINE,
)
CLASSES = (
    "empty_response",
    "no_output",
    "merged_instruction",
    "placeholder",
    "noinput_marker",
    "missing_content",
    "image_request",
    "empty_code",
    "wrong_answer",
    "unclear_instruction",
    "control_characters",
    "literal_escapes",
)
DEFAULT = CLASSES[:-1]
# What RE2 looks for before Python looks closely: more than the rules of `defect` find, of the prompt and the response.
_LOOK_CONTROL, _LOOK_ESCAPE = r"[\x00-\x08\x0e-\x1b\x7f-\x84\x86-\x9f]", r"\\[nrtu]"
_LOOK_PROMPT = (
    r"(?i)no[ _-]?(?:in|out)put|<\s*(?:none|empty)|n/a[^a-z0-9\n]*$|instruction ?:|\[(?:insert|paste)",
    _LOOK_CONTROL,
    r"(?im)^\s*(?:\{\{ ?\w+ ?\}\}|\{(?:instruction|input|prompt|question|text)\})\s*$",
    r"(?i)^[^a-z0-9]*(?:undefined|none|null|nan|todo|tbd|lorem ipsum|asdf\w*|instruction|input|n/?a|prompt"
    r"|question)?[^a-z0-9]*$",
)
_LOOK_RESPONSE = (
    r"(?i)no[ _-]?(?:in|out)put|n/a|instruction ?:|^[^!-~]*[\[<][^\n]*[\]>][^!-~]*$|[\[<](?:insert|paste)"
    r"|\[(?:your|add|enter)"
    r"|```[^\n`]*\n\s*```|<code>\s*</code>|<pre>\s*</pre>|code (?:goes )?here",
    r"(?i)^[^a-z]*(?:your code|insert code|add code|code)|^[\[<]code",
    _LOOK_CONTROL,
)
Defect = Iterator[tuple[str, str, str]]  # reason, matched text, where
Finder = Callable[[str, str], Defect]


@dataclass(frozen=True)
class Defects(Unmeasured):
    """Drops rows with a defect that no threshold is needed for (the ten classes of AlpacaDataCleaned, in English).

    classes (each is a reason; default all but the last): empty_response; no_output (`<nooutput>`, `<noinput>` or "N/A"
    in place of an answer); merged_instruction (the generator's next item follows the answer: "18. Instruction: …");
    placeholder (the answer holds "[insert …]" that the prompt did not ask for, or is itself "<image attached>");
    noinput_marker (the prompt ends in `<noinput>`, "No input" or "N/A": AlpacaDataCleaned removed the marker, here the
    row goes, 1.4 % of Alpaca, as judges never rewrite); missing_content (the prompt is about a picture, a file, "the
    following article", the page behind a bare URL or the web, which is not there); image_request ("Design a logo");
    empty_code (an empty code block, or "the following code snippet" with nothing after it); wrong_answer (arithmetic
    that can be checked: an expression, a median, mean or sum, a change of units, "3 * 4 = 13"); unclear_instruction (a
    prompt without a word, or a template whose slots were never filled); control_characters (C0 and C1); literal_escapes
    (a backslash and an n in prose that stand for a line's end: so are two thirds of FLAN's chains of thought, which are
    better mended than lost).

    "[Your Name]" under a letter is no defect: a draft may leave it open. Evidence: {matched, where: prompt | response}.
    Of a preference row the prompt and `chosen` are judged; of a raw document only whether it is empty.
    """

    classes: tuple[str, ...] = DEFAULT

    scope: ClassVar[Literal["row"]] = "row"

    def __post_init__(self) -> None:
        known_classes(self, self.classes, CLASSES)

    def judge(self, rows: pa.Table, values: pa.Table) -> pa.Table:
        """Verdicts, aligned with `rows`."""
        from ..text.equations import checkable
        from ..text.texts import VISIBLE, at, matching, texts

        prompts, responses = texts(rows, "prompt"), texts(rows, "response")
        escapes = (_LOOK_ESCAPE,) if "literal_escapes" in self.classes else ()
        of_prompt = may_ask(prompts) | matching(prompts, *_LOOK_PROMPT, *escapes)
        of_response = matching(responses, *_LOOK_RESPONSE, *escapes) | ~matching(responses, VISIBLE)
        masks = (of_response, of_prompt, checkable(prompts, responses))
        look = np.flatnonzero(masks[0] | masks[1] | masks[2])
        documents = rows["text"].is_valid().to_numpy()
        found = {}
        for row, prompt, response in zip(look.tolist(), at(prompts, look), at(responses, look), strict=True):
            finders = [find for find, mask in zip(_FINDERS, masks, strict=True) if mask[row]]
            one = defect(prompt, response, bool(documents[row]), self.classes, finders)
            if one is not None:
                found[row] = one[0], {"matched": one[1], "where": one[2]}
        return flagged(rows.num_rows, found)


def defect(
    prompt: str,
    response: str,
    document: bool = False,
    classes: Sequence[str] = DEFAULT,
    finders: Sequence[Finder] | None = None,
) -> tuple[str, str, str] | None:
    """The first defect of a row as (reason, matched text, where), or None. finders: those that may find something."""
    answer = response.strip()
    if not answer:
        return ("empty_response", "", "response") if "empty_response" in classes else None
    if document:
        return None
    prompt = prompt.strip()
    for find in _FINDERS if finders is None else finders:
        for reason, matched, where in find(prompt, answer):
            if reason in classes:
                return reason, matched.strip()[:200], where
    return None


def _of_response(prompt: str, answer: str) -> Defect:
    match = _NO_OUTPUT.match(answer)
    if match and not _NOT_AVAILABLE.search(_NOINPUT.sub("", prompt)):
        yield "no_output", match[0], "response"
    match = _MERGED.search(answer)
    if match and "instruction" not in prompt.lower():
        yield "merged_instruction", match[0], "response"
    match = _STAND_IN.match(answer)
    if match:
        yield "placeholder", match[0], "response"
    match = next((field for field in _INSERT.finditer(answer) if not _OPEN_FIELD.search(field[0])), None)
    if match and not _TEMPLATE.search(prompt):
        yield "placeholder", match[0], "response"
    match = _EMPTY_CODE.search(answer)
    if match:
        yield "empty_code", match[0], "response"
    yield from _characters(prompt, answer, "response")


def _of_prompt(prompt: str, answer: str) -> Defect:
    match = _MERGED.search(prompt)
    if match and re.search(r"\d", match[0]):  # "### Instruction:" alone is a common prompt format
        yield "merged_instruction", match[0], "prompt"
    match = _NOINPUT.search(prompt)
    if match:
        yield "noinput_marker", match[0], "prompt"
    matched = attached_content(prompt) or url_content(prompt)
    if matched:
        yield "missing_content", matched, "prompt"
    for reason, name in (("missing_content", "browse"), ("image_request", "image_output")):
        one = request(prompt, (name,))
        if one:
            yield reason, one[1], "prompt"
    matched = absent_code(prompt)
    if matched:
        yield "empty_code", matched, "prompt"
    match = _UNCLEAR.search(prompt)
    if match:
        yield "unclear_instruction", match[0], "prompt"
    yield from _characters(prompt, answer, "prompt")


def _of_sums(prompt: str, answer: str) -> Defect:
    wrong = wrong_arithmetic(prompt, answer)
    if wrong:
        yield "wrong_answer", wrong, "response"


def _characters(prompt: str, answer: str, where: str) -> Defect:
    text = prompt if where == "prompt" else answer
    match = _CONTROLS.search(text)
    if match:
        yield "control_characters", f"U+{ord(match[0]):04X}", where
    match = _ESCAPE.search(text)
    if match and not _SPEAKS_OF_ESCAPES.search(prompt) and not _SPEAKS_OF_ESCAPES.search(answer):
        yield "literal_escapes", text[max(0, match.start() - 20) : match.end() + 20], where


_FINDERS: tuple[Finder, ...] = (_of_response, _of_prompt, _of_sums)
