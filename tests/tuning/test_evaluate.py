import random
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.metrics import roc_auc_score

from gristmill.curation.rows import content_id, counted_row_id, message, table
from gristmill.curation.shards import shard_table
from gristmill.tuning.chat import tokenise_completions, tokenise_pairs, tokenise_rows
from gristmill.tuning.evaluate import auc, evaluate_preference, evaluate_sft, evaluate_unpaired
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
        elif kind == "kto":
            row |= {"chosen": [message("assistant", answer[0])], "label": answer[1]}
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
    assert evaluate_sft(model, tokenizer, rows.slice(0, 0), 120) == {
        "loss": None,
        "tokens": 0,
        "rows": 0,
        "excluded": {},
    }
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


def test_a_preference_that_is_not_a_number_is_no_wrong_one(home: Path) -> None:
    """A broken model's pairs once counted as lost ones."""
    rows = rows_of("preference", [("mill stone", "sack"), ("grain", "flour wheel")])
    tokenizer, broken = load_tokenizer(home / "0"), load(home, 1)
    with torch.no_grad():
        broken.get_output_embeddings().weight.fill_(float("nan"))
    found = evaluate_preference(broken, load(home, 0), tokenizer, rows, 0.1, 200)
    assert np.isnan(found["accuracy"]) and np.isnan(found["margin"]) and found["pairs"] == 2
    answers = rows_of("kto", [("mill stone", True), ("grain", False)])
    unpaired = evaluate_unpaired(broken, load(home, 0), tokenizer, answers, 0.1, 200)
    assert all(np.isnan(unpaired[name]) for name in ("logp_desirable", "logp_auc", "reward_auc", "margin"))


@pytest.mark.parametrize("kinds", [2, 5, 1000])
def test_auc_is_that_of_scikit_learn(kinds: int) -> None:
    draw = np.random.default_rng(kinds)
    for size in (2, 3, 10, 500):
        scores, good = draw.integers(0, kinds, size).astype(float), draw.random(size) < 0.3
        good[:2] = True, False
        assert auc(scores, good) == pytest.approx(roc_auc_score(good, scores), abs=1e-12)
        assert auc(-scores, good) == pytest.approx(1 - roc_auc_score(good, scores), abs=1e-12)
    assert auc(np.ones(3), np.ones(3, bool)) is None and auc(np.ones(3), np.zeros(3, bool)) is None
    assert np.isnan(auc(np.asarray([np.nan, 1.0]), np.asarray([True, False])))
    assert auc(np.asarray([0.0, -np.inf]), np.asarray([True, False])) == 1.0


def test_single_answers_with_labels_against_naive_log_probabilities(home: Path) -> None:
    draw = random.Random(7)
    answers = [(talk(draw), draw.random() < 0.4) for _ in range(13)]
    rows = rows_of("kto", [*answers, (" ".join(WORDS * 30), True)])
    tokenizer, policy, reference = load_tokenizer(home / "0"), load(home, 1), load(home, 0)
    found = evaluate_unpaired(policy, reference, tokenizer, rows, 0.5, 160)
    documents, good = tokenise_completions(tokenizer, rows)[:-1], np.asarray([label for _, label in answers])
    ours = [alone(home, 1, document) for document in documents]
    rewards = np.asarray([0.5 * (one.sum() - alone(home, 0, d).sum()) for one, d in zip(ours, documents, strict=True)])
    for name, which in (("logp_desirable", good), ("logp_undesirable", ~good)):
        expected = np.concatenate([one for one, own in zip(ours, which, strict=True) if own]).mean()
        assert found[name] == pytest.approx(expected, rel=1e-5)
    assert found["logp_auc"] == pytest.approx(roc_auc_score(good, [one.mean() for one in ours]))
    assert found["reward_auc"] == pytest.approx(roc_auc_score(good, rewards))
    assert found["margin"] == pytest.approx(rewards[good].mean() - rewards[~good].mean(), rel=1e-4, abs=1e-6)
    assert 0 < found["reward_auc"] < 1 and found["logp_auc"] != found["reward_auc"]
    assert (found["desirable"], found["undesirable"]) == (good.sum(), (~good).sum())
    assert found["excluded"] == {"too_long": 1}
    swapped = rows.set_column(
        rows.column_names.index("label"), "label", [[not one for one in rows["label"].to_pylist()]]
    )
    other = evaluate_unpaired(policy, reference, tokenizer, swapped, 0.5, 160)
    assert other["logp_auc"] == pytest.approx(1 - found["logp_auc"]) and other["margin"] == -found["margin"]
    assert (other["logp_desirable"], other["undesirable"]) == (found["logp_undesirable"], found["desirable"])


def test_answers_of_one_label_have_a_log_probability_and_no_separation(home: Path) -> None:
    tokenizer, policy = load_tokenizer(home / "0"), load(home, 1)
    both = rows_of("kto", [("mill", True), ("stone wheel", False), ("grain", None)])
    alike = evaluate_unpaired(policy, policy, tokenizer, both, 0.1, 160)
    assert (alike["reward_auc"], alike["margin"], alike["excluded"]) == (0.5, 0.0, {"no_label": 1})
    assert "reward_auc" not in evaluate_unpaired(policy, None, tokenizer, both, 0.1, 160)
    for place, kind in ((0, "desirable"), (1, "undesirable")):
        found = evaluate_unpaired(policy, load(home, 0), tokenizer, both.slice(place, 1), 0.1, 160)
        assert (found["logp_auc"], found["reward_auc"], found["margin"]) == (None, None, None)
        assert found[kind] == 1 and found[f"logp_{kind}"] == pytest.approx(alike[f"logp_{kind}"], rel=1e-6)
        assert [found[f"logp_{name}"] for name in ("desirable", "undesirable") if name != kind] == [None]
    empty = evaluate_unpaired(policy, policy, tokenizer, both.slice(0, 0), 0.1, 160)
    assert empty["logp_desirable"] is None and empty["desirable"] == empty["undesirable"] == 0
