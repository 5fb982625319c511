"""Which rows hold arithmetic that is worth checking: a compiled first look before `arithmetic` reads closely."""

from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from ..duplicates.shingles import compiled
from .arithmetic import LOOK_ASKED, LOOK_VERB, SHORT_ANSWER, SHORT_PROMPT
from .texts import matching

_DIGITS = 9  # of an operand: their product fits 64 bits


def checkable(prompts: pa.Array, responses: pa.Array) -> npt.NDArray[np.bool_]:
    """Rows (large_string each) of which `arithmetic.wrong_arithmetic` may say something: a response that holds an
    equation which is not plainly right, or a short prompt that asks for a number."""
    found = np.zeros(len(prompts), np.bool_)
    _, offsets, data = responses.buffers()
    if data is not None:
        ends = np.frombuffer(offsets, np.int64)[responses.offset :]
        _doubtful(np.frombuffer(data, np.uint8), ends, found)
    short = _shorter(prompts, SHORT_PROMPT) & _shorter(responses, SHORT_ANSWER) & ~found
    rows = np.flatnonzero(short)
    asks = prompts.take(pa.array(rows))
    found[rows[matching(asks, *LOOK_ASKED) & matching(asks, LOOK_VERB)]] = True
    return found


def _shorter(strings: pa.Array, most: int) -> Any:
    return np.asarray(pc.less_equal(pc.utf8_length(strings), most))


@compiled
def _number_before(text, at, low):  # type: ignore[no-untyped-def]
    """(value, place before it) of the whole number that ends at `at`; value -1 where there is none or it is too
    long."""
    value, unit, size = np.int64(0), np.int64(1), 0
    while at >= low and text[at] >= 48 and text[at] <= 57 and size < _DIGITS:
        value += unit * (np.int64(text[at]) - 48)
        unit *= 10
        size += 1
        at -= 1
    whole = size > 0 and not (at >= low and ((text[at] >= 48 and text[at] <= 57) or text[at] == 44 or text[at] == 46))
    return (value if whole else np.int64(-1)), at


@compiled
def _number_after(text, at, end):  # type: ignore[no-untyped-def]
    """Value of the whole number that begins at `at`, not followed by a decimal or a thousands separator; else -1."""
    value, size = np.int64(0), 0
    while at < end and text[at] >= 48 and text[at] <= 57 and size < 2 * _DIGITS:
        value = value * 10 + (np.int64(text[at]) - 48)
        size += 1
        at += 1
    more = at + 1 < end and (text[at] == 44 or text[at] == 46) and text[at + 1] >= 48 and text[at + 1] <= 57
    return np.int64(-1) if size == 0 or more or (at < end and text[at] >= 48 and text[at] <= 57) else value


@compiled
def _plainly_right(text, low, at, end):  # type: ignore[no-untyped-def]
    """Whether the "=" at `at` follows no operation, or one of two whole numbers that comes to the one after it."""
    left = at - 1
    if left >= low and text[left] == 32:
        left -= 1
    if left < low or not ((text[left] >= 48 and text[left] <= 57) or text[left] == 41):
        return True
    right = at + 1
    if right < end and text[right] == 32:
        right += 1
    if right < end and text[right] >= 128:  # a currency sign
        return False
    if right < end and text[right] == 36:  # $
        right += 1
    if right >= end or not ((text[right] >= 48 and text[right] <= 57) or text[right] == 45 or text[right] == 46):
        return True
    second, before = _number_before(text, left, low)
    spaced = before
    while spaced >= low and text[spaced] == 32:
        spaced -= 1
    if second < 0 or spaced < low:
        return second >= 0
    sign = text[spaced]
    if sign != 43 and sign != 45 and sign != 42 and sign != 47:  # + - * /
        return sign < 128 and sign != 120 and sign != 94 and sign != 41 and sign != 40  # x ^ ) (
    if before - spaced > 1:
        return False
    spaced -= 1
    if spaced >= low and text[spaced] == 32:
        spaced -= 1
    first, before = _number_before(text, spaced, low)
    while before >= low and text[before] == 32:
        before -= 1
    alone = before < low or not (
        text[before] == 40 or text[before] == 41 or text[before] == 94 or text[before] == 120 or text[before] >= 128
        or (text[before] >= 42 and text[before] <= 47)
    )  # fmt: skip
    result = _number_after(text, right, end)
    if first < 0 or not alone or result < 0:
        return False
    if sign == 43:
        return first + second == result
    if sign == 45:
        return first - second == result
    return first * second == result if sign == 42 else second > 0 and first == second * result


@compiled
def _doubtful(text, ends, found):  # type: ignore[no-untyped-def]
    for row in range(found.size):
        low, end = ends[row], ends[row + 1]
        for at in range(low, end):
            if text[at] == 61 and not _plainly_right(text, low, at, end):
                found[row] = True
                break
