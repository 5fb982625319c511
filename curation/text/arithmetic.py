"""Arithmetic that can be checked: what a prompt asks to be worked out, and what an answer claims to be equal.

Made to be sure and not complete: a sum that is flagged is wrong (rounding, fractions and thousands separators are
allowed for); what cannot be read with certainty is taken to be right.
"""

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from fractions import Fraction
from statistics import median

_NUMBER = r"\d+(?:,\d{3})*(?:\.\d+)?|\.\d+"
_TOKEN = re.compile(rf"\s*(?:(?P<number>{_NUMBER})|(?P<sign>\*\*|[-+*/^()×÷−–x]))")
_OPERATORS = {"×": "*", "x": "*", "÷": "/", "−": "-", "–": "-", "**": "^"}
_RUN = re.compile(r"[\d.,+\-*/^×÷−–x() ]+")
_OPERATION = re.compile(r"[\d)] *(?:\*\*|[-+*/^×÷−–x]) *[-(]*[\d.]")
_NOT_BEFORE = re.compile(
    r"[\w.,$€£%^=+*/×÷<>~√!°\\{}\[\]|&#_≈−–:-]\s*\Z|[-(]\s*\Z|\b(?:of|and|by|or|to|than|mod|log|sqrt)\s*\Z", re.I
)
_ASKS = re.compile(
    r"\b(?:calculate|compute|evaluate|what(?:'s| is)|solve|simplify|find|answer|work out|result|sum|add|multiply"
    r"|subtract"
    r"|divide|value)\b",
    re.IGNORECASE,
)
_OTHER_TASK = re.compile(
    r"\b(?:convert|notation|postfix|prefix|derivative|integral|explain|function|code|program|script|round(?:ed)?|estimat"
    r"|approximat|remainder|mod(?:ulo|ulus)?|binary|hex\w*|octal|base|fraction|percent\w*|range|date|ratio|rewrite|describe|"
    r"why|prove|equivalent|factor|prime|word(?:s)?|story|sentence|inverse|reciprocal|average|mean|median|complete|fill|"
    r"minimum|maximum|matri\w+|vector|polynomial|quotient|without|log\w*|root|sqrt|different|steps?|score|game|address|"
    r"phone|version|weighted|quartile|deviation|variance|probab\w+|how would|formula|error|mistake|wrong"
    r"|incorrect)\b|%",
    re.IGNORECASE,
)
_SAID = re.compile(rf"(?P<whole>\d+) (?P<part>\d+/\d+)|(?P<over>\d+) ?/ ?(?P<under>\d+)|(?P<number>-?(?:{_NUMBER}))")
_CODE = re.compile(r"[{};]|\w\(|\breturn\b|=>")
SHORT_ANSWER, SHORT_PROMPT = 400, 300  # characters


# What RE2 looks for in a prompt before `wrong_result` looks closely: an operation, a list of numbers, a conversion.
LOOK_ASKED = (
    r"[\d)] *(?:\*\*|[-+*/^x×÷−–]) *[-(]*[\d.]",
    r"\d\s*(?:,|and)\s*(?:and )?-?\d[\d.]*\s*(?:,|and)\s*(?:and )?-?\d",
    r"(?i)convert [^\n]*\d[^\n]*to ",
)


LOOK_VERB = (
    r"(?i)calculat|comput|evaluat|what.s|what is|solve|simplif|find|answer|work out|result|\bsum\b|\badd|multipl"
    r"|subtract"
    r"|divid|value|median|mean|average|convert"
)


class _Unreadable(Exception):
    """The expression is none that can be evaluated."""


def wrong_arithmetic(prompt: str, answer: str) -> str | None:
    """What is wrong and what would be right, as "6 + 3 is 9", or None where nothing that can be checked is wrong."""
    return wrong_equation(answer) or wrong_result(prompt, answer)


def wrong_equation(text: str) -> str | None:
    """The first "3 * 4 = 13" of a text: numbers alone on the left, one number on the right, unequal."""
    for match in _RIGHT.finditer(text):
        left, before = _run_before(text, match.start())
        right = match["right"]
        simple = _SIMPLE.fullmatch(left)
        if simple and _OPERATE[simple[2]](int(simple[1]), int(simple[3])) == right:  # most are right, and said so
            continue
        if not _OPERATION.search(left) or not before.isascii() or _NOT_BEFORE.search(before):
            continue
        if _NOT_AFTER.match(text, match.end()) or _CHAIN.search(left):
            continue
        value = _value(left)
        if value is not None and not _agrees(value, right, division="/" in left or "÷" in left):
            return f"{left} is {_plain(value)}, not {right}"
    return None


_SIMPLE = re.compile(r"(\d{1,9}) ?([-+*x×]) ?(\d{1,9})")
_OPERATE: dict[str, Callable[[int, int], str]] = {
    "+": lambda a, b: str(a + b),
    "-": lambda a, b: str(a - b),
    **dict.fromkeys("*x×", lambda a, b: str(a * b)),
}
_RIGHT = re.compile(rf" ?= ?[$€£]?(?P<right>-?(?:{_NUMBER}))")
_NOT_AFTER = re.compile(
    r"\d|,\d|\.\d|\s*[-+*/^×÷%=−–(x°\\]|\s*(?:and|r|R|remainder|mod)\b|\s?[a-zA-Z]\b|e[+-]?\d|…|\.\.\.|!|:\d|\s*\d"
)
_CHAIN = re.compile(r"/[^()+-]*[/*]")  # a / b / c and a / b * c are often meant as a / (b * c), or as a of b / c
_LONGEST = 120  # characters of an expression


def _run_before(text: str, end: int) -> tuple[str, str]:
    """The expression that ends at `end`, and some characters before it."""
    window = text[max(0, end - _LONGEST - 12) : end]
    run = _RUN.match(window[::-1])
    left = window[len(window) - min(run.end(), _LONGEST) :].lstrip(" .,*/^×÷x)") if run else ""
    return left.rstrip(), window[max(0, len(window) - len(left) - 12) : len(window) - len(left)]


def wrong_result(prompt: str, answer: str) -> str | None:
    """What a short prompt asks to be worked out and a short answer does not hold."""
    if len(prompt) > SHORT_PROMPT or len(answer) > SHORT_ANSWER or not re.search(r"\d", answer) or _CODE.search(answer):
        return None
    asked = _asked_sum(prompt) or _asked_list(prompt) or _asked_conversion(prompt)
    if asked is None:
        return None
    said = _said(answer, Fraction(0) if asked.exact else Fraction(1, 2))
    if any(abs(number - asked.value) <= max(asked.slack * abs(asked.value), rounding) for number, rounding in said):
        return None
    return f"{asked.name} is {_plain(asked.value)}"


@dataclass(frozen=True)
class Asked:
    """What is asked and its value; the relative error that is forgiven; whether a whole number must be exact (else it
    may be rounded)."""

    name: str
    value: Fraction
    slack: Fraction = Fraction(0)
    exact: bool = False


def _asked_sum(prompt: str) -> Asked | None:
    if not _OPERATION.search(prompt) or not _ASKS.search(prompt) or _OTHER_TASK.search(prompt):
        return None
    found = {match[0].strip(" .,x"): match for match in _RUN.finditer(prompt) if _OPERATION.search(match[0])}
    if len(found) != 1:
        return None
    text, match = found.popitem()
    before, after = prompt[: match.start()][-3:], prompt[match.end() :][:4]
    if _CHAIN.search(text):
        return None
    clean = not re.search(r"[\w.^=*/√!$£€\\{-]\s*\Z", before) and not re.match(
        r"\s*[-+*/^×÷%°\\!]|\s?[a-zA-Z(_]\b|\s*=\s*\d|\d|\(", after
    )
    numbers = re.findall(r"\d+", prompt)
    if not clean or len(numbers) > 2 * len(re.findall(r"\d+", text)):
        return None
    if re.fullmatch(r"\d+\s*[-/–]\s*\d+(?:\s*[-/–]\s*\d+)*", text) and not re.search(r"\s", text) and "/" not in text:
        return None  # a range or a date
    value = _value(text)
    return None if value is None else Asked(text, value)


_STATISTICS: dict[str, Callable[[list[Fraction]], Fraction]] = {
    "median": median,
    "mean": lambda numbers: sum(numbers, Fraction(0)) / len(numbers),
    "average": lambda numbers: sum(numbers, Fraction(0)) / len(numbers),
    "sum": lambda numbers: sum(numbers, Fraction(0)),
}
_STATISTIC = re.compile(r"\b(median|mean|average|sum)\b", re.IGNORECASE)
_LIST = re.compile(
    r"(?<![\w.$/-])-?(?:\d+(?:\.\d+)?)(?:\s*,\s*(?:and )?-?\d+(?:\.\d+)?"
    r"|\s+and\s+-?\d+(?:\.\d+)?){2,}(?![\w%/(^]|\.\d)"
)
_NOT_A_LIST = re.compile(
    r"\b(?:squares?|cubes?|even|odd|positive|negative|prime|weighted|absolute|first|last|digits?|function|code|program"
    r"|python|explain|modes?|range|deviation|variance|roots?|moving|missing|which|compare|product|differen\w+|matri\w+"
    r"|geometric|harmonic|equal|complete|pairs?|two|series|sequence is|largest|smallest|highest|lowest|squared"
    r"|round\w*|array manip"
    r"|triangle|angles?|write|algorithm|sort\w*|list all|subset|target|greater|less|above|below|between|per|rate)\b",
    re.IGNORECASE,
)


def _asked_list(prompt: str) -> Asked | None:
    asked = {name.lower() for name in _STATISTIC.findall(prompt)}
    if len(asked) != 1 or _NOT_A_LIST.search(prompt):
        return None
    lists = {re.sub(r"[^\d.,-]", "", match[0].replace("and", ",")): match for match in _LIST.finditer(prompt)}
    texts = {tuple(re.findall(r"-?\d+(?:\.\d+)?", match[0])) for match in lists.values()}
    if len(texts) != 1:
        return None
    (text,) = texts
    rest = prompt
    for match in lists.values():
        rest = rest.replace(match[0], " ")
    if re.search(r"\d", rest):  # something else counts too
        return None
    name = asked.pop()
    value = _STATISTICS[name]([Fraction(number) for number in text])
    return Asked(f"{name} of {', '.join(text)}", value, exact=name in ("median", "sum"))


_UNITS: dict[str, tuple[str, str]] = {  # names of a unit -> (kind, size)
    "mm|millimet(?:er|re)s?": ("length", "0.001"),
    "cm|centimet(?:er|re)s?": ("length", "0.01"),
    "m|met(?:er|re)s?": ("length", "1"),
    "km|kms|kilomet(?:er|re)s?": ("length", "1000"),
    "in|inch(?:es)?": ("length", "0.0254"),
    "ft|feet|foot": ("length", "0.3048"),
    "yd|yards?": ("length", "0.9144"),
    "miles?": ("length", "1609.344"),
    "mg|milligrams?": ("mass", "0.001"),
    "g|grams?": ("mass", "1"),
    "kg|kgs|kilos?|kilograms?": ("mass", "1000"),
    "lbs?|pounds?": ("mass", "453.59237"),
    "oz|ounces?": ("mass", "28.349523"),
    "ml|millilit(?:er|re)s?": ("volume", "0.001"),
    "l|lit(?:er|re)s?": ("volume", "1"),
    "seconds?": ("time", "1"),
    "minutes?": ("time", "60"),
    "hours?": ("time", "3600"),
    "days?": ("time", "86400"),
    "weeks?": ("time", "604800"),
    "°? ?f|(?:degrees? )?fahrenheit": ("heat", "f"),
    "°? ?c|(?:degrees? )?celsius": ("heat", "c"),
    "k|kelvins?": ("heat", "k"),
}
_UNIT = "|".join(f"(?:{names})" for names in _UNITS)
_CONVERSION = re.compile(
    rf"\bconvert (?:the |a |an )?(?:temperature |length |weight |distance "
    rf"|measurement )?(?:of )?(?P<number>-?(?:{_NUMBER}))"
    rf" ?(?P<unit>{_UNIT}) (?:in)?to (?:the )?(?P<other>{_UNIT})\s*[.?!]?\s*\Z",
    re.IGNORECASE,
)
_HEAT = {
    "c": (Fraction(1), Fraction(0)),
    "k": (Fraction(1), Fraction("-273.15")),
    "f": (Fraction(5, 9), Fraction(-160, 9)),
}


def _asked_conversion(prompt: str) -> Asked | None:
    match = _CONVERSION.search(prompt)
    if match is None:
        return None
    number = Fraction(match["number"].replace(",", ""))
    (kind, size), (other_kind, other_size) = _unit(match["unit"]), _unit(match["other"])
    if kind != other_kind:
        return None
    name = f"{match['number']} {match['unit']} in {match['other']}"
    if kind == "heat":
        (factor, shift), (other, other_shift) = _HEAT[size], _HEAT[other_size]
        return Asked(name, (number * factor + shift - other_shift) / other, Fraction(1, 100))
    return Asked(name, number * Fraction(size) / Fraction(other_size), Fraction(2, 100))


def _unit(text: str) -> tuple[str, str]:
    return next(what for names, what in _UNITS.items() if re.fullmatch(names, text, re.IGNORECASE))


def _said(answer: str, whole: Fraction) -> Iterator[tuple[Fraction, Fraction]]:
    """Every number of an answer, and by how much it may be rounded; `whole`: a whole number."""
    for match in _SAID.finditer(answer):
        if match["whole"]:
            over, under = match["part"].split("/")
            if int(under):
                yield int(match["whole"]) + Fraction(int(over), int(under)), Fraction(0)
            continue
        if match["over"]:
            if int(match["under"]):
                yield Fraction(int(match["over"]), int(match["under"])), Fraction(0)
            yield Fraction(match["under"]), whole
            continue
        number = Fraction(match["number"].replace(",", ""))
        rounding = rounding_of(match["number"]) or whole
        yield number, rounding
        yield -number, rounding  # "5 - 8 is minus 3", and a dash that is read as a sign


def rounding_of(number: str) -> Fraction:
    """How far a number as it is written may lie from what it stands for: one unit of its last decimal (3.33 and 3.34
    may both stand for 10 / 3), and nothing for a whole number."""
    decimals = len(number.partition(".")[2])
    return Fraction(1, 10**decimals) if decimals else Fraction(0)


def _agrees(value: Fraction, written: str, division: bool) -> bool:
    """Whether a written result is `value`, rounded or, after a division, cut off."""
    number = Fraction(written.replace(",", ""))
    if value.denominator == 1 and "." not in written:
        return value == number
    return abs(value - number) <= (rounding_of(written) or Fraction(1, 2)) * (2 if division else 1)


def _value(text: str) -> Fraction | None:
    """The value of an expression of numbers, + - * / ^ and brackets; None where it is none."""
    tokens, at = [], 0
    while at < len(text.rstrip()):
        match = _TOKEN.match(text, at)
        if match is None:
            return None
        sign = match["sign"]
        tokens.append(match["number"].replace(",", "") if match["number"] else _OPERATORS.get(sign, sign))
        at = match.end()
    try:
        value, rest = _terms(tokens, 0)
    except (_Unreadable, ZeroDivisionError, OverflowError):
        return None
    return value if rest == len(tokens) else None


def _terms(tokens: list[str], at: int) -> tuple[Fraction, int]:
    value, at = _factors(tokens, at)
    while at < len(tokens) and tokens[at] in "+-":
        other, after = _factors(tokens, at + 1)
        value = value + other if tokens[at] == "+" else value - other
        at = after
    return value, at


def _factors(tokens: list[str], at: int) -> tuple[Fraction, int]:
    value, at = _power(tokens, at)
    while at < len(tokens) and tokens[at] in "*/":
        other, after = _power(tokens, at + 1)
        value = value * other if tokens[at] == "*" else value / other
        at = after
    return value, at


def _power(tokens: list[str], at: int) -> tuple[Fraction, int]:
    if at < len(tokens) and tokens[at] == "-":
        value, at = _power(tokens, at + 1)
        return -value, at
    value, at = _atom(tokens, at)
    if at < len(tokens) and tokens[at] == "^":
        exponent, at = _power(tokens, at + 1)
        if exponent.denominator != 1 or abs(exponent) > 20 or abs(value) > 10**6:
            raise _Unreadable
        value = value ** int(exponent)
    return value, at


def _atom(tokens: list[str], at: int) -> tuple[Fraction, int]:
    if at >= len(tokens):
        raise _Unreadable
    if tokens[at] == "(":
        value, at = _terms(tokens, at + 1)
        if at >= len(tokens) or tokens[at] != ")":
            raise _Unreadable
        return value, at + 1
    if not tokens[at][0].isdigit() and tokens[at][0] != ".":
        raise _Unreadable
    return Fraction(tokens[at]), at + 1


def _plain(value: Fraction) -> str:
    return str(value) if value.denominator == 1 else f"{float(value):g}"
