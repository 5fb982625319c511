"""`funnel` adds up or says where it does not; `why` has an answer for every row."""

import io
import json
import runpy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from rich.console import Console

from gristmill.curation import look, views
from gristmill.curation.folder import HouseError, RunFolder, read_json, write_json

write_run = runpy.run_path(str(Path(__file__).with_name("fake_run.py")))["write_run"]


@pytest.fixture(scope="module")
def fake(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return write_run(tmp_path_factory.mktemp("run"))


def screen() -> Console:
    return Console(file=io.StringIO(), width=200, force_terminal=False)


def shown(console: Console) -> str:
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_funnel_is_the_ledgers_and_adds_up(fake: Any) -> None:
    found = look.funnel(fake.folder)
    assert found.faults == ()
    for one in found.sets:
        assert [step["step"] for step in one.steps] == list(range(len(one.steps)))
        for step in one.steps:
            log = fake.log[one.name, step["step"]].values()
            assert step["came"] + step["made"] == len(log)
            assert step["kept"] == sum(keep for keep, *_ in log)
        assert one.curated == {"train": one.steps[-1]["kept"], "test": one.held_out}


def test_funnel_on_the_screen(fake: Any) -> None:
    console = screen()
    look.print_funnel(fake.folder, console)
    text = shown(console)
    assert "read 384 = rows 380 + quarantined 4" in text
    assert "in all 10 steps" in text and "NOT CONSERVED" not in text
    assert "near_duplicate 22" in text and "219 rows in split train and 33 rows in split test" in text


@pytest.mark.parametrize(
    ("path", "change", "fault"),
    [
        ("ledger/sft/02-Decontaminate/step.json", {"kept": 250}, "is not kept 250"),
        ("ledger/sft/03-ResponseLength/step.json", {"came": 300, "dropped": 69}, "300 came, but 257 were left"),
        ("rows/alpaca.json", {"read": 999}, "read 999 is not rows 240"),
    ],
)
def test_a_loss_is_named(tmp_path: Path, path: str, change: dict[str, int], fault: str) -> None:
    fake = write_run(tmp_path)
    write_json(tmp_path / path, read_json(tmp_path / path) | change)
    assert any(fault in one for one in look.funnel(fake.folder).faults)
    console = screen()
    look.print_funnel(fake.folder, console)
    assert "NOT CONSERVED" in shown(console) and "accounted for" not in shown(console)


def test_funnel_of_an_unfinished_run(tmp_path: Path) -> None:
    fake = write_run(tmp_path)
    (tmp_path / "ledger/sft/05-PerplexityRange/step.json").unlink()
    (tmp_path / "ledger/sft/06-Overrides/step.json").unlink()
    (tmp_path / "curated/sft/manifest.json").unlink()
    console = screen()
    look.print_funnel(fake.folder, console)
    assert "not finished: 5 of 7 steps are done" in shown(console) and "NOT CONSERVED" not in shown(console)
    look.print_funnel(RunFolder(tmp_path / "ledger"), console)
    assert "holds no rows yet" in shown(console)


def test_every_row_has_an_answer(fake: Any) -> None:
    _, lost = views.query(fake.folder, "select row_id from rows where row_id not in (select row_id from verdicts)")
    assert lost == []
    with views.connect(fake.folder) as con:
        for row in fake.rows[::12]:
            found = look.life(con, fake.folder, row["row_id"])
            expected = {key: log[row["row_id"]] for key, log in fake.log.items() if row["row_id"] in log}
            assert {(v.set, v.step): (v.keep, v.reason) for v in found.verdicts} == {
                k: f[:2] for k, f in expected.items()
            }
            last = found.verdicts[-1]
            assert bool(found.curated) == (last.keep or last.reason == "held_out")


def test_duplicate_stands_beside_its_original(fake: Any) -> None:
    last = look.why(fake.folder, fake.by_name["duplicate"]).verdicts[-1]
    assert (last.keep, last.reason, last.score) == (False, "near_duplicate", 0.81)
    original = next(row for row in fake.rows if row["row_id"] == fake.by_name["original"])
    line = next(line for line in last.proof() if line.startswith("duplicate of"))
    assert fake.by_name["original"] in line and original["messages"][0]["content"] in line
    assert last.sentence() == "dropped: near_duplicate; score 0.81, kept up to 0.75"


def test_score_and_threshold_in_words(fake: Any) -> None:
    first = next(v for v in look.why(fake.folder, fake.by_name["too_high"]).verdicts if not v.keep)
    assert first.sentence().startswith("dropped: perplexity_high; perplexity ")
    assert first.sentence().endswith("kept from 6 to 190")
    kept = next(v for v in look.why(fake.folder, fake.by_name["kept"]).verdicts if v.name == "PerplexityRange")
    assert kept.keep and kept.score is not None and "kept; perplexity" in kept.sentence()


def test_matched_text_is_shown(fake: Any) -> None:
    last = look.why(fake.folder, fake.by_name["contaminated"]).verdicts[-1]
    assert "ngram: natalia sold clips to 48 of her friends" in last.proof()
    assert "benchmark: gsm8k_test" in last.proof()


def test_made_row_and_its_parent_know_each_other(fake: Any) -> None:
    child = look.why(fake.folder, fake.by_name["made"])
    assert child.source is None and [p.row_id for p in child.parents] == [fake.by_name["rewritten"]]
    parent = look.why(fake.folder, fake.by_name["rewritten"])
    assert [c.row_id for c in parent.children] == [fake.by_name["made"]]
    assert parent.verdicts[-1].reason == "rewritten"
    assert parent.source is not None and parent.source["name"] == "alpaca"


def test_override_comes_after_the_drop_it_undoes(fake: Any) -> None:
    found = look.why(fake.folder, fake.by_name["short"])
    assert [(v.name, v.keep) for v in found.verdicts][-2:] == [("ResponseLength", False), ("Overrides", True)]
    assert found.verdicts[-1].evidence["who"] == "ada"
    assert found.curated[0][:2] == ("sft", "train")


def test_training_of_a_row(fake: Any) -> None:
    (one,) = look.why(fake.folder, fake.by_name["kept"]).trained
    losses = pq.read_table(fake.folder.stage("sft") / "row_losses" / "train.parquet").to_pylist()
    expected = next(row for row in losses if row["row_id"] == fake.by_name["kept"])
    assert one["stage"] == "sft" and one["steps"] == [40] and one["losses"]["loss"] == expected["loss"]
    excluded = pq.read_table(fake.folder.stage("sft") / "excluded.parquet")["row_id"][0].as_py()
    assert {"stage": "sft", "excluded": "too_long"} in look.why(fake.folder, excluded).trained


def test_traceback_of_a_judge_error(fake: Any) -> None:
    found = look.why(fake.folder, fake.by_name["judge_error"])
    assert found.faults[0]["error"] == "ValueError: no tokens" and "Traceback" in found.faults[0]["raw"]


def test_prefixes_and_unknown_ids(fake: Any) -> None:
    full = fake.by_name["kept"]
    assert look.why(fake.folder, full[:16]).row["row_id"] == full
    with pytest.raises(HouseError, match="several rows begin with"):
        look.why(fake.folder, next(a for a in "0123456789abcdef" if sum(r["row_id"][0] == a for r in fake.rows) > 1))
    for unknown in ("zz", "", "%", "' or 1=1 --"):
        with pytest.raises(HouseError, match="no row has the id"):
            look.why(fake.folder, unknown)


def test_row_text_cannot_drive_the_terminal(tmp_path: Path) -> None:
    fake = write_run(tmp_path)
    part = fake.folder.rows / "alpaca-00000.parquet"
    rows = pq.read_table(part)
    first = rows.slice(0, 1).to_pylist()[0]
    first["messages"][0]["content"] = "\x1b[2J\x1b]0;owned\x07 [bold red]not markup[/] \x9b31m"
    pq.write_table(__import__("pyarrow").Table.from_pylist([first], schema=rows.schema), part)
    console = Console(file=io.StringIO(), width=200, force_terminal=True)
    look.print_why(fake.folder, first["row_id"], console)
    look.print_query(
        fake.folder, f"select messages[1].content as c from rows where row_id = '{first['row_id']}'", console
    )
    assert "\x1b[2J" not in shown(console) and "\x07" not in shown(console) and "\x9b" not in shown(console)
    assert shown(console).count("[bold red]not markup[/]") == 2


def test_a_terminal_obeys_no_row() -> None:
    said = "a\tb\n\x1b[31mc\x00\x7f\x9b \u202edesrever\u2066 é 日 \U0001f600"
    assert look.plain(said) == "a\tb\n·[31mc··· ·desrever· é 日 \U0001f600"


def test_a_row_made_from_nothing_says_so(fake: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    made = look.why(fake.folder, fake.by_name["made"])
    lone = replace(made, row=dict(made.row) | {"parents": []}, parents=())
    monkeypatch.setattr(look, "life", lambda *_: lone)
    console = screen()
    look.print_why(fake.folder, fake.by_name["made"], console)
    assert "no row: its maker begins with what the model says" in shown(console)


def test_printed_life_and_query(fake: Any) -> None:
    console = screen()
    look.print_why(fake.folder, fake.by_name["short"], console)
    look.print_why(fake.folder, fake.by_name["made"], console)
    look.print_query(fake.folder, "select 1 as one, null as two, 'x' as three", console)
    look.print_query(fake.folder, "select range as number from range(1500)", console)
    text = shown(console)
    for piece in (
        "dropped: length_low",
        "override_keep",
        "curated: split train",
        "made by Rewrite",
        "trained in step",
        "null",
    ):
        assert piece in text
    assert "only the first 1,000 rows" in text and " 1000" not in text.split("number")[1].split("only")[0]
    assert json.dumps("x") not in text
