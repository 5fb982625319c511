"""What a training stage reads: rows as units of documents, the rows left out and why, packs, and optimizer steps.

Every row of the split is trained whole or listed in `excluded` by its id.
"""

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from ..curation.folder import HouseError, write_json, write_parquet
from ..curation.shards import read_manifest, read_split
from .chat import Tokens, tokenise_completions, tokenise_pairs, tokenise_rows
from .packing import Ints, pack_costs, pack_plan, plan_digest, shared_tokens, step_plan, target_tokens, tree_size
from .settings import Training
from .units import Family as Family
from .units import Units as Units
from .units import kl_units as kl_units

Objective = Literal["sft", "dpo", "kto"]
Overlong = Literal["refuse", "drop", "truncate_prompt"]
KIND: dict[str, str] = {"tokens": "sft", "pairs": "preference", "lists": "preference", "unpaired": "kto"}
FAMILY: dict[str, Family] = {"sft": "tokens", "dpo": "pairs", "kto": "unpaired"}  # where the loss says no other
REWARDS = ("score_chosen", "score_rejected")  # columns of a preference set that say more than which is better

Group = list[tuple[Tokens, ...]]  # the units of one row


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


@dataclass(frozen=True)
class _Found:
    """Units of one row, or one list of several: the rows' places in their table, and what the answers are worth."""

    rows: tuple[int, ...]
    units: Group
    rewards: tuple[float, ...] = ()


def read_rows(objective: Objective | Family, data: Path, split: str = "train") -> pa.Table:
    """A split of a curated folder. HouseError where its kind does not suit the objective."""
    kind, wanted = read_manifest(data)["kind"], KIND[_family(objective)]
    if kind != wanted:
        raise HouseError(
            f"{objective} trains on data of kind {wanted!r}, but {data} is of kind {kind!r}; "
            f"name a curated set of kind {wanted!r}, or another objective"
        )
    return read_split(data, split)


def read_units(
    objective: Objective | Family,
    tokenizer: PreTrainedTokenizerBase,
    rows: pa.Table,
    capacity: int,
    overlong: Overlong,
    context: int | None = None,
    *,
    shared: bool = True,
) -> Units:
    """Rows (columns of a curated folder) as units that fit packs of `capacity` tokens and the model's `context`.

    objective: what a loss is a loss of (Family), or sft, dpo, kto for the usual one. tokens: a unit for each example of
    a row of kind sft (several where the chat template rewrites earlier turns). pairs: chosen and rejected. unpaired:
    the completion of a row of kind kto, with its label. lists: the distinct answers of all preference rows of one
    prompt (and tools). A list's answer is worth the mean of what its rows say of it: the columns score_chosen and
    score_rejected (or those numbers in a column `meta`) where all of the list's rows have them, else 1 where it is
    chosen and 0 where it is rejected; an answer that rows weight differently gets their mean weights.

    overlong: what becomes of a row with a unit longer than that: `refuse` raises a HouseError that names such rows,
    `drop` excludes them, `truncate_prompt` cuts the head of each document as far as that costs no target token, and
    excludes the row where it would. Units' lengths count what their documents share once, unless `shared` is False.
    """
    family = _family(objective)
    found, excluded = _found(_groups(family, tokenizer, rows), rows, family)
    if family == "lists":
        found, more = _lists(found, rows)
        excluded += more
    limit = capacity if context is None else min(capacity, context)
    kept: list[tuple[_Found, tuple[Tokens, ...]]] = []
    truncated: list[tuple[int, int, int]] = []
    for item in found:
        cuts = [_excess(unit, capacity, limit, shared) for unit in item.units]
        if any(cuts) and not (overlong == "truncate_prompt" and _cuttable(item.units, cuts)):
            size = max(_size(unit, shared) for unit in item.units)
            excluded += [(row, "too_long", size) for row in item.rows]
            continue
        for unit, cut in zip(item.units, cuts, strict=True):
            if cut:
                unit = tuple(Tokens(document.ids[cut:], document.weights[cut:]) for document in unit)
                truncated += [(row, _size(unit, shared), cut) for row in item.rows]
            kept.append((item, unit))
    row_ids = rows["row_id"].to_pylist()
    left_out = [(row_ids[row], reason, tokens) for row, reason, tokens in sorted(excluded, key=lambda item: item[0])]
    if overlong == "refuse":
        _refuse([item for item in left_out if item[1] == "too_long"], capacity, context)
    cut_rows = [(row_ids[row], tokens, cut) for row, tokens, cut in truncated]
    units = Units(
        row_ids=[row_ids[item.rows[0]] for item, _ in kept],
        documents=[document for _, unit in kept for document in unit],
        first=np.cumsum([0, *(len(unit) for _, unit in kept)]),
        excluded=_table(left_out, {"row_id": pa.string(), "reason": pa.string(), "tokens": pa.int64()}),
        truncated=_table(cut_rows, {"row_id": pa.string(), "tokens": pa.int64(), "cut": pa.int64()}),
        shared=shared,
    )
    return _annotated(units, [item for item, _ in kept], rows, family)


def _family(objective: Objective | Family) -> Family:
    return FAMILY.get(objective) or cast(Family, objective)


def make_plan(units: Units, settings: Training) -> Plan:
    """Packs and steps of a whole stage: a pure function of the units' lengths and the settings."""
    lengths = units.lengths
    if not len(lengths):
        reasons = counted(units.excluded)
        shown = ", ".join(f"{reason} {count:,}" for reason, count in reasons.items())
        longest = max((row["tokens"] for row in units.excluded.to_pylist() if row["reason"] == "too_long"), default=0)
        advice = f". The longest row has {longest:,} tokens: raise capacity" if longest > settings.capacity else ""
        raise HouseError(f"no row is left to train on; excluded: {shown or 'none, the data has no rows'}{advice}")
    packs = pack_plan(lengths, settings.capacity)
    costs = pack_costs(packs, units.squares)
    steps: list[tuple[int, list[int]]] = []
    an_epoch = -(-len(packs) // settings.packs_per_step)
    total = settings.max_steps or max(1, round(settings.epochs * an_epoch))
    for epoch in range(-(-total // an_epoch)):
        steps += [(epoch, packs) for packs in step_plan(costs, settings.packs_per_step, epoch, settings.seed)]
    policy = f"{settings.overlong} {settings.packs_per_step} {total}{'' if units.shared else ' unshared'}"
    return Plan(units, packs, steps[:total], plan_digest(lengths, settings.capacity, policy, settings.seed))


def summary(plan: Plan, capacity: int) -> dict[str, Any]:
    """The plan in numbers: rows, units, tokens (unshared_tokens: if nothing lay once for many), target tokens, packs,
    fill, steps, epochs (begun), not_reached (rows of the packs that no step takes), what was left out or cut."""
    lengths = plan.units.lengths
    return {
        "rows": len(set(plan.units.rows_of(np.arange(len(lengths)))[0])),
        "units": len(lengths),
        "tokens": int(lengths.sum()),
        "unshared_tokens": int(plan.units.document_lengths.sum()),
        "target_tokens": int(plan.units.targets.sum()),
        "longest": int(lengths.max()),
        "packs": len(plan.packs),
        "fill": round(float(lengths.sum()) / (len(plan.packs) * capacity), 6),
        "steps": len(plan.steps),
        "epochs": plan.steps[-1][0] + 1,
        "not_reached": len(_not_reached(plan)),
        "excluded": counted(plan.units.excluded),
        "truncated": plan.units.truncated.num_rows,
        "digest": plan.digest,
    }


def _not_reached(plan: Plan) -> set[str]:
    """Rows that no step trains, because the steps end before an epoch does."""
    reached = {pack for _, packs in plan.steps for pack in packs}
    left = [units for pack, units in enumerate(plan.packs) if pack not in reached]
    if not left:
        return set()
    trained = np.concatenate([plan.packs[pack] for pack in reached])
    return set(plan.units.rows_of(np.concatenate(left))[0]) - set(plan.units.rows_of(trained)[0])


def write_plan(plan: Plan, capacity: int, out: Path) -> dict[str, Any]:
    """Writes plan.parquet (pack, row_id, tokens), steps.parquet (step, epoch, row_id), excluded.parquet,
    truncated.parquet and plan.json (the summary, returned) into `out`."""
    order = np.concatenate(plan.packs)
    row_ids, places = plan.units.rows_of(order)
    packed = {
        "pack": pa.array(np.repeat(np.arange(len(plan.packs)), [len(pack) for pack in plan.packs])[places], pa.int32()),
        "row_id": pa.array(row_ids, pa.string()),
        "tokens": pa.array(plan.units.lengths[order][places], pa.int32()),
    }
    write_parquet(out / "plan.parquet", pa.table(packed))
    stepped = [plan.units_of(step) for step in range(len(plan.steps))]
    counts = [len(units) for units in stepped]
    row_ids, places = plan.units.rows_of(np.concatenate(stepped))
    trained = {
        "step": pa.array(np.repeat(np.arange(1, len(counts) + 1), counts)[places], pa.int32()),
        "epoch": pa.array(np.repeat([epoch + 1 for epoch, _ in plan.steps], counts)[places], pa.int32()),
        "row_id": pa.array(row_ids, pa.string()),
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


def _size(unit: Sequence[Tokens], shared: bool) -> int:
    return tree_size([len(document.ids) for document in unit], shared_tokens(unit) if shared else 0)


def _excess(unit: Sequence[Tokens], capacity: int, limit: int, shared: bool) -> int:
    """Tokens to cut from the head of each document so that the unit fits `capacity` and each document `limit`."""
    longest = max(len(document.ids) for document in unit)
    common = shared_tokens(unit) if shared else 0
    over = max(0, _size(unit, shared) - capacity)
    once = min(over, common)  # what is shared shrinks once for all; beyond it each document shrinks on its own
    return max(once + -(-(over - once) // len(unit)), longest - limit, 0)


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


def _annotated(units: Units, found: Sequence[_Found], rows: pa.Table, family: Family) -> Units:
    """With what the rows say of the units besides: labels, rewards, members, tasks."""
    if family == "unpaired":
        labels = rows["label"].to_pylist()
        units = replace(units, labels=np.asarray([labels[item.rows[0]] for item in found], bool))
    if family == "lists":
        row_ids = rows["row_id"].to_pylist()
        units = replace(
            units,
            rewards=np.asarray([reward for item in found for reward in item.rewards], np.float32),
            members=[tuple(row_ids[row] for row in item.rows) for item in found],
        )
    if "source" in rows.column_names:
        sources = rows["source"].to_pylist()
        own = [sources[item.rows[0]] for item in found]
        names = sorted(set(own))
        places = {name: place for place, name in enumerate(names)}
        tasks = np.asarray([places[name] for name in own], np.int32)
        units = replace(units, tasks=tasks, task_names=tuple(names))
    return units


def _groups(family: Family, tokenizer: PreTrainedTokenizerBase, rows: pa.Table) -> list[Group]:
    """The units of each row."""
    if family == "tokens":
        return [[(example,) for example in examples] for examples in tokenise_rows(tokenizer, rows)]
    if family == "unpaired":
        return [[(example,)] for example in tokenise_completions(tokenizer, rows)]
    return [[pair] for pair in tokenise_pairs(tokenizer, rows)]


def _found(groups: Sequence[Group], rows: pa.Table, family: Family) -> tuple[list[_Found], list[tuple[int, str, int]]]:
    """What each row teaches; and rows that teach nothing: place, reason, tokens of the row's longest unit."""
    labels = rows["label"].to_pylist() if family == "unpaired" else [True] * len(groups)
    found, excluded = [], []
    for row, (group, label) in enumerate(zip(groups, labels, strict=True)):
        teaching, reason = _teaching(group)
        reason = "no_label" if reason is None and label is None else reason
        if reason is None:
            found.append(_Found((row,), teaching))
        else:
            excluded.append((row, reason, max((_size(unit, True) for unit in group), default=0)))
    return found, excluded


def _lists(found: Sequence[_Found], rows: pa.Table) -> tuple[list[_Found], list[tuple[int, str, int]]]:
    """Pairs of one prompt (and tools) as one list each; and the rows of lists whose answers are all worth the same."""
    columns = [rows[name].to_pylist() for name in ("prompt", "tools") if name in rows.column_names]
    by_prompt: dict[str, list[_Found]] = {}
    for item in found:
        key = json.dumps([column[item.rows[0]] for column in columns], sort_keys=True)
        by_prompt.setdefault(key, []).append(item)
    scores = _scores(rows)
    lists, excluded = [], []
    for pairs in by_prompt.values():
        members = tuple(item.rows[0] for item in pairs)
        known = [score for row in members if (score := scores[row]) is not None]
        said_of = known if len(known) == len(members) else [(1.0, 0.0)] * len(members)
        answers: dict[bytes, list[tuple[Tokens, float]]] = {}
        for item, score in zip(pairs, said_of, strict=True):
            for document, reward in zip(item.units[0], score, strict=True):
                answers.setdefault(document.ids.tobytes(), []).append((document, reward))
        rewards = tuple(float(np.mean([reward for _, reward in said])) for said in answers.values())
        unit = tuple(Tokens(said[0][0].ids, _mean_weights(said)) for said in answers.values())
        if len(set(rewards)) == 1:
            excluded += [(row, "equal_rewards", _size(unit, True)) for row in members]
        else:
            lists.append(_Found(members, [unit], rewards))
    return lists, excluded


def _mean_weights(said: Sequence[tuple[Tokens, float]]) -> NDArray[np.float32]:
    weights: NDArray[np.float32] = np.mean([document.weights for document, _ in said], 0, dtype=np.float64)
    return weights.astype(np.float32)


def _scores(rows: pa.Table) -> list[tuple[float, float] | None]:
    """What each row says its chosen and rejected answer are worth; None where it says nothing."""
    if all(name in rows.column_names for name in REWARDS):
        pairs = zip(*(rows[name].to_pylist() for name in REWARDS), strict=True)
    elif "meta" in rows.column_names:
        read = [json.loads(meta or "{}") for meta in rows["meta"].to_pylist()]
        pairs = zip(*([meta.get(name) for meta in read] for name in REWARDS), strict=True)
    else:
        return [None] * rows.num_rows
    return [(float(good), float(bad)) if _number(good) and _number(bad) else None for good, bad in pairs]


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and bool(np.isfinite(value))
