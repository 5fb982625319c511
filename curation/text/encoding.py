"""Text that went through a wrong encoding: a cheap pattern that finds every candidate, and ftfy, which repairs them."""

import re
from functools import lru_cache

# what ftfy takes text for that was UTF-8 (ftfy.chardata.CHARMAP_ENCODINGS)
_READ_AS = (
    "latin-1 windows-1252 windows-1251 windows-1250 windows-1253 windows-1254 windows-1257 iso-8859-2 mac-roman cp437"
)
# Characters that no text means: C0 without tab and line ends, DEL, C1, deprecated and interlinear marks, byte order
# marks within text, U+FFFC and the replacement character.
CONTROLS = r"[\x00-\x08\x0b\x0e-\x1f\x7f-\x9f\x{206a}-\x{206f}\x{feff}\x{fff9}-\x{fffd}]"
_CONTROL = re.compile("[\x00-\x08\x0b\x0e-\x1f\x7f-\x9f\u206a-\u206f\ufeff\ufff9-\ufffd]")
_NEAR = re.compile(r"[\x00-\x7f]{0,4}[^\x00-\x7f]+(?:[\x00-\x7f]{1,8}[^\x00-\x7f]+)*[\x00-\x7f]{0,4}")
_ENTITY = r"&(?:#\d+|#[xX][0-9a-fA-F]+|\w+);"
_CURLED = "[‘’‚‛“”„‟ʼ]"


@lru_cache
def suspicious(unescape_html: bool = False, uncurl_quotes: bool = False) -> str:
    """A pattern of RE2 that matches every text which `repaired` would change: a character that no text means, or two
    neighbours that are the first two bytes of a UTF-8 character in one of the encodings it is mistaken for."""
    first, second = set(), {" ", "\xa0", "\ufffd"}  # a no-break space is often a space by now
    for name in _READ_AS.split(" "):
        first |= set(bytes(range(0xC2, 0xF5)).decode(name, "ignore"))
        second |= set(bytes(range(0x80, 0xC0)).decode(name, "ignore")) | {chr(code) for code in range(0x80, 0xC0)}
    kinds = [CONTROLS, f"[{_class(first)}][{_class(second)}]"]
    return "|".join([*kinds, *([_ENTITY] if unescape_html else []), *([_CURLED] if uncurl_quotes else [])])


def _class(letters: set[str]) -> str:
    return "".join(rf"\x{{{ord(letter):x}}}" for letter in sorted(letters))


def repaired(text: str, unescape_html: bool = False, uncurl_quotes: bool = False) -> str:
    """The text as ftfy repairs it: mojibake and characters that no text means; width, ligatures, normal form and line
    ends stay."""
    import ftfy

    if not (unescape_html or uncurl_quotes or damage(text)):  # ftfy looks no further at a text without badness either
        return text
    config = ftfy.TextFixerConfig(
        unescape_html=unescape_html,
        uncurl_quotes=uncurl_quotes,
        fix_latin_ligatures=False,
        fix_character_width=False,
        fix_line_breaks=False,
        normalization=None,
        explain=False,
    )
    return ftfy.fix_text(text, config)


def damage(text: str) -> int:
    """How many characters no text means, and how many sequences of characters that only a wrong encoding makes."""
    return len(_CONTROL.findall(text)) + _unlikely(_CONTROL.sub("", text))


def _unlikely(text: str) -> int:
    """ftfy's badness, of the neighbourhoods of what is not ASCII: its patterns reach no further than three characters,
    and it takes 1 µs a character."""
    from ftfy.badness import badness

    return badness("\n\n".join(_NEAR.findall(text)))
