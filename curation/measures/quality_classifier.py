"""How much a row looks like the user's good rows and how little like the bad ones: a learned quality filter."""

import heapq
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import pyarrow as pa

from ..door import Progress
from ..folder import HouseError, about, read_parquet
from ..steps import Tools
from ..text.view import VIEW_COLUMNS, View

if TYPE_CHECKING:
    from ..selecting.classifier import Model


@dataclass(frozen=True)
class QualityClassifier:
    """Probability that a row is one of the good ones, by a linear classifier over hashed word n-grams that is trained
    in seconds on the user's own sets, as DCLM filters the web (Li et al., arXiv 2406.11794; fastText there).

    positives, negatives: addresses of good and bad rows, as a source's path (files, folders, patterns, any shape).
    audits: folders of earlier runs whose `gristmill audit` labels count too, good as positive and bad as negative.
    view: what is read of a row. features: size of the table of n-grams. limit: rows of each address at most, drawn by
    content. A content on both sides is left out. The values are kept by the contents of all these files.

    quality_prob: 0 to 1, null for a row without words. Cut it by a quantile (DCLM kept the best tenth), as 0.5 means
    nothing where the two sides are not the choice you face. The cross-validated AUROC is told in the step's notes: near
    0.5 nothing was learnt; near 1 the sides differ by more than quality (topic, source), which is what it then filters.
    """

    positives: tuple[str, ...]
    negatives: tuple[str, ...]
    audits: tuple[str, ...] = ()
    view: View = "pair"
    features: int = 1 << 18
    limit: int = 20_000

    version: ClassVar[int] = 1
    columns: ClassVar[dict[str, pa.DataType]] = {"quality_prob": pa.float32()}
    models: ClassVar[tuple[str, ...]] = ()

    def __post_init__(self) -> None:
        if self.features < 2 or self.limit < 1:
            raise HouseError(f"{self}: features is at least 2, limit at least 1")

    def inputs(self) -> str:
        """Digest of all files that it learns from."""
        from ..inputs import files_inputs
        from ..reading.files import files_digest, find_files
        from ..rows import digest

        pieces: list[str] = []
        for side in (self.positives, self.negatives):
            for address in side:
                with about(f"QualityClassifier, {'negatives' if pieces.count('side') else 'positives'}"):
                    files = find_files(address)
                local = all(file.fs.protocol in ("file", ("file", "local")) for file in files)
                pieces.append(files_inputs([file.path for file in files]) if local else files_digest(files))
            pieces.append("side")
        pieces += [files_inputs(map(str, _label_files(out))) for out in self.audits]
        return digest(*pieces)

    def measure(self, rows: pa.Table, tools: Tools, progress: Progress) -> pa.Table:
        """One row of `columns` for each row, in order."""
        found = _model(self, self.inputs()).probabilities(rows, self.view)
        progress(rows.num_rows, rows.num_rows)
        return pa.table({"quality_prob": pa.array(found.astype(np.float32), mask=np.isnan(found))})


@lru_cache(maxsize=4)
def _model(measure: QualityClassifier, inputs: str) -> "Model":
    from ..selecting.classifier import train

    parts = [*_side(measure.positives, True, measure.limit), *_side(measure.negatives, False, measure.limit)]
    parts += [part for out in measure.audits for part in _labelled(out)]
    if not parts:
        raise HouseError("QualityClassifier has nothing to learn from: give positives and negatives, or audits")
    positive = np.concatenate([np.asarray(side) for _, side in parts])
    rows = pa.concat_tables([part for part, _ in parts])
    return train(rows, positive, measure.view, measure.features, "QualityClassifier")


def _side(addresses: Sequence[str], positive: bool, limit: int) -> Iterator[tuple[pa.Table, list[bool]]]:
    """Of each address `limit` rows of the lowest content ids, and their side."""
    from ..reading.source import Source, Unreadable, iter_rows
    from ..rows import table

    for number, address in enumerate(addresses):
        source = Source(f"side{number}", address, "-")
        unreadable = 0

        def read(source: Source = source) -> Iterator[dict[str, Any]]:
            nonlocal unreadable
            for row in iter_rows(source):
                if isinstance(row, Unreadable):
                    unreadable += 1
                else:
                    yield row

        with about(f"QualityClassifier, {'positives' if positive else 'negatives'} {address}"):
            rows = heapq.nsmallest(limit, read(), key=lambda row: str(row["content_id"]))
        if unreadable:
            warnings.warn(f"QualityClassifier: {unreadable} unreadable records of {address} left out", stacklevel=2)
        yield table(rows).select(["content_id", *VIEW_COLUMNS]), [positive] * len(rows)


def _label_files(out: str) -> list[Any]:
    from pathlib import Path

    files = sorted((Path(out) / "audits").glob("*/labels.parquet"))
    if not files:
        raise HouseError(f"{out} holds no labels of `gristmill audit` (audits/*/labels.parquet)")
    return files


def _labelled(out: str) -> Iterator[tuple[pa.Table, list[bool]]]:
    """The rows of a run that people labelled good or bad, and what they said."""
    from pathlib import Path

    import pyarrow.parquet as pq

    said = {
        row["row_id"]: row["label"] == "good"
        for file in _label_files(out)
        for row in read_parquet(file, ["row_id", "label"], "Restore it, or leave its run out of `audits`").to_pylist()
        if row["label"] in ("good", "bad")
    }
    wanted = pa.array(sorted(said), pa.string())
    for part in sorted((Path(out) / "rows").glob("*.parquet")):
        columns = ["row_id", "content_id", *VIEW_COLUMNS]
        rows = pq.read_table(part, columns=columns, filters=_among(wanted))
        if rows.num_rows:
            yield rows.drop_columns(["row_id"]), [said[name] for name in rows["row_id"].to_pylist()]


def _among(names: pa.Array) -> Any:
    import pyarrow.compute as pc

    return pc.field("row_id").isin(names)
