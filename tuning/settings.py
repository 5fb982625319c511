"""Settings of models and training runs: plain values that a recipe holds. Imports nothing heavy."""

from collections.abc import Mapping
from dataclasses import dataclass
from math import inf, isfinite
from typing import Literal


@dataclass(frozen=True)
class NewModel:
    """A small decoder made on the spot: tokenizer trained, weights drawn from `seed`, briefly pre-trained.

    params: target number of parameters, embeddings included ("3M", "10M"); width and depth follow from it.
    vocab: size of the byte-level BPE vocabulary. architecture: transformers' model type. context: longest sequence in
    tokens. tokens: pre-training tokens (real ones), 0 for random weights. rows: rows of the corpus that are read at
    most, an evenly spaced sample of it.
    """

    params: str = "3M"
    vocab: int = 4096
    architecture: Literal["llama", "qwen3", "mistral"] = "qwen3"
    context: int = 1024
    tokens: int = 1_000_000
    rows: int = 20_000
    learning_rate: float = 2e-3
    seed: int = 0


@dataclass(frozen=True)
class Lora:
    """Low-rank adapters on linear layers of the decoder blocks (LoRA, arXiv 2106.09685; QLoRA, arXiv 2305.14314).

    alpha/rank scales the update; with `rslora` alpha/sqrt(rank) (arXiv 2312.03732). base: how the frozen weights of all
    linear layers in the blocks are stored while training; nf4 is bitsandbytes' format, with double quantisation of the
    block constants. targets: layers that get an adapter, by the ends of their names ("q_proj", "mlp.up_proj"); none:
    all. lora_plus_ratio: B's learning rate over A's (LoRA+, arXiv 2402.12354). init: how A starts; B starts at zero.
    """

    rank: int = 16
    alpha: float = 32.0
    dropout: float = 0.0
    base: Literal["nf4", "nf4-single", "bf16", "fp32"] = "nf4"
    targets: tuple[str, ...] = ()
    rslora: bool = False
    lora_plus_ratio: float = 1.0
    init: Literal["kaiming", "gaussian"] = "kaiming"


Option = bool | int | float | str  # as a recipe reads them: the first that fits
Loss = str | Mapping[str, Mapping[str, Option]]


@dataclass(frozen=True)
class Training:
    """One training stage.

    loss: a name (`gristmill losses` lists them), a name with options ({ipo: {beta: 0.2}}), or the dotted path of a
    function of your own; None: sft, dpo or kto, as the stage is called. lora: None tunes all weights.

    capacity: tokens of one pack; packs_per_step: packs of one optimizer step over all accumulation and all processes;
    the loss is averaged over the step's target tokens (SFT), pairs, rows or lists. overlong: what to do with rows
    longer than `capacity` tokens: refuse to start, drop them, or cut the prompt's head.

    optimizer: AdamW, or Lion (arXiv 2302.06675), which wants a third to a tenth of AdamW's rate. learning_rate rises
    linearly over warmup (a share of all steps) and then follows the schedule: linear or cosine to zero, constant, or
    wsd: constant, then linear to zero over the last `decay` of all steps. max_grad_norm clips the global norm.

    dtype: of the frozen weights and the computation; auto is bf16 where the device computes it natively, else fp32;
    adapters are fp32 always. checkpointing: activation checkpointing of no layer, of all layers, or of the first so
    many; offload: keeps what it saves in the computer's memory instead of the GPU's. parallel: whether each of
    several processes holds the whole model (ddp) or a share of it (fsdp); processes: how many `gristmill` starts on
    this machine (one for each GPU), where torchrun has not started them.

    SFT only: neftune_alpha: noise on embeddings (arXiv 2310.05914); masked_thought: share of answer tokens hidden as
    inputs (arXiv 2403.02178). (Tasks that weigh the same are a loss: mft.)

    checkpoint_every: optimizer steps between checkpoints. evaluate_every: optimizer steps between measurements on the
    held-out rows (0: none); the weights that did best there are kept in `best/` beside the last ones. track: where
    metrics go besides metrics.jsonl. threads: torch's threads on a CPU (0: torch's default).
    """

    epochs: float = 1.0
    max_steps: int = 0  # 0: as the epochs say
    loss: Loss | None = None
    optimizer: Literal["adamw", "lion"] = "adamw"
    learning_rate: float = 2e-4
    warmup: float = 0.03
    schedule: Literal["linear", "cosine", "constant", "wsd"] = "linear"
    decay: float = 0.2
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    capacity: int = 1024
    packs_per_step: int = 8
    lora: Lora | None = Lora()
    overlong: Literal["refuse", "drop", "truncate_prompt"] = "refuse"
    neftune_alpha: float = 0.0
    masked_thought: float = 0.0
    dtype: Literal["auto", "fp32", "bf16"] = "auto"
    checkpointing: Literal["none", "layers"] | int = "none"
    offload: bool = False
    compile: bool = False
    parallel: Literal["ddp", "fsdp"] = "ddp"
    processes: int = 1
    evaluate_every: int = 0
    checkpoint_every: int = 50
    keep_checkpoints: int = 2
    track: tuple[Literal["tensorboard", "trackio", "wandb"], ...] = ()
    threads: int = 0
    deterministic: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        for name, low, high in _RANGES:
            value = getattr(self, name)
            if not low <= value <= high or value == inf:
                bound = f"from {low:g} to {high:g}" if high < inf else f"{low:g} or more"
                raise ValueError(f"{name} is {bound}, not {value}")
        lora = self.lora
        if lora is not None and (lora.rank < 1 or not 0 <= lora.dropout < 1 or not 0 < lora.lora_plus_ratio < inf):
            raise ValueError("lora: rank is 1 or more, dropout from 0 to below 1, lora_plus_ratio above 0")
        if lora is not None and not isfinite(lora.alpha):
            raise ValueError(f"lora: alpha is a number, not {lora.alpha}")
        if self.checkpointing not in ("none", "layers") and int(self.checkpointing) < 0:
            raise ValueError(f"checkpointing is none, layers, or how many of them, not {self.checkpointing}")
        if not self.epochs and not self.max_steps:
            raise ValueError("epochs is above 0 where max_steps does not say how many steps there are")


_RANGES: tuple[tuple[str, float, float], ...] = (
    ("warmup", 0, 1), ("decay", 0, 1), ("learning_rate", 0, inf), ("weight_decay", 0, inf), ("max_grad_norm", 0, inf),
    ("capacity", 2, inf), ("packs_per_step", 1, inf), ("neftune_alpha", 0, inf), ("masked_thought", 0, 1),
    ("evaluate_every", 0, inf), ("checkpoint_every", 1, inf), ("max_steps", 0, inf), ("epochs", 0, inf),
    ("processes", 1, inf), ("threads", 0, inf), ("keep_checkpoints", 0, inf), ("seed", 0, inf),
)  # fmt: skip
