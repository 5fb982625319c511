"""Packed scores against transformers' own logits, one row at a time, and their independence of the other rows."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from transformers import AutoModelForCausalLM

from gristmill.curation.rows import message, table
from gristmill.tuning import score
from gristmill.tuning.models import load_model, load_tokenizer, make_model
from gristmill.tuning.score import PackedScorer
from gristmill.tuning.settings import NewModel


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("score") / "model"
    corpus = [
        [{"role": "user", "content": f"say {n}"}, {"role": "assistant", "content": f"{n} it is"}] for n in range(99)
    ]
    make_model(made, NewModel(params="40K", vocab=300, context=160, tokens=2000), iter(corpus))
    return made


@pytest.fixture(scope="module")
def scorer(folder: Path) -> PackedScorer:
    return PackedScorer(folder)


def row(position: int, **fields: Any) -> dict[str, Any]:
    return {"row_id": str(position), "content_id": "c", "source": "s", "position": position, **fields}


def rows() -> pa.Table:
    ask, end = message("user", "say 4"), message("user", "and?")
    some: list[dict[str, Any]] = [
        {"messages": [ask, message("assistant", "4 it is"), end, message("assistant", "5" * n), end]} for n in range(20)
    ]
    some.append({"messages": [ask], "chosen": [message("assistant", "good")], "rejected": [message("assistant", "x")]})
    some += [{"messages": [ask]}, {"text": "raw"}, {"messages": [ask, message("assistant", "long " * 60)]}]
    some.append({"messages": [message("narrator", "?"), message("assistant", "no such role")]})
    return table(row(position, **fields) for position, fields in enumerate(some))


Scores = tuple[int, float, float, float, int]


def expected(folder: Path, messages: list[dict[str, str]], alone: bool = False) -> Scores:
    """By transformers: the whole conversation's logits, read at the last turn; `alone`: that turn is the whole."""
    tokenizer, model = load_tokenizer(folder), AutoModelForCausalLM.from_pretrained(folder)
    prompt = tokenizer.apply_chat_template(messages[:-1], add_generation_prompt=True, return_dict=False)
    whole = tokenizer.apply_chat_template(messages, return_dict=False)
    whole = whole[: len(whole) - whole[::-1].index(tokenizer.eos_token_id)]
    if alone:
        opening = tokenizer("<|im_start|>assistant\n", add_special_tokens=False)["input_ids"]
        whole, prompt = opening + whole[len(prompt) :], opening
    with torch.no_grad():
        logps = model(torch.tensor([whole])).logits[0].double().log_softmax(-1)
    told = [logps[at - 1, whole[at]].item() for at in range(len(prompt), len(whole))]
    return len(told), -sum(told), sum(map(math.exp, told)) / len(told), math.exp(min(told)), len(prompt)


def test_scores_are_those_of_transformers(folder: Path, scorer: PackedScorer) -> None:
    got = scorer.response_scores(rows()).to_pylist()
    both = scorer.response_scores(rows(), alone=True).to_pylist()
    turns = [("user", "say 4"), ("assistant", "4 it is"), ("user", "and?"), ("assistant", "5" * 7)]
    chosen = [("user", "say 4"), ("assistant", "good")]
    for at, pairs in ((7, turns), (20, chosen)):
        messages = [{"role": role, "content": content} for role, content in pairs]
        assert tuple(got[at].values()) == pytest.approx(expected(folder, messages), rel=1e-5)
        assert both[at].pop("alone_nll") == pytest.approx(expected(folder, messages, alone=True)[1], rel=1e-5)
        assert both[at] == got[at]


def test_what_cannot_be_scored_is_null(scorer: PackedScorer) -> None:
    for alone, schema in ((False, score.SCORES), (True, score.SCORES.append(score.ALONE))):
        got = scorer.response_scores(rows(), alone=alone)
        assert got.schema == schema
        for column in got.columns:
            assert np.flatnonzero(column.is_null().to_numpy()).tolist() == [21, 22, 23, 24]
    nothing = scorer.response_scores(rows().slice(21, 4), alone=True)
    assert nothing.num_rows == 4 and nothing["nll"].null_count == 4
    assert scorer.response_scores(rows().slice(0, 0)).num_rows == 0


def test_scores_do_not_depend_on_the_other_rows(scorer: PackedScorer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(score, "CAPACITY", 256)
    whole = scorer.response_scores(rows())
    order = np.random.default_rng(0).permutation(rows().num_rows)
    assert scorer.response_scores(rows().take(order)).equals(whole.take(order))
    alone = [scorer.response_scores(rows().slice(at, 1)) for at in range(0, 21, 4)]
    assert pa.concat_tables(alone).equals(whole.take(list(range(0, 21, 4))))
    both = scorer.response_scores(rows(), alone=True)
    assert both.drop_columns(["alone_nll"]).equals(whole)
    monkeypatch.setattr(score, "BATCH_ROWS", 3)
    assert scorer.response_scores(rows()).combine_chunks().equals(whole)
    assert scorer.response_scores(rows().take(order), alone=True).combine_chunks().equals(both.take(order))


def test_a_longer_response_has_a_pack_of_its_own() -> None:
    plan = score._plan([10, 5000, 4096, 9000, 20])
    assert sorted((sorted(places), capacity) for places, capacity in plan) == [
        ([0, 4], 4096), ([1], 8192), ([2], 4096), ([3], 16384)
    ]  # fmt: skip


def test_progress_ends_at_all_rows(scorer: PackedScorer) -> None:
    seen: list[tuple[int, int]] = []
    scorer.response_scores(rows(), lambda *at: seen.append(at))
    assert seen[-1] == (25, 25) and [done for done, _ in seen] == sorted(done for done, _ in seen)


def test_the_digest_names_model_and_adapter(folder: Path, scorer: PackedScorer, tmp_path: Path) -> None:
    from gristmill.tuning.lora import add_lora, save_adapter
    from gristmill.tuning.settings import Lora

    model, settings = load_model(folder), Lora(rank=2, base="fp32")
    add_lora(model, settings, seed=0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(".B"):
                parameter.add_(0.05)
    save_adapter(model, tmp_path / "adapter", settings, str(folder))
    tuned = PackedScorer(folder, tmp_path / "adapter")
    assert tuned.digest.startswith(scorer.digest) and tuned.digest != scorer.digest
    before, after = (one.response_scores(rows().slice(0, 3))["nll"].to_numpy() for one in (scorer, tuned))
    assert np.abs(after - before).min() > 1e-3
