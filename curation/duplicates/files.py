"""What a judge of duplicates keeps beside its verdicts (`corpus.kept`), and how another decision reads it again."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from ..folder import write_parquet
from ..text.spans import Ints
from .groups import Said
from .minhash import Pairs

ROWS, UNITS, PAIRS, FULL, MEMBERS = (f"duplicates-{n}.parquet" for n in ("rows", "units", "pairs", "full", "members"))


def write_said(kept: Path, settings: str, said: Said, lengths: Ints, values: np.ndarray | None, measure: str) -> None:
    """rows: each row's length and value to rank it by; units: each text's number and, of turns, its row; pairs: numbers
    and Jaccard of all verified pairs above the floor, and whether they met outside a full bucket; full, members: the
    full buckets. Rows are numbered as they came."""
    pairs = said.pairs
    rows = {"length": lengths} | ({} if values is None else {"value": values})
    units = {"group": pairs.group} | ({} if said.row is None else {"row": said.row})
    near = {"left": pairs.left, "right": pairs.right, "similarity": pairs.similarity, "light": pairs.light}
    about = {"settings": settings, "measure": measure}
    write_parquet(kept / ROWS, pa.table(rows).replace_schema_metadata(about))
    write_parquet(kept / UNITS, pa.table(units))
    write_parquet(kept / PAIRS, pa.table(near))
    write_parquet(kept / FULL, pa.table({"size": pairs.sizes}))
    write_parquet(kept / MEMBERS, pa.table({"text": pairs.members}))


def read_said(kept: Path, settings: str, measure: str, came: int) -> tuple[Said, Ints, np.ndarray | None, bool] | None:
    """What was measured, lengths, values, and whether the values are those of `measure`; None where the files are of
    other settings or of other than `came` rows, or do not lie there."""
    try:
        rows = pq.read_table(kept / ROWS)
        about = rows.schema.metadata or {}
        if about.get(b"settings") != settings.encode() or rows.num_rows != came:
            return None
        units, near, full, members = (pq.read_table(kept / name) for name in (UNITS, PAIRS, FULL, MEMBERS))
    except (OSError, pa.ArrowException):
        return None
    columns = {name: near[name].to_numpy() for name in ("left", "right", "similarity")}
    light = near["light"].to_numpy()
    pairs = Pairs(units["group"].to_numpy(), **columns, light=light, sizes=full["size"].to_numpy(),
                  members=members["text"].to_numpy())  # fmt: skip
    row = units["row"].to_numpy() if "row" in units.column_names else None
    values = rows["value"].to_numpy() if "value" in rows.column_names else None
    same = about.get(b"measure") == measure.encode()
    return Said(came, pairs, row), rows["length"].to_numpy(), values, same
