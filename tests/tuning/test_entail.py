"""NLI by a cross-encoder made on the spot: label order, batches, and what is no NLI model."""

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer, BertConfig, BertForSequenceClassification, PreTrainedTokenizerFast

from gristmill.curation.folder import HouseError
from gristmill.tuning.entail import CrossEncoder, label_order
from gristmill.tuning.models import train_tokenizer

NAMES = {0: "ENTAILMENT", 1: "neutral", 2: "Contradiction"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("entail") / "model"
    tokenizer = train_tokenizer(["the cat sat on the mat, the dog did not"] * 9, 300, 48)
    config = BertConfig(
        vocab_size=len(tokenizer), hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32,
        max_position_embeddings=48, type_vocab_size=2, id2label=NAMES, label2id={v: k for k, v in NAMES.items()},
        pad_token_id=0, initializer_range=0.5,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        BertForSequenceClassification(config).save_pretrained(made)
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer.backend_tokenizer, pad_token="<|endoftext|>", model_max_length=48
    ).save_pretrained(made)
    return made


PAIRS = [("the cat sat", "the dog did not"), ("a", "b"), ("the mat " * 40, "cat"), ("", "x"), ("cat", "the mat " * 9)]


def test_probabilities_are_the_models_own_in_our_order(folder: Path) -> None:
    found = CrossEncoder(folder, dtype="fp32").probabilities(PAIRS)
    model, tokenizer = BertForSequenceClassification.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    for pair, told in zip(PAIRS, found, strict=True):
        inputs = tokenizer(*pair, truncation="longest_first", max_length=48, return_tensors="pt")
        with torch.no_grad():
            entailment, neutral, contradiction = model(**inputs).logits[0].softmax(-1).tolist()
        assert told.tolist() == pytest.approx([contradiction, entailment, neutral], abs=1e-5)
    assert found.dtype == np.float32 and np.ptp(found[:, 0]) > 0.01


def test_pairs_do_not_depend_on_their_batch(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nli = CrossEncoder(folder, dtype="fp32")
    whole = nli.probabilities(PAIRS)
    seen: list[tuple[int, int]] = []
    monkeypatch.setattr("gristmill.tuning.entail.BATCH", 2)
    assert np.allclose(nli.probabilities(PAIRS[::-1], lambda *at: seen.append(at)), whole[::-1], atol=1e-6)
    assert seen == [(2, 5), (4, 5), (5, 5)]
    assert nli.probabilities([]).shape == (0, 3)


def test_what_is_no_nli_model_is_refused(folder: Path, tmp_path: Path) -> None:
    for names in ({0: "LABEL_0", 1: "LABEL_1", 2: "LABEL_2"}, {0: "entailment", 1: "not_entailment"}):
        with pytest.raises(HouseError, match="contradiction, entailment and neutral"):
            label_order(names, tmp_path)
    assert label_order(NAMES, folder) == [2, 0, 1]
    with pytest.raises(HouseError, match="no model folder"):
        CrossEncoder(tmp_path / "none")
