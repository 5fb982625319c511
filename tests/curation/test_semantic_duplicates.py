"""Semantic duplicates against brute force: the same groups, one survivor each, blind to order, parts and threads."""

import json
import random
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from threadpoolctl import threadpool_limits

from gristmill.curation.duplicates.near_vectors import near_vectors
from gristmill.curation.folder import HouseError
from gristmill.curation.judges.semantic_duplicates import SemanticDuplicate
from gristmill.curation.rows import table
from gristmill.curation.steps import VERDICT

Make = Callable[..., dict[str, Any]]


class Rows:
    """A corpus in parts, each row with its embedding."""

    seed = 0

    def __init__(self, rows: list[dict[str, Any]], vectors: np.ndarray, kept: Path, part: int = 1000) -> None:
        self.all, self.vectors, self.kept, self.part, self.rows = rows, vectors, kept, part, len(rows)

    def progress(self, done: int, total: int) -> None:
        assert 0 <= done <= total

    def tables(self, columns: Sequence[str]) -> Iterator[pa.Table]:
        for start in range(0, len(self.all), self.part):
            yield table(self.all[start : start + self.part]).select(list(columns))

    def values(self, columns: Sequence[str]) -> pa.Table:
        assert list(columns) == ["embedding"]
        halves = self.vectors.astype(np.float16)
        chunks = [
            pa.array(list(halves[s : s + self.part]), pa.list_(pa.float16())) for s in range(0, len(halves), self.part)
        ]
        return pa.table({"embedding": pa.chunked_array(chunks, pa.list_(pa.float16()))})


def unit(vectors: np.ndarray) -> np.ndarray:
    return vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)


def planted(make_row: Make, groups: int = 60, seed: int = 0) -> tuple[list[dict[str, Any]], np.ndarray]:
    """Groups of one to five near vectors each, far from all others; the texts differ in length."""
    draw = np.random.default_rng(seed)
    rows, vectors = [], []
    for group in range(groups):
        centre = draw.normal(size=48)
        for member in range(group % 5 + 1):
            vectors.append(centre + 0.15 * draw.normal(size=48))
            rows.append(make_row("a", len(rows), f"q{group} " + "x" * int(draw.integers(1, 60)), f"r{member}"))
    return rows, unit(np.array(vectors))


def judged(judge: SemanticDuplicate, corpus: Rows) -> list[dict[str, Any]]:
    found = judge.judge(corpus)  # type: ignore[arg-type]
    assert found.schema == VERDICT
    result: list[dict[str, Any]] = found.to_pylist()
    return result


def components(cosines: np.ndarray, threshold: float) -> np.ndarray:
    """Connected components by plain relabelling."""
    label = np.arange(len(cosines))
    while True:
        new = np.array([label[cosines[i] >= threshold].min(initial=label[i]) for i in range(len(cosines))])
        if (new == label).all():
            return label
        label = new


@pytest.mark.parametrize("threshold", [0.75, 0.9, 0.97])
def test_groups_are_those_of_brute_force(make_row: Make, tmp_path: Path, threshold: float) -> None:
    rows, vectors = planted(make_row)
    halves = unit(vectors.astype(np.float16).astype(np.float32))
    cosines = halves @ halves.T
    assert np.abs(cosines - threshold).min() > 1e-6, "no pair on the edge"
    groups = components(cosines, threshold)
    found = judged(SemanticDuplicate("m", threshold=threshold, k=None), Rows(rows, vectors, tmp_path))
    place = {row["row_id"]: index for index, row in enumerate(rows)}
    for group in np.unique(groups):
        members = np.flatnonzero(groups == group)
        kept = [m for m in members if found[m]["keep"]]
        assert len(kept) == 1, "exactly one survivor"
        lengths = [len(rows[m]["messages"][0]["content"]) for m in members]
        assert len(rows[kept[0]]["messages"][0]["content"]) == max(lengths)
    for index, verdict in enumerate(found):
        if verdict["keep"]:
            assert verdict["evidence"] is None
            continue
        proof = json.loads(verdict["evidence"])
        survivor = place[proof["duplicate_of"]]
        assert verdict["reason"] == "semantic_duplicate" and groups[survivor] == groups[index]
        if "via" in proof:
            assert cosines[index, survivor] < threshold <= proof["via_similarity"]
            assert proof["via_similarity"] == pytest.approx(cosines[index, place[proof["via"]]], abs=2e-6)
        else:
            assert (
                proof["similarity"] == pytest.approx(cosines[index, survivor], abs=2e-6)
                and proof["similarity"] >= threshold
            )


def test_clusters_restrict_pairs_and_lose_none_of_tight_groups(make_row: Make, tmp_path: Path) -> None:
    rows, vectors = planted(make_row)
    (tmp_path / "k").mkdir()
    whole = judged(SemanticDuplicate("m", threshold=0.9, k=None), Rows(rows, vectors, tmp_path))
    some = judged(SemanticDuplicate("m", threshold=0.9, k=8), Rows(rows, vectors, tmp_path / "k"))
    assert [v["keep"] for v in some] == [v["keep"] for v in whole]


def test_order_parts_and_threads_do_not_matter(make_row: Make, tmp_path: Path) -> None:
    rows, vectors = planted(make_row, seed=3)
    judge = SemanticDuplicate("m", threshold=0.9, k=6, survivor="farthest")
    first = judged(judge, Rows(rows, vectors, tmp_path))
    order = random.Random(1).sample(range(len(rows)), len(rows))
    (tmp_path / "again").mkdir()
    with threadpool_limits(3):
        again = judged(judge, Rows([rows[i] for i in order], vectors[order], tmp_path / "again", part=7))
    assert named(again, [rows[i] for i in order]) == named(first, rows)


def named(found: list[dict[str, Any]], rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Verdicts by row_id, without the number of the group, which counts in the order of the rows."""
    return {r["row_id"]: (v["keep"], v["score"], _without_cluster(v)) for r, v in zip(rows, found, strict=True)}


def _without_cluster(verdict: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in json.loads(verdict["evidence"] or "{}").items() if key != "cluster"}


@pytest.mark.parametrize("survivor", ["first", "farthest", "nearest"])
def test_survivors(make_row: Make, tmp_path: Path, survivor: Any) -> None:
    rows, vectors = planted(make_row, groups=10)
    halves = unit(vectors.astype(np.float16).astype(np.float32))
    centre = halves.mean(axis=0) / np.linalg.norm(halves.mean(axis=0))
    groups = components(halves @ halves.T, 0.8)
    found = judged(SemanticDuplicate("m", threshold=0.8, k=None, survivor=survivor), Rows(rows, vectors, tmp_path))
    near = halves @ centre
    value = {"first": -np.arange(len(rows)), "farthest": -near, "nearest": near}[survivor]
    for group in np.unique(groups):
        members = np.flatnonzero(groups == group)
        assert found[members[value[members].argmax()]]["keep"]


def test_another_threshold_is_decided_from_what_was_kept(make_row: Make, tmp_path: Path) -> None:
    rows, vectors = planted(make_row)
    SemanticDuplicate("m", threshold=0.9, floor=0.7, k=None).judge(Rows(rows, vectors, tmp_path))  # type: ignore[arg-type]
    (tmp_path / "fresh").mkdir()
    all_came = np.ones(len(rows), np.bool_)
    gone = np.arange(len(rows)) % 7 != 3
    for came in (all_came, gone):
        left = [row for row, here in zip(rows, came, strict=True) if here]
        corpus: Any = Rows(left, vectors[came], tmp_path / "fresh")
        for judge in (SemanticDuplicate("m", threshold=t, floor=0.7, k=None) for t in (0.75, 0.95)):
            again = judge.rejudge(corpus, tmp_path, came)
            assert again is not None and again.equals(judge.judge(corpus))
    fewer: Any = Rows([row for row, here in zip(rows, gone, strict=True) if here], vectors[gone], tmp_path / "fresh")
    clustered = SemanticDuplicate("m", threshold=0.9, floor=0.7, k=5)
    assert clustered.rejudge(fewer, tmp_path, gone) is None, "kept for other clusters"
    clustered.judge(Rows(rows, vectors, tmp_path))  # type: ignore[arg-type]
    assert clustered.rejudge(fewer, tmp_path, gone) is None, "clusters would be others"
    assert clustered.rejudge(Rows(rows, vectors, tmp_path), tmp_path, all_came) is not None  # type: ignore[arg-type]
    assert SemanticDuplicate("m", threshold=0.9, floor=0.8, k=5).rejudge(fewer, tmp_path, gone) is None


def test_equal_vectors_are_one_text_across_clusters_and_zeros_are_near_to_none() -> None:
    draw = np.random.default_rng(0)
    some = unit(draw.normal(size=(50, 16))).astype(np.float32)
    vectors = np.concatenate([some, some, np.zeros((4, 16), np.float32), some[:1]])
    labels = draw.integers(0, 5, len(vectors))
    pairs = near_vectors(vectors, labels, 0.3)
    assert (pairs.group[:50] == pairs.group[50:100]).all() and (pairs.group[100:104] == -1).all()
    assert pairs.group[104] == pairs.group[0] and len(np.unique(pairs.group[:50])) == 50
    text = {int(group): index for index, group in reversed(list(enumerate(pairs.group)))}
    want = {
        (min(a, b), max(a, b))
        for a in text for b in text
        if 0 <= a < b and labels[text[a]] == labels[text[b]] and vectors[text[a]] @ vectors[text[b]] >= 0.3
    }  # fmt: skip
    assert set(zip(pairs.left.tolist(), pairs.right.tolist(), strict=True)) == want and want
    assert (np.diff(pairs.left.astype(np.int64) << 32 | pairs.right) > 0).all()


def test_rows_of_tfidf_that_say_the_same_in_other_words_order_go(make_row: Make, tmp_path: Path) -> None:
    rows = [make_row("a", n, f"name the largest city of country{n} and its river", "x") for n in range(30)]
    rows += [make_row("a", 99, "and its river: name the largest city of country3", "x"), make_row("a", 100, "", "x")]
    found = judged(SemanticDuplicate(threshold=0.98), Rows(rows, np.zeros((0, 1)), tmp_path))
    assert [n for n, verdict in enumerate(found) if not verdict["keep"]] == [3]
    assert json.loads(found[3]["evidence"])["duplicate_of"] == rows[30]["row_id"]


@pytest.mark.parametrize("wrong", [{"threshold": 0}, {"threshold": 1.1}, {"floor": 0.95}, {"k": -1}, {"dims": 0}])
def test_refuses_what_cannot_be_done(wrong: dict[str, Any]) -> None:
    with pytest.raises(HouseError):
        SemanticDuplicate(**wrong)
