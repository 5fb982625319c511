"""Docstrings as documents: what is taken from a module, and the standard library's own."""

import json
from itertools import islice
from pathlib import Path

import pytest

from gristmill.curation.folder import HouseError, RunFolder
from gristmill.curation.reading import source as reading
from gristmill.curation.reading.docstrings import docstrings, module_files
from gristmill.curation.reading.formats import Record, Unreadable
from gristmill.curation.reading.source import Source, iter_rows, read_source

LONG = "A docstring that is longer than forty characters, truly."
MODULE = f'''"""{LONG} Module."""
import sys

def short():
    """Too short."""

if sys:
    def inside(a: int, *b, c="x\\d") -> str:
        """{LONG} Function.

            Indented.
        """

class Thing:
    """{LONG} Class."""

    def __init__(self, size=1): ...

    async def run(self):
        """{LONG} Method."""
        def nested():
            """{LONG} Nested."""
'''


def test_what_is_taken_from_a_module(tmp_path: Path) -> None:
    (tmp_path / "a.py").write_text(MODULE)
    (tmp_path / "bad.py").write_bytes(b"x = 1\ndef broken(:\n")
    (tmp_path / "nul.py").write_bytes(b"x = 1\x00")
    files = [(f"pkg/{name}", tmp_path / name) for name in ("a.py", "bad.py", "nul.py")]
    found = [record for _, record in docstrings(files)]
    taken = [record.fields for record in found if isinstance(record, Record)]
    assert [(each["qualified_name"], each["kind"], each["signature"]) for each in taken] == [
        ("pkg.a", "module", None),
        ("pkg.a.inside", "function", "inside(a: int, *b, c='x\\\\d') -> str"),
        ("pkg.a.Thing", "class", "Thing(size=1)"),
        ("pkg.a.Thing.run", "method", "run(self)"),
        ("pkg.a.Thing.run.nested", "function", "nested()"),
    ]
    assert taken[1]["text"] == f"{LONG} Function.\n\nIndented."
    assert all(each["file"] == "pkg/a.py" and each["module"] == "pkg.a" for each in taken)
    faults = [record for record in found if isinstance(record, Unreadable)]
    assert [(fault.file, fault.line) for fault in faults] == [("pkg/bad.py", 2), ("pkg/nul.py", 0)]
    assert faults[0].raw == "def broken(:" and "SyntaxError" in faults[0].error


def test_the_standard_library(folder: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    files = module_files("docstrings:stdlib")
    names = [name for name, _ in files]
    assert "textwrap.py" in names and names == sorted(names) and not any("site-packages" in name for name in names)
    monkeypatch.setattr(reading, "module_files", lambda _: [f for f in files if f[0] in ("string.py", "textwrap.py")])
    source = Source("docs", "docstrings:stdlib", "PSF-2.0")
    record = read_source(source, folder)
    rows = [row for row in iter_rows(source) if not isinstance(row, Unreadable)]
    assert record["shape"] == "text" and record["rows"] == len(rows) == record["read"] > 10
    wrap = next(row for row in rows if json.loads(row["meta"])["qualified_name"] == "textwrap.wrap")
    meta = json.loads(wrap["meta"])
    assert meta["signature"] == "wrap(text, width=70, **kwargs)" and wrap["text"].startswith("Wrap a single paragraph")
    assert set(meta) == {"qualified_name", "signature", "kind", "module", "file"}
    assert not any(str(Path(files[0][1]).parent) in str(row) for row in rows)
    assert read_source(source, folder) == record


def test_every_package_and_bad_addresses() -> None:
    assert any(name.startswith("pyarrow/") for name, _ in module_files("docstrings:all"))
    with pytest.raises(HouseError, match="docstrings:stdlib or docstrings:all"):
        next(islice(iter_rows(Source("d", "docstrings:numpy", "BSD")), 1))
