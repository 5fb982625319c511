"""The recipes that ship: they load, say what issue and architecture promise, and refer to data that is there."""

from pathlib import Path

import pytest

from gristmill.curation.sift import full_steps
from gristmill.flows.models import set_plan
from gristmill.flows.recipe import Curate, Evaluate, dump, load_recipe, load_text, shipped
from gristmill.flows.run import waiting_sets


@pytest.mark.parametrize("name", sorted(shipped()))
def test_it_loads_and_dumps_back_equal(name: str) -> None:
    recipe = load_recipe(name)
    assert recipe.name == name and recipe.licences is not None
    assert load_text(dump(recipe)) == recipe
    for stage in recipe.stages:
        if isinstance(stage, Curate):
            names = [type(step).__name__ for step in full_steps(set_plan(recipe, stage))]
            assert names[0] == "HeldOut" and names[-1] == "Overrides" and "NearHeldOut" in names


@pytest.mark.parametrize("name", ["demo", "alpaca-lite"])
def test_those_that_train_end_with_an_evaluation(name: str) -> None:
    last = load_recipe(name).stages[-1]
    assert isinstance(last, Evaluate) and last.models == ("small", "sft", "dpo") and last.sets == ("sft", "dpo")


def test_demo_needs_nothing_but_this_python() -> None:
    recipe = load_recipe("demo")
    assert [source.path for source in recipe.sources] == ["docstrings:stdlib"]
    assert recipe.models["small"].path is None
    assert waiting_sets(recipe) == ("dpo",)  # its pairs come from the tuned model
    sets = recipe.sets()
    assert sets["sft"].held_out == sets["dpo"].held_out  # the same prompts are held out of both


def test_alpaca_lite_reads_the_data_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("GRISTMILL_DATA", raising=False)
    assert load_recipe("alpaca-lite").source("dolly").path == "../shared/data/dolly_sample2000.parquet"
    monkeypatch.setenv("GRISTMILL_DATA", "/elsewhere")
    assert load_recipe("alpaca-lite").source("dolly").path == "/elsewhere/dolly_sample2000.parquet"


def test_alpaca_full_measures_once_for_both_quantiles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("GRISTMILL_DATA", raising=False)
    steps = load_recipe("alpaca-full").sets()["sft"].steps
    asked = [measure for step in steps if type(step).__name__ == "ScoreQuantile" for measure in step.needs]
    assert len(asked) == 2 and len({repr(measure) for measure in asked}) == 1
    assert waiting_sets(load_recipe("alpaca-full")) == ()


def test_alpaca_lite_measures_perplexity_after_the_cheap_judges() -> None:
    steps = [type(step).__name__ for step in load_recipe("alpaca-lite").sets()["sft"].steps]
    costly = next(index for index, name in enumerate(steps) if name.startswith("Perplexity"))
    assert {"Refusal", "ExactDuplicate", "NearDuplicate", "Decontaminate"} <= set(steps[:costly])


def test_all_that_alpaca_lite_names_is_there(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GRISTMILL_DATA", str(data))
    recipe = load_recipe("alpaca-lite")
    named = [source.path for source in recipe.sources]
    for stage in recipe.sets().values():
        named += [path for step in stage.steps for path in getattr(step, "against", ())]
    assert len(named) == 15 and all(Path(path).is_file() for path in named)
