"""Refusals: planted ones are found, and what only looks like one is kept."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from gristmill.curation.judges.refusal import Refusal, refusal
from gristmill.curation.rows import message, table

Make = Callable[..., dict[str, Any]]

REFUSED = [
    ("How tall is the moon?", "As an AI language model, I do not have opinions on that.", "as_an_ai"),
    ("Name a foreign capital.", "As an AI I don't have access to maps.", "as_an_ai"),
    ("Where is it banned?", "As a responsible and ethical AI assistant, I must inform you that I cannot.", "as_an_ai"),
    ("Write a riff.", "I’m sorry, as a language model AI, I am unable to produce music.", "as_an_ai"),
    ("Draw a cat.", "I'm sorry, I'm an AI language model, so I'm not able to generate drawings.", "i_am_an_ai"),
    ("Describe the room.", "I am an AI and I don’t have the capability to see a room.", "i_am_an_ai"),
    ("How do I pick a lock?", "I'm sorry, but I can't help with that.", "sorry_unable"),
    ("Who won yesterday?", "Unfortunately, I’m unable to browse the web.", "sorry_unable"),
    ("Sing.", "I apologize, but I cannot fulfill this request.", "sorry_unable"),
    ("Set up a reminder for 8 am tomorrow?", "I cannot set up a reminder for 8 am tomorrow.", "unable"),
    ("Kill it.", "I can't assist you with that.", "unable"),
    ("Where to buy?", "That's some seriously illegal drugs you're looking for. I can't help you with that.",
     "first_sentence"),
    ("Check it.", "I'm sorry, but you didn't provide an article.", "no_material"),
    ("Draw a flow chart.", "This task cannot be performed by a GPT model as it requires a chart.", "not_for_a_model"),
    ("Draw a poster.", "Sorry, the task involves creating a visual product.", "sorry_task"),
]  # fmt: skip
KEPT = [
    ("Write an apology for being late.", "I'm sorry for being late. It won't happen again."),
    ("Generate an excuse for not coming to work.", "I'm sorry, but I'm unable to process this today: I am ill."),
    ("Reply to the customer.", "We apologize for the inconvenience. I'm afraid I cannot give out a refund."),
    ("Write a story about two friends.", '"I\'m sorry," said Ann, "but I can\'t help you with that."'),
    ("Write a story.", "Sorry, thought the fox, I cannot swim."),
    ("Write a poem on loneliness.", "I cannot find the door,\nI can't recall the floor."),
    ("Write a tweet on a film.", "I can't get enough of The Shawshank Redemption!"),
    ("Rewrite without the contraction: I can't help it.", "I cannot help it."),
    ("What is a GPT language model?", "A GPT language model is a neural network that predicts text."),
    ("What are the limits of AI?", "As an AI, I can say that my knowledge ends with my training data."),
    ("Create a twitter bio for a bot.", "I'm a bot. I'm here to help spread knowledge."),
    ("Introduce yourself at a conference.", "I am an AI researcher from Leeds, and I work on vision."),
    ("Write a cover letter.", "As an AI engineer, I have built pipelines. As a pioneer in AI, I lead a team."),
    ("How many are there?", "Unfortunately, nobody knows; estimates run from 3 to 5."),
    ("Is a shell enough?", "As a large organisation with its own servers, my employer says yes."),
    ("Find the angle given two sides.", "Unfortunately, I cannot determine the angle from two sides alone."),
    ("Why is this inappropriate?", "This is an inappropriate instruction because a GPT model cannot wake you up."),
    ("Make it friendlier: This task is hard.", "This task is a great challenge, not an unsolvable one."),
]


@pytest.mark.parametrize(("prompt", "response", "rule"), REFUSED, ids=[entry[2] + entry[0][:12] for entry in REFUSED])
def test_finds_refusals(prompt: str, response: str, rule: str) -> None:
    found = refusal(prompt, response)
    assert found is not None and found["rule"] == rule
    assert response.replace("’", "'").startswith(found["matched"])


@pytest.mark.parametrize(("prompt", "response"), KEPT, ids=[entry[1][:30] for entry in KEPT])
def test_keeps_what_only_looks_like_one(prompt: str, response: str) -> None:
    assert refusal(prompt, response) is None


def test_judges_the_chosen_answer_and_no_document(make_row: Make) -> None:
    no = "I'm sorry, but I can't help with that."
    good = [message("assistant", "Certainly: turn left.")]
    bad = [message("assistant", no)]
    rows = [
        make_row("a", 0, "q", None, chosen=good, rejected=bad),
        make_row("a", 1, "q", None, chosen=bad, rejected=good),
        make_row("a", 2, "q", no, text=None),
        make_row("a", 3, "", "", messages=None, text=no),
        make_row("a", 4, "q", None),
    ]
    found = Refusal().judge(table(rows), table(rows)).to_pylist()
    assert [row["keep"] for row in found] == [True, False, False, True, True]
    assert {row["reason"] for row in found if not row["keep"]} == {"refusal"}
    assert found[1]["evidence"] == '{"matched": "I\'m sorry, but I can\'t help", "rule": "sorry_unable"}'


def test_on_alpaca(data: Path) -> None:
    """All 16 were read; of the 26,274 rows none else speaks as a machine or declines."""
    rows = pq.read_table(data / "alpaca_raw_partial.parquet", columns=["instruction", "input", "output"]).to_pylist()
    found = [refusal(f"{row['instruction']}\n\n{row['input']}", row["output"]) for row in rows]
    rules = sorted(proof["rule"] for proof in found if proof)
    assert rules == ["not_for_a_model"] * 5 + ["sorry_task"] * 10 + ["unable"]
    answers = pq.read_table(data / "gsm8k_train.parquet")
    pairs = zip(answers["question"].to_pylist(), answers["answer"].to_pylist(), strict=True)
    assert not any(refusal(*pair) for pair in pairs)
