"""Each family of models from end to end, in tiny: trained packed, its adapter in PEFT, merged, all with equal logits.

Packed states against documents alone, for every architecture, are in test_attention.py.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from gristmill.curation.folder import HouseError
from gristmill.curation.rows import content_id, counted_row_id, message, table
from gristmill.curation.shards import write_curated
from gristmill.tuning.export import export
from gristmill.tuning.loop import train
from gristmill.tuning.models import load_model, load_tokenizer, train_tokenizer
from gristmill.tuning.settings import Lora, Training

WINDOW = {"sliding_window": 8}
MIXED = WINDOW | {"layer_types": ["sliding_attention", "full_attention"]}
CAPS = {"attn_logit_softcapping": 0.5, "final_logit_softcapping": 5.0, "query_pre_attn_scalar": 1}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {"tie_word_embeddings": False},
    "qwen2": {"use_sliding_window": True, "max_window_layers": 1} | WINDOW,
    "qwen3": {"tie_word_embeddings": True},
    "mistral": WINDOW,
    "gemma": {},
    "gemma2": MIXED | CAPS,
    "gemma3_text": MIXED,
    "phi3": WINDOW,
    "olmo2": {},
    "granite": {"embedding_multiplier": 3.0, "attention_multiplier": 0.2, "logits_scaling": 4.0},
}
SETTINGS = Training(
    capacity=96, packs_per_step=8, max_steps=3, learning_rate=1e-2, warmup=0.0, threads=1, dtype="fp32",
    lora=Lora(rank=2, base="fp32"),
)  # fmt: skip
IDS = torch.randint(3, 250, (1, 40), generator=torch.Generator().manual_seed(1))


def make_base(folder: Path, kind: str, vocab: int | None = None, **more: Any) -> Path:
    torch.manual_seed(0)
    tokenizer = train_tokenizer(["Grind the grain of the mill. " * 30], 300, 128)
    shape: dict[str, Any] = {
        "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 8, "vocab_size": vocab or len(tokenizer), "max_position_embeddings": 128,
        "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "initializer_range": 0.1,
    }  # fmt: skip
    AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **shape | more)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def curate(folder: Path, conversations: Iterator[list[dict[str, Any]]]) -> Path:
    rows = []
    for position, messages in enumerate(conversations):
        row = {"source": "made", "position": position, "messages": messages}
        row["content_id"] = content_id(row)
        rows.append(row | {"row_id": counted_row_id("made", row["content_id"], 0)})
    write_curated(folder, "sft", {"train": [table(rows)]}, {}, lambda manifest: {})
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    turns = ([message("user", "mill " * (n + 1)), message("assistant", "grain " * (5 - n))] for n in range(5))
    return curate(tmp_path_factory.mktemp("families") / "sft", turns)


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        found: Tensor = model.eval()(IDS, use_cache=False).logits
    return found


@pytest.mark.parametrize("kind", FAMILIES)
def test_a_family_from_training_to_export(kind: str, data: Path, tmp_path: Path) -> None:
    base = make_base(tmp_path / "base", kind, **FAMILIES[kind])
    run = train("sft", data, base, tmp_path / "run", SETTINGS)
    lines = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert run["status"] == "complete" and lines[2]["loss"] < lines[0]["loss"]  # each step sees all rows
    ours = load_model(base, dtype="fp32", device="cpu", adapter=tmp_path / "run/adapter")
    ours.set_attn_implementation("eager")
    plain = AutoModelForCausalLM.from_pretrained(base, attn_implementation="eager")
    before = logits(plain)
    theirs = logits(PeftModel.from_pretrained(plain, str(tmp_path / "run/adapter")))
    close = 1e-5 * max(1.0, float(theirs.abs().max()))
    assert (theirs - before).abs().max() > 100 * close
    torch.testing.assert_close(logits(ours), theirs, rtol=1e-4, atol=close)
    export(tmp_path / "run", tmp_path / "merged", "merged", device="cpu")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", attn_implementation="eager")
    torch.testing.assert_close(logits(merged), theirs, rtol=1e-4, atol=close)


def test_a_mixture_of_experts_is_refused_by_name_before_training(data: Path, tmp_path: Path) -> None:
    shape = {"num_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 16}
    base = make_base(tmp_path / "base", "qwen3_moe", **shape)
    with pytest.raises(HouseError, match=r"qwen3_moe.* is a mixture of experts"):
        train("sft", data, base, tmp_path / "run", SETTINGS)


def test_a_model_whose_documents_cannot_be_kept_apart_is_refused_by_name(data: Path, tmp_path: Path) -> None:
    base = make_base(tmp_path / "base", "lfm2", layer_types=["conv", "full_attention"])
    with pytest.raises(HouseError, match=r"lfm2.* has layers \['conv'\], which carry state across the documents"):
        train("sft", data, base, tmp_path / "run", SETTINGS)


def test_a_vocabulary_larger_than_the_embedding_is_refused(data: Path, tmp_path: Path) -> None:
    """The ids beyond it would read outside the matrix; the mistake is a base and a tokenizer that do not belong."""
    base = make_base(tmp_path / "base", "llama", vocab=270)
    with pytest.raises(HouseError, match=r"ids up to 2\d\d.* 270 rows.*resize_token_embeddings"):
        train("sft", data, base, tmp_path / "run", SETTINGS)


def test_a_special_token_beyond_the_embedding_is_refused_where_a_row_says_it(data: Path, tmp_path: Path) -> None:
    """Gemma 3's text models have no row for the placeholder of an image that their tokenizer knows."""
    base = make_base(tmp_path / "base", "llama")
    tokenizer = load_tokenizer(base)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    tokenizer.save_pretrained(base)
    assert train("sft", data, base, tmp_path / "run", SETTINGS)["status"] == "complete"
    turns = [message("user", "mill <image>"), message("assistant", "grain")]
    said = curate(tmp_path / "said", iter([turns]))
    with pytest.raises(HouseError, match=r"id \d+ .*of 1 rows.* such as [0-9a-f]{32}"):
        train("sft", said, base, tmp_path / "refused", SETTINGS)


def test_an_embedding_larger_than_the_vocabulary_is_common_and_fine(data: Path, tmp_path: Path) -> None:
    base = make_base(tmp_path / "base", "llama", vocab=320)
    assert train("sft", data, base, tmp_path / "run", SETTINGS)["status"] == "complete"


def test_rows_without_a_target_are_left_out_by_name_never_trained_as_zero(tmp_path: Path) -> None:
    """Trap 7: all labels masked is no loss of 0.0, and no NaN."""
    base = make_base(tmp_path / "base", "llama")
    silent = curate(tmp_path / "silent", iter([[message("user", "mill")]]))
    with pytest.raises(HouseError, match=r"no row is left to train on; excluded: .*no_target"):
        train("sft", silent, base, tmp_path / "run", SETTINGS)
