"""Exports: files that PEFT, transformers and bitsandbytes load, equal to what was trained; whole or not at all."""

import hashlib
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

from gristmill.curation.folder import HouseError
from gristmill.kernels.nf4 import dequantise, from_tensors, naive_dequantise, quantise
from gristmill.tuning import export as exporting
from gristmill.tuning.agreement import compare, probes
from gristmill.tuning.export import export, read_updates
from gristmill.tuning.lora import add_lora, save_adapter, trainable
from gristmill.tuning.models import CHAT_TEMPLATE, load_model, load_tokenizer, train_tokenizer
from gristmill.tuning.quantised import NF4Linear
from gristmill.tuning.settings import Lora
from gristmill.tuning.weight_files import WeightFiles

IDS = torch.randint(3, 280, (2, 17), generator=torch.Generator().manual_seed(1))
TALK = ["Grind the grain of the mill by the river. " * 30]


def make_base(folder: Path, kind: str = "llama", dtype: torch.dtype = torch.float32, **more: Any) -> Path:
    torch.manual_seed(0)
    tokenizer = train_tokenizer(TALK, 300, 128)
    # rows of whole NF4 blocks: bitsandbytes 0.50.2 on a CPU dequantises others (96) wrongly
    shape: dict[str, Any] = {
        "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 16, "vocab_size": len(tokenizer), "max_position_embeddings": 128,
        "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 0, "tie_word_embeddings": False, "initializer_range": 0.1,
    }  # fmt: skip
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **shape | more)).to(dtype)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (folder / "README.md").write_text("---\nlicense: mit\n---\n# A base\n")
    return folder


def make_adapter(base: Path, folder: Path, settings: Lora, dtype: str = "fp32", scale: float = 0.1) -> Path:
    model = load_model(base, dtype=dtype, device="cpu")
    add_lora(model, settings, seed=5)
    draw = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in trainable(model).values():
            parameter.add_(torch.randn(parameter.shape, generator=draw) * scale)
    save_adapter(model, folder, settings, str(base))
    return folder


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        found: Tensor = model.eval()(IDS, use_cache=False).logits.float()
    return found


def trained(base: Path, adapter: Path, dtype: str = "fp32") -> Tensor:
    model = load_model(base, dtype=dtype, device="cpu", adapter=adapter)
    model.set_attn_implementation("eager")
    return logits(model)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_base(tmp_path_factory.mktemp("export") / "base")


@pytest.mark.parametrize("stored", ["nf4", "nf4-single", "bf16", "fp32"])
def test_merged_is_the_model_that_was_trained(stored: Any, base: Path, tmp_path: Path) -> None:
    """Trap 14: the merge is on the base as it was trained on, which for NF4 is not the base."""
    adapter = make_adapter(base, tmp_path / "adapter", Lora(rank=4, base=stored))
    manifest = export(adapter, tmp_path / "merged", "merged", device="cpu")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert merged.dtype == torch.float32
    torch.testing.assert_close(logits(merged), trained(base, adapter), rtol=1e-4, atol=1e-4)
    assert manifest["check"]["difference"] < manifest["check"]["tolerance"] == 1e-3
    plain = AutoModelForCausalLM.from_pretrained(base)
    theirs = PeftModel.from_pretrained(plain, str(adapter)).merge_and_unload()  # on the base as it is
    apart = (logits(theirs) - logits(merged)).abs().max()
    assert apart < 1e-4 if stored == "fp32" else apart > 1e-3


@pytest.mark.parametrize("kind", ["qwen2", "phi3"])
def test_biases_and_fused_layers_come_through(kind: str, tmp_path: Path) -> None:
    base = make_base(tmp_path / "base", kind, torch.bfloat16)
    adapter = make_adapter(base, tmp_path / "adapter", Lora(rank=4), dtype="bf16")
    manifest = export(adapter, tmp_path / "merged", "merged", device="cpu")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert merged.dtype == torch.bfloat16 and manifest["check"]["computed_in"] == "bfloat16"
    before, after = WeightFiles(base), WeightFiles(tmp_path / "merged")
    assert sorted(before.names()) == sorted(after.names())
    updated = {f"{name}.weight" for name in read_updates(adapter)}
    for name in before.names():
        assert torch.equal(before.get(name), after.get(name)) == (name not in updated), name


def test_merged_nf4_is_bitsandbytes_own(base: Path, tmp_path: Path) -> None:
    adapter = make_adapter(base, tmp_path / "adapter", Lora(rank=4))
    manifest = export(adapter, tmp_path / "nf4", "nf4", device="cpu", dtype="bf16")
    export(adapter, tmp_path / "merged", "merged", device="cpu", dtype="bf16")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "nf4", dtype=torch.float32)
    assert type(theirs.model.layers[0].mlp.up_proj).__name__ == "Linear4bit"
    assert theirs.config.quantization_config.bnb_4bit_use_double_quant
    ours = load_model(tmp_path / "nf4", dtype="fp32", device="cpu")
    ours.set_attn_implementation("eager")
    assert isinstance(ours.model.layers[0].mlp.up_proj, NF4Linear)
    merged = WeightFiles(tmp_path / "merged")
    expected = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    for name, module in expected.model.layers.named_modules():
        if isinstance(module, nn.Linear):
            q = quantise(merged.get(f"model.layers.{name}.weight"))
            assert torch.equal(ours.get_submodule(f"model.layers.{name}").nf4.packed, q.packed)
            module.weight.data = dequantise(q, torch.float32)
    torch.testing.assert_close(logits(ours), logits(expected), rtol=1e-4, atol=1e-4)
    assert compare([logits(expected)[0]], [logits(theirs)[0]])["difference"] < 0.02  # it computes in bf16
    assert 0.005 < manifest["check"]["difference"] < manifest["check"]["tolerance"] == 0.6
    assert manifest["check"]["kl"] > 0


def test_merged_into_four_bits_is_not_the_adapter_on_four_bits(base: Path, tmp_path: Path) -> None:
    """Trap 14 again: what the manifest calls `difference` is there, and the bf16 merge does not have it."""
    adapter = make_adapter(base, tmp_path / "adapter", Lora(rank=4))
    nf4 = export(adapter, tmp_path / "nf4", "nf4", device="cpu")["check"]["difference"]
    merged = export(adapter, tmp_path / "merged", "merged", device="cpu", dtype="bf16")["check"]["difference"]
    assert merged < 0.03 < 0.1 < nf4


def test_a_checkpoint_of_bitsandbytes_loads_in_ours(base: Path, tmp_path: Path) -> None:
    how = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
    theirs = AutoModelForCausalLM.from_pretrained(base, quantization_config=how, dtype=torch.float32)
    theirs.save_pretrained(tmp_path / "theirs")
    AutoTokenizer.from_pretrained(base).save_pretrained(tmp_path / "theirs")
    ours = load_model(tmp_path / "theirs", dtype="fp32", device="cpu")
    ours.set_attn_implementation("eager")
    torch.testing.assert_close(logits(ours), logits(theirs), rtol=1e-3, atol=1e-3)
    adapter = make_adapter(tmp_path / "theirs", tmp_path / "adapter", Lora(rank=4))
    check = export(adapter, tmp_path / "merged", "merged", device="cpu", dtype="fp32")["check"]
    assert check["difference"] < check["tolerance"]
    torch.testing.assert_close(
        logits(AutoModelForCausalLM.from_pretrained(tmp_path / "merged")),
        trained(tmp_path / "theirs", adapter),
        rtol=1e-4,
        atol=1e-4,
    )


def test_the_adapter_goes_with_tokenizer_template_and_its_base_s_name(base: Path, tmp_path: Path) -> None:
    adapter = make_adapter(base, tmp_path / "adapter", Lora(rank=4, base="fp32"))
    manifest = export(adapter, tmp_path / "out", "adapter", device="cpu")
    assert manifest["check"]["difference"] == 0 and manifest["vllm"] == []
    theirs = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), str(tmp_path / "out"))
    torch.testing.assert_close(logits(theirs), trained(base, adapter), rtol=1e-4, atol=1e-4)
    assert AutoTokenizer.from_pretrained(tmp_path / "out").chat_template == CHAT_TEMPLATE
    assert json.loads((tmp_path / "out/adapter_config.json").read_text())["base_model_name_or_path"] == str(base)


def test_tokenizer_template_and_stop_tokens_go_with_the_weights(base: Path, tmp_path: Path) -> None:
    """The base's generation configuration knows <|endoftext|> alone; the template ends a turn with <|im_end|>."""
    adapter = make_adapter(base, tmp_path / "adapter", Lora(rank=4))
    manifest = export(adapter, tmp_path / "out", "merged", device="cpu")
    tokenizer = load_tokenizer(tmp_path / "out")
    assert manifest["stop_tokens"][0] == "<|im_end|>"
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    stops = model.generation_config.eos_token_id
    assert tokenizer.convert_tokens_to_ids("<|im_end|>") in stops and 0 in stops
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        assert (tmp_path / "out" / name).read_bytes() == (base / name).read_bytes()


def test_the_manifest_names_parents_licences_and_files(base: Path, tmp_path: Path) -> None:
    run, data = tmp_path / "run", tmp_path / "data"
    make_adapter(base, run / "adapter", Lora(rank=4))
    data.mkdir()
    (data / "manifest.json").write_text(json.dumps({"sources": [{"name": "talk", "licence": "CC-BY-4.0"}]}))
    digest = exporting.parents_record(exporting.find_parents(run / "adapter", base))["base"]["digest"]
    record = {"status": "complete", "result": "adapter", "model": str(base), "model_digest": digest, "dtype": "fp32"}
    (run / "run.json").write_text(json.dumps(record | {"data": str(data), "data_digest": "d", "objective": "sft"}))
    manifest = export(run, tmp_path / "out", "merged", device="cpu")
    assert manifest == json.loads((tmp_path / "out/manifest.json").read_text())
    parents = manifest["parents"]
    assert parents["base"] == {"path": str(base), "digest": digest, "licence": "mit"}
    assert parents["adapter"]["base_stored_as"] == "nf4" and parents["run"]["data_digest"] == "d"
    assert parents["data"]["licences"] == {"talk": "CC-BY-4.0"}
    for file in manifest["files"]:
        content = (tmp_path / "out" / file["path"]).read_bytes()
        assert hashlib.sha256(content).hexdigest() == file["sha256"] and len(content) == file["bytes"]
    assert {"model.safetensors", "config.json", "generation_config.json", "tokenizer.json"} <= {
        file["path"] for file in manifest["files"]
    }
    (run / "run.json").write_text(json.dumps(record | {"status": "running", "objective": "sft"}))
    with pytest.raises(HouseError, match="not finished"):
        export(run, tmp_path / "again", "merged", device="cpu")
    (run.parent / "run.json").write_text('{"recipe": "r"}')
    with pytest.raises(HouseError, match=f"holds a whole run: name one of its training stages, .*{run.name}"):
        exporting.find_parents(run.parent, None)
    (run.parent / "run.json").unlink()
    (run / "run.json").write_text(json.dumps(record | {"model_digest": "other"}))
    with pytest.raises(HouseError, match=r"is not the model that .* was trained on"):
        export(run, tmp_path / "again", "merged", device="cpu")


@pytest.mark.parametrize("kind", ["merged", "nf4"])
def test_shards_hold_what_one_file_does(kind: Any, base: Path, tmp_path: Path) -> None:
    adapter = make_adapter(base, tmp_path / "adapter", Lora(rank=4))
    export(adapter, tmp_path / "one", kind, device="cpu")
    export(adapter, tmp_path / "many", kind, device="cpu", shard_bytes=30_000)
    files = sorted((tmp_path / "many").glob("*.safetensors"))
    assert len(files) > 3 and max(file.stat().st_size for file in files) < 100_000
    index = json.loads((tmp_path / "many/model.safetensors.index.json").read_text())
    one, many = WeightFiles(tmp_path / "one"), WeightFiles(tmp_path / "many")
    assert set(index["weight_map"]) == set(one.names()) == set(many.names())
    assert all(torch.equal(one.get(name), many.get(name)) for name in one.names())
    assert index["metadata"]["total_size"] == sum(one.get(name).nbytes for name in one.names())
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "many", dtype=torch.float32)
    torch.testing.assert_close(
        logits(loaded), logits(AutoModelForCausalLM.from_pretrained(tmp_path / "one", dtype=torch.float32))
    )


def test_tied_embeddings_and_old_weight_files(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base", "qwen3", tie_word_embeddings=True)
    adapter = make_adapter(base, tmp_path / "adapter", Lora(rank=4))
    model = AutoModelForCausalLM.from_pretrained(base)
    (base / "model.safetensors").unlink()
    torch.save(model.state_dict(), base / "pytorch_model.bin")
    export(adapter, tmp_path / "out", "merged", device="cpu")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert merged.lm_head.weight is merged.model.embed_tokens.weight
    torch.testing.assert_close(logits(merged), trained(base, adapter), rtol=1e-4, atol=1e-4)


def test_a_whole_tuned_model_is_exported_without_a_base(base: Path, tmp_path: Path) -> None:
    export(base, tmp_path / "half", "merged", device="cpu", dtype="fp16")
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "half").dtype == torch.float16
    with pytest.raises(HouseError, match="there is no adapter: export it merged, or as nf4"):
        export(base, tmp_path / "no", "adapter", device="cpu")
    with pytest.raises(HouseError, match="leave out --model"):
        export(base, tmp_path / "no", "merged", model=tmp_path, device="cpu")


def _swapped(q: Any) -> Any:
    return replace(q, packed=((q.packed << 4) | (q.packed >> 4)))


MUTATIONS = {
    "swapped nibbles": ("nf4", "quantise", lambda real: lambda *a, **k: _swapped(real(*a, **k))),
    "no offset": ("nf4", "quantise", lambda real: lambda *a, **k: replace(q := real(*a, **k), offset=q.offset * 0)),
    "update forgotten": ("merged", "read_updates", lambda real: lambda folder: {}),
    "scale forgotten": (
        "merged",
        "read_updates",
        lambda real: lambda folder: {n: replace(u, scale=1.0) for n, u in real(folder).items()},
    ),
    "base not as trained": ("merged", "dequantise", lambda real: lambda q: exporting_weight[0]),
}
exporting_weight: list[Tensor] = []


@pytest.mark.parametrize("name", MUTATIONS)
def test_the_check_catches_a_wrong_export_and_nothing_is_left(
    name: str, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kind, target, broken = MUTATIONS[name]
    adapter = make_adapter(base, tmp_path / "adapter", Lora(rank=4, alpha=32.0))
    if name == "base not as trained":
        real = exporting.quantise

        def remembered(weight: Tensor, **how: Any) -> Any:
            exporting_weight[:] = [weight]
            return real(weight, **how)

        monkeypatch.setattr(exporting, "quantise", remembered)
    monkeypatch.setattr(exporting, target, broken(getattr(exporting, target)))
    with pytest.raises(HouseError, match="the exported model is not the trained one"):
        export(adapter, tmp_path / "out", kind, device="cpu")  # type: ignore[arg-type]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter"]


def test_what_does_not_fit_is_named(base: Path, tmp_path: Path) -> None:
    adapter = make_adapter(base, tmp_path / "adapter", Lora(rank=4))
    other = make_base(tmp_path / "other", intermediate_size=192)
    with pytest.raises(HouseError, match=r"does not fit .*other: .*_proj"):
        export(adapter, tmp_path / "out", "merged", model=other, device="cpu")
    with pytest.raises(HouseError, match="exists already"):
        export(adapter, adapter, "merged", device="cpu")
    with pytest.raises(HouseError, match=r"no finished run .*no adapter .*no model"):
        export(tmp_path, tmp_path / "out", "merged", device="cpu")
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps(config | {"use_dora": True}))
    with pytest.raises(HouseError, match="cannot merge an adapter with use_dora=True"):
        export(adapter, tmp_path / "out", "merged", device="cpu")


def test_probes_are_the_same_every_time_and_within_the_vocabulary(base: Path) -> None:
    tokenizer = load_tokenizer(base)
    one, two = probes(tokenizer), probes(tokenizer)
    assert len(one) == 3 and all(torch.equal(a, b) for a, b in zip(one, two, strict=True))
    assert max(int(row.max()) for row in one) < len(tokenizer)


def test_an_nf4_weight_reads_by_the_definition(base: Path, tmp_path: Path) -> None:
    export(base, tmp_path / "out", "nf4", device="cpu")
    files = WeightFiles(tmp_path / "out")
    name = "model.layers.1.mlp.down_proj.weight"
    own = {key: files.get(key) for key in files.names() if key.startswith(name)}
    weight = WeightFiles(base).get(name)
    assert torch.equal(naive_dequantise(from_tensors(own, name)), dequantise(quantise(weight)))
