"""Words and characters counted in buffers equal those counted in Python."""

from pathlib import Path

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gristmill.curation.text.texts import texts
from gristmill.curation.text.view import view, words
from gristmill.curation.text.word_counts import word_counts

from .real import real_rows

HARD = [
    "",
    "a",
    "e\u0301t\u00e9 x",
    "\ufb01ve",
    "stra\u00dfe",
    "\u0130stanbul",
    "\u1100\u1161\u11a8",
    "日本語 です",
    "a_b-c",
    "½ ² x²",
    "\u212a m",
    "🙂🙂",
    "ก็ตาม",
]


def check(strings: list[str | None], kind: pa.DataType) -> None:
    array = pa.array(["skipped", *strings], kind).slice(1)
    counts, characters = word_counts(array)
    assert counts.tolist() == [len(words(text or "")) for text in strings]
    assert characters.tolist() == [len(text or "") for text in strings]


@pytest.mark.parametrize("kind", [pa.string(), pa.large_string()])
def test_hard_letters(kind: pa.DataType) -> None:
    check([*HARD, None, " ".join(HARD)], kind)
    check([], kind)


@settings(deadline=None, max_examples=300)
@given(st.lists(st.text(max_size=12), max_size=6))
def test_any_text(strings: list[str]) -> None:
    check([*strings], pa.large_string())


@pytest.mark.parametrize("name", ["alpaca_raw_first5000", "lingua_sentences", "docs_til"])
def test_real_text(data: Path, name: str) -> None:
    rows = real_rows(data, name, 8_000)
    array = texts(rows, "response")
    plain = view(rows, "response")
    counts, characters = word_counts(array)
    assert counts.tolist() == [len(words(text)) for text in plain]
    assert characters.tolist() == [len(text) for text in plain]
