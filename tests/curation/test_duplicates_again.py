"""Deciding again from what a judging kept, against judging the same rows afresh."""

import random
import runpy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from gristmill.curation.folder import HouseError
from gristmill.curation.judges.duplicates import ExactDuplicate, NearDuplicate
from gristmill.curation.measures.length import Length

pytest.importorskip("numba")

Row = dict[str, Any]
SHARED = runpy.run_path(str(Path(__file__).with_name("duplicate_rows.py")))
Live, corpus = SHARED["Live"], SHARED["corpus"]


def values_of(rows: Sequence[Row], seed: int) -> pa.Table:
    rng = random.Random(seed)
    return pa.table({"response_words": pa.array([rng.choice([None, 1, 2, 3, 9]) for _ in rows], pa.int32())})


NEAR = [
    {},
    {"survivor": "longest"},
    {"survivor": "source", "sources": ("c", "a")},
    {"view": "turn"},
    {"view": "prompt", "chars": 4},
    {"view": "response", "floor": 0.5, "threshold": 0.6},
]


@pytest.mark.parametrize("fields", NEAR)
def test_near_duplicates_decided_again_are_those_judged_afresh(fields: dict[str, Any], tmp_path: Path) -> None:
    rows = corpus(len(str(fields)))
    first = NearDuplicate(**fields)
    whole = Live(rows, tmp_path)
    before = first.judge(whole)
    assert 50 < before["keep"].to_pylist().count(False) < len(rows)
    assert first.rejudge(whole, whole.kept, np.ones(len(rows), np.bool_)).equals(before)
    served = 0
    for share in (0.99, 0.9, 0.7):
        for threshold in (first._floor(), 0.8, 1.0):
            came = np.random.default_rng(int(share * 100)).random(len(rows)) < share
            some = [r for r, here in zip(rows, came, strict=True) if here]
            judge = NearDuplicate(**fields | {"threshold": threshold, "floor": first._floor()})
            again = judge.rejudge(Live(some, tmp_path), whole.kept, came)
            if again is not None:
                served += 1
                assert again.equals(judge.judge(Live(some, tmp_path)))
    assert served == 9


def test_a_full_bucket_without_its_first_rows_is_not_guessed(tmp_path: Path) -> None:
    rows = corpus(1, families=5, template=120)
    whole = Live(rows, tmp_path)
    NearDuplicate().judge(whole)
    fates = set()
    for keep in (0.6, 0.3, 0.2, 0.05):
        came = np.random.default_rng(0).random(len(rows)) < keep
        some = [r for r, here in zip(rows, came, strict=True) if here]
        again = NearDuplicate().rejudge(Live(some, tmp_path), whole.kept, came)
        fates.add(again is None)
        assert again is None or again.equals(NearDuplicate().judge(Live(some, tmp_path)))
    assert fates == {True, False}


@pytest.mark.parametrize("view", ["pair", "prompt", "turn"])
def test_exact_duplicates_decided_again(view: Any, tmp_path: Path) -> None:
    rows = corpus(7)
    whole = Live(rows, tmp_path)
    before = ExactDuplicate(view).judge(whole)
    assert 50 < before["keep"].to_pylist().count(False) < len(rows)
    for share in (1.0, 0.5):
        came = np.random.default_rng(3).random(len(rows)) < share
        some = [r for r, here in zip(rows, came, strict=True) if here]
        for survivor in ("first", "longest"):
            judge = ExactDuplicate(view, survivor)
            again = judge.rejudge(Live(some, tmp_path), whole.kept, came)
            assert again is not None and again.equals(judge.judge(Live(some, tmp_path)))


def test_a_measure_chooses_the_survivor_now_and_again(tmp_path: Path) -> None:
    rows = corpus(11)
    values = values_of(rows, 0)
    for kind in (ExactDuplicate, NearDuplicate):
        whole = Live(rows, tmp_path, values)
        judge = kind(survivor="measure", of=Length(), column="response_words", prefer="low")
        assert judge.needs == (Length(),)
        before = judge.judge(whole)
        fate = dict(zip([r["row_id"] for r in rows], before["keep"].to_pylist(), strict=True))
        value = dict(zip(fate, values["response_words"].to_pylist(), strict=True))
        worse = [v or 99 for name, v in value.items() if not fate[name]]
        better = [v or 99 for name, v in value.items() if fate[name]]
        assert np.mean(better) < np.mean(worse)
        came = np.random.default_rng(1).random(len(rows)) < 0.8
        some = [r for r, here in zip(rows, came, strict=True) if here]
        blind = Live(some, tmp_path)
        assert judge.rejudge(blind, whole.kept, came).equals(judge.judge(Live(some, tmp_path, values.filter(came))))
        other = kind(survivor="measure", of=Length(), column="response_chars")
        assert other.rejudge(blind, whole.kept, came) is None
        named = pa.table({"response_chars": values["response_words"]})
        expected = other.judge(Live(some, tmp_path, named.filter(came)))
        assert other.rejudge(Live(some, tmp_path, named.filter(came)), whole.kept, came).equals(expected)


def test_kept_files_of_other_settings_do_not_serve(tmp_path: Path) -> None:
    rows = corpus(2, families=10, template=3)
    whole, all_came = Live(rows, tmp_path), np.ones(len(rows), np.bool_)
    NearDuplicate().judge(whole)
    for fields in ({"threshold": 0.65}, {"ngram": 4}, {"view": "prompt"}, {"seed": 1}, {"chars": 3}, {"floor": 0.6},
                   {"bands": 14, "rows_per_band": 8}):  # fmt: skip
        assert NearDuplicate(**fields).rejudge(whole, whole.kept, all_came) is None
    assert ExactDuplicate().rejudge(whole, whole.kept, all_came) is None
    assert NearDuplicate().rejudge(whole, whole.kept, all_came[1:]) is None
    assert NearDuplicate().rejudge(whole, tmp_path / "nowhere", all_came) is None
    assert NearDuplicate(threshold=0.7).rejudge(whole, whole.kept, all_came) is not None


def test_wrong_rules_are_refused() -> None:
    wrong: list[dict[str, Any]] = [{"survivor": "source"}, {"sources": ("a",)}, {"survivor": "measure"},
        {"of": Length()}, {"survivor": "measure", "of": Length(), "column": "nonsense"}, {"turn_bytes": 0}]  # fmt: skip
    for fields in wrong:
        for kind in (ExactDuplicate, NearDuplicate):
            with pytest.raises(HouseError):
                kind(**fields)
    for more in ({"bands": 20}, {"rows_per_band": 5}, {"floor": 0.8}, {"floor": 0.0}, {"chars": 0}):
        with pytest.raises(HouseError):
            NearDuplicate(**more)
