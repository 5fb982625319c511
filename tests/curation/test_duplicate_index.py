"""Duplicates against earlier releases on disk, and arrays that spill."""

import errno
import json
import os
import random
import runpy
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gristmill.curation.duplicates import spill
from gristmill.curation.folder import HouseError
from gristmill.curation.judges.duplicates import ExactDuplicate, NearDuplicate

pytest.importorskip("numba")

Row = dict[str, Any]
SHARED = runpy.run_path(str(Path(__file__).with_name("duplicate_rows.py")))
Live, corpus, make, edited, WORDS = (SHARED[name] for name in ("Live", "corpus", "row", "edited", "WORDS"))


def night(judge: Any, rows: Sequence[Row], tmp_path: Path, name: str | None) -> list[Row]:
    home = None if name is None else tmp_path / name / "clean"
    found: list[Row] = judge.judge(Live(rows, tmp_path, home=home)).to_pylist()
    return found


def three_nights(seed: int, copies: int = 120) -> list[list[Row]]:
    """Rows of three nights; of the second and third many are edited copies of rows of any night before or the same."""
    rng = random.Random(seed)
    texts: list[list[str]] = []
    nights = []
    for number in range(3):
        said = [[" ".join(rng.choices(WORDS, k=rng.randint(3, 30))) for _ in range(2)] for _ in range(100)]
        said += [[edited(t, share, rng) for t in rng.choice(texts + said)]
                 for share in rng.choices([0, 0.01, 0.03], k=copies)]  # fmt: skip
        texts += said
        nights.append([make(f"n{number}-{i}", "abc"[number], i, turns) for i, turns in enumerate(said)])
    return nights


@pytest.mark.parametrize("view", ["pair", "turn"])
def test_a_new_row_goes_where_an_earlier_release_kept_one_like_it(view: Any, tmp_path: Path) -> None:
    """Night by night the same rows stay as when all nights are judged as one corpus, oldest first."""
    nights = three_nights(1)
    judge = ExactDuplicate(view, index=str(tmp_path / "index"), turn_bytes=8)
    whole = night(ExactDuplicate(view, turn_bytes=8), [r for rows in nights for r in rows], tmp_path, None)
    stays = {r["row_id"] for r, v in zip((r for rows in nights for r in rows), whole, strict=True) if v["keep"]}
    kept: set[str] = set()
    for number, rows in enumerate(nights):
        found = night(judge, rows, tmp_path, f"night{number}")
        released = 0
        for v in found:
            if not v["keep"]:
                evidence = json.loads(v["evidence"])
                earlier = evidence["duplicate_of"].split("-")[0] != f"n{number}"
                released += earlier
                assert evidence.get("release") == (f"night{evidence['duplicate_of'][1]}/clean" if earlier else None)
                assert not earlier or evidence["duplicate_of"] in kept
        assert released > 20 or not number
        kept |= {r["row_id"] for r, v in zip(rows, found, strict=True) if v["keep"]}
    if view == "pair":
        assert kept == stays


def test_near_rows_of_earlier_releases_by_brute_force(tmp_path: Path) -> None:
    nights = three_nights(2)
    judge = NearDuplicate(index=str(tmp_path / "index"))
    kept: dict[str, set[Any]] = {}
    near_before = 0
    for number, rows in enumerate(nights):
        found = night(judge, rows, tmp_path, f"night{number}")
        sets = {r["row_id"]: shingles(r) for r in rows}
        for r, v in zip(rows, found, strict=True):
            best = max((jaccard(sets[r["row_id"]], other) for other in kept.values()), default=0.0)
            evidence = json.loads(v["evidence"] or "{}")
            if evidence.get("release") and "via" not in evidence:
                assert v["score"] == best == jaccard(sets[r["row_id"]], kept[evidence["duplicate_of"]]) >= 0.7
            assert best < 0.72 or not v["keep"]
            near_before += best >= 0.72
        kept |= {r["row_id"]: sets[r["row_id"]] for r, v in zip(rows, found, strict=True) if v["keep"]}
    assert near_before > 80


def shingles(r: Row) -> set[tuple[str, ...]]:
    said = " ".join(turn["content"] for turn in r["messages"]).split()
    return {tuple(said[i : i + 5]) for i in range(max(1, len(said) - 4))} if said else set()


def jaccard(a: set[Any], b: set[Any]) -> float:
    return len(a & b) / len(a | b)


def test_a_run_done_again_ends_as_it_did(tmp_path: Path) -> None:
    nights = three_nights(3)
    for judge in (NearDuplicate(index=str(tmp_path / "near")), ExactDuplicate(index=str(tmp_path / "exact"))):
        first = [night(judge, rows, tmp_path, f"night{number}") for number, rows in enumerate(nights)]
        assert [night(judge, rows, tmp_path, f"night{number}") for number, rows in enumerate(nights)] == first
        assert night(judge, nights[1], tmp_path, "night1") == first[1]  # not against the third
        preview = night(judge, nights[0], tmp_path, None)  # against all three; adds nothing
        assert sum(v["keep"] for v in preview) < sum(v["keep"] for v in first[0])
        assert night(judge, nights[2], tmp_path, "night2") == first[2]
        all_came = np.ones(len(nights[0]), np.bool_)
        assert judge.rejudge(Live(nights[0], tmp_path), tmp_path, all_came) is None


def test_a_broken_or_foreign_index_is_refused(tmp_path: Path) -> None:
    rows, index = three_nights(4)[0], tmp_path / "index"
    judge = NearDuplicate(index=str(index))
    night(judge, rows, tmp_path, "night0")
    with pytest.raises(HouseError, match="use another folder"):
        night(NearDuplicate(index=str(index), ngram=4), rows, tmp_path, "night1")
    (tmp_path / "elsewhere").mkdir()
    with pytest.raises(HouseError, match="OUT"):
        night(judge, rows, tmp_path / "elsewhere", "night0")
    (index / "night0/clean/hashes.npy").write_bytes(b"short")
    with pytest.raises(HouseError, match="night0"):
        night(judge, rows, tmp_path, "night1")
    shutil.rmtree(index / "night0")
    with pytest.raises(HouseError, match="night0"):
        night(judge, rows, tmp_path, "night1")
    (index / "index.json").write_text("{")
    with pytest.raises(HouseError, match="restore it"):
        night(judge, rows, tmp_path, "night1")
    (index / "index.json").unlink()
    (index / "other").mkdir()
    with pytest.raises(HouseError, match="missing"):
        night(judge, rows, tmp_path, "night1")


@pytest.mark.parametrize("view", ["pair", "turn"])
def test_what_spills_to_disk_is_judged_alike(view: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = corpus(5)
    judge = NearDuplicate(view=view, index=str(tmp_path / "index"))
    expected = judge.judge(Live(rows, tmp_path, home=tmp_path / "a" / "clean"))
    before = {path.name: path.read_bytes() for path in (tmp_path / "index/a/clean").iterdir()}
    monkeypatch.setattr(spill, "LIMIT", 1000)
    live = Live(rows, tmp_path, home=tmp_path / "a" / "clean")
    opened: list[Path] = []
    really = spill._opened
    monkeypatch.setattr(spill, "_opened", lambda path: opened.append(path) or really(path))
    assert judge.judge(live).equals(expected)
    assert len(opened) > 2 and {path.parent for path in opened} == {live.scratch}
    assert {path.suffix for path in live.scratch.iterdir()} == {".parquet"}  # a spilled array has no name to be left
    assert {path.name: path.read_bytes() for path in (tmp_path / "index/a/clean").iterdir()} == before


def test_a_full_disk_says_how_much_is_needed_and_where(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*arguments: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(spill, "LIMIT", 1000)
    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(HouseError, match=r"band-keys.u64 needs at least 0 MB \(No space left"):
        NearDuplicate().judge(Live(corpus(5), tmp_path))
    spool = spill.Spool(tmp_path, "shingles", np.uint64)
    spool.append(np.arange(500, dtype=np.uint64))
    if Path("/dev/full").exists():
        spool.file.close()
        spool.file = Path("/dev/full").open("wb", buffering=0)  # noqa: SIM115
        with pytest.raises(HouseError, match="shingles needs at least"):
            spool.append(np.arange(500, dtype=np.uint64))
