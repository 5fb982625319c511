"""Training stages in recipes and on the command line: every objective, losses by name, options or dotted path."""

import sys
from dataclasses import replace
from pathlib import Path

import pytest
from transformers import AutoConfig

from gristmill.curation.folder import HouseError, RunFolder
from gristmill.flows.cli import app
from gristmill.flows.losses import show_losses
from gristmill.flows.models import Workshop
from gristmill.flows.recipe import build_settings, dump, load_text
from gristmill.flows.run import run
from gristmill.flows.training import train_stage
from gristmill.tuning.losses import LOSSES
from gristmill.tuning.settings import Training

TEXT = """\
name: tiny
sources:
  rows: {path: rows.jsonl, licence: MIT}
models:
  base: {path: models/base}
stages:
  - curate: {set: pairs, kind: preference, sources: [rows], held_out: 0}
  - curate: {set: single, kind: kto, sources: [rows]}
  - dpo:
      set: pairs
      model: base
      loss: {simpo: {beta: 2.5}}
      checkpointing: 4
      track: [tensorboard, wandb]
  - kto:
      set: single
      model: base
      start: dpo
      loss: kto
      optimizer: lion
      checkpointing: layers
      evaluate_every: 10
"""


def test_every_objective_and_form_of_a_loss_is_read_and_dumped_back() -> None:
    recipe = load_text(TEXT)
    dpo, kto = recipe.trained().values()
    assert (dpo.objective, kto.objective, kto.start) == ("dpo", "kto", "dpo")
    assert dpo.settings.loss == {"simpo": {"beta": 2.5}} and dpo.settings.checkpointing == 4
    assert dpo.settings.track == ("tensorboard", "wandb")
    assert kto.settings.loss == "kto" and kto.settings.checkpointing == "layers"
    assert load_text(dump(recipe)) == recipe
    changed = load_text(TEXT, overrides=["stages.dpo.loss.simpo.gamma=0.5", "stages.kto.loss=fdpo"])
    assert changed.trained()["dpo"].settings.loss == {"simpo": {"beta": 2.5, "gamma": 0.5}}
    assert changed.trained()["kto"].settings.loss == "fdpo"


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("{simpo: {beta: 2.5}}", "simpoo", "tiny.yaml:12: unknown loss 'simpoo'; did you mean 'simpo'?"),
        ("beta: 2.5", "bata: 2.5", "tiny.yaml:12: loss simpo has no option 'bata'; did you mean 'beta'?"),
        ("beta: 2.5", "beta: -1", "tiny.yaml:12: loss simpo: beta is -1.0: it must be above 0"),
        ("{simpo: {beta: 2.5}}", "kto", "tiny.yaml:12: loss kto is one of unpaired; dpo trains on pairs or lists"),
        ("loss: kto", "loss: no_such_module.loss", "tiny.yaml:19: loss no_such_module.loss: cannot import"),
        ("optimizer: lion", "optimizer: tiger", "tiny.yaml:20: 'tiger' is none of adamw, lion"),
        (
            "checkpointing: layers",
            "checkpointing: some",
            "tiny.yaml:21: 'some' is none of none, layers, nor a",
        ),
        ("[tensorboard, wandb]", "[mlflow]", "tiny.yaml:14: 'mlflow' is none of tensorboard, trackio, wandb"),
        ("checkpointing: 4", "evaluate_every: 5", "set 'pairs' holds no rows out (held_out: 0)"),
        ("set: single\n", "set: pairs\n", "kto trains on kto rows; set 'pairs' holds preference"),
        ("checkpointing: 4", "lora: {rank: 0}", "tiny.yaml:10: Training: lora: rank is 1 or more, dropout from 0"),
        ("checkpointing: 4", "lora: {alpha: nan}", "tiny.yaml:10: Training: lora: alpha is a number, not nan"),
        (
            "checkpointing: 4",
            "lora: {rank: 4}",
            "continues 'dpo', whose lora.rank is 4, not 16: write the same",
        ),
        ("checkpointing: 4", "capacity: 1", "tiny.yaml:10: Training: capacity is 2 or more, not 1"),
    ],
)
def test_what_cannot_be_trained_is_named_with_its_line(old: str, new: str, message: str) -> None:
    assert old in TEXT
    with pytest.raises(HouseError) as caught:
        load_text(TEXT.replace(old, new, 1), "tiny.yaml")
    assert message in str(caught.value)


def test_the_command_line_reads_losses_as_recipes_do() -> None:
    made = build_settings(Training, ["loss.ipo.beta=0.2", "track=[trackio]", "checkpointing=2"])
    assert (made.loss, made.track, made.checkpointing) == ({"ipo": {"beta": 0.2}}, ("trackio",), 2)
    assert build_settings(Training, ["loss=my_package.my_loss"]).loss == "my_package.my_loss"
    assert build_settings(Training, ["loss.my.own.beta=2"]).loss == {"my.own": {"beta": 2}}
    with pytest.raises(HouseError, match=r"^overrides: Training: learning_rate is 0 or more, not -1"):
        build_settings(Training, ["learning_rate=-1"])
    with pytest.raises(HouseError, match=r"'all' is none of none, layers, nor a whole number"):
        build_settings(Training, ["checkpointing=all"])
    with pytest.raises(HouseError, match=r"a list belongs here, as in \[a, b\], not 'q_proj,v_proj'"):
        build_settings(Training, ["lora.targets=q_proj,v_proj"])
    assert {command.name or command.callback.__name__ for command in app.registered_commands} > {"sft", "dpo", "kto"}


def test_a_tracker_that_is_not_installed_is_told_before_anything_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    recipe = load_text(TEXT.replace("[tensorboard, wandb]", "[wandb]"), "tiny.yaml")
    with pytest.raises(HouseError, match="track: wandb is not installed"):
        run(recipe, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_list_of_losses_names_each_with_its_options(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    show_losses()
    said = capsys.readouterr().out
    assert all(f"  {name}(" in said for name in LOSSES) and "ipo(beta=0.1)" in said and "arXiv 2405.14734" in said
    show_losses("kto")
    assert "reference point z" in capsys.readouterr().out
    with pytest.raises(HouseError, match="no loss is called 'ktoo'; did you mean 'kto'"):
        show_losses("ktoo")


SERVED = """\
name: served
sources:
  rows: {path: rows.jsonl, licence: MIT}
models:
  base: {path: MODEL, serve: {}}
stages:
  - curate: {set: first, sources: [rows]}
  - sft: {set: first, model: base, lora: {rank: 513}}
  - curate:
      set: second
      kind: preference
      steps:
        - BestAgainstWorst: {model: sft, judge: base, set_name: first}
"""


def test_what_vllm_would_not_serve_is_not_trained_where_it_is_to_be_asked_through_it(tmp_path: Path) -> None:
    AutoConfig.for_model("qwen3", architectures=["Qwen3ForCausalLM"]).save_pretrained(tmp_path / "model")
    recipe = load_text(SERVED.replace("MODEL", str(tmp_path / "model")))
    folder = RunFolder(tmp_path / "out")
    with pytest.raises(HouseError, match=r"stage sft: the set second will ask it through vLLM.*rank 513"):
        train_stage(folder, Workshop(recipe, folder), recipe.trained()["sft"], lambda done, total: None)
    plain = replace(recipe, models={"base": replace(recipe.models["base"], serve=None)})
    with pytest.raises(HouseError) as told:  # nothing is curated in this folder: it gets that far
        train_stage(folder, Workshop(plain, folder), plain.trained()["sft"], lambda done, total: None)
    assert "vLLM" not in str(told.value)


def test_an_adapter_that_continues_full_weights_lies_on_those(tmp_path: Path) -> None:
    recipe = load_text(
        "name: two\nsources:\n  rows: {path: rows.jsonl, licence: MIT}\nmodels:\n  base: {path: models/base}\nstages:\n"
        "  - curate: {set: chats, sources: [rows]}\n"
        "  - sft: {set: chats, model: base, lora: null}\n"
        "  - sft: {set: chats, model: base, name: more, start: sft}\n"
        "  - sft: {set: chats, model: base, name: third, start: more}\n"
    )
    folder = RunFolder(tmp_path / "out")
    for name, file in (
        ("sft", "model/config.json"),
        ("more", "adapter/adapter_config.json"),
        ("third", "adapter/adapter_config.json"),
    ):
        (folder.stage(name) / file).parent.mkdir(parents=True)
        (folder.stage(name) / file).write_text("{}")
    shop, full = Workshop(recipe, folder), folder.stage("sft") / "model"
    assert shop.where("sft") == (full, None)
    assert shop.where("more") == (full, folder.stage("more") / "adapter")
    assert shop.where("third") == (full, folder.stage("third") / "adapter")
