import random
from pathlib import Path

import numpy as np
import pytest
import torch

from gristmill.curation.rows import content_id, counted_row_id, message, table
from gristmill.curation.shards import shard_table
from gristmill.tuning.chat import tokenise_pairs, tokenise_rows
from gristmill.tuning.evaluate import evaluate_preference, evaluate_sft
from gristmill.tuning.models import load_model, load_tokenizer, make_model
from gristmill.tuning.settings import NewModel

WORDS = ("mill", "grist", "stone", "water", "wheel", "grain", "flour", "sack")


def talk(draw, most=12):
    return " ".join(draw.choices(WORDS, k=draw.randint(1, most)))


def rows_of(kind, answers, seed=0):
    draw = random.Random(seed)
    rows = []
    for position, answer in enumerate(answers):
        row = {"source": "made", "position": position, "messages": [message("user", talk(draw))]}
        if kind == "sft":
            row["messages"] += [message("assistant", answer)]
        else:
            row |= {"chosen": [message("assistant", answer[0])], "rejected": [message("assistant", answer[1])]}
        row["content_id"] = content_id(row)
        row["row_id"] = counted_row_id("made", row["content_id"], position)
        rows.append(row)
    return shard_table(table(rows), kind, ("role", "content"), ())


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    home = tmp_path_factory.mktemp("home")
    for seed in (0, 1):
        spec = NewModel(params="60K", vocab=300, context=256, tokens=0, seed=seed)
        make_model(home / str(seed), spec, iter([talk(random.Random(1), 400) for _ in range(20)]))
    return home


def load(home, seed):
    return load_model(home / str(seed), dtype="fp32", device="cpu")


def alone(home, seed, document):
    """Log-probabilities of one document's targets by transformers' own forward pass."""
    model = load(home, seed)
    model.set_attn_implementation("eager")
    ids = torch.from_numpy(document.ids.astype(np.int64))
    with torch.no_grad():
        logits = model(input_ids=ids[None]).logits[0]
    targets = np.flatnonzero(document.weights)
    return logits[targets - 1].log_softmax(-1).gather(1, ids[targets, None])[:, 0].numpy()


def test_sft_loss_is_the_mean_over_all_target_tokens(home: Path) -> None:
    draw = random.Random(3)
    rows = rows_of("sft", [talk(draw) for _ in range(9)])
    tokenizer, model = load_tokenizer(home / "0"), load(home, 0)
    found = evaluate_sft(model, tokenizer, rows, 160)
    expected = np.concatenate([-alone(home, 0, document) for (document,) in tokenise_rows(tokenizer, rows)])
    assert found["loss"] == pytest.approx(expected.mean(), rel=1e-5)
    assert found == {"loss": found["loss"], "tokens": len(expected), "rows": 9, "excluded": {}}
    assert evaluate_sft(model, tokenizer, rows, 200)["loss"] == pytest.approx(found["loss"], rel=1e-5)
    backwards = rows.take(list(range(8, -1, -1)))
    assert evaluate_sft(model, tokenizer, backwards, 160)["loss"] == pytest.approx(found["loss"], rel=1e-6)
    model.train()
    evaluate_sft(model, tokenizer, rows, 160)
    assert model.training


def test_what_cannot_be_scored_is_counted(home: Path) -> None:
    tokenizer, model = load_tokenizer(home / "0"), load(home, 0)
    rows = rows_of("sft", ["mill", " ".join(WORDS * 30), "stone"])
    found = evaluate_sft(model, tokenizer, rows, 120)
    assert (found["rows"], found["excluded"]) == (2, {"too_long": 1})
    none = evaluate_sft(model, tokenizer, rows.slice(1, 1), 120)
    assert none == {"loss": None, "tokens": 0, "rows": 0, "excluded": {"too_long": 1}}
    assert evaluate_sft(model, tokenizer, rows, 4000)["excluded"] == {"too_long": 1}  # beyond the model's context
    nothing = evaluate_preference(model, None, tokenizer, rows_of("preference", []), 0.1, 120)
    assert nothing == {"accuracy": None, "margin": None, "pairs": 0, "excluded": {}}


def test_preference_accuracy_and_margin_of_a_policy_against_its_reference(home: Path) -> None:
    draw = random.Random(5)
    rows = rows_of("preference", [(talk(draw), talk(draw)) for _ in range(11)] + [("mill", "mill")])
    tokenizer, policy, reference = load_tokenizer(home / "0"), load(home, 1), load(home, 0)
    found = evaluate_preference(policy, reference, tokenizer, rows, 0.5, 200)
    margins = []
    for pair in tokenise_pairs(tokenizer, rows)[:-1]:
        chosen, rejected = (alone(home, 1, document).sum() - alone(home, 0, document).sum() for document in pair)
        margins.append(0.5 * (chosen - rejected))
    assert 0 < found["accuracy"] < 1
    assert found["accuracy"] == pytest.approx(np.mean([margin > 0 for margin in margins]))
    assert found["margin"] == pytest.approx(np.mean(margins), rel=1e-4, abs=1e-6)
    assert (found["pairs"], found["excluded"]) == (11, {"equal_answers": 1})
    swapped = evaluate_preference(reference, policy, tokenizer, rows, 0.5, 200)
    assert swapped["accuracy"] == pytest.approx(1 - found["accuracy"])


def test_a_policy_against_itself_is_all_ties(home: Path) -> None:
    draw = random.Random(5)
    rows = rows_of("preference", [(talk(draw), talk(draw, 5)) for _ in range(7)])
    tokenizer, policy = load_tokenizer(home / "0"), load(home, 1)
    itself = evaluate_preference(policy, None, tokenizer, rows, 0.1, 200)
    assert itself == evaluate_preference(policy, load(home, 1), tokenizer, rows, 0.1, 200)
    assert (itself["accuracy"], itself["margin"]) == (0.5, 0.0)
