"""What a run ended with, as files that others load: a PEFT adapter, merged weights, or merged NF4.

The merge happens on the base as it was trained on: an NF4 base is quantised and dequantised as training did, then the
update is added in fp32 and rounded once. Merged-into-4-bit is another model than adapter-on-4-bit, since the sum is
quantised again; the manifest says by how much. Weights are read, merged and written one by one, and a folder appears
only when its logits have been compared with those of the trained model.
"""

import hashlib
import json
import math
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, GenerationConfig

from ..curation.folder import HouseError, read_json, whole_folder, write_json
from ..kernels.nf4 import STATE, dequantise, from_tensors, quantise, to_tensors
from .agreement import compare, logits_of, probes, tolerance_of
from .chat import end_of_turn
from .digests import RECORD
from .models import load_config, load_tokenizer
from .parents import Parents, find_parents, parents_record
from .quantised import is_nf4
from .servable import check_servable
from .weight_files import SHARD_BYTES, Make, WeightFiles, write_weights

As = Literal["adapter", "merged", "nf4"]
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
MANIFEST = "manifest.json"
_COPIED = (".json", ".jinja", ".txt", ".model")  # of the base: tokenizer, chat template, licence, whatever else it says
_OWN = {"config.json", "generation_config.json", MANIFEST, RECORD}
_PREFIX = "base_model.model."
Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Update:
    """What an adapter adds to one weight: scale * B A."""

    a: Tensor
    b: Tensor
    scale: float

    def added(self, weight: Tensor) -> Tensor:
        """fp32 `weight` with the update."""
        a, b = (tensor.to(weight.device, torch.float32) for tensor in (self.a, self.b))
        return weight.float().addmm(b, a, alpha=self.scale)


def export(
    source: Path,
    to: Path,
    kind: As,
    *,
    model: Path | None = None,
    dtype: Literal["auto", "fp32", "fp16", "bf16"] = "auto",
    shard_bytes: int = SHARD_BYTES,
    device: str | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Writes what `source` ended with into the folder `to`, whole or not at all, and returns its manifest.json.

    source: a finished training run, an adapter's folder, or a model's. model: the base; None: the one that the run or
    the adapter names. kind: adapter (PEFT's files, tokenizer and chat template), merged (one model of `dtype`; auto:
    the base's own), nf4 (a merged model in bitsandbytes' 4-bit checkpoint, double quantisation). device: where weights
    are merged and logits computed; default CUDA where there is one. progress: (weights done, weights in all).

    HouseError where something is missing or does not fit, where `to` exists already, or where the logits of what was
    written differ from the trained model's by more than the tolerance of `agreement.tolerance_of`.
    """
    if kind not in get_args(As):
        raise HouseError(f"unknown kind of export {kind!r}; known: {', '.join(get_args(As))}")
    if to.exists() and (not to.is_dir() or any(to.iterdir())):
        raise HouseError(f"{to} exists already: name a new folder, so that nothing is overwritten")
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    parents = find_parents(source, model)
    with whole_folder(to) as folder:
        if kind == "adapter":
            _copy_adapter(parents, folder)
        else:
            wanted = _dtype(parents, dtype)
            _write_merged(parents, folder, kind, wanted, shard_bytes, device, progress)
        stop = _write_sides(parents, folder, kind)
        found = _check(parents, folder, kind, device)
        config = load_config(parents.base)
        lora = read_json(folder / "adapter_config.json") if kind == "adapter" else None
        manifest = {
            "kind": kind,
            "parents": parents_record(parents),
            "stop_tokens": stop,
            "check": found,
            "vllm": check_servable(config, lora),
            "files": _listed(folder),
        }
        write_json(folder / MANIFEST, manifest)
    return manifest


def read_updates(folder: Path) -> dict[str, Update]:
    """The updates of the PEFT adapter in `folder` by module name. HouseError for a kind that is more than B A."""
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        if not (folder / name).is_file():
            raise HouseError(f"{folder} holds no {name}: not a PEFT adapter, or its training did not finish")
    config = read_json(folder / "adapter_config.json")
    plain = {"peft_type": "LORA", "bias": "none", "use_dora": False, "fan_in_fan_out": False, "modules_to_save": None}
    plain |= {"layer_replication": None, "lora_bias": False, "target_parameters": None}
    if odd := [f"{key}={config[key]!r}" for key, value in plain.items() if (config.get(key) or value) != value]:
        raise HouseError(f"{folder / 'adapter_config.json'}: cannot merge an adapter with {', '.join(odd)}")
    halves: dict[str, dict[str, Tensor]] = {}
    for key, tensor in load_file(folder / "adapter_model.safetensors").items():
        name, _, letter = key.removeprefix(_PREFIX).removesuffix(".weight").rpartition(".lora_")
        halves.setdefault(name, {})[letter] = tensor
    if wrong := [name for name, half in halves.items() if set(half) != {"A", "B"}]:
        raise HouseError(f"{folder}: {wrong[0]} has no whole update (lora_A and lora_B)")
    return {name: Update(half["A"], half["B"], _scale(config, name, len(half["A"]))) for name, half in halves.items()}


def _scale(config: Mapping[str, Any], name: str, rank: int) -> float:
    patterns = (config.get("alpha_pattern") or {}).items()
    alpha = next((value for key, value in patterns if re.match(rf"(.*\.)?({key})$", name)), config["lora_alpha"])
    return float(alpha) / (math.sqrt(rank) if config.get("use_rslora") else rank)


def _dtype(parents: Parents, dtype: str) -> torch.dtype:
    if dtype != "auto":
        if dtype not in DTYPES:
            raise HouseError(f"unknown dtype {dtype!r}; known: auto, {', '.join(DTYPES)}")
        return DTYPES[dtype]
    own = parents.weights_dtype
    return own if own in DTYPES.values() else torch.bfloat16


def _write_merged(
    parents: Parents, folder: Path, kind: As, dtype: torch.dtype, shard_bytes: int, device: str, progress: Any
) -> None:
    files = WeightFiles(parents.base)
    config = load_config(parents.base)
    stored_nf4 = is_nf4(config)
    linears = _linears(config)
    updates = {} if parents.adapter is None else read_updates(parents.adapter)
    _check_fit(parents, files, linears, updates)
    names = [name for name in files.names() if not _side(name, linears)]
    if config.tie_word_embeddings:
        names = [name for name in names if name != "lm_head.weight"]
    done = 0

    def made(name: str) -> Mapping[str, Tensor]:
        nonlocal done
        done += 1
        if progress is not None:
            progress(done, len(names))
        weight, module = files.get(name), name.removesuffix(".weight")
        if module not in linears or not name.endswith(".weight"):
            return {name: weight.to(dtype) if weight.is_floating_point() else weight}
        if f"{name}.{STATE}" in files:
            own = {key: files.get(key) for key in files.names() if key == name or key.startswith(f"{name}.")}
            weight = dequantise(from_tensors(own, name), parents.dtype)
        merged = _merged(weight.to(device), updates.get(module), parents, stored_nf4).to(dtype)
        return to_tensors(quantise(merged), name) if kind == "nf4" else {name: merged}

    parts: Iterator[tuple[int, Make]] = (
        (_expected(files, name, linears, kind, dtype), partial(made, name)) for name in names
    )
    write_weights(folder, parts, shard_bytes)
    _write_config(parents.base, folder, kind, dtype)


def _merged(weight: Tensor, update: Update | None, parents: Parents, stored_nf4: bool) -> Tensor:
    """One weight as it was trained, in fp32, with the update of its adapter."""
    kept = weight.to(parents.dtype)
    if parents.stored in ("nf4", "nf4-single") and not stored_nf4:
        kept = dequantise(quantise(kept, double=parents.stored == "nf4"))
    elif parents.stored in DTYPES:
        kept = kept.to(DTYPES[parents.stored])
    return kept.float() if update is None else update.added(kept)


def _linears(config: Any) -> dict[str, tuple[int, ...]]:
    """Linear layers of the model besides its output layer, and the shapes of their weights."""
    plain = type(config).from_dict({k: v for k, v in config.to_dict().items() if k != "quantization_config"})
    with torch.device("meta"):
        model: Any = AutoModelForCausalLM.from_config(plain)  # type: ignore[no-untyped-call]
    out = model.get_output_embeddings()
    return {
        name: tuple(module.weight.shape)
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and module is not out
    }


def _check_fit(
    parents: Parents, files: WeightFiles, linears: Mapping[str, tuple[int, ...]], updates: Mapping[str, Update]
) -> None:
    absent = [name for name in linears if f"{name}.weight" not in files]
    if absent:
        raise HouseError(
            f"{parents.base}: the files hold no {absent[0]}.weight ({len(absent)} of {len(linears)} weights go by other"
            " names there): load it with transformers and save it again by save_pretrained"
        )
    wrong = [
        name
        for name, update in updates.items()
        if linears.get(name) != (update.b.shape[0], update.a.shape[1]) or update.b.shape[1] != update.a.shape[0]
    ]
    if wrong:
        raise HouseError(
            f"{parents.adapter} does not fit {parents.base}: {', '.join(wrong[:3])} ({len(wrong)} of {len(updates)});"
            " name the base that it was trained on (--model)"
        )


def _side(name: str, linears: Mapping[str, tuple[int, ...]]) -> bool:
    """Whether `name` is of the constants beside an NF4 weight."""
    head, middle, _ = name.partition(".weight.")
    return bool(middle) and head in linears


def _expected(files: WeightFiles, name: str, linears: Mapping[str, Any], kind: As, dtype: torch.dtype) -> int:
    module = name.removesuffix(".weight")
    linear = module in linears and name.endswith(".weight")
    weights = math.prod(linears[module]) if linear else math.prod(files.about(name)[0])
    return int(weights * 0.53) if linear and kind == "nf4" else weights * dtype.itemsize


def _write_config(base: Path, folder: Path, kind: As, dtype: torch.dtype) -> None:
    config = read_json(base / "config.json")
    name = str(dtype).removeprefix("torch.")
    config = {key: value for key, value in config.items() if key not in ("torch_dtype", "quantization_config")}
    config["dtype"] = name
    if kind == "nf4":
        config["quantization_config"] = {
            "quant_method": "bitsandbytes",
            "load_in_4bit": True,
            "load_in_8bit": False,
            "bnb_4bit_quant_type": "nf4",
            "bnb_4bit_use_double_quant": True,
            "bnb_4bit_compute_dtype": name,
            "bnb_4bit_quant_storage": "uint8",
            "llm_int8_skip_modules": ["lm_head"],
            "llm_int8_enable_fp32_cpu_offload": False,
            "llm_int8_has_fp16_weight": False,
            "llm_int8_threshold": 6.0,
        }
    write_json(folder / "config.json", config)


def _copy_adapter(parents: Parents, folder: Path) -> None:
    if parents.adapter is None:
        raise HouseError(f"{parents.source} tuned all weights, so there is no adapter: export it merged, or as nf4")
    read_updates(parents.adapter)
    for path in sorted(parents.adapter.iterdir()):
        if path.name in ("adapter_model.safetensors", "gristmill.json"):
            shutil.copyfile(path, folder / path.name)
    config = read_json(parents.adapter / "adapter_config.json") | {"base_model_name_or_path": str(parents.base)}
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def _write_sides(parents: Parents, folder: Path, kind: As) -> list[str]:
    """Tokenizer, chat template and generation configuration; returns the tokens at which generation stops."""
    for path in sorted(parents.base.iterdir()):
        named = path.suffix in _COPIED or path.name.upper().startswith(("LICENSE", "LICENCE", "NOTICE"))
        if path.is_file() and named and path.name not in _OWN and not path.name.endswith(".index.json"):
            shutil.copyfile(path, folder / path.name)
    tokenizer = load_tokenizer(parents.base)
    end = end_of_turn(tokenizer)
    base = parents.base / "generation_config.json"
    stated = read_json(base) if base.is_file() else {}
    known = stated.get("eos_token_id", [])
    stops = list(dict.fromkeys([end, *(known if isinstance(known, list) else [known]), tokenizer.eos_token_id]))
    stops = [stop for stop in stops if stop is not None]
    if kind != "adapter":
        config = GenerationConfig(**stated)  # type: ignore[no-untyped-call]
        config.eos_token_id = stops if len(stops) > 1 else stops[0]
        if config.pad_token_id is None:
            config.pad_token_id = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else stops[0]
        config.save_pretrained(folder)
    return [str(token) for token in tokenizer.convert_ids_to_tokens(stops)]


def _check(parents: Parents, folder: Path, kind: As, device: str) -> dict[str, Any]:
    """How far the logits of what was written lie from the trained model's. HouseError beyond the tolerance."""
    ids = probes(load_tokenizer(parents.base))
    kept = parents.dtype
    trained = logits_of(parents.base, parents.adapter, kept, device, ids)
    base, adapter = (parents.base, folder) if kind == "adapter" else (folder, None)
    found = compare(trained, logits_of(base, adapter, kept, device, ids))
    dtypes = [kept, *([] if kind == "adapter" else [WeightFiles(folder).floating_dtype()])]
    tolerance = tolerance_of(kind == "nf4", dtypes)
    if not found["difference"] <= tolerance:
        raise HouseError(
            f"the exported model is not the trained one: its logits differ by {found['difference']:.2g} of their spread"
            f" (tolerance {tolerance:g}). Nothing was written. Is {parents.base} the base that it was trained on, with"
            " the weights that it had then?"
        )
    return found | {"tolerance": tolerance, "computed_in": str(kept).removeprefix("torch.")}


def _listed(folder: Path) -> list[dict[str, Any]]:
    listed = []
    for path in sorted(folder.iterdir()):
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        listed.append({"path": path.name, "bytes": path.stat().st_size, "sha256": digest})
    return listed
