"""Every maker has a page with a line that loads, a real made row, its parents and its verdicts; the index names all."""

import json
import re
import runpy
import sys
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import pytest
import yaml

from gristmill.curation.steps import find_steps
from gristmill.flows.recipe import load_text

ROOT = Path(__file__).parents[2]
HOME = ROOT / "docs" / "makers"
MAKERS = sorted(name for name, kind in find_steps().items() if getattr(kind, "scope", None) == "maker")
PARTS = ["In a recipe", "A row that it made", "Its parents", "Its verdicts", "What became of all"]
MODELS = ("small", "brief", "solver", "author", "minilm", "static", "nli")


@pytest.fixture(scope="module")
def script() -> dict[str, Any]:
    sys.path.insert(0, str(ROOT / "docs"))
    try:
        return runpy.run_path(str(ROOT / "docs" / "makers.py"))
    finally:
        sys.path.remove(str(ROOT / "docs"))


def parts_of(name: str) -> dict[str, str]:
    whole = (HOME / f"{name}.md").read_text(encoding="utf-8")
    said = re.split(rf"\n## ({'|'.join(PARTS)})\n", whole)  # rows that are shown may have headings of their own
    return {"": said[0]} | dict(zip(said[1::2], said[2::2], strict=True))


@pytest.mark.parametrize("name", MAKERS)
def test_every_maker_has_a_page(name: str, script: dict[str, Any]) -> None:
    found = parts_of(name)
    assert list(found) == ["", *PARTS] and found[""].startswith(f"# {name}\n")
    page = script["read_pages"]()[name]
    assert page.paper in found[""] and script["WHO"][page.answers] in found["In a recipe"]
    row_id = re.search(r"\A\n`([0-9a-f]{32})`\n", found["A row that it made"])
    assert row_id and "```text\n" in found["A row that it made"]
    parents = re.findall(r"^`([0-9a-f]{32})` \(", found["Its parents"], re.MULTILINE)
    assert parents or "It has none." in found["Its parents"]
    assert row_id.group(1) not in parents
    verdicts = [line.split(" | ") for line in found["Its verdicts"].splitlines() if line.startswith(f"| {name} | ")]
    assert verdicts[0][1] == name and verdicts[0][2].startswith("kept") and len(verdicts) >= 2
    first = found["What became of all"].split("\n- ")[1]
    counts = re.findall(r"(asked|answered|parsed|made|kept) ([\d,]+)", first)
    numbers = {what: int(count.replace(",", "")) for what, count in counts}
    assert numbers["made"] >= 1 and numbers["made"] >= numbers["kept"]
    assert numbers.get("asked", 0) >= numbers.get("answered", 0) >= numbers.get("parsed", 0)


@pytest.mark.parametrize("name", MAKERS)
def test_the_lines_of_a_page_load(name: str, script: dict[str, Any]) -> None:
    block = re.search(r"```yaml\n(.*?)```", parts_of(name)["In a recipe"], re.DOTALL)
    assert block
    steps = yaml.safe_load(block.group(1))
    kind = script["read_pages"]()[name].example.kind
    sets = [{"set": other, "sources": ["s"]} for other in ("specialised", "short")]
    recipe = {
        "name": "r",
        "sources": {"s": {"path": "s.jsonl", "licence": "MIT"}},
        "models": {model: {"path": "x"} for model in MODELS},
        "stages": [{"curate": one} for one in (*sets, {"set": "t", "kind": kind, "sources": ["s"], "steps": steps})],
    }
    assert name in [type(step).__name__ for step in load_text(yaml.safe_dump(recipe)).sets()["t"].steps]


def test_the_index_names_every_page() -> None:
    linked = re.findall(r"\| \[(\w+)\]\((\w+)\.md\)", (HOME / "README.md").read_text(encoding="utf-8"))
    assert [name for name, _ in linked] == MAKERS == [file for _, file in linked]
    assert {path.stem for path in HOME.glob("*.md")} - {"README"} == set(MAKERS)
    assert "docs/makers/" in (ROOT / "docs" / "methods.md").read_text(encoding="utf-8").split("\n## ")[0]


def test_the_author_says_what_was_written_and_nothing_else(script: dict[str, Any]) -> None:
    written = (("colou?r of snow", ("White.", "It is white.")), ("deep", ("Very.",)))

    def ask(url: str, text: str, seed: int) -> tuple[int, Any]:
        body = json.dumps({"messages": [{"role": "user", "content": text}], "seed": seed}).encode()
        try:
            with urllib.request.urlopen(urllib.request.Request(f"{url}/chat/completions", body)) as answer:
                return answer.status, json.load(answer)["choices"][0]["message"]["content"]
        except urllib.error.HTTPError as error:
            return error.code, None

    with script["author"](written) as (url, lost):
        assert (
            ask(url, "the color of snow?", 2) == (200, "White.")
            and ask(url, "the colour of snow?", 3)[1] == "It is white."
        )
        assert ask(url, "how\ndeep?", 0) == (200, "Very.") and lost == []
        assert ask(url, "how high?", 0) == (400, None) and lost == ["how high?"]


def test_a_fence_is_longer_than_any_in_the_text(script: dict[str, Any]) -> None:
    fenced = script["fenced"]
    assert fenced("a") == "```text\na\n```" and fenced("```\nx\n````", "json").splitlines()[0] == "`````json"
