"""The cassette of published GSM8K solutions: as many answers as were published, to the very requests of the recipe's
makers, and what is said of a file that is another one."""

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from gristmill.curation.door import ChatAnswer, ChatError, ChatRequest
from gristmill.curation.folder import HouseError, RunFolder
from gristmill.curation.reading.source import read_source
from gristmill.curation.rows import ROW
from gristmill.flows.doors.cassette import CassetteChat
from gristmill.flows.doors.published import MODELS, NAME, main, samplers, write_cassette
from gristmill.flows.recipe import Recipe, load_recipe

FILE = "gsm8k_model_solutions.parquet"
QUESTIONS = 1319  # of GSM8K's test set


@pytest.fixture
def recipe(data: Path, monkeypatch: pytest.MonkeyPatch) -> Recipe:
    monkeypatch.setenv("GRISTMILL_DATA", str(data))
    return load_recipe("math-dart")


class Asked:
    """A cassette that remembers what it was asked and what it said."""

    def __init__(self, cassette: CassetteChat) -> None:
        self.name, self.digest, self.licence, self.price = (
            cassette.name, cassette.digest, cassette.licence, cassette.price
        )  # fmt: skip
        self.cassette, self.told = cassette, list[tuple[ChatRequest, ChatAnswer | ChatError]]()

    def complete(self, requests: Sequence[ChatRequest], progress: Any = None) -> list[ChatAnswer | ChatError]:
        answers = self.cassette.complete(requests)
        self.told += zip(requests, answers, strict=True)
        return answers


class Corpus:
    """What a maker sees of a run: rows of the set that it asks about, and one model."""

    def __init__(self, chat: Asked, rows: pa.Table) -> None:
        self.model, self.rows, self.tools, self.facts = chat, rows, self, dict[str, Any]()

    def chat(self, model: str) -> Asked:
        assert model == "solver"
        return self.model

    def curated(self, set_name: str, split: str) -> Iterator[pa.Table]:
        assert set_name == "questions"
        yield self.rows if split == "train" else ROW.empty_table()

    def tables(self, columns: Sequence[str] | None = None) -> Iterator[pa.Table]:
        yield ROW.empty_table().select(list(columns or ROW.names))

    def progress(self, done: int, total: int) -> None:
        assert done <= total

    def record(self, **facts: Any) -> None:
        self.facts |= facts


def test_the_makers_of_math_dart_are_answered_with_the_published_texts(
    data: Path, recipe: Recipe, tmp_path: Path
) -> None:
    path = tmp_path / "deep" / "math-dart.jsonl"
    assert write_cassette(path, recipe, data / FILE) == len(MODELS) * QUESTIONS == 5276
    assert sum(1 for _ in path.open()) == 5277 and [file.name for file in path.parent.iterdir()] == [path.name]
    cassette = CassetteChat(path)
    assert (cassette.name, cassette.licence, cassette.price) == (NAME, "MIT", (0.0, 0.0))
    folder = RunFolder(tmp_path / "out")
    read_source(replace(recipe.source("gsm8k"), limit=12), folder)
    rows = pa.concat_tables(pq.read_table(file) for file in sorted(folder.rows.glob("gsm8k-*.parquet")))
    published = {row["question"].strip(): row for row in pq.read_table(data / FILE).slice(0, 40).to_pylist()}
    makers = samplers(recipe)
    assert [type(maker).__name__ for maker in makers] == ["RejectionSampling", "RightAgainstWrong"]
    for maker in makers:
        corpus = Corpus(Asked(cassette), rows)
        made = [row for part in maker.make(corpus) for row in part.to_pylist()]
        told = corpus.model.told
        assert made and len(told) == 12 * len(MODELS) == len({request.seed for request, _ in told})
        assert all(isinstance(answer, ChatAnswer) for _, answer in told), "the cassette lacks what the maker asks"
        for row in rows.to_pylist():
            question = row["messages"][0]["content"]
            texts = [answer.text for request, answer in told if question in request.messages[-1][1]]
            assert texts == [json.loads(published[question][model])["solution"] for model in MODELS]


def test_the_command_says_what_it_wrote_and_overwrites_nothing(
    data: Path, recipe: Recipe, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    few = tmp_path / "data"
    few.mkdir()
    pq.write_table(pq.read_table(data / FILE).slice(0, 5), few / FILE)
    monkeypatch.setenv("GRISTMILL_DATA", str(few))
    path = tmp_path / "math-dart.jsonl"
    main([str(path)])
    assert capsys.readouterr().out == f"{path}: 20 answers, {NAME}\n"
    before = path.read_bytes()
    with pytest.raises(HouseError, match=r"math-dart\.jsonl is there: remove it, or name another file"):
        main([str(path)])
    assert path.read_bytes() == before
    main([str(tmp_path / "other.jsonl"), "math-dart", "sets.sft.RejectionSampling.max_tokens=64"])
    assert "40 answers" in capsys.readouterr().out  # the two makers ask otherwise now, and both are answered
    with pytest.raises(HouseError, match="no maker that samples answers"):
        main([str(tmp_path / "none.jsonl"), "demo"])
    with pytest.raises(HouseError, match="name the cassette to write: python -m"):
        main([])
    assert not (tmp_path / "none.jsonl").exists()


def spoilt(data: Path, file: Path, how: str) -> None:
    table = pq.read_table(data / FILE).slice(0, 3)
    if how == "another set":
        shutil.copy(data / "gsm8k_test.parquet", file)
    elif how == "no Parquet":
        file.write_text("question,ground_truth\n")
    elif how == "a model less":
        pq.write_table(table.drop_columns([MODELS[1]]), file)
    elif how == "no JSON":
        column = pa.array(["It is 18."] * 3)
        pq.write_table(table.set_column(table.column_names.index(MODELS[0]), MODELS[0], column), file)


@pytest.mark.parametrize("how", ["absent", "another set", "no Parquet", "a model less", "no JSON"])
def test_a_file_that_is_another_one_is_named(data: Path, recipe: Recipe, tmp_path: Path, how: str) -> None:
    file = tmp_path / FILE
    spoilt(data, file, how)
    with pytest.raises(HouseError) as caught:
        write_cassette(tmp_path / "out.jsonl", recipe, file)
    assert str(file) in str(caught.value) and "Set GRISTMILL_DATA to the folder that holds" in str(caught.value)
    assert not (tmp_path / "out.jsonl").exists()


def test_the_module_ends_with_a_message_and_no_traceback(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "gristmill.flows.doors.published", str(tmp_path / "out.jsonl")]
    done = subprocess.run(command, capture_output=True, text=True, env={"GRISTMILL_DATA": str(tmp_path)})
    assert done.returncode == 1 and done.stderr.startswith("error: there is no ") and done.stderr.count("\n") == 1
