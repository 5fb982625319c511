"""Every measure, judge and maker keeps its contract: documented, frozen, typed verdicts, at home on the empty table, on
one row, on nulls and on very long rows, the same answer twice."""

import dataclasses
import hashlib
import json
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from gristmill.curation.door import ChatAnswer, ChatRequest
from gristmill.curation.measures.length import Length
from gristmill.curation.rows import ROW, content_id, message, table
from gristmill.curation.steps import VERDICT, find_steps, value_names
from gristmill.curation.text.view import view

STEPS = find_steps()
SCRATCH = TemporaryDirectory()
TARGETS = Path(SCRATCH.name) / "targets.jsonl"
TARGETS.write_text('{"prompt": "What is a word?", "completion": "A sound that means something."}\n')
TAUGHT = Path(tempfile.mkdtemp(prefix="gristmill-contracts-"))
for side in ("good", "bad"):
    taught = [json.dumps({"instruction": f"question {n}", "output": f"{side} answer {n}"}) for n in range(20)]
    (TAUGHT / f"{side}.jsonl").write_text("\n".join(taught))
SCORED = TAUGHT / "scores.parquet"
pq.write_table(pa.table({"row_id": ["0" * 32], "content_id": ["1" * 32], "loss": [1.0]}), SCORED)
# what a recipe must say of each step that has fields without defaults
NEEDED: dict[str, dict[str, Any]] = {
    "Matches": {"pattern": "a"},
    "BackTranslation": {"model": "m"},
    "BestAgainstWorst": {"model": "m", "judge": "j"},
    "CleanCode": {"model": "m"},
    "ClearCorrection": {"model": "m", "judge": "j"},
    "DocumentTasks": {"model": "m"},
    "ExtendConversation": {"model": "m"},
    "Rephrase": {"model": "m"},
    "Translate": {"model": "m", "language": "German", "code": "de"},
    "RejectionSampling": {"model": "m", "verifier": STEPS["Matches"]("a")},
    "RightAgainstWrong": {"model": "m", "verifier": STEPS["Matches"]("a")},
    "SelectiveSelfSft": {"model": "m", "verifier": STEPS["Matches"]("a")},
    "ReGenesis": {"model": "m", "verifier": STEPS["Matches"]("a")},
    "JudgedRight": {"model": "m"},
    "EvolInstruct": {"model": "m"},
    "LaMini": {"model": "m"},
    "OrcaExplanation": {"model": "m"},
    "SelfInstruct": {"model": "m"},
    "OnPolicyPreference": {"model": "m", "verifier": STEPS["Matches"]("a")},
    "PreferenceTree": {"model": "m", "verifier": STEPS["Matches"]("a")},
    "SentenceMasks": {"model": "m"},
    "StepPairs": {"model": "m", "verifier": STEPS["Matches"]("a")},
    "ScoreFile": {"path": str(SCORED)},
    "ScoreQuantile": {"of": Length(), "column": "response_words"},
    "ScoreRange": {"of": Length(), "column": "response_words"},
    "TestedPreference": {"model": "m"},
    "TokenLength": {"model": "m"},
    "TokenLengthRange": {"model": "m"},
    "Cap": {"most": 2},
    "MakerQuota": {"most": 2},
    "StageMixture": {"set_name": "s"},
    "Confidence": {"model": "m", "nli": "n"},
    "ConfidenceFilter": {"of": STEPS["Confidence"](model="m", nli="n")},
    "Embedding": {"model": "m"},
    "DensityBasedPruning": {"budget": 2},
    "GotD": {"budget": 2, "targets": (str(TARGETS),)},
    "RepresentationSimilarity": {"budget": 2, "targets": (str(TARGETS),)},
    "SimCore": {"budget": 2, "targets": (str(TARGETS),)},
    "Grape": {"model": "m"},
    "Ifd": {"model": "m"},
    "JudgeScores": {"model": "m"},
    "Deita": {"budget": 2, "of": Length(), "column": "response_words"},
    "FacilityLocation": {"budget": 2},
    "IterativeQuality": {"budget": 4},
    "KCenter": {"budget": 2},
    "InstructMining": {"budget": 2},
    "Glan": {"model": "m"},
    "InstructSkillMix": {"model": "m"},
    "Personas": {"model": "m"},
    "KMeansQuality": {"budget": 2},
    "PairPreference": {"model": "m"},
    "PerplexityQuantile": {"model": "m"},
    "PerplexityRange": {"model": "m"},
    "PreferenceFromModel": {"model": "m"},
    "RandomSample": {"budget": 2},
    "RepeatedRandom": {"budget": 2},
    "QualityClassifier": {"positives": (str(TAUGHT / "good.jsonl"),), "negatives": (str(TAUGHT / "bad.jsonl"),)},
    "ResponsePerplexity": {"model": "m"},
    "StratifiedSample": {"budget": 2},
    "TopScore": {"budget": 2},
}
# makers of rows whose meta, or whose programs, no case here has
UNFED = {"LintSeq", "MarkedErrors", "MessageTreeRanks", "NonInstructional", "MinedTasks", "StatedSteps"}
MEASURES = sorted(name for name, kind in STEPS.items() if hasattr(kind, "measure"))
JUDGES = sorted(name for name, kind in STEPS.items() if getattr(kind, "scope", None) in ("row", "corpus"))
MAKERS = sorted(name for name, kind in STEPS.items() if getattr(kind, "scope", None) == "maker")


class Scorer:
    digest = "d"

    def response_scores(self, rows: pa.Table, progress: Any = None, *, alone: bool = False) -> pa.Table:
        size = [len((row["messages"] or [{"content": ""}])[-1]["content"] or "") or None for row in rows.to_pylist()]
        nll = [None if n is None else 2.0 * n for n in size]
        prob = [None if n is None else 0.5 for n in size]
        kinds = {"tokens": pa.int32(), "nll": pa.float64(), "mean_prob": pa.float64(), "min_prob": pa.float64()}
        columns = {"tokens": size, "nll": nll, "mean_prob": prob, "min_prob": prob, "prompt_tokens": size}
        kinds |= {"prompt_tokens": pa.int32()}
        if alone:
            columns["alone_nll"], kinds["alone_nll"] = nll, pa.float64()
        return pa.table({name: pa.array(columns[name], kind) for name, kind in kinds.items()})


class Chat:
    name, digest, licence, price = "m", "d", "MIT", (0.0, 0.0)

    def complete(self, requests: Sequence[ChatRequest], progress: Any = None) -> list[ChatAnswer]:
        return [ChatAnswer("another answer", 3, 2, True) for _ in requests]


class Vectors:
    digest, dims = "d", 8

    def embed(self, texts: Sequence[str], progress: Any = None) -> np.ndarray:
        made = np.array([np.frombuffer(hashlib.sha256(text.encode()).digest()[:8], np.int8) for text in texts])
        found = made.reshape(len(texts), 8).astype(np.float32)
        return np.asarray(found / np.maximum(np.linalg.norm(found, axis=1, keepdims=True), 1e-6), np.float32)


class Entailment:
    digest = "d"

    def probabilities(self, pairs: Sequence[tuple[str, str]], progress: Any = None) -> np.ndarray:
        return np.full((len(pairs), 3), 1 / 3, np.float32)


class Tools:
    def __init__(self, rows: pa.Table) -> None:
        self.rows = rows

    def scorer(self, model: str) -> Scorer:
        return Scorer()

    def chat(self, model: str) -> Chat:
        return Chat()

    def embedder(self, model: str) -> Vectors:
        return Vectors()

    def entailment(self, model: str) -> Entailment:
        return Entailment()

    def token_counts(self, model: str, rows: pa.Table) -> pa.Table:
        size = [len(text) for text in view(rows, "pair")]
        names = ("prompt_tokens", "response_tokens", "total_tokens")
        return pa.table({name: pa.array(size, pa.int32()) for name in names})

    def digest(self, model: str) -> str:
        return "d"

    def curated(self, set_name: str, split: str) -> Iterator[pa.Table]:
        yield self.rows


class Rows:
    """A Corpus over one table."""

    def __init__(self, rows: pa.Table, judge: Any, scratch: Path) -> None:
        self.table, self.rows, self.seed, self.scratch, self.tools = rows, rows.num_rows, 0, scratch, Tools(rows)
        self.needs = getattr(judge, "needs", ())
        self.kept = scratch

    def progress(self, done: int, total: int) -> None:
        assert 0 <= done <= total

    def tables(self, columns: Sequence[str] | None = None) -> Iterator[pa.Table]:
        if self.rows:
            yield self.table if columns is None else self.table.select(list(columns))

    def values(self, columns: Sequence[str]) -> pa.Table:
        return values_of(self.needs, self.table).select(list(columns))

    def held_out(self, columns: Sequence[str] | None = None) -> Iterator[pa.Table]:
        yield from ()

    def record(self, **facts: Any) -> None:
        json.dumps(facts)


def values_of(needs: Any, rows: pa.Table) -> pa.Table:
    columns: dict[str, Any] = {"_none": pa.nulls(rows.num_rows)}
    for measure, names in zip(needs, value_names([measure.columns for measure in needs]), strict=True):
        found = measure.measure(rows, Tools(rows), lambda done, total: None)
        columns |= dict(zip(names, found.columns, strict=True))
    return pa.table(columns)


def make(name: str) -> Any:
    return STEPS[name](**NEEDED.get(name, {}))


def nulls() -> dict[str, Any]:
    row: dict[str, Any] = dict.fromkeys(ROW.names) | {"source": "a", "position": 0, "row_id": "n"}
    return row | {"content_id": content_id(row)}


Make = Callable[..., dict[str, Any]]


@pytest.fixture
def cases(make_row: Make) -> dict[str, pa.Table]:
    long = make_row("a", 1, "word " * 2000, "antwort " * 1300)
    pair = make_row("a", 2, "q", None, chosen=[message("assistant", "x")], rejected=[message("assistant", "y")])
    document = dict.fromkeys(ROW.names) | {"source": "a", "position": 3, "row_id": "t", "text": "A document.\n\nMore."}
    document |= {"meta": json.dumps({"qualified_name": "a.b", "signature": "(x)", "kind": "function", "module": "a"})}
    document["content_id"] = content_id(document)
    mixed = [make_row("a", i, f"question {i}", f"answer {i}") for i in range(6)]
    broken = make_row("a", 11, "Who?", "Write to AmÃ©lie: amelie.roux@free.fr, please.")
    return {
        "empty": table([]),
        "one": table([make_row("a", 0, "q", "r")]),
        "nulls": table([nulls()]),
        "mixed": table(
            [
                *mixed,
                long,
                pair,
                nulls(),
                document,
                make_row("a", 9, "", ""),
                make_row("a", 10, "日本語", "答え"),
                broken,
            ]
        ),
    }


@pytest.mark.parametrize("name", sorted(STEPS))
def test_documented_and_frozen(name: str) -> None:
    kind = STEPS[name]
    assert len((kind.__doc__ or "").split()) >= 10 and not (kind.__doc__ or "").startswith(f"{name}(")
    assert kind.__dataclass_params__.frozen
    needed = {f.name for f in dataclasses.fields(kind)
              if f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING}  # fmt: skip
    assert needed == NEEDED.get(name, {}).keys()
    step = make(name)
    assert repr(step).startswith(f"{name}(") and hash(step) == hash(make(name))


@pytest.mark.parametrize("name", MEASURES)
def test_measures_give_their_columns_aligned(name: str, cases: dict[str, pa.Table]) -> None:
    measure = make(name)
    for rows in cases.values():
        found = measure.measure(rows, Tools(rows), lambda done, total: None)
        assert {n: found.schema.field(n).type for n in found.column_names} == measure.columns
        assert found.num_rows == rows.num_rows
        assert found.equals(measure.measure(rows, Tools(rows), lambda done, total: None))


@pytest.mark.parametrize("name", JUDGES)
def test_judges_give_one_verdict_a_row(name: str, cases: dict[str, pa.Table], tmp_path: Path) -> None:
    judge = make(name)
    low, high = judge.limits()
    assert low is None or high is None or low <= high
    assert judge.score is None or any(judge.score in need.columns for need in judge.needs)
    for case, rows in cases.items():
        found = [judged(judge, rows, tmp_path) for _ in range(2)]
        assert found[0].schema == VERDICT and found[0].num_rows == rows.num_rows, case
        assert found[0].equals(found[1]), case
        for verdict in found[0].to_pylist():
            assert verdict["keep"] or verdict["reason"], case
            json.loads(verdict["evidence"] or "{}")


def judged(judge: Any, rows: pa.Table, scratch: Path) -> pa.Table:
    if judge.scope == "row":
        return judge.judge(rows, values_of(judge.needs, rows))
    return judge.judge(Rows(rows, judge, scratch)) if rows.num_rows else VERDICT.empty_table()


@pytest.mark.filterwarnings("ignore:.* made no row:UserWarning")
@pytest.mark.parametrize("name", MAKERS)
def test_makers_make_rows_with_parents(name: str, cases: dict[str, pa.Table], tmp_path: Path) -> None:
    maker = make(name)
    for rows in cases.values():
        made = [row for found in maker.make(Rows(rows, maker, tmp_path)) for row in found.cast(ROW).to_pylist()]
        again = [row for found in maker.make(Rows(rows, maker, tmp_path)) for row in found.to_pylist()]
        assert made == again
        known = set(rows["row_id"].to_pylist())
        assert all(row["parents"] and set(row["parents"]) <= known and row["maker"] == repr(maker) for row in made)
    fed = name == "PreferenceFromModel" or (maker.model is None and name not in UNFED)
    assert made or not fed, "the mixed case has a row that every maker without a model can make something of"
