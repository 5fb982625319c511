"""Boilerplate: planted phrases are found, what only looks like one is kept, and the quick look misses nothing."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from gristmill.curation.folder import HouseError
from gristmill.curation.judges.refusal import BOILERPLATE, Boilerplate, Refusal, boilerplate, refusal
from gristmill.curation.rows import table
from gristmill.curation.text.view import view

from .real import real_rows

Make = Callable[..., dict[str, Any]]

FOUND = [
    ("Name three birds.", "Sure! Here is a list: wren, kite, owl.", "opening"),
    ("Name three birds.", "I'd be happy to help you with that. Here are three: wren, kite, owl.", "opening"),
    ("Name three birds.", "Certainly, let me name some.", "opening"),
    ("Who won?", "Spain won. However, as an AI language model, I cannot know what came later.", "as_an_ai"),
    ("Name a bird.", "A wren.\n\nI hope this helps!", "closing"),
    ("Name a bird.", "A wren. Let me know if you have any other questions.", "closing"),
]
KEPT = [
    ("Is it true?", "Sure, but only on Sundays."),
    ("Name three birds.", "Here is a list: wren, kite, owl."),
    ("Write an email to a client.", "Dear client, ... I hope this helps. Let me know if you have any questions."),
    ("What is an AI language model?", "As an AI language model, I am an example of one."),
    ("What does hope mean?", "I hope this helps is a phrase. " + "It ends many answers of assistants. " * 10),
]


@pytest.mark.parametrize(("prompt", "response", "name"), FOUND, ids=[str(n) for n in range(len(FOUND))])
def test_finds_phrases(make_row: Make, prompt: str, response: str, name: str) -> None:
    found = boilerplate(prompt, response)
    assert found is not None and found[0] == name and found[1] in response
    rows = table([make_row("a", 0, prompt, response)])
    assert Boilerplate().judge(rows, rows)["reason"].to_pylist() == [name]
    others = tuple(other for other in BOILERPLATE if other != name)
    assert Boilerplate(others).judge(rows, rows)["keep"].to_pylist() == [True]


@pytest.mark.parametrize(("prompt", "response"), KEPT, ids=[str(n) for n in range(len(KEPT))])
def test_keeps_their_neighbours(prompt: str, response: str) -> None:
    assert boilerplate(prompt, response) is None


def test_classes_must_be_known() -> None:
    with pytest.raises(HouseError, match="opening, as_an_ai, closing"):
        Boilerplate(("greeting",))


@pytest.mark.parametrize(
    "name", ["alpaca_gpt4_partial", "ultrafeedback_sample1000", "hh_rlhf_harmless_test", "dolly_sample2000"]
)
def test_the_quick_look_misses_nothing(data: Path, name: str) -> None:
    rows = real_rows(data, name, 5000)
    said = [*zip(view(rows, "prompt"), view(rows, "response"), strict=True)]
    phrases = [boilerplate(*pair) for pair in said]
    assert Boilerplate().judge(rows, rows)["reason"].to_pylist() == [one and one[0] for one in phrases]
    declined = [refusal(*pair) is None for pair in said]
    assert Refusal().judge(rows, rows)["keep"].to_pylist() == declined
    assert declined.count(False) > 0
