"""The compiled view equals the plain one."""

from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gristmill.curation.folder import RunFolder
from gristmill.curation.reading.source import Source, iter_rows
from gristmill.curation.rows import ROW, message, table
from gristmill.curation.text.texts import texts
from gristmill.curation.text.view import View, view

said = st.one_of(st.none(), st.sampled_from(["", "\n", "a", "Zürich ☂", "two\n\nlines", "漢字"]))
turns = st.one_of(st.none(), st.lists(st.tuples(st.sampled_from(["system", "user", "assistant"]), said), max_size=4))


def row(messages: Any, chosen: Any, rejected: Any, text: str | None) -> dict[str, Any]:
    def of(found: Any) -> Any:
        return None if found is None else [message(role, content) for role, content in found]

    base: dict[str, Any] = dict.fromkeys(ROW.names) | {"row_id": "r", "content_id": "c", "source": "s", "position": 0}
    return base | {"messages": of(messages), "chosen": of(chosen), "rejected": of(rejected), "text": text}


@pytest.mark.parametrize("which", ["pair", "prompt", "response"])
@settings(deadline=None)  # the first example waits for the compiler
@given(rows=st.lists(st.tuples(turns, turns, turns, said), max_size=5))
def test_equals_the_plain_view(which: View, rows: list[Any]) -> None:
    found = table(row(*each) for each in rows)
    assert texts(found, which).to_pylist() == view(found, which)
    assert texts(found.slice(1), which).to_pylist() == view(found.slice(1), which)


def test_equals_the_plain_view_on_real_rows(data: Path) -> None:
    rows = pa.concat_tables(
        table(
            item
            for _, item in zip(range(500), iter_rows(Source(name, str(data / f"{name}.parquet"), "MIT")), strict=False)
        )
        for name in ("alpaca_raw_partial", "hh_rlhf_harmless_test", "docs_til")
    )
    for which in ("pair", "prompt", "response"):
        assert texts(rows, which).to_pylist() == view(rows, which)


def test_no_rows(folder: RunFolder) -> None:
    assert texts(ROW.empty_table(), "pair").to_pylist() == []
