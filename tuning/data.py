"""What a training stage reads: rows as units of documents, the rows left out and why, packs, and optimizer steps.

A unit is what is packed as one: a document (SFT) or a pair's two documents, chosen then rejected (DPO). Every row of
the split is trained whole or listed in `excluded` by its id.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from ..curation.folder import HouseError, write_json, write_parquet
from ..curation.shards import read_manifest, read_split
from .chat import Tokens, tokenise_pairs, tokenise_rows
from .packing import Ints, Pack, build_pack, pack_costs, pack_plan, plan_digest, step_plan, target_tokens
from .settings import Training

Objective = Literal["sft", "dpo"]
Overlong = Literal["refuse", "drop", "truncate_prompt"]
KIND: dict[str, str] = {"sft": "sft", "dpo": "preference"}
WIDTH: dict[str, int] = {"sft": 1, "dpo": 2}  # documents of a unit

Group = list[tuple[Tokens, ...]]  # the units of one row


@dataclass(frozen=True)
class Units:
    """U units of `width` documents each, in the order of their rows; unit u is documents[u * width : (u + 1) * width].

    excluded: row_id, reason (too_long, no_target, equal_answers), tokens of the row's longest unit.
    truncated: row_id, tokens that were left, tokens that were cut from the head of each document.
    """

    width: int
    row_ids: list[str]  # (U,)
    documents: list[Tokens]  # (U * width,)
    excluded: pa.Table
    truncated: pa.Table

    @cached_property
    def lengths(self) -> Ints:
        """(U,) tokens of each unit."""
        return self._sums([len(document.ids) for document in self.documents]).astype(np.int64)

    @cached_property
    def weights(self) -> NDArray[np.float64]:
        """(U,) sum of each unit's target weights."""
        return self._sums([document.weights[1:].sum(dtype=np.float64) for document in self.documents])

    @cached_property
    def targets(self) -> Ints:
        """(U,) target tokens of each unit."""
        return self._sums([target_tokens(document) for document in self.documents]).astype(np.int64)

    def pack(self, units: Ints, pad_to: int | None = None) -> Pack:
        """These units' documents as one pack, in order."""
        return build_pack(self.documents, (units[:, None] * self.width + np.arange(self.width)).ravel(), pad_to)

    def _sums(self, of_documents: Sequence[float]) -> NDArray[np.float64]:
        sums: NDArray[np.float64] = np.asarray(of_documents, np.float64).reshape(-1, self.width).sum(1)
        return sums


@dataclass(frozen=True)
class Plan:
    """A whole training stage: packs of units, and for each optimizer step its epoch (from 0) and its packs."""

    units: Units
    packs: list[Ints]
    steps: list[tuple[int, list[int]]]
    digest: str

    def units_of(self, step: int) -> Ints:
        """The units that optimizer step `step` (from 0) trains, in order."""
        return np.concatenate([self.packs[pack] for pack in self.steps[step][1]])


def read_rows(objective: Objective, data: Path) -> pa.Table:
    """The train split of a curated folder. HouseError where its kind does not suit the objective."""
    kind = read_manifest(data)["kind"]
    if kind != KIND[objective]:
        raise HouseError(
            f"{objective} trains on data of kind {KIND[objective]!r}, but {data} is of kind {kind!r}; "
            f"name a curated set of kind {KIND[objective]!r}, or another objective"
        )
    return read_split(data)


def read_units(
    objective: Objective,
    tokenizer: PreTrainedTokenizerBase,
    rows: pa.Table,
    capacity: int,
    overlong: Overlong,
    context: int | None = None,
) -> Units:
    """Rows (columns of a curated folder) as units that fit packs of `capacity` tokens and the model's `context`.

    overlong: what becomes of a row with a unit longer than that: `refuse` raises a HouseError that names such rows,
    `drop` excludes them, `truncate_prompt` cuts the head of each document as far as that costs no target token, and
    excludes the row where it would.
    """
    groups: list[Group]
    if objective == "sft":
        groups = [[(example,) for example in examples] for examples in tokenise_rows(tokenizer, rows)]
    else:
        groups = [[pair] for pair in tokenise_pairs(tokenizer, rows)]
    limit = capacity if context is None else min(capacity, context)
    kept: list[tuple[str, tuple[Tokens, ...]]] = []
    excluded: list[tuple[str, str, int]] = []
    truncated: list[tuple[str, int, int]] = []
    for row_id, group in zip(rows["row_id"].to_pylist(), groups, strict=True):
        teaching, reason = _teaching(group)
        cuts = [_excess(unit, capacity, limit) for unit in teaching]
        if reason is None and any(cuts) and not (overlong == "truncate_prompt" and _cuttable(teaching, cuts)):
            reason = "too_long"
        if reason is not None:
            excluded.append((row_id, reason, max((_size(unit) for unit in group), default=0)))
            continue
        for unit, cut in zip(teaching, cuts, strict=True):
            if cut:
                unit = tuple(Tokens(document.ids[cut:], document.weights[cut:]) for document in unit)
                truncated.append((row_id, _size(unit), cut))
            kept.append((row_id, unit))
    if overlong == "refuse":
        _refuse([item for item in excluded if item[1] == "too_long"], capacity, context)
    return Units(
        width=WIDTH[objective],
        row_ids=[row_id for row_id, _ in kept],
        documents=[document for _, unit in kept for document in unit],
        excluded=_table(excluded, {"row_id": pa.string(), "reason": pa.string(), "tokens": pa.int64()}),
        truncated=_table(truncated, {"row_id": pa.string(), "tokens": pa.int64(), "cut": pa.int64()}),
    )


def make_plan(units: Units, settings: Training) -> Plan:
    """Packs and steps of a whole stage: a pure function of the units' lengths and the settings."""
    lengths = units.lengths
    if not len(lengths):
        reasons = counted(units.excluded)
        raise HouseError(f"no row is left to train on; excluded: {reasons or 'none, the data has no rows'}")
    packs = pack_plan(lengths, settings.capacity)
    squares = np.asarray([len(document.ids) ** 2 for document in units.documents], np.float64)
    costs = pack_costs(packs, squares.reshape(-1, units.width).sum(1))
    steps: list[tuple[int, list[int]]] = []
    an_epoch = -(-len(packs) // settings.packs_per_step)
    total = settings.max_steps or max(1, round(settings.epochs * an_epoch))
    for epoch in range(-(-total // an_epoch)):
        steps += [(epoch, packs) for packs in step_plan(costs, settings.packs_per_step, epoch, settings.seed)]
    policy = f"{settings.overlong} {settings.packs_per_step} {total}"
    return Plan(units, packs, steps[:total], plan_digest(lengths, settings.capacity, policy, settings.seed))


def summary(plan: Plan, capacity: int) -> dict[str, Any]:
    """The plan in numbers: rows, units, tokens, target tokens, packs, fill, steps, epochs, what was left out or cut."""
    lengths = plan.units.lengths
    return {
        "rows": len(set(plan.units.row_ids)),
        "units": len(lengths),
        "tokens": int(lengths.sum()),
        "target_tokens": int(plan.units.targets.sum()),
        "longest": int(lengths.max()),
        "packs": len(plan.packs),
        "fill": round(float(lengths.sum()) / (len(plan.packs) * capacity), 6),
        "steps": len(plan.steps),
        "epochs": plan.steps[-1][0] + 1,
        "excluded": counted(plan.units.excluded),
        "truncated": plan.units.truncated.num_rows,
        "digest": plan.digest,
    }


def write_plan(plan: Plan, capacity: int, out: Path) -> dict[str, Any]:
    """Writes plan.parquet (pack, row_id, tokens), steps.parquet (step, epoch, row_id), excluded.parquet,
    truncated.parquet and plan.json (the summary, returned) into `out`."""
    row_ids = pa.array(plan.units.row_ids, pa.string())
    order = np.concatenate(plan.packs)
    sizes = [len(pack) for pack in plan.packs]
    packed = {
        "pack": pa.array(np.repeat(np.arange(len(plan.packs)), sizes), pa.int32()),
        "row_id": row_ids.take(pa.array(order)),
        "tokens": pa.array(plan.units.lengths[order], pa.int32()),
    }
    write_parquet(out / "plan.parquet", pa.table(packed))
    stepped = [plan.units_of(step) for step in range(len(plan.steps))]
    counts = [len(units) for units in stepped]
    trained = {
        "step": pa.array(np.repeat(np.arange(1, len(counts) + 1), counts), pa.int32()),
        "epoch": pa.array(np.repeat([epoch + 1 for epoch, _ in plan.steps], counts), pa.int32()),
        "row_id": row_ids.take(pa.array(np.concatenate(stepped))),
    }
    write_parquet(out / "steps.parquet", pa.table(trained))
    write_parquet(out / "excluded.parquet", plan.units.excluded)
    write_parquet(out / "truncated.parquet", plan.units.truncated)
    numbers = summary(plan, capacity)
    write_json(out / "plan.json", numbers)
    return numbers


def counted(excluded: pa.Table) -> dict[str, int]:
    """Excluded rows by reason."""
    return dict(sorted(Counter(excluded["reason"].to_pylist()).items()))


def _teaching(group: Group) -> tuple[Group, str | None]:
    """The units of one row that have target tokens, and why the row is left out where that is so."""
    teaching = [unit for unit in group if all(target_tokens(document) for document in unit)]
    if not teaching:
        return [], "no_target"
    if any(len(unit) == 2 and np.array_equal(unit[0].ids, unit[1].ids) for unit in teaching):
        return teaching, "equal_answers"
    return teaching, None


def _size(unit: Sequence[Tokens]) -> int:
    return sum(len(document.ids) for document in unit)


def _excess(unit: Sequence[Tokens], capacity: int, limit: int) -> int:
    """Tokens to cut from the head of each document so that the unit fits `capacity` and each document `limit`."""
    longest = max(len(document.ids) for document in unit)
    return max(0, -((capacity - _size(unit)) // len(unit)), longest - limit)


def _cuttable(units: Group, cuts: Sequence[int]) -> bool:
    """Whether the cuts leave every target token, and a token before the first one."""
    pairs = [(document, cut) for unit, cut in zip(units, cuts, strict=True) for document in unit]
    return all(cut == 0 or not document.weights[: cut + 1].any() for document, cut in pairs)


def _refuse(too_long: list[tuple[str, str, int]], capacity: int, context: int | None) -> None:
    if too_long:
        longest = max(tokens for _, _, tokens in too_long)
        shown = ", ".join(f"{row_id} ({tokens})" for row_id, _, tokens in too_long[:5])
        bound = f"capacity of {capacity} tokens" + ("" if context is None else f" (model's context: {context})")
        raise HouseError(
            f"{len(too_long)} rows are longer than the {bound}, the longest has {longest}: {shown}"
            f"{', …' if len(too_long) > 5 else ''}. Raise capacity, curate by length, or set overlong to drop or "
            "truncate_prompt; each row so treated is listed in excluded.parquet or truncated.parquet"
        )


def _table(items: list[tuple[Any, ...]], kinds: dict[str, pa.DataType]) -> pa.Table:
    columns = zip(*items, strict=True) if items else ([] for _ in kinds)
    return pa.table({name: pa.array(list(c), kind) for (name, kind), c in zip(kinds.items(), columns, strict=True)})
