"""Defects: planted ones are found with their reason, their harmless neighbours are kept, and Alpaca's are counted."""

import json
import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from gristmill.curation.folder import HouseError
from gristmill.curation.judges.defects import CLASSES, Defects, defect
from gristmill.curation.judges.equal_answers import EqualAnswers
from gristmill.curation.rows import message, table
from gristmill.curation.text.view import view

from .real import real_rows

Make = Callable[..., dict[str, Any]]

DROPPED = [
    ("Say something.", "", "empty_response", "response"),
    ("Say something.", " \n\t", "empty_response", "response"),
    ("Design a logo.", "<nooutput>", "no_output", "response"),
    ("Design a logo.", "<No output>", "no_output", "response"),
    ("Design a logo.", "<No Output - this is a visual task.>", "no_output", "response"),
    ("Design a logo.", "<nooutput> This type of instruction cannot be fulfilled.", "no_output", "response"),
    ("Design a logo.", "No output required", "no_output", "response"),
    ("Design a logo.", "No output as GPT models cannot draw.", "no_output", "response"),
    ("Write a story.", "<noinput>\nThe old woman walked.", "no_output", "response"),
    ("Write a sort.\n\nN/A", "N/A", "no_output", "response"),
    ("Why is the sky blue?", "Scattering.\n## \n14. Instruction: Name a bird.\n14. Input:\n<noinput>",
     "merged_instruction", "response"),
    ("Is it valid?", "Valid\n\n### Instruction: Use the given points.", "merged_instruction", "response"),
    ("Name a bird.\n18. Instruction: Name a fish.", "Wren", "merged_instruction", "prompt"),
    ("Write to the editor.", "I believe that [insert opinion].", "placeholder", "response"),
    ("Crop the portrait.", "<cropped image attached>", "placeholder", "response"),
    ("Draw a bus.", "[Picture of a bus with circles]", "placeholder", "response"),
    ("Describe the painting below.\n\n[Image provided]", "It shows a meadow.", "missing_content", "prompt"),
    ("What colour is it?\n\n![alt](https://i.imgur.com/x.png)", "Blue.", "missing_content", "prompt"),
    ("Name the animal.\n\n<include image>", "A dog.", "missing_content", "prompt"),
    ("Edit this photo.\n\n(Link to photo)", "Done.", "missing_content", "prompt"),
    ("Analyze the speech.\n\n[Insert example political speech]", "It is calm.", "missing_content", "prompt"),
    ("Summarize the article:\nhttps://www.bbc.com/news/world-51461830", "Protests.", "missing_content", "prompt"),
    ("Name a bird.\n\n<noinput>", "Wren", "noinput_marker", "prompt"),
    ("Name a bird.\n\nNo input required.", "Wren", "noinput_marker", "prompt"),
    ("Name a bird.\n\n`<NoInput>`", "Wren", "noinput_marker", "prompt"),
    ("Name a bird.\n\nN/A", "Wren", "noinput_marker", "prompt"),
    ("Describe the following painting in three sentences.", "A meadow.", "missing_content", "prompt"),
    ("Search the web for the tallest tower.", "828 m", "missing_content", "prompt"),
    ("Design a logo for a bakery.", "A round one with a loaf.", "image_request", "prompt"),
    ("Please draw me a cat.", "Here it is.", "image_request", "prompt"),
    ("Explain the following code snippet.", "It adds.", "empty_code", "prompt"),
    ("Write a loop in Python.", "Here it is:\n```python\n```", "empty_code", "response"),
    ("Write a loop in Python.", "<code></code>", "empty_code", "response"),
    ("Evaluate the following expression: (6+2)*(2-2).", "8", "wrong_answer", "response"),
    ("How many legs have 3 cats?", "3 * 4 = 13, so there are 13.", "wrong_answer", "response"),
    ("Convert 25m to km.", "25km", "wrong_answer", "response"),
    ("Calculate the median of the following data set.\n\n1, 2, 4, 5, 8, 9", "5", "wrong_answer", "response"),
    ("...", "How can I help?", "unclear_instruction", "prompt"),
    ("{{ instruction }}", "Sure.", "unclear_instruction", "prompt"),
    ("Name a bird.", "Wr\x03en", "control_characters", "response"),
]  # fmt: skip
KEPT = [
    ("What does a form need?", '<input type="text" name="name">'),
    ("Write a letter to a friend.", "Dear [Name],\n\nThank you.\n\nSincerely,\n[Your Name]"),
    ("Write to mum.", "Dear [insert name],\nIt was great."),
    ("Write a template for an email.", "We offer [insert product] at [insert price]."),
    ("Write vegan brownies.", "2 cups flour\n\nInstructions:\n1. Preheat the oven."),
    ("Print 3.", "print(1 + 2)\n# Output: 3"),
    ("Write an instruction set for a GPT model.", "Task\n6. Instruction: list three birds."),
    ("Answer N/A where the field is unknown.\n\nCapital of Atlantis", "N/A"),
    ("What is the output of `pass`?", "No output is printed, and the program ends."),
    ("Is the device on?", "No input was detected."),
    ("What does <noinput> mean in Alpaca?", "That the instruction needs no input."),
    ("Extract the links.\n\nSee www.example.com/links", "www.example.com/links"),
    ("Shorten this URL for an article:\nhttps://www.bbc.com/news/world-51461830", "https://bbc.in/x"),
    ("Shorten this URL:\nhttps://www.bbc.com/news/world-51461830", "https://bbc.in/x"),
    ("Write a Python scraper for the pages of this website.\n\nhttps://example.com/shop", "import requests"),
    ("What kind of website is it?\n\nwww.amazon.com", "A shop."),
    ("Mend this HTML.\n\n<div>\n<video>\n<source></video>", "<div><video></video></div>"),
    ("Write a caption.\n\n[A photo of a person who walks through the woods at dawn]", "Morning walk."),
    ("Compose a song.", "[Verse 1]\nHappy birthday to you"),
    ("What is 1 + 1?", "2"),
    ("What is 12/8?", "1.5"),
    ("Divide 10 by 3.", "10 / 3 = 3.33, so 3 remain 1."),
    ("Solve for x.\n\n2x + 3 = 7", "2x + 3 = 7, so 2x = 4."),
    ("Calculate the average of 4, 8, 20 and 11.", "It is about 10.8."),
    ("Convert 28 cm to inches.", "11 inches"),
    ("Which of the following sentences is right?\n\nA or B", "A"),
    ("Design a logo with SVG code.", "<svg></svg>"),
    ("Draw a conclusion from the text.", "It rains."),
    ("Create a function that reverses the given string.", "s[::-1]"),
]


@pytest.mark.parametrize(("prompt", "response", "reason", "where"), DROPPED, ids=[str(i) for i in range(len(DROPPED))])
def test_finds_defects(prompt: str, response: str, reason: str, where: str) -> None:
    found = defect(prompt, response)
    assert found is not None and (found[0], found[2]) == (reason, where)
    if reason not in ("wrong_answer", "control_characters"):  # these say what would be right, and the code point
        assert found[1] in (prompt if where == "prompt" else response)


@pytest.mark.parametrize(("prompt", "response"), KEPT, ids=[entry[0][:25] for entry in KEPT])
def test_keeps_their_neighbours(prompt: str, response: str) -> None:
    assert defect(prompt, response) is None


def test_a_long_prompt_has_enough_besides_its_picture() -> None:
    picture = "![logo](https://example.com/logo.png)\n"
    assert defect(picture + "Describe it.", "A bird.") is not None
    assert defect(picture + "The readme goes on. " * 40 + "\nSummarise it.", "A readme.") is None


def test_judges_rows_of_every_kind(make_row: Make) -> None:
    empty, good = [message("assistant", "")], [message("assistant", "Wren")]
    rows = [
        make_row("a", 0, "Name a bird.", None, chosen=good, rejected=empty),
        make_row("a", 1, "Name a bird.", None, chosen=empty, rejected=good),
        make_row("a", 2, "", "", messages=None, text="A document.\n\n<noinput>"),
        make_row("a", 3, "", "", messages=None, text=" "),
        make_row("a", 4, "Name a bird.\n\n<noinput>", "Wren"),
    ]
    found = Defects().judge(table(rows), table(rows)).to_pylist()
    reasons = [None, "empty_response", None, "empty_response", "noinput_marker"]
    assert [row["reason"] for row in found] == reasons
    assert [row["keep"] for row in found] == [reason is None for reason in reasons]
    assert json.loads(found[4]["evidence"]) == {"matched": "<noinput>", "where": "prompt"}


def test_equal_answers(make_row: Make) -> None:
    def pair(position: int, chosen: str, rejected: str) -> dict[str, Any]:
        answers = {"chosen": [message("assistant", chosen)], "rejected": [message("assistant", rejected)]}
        return make_row("a", position, "q", None, **answers)

    call = {"chosen": [message("assistant", None, tool_calls='[{"a": 1}]')]}
    other = {"rejected": [message("assistant", None, tool_calls='[{"a": 2}]')]}
    rows = [pair(0, "Yes", "No"), pair(1, "ﬁne  day", "Fine day\n"), make_row("a", 2, "q", "r")]
    rows += [make_row("a", 3, "q", None, **call, **other), make_row("a", 4, "q", None, chosen=[], rejected=None)]
    found = EqualAnswers().judge(table(rows), table(rows)).to_pylist()
    assert [row["keep"] for row in found] == [True, False, True, True, True]
    assert found[1]["reason"] == "equal_answers"


NO_INPUT = re.compile(r"\W*no[ _-]?input", re.I)
NO_OUTPUT = re.compile(r"\W*no[ _-]?output", re.I)
NEXT_ITEM = re.compile(r"\n\W*\d+\. ?Instruction")


def test_on_alpaca(data: Path) -> None:
    """Counted when the rows had been read by eye; 32 merged and 13 empty ones are what the set is known for."""
    rows = pq.read_table(data / "alpaca_raw_partial.parquet", columns=["instruction", "input", "output"]).to_pylist()
    judged = Defects().judge(*[real_rows(data, "alpaca_raw_partial")] * 2).to_pylist()
    places = [json.loads(row["evidence"])["where"] if row["evidence"] else None for row in judged]
    reasons = [row["reason"] for row in judged]
    found = [(reason, where) for reason, where in zip(reasons, places, strict=True) if reason]
    assert Counter(found) == {
        ("noinput_marker", "prompt"): 366,
        ("missing_content", "prompt"): 151,
        ("image_request", "prompt"): 83,
        ("no_output", "response"): 53,
        ("wrong_answer", "response"): 38,
        ("merged_instruction", "response"): 32,
        ("empty_response", "response"): 13,
        ("placeholder", "response"): 12,
        ("empty_code", "prompt"): 1,
        ("control_characters", "response"): 1,
    }
    no_input = [reason for row, reason in zip(rows, reasons, strict=True) if NO_INPUT.match(row["input"])]
    assert len(no_input) == 356 and None not in no_input
    no_output = [reason for row, reason in zip(rows, reasons, strict=True) if NO_OUTPUT.match(row["output"])]
    assert len(no_output) == 28 and None not in no_output
    merged = [reason for row, reason in zip(rows, reasons, strict=True) if NEXT_ITEM.search(row["output"])]
    assert len(merged) == 32 and set(merged) == {"merged_instruction"}
    assert [reason for row, reason in zip(rows, reasons, strict=True) if not row["output"].strip()] == [
        "empty_response"
    ] * 13


SETS = ("alpaca_raw_first5000", "codealpaca_2k", "hh_rlhf_harmless_test", "gsm8k_train", "flan_cot", "docs_til")


@pytest.mark.parametrize("name", SETS)
def test_the_quick_look_misses_nothing(data: Path, name: str) -> None:
    """The judge, which looks closely at few rows, says what the plain definition says of all rows."""
    rows = real_rows(data, name, 1500)
    documents = rows["text"].is_valid().to_pylist()
    said = zip(view(rows, "prompt"), view(rows, "response"), documents, strict=True)
    plain = [defect(*row, CLASSES) for row in said]
    found = Defects(CLASSES).judge(rows, rows)
    assert found["reason"].to_pylist() == [one and one[0] for one in plain]
    where = [item and json.loads(item) for item in found["evidence"].to_pylist()]
    assert where == [one and {"matched": one[1], "where": one[2]} for one in plain]


def test_what_is_found_of_good_sets(data: Path) -> None:
    """Verified or human-written answers: of 9,473 rows one prompt asks for a current price."""
    assert not any(
        reason for reason in Defects().judge(*[real_rows(data, "dolly_sample2000")] * 2)["reason"].to_pylist()
    )
    found = Defects().judge(*[real_rows(data, "gsm8k_train")] * 2)["reason"].to_pylist()
    assert [reason for reason in found if reason] == ["missing_content"]


def test_classes_are_a_choice(make_row: Make) -> None:
    rows = table([make_row("a", 0, "Design a logo.", ""), make_row("a", 1, "Design a logo.", "Blue\\n\\nRed")])
    assert Defects().judge(rows, rows)["reason"].to_pylist() == ["empty_response", "image_request"]
    assert Defects(("image_request",)).judge(rows, rows)["reason"].to_pylist() == [None, "image_request"]
    assert Defects(("literal_escapes",)).judge(rows, rows)["reason"].to_pylist() == [None, "literal_escapes"]
    with pytest.raises(HouseError, match="name unknown ones"):
        Defects(("spam",))
    with pytest.raises(HouseError, match="none"):
        Defects(())


def test_on_preference_pairs(data: Path, make_row: Make) -> None:
    pairs = pq.read_table(data / "ultrafeedback_sample1000.parquet").to_pylist()
    rows = []
    for n, pair in enumerate(pairs):
        sides = {side: [message("assistant", pair[side][-1]["content"])] for side in ("chosen", "rejected")}
        rows.append(make_row("u", n, pair["chosen"][0]["content"], None, **sides))
    found = EqualAnswers().judge(table(rows), table(rows)).to_pylist()
    assert sum(not row["keep"] for row in found) == 12
