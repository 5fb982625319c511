"""What is told of makers adds up: requests, rows, costs; in the report, the funnel, the life of a row and SQL."""

import io
import json
import runpy
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest
from rich.console import Console

from gristmill.curation import look, views
from gristmill.curation.accounts import accounts, faults
from gristmill.curation.door import ChatAnswer, ChatError, ChatRequest, Sampling
from gristmill.curation.folder import RunFolder, read_json, write_json
from gristmill.curation.judges.length import ResponseLength
from gristmill.curation.judges.maker_quota import MakerQuota
from gristmill.curation.preferring import Question, sampled, samples
from gristmill.curation.rows import message, table
from gristmill.curation.sift import SetPlan, advance, begin, full_steps
from gristmill.curation.synthesis import Session, asking
from gristmill.curation.verifiers.judge import JudgedRight
from gristmill.flows.report import write_report

FAKE = runpy.run_path(str(Path(__file__).parents[1] / "curation" / "fake_run.py"))


@dataclass(frozen=True)
class Echo:
    """Asks once for every live row; says what came as a new row."""

    model: str = "m"
    scope: ClassVar[str] = "maker"
    consumes: ClassVar[str | None] = None

    def make(self, corpus: Any) -> Any:
        with Session(self, corpus, self.model, "echo") as session:
            rows = [row for part in corpus.tables() for row in part.to_pylist()]
            asks = [asking(None, (("user", row["messages"][0]["content"]),), Sampling(), (n,), (row["row_id"],), row)
                    for n, row in enumerate(rows)]  # fmt: skip
            made = []
            for ask, answer in session.ask(asks):
                if answer.text == "?":
                    session.unparsed("no_text")
                    continue
                session.tally.parsed += 1
                if answer.text == "wrong":
                    session.refused("wrong")
                    continue
                session.tally.verified += 1
                turns = [ask.about["messages"][0], message("assistant", answer.text)]
                made.append(session.row(ask, answer, messages=turns))
            if made:
                yield table(made)


@dataclass(frozen=True)
class Judged(Echo):
    """Asks as Echo does; a row is what a judge finds right."""

    def make(self, corpus: Any) -> Any:
        with Session(self, corpus, self.model, "judged") as session:
            rows = [row for part in corpus.tables() for row in part.to_pylist()]
            asked = [Question(row["row_id"], tuple(row["messages"][:1]), "yes") for row in rows]
            made = []
            for said, finding in sampled(session, samples(asked, 1, Sampling(), 0), JudgedRight("judge")):
                if finding.right:
                    turns = [*said.ask.about.prompt, message("assistant", said.text)]
                    made.append(session.row(said.ask, said.answer, messages=turns))
                else:
                    session.refused("undecided" if finding.right is None else "wrong")
            yield table(made)


class Door:
    """Answers by the prompt's last digit: 0 fails, 1 cannot be read, 2 is wrong, 3 is long, the rest are good."""

    name, digest, licence, price = "door", "d" * 32, "CC0", (1000.0, 2000.0)

    def __init__(self, asked: list[str] | None = None) -> None:
        self.asked: list[str] = [] if asked is None else asked  # by whom, one a request

    def complete(self, requests: Sequence[ChatRequest], progress: Any = None) -> list[ChatAnswer | ChatError]:
        self.asked += [self.name] * len(requests)
        return [self.answer(request.messages[-1][1]) for request in requests]

    def answer(self, said: str) -> ChatAnswer | ChatError:
        kind = int(said[-1])
        if kind == 0:
            return ChatError("timeout", "60 s")
        text = {1: "?", 2: "wrong", 3: "word " * 50}.get(kind, f"answer to {said}")
        return ChatAnswer(text, 10, 5, True, cached=kind == 9)

    def chat(self, model: str) -> "Door":
        return Judge(self.asked) if model == "judge" else self


class Judge(Door):
    """Fails of one question, is not sure of another, cannot be read of a third, finds the rest right."""

    name, price = "big <judge>", (10.0, 20.0)

    def answer(self, said: str) -> ChatAnswer | ChatError:
        if "number 14" in said:
            return ChatError("server", "500")
        text = "Hm." if "number 15" in said else "Verdict: unsure" if "number 16" in said else "Verdict: yes"
        return ChatAnswer(text, 40, 4, True)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    """A set of 40 rows of which a maker makes 28; a judge drops four of these, a quota eight."""
    folder = RunFolder(tmp_path_factory.mktemp("makers"))
    with pytest.warns(UserWarning, match="4 timeout of 40"):
        for note in sifted(folder, 40, (Echo(), ResponseLength(low=1, high=20), MakerQuota({"Echo": 16})), Door()):
            warnings.warn(note, stacklevel=1)
    return folder


def sifted(folder: RunFolder, size: int, steps: Sequence[Any], door: "Door") -> list[str]:
    """Runs the steps over `size` rows; the notes of all."""
    conftest = runpy.run_path(str(Path(__file__).parents[1] / "conftest.py"))
    rows = [conftest["conversation"]("s", n, f"question number {n}", "yes") for n in range(size)]
    from gristmill.curation.folder import write_parquet

    write_parquet(folder.rows / "s-00000.parquet", table(rows))
    record = {"name": "s", "path": "s.jsonl", "shape": "messages", "licence": "MIT", "digest": "0" * 64}
    write_json(
        folder.rows / "s.json", record | {"rows": size, "quarantined": 0, "read": size, "parts": ["s-00000.parquet"]}
    )
    plan = SetPlan("t", "sft", ("s",), tuple(steps), held_out=0.0)
    begin(folder, plan)
    notes: list[str] = []
    for index in range(len(full_steps(plan))):
        notes += advance(folder, plan, index, door, lambda done, total: None)["notes"]  # type: ignore[arg-type]
    return notes


def test_requests_and_rows_add_up(run: RunFolder) -> None:
    with views.connect(run) as con:
        (one,) = accounts(con, run)
    assert (one.asked, one.answered, one.parsed, one.verified) == (40, 36, 32, 28)
    assert (one.failed, one.unparsed, one.refused) == ({"timeout": 4}, {"no_text": 4}, {"wrong": 4})
    assert (one.made, one.kept, one.held_out) == (28, 16, 0)
    assert one.dropped == {("MakerQuota", "over_quota"): 8, ("ResponseLength", "too_long"): 4}
    assert faults(run, [one]) == [] and look.funnel(run).faults == ()
    assert (one.prompt_tokens, one.tokens, one.cached) == (360, 180, 4)
    assert one.tokens_per_row == 540 / 16
    assert one.cost == pytest.approx(32 * (10 * 1000 + 5 * 2000) / 1e6) and one.cost_per_row == pytest.approx(
        one.cost / 16
    )


@pytest.fixture(scope="module")
def judged(tmp_path_factory: pytest.TempPathFactory) -> tuple[RunFolder, Door]:
    """A set of 30 rows of which a maker with a judge as its verifier makes 24; a quota keeps 16."""
    folder, door = RunFolder(tmp_path_factory.mktemp("judged")), Door()
    sifted(folder, 30, (Judged(), MakerQuota({"Judged": 16})), door)
    return folder, door


def test_what_a_verifier_asked_is_in_the_account(judged: tuple[RunFolder, Door]) -> None:
    run, door = judged
    with views.connect(run) as con:
        (one,) = accounts(con, run)
    assert one.judged is not None and one.judged.model == "big <judge>"
    assert (one.asked, one.answered, one.parsed, one.verified, one.made, one.kept) == (30, 27, 27, 24, 24, 16)
    told = one.judged
    assert (told.asked, told.answered, told.parsed) == (54, 52, 50)
    assert (told.failed, told.unparsed) == ({"server": 2}, {"no_verdict": 2}) and one.refused == {"undecided": 3}
    assert (door.asked.count("door"), door.asked.count("big <judge>")) == (one.asked, told.asked)
    assert one.cost == pytest.approx(24 * 0.02) and told.cost == pytest.approx(52 * (40 * 10 + 4 * 20) / 1e6)
    assert one.cost_per_row == pytest.approx((one.cost + told.cost) / 16)
    assert one.tokens_per_row == (27 * 15 + 52 * 44) / 16
    assert faults(run, [one]) == []
    sums = "select judged_asked - judged_answered - judged_failed, judged_answered - judged_parsed - judged_unparsed"
    assert views.query(run, f"{sums} from makers")[1] == [(0, 0)]
    sql = "select what, reason, rows from maker_reasons where what like 'judged%' order by all"
    assert views.query(run, sql)[1] == [("judged_failed", "server", 2), ("judged_unparsed", "no_verdict", 2)]


def test_what_a_verifier_asked_is_shown(judged: tuple[RunFolder, Door]) -> None:
    said = shown(look.print_funnel, judged[0])
    assert "1 Judged: judged by big <judge>: asked 54, answered 52, parsed 50, 2,080 + 208 tokens, cost 0.02496" in said
    assert "judge failed server 2; judge unparsed no_verdict 2" in said and "Every row is accounted for" in said
    part = write_report(judged[0]).read_text(encoding="utf-8").split('<section id="makers">')[1].split("</section>")[0]
    assert "its verifier asks big &lt;judge&gt;:" in part and "<span>asked</span> 54</div>" in part
    assert "<span>asked</span> 30</div>" in part and "judge unparsed" in part


def test_the_views_say_the_same(run: RunFolder) -> None:
    sums = """select sum(asked - answered - failed), sum(answered - parsed - unparsed),
        sum(made - kept - held_out - dropped) from makers"""
    assert views.query(run, sums)[1] == [(0, 0, 0)]
    sql = "select what, sum(rows) from maker_reasons group by all order by all"
    assert views.query(run, sql)[1] == [("dropped", 12), ("failed", 4), ("refused", 4), ("unparsed", 4)]
    alive = """select count(*) from verdicts v join rows using (row_id)
        where maker is not null and keep and step = (select max(step) from verdicts)"""
    assert views.query(run, alive)[1] == [(16,)]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"answered": 35}, "asked 40 is not answered 35 + failed 4"),
        ({"parsed": 33}, "answered 36 is not parsed 33 + unparsed 4"),
        ({"judged": {"model": "j", "asked": 3, "answered": 2, "parsed": 2}}, "its judge: asked 3 is not answered 2"),
        ({"judged": {"model": "j", "asked": 2, "answered": 2, "parsed": 1}}, "its judge: answered 2 is not parsed 1"),
        ({"made": 27}, "it counted 27 rows, the ledger holds 28"),
    ],
)
def test_what_does_not_add_up_is_a_fault(run: RunFolder, change: dict[str, Any], said: str) -> None:
    path = next(run.ledger.glob("t/*-Echo/step.json"))
    whole = read_json(path)
    try:
        write_json(path, whole | {"synthesis": whole["synthesis"] | change})
        assert any(said in fault for fault in look.funnel(run).faults)
    finally:
        write_json(path, whole)


def shown(show: Any, *args: Any) -> str:
    console = Console(file=io.StringIO(), width=140, color_system=None)
    show(*args, console)
    return " ".join(console.file.getvalue().split())  # type: ignore[attr-defined]


def test_the_funnel_and_the_life_of_a_row_tell_of_makers(run: RunFolder) -> None:
    said = shown(look.print_funnel, run)
    assert "1 Echo 40 36 32 28 28 16 33.75 0.04" in said
    assert (
        "failed timeout 4; unparsed no_text 4; refused wrong 4; dropped over_quota 8 (MakerQuota), too_long 4" in said
    )
    made = views.query(run, "select row_id, parents[1] from rows where maker is not null order by position limit 1")[1]
    life = shown(look.print_why, run, made[0][0])
    assert "by door (digest dddddddddddd…; licence or terms: CC0)" in life and "temperature 0.8" in life
    assert f"{made[0][1]} (source s, position 3; kept in set t) question number 3 → yes" in life.replace("│ ", "")


def test_the_report_shows_numbers_samples_parents_and_verdicts(run: RunFolder) -> None:
    text = write_report(run).read_text(encoding="utf-8")
    part = text.split('<section id="makers">')[1].split("</section>")[0]
    for name, value in (("asked", 40), ("failed", 4), ("not parsed", 4), ("refused", 4), ("cost a kept row", 0.04)):
        assert f"<span>{name}</span> {value}</div>" in part
    assert "<span>kept</span> <b>16</b>" in part and "<span>dropped</span> <b>12</b>" in part
    assert part.count('class="sample"') == 3 and part.count('<span class="chip kept">kept') == 2
    assert part.count("parent <code>") == 3 and "kept in set t" in part and "dropped: " in part
    assert write_report(run).read_text(encoding="utf-8") == text


def test_a_made_row_whose_parent_left_says_so_and_text_stays_inert(tmp_path: Path) -> None:
    fake = FAKE["write_run"](tmp_path / "fake")
    life = look.why(fake.folder, fake.by_name["made"])
    assert life.parents[0].fates == ("dropped from set sft by Rewrite: rewritten",)
    part = (
        write_report(fake.folder).read_text(encoding="utf-8").split('<section id="makers">')[1].split("</section>")[0]
    )
    assert "dropped from set sft by Rewrite: rewritten" in part and "<script" not in part and "held out" in part
    origin = json.loads(life.row["meta"])["made"]
    assert origin["model"] == "small" and "asks small (MIT)" in part


def test_a_run_without_makers_says_so(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    assert "No maker in this run." in write_report(RunFolder(tmp_path / "empty")).read_text(encoding="utf-8")
