"""Real trainers of Hugging Face write their rows' losses: equal to transformers' own forward, by row_id."""

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments
from trl import SFTConfig, SFTTrainer

from gristmill.curation.folder import HouseError
from gristmill.curation.measures.score_file import ScoreFile
from gristmill.tuning.callback import RowLosses, _latest
from gristmill.tuning.models import load_tokenizer, make_model
from gristmill.tuning.settings import NewModel

WORDS = "mill grist stone water wheel grain flour sack river sluice bread".split()  # noqa: SIM905
IDS = [f"{number:032x}" for number in range(6)]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("callback") / "model"
    make_model(folder, NewModel(params="40K", vocab=300, context=128, tokens=0), iter([" ".join(WORDS) * 30]))
    return folder


def features() -> list[dict[str, Any]]:
    draw = np.random.default_rng(0)
    made = []
    for row_id in IDS:
        ids = draw.integers(3, 250, draw.integers(6, 14)).tolist()
        made.append({"row_id": row_id, "input_ids": ids, "labels": [-100] * 3 + ids[3:]})
    made[4]["labels"] = [-100] * len(made[4]["labels"])  # nothing to learn: no loss, and no NaN
    return made


def padded(rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    longest = max(len(row["input_ids"]) for row in rows)
    fill = {"input_ids": 0, "labels": -100}
    return {k: torch.tensor([row[k] + [v] * (longest - len(row[k])) for row in rows]) for k, v in fill.items()} | {
        "attention_mask": torch.tensor(
            [[1] * len(row["input_ids"]) + [0] * (longest - len(row["input_ids"])) for row in rows]
        )
    }


def alone(model: Any, ids: list[int], labels: list[int]) -> np.ndarray:
    with torch.no_grad():
        logps = model(torch.tensor([ids])).logits[0].log_softmax(-1)
    return np.asarray([float(logps[t - 1, label]) for t, label in enumerate(labels) if t and label != -100])


def args(kind: Any, out: Path, **more: Any) -> Any:
    how = {"per_device_train_batch_size": 2, "num_train_epochs": 2, "learning_rate": 0.0, "report_to": []}
    return kind(str(out), use_cpu=True, save_strategy="no", disable_tqdm=True, **how | more)


def test_the_trainer_of_transformers(home: Path, tmp_path: Path) -> None:
    model, path = AutoModelForCausalLM.from_pretrained(home), tmp_path / "row_losses/train.parquet"
    data = Dataset.from_list(features())
    how = args(TrainingArguments, tmp_path, gradient_accumulation_steps=2)
    trainer = Trainer(model, how, data_collator=padded, train_dataset=data, eval_dataset=data)
    RowLosses.attach(trainer, path)
    trainer.train()
    trainer.evaluate()
    found = {row["row_id"]: row for row in pq.read_table(path).to_pylist()}
    assert set(found) == set(IDS) - {IDS[4]}
    for row in features():
        if row["row_id"] in found:
            logps = alone(model.eval(), row["input_ids"], row["labels"])
            own = found[row["row_id"]]
            assert own["tokens"] == len(logps) and own["epoch"] == 2 and 3 <= own["step"] <= 4
            assert own["loss"] == pytest.approx(-logps.mean(), rel=1e-4)
            assert own["mean_prob"] == pytest.approx(np.exp(logps).mean(), rel=1e-4)
    rows = pa.table({"row_id": IDS})
    measured = ScoreFile(str(tmp_path)).measure(rows, None, lambda done, total: None)  # type: ignore[arg-type]
    assert measured["loss"].to_pylist() == [found[row_id]["loss"] if row_id in found else None for row_id in IDS]


@pytest.mark.parametrize("adapter", [None, LoraConfig(r=2, target_modules=["q_proj"])], ids=["whole", "lora"])
def test_trl_s_sft_trainer_whose_logits_are_fused_away(adapter: Any, home: Path, tmp_path: Path) -> None:
    model, path = AutoModelForCausalLM.from_pretrained(home), tmp_path / "train.parquet"
    rows = [{"row_id": row_id, "text": " ".join(WORDS[number:] * 2)} for number, row_id in enumerate(IDS)]
    trainer = SFTTrainer(
        model,
        args(SFTConfig, tmp_path, max_length=64, num_train_epochs=1),
        train_dataset=Dataset.from_list(rows),
        processing_class=load_tokenizer(home),
        peft_config=adapter,
    )
    tokens = {row["row_id"]: row["input_ids"] for row in trainer.train_dataset}
    RowLosses.attach(trainer, path)
    trainer.train()
    found = {row["row_id"]: row for row in pq.read_table(path).to_pylist()}
    assert set(found) == set(IDS)
    for row_id, ids in tokens.items():
        logps = alone(trainer.model.eval(), ids, ids)
        assert found[row_id]["tokens"] == len(logps) == len(ids) - 1
        assert found[row_id]["loss"] == pytest.approx(-logps.mean(), rel=1e-3)


def test_what_hides_the_rows_is_refused(home: Path, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(home)
    rows = [{key: value for key, value in row.items() if key != "row_id"} for row in features()]
    trainer = Trainer(model, args(TrainingArguments, tmp_path), train_dataset=Dataset.from_list(rows))
    with pytest.raises(HouseError, match=r"has the columns input_ids, labels, but no row_id.*packing=False"):
        RowLosses.attach(trainer, tmp_path / "train.parquet")
    with pytest.raises(HouseError, match="names 1 rows twice"):
        RowLosses(tmp_path / "train.parquet", ["a", "a", "b"])


def test_of_several_processes_the_latest_counts() -> None:
    first = pa.table({"row_id": ["a", "b"], "step": [1, 5], "loss": [1.0, 2.0]})
    second = pa.table({"row_id": ["b", "a", "c"], "step": [2, 4, 3], "loss": [3.0, 4.0, 5.0]})
    assert _latest([first, second]).to_pydict() == {
        "row_id": ["a", "b", "c"],
        "step": [4, 5, 3],
        "loss": [4.0, 2.0, 5.0],
    }
    assert _latest([first.slice(0, 0)]).num_rows == 0
