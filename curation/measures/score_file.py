"""What a model made of each row elsewhere: the file of `gristmill score`, or what a training run saw."""

from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import ClassVar

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from ..door import Progress
from ..folder import HouseError
from ..keys import Found, keys_of
from ..steps import Tools

HOMES = ("scores.parquet", "row_losses/train.parquet", "train.parquet")  # of a folder that is named, the first found


@dataclass(frozen=True)
class ScoreFile:
    """What `gristmill score` or a training run wrote of each row: its loss, how likely its tokens were.

    path: a Parquet file with `row_id`, or `content_id`, and any of the columns below; or a folder: of a training stage
    (its row_losses, as the last epoch saw each row) or of scores. Rows are found by content_id where the file has it,
    else by row_id; rows of equal content share one value. Another file at the same path is measured anew.

    loss: nats a target token; of a pair what its loss said. perplexity: exp(loss), where the file has it. mean_prob,
    min_prob: of the target tokens. margin: how far the preferred answer lies above the other (training: of the rewards;
    scores: of the log-probabilities). scored_tokens: targets. All null for a row that the file does not hold.
    """

    path: str

    version: ClassVar[int] = 1
    columns: ClassVar[dict[str, pa.DataType]] = {
        "loss": pa.float64(),
        "perplexity": pa.float64(),
        "mean_prob": pa.float64(),
        "min_prob": pa.float64(),
        "margin": pa.float64(),
        "scored_tokens": pa.int64(),
    }
    models: ClassVar[tuple[str, ...]] = ()

    def inputs(self) -> str:
        """Digest of the file."""
        from ..inputs import files_inputs

        return files_inputs([str(self._file())])

    def measure(self, rows: pa.Table, tools: Tools, progress: Progress) -> pa.Table:
        """One row of `columns` for each row, in order."""
        key, found, values = _read(str(self._file()), self.inputs())
        places = found.places(keys_of(rows[key]))
        progress(rows.num_rows, rows.num_rows)
        return values.take(pa.array(places, mask=places < 0))

    def _file(self) -> Path:
        path = Path(self.path)
        if path.is_file():
            return path
        for name in HOMES:
            if (path / name).is_file():
                return path / name
        raise HouseError(
            f"ScoreFile: {path} is no file and no folder with {', '.join(HOMES)}: write one by `gristmill score MODEL"
            " DATA --out FILE.parquet`, or name a training stage that has finished"
        )


@lru_cache(maxsize=2)
def _read(path: str, inputs: str) -> tuple[str, Found, pa.Table]:
    """By which id rows are found, their places, and the columns of ScoreFile."""
    try:
        table = pq.read_table(path)
    except (OSError, pa.ArrowException) as error:
        raise HouseError(f"ScoreFile: {path} cannot be read: {str(error).splitlines()[0]}") from error
    names = set(table.column_names)
    key = next((name for name in ("content_id", "row_id") if name in names), None)
    have = {name: _column(table, name) for name in ScoreFile.columns}
    if key is None or all(column is None for column in have.values()):
        raise HouseError(
            f"ScoreFile: {path} has the columns {', '.join(table.column_names)}; it needs row_id or content_id, and of"
            f" {', '.join(ScoreFile.columns)} at least one"
        )
    try:
        found = Found.of(keys_of(table[key]))
    except ValueError as error:
        raise HouseError(f"ScoreFile: {path}: {key}: {error}; it holds ids that are not gristmill's") from error
    columns = {
        name: pa.nulls(table.num_rows, kind) if (column := have[name]) is None else column.cast(kind)
        for name, kind in ScoreFile.columns.items()
    }
    return key, found, pa.table(columns).combine_chunks()


def _column(table: pa.Table, name: str) -> pa.ChunkedArray | None:
    names = set(table.column_names)
    if name == "scored_tokens":
        return table["tokens"] if "tokens" in names else None
    if name == "margin" and name not in names:
        if "reward" in names:
            return table["reward"]
        return pc.subtract(table["logp"], table["rejected_logp"]) if {"logp", "rejected_logp"} <= names else None
    return table[name] if name in names else None
