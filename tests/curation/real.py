"""Rows of the real data sets, as reading makes them, for tests that compare a compiled judge with its plain
definition."""

from functools import lru_cache
from itertools import islice
from pathlib import Path

import pyarrow as pa

from gristmill.curation.reading.source import Source, iter_rows
from gristmill.curation.rows import table


@lru_cache
def real_rows(data: Path, name: str, limit: int | None = None) -> pa.Table:
    """The first `limit` rows of one set."""
    source = Source(name, str(data / f"{name}.parquet"), "test")
    return table(islice(iter_rows(source), limit))
