"""An audit's sample is blind and stratified, its intervals cover the truth at their rate, its labels are kept."""

import json
from collections.abc import Callable
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from gristmill.curation.audit import (
    SAMPLE,
    Label,
    add_labels,
    audit_folder,
    check_labels,
    corrected,
    draw_sample,
    find_step,
    plain_report,
    read_labels,
    report,
    stratified,
    write_report,
)
from gristmill.curation.folder import HouseError, RunFolder, read_json
from gristmill.curation.judges.length import ResponseLength
from gristmill.curation.sift import SetPlan, advance, begin, full_steps

Write = Callable[..., list[str]]
Make = Callable[..., dict[str, Any]]
ROWS = 4000


class NoTools:
    def digest(self, model: str) -> str:
        return "0"


def corpus(seed: int, bad_low: float, bad_high: float) -> tuple[Any, Any, Any, Any]:
    """(keys, scores, dropped, bad): rows above the limit 0.8 are dropped; they are bad with chance `bad_high`, the
    others with a chance that grows with the score up to 2 bad_low."""
    random = np.random.default_rng(seed)
    scores = random.random(ROWS)
    dropped = scores > 0.8
    bad = random.random(ROWS) < np.where(dropped, bad_high, 2 * bad_low * scores / 0.8)
    return random.integers(0, 2**64, (ROWS, 2), np.uint64), scores, dropped, bad


def audited(seed: int, bad_low: float, bad_high: float, size: int = 50) -> tuple[Any, Any, dict[str, Label]]:
    """(sample, truth, labels) of a simulated audit; truth: precision, missed, lost, price."""
    keys, scores, dropped, bad = corpus(seed, bad_low, bad_high)
    rows, strata, weights = stratified(keys, dropped, scores, size, seed)
    names = [f"{row:032x}" for row in rows.tolist()]
    columns = [names, names, dropped[rows], scores[rows], strata.astype(np.int32), weights]
    sample = pa.Table.from_arrays([pa.array(c, f.type) for c, f in zip(columns, SAMPLE, strict=True)], schema=SAMPLE)
    labels: dict[str, Label] = {n: "bad" if bad[r] else "good" for n, r in zip(names, rows.tolist(), strict=True)}
    caught, let, gone = (int(mask.sum()) for mask in (bad & dropped, bad & ~dropped, ~bad & dropped))
    truth = {"precision": caught / dropped.sum(), "missed": let / (let + caught), "lost": gone / (~bad).sum(),
             "price": gone / caught}  # fmt: skip
    return sample, (truth, int(dropped.sum())), labels


def record(dropped: int) -> dict[str, Any]:
    return {"set": "s", "step": 2, "name": "J", "judge": "J()", "dropped": dropped, "kept": ROWS - dropped,
            "limits": [None, 0.8], "score": "x"}  # fmt: skip


@pytest.mark.parametrize(("bad_low", "bad_high"), [(0.02, 0.9), (0.1, 0.6), (0.3, 0.97)])
def test_intervals_cover_the_truth_at_their_rate(bad_low: float, bad_high: float) -> None:
    hits: dict[str, int] = dict.fromkeys(("precision", "missed", "lost", "price"), 0)
    runs = 150
    for seed in range(runs):
        sample, (truth, dropped), labels = audited(seed, bad_low, bad_high)
        found = report(sample, labels, record(dropped), seed=seed)
        for name in hits:
            estimate = getattr(found, name)
            hits[name] += estimate.low - 1e-9 <= truth[name] <= estimate.high + 1e-9
    # 95 % of 150 with three standard errors: 0.897
    assert min(hits.values()) / runs >= 0.897, hits


def test_intervals_are_no_wider_than_they_must_be() -> None:
    sample, (_, dropped), labels = audited(1, 0.1, 0.6, size=400)
    found = report(sample, labels, record(dropped))
    assert found.precision.high - found.precision.low < 0.16  # 4 sqrt(0.6 * 0.4 / 200) = 0.14


def test_the_sample_is_seeded_balanced_and_blind() -> None:
    keys, scores, dropped, _ = corpus(3, 0.1, 0.8)
    rows, strata, weights = stratified(keys, dropped, scores, 50, 7)
    assert len(set(rows.tolist())) == 50 and dropped[rows].sum() == 25
    assert weights[dropped[rows]].sum() == pytest.approx(dropped.sum())
    assert weights[~dropped[rows]].sum() == pytest.approx((~dropped).sum())
    assert np.bincount(strata[dropped[rows]]).tolist() == [5] * 5
    changes = np.count_nonzero(np.diff(dropped[rows].astype(int)))
    assert changes > 10  # sides are mixed
    order = np.random.default_rng(0).permutation(ROWS)
    again = stratified(keys[order], dropped[order], scores[order], 50, 7)
    assert order[again[0]].tolist() == rows.tolist()  # whatever the order of the rows
    assert stratified(keys, dropped, scores, 50, 8)[0].tolist() != rows.tolist()
    few = np.zeros(ROWS, np.bool_)
    few[:3] = True
    assert few[stratified(keys, few, scores, 50, 7)[0]].sum() == 3  # the other side takes the rest


def test_the_threshold_keeps_to_its_budget_of_good_rows() -> None:
    keys, scores, dropped, _ = corpus(5, 0.1, 0.8)
    bad = scores > 0.7  # a perfect limit would be 0.7
    rows, strata, weights = stratified(keys, dropped, scores, 600, 1)
    names = [f"{row:032x}" for row in rows.tolist()]
    sample = pa.table([names, names, dropped[rows], scores[rows], strata.astype(np.int32), weights], names=SAMPLE.names)
    labels: dict[str, Label] = {n: "bad" if bad[r] else "good" for n, r in zip(names, rows.tolist(), strict=True)}
    found = report(sample.cast(SAMPLE), labels, record(int(dropped.sum())), loss_budget=0.0).threshold
    assert found is not None and found["limit"] == "high" and found["now"] == 0.8
    assert 0.68 < found["value"] <= 0.7 and found["loss"]["value"] == 0.0
    loose = report(sample.cast(SAMPLE), labels, record(int(dropped.sum())), loss_budget=0.3).threshold
    assert loose is not None and 0.45 < loose["value"] < 0.53 and loose["loss"]["value"] <= 0.3


def test_a_judge_model_is_corrected_by_its_errors() -> None:
    keys, scores, dropped, bad = corpus(11, 0.15, 0.8)
    rows, strata, weights = stratified(keys, dropped, scores, 1200, 2)
    names = [f"{row:032x}" for row in rows.tolist()]
    sample = pa.table([names, names, dropped[rows], scores[rows], strata.astype(np.int32), weights], names=SAMPLE.names)
    random = np.random.default_rng(0)
    truth: dict[str, Label] = {n: "bad" if bad[r] else "good" for n, r in zip(names, rows.tolist(), strict=True)}
    model: dict[str, Label] = {
        n: ("bad" if random.random() < (0.85 if said == "bad" else 0.2) else "good") for n, said in truth.items()
    }
    precision = bad[dropped].mean()
    naive = report(sample.cast(SAMPLE), model, record(int(dropped.sum())))
    found = corrected(sample.cast(SAMPLE), dict(list(truth.items())[:300]), model, record(int(dropped.sum())))
    assert found.precision.value is not None and naive.precision.value is not None
    assert abs(found.precision.value - precision) < abs(naive.precision.value - precision)
    assert found.precision.low <= precision <= found.precision.high
    assert not naive.precision.low <= precision <= naive.precision.high  # uncorrected it would mislead
    assert found.labeller is not None and found.labeller["calibrated_on"] == 300
    with pytest.raises(HouseError, match="Label more rows by hand"):
        corrected(sample.cast(SAMPLE), {}, model, record(int(dropped.sum())))


def curated(folder: RunFolder, plan: SetPlan) -> None:
    begin(folder, plan)
    for index in range(len(full_steps(plan))):
        advance(folder, plan, index, NoTools(), lambda done, total: None)  # type: ignore[arg-type]


def test_an_audit_of_a_run(folder: RunFolder, write_source: Write, make_row: Make) -> None:
    rows = [make_row("a", i, f"q{i}", " ".join(["word"] * (1 + i % 20))) for i in range(200)]
    write_source("a", rows, part_rows=64)
    curated(folder, SetPlan("s", "sft", ("a",), (ResponseLength(low=6),), 0.0))
    step = find_step(folder, None)
    assert step["name"] == "ResponseLength" and find_step(folder, "ResponseLength")["step"] == step["step"]
    sample = draw_sample(folder, step, 40, seed=1)
    lengths = {row["row_id"]: 1 + row["position"] % 20 for row in rows}
    found = sample.to_pylist()
    assert [row["dropped"] for row in found] == [lengths[row["row_id"]] < 6 for row in found]
    assert [row["score"] for row in found] == [lengths[row["row_id"]] for row in found]
    assert sum(row["dropped"] for row in found) == 20
    assert draw_sample(folder, step, 40, seed=1).equals(sample)
    home = audit_folder(folder, step)
    labels = [
        {"row_id": r["row_id"], "content_id": r["content_id"], "label": "bad" if r["score"] < 4 else "good",
         "who": "ann", "note": None} for r in found
    ]  # fmt: skip
    add_labels(home, labels[:10])
    add_labels(home, labels)
    assert len(read_labels(home)) == 40
    told = report(sample, {i: label["label"] for i, label in read_labels(home).items()}, step)
    assert told.dropped.labelled == 20 and told.missed.value == 0.0 and told.precision.value is not None
    assert told.precision.low <= 0.6 <= told.precision.high  # 30 of the 50 dropped rows have fewer than 4 words
    write_report(home, told)
    assert read_json(home / "report.json")["precision"]["value"] == told.precision.value
    assert json.dumps(plain_report(told), allow_nan=False)
    checked = check_labels(folder, folder).to_pylist()
    assert len(checked) == 40
    assert sum(not row["right"] for row in checked) == sum(4 <= row["score"] < 6 for row in found)


def test_a_judge_that_dropped_nothing_cannot_be_audited(folder: RunFolder, write_source: Write, make_row: Make) -> None:
    write_source("a", [make_row("a", i, f"q{i}", "an answer") for i in range(5)])
    curated(folder, SetPlan("s", "sft", ("a",), (ResponseLength(low=1),), 0.0))
    with pytest.raises(HouseError, match="those that did: none"):
        find_step(folder, "ResponseLength")
