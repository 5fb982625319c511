"""A model of two layers, small curated sets of each kind, and stages over them."""

import json
import random

import numpy as np
import torch

from gristmill.curation.rows import content_id, counted_row_id, message, table
from gristmill.curation.shards import write_curated
from gristmill.tuning.data import make_plan, read_rows, read_units
from gristmill.tuning.models import load_model, load_tokenizer, make_model
from gristmill.tuning.objectives import find_loss
from gristmill.tuning.ranks import World
from gristmill.tuning.settings import Lora, NewModel, Training
from gristmill.tuning.sharded import spread
from gristmill.tuning.stage import Stage

WORDS = ("mill", "grist", "stone", "water", "wheel", "grain", "flour", "sack", "miller", "river", "sluice", "bread")
SMALL = Training(
    capacity=150, packs_per_step=3, epochs=2, learning_rate=1e-2, warmup=0.2, checkpoint_every=3, threads=1,
    lora=Lora(rank=4, alpha=8.0, dropout=0.1),
)  # fmt: skip
WEIGHTS = "adapter/adapter_model.safetensors"


def talk(draw, most=18):
    return " ".join(draw.choices(WORDS, k=draw.randint(1, most)))


KINDS = {"sft": "sft", "dpo": "preference", "kto": "kto"}


def rows_of(kind, count, seed=0):
    draw = random.Random(seed)
    rows = []
    for position in range(count):
        source = "other" if position % 4 == 3 else "made"
        prompt = talk(random.Random(position // 3)) if kind == "preference" else talk(draw)
        row = {"source": source, "position": position, "messages": [message("user", prompt)]}
        if kind == "kto":
            row |= {"chosen": [message("assistant", talk(draw))], "label": position % 3 != 0}
        elif kind == "sft":
            row["messages"].append(message("assistant", talk(draw)))
        else:
            row |= {"chosen": [message("assistant", talk(draw))], "rejected": [message("assistant", talk(draw, 8))]}
        row["content_id"] = content_id(row)
        row["row_id"] = counted_row_id(source, row["content_id"], position)
        rows.append(row)
    return rows


def curate(folder, kind, rows, held_out=()):
    splits = {"train": [table(rows)]} | ({"test": [table(held_out)]} if held_out else {})
    write_curated(folder, kind, splits, {}, lambda manifest: {})
    return folder


def make_home(home):
    """A folder with `model` and the sets `sft`, `preference`, `kto`, each with some held-out rows."""
    spec = NewModel(params="110K", vocab=300, context=256, tokens=0)
    make_model(home / "model", spec, iter([talk(random.Random(1), 400) for _ in range(20)]))
    for kind, count in (("sft", 40), ("preference", 24), ("kto", 30)):
        curate(home / kind, kind, rows_of(kind, count), rows_of(kind, 9, seed=1))
    return home


def metrics(out):
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def adapter_of(out):
    return (out / WEIGHTS).read_bytes()


def stage_of(home, objective, settings, reference=None):
    """A Stage over all weights, on the fixture's data."""
    policy = load_model(home / "model", dtype="fp32", device="cpu")
    policy.requires_grad_(True)
    loss = find_loss(settings.loss, objective)
    rows = read_rows(objective, home / KINDS[objective])
    units = read_units(loss.family, load_tokenizer(home / "model"), rows, settings.capacity, "refuse", 256)
    plan = make_plan(units, settings)
    return Stage("", loss, plan, spread(policy, World(), "ddp"), reference, settings, home / "none")


def parameters_of(stage):
    return stage.spread.parameters


def alone(model, document):
    """Log-probabilities of the targets of one document, by transformers' own forward pass."""
    ids = torch.from_numpy(document.ids.astype(np.int64))
    logits = model(input_ids=ids[None], use_cache=False).logits[0]
    targets = np.flatnonzero(document.weights)
    return logits[targets - 1].log_softmax(-1).gather(1, ids[targets, None])[:, 0]


def plain(home):
    """The model with transformers' own attention."""
    model = load_model(home / "model", dtype="fp32", device="cpu")
    model.set_attn_implementation("eager")
    return model.requires_grad_(True)


def close(ours, theirs):
    for name, parameter in theirs.items():
        scale = parameter.grad.abs().max().item()
        torch.testing.assert_close(ours[name].grad, parameter.grad, rtol=1e-4, atol=2e-6 * max(scale, 1e-3), msg=name)
