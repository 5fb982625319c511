"""Bad input, as a user meets it: the message says what was wrong, where, and what to do; no traceback; nothing lost."""

import dataclasses
import errno
import hashlib
import json
import math
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from gristmill.curation.door import Progress
from gristmill.curation.duplicates import spill
from gristmill.curation.folder import HouseError, RunFolder, read_json
from gristmill.curation.look import why
from gristmill.curation.steps import Corpus, Tools, Unmeasured, verdicts
from gristmill.flows import cli
from gristmill.flows.deciding import decide
from gristmill.flows.models import Workshop
from gristmill.flows.progress import Silent
from gristmill.flows.recipe import load_text
from gristmill.flows.run import run

LIVE = 129  # rows of the chats that are not held out


@pytest.fixture(scope="module")
def chats(shared: Path) -> Path:
    return shared / "chats.jsonl"


def text(chats: Path, step: str, models: str = "") -> str:
    return f"""\
name: bad
sources:
  chats: {{path: "{chats}", licence: MIT}}
{models and f"models: {models}"}
stages:
  - curate:
      set: clean
      sources: [chats]
      held_out: 0.1
      steps:
        - {step}
"""


def curate(chats: Path, out: Path, step: str, models: str = "", steps: tuple[Any, ...] = ()) -> list[dict[str, Any]]:
    """Records of the set's steps; `steps` stand in place of the recipe's."""
    recipe = load_text(text(chats, step, models), "bad.yaml")
    if steps:
        stage = dataclasses.replace(recipe.stages[0], steps=steps)
        recipe = dataclasses.replace(recipe, stages=(stage,))
    run(recipe, out, parts="curate", workers=1, show=Silent())
    return recorded(out)


def recorded(out: Path) -> list[dict[str, Any]]:
    return [read_json(path) for path in sorted((out / "ledger" / "clean").glob("[0-9]*/step.json"))]


def refused(chats: Path, out: Path, step: str, models: str = "", steps: tuple[Any, ...] = ()) -> str:
    with pytest.raises(HouseError) as error:
        curate(chats, out, step, models, steps)
    said = str(error.value)
    assert "Traceback" not in said and 'File "' not in said
    return said


def call(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    monkeypatch.setattr(sys, "argv", ["gristmill", *map(str, arguments)])
    try:
        cli.main()
    except SystemExit as ended:
        return int(ended.code or 0)
    return 0


# ---- models


EMPTY = "\x02" + "\0" * 7 + "{}"  # a sound file of weights that holds none
EMBED, SCORE = "KMeansQuality: {budget: 10, k: 3, embedding: m}", "PerplexityQuantile: {model: m}"


@pytest.mark.parametrize("step", [EMBED, SCORE])
@pytest.mark.parametrize(
    ("files", "path", "said"),
    [
        (None, "FOLDER", "model 'm': FOLDER holds no config.json; give a folder in Hugging Face's format"),
        ({}, "FOLDER", "model 'm': FOLDER holds no config.json"),
        (None, "sentence-transformers/no-such", "no folder sentence-transformers/no-such here, and the hub did not"),
        ({"modules.json": "[{"}, "FOLDER", "FOLDER/modules.json cannot be read"),
        ({"config.json": "{", "model.safetensors": "x"}, "FOLDER", "FOLDER holds no "),
        ({"config.json": "[]", "model.safetensors": "x"}, "FOLDER", "FOLDER holds no "),
        ({"config.json": '{"model_type": "vit"}', "model.safetensors": EMPTY}, "FOLDER", "FOLDER holds no "),
    ],
)
def test_a_model_that_is_not_one(
    chats: Path, tmp_path: Path, step: str, files: dict[str, str] | None, path: str, said: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    home = tmp_path / "model"
    for name, content in (files or {}).items():
        home.mkdir(exist_ok=True)
        (home / name).write_text(content)
    home.mkdir(exist_ok=True) if files == {} else None
    models = f'{{m: {{path: "{path.replace("FOLDER", str(home))}"}}}}'
    assert said.replace("FOLDER", str(home)) in refused(chats, tmp_path / "out", step, models)


def encoder(home: Path, hidden: int, vocabulary: bool = True) -> str:
    """A tiny BERT with random weights; its recipe entry."""
    from transformers import BertConfig, BertModel

    heads = {"num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *(chr(97 + i) for i in range(26)),
             *("##" + chr(97 + i) for i in range(26))]  # fmt: skip
    BertModel(BertConfig(vocab_size=len(words), hidden_size=hidden, **heads)).save_pretrained(home)
    if vocabulary:
        (home / "vocab.txt").write_text("\n".join(words))
        (home / "tokenizer_config.json").write_text('{"tokenizer_class": "BertTokenizer", "do_lower_case": true}')
    return f'{{m: {{path: "{home}"}}}}'


def test_an_encoder_without_a_tokenizer_is_no_embedding_model(chats: Path, tmp_path: Path) -> None:
    models = encoder(tmp_path / "model", 8, vocabulary=False)
    said = refused(chats, tmp_path / "out", EMBED, models)
    assert said.startswith(f"{tmp_path / 'model'} holds no tokenizer") and "put the one there" in said


def test_a_model_of_another_size_is_measured_anew(chats: Path, tmp_path: Path) -> None:
    """Values of the model that lay there before are never mixed with its own; damaged ones are told."""
    models = encoder(tmp_path / "model", 8)
    assert curate(chats, tmp_path / "one", EMBED, models)[3]["kept"] == 10
    shutil.rmtree(tmp_path / "model")
    encoder(tmp_path / "model", 16)
    shutil.copytree(tmp_path / "one" / "measures", tmp_path / "two" / "measures")
    record = curate(chats, tmp_path / "two", EMBED, models)[3]
    (key,) = (key for key in record["measured"] if key.startswith("Embedding"))
    assert record["measured"][key] > 0 and record["reused"][key] == 0 and record["kept"] == 10
    shutil.copytree(tmp_path / "two" / "measures", tmp_path / "three" / "measures")
    (file,) = (tmp_path / "three" / "measures" / key).glob("*.parquet")
    table = pq.read_table(file)
    cut = [one[:8] if row else one for row, one in enumerate(table["embedding"].to_pylist())]
    kind = table.schema.field("embedding").type
    pq.write_table(table.set_column(1, "embedding", pa.array(cut, kind)), file)
    assert "vectors of 2 sizes: [8, 16]; remove its measures" in refused(chats, tmp_path / "three", EMBED, models)


# ---- scores that are none


ODD = [math.nan, math.inf, -math.inf, None]


def odd(content: str) -> float | None:
    """Half of the contents have no finite number."""
    number = int(hashlib.md5(content.encode()).hexdigest(), 16)
    return ODD[number % 8] if number % 8 < 4 else (number >> 8) % 1000 / 100 + 1


class OddScorer:
    digest = "d"

    def response_scores(self, rows: pa.Table, progress: Progress | None = None, *, alone: bool = False) -> pa.Table:
        values = [odd(content) for content in rows["content_id"].to_pylist()]
        numbers = pa.array(values, pa.float64())
        tokens = pa.array([None if value is None else 1 for value in values], pa.int32())
        found = {"tokens": tokens, "nll": numbers, "mean_prob": numbers, "min_prob": numbers, "prompt_tokens": tokens}
        return pa.table(found)


OF = "of: {ResponsePerplexity: {model: m}}, column: nll"


@pytest.mark.parametrize(
    ("step", "infinite", "kept"),
    [
        (f"ScoreRange: {{{OF}, low: 2, high: 9}}", True, None),
        (f"ScoreRange: {{{OF}}}", True, None),
        (f"ScoreQuantile: {{{OF}, drop_lowest: 0.1}}", True, None),
        ("PerplexityRange: {model: m}", True, None),
        ("PerplexityQuantile: {model: m}", True, None),
        ("KMeansQuality: {budget: 30, k: 3, quality: nll, model: m}", False, 30),
        (f"TopScore: {{budget: 30, {OF}}}", False, 30),
        (f"Deita: {{budget: 30, {OF}}}", False, 30),
        (f"Deita: {{budget: 120, {OF}}}", False, "all"),
        ("InstructMining: {budget: 20, of: [{ResponsePerplexity: {model: m}}], rule: [[nll, 1.0]]}", False, 20),
        ("Grape: {model: m}", False, "all"),
    ],
)
def test_rows_without_a_number_are_not_scorable(
    chats: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str, infinite: bool, kept: int | str | None
) -> None:
    """NaN and null are never kept and never dropped as if they were numbers; an infinite score is ranked by judges of a
    range, and cannot be weighed by those that select. Budgets are met from the rest."""
    monkeypatch.setattr(Workshop, "digest", lambda self, model: "d")
    monkeypatch.setattr(Workshop, "scorer", lambda self, model: OddScorer())
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "config.json").write_text("{}")
    record = curate(chats, tmp_path / "out", step, f'{{m: {{path: "{tmp_path / "m"}"}}}}')[3]
    folder = tmp_path / "out" / "ledger" / "clean"
    told = {r["row_id"]: r for r in pq.read_table(next(folder.glob("03-*")) / "verdicts.parquet").to_pylist()}
    rows = pq.read_table(next((tmp_path / "out" / "rows").glob("chats-*.parquet")), columns=["row_id", "content_id"])
    held = {r["row_id"] for r in pq.read_table(folder / "00-HeldOut" / "verdicts.parquet").to_pylist()}
    numbers = {r["row_id"]: odd(r["content_id"]) for r in rows.to_pylist() if r["row_id"] not in held}
    unfit = {
        row for row, value in numbers.items()
        if value is None or math.isnan(value) or (not infinite and math.isinf(value))
    }  # fmt: skip
    assert 20 < len(unfit) < LIVE - 30 and len(numbers) == LIVE == record["came"]
    assert {row for row, said in told.items() if said["reason"] == "not_scorable"} == unfit
    assert record["reasons"]["not_scorable"] == len(unfit)
    if kept is not None:
        assert record["kept"] == (LIVE - len(unfit) if kept == "all" else kept)


@dataclass(frozen=True)
class Sure:
    """A confidence that is odd for half of the contents."""

    version: ClassVar[int] = 1
    models: ClassVar[tuple[str, ...]] = ()
    columns: ClassVar[dict[str, pa.DataType]] = dict.fromkeys(("confidence", "consistency", "reflection"), pa.float64())

    def measure(self, rows: pa.Table, tools: Tools, progress: Progress) -> pa.Table:
        values = pa.array([odd(content) for content in rows["content_id"].to_pylist()], pa.float64())
        return pa.table(dict.fromkeys(self.columns, values))


def test_a_confidence_that_is_no_number(chats: Path, tmp_path: Path) -> None:
    from gristmill.curation.judges.confidence import ConfidenceFilter

    record = curate(chats, tmp_path / "out", "EqualAnswers", steps=(ConfidenceFilter(Sure(), 0.5),))[3]
    rows = pq.read_table(next((tmp_path / "out" / "rows").glob("chats-*.parquet")), columns=["row_id", "content_id"])
    held = pq.read_table(tmp_path / "out" / "ledger" / "clean" / "00-HeldOut" / "verdicts.parquet")["row_id"]
    values = [odd(r["content_id"]) for r in rows.to_pylist() if r["row_id"] not in set(held.to_pylist())]
    unknown = sum(value is None or math.isnan(value) for value in values)
    assert record["reasons"] == {"not_scorable": unknown, "low_confidence": values.count(-math.inf)}


# ---- steps that raise


@dataclass(frozen=True)
class Choosy(Unmeasured):
    """Raises on rows whose prompt says `word`."""

    word: str

    scope: ClassVar[str] = "row"

    def judge(self, rows: pa.Table, values: pa.Table) -> pa.Table:
        for row in rows.to_pylist():
            if self.word in row["messages"][0]["content"]:
                raise ValueError(f"cannot bear {self.word}")
        return verdicts([True] * rows.num_rows)


@dataclass(frozen=True)
class Failing(Unmeasured):
    """A corpus judge that raises."""

    scope: ClassVar[str] = "corpus"

    def judge(self, corpus: Corpus) -> pa.Table:
        return pa.table({"keep": [1 / 0]})


@dataclass(frozen=True)
class Stumbling:
    """A maker that raises after its first table."""

    scope: ClassVar[str] = "maker"
    consumes: ClassVar[str | None] = None
    model: ClassVar[str | None] = None

    def make(self, corpus: Corpus) -> Iterator[pa.Table]:
        yield next(iter(corpus.tables())).slice(0, 1)
        raise KeyError("second table")


def test_a_judge_that_raises_on_a_row(chats: Path, tmp_path: Path) -> None:
    record = curate(chats, tmp_path / "out", "EqualAnswers", steps=(Choosy("number 7?"),))[3]
    lost = record["reasons"]["judge_error"]
    assert 1 <= lost <= 2 and record["kept"] == LIVE - lost  # its neighbours stay
    faults = pq.read_table(tmp_path / "out" / "quarantine" / "clean-03-Choosy.parquet").to_pylist()
    assert len(faults) == lost and faults[0]["error"] == "ValueError: cannot bear number 7?"
    assert faults[0]["raw"].startswith("Traceback") and faults[0]["raw"].count("Traceback") == 1
    told = why(RunFolder(tmp_path / "out"), faults[0]["row_id"]).verdicts[3]
    assert (told.reason, told.evidence) == ("judge_error", {"error": "ValueError: cannot bear number 7?"})


@pytest.mark.parametrize(
    ("step", "said"),
    [
        (Choosy("What"), f"Choosy raised on every one of {LIVE} rows; the first time: ValueError: cannot bear What"),
        (Failing(), "it raised ZeroDivisionError: division by zero"),
        (Stumbling(), "it raised KeyError: 'second table'"),
    ],
)
def test_a_step_that_is_broken_stops_the_run(chats: Path, tmp_path: Path, step: Any, said: str) -> None:
    name = type(step).__name__
    told = refused(chats, tmp_path / "out", "EqualAnswers", steps=(step,))
    index = 1 if name == "Stumbling" else 3  # makers come before the gates
    assert f"step {index} {name} of set clean: {said}" in told and "run the same command again" in told
    kept = tmp_path / "out" / "quarantine" / f"clean-{index:02d}-{name}.txt"
    assert str(kept) in told and kept.read_text().startswith("Traceback")
    assert kept.read_text().count("Traceback") == 1
    assert [record["kept"] for record in recorded(tmp_path / "out")] == [LIVE] * index  # what came before stands
    assert not list((tmp_path / "out").rglob(".*.tmp")) and not (tmp_path / "out" / "curated").exists()


def test_thresholds_that_drop_everything(
    chats: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    strict = tmp_path / "strict.yaml"
    strict.write_text(text(chats, "ResponseLength: {low: 400, high: 500}"))
    out = tmp_path / "out"
    for _ in range(2):  # as often as it is asked
        assert call(monkeypatch, "curate", strict, "--out", out, "--plain", "--workers", 1) == 1
        said = capsys.readouterr().err
        assert f"step 3 ResponseLength of set clean left no row: {LIVE} came" in said
        assert f"00 HeldOut: 150 -> {LIVE}, held_out {150 - LIVE}" in said
        assert f"03 ResponseLength: {LIVE} -> 0, too_short {LIVE}" in said
        assert "new --out" in said and "Traceback" not in said
    assert not (out / "curated").exists()
    assert call(monkeypatch, "funnel", out) == 0 and "too_short" in capsys.readouterr().out
    loose = ["sets.clean.ResponseLength.low=1", "--plain", "--workers", 1]
    assert call(monkeypatch, "curate", strict, *loose, "--out", out) == 1
    assert "choose another --out" in capsys.readouterr().err
    assert call(monkeypatch, "curate", strict, *loose, "--out", tmp_path / "looser") == 0
    assert recorded(tmp_path / "looser")[-1]["kept"] == LIVE


# ---- files that a step reads


FILES = {
    "empty.jsonl": "",
    "broken.jsonl": '{"question": "one and one and one?", "answer": "3"}\n{"question": \n',
    "bad.parquet": "PAR1 and no more",
    "odd.jsonl": '{"alpha": 1, "beta": 2}\n',
    "blank.jsonl": '{"question": "", "answer": ""}\n',
    "text.jsonl": '{"text": "a raw document that says something"}\n',
    "few.jsonl": "".join(f'{{"question": "how about {i}?", "answer": "a river {i}"}}\n' for i in range(12)),
}


@pytest.fixture
def files(tmp_path: Path) -> Path:
    for name, content in FILES.items():
        (tmp_path / name).write_text(content)
    return tmp_path


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("absent.jsonl", "evaluation set absent: FILE: no such file or folder"),
        ("empty.jsonl", "evaluation set empty: "),
        ("broken.jsonl", "evaluation set FILE: line 2 of FILE cannot be read: invalid JSON"),
        ("bad.parquet", "evaluation set bad: FILE is damaged or not of its format"),
        ("odd.jsonl", "Columns seen: alpha, beta."),
        ("blank.jsonl", "evaluation set blank: none of its 1 items says anything that could be looked for"),
    ],
)
def test_an_evaluation_file_that_cannot_serve(chats: Path, files: Path, name: str, said: str) -> None:
    told = refused(chats, files / "out", f'Decontaminate: {{against: ["{files / name}"]}}')
    assert said.replace("FILE", str(files / name)) in told
    # a missing file is told before the first step; of the others the steps before stand, this one left nothing
    assert len(recorded(files / "out")) == (0 if name == "absent.jsonl" else 3)


def test_a_known_evaluation_set_misspelt_or_with_other_columns(chats: Path, files: Path) -> None:
    told = refused(chats, files / "out", f'Decontaminate: {{sets: {{gsm8: "{files / "few.jsonl"}"}}}}')
    assert told.startswith("bad.yaml:11: ") and "did you mean 'gsm8k'?" in told
    told = refused(chats, files / "out", f'Decontaminate: {{sets: {{math: "{files / "few.jsonl"}"}}}}')
    assert "evaluation set math: no column 'problem'" in told and "it has question, answer" in told


@pytest.mark.parametrize("judge", ["GotD", "SimCore", "RepresentationSimilarity"])
@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("absent.jsonl", "no such file or folder"),
        ("empty.jsonl", "is empty"),
        ("broken.jsonl", "(FILE:2). Mend that record, or remove it"),
        ("text.jsonl", "no row has a prompt. Give rows that have one, or another `view`"),
    ],
)
def test_targets_that_cannot_serve(chats: Path, files: Path, judge: str, name: str, said: str) -> None:
    step = f'{judge}: {{budget: 9, view: prompt, targets: ["{files / name}"]}}'
    told = refused(chats, files / "out", step)
    assert told.startswith(f"target set {files / name}: ") and said.replace("FILE", str(files / name)) in told


@pytest.mark.parametrize(
    ("positives", "negatives", "said"),
    [
        (["absent.jsonl"], ["few.jsonl"], "QualityClassifier, positives: FOLDER/absent.jsonl: no such file"),
        (["few.jsonl"], ["absent.jsonl"], "QualityClassifier, negatives: FOLDER/absent.jsonl: no such file"),
        (["few.jsonl"], [], "12 positive and 0 negative rows; each side needs 10. Add rows"),
        (["few.jsonl"], ["few.jsonl"], "12 contents that stand on both sides are left out"),
        ([], [], "nothing to learn from: give positives and negatives, or audits"),
    ],
)
def test_a_classifier_with_nothing_to_learn_from(
    chats: Path, files: Path, positives: list[str], negatives: list[str], said: str
) -> None:
    sides = [json.dumps([str(files / name) for name in side]) for side in (positives, negatives)]
    of = f"{{QualityClassifier: {{positives: {sides[0]}, negatives: {sides[1]}}}}}"
    told = refused(chats, files / "out", f"ScoreQuantile: {{of: {of}, column: quality_prob, drop_lowest: 0.2}}")
    assert said.replace("FOLDER", str(files)) in told


@pytest.mark.parametrize(
    ("step", "said"),
    [
        (
            "ScoreRange: {of: {Length: {}}, column: respns}",
            "Length has no number column 'respns'; it has",
        ),
        ("ScoreRange: {of: {Lenght: {}}, column: x}", "unknown step 'Lenght'; did you mean 'Length'?"),
        ("ScoreRange: {of: {Ifd: {modle: m}}, column: ifd}", "unknown key 'modle' in Ifd; did you mean 'model'?"),
        ("ScoreRange: {of: {Ifd: {model: smal}}, column: ifd}", "unknown model 'smal'; there are none"),
        ("ScoreRange: {of: {Length: {}, Ifd: {model: m}}, column: x}", "not 2 (Length, Ifd)"),
        ("ScoreRange: {of: Length}", "ScoreRange needs the key 'column'"),
        ("ScoreRang: {of: Length}", "unknown step 'ScoreRang'; did you mean 'ScoreRange'?"),
    ],
)
def test_a_nested_measure_that_is_not_understood(chats: Path, tmp_path: Path, step: str, said: str) -> None:
    told = refused(chats, tmp_path / "out", step)
    assert told.startswith("bad.yaml:11: ") and said in told and told.count("ScoreRange:") <= 1
    assert not (tmp_path / "out").exists()


# ---- what lies in a run's folder


@pytest.fixture(scope="module")
def finished(chats: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("finished") / "out"
    curate(chats, out, "ResponseLength: {low: 9, high: 500}")
    return out


@pytest.fixture
def copy(finished: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "copy"))


def recipe_of(out: Path) -> Path:
    return out / "recipe.yaml"


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"nonsense", "overrides.parquet cannot be read: "),
        ({"row_id": ["a"]}, "overrides.parquet has no column action; it has row_id. Restore it, or remove it"),
        ({"row_id": ["a"], "action": ["kepe"]}, "overrides.parquet row 1: needs one of row_id and content_id"),
    ],
)
def test_damaged_overrides(
    copy: Path, content: Any, said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = copy / "overrides.parquet"
    path.write_bytes(content) if isinstance(content, bytes) else pq.write_table(pa.table(content), path)
    again = ["curate", recipe_of(copy), "--out", copy, "--plain", "--workers", 1]
    assert call(monkeypatch, *again) == 1
    assert said in capsys.readouterr().err
    row = pq.read_table(next((copy / "rows").glob("chats-*.parquet")), columns=["row_id"])["row_id"][0].as_py()
    before = path.read_bytes()
    assert call(monkeypatch, "override", copy, row, "drop", "--why", "x") == 1
    assert said in capsys.readouterr().err and path.read_bytes() == before  # nothing is written over it
    path.unlink()
    assert call(monkeypatch, *again) == 0


def test_damaged_audit_files(copy: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    ask = ["audit", copy, "--judge", "ResponseLength", "--size", 6]
    monkeypatch.setattr(sys.stdin, "isatty", lambda: False, raising=False)
    assert call(monkeypatch, *ask) == 0
    (home,) = (copy / "audits").iterdir()
    for content, said in (
        (b"nonsense", "labels.parquet cannot be read"),
        (None, "labels.parquet has no column row_id"),
    ):
        path = home / "labels.parquet"
        path.write_bytes(content) if content else pq.write_table(pa.table({"a": [1]}), path)
        for arguments in (ask, ["audit", copy, "--against", copy]):
            assert call(monkeypatch, *arguments) == 1
            assert said in capsys.readouterr().err
    path.unlink()
    (home / "sample-6-0.parquet").write_bytes(b"x")
    assert call(monkeypatch, *ask) == 1
    assert "sample-6-0.parquet cannot be read" in (said := capsys.readouterr().err) and "Remove it" in said


def test_an_audit_of_a_judge_that_dropped_nothing(
    finished: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call(monkeypatch, "audit", finished, "--judge", "Trainable") == 1
    assert "no judge Trainable of" in (said := capsys.readouterr().err) and "those that did: " in said
    assert "ResponseLength" in said and not (finished / "audits").exists()


def test_why_of_an_unknown_row(
    finished: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for row in ("zzzz", ""):
        assert call(monkeypatch, "why", finished, row) == 1
        assert f"no row has the id {row!r}. Ids stand in the report" in capsys.readouterr().err
    assert call(monkeypatch, "why", finished.parent, "a") == 1
    assert "is not a run's folder" in capsys.readouterr().err


def test_decide_where_it_cannot(
    copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    change = "sets.clean.ResponseLength.low=12"
    assert call(monkeypatch, "decide", copy, change, "--write", copy / "rows") == 1
    assert "is not empty: a new release wants a folder of its own" in capsys.readouterr().err
    with pytest.raises(HouseError, match="held_out was"):
        decide(copy, ["sets.clean.held_out=0.2"])
    shutil.rmtree(next((copy / "ledger" / "clean").glob("03-*")))
    assert call(monkeypatch, "decide", copy, change) == 1
    assert f"set clean of {copy} is not finished: `gristmill run` first" in capsys.readouterr().err
    assert call(monkeypatch, "decide", tmp_path, change) == 1
    assert "holds no recipe.yaml" in capsys.readouterr().err


@pytest.mark.parametrize("judge", ["ExactDuplicate", "NearDuplicate"])
def test_an_index_of_earlier_releases_that_is_damaged(chats: Path, tmp_path: Path, judge: str) -> None:
    index = tmp_path / "index"
    step = f'{judge}: {{index: "{index}"}}'
    curate(chats, tmp_path / "first", step)
    whole = {path: path.read_bytes() for path in index.rglob("*") if path.is_file()}
    other = step.replace("}", ", view: response}")
    assert "this step has" in refused(chats, tmp_path / "other", other)
    largest = max(index.rglob("*.npy"), key=lambda path: path.stat().st_size)
    for path, content in ((largest, b"x"), (index / "index.json", b"{"), (next(index.rglob("segment.json")), b"[]")):
        path.write_bytes(content)
        told = refused(chats, tmp_path / "second", step)
        assert f"index of earlier releases {index} cannot be read" in told and "restore it, or begin a new one" in told
        path.write_bytes(whole[path])
    told = refused(chats, tmp_path / "second", step)  # whole again, it finds all rows in the first release
    assert f"left no row: {LIVE} came" in told and "_duplicate" in told


# ---- a full disk


def test_a_full_disk_in_a_spill(chats: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(file: int, offset: int, size: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(spill, "LIMIT", 64)
    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(HouseError, match=r"no room for what does not fit into memory: .* Free some space there"):
        spill.matrix(tmp_path, "keys", (100, 10), np.uint64)
    told = refused(chats, tmp_path / "out", "NearDuplicate")
    assert "no room for what does not fit into memory" in told and str(tmp_path / "out") in told
    monkeypatch.undo()
    assert curate(chats, tmp_path / "out", "NearDuplicate")[3]["came"] == LIVE  # the same command goes on
    assert not list((tmp_path / "out").rglob(".*.tmp"))


def test_a_disk_that_is_really_small(chats: Path, tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=96k", "none", str(disk)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("a tmpfs cannot be mounted here")
    try:
        told = refused(chats, disk / "out", "ResponseLength")
        assert told.startswith(f"cannot write {disk / 'out'}") and "Make room on that disk" in told
        subprocess.run(["mount", "-o", "remount,size=8m", str(disk)], check=True)
        assert curate(chats, disk / "out", "ResponseLength")[-1]["kept"] == LIVE
    finally:
        subprocess.run(["umount", str(disk)], check=True)
