"""`rounds`: one block becomes ordinary stages, and what they call each other is what a user would expect."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from gristmill.curation.folder import HouseError, RunFolder, read_json
from gristmill.flows.cli import app
from gristmill.flows.deciding import decide
from gristmill.flows.models import Workshop
from gristmill.flows.progress import Done, Silent
from gristmill.flows.recipe import Curate, Evaluate, Recipe, Train, digest, dump, load_text
from gristmill.flows.run import Job, plainly, run

TEXT = """\
name: loop
sources:
  chats: {path: chats.jsonl, licence: MIT}
models:
  base: {new: {params: 1M}, corpus: seeds}
stages:
  - curate: {set: seeds, sources: [chats], steps: [Refusal]}
  - rounds:
      count: 2
      stages:
        - curate:
            set: made
            sources: [chats]
            steps:
              - PreferenceFromModel: {model: previous, set_name: seeds, seed: "${round}"}
              - Refusal
        - sft: {set: seeds, model: base, start: previous, max_steps: 3}
        - curate:
            set: pairs
            kind: preference
            steps:
              - OnPolicyPreference:
                  {model: sft, set_name: made, prompts: 4, verifier: {JudgedRight: {model: previous}}}
        - dpo: {set: pairs, model: base, start: sft}
        - evaluate: {models: [previous, dpo], sets: [made]}
  - evaluate: {models: [base, dpo], sets: [pairs, seeds]}
"""


def loaded(*overrides: str, text: str = TEXT) -> Recipe:
    return load_text(text, "loop.yaml", overrides)


def wrong(*overrides: str, text: str = TEXT) -> str:
    with pytest.raises(HouseError) as caught:
        loaded(*overrides, text=text)
    return str(caught.value)


def said(recipe: Recipe) -> list[tuple[str, ...]]:
    """What each stage is called, and whom it names."""
    found: list[tuple[str, ...]] = []
    for stage in recipe.stages:
        if isinstance(stage, Curate):
            step = stage.steps[0]
            found.append((stage.set, str(getattr(step, "model", "")), str(getattr(step, "set_name", ""))))
        elif isinstance(stage, Train):
            found.append((stage.name, stage.set, str(stage.start)))
        else:
            found.append((*stage.models, *stage.sets))
    return found


def test_each_round_has_its_own_names_and_begins_where_the_one_before_ended() -> None:
    recipe = loaded()
    assert said(recipe) == [
        ("seeds", "", ""),
        ("made-1", "base", "seeds"),
        ("sft-1", "seeds", "None"),
        ("pairs-1", "sft-1", "made-1"),
        ("dpo-1", "pairs-1", "sft-1"),
        ("base", "dpo-1", "made-1"),
        ("made-2", "dpo-1", "seeds"),
        ("sft-2", "seeds", "dpo-1"),
        ("pairs-2", "sft-2", "made-2"),
        ("dpo-2", "pairs-2", "sft-2"),
        ("dpo-1", "dpo-2", "made-2"),
        ("base", "dpo-1", "dpo-2", "pairs-1", "pairs-2", "seeds"),
    ]
    assert [stage.round for stage in recipe.stages if not isinstance(stage, Evaluate)] == [None, *[1] * 4, *[2] * 4]
    made = recipe.sets()["made-2"].steps[0]
    assert made.seed == 2 and recipe.sets()["made-1"].steps[0].seed == 1
    assert recipe.sets()["pairs-2"].steps[0].verifier.model == "dpo-1"


def test_the_first_round_begins_with_a_stage_before_the_block() -> None:
    warm = "  - sft: {name: warm, set: seeds, model: base}\n  - rounds:"
    recipe = loaded(text=TEXT.replace("  - rounds:", warm))
    assert recipe.trained()["sft-1"].start == "warm" and recipe.sets()["made-1"].steps[0].model == "warm"
    assert recipe.trained()["sft-2"].start == "dpo-1"


def test_a_single_round_and_a_choice_of_the_same_word() -> None:
    text = TEXT.replace("set: pairs", "set: prompt").replace("[pairs, seeds]", "[prompt]").replace("dpo:", "dpo: ")
    text = text.replace("- Refusal\n", "- ExactDuplicate: {view: prompt}\n")
    recipe = loaded("rounds.count=1", text=text)
    assert [*recipe.sets()] == ["seeds", "made-1", "prompt-1"] and recipe.stages[-1].models == ("base", "dpo-1")
    assert recipe.sets()["made-1"].steps[1].view == "prompt"


def test_what_is_written_out_loads_back_equal() -> None:
    recipe = loaded()
    assert load_text(dump(recipe)) == recipe and digest(load_text(dump(recipe))) == digest(recipe)
    assert "round: 2" in dump(recipe) and "round: null" not in dump(recipe) and "previous" not in dump(recipe)


def test_overrides_reach_one_round_or_all() -> None:
    def of(recipe: Recipe) -> list[object]:
        return [
            *(recipe.sets()[f"made-{one}"].held_out for one in (1, 2)),
            *(recipe.trained()[f"sft-{one}"].settings.max_steps for one in (1, 2)),
            *(recipe.sets()[f"pairs-{one}"].steps[0].prompts for one in (1, 2)),
        ]

    assert of(loaded("sets.made.held_out=0.5", "stages.sft.max_steps=9")) == [0.5, 0.5, 9, 9, 4, 4]
    assert of(loaded("sets.made-2.held_out=0.5", "stages.sft-1.max_steps=9")) == [0.02, 0.5, 9, 3, 4, 4]
    both = ("sets.pairs.OnPolicyPreference.prompts=7", "sets.pairs-2.OnPolicyPreference.prompts=8")
    assert of(loaded(*both)) == [0.02, 0.02, 3, 3, 7, 8]
    assert [*loaded("sets.made-3.held_out=0.3", "rounds.count=3").sets()][-2:] == ["made-3", "pairs-3"]
    again = load_text(dump(loaded()), overrides=["sets.pairs.OnPolicyPreference.prompts=7"])  # as `decide` reads it
    assert of(again)[-2:] == [7, 7]
    second = TEXT + "  - rounds: {count: 1, stages: [sft: {name: more, set: seeds, model: base}]}\n"
    assert "more-3" in loaded("rounds.2.count=3", text=second).trained()
    assert "say rounds.1.count" in wrong("rounds.count=3", text=second)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("rounds.count=0", "override rounds.count=0: the count of rounds is at least 1, not '0'"),
        ("rounds.cont=3", "of rounds `count` can be set"),
        ("rounds.3.count=3", "there is no block 3 of rounds, they are 1 to 1"),
        ("sets.mad.held_out=0.1", "no set 'mad'; did you mean 'made'?"),
        ("sets.made-3.held_out=0.1", "no set 'made-3'; did you mean 'made-2'?"),
        ("round.count=3", "unknown key 'round.count'; did you mean 'rounds.count'?"),
    ],
)
def test_a_wrong_override_says_what_there_is(override: str, message: str) -> None:
    assert message in wrong(override)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("count: 2", "count: two", "loop.yaml:9: a whole number belongs here, not 'two'"),
        ("count: 2", "count: 0", "loop.yaml:9: the count of rounds is at least 1, not '0'"),
        ("      count: 2\n", "", "loop.yaml:8: rounds needs the key 'count'"),
        ("count: 2", "count: 2\n      time: 3", "loop.yaml:10: unknown key 'time' in rounds; known: count, stages"),
        ("- rounds:", "- round:", "loop.yaml:8: unknown stage 'round'; did you mean 'rounds'?"),
        ("set_name: made,", "set_name: mad,", "OnPolicyPreference needs the set 'mad' before this one"),
        ("start: sft}", "start: stf}", "loop.yaml:24: no earlier stage 'stf'; did you mean 'sft-1'?"),
        ("start: sft}", "start: sft, warmup: 3}", "loop.yaml:24: Training: warmup is from 0 to 1, not 3.0"),
        ("set: seeds, sources", "set: made, sources", "loop.yaml:12: the set 'made' of the rounds is named elsewhere"),
        ("  base: {new", "  sft: {new", "the stage 'sft' of the rounds is named elsewhere too"),
        ("set: made\n", "set: previous\n", "loop.yaml:12: 'previous' is the model before a round"),
        ("        - sft: {set: seeds", "        - rounds: {set: seeds", "loop.yaml:17: rounds inside of rounds"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_shown_where_it_stands(old: str, new: str, message: str) -> None:
    assert message in wrong(text=TEXT.replace(old, new, 1))


def test_rounds_that_train_nothing_are_refused() -> None:
    text = TEXT[: TEXT.index("        - sft:")]
    assert "loop.yaml:8: rounds without a stage that trains (sft, dpo, kto) repeat nothing" in wrong(text=text)


LOOP = """\
name: loop
decontaminate: []
sources:
  chats: {path: "CHATS", licence: MIT}
models:
  base:
    new: {params: 300K, vocab: 400, context: 256, tokens: 2000}
    corpus: clean
    licence: MIT
stages:
  - curate: {set: clean, sources: [chats], held_out: 0.1, steps: [ResponseLength: {low: 1, high: 500}, ExactDuplicate]}
  - sft: {set: clean, model: base, max_steps: 2, TRAINING}
  - rounds:
      count: 2
      stages:
        - curate:
            set: pairs
            kind: preference
            held_out: 0
            steps:
              - OnPolicyPreference:
                  model: previous
                  set_name: clean
                  verifier: {Matches: {pattern: "a"}}
                  prompts: 20
                  test_prompts: 0
                  answers: 6
                  max_tokens: 48
                  seed: ${round}
              - EqualAnswers
        - dpo: {set: pairs, model: base, start: previous, max_steps: 2, TRAINING}
  - evaluate: {models: [base, sft, dpo], sets: [clean]}
""".replace("TRAINING", "capacity: 256, packs_per_step: 2, learning_rate: 1e-2, threads: 1, lora: {rank: 4}")

Looped = tuple[Recipe, RunFolder, list[str], list[str]]


@pytest.fixture(scope="module")
def looped(shared: Path, tmp_path_factory: pytest.TempPathFactory) -> Looped:
    """A loop that was stopped in its second round and then went on: recipe, folder, the jobs of both starts."""
    recipe = load_text(LOOP.replace("CHATS", str(shared / "chats.jsonl")))
    out = tmp_path_factory.mktemp("loop") / "out"
    first: list[str] = []

    def until_round_two(job: Job, show: Silent) -> Done:
        first.append(job.name)
        if job.name == "train dpo-2":
            raise KeyboardInterrupt
        return plainly(job, show)

    with pytest.raises(KeyboardInterrupt):
        run(recipe, out, cache=shared / "cache", each=until_round_two)
    second = Silent()
    run(recipe, out, cache=shared / "cache", show=second)
    return recipe, RunFolder(out, shared / "cache"), first, second.done


def test_a_loop_goes_on_where_it_stopped(looped: Looped) -> None:
    recipe, folder, first, _ = looped
    assert first.index("train dpo-1") < first.index("pairs-2 01-OnPolicyPreference") < first.index("train dpo-2")
    spent = read_json(folder.root / "spend.json")["starts"]
    asked = [start["models"] for start in spent]
    assert len(asked) == 1 and set(asked[0]) == {"sft", "dpo-1"}  # the second start found every answer and row made
    assert run(recipe, folder.root, cache=folder.measures.parent).cached
    assert {row["model"] for row in read_json(folder.root / "evaluation.json")["rows"]} == {
        "base",
        "sft",
        "dpo-1",
        "dpo-2",
    }


def test_rows_of_a_round_name_the_adapter_that_made_them(looped: Looped) -> None:
    recipe, folder, _, _ = looped
    shop = Workshop(recipe, folder)
    for number, model in ((1, "sft"), (2, "dpo-1")):
        rows = [row for part in shop.curated(f"pairs-{number}", "train") for row in part.to_pylist()]
        assert rows
        for row in rows:
            made = json.loads(row["meta"])["made"]
            assert (made["model"], made["model_digest"]) == (model, shop.digest(model))
    digests = {shop.digest(name) for name in ("base", "sft", "dpo-1", "dpo-2")}
    assert len(digests) == 4


def test_each_round_is_a_release_with_its_own_card(looped: Looped) -> None:
    recipe, folder, _, _ = looped
    shop = Workshop(recipe, folder)
    for number, model, told in ((1, "sft", "`base` after the stage of that name"), (2, "dpo-1", ", round 1 |")):
        home = folder.curated(f"pairs-{number}")
        manifest = read_json(home / "manifest.json")
        (author,) = manifest["models"]
        assert manifest["round"] == number and author["model"] == model and author["digest"] == shop.digest(model)
        card = (home / "README.md").read_text()
        assert f"round {number} of a loop" in card and told in card and f"`{shop.digest(model)}`" in card
        assert "of 300K parameters made on the spot" in card
    report = folder.report.read_text()
    assert "Round 2 of a loop." in report and f"OnPolicyPreference asked dpo-1 ({shop.digest('dpo-1')})." in report


def test_decide_and_why_know_the_rounds(looped: Looped) -> None:
    recipe, folder, _, _ = looped
    (row, *_) = [row for part in Workshop(recipe, folder).curated("pairs-2", "train") for row in part.to_pylist()]
    said = CliRunner().invoke(app, ["why", str(folder.root), row["row_id"]], catch_exceptions=False).output
    assert "pairs-2" in said and "dpo-1" in said
    found = decide(folder.root, ["sets.clean.ResponseLength.low=8"])
    assert found.unsure == ("pairs-1", "pairs-2")  # their prompts are those of the set that would change
