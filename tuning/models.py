"""Models in a folder: loading one, naming its bytes, and making a small one on the spot.

A made model is an ordinary Hugging Face folder (tokenizer, chat template, weights, generation config) of a mainstream
architecture, so that everything that runs on it runs on a downloaded model by one changed line. Its pre-training is
brief: enough that perplexity ranks rows and that tuning has something to tune, no more.
"""

import hashlib
import json
import math
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)
from transformers.utils import logging

from ..curation.folder import HouseError, whole_folder, write_json
from .attention import isolate
from .chat import Tokens, conversation_ids, tokenise_texts
from .digests import RECORD
from .forward import pack_logps
from .lora import load_adapter, noted_base
from .norms import fuse_norms
from .packing import build_pack, pack_plan
from .quantised import is_nf4, load_nf4
from .quantising import load_causal
from .settings import NewModel

Text = str | Sequence[Mapping[str, Any]]

PAD, START, END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
CHAT_TEMPLATE = (
    "{%- if tools %}{{- '<|im_start|>system\\nTools: ' + (tools | tojson) + '<|im_end|>\\n' }}{%- endif %}"
    "{%- for message in messages %}"
    "{%- if message.role not in ['system', 'user', 'assistant', 'tool'] %}"
    "{{- raise_exception('unknown role ' ~ message.role) }}{%- endif %}"
    "{{- '<|im_start|>' + message.role + '\\n' }}"
    "{%- if message.reasoning_content %}"
    "{{- '<think>\\n' + message.reasoning_content + '\\n</think>\\n\\n' }}{%- endif %}"
    "{{- message.content or '' }}"
    "{%- for call in message.tool_calls or [] %}"
    "{{- '<tool_call>' + ((call.function or call) | tojson) + '</tool_call>' }}{%- endfor %}"
    "{{- '<|im_end|>\\n' }}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"
)

STEP_TOKENS = 2048  # of pre-training at most; enough rows to fill two cores
STEPS = 200  # of pre-training at least, by smaller steps where few tokens are asked for
WARMUP = 0.05  # share of the steps
FLOOR = 0.1  # of the learning rate, where the cosine ends
ASPECT = 64  # width over depth that is aimed at: GPT-2's, and wide is fast on a CPU

_WEIGHTS = ("*.safetensors", "pytorch_model*.bin")


def load_model(
    folder: Path,
    *,
    dtype: str = "auto",
    device: str | None = None,
    adapter: Path | None = None,
    base: str | None = None,
) -> PreTrainedModel:
    """The causal LM in `folder`, in evaluation mode, its attention per document (`attention.isolate`), its norms fused.

    dtype: fp32, bf16, or auto: bf16 where the device computes it natively. device: default CUDA where there is one.
    adapter: folder of a LoRA adapter to attach. base: how the decoder blocks' linear layers will be stored
    (settings.Lora; None: as the adapter notes it): in NF4 they are quantised while they are read, so that the model is
    never held whole. HouseError where the folder is absent, or holds no model or one that is damaged.
    """
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    check_model(folder)
    wanted = torch_dtype(dtype, device)
    if base is None and adapter is not None:
        base = noted_base(adapter)
    config = load_config(folder)
    try:
        with no_bars():
            model: Any = (
                load_nf4(folder, config, wanted)
                if is_nf4(config)
                else load_causal(folder, config, wanted, device, base)
            )
    except HouseError:
        raise
    except torch.OutOfMemoryError as error:
        raise HouseError(
            f"{folder} does not fit the memory of {device} beside what lies there ({error}). Free it, take a smaller"
            " model, or store its base in NF4 (lora: {base: nf4}) where it is not"
        ) from error
    except Exception as error:  # transformers lets through whatever safetensors, json and its own checks raise
        raise HouseError(f"{folder} holds no model that transformers can load as a causal LM: {error}") from error
    isolate(model)
    fuse_norms(model)
    model = model.to(device)
    if adapter is not None:
        load_adapter(model, adapter)
    return cast(PreTrainedModel, model.eval())


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """The tokenizer in `folder`. HouseError where there is none, or it has no chat template, EOS token or offsets."""
    if not folder.is_dir():
        raise HouseError(f"there is no model folder {folder}")
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # as in load_model
        raise HouseError(f"{folder} holds no tokenizer that transformers can load: {error}") from error
    check_vocabulary(tokenizer, folder)
    _check_embedding(tokenizer, folder)
    for missing, what in (
        (not tokenizer.chat_template, "no chat template: put one in its chat_template.jinja"),
        (tokenizer.eos_token_id is None, "no EOS token: set eos_token in its tokenizer_config.json"),
        (not tokenizer.is_fast, "no fast tokenizer (tokenizer.json), which the loss mask needs for its offsets"),
    ):
        if missing:
            raise HouseError(f"the tokenizer in {folder} has {what}")
    return cast(PreTrainedTokenizerBase, tokenizer)


def check_vocabulary(tokenizer: Any, folder: Path) -> None:
    """HouseError where transformers made up a tokenizer of special tokens alone, for want of files: with it every text
    would be unknown words, and no error."""
    if len(tokenizer) <= len(set(tokenizer.all_special_ids)):
        raise HouseError(
            f"{folder} holds no tokenizer (tokenizer.json, or a vocabulary): put the one there that the model was"
            " trained with"
        )


def _check_embedding(tokenizer: Any, folder: Path) -> None:
    """HouseError where the tokenizer gives ids that the embedding has no row for.

    Special tokens may lie beyond it: text models of Gemma 3 share the tokenizer of those that read images, and have no
    row for the placeholder of an image (262,144). `loop.train` refuses rows that say one.
    """
    path = folder / "config.json"
    config = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    rows = config.get("vocab_size") or (config.get("text_config") or {}).get("vocab_size")
    special = {id_ for id_, token in tokenizer.added_tokens_decoder.items() if token.special}
    highest = max(id_ for id_ in tokenizer.get_vocab().values() if id_ not in special)  # ids may have gaps
    if rows and highest >= rows:
        raise HouseError(
            f"the tokenizer in {folder} has ids up to {highest}, the model's embedding {rows} rows: the last ids"
            " would read beyond it. Put the tokenizer there that the model was trained with, or give the model its rows"
            " by transformers' resize_token_embeddings and save it again"
        )


def check_model(folder: Path) -> None:
    """HouseError unless `folder` holds a configuration and weights."""
    _check_config(folder)
    if not any(True for pattern in _WEIGHTS for _ in folder.glob(pattern)):
        raise HouseError(f"{folder} holds a config.json but no weights ({' or '.join(_WEIGHTS)})")


def _check_config(folder: Path) -> None:
    if not folder.is_dir():
        raise HouseError(f"there is no model folder {folder}")
    if not (folder / "config.json").is_file():
        raise HouseError(f"{folder} holds no config.json: not a model in Hugging Face's format")


def load_config(folder: Path) -> Any:
    """The configuration of the model in `folder`. HouseError where there is none, or transformers cannot read it or
    does not know its architecture."""
    _check_config(folder)
    try:
        return AutoConfig.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # as in load_model
        said = " ".join(str(error).split("\n\n")[0].split())
        raise HouseError(f"{folder} holds no model that transformers can load; config.json: {said}") from error


def torch_dtype(name: str, device: str) -> torch.dtype:
    """fp32, bf16, or auto: bf16 on CUDA and on a CPU with bf16 instructions (AVX512-BF16, AMX), else fp32."""
    if name == "auto":
        flags = torch.cpu.get_capabilities()
        native = device.startswith("cuda") or flags.get("avx512_bf16", False) or flags.get("amx_bf16", False)
        return torch.bfloat16 if native else torch.float32
    try:
        return {"fp32": torch.float32, "bf16": torch.bfloat16}[name]
    except KeyError:
        raise HouseError(f"unknown dtype {name!r}; known: auto, fp32, bf16") from None


def make_model(
    folder: Path, spec: NewModel, texts: Iterator[Text], progress: Callable[[int, int], None] | None = None
) -> dict[str, Any]:
    """Makes the model that `spec` describes from `texts` and writes it whole into `folder`.

    texts: conversations (lists of {role, content}) or raw documents, all read into memory. progress: called with
    (tokens trained on, tokens to train on). Returns what make_model.json holds: params (the true number, within 15% of
    the target), tokens, loss (nats per token, mean of the last tenth of the steps), seconds, threads, vocab, spec,
    corpus (digest). Equal corpus, spec and thread count give equal weights. HouseError for an empty corpus or a target
    that no model of this vocabulary meets.
    """
    began = time.monotonic()
    corpus = [text for text in texts if text]
    if not corpus:
        raise HouseError("the corpus of the new model is empty: there is nothing to train a tokenizer on")
    tokenizer = train_tokenizer(corpus, spec.vocab, spec.context)
    model = _new_weights(spec, tokenizer)
    trained, loss = _pretrain(model, spec, _examples(tokenizer, corpus, spec.context), progress)
    record = {
        "params": sum(p.numel() for p in model.parameters()),
        "tokens": trained,
        "loss": loss,
        "seconds": round(time.monotonic() - began, 1),
        "threads": torch.get_num_threads(),
        "vocab": len(tokenizer),
        "spec": asdict(spec),
        "corpus": hashlib.sha256(json.dumps(corpus, ensure_ascii=False).encode()).hexdigest()[:32],
    }
    with whole_folder(folder) as temporary:
        model.set_attn_implementation("sdpa")
        with no_bars():
            model.save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)
        write_json(temporary / RECORD, record)
    return record


def train_tokenizer(corpus: Sequence[Text], vocab: int, context: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer with a ChatML template; pad and EOS differ. At most `vocab` tokens, fewer where the
    corpus is too small for so many merges. HouseError below 259, the bytes and the special tokens."""
    if vocab < 256 + 3:
        raise HouseError(f"a byte-level vocabulary has at least 259 tokens (256 bytes, 3 special), not {vocab}")
    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    inner.post_processor = processors.ByteLevel(trim_offsets=False)
    trainer = trainers.BpeTrainer(
        vocab_size=vocab,
        min_frequency=2,
        special_tokens=[PAD, START, END],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    inner.train_from_iterator(_pieces(corpus), trainer)
    tokenizer = PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=inner,
        eos_token=END,
        pad_token=PAD,
        additional_special_tokens=[START],
        model_max_length=context,
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def shape_for(params: int, vocab: int, architecture: str) -> dict[str, int]:
    """Width, depth, heads and feed-forward width (transformers' names) of the decoder with tied embeddings that comes
    nearest to `params` parameters in all, its width about ASPECT times its depth.

    HouseError where none is within 15%."""
    found: list[tuple[float, dict[str, int]]] = []
    for width in (32, *range(64, 512, 64), *range(512, 8193, 128)):
        head_dim = 32 if width < 512 else 64
        heads = width // head_dim
        shared = max(1, heads // 2)
        norms = 2 * width + (2 * head_dim if architecture == "qwen3" else 0)
        attention = 2 * width * head_dim * (heads + shared)
        for depth in range(1, 49):
            room = (params - vocab * width - width) / depth - norms - attention
            inner = min(max(round(room / (3 * width) / 32) * 32, 2 * width), 4 * width)
            total = vocab * width + width + depth * (norms + attention + 3 * width * inner)
            error = abs(total / params - 1)
            if error <= 0.15:
                cost = abs(math.log(width / depth / ASPECT)) + abs(math.log(inner / width * 3 / 8)) + 5 * error
                found.append(
                    (
                        cost,
                        {
                            "hidden_size": width,
                            "num_hidden_layers": depth,
                            "num_attention_heads": heads,
                            "num_key_value_heads": shared,
                            "head_dim": head_dim,
                            "intermediate_size": inner,
                        },
                    )
                )
    if not found:
        raise HouseError(
            f"no {architecture} model with a vocabulary of {vocab} has about {params:,} parameters "
            f"(its embeddings take {32 * vocab:,} at least); ask for more params or a smaller vocab"
        )
    return min(found, key=lambda item: item[0])[1]


def parameter_count(text: str) -> int:
    """The number that "3M", "350K", "1.5B" or "12345" says."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kmb]?)", text.strip().lower())
    if match is None or float(match[1]) == 0:
        raise HouseError(f"params {text!r} is no number of parameters; write it as 3M, 350K or 1.5B")
    return int(float(match[1]) * {"": 1, "k": 1e3, "m": 1e6, "b": 1e9}[match[2]])


def _pieces(corpus: Sequence[Text]) -> Iterator[str]:
    for text in corpus:
        if isinstance(text, str):
            yield text
        else:
            for turn in text:
                yield f"{turn['role']}\n"  # so that roles, which every conversation repeats, become single tokens
                yield turn.get("content") or ""


def _new_weights(spec: NewModel, tokenizer: PreTrainedTokenizerFast) -> PreTrainedModel:
    shape = shape_for(parameter_count(spec.params), len(tokenizer), spec.architecture)
    ids = {"bos_token_id": None, "eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    more = {"sliding_window": None} if spec.architecture == "mistral" else {}
    config = AutoConfig.for_model(
        spec.architecture,
        vocab_size=len(tokenizer),
        max_position_embeddings=spec.context,
        tie_word_embeddings=True,
        **shape,
        **ids,
        **more,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(spec.seed)
        model: Any = AutoModelForCausalLM.from_config(config, dtype=torch.float32)  # type: ignore[no-untyped-call]
    sampling = {"do_sample": True, "temperature": 0.8, "top_p": 0.95}
    model.generation_config = GenerationConfig(**ids, **sampling)  # type: ignore[no-untyped-call]
    return cast(PreTrainedModel, model)


def _examples(tokenizer: PreTrainedTokenizerFast, corpus: Sequence[Text], context: int) -> list[NDArray[np.int32]]:
    """Token ids of the corpus's documents, cut into pieces of at most `context` tokens; nothing is left out."""
    raw = [text for text in corpus if isinstance(text, str)]
    whole = [tokens.ids for tokens in tokenise_texts(tokenizer, raw)] if raw else []
    for ids in conversation_ids(tokenizer, [text for text in corpus if not isinstance(text, str)]):
        if isinstance(ids, HouseError):
            raise ids
        whole.append(ids)
    return [ids[at : at + context] for ids in whole for at in range(0, len(ids), context)]


def _pretrain(
    model: PreTrainedModel,
    spec: NewModel,
    documents: Sequence[NDArray[np.int32]],
    progress: Callable[[int, int], None] | None,
) -> tuple[int, float | None]:
    """Trains on every token of packed documents until `spec.tokens` are seen; (tokens seen, last loss)."""
    isolate(model)
    model.train()
    examples = [Tokens(ids, np.ones(len(ids), np.float32)) for ids in documents]
    plan = _steps(np.asarray([len(ids) for ids in documents], np.int64), spec)
    rate = spec.learning_rate
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    losses, seen = [], 0
    for step, chosen in enumerate(plan):
        pack = build_pack(examples, chosen)
        loss = -pack_logps(model, pack)[0].mean()
        optimizer.zero_grad(set_to_none=True)
        torch.autograd.backward(loss)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = rate * _schedule(step, len(plan))
        optimizer.step()
        losses.append(float(loss.detach()))
        seen += pack.size
        if progress is not None:
            progress(min(seen, spec.tokens), spec.tokens)
    model.train(False)
    return seen, float(np.mean(losses[-max(1, len(losses) // 10) :])) if losses else None


def _steps(lengths: NDArray[np.int64], spec: NewModel) -> list[NDArray[np.int64]]:
    """The packs of pre-training, one a step: epochs of all documents, each in its own order, up to spec.tokens."""
    usable = np.flatnonzero(lengths > 1)  # one token alone predicts nothing
    capacity = max(spec.context, min(STEP_TOKENS, spec.tokens // STEPS))
    if not spec.tokens or not len(usable):
        return []
    packs = [usable[pack] for pack in pack_plan(lengths[usable], capacity)]
    sizes = np.asarray([lengths[pack].sum() for pack in packs])
    draw = np.random.default_rng([spec.seed, 0x70726574])
    steps: list[NDArray[np.int64]] = []
    seen = 0
    while seen < spec.tokens:
        for index in draw.permutation(len(packs)).tolist():
            if seen >= spec.tokens:
                break
            steps.append(packs[index])
            seen += int(sizes[index])
    return steps


def _schedule(step: int, steps: int) -> float:
    """Linear warm-up, then a cosine down to FLOOR."""
    rise = max(1, round(WARMUP * steps))
    if step < rise:
        return (step + 1) / rise
    share = (step - rise) / max(1, steps - rise)
    return FLOOR + (1 - FLOOR) * 0.5 * (1 + math.cos(math.pi * share))


@contextmanager
def no_bars() -> Iterator[None]:
    """Without the progress bars that transformers draws over those of the run."""
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()  # type: ignore[no-untyped-call]
