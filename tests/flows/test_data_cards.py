"""The cards in data_cards/ are what their manifests render, and their recipes are the ones that ship."""

from pathlib import Path

import pytest

from gristmill.curation.cards import card
from gristmill.curation.folder import read_json
from gristmill.flows.recipe import load_recipe, load_text, shipped

CARDS = Path(__file__).parents[2] / "data_cards"
FOLDERS = sorted(path for path in CARDS.iterdir() if path.is_dir())


def test_every_set_of_every_recipe_that_ships_has_a_card(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("GRISTMILL_DATA", raising=False)
    wanted = {f"{name}-{set_name}" for name in shipped() for set_name in load_recipe(name).sets()}
    assert {path.name for path in FOLDERS} == wanted


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda path: path.name)
def test_the_card_still_renders_from_its_manifest(folder: Path) -> None:
    assert card(read_json(folder / "manifest.json")) == (folder / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda path: path.name)
def test_the_manifest_is_of_the_recipe_that_ships(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("GRISTMILL_DATA", raising=False)
    manifest = read_json(folder / "manifest.json")
    (name,) = (name for name in shipped() if folder.name in {f"{name}-{kind}" for kind in load_recipe(name).sets()})
    assert load_text(manifest["recipe"]) == load_recipe(name)
    assert all(step["came"] + step["made"] == step["kept"] + step["dropped"] for step in manifest["funnel"])
    assert manifest["rows"] == manifest["funnel"][-1]["kept"]
