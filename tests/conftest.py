"""What the tests of every room share: the folder of real data, and small sources as reading would write them."""

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from gristmill.curation.folder import RunFolder, write_json, write_parquet
from gristmill.curation.rows import ROW, content_id, counted_row_id, message, table

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as in a shell's background job: children would never see Ctrl-C
    signal.signal(signal.SIGINT, signal.default_int_handler)
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # bitsandbytes and transformers call a hub at import otherwise
os.environ.setdefault("PREFECT_SERVER_ANALYTICS_ENABLED", "false")

WriteSource = Callable[..., list[str]]


@pytest.fixture
def data() -> Path:
    """The folder of real data sets; a test that wants it is skipped where it is absent."""
    folder = Path(os.environ.get("GRISTMILL_DATA", Path(__file__).parents[1] / "../shared/data")).resolve()
    if not folder.is_dir():
        pytest.skip(f"no real data at {folder}: set GRISTMILL_DATA")
    return folder


def conversation(source: str, position: int, prompt: str, response: str | None, **more: Any) -> dict[str, Any]:
    """A row (every field of ROW) of one user turn and, unless `response` is None, one assistant turn."""
    turns = [message("user", prompt), *([] if response is None else [message("assistant", response)])]
    row: dict[str, Any] = dict.fromkeys(ROW.names) | {"source": source, "position": position, "messages": turns} | more
    row["content_id"] = content_id(row)
    row["row_id"] = counted_row_id(source, row["content_id"], position)
    return row


@pytest.fixture
def make_row() -> Callable[..., dict[str, Any]]:
    return conversation


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    return RunFolder(tmp_path / "out")


@pytest.fixture
def write_source(folder: RunFolder) -> WriteSource:
    """write_source(name, rows, part_rows=…): writes rows/NAME-*.parquet and rows/NAME.json; gives the row ids."""

    def write(name: str, rows: list[dict[str, Any]], part_rows: int = 50_000) -> list[str]:
        parts = []
        for start in range(0, len(rows), part_rows):
            parts.append(f"{name}-{len(parts):05d}.parquet")
            write_parquet(folder.rows / parts[-1], table(rows[start : start + part_rows]))
        record = {"name": name, "path": f"{name}.jsonl", "shape": "messages", "licence": "MIT", "digest": "0" * 64}
        counts = {"rows": len(rows), "quarantined": 0, "read": len(rows), "parts": parts}
        write_json(folder.rows / f"{name}.json", record | counts)
        return [row["row_id"] for row in rows]

    return write
