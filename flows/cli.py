"""The command line. Every verb is a few lines over a plain function; heavy parts are imported by the verb that needs
them, so that `gristmill --help` answers at once."""

import os
import shlex
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from ..curation.folder import HouseError, RunFolder, stored_folder

app = typer.Typer(
    name="gristmill",
    help="From raw instruction data to a tuned model, with every row accounted for.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

RECIPE = Annotated[str, typer.Argument(help="A recipe file (YAML), or the name of one that ships: demo, alpaca-lite.")]
OVERRIDES = Annotated[
    list[str] | None,
    typer.Argument(help="key=value …: seed=7, sets.SET.STEP.KEY=…, stages.NAME.KEY=…, sources.NAME.KEY=…"),
]
OUT = Annotated[Path | None, typer.Option("--out", "-o", help="The run's folder. Default: the recipe's name.")]
CACHE = Annotated[
    Path | None, typer.Option(help="Folder of measures and new models that several runs share. Default: in OUT.")
]
PLAIN = Annotated[bool, typer.Option("--plain", help="Without Prefect: nothing in its UI, and it starts 10 s sooner.")]
WORKERS = Annotated[
    int | None,
    typer.Option(help="Workers that judge rows side by side. Default: GRISTMILL_WORKERS, else every processor."),
]
EXECUTOR = Annotated[
    str | None,
    typer.Option(help="What they are: processes, threads or ray. Default: GRISTMILL_EXECUTOR, else processes."),
]
FOLDER = Annotated[Path, typer.Argument(help="A run's folder.")]
DATA = Annotated[str, typer.Argument(help="A curated folder (with manifest.json), or any data set that can be read.")]
SETTINGS = Annotated[
    list[str] | None, typer.Argument(help="key=value …: max_steps=100, loss=simpo, loss.ipo.beta=0.2, lora.rank=32")
]
MODEL = Annotated[Path, typer.Option(help="The model's folder, in Hugging Face's format.")]


@app.command()
def run(
    recipe: RECIPE,
    overrides: OVERRIDES = None,
    out: OUT = None,
    cache: CACHE = None,
    workers: WORKERS = None,
    executor: EXECUTOR = None,
    plain: PLAIN = False,
) -> None:
    """Do everything a recipe says: curate, tune, evaluate, report. Run again, it does only what is missing."""
    _run(recipe, overrides, out, cache, "all", plain, workers, executor)


@app.command()
def curate(
    recipe: RECIPE,
    overrides: OVERRIDES = None,
    out: OUT = None,
    cache: CACHE = None,
    workers: WORKERS = None,
    executor: EXECUTOR = None,
    plain: PLAIN = False,
) -> None:
    """Only make a recipe's curated sets; those that need a trained model are named and wait for `run`."""
    _run(recipe, overrides, out, cache, "curate", plain, workers, executor)


@app.command()
def demo(overrides: OVERRIDES = None, out: OUT = None, plain: PLAIN = False) -> None:
    """A first run with nothing to download: the recipe `demo`, from docstrings to a small tuned model."""
    _run("demo", overrides, out, None, "all", plain)


def _run(
    recipe: str,
    overrides: list[str] | None,
    out: Path | None,
    cache: Path | None,
    parts: Any,
    plain: bool,
    workers: int | None = None,
    executor: str | None = None,
) -> None:
    from .launch import refuse_torchrun
    from .progress import Terminal
    from .recipe import load_recipe
    from .run import run as run_plainly
    from .run import run_in_prefect
    from .summary import show_result

    refuse_torchrun("a recipe's run")
    loaded = load_recipe(recipe, overrides or ())
    show = Terminal()
    call = run_plainly if plain else run_in_prefect
    try:
        how: dict[str, Any] = {"cache": cache, "parts": parts, "workers": workers, "executor": executor, "show": show}
        result = call(loaded, out or Path(loaded.name), **how)
    except KeyboardInterrupt:
        _say_how_to_go_on(show.done)
        raise
    show_result(loaded, result, show)


def _say_how_to_go_on(done: list[str]) -> None:
    last = f", the last: {done[-1]}" if done else ""
    command = shlex.join(["gristmill", *sys.argv[1:]])
    print(
        f"\nInterrupted. {len(done)} steps are done{last}. Nothing is lost; continue with\n  {command}", file=sys.stderr
    )


@app.command()
def sft(
    data: DATA,
    settings: SETTINGS = None,
    *,
    model: MODEL,
    out: Annotated[Path, typer.Option("--out", "-o", help="The run's folder.")],
    start: Annotated[
        Path | None, typer.Option(help="A LoRA adapter to continue, or the folder of the stage that made it.")
    ] = None,
    licence: Annotated[str, typer.Option(help="Licence of DATA, where it has no manifest.")] = "unknown",
) -> None:
    """Fine-tune a model on conversations."""
    _train("sft", data, settings, model, out, start, licence)


@app.command()
def dpo(
    data: DATA,
    settings: SETTINGS = None,
    *,
    model: MODEL,
    out: Annotated[Path, typer.Option("--out", "-o", help="The run's folder.")],
    start: Annotated[Path | None, typer.Option(help="The SFT adapter to start from; also the reference.")] = None,
    licence: Annotated[str, typer.Option(help="Licence of DATA, where it has no manifest.")] = "unknown",
) -> None:
    """Tune a model on preference pairs, or on lists of answers with scores: DPO and its kin (`gristmill losses`)."""
    _train("dpo", data, settings, model, out, start, licence)


@app.command()
def kto(
    data: DATA,
    settings: SETTINGS = None,
    *,
    model: MODEL,
    out: Annotated[Path, typer.Option("--out", "-o", help="The run's folder.")],
    start: Annotated[Path | None, typer.Option(help="The SFT adapter to start from; also the reference.")] = None,
    licence: Annotated[str, typer.Option(help="Licence of DATA, where it has no manifest.")] = "unknown",
) -> None:
    """Tune a model on single answers that are good or bad (KTO)."""
    _train("kto", data, settings, model, out, start, licence)


def _train(
    objective: Any, data: str, settings: list[str] | None, model: Path, out: Path, start: Path | None, licence: str
) -> None:
    from .progress import Terminal
    from .single import train_single

    show = Terminal()
    try:
        train_single(objective, data, settings or (), model, out, start, licence, show)
    except KeyboardInterrupt:
        _say_how_to_go_on(show.done)
        raise


@app.command()
def export(
    source: Annotated[Path, typer.Argument(help="A training stage's folder (OUT/sft), an adapter, or a model.")],
    *,
    to: Annotated[Path, typer.Option(help="The new folder.")],
    kind: Annotated[
        str, typer.Option("--as", help="adapter (PEFT), merged (one model), or nf4 (merged, 4-bit as bitsandbytes').")
    ] = "merged",
    model: Annotated[str | None, typer.Option(help="The base. Default: the one that the run or adapter names.")] = None,
    dtype: Annotated[str, typer.Option(help="Of merged weights: auto (the base's), bf16, fp16, fp32.")] = "auto",
) -> None:
    """Write what was trained as files that PEFT, transformers and vLLM load, its logits compared first."""
    from .exporting import export_command
    from .progress import Terminal

    export_command(source, to, kind, model, dtype, Terminal())


@app.command()
def score(
    model: Annotated[str, typer.Argument(help="A model's folder, in Hugging Face's format, or its name on the hub.")],
    data: Annotated[str, typer.Argument(help="A curated folder, a run's folder, or any data set that can be read.")],
    *,
    adapter: Annotated[Path | None, typer.Option(help="A LoRA adapter on the model.")] = None,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="A .parquet file, or a folder for scores.parquet. Default: none.")
    ] = None,
    per_token: Annotated[bool, typer.Option("--per-token", help="Also each token's id and log-probability.")] = False,
    source: Annotated[str, typer.Option(help="DATA's name as a source in your recipe: the row_ids are then its.")] = (
        "data"
    ),
) -> None:
    """Loss, perplexity and log-probabilities of any model on any rows, by row_id; a recipe reads them by ScoreFile."""
    from .progress import Terminal
    from .scoring import score_command

    score_command(model, data, adapter, out, per_token, source, Terminal())


@app.command()
def funnel(folder: FOLDER) -> None:
    """Came -> kept at every step of every set, with the reasons."""
    from ..curation.look import print_funnel

    print_funnel(_run_folder(folder))


@app.command()
def why(folder: FOLDER, row_id: Annotated[str, typer.Argument(help="A row_id, or its first characters.")]) -> None:
    """The life of one row: where it came from, every verdict, what became of it."""
    from ..curation.look import print_why

    print_why(_run_folder(folder), row_id)


@app.command()
def sql(folder: FOLDER, query: Annotated[str, typer.Argument(help='Such as "select * from funnel".')]) -> None:
    """One read-only SELECT over the views rows, verdicts, measures, makers, curated, quarantine, funnel, runs."""
    from ..curation.look import print_query

    print_query(_run_folder(folder), query)


def _run_folder(folder: Path) -> RunFolder:
    if not (folder / "rows").is_dir():
        raise HouseError(f"{folder} is not a run's folder: it holds no rows/. Give the --out of a run")
    return stored_folder(folder)


@app.command()
def decide(
    folder: FOLDER,
    overrides: OVERRIDES = None,
    *,
    write: Annotated[Path | None, typer.Option(help="Make a new release of it in this folder.")] = None,
) -> None:
    """What if: decide a finished run again with other thresholds, quotas and budgets, from what it measured."""
    from rich.console import Console

    from ..curation.look import wide_console
    from .deciding import decide as decide_again
    from .deciding import print_decision, write_release

    console: Console = wide_console()
    decision = decide_again(folder, overrides or ())
    print_decision(decision, console, writes=write is not None)
    if write is not None:
        from .progress import Terminal

        write_release(folder, decision, write, Terminal())
        console.print(f"Release: {write.resolve()}", markup=False)


@app.command()
def override(
    folder: FOLDER,
    row_id: Annotated[str, typer.Argument(help="A row_id, or its first characters.")],
    action: Annotated[str, typer.Argument(help="keep, drop or edit.")],
    *,
    why: Annotated[str, typer.Option(help="The reason, shown by `gristmill why`.")],
    who: Annotated[str | None, typer.Option(help="Default: the user's name on this machine.")] = None,
    content: Annotated[
        str | None, typer.Option(help='For edit: JSON of the fields to replace, or @FILE: {"messages": […]}.')
    ] = None,
) -> None:
    """Overrule the judges on one row. Takes effect at the next run of the recipe, and comes last there."""
    from .overruling import overrule

    typer.echo(overrule(_run_folder(folder), row_id, action, why, who, content))


@app.command()
def audit(
    folder: FOLDER,
    *,
    judge: Annotated[
        str | None, typer.Option(help="Class name of the judge (NAME.2: the second). Default: the one that drops most.")
    ] = None,
    set_name: Annotated[str | None, typer.Option("--set", help="The set. Default: any.")] = None,
    size: Annotated[int, typer.Option(help="Rows of the sample.")] = 50,
    seed: Annotated[int, typer.Option(help="Of the draw.")] = 0,
    labels: Annotated[
        Path | None, typer.Option(help="A filled sheet: JSON lines or CSV with row_id and label.")
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(help="A model of the recipe labels the sample; rows that people labelled calibrate it."),
    ] = None,
    budget: Annotated[float, typer.Option(help="Share of good rows that a threshold may lose.")] = 0.02,
    apply: Annotated[bool, typer.Option("--apply", help="Override the rows that the judge got wrong.")] = False,
    against: Annotated[
        Path | None, typer.Option(help="An earlier run: does this one treat the rows labelled there as labelled?")
    ] = None,
    who: Annotated[str | None, typer.Option(help="Who labels. Default: the user's name on this machine.")] = None,
) -> None:
    """Is a judge right? Label a blind sample; learn its precision, what it misses and what that costs."""
    from .auditing import audit_command, print_check

    run_folder = _run_folder(folder)
    if against is not None:
        from ..curation.look import wide_console

        raise typer.Exit(int(print_check(run_folder, _run_folder(against), wide_console()) > 0))
    audit_command(run_folder, judge, set_name, size, seed, labels, model, budget, apply, who)


@app.command()
def judges(name: Annotated[str | None, typer.Argument(help="One of them, with its whole docstring.")] = None) -> None:
    """Every judge, maker and measure: what it does, and its fields with their defaults."""
    from .summary import show_steps

    show_steps(name)


@app.command()
def losses(name: Annotated[str | None, typer.Argument(help="One of them, with its whole docstring.")] = None) -> None:
    """Every loss that a stage can name: what it trains on, its paper, its options with their defaults."""
    from .losses import show_losses

    show_losses(name)


@app.command()
def plan(
    what: Annotated[str, typer.Argument(help="A number of examples (an amount of money, with prices), or a recipe.")],
    *,
    model_kind: Annotated[
        str | None, typer.Option(help="base or instruct. Default: both; of a recipe by its models' names.")
    ] = None,
    sft_price: Annotated[float | None, typer.Option(help="Of one SFT example. WHAT is then money.")] = None,
    pair_price: Annotated[float | None, typer.Option(help="Of one preference pair.")] = None,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="The recipe's run. Default: its name.")] = None,
) -> None:
    """How to share a data budget between SFT examples and preference pairs, and why; warns of recipes that differ."""
    from .planning import explain

    typer.echo(explain(what, model_kind, sft_price, pair_price, out))


@app.command()
def doctor() -> None:
    """What this machine has, what it lacks, and what to do about it."""
    from .doctor import examine, show

    raise typer.Exit(show(examine()))


@app.command()
def schedule(
    recipe: RECIPE,
    overrides: OVERRIDES = None,
    *,
    cron: Annotated[str, typer.Option(help='When, in cron\'s five fields: "0 2 * * *" is every night at two (UTC).')],
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="Folder of the releases. Default: RECIPE-releases.")
    ] = None,
) -> None:
    """Run a recipe again and again: a served Prefect deployment. Each run is a new release OUT/TIME that measures only
    new rows. Needs PREFECT_API_URL, else starts a Prefect server on 127.0.0.1."""
    from .recipe import load_recipe
    from .server import prefect_environment

    loaded = load_recipe(recipe, overrides or ())
    prefect_environment(PREFECT_LOGGING_LEVEL="INFO", PREFECT_LOGGING_TO_API_ENABLED="true")
    from .schedule import serve

    serve(loaded, cron, out or Path(f"{loaded.name}-releases"))


@app.command("new-model")
def new_model(
    folder: Annotated[Path, typer.Argument(help="Where to write it.")],
    corpus: Annotated[str, typer.Option(help="Any data set that can be read: conversations or raw text.")],
    params: Annotated[str, typer.Option(help="Parameters, embeddings included: 3M, 10M.")] = "3M",
    settings: Annotated[list[str] | None, typer.Argument(help="key=value …: vocab=8192, tokens=5e6, seed=1")] = None,
) -> None:
    """Make a small model: a tokenizer, a decoder in a mainstream architecture, brief pre-training."""
    from .progress import Terminal
    from .single import make_single

    make_single(folder, corpus, [f"params={params}", *(settings or ())], Terminal())


def _check_arguments(arguments: list[str]) -> None:
    """HouseError for a path whose bytes are no UTF-8, which Parquet and JSON cannot name."""
    for argument in arguments:
        try:
            argument.encode()
        except UnicodeEncodeError as error:
            shown = os.fsencode(argument).decode(errors="backslashreplace")
            raise HouseError(f"{shown!r} is not UTF-8: rename that file or folder, or name another") from error


def main() -> None:
    """The console script: HouseError is a message, not a traceback."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    try:
        _check_arguments(sys.argv[1:])
        app()
    except HouseError as error:
        typer.secho(str(error), fg=typer.colors.RED, err=True)
        sys.exit(1)


if __name__ == "__main__":
    main()
