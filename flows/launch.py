"""A training stage in this process or, where its setting `processes` asks for several, in as many on this machine.

torchrun starts those and each runs this file; the first one tells what happens as lines of JSON. Inside processes that
torchrun has started already (`torchrun -m gristmill.flows.cli sft …`), a stage trains in all of them as they are.
"""

import json
import logging
import os
import pickle
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ..curation.folder import HouseError
from ..tuning.settings import Training
from .server import end_with_parent

GRACE = 60.0  # seconds that stopped processes have to end by themselves
_OWN = ("result", "error", "warning")  # events of this file; the others are those of `loop.train`
log = logging.getLogger(__name__)


def started() -> bool:
    """Whether torchrun has started this process as one of several."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


def refuse_torchrun(what: str) -> None:
    """HouseError of the first process of torchrun, for what one process does; the others end without a word."""
    if not started():
        return
    if os.environ.get("RANK", "0") != "0":
        time.sleep(2.0)  # torchrun ends all once one has ended; the first one is to be heard
        raise SystemExit(1)
    raise HouseError(
        f"{what} is not started by torchrun: curation and evaluation take one process. Start it plainly and give the "
        "training stages that want several `processes: N`, or train by `torchrun … -m gristmill.flows.cli sft …`"
    )


def train_here(
    objective: Any,
    data: Path,
    model: Path,
    out: Path,
    settings: Training,
    *,
    progress: Callable[[dict[str, Any]], None],
    **how: Any,
) -> dict[str, Any]:
    """`loop.train`, in `settings.processes` processes. HouseError where they fail, with what they said."""
    if settings.processes == 1 or started():
        from ..tuning.loop import train

        return train(objective, data, model, out, settings, progress=progress, **how)
    with tempfile.TemporaryDirectory(prefix="gristmill-processes-") as scratch:
        job, errors = Path(scratch) / "job", Path(scratch) / "errors"
        job.write_bytes(pickle.dumps(((objective, data, model, out, settings), how)))
        with errors.open("wb") as stderr:
            process = subprocess.Popen(
                _command(settings.processes, job), stdout=subprocess.PIPE, stderr=stderr, text=True,
                env=_environment(settings), preexec_fn=end_with_parent,
            )  # fmt: skip
            try:
                found = _listen(process, progress)
            except BaseException:
                _end(process)
                raise
        if "error" in found:
            raise HouseError(found["error"])
        if process.returncode or "result" not in found:
            said = "\n".join(errors.read_text(errors="replace").splitlines()[-30:])
            raise HouseError(f"{settings.processes} processes for {out} ended with {process.returncode}:\n{said}")
        result: dict[str, Any] = found["result"]
        return result


def _command(processes: int, job: Path) -> list[str]:
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    return [*torchrun, "-m", __name__, str(job)]


def _environment(settings: Training) -> Mapping[str, str]:
    """The processors are divided among the processes, unless a person has divided them."""
    share = max(1, (os.cpu_count() or 1) // settings.processes)
    return {"OMP_NUM_THREADS": str(share), **os.environ}


def _listen(process: subprocess.Popen[str], progress: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
    """Passes on what the processes tell until all have ended; what they ended with, by event."""
    found: dict[str, Any] = {}
    assert process.stdout is not None
    for line in process.stdout:
        try:
            event = json.loads(line)
        except ValueError:
            continue
        if event["event"] == "warning":
            log.warning("%s", event["told"])
        elif event["event"] in _OWN:
            found.setdefault(event["event"], event["told"])
        else:
            progress(event)
    process.wait()
    return found


def _end(process: subprocess.Popen[str]) -> None:
    """Ctrl-C has reached the processes as well: they may end by themselves, or are ended."""
    try:
        process.wait(GRACE)
    except subprocess.TimeoutExpired:
        process.terminate()
        process.wait()


class _Warnings(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        _tell({"event": "warning", "told": record.getMessage()})


def _tell(event: dict[str, Any]) -> None:
    print(json.dumps(event), flush=True)


def _work(job: Path) -> None:
    """One of the processes."""
    from ..tuning.loop import train

    arguments, how = pickle.loads(job.read_bytes())
    logging.getLogger(__package__.partition(".")[0]).addHandler(_Warnings(logging.WARNING))
    try:
        run = train(*arguments, progress=_tell, **how)
    except HouseError as error:
        _tell({"event": "error", "told": str(error)})
        raise SystemExit(1) from None
    if os.environ["RANK"] == "0":
        _tell({"event": "result", "told": run})


if __name__ == "__main__":
    _work(Path(sys.argv[1]))
