"""The engine: verdicts for every row, conservation, errors of single rows, makers, overrides, restarts."""

import json
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from gristmill.curation import sift
from gristmill.curation.folder import HouseError, RunFolder, write_parquet
from gristmill.curation.judges.kmeans_quality import KMeansQuality
from gristmill.curation.ledger import State, ledger_digest, records
from gristmill.curation.overrides import OVERRIDES
from gristmill.curation.rows import made_row, message, table
from gristmill.curation.sift import SetPlan, advance, begin, full_steps, held_out_rows, state_before
from gristmill.curation.steps import Corpus, Measure, verdicts
from gristmill.curation.text.view import prompt_of, response_of, view
from gristmill.flows.run import measured_text

Write = Callable[..., list[str]]
Make = Callable[..., dict[str, Any]]


@dataclass
class NoTools:
    """No models at all."""

    def digest(self, model: str) -> str:
        return "0"


@dataclass(frozen=True)
class Letters:
    """Length of the response in characters; raises on a response that says `boom`."""

    calls: list[int] = field(default_factory=list, repr=False, compare=False)
    version: ClassVar[int] = 1
    columns: ClassVar[dict[str, pa.DataType]] = {"letters": pa.int32()}
    models: ClassVar[tuple[str, ...]] = ()

    def measure(self, rows: pa.Table, tools: Any, progress: Any) -> pa.Table:
        texts = view(rows, "response")
        if "boom" in texts:
            raise ValueError("cannot count boom")
        self.calls.append(len(texts))
        return pa.table({"letters": pa.array([len(text) for text in texts], pa.int32())})


@dataclass(frozen=True)
class Nameless:
    """Letters as a float, NaN for a response that says `nan`."""

    version: ClassVar[int] = 1
    columns: ClassVar[dict[str, pa.DataType]] = {"letters": pa.float64()}
    models: ClassVar[tuple[str, ...]] = ()

    def measure(self, rows: pa.Table, tools: Any, progress: Any) -> pa.Table:
        return pa.table({"letters": [float("nan") if t == "nan" else float(len(t)) for t in view(rows, "response")]})


@dataclass(frozen=True)
class AtLeast:
    low: int = 3
    counter: Any = Letters()
    scope: ClassVar[str] = "row"
    score: ClassVar[str] = "letters"

    @property
    def needs(self) -> tuple[Measure, ...]:
        return (self.counter,)

    def limits(self) -> tuple[float | None, float | None]:
        return self.low, None

    def judge(self, rows: pa.Table, values: pa.Table) -> pa.Table:
        if "bang" in view(rows, "response"):
            raise RuntimeError("no verdict on bang")
        letters = values["letters"].to_pylist()
        return verdicts([n is not None and n >= self.low for n in letters], "too_short", letters)


@dataclass(frozen=True)
class EveryOther:
    scope: ClassVar[str] = "corpus"
    score: ClassVar[None] = None
    needs: ClassVar[tuple[Measure, ...]] = ()

    def limits(self) -> tuple[float | None, float | None]:
        return None, None

    def judge(self, corpus: Corpus) -> pa.Table:
        ids = [i for rows in corpus.tables(["row_id"]) for i in rows["row_id"].to_pylist()]
        return verdicts([i % 2 == 0 for i in range(len(ids))], "odd", evidence=[{"rank": i} for i in range(len(ids))])


@dataclass(frozen=True)
class Shout:
    consumes: ClassVar[str | None] = "rewritten"
    scope: ClassVar[str] = "maker"
    model: ClassVar[None] = None

    def make(self, corpus: Corpus) -> Iterator[pa.Table]:
        for rows in corpus.tables():
            made = [
                made_row(repr(self), [row["row_id"]], i, "shout", messages=_shouted(row))
                for i, row in enumerate(rows.to_pylist())
                if "again" in prompt_of(row)
            ]
            yield table(made)


def _shouted(row: dict[str, Any]) -> list[dict[str, str | None]]:
    return [message("user", prompt_of(row).upper()), message("assistant", response_of(row).upper())]


def quiet(done: int, total: int) -> None:
    pass


def run(folder: RunFolder, plan: SetPlan) -> list[dict[str, Any]]:
    begin(folder, plan)
    return [advance(folder, plan, index, NoTools(), quiet) for index in range(len(full_steps(plan)))]


def plan_of(*steps: Any, held_out: float = 0.0, sources: tuple[str, ...] = ("a",)) -> SetPlan:
    return SetPlan("sft", "sft", sources, steps, held_out)


def rows_of(make_row: Make, responses: list[str | None], source: str = "a") -> list[dict[str, Any]]:
    return [make_row(source, i, f"question {i}?", response) for i, response in enumerate(responses)]


def stored(folder: RunFolder, step: str) -> dict[str, dict[str, Any]]:
    return {v["row_id"]: v for v in pq.read_table(folder.ledger / "sft" / step / "verdicts.parquet").to_pylist()}


def test_every_row_is_kept_or_dropped_with_its_reason(folder: RunFolder, write_source: Write, make_row: Make) -> None:
    ids = write_source("a", rows_of(make_row, ["long enough", "no", "fine too", None, "hi"]), part_rows=2)
    found = run(folder, plan_of(AtLeast()))
    assert [(r["name"], r["came"], r["kept"], r["dropped"]) for r in found] == [
        ("HeldOut", 5, 5, 0), ("Trainable", 5, 4, 1), ("AtLeast", 4, 2, 2), ("Overrides", 2, 2, 0)
    ]  # fmt: skip
    assert found[1]["reasons"] == {"no_assistant_turn": 1} and found[2]["reasons"] == {"too_short": 2}
    assert found[2]["limits"] == [3, None] and found[2]["score"] == "letters"
    dropped = stored(folder, "02-AtLeast")
    assert set(dropped) == {ids[1], ids[4]} and dropped[ids[1]]["score"] == 2.0
    alive = state_before(folder, plan_of(AtLeast()), 4)
    assert [i for t in alive.tables(["row_id"]) for i in t["row_id"].to_pylist()] == [ids[0], ids[2]]


def test_one_row_that_raises_is_dropped_alone_with_its_traceback(
    folder: RunFolder, write_source: Write, make_row: Make
) -> None:
    ids = write_source("a", rows_of(make_row, ["good one", "boom", "good two", "bang", "good three", "x"]))
    found = run(folder, plan_of(AtLeast(counter=Letters())))
    assert found[2]["reasons"] == {"judge_error": 2, "too_short": 1} and found[2]["kept"] == 3
    faults = pq.read_table(folder.quarantine / "sft-02-AtLeast.parquet").to_pylist()
    assert {f["row_id"] for f in faults} == {ids[1], ids[3]}
    assert "cannot count boom" in faults[0]["raw"] and "no verdict on bang" in faults[1]["error"]


def test_a_judge_that_raises_on_every_row_stops_the_run(folder: RunFolder, write_source: Write, make_row: Make) -> None:
    write_source("a", rows_of(make_row, ["bang", "bang"]))
    with pytest.raises(HouseError, match=r"AtLeast raised on every one of 2 rows"):
        run(folder, plan_of(AtLeast(counter=Letters())))


def test_measures_are_taken_once_for_each_content(folder: RunFolder, write_source: Write, make_row: Make) -> None:
    rows = [*rows_of(make_row, ["same", "other"]), make_row("a", 2, "question 0?", "same")]
    write_source("a", rows)
    counter = Letters()
    run(folder, plan_of(AtLeast(counter=counter)))
    assert counter.calls == [2]
    again = RunFolder(folder.root.with_name("next"), cache=folder.root)
    again.rows.parent.mkdir(parents=True)
    again.rows.symlink_to(folder.rows)
    run(again, plan_of(AtLeast(low=5, counter=counter)))
    assert counter.calls == [2]


def test_a_second_run_measures_only_what_is_new(folder: RunFolder, write_source: Write, make_row: Make) -> None:
    rows = rows_of(make_row, ["one", "two two", "three", "three"])
    write_source("a", rows)
    counter = Letters()
    first = run(folder, plan_of(AtLeast(counter=counter)))[2]
    (key,) = first["measures"]
    assert (first["measured"], first["reused"]) == ({key: 4}, {key: 0})
    again = RunFolder(folder.root.with_name("next"), cache=folder.root)
    folder.rows = again.rows
    write_source("a", [*rows, *(make_row("a", 4 + i, f"new {i}?", f"answer {i}") for i in range(3))])
    second = run(again, plan_of(AtLeast(counter=counter)))[2]
    assert (second["measured"], second["reused"], counter.calls) == ({key: 3}, {key: 4}, [4, 3])
    assert measured_text(second) == "  [Letters measured 3 of 7]" and measured_text(first) == ""


def test_values_that_are_no_numbers_are_told_and_kept_apart(
    folder: RunFolder, write_source: Write, make_row: Make
) -> None:
    ids = write_source("a", rows_of(make_row, ["fine answer", "nan", "another"]))
    found = run(folder, plan_of(AtLeast(counter=Nameless())))[2]
    assert found["kept"] == 2 and found["reasons"] == {"too_short": 1}
    assert stored(folder, "02-AtLeast")[ids[1]]["score"] is None
    again = RunFolder(folder.root.with_name("next"), cache=folder.root)
    again.rows.parent.mkdir(parents=True)
    again.rows.symlink_to(folder.rows)
    assert run(again, plan_of(AtLeast(counter=Nameless())))[2]["measured"] == {found["measures"][0]: 0}


def test_a_step_that_keeps_nothing_stops_with_the_step_named(
    folder: RunFolder, write_source: Write, make_row: Make
) -> None:
    write_source("a", rows_of(make_row, ["aa", "bb"]))
    with pytest.raises(HouseError, match=r"(?s)step 2 AtLeast of set sft left no row: 2 came.*too_short 2.*Loosen"):
        run(folder, plan_of(AtLeast(low=9)))
    assert [r["kept"] for r in records(folder, "sft")] == [2, 2, 0]


@dataclass(frozen=True)
class Barren:
    """Makes nothing, and says why."""

    consumes: ClassVar[str | None] = None
    scope: ClassVar[str] = "maker"
    model: ClassVar[None] = None

    def make(self, corpus: Corpus) -> Iterator[pa.Table]:
        warnings.warn("Barren made no row: 3 requests; 3 refused", stacklevel=1)
        return iter(())


def test_a_set_without_rows_says_what_its_makers_lacked(folder: RunFolder, write_source: Write, make_row: Make) -> None:
    write_source("a", rows_of(make_row, ["aa", "bb"]))
    with pytest.raises(HouseError) as caught:
        run(folder, plan_of(Barren(), AtLeast(low=9)))
    assert "! Barren made no row: 3 requests; 3 refused\n" in str(caught.value)
    assert "No maker made a row: mend what is told above" in str(caught.value)
    assert "Loosen" not in str(caught.value)


def test_a_source_left_empty_is_named(folder: RunFolder, write_source: Write, make_row: Make) -> None:
    write_source("a", rows_of(make_row, ["long enough"]))
    write_source("b", rows_of(make_row, ["x"], "b"))
    assert run(folder, plan_of(AtLeast(), sources=("a", "b")))[2]["emptied_sources"] == ["b"]


def test_corpus_judges_keep_their_evidence(folder: RunFolder, write_source: Write, make_row: Make) -> None:
    ids = write_source("a", rows_of(make_row, ["one", "two", "three"]), part_rows=2)
    assert run(folder, plan_of(EveryOther()))[2]["kept"] == 2
    found = stored(folder, "02-EveryOther")
    assert [found[i]["keep"] for i in ids] == [True, False, True]
    assert json.loads(found[ids[2]]["evidence"]) == {"rank": 2}


def test_what_a_step_warns_of_is_in_its_record(folder: RunFolder, write_source: Write, make_row: Make) -> None:
    write_source("a", rows_of(make_row, ["one", "two", "three"]))
    found = run(folder, plan_of(KMeansQuality(budget=9, k=2)))
    assert found[2]["kept"] == 3 and found[2]["notes"] == ["KMeansQuality: budget 9 of 3 rows: all kept"]


def test_makers_add_rows_and_consume_their_parents(folder: RunFolder, write_source: Write, make_row: Make) -> None:
    rows = [make_row("a", 0, "say it", "quietly"), make_row("a", 1, "say it again", "softly")]
    ids = write_source("a", rows)
    found = run(folder, plan_of(Shout()))
    assert (found[1]["came"], found[1]["made"], found[1]["kept"], found[1]["dropped"]) == (2, 1, 2, 1)
    assert stored(folder, "01-Shout")[ids[1]]["reason"] == "rewritten"
    end = state_before(folder, plan_of(Shout()), len(found))
    texts = [response_of(row) for rows in end.tables() for row in rows.to_pylist()]
    assert texts == ["quietly", "SOFTLY"]


def test_held_out_rows_are_whole_prompts_and_made_rows_obey_them(
    folder: RunFolder, write_source: Write, make_row: Make
) -> None:
    rows = [make_row("a", 2 * i + j, f"again {i}", f"answer {i} {j}") for i in range(60) for j in range(2)]
    write_source("a", rows)
    plan = plan_of(Shout(), held_out=0.3)
    found = run(folder, plan)
    held = [prompt_of(r) for t in held_out_rows(folder, plan, len(found), state_before(folder, plan, len(found)))
            for r in t.to_pylist()]  # fmt: skip
    live = [prompt_of(r) for t in state_before(folder, plan, len(found)).tables() for r in t.to_pylist()]
    assert 6 <= len(set(held)) <= 30 and all(held.count(prompt) == 2 for prompt in held)
    assert not {p.lower() for p in held} & {p.lower() for p in live}
    assert all(r["came"] + r["made"] == r["kept"] + r["dropped"] for r in found)


def override(folder: RunFolder, *rules: dict[str, str]) -> None:
    write_parquet(folder.root / "overrides.parquet", pa.Table.from_pylist(list(rules), schema=OVERRIDES))


def test_people_overrule_machines(folder: RunFolder, write_source: Write, make_row: Make) -> None:
    rows = rows_of(make_row, ["long enough", "no", "also long", "third one"])
    ids = write_source("a", rows)
    edit = json.dumps({"messages": [message("user", "q"), message("assistant", "a better answer")]})
    override(
        folder,
        {"row_id": ids[1], "action": "keep", "who": "ann", "why": "short and right"},
        {"content_id": rows[2]["content_id"], "action": "drop", "who": "bob", "why": "wrong"},
        {"row_id": ids[3], "action": "edit", "content": edit, "who": "ann", "why": "typo"},
    )
    last = run(folder, plan_of(AtLeast()))[-1]
    assert (last["came"], last["made"], last["kept"], last["dropped"]) == (3, 2, 3, 2)
    found = stored(folder, "03-Overrides")
    assert found[ids[1]]["keep"] and json.loads(found[ids[1]]["evidence"])["who"] == "ann"
    assert found[ids[2]]["reason"] == "override_drop" and found[ids[3]]["reason"] == "rewritten"
    end = [r for t in state_before(folder, plan_of(AtLeast()), 4).tables() for r in t.to_pylist()]
    assert [response_of(r) for r in end] == ["long enough", "no", "a better answer"]
    assert end[2]["parents"] == [ids[3]]


def test_new_overrides_make_only_the_last_step_again(folder: RunFolder, write_source: Write, make_row: Make) -> None:
    ids = write_source("a", rows_of(make_row, ["long enough", "also long"]))
    run(folder, plan_of(AtLeast()))
    override(folder, {"row_id": ids[0], "action": "drop", "who": "ann", "why": "wrong"})
    found = run(folder, plan_of(AtLeast()))
    assert [r["cached"] for r in found] == [True, True, True, False] and found[-1]["kept"] == 1


@pytest.mark.parametrize(
    ("rule", "says"),
    [
        ({"row_id": "x", "action": "burn"}, "row 1: needs one of row_id and content_id"),
        ({"action": "drop"}, "row 1: needs one of row_id and content_id"),
        ({"row_id": "x", "action": "edit", "content": "{"}, "content is not JSON"),
        ({"row_id": "x", "action": "edit", "content": '{"colour": 1}'}, "fields of"),
    ],
)
def test_a_malformed_override_is_named(
    folder: RunFolder, write_source: Write, make_row: Make, rule: dict[str, str], says: str
) -> None:
    write_source("a", rows_of(make_row, ["fine"]))
    override(folder, rule)
    with pytest.raises(HouseError, match=says):
        run(folder, plan_of())


def test_lost_rows_stop_the_run(
    folder: RunFolder, write_source: Write, make_row: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_source("a", rows_of(make_row, ["one", "two"]))

    def lossy(step: Any, live: sift.LiveRows, write: Any) -> Any:
        return np.concatenate([judge(step, live, write)[:-1], [False]])

    judge = sift._judge
    monkeypatch.setattr(sift, "_judge", lossy)
    with pytest.raises(HouseError, match=r"step 0 HeldOut of set sft does not conserve rows: came 2 \+ made 0"):
        run(folder, plan_of())
    assert records(folder, "sft") == []


def test_a_killed_step_is_done_again_to_the_same_bytes(
    folder: RunFolder, write_source: Write, make_row: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [make_row("a", i, f"again {i % 7}", "word " * (i % 5)) for i in range(40)]
    write_source("a", rows, part_rows=9)
    plan = plan_of(Shout(), AtLeast(), EveryOther(), held_out=0.2)
    run(folder, plan)
    whole = ledger_digest(folder, "sft")
    made = [path.read_bytes() for path in sorted(folder.rows.glob("made-*"))]

    def interrupted(path: Any, alive: Any) -> None:
        raise KeyboardInterrupt

    for index in range(len(full_steps(plan))):
        for later in sorted((folder.ledger / "sft").glob("[0-9]*"))[index:]:
            if later.is_dir():
                (later / "step.json").unlink()
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(sift, "save_alive", interrupted)
            run(folder, plan)
        assert len(records(folder, "sft")) == index
        torn = folder.ledger / "sft" / f".{index:02d}-Torn.x.tmp"  # as a SIGKILL leaves it, all but moved into place
        torn.mkdir()
        (torn / "step.json").write_text("{}")
        run(folder, plan)
        assert ledger_digest(folder, "sft") == whole
        assert [path.read_bytes() for path in sorted(folder.rows.glob("made-*"))] == made


def test_state_is_independent_of_part_size(folder: RunFolder, write_source: Write, make_row: Make) -> None:
    rows = rows_of(make_row, [("word " * (i % 4)).strip() for i in range(30)])
    verdict_sets = []
    for size in (7, 50_000):
        other = RunFolder(folder.root / str(size))
        folder.rows = other.rows
        write_source("a", rows, part_rows=size)
        run(other, plan_of(AtLeast(), EveryOther()))
        verdict_sets.append([stored(other, name) for name in ("02-AtLeast", "03-EveryOther")])
    assert verdict_sets[0] == verdict_sets[1]
    assert isinstance(state_before(other, plan_of(AtLeast(), EveryOther()), 2), State)


@dataclass(frozen=True)
class Copy(Shout):
    """Makes a row of each row that was read, which stays."""

    consumes: ClassVar[str | None] = None

    def make(self, corpus: Corpus) -> Iterator[pa.Table]:
        for rows in corpus.tables():
            yield table(
                made_row(repr(self), [row["row_id"]], 0, "copy", messages=_shouted(row))
                for row in rows.to_pylist()
                if row["maker"] is None
            )


def test_the_same_maker_twice_gives_rows_of_their_own(folder: RunFolder, write_source: Write, make_row: Make) -> None:
    write_source("a", rows_of(make_row, ["one", "two"]))
    run(folder, plan_of(Copy(), Copy()))
    ids = [
        i for t in state_before(folder, plan_of(Copy(), Copy()), 5).tables(["row_id"]) for i in t["row_id"].to_pylist()
    ]
    assert len(ids) == 6 == len(set(ids))
