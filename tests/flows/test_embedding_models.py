"""Embedding models of a recipe: by path, distilled when first needed, and what is wrong with one said before a run."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import BertConfig, BertModel, BertTokenizer

from gristmill.curation.folder import HouseError
from gristmill.curation.judges.semantic_duplicates import SemanticDuplicate
from gristmill.curation.reading.source import Source
from gristmill.flows.run import run
from gristmill.flows.stages import Curate, Model, Recipe, check


@pytest.fixture
def encoder(tmp_path: Path) -> str:
    home = tmp_path / "encoder"
    words = [
        "[PAD]",
        "[UNK]",
        "[CLS]",
        "[SEP]",
        "[MASK]",
        *"abcdefghijklmnopqrstuvwxyz0123456789?",
        *["what", "is", "the", "of"],
    ]
    words += [f"##{letter}" for letter in "abcdefghijklmnopqrstuvwxyz0123456789"]
    BertTokenizer(vocab={word: place for place, word in enumerate(words)}).save_pretrained(home)
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
    BertModel(BertConfig(vocab_size=len(words), max_position_embeddings=64, **shape)).save_pretrained(home)
    return str(home)


def recipe(tmp_path: Path, model: str, **models: Model) -> Recipe:
    lines = [{"prompt": f"what is the root of {n}?", "response": f"it is {n}"} for n in (4, 9, 16, 25)]
    lines.append({"prompt": "What is the root of 4 ?", "response": "two"})
    chats = tmp_path / "chats.jsonl"
    chats.write_text("".join(json.dumps(line) + "\n" for line in lines))
    steps = (SemanticDuplicate(model, threshold=0.9999),)
    return Recipe(
        "r",
        sources=(Source("chats", str(chats), "MIT"),),
        models=models,
        stages=(Curate("clean", sources=("chats",), held_out=0.0, steps=steps),),
    )


@pytest.mark.parametrize("name", ["base", "static"])
def test_a_recipe_embeds_by_a_model_and_by_one_distilled_from_it(tmp_path: Path, encoder: str, name: str) -> None:
    mine = recipe(tmp_path, name, base=Model(path=encoder), static=Model(distil="base"))
    out = tmp_path / "out"
    result = run(mine, out)
    step = json.loads(next(out.glob("ledger/clean/*-SemanticDuplicate/step.json")).read_text())
    assert step["reasons"] == {"semantic_duplicate": 1} and step["kept"] == 4
    made = list((out / "models").glob("static-*/model.safetensors"))
    assert len(made) == (name == "static")
    assert not result.cached and run(mine, out).cached


def test_a_distilled_model_is_keyed_by_its_teacher(tmp_path: Path, encoder: str) -> None:
    from gristmill.curation.folder import RunFolder
    from gristmill.flows.models import Workshop

    mine = recipe(tmp_path, "static", base=Model(path=encoder), static=Model(distil="base"))
    one = Workshop(mine, RunFolder(tmp_path / "a")).base_folder("static").name
    assert Workshop(mine, RunFolder(tmp_path / "b")).base_folder("static").name == one
    config = Path(encoder) / "config.json"
    config.write_text(config.read_text() + " ")
    assert Workshop(mine, RunFolder(tmp_path / "b")).base_folder("static").name != one


@pytest.mark.parametrize(
    ("models", "message"),
    [
        ({"m": Model(path="x", distil="m")}, "both `path` and `distil`"),
        ({"m": Model()}, "none of `path`, `new`, `distil`, `server` and `cassette`"),
        ({"m": Model(distil="absent")}, "distilled from a model that has a path"),
        ({"m": Model(distil="m")}, "distilled from a model that has a path"),
        ({"m": Model(distil="b", corpus="clean"), "b": Model(path="x")}, "learns from no set"),
    ],
)
def test_what_is_wrong_is_said(tmp_path: Path, models: dict[str, Any], message: str) -> None:
    with pytest.raises(HouseError, match=message):
        check(recipe(tmp_path, "m", **models))
