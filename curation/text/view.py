"""What a row says, as text: prompt, response, and both; words; the normal form under which rows count as equal."""

import re
import unicodedata
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import pyarrow as pa

View = Literal["pair", "prompt", "response"]

WORD = re.compile(r"\w+")
_SPACE = re.compile(r"\s+")
_ASCII = bytes(ord(chr(i).lower()) if i < 128 and WORD.match(chr(i)) else 32 for i in range(256))  # folded word or " "


def contents(messages: Sequence[Mapping[str, Any]] | None) -> str:
    """The turns' contents joined by blank lines."""
    return "\n\n".join(turn["content"] or "" for turn in messages or ())


def prompt_of(row: Mapping[str, Any]) -> str:
    """All that is said before the response: every turn before the last assistant turn; of a preference row, `messages`;
    of a raw document, nothing."""
    messages = row["messages"] or []
    if row["chosen"] is not None or row["rejected"] is not None:
        return contents(messages)
    last = _last_assistant(messages)
    return contents(messages if last is None else messages[:last])


def response_of(row: Mapping[str, Any]) -> str:
    """The last assistant turn; of a preference row, `chosen`; of a raw document, its text."""
    if row["chosen"] is not None:
        return contents(row["chosen"])
    if row["text"] is not None:
        return str(row["text"])
    messages = row["messages"] or []
    last = _last_assistant(messages)
    return "" if last is None else messages[last]["content"] or ""


def pair_of(row: Mapping[str, Any]) -> str:
    """Prompt, response, and of a preference row also `rejected`, joined by blank lines."""
    pieces = [prompt_of(row), response_of(row)]
    if row["rejected"] is not None:
        pieces.append(contents(row["rejected"]))
    return "\n\n".join(piece for piece in pieces if piece)


VIEWS = {"pair": pair_of, "prompt": prompt_of, "response": response_of}
VIEW_COLUMNS = ("messages", "chosen", "rejected", "text")


def view(rows: pa.Table, which: View) -> list[str]:
    """One string per row. `rows` carries at least VIEW_COLUMNS."""
    of = VIEWS[which]
    return [of(row) for row in rows.select(VIEW_COLUMNS).to_pylist()]


def normal(text: str) -> str:
    """NFKC, case-folded, white space as single spaces, ends stripped: the form in which exact duplicates are equal."""
    return _SPACE.sub(" ", unicodedata.normalize("NFKC", text).casefold()).strip()


def words(text: str) -> list[str]:
    r"""Case-folded runs of \w characters after NFKC."""
    if text.isascii():  # the same in half the time
        return text.encode().translate(_ASCII).decode().split()
    return WORD.findall(unicodedata.normalize("NFKC", text).casefold())


def _last_assistant(messages: Sequence[Mapping[str, Any]]) -> int | None:
    for index in range(len(messages) - 1, -1, -1):
        if messages[index]["role"] == "assistant":
            return index
    return None
