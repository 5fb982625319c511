"""docs/losses.md says what docstrings, signatures and tests of the losses say; each has a test against an oracle."""

import re
import runpy
from pathlib import Path

import pytest
import torch

from gristmill.tuning.losses import LOSSES

ROOT = Path(__file__).parents[2]
MAKER = runpy.run_path(str(ROOT / "docs" / "losses.py"))
TEXT = (ROOT / "docs" / "losses.md").read_text(encoding="utf-8")


def test_the_page_is_what_its_maker_makes() -> None:
    assert MAKER["page"]() == TEXT, "run: python docs/losses.py"


@pytest.mark.parametrize("name", LOSSES)
def test_every_loss_has_a_row_with_paper_formula_and_oracle_test(name: str) -> None:
    rows = [line for line in TEXT.splitlines() if line.startswith(f"| `{name}` |")]
    assert len(rows) == 1
    _, after, formula, _, compared = (cell.strip() for cell in re.split(r"(?<!\\)\|", rows[0])[1:-1])
    assert "https://arxiv.org/abs/" in after or name == "nll"
    assert formula.startswith("`") and any(sign in formula for sign in ("log", "σ", "²", "max"))
    assert re.fullmatch(r"(`test_\w+`(, )?)+", compared)


def test_every_test_that_the_page_names_exists() -> None:
    defined = {
        name for path in (ROOT / "tests" / "tuning").glob("*.py")
        for name in re.findall(r"^def (test_\w+)", path.read_text(encoding="utf-8"), re.MULTILINE)
    }  # fmt: skip
    named = set(re.findall(r"`(test_\w+)`", TEXT))
    assert len(named) > 10 and named <= defined


def test_the_loss_of_ones_own_that_the_page_shows_runs() -> None:
    shown = re.search(r"```python\n(.*?)```", TEXT, re.DOTALL)
    assert shown
    space: dict[str, object] = {}
    exec(shown.group(1), space)
    losses = space["mine"](*(-torch.rand(4, 3)))  # type: ignore[operator]
    assert losses.shape == (3,)
