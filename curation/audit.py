"""Is this judge right? A blind, seeded sample on both sides of its threshold, labels, and what follows from them.

The rows that reached a judge are cut into two sides, dropped and kept, each side into strata of equal size along the
judge's score; each stratum gives equally many rows, drawn by a hash of (seed, row_id). Inside a side the sample is
therefore self-weighting: its share of bad rows estimates the side's, and the strata only make the estimate better than
the binomial that the intervals assume (they are conservative).
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from .folder import HouseError, RunFolder, read_json, read_parquet, write_json, write_parquet
from .judging import KEPT, VALUES
from .ledger import Mask, State, StepRecord, passages, read_verdicts, records, source_parts, step_folders
from .selecting.selection import Hashes, hashes, quotas, row_keys
from .text.spans import Ints

Label = Literal["good", "bad", "unsure"]
Reals = npt.NDArray[np.float64]
SAMPLE = pa.schema(
    [("row_id", pa.string()), ("content_id", pa.string()), ("dropped", pa.bool_()), ("score", pa.float64()),
     ("stratum", pa.int32()), ("weight", pa.float64())]
)  # fmt: skip
LABELS = pa.schema([(name, pa.string()) for name in ("row_id", "content_id", "label", "who", "note")])
STRATA = 5  # of a side
DRAWS = 20_000  # of each posterior: its quantiles then move by less than a hundredth of the interval


@dataclass(frozen=True)
class Estimate:
    """A figure for the whole corpus with its 95 % interval; `value` is None where nothing was labelled."""

    value: float | None
    low: float
    high: float

    def __str__(self) -> str:
        return "unknown" if self.value is None else f"{self.value:.3g} ({self.low:.3g} to {self.high:.3g})"


@dataclass(frozen=True)
class Side:
    """One side of a judge: rows of the corpus, rows sampled and labelled, bad ones among those, unsure ones besides."""

    rows: int
    labelled: int
    bad: int
    unsure: int


@dataclass(frozen=True)
class Report:
    """What an audit says of a judge, reweighted to the corpus.

    precision: the share of dropped rows that are bad. missed: the share of all bad rows that the judge kept. lost: the
    share of all good rows that it dropped. price: good rows dropped for each bad row dropped. threshold: the strictest
    score limit that loses at most the stated share of good rows, with that loss; None where the judge has no score.
    labeller: how well a judge model agrees with people, where one labelled."""

    set: str
    step: int
    judge: str
    dropped: Side
    kept: Side
    precision: Estimate
    missed: Estimate
    lost: Estimate
    price: Estimate
    threshold: dict[str, Any] | None = None
    labeller: dict[str, Any] | None = None


# ---- the sample


def find_step(folder: RunFolder, judge: str | None, set_name: str | None = None) -> StepRecord:
    """The finished step of that class name (or NAME.2, the second one) that dropped rows; without a name, the judge
    that dropped most. Raises HouseError with what there is to choose from."""
    sets = [set_name] if set_name else [path.parent.name for path in sorted(folder.ledger.glob("*/set.json"))]
    steps = [r for name in sets for r in records(folder, name) if r["scope"] in ("row", "corpus")]
    open_steps = [r for r in steps if r["dropped"] and set(r["reasons"]) != {"held_out"}]
    if judge is not None:
        name, _, which = judge.partition(".")
        named = [r for r in open_steps if r["name"] == name]
        open_steps = named[int(which) - 1 : int(which)] if which.isdigit() and int(which) else named[:1]
    if not open_steps:
        known = ", ".join(sorted({r["name"] for r in steps if r["dropped"]})) or "none"
        raise HouseError(f"no judge {judge or ''} of {folder.root} dropped a row; those that did: {known}")
    return max(open_steps, key=lambda r: (r["dropped"], -r["step"]))


def draw_sample(folder: RunFolder, record: StepRecord, size: int = 50, seed: int = 0) -> pa.Table:
    """`size` rows (schema SAMPLE) of those that reached the step, half of each side as far as there are rows, in a
    random order; weight: rows of the corpus that each stands for. Fewer where fewer came."""
    if size < 2:
        raise HouseError(f"an audit wants at least 2 rows, not {size}")
    before, after = _around(folder, record)
    ids = _ids(before)
    dropped = ~after.alive[: len(before.alive)][before.alive]
    scores = _scores(folder, record, ids["row_id"])
    where, strata, weights = stratified(row_keys(ids["row_id"]), dropped, scores, size, seed)
    score = scores[where]
    return pa.table(
        {
            **{name: ids[name].take(pa.array(where, pa.int64())) for name in ("row_id", "content_id")},
            "dropped": pa.array(dropped[where], pa.bool_()),
            "score": pa.array(score, pa.float64(), mask=np.isnan(score)),
            "stratum": pa.array(strata, pa.int32()),
            "weight": pa.array(weights, pa.float64()),
        },
        schema=SAMPLE,
    )


def stratified(keys: Hashes, dropped: Mask, scores: Reals, size: int, seed: int) -> tuple[Ints, Ints, Reals]:
    """(rows, stratum of each on its side, rows that each stands for), in a random order: half of each side as far as it
    goes, and of each side equally many from STRATA parts of equal size along the score (NaN last)."""
    order, draw = hashes(keys, seed), hashes(keys, seed + 1)
    sizes = _split(size, [int(dropped.sum()), int((~dropped).sum())])
    picked: list[tuple[int, int, float]] = []
    for side, count in zip((True, False), sizes, strict=True):
        rows = np.flatnonzero(dropped == side)
        rows = rows[np.lexsort((order[rows], scores[rows]))]
        strata = np.array_split(rows, max(1, min(STRATA, count)))
        counts = _split(count, [len(stratum) for stratum in strata])
        for number, (stratum, some) in enumerate(zip(strata, counts, strict=True)):
            best = stratum[np.argsort(draw[stratum], kind="stable")][:some]
            picked += [(row, number, len(stratum) / max(1, some)) for row in best.tolist()]
    blind = hashes(keys, seed + 2)  # sides and strata mixed
    picked.sort(key=lambda item: int(blind[item[0]]))
    columns = list(zip(*picked, strict=True)) or [(), (), ()]
    return np.array(columns[0], np.int64), np.array(columns[1], np.int64), np.array(columns[2], np.float64)


def _split(total: int, available: Sequence[int]) -> list[int]:
    """`total` in equal shares, none above what is available; what one cannot take goes to the others."""
    found: list[int] = quotas(np.ones(len(available)), np.array(available, np.int64), total).tolist()
    return found


def _around(folder: RunFolder, record: StepRecord) -> tuple[State, State]:
    """The set's state before and after the step."""
    for passage in passages(folder, record["set"]):
        if passage.record["step"] == record["step"]:
            return passage.before, passage.after
    raise HouseError(f"step {record['step']} of set {record['set']} is not finished")


def _ids(state: State) -> pa.Table:
    schema = pa.schema([("row_id", pa.string()), ("content_id", pa.string())])
    return pa.concat_tables([schema.empty_table(), *(t.cast(schema) for t in state.tables(schema.names))])


def _scores(folder: RunFolder, record: StepRecord, row_ids: pa.ChunkedArray) -> Reals:
    """The judge's score of each row that came, NaN where none is known: from the values that it read, else from its
    verdicts."""
    home = folder.ledger / record["set"] / f"{record['step']:02d}-{record['name']}"
    path = home / KEPT / VALUES
    if record["score"] and path.is_file() and record["score"] in pq.read_schema(path).names:
        column = pq.read_table(path, columns=[record["score"]])[record["score"]]
    else:
        told = pq.read_table(home / "verdicts.parquet", columns=["row_id", "score"])
        column = told["score"].take(pc.index_in(row_ids, value_set=told["row_id"].combine_chunks()))
    return np.asarray(column.cast(pa.float64()).to_numpy(), np.float64)


# ---- what labels say


def report(
    sample: pa.Table, labels: Mapping[str, Label], record: StepRecord, *, loss_budget: float = 0.02, seed: int = 0
) -> Report:
    """What the labels (row_id -> label) of a sample say of its judge. Rows without a label are passed over; `unsure`
    ones are counted and not used. Intervals: Jeffreys posteriors of each side's share of bad rows (Brown, Cai and
    DasGupta 2001), carried over to the rows that were not sampled."""
    rows = [row | {"label": labels.get(row["row_id"])} for row in sample.to_pylist()]
    dropped, kept = _side(rows, True, record["dropped"]), _side(rows, False, record["kept"])
    random = np.random.default_rng(seed)
    bad_dropped, bad_kept = _bad_rows(dropped, random), _bad_rows(kept, random)
    return _figures(record, dropped, kept, bad_dropped, bad_kept, _share(dropped), _share(kept),
                    _threshold(rows, record, loss_budget, random))  # fmt: skip


def _figures(
    record: StepRecord,
    dropped: Side,
    kept: Side,
    bad_dropped: Reals,
    bad_kept: Reals,
    share_dropped: float | None,
    share_kept: float | None,
    threshold: dict[str, Any] | None,
    labeller: dict[str, Any] | None = None,
) -> Report:
    """The report from draws of the number of bad rows on each side, and the plain estimates of their shares."""
    at = None if share_dropped is None else share_dropped * dropped.rows
    besides = None if share_kept is None else share_kept * kept.rows
    good_dropped, good_kept = dropped.rows - bad_dropped, kept.rows - bad_kept

    def ratio(over: float | None, under: float | None) -> float | None:
        return None if over is None or under is None or over + under == 0 else over / (over + under)

    good = (None if at is None else dropped.rows - at, None if besides is None else kept.rows - besides)
    price = None if at is None else (dropped.rows - at) / at if at else math.inf
    return Report(
        record["set"], record["step"], record["judge"], dropped, kept,
        precision=_estimate(share_dropped, bad_dropped / max(1, dropped.rows)),
        missed=_estimate(ratio(besides, at), _over(bad_kept, bad_kept + bad_dropped)),
        lost=_estimate(ratio(*good), _over(good_dropped, good_dropped + good_kept)),
        price=_estimate(price, _over(good_dropped, bad_dropped)),
        threshold=threshold, labeller=labeller,
    )  # fmt: skip


def _side(rows: Sequence[Mapping[str, Any]], dropped: bool, size: int) -> Side:
    said = [row["label"] for row in rows if row["dropped"] == dropped]
    return Side(size, said.count("good") + said.count("bad"), said.count("bad"), said.count("unsure"))


def _share(side: Side) -> float | None:
    return side.bad / side.labelled if side.labelled else None


def _bad_rows(side: Side, random: np.random.Generator) -> Reals:
    """Draws of the number of bad rows on a side: those seen, and of the others as many as the posterior share says. At
    the ends the interval reaches 0 and 1, as Brown, Cai and DasGupta advise."""
    share = random.beta(side.bad + 0.5, side.labelled - side.bad + 0.5, DRAWS)
    if side.labelled and side.bad == 0:
        share[: DRAWS // 20] = 0.0
    if side.labelled and side.bad == side.labelled:
        share[: DRAWS // 20] = 1.0
    rest = random.binomial(max(0, side.rows - side.labelled), share)
    return np.asarray(side.bad + rest, np.float64)


def _over(over: Reals, under: Reals) -> Reals:
    found: Reals = np.divide(over, under, out=np.full(len(over), np.inf), where=under > 0)
    return found


def _estimate(value: float | None, draws: Reals) -> Estimate:
    low, high = np.quantile(draws, [0.025, 0.975], method="inverted_cdf")  # which takes infinities
    return Estimate(value, float(low), float(high))


def _threshold(
    rows: Sequence[Mapping[str, Any]], record: StepRecord, budget: float, random: np.random.Generator
) -> dict[str, Any] | None:
    """The strictest limit whose loss of good rows stays within the budget: which limit, its value now, the better one,
    and the share of good rows beyond it. Of a judge with two limits, the one beyond which more of the sample lies."""
    low, high = record["limits"]
    scored = [row for row in rows if row["label"] in ("good", "bad") and row["score"] is not None]
    if (low is None and high is None) or not any(row["label"] == "good" for row in scored):
        return None
    beyond_low = sum(row["score"] < low for row in scored) if low is not None else -1
    beyond_high = sum(row["score"] > high for row in scored) if high is not None else -1
    side = "low" if beyond_low > beyond_high else "high"
    sign = -1.0 if side == "low" else 1.0  # the higher the worse
    good = [(sign * row["score"], row["weight"]) for row in scored if row["label"] == "good"]
    scores, weights = (np.array(column) for column in zip(*good, strict=True))
    candidates = np.unique(sign * np.array([row["score"] for row in scored]))
    losses = np.array([weights[scores > at].sum() for at in candidates]) / weights.sum()
    at = int(np.flatnonzero(losses <= budget)[0])
    best, lost = float(candidates[at]), float(losses[at])
    size = weights.sum() ** 2 / (weights**2).sum()  # Kish's effective number of good rows
    draws = random.beta(lost * size + 0.5, (1 - lost) * size + 0.5, DRAWS)
    if lost == 0:
        draws[: DRAWS // 20] = 0.0
    loss = _estimate(lost, draws)
    return {"limit": side, "now": low if side == "low" else high, "value": sign * best, "budget": budget,
            "loss": asdict(loss)}  # fmt: skip


# ---- a judge model as labeller


def corrected(
    sample: pa.Table,
    people: Mapping[str, Label],
    model: Mapping[str, Label],
    record: StepRecord,
    *,
    loss_budget: float = 0.02,
    seed: int = 0,
) -> Report:
    """`report` by a judge model's labels, corrected by its errors on the rows that people labelled too (Rogan and
    Gladen 1978): bad = (called bad + specificity - 1) / (sensitivity + specificity - 1), each with its posterior.

    The rows labelled twice must hold good and bad ones by people's word; the model is taken to err alike on both
    sides of the judge."""
    both = [(people[i], model[i]) for i in people if people[i] != "unsure" and model.get(i, "unsure") != "unsure"]
    bad, good = ([said for truth, said in both if truth == which] for which in ("bad", "good"))
    if not bad or not good:
        raise HouseError(
            f"a judge model is calibrated by rows that people call good and bad: there are {len(good)} good and"
            f" {len(bad)} bad rows that both labelled. Label more rows by hand"
        )
    random = np.random.default_rng(seed)
    finds, spares = bad.count("bad"), good.count("good")
    sensitivity = random.beta(finds + 0.5, len(bad) - finds + 0.5, DRAWS)
    specificity = random.beta(spares + 0.5, len(good) - spares + 0.5, DRAWS)
    plain = (finds / len(bad), spares / len(good))
    if sum(plain) <= 1:
        raise HouseError("the judge model agrees with people no better than chance: its labels say nothing")
    rows = [row | {"label": model.get(row["row_id"])} for row in sample.to_pylist()]
    sides = (_side(rows, True, record["dropped"]), _side(rows, False, record["kept"]))
    draws: list[Reals] = []
    shares: list[float | None] = []
    for side in sides:
        called = random.beta(side.bad + 0.5, side.labelled - side.bad + 0.5, DRAWS)
        under = sensitivity + specificity - 1
        share = np.where(under > 0.01, (called + specificity - 1) / np.maximum(under, 0.01), random.random(DRAWS))
        draws.append(random.binomial(side.rows, np.clip(share, 0.0, 1.0)).astype(np.float64))
        value = _share(side)
        shares.append(None if value is None else float(np.clip((value + plain[1] - 1) / (sum(plain) - 1), 0, 1)))
    labeller = {"sensitivity": plain[0], "specificity": plain[1], "calibrated_on": len(both)}
    limit = _threshold(rows, record, loss_budget, random)
    return _figures(record, *sides, draws[0], draws[1], shares[0], shares[1], limit, labeller)


# ---- what is kept of an audit


def audit_folder(folder: RunFolder, record: StepRecord) -> Path:
    """OUT/audits/SET-NN-Judge/: sample.parquet, labels.parquet, report.json."""
    return folder.root / "audits" / f"{record['set']}-{record['step']:02d}-{record['name']}"


def read_labels(home: Path) -> dict[str, dict[str, Any]]:
    """Labels that lie in an audit's folder by row_id, the last of each row."""
    path = home / "labels.parquet"
    if not path.is_file():
        return {}
    found = read_parquet(path, LABELS.names, "Restore it; without it the audit's labels are gone")
    return {row["row_id"]: row for row in found.to_pylist()}


def add_labels(home: Path, labels: Sequence[Mapping[str, Any]]) -> None:
    """Writes these labels (keys of LABELS) beside those that lie there; a later one of a row replaces the earlier."""
    known = read_labels(home) | {str(label["row_id"]): dict(label) for label in labels}
    write_parquet(home / "labels.parquet", pa.Table.from_pylist(list(known.values()), schema=LABELS))


def write_report(home: Path, found: Report) -> None:
    write_json(home / "report.json", plain_report(found))


def plain_report(found: Report) -> dict[str, Any]:
    """The report as JSON holds it: an infinite figure is null."""

    def finite(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: finite(item) for key, item in value.items()}
        return None if isinstance(value, float) and not math.isfinite(value) else value

    whole: dict[str, Any] = finite(asdict(found))
    return whole


def check_labels(folder: RunFolder, earlier: RunFolder) -> pa.Table:
    """Labels of an earlier run held against this one (a regression test): for each labelled content that came in here
    too: row_id, content_id, label, kept (whether it lives at the end of every set that read it), right (good and kept,
    or bad and dropped), fate (kept, or the step that dropped it and its reason)."""
    labels = [row for home in sorted((earlier.root / "audits").glob("*"))
              for row in read_labels(home).values() if row["label"] != "unsure"]  # fmt: skip
    wanted = {row["content_id"]: row["label"] for row in labels}
    found: list[dict[str, Any]] = []
    for path in sorted(folder.ledger.glob("*/set.json")):
        state = source_parts(folder, read_json(path)["sources"])
        for passage in passages(folder, path.parent.name):
            state = passage.after
        for part, mask in state.masks():
            names = pq.read_table(part, columns=["row_id", "content_id"])
            ids = names["content_id"]
            hit = pc.is_in(ids, value_set=pa.array(list(wanted), pa.string())).to_numpy()
            for row, live in zip(names.filter(pa.array(hit)).to_pylist(), mask[hit].tolist(), strict=True):
                label = wanted[row["content_id"]]
                found.append({**row, "set": path.parent.name, "label": label, "kept": live,
                              "right": live == (label == "good")})  # fmt: skip
        mine = [row for row in found if row["set"] == path.parent.name]
        gone = _dropped_by(folder, path.parent.name, [row["row_id"] for row in mine if not row["kept"]])
        for row in mine:
            row["fate"] = "kept" if row["kept"] else f"dropped ({gone.get(row['row_id'], 'unknown')})"
    kinds = {"set": pa.string(), "row_id": pa.string(), "content_id": pa.string(), "label": pa.string(),
             "kept": pa.bool_(), "right": pa.bool_(), "fate": pa.string()}  # fmt: skip
    return pa.Table.from_pylist(found, schema=pa.schema(kinds))


def _dropped_by(folder: RunFolder, set_name: str, rows: Sequence[str]) -> dict[str, str]:
    """Which step dropped each of these rows, and its reason."""
    wanted = pa.array(rows, pa.string())
    found = {}
    for home in step_folders(folder, set_name):
        for table in read_verdicts(home, ["row_id", "keep", "reason"]):
            here = table.filter(pc.and_(pc.invert(table["keep"]), pc.is_in(table["row_id"], value_set=wanted)))
            for row in here.to_pylist():
                found[row["row_id"]] = f"{home.name}: {row['reason']}"
    return found
