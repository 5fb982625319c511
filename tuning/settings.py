"""Settings of models and training runs: plain values that a recipe holds. Imports nothing heavy."""

from dataclasses import dataclass
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


@dataclass(frozen=True)
class Training:
    """One training stage.

    lora: None tunes all weights. capacity: tokens of one pack; packs_per_step: packs of one optimizer step over all
    accumulation; the loss is averaged over the step's target tokens (SFT) or pairs (DPO). learning_rate rises linearly
    over warmup (a share of all steps) and falls linearly to zero. max_grad_norm clips the global norm. overlong: what
    to do with rows longer than `capacity` tokens: refuse to start, drop them, or cut the prompt's head. beta: DPO's
    temperature (arXiv 2305.18290). dtype: of the computation; auto is bf16 where the device computes it natively, else
    fp32. checkpoint_every: optimizer steps between checkpoints. threads: torch's threads on a CPU (0: torch's default).
    """

    epochs: float = 1.0
    max_steps: int = 0  # 0: as the epochs say
    learning_rate: float = 2e-4
    warmup: float = 0.03
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    capacity: int = 1024
    packs_per_step: int = 8
    lora: Lora | None = Lora()
    overlong: Literal["refuse", "drop", "truncate_prompt"] = "refuse"
    beta: float = 0.1
    dtype: Literal["auto", "fp32", "bf16"] = "auto"
    checkpoint_every: int = 50
    keep_checkpoints: int = 2
    threads: int = 0
    deterministic: bool = False
    seed: int = 0
