"""Selection with an exact budget: seeded draws by row_id, ranks, quotas, what a budget in tokens buys, and verdicts
made as arrays. Nothing here depends on the order of the rows or on how they are cut into parts."""

import json
import re
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from ..duplicates.survivors import json_column
from ..folder import HouseError
from ..keys import keys_of
from ..measures.length import Length
from ..rows import digest
from ..steps import VERDICT, Corpus, Measure, value_names
from ..text.spans import Ints

Unit = Literal["rows", "tokens", "words"]
Shares = Literal["proportional", "equal", "sqrt"]
Reals = npt.NDArray[np.float64]
Bools = npt.NDArray[np.bool_]
Hashes = npt.NDArray[np.uint64]
NOT_SELECTED, NOT_SCORABLE = "not_selected", "not_scorable"
_TOKENS = ("tokens", "response_tokens")  # the column that counts, of a measure that has several
_ID = re.compile("[0-9a-f]{32}")
_MIX_1, _MIX_2, _STEP = np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB), np.uint64(0x9E3779B97F4A7C15)


@dataclass(frozen=True)
class Pool:
    """The live rows as a selection sees them, in the order of `corpus.tables()`. keys: the 128 bits of each row_id;
    scores: NaN where unknown; costs: rows, words or tokens, at least 1 a row; open: rows that may be selected."""

    keys: Hashes  # (rows, 2)
    scores: Reals
    costs: Ints
    open: Bools

    def __len__(self) -> int:
        return len(self.costs)


class Budgeted:
    """Base of a judge that keeps what a budget buys: it judges by no one score, and its limits follow from the corpus
    and stand in the evidence."""

    scope: ClassVar[Literal["corpus"]] = "corpus"
    score: ClassVar[str | None] = None

    def limits(self) -> tuple[float | None, float | None]:
        return None, None


# ---- what a step reads


def reads(step: object, *wanted: tuple[Measure, str]) -> tuple[Measure, ...]:
    """The `needs` of a judge that reads these columns of these measures, each measure once. A HouseError where a
    measure has no such column."""
    needs = tuple(dict.fromkeys(measure for measure, _ in wanted))
    for measure, column in wanted:
        if column not in measure.columns:
            raise HouseError(f"{step}: {measure} has no column {column!r}; it has {', '.join(measure.columns)}")
    return needs


def value_name(needs: Sequence[Measure], measure: Measure, column: str) -> str:
    """Under which name a judge with these `needs` reads this column of this measure."""
    place = list(needs).index(measure)
    return dict(zip(measure.columns, value_names([need.columns for need in needs])[place], strict=True))[column]


def only_column(step: object, of: Measure, column: str | None) -> str:
    """`column`, or the single column of `of` where it is None; else a HouseError that lists the choice."""
    if column is None and len(of.columns) == 1:
        return next(iter(of.columns))
    if column is None or column not in of.columns:
        raise HouseError(f"{step}: name a column of {of}: one of {', '.join(of.columns)}")
    return column


def cost_of(step: object, unit: Unit, tokens: Measure | None) -> tuple[tuple[Measure, str], ...]:
    """What a budget in `unit` reads: nothing for rows, Length's response_words for words, and for tokens the column
    `tokens`, `response_tokens` or the only column of the measure `tokens`."""
    if unit == "rows":
        return ()
    if unit == "words":
        return ((Length(), "response_words"),)
    if tokens is None:
        raise HouseError(
            f"{step}: a budget in tokens needs the measure that counts them: add tokens: {{MEASURE: {{…}}}}"
        )
    known = [name for name in _TOKENS if name in tokens.columns]
    return ((tokens, known[0] if known else only_column(step, tokens, None)),)


def pool(
    corpus: Corpus, unit: Unit, tokens: Measure | None, column: str | None = None, needs: Sequence[Measure] = ()
) -> Pool:
    """The live rows with their costs in `unit` and the scores of `column` (as `value_name` says). needs: those of the
    judge, where the measure that counts tokens may share a column's name with another. A row whose cost is unknown, or
    whose score is wanted and no finite number, is not open to selection."""
    keys = row_keys(row_ids(corpus))
    scores = np.full(len(keys), np.nan) if column is None else numbers(corpus, column)
    known = np.ones(len(keys), np.bool_) if column is None else np.isfinite(scores)
    costs = np.ones(len(keys))
    for measure, name in cost_of("a budget", unit, tokens):
        costs = numbers(corpus, value_name(needs or (measure,), measure, name))
        known &= np.isfinite(costs)
    whole = np.maximum(np.where(known, costs, 1), 1).astype(np.int64)  # an empty row still takes a place
    return Pool(keys, scores, whole, known)


def row_ids(corpus: Corpus) -> pa.ChunkedArray:
    """The row_ids of the live rows."""
    return pa.chunked_array(
        [chunk for rows in corpus.tables(["row_id"]) for chunk in rows["row_id"].chunks], pa.string()
    )


def numbers(corpus: Corpus, column: str) -> Reals:
    """A value column as float64; null is NaN."""
    values = corpus.values([column])[column].cast(pa.float64())
    return np.asarray(values.to_numpy(), np.float64)


# ---- seeded draws


def row_keys(row_ids: pa.Array | pa.ChunkedArray) -> Hashes:
    """The 128 bits that each row_id spells in hexadecimal, shape (rows, 2); of another name those of its digest."""
    try:
        return keys_of(row_ids)
    except ValueError:
        named = [name if _ID.fullmatch(name) else digest(name) for name in map(str, row_ids.to_pylist())]
        return keys_of(pa.array(named, pa.string()))


def hashes(keys: Hashes, seed: int) -> Hashes:
    """64 well-mixed bits of each row, a function of (seed, row_id) alone: the key of every draw, and of every tie."""
    with np.errstate(over="ignore"):
        salt = _mixed(np.array([seed & 0xFFFFFFFFFFFFFFFF], np.uint64) + _STEP)
        return _mixed(_mixed(keys[:, 0] ^ salt) + _mixed(keys[:, 1] + _STEP))


def _mixed(bits: Hashes) -> Hashes:
    """The finalizer of SplitMix64."""
    bits = (bits ^ (bits >> np.uint64(30))) * _MIX_1
    bits = (bits ^ (bits >> np.uint64(27))) * _MIX_2
    return bits ^ (bits >> np.uint64(31))


def uniform(keys: Hashes, seed: int) -> Reals:
    """A draw from (0, 1) for each row, a function of (seed, row_id) alone."""
    return ((hashes(keys, seed) >> np.uint64(12)).astype(np.float64) + 0.5) / 2.0**52


def gumbel(keys: Hashes, seed: int) -> Reals:
    """A standard Gumbel draw for each row, a function of (seed, row_id) alone: the largest of logit + draw is a sample
    from the softmax of the logits, and the next ones continue it without replacement (arXiv 1903.06059)."""
    draws: Reals = -np.log(-np.log(uniform(keys, seed)))
    return draws


def canonical(keys: Hashes) -> Ints:
    """The order of row_id: in it, work that is sensitive to order gives the same result for any order of the rows."""
    order: Ints = np.lexsort((keys[:, 1], keys[:, 0]))
    return order


# ---- ranks, quotas, what a budget buys


def descending(scores: Reals, ties: Hashes, open_rows: Bools) -> Ints:
    """The open rows from the greatest score down, equal ones by `ties`."""
    rows = np.flatnonzero(open_rows)
    order: Ints = rows[np.lexsort((ties[rows], -scores[rows]))]
    return order


def ranks(order: Ints, groups: Ints) -> Ints:
    """Place from 1 of each row among those of its group in `order`; 0 for rows that are not in `order`."""
    found = np.zeros(len(groups), np.int64)
    by_group = order[np.argsort(groups[order], kind="stable")]
    grouped = groups[by_group]
    first = np.r_[True, grouped[1:] != grouped[:-1]] if len(order) else np.zeros(0, np.bool_)
    starts = np.flatnonzero(first)
    found[by_group] = np.arange(len(order)) - np.repeat(starts, np.diff(np.r_[starts, len(order)])) + 1
    return found


def shared(sizes: npt.NDArray[Any], shares: Shares) -> Reals:
    """Weights of groups of these sizes: their sizes, equal ones, or the square roots; 0 for an empty group."""
    whole = np.asarray(sizes, np.float64)
    if shares == "proportional":
        return whole
    return np.sqrt(whole) if shares == "sqrt" else (whole > 0).astype(np.float64)


def quotas(weights: npt.NDArray[Any], available: Ints, budget: int, least: Ints | None = None) -> Ints:
    """Units to take of each group: proportional to `weights`, at most `available`, at least `least` (default: 1 where
    anything is available) if the budget suffices for that, `budget` in all (or all that is available).

    The shares are clip(scale · weight, least, available) with the one scale that spends the budget; what rounding down
    leaves goes to the largest remainders, ties to the larger weight, then to the earlier group. A weight of 0 counts
    as a billionth of the largest: such a group is served when the others run dry."""
    budget = min(budget, int(available.sum()))
    least = np.minimum(available, 1) if least is None else least
    if least.sum() > budget:
        least = np.zeros_like(available)
    weights = np.asarray(weights, np.float64)
    weights = np.maximum(weights, 1e-9 * weights.max(initial=0.0)) if weights.any() else np.ones(len(weights))
    low, high = 0.0, float((available / weights).max(initial=0.0)) * 2 + 1
    for _ in range(200):
        middle = (low + high) / 2
        if not low < middle < high:
            break
        if np.clip(middle * weights, least, available).sum() < budget:
            low = middle
        else:
            high = middle
    exact = np.clip(high * weights, least, available)
    whole = np.floor(exact + 1e-9).astype(np.int64)  # 2.9999999999 is 3
    order = np.lexsort((np.arange(len(weights)), -weights, -(exact - whole)))
    for step in (1, -1):
        while (gap := budget - int(whole.sum())) * step > 0:
            near = order[::step]
            able = near[(least[near] <= whole[near] + step) & (whole[near] + step <= available[near])]
            whole[able[: abs(gap)]] += step
    return whole


def spend(order: Ints, costs: Ints, budget: int) -> Bools:
    """The rows bought with `budget` going down `order`: a row that costs more than what is left is passed over and the
    next that fits is taken, until none fits."""
    keep = np.zeros(len(costs), np.bool_)
    while len(order) and budget > 0:
        order = order[costs[order] <= budget]
        total = np.cumsum(costs[order])
        taken = int(np.searchsorted(total, budget, side="right"))
        keep[order[:taken]] = True
        budget -= int(total[taken - 1]) if taken else 0
        order = order[taken + 1 :]
    return keep


def spend_in_groups(order: Ints, groups: Ints, costs: Ints, weights: Reals, budget: int) -> tuple[Bools, Ints, Ints]:
    """(kept rows, rank of each row in its group, quota of each group in the budget's unit).

    Each group has its quota by `weights`. First comes the best row of each group, where the budget suffices for all of
    them; then rows in the order of how full they make their group (cost of the group up to this row / its quota). With
    a budget in rows that is exactly the rows with rank <= quota; with one in tokens the rest that whole rows leave goes
    to the next in that order which fit."""
    rank = ranks(order, groups)
    sizes = len(weights)
    available = np.bincount(groups[order], weights=costs[order], minlength=sizes).astype(np.int64)
    first = order[rank[order] == 1]
    least = np.zeros(sizes, np.int64)
    least[groups[first]] = costs[first]
    quota = quotas(weights, available, budget, least)
    by_group = order[np.argsort(groups[order], kind="stable")]
    running = np.cumsum(costs[by_group])
    before = np.r_[0, np.cumsum(available)[:-1]]
    cumulated = running - before[groups[by_group]]
    fullness = np.zeros(len(costs))
    fullness[by_group] = cumulated / np.maximum(quota[groups[by_group]], 0.5)
    if costs[first].sum() <= budget:
        fullness[first] = 0.0
    if np.all(costs[order] == 1):
        keep = np.zeros(len(costs), np.bool_)
        keep[order] = rank[order] <= quota[groups[order]]
        return keep, rank, quota
    place = np.zeros(len(costs), np.int64)
    place[order] = np.arange(len(order))
    return spend(order[np.lexsort((place[order], fullness[order]))], costs, budget), rank, quota


# ---- verdicts


def selected(rows: Pool, keep: Bools, evidence: Mapping[str, pa.Array | npt.NDArray[Any]]) -> pa.Table:
    """Verdicts (schema VERDICT): reason not_selected, or not_scorable (without evidence) for rows that are not open.
    Strings of `evidence` are escaped here; a masked or null value leaves its key out."""
    columns = {name: _plain(values) for name, values in evidence.items()}
    proof = json_column(columns) if columns else pa.nulls(len(rows), pa.string())
    proof = pc.if_else(pa.array(rows.open), proof, pa.scalar(None, pa.string()))
    lost = pc.if_else(pa.array(rows.open), NOT_SELECTED, NOT_SCORABLE)
    reason = pc.if_else(pa.array(keep), pa.scalar(None, pa.string()), lost)
    score = pa.array(rows.scores, pa.float64(), mask=np.isnan(rows.scores))
    return pa.Table.from_arrays([pa.array(keep), reason, score, proof.cast(pa.string())], schema=VERDICT)


def dropped(
    rows: Pool,
    keep: Bools,
    reason: str,
    evidence: Mapping[str, pa.Array | npt.NDArray[Any]],
    shown: Bools | None = None,
) -> pa.Table:
    """Verdicts with this reason; evidence for the rows `shown`, by default the dropped ones."""
    said = selected(rows, keep, evidence)
    lost = pa.array([reason], pa.string()).take(pa.array(np.zeros(len(keep), np.int64), mask=keep))
    proof = pc.if_else(pa.array(~keep if shown is None else shown), said["evidence"], pa.scalar(None, pa.string()))
    return pa.Table.from_arrays([said["keep"], lost, said["score"], proof], schema=VERDICT)


def _plain(values: pa.Array | npt.NDArray[Any]) -> pa.Array:
    column = values if isinstance(values, pa.Array | pa.ChunkedArray) else pa.array(values)
    column = column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column
    if not pa.types.is_string(column.type):
        return column
    coded = column.dictionary_encode()
    escaped = pa.array(
        [json.dumps(text, ensure_ascii=False)[1:-1] for text in coded.dictionary.to_pylist()], pa.string()
    )
    return escaped.take(coded.indices)


def picked(
    rows: Pool,
    names: pa.ChunkedArray,
    order: Ints,
    chosen: Ints,
    closest: tuple[str, npt.NDArray[np.float32], Ints],
    evidence: Mapping[str, pa.Array | npt.NDArray[Any]],
) -> pa.Table:
    """Verdicts of a greedy choice. order: the open rows as the choice saw them; chosen: places in `order`, in the order
    of choice. closest: what it is called (distance, similarity), its value for each place in `order` and the place of
    the picked row it is to (-1: none), which becomes the score and the evidence {NAME, closest} beside {rank}."""
    keep, rank = np.zeros(len(rows), np.bool_), np.zeros(len(rows), np.int64)
    keep[order[chosen]], rank[order[chosen]] = True, np.arange(1, len(chosen) + 1)
    what, value, other = closest
    compared = other >= 0
    known, score, row = np.zeros(len(rows), np.bool_), np.full(len(rows), np.nan), np.arange(len(rows))
    known[order[compared]], score[order[compared]] = True, value[compared]
    row[order[compared]] = order[other[compared]]
    proof = {
        "rank": pa.array(rank, mask=~keep),
        what: pa.array(np.round(score, 6), mask=~known),
        "closest": names.combine_chunks().take(pa.array(row, mask=~known | (row == np.arange(len(rows))))),
    }
    return selected(replace(rows, scores=score), keep, {**proof, **evidence})


def all_kept(step: object, rows: Pool, budget: int, unit: Unit) -> pa.Table | None:
    """Where the budget is not below what the open rows cost: verdicts that keep them all, with a warning and a note as
    evidence. Else None: there is something to select."""
    total = int(rows.costs[rows.open].sum())
    if budget < total:
        return None
    note = f"budget {budget} of {total} {unit}: all kept"
    warnings.warn(f"{type(step).__name__}: {note}", stacklevel=2)
    return selected(rows, rows.open.copy(), {"note": pa.array([note] * len(rows), pa.string())})


def check_budget(step: object, budget: int, unit: Unit, tokens: Measure | None) -> None:
    """A HouseError unless the budget is at least 1 and can be counted."""
    if budget < 1:
        raise HouseError(f"{step}: budget is at least 1")
    reads(step, *cost_of(step, unit, tokens))


def paid(unit: Unit, costs: Ints) -> dict[str, Ints]:
    """The evidence of a row's cost: {tokens} or {words}; nothing for rows, which all cost 1."""
    return {} if unit == "rows" else {unit: costs}


def shuffled(keys: Hashes, seed: int, open_rows: Bools) -> Ints:
    """The open rows in a random order that depends on (seed, row_id) alone."""
    return descending(np.zeros(len(keys)), hashes(keys, seed), open_rows)


def codes(values: Sequence[str | None] | pa.Array | pa.ChunkedArray) -> tuple[Ints, list[str]]:
    """(number of each value, the values in sorted order); null counts as the empty string."""
    column = values if isinstance(values, pa.Array | pa.ChunkedArray) else pa.array(values, pa.string())
    column = column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column
    coded = pc.fill_null(column.cast(pa.string()), "").dictionary_encode()
    names = coded.dictionary.to_pylist()
    place = np.empty(len(names), np.int64)
    place[np.argsort(np.array(names, object), kind="stable")] = np.arange(len(names))
    return place[coded.indices.to_numpy(zero_copy_only=False)], sorted(names)
