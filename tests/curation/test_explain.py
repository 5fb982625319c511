"""Evidence as one sees it."""

from typing import Any

from rich.console import Console

from gristmill.curation.explain import highlighted, pictures, side_by_side


def shown(thing: Any) -> str:
    console = Console(width=100, record=True)
    console.print(thing)
    return console.export_text(styles=True)


def test_a_duplicate_stands_beside_the_row_that_stays() -> None:
    text = shown(side_by_side("The quick brown fox jumps", "The quick red fox jumps"))
    assert "this row" in text and "the row that stays" in text
    assert "\x1b[1;33mbrown" in text and "\x1b[1;33mred" in text and "\x1b[1;33mfox" not in text


def test_long_texts_are_shown_from_their_first_difference() -> None:
    same = " ".join(f"w{i}" for i in range(500))
    text = shown(side_by_side(f"{same} left tail", f"{same} right tail"))
    assert "left" in text and "right" in text and "w10 " not in text and "w490" in text


def test_the_match_is_marked_in_the_text_as_it_stands() -> None:
    said = "x" * 300 + " Natalia SOLD clips,\nto 48 of her friends! And more" + " y" * 200
    found = highlighted(said, "natalia sold clips to 48 of her friends")
    assert found is not None and len(found.plain) < 250
    (span,) = [span for span in found.spans if span.style == "bold yellow"]
    assert found.plain[span.start : span.end] == "Natalia SOLD clips, to 48 of her friends"
    assert highlighted(said, "nothing of the kind") is None and highlighted(said, "!?") is None
    assert highlighted("a category", "cat") is None  # whole words


def test_terminal_codes_in_texts_are_not_obeyed() -> None:
    assert "\x1b[31mred" not in shown(side_by_side("\x1b[31mred", "blue"))


def test_pictures_follow_the_evidence() -> None:
    row = {"messages": [{"role": "user", "content": "one two three"}, {"role": "assistant", "content": "four"}],
           "chosen": None, "rejected": None, "text": None}  # fmt: skip
    assert len(list(pictures(row, {"duplicate_of": "a"}, {"a": row}))) == 1
    assert len(list(pictures(row, {"duplicate_of": "a"}, {}))) == 0
    assert len(list(pictures(row, {"matched": "two three"}, {}))) == 1
    assert list(pictures(row, {"rank": 3}, {})) == []
