"""report.html holds every section, the ledger's numbers, and nothing that runs or loads."""

import html.parser
import re
import runpy
import shutil
from pathlib import Path
from typing import Any

import pytest

from gristmill.curation.folder import RunFolder
from gristmill.curation.look import funnel
from gristmill.flows.report import number, write_report

FAKE = runpy.run_path(str(Path(__file__).parents[1] / "curation" / "fake_run.py"))
SECTIONS = ("funnel", "makers", "scores", "map", "samples", "training", "evaluation", "quarantine", "files")


class Page(html.parser.HTMLParser):
    """Tags with their attributes, and the text outside <style>."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "br", "link", "input"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if not self.open or self.open[-1] != "style":
            self.text += data + " "

    def count(self, tag: str, css: str) -> int:
        return sum(name == tag and css in (attrs.get("class") or "").split() for name, attrs in self.tags)


@pytest.fixture(scope="module")
def fake(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return FAKE["write_run"](tmp_path_factory.mktemp("run"))


@pytest.fixture(scope="module")
def page(fake: Any) -> Page:
    path = write_report(fake.folder)
    assert path == fake.folder.root / "report.html"
    return Page(path.read_text(encoding="utf-8"))


def test_every_section_is_there_and_every_tag_closed(page: Page) -> None:
    assert tuple(attrs["id"] for tag, attrs in page.tags if tag == "section") == SECTIONS
    assert page.open == []


def test_numbers_are_the_funnels(fake: Any, page: Page) -> None:
    found = funnel(fake.folder)
    text = " ".join(page.text.split())
    assert "read 384 = rows 380 + quarantined 4" in text
    for one in found.sets:
        for step in one.steps:
            made = f" + {step['made']:,}" if step["made"] else ""
            assert f"{step['came']:,}{made} → {step['kept']:,}" in text
            for reason, rows in step["reasons"].items():
                assert f"{reason} {rows:,}" in text
        assert f"Curated: {one.curated['train']:,} rows in split train" in text


def test_row_text_stays_inert(fake: Any, page: Page) -> None:
    names = {tag for tag, _ in page.tags}
    assert not names & {"script", "img", "iframe", "link", "object", "embed", "form", "base", "audio", "video", "image"}
    assert all(not name.startswith("on") for _, attrs in page.tags for name in attrs)
    assert FAKE["EVIL"] in page.text
    assert "<script" not in fake.folder.report.read_text(encoding="utf-8")


def test_nothing_is_loaded(fake: Any, page: Page) -> None:
    text = fake.folder.report.read_text(encoding="utf-8")
    style = "".join(re.findall(r"<style>(.*?)</style>", text, re.DOTALL))
    assert "url(" not in style and "@import" not in style
    for _, attrs in page.tags:
        assert not {"src", "srcset", "xlink:href", "action", "data"} & attrs.keys()
        assert (attrs.get("href") or "#").startswith("#")
        assert "url(" not in (attrs.get("style") or "")
    policy = next(
        a["content"] for t, a in page.tags if t == "meta" and a.get("http-equiv") == "Content-Security-Policy"
    )
    assert policy is not None and policy.startswith("default-src 'none'")


def test_histograms_hold_every_scored_row(fake: Any, page: Page) -> None:
    titles = re.findall(r"<g><title>([\d,]+) rows</title>", fake.folder.report.read_text(encoding="utf-8"))
    scored = len(fake.log["sft", 3]) + len(fake.log["sft", 5])
    assert sum(int(title.replace(",", "")) for title in titles) == scored
    assert sum(tag == "line" and attrs.get("class") == "limit" for tag, attrs in page.tags) == 4


def test_map_shows_every_row_of_each_set_once(fake: Any, page: Page) -> None:
    rows = {name: {i for (s, _), log in fake.log.items() if s == name for i in log} for name in ("sft", "dpo")}
    dots = [attrs.get("class") for tag, attrs in page.tags if tag == "circle"]
    assert len(dots) == sum(len(ids) for ids in rows.values())
    assert dots.count("kept") == sum(one.curated["train"] for one in funnel(fake.folder).sets)


def test_samples_of_each_reason(page: Page) -> None:
    for reason in ("near_duplicate", "contaminated", "length_low", "perplexity_high", "judge_error", "over_budget"):
        assert reason in page.text
    assert "natalia sold clips" in page.text and "duplicate of: " in page.text
    assert page.count("div", "sample") <= 3 * 12 + 5


def test_curves_and_evaluation(page: Page) -> None:
    assert page.count("polyline", "smooth") == 1 + 3  # loss of sft; loss, margin and accuracy of dpo
    text = " ".join(page.text.split())
    assert "sft loss 7.91 2.31 2.36 33" in text
    assert "dpo accuracy – 0.5 0.875 8" in text
    assert page.count("td", "best") == 3
    assert "left out: too_long 1" in text and "LoRA rank 16 over nf4" in text


def test_equal_folders_give_equal_bytes(fake: Any, tmp_path: Path) -> None:
    first = write_report(fake.folder).read_bytes()
    shutil.copytree(fake.folder.root, tmp_path / "copy")
    assert write_report(RunFolder(tmp_path / "copy")).read_bytes() == first


@pytest.mark.parametrize(
    "missing",
    [
        "curated",
        "measures",
        "ledger",
        "evaluation.json",
        "sft/metrics.jsonl",
        "recipe.yaml",
        "quarantine",
        "dpo",
    ],
)
def test_unfinished_runs_have_a_report(fake: Any, tmp_path: Path, missing: str) -> None:
    root = tmp_path / "run"
    shutil.copytree(fake.folder.root, root)
    path = root / missing
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    page = Page(write_report(RunFolder(root)).read_text(encoding="utf-8"))
    assert tuple(attrs["id"] for tag, attrs in page.tags if tag == "section") == SECTIONS


def test_an_empty_folder_has_a_report(tmp_path: Path) -> None:
    text = write_report(RunFolder(tmp_path)).read_text(encoding="utf-8")
    assert "No source was read to its end" in text and "Nothing was evaluated" in text


def test_a_loss_of_rows_is_shouted(fake: Any, tmp_path: Path) -> None:
    root = tmp_path / "run"
    shutil.copytree(fake.folder.root, root)
    step = root / "ledger/sft/02-Decontaminate/step.json"
    step.write_text(step.read_text().replace('"kept": 257', '"kept": 250'))
    text = Page(write_report(RunFolder(root)).read_text(encoding="utf-8")).text
    assert "Not conserved" in text and "accounted for" not in text


@pytest.mark.parametrize(
    ("value", "said"),
    [
        *((None, "–"), (3, "3"), (12345, "12,345"), (0.00021, "0.00021"), (2.14159, "2.142"), (3122.4, "3,122")),
        *(("cpu", "cpu"), (float("inf"), "inf"), (float("nan"), "nan"), (True, "True")),
    ],
)
def test_numbers_for_people(value: Any, said: str) -> None:
    assert number(value) == said
