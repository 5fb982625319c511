"""Makers that make rows out of each row by itself, without asking a model."""

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import pyarrow as pa

from .rows import Row, made_row, table
from .steps import Corpus


def unfolded(
    maker: object,
    corpus: Corpus,
    contents: Callable[[Row], Iterable[Mapping[str, Any]]],
    source: str,
    wanted: str,
    columns: Sequence[str] | None = None,
) -> Iterator[pa.Table]:
    """Tables of new rows, one for each part that gave any. contents: of a row (with `columns`, row_id among them) what
    the rows made of it hold. source: theirs. wanted: what a row must have, told in a warning where nothing was made."""
    position = 0
    for part in corpus.tables(columns):
        made: list[Row] = []
        for row in part.to_pylist():
            for content in contents(row):
                made.append(made_row(repr(maker), [row["row_id"]], position, source, **content))
                position += 1
        if made:
            yield table(made)
    if not position:
        warnings.warn(f"{type(maker).__name__} made no row of {corpus.rows:,}: {wanted}", stacklevel=2)
