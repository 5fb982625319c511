"""What `gristmill losses` prints: the losses that stages can name."""

import inspect

from rich.console import Console

from ..curation.folder import HouseError
from ..tuning.losses import LOSSES
from ..tuning.objectives import OBJECTIVES, Loss, find_loss
from .stages import nearest
from .summary import first_sentence

TITLES = {
    "sft": "sft: weighted tokens",
    "dpo": "dpo: pairs and lists of answers",
    "kto": "kto: single good and bad answers",
}


def show_losses(name: str | None = None) -> None:
    """Every loss by the objective that names it, with its options and its docstring's first sentence; or one whole."""
    console = Console(highlight=False, soft_wrap=True)
    if name is not None and name not in LOSSES:
        raise HouseError(f"no loss is called {name!r}; {nearest(name, list(LOSSES))}")
    found = {each: loss for objective in OBJECTIVES for each in sorted(LOSSES) if (loss := _loss(each, objective))}
    if name is not None:
        console.print(_signature(name, found[name].options), style="bold", markup=False)
        console.print(f"a loss of {found[name].family}. {inspect.getdoc(LOSSES[name]) or ''}", markup=False)
        return
    for objective, families in OBJECTIVES.items():
        console.print(TITLES[objective], style="bold cyan", markup=False)
        for each, loss in found.items():
            if loss.family in families:
                reference = "" if loss.reference else ", no reference"
                console.print(f"  {_signature(each, loss.options)}", style="bold", markup=False)
                said = first_sentence(inspect.getdoc(LOSSES[each]) or "")
                console.print(f"    {loss.family}{reference}. {said}", markup=False)


def _loss(name: str, objective: str) -> Loss | None:
    try:
        return find_loss(name, objective)
    except HouseError:
        return None


def _signature(name: str, options: object) -> str:
    assert isinstance(options, dict)
    return f"{name}({', '.join(f'{key}={value!r}' for key, value in options.items())})"
