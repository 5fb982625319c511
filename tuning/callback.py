"""Losses by row from any Hugging Face trainer: the same table as our own runs write, for the next curation.

    trainer = SFTTrainer(model, args, train_dataset=dataset)   # a column row_id, packing and padding_free off
    RowLosses.attach(trainer, Path("run/row_losses/train.parquet"))
    trainer.train()

Where the forward gives logits, its target tokens are read there; where it fuses them away, the hidden states meet the
head once more, for target tokens alone and without gradients.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor
from transformers import TrainerCallback

from ..curation.folder import HouseError, write_parquet
from ..kernels.logprob import target_logprobs
from .attention import head, logit_form

COLUMN, FIELD, IGNORED = "row_id", "gristmill_rows", -100


class RowCollator:
    """Another collator, whose batches also say which row each of their members is."""

    def __init__(self, inner: Callable[[list[Any]], Any], row_ids: Sequence[str]) -> None:
        self.inner = inner
        self.places = {row_id: place for place, row_id in enumerate(row_ids)}

    def __call__(self, features: list[Any]) -> Any:
        places = [self.places.get(str(feature[COLUMN]), -1) if COLUMN in feature else -1 for feature in features]
        batch = self.inner([{key: value for key, value in feature.items() if key != COLUMN} for feature in features])
        if min(places, default=-1) >= 0:
            batch[FIELD] = torch.tensor(places)
        return batch


class RowLosses(TrainerCallback):
    """Keeps the mean loss and the mean probability of each row's target tokens, as its last epoch saw it, and writes
    them at each save and at the end: row_id, epoch, step, loss, tokens, mean_prob. Evaluation is not recorded.

    path: the Parquet file. row_ids: of the training set. Use `attach`, or put the instance among the callbacks, its
    `collator` around the trainer's, and the column row_id among those that the trainer keeps.
    """

    def __init__(self, path: Path, row_ids: Sequence[str]) -> None:
        self.path = Path(path)
        self.row_ids = [str(row_id) for row_id in row_ids]
        if len(set(self.row_ids)) != len(self.row_ids):
            raise HouseError(
                f"the training set names {len(self.row_ids) - len(set(self.row_ids))} rows twice by row_id"
            )
        count = len(self.row_ids)
        self.loss, self.prob = np.zeros(count), np.zeros(count)
        self.tokens, self.step, self.epoch = (np.zeros(count, np.int64) for _ in range(3))
        self._state: Any = None
        self._rows: Tensor | None = None
        self._labels: Tensor | None = None
        self._hidden: Tensor | None = None
        self._hooks: list[Any] = []

    @classmethod
    def attach(cls, trainer: Any, path: Path) -> "RowLosses":
        """Lets `trainer` (transformers' Trainer, TRL's SFTTrainer) record its rows into `path`. HouseError where its
        training set has no column row_id (packing takes it away), or its batches lose the rows (padding_free)."""
        columns = getattr(trainer.train_dataset, "column_names", None) or ()
        if COLUMN not in columns:
            raise HouseError(
                f"the training set has the columns {', '.join(columns) or 'of no table'}, but no {COLUMN}, so nothing"
                " says which row a loss is of: keep that column (a curated folder has it), and set packing=False"
            )
        if getattr(trainer.args, "padding_free", False):
            raise HouseError("padding_free lays all rows of a batch end to end: set padding_free=False to record rows")
        found = cls(path, trainer.train_dataset[COLUMN])
        trainer.data_collator = found.collator(trainer.data_collator)
        if trainer.args.remove_unused_columns:
            trainer._set_signature_columns_if_needed()
            trainer._signature_columns = [*trainer._signature_columns, COLUMN]
        trainer.add_callback(found)
        return found

    def collator(self, inner: Callable[[list[Any]], Any]) -> RowCollator:
        return RowCollator(inner, self.row_ids)

    def on_train_begin(self, args: Any, state: Any, control: Any, **more: Any) -> None:
        model = more["model"]
        base = model.get_base_model() if hasattr(model, "get_base_model") else model
        self._state, self._base = state, base
        self._hooks = [
            model.register_forward_pre_hook(self._before, with_kwargs=True),
            base.base_model.register_forward_hook(self._decoded),
            model.register_forward_hook(self._after),
        ]

    def on_save(self, args: Any, state: Any, control: Any, **more: Any) -> None:
        self.write()

    def on_train_end(self, args: Any, state: Any, control: Any, **more: Any) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks = []
        self.write()

    def _before(self, model: Any, positional: Any, named: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        rows = named.pop(FIELD, None)
        labels = named.get("labels")
        self._rows = self._labels = self._hidden = None
        if rows is not None and labels is not None and model.training:
            if len(rows) != len(labels):
                raise HouseError(f"a batch of {len(rows)} rows came as {len(labels)} sequences: set padding_free=False")
            self._rows, self._labels = rows, labels
        return positional, named

    def _decoded(self, module: Any, positional: Any, output: Any) -> None:
        if self._rows is not None:
            states = output[0] if isinstance(output, tuple) else output.last_hidden_state
            self._hidden = states.detach()

    @torch.no_grad()
    def _after(self, model: Any, positional: Any, output: Any) -> None:
        rows, labels, hidden = self._rows, self._labels, self._hidden
        self._rows = self._labels = self._hidden = None
        if rows is None or labels is None:
            return
        logits = output.get("logits") if isinstance(output, Mapping) else getattr(output, "logits", None)
        owners, places = (labels[:, 1:] != IGNORED).nonzero(as_tuple=True)
        targets = labels[owners, places + 1]
        if logits is not None and logits.shape[:2] == labels.shape:
            logps = logits.detach()[owners, places].float().log_softmax(-1).gather(1, targets[:, None])[:, 0]
        elif hidden is not None:
            form = logit_form(self._base)
            logps = target_logprobs(hidden[owners, places], head(self._base), targets, **form)
        else:
            raise HouseError(f"{type(model).__name__} gives neither logits nor hidden states: no row can be recorded")
        self._keep(rows.cpu().numpy(), owners.cpu().numpy(), logps.double().cpu().numpy())

    def _keep(self, rows: np.ndarray, owners: np.ndarray, logps: np.ndarray) -> None:
        count = np.bincount(owners, minlength=len(rows))
        seen = np.flatnonzero(count)  # a row without targets has no loss
        places, tokens = rows[seen], count[seen]
        self.loss[places] = -np.bincount(owners, logps, len(rows))[seen] / tokens
        self.prob[places] = np.bincount(owners, np.exp(logps), len(rows))[seen] / tokens
        self.tokens[places] = tokens
        self.step[places] = self._state.global_step + 1
        self.epoch[places] = int(self._state.epoch or 0) + 1

    def write(self) -> None:
        """Writes the rows seen so far, those of all processes; whole or not at all."""
        table = self._table()
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            every: list[Any] = [None] * torch.distributed.get_world_size()
            torch.distributed.all_gather_object(every, table)
            if torch.distributed.get_rank():
                return
            table = _latest(every)
        write_parquet(self.path, table)

    def _table(self) -> pa.Table:
        seen = np.flatnonzero(self.step)
        return pa.table(
            {
                "row_id": pa.array([self.row_ids[place] for place in seen], pa.string()),
                "epoch": pa.array(self.epoch[seen], pa.int32()),
                "step": pa.array(self.step[seen], pa.int32()),
                "loss": self.loss[seen],
                "tokens": self.tokens[seen],
                "mean_prob": self.prob[seen],
            }
        )


def _latest(tables: list[pa.Table]) -> pa.Table:
    """Each row once, as the latest step of any process saw it."""
    rows = pa.concat_tables(tables).sort_by([("row_id", "ascending"), ("step", "descending")])
    names = rows["row_id"].to_numpy(zero_copy_only=False)
    return rows.filter(pa.array(np.r_[True, names[1:] != names[:-1]][: len(names)]))
