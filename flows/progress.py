"""What people see of a run in the terminal: a bar while a step runs, one line when it is done."""

import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from ..curation.door import Progress

NOTE_SECONDS = 30.0  # between the notes of one job in a log


@dataclass(frozen=True)
class Done:
    """How a job of a run ended. text: what came of it, in one line. cached: it stood already."""

    text: str
    cached: bool = False
    data: dict[str, Any] = field(default_factory=dict)


class Bar:
    """What a job reports to: called with (done, total). Shows nothing."""

    def __call__(self, done: int, total: int) -> None:
        pass

    def note(self, text: str) -> None:
        """What is going on, in one line that the next one replaces."""

    def say(self, text: str) -> None:
        """Lines that stay."""


class Silent:
    """Shows nothing; counts what was done."""

    def __init__(self) -> None:
        self.done: list[str] = []

    def say(self, text: str) -> None:
        pass

    @contextmanager
    def bar(self, name: str) -> Iterator[Progress]:
        yield Bar()

    def finish(self, name: str, done: Done, seconds: float) -> None:
        self.done.append(name)


class Terminal(Silent):
    """Bars and colours on a terminal, plain lines elsewhere."""

    def __init__(self) -> None:
        super().__init__()
        from rich.console import Console

        self.console = Console(highlight=False, soft_wrap=True, file=sys.stdout)

    def say(self, text: str) -> None:
        self.console.print(text, markup=False)

    @contextmanager
    def bar(self, name: str) -> Iterator[Progress]:
        if not self.console.is_terminal:
            yield _Lines(self.console)
            return
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
        from rich.progress import Progress as Bars

        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        notes = TextColumn("{task.fields[note]}", style="dim")
        how: dict[str, Any] = {"console": self.console, "transient": True, "speed_estimate_period": 600}
        with Bars(*columns, TimeRemainingColumn(), notes, **how) as bars:
            yield _Drawn(bars, bars.add_task(name, total=None, note=""))

    def finish(self, name: str, done: Done, seconds: float) -> None:
        super().finish(name, done, seconds)
        took = "cached" if done.cached else duration(seconds)
        text, *notes = done.text.split("\n")
        line = f"{'=' if done.cached else '+'} {name:<28} {text:<60} {took:>8}"
        self.console.print("\n".join([line, *notes]), markup=False, style="dim" if done.cached else None)


class _Lines(Bar):
    """Where no bar can be drawn: a note now and then, as a line."""

    def __init__(self, console: Any) -> None:
        self.console = console
        self.said = time.monotonic()

    def note(self, text: str) -> None:
        if time.monotonic() - self.said >= NOTE_SECONDS:
            self.said = time.monotonic()
            self.say(text)

    def say(self, text: str) -> None:
        self.console.print("\n".join(f"    {line}" for line in text.split("\n")), markup=False)


class _Drawn(_Lines):
    """A bar on a terminal."""

    def __init__(self, bars: Any, task: Any) -> None:
        super().__init__(bars.console)
        self.bars, self.task = bars, task

    def __call__(self, done: int, total: int) -> None:
        self.bars.update(self.task, completed=done, total=total or None)

    def note(self, text: str) -> None:
        self.bars.update(self.task, note=text)


@contextmanager
def interrupts_wait() -> Iterator[None]:
    """Holds Ctrl-C back until the block ends: inside the import of torch it would abort the process."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    held: list[int] = []
    before = signal.signal(signal.SIGINT, lambda number, frame: held.append(number))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
    if held:
        raise KeyboardInterrupt


def timed(name: str, show: Silent, do: Any) -> Done:
    """Runs `do(progress)` with a bar, then shows how it ended."""
    started = time.monotonic()
    with show.bar(name) as progress:
        done: Done = do(progress)
    show.finish(name, done, time.monotonic() - started)
    return done


def duration(seconds: float) -> str:
    """0.4 s, 12 s, 3 min 20 s, 2 h 5 min."""
    if seconds < 10:
        return f"{seconds:.1f} s"
    if seconds < 60:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60) if seconds >= 3600 else int(seconds // 60)
    return f"{minutes // 60} h {minutes % 60} min" if minutes >= 60 else f"{minutes} min {seconds % 60:.0f} s"
