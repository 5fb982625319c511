"""gristmill plan: all SFT below 1,000, never a cold start, prices respected, shares that sum to the budget."""

from pathlib import Path

import pytest

from gristmill.curation.folder import HouseError, write_json
from gristmill.flows.planning import LEAST, SMALL, explain, look, plan, preference_share
from gristmill.flows.recipe import load_text

RECIPE = """
name: two
sources: {chats: {path: chats.jsonl, licence: MIT}}
models: {base: {path: org/some-1b}, tuned: {path: org/some-1b-Instruct}}
stages:
  - curate: {set: clean, sources: [chats]}
  - curate: {set: pairs, kind: preference, sources: [chats]}
  - sft: {set: clean, model: base}
  - dpo: {set: pairs, model: base, start: sft}
  - dpo: {name: cold, set: pairs, model: base}
  - dpo: {name: warm, set: pairs, model: tuned}
"""


@pytest.mark.parametrize("kind", ["base", "instruct"])
def test_small_budgets_are_all_sft_and_shares_sum_to_the_budget(kind: str) -> None:
    shares = []
    for budget in (1, 500, SMALL - 1, SMALL, 3_000, 20_000, 100_000, 5_000_000):
        found = plan(budget, kind)  # type: ignore[arg-type]
        assert found.sft + found.pairs == budget and found.reasons
        assert (found.pairs == 0) == (budget < SMALL)
        shares.append(found.pairs / budget)
    assert shares == sorted(shares)  # a growing preference share
    if kind == "base":
        assert all(plan(budget).sft >= LEAST * budget for budget in (1_000, 12_345, 10_000_000))
    assert preference_share(SMALL - 1, "base") == 0 < preference_share(SMALL, "base")
    assert preference_share(10**7, "instruct") == 1.0


@pytest.mark.parametrize("prices", [(0.1, 0.4), (2.0, 1.0), (1.0, 1.0), (0.07, 0.01)])
def test_money_buys_what_it_can_and_no_more(prices: tuple[float, float]) -> None:
    for money in (10.0, 300.0, 999.99, 12_000.0):
        found = plan(money, "base", *prices, money=True)
        assert found.cost <= money * (1 + 1e-9) and found.left == pytest.approx(money - found.cost, abs=1e-6)
        assert found.left < prices[0] + 1e-6  # nothing is left that would buy one more example
        assert found.sft >= LEAST * found.examples
        assert f"{found.sft:,} SFT" in found.text()
    assert plan(50.0, "base", 1.0, 1.0, money=True).pairs == 0
    assert plan(1_500.0, "base", 1.0, 100.0, money=True).pairs == 0  # a mix would be below 1,000


def test_what_cannot_be_planned_is_said() -> None:
    with pytest.raises(HouseError, match="not even one"):
        plan(0.5, "base", 1.0, 1.0, money=True)
    for budget, price in ((0, 1.0), (-5, 1.0), (10, 0.0), (float("nan"), 1.0)):
        with pytest.raises(HouseError, match="above 0"):
            plan(budget, "base", price, 1.0, money=True)
    with pytest.raises(HouseError, match="both prices"):
        explain("100", None, 1.0, None, None)
    with pytest.raises(HouseError, match="base or instruct"):
        explain("100", "chat", None, None, None)
    assert explain("5,000", None, None, None, None).count("preference pairs (") == 2  # base and instruct


def curated(folder: Path, name: str, kind: str, rows: int) -> None:
    files = [{"path": "a", "split": "train", "rows": rows}, {"path": "b", "split": "test", "rows": 7}]
    home = folder / "curated" / name
    home.mkdir(parents=True)
    write_json(home / "manifest.json", {"schema_version": 1, "kind": kind, "files": files})


def test_recipes_that_do_otherwise_are_warned(tmp_path: Path) -> None:
    recipe = load_text(RECIPE)
    base, tuned = look(recipe, tmp_path)
    assert (base.kind, tuned.kind) == ("base", "instruct") and base.sft is None
    assert [warning for warning in base.warnings if "starts cold" in warning] == list(base.warnings)
    assert len(base.warnings) == 1 and "stage cold" in base.warnings[0] and not tuned.warnings
    curated(tmp_path, "clean", "sft", 40)
    curated(tmp_path, "pairs", "preference", 4_000)
    base, tuned = look(recipe, tmp_path)
    assert (base.sft, base.pairs, tuned.sft, tuned.pairs) == (40, 4_000, 0, 4_000)
    assert any("1.0% of the examples are for SFT; give it 10%" in warning for warning in base.warnings)
    said = look(recipe, tmp_path, "instruct")[0].warnings
    assert said == ()
    path = tmp_path / "recipe.yaml"
    path.write_text(RECIPE)
    text = explain(str(path), None, None, None, tmp_path)
    assert "trains on 40 SFT examples and 4,000 preference rows" in text and text.count("warning:") == 2
