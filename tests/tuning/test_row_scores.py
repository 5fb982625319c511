"""Scores by row equal transformers' own log-probabilities of the same tokens, and say why where there are none."""

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from transformers import AutoModelForCausalLM

from gristmill.curation.rows import ROW, content_id, counted_row_id, message, table
from gristmill.tuning.chat import tokenise_messages, tokenise_pair, tokenise_texts
from gristmill.tuning.models import load_tokenizer, make_model
from gristmill.tuning.row_scores import ROW_SCORES, row_scores, schema_of
from gristmill.tuning.score import PackedScorer
from gristmill.tuning.settings import NewModel

TALK = "Grind the grain of the mill by the river. "


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("scores") / "model"
    make_model(folder, NewModel(params="40K", vocab=300, context=128, tokens=0), iter([TALK * 20]))
    return folder


def row(**content: Any) -> dict[str, Any]:
    made = dict.fromkeys(ROW.names) | {"source": "a", "position": 0} | content
    made["content_id"] = content_id(made)
    return made | {"row_id": counted_row_id("a", made["content_id"], 0)}


ASK = message("user", "Why?")
CHAT = [ASK, message("assistant", "The mill grinds."), message("user", "And?"), message("assistant", "Bread.")]
SPANS = [{"field": "messages", "turn": 3, "start": 0, "end": 6, "weight": 0.5}]
ROWS = [
    row(messages=CHAT),
    row(messages=CHAT, spans=SPANS),
    row(messages=[ASK], chosen=[message("assistant", "Grain.")], rejected=[message("assistant", "The river.")]),
    row(messages=[ASK], chosen=[message("assistant", "Grain.")], label=True),
    row(text=TALK),
    row(messages=[ASK]),
    row(messages=[message("narrator", "?"), message("assistant", "No.")]),
    row(messages=[message("user", TALK * 20), message("assistant", "Too long.")]),
]


def scored(home: Path, **how: Any) -> list[dict[str, Any]]:
    return pa.concat_tables(row_scores(PackedScorer(home, dtype="fp32", device="cpu"), table(ROWS), **how)).to_pylist()


def test_scores_are_those_of_transformers(home: Path) -> None:
    model, tokenizer = AutoModelForCausalLM.from_pretrained(home).eval(), load_tokenizer(home)
    turns = [{"role": turn["role"], "content": turn["content"]} for turn in CHAT]
    ask, chosen, rejected = turns[:1], [{"role": "assistant", "content": "Grain."}], ROWS[2]["rejected"]
    pair = tokenise_pair(tokenizer, ask, chosen, [{"role": "assistant", "content": rejected[0]["content"]}])
    expected = [
        tokenise_messages(tokenizer, turns)[0],
        tokenise_messages(tokenizer, turns, spans=SPANS)[0],
        pair[0],
        pair[0],
        tokenise_texts(tokenizer, [TALK])[0],
    ]
    found = scored(home, per_token=True)
    for own, tokens in zip(found, expected, strict=False):
        logps, weights = alone(model, tokens)
        assert own["problem"] is None and own["tokens"] == len(logps)
        assert own["loss"] == pytest.approx(-(weights @ logps) / weights.sum(), rel=1e-4)
        assert own["perplexity"] == pytest.approx(np.exp(own["loss"]))
        assert own["logp"] == pytest.approx(weights @ logps, rel=1e-4)
        assert own["mean_prob"] == pytest.approx(np.exp(logps).mean(), rel=1e-4)
        assert own["min_prob"] == pytest.approx(np.exp(logps).min(), rel=1e-4)
        assert own["token_ids"] == tokens.ids[tokens.weights != 0].tolist()
        np.testing.assert_allclose(own["token_logps"], logps, rtol=1e-4, atol=1e-4)
    assert found[0]["loss"] != found[1]["loss"]
    logps, _ = alone(model, pair[1])
    assert found[2]["rejected_tokens"] == len(logps)
    assert found[2]["rejected_logp"] == pytest.approx(logps.sum(), rel=1e-4)


def alone(model: Any, tokens: Any) -> tuple[np.ndarray, np.ndarray]:
    ids = torch.from_numpy(tokens.ids.astype(np.int64))
    with torch.no_grad():
        logits = model(ids[None], use_cache=False).logits[0]
    places = np.flatnonzero(tokens.weights)
    logps = logits[places - 1].log_softmax(-1).gather(1, ids[places, None])[:, 0]
    return logps.double().numpy(), tokens.weights[places].astype(np.float64)


def test_a_row_that_cannot_be_scored_says_why_and_harms_no_other(home: Path) -> None:
    found = scored(home)
    assert [item["row_id"] for item in found] == [row["row_id"] for row in ROWS]
    assert "token_ids" not in found[0] and set(found[0]) == set(ROW_SCORES.names)
    problems = [item["problem"] for item in found[5:]]
    assert problems[0] == "no assistant turn" and "unknown role narrator" in problems[1]
    assert "more than the model's context of 128" in problems[2]
    assert all(item["loss"] is None and item["tokens"] is None for item in found[5:])


def test_log_probabilities_that_are_no_numbers_are_a_problem_and_no_score(home: Path) -> None:
    scorer = PackedScorer(home)
    real = scorer.target_logps

    def odd(documents, told):
        for place, logps in enumerate(real(documents, told)):
            yield logps * np.nan if place == 0 else logps

    scorer.target_logps = odd
    (made,) = row_scores(scorer, table([ROWS[0], ROWS[4]]))
    first, second = made.to_pylist()
    assert first["problem"].startswith("its log-probabilities are no numbers") and first["loss"] is None
    assert second["problem"] is None and np.isfinite(second["loss"])


def test_no_rows_and_progress(home: Path) -> None:
    scorer = PackedScorer(home, dtype="fp32", device="cpu")
    assert list(row_scores(scorer, table([]))) == []
    seen: list[tuple[int, int]] = []
    (found,) = row_scores(scorer, table(ROWS[:3]), progress=lambda done, total: seen.append((done, total)))
    assert found.schema == schema_of(False) and seen[-1] == (3, 3)
    seen.clear()
    list(
        row_scores(scorer, table([row(messages=[message("user", "a question")])]), progress=lambda *at: seen.append(at))
    )
    assert seen == [(1, 1)]  # a batch without anything to score is done too
