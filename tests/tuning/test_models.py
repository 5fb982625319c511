"""Making a model, loading it by transformers and by ourselves, and what is wrong with a folder said in words."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from gristmill.curation.folder import HouseError
from gristmill.tuning.attention import head, hidden_states
from gristmill.tuning.chat import tokenise_messages
from gristmill.tuning.digests import model_digest
from gristmill.tuning.models import (
    load_config,
    load_model,
    load_tokenizer,
    make_model,
    parameter_count,
    shape_for,
    torch_dtype,
    train_tokenizer,
)
from gristmill.tuning.settings import NewModel

SPEC = NewModel(params="40K", vocab=320, context=64, tokens=6000, learning_rate=5e-3)


def corpus() -> Iterator[object]:
    for number in range(60):
        yield [
            {"role": "user", "content": f"What comes after {number}?"},
            {"role": "assistant", "content": f"After {number} comes {number + 1}."},
        ]
    yield "A raw document that says what comes after what, and runs on, " * 8


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "tiny"
    make_model(folder, SPEC, corpus())
    return folder


def test_what_is_made_is_what_was_asked_for(made: Path) -> None:
    record = json.loads((made / "make_model.json").read_text())
    model = AutoModelForCausalLM.from_pretrained(made)
    assert record["params"] == sum(p.numel() for p in model.parameters())
    assert abs(record["params"] / 40_000 - 1) <= 0.15
    assert 6000 <= record["tokens"] <= 6000 + 2048
    assert record["loss"] < 4.0  # ln 320 = 5.8 before training
    assert model.config.tie_word_embeddings and model.config.model_type == "qwen3"
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert record["spec"]["params"] == "40K" and len(record["corpus"]) == 32


def test_the_tokenizer_reloads_with_template_and_distinct_ends(made: Path) -> None:
    theirs, ours = AutoTokenizer.from_pretrained(made), load_tokenizer(made)
    assert theirs.eos_token == "<|im_end|>" and theirs.pad_token == "<|endoftext|>"
    model = AutoModelForCausalLM.from_pretrained(made)
    assert model.generation_config.eos_token_id == theirs.eos_token_id
    assert model.generation_config.pad_token_id == theirs.pad_token_id
    messages = [{"role": role, "content": f"{role} ä🎉  x"} for role in ("system", "user", "assistant", "tool")]
    text = theirs.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    pieces = "".join(f"<|im_start|>{m['role']}\n{m['content']}<|im_end|>\n" for m in messages)
    assert text == pieces + "<|im_start|>assistant\n"
    assert ours.decode(ours(text)["input_ids"]) == text
    assert len(ours("assistant\n")["input_ids"]) <= 2
    with pytest.raises(HouseError, match="unknown role narrator"):
        tokenise_messages(ours, [{"role": "narrator", "content": ""}])


def test_packed_states_are_those_of_transformers(made: Path) -> None:
    ours, theirs = load_model(made), AutoModelForCausalLM.from_pretrained(made)
    tokens = torch.arange(3, 33)
    positions = torch.cat([torch.arange(10), torch.arange(20)])
    with torch.no_grad():
        logits = hidden_states(ours, tokens, positions, [10, 20]) @ head(ours).T
        apart = torch.cat([theirs(tokens[None, :10]).logits[0], theirs(tokens[None, 10:]).logits[0]])
    assert not ours.training and ours.dtype == torch.float32
    torch.testing.assert_close(logits, apart, atol=1e-5, rtol=1e-5)


def test_equal_corpus_and_spec_make_equal_weights(made: Path, tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    make_model(tmp_path / "again", SPEC, corpus(), lambda *at: seen.append(at))
    assert model_digest(tmp_path / "again") == model_digest(made)
    assert seen[-1] == (6000, 6000)


def test_the_digest_sees_every_byte_but_the_record(made: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(made, copy)
    (copy / "make_model.json").unlink()
    assert model_digest(copy) == model_digest(made)
    assert len(model_digest(copy)) == 32
    for name in ("model.safetensors", "config.json", "tokenizer.json", "chat_template.jinja"):
        raw = (copy / name).read_bytes()
        (copy / name).write_bytes(raw[:-1] + bytes([raw[-1] ^ 1]))
        assert model_digest(copy) != model_digest(made)
        (copy / name).write_bytes(raw)


SIZES = [("40K", 300), ("1M", 4096), ("3M", 4096), ("10M", 8192), ("120M", 32000)]


@pytest.mark.parametrize("architecture", ["llama", "qwen3", "mistral"])
@pytest.mark.parametrize(("params", "vocab"), SIZES)
def test_shapes_meet_the_target(architecture: str, params: str, vocab: int) -> None:
    shape = shape_for(parameter_count(params), vocab, architecture)
    config = AutoConfig.for_model(architecture, vocab_size=vocab, tie_word_embeddings=True, **shape)
    with torch.device("meta"):
        true = sum(p.numel() for p in AutoModelForCausalLM.from_config(config).parameters())
    assert abs(true / parameter_count(params) - 1) <= 0.15
    assert shape["num_attention_heads"] % shape["num_key_value_heads"] == 0


def test_random_weights_and_other_architectures(tmp_path: Path) -> None:
    for architecture in ("llama", "mistral"):
        spec = NewModel(params="40K", vocab=320, context=64, tokens=0, architecture=architecture)
        record = make_model(tmp_path / architecture, spec, corpus())
        assert record["tokens"] == 0 and record["loss"] is None
        assert load_model(tmp_path / architecture).config.model_type == architecture


def test_a_small_corpus_gives_a_small_vocabulary() -> None:
    assert 259 <= len(train_tokenizer(["aab aab"], 4096, 64)) < 300
    with pytest.raises(HouseError, match="at least 259"):
        train_tokenizer(["aab"], 100, 64)


NUMBERS = [("3M", 3_000_000), ("1.5b", 1_500_000_000), ("350K", 350_000), ("77", 77)]


@pytest.mark.parametrize(("text", "number"), NUMBERS)
def test_parameter_counts(text: str, number: int) -> None:
    assert parameter_count(text) == number


def test_impossible_models_are_refused(tmp_path: Path) -> None:
    with pytest.raises(HouseError, match="3M, 350K"):
        parameter_count("many")
    with pytest.raises(HouseError, match="ask for more params or a smaller vocab"):
        shape_for(10_000, 4096, "llama")
    with pytest.raises(HouseError, match="corpus of the new model is empty"):
        make_model(tmp_path / "none", SPEC, iter([]))
    assert not (tmp_path / "none").exists()


def test_folders_that_hold_no_model(made: Path, tmp_path: Path) -> None:
    with pytest.raises(HouseError, match=r"no model folder .*absent"):
        load_model(tmp_path / "absent")
    with pytest.raises(HouseError, match=r"no model folder .*absent"):
        load_tokenizer(tmp_path / "absent")
    (tmp_path / "bare").mkdir()
    with pytest.raises(HouseError, match=r"bare holds no config\.json"):
        load_model(tmp_path / "bare")
    shutil.copy(made / "config.json", tmp_path / "bare")
    with pytest.raises(HouseError, match=r"bare holds a config\.json but no weights"):
        load_model(tmp_path / "bare")
    (tmp_path / "bare" / "model.safetensors").write_bytes(b"torn")
    with pytest.raises(HouseError, match=r"bare/model\.safetensors is damaged or not whole"):
        load_model(tmp_path / "bare")


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ("{not json", "not a valid JSON file"),
        ('{"model_type": "no-such"}', "has model type `no-such` but Transformers does not recognize"),
        ("{}", "Unrecognized model"),
    ],
)
def test_a_configuration_that_cannot_be_read_is_refused(made: Path, tmp_path: Path, config: str, said: str) -> None:
    shutil.copytree(made, tmp_path / "odd")
    (tmp_path / "odd" / "config.json").write_text(config)
    with pytest.raises(HouseError, match=rf"odd holds no model .* config\.json: .*{said}") as error:
        load_config(tmp_path / "odd")
    assert "pip install git+" not in str(error.value)
    with pytest.raises(HouseError, match="holds no model"):
        load_model(tmp_path / "odd")


def test_a_tokenizer_without_template_or_end_is_refused(made: Path, tmp_path: Path) -> None:
    shutil.copytree(made, tmp_path / "mute")
    (tmp_path / "mute" / "chat_template.jinja").unlink()
    with pytest.raises(HouseError, match="no chat template"):
        load_tokenizer(tmp_path / "mute")
    shutil.copytree(made, tmp_path / "endless")
    path = tmp_path / "endless" / "tokenizer_config.json"
    config = json.loads(path.read_text())
    del config["eos_token"]
    path.write_text(json.dumps(config))
    with pytest.raises(HouseError, match="no EOS token"):
        load_tokenizer(tmp_path / "endless")


def test_dtypes() -> None:
    assert torch_dtype("auto", "cuda") == torch_dtype("bf16", "cpu") == torch.bfloat16
    assert torch_dtype("fp32", "cuda") == torch.float32
    with pytest.raises(HouseError, match="unknown dtype 'fp8'"):
        torch_dtype("fp8", "cpu")
