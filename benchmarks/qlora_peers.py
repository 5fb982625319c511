"""The contenders of qlora.py on a CPU: TRL + PEFT + bitsandbytes, and a bare torch loop with PEFT + bitsandbytes."""

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig


def work(who: str, objective: str, folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    rows = json.loads((folder / f"{objective}.json").read_text())
    times, counts = (bare if who == "bare" else trl)(who, objective, folder, rows, options)
    warm = min(options.warm, len(times) - 1)
    seconds, tokens = sum(times[warm:]), sum(counts[warm:])
    return {
        "tokens_per_s": round(tokens / seconds, 1), "tokens": tokens, "seconds": round(seconds, 2), "steps": len(times)
    }  # fmt: skip


def quantised(folder: Path, dtype: torch.dtype) -> Any:
    config = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype
    )
    return AutoModelForCausalLM.from_pretrained(folder / "model", quantization_config=config, dtype=dtype)


def adapters() -> LoraConfig:
    return LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")


def dtype_of(options: argparse.Namespace) -> torch.dtype:
    return torch.float32 if options.dtype == "fp32" else torch.bfloat16


def trl(
    who: str, objective: str, folder: Path, rows: list[dict[str, Any]], options: argparse.Namespace
) -> tuple[list[float], list[int]]:
    from transformers import TrainerCallback
    from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

    times: list[float] = []
    counts: list[int] = []

    class Clock(TrainerCallback):  # type: ignore[misc]
        def on_step_begin(self, *_: Any, **__: Any) -> None:
            counts.append(0)
            self.began = time.perf_counter()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            times.append(time.perf_counter() - self.began)

    base = SFTTrainer if objective == "sft" else DPOTrainer

    class Counted(base):  # type: ignore[misc, valid-type]
        def training_step(self, model: Any, inputs: Any, *rest: Any, **named: Any) -> Any:
            mask = inputs.get("attention_mask")
            counts[-1] += int(inputs["input_ids"].numel() if mask is None else mask.sum())
            return super().training_step(model, inputs, *rest, **named)

    packed = who == "trl-packed"
    same = {
        "output_dir": tempfile.mkdtemp(), "num_train_epochs": 1, "learning_rate": 2e-4, "report_to": "none",
        "save_strategy": "no", "use_cpu": True, "bf16": options.dtype == "bf16", "max_length": options.capacity,
        "disable_tqdm": True, "logging_steps": 1000, "dataloader_pin_memory": False,
    }  # fmt: skip
    if packed:
        same["gradient_checkpointing"] = False
    model, tokenizer = quantised(folder, dtype_of(options)), AutoTokenizer.from_pretrained(folder / "model")
    if objective == "sft":
        batch = options.packs_per_step if packed else options.batch
        settings = SFTConfig(**same, packing=packed, per_device_train_batch_size=batch)
        data = [{"input_ids": row["ids"][0], "labels": row["labels"][0]} for row in rows]
    else:
        settings = DPOConfig(**same, per_device_train_batch_size=options.batch)
        data = [{key: row[key] for key in ("prompt", "chosen", "rejected")} for row in rows]
    trainer = Counted(
        model=model, args=settings, train_dataset=Dataset.from_list(data), processing_class=tokenizer,
        peft_config=adapters(), callbacks=[Clock()],
    )  # fmt: skip
    trainer.train()
    return times, counts


def bare(
    who: str, objective: str, folder: Path, rows: list[dict[str, Any]], options: argparse.Namespace
) -> tuple[list[float], list[int]]:
    model = prepare_model_for_kbit_training(quantised(folder, dtype_of(options)), use_gradient_checkpointing=False)
    model = get_peft_model(model, adapters())
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-4)
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(0)).tolist()
    times, counts = [], []
    for start in range(0, len(rows), options.batch):
        batch = [rows[index] for index in order[start : start + options.batch]]
        began = time.perf_counter()
        # all chosen, then all rejected
        documents = [side for place in range(len(batch[0]["ids"])) for side in _sides(batch, place)]
        ids, labels, mask = padded(documents)
        if objective == "sft":
            loss = model(input_ids=ids, attention_mask=mask, labels=labels, use_cache=False).loss
        else:
            loss = preference(model, ids, labels, mask)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        times.append(time.perf_counter() - began)
        counts.append(sum(row["tokens"] for row in batch))
    return times, counts


def _sides(batch: list[dict[str, Any]], place: int) -> list[tuple[list[int], list[int]]]:
    return [(row["ids"][place], row["labels"][place]) for row in batch]


def padded(documents: list[tuple[list[int], list[int]]]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    longest = max(len(ids) for ids, _ in documents)
    ids = torch.tensor([one + [0] * (longest - len(one)) for one, _ in documents])
    labels = torch.tensor([one + [-100] * (longest - len(one)) for _, one in documents])
    mask = torch.tensor([[1] * len(one) + [0] * (longest - len(one)) for one, _ in documents])
    return ids, labels, mask


def preference(model: Any, ids: torch.Tensor, labels: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    def answers() -> torch.Tensor:
        logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits[:, :-1].float()
        wanted = labels[:, 1:]
        logps = torch.gather(logits.log_softmax(-1), 2, wanted.clamp(min=0)[..., None])[..., 0]
        return (logps * (wanted != -100)).sum(1)

    with torch.no_grad(), model.disable_adapter():
        reference = answers()
    chosen, rejected = (answers() - reference).chunk(2)
    return -F.logsigmoid(0.1 * (chosen - rejected)).mean()
