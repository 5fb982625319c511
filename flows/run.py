"""A run: everything that a recipe says, one job after the other, each skipped where its marker stands.

`run` is plain Python. `run_in_prefect` is the same with one Prefect task per job. A finished recipe is recognised by
OUT/run.json before Prefect, torch or DuckDB is imported.
"""

import difflib
import os
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import ExitStack, closing
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

from ..curation.door import Progress
from ..curation.folder import LOCK, HouseError, RunFolder, read_json, sole, whole_file, write_json
from ..curation.pool import INLINE, Pool, pool
from ..curation.reading.source import read_source
from ..curation.rows import digest as digest_of
from ..tuning.hub import model_folder
from ..tuning.trackers import check_trackers
from .models import Workshop, set_plan
from .progress import Bar, Done, Silent, interrupts_wait, timed
from .recipe import Curate, Recipe, Source, Train, check, digest, dump
from .server import prefect_environment, prefect_server
from .stages import Evaluate, answering, cautions, made_on_the_spot, models_of, steps_of

Parts = Literal["all", "curate"]
FILES = {".parquet", ".jsonl", ".json", ".csv", ".tsv", ".arrow", ".gz", ".zst"}  # what else a path says is no file's
NOT_OURS = ("answers", "measures", "models", "cache")  # what may outlive a release or change without it


@dataclass(frozen=True)
class Job:
    """One unit of a run, as the terminal and Prefect show it."""

    name: str
    do: Callable[[Progress], Done]


Each = Callable[[Job, Silent], Done]


@dataclass(frozen=True)
class Result:
    """A finished run. cached: it stood already. waiting: sets left out because they need a trained model."""

    folder: RunFolder
    cached: bool = False
    waiting: tuple[str, ...] = ()

    def evaluation(self) -> list[dict[str, Any]]:
        path = self.folder.root / "evaluation.json"
        return list(read_json(path)["rows"]) if path.is_file() else []


def plainly(job: Job, show: Silent) -> Done:
    return timed(job.name, show, job.do)


def run(
    recipe: Recipe,
    out: str | Path,
    *,
    cache: str | Path | None = None,
    parts: Parts = "all",
    previous: str | None = None,
    workers: int | None = None,
    executor: str | None = None,
    show: Silent | None = None,
    each: Each = plainly,
) -> Result:
    """Does all of `recipe` that is not done yet in the folder `out`, or only its curation, and returns what stands.

    cache: folder of measures and new models, shared between releases (default: in `out`). previous: the release before
    this one, for the manifests. workers, executor: how many processes (or threads, or Ray's) judge rows side by side
    (default: GRISTMILL_WORKERS, else every processor; GRISTMILL_EXECUTOR, else processes); the result is the same.
    each: does one job. Raises HouseError for what the user can mend."""
    folder, show = RunFolder(out, cache), show or Silent()
    waiting = waiting_sets(recipe) if parts == "curate" else ()
    if finished(recipe, folder, parts):
        return Result(folder, cached=True, waiting=waiting)
    if parts == "all":
        check_trackers([name for stage in recipe.trained().values() for name in stage.settings.track])
    started = start(recipe, folder, previous)
    for caution in cautions(recipe):
        show.say(f"! {caution}")
    with ExitStack() as held:
        held.enter_context(sole(folder.root))
        crew = held.enter_context(pool(workers, executor))
        left_out = waiting if parts == "curate" else None
        for job in held.enter_context(closing(jobs(recipe, folder, started, left_out, crew))):
            each(job, show)
        _mark_finished(recipe, folder, parts)
    return Result(folder, waiting=waiting)


def run_in_prefect(recipe: Recipe, out: str | Path, **how: Any) -> Result:
    """`run` as a Prefect flow, in an embedded server unless PREFECT_API_URL names one."""
    if finished(recipe, RunFolder(out, how.get("cache")), how.get("parts", "all")):
        return run(recipe, out, **how)
    start(
        recipe, RunFolder(out, how.get("cache")), how.get("previous")
    )  # what is wrong is said before any server starts
    prefect_environment()
    with interrupts_wait():
        from .flow import as_flow
    with prefect_server(services=False):
        return as_flow(recipe.name, str(out), lambda each: run(recipe, out, **how, each=each))


# ---- beginning and end


def start(recipe: Recipe, folder: RunFolder, previous: str | None = None) -> dict[str, Any]:
    """Checks recipe and folder, stores the recipe, and returns started.json: `created` is the first start's time."""
    check(recipe)
    for name, model in recipe.models.items():
        if model.path is None:
            continue
        here = model_folder(model.path)
        if not any((here / mark).is_file() for mark in ("config.json", "modules.json")):
            raise HouseError(
                f"model {name!r}: {model.path} holds no config.json; give a folder in Hugging Face's format"
            )
    _evaluation_files(recipe)
    text = dump(recipe)
    if folder.recipe.is_file():
        _same_recipe(folder, text)
    else:
        with whole_file(folder.recipe) as temporary:
            temporary.write_text(text, encoding="utf-8")
    path = folder.root / "started.json"
    if not path.is_file():
        shared = None if folder.measures.parent == folder.root else os.path.relpath(folder.measures.parent, folder.root)
        begun = {"created": datetime.now(UTC).isoformat(timespec="seconds"), "previous": previous, "cache": shared}
        write_json(path, begun)
    return read_json(path)


def _evaluation_files(recipe: Recipe) -> None:
    """A HouseError where a Decontaminate names a file that is not there: its step comes late, hours into a long run."""
    from ..curation.judges.decontaminate import Decontaminate
    from ..curation.text.benchmark_sets import resolved

    steps = [step for stage in recipe.sets().values() for step in steps_of(recipe, stage)]
    for step in steps:
        for one in resolved(step.against, step.sets or {}) if isinstance(step, Decontaminate) else ():
            path = Path(one.path)
            if path.suffix in FILES and not any(mark in one.path for mark in ":*?[") and not path.exists():
                raise HouseError(f"evaluation set {one.title}: {one.path}: no such file or folder. Check the path.")


def _same_recipe(folder: RunFolder, text: str) -> None:
    stored = folder.recipe.read_text(encoding="utf-8")
    if stored != text:
        lines = difflib.unified_diff(stored.splitlines(), text.splitlines(), lineterm="", n=0)
        changed = [line for line in lines if line[:1] in "+-" and line[:3] not in ("+++", "---")]
        shown = "\n".join(changed[:8] + (["…"] if len(changed) > 8 else []))
        raise HouseError(
            f"{folder.root} holds a run of another recipe (- stored, + asked for):\n{shown}\n"
            "One folder is one release: choose another --out, or delete this one."
        )


def release_info(recipe: Recipe, started: dict[str, Any]) -> dict[str, Any]:
    """What a manifest says of the run that it comes from."""
    return {
        "name": recipe.name,
        "version": recipe.version,
        "created": started["created"],
        "recipe": dump(recipe),
        "recipe_digest": digest(recipe),
        "seed": recipe.seed,
        "gristmill": version("gristmill"),
        "previous": started["previous"],
    }


def authors(recipe: Recipe, stage: Curate, shop: Workshop) -> dict[str, Any]:
    """What a set's manifest says of the models whose answers it holds, and of the round that made it."""
    asked = [(step, name) for step in stage.steps if step.scope == "maker" for name in answering(step)]
    found = []
    for step, name in asked:
        trained = recipe.trained().get(name)
        said: dict[str, Any] = {"maker": type(step).__name__, "model": name, "digest": shop.digest(name)}
        if trained is not None:
            said |= {"base": trained.model, "round": trained.round}
        if caution := made_on_the_spot(recipe, name):
            said |= {"caution": caution}
        found.append(said)
    told: dict[str, Any] = {} if stage.round is None else {"round": stage.round}
    return told | {"models": found} if found else told


def finished(recipe: Recipe, folder: RunFolder, parts: Parts) -> bool:
    """Whether run.json says that this recipe is done here, and everything that it lists still stands."""
    path = folder.root / "run.json"
    if not path.is_file():
        return False
    record = read_json(path)
    same = record["recipe"] == digest(recipe) and record["overrides"] == _overrides(folder)
    if not same or parts not in ("curate", record["parts"]):
        return False
    return all(_bytes(folder.root / name) == size for name, size in record["files"].items())


def _mark_finished(recipe: Recipe, folder: RunFolder, parts: Parts) -> None:
    files = {
        str(path.relative_to(folder.root)): path.stat().st_size
        for path in sorted(folder.root.rglob("*"))
        if path.is_file() and path.relative_to(folder.root).parts[0] not in (*NOT_OURS, LOCK, "run.json")
    }
    record = {"recipe": digest(recipe), "parts": parts, "overrides": _overrides(folder), "files": files}
    write_json(folder.root / "run.json", record)


def _overrides(folder: RunFolder) -> str | None:
    path = folder.root / "overrides.parquet"
    return digest_of(path.read_bytes().hex()) if path.is_file() else None


def _bytes(path: Path) -> int:
    return path.stat().st_size if path.is_file() else -1


# ---- jobs


def waiting_sets(recipe: Recipe) -> tuple[str, ...]:
    """Sets that need a trained model, or the rows of a set that does."""
    waiting: list[str] = []
    for name, stage in recipe.sets().items():
        for step in stage.steps:
            trained = any(model in recipe.trained() for model in models_of(step))
            if trained or getattr(step, "set_name", None) in waiting:
                waiting.append(name)
                break
    return tuple(waiting)


def jobs(
    recipe: Recipe,
    folder: RunFolder,
    started: dict[str, Any],
    waiting: tuple[str, ...] | None = None,
    crew: Pool = INLINE,
) -> Generator[Job, None, None]:
    """The jobs of a run in order; with `waiting` only reading and curation, without the sets named there."""
    with closing(Workshop(recipe, folder)) as shop:
        yield from _jobs(recipe, folder, shop, started, waiting, crew)


def _jobs(
    recipe: Recipe,
    folder: RunFolder,
    shop: Workshop,
    started: dict[str, Any],
    waiting: tuple[str, ...] | None,
    crew: Pool,
) -> Iterator[Job]:
    stages = [s for s in recipe.stages if waiting is None or (isinstance(s, Curate) and s.set not in waiting)]
    needed = {name for stage in stages if isinstance(stage, Curate) for name in stage.sources}
    for source in recipe.sources:
        if source.name in needed:
            yield _read_job(source, folder, crew)
    for index, stage in enumerate(stages):
        if isinstance(stage, Curate):
            yield from _curate_jobs(recipe, folder, shop, stage, release_info(recipe, started), crew)
        elif isinstance(stage, Train):
            yield from shop_jobs(shop, [stage.model])
            yield _train_job(folder, shop, stage)
        else:
            yield from shop_jobs(shop, stage.models)
            yield _evaluate_job(folder, shop, stage, index)
    yield _report_job(folder)


def _read_job(source: Source, folder: RunFolder, crew: Pool) -> Job:
    def do(progress: Progress) -> Done:
        path = folder.rows / f"{source.name}.json"
        cached = path.is_file()
        record = read_source(source, folder, lambda rows: progress(rows, source.limit or 0), crew)
        bad = f", {record['quarantined']:,} quarantined" if record["quarantined"] else ""
        return Done(f"{record['rows']:,} rows ({record['shape']}){bad}", cached, record)

    return Job(f"read {source.name}", do)


def shop_jobs(shop: Workshop, names: Iterable[str]) -> Iterator[Job]:
    """A job for each new or distilled model among `names` (stages count as their base model)."""
    for name in dict.fromkeys(shop.base(name) for name in names):
        if shop.is_made(name) and name not in shop.announced:
            shop.announced.add(name)
            yield Job(f"make model {name}", partial(shop.make, name))


def _curate_jobs(
    recipe: Recipe, folder: RunFolder, shop: Workshop, stage: Curate, release: dict[str, Any], crew: Pool
) -> Iterator[Job]:
    from ..curation.release import finish
    from ..curation.sift import advance, begin, full_steps, step_name

    plan = set_plan(recipe, stage)
    begin(folder, plan)
    for index, step in enumerate(full_steps(plan)):
        yield from shop_jobs(shop, models_of(step))

        def do(progress: Progress, index: int = index) -> Done:
            shop.doors.note = progress.note if isinstance(progress, Bar) else shop.doors.note
            record = advance(folder, plan, index, shop, progress, crew)
            spent = [f"    {line}" for line in shop.doors.report()]
            return Done("\n".join([step_text(record), *spent]), record["cached"], record)

        yield Job(f"{stage.set} {step_name(index, step)}", do)

    def shards(progress: Progress) -> Done:
        path = folder.curated(stage.set) / "manifest.json"
        before = path.stat().st_mtime_ns if path.is_file() else None
        manifest = finish(folder, plan, release | authors(recipe, stage, shop))
        cached = path.stat().st_mtime_ns == before
        test = sum(file["rows"] for file in manifest["files"] if file["split"] == "test")
        return Done(f"{manifest['rows']:,} rows, {test:,} held out -> {folder.curated(stage.set)}", cached)

    yield Job(f"{stage.set} shards", shards)


def step_text(record: dict[str, Any]) -> str:
    """came -> kept, and why the others are gone."""
    made = f" + {record['made']:,}" if record["made"] else ""
    reasons = ", ".join(f"{reason} {count:,}" for reason, count in record["reasons"].items())
    notes = [*record["notes"], *(_emptied(name) for name in record["emptied_sources"])]
    line = (
        f"{record['came']:,}{made} -> {record['kept']:,}"
        + (f"  ({reasons})" if reasons else "")
        + measured_text(record)
    )
    return "\n".join([line, *(f"    ! {note}" for note in notes)])


def _emptied(name: str) -> str:
    """`name`: of a source, or made-SET-STEP of what a maker's step made."""
    step = name.rsplit("-", 1)[-1]
    if name.startswith("made-") and step.isdigit():
        return f"no row that step {int(step)} made is left"
    return f"source {name} has no row left"


def measured_text(record: dict[str, Any]) -> str:
    """How many contents each measure of a step measured now, of how many, where it found some measured already."""
    found = [
        f"{key.rsplit('-', 1)[0]} measured {now:,} of {now + record['reused'][key]:,}"
        for key, now in record.get("measured", {}).items()
        if record["reused"][key]
    ]
    return f"  [{', '.join(found)}]" if found else ""


def _train_job(folder: RunFolder, shop: Workshop, stage: Train) -> Job:
    def do(progress: Progress) -> Done:
        with interrupts_wait():
            from .training import train_stage

        shop.doors.before_training()
        return train_stage(folder, shop, stage, progress)

    return Job(f"train {stage.name}", do)


def _evaluate_job(folder: RunFolder, shop: Workshop, stage: Evaluate, index: int) -> Job:
    def do(progress: Progress) -> Done:
        with interrupts_wait():
            from .training import evaluate_stage

        return evaluate_stage(folder, shop, stage, index, progress)

    return Job("evaluate", do)


def _report_job(folder: RunFolder) -> Job:
    def do(progress: Progress) -> Done:
        from .report import write_report

        return Done(str(write_report(folder)))

    return Job("report", do)
