"""One part of a run by itself: training on data that lies somewhere, and making a model from it."""

import re
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from ..curation.folder import HouseError, RunFolder, read_json, sole
from ..curation.ledger import records
from ..curation.reading.source import read_source
from ..curation.shards import KINDS
from ..tuning.settings import NewModel, Training
from .progress import Done, Silent, interrupts_wait, timed
from .recipe import Curate, Model, Recipe, Source, build_settings
from .run import run
from .stages import TRAINS_ON, Objective

HELD_OUT = 0.05  # share of the rows that are measured and not trained, where evaluate_every asks for some


def train_single(
    objective: Objective,
    data: str,
    settings: Sequence[str],
    model: Path,
    out: Path,
    start: Path | None,
    licence: str,
    show: Silent,
) -> dict[str, Any]:
    """Trains `model` in OUT/OBJECTIVE on a curated folder, or on any readable data, curated into OUT first."""
    with interrupts_wait():
        from ..tuning.objectives import find_loss
        from ..tuning.ranks import world
        from .launch import train_here
        from .training import told
        from .training_text import end_text

    how = build_settings(Training, settings)
    find_loss(how.loss, objective)
    folder = RunFolder(out)
    adapter = start / "adapter" if start is not None and (start / "adapter").is_dir() else start  # of a stage's folder
    curated, held_out = Path(data), HELD_OUT if how.evaluate_every else 0.0
    with world() as here, ExitStack() as held:
        show = show if here.main else Silent()
        here.first(lambda: held.enter_context(sole(folder.root)))
        if not (curated / "manifest.json").is_file():
            kind = TRAINS_ON[objective][0]
            curated = here.first(lambda: _curated(data, kind, licence, model, folder, held_out, show))
        home = folder.stage(objective)

        def do(progress: Any) -> Done:
            parts: dict[str, Any] = {"progress": told(progress), "references": folder.root / "references"}
            done = train_here(objective, curated, model, home, how, adapter=adapter, name=objective, **parts)
            return Done(end_text(done, home), data=done)

        return timed(f"train {objective}", show, do).data


def _curated(data: str, kind: str, licence: str, model: Path, folder: RunFolder, held_out: float, show: Silent) -> Path:
    """Reads `data` into the run's folder and makes a curated set of all that can be trained on."""
    assert kind in KINDS
    name = re.sub(r"[^A-Za-z0-9_]+", "-", folder.root.resolve().name).strip("-_") or "run"
    recipe = Recipe(
        name,
        sources=(Source("data", data, licence=licence),),
        models={"model": Model(path=str(model))},
        stages=(Curate("data", kind=kind, sources=("data",), held_out=held_out),),  # type: ignore[arg-type]
    )
    try:
        done = run(recipe, folder.root, parts="curate", show=show)
    except HouseError as error:
        if said := _of_another_kind(folder, data, kind):
            raise HouseError(said) from error
        raise
    if done.cached and Path(data).exists():  # a finished run does not open its sources again
        read_source(recipe.sources[0], folder)
    return folder.curated("data")


def _of_another_kind(folder: RunFolder, data: str, kind: str) -> str:
    """What to say where every row of `data` was dropped because it is of another kind; nothing where that is not so."""
    record = folder.rows / "data.json"
    dropped = [reason for step in records(folder, "data") for reason in step["reasons"] if step["kept"] == 0]
    if dropped != ["wrong_shape"] or not record.is_file():
        return ""
    verbs = {"sft": "gristmill sft", "preference": "gristmill dpo", "kto": "gristmill kto"}
    holds = {"sft": "conversations", "preference": "preference pairs", "kto": "single answers that are good or bad"}
    others = ", ".join(f"`{verbs[other]}` on {holds[other]}" for other in verbs if other != kind)
    shape = read_json(record)["shape"]
    return (
        f"{data} holds rows of the shape {shape}; `{verbs[kind]}` trains on {holds[kind]}, {others}. "
        "Use the one that fits, into another --out"
    )


def make_single(folder: Path, corpus: str, settings: Sequence[str], show: Silent) -> dict[str, Any]:
    """Makes the model that `settings` (of NewModel) describe from any readable data."""
    with interrupts_wait():
        from ..tuning.models import make_model

    spec = build_settings(NewModel, settings)
    if folder.exists() and any(folder.iterdir()):
        raise HouseError(f"{folder} is not empty: choose another folder for the new model")
    with tempfile.TemporaryDirectory(prefix="gristmill-corpus-") as scratch:
        parts = RunFolder(scratch)
        timed("read corpus", show, lambda progress: _read(corpus, parts, progress))

        def make(progress: Any) -> Done:
            done = make_model(folder, spec, _texts(parts, spec.rows), progress)
            return Done(f"{done['params']:,} parameters, {done['tokens']:,} tokens -> {folder}", data=done)

        return timed("make model", show, make).data


def _read(corpus: str, folder: RunFolder, progress: Any) -> Done:
    record = read_source(Source("corpus", corpus, licence="unknown"), folder, lambda rows: progress(rows, 0))
    return Done(f"{record['rows']:,} rows ({record['shape']}), {record['quarantined']:,} could not be read")


def _texts(folder: RunFolder, limit: int) -> Iterator[Any]:
    from .models import evenly

    parts = sorted(folder.rows.glob("*.parquet"))
    total = sum(pq.read_metadata(part).num_rows for part in parts)
    return evenly((pq.read_table(part) for part in parts), total, limit)
