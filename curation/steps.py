"""What a step of curation is: measures, judges and makers, and what the engine hands them.

Each is a frozen dataclass. Its fields are its configuration, its repr is its name in the ledger, and a recipe names it
by its class. There is no registry: `find_steps` walks the modules of judges/, measures/ and makers/.
"""

import importlib
import inspect
import json
import pkgutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import MISSING, fields, is_dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal, Protocol, runtime_checkable

import pyarrow as pa

from .door import ChatModel, Embedder, EntailmentModel, Progress, ResponseScorer
from .rows import ROW

VERDICT = pa.schema(
    [
        pa.field("keep", pa.bool_(), nullable=False),
        pa.field("reason", pa.string()),
        pa.field("score", pa.float64()),
        pa.field("evidence", pa.string()),  # JSON
    ]
)


def verdicts(
    keep: Sequence[bool],
    reason: str | Sequence[str | None] | None = None,
    score: Sequence[float | None] | None = None,
    evidence: Sequence[Mapping[str, Any] | None] | None = None,
) -> pa.Table:
    """Verdicts aligned with the judged rows. A single `reason` goes to every dropped row; kept rows carry none."""
    size = len(keep)
    if reason is None or isinstance(reason, str):
        reason = [None if kept else reason for kept in keep]
    proof = [None if item is None else json.dumps(item, ensure_ascii=False, sort_keys=True) for item in evidence or ()]
    return pa.table(
        {
            "keep": pa.array(keep, pa.bool_()),
            "reason": pa.array(reason, pa.string()),
            "score": pa.array([None] * size if score is None else score, pa.float64(), from_pandas=True),
            "evidence": pa.array(proof or [None] * size, pa.string()),
        },
        schema=VERDICT,
    )


class Tools(Protocol):
    """What flows hands to the steps that need a model or another set's rows."""

    def scorer(self, model: str) -> ResponseScorer:
        """Scorer of the model that the recipe calls `model`."""

    def chat(self, model: str) -> ChatModel:
        """Chat model that the recipe calls `model`, or the model that the training stage `model` ended with."""

    def embedder(self, model: str) -> Embedder:
        """Embedding model that the recipe calls `model`."""

    def entailment(self, model: str) -> EntailmentModel:
        """Natural-language-inference model that the recipe calls `model`."""

    def token_counts(self, model: str, rows: pa.Table) -> pa.Table:
        """For each row (schema ROW), in order: `prompt_tokens`, `response_tokens` and `total_tokens` (int32) under the
        model's tokenizer and chat template, as the trainer counts them; null where the template refuses the row."""

    def digest(self, model: str) -> str:
        """Digest of a model's weights, without loading it."""

    def curated(self, set_name: str, split: str) -> Iterator[pa.Table]:
        """Curated rows (schema ROW) of an earlier set of this run; split is `train` or `test`."""


class Measure(Protocol):
    """rows -> value columns. Pure, batched; its values are cached by content_id, its own repr, `version` and the
    digests of the models it names."""

    version: ClassVar[int]
    columns: ClassVar[dict[str, pa.DataType]]  # name -> type of each value column

    @property
    def models(self) -> tuple[str, ...]:
        """The models it needs, by their names in the recipe."""

    def measure(self, rows: pa.Table, tools: Tools, progress: Progress) -> pa.Table:
        """One row of `columns` for each row (schema ROW), in order."""


def value_names(columns: Sequence[Iterable[str]]) -> list[list[str]]:
    """Under which names a judge reads the columns of its `needs`: their own; a column that a later measure has too is
    called NAME#PLACE by the place of its measure, so that two scores of one kind can be read side by side."""
    needs = [list(names) for names in columns]
    later = [{name for names in needs[place + 1 :] for name in names} for place in range(len(needs))]
    return [
        [f"{name}#{place}" if name in later[place] else name for name in names] for place, names in enumerate(needs)
    ]


class Corpus(Protocol):
    """The live rows of a set, as a corpus judge or a maker sees them: in a fixed order, part by part."""

    rows: int
    seed: int
    scratch: Path  # a folder for intermediate files, removed after the step
    kept: Path  # a folder that stays beside the step's verdicts: what another decision over the same rows can use
    progress: Progress
    tools: Tools

    def tables(self, columns: Sequence[str] | None = None) -> Iterator[pa.Table]:
        """Live rows, one table per part, with these columns of ROW (default: all)."""

    def values(self, columns: Sequence[str]) -> pa.Table:
        """Value columns of the judge's `needs`, for all live rows in the order of `tables`."""

    def held_out(self, columns: Sequence[str] | None = None) -> Iterator[pa.Table]:
        """The set's held-out rows."""

    def record(self, **facts: Any) -> None:
        """Adds facts to the step's record (step.json), such as what a maker asked, and what became of it."""


class Unmeasured:
    """Base of a judge that reads no measure and judges by no score."""

    score: ClassVar[str | None] = None

    @property
    def needs(self) -> tuple[Measure, ...]:
        return ()

    def limits(self) -> tuple[float | None, float | None]:
        return None, None


@runtime_checkable
class RowJudge(Protocol):
    """Keeps or drops a row by looking at that row and its measures."""

    scope: ClassVar[Literal["row"]]

    @property
    def score(self) -> str | None:
        """The value column that it judges by, for histograms and for `why`."""

    @property
    def needs(self) -> tuple[Measure, ...]:
        """Measures whose columns `judge` reads."""

    def limits(self) -> tuple[float | None, float | None]:
        """Lowest and highest score that is kept (None: no limit)."""

    def judge(self, rows: pa.Table, values: pa.Table) -> pa.Table:
        """Verdicts (schema VERDICT), aligned with `rows` (schema ROW) and `values` (columns of `needs`)."""


@runtime_checkable
class CorpusJudge(Protocol):
    """Keeps or drops rows by looking at the columns of all rows. The same members as RowJudge, but for `judge`."""

    scope: ClassVar[Literal["corpus"]]

    @property
    def score(self) -> str | None:
        """The value column that it judges by, for histograms and for `why`."""

    @property
    def needs(self) -> tuple[Measure, ...]:
        """Measures whose columns the judge reads through `corpus.values`."""

    def limits(self) -> tuple[float | None, float | None]:
        """Lowest and highest score that is kept (None: no limit)."""

    def judge(self, corpus: Corpus) -> pa.Table:
        """Verdicts (schema VERDICT) for all live rows, in the order of `corpus.tables()`."""


@runtime_checkable
class Maker(Protocol):
    """Yields new rows with parents (curation.rows.made_row). One that only says a row better, row by row, states
    `rewrites: ClassVar[bool] = True`: the engine then gives it the held-out rows too, and what it makes of them
    replaces them in split test."""

    scope: ClassVar[Literal["maker"]]

    @property
    def consumes(self) -> str | None:
        """Reason with which a parent that something was made from leaves the set, or None where parents stay."""

    @property
    def model(self) -> str | None:
        """The model it needs: a model of the recipe, or an earlier training stage."""

    def make(self, corpus: Corpus) -> Iterator[pa.Table]:
        """Tables of new rows (schema ROW)."""


Step = RowJudge | CorpusJudge | Maker


def columns_read(judge: RowJudge) -> tuple[str, ...]:
    """Columns of ROW that `judge` reads: its `reads`, a ClassVar that a judge of measured values alone sets to (), else
    all. It is then handed `rows` of the right number without other columns."""
    return tuple(getattr(judge, "reads", ROW.names))


def brief(step: Any) -> str:
    """A step as its recipe says it: its class name and the fields that are not their defaults."""
    said = []
    for one in fields(step):
        value = getattr(step, one.name)
        default = one.default_factory() if one.default_factory is not MISSING else one.default
        if value != default:
            said.append(f"{one.name}={brief(value) if is_dataclass(value) else repr(value)}")
    return f"{type(step).__name__}({', '.join(said)})"


def find_steps() -> dict[str, type[Any]]:
    """Every measure, judge, maker and verifier by class name. Their modules import nothing heavy at the top."""
    found: dict[str, type[Any]] = {}
    for room in ("judges", "makers", "measures", "verifiers"):
        package = f"{__package__}.{room}"
        folder = Path(__file__).with_name(room)
        for info in pkgutil.iter_modules([str(folder)]):
            module = importlib.import_module(f"{package}.{info.name}")
            for name, kind in inspect.getmembers(module, inspect.isclass):
                own = kind.__module__ == module.__name__ and is_dataclass(kind) and not name.startswith("_")
                if own and any(hasattr(kind, mark) for mark in ("scope", "measure", "verify")):
                    found[name] = kind
    return found
