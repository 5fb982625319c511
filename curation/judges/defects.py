"""A judge of the defects that instruction data is known for: answers that are none, prompts that ask the impossible."""

import re
from dataclasses import dataclass
from typing import ClassVar, Literal

import pyarrow as pa

from ..steps import Unmeasured, verdicts
from ..text import VIEW_COLUMNS, prompt_of, response_of

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
    rf"(?:\A|\n)[^\w\n]*(?:{_NO}(?:[^\w\n]*(?:is )?(?:required|needed|provided|necessary))?(?: \d+)?"
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
_MEDIA = (
    r"(?:image|picture|photo(?:graph)?|painting|drawing|sketch|figure|diagram|graph|chart|plot|screenshot|logo|poster"
    r"|video|audio|sound|song|recording|file|document|attachment|comic|cartoon|map|article)s?"
)
# What a letter or an advertisement may leave open: "Dear [insert name]".
_OPEN_FIELD = re.compile(
    r"\W(?:insert|paste)\b.*\b(?:names?|dates?|times?|e-?mail|address|phone|numbers?|company|location|city|link|url|website|signature|logo|title)\W*\Z",
    re.I,
)
# The answer is nothing but a stand-in for a picture or a file: "<cropped image attached>", "[Image of structure]".
_STAND_IN = re.compile(
    rf"(?:\[[^\]\n(]{{0,60}}\b{_MEDIA}\b[^\]\n]{{0,60}}\]|<[^>=\n]{{0,40}}\b{_MEDIA}\b[^>=\n]{{0,40}}>)\Z", re.I
)
# A line of the prompt that stands for something a text model cannot see.
_ATTACHED = re.compile(
    rf"^(?:!\[[^\]\n]*\]\([^)\n]*\)|[<\[(](?:an? |the |include |insert |attach(?:ed)? |see |link to |upload(?:ed)? )*"
    rf"{_MEDIA}(?: (?:(?:attached|provided|here|below|link|url|file)\b[^>\]\)\n]*"
    r"|(?:of|from|showing)(?: [^\s>\])]+){1,3}))?[>\])])\s*$",
    re.IGNORECASE | re.MULTILINE,
)
_SHORT = 400  # characters: a longer prompt has enough besides the picture; `</` shows that the line is a tag
_INSERTED = re.compile(r"^[<\[]insert\b[^>\]\n]{1,60}[>\]]\s*$", re.IGNORECASE | re.MULTILINE)
# The prompt ends in the bare address of a page (a site's name alone may say enough) …
_URL = re.compile(r"(?:\A|\n)[^\n:]{0,24}:?[ \n]*<?(?P<url>(?:https?://|www\.)[^\s<>/]+/[^\s<>]+)>?\s*\Z")
# … and asks about what lies there, not about the address.
_CONTENT = re.compile(
    r"\b(?:article|story|web ?site|web ?page|page|blog|post|document|essay|paper|text|passage|content|book"
    rf"|report|data ?set|movie|film|trailer|advert\w*|artwork|art|piece|design|flag|{_MEDIA})\b",
    re.IGNORECASE,
)
_ADDRESS = re.compile(
    r"\b(?:urls?|links?|domain|address|hyperlink|shorten|encod|pars|regex\w*|html|https? request|api|code|script"
    r"|program|scrap|crawl|python|java|sql|server|function|tweet|hashtag|cit(?:e|ation)|reference|bibliograph\w*|markdown)",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class Defects(Unmeasured):
    """Drops rows with a defect that no threshold is needed for (the classes of AlpacaDataCleaned, in English).

    Reasons: empty_response; no_output (`<nooutput>`, `<noinput>` or "N/A" in place of an answer); merged_instruction
    (the generator's next item follows the answer: "18. Instruction: …"); placeholder (the answer holds "[insert …]"
    that the prompt did not ask for, or is itself "<image attached>"); missing_content (the prompt is about a picture,
    a file or the page behind a bare URL, which is not there); noinput_marker (the prompt ends in `<noinput>`, "No
    input" or "N/A": AlpacaDataCleaned removed the marker, here the row goes, 1.4 % of Alpaca, as judges never
    rewrite). "[Your Name]" under a letter is no defect: a draft may leave it open. Evidence: {matched, where: prompt
    | response}. Of a preference row the prompt and `chosen` are judged; of a raw document only whether it is empty.
    """

    scope: ClassVar[Literal["row"]] = "row"

    def judge(self, rows: pa.Table, values: pa.Table) -> pa.Table:
        """Verdicts, aligned with `rows`."""
        found = [
            defect(prompt_of(row), response_of(row), document=row["text"] is not None)
            for row in rows.select(VIEW_COLUMNS).to_pylist()
        ]
        reasons = [None if one is None else one[0] for one in found]
        proof = [None if one is None else {"matched": one[1], "where": one[2]} for one in found]
        return verdicts([one is None for one in found], reasons, evidence=proof)


def defect(prompt: str, response: str, document: bool = False) -> tuple[str, str, str] | None:
    """The first defect of a row as (reason, matched text, where), or None."""
    answer = response.strip()
    if not answer:
        return "empty_response", "", "response"
    if document:
        return None
    return _of_response(prompt, answer) or _of_prompt(prompt.strip())


def _of_response(prompt: str, answer: str) -> tuple[str, str, str] | None:
    match = _NO_OUTPUT.match(answer)
    if match and not _NOT_AVAILABLE.search(_NOINPUT.sub("", prompt.strip())):
        return "no_output", match[0][:200], "response"
    match = _MERGED.search(answer)
    if match and "instruction" not in prompt.lower():
        return "merged_instruction", match[0].strip()[:200], "response"
    match = _STAND_IN.match(answer)
    if match:
        return "placeholder", match[0].strip(), "response"
    match = next((field for field in _INSERT.finditer(answer) if not _OPEN_FIELD.search(field[0])), None)
    if match and not _TEMPLATE.search(prompt):
        return "placeholder", match[0], "response"
    return None


def _of_prompt(prompt: str) -> tuple[str, str, str] | None:
    match = _MERGED.search(prompt)
    if match and re.search(r"\d", match[0]):  # "### Instruction:" alone is a common prompt format
        return "merged_instruction", match[0].strip()[:200], "prompt"
    match = _NOINPUT.search(prompt)
    if match:
        return "noinput_marker", match[0].strip(), "prompt"
    match = _ATTACHED.search(prompt) or _INSERTED.search(prompt)
    if match and len(prompt) - len(match[0]) < _SHORT and "</" not in prompt:
        return "missing_content", match[0].strip()[:200], "prompt"
    match = _URL.search(prompt)
    # the address's own label, "Article link:", tells what it is of, not what is asked
    if match and _CONTENT.search(prompt[: match.start("url")]) and not _ADDRESS.search(prompt[: match.start()]):
        return "missing_content", match["url"][:200], "prompt"
    return None
