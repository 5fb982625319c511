"""A set that trains a model is decontaminated, or it is said loudly that it is not."""

from pathlib import Path
from typing import Any

import pytest

from gristmill.curation.folder import HouseError
from gristmill.curation.judges.decontaminate import Decontaminate
from gristmill.curation.text.benchmark_sets import EvaluationSet
from gristmill.flows.models import set_plan
from gristmill.flows.progress import Silent
from gristmill.flows.recipe import dump, load_text
from gristmill.flows.run import run
from gristmill.flows.stages import cautions

RECIPE = """
name: tiny
sources:
  chats: {path: chats.jsonl, licence: MIT}
models:
  small: {new: {params: 1M, vocab: 300, context: 64, tokens: 1000}, corpus: raw}
stages:
  - curate: {set: raw, sources: [chats]}
  - curate: {set: clean, sources: [chats], steps: [STEPS]}
  - curate: {set: made, sources: [chats], steps: [DocstringQuestions, Refusal]}
  - sft: {set: clean, model: small}
  - sft: {set: made, model: small, name: other}
"""


def loaded(steps: str = "Refusal", more: str = "") -> Any:
    return load_text(RECIPE.replace("STEPS", steps) + more)


def test_sets_that_train_and_are_not_decontaminated_are_named() -> None:
    said = list(cautions(loaded()))
    assert len(said) == 2 and "set clean" in said[0] and "set made" in said[1]
    assert "`decontaminate: [" in said[0]
    said = list(cautions(loaded("Decontaminate: {against: [a.jsonl]}")))
    assert len(said) == 1 and "set made" in said[0]
    assert len(list(cautions(loaded("Decontaminate, DocstringQuestions")))) == 2  # what a later maker makes is not seen
    assert list(cautions(loaded(more="decontaminate: []"))) == []


def test_one_line_puts_the_gate_into_every_set_that_trains() -> None:
    recipe = loaded(more="decontaminate: [a.jsonl, {path: b.jsonl, name: b, prompt: [ask]}]")
    against = ("a.jsonl", EvaluationSet("b.jsonl", "b", ("ask",)))
    assert recipe.decontaminate == against and list(cautions(recipe)) == []
    assert load_text(dump(recipe)) == recipe
    gates = {name: [type(step).__name__ for step in set_plan(recipe, stage).steps]
             for name, stage in recipe.sets().items()}  # fmt: skip
    assert gates == {
        "raw": [],
        "clean": ["Decontaminate", "Refusal"],
        "made": ["DocstringQuestions", "Decontaminate", "Refusal"],
    }
    assert set_plan(recipe, recipe.sets()["clean"]).steps[0] == Decontaminate(against)
    own = loaded("Decontaminate: {against: [c.jsonl]}", "decontaminate: [a.jsonl]")
    assert set_plan(own, own.sets()["clean"]).steps == (Decontaminate(("c.jsonl",)),)


def test_a_step_that_names_no_set_takes_those_of_the_recipe() -> None:
    """It looked for nothing, and kept the gate away from the set that it stands in."""
    recipe = loaded("Decontaminate: {n: 10}", "decontaminate: [a.jsonl]")
    assert set_plan(recipe, recipe.sets()["clean"]).steps == (Decontaminate(("a.jsonl",), n=10),)
    assert recipe.sets()["clean"].steps == (Decontaminate(n=10),) and load_text(dump(recipe)) == recipe
    early = loaded("Decontaminate, DocstringQuestions", "decontaminate: [a.jsonl]")
    named = [type(step).__name__ for step in set_plan(early, early.sets()["clean"]).steps]
    assert named == ["Decontaminate", "DocstringQuestions", "Decontaminate"]


def test_evaluation_sets_that_nothing_is_compared_with_are_told() -> None:
    lines = RECIPE.splitlines(keepends=True)
    untrained = "".join(line for line in lines if not line.startswith(("models", "  small", "  - sft")))
    (said,) = cautions(load_text(untrained.replace("STEPS", "Refusal") + "decontaminate: [a.jsonl]"))
    assert "no set is compared with them" in said
    assert not list(cautions(load_text(untrained.replace("STEPS", "Decontaminate") + "decontaminate: [a.jsonl]")))


def test_a_run_says_it_first(tmp_path: Path) -> None:
    class Said(Silent):
        def __init__(self) -> None:
            super().__init__()
            self.said: list[str] = []

        def say(self, text: str) -> None:
            self.said.append(text)

    show = Said()
    with pytest.raises(HouseError, match=r"chats\.jsonl"):  # there is no such file: nothing was done yet
        run(loaded(), tmp_path / "out", show=show)
    assert [line[:11] for line in show.said] == ["! set clean", "! set made "]


def test_sets_by_name_and_columns_in_a_recipe() -> None:
    recipe = loaded("Decontaminate: {sets: {gsm8k: a.parquet}, level: source, source_share: 0.1}")
    (step,) = recipe.sets()["clean"].steps
    assert step == Decontaminate(sets={"gsm8k": "a.parquet"}, level="source", source_share=0.1)
    assert load_text(dump(recipe)) == recipe
    with pytest.raises(HouseError, match="no usual evaluation set is called 'gsm9k'"):
        loaded("Decontaminate: {sets: {gsm9k: a.parquet}}")
