"""Code: answers tested by their rows' tests, LintSeq's exact properties, cleaning and preferences by tests."""

import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from gristmill.curation.door import ChatAnswer, ChatError, ChatRequest
from gristmill.curation.makers.clean_code import CleanCode
from gristmill.curation.makers.lint_seq import DIFF, LintSeq, diffs, lint, program, rebuilt, sequence
from gristmill.curation.makers.plum import TestedPreference, parse_asserts
from gristmill.curation.rows import ROW, message, source_row_id, table
from gristmill.curation.verifiers.unit_tests import UnitTests, code_of
from gristmill.curation.verifiers.unit_tests import tests_of as read_tests
from gristmill.curation.verifying import Case, Verifier

from .late import Late, Telling

MBPP = {"test_list": ["assert add(1, 2) == 3", "assert add(0, 0) == 0, 'zero'"], "test_setup_code": ""}
EVAL = {
    "prompt": 'from typing import List\n\ndef add(a: int, b: int) -> int:\n    """Sum."""\n',
    "entry_point": "add",
    "test": "def check(candidate):\n    assert candidate(1, 2) == 3\n",
}
FILED = {
    "solution_file": "sums.py",
    "tests": "import unittest\nfrom sums import add\nclass T(unittest.TestCase):\n"
    "    def test_a(self): self.assertEqual(add(1, 2), 3)\nif __name__ == '__main__':\n    unittest.main()\n",
}


def test_answers_are_right_where_their_tests_pass() -> None:
    good = "def add(a, b):\n    return a + b"
    cases = [
        (Case("", good.replace("\n", "\r\n"), None, MBPP), True),
        (Case("", f"Sure:\n```python\n{good}\n```\nCalled like\n```\nadd(1)\n```", None, MBPP), True),
        (Case("", f"Here it is:\n\n{good}\n\nI hope it helps!", None, MBPP), True),
        (Case("", "    return a + b\n", None, EVAL), True),
        (Case("", "  c = a + b\n  return c\n", None, EVAL), True),
        (Case("", f"```python\n{good}\n```", None, EVAL), True),
        (Case("", good, None, FILED), True),
        (Case("", good, "assert add(2, 2) == 4", {}), True),
        (Case("", "def add(a, b):\n    return 3", None, MBPP), False),
        (Case("", "def add(a, b):\n    return 0", None, FILED), False),
        (Case("", f"import sys\n{good}\nsys.exit(0)", None, MBPP), False),
        (Case("", "def add(a, b):\n    while True: pass", None, MBPP), False),
        (Case("", "I cannot do that.", None, MBPP), False),
        (Case("", good, "3", {}), None),
    ]
    found = UnitTests(cpu=1).verify([case for case, _ in cases], None)  # type: ignore[arg-type]
    assert [one.right for one in found] == [right for _, right in cases]
    assert found[8].detail == "assert add(0, 0) == 0, 'zero': AssertionError: zero"
    assert found[10].detail == "ended before its tests did" and found[11].detail == "timeout"
    assert found[0].value == found[1].value == good and isinstance(UnitTests(), Verifier)


def test_code_is_found_in_ugly_answers() -> None:
    tests = read_tests(Case("", "", None, MBPP))
    assert tests is not None and tests.entry == "add"
    two = "```py\nimport math\n```\ntext\n```python\ndef other(): pass\n```\n```bash\npip install x\n```"
    assert code_of(two) == "import math\n\n\ndef other(): pass\n"
    assert code_of("```python\ndef add(a, b):\n    return 1") == "def add(a, b):\n    return 1"  # never closed
    assert code_of("no code here, sorry") is None and code_of("") is None
    assert code_of("```python\nnot python at all\n```") is None


def test_published_solutions_pass_their_tests(data: Path) -> None:
    rows = [
        row for name in ("mbpp974", "humaneval164") for row in pq.read_table(data / f"{name}.parquet").to_pylist()[::12]
    ]
    cases = [
        Case(row.get("prompt") or row["text"], row.get("canonical_solution") or row["code"], None, row) for row in rows
    ]
    found = UnitTests().verify(cases, None)  # type: ignore[arg-type]
    assert [(row["task_id"], one.detail) for row, one in zip(rows, found, strict=True) if not one.right] == []


CODE = '''import math


class Shape:
    """A shape."""

    def __init__(self, side):
        self.side = side

    def area(self):
        # squared
        return math.pow(self.side, 2)


def total(sides):
    found = 0
    for side in sides:
        found += Shape(side).area()
    return found


print("+++ @@ -1 +1 @@", total([1, 2]))'''


def test_every_state_lints_clean_and_the_diffs_rebuild_the_program() -> None:
    texts = set()
    for seed in range(6):
        states = sequence(CODE, seed)
        steps = diffs(states)
        assert states[0] == "" and states[-1] == CODE and all(lint(state) == () for state in states)
        assert rebuilt(steps) == CODE and [rebuilt(steps[:n]) for n in range(len(states))] == states
        assert states == sequence(CODE, seed) and not any(step.startswith(("---", "+++")) for step in steps)
        texts.add(tuple(states))
    assert len(texts) > 1
    assert lint("def f():\n    return undefined")[0] == ("E0602", 2)
    assert [name for name, _ in lint("def f():\n  return 1\n")] == ["W0311"] and lint("import os\n") == ()
    with pytest.raises(ValueError, match="does not fit"):
        rebuilt(["@@ -1 +1 @@\n-x\n+y"])
    odd = "x = 1\n+y = 2\n@@ -1 +1 @@\n--- a"
    assert rebuilt(diffs(["", "x = 1", odd, odd + "\n"])) == odd + "\n"


class Corpus:
    """Rows, and a door that answers by a function."""

    name, digest, licence, price = "small", "d", "MIT", (0.0, 0.0)

    def __init__(self, rows: list[dict[str, Any]], say: Callable[[ChatRequest], str] | None = None) -> None:
        self.all, self.say, self.facts, self.rows = rows, say, {}, len(rows)  # type: ignore[var-annotated]
        self.tools = self

    def chat(self, model: str) -> "Corpus":
        return self

    def complete(self, requests: Sequence[ChatRequest], progress: Any = None) -> list[ChatAnswer | ChatError]:
        assert self.say is not None
        return [ChatAnswer(self.say(request), 10, 10, True) for request in requests]

    def progress(self, done: int, total: int) -> None:
        pass

    def record(self, **facts: Any) -> None:
        self.facts |= facts

    def tables(self, columns: Sequence[str] | None = None) -> Iterator[pa.Table]:
        yield table(self.all).select(list(columns or ROW.names))


def row(name: str, task: str, answer: str, meta: dict[str, Any] | None = None) -> dict[str, Any]:
    found: dict[str, Any] = dict.fromkeys(ROW.names) | {"source": "s", "position": 0, "content_id": name}
    found |= {"row_id": source_row_id("s", name), "meta": json.dumps(meta or {})}
    return found | {"messages": [message("user", task), message("assistant", answer)]}


def made_by(maker: Any, corpus: Corpus) -> list[dict[str, Any]]:
    return [one for part in maker.make(corpus) for one in part.to_pylist()]


def test_lint_seq_makes_rows_and_says_what_it_skipped() -> None:
    dirty = "def f():\n    return nothing_of_the_kind"
    rows = [row("a", "q", f"```python\n{CODE}\n```"), row("b", "q", dirty), row("c", "q", "prose and no code")]
    rows += [row("d", "q", CODE + "\n" * 2 + "x = 1\n" * 300)]
    corpus = Corpus(rows)
    maker = LintSeq(samples=2, workers=1)
    with pytest.warns(UserWarning, match="2 rows of 4; skipped: 1 no_python, 1 not_clean, 1 too_long"):
        made = made_by(maker, corpus)
    assert corpus.facts["synthesis"]["made"] == 2 and len({one["row_id"] for one in made}) == 2
    for one in made:
        assert one["parents"] == [rows[0]["row_id"]] and one["messages"][0]["content"] == "q"
        steps = one["messages"][1]["content"].split(f"\n{DIFF}\n")
        assert (
            rebuilt(steps) == json.loads(one["meta"])["program"] == program(rows[0]["messages"][1]["content"]) == CODE
        )
    with pytest.warns(UserWarning):
        again = made_by(LintSeq(samples=2, workers=2), Corpus(rows))
    assert [one["messages"] for one in again] == [one["messages"] for one in made]
    assert LintSeq(replace=True).consumes == "rewritten" and LintSeq().consumes is None


def test_cleaning_is_accepted_only_where_the_tests_still_pass() -> None:
    old = "def add(a, b):\n    x = a + b\n    return x"
    said = {
        "Rename": "```python\ndef add(a, b):\n    total = a + b\n    return total\n```",
        "Split": "```python\ndef add(a, b):\n    return 7\n```",
        "Write": '```python\n# Adds.\ndef add(a, b):\n    """The sum."""\n    total = a + b\n    return total\n```',
    }
    rows = [row("a", "Add.", old, MBPP), row("b", "Add.", "def add(a, b): return 9", MBPP), row("c", "Hi", "Hello")]
    corpus = Corpus(rows, lambda request: said[request.messages[-1][1].split()[0]])
    (made,) = made_by(CleanCode("m"), corpus)
    meta = json.loads(made["meta"])
    assert meta["cleaned"] == ["rename", "plan"] and meta["before"] == old and meta["made"]["prompt"] == "clean_plan"
    assert made["messages"][-1]["content"] == said["Write"] and made["parents"] == [rows[0]["row_id"]]
    told = corpus.facts["synthesis"]
    assert told["refused"] == {"fails_its_tests": 1, "modularise_fails_tests": 1} and told["verified"] == 2
    assert told["asked"] == told["answered"] == 3


def test_pairs_come_from_tests_that_part_the_solutions() -> None:
    def say(request: ChatRequest) -> str:
        task = request.messages[-1][1]
        if task.startswith("Write "):
            if "nonsense" in task:
                return "I would rather not."
            return "```python\nassert add(1, 2) == 3\nassert add(2, 2) == 4\nassert True\n```"
        if "easy" in task or request.seed % 2:
            return f"def add(a, b):\n    return a + b + 0 * {request.seed}"
        return f"def add(a, b):\n    return {request.seed}"

    rows = [row(name, f"{name} add", "") for name in ("mixed", "easy", "nonsense")]
    corpus = Corpus(rows, say)
    (made,) = made_by(TestedPreference("m"), corpus)
    assert made["parents"] == [rows[0]["row_id"]] and made["messages"] == [message("user", "mixed add")]
    assert "a + b" in made["chosen"][0]["content"] and "a + b" not in made["rejected"][0]["content"]
    assert json.loads(made["meta"])["tests"] == ["assert add(1, 2) == 3", "assert add(2, 2) == 4"]
    told = corpus.facts["synthesis"]
    assert told["asked"] == 3 + 16 and told["refused"] == {"all_pass": 1} and told["unparsed"] == {"no_tests": 1}
    assert made_by(TestedPreference("m"), Corpus(rows, say)) == [made]
    with pytest.warns(UserWarning, match="1 all_pass"):
        assert made_by(TestedPreference("m", own_tests=True), Corpus([row("easy", "easy", "", MBPP)], say)) == []


def test_programs_are_tested_while_others_are_still_asked_for() -> None:
    steps = {"Rename": "total", "Split": "whole", "Write": "whole"}

    def cleaned(request: ChatRequest) -> str:
        name = steps[request.messages[-1][1].split()[0]]
        doc = '    """The sum."""\n' * request.messages[-1][1].startswith("Write")
        return f"```python\ndef add(a, b):\n{doc}    {name} = a + b\n    return {name}\n```"

    rows = [row(f"{n}", "Add.", "def add(a, b):\n    x = a + b\n    return x", MBPP) for n in range(40)]
    corpus, sums = Corpus(rows), Telling("a + b")
    late = corpus.tools = Late(cleaned, sums)  # type: ignore[assignment]
    assert len(made_by(CleanCode("m", verifier=sums), corpus)) == 40 and late.waited == 3
    assert corpus.facts["synthesis"]["verified"] == 120

    def solved(request: ChatRequest) -> str:
        return f"def add(a, b):\n    return {'a + b' if request.seed % 2 else 'a'} + 0 * {request.seed}"

    corpus = Corpus([row(f"{n}", f"Add {n}.", "", MBPP) for n in range(5)])
    late = corpus.tools = Late(solved, sums)  # type: ignore[assignment]
    made = made_by(TestedPreference("m", limits=sums), corpus)  # type: ignore[arg-type]
    assert late.waited == 1 and {one["parents"][0] for one in made} == {one["row_id"] for one in corpus.all}
    assert all(
        ("a + b" in one[side][0]["content"]) == (side == "chosen") for one in made for side in ("chosen", "rejected")
    )


def test_asserts_are_read_from_ugly_answers() -> None:
    assert parse_asserts("1. assert f(1) == 2\n2. `assert f(2) == 3`\nassert 1 == 1") == [
        "assert f(1) == 2",
        "assert f(2) == 3",
    ]
    assert parse_asserts("nothing") == "no_tests" and parse_asserts("```python\nx = 1\n```") == "no_tests"
