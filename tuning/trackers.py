"""Metrics to TensorBoard, trackio and Weights & Biases, where they are installed and asked for; all of them offline.

metrics.jsonl is written whatever is asked for; these are copies of its lines.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from ..curation.folder import HouseError

Track = Callable[[int, Mapping[str, float]], None]
PACKAGES = {"tensorboard": "tensorboard", "trackio": "trackio", "wandb": "wandb"}


def check_trackers(names: Sequence[str]) -> None:
    """HouseError for a tracker that is asked for and not installed: told before anything is computed."""
    for name in names:
        if find_spec(PACKAGES[name]) is None:
            raise HouseError(
                f"track: {name} is not installed. Install it (pip install {PACKAGES[name]}), or leave it out"
            )


@contextmanager
def trackers(names: Sequence[str], out: Path, run: Mapping[str, Any]) -> Iterator[Track]:
    """A function of (step, metrics) that writes a step's numbers to every tracker named; closes them at the end.

    A resumed run continues the same tracker's run, and sends again the steps that it does again. TensorBoard's files
    lie in `out`/tensorboard, W&B's in `out`/wandb (offline; `wandb sync` uploads them), trackio's where trackio says.
    """
    check_trackers(names)
    with ExitStack() as stack:
        found = [stack.enter_context(_OPEN[name](out, run)) for name in names]

        def track(step: int, line: Mapping[str, Any]) -> None:
            numbers = {key: float(value) for key, value in line.items() if isinstance(value, int | float)}
            for one in found:
                one(step, numbers)

        yield track


@contextmanager
def _tensorboard(out: Path, run: Mapping[str, Any]) -> Iterator[Track]:
    from torch.utils.tensorboard import SummaryWriter

    writer: Any = SummaryWriter(str(out / "tensorboard"))

    def track(step: int, numbers: Mapping[str, float]) -> None:
        for key, value in numbers.items():
            writer.add_scalar(key, value, step)

    try:
        yield track
    finally:
        writer.close()


@contextmanager
def _trackio(out: Path, run: Mapping[str, Any]) -> Iterator[Track]:
    import trackio  # type: ignore[import-not-found, unused-ignore]

    trackio.init(project="gristmill", name=_name(out, run), config=dict(run["settings"]), resume="allow")
    try:
        yield lambda step, numbers: trackio.log(dict(numbers), step=step)
    finally:
        trackio.finish()


@contextmanager
def _wandb(out: Path, run: Mapping[str, Any]) -> Iterator[Track]:
    import wandb  # type: ignore[import-not-found, unused-ignore]

    name = _name(out, run)
    how = {"project": "gristmill", "name": name, "id": name, "resume": "allow", "mode": "offline", "dir": str(out)}
    session: Any = wandb.init(**how, config=dict(run["settings"]))
    try:
        yield lambda step, numbers: session.log(dict(numbers), step=step)
    finally:
        session.finish()


def _name(out: Path, run: Mapping[str, Any]) -> str:
    """A name that two stages of two folders do not share."""
    return f"{out.resolve().parent.name}-{run['name'] or out.name}-{str(run['key'])[:8]}"


_OPEN: dict[str, Callable[[Path, Mapping[str, Any]], Any]] = {
    "tensorboard": _tensorboard, "trackio": _trackio, "wandb": _wandb
}  # fmt: skip
