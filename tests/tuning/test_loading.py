"""Models quantised while they are read against the same models loaded whole and quantised then: every bit."""

import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, conversion_mapping
from transformers.core_model_loading import Chunk, WeightConverter

from gristmill.curation.folder import HouseError
from gristmill.kernels.nf4 import quantise
from gristmill.tuning import quantising
from gristmill.tuning.attention import head, hidden_states, isolate
from gristmill.tuning.lora import add_lora, load_adapter, save_adapter
from gristmill.tuning.models import load_model
from gristmill.tuning.norms import fuse_norms
from gristmill.tuning.quantised import NF4Linear
from gristmill.tuning.settings import Lora

FAMILIES = ("llama", "qwen2", "qwen3", "mistral", "gemma2", "gemma3_text", "phi3", "glm", "olmo2", "cohere")
TOKENS = torch.randint(3, 120, (24,), generator=torch.Generator().manual_seed(1))
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def make(folder: Path, kind: str = "llama", dtype: str = "fp32", tied: bool = False, base: bool = False) -> Path:
    """A tiny checkpoint in several files, of odd sizes. base: of the model without its output layer."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        kind, hidden_size=36, intermediate_size=50, num_hidden_layers=2, num_attention_heads=3, num_key_value_heads=1,
        head_dim=12, vocab_size=120, pad_token_id=0, bos_token_id=1, eos_token_id=2, tie_word_embeddings=tied,
        attention_bias=kind in ("llama", "glm"), initializer_range=0.3,
    )  # fmt: skip
    door: Any = AutoModel if base else AutoModelForCausalLM
    model = door.from_config(config, dtype=DTYPES[dtype])
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_()
    model.save_pretrained(folder, max_shard_size="12kB")
    assert len([*folder.glob("*.safetensors")]) > 2
    return folder


def whole(folder: Path, dtype: str, settings: Lora) -> Any:
    """The model loaded whole, its linear layers quantised one after another then."""
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=DTYPES[dtype])
    isolate(model)
    fuse_norms(model)
    add_lora(model, settings, 3)
    return model.eval()


def read(folder: Path, dtype: str, settings: Lora) -> Any:
    model: Any = load_model(folder, dtype=dtype, device="cpu", base=settings.base)
    add_lora(model, settings, 3)
    return model.eval()


def state(model: Any) -> dict[str, Tensor]:
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


def assert_equal(ours: Any, theirs: Any) -> None:
    """Names, dtypes, bits and learning of every parameter and buffer; training flags; configuration; logits."""
    mine, other = state(ours), state(theirs)
    assert mine.keys() == other.keys()
    for name, tensor in mine.items():
        assert tensor.dtype == other[name].dtype and tensor.requires_grad == other[name].requires_grad, name
        assert torch.equal(tensor, other[name]), name
    modes = [{name: (type(one), one.training) for name, one in model.named_modules()} for model in (ours, theirs)]
    assert modes[0] == modes[1]
    assert ours.config.to_dict() == theirs.config.to_dict() and ours.dtype == theirs.dtype
    assert ours.generation_config == theirs.generation_config and ours.name_or_path == theirs.name_or_path
    told = [hidden_states(model, TOKENS, torch.arange(24), [24]) @ head(model).T for model in (ours, theirs)]
    assert torch.equal(*told) and told[0].isfinite().all() and told[0].std() > 0


@pytest.mark.parametrize("kind", FAMILIES)
def test_a_family_read_layer_by_layer_is_the_one_loaded_whole(kind: str, tmp_path: Path) -> None:
    for stored, dtype, tied in (("bf16", "bf16", False), ("fp32", "bf16", True), ("bf16", "fp32", True)):
        folder = make(tmp_path / f"{stored}{dtype}", kind, stored, tied)
        ours = read(folder, dtype, Lora(rank=2, base="nf4"))
        assert_equal(ours, whole(folder, dtype, Lora(rank=2, base="nf4")))
        embedding = ours.get_input_embeddings().weight
        assert (head(ours) is embedding) is tied and embedding.dtype == DTYPES[dtype]


@pytest.mark.parametrize("base", ["nf4-single", "bf16", "fp32"])
def test_every_way_to_store_the_base(base: Any, tmp_path: Path) -> None:
    folder, settings = make(tmp_path / "model"), Lora(rank=2, base=base, targets=("q_proj", "v_proj"))
    assert_equal(read(folder, "fp32", settings), whole(folder, "fp32", settings))


def test_no_more_than_one_weight_waits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each linear weight is gone before the next one is read."""
    folder = make(tmp_path / "model")
    alive: list[weakref.ref[Tensor]] = []
    order: list[str] = []

    def quantised(weight: Tensor, **how: Any) -> Any:
        assert not any(one() is not None for one in alive)
        alive.append(weakref.ref(weight))
        return quantise(weight, **how)

    def stored(one: quantising.Stored, where: Any) -> Tensor:
        order.append(one.name)
        return real(one, where)

    real = quantising.Stored.__getitem__
    monkeypatch.setattr(quantising, "quantise", quantised)
    monkeypatch.setattr(quantising.Stored, "__getitem__", stored)
    model: Any = load_model(folder, dtype="bf16", device="cpu", base="nf4")
    layers = [module for module in model.modules() if isinstance(module, NF4Linear)]
    assert len(layers) == len(alive) == 14 and sorted(order) == sorted(quantising.stored_tensors(folder))
    assert not hasattr(model.config, "quantization_config") and "weight" not in dict(layers[0].named_parameters())


def test_an_adapter_that_notes_nf4_is_put_on_a_model_read_so(tmp_path: Path) -> None:
    folder, settings = make(tmp_path / "model"), Lora(rank=2, base="nf4")
    trained = whole(folder, "fp32", settings)
    with torch.no_grad():
        for name, parameter in trained.named_parameters():
            if name.endswith(".B"):
                parameter.normal_()
    save_adapter(trained, tmp_path / "adapter", settings, str(folder))
    theirs: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    isolate(theirs)
    fuse_norms(theirs)
    load_adapter(theirs, tmp_path / "adapter")
    assert_equal(load_model(folder, dtype="fp32", device="cpu", adapter=tmp_path / "adapter"), theirs.eval())


def test_keys_that_transformers_renames(tmp_path: Path) -> None:
    """A checkpoint of the model without its output layer: `layers.0…` becomes `model.layers.0…`."""
    folder, settings = make(tmp_path / "model", tied=True, base=True), Lora(rank=2, base="nf4")
    assert "layers.0.mlp.up_proj.weight" in quantising.stored_tensors(folder)
    assert_equal(read(folder, "bf16", settings), whole(folder, "bf16", settings))


def test_weights_that_transformers_splits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One stored matrix of gate and up, as some checkpoints have: each half is quantised on its own."""
    folder, settings = make(tmp_path / "model"), Lora(rank=2, base="nf4")
    plain = whole(folder, "bf16", settings)
    tensors = {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}
    for layer in range(2):
        halves = [tensors.pop(f"model.layers.{layer}.mlp.{half}_proj.weight") for half in ("gate", "up")]
        tensors[f"model.layers.{layer}.mlp.both.weight"] = torch.cat(halves)
    for path in folder.glob("model*"):
        path.unlink()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    split = WeightConverter(["mlp.both"], ["mlp.gate_proj", "mlp.up_proj"], [Chunk(dim=0)])
    found = conversion_mapping.get_checkpoint_conversion_mapping
    monkeypatch.setattr(
        conversion_mapping,
        "get_checkpoint_conversion_mapping",
        lambda kind: [split] if kind == "llama" else found(kind),
    )
    assert_equal(read(folder, "bf16", settings), plain)


def test_torchs_own_files(tmp_path: Path) -> None:
    folder, settings = make(tmp_path / "model"), Lora(rank=2, base="nf4")
    plain = whole(folder, "bf16", settings)
    tensors = {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}
    for path in folder.glob("model*"):
        path.unlink()
    torch.save(tensors, folder / "pytorch_model.bin")
    assert_equal(read(folder, "bf16", settings), plain)


@pytest.mark.parametrize("base", ["nf4", None])
def test_damaged_files_are_named(base: str | None, tmp_path: Path) -> None:
    folder = make(tmp_path / "model")
    _, second, *_ = sorted(folder.glob("*.safetensors"))
    kept = second.read_bytes()
    second.write_bytes(kept[:-100])
    with pytest.raises(HouseError, match=rf"{second.name} is damaged or not whole: get this file again"):
        load_model(folder, device="cpu", base=base)
    second.unlink()
    with pytest.raises(HouseError, match=rf"names {second.name}, which is not there"):
        load_model(folder, device="cpu", base=base)
    second.write_bytes(kept)
    name = "model.layers.0.mlp.up_proj.weight"
    path = quantising.stored_tensors(folder)[name].path
    tensors = {key: tensor for key, tensor in load_file(path).items() if key != name}
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(HouseError, match=rf"lacks the weights {name} \(1 in all\)"):
        load_model(folder, device="cpu", base=base)


def test_a_file_that_goes_while_it_is_read(tmp_path: Path) -> None:
    stored = quantising.stored_tensors(make(tmp_path / "model"))
    one = stored["model.norm.weight"]
    assert one[...].shape == (36,)
    one.path.unlink()
    with pytest.raises(HouseError, match=f"{one.path.name} is damaged"):
        one[...]


@pytest.mark.parametrize("name", ["model.layers.1.mlp.up_proj.weight", "model.embed_tokens.weight"])
def test_weights_of_another_model_and_such_as_are_no_numbers(name: str, tmp_path: Path) -> None:
    folder = make(tmp_path / "model", dtype="bf16")
    path = quantising.stored_tensors(folder)[name].path
    tensors = load_file(path)
    save_file(tensors | {name: tensors[name][:-2].clone()}, path, metadata={"format": "pt"})
    with pytest.raises(HouseError, match=rf"{name} has shape \(\d+, 36\), config.json asks for \(\d+, 36\)"):
        load_model(folder, dtype="bf16", device="cpu", base="nf4")
    if "proj" in name:
        tensors[name][3, 5] = torch.nan
        save_file(tensors, path, metadata={"format": "pt"})
        with pytest.raises(HouseError, match=rf"{folder}: {name}: cannot quantise .* holds inf or NaN"):
            load_model(folder, dtype="bf16", device="cpu", base="nf4")


def test_what_cannot_be_trained_is_refused_before_anything_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = make(tmp_path / "model")
    config = (folder / "config.json").read_text()
    (folder / "config.json").write_text(config.replace('"attention_dropout": 0.0', '"attention_dropout": 0.1'))
    monkeypatch.setattr(quantising.Stored, "__getitem__", None)
    with pytest.raises(HouseError, match=r"attention_dropout 0\.1; set it to 0"):
        load_model(folder, device="cpu", base="nf4")


def test_a_device_that_is_too_small_is_told_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(weight: Tensor, **how: Any) -> Any:
        raise torch.OutOfMemoryError("tried to allocate 2 GiB")

    monkeypatch.setattr(quantising, "quantise", full)
    with pytest.raises(HouseError, match=r"does not fit the memory of cpu .* 2 GiB\). Free it"):
        load_model(make(tmp_path / "model"), device="cpu", base="nf4")
