"""Repetition: shares equal to those counted in plain Python, and a judge that drops what goes round in circles."""

import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gristmill.curation.folder import HouseError
from gristmill.curation.judges.repetitive import Repetitive
from gristmill.curation.measures.repetition import Repetition
from gristmill.curation.rows import table
from gristmill.curation.text.view import view

from .real import real_rows

Make = Callable[..., dict[str, Any]]


def measured(rows: pa.Table) -> pa.Table:
    return Repetition().measure(rows, None, lambda done, total: None)  # type: ignore[arg-type]


def gram_share(words: list[str], n: int, every: bool) -> float:
    grams = [tuple(words[k : k + n]) for k in range(len(words) - n + 1)]
    counts = Counter(grams)  # in order of first appearance, so that of equal ones the first is the most common
    chosen = {gram for gram, count in counts.items() if count > 1} if every else {
        gram for gram, count in counts.most_common(1) if count > 1
    }  # fmt: skip
    covered = {k + i for k, gram in enumerate(grams) if gram in chosen for i in range(n)}
    return len(covered) / len(words) if words else 0.0


def line_share(text: str) -> float:
    lines = [
        line
        for line in (re.sub(rb"^[\x00-\x20]+|[\x00-\x20]+$", b"", raw) for raw in text.encode().split(b"\n"))
        if line
    ]
    seen: set[bytes] = set()
    again = 0
    for line in lines:
        again += len(line) if line in seen else 0
        seen.add(line)
    return again / sum(map(len, lines)) if lines else 0.0


def loop_share(text: str) -> float:
    raw = re.sub(rb"[\x00-\x20]+$", b"", text.encode())
    best = 0
    for period in range(1, min(400, len(raw) // 4) + 1):
        length = period
        while length < len(raw) and raw[-1 - length] == raw[-1 - length + period]:
            length += 1
        if length >= 4 * period and length >= 24:
            best = max(best, length)
    return best / len(raw) if best else 0.0


def plain(text: str) -> dict[str, float]:
    words = re.findall(r"\w+", text.lower())  # of ASCII text: the words of shingles
    found: dict[str, float] = {"words": len(words)}
    found |= {f"top_{n}gram": gram_share(words, n, False) for n in (2, 3, 4)}
    found |= {f"repeated_{n}gram": gram_share(words, n, True) for n in (5, 10)}
    return found | {"repeated_lines": line_share(text), "loop": loop_share(text)}


def check(rows: pa.Table) -> int:
    texts = view(rows, "response")
    compared = 0
    for found, text in zip(measured(rows).to_pylist(), texts, strict=True):
        if text.isascii():
            assert found == pytest.approx(plain(text), abs=1e-6)
            compared += 1
    return compared


words = st.lists(st.sampled_from(["a", "b", "ab", "\n", " ", "a\n", ". ", "loop "]), max_size=60).map("".join)


@settings(deadline=None, max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(texts=st.lists(words, max_size=4))
def test_shares_of_any_text(make_row: Make, texts: list[str]) -> None:
    assert check(table([make_row("a", n, "q", text) for n, text in enumerate(texts)])) == len(texts)


@pytest.mark.parametrize("name", ["self_instruct_predictions", "codealpaca_2k"])
def test_shares_of_real_text(data: Path, name: str) -> None:
    assert check(real_rows(data, name, 700)) > 500


def test_drops_what_goes_round_in_circles(make_row: Make) -> None:
    prose = " ".join(f"word{n}" for n in range(60))
    line = "the same old line that comes again and again"
    answers = [
        prose,
        prose + " I was very shy." * 20,
        "\n".join([prose, *(f"{line}\nno {n}" for n in range(29))]),
        "yes " * 5,
        f"{prose} {prose}",
        "漢字" * 40,
        "." * 50,
    ]
    rows = table([make_row("a", n, "q", text) for n, text in enumerate(answers)])
    found = Repetitive().judge(rows, measured(rows))
    assert found["reason"].to_pylist() == [None, "loop", "repeated_lines", None, "repeated_ngrams", "loop", "loop"]
    loose = Repetitive(loop=1, lines=1, ngrams=1, frequent=1)
    assert all(loose.judge(rows, measured(rows))["keep"].to_pylist())
    with pytest.raises(HouseError, match="0 to 1"):
        Repetitive(loop=2)


def test_on_real_sets(data: Path) -> None:
    """Samples of models that could not stop, and verified answers."""
    bad = real_rows(data, "self_instruct_predictions")
    reasons = Counter(Repetitive().judge(bad, measured(bad))["reason"].to_pylist())
    assert reasons["loop"] == 220
    good = real_rows(data, "gsm8k_train")
    assert all(Repetitive().judge(good, measured(good))["keep"].to_pylist())
