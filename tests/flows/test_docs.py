"""What the README and the architecture page say is so: commands, options, the recipe shown, the files of each room."""

import json
import re
from pathlib import Path

import pytest
import yaml
from typer.main import get_command

from gristmill.curation.steps import find_steps
from gristmill.flows.cli import app
from gristmill.flows.recipe import load_text

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
ARCHITECTURE = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
COMMANDS = get_command(app).commands  # type: ignore[attr-defined]


def test_every_command_is_documented_and_every_documented_command_exists() -> None:
    named = set(re.findall(r"(?:`|\$ |bin/)gristmill ([a-z-]+)", README))
    assert named == set(COMMANDS)


@pytest.mark.parametrize("name", sorted(COMMANDS))
def test_every_command_has_help(name: str) -> None:
    assert len((COMMANDS[name].help or "").split()) >= 5
    assert all(getattr(option, "help", None) for option in COMMANDS[name].params)


def test_options_in_the_readme_exist() -> None:
    known = {flag for command in COMMANDS.values() for option in command.params for flag in option.opts}
    assert set(re.findall(r"(?<=[ `])--[a-z-]+", README)) <= known


def test_the_recipe_of_the_readme_loads() -> None:
    shown = re.search(r"```yaml\n(.*?)```", README, re.DOTALL)
    assert shown
    recipe = load_text(shown.group(1))
    assert recipe.name == "mine" and len(recipe.sets()["clean"].steps) == 7
    assert {type(step).__name__ for step in recipe.sets()["clean"].steps} <= set(find_steps())


def test_overrides_in_the_readme_are_taken() -> None:
    shown = re.search(r"```yaml\n(.*?)```", README, re.DOTALL)
    line = re.search(r"Overrides on the command line: (.*?)\. An unknown", README, re.DOTALL)
    assert shown and line
    overrides = re.findall(r"`([^`]+)`", line.group(1))
    assert len(overrides) >= 5
    load_text(shown.group(1), overrides=[item.replace("…", "x") for item in overrides])


METHODS = (ROOT / "docs" / "methods.md").read_text(encoding="utf-8")
SECTIONS = {part.split("\n", 1)[0]: part for part in METHODS.split("\n### ")[1:]}
EXAMPLES = yaml.safe_load((ROOT / "docs" / "methods.yaml").read_text(encoding="utf-8"))
KINDS = {name: entry.get("kind", "sft") for group in EXAMPLES.values() for name, entry in group.items()}
VERDICT = {"row_id", "keep", "reason", "score", "evidence"}
MADE = {"row_id", "maker", "parents"}
TALLY = {"asked", "answered", "failed", "parsed", "unparsed", "verified", "refused", "made"}  # of a maker without rows


@pytest.mark.parametrize("name", sorted(name for name, kind in find_steps().items() if not hasattr(kind, "verify")))
def test_every_step_has_a_section_with_a_line_that_loads_and_a_real_row(name: str) -> None:
    line = re.search(r"```yaml\n- (.*)\n```", SECTIONS[name])
    row = re.search(r"```json\n(.*)\n```", SECTIONS[name])
    assert line and row
    fact = json.loads(row.group(1))
    if hasattr(find_steps()[name], "make") and "asked" in fact:
        assert set(fact) >= TALLY and fact["made"] == 0 and fact["answered"] + sum(fact["failed"].values()) > 0
    else:
        assert set(fact) in (VERDICT, MADE)
    models = "".join(f"  {model}: {{path: x}}\n" for model in ("small", "brief", "solver", "minilm", "static", "nli"))
    shown = yaml.safe_load(line.group(1))
    sets = [{"set": "specialised", "sources": ["s"]}, {"set": "short", "sources": ["s"]},
            {"set": "t", "kind": KINDS[name], "sources": ["s"], "steps": [shown]}]  # fmt: skip
    recipe = {"name": "r", "sources": {"s": {"path": "s.jsonl", "licence": "MIT"}}, "models": yaml.safe_load(models),
              "stages": [{"curate": one} for one in sets]}  # fmt: skip
    assert load_text(yaml.safe_dump(recipe)).sets()["t"].steps


SHELVES = {"judges", "makers", "measures", "reading", "verifiers"}  # one thing a file, each found by its name


@pytest.mark.parametrize("room", ["curation", "flows", "kernels", "tuning"])
def test_every_file_is_on_the_map(room: str) -> None:
    section = ARCHITECTURE.split(f"## {room}\n")[1].split("\n## ")[0]
    files = [path.relative_to(ROOT / room) for path in sorted((ROOT / room).rglob("*.py"))]
    assert not [str(path) for path in files if path.parts[0] not in SHELVES and f"`{path}`" not in section]
