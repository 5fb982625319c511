"""The stage `evaluate`: which models are measured on which sets against what, and how it is told, in JSON, on the
terminal and in the report."""

import random
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from gristmill.curation.folder import HouseError, RunFolder, read_json
from gristmill.curation.rows import content_id, counted_row_id, message, table
from gristmill.curation.shards import read_split, write_curated
from gristmill.flows.models import Workshop
from gristmill.flows.progress import Silent
from gristmill.flows.recipe import Recipe, load_text
from gristmill.flows.report import write_report
from gristmill.flows.run import Result
from gristmill.flows.summary import show_result
from gristmill.flows.training import evaluate_stage
from gristmill.tuning.evaluate import evaluate_unpaired
from gristmill.tuning.models import load_model, load_tokenizer, make_model
from gristmill.tuning.settings import NewModel

WORDS = ("mill", "grist", "stone", "water", "wheel", "grain", "flour", "sack")
TEXT = """\
name: labelled
decontaminate: []
sources:
  rows: {path: rows.jsonl, licence: MIT}
models:
  base: {path: BASE}
stages:
  - curate: {set: single, kind: kto, sources: [rows], held_out: 0.1}
  - curate: {set: good, kind: kto, sources: [rows], held_out: 0.1}
  - curate: {set: pairs, kind: preference, sources: [rows], held_out: 0.1}
  - curate: {set: chats, kind: sft, sources: [rows], held_out: 0.1}
  - sft: {set: chats, model: base, capacity: 200, lora: null}
  - kto: {set: single, model: base, start: sft, loss: {kto: {beta: 0.5}}, lora: null}
  - dpo: {set: pairs, model: base, start: kto, lora: null}
  - evaluate: {models: [base, sft, kto, dpo], sets: [single, pairs]}
  - evaluate: {models: [kto], sets: [good]}
  - evaluate: {models: [base, sft], sets: [pairs]}
"""
Found = dict[tuple[str, str, str], dict[str, Any]]


def talk(draw: random.Random) -> str:
    return " ".join(draw.choices(WORDS, k=draw.randint(1, 12)))


def curated(folder: RunFolder, name: str, kind: str, labels: list[bool], long: str = "") -> None:
    """A set of one row in train and one in test for each label. long: the first question."""
    draw = random.Random(len(labels))
    splits = {}
    for split in ("train", "test"):
        rows = []
        for position, label in enumerate(labels):
            row = {"source": "rows", "position": position, "messages": [message("user", talk(draw))]}
            if long and not position:
                row["messages"] = [message("user", long)]
            row["chosen"] = [message("assistant", talk(draw))]
            row |= {"label": label} if kind == "kto" else {"rejected": [message("assistant", talk(draw))]}
            row["content_id"] = content_id(row)
            row["row_id"] = counted_row_id("rows", row["content_id"], position)
            rows.append(row)
        splits[split] = [table(rows)]
    write_curated(folder.curated(name), kind, splits, {}, lambda manifest: {})


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> tuple[Recipe, RunFolder]:
    """Three models (the fourth is the base) that differ in their weights, and all stages `evaluate` of TEXT."""
    home = tmp_path_factory.mktemp("labelled")
    spec = NewModel(params="60K", vocab=300, context=256, tokens=0)
    make_model(home / "base", spec, iter([talk(random.Random(n)) for n in range(400)]))
    folder, tokenizer = RunFolder(home / "out"), load_tokenizer(home / "base")
    recipe = load_text(TEXT.replace("BASE", str(home / "base")))
    for seed, name in enumerate(recipe.trained()):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_pretrained(home / "base")
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.05 * torch.randn_like(parameter))
        model.save_pretrained(folder.stage(name) / "model")
        tokenizer.save_pretrained(folder.stage(name) / "model")
    curated(folder, "single", "kto", [True, False, True, True, False, False, True])
    curated(folder, "good", "kto", [True] * 4, long="mill " * 300)
    curated(folder, "pairs", "preference", [True] * 5)
    for index, stage in enumerate(recipe.stages[-3:]):
        done = evaluate_stage(folder, Workshop(recipe, folder), stage, index, lambda done, total: None)
        assert not done.cached
    return recipe, folder


@pytest.fixture
def found(measured: tuple[Recipe, RunFolder]) -> Found:
    rows = read_json(measured[1].root / "evaluation.json")["rows"]
    return {(row["set"], row["model"], row["metric"]): row for row in rows}


def test_a_set_of_labelled_answers_measures_every_model(measured: tuple[Recipe, RunFolder], found: Found) -> None:
    recipe, folder = measured
    shop = Workshop(recipe, folder)
    models = {name: load_model(shop.where(name)[0], dtype="fp32", device="cpu") for name in ("base", "sft", "kto")}
    rows, tokenizer = read_split(folder.curated("single"), "test"), load_tokenizer(shop.where("base")[0])
    for name, start in (("base", None), ("sft", "sft"), ("kto", "sft")):
        reference = models[name] if start == name else models.get(start)
        expected = evaluate_unpaired(models[name], reference, tokenizer, rows, 0.5, 4096)
        ours = {metric: row["value"] for (of, model, metric), row in found.items() if (of, model) == ("single", name)}
        assert list(ours) == [metric for metric in expected if metric in ours] and len(ours) == (3 if not start else 5)
        assert ours == pytest.approx({metric: expected[metric] for metric in ours}, abs=1e-5)
    counts = {metric: row["rows"] for (of, model, metric), row in found.items() if (of, model) == ("single", "kto")}
    assert list(counts.items()) == [
        ("logp_desirable", 4), ("logp_undesirable", 3), ("logp_auc", 7), ("reward_auc", 7), ("margin", 7)
    ]  # fmt: skip
    assert found["single", "sft", "reward_auc"]["value"] == 0.5 and found["single", "sft", "margin"]["value"] == 0.0


def test_a_stage_that_another_starts_from_keeps_its_own_reference(found: Found) -> None:
    """It was once measured again as the other's start, against itself, and all its pairs were shown as ties."""
    assert found["pairs", "sft", "margin"]["value"] == 0.0
    assert found["pairs", "kto", "margin"]["value"] != 0.0 != found["pairs", "dpo", "margin"]["value"]
    assert found["single", "kto", "margin"]["value"] != 0.0 and ("pairs", "base", "margin") not in found


def test_one_label_alone_is_said_and_so_is_a_missing_reference(
    measured: tuple[Recipe, RunFolder], found: Found, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe, folder = measured
    for metric in ("logp_undesirable", "logp_auc", "reward_auc", "margin"):
        assert found["good", "kto", metric]["note"] == "all answers are desirable"
        assert found["good", "kto", metric]["value"] is None
    assert (
        np.isfinite(found["good", "kto", "logp_desirable"]["value"]) and found["good", "sft", "logp_auc"]["rows"] == 3
    )
    assert "no reference" in found["pairs", "base", "accuracy"]["note"]
    assert found["good", "kto", "logp_auc"]["excluded"] == {"too_long": 1}
    assert [key for key, row in found.items() if "excluded" in row and key[0] != "good"] == []
    assert [key for key, row in found.items() if "note" in row and key[0] == "single"] == []
    alone = RunFolder(tmp_path)
    shutil.copy(folder.root / "evaluation.json", alone.root)
    page = write_report(alone).read_text(encoding="utf-8")
    show_result(recipe, Result(alone, cached=True), Silent())
    said = capsys.readouterr().out
    assert said.count("all answers are desirable") == 8 and page.count("all answers are desirable") == 8
    left = "good, held-out rows not measured: too_long 1"
    assert said.count(left) == page.count(left) == 1
    value = found["single", "kto", "reward_auc"]["value"]
    assert f"{value:.4f}" in said and f"{value:.4g}" in page and "nothing to score" not in said


def test_models_with_weights_that_are_no_numbers_say_so(measured: tuple[Recipe, RunFolder], tmp_path: Path) -> None:
    recipe, folder = measured
    broken = RunFolder(tmp_path / "out")
    base = AutoModelForCausalLM.from_pretrained(Workshop(recipe, folder).where("base")[0])
    base.get_output_embeddings().weight.data.fill_(float("nan"))
    for name in ("sft", "kto"):
        base.save_pretrained(broken.stage(name) / "model")
    curated(broken, "single", "kto", [True, False])
    stage = recipe.stages[-2].__class__(models=("kto",), sets=("single",))
    evaluate_stage(broken, Workshop(recipe, broken), stage, 0, lambda done, total: None)
    rows = read_json(broken.root / "evaluation.json")["rows"]
    kto = [row for row in rows if row["model"] == "kto"]
    assert len(kto) == 5 and all(row["value"] is None and row["note"] == "not finite" for row in kto)
    assert "NaN" not in (broken.root / "evaluation.json").read_text()


def test_raw_text_is_not_evaluated() -> None:
    with pytest.raises(HouseError, match="set 'chats' holds text: sft, preference and kto can be evaluated"):
        load_text(
            "name: t\nsources:\n  rows: {path: rows.jsonl, licence: MIT}\nmodels:\n  base: {path: models/base}\n"
            "stages:\n  - curate: {set: chats, kind: text, sources: [rows]}\n"
            "  - evaluate: {models: [base], sets: [chats]}\n"
        )
