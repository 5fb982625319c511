"""The learned quality filter: scores against plain linear algebra, one model from any order, keyed by its files."""

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from gristmill.curation.cache import measure_key
from gristmill.curation.folder import HouseError, write_parquet
from gristmill.curation.measures.quality_classifier import QualityClassifier
from gristmill.curation.rows import table
from gristmill.curation.selecting.classifier import _matrix, _ngrams, auroc, train

Make = Callable[..., dict[str, Any]]
pytestmark = pytest.mark.filterwarnings("ignore:QualityClassifier:UserWarning", "ignore:t:UserWarning")


def rows_of(make_row: Make, seed: int, size: int = 200) -> tuple[pa.Table, np.ndarray]:
    """Good rows speak of some words more often than bad ones."""
    draw = np.random.default_rng(seed)
    words = np.array([f"w{n}" for n in range(300)])
    weight = np.linspace(1, 3, 300)
    good = np.arange(size) % 2 == 0
    rows = []
    for n in range(size):
        share = weight if good[n] else weight[::-1]
        rows.append(make_row("a", n, "q", " ".join(draw.choice(words, 40, p=share / share.sum()))))
    return table(rows), good


def test_area_is_the_share_of_pairs_in_order() -> None:
    draw = np.random.default_rng(0)
    for _ in range(20):
        truth, scores = draw.random(60) < 0.4, draw.integers(0, 9, 60) / 3
        pairs = scores[truth][:, None] - scores[~truth][None, :]
        assert auroc(truth, scores) == pytest.approx(((pairs > 0) + 0.5 * (pairs == 0)).mean())


def test_scores_are_those_of_the_linear_model(make_row: Make) -> None:
    rows, good = rows_of(make_row, 0)
    with pytest.warns(
        UserWarning, match=r"t: trained on 100 positive and 100 negative rows, cross-validated AUROC 0\.9"
    ):
        model = train(rows, good, "response", 4096, "t")
    fresh, truth = rows_of(make_row, 1)
    found = model.probabilities(fresh, "response")
    logits = _matrix(_ngrams(fresh, "response"), 4096) @ model.weights + model.intercept
    assert np.allclose(found, 1 / (1 + np.exp(-logits)), atol=1e-9)
    assert auroc(truth, found) > 0.9 and abs(model.auroc - auroc(truth, found)) < 0.08
    again = _matrix(_ngrams(fresh, "response"), 4096)
    assert np.allclose(np.asarray(again.sum(axis=1)).ravel(), np.sqrt(40 + 39))  # 79 n-grams, each 1 / sqrt(79)
    silent = table([make_row("a", 0, "q", "…"), make_row("a", 1, "q", "")])
    assert np.isnan(model.probabilities(silent, "response")).all()


def test_the_order_of_rows_changes_nothing(make_row: Make) -> None:
    rows, good = rows_of(make_row, 2)
    order = np.random.default_rng(3).permutation(len(good))
    one = train(rows, good, "pair", 1024, "t")
    other = train(rows.take(pa.array(order)), good[order], "pair", 1024, "t")
    assert (one.weights == other.weights).all() and one.auroc == other.auroc


def test_noise_teaches_nothing(make_row: Make) -> None:
    rows, _ = rows_of(make_row, 4, 400)
    assert 0.35 < train(rows, np.random.default_rng(5).random(400) < 0.5, "pair", 1024, "t").auroc < 0.65


def write(path: Path, rows: list[dict[str, str]]) -> str:
    path.write_text("\n".join(map(json.dumps, rows)))
    return str(path)


def test_learns_from_files_and_is_keyed_by_them(tmp_path: Path, make_row: Make) -> None:
    good = [
        {"instruction": f"Explain item {n}", "output": f"Because the reason {n} is clear and sound."} for n in range(30)
    ]
    bad = [{"instruction": f"Explain item {n}", "output": f"lol dunno {n} whatever"} for n in range(30)]
    paths = [write(tmp_path / f"{name}.jsonl", rows) for name, rows in (("good", good), ("bad", [*bad, good[0]]))]
    measure = QualityClassifier((paths[0],), (paths[1],))
    key = measure_key(measure, None)  # type: ignore[arg-type]
    rows = table(
        [make_row("a", 0, "Explain item x", "Because it is sound and clear."), make_row("a", 1, "?", "lol whatever")]
    )
    with pytest.warns(UserWarning, match="29 positive and 30 negative rows.*1 contents stand on both sides"):
        found = measure.measure(rows, None, lambda done, total: None)  # type: ignore[arg-type]
    assert found["quality_prob"][0].as_py() > 0.6 > 0.4 > found["quality_prob"][1].as_py()
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # trained once
        assert measure.measure(rows, None, lambda done, total: None).equals(found)  # type: ignore[arg-type]
    write(tmp_path / "bad.jsonl", [*bad, {"instruction": "more", "output": "of the same"}])
    assert measure_key(measure, None) != key  # type: ignore[arg-type]
    for wrong in (QualityClassifier((), ()), QualityClassifier((paths[0],), ())):
        with pytest.raises(HouseError):
            wrong.measure(rows, None, lambda done, total: None)  # type: ignore[arg-type]


def test_learns_from_the_labels_of_an_audit(tmp_path: Path, make_row: Make) -> None:
    rows, good = rows_of(make_row, 6, 60)
    write_parquet(tmp_path / "rows" / "a-00000.parquet", rows)
    labels = pa.table({"row_id": rows["row_id"], "content_id": rows["content_id"],
                       "label": ["good" if one else "bad" for one in good]})  # fmt: skip
    write_parquet(tmp_path / "audits" / "s-02-Length" / "labels.parquet", labels)
    fresh, truth = rows_of(make_row, 7)
    measure = QualityClassifier((), (), audits=(str(tmp_path),), view="response")
    found = measure.measure(fresh, None, lambda done, total: None)["quality_prob"].to_numpy()  # type: ignore[arg-type]
    assert auroc(truth, found) > 0.8
    key = measure_key(measure, None)  # type: ignore[arg-type]
    write_parquet(tmp_path / "audits" / "s-03-Other" / "labels.parquet", labels.slice(0, 3))
    assert measure_key(measure, None) != key  # type: ignore[arg-type]
    with pytest.raises(HouseError, match="no labels"):
        QualityClassifier((), (), audits=(str(tmp_path / "none"),)).inputs()


def test_tells_code_from_stories_of_real_sets(data: Path) -> None:
    measure = QualityClassifier(
        (str(data / "gpteacher_roleplay.parquet"),), (str(data / "codealpaca_2k.parquet"),), limit=600
    )
    dolly = pq.read_table(data / "dolly_sample2000.parquet")
    assert dolly.num_rows
    with pytest.warns(UserWarning, match=r"AUROC 0\.99|AUROC 1\.0"):
        measure.measure(table([]), None, lambda done, total: None)  # type: ignore[arg-type]
