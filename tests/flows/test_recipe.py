"""The recipe loader: strict, with places; overrides; what it dumps loads back equal."""

from pathlib import Path

import pytest

from gristmill.curation.folder import HouseError
from gristmill.curation.judges.length import ResponseLength
from gristmill.flows.recipe import (
    Curate,
    Evaluate,
    Model,
    Recipe,
    Source,
    Train,
    check,
    digest,
    dump,
    load_recipe,
    load_text,
)
from gristmill.tuning.settings import Lora, NewModel, Training

TEXT = """\
name: tiny
version: 1.0
seed: 7
licences: [MIT]
sources:
  chats: {path: "${CHATS:-data}/chats.jsonl", licence: MIT, limit: 10}
models:
  base:
    new: {params: 1M, learning_rate: 1e-3}
    corpus: clean
stages:
  - curate:
      set: clean
      sources: [chats]
      steps:
        - ResponseLength: {low: 1, high: 500}
        - Refusal
        - ResponseLength: {low: 2}
  - sft:
      set: clean
      model: base
      max_steps: 5
      lora: {rank: 4}
  - sft:
      name: longer
      set: clean
      model: base
      start: sft
      lora: null
  - evaluate: {models: [base, longer], sets: [clean]}
"""


def wrong(text: str, *overrides: str) -> str:
    with pytest.raises(HouseError) as caught:
        load_text(text, "tiny.yaml", overrides)
    return str(caught.value)


def test_every_field_lands_where_its_type_says() -> None:
    recipe = load_text(TEXT)
    assert recipe.version == "1.0"  # text, not a number
    assert recipe.sources == (Source("chats", "data/chats.jsonl", licence="MIT", limit=10),)
    assert recipe.models == {"base": Model(new=NewModel(params="1M", learning_rate=1e-3, seed=7), corpus="clean")}
    curate, first, second, evaluate = recipe.stages
    assert isinstance(curate, Curate) and curate.steps[0] == ResponseLength(low=1, high=500)
    settings = Training(max_steps=5, lora=Lora(rank=4), seed=7)
    assert first == Train("sft", set="clean", model="base", name="sft", settings=settings)
    assert second == Train(
        "sft", set="clean", model="base", name="longer", start="sft", settings=Training(lora=None, seed=7)
    )
    assert evaluate == Evaluate(models=("base", "longer"), sets=("clean",))


def test_the_dump_loads_back_equal_and_names_the_recipe() -> None:
    recipe = load_text(TEXT)
    again = load_text(dump(recipe))
    assert again == recipe and digest(again) == digest(recipe)
    assert digest(load_text(TEXT, overrides=["seed=8"])) != digest(recipe)


def test_a_recipe_in_python_equals_the_one_in_yaml() -> None:
    made = Recipe(
        "tiny",
        sources=(Source("chats", "a ${not a variable}", licence="MIT"),),
        stages=(Curate("clean", sources=("chats",), steps=(ResponseLength(low=1),)),),
    )
    check(made)
    assert load_text(dump(made)) == made


def test_variables_are_expanded_with_defaults(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CHATS", "/elsewhere")
    assert load_text(TEXT).sources[0].path == "/elsewhere/chats.jsonl"
    assert "tiny.yaml:6: the environment variable NOWHERE_SET is not set" in wrong(
        TEXT.replace("${CHATS:-data}", "${NOWHERE_SET}")
    )


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("seed: 7", "sede: 7", "tiny.yaml:3: unknown key 'sede' in Recipe; did you mean 'seed'?"),
        ("max_steps: 5", "max_step: 5", "tiny.yaml:22: unknown key 'max_step' in sft; did you mean 'max_steps'?"),
        ("rank: 4", "rnk: 4", "tiny.yaml:23: unknown key 'rnk' in Lora; did you mean 'rank'?"),
        ("low: 1,", "lo: 1,", "tiny.yaml:16: unknown key 'lo' in ResponseLength; did you mean 'low'?"),
        ("- Refusal", "- Refusals", "tiny.yaml:17: unknown step 'Refusals'; did you mean 'Refusal'?"),
        ("  - evaluate:", "  - evaluat:", "tiny.yaml:30: unknown stage 'evaluat'; did you mean 'evaluate'?"),
        ("seed: 7", "seed: seven", "tiny.yaml:3: a whole number belongs here, not 'seven'"),
        ("seed: 7", "seed: '7'", "tiny.yaml:3: a whole number belongs here, not '7'"),
        ("licences: [MIT]", "licences: MIT", "tiny.yaml:4: a list belongs here, as in [a, b], not 'MIT'"),
        ("lora: {rank: 4}", "lora: 4", "tiny.yaml:23: Lora is a mapping of keys, not '4'"),
        ("licence: MIT, ", "", "tiny.yaml:6: Source needs the key 'licence'"),
        ("seed: 7", "seed: 7\nseed: 8", "tiny.yaml:4: key 'seed' is there twice"),
        ("seed: 7", "seed: [7", "not YAML"),
        ("sources: [chats]", "sources: [chat]", "tiny.yaml:14: unknown source 'chat'; did you mean 'chats'?"),
        ("start: sft", "start: sfts", "tiny.yaml:28: no earlier stage 'sfts'; did you mean 'sft'?"),
        ("sets: [clean]", "sets: [cleaned]", "tiny.yaml:30: unknown set 'cleaned'; did you mean 'clean'?"),
        ("models: [base,", "models: [bse,", "tiny.yaml:30: unknown model or earlier stage 'bse'; did you mean 'base'?"),
        ("licences: [MIT]", "licences: [CC0-1.0]", "tiny.yaml:6: source 'chats' has the licence 'MIT'"),
        ("name: longer", "name: sft", "tiny.yaml:25: stage 'sft' is there twice"),
        ("name: longer", "name: rows", "tiny.yaml:25: stage name 'rows' is a folder of every run"),
        ("corpus: clean", "corpus: claen", "tiny.yaml:10: unknown set 'claen'; did you mean 'clean'?"),
        ("    corpus: clean\n", "", "model 'base' is new: name the set"),
        ("  - sft:\n      set", "  - dpo:\n      set", "dpo trains on preference rows; set 'clean' holds sft"),
    ],
)
def test_what_is_wrong_is_named_with_its_line(old: str, new: str, message: str) -> None:
    assert old in TEXT
    assert message in wrong(TEXT.replace(old, new, 1))


def test_overrides_reach_every_part() -> None:
    recipe = load_text(
        TEXT,
        overrides=[
            "stages.sft.max_steps=9",
            "stages.sft.lora.rank=2",
            "stages.longer.lora.rank=2",
            "sets.clean.held_out=0.5",
            "sets.clean.ResponseLength.2.low=3",
            "sources.chats.limit=null",
            "models.base={path: some/where}",
            "stages.evaluate.models=[sft]",
        ],
    )
    assert recipe.trained()["sft"].settings.max_steps == 9
    assert recipe.trained()["longer"].settings.lora == Lora(rank=2)
    assert recipe.sets()["clean"].held_out == 0.5
    assert recipe.sets()["clean"].steps[0] == ResponseLength(low=1, high=500)
    assert recipe.sets()["clean"].steps[2] == ResponseLength(low=3)
    assert recipe.sources[0].limit is None
    assert recipe.models == {"base": Model(path="some/where")}
    assert recipe.stages[-1] == Evaluate(models=("sft",), sets=("clean",))


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("stages.sft.max_stps=9", "override stages.sft.max_stps=9: unknown key 'max_stps' in sft; did you mean 'max_s"),
        ("stages.stf.max_steps=9", "no stage 'stf'; did you mean 'sft'?"),
        ("sets.clear.held_out=0", "no set 'clear'; did you mean 'clean'?"),
        ("sets.clean.Refusl.x=0", "no key or step 'Refusl' here; did you mean 'Refusal'?"),
        ("sets.clean.ResponseLength.low=3", "there are 2 ResponseLength steps: say ResponseLength.1"),
        ("sets.clean.Refusal.nothing=3", "unknown key 'nothing' in Refusal"),
        ("sources.chat.limit=3", "no source 'chat'; did you mean 'chats'?"),
        ("sede=3", "unknown key 'sede'; did you mean 'seed'?"),
        ("seed", "'seed' is not an override"),
        ("seed=x", "override seed=x: a whole number belongs here, not 'x'"),
        ("models.base.path=here", "model 'base' has both `path` and `new`"),
    ],
)
def test_a_wrong_override_is_named(override: str, message: str) -> None:
    assert message in wrong(TEXT, override)


def test_an_anchor_is_overridden_in_one_place_only() -> None:
    text = TEXT.replace("lora: {rank: 4}", "lora: &small {rank: 4}").replace("lora: null", "lora: *small")
    recipe = load_text(text, overrides=["stages.longer.lora.dropout=0.5"])
    assert recipe.trained()["sft"].settings.lora == Lora(rank=4)
    assert recipe.trained()["longer"].settings.lora == Lora(rank=4, dropout=0.5)


def test_an_unknown_recipe_is_named(tmp_path: Path) -> None:
    with pytest.raises(HouseError, match="no recipe is called 'dmo'; did you mean 'demo'"):
        load_recipe("dmo")
    with pytest.raises(HouseError, match="there is no recipe file"):
        load_recipe(tmp_path / "nothing.yaml")
