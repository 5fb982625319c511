"""Deciding again gives what a run of the changed recipe gives, and says what it cannot know."""

import json
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gristmill.curation.decide import decide
from gristmill.curation.folder import HouseError, RunFolder, write_parquet
from gristmill.curation.judges.duplicates import ExactDuplicate, NearDuplicate
from gristmill.curation.judges.kmeans_quality import KMeansQuality
from gristmill.curation.judges.length import ResponseLength
from gristmill.curation.judges.perplexity import PerplexityQuantile, PerplexityRange
from gristmill.curation.ledger import records
from gristmill.curation.overrides import OVERRIDES
from gristmill.curation.rows import made_row, message, table
from gristmill.curation.sift import SetPlan, advance, begin, full_steps, state_before
from gristmill.curation.steps import Corpus, verdicts
from gristmill.curation.text.view import prompt_of, response_of

Write = Callable[..., list[str]]
Make = Callable[..., dict[str, Any]]


@dataclass
class Tools:
    """A model whose perplexity is a number written in the answer; it counts the rows that it scores."""

    scored: list[int] = field(default_factory=list)

    def digest(self, model: str) -> str:
        return model

    def scorer(self, model: str) -> Any:
        return self

    def response_scores(self, rows: pa.Table, progress: Any = None) -> pa.Table:
        self.scored.append(rows.num_rows)
        nll = pa.array([float(len(response_of(row)) % 7) for row in rows.to_pylist()], pa.float64())
        half = pa.array([0.5] * rows.num_rows, pa.float64())
        return pa.table({"tokens": pa.array([3] * rows.num_rows, pa.int32()), "nll": nll, "mean_prob": half,
                         "min_prob": half})  # fmt: skip


@dataclass(frozen=True)
class Shout:
    """Makes a louder row of each that says `loud`."""

    consumes: ClassVar[str | None] = "rewritten"
    scope: ClassVar[str] = "maker"
    model: ClassVar[None] = None

    def make(self, corpus: Corpus) -> Any:
        for rows in corpus.tables():
            yield table(
                made_row("Shout()", [row["row_id"]], i, "shout",
                         messages=[message("user", prompt_of(row)), message("assistant", response_of(row).upper())])
                for i, row in enumerate(rows.to_pylist())
                if "loud" in response_of(row)
            )  # fmt: skip


def quiet(done: int, total: int) -> None:
    pass


def plan_of(*steps: Any, held_out: float = 0.1) -> SetPlan:
    return SetPlan("sft", "sft", ("a",), steps, held_out)


def run(folder: RunFolder, plan: SetPlan, tools: Any = None) -> None:
    begin(folder, plan)
    for index in range(len(full_steps(plan))):
        advance(folder, plan, index, tools or Tools(), quiet)


def fresh(folder: RunFolder, plan: SetPlan) -> RunFolder:
    """The same rows, curated anew by another plan."""
    other = RunFolder(folder.root.with_name(f"fresh-{len(list(folder.root.parent.iterdir()))}"))
    other.rows.mkdir(parents=True)
    for path in folder.rows.glob("a*"):
        (other.rows / path.name).symlink_to(path)
    if (folder.root / "overrides.parquet").is_file():
        (other.root / "overrides.parquet").symlink_to(folder.root / "overrides.parquet")
    run(other, plan)
    return other


def agree(folder: RunFolder, old: SetPlan, new: SetPlan) -> None:
    """What `decide` says step by step is what a fresh run does."""
    found = decide(folder, old, new, Tools(), quiet)
    other = fresh(folder, new)
    for again, record in zip(found.steps, records(other, "sft"), strict=True):
        told = (again.name, again.came, again.made, again.kept, again.dropped, again.reasons, again.judge)
        assert told == tuple(record[n] for n in ("name", "came", "made", "kept", "dropped", "reasons", "judge"))
        assert again.waiting == 0 and again.seconds is None
    steps = len(full_steps(new))
    was, now = (state_before(f, p, steps).rows for f, p in ((folder, old), (other, new)))
    assert now - was == found.gained - found.lost


def answers(make_row: Make, count: int = 120) -> list[dict[str, Any]]:
    """Answers of 1 to 15 words; every fifth is nearly its predecessor, every ninth exactly an earlier one."""
    rows, random = [], np.random.default_rng(0)
    said: list[str] = []
    for i in range(count):
        words = [f"w{random.integers(400)}" for _ in range(1 + i % 15)]
        if i % 5 == 4:
            words = [*said[-1].split(), "more"]
        if i % 9 == 8:
            words = said[i // 2].split()
        said.append(" ".join(words) + (" loud" if i % 11 == 3 else ""))
        rows.append(make_row("a", i, "the same question" if i % 2 else f"question {i % 60}", said[-1]))
    return rows


BASE = plan_of(
    ResponseLength(low=2, high=14),
    ExactDuplicate(),
    NearDuplicate(threshold=0.7, ngram=2),
    PerplexityRange(model="m", low=1.0, high=6.0),
    PerplexityQuantile(model="m", drop_highest=0.1),
    KMeansQuality(budget=20, k=4, dims=4),
)


def changed(index: int, **values: Any) -> SetPlan:
    steps = list(BASE.steps)
    steps[index] = replace(steps[index], **values)
    return replace(BASE, steps=tuple(steps))


@pytest.mark.parametrize(
    ("index", "values"),
    [
        (0, {"low": 4}), (0, {"high": 9}), (2, {"threshold": 0.5}),
        (3, {"high": 3.0}), (4, {"drop_highest": 0.3}), (4, {"drop_lowest": 0.2}), (5, {"budget": 9}),
        (5, {"budget": 30}), (5, {"temperature": 0.1}), (1, {"survivor": "longest"}),
    ],
)  # fmt: skip
def test_equals_a_fresh_run(
    folder: RunFolder, write_source: Write, make_row: Make, index: int, values: dict[str, Any]
) -> None:
    write_source("a", answers(make_row), part_rows=37)
    run(folder, BASE)
    agree(folder, BASE, changed(index, **values))


def test_nothing_changed_says_what_was(folder: RunFolder, write_source: Write, make_row: Make) -> None:
    write_source("a", answers(make_row), part_rows=50)
    run(folder, BASE)
    found = decide(folder, BASE, BASE, Tools(), quiet)
    assert (found.gained, found.lost, found.waiting) == (0, 0, 0)
    assert [s.kept for s in found.steps] == [r["kept"] for r in records(folder, "sft")]


def test_rows_that_no_model_has_seen_wait_and_are_priced(
    folder: RunFolder, write_source: Write, make_row: Make
) -> None:
    write_source("a", answers(make_row), part_rows=50)
    run(folder, BASE)
    tools = Tools()
    found = decide(folder, BASE, changed(0, low=1, high=99), tools, quiet)
    assert tools.scored == []  # no model is asked
    first = next(step for step in found.steps if step.waiting)
    assert first.name == "PerplexityRange" and first.seconds is not None
    for step in found.steps:
        assert step.came + step.made == step.kept + step.dropped + step.waiting
    waiting = decide(folder, BASE, changed(2, threshold=0.95), tools, quiet)  # fewer duplicates, more to measure
    assert waiting.waiting > 0 and tools.scored == []
    assert next(step for step in waiting.steps if step.waiting).name == "PerplexityRange"


def test_overrides_come_last(folder: RunFolder, write_source: Write, make_row: Make) -> None:
    ids = write_source("a", answers(make_row), part_rows=50)
    content = json.dumps({"messages": [message("user", "q"), message("assistant", "edited by hand")]})
    lines = [(ids[0], "keep", None), (ids[20], "drop", None), (ids[22], "edit", content)]
    rules = [{"row_id": i, "action": action, "content": c, "who": "me", "why": "so"} for i, action, c in lines]
    write_parquet(folder.root / "overrides.parquet", pa.Table.from_pylist(rules, schema=OVERRIDES))
    plan = plan_of(ResponseLength(low=2, high=14), held_out=0.0)
    run(folder, plan)
    agree(folder, plan, plan_of(ResponseLength(low=5, high=14), held_out=0.0))


def test_made_rows_go_with_their_parents(folder: RunFolder, write_source: Write, make_row: Make) -> None:
    write_source("a", answers(make_row), part_rows=50)
    old, new = (plan_of(ResponseLength(low=low), Shout(), ResponseLength(high=13)) for low in (2, 6))
    run(folder, old)
    agree(folder, old, new)
    looser = decide(folder, old, plan_of(ResponseLength(low=1), Shout(), ResponseLength(high=13)), Tools(), quiet)
    assert looser.steps[4].name == "Shout" and looser.steps[4].waiting > 0


@settings(max_examples=15, deadline=None)
@given(
    low=st.integers(1, 10),
    more=st.integers(0, 8),
    near=st.sampled_from([0.5, 0.7, 0.85, 1.0]),
    budget=st.integers(1, 60),
)
def test_any_tighter_recipe_equals_a_fresh_run(
    tmp_path_factory: pytest.TempPathFactory, low: int, more: int, near: float, budget: int
) -> None:
    from tests.conftest import conversation

    folder = RunFolder(tmp_path_factory.mktemp("decide") / "out")
    write_parquet(folder.rows / "a-00000.parquet", table(answers(conversation, 80)))
    record = {"name": "a", "path": "a", "shape": "messages", "licence": "MIT", "digest": "0", "rows": 80,
              "quarantined": 0, "read": 80, "parts": ["a-00000.parquet"]}  # fmt: skip
    (folder.rows / "a.json").write_text(json.dumps(record))
    old = plan_of(ResponseLength(low=1), NearDuplicate(threshold=0.7, ngram=2), KMeansQuality(budget=30, k=3, dims=4))
    run(folder, old)
    new = plan_of(ResponseLength(low=low, high=low + more), NearDuplicate(threshold=near, ngram=2),
                  KMeansQuality(budget=budget, k=3, dims=4))  # fmt: skip
    try:
        fresh(folder, new)
    except HouseError:  # nothing is left: decide says so instead of stopping
        assert decide(folder, old, new, Tools(), quiet).steps[-1].kept == 0
    else:
        agree(folder, old, new)


def test_what_cannot_be_decided_again_is_said(folder: RunFolder, write_source: Write, make_row: Make) -> None:
    write_source("a", answers(make_row), part_rows=50)
    run(folder, BASE)
    with pytest.raises(HouseError, match=r"held_out was 0\.1 and would be 0\.2"):
        decide(folder, BASE, replace(BASE, held_out=0.2), Tools(), quiet)
    with pytest.raises(HouseError, match="steps are not the same"):
        decide(folder, BASE, replace(BASE, steps=BASE.steps[1:]), Tools(), quiet)
    begin(folder, replace(BASE, name="other"))
    with pytest.raises(HouseError, match="is not finished"):
        decide(folder, replace(BASE, name="other"), replace(BASE, name="other"), Tools(), quiet)


@dataclass(frozen=True)
class Shy:
    """Drops long answers and raises on loud ones."""

    most: int
    scope: ClassVar[str] = "row"
    score: ClassVar[None] = None
    needs: ClassVar[tuple[()]] = ()

    def limits(self) -> tuple[float | None, float | None]:
        return None, None

    def judge(self, rows: pa.Table, values: pa.Table) -> pa.Table:
        said = [response_of(row) for row in rows.to_pylist()]
        if any("loud" in text for text in said):
            raise ValueError("too loud")
        return verdicts([len(text) <= self.most for text in said], "long")


def test_a_row_that_raised_stays_dropped_as_such(folder: RunFolder, write_source: Write, make_row: Make) -> None:
    write_source("a", answers(make_row), part_rows=50)
    old = plan_of(Shy(40))
    run(folder, old)
    assert records(folder, "sft")[3]["reasons"]["judge_error"] > 5
    agree(folder, old, plan_of(Shy(60)))
    agree(folder, old, plan_of(Shy(20)))
