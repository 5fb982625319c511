r"""Where an answer says its result, and what that result is as a number.

Conventions: GSM8K's `#### 72`, MATH's `\boxed{…}` (also `\fbox`), `A: 72` of the published GSM8K solutions, "the answer
is 72", `Answer: 72`, and at last the last number of the text. What the result means beyond a number is for
`curation.algebra` to say.
"""

import re
from fractions import Fraction

HASHES = re.compile(r"#{4}[ \t]*(?:\n[ \t]*)?(\S[^\n]*)")
BOX = re.compile(r"\\(?:boxed|fbox)\s*")
SAID = re.compile(
    r"(?:^|\n)[ \t*_]*A(?:nswer)?[ \t*_]*:[ \t*_]*(\S[^\n]*)"
    r"|\banswer[ \t*_]*(?::|\bis\b:?|\bequals\b|=)[ \t*_]*(\S[^\n]*)",
    re.IGNORECASE,
)
DIGITS = r"(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?|\.\d+"
NUMBER = re.compile(rf"(?<![\w.])(?:[-+\u2212]\s?)?[$€£¥]?\s?(?:{DIGITS})(?:\s?/\s?\d+(?![\d.]))?\s?%?")
WHOLE = re.compile(
    rf"(?P<sign>[-+\u2212]?)\s*[$€£¥]?\s*(?P<sign2>-?)(?P<digits>{DIGITS})(?:\s*/\s*(?P<under>\d+))?\s*(?P<percent>%?)"
    r"(?P<unit>(?:\s+(?!(?:pi|or|and|to)\b)[A-Za-z][A-Za-z.'/-]+|\s*°)*)"
)
SIGNS = (  # as they are typed -> in LaTeX
    (re.compile(r"(?<![\\A-Za-z])pi(?![A-Za-z])|π"), r"\\pi "),
    (re.compile(r"(?<![\\A-Za-z])inf(?:inity|ty)?(?![A-Za-z])|∞"), r"\\infty "),
    (re.compile(r"(?:(?<![\\A-Za-z])sqrt|√)\s*(?:\(([^()]*)\)|(\d+))"), r"\\sqrt{\1\2}"),
    (re.compile(r"^\{([^{}\\]*,[^{}\\]*)\}$"), r"\\{\1\\}"),
)
MIXED = re.compile(r"(-?)(\d+)\s+(\d+)\s*/\s*([1-9]\d*)")
POWER = re.compile(rf"[-+]?(?:{DIGITS})[eE][-+]?\d{{1,2}}")
WORD = re.compile(r"(?!(?:pi|inf|infinity|sqrt|log|ln|exp|sin|cos|tan)(?![A-Za-z]))(?<![A-Za-z])[A-Za-z]{2,}")
MEASURED = re.compile(rf"\W*(?:{DIGITS})(?:\s+[A-Za-z]|[A-Za-mo-w])(?:/[A-Za-z])?(?:\^?[23]|[\u00b2\u00b3])?\W*")  # 5 m
MAGNITUDES = {"hundred": 100, "thousand": 1000, "million": 10**6, "billion": 10**9, "trillion": 10**12}
SPACES = re.compile(r"(?<!\\)\\[!,;: ]|\\q?quad(?![A-Za-z])|~|\s+")
TEXT = re.compile(r"\\(?:text(?:bf|it|rm|tt|normal)?|mathrm|mathbf|mbox|operatorname)\s*\{([^{}]*)\}")
FORMULA = re.compile(r"[\\^_]|^[^A-Za-z]*[a-zA-Z]?[^A-Za-z]*$")
LONGEST = 400  # characters of a result; longer ones are no results
DIGITS_AT_MOST = 100  # of a number; longer ones are decimals that never ended


def final_answer(text: str, last_number: bool = True) -> str | None:
    r"""The text of the result, or None. The last `####` or `\boxed` goes before the last "answer is"; last_number: the
    last number of the text where nothing marks a result."""
    found = _marked(text)
    if found is None:
        said = list(SAID.finditer(text))
        found = _of_sentence(said[-1][1] or said[-1][2]) if said else None
    if found is None and last_number:
        numbers = NUMBER.findall(text)
        found = numbers[-1] if numbers else None
    return found if found is not None and found.strip() and len(found) <= LONGEST else None


def reference_answer(text: str) -> str | None:
    """The result of a reference: what it marks, the whole of it where it is a line without marks, else as
    `final_answer`."""
    marked = final_answer(text, last_number=False)
    stripped = text.strip()
    if marked is None and stripped and "\n" not in stripped and len(stripped) <= LONGEST:
        bare = number(stripped) is not None or len(stripped.split()) <= 8 or FORMULA.search(stripped) is not None
        return stripped if bare else final_answer(text)
    return marked or final_answer(text)


def _marked(text: str) -> str | None:
    """What the last `####` or `\\boxed` holds."""
    hashes = list(HASHES.finditer(text))
    boxes = [(match.start(), inner) for match in BOX.finditer(text) if (inner := _boxed(text, match.end())) is not None]
    if hashes and (not boxes or hashes[-1].end() > boxes[-1][0] + len(boxes[-1][1]) + 20):
        return hashes[-1][1].strip()
    return boxes[-1][1].strip() if boxes else None


def _boxed(text: str, start: int) -> str | None:
    r"""What stands in the braces that open at `start`, or after `\boxed ` without braces; None for an open brace."""
    if text[start : start + 1] != "{":
        bare = re.compile(r"[^\s$.,]+").match(text, start)
        return bare[0] if bare else None
    depth = 0
    for at in range(start, len(text)):
        if text[at] in "{}" and text[at - 1] != "\\":
            depth += 1 if text[at] == "{" else -1
            if depth == 0:
                return text[start + 1 : at]
    return None


def _of_sentence(said: str) -> str | None:
    """The result in what follows "answer is": its formula, a number, or the words up to the sentence's end."""
    formula = re.search(r"\$\$?([^$]+)\$\$?|\\\((.+?)\\\)|\\\[(.+?)\\\]", said)
    if formula and (not re.match(r"\s*[\d.,]+", formula[1] or "") or said.startswith(("$$", "\\"))):
        return next(group for group in formula.groups() if group is not None)
    said = re.split(r"(?<=[^\d])\.(?:\s|$)|(?<=\d)\.(?:\s|$)", said.strip("*_ \t"))[0].strip("*_ \t")
    if number(said) is not None or "\\" in said:
        return said
    if "=" in said:
        said = said.rsplit("=", 1)[1].strip()
    if _is_formula(said):
        return said
    one = NUMBER.search(said)
    return one[0] if one else said or None


def _is_formula(said: str) -> bool:
    """Whether a result without words is more than one number, of which none alone is the result: (1, 2), pi/2, 10^3."""
    said = re.sub(r"(?<=[\d%])\s+\(.*\)$", "", said)  # 18 (3*6)
    many = len(re.findall(rf"{DIGITS}|[A-Za-z]+|[√π∞]", said)) > 1
    return many and not WORD.search(said) and not MEASURED.fullmatch(said)


def plain(said: str) -> str:
    r"""A result without what only dresses it: spaces, `$…$`, `\text{…}`, `\left`, `\!`, thousands commas of LaTeX, a
    full stop."""
    said = said.strip().strip("*").strip()
    said = re.sub(r"^\\\(|\\\)$|^\\\[|\\\]$", "", said)
    if len(said) > 1 and said[0] == said[-1] == "$":
        said = said.strip("$")
    said = re.sub(r",\\!\s*", ",", said).replace("\\$", "$").replace("\\%", "%").replace("\u2212", "-")
    said = re.sub(r"\^\s*\{?\s*\\circ\s*\}?|\\degree(?![A-Za-z])", "°", said)
    said = re.sub(r"\\(?:left|right)(?![A-Za-z])", "", said)
    for written, sign in SIGNS:
        said = written.sub(sign, said)
    said = re.sub(r"\\[dt]frac(?![A-Za-z])", r"\\frac", said)
    said = re.sub(r"\\frac\s*(\d)\s*(\d)(?!\d)", r"\\frac{\1}{\2}", said)
    said = SPACES.sub(" ", TEXT.sub(r" \1 ", said)).strip()
    return said.rstrip(".").strip()


def number(said: str) -> tuple[Fraction, bool] | None:
    r"""The number that a result is, and whether it is said in per cent; units and currencies are left out, `1/2` and
    `\frac{1}{2}` are fractions, "2 1/2", 1e3 and "2 million" are one number. None for anything else, such as
    5x or a list."""
    said = plain(said)
    if len(said) > DIGITS_AT_MOST:
        return None
    said = re.sub(r"^(-?)\s*(?:\\frac\s*\{\s*(\d+)\s*\}\s*\{\s*(\d+)\s*\})$", r"\1\2/\3", said)
    if mixed := MIXED.fullmatch(said):
        value = int(mixed[2]) + Fraction(int(mixed[3]), int(mixed[4]))
        return (-value if mixed[1] else value), False
    if POWER.fullmatch(said):
        return Fraction(said.replace(",", "")), False
    match = WHOLE.fullmatch(said)
    if match is None or (match["under"] and int(match["under"]) == 0):
        return None
    value = Fraction(match["digits"].replace(",", "")) / int(match["under"] or 1)
    for word in match["unit"].lower().split():
        value *= MAGNITUDES.get(word, 1)
    negative = (match["sign"] in ("-", "\u2212")) != bool(match["sign2"])
    return (-value if negative else value), bool(match["percent"])


def equal_numbers(one: tuple[Fraction, bool], other: tuple[Fraction, bool]) -> bool:
    """Whether two results of `number` are one: exactly, and 25 % is both 25 and 0.25."""
    (a, percent_a), (b, percent_b) = one, other
    if a == b:
        return True
    return percent_a != percent_b and (a / 100 == b if percent_a else a == b / 100)


def normal_form(said: str) -> str:
    """A text that equal numbers share; else the result undressed."""
    found = number(said)
    return str(found[0]) + "%" * found[1] if found is not None else plain(said).replace(" ", "")
