"""One small Qwen3 for all tests of vLLM, a run that learnt three answers by heart, and what is exported of it."""

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from gristmill.curation.rows import content_id, counted_row_id, message, table
from gristmill.curation.shards import write_curated
from gristmill.tuning.export import export
from gristmill.tuning.loop import train
from gristmill.tuning.models import train_tokenizer
from gristmill.tuning.settings import Lora, Training

os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ.setdefault("VLLM_EXECUTE_MODEL_TIMEOUT_SECONDS", "3600")  # 300 by default: too few on a busy machine
TALK = [("What grinds?", "The mill."), ("What turns it?", "The river."), ("And then?", "Flour, then bread.")]
RANK, CONTEXT = 4, 128


@pytest.fixture(scope="session")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the model `base`, the run `run` that learnt TALK on it, and its exports `adapter` and `merged`."""
    return make(tmp_path_factory.mktemp("vllm"))


def make(home: Path) -> Path:
    tokenizer = train_tokenizer([" ".join(word for pair in TALK for word in pair) * 20], 300, CONTEXT)
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        "qwen3", hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=32, vocab_size=len(tokenizer), max_position_embeddings=CONTEXT,
        eos_token_id=0, initializer_range=0.1,
    )  # fmt: skip
    AutoModelForCausalLM.from_config(config).save_pretrained(home / "base")
    tokenizer.save_pretrained(home / "base")
    rows = []
    for ask, say in TALK:
        row: dict[str, Any] = {"messages": [message("user", ask), message("assistant", say)]}
        row |= {"source": "talk", "position": 0, "content_id": content_id(row)}
        rows.append(row | {"row_id": counted_row_id("talk", row["content_id"], 0)})
    write_curated(home / "data", "sft", {"train": [table(rows)]}, {}, lambda manifest: {})
    how = Training(
        capacity=128, packs_per_step=1, max_steps=60, learning_rate=1e-2, dtype="fp32", threads=1,
        lora=Lora(rank=RANK, base="fp32"),
    )  # fmt: skip
    train("sft", home / "data", home / "base", home / "run", how)
    for kind in ("adapter", "merged"):
        manifest = export(home / "run", home / kind, kind, device="cpu")  # type: ignore[arg-type]
        assert manifest["vllm"] == []
    return home
