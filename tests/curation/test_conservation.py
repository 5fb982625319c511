"""Conservation under random recipes: whatever steps are strung together, no row is lost and none counted twice."""

import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gristmill.curation import blocks
from gristmill.curation import pool as pools
from gristmill.curation.folder import HouseError, RunFolder, read_json, write_json, write_parquet
from gristmill.curation.judges.length import ResponseLength
from gristmill.curation.judges.refusal import Refusal
from gristmill.curation.ledger import ledger_digest
from gristmill.curation.measures.length import Length
from gristmill.curation.pool import INLINE, Pool, pool
from gristmill.curation.rows import digest, made_row, message, table
from gristmill.curation.sift import SetPlan, advance, begin, full_steps, state_before, step_name
from gristmill.curation.steps import Corpus, Measure, verdicts
from gristmill.curation.text.view import response_of, view

Make = Callable[..., dict[str, Any]]
WORDS = ["rain", "falls", "again", "boom", "bang", "slow", "light", "I'm sorry, but I cannot help with that."]


class NoTools:
    def digest(self, model: str) -> str:
        return "0"


@dataclass(frozen=True)
class Fussy:
    """Drops a share of the rows by a hash, raises on those that say `bang`, and by measure on those that say `boom`."""

    share: float
    counter: Any = field(default_factory=lambda: Moody())
    scope: ClassVar[str] = "row"
    score: ClassVar[str] = "letters"

    @property
    def needs(self) -> tuple[Measure, ...]:
        return (self.counter, Length())

    def limits(self) -> tuple[float | None, float | None]:
        return None, None

    def judge(self, rows: pa.Table, values: pa.Table) -> pa.Table:
        if any("bang" in text for text in view(rows, "response")):
            raise RuntimeError("no verdict on bang")
        keep = [int(digest(row_id)[:4], 16) >= self.share * 16**4 for row_id in rows["row_id"].to_pylist()]
        return verdicts(keep, "unlucky", values["letters"].to_pylist())


@dataclass(frozen=True)
class Moody:
    """Letters of the response; NaN for short ones; raises on `boom`."""

    version: ClassVar[int] = 1
    columns: ClassVar[dict[str, pa.DataType]] = {"letters": pa.float64()}
    models: ClassVar[tuple[str, ...]] = ()

    def measure(self, rows: pa.Table, tools: Any, progress: Any) -> pa.Table:
        texts = view(rows, "response")
        if any("boom" in text for text in texts):
            raise ValueError("cannot count boom")
        return pa.table({"letters": [float("nan") if len(text) < 5 else float(len(text)) for text in texts]})


@dataclass(frozen=True)
class Scored:
    """A corpus judge over a measure: drops what has no score, and the lowest share of the rest."""

    share: float
    scope: ClassVar[str] = "corpus"
    score: ClassVar[str] = "letters"
    needs: ClassVar[tuple[Measure, ...]] = (Moody(),)

    def limits(self) -> tuple[float | None, float | None]:
        return None, None

    def judge(self, corpus: Corpus) -> pa.Table:
        score = np.asarray(corpus.values(["letters"])["letters"], np.float64)
        known = ~np.isnan(score)
        low = np.quantile(score[known], self.share) if known.any() else 0.0
        keep = known & (score >= low)
        return verdicts(list(keep), ["not_scorable" if not k else "low" for k in known], list(score))


@dataclass(frozen=True)
class Echo:
    """Makes a row of some rows, and takes its parents away or leaves them."""

    share: float
    consumes: str | None
    scope: ClassVar[str] = "maker"
    model: ClassVar[None] = None

    def make(self, corpus: Corpus) -> Iterator[pa.Table]:
        for rows in corpus.tables():
            made = []
            for index, row in enumerate(rows.to_pylist()):
                if int(digest("echo", row["row_id"])[:4], 16) < self.share * 16**4:
                    said = [message("user", f"say {index % 3}"), message("assistant", response_of(row) or None)]
                    made.append(made_row(repr(self), [row["row_id"]], index, "echo", messages=said))
            yield table(made)


SHARES = st.sampled_from([0.0, 0.2, 0.6])
STEPS = st.one_of(
    st.builds(Fussy, SHARES),
    st.builds(Scored, SHARES),
    st.builds(Echo, SHARES, st.sampled_from([None, "rewritten"])),
    st.builds(ResponseLength, st.integers(0, 3), st.integers(4, 40)),
    st.builds(Refusal),
)


@pytest.fixture(scope="module")
def two() -> Iterator[Pool]:
    with pool(2, "threads") as crew:
        yield crew


@pytest.mark.parametrize("part_rows", [7, 50])
@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_every_row_has_exactly_one_fate_at_each_step(
    part_rows: int, data: st.DataObject, two: Pool, make_row: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pools, "SMALL", 0)
    monkeypatch.setattr(blocks, "BLOCK_ROWS", 11)
    said = data.draw(st.lists(st.lists(st.sampled_from(WORDS), max_size=5), min_size=1, max_size=30))
    steps = tuple(data.draw(st.lists(STEPS, min_size=1, max_size=4)))
    plan = SetPlan("sft", "sft", ("a",), steps, data.draw(SHARES) / 2, 3)
    rows = [make_row("a", i, f"question {i % 9}", " ".join(words)) for i, words in enumerate(said)]
    with tempfile.TemporaryDirectory() as scratch:
        ends = [_run(RunFolder(Path(scratch) / name), plan, rows, part_rows, crew) for name, crew in
                (("one", INLINE), ("two", two))]  # fmt: skip
        assert ends[0] == ends[1]


def _run(folder: RunFolder, plan: SetPlan, rows: list[dict[str, Any]], part_rows: int, crew: Pool) -> tuple[str, str]:
    """Runs the plan, holds each finished step to the rule, and gives the ledger's digest and how the run ended."""
    parts = []
    for start in range(0, len(rows), part_rows):
        parts.append(f"a-{len(parts):05d}.parquet")
        write_parquet(folder.rows / parts[-1], table(rows[start : start + part_rows]))
    write_json(folder.rows / "a.json", {"name": "a", "rows": len(rows), "parts": parts})
    begin(folder, plan)
    end = ""
    for index, step in enumerate(full_steps(plan)):
        try:
            advance(folder, plan, index, NoTools(), lambda done, total: None, crew)  # type: ignore[arg-type]
        except HouseError as error:
            end = str(error).replace(str(folder.root), "")
        home = folder.ledger / plan.name / step_name(index, step)
        if (home / "step.json").is_file():
            _check(folder, plan, index, read_json(home / "step.json"), home)
        if end:
            break
    return ledger_digest(folder, plan.name), end


def _check(folder: RunFolder, plan: SetPlan, index: int, record: dict[str, Any], home: Path) -> None:
    assert record["came"] + record["made"] == record["kept"] + record["dropped"]
    before = _ids(folder, plan, index)
    after = _ids(folder, plan, index + 1)
    made = [i for part in record["made_parts"] for i in pq.read_table(folder.rows / part)["row_id"].to_pylist()]
    found = pq.read_table(home / "verdicts.parquet")
    assert len(before) == len(set(before)) == record["came"] and len(after) == len(set(after)) == record["kept"]
    judged = found["row_id"].to_pylist()
    assert len(judged) == len(set(judged)) and set(judged) <= {*before, *made}
    dropped = {row_id for row_id, keep in zip(judged, found["keep"].to_pylist(), strict=True) if not keep}
    assert {*before, *made} - dropped == set(after) and not dropped & set(after)
    assert len(dropped) == record["dropped"] == sum(record["reasons"].values())
    assert all(
        reason for reason, keep in zip(found["reason"].to_pylist(), found["keep"].to_pylist(), strict=True) if not keep
    )


def _ids(folder: RunFolder, plan: SetPlan, index: int) -> list[str]:
    return [i for rows in state_before(folder, plan, index).tables(["row_id"]) for i in rows["row_id"].to_pylist()]
