"""Answers in Python that pass their tests, run in the sandbox."""

import ast
import contextlib
import json
import re
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from ..folder import HouseError
from ..steps import Tools
from ..verifying import Case, Finding

_FENCE = re.compile(
    r"^(?P<fence>`{3,}|~{3,})[ \t]*(?P<language>[\w+-]*)[^\n]*\n(?P<code>.*?)(?:^(?P=fence)|\Z)", re.M | re.S
)
# Tests that are a module of unittest's: imported, so that their own unittest.main() does not run.
_RUN_CASES = """import sys, unittest
sys.path.insert(0, "")
found = unittest.main("given_tests", argv=["tests"], failfast=True, exit=False).result
assert found.testsRun and found.wasSuccessful(), "unittest failed"
"""
_PYTHON = ("", "python", "python3", "py")


@dataclass(frozen=True)
class UnitTests:
    """Right where the answer's code passes the tests that the row carries, all of them, to the last line (an answer
    that calls sys.exit(0) before them is wrong).

    Tests are read from the case's meta: `test_list` with `test_setup_code` (MBPP), `test` with `entry_point`, and
    `prompt` which an answer may continue (HumanEval), `tests` with `solution_file` (test cases of unittest that import
    the solution by that name), or `tests` alone, a text or list of statements; without any, from the reference. A case
    without tests is abstained from. cpu, seconds, memory (MB): of each program. workers: programs at a time (default:
    one a processor). The finding's detail is the failing test and what it said; its value the code in normal form.
    """

    cpu: int = 10
    seconds: float = 60.0
    memory: int = 1024
    workers: int | None = None

    model: ClassVar[None] = None

    def __post_init__(self) -> None:
        if min(self.cpu, self.seconds, self.memory) <= 0 or (self.workers is not None and self.workers < 1):
            raise HouseError(f"{self}: limits are above 0")

    def verify(self, cases: Sequence[Case], tools: Tools) -> list[Finding]:
        """One finding a case; the programs run side by side."""
        from ..sandbox import Limits, Program, run_many

        limits = Limits(cpu=self.cpu, seconds=self.seconds, memory=self.memory << 20)
        found: dict[int, Finding] = {}
        programs: dict[int, Program] = {}
        codes: dict[int, str] = {}
        for place, case in enumerate(cases):
            tests = tests_of(case)
            code = None if tests is None else code_of(case.answer, tests)
            if tests is None:
                found[place] = Finding(None, "no tests")
            elif code is None:
                found[place] = Finding(False, "no Python in the answer")
            else:
                programs[place], codes[place] = tests.program(code), code
        for place, outcome in zip(programs, run_many(list(programs.values()), limits, self.workers), strict=True):
            right = outcome.status == "ok" and outcome.finished
            if outcome.status == "error":
                found[place] = Finding(None, outcome.stderr)
            else:
                said = "passes its tests" if right else _failure(outcome.status, outcome.stderr, programs[place].source)
                found[place] = Finding(right, said, normal_code(codes[place]))
        return [found[place] for place in range(len(cases))]


@dataclass(frozen=True)
class Tests:
    """What a row says on how its answer is tested. after: statements to run after the code. entry: the name that the
    answer must define. opening: code that the answer may continue. file: the module under which tests import it."""

    __test__: ClassVar[bool] = False  # no test class of pytest

    after: str
    entry: str | None = None
    opening: str = ""
    file: str | None = None

    def program(self, code: str) -> Any:
        """The program that tests `code` (a sandbox.Program)."""
        from ..sandbox import Program

        if self.file is None:
            return Program(f"{code}\n\n{self.after}\n")
        files = {self.file.rpartition("/")[2]: code, "given_tests.py": self.after}
        return Program(_RUN_CASES, files=files)


def tests_of(case: Case) -> Tests | None:
    """The tests that a case carries, or None."""
    meta = case.meta
    if meta.get("test_list"):
        listed = _listed(meta["test_list"])
        return Tests("\n".join([str(meta.get("test_setup_code") or ""), *listed]), _called(listed))
    if meta.get("test") and meta.get("entry_point"):
        entry = str(meta["entry_point"])
        return Tests(f"{meta['test']}\n\ncheck({entry})", entry, str(meta.get("prompt") or case.prompt))
    if meta.get("tests"):
        listed = _listed(meta["tests"])
        file = str(meta["solution_file"]) if meta.get("solution_file") else None
        return Tests(
            "\n".join([str(meta.get("test_setup_code") or ""), *listed]), None if file else _called(listed), "", file
        )
    if case.reference and "assert" in case.reference and parses(case.reference):
        return Tests(case.reference, _called([case.reference]))
    return None


def _listed(tests: object) -> list[str]:
    """Tests as statements: a list, its JSON, or a text."""
    if isinstance(tests, str) and tests.lstrip().startswith("["):
        with contextlib.suppress(ValueError):
            tests = json.loads(tests)
    return [str(one) for one in tests] if isinstance(tests, list | tuple) else [str(tests)]


def _called(tests: Sequence[str]) -> str | None:
    """The name that every test calls and that no test defines, builtins apart; None where it is not one alone."""
    import builtins

    shared: set[str] | None = None
    for test in tests:
        try:
            tree = ast.parse(test)
        except (SyntaxError, ValueError):
            return None
        called = {
            node.func.id for node in ast.walk(tree) if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)
        }
        called -= {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.ClassDef)}
        shared = called if shared is None else shared & called
    left = sorted(name for name in shared or () if not hasattr(builtins, name))
    return left[0] if len(left) == 1 else None


def code_of(answer: str, tests: Tests | None = None) -> str | None:
    """The Python in an answer: its fenced blocks, or all of it where there is no fence; None where nothing parses.

    Of several blocks the first that defines what the tests call; else all that parse, joined, else the longest that
    does. An answer that continues the prompt (HumanEval) is put behind it. Prose around bare code is cut off.
    """
    tests = tests or Tests("")
    answer = answer.replace("\r\n", "\n")
    blocks = [match["code"] for match in _FENCE.finditer(answer) if match["language"].lower() in _PYTHON]
    pieces = blocks or [answer]
    for piece in pieces:
        body = textwrap.indent(textwrap.dedent(piece.strip("\n")), "    ")  # bodies come with any indentation
        for whole in (tests.opening + piece, tests.opening + body):
            if tests.opening and not defines(piece, tests.entry) and defines(whole, tests.entry):
                return whole
    right = [piece for piece in pieces if parses(piece) and piece.strip()]
    for piece in right:
        if tests.entry is not None and defines(piece, tests.entry):
            return _with_imports(tests.opening, piece)
    if blocks and right:
        joined = "\n\n".join(right)
        return joined if parses(joined) else max(right, key=len)
    return right[0] if right else _bare(answer)


def _with_imports(opening: str, code: str) -> str:
    """`code` after what the prompt imports and defines before its last function, which the answer may have left out."""
    try:
        head = ast.parse(opening).body if opening else []
    except SyntaxError:
        try:
            head = ast.parse(opening.rstrip() + "\n    pass\n").body
        except SyntaxError:
            head = []
    kept = [ast.unparse(one) for one in head[:-1]]
    return "\n".join([*kept, code])


def _bare(answer: str) -> str | None:
    """The code in an answer without fences: the longest run of lines from a line that can begin code that parses."""
    lines = answer.split("\n")[:400]  # each cut parses anew
    starts = [at for at, line in enumerate(lines) if re.match(r"(?:def|class|import|from|async|@|\w+ *=)", line)]
    for start in starts[:8]:
        ends = [
            at for at in range(len(lines), start, -1) if at == len(lines) or (lines[at] and not lines[at][0].isspace())
        ]
        for end in ends[:40]:
            code = "\n".join(lines[start:end])
            if parses(code):
                return code
    return None


def parses(code: str) -> bool:
    """Whether it is Python."""
    return _tree(code) is not None


def defines(code: str, name: str | None) -> bool:
    """Whether the module defines `name` (None: anything at all)."""
    tree = _tree(code)
    if tree is None:
        return False
    found = set()
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            found.add(node.name)
        elif isinstance(node, ast.Assign):
            found |= {one.id for one in node.targets if isinstance(one, ast.Name)}
    return bool(found) if name is None else name in found


def normal_code(code: str) -> str | None:
    """The code without comments and layout, by which equal answers are known."""
    tree = _tree(code)
    try:
        return None if tree is None else ast.unparse(tree)
    except (RecursionError, ValueError):
        return None


def _tree(code: str) -> ast.Module | None:
    import warnings

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of odd escapes in what a model wrote
            return ast.parse(code)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return None


def _failure(status: str, stderr: str, source: str) -> str:
    """The failing line of the program and the last line of what was said, or the status."""
    said = [line for line in stderr.strip().split("\n") if line.strip()]
    if status in ("timeout", "memory", "output", "killed") or not said:
        return {"ok": "ended before its tests did", "failed": "ended with an error"}.get(status, status)
    numbers = re.findall(r'File "program\.py", line (\d+)', stderr)
    lines = source.split("\n")
    at = [int(number) for number in numbers if int(number) <= len(lines)]
    where = f"{lines[at[0] - 1].strip()[:300]}: " if at else ""
    last = next(
        (line for line in reversed(said) if re.match(r"[\w.]+(?:Error|Exception|Exit|Warning|Interrupt)?\b", line)),
        said[-1],
    )
    return f"{where}{last[:300]}"


def meta_of(row: Mapping[str, Any]) -> dict[str, Any]:
    """A row's meta as a mapping."""
    found = json.loads(row["meta"]) if row.get("meta") else {}
    return found if isinstance(found, dict) else {}
