"""A judge of prompts that a text model cannot serve: what they speak of is not there, or they want more than text."""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from ..flags import flagged
from ..folder import HouseError
from ..steps import Unmeasured

MEDIA = (
    r"(?:image|picture|photo(?:graph)?|painting|drawing|sketch|figure|diagram|graph|chart|plot|screenshot|logo|poster"
    r"|video|audio|sound|song|recording|file|document|attachment|comic|cartoon|map|article)s?"
)
# A line of the prompt that stands for something a text model cannot see.
_ATTACHED = re.compile(
    rf"^(?:!\[[^\]\n]*\]\([^)\n]*\)|[<\[(](?:an? |the |include |insert |attach(?:ed)? |see |link to |upload(?:ed)? )*"
    rf"{MEDIA}(?: (?:(?:attached|provided|here|below|link|url|file)\b[^>\]\)\n]*"
    r"|(?:of|from|showing)(?: [^\s>\])]+){1,3}))?[>\])])\s*$",
    re.IGNORECASE | re.MULTILINE,
)
_INSERTED = re.compile(r"^[<\[]insert\b[^>\]\n]{1,60}[>\]]\s*$", re.IGNORECASE | re.MULTILINE)
_SHORT = 400  # characters: a longer prompt has enough besides the picture; `</` shows that the line is a tag
# The prompt ends in the bare address of a page (a site's name alone may say enough) …
_URL = re.compile(r"(?:\A|\n)[^\n:]{0,24}:?[ \n]*<?(?P<url>(?:https?://|www\.)[^\s<>/]+/[^\s<>]+)>?\s*\Z")
# … and asks about what lies there, not about the address.
_CONTENT = re.compile(
    r"\b(?:article|story|web ?site|web ?page|page|blog|post|document|essay|paper|text|passage|content|book"
    rf"|report|data ?set|movie|film|trailer|advert\w*|artwork|art|piece|design|flag|{MEDIA})\b",
    re.IGNORECASE,
)
_ADDRESS = re.compile(
    r"\b(?:urls?|links?|domain|address|hyperlink|shorten|encod|pars|regex\w*|html|https? request|api|code|script"
    r"|program|scrap|crawl|python|java|sql|server|function|tweet|hashtag|cit(?:e|ation)|reference|bibliograph\w*|markdown)",
    re.IGNORECASE,
)
# One paragraph that speaks of "the following article" and ends: no colon, quotation, number or bracket brings it.
_NOTHING_FOLLOWS = re.compile(
    r"\A[^:\"“”'`\[\](){}<>=|\d\n]*?\b(?:the|these) following (?:(?!technolog|concept)[\w-]+ ){0,2}"
    rf"(?:{MEDIA}|paragraph|passage|text|sentence|stor(?:y|ies)|e-?mail|poem|data ?set|array|equation|expression|input"
    r"|material|conversation|dialogue|quote|excerpt|quotation|transcript|letter|essay|headline|tweet|speech|lyrics"
    r"|art ?piece|artwork)s?\b(?! (?:topic|technolog|concept|with|for|about|on|to (?:be|make)|pattern|format))"
    r"[^:\"“”'`\[\](){}<>=|\d\n?]*[.!]?\s*\Z",
    re.IGNORECASE,
)
_NO_CODE = re.compile(
    r"\A[^:\"“”`\[\](){}<>=|\n]*?\b(?:the|this|these) following (?:[\w+#-]+ ){0,3}(?:code|snippet|program|function"
    r"|script|query|class|method|algorithm)s?\b[^:\"“”`\[\](){}<>=|\n]*[.?!]?\s*\Z",
    re.IGNORECASE,
)
_SELF_CONTAINED = re.compile(
    r"\b(?:which|of) the following\b|\b(?:write|create|design|develop|implement|build)\b", re.I
)

_START = r"(?:\A|[\n.!?:]\s*)(?:please |can you |could you |i want you to |i need you to |i'd like you to )?"
_SOME = r"(?:me |us )?(?:(?:an?|the|this|that|some|my|your|two|three|\d+) )?"
_ONE = r"(?:me |us )?(?:an?|the|this|that|some|my|your|two|three|\d+) "
_DRAWN = (
    r"(?:images?|pictures?|photos?|photographs?|drawings?|paintings?|illustrations?|logos?|posters?|infographics?|memes?"
    r"|gifs?|icons?|cartoons?|collages?|wallpapers?|animations?|graphics?|flyers?|album cover|book cover|coloring page)"
)
_NOT_DRAWN = (  # what a text model can make of it after all
    r"(?!'|-| of the (?:planet|situation|future)| (?:description|caption|prompt|idea|concept|slogan|title"
    r"|tag ?line|name"
    r"|text|script|program|app\b|gallery|viewer|editor|class|processing|recognition|classif|generator|novel|book"
    r"|strip|card|design(?:er| brief| program)"
    r"|file|files|format|upload|in (?:html|css|svg|ascii|words)|using (?:html|css|svg|ascii|python|words|java)))"
)
_REQUESTS: dict[str, str] = {
    "image_output": rf"{_START}(?:(?:draw|paint|illustrate|photoshop) {_ONE}(?!.{{0,30}}\b(?:conclusion|comparison"
    r"|parallel|inference|distinction|attention|analogy|line|connection|venn|table|lesson|picture (?:in|with|of) "
    r"(?:words|the (?:future|situation)))s?\b)(?=[\w'\"])"
    rf"|(?:sketch|design|create|generate|produce|make|render) {_SOME}(?:(?!{_DRAWN}\b)[\w-]+ ){{0,3}}?{_DRAWN}\b"
    rf"{_NOT_DRAWN})",
    "audio_video": rf"{_START}(?:(?:play|stream) {_SOME}(?:[\w']+ ){{0,4}}?(?:song|music|video|track|album|playlist"
    r"|podcast|audio)\b|(?:transcribe|listen to|watch|caption) (?:the|this|an?) (?:\w+ ){0,2}(?:audio|video"
    r"|recording|clip"
    rf"|podcast)\b|(?:create|make|record|produce|generate|edit) {_SOME}(?:(?!video)[\w-]+ ){{0,3}}?(?:video"
    rf"|audio|recording"
    r"|podcast|soundtrack|voice ?over)s?\b(?!'|-| (?:games?|script|title|idea|description|essay|game\b|outline|name"
    r"|lesson plan|plan|concept|store|player|topic|summary|conferenc|tutorial on|ad script|streaming|production|editing"
    r"|episode|series|company|sharing|platform|rental|website|app\b|content)))",
    "browse": rf"{_START}(?:(?:search|browse|surf) (?:(?:on|in|through) )?(?:the )?(?:web|internet|google"
    rf"|online)\b(?! (?:safely|engine"
    r"|app|page|server|site|histor|advert|brows))|(?:look|find|check) (?:\w+ ){0,6}(?:online"
    r"|on (?:the )?(?:internet|web"
    r"|google))\s*[.?!]?\s*\Z"
    rf"|google (?:the|for)|(?:what(?:'s| is| are)|tell me|find|give me|get|show me|report|check|look up|provide"
    r") (?:me )?(?:the )?(?:(?:current|latest|live|real-time) |today's )(?:\w+ ){0,2}(?:weather|temperature"
    r"|stock price|price"
    r"|news|scores?|exchange rate|traffic|forecast|time in)\b)"
    r"|\bweather (?:forecast )?(?:like )?(?:for|in) (?:\w+ ){1,3}(?:today|tomorrow|right now|now)\b",
    "device": rf"{_START}(?:(?:set|create|add) {_SOME}(?:\w+ ){{0,2}}?(?:alarm|reminder|timer"
    rf"|calendar event) (?:for|to|at|in)"
    r"\b|(?:send|forward) (?:an? |the |this )(?:e-?mail|text|sms|text message|message) to\b|(?:book|order|reserve"
    r") (?:me )?(?:an? )(?:\w+ ){0,2}?(?:flight|ticket|hotel room|hotel|table|pizza|taxi|cab"
    r"|ride)\b(?! (?:system|app|form))"
    r"|(?:turn|switch) (?:on|off) (?:the|my) |(?:increase|decrease|change|set) the (?:font size|volume|brightness"
    r"|screen)\b)",
}
_COMPILED = {name: re.compile(pattern, re.IGNORECASE) for name, pattern in _REQUESTS.items()}
_AS_TEXT = re.compile(  # of pictures, music and tools there is much that a text can say
    r"\b(?:code|html|css|svg|python|java(?:script)?|c\+\+|sql|script|program|function|latex|tikz|ascii|matplotlib|json|yaml"
    r"|algorithm|api|describ|descript|caption|lyrics?|sentence|dialogue|rewrite|rephrase|translat|paraphras|edit this"
    r"|essay|how (?:to|do|would|can|could)|steps|instructions|story|list of|command|web ?site|web ?page|app)\b",
    re.IGNORECASE,
)
CLASSES = ("url_content", "attached_content", "image_output", "audio_video", "browse", "device")

# What RE2 looks for before Python looks closely: a word of each rule that no match can be without. Two gaps in one
# pattern would multiply the states of RE2's automaton (19 µs a row instead of 1), so those with a gap stand alone.
_NO_TEXT = r"[^:\"“”`\[\](){}<>=|\n]*"
_LOOK = (
    r"(?i)(?:https?://|www\.)\S*\s*$",
    rf"(?im)^(?:!\[|[<\[(][^\n]*{MEDIA}|[<\[]insert)",
    rf"(?i)^{_NO_TEXT}following {_NO_TEXT}$",
)
_LOOK_SHORT = (
    r"(?i)draw|paint|illustrat|photoshop|\b(?:image|pictures?\b|photo|logo|poster|infographic|meme|gif|icon|cartoon"
    r"|collage|wallpaper|animation|graphic|flyer)|(?:album|book) cover|coloring page|(?:song|music|video|track|album"
    r"|playlist|podcast|audio|recording|clip|soundtrack|voice ?over)s?\b|\b(?:web|internet|google|online|weather"
    r"|temperature|stock|exchange|traffic|forecast|alarm|reminder|timer|calendar)"
    r"|(?:current|latest|live|time|day.s) (?:\w+ )?(?:price|news|score|time)"
    r"|(?:send|forward) (?:an?|the|this) (?:e-?mail|text|sms|message)|(?:book|order|reserve) (?:me )?an? "
    r"|(?:turn|switch) (?:on|off) (?:the|my)|(?:increase|decrease|change|set) the (?:font|volume|bright|screen)"
)
_PADDED = r"^[^!-~]|[^!-~]$"  # may be shorter than its length


def may_ask(prompts: pa.Array) -> npt.NDArray[np.bool_]:
    """Prompts (large_string) of which `request` or `absent_code` may say something."""
    from ..text.texts import matching

    found = matching(prompts, *_LOOK)
    short = np.asarray(pc.less_equal(pc.utf8_length(prompts), _SHORT)) | matching(prompts, _PADDED)
    rows = np.flatnonzero(short & ~found)
    found[rows] = matching(prompts.take(pa.array(rows)), _LOOK_SHORT)
    return found


@dataclass(frozen=True)
class UnservableRequest(Unmeasured):
    """Drops rows whose prompt a text model cannot serve, since what it speaks of is not there or it wants more than
    text.

    classes (default all; English): url_content (asks about the page behind a bare address), attached_content ("<image
    attached>", or "the following article" with nothing after it), image_output ("Design a logo"), audio_video ("Play
    some jazz"), browse ("the latest news", "search the web"), device ("Set an alarm for 7"). The class is the reason;
    evidence: {matched}. Requests for a description, a script, code or lyrics are kept. A raw document is kept, and so
    is a row with `tools` or tool calls: it may have what it takes. Found by AlpacaDataCleaned to teach invention.
    """

    classes: tuple[str, ...] = CLASSES

    scope: ClassVar[Literal["row"]] = "row"

    def __post_init__(self) -> None:
        known_classes(self, self.classes, CLASSES)

    def judge(self, rows: pa.Table, values: pa.Table) -> pa.Table:
        """Verdicts, aligned with `rows`."""
        from ..text.texts import at, texts

        prompts = texts(rows, "prompt")
        look = np.flatnonzero(may_ask(prompts))
        equipped = rows["tools"].is_valid().to_numpy()
        found = {}
        for row, prompt in zip(look.tolist(), at(prompts, look), strict=True):
            one = None if equipped[row] else request(prompt, self.classes)
            if one is not None:
                found[row] = one[0], {"matched": one[1]}
        return flagged(rows.num_rows, found)


def known_classes(judge: object, asked: Sequence[str], known: Sequence[str]) -> None:
    """A HouseError where a class is unknown or none is asked for."""
    unknown = [name for name in asked if name not in known]
    if unknown or not asked:
        fault = f"name unknown ones {unknown}" if unknown else "are none"
        raise HouseError(f"{type(judge).__name__}: classes {list(asked)} {fault}; take some of {', '.join(known)}")


def request(prompt: str, classes: Sequence[str] = CLASSES) -> tuple[str, str] | None:
    """The first of `classes` that the prompt belongs to and the words that show it, or None."""
    prompt = prompt.strip()
    for name in classes:
        matched = _FINDERS[name](prompt)
        if matched is not None:
            return name, matched[:200]
    return None


def url_content(prompt: str) -> str | None:
    """The bare address that a prompt ends in and asks about."""
    match = _URL.search(prompt)
    # the address's own label, "Article link:", tells what it is of, not what is asked
    if match and _CONTENT.search(prompt[: match.start("url")]) and not _ADDRESS.search(prompt[: match.start()]):
        return match["url"]
    return None


def attached_content(prompt: str) -> str | None:
    """The line that stands for a picture or a file, or the words that announce a text which does not come."""
    match = _ATTACHED.search(prompt) or _INSERTED.search(prompt)
    if match and len(prompt) - len(match[0]) < _SHORT and "</" not in prompt:
        return match[0].strip()
    match = _NOTHING_FOLLOWS.match(prompt)
    if match and not re.search(r"\b(?:which|any|one) of the following\b", prompt, re.IGNORECASE):
        return match[0]
    return None


def absent_code(prompt: str) -> str | None:
    """The words that announce code which does not come: "Explain the following code snippet."."""
    match = _NO_CODE.match(prompt)
    return match[0] if match and not _SELF_CONTAINED.search(prompt) else None


def _wants(name: str) -> Callable[[str], str | None]:
    def find(prompt: str) -> str | None:
        if len(prompt) > _SHORT:
            return None
        match = _COMPILED[name].search(prompt)
        return None if match is None or _AS_TEXT.search(prompt) else match[0].strip(" \n.!?:")

    return find


_FINDERS: dict[str, Callable[[str], str | None]] = {
    "url_content": url_content,
    "attached_content": attached_content,
    **{name: _wants(name) for name in _REQUESTS},
}
