"""Programs as sequences of edits: LintSeq, which asks no model (arXiv 2410.02749)."""

import difflib
import io
import json
import random
import re
import sys
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from typing import Any, ClassVar, Literal

import pyarrow as pa

from ..folder import HouseError
from ..rows import Row, digest, made_row, message, table
from ..steps import Corpus

DIFF = "<|diff|>"  # a line of its own between two diffs of an answer
_HUNK = re.compile(r"@@ -(\d+)(?:,(\d+))? \+(\d+)(?:,(\d+))? @@")
_FENCE = re.compile(r"\A\s*```[\w+-]*[ \t]*\n(.*?)\n?```\s*\Z", re.S)
_INCLUDED = ("W0311", "W0231")  # bad indentation, a parent's __init__ that is not called


@dataclass(frozen=True)
class LintSeq:
    """Rows whose answer is a Python program become rows whose answer writes that program in edits, each of which
    leaves it lint-clean (LintSeq, arXiv 2410.02749).

    Backwards from the whole program a line drawn by chance goes, with the lines indented under it and all that pylint
    then calls faulty (errors, W0311 and W0231), until nothing is left; forwards these states give the edits. The answer
    is the consecutive unified diffs without context or file headers, parted by a line <|diff|>; `rebuilt` gives the
    stripped program back byte for byte. A program that does not lint clean, or is none, is skipped; a warning and the
    step's record (`synthesis`) tell why and how many.

    samples: sequences drawn of each program. max_lines: longer programs are skipped. replace: the programs' own rows
    leave the set with reason rewritten. seed: of the draws, with the row_id. workers: processes (1: this
    one alone). Needs pylint.
    """

    samples: int = 1
    max_lines: int = 200
    replace: bool = False
    seed: int = 0
    workers: int = 2

    scope: ClassVar[Literal["maker"]] = "maker"
    model: ClassVar[None] = None

    def __post_init__(self) -> None:
        if min(self.samples, self.max_lines, self.workers) < 1:
            raise HouseError(f"{self}: samples, max_lines and workers are at least 1")

    @property
    def consumes(self) -> str | None:
        """Reason with which programs leave the set."""
        return "rewritten" if self.replace else None

    def make(self, corpus: Corpus) -> Iterator[pa.Table]:
        """Tables of new rows, one for each part that gave any."""
        require_pylint()
        lost: Counter[str] = Counter()
        made_count = done = 0
        with _pool(self.workers) as pool:
            for part in corpus.tables(["row_id", "messages"]):
                rows = [row for row in part.to_pylist() if row["messages"]]
                jobs = [(*self._job(row), row) for row in rows]
                found = pool.map(_sequences, [job[:3] for job in jobs], chunksize=4)
                made: list[Row] = []
                for (code, _, _, row), states in zip(jobs, found, strict=True):
                    done += 1
                    corpus.progress(done, corpus.rows)
                    if isinstance(states, str):
                        lost[states] += 1
                        continue
                    for sample, one in enumerate(states):
                        made.append(self._row(row, code, one, sample, made_count))
                        made_count += 1
                if made:
                    yield table(made)
        told = {"asked": done, "made": made_count, "refused": dict(sorted(lost.items()))}
        corpus.record(synthesis=told)
        if lost:
            why = ", ".join(f"{count} {reason}" for reason, count in sorted(lost.items()))
            warnings.warn(f"LintSeq: {made_count} rows of {done}; skipped: {why}", stacklevel=2)

    def _job(self, row: Row) -> tuple[str, tuple[int, ...], int]:
        seeds = tuple(int(digest("lint", str(self.seed), row["row_id"], str(n))[:8], 16) for n in range(self.samples))
        last = row["messages"][-1]
        return (program(last["content"] or "") if last["role"] == "assistant" else ""), seeds, self.max_lines

    def _row(self, row: Row, code: str, states: list[str], sample: int, position: int) -> Row:
        steps = diffs(states)
        about = {"program": code, "edits": len(steps), "sample": sample}
        turns = [*row["messages"][:-1], message("assistant", f"\n{DIFF}\n".join(steps))]
        said = json.dumps(about, ensure_ascii=False, sort_keys=True)
        return made_row(repr(self), [row["row_id"]], position, "lint_seq", messages=turns, meta=said)


def program(answer: str) -> str:
    """The program of an answer that is one, fenced or bare: stripped, with newlines alone at line ends."""
    text = answer.replace("\r\n", "\n").replace("\r", "\n")
    fenced = _FENCE.match(text)
    return (fenced[1] if fenced else text).strip()


def diffs(states: Sequence[str]) -> list[str]:
    """Unified diffs between consecutive states, without context and file headers."""
    return [
        "\n".join(list(difflib.unified_diff(_lines(a), _lines(b), n=0, lineterm=""))[2:]) for a, b in pairwise(states)
    ]


def rebuilt(steps: Sequence[str]) -> str:
    """The program that the diffs write, in order, onto an empty one. Raises ValueError where one does not apply."""
    lines: list[str] = []
    for step in steps:
        lines = _applied(lines, step)
    return "\n".join(lines)


def _applied(lines: list[str], step: str) -> list[str]:
    """The lines after one diff: read by its hunks' counts, so that a line may begin with + or @@ itself."""
    given, found, at, place = step.split("\n"), [], 0, 0
    while place < len(given):
        head = _HUNK.fullmatch(given[place])
        if head is None:
            raise ValueError(f"no hunk: {given[place]!r}")
        start, removed, added = int(head[1]), int(head[2] or 1), int(head[4] or 1)
        start = start - 1 if removed else start  # a hunk that removes nothing names the line before it
        body = given[place + 1 : place + 1 + removed + added]
        old, new = body[:removed], body[removed:]
        if lines[start : start + removed] != [line[1:] for line in old] or any(line[:1] != "+" for line in new):
            raise ValueError(f"{given[place]} does not fit")
        found += lines[at:start] + [line[1:] for line in new]
        at, place = start + removed, place + 1 + removed + added
    return found + lines[at:]


def _lines(text: str) -> list[str]:
    return text.split("\n") if text else []


def sequence(code: str, seed: int) -> list[str]:
    """States from the empty program to `code` (stripped and lint-clean), each lint-clean, by the draws of `seed`."""
    lines, draw = code.split("\n"), random.Random(seed)
    left, states = set(range(len(lines))), [code]
    while candidates := [at for at in sorted(left) if lines[at].strip() and lines[at].lstrip()[0] != "#"]:
        left = _without(lines, left, draw.choice(candidates))
        states.append(_text(lines, left))
    if states[-1]:
        states.append("")
    found: list[str] = []
    for state in reversed(states):
        if not found or state != found[-1]:
            found.append(state)
    return found


def _without(lines: list[str], left: set[int], line: int) -> set[int]:
    """What is left without a line, its children, and whatever then is faulty."""
    gone = {line}
    while gone:
        left = left - gone - {child for one in gone for child in _children(lines, one)}
        kept = _kept(lines, left)
        faulty = lint("\n".join(lines[at] for at in kept).strip())
        gone = {kept[min(number, len(kept)) - 1] for _, number in faulty} if kept else set()
    return left


def _children(lines: list[str], line: int) -> Iterator[int]:
    """The lines right after it that are indented deeper."""
    for at in range(line + 1, len(lines)):
        if lines[at].strip() and _indent(lines[at]) <= _indent(lines[line]):
            return
        yield at


def _indent(line: str) -> int:
    return len(line.expandtabs()) - len(line.expandtabs().lstrip())


def _kept(lines: list[str], left: set[int]) -> list[int]:
    """What is left, without blank lines at either end: as the stripped text counts its lines."""
    kept = sorted(left)
    while kept and not lines[kept[0]].strip():
        kept.pop(0)
    while kept and not lines[kept[-1]].strip():
        kept.pop()
    return kept


def _text(lines: list[str], left: set[int]) -> str:
    return "\n".join(lines[at] for at in _kept(lines, left)).strip()


def _sequences(job: tuple[str, tuple[int, ...], int]) -> list[list[str]] | str:
    """The sequences of one program, or why there is none."""
    code, seeds, max_lines = job
    if not code:
        return "no_program"
    if code.count("\n") >= max_lines:
        return "too_long"
    faulty = lint(code)
    if any(name.startswith("E0001") for name, _ in faulty):
        return "no_python"
    if faulty:
        return "not_clean"
    return [sequence(code, seed) for seed in seeds]


def require_pylint() -> None:
    """Raises HouseError where pylint is missing."""
    from importlib.util import find_spec

    if find_spec("pylint") is None:
        raise HouseError("LintSeq needs pylint, which is not installed: pip install 'gristmill[curate]'")


@lru_cache(maxsize=4096)
def lint(code: str) -> tuple[tuple[str, int], ...]:
    """(message id, line from 1) of each error and of W0311 and W0231 that pylint finds in `code`. Empty for none."""
    if not code:
        return ()
    linter = _linter()
    linter.reporter.messages.clear()
    before, sys.stdin = sys.stdin, io.TextIOWrapper(io.BytesIO((code + "\n").encode("utf-8", "replace")), "utf-8")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            linter.check(["program.py"])
    finally:
        sys.stdin = before
    return tuple((one.msg_id, max(one.line, 1)) for one in linter.reporter.messages)


@lru_cache(maxsize=1)
def _linter() -> Any:
    """One linter a process: building one costs twenty programs."""
    from pylint.lint import PyLinter
    from pylint.reporters import CollectingReporter

    linter = PyLinter(reporter=CollectingReporter())
    linter.load_default_plugins()
    linter.disable("all")
    for name in ("E", "F", *_INCLUDED):
        linter.enable(name)
    linter.config.from_stdin = True
    return linter


class _Here:
    """A pool of this process alone."""

    def __enter__(self) -> "_Here":
        return self

    def __exit__(self, *_: object) -> None:
        return None

    def map(self, work: Any, jobs: Sequence[Any], chunksize: int = 1) -> Iterator[Any]:
        return map(work, jobs)


def _pool(workers: int) -> Any:
    from concurrent.futures import ProcessPoolExecutor
    from multiprocessing import get_context

    return _Here() if workers == 1 else ProcessPoolExecutor(workers, mp_context=get_context("spawn"))
