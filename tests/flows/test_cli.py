"""The command line: messages instead of tracebacks, light imports, every verb on a small run."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from gristmill.curation.folder import read_json
from gristmill.curation.shards import read_manifest
from gristmill.flows import cli
from gristmill.flows.progress import Silent
from gristmill.flows.recipe import Recipe
from gristmill.flows.run import Result

Whole = tuple[Recipe, Result, Silent]
VERBS = ["run", "curate", "demo", "sft", "dpo", "funnel", "why", "sql", "decide", "override", "audit", "judges",
         "doctor", "schedule", "new-model"]  # fmt: skip


def call(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    """Exit code of `gristmill ARGUMENTS`."""
    monkeypatch.setattr(sys, "argv", ["gristmill", *map(str, arguments)])
    try:
        cli.main()
    except SystemExit as ended:
        return int(ended.code or 0)
    return 0


def test_every_verb_has_help(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert call(monkeypatch, "--help") == 0
    listed = capsys.readouterr().out
    for verb in VERBS:
        assert f"  {verb}" in listed
        assert call(monkeypatch, verb, "--help") == 0
        assert len(capsys.readouterr().out.split("\n\n")[1].strip()) > 20  # its docstring


def test_help_imports_nothing_heavy() -> None:
    code = (
        "import sys; import gristmill.flows.cli\n"
        "heavy = ('torch', 'transformers', 'duckdb', 'prefect', 'numba', 'sklearn', 'datasets', 'yaml')\n"
        "print([name for name in heavy if name in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "[]"


def test_a_path_that_is_not_utf_8_is_told(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert call(monkeypatch, "sft", "caf\udce9.jsonl", "--model", "m", "--out", "o") == 1
    assert "caf\\\\xe9.jsonl' is not UTF-8: rename" in capsys.readouterr().err


def test_an_error_is_one_message_without_a_traceback(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert call(monkeypatch, "run", "dmeo", "--plain") == 1
    said = capsys.readouterr()
    assert said.err.strip() == "no recipe is called 'dmeo'; did you mean 'demo'?" and said.out == ""
    recipe = tmp_path / "mine.yaml"
    recipe.write_text("name: mine\nsuorces: {}\n")
    assert call(monkeypatch, "run", recipe) == 1
    assert f"{recipe}:2: unknown key 'suorces' in Recipe; did you mean 'sources'?" in capsys.readouterr().err
    assert call(monkeypatch, "funnel", tmp_path) == 1
    assert "is not a run's folder" in capsys.readouterr().err


def test_run_ends_with_funnel_evaluation_and_report(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], shared: Path, whole: Whole
) -> None:
    arguments = ["run", shared / "whole.yaml", "--out", shared / "whole", "--cache", shared / "cache"]
    (shared / "whole" / "run.json").unlink()
    assert call(monkeypatch, *arguments, "--plain") == 0
    said = capsys.readouterr().out
    assert "= clean 00-HeldOut" in said and "cached" in said
    assert "Every row is accounted for" in said and "accuracy" in said and "report.html" in said
    assert call(monkeypatch, *arguments) == 0  # finished: answers before Prefect
    assert "is done already" in capsys.readouterr().out


def test_looking_into_a_run(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], shared: Path, whole: Whole
) -> None:
    assert call(monkeypatch, "funnel", shared / "whole") == 0
    assert "ExactDuplicate" in capsys.readouterr().out
    assert call(monkeypatch, "sql", shared / "whole", "select sum(came + made - kept - dropped) from funnel") == 0
    assert "0" in capsys.readouterr().out
    rows = whole[1].folder.root / "curated/clean"
    first = read_manifest(rows)["files"][0]["path"]
    import pyarrow.parquet as pq

    row_id = pq.read_table(rows / first)["row_id"][0].as_py()
    assert call(monkeypatch, "why", shared / "whole", row_id) == 0
    assert row_id in capsys.readouterr().out


def test_judges_lists_every_step_with_its_fields(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call(monkeypatch, "judges") == 0
    said = capsys.readouterr().out
    assert "ResponseLength(low=1, high=2000)\n    Drops rows whose response" in said
    assert said.index("Row judges") < said.index("ResponseLength(") < said.index("Corpus judges")
    assert said.index("Measures") < said.index("  Ifd(model)")
    assert "(OPT-IML, arXiv 2212.12017; T5, arXiv 1910.10683)." in said  # no sentence ends at a semicolon
    assert "PreferenceFromModel(model, set_name='sft'" in said
    assert call(monkeypatch, "judges", "Refusl") == 1
    assert "did you mean 'Refusal'?" in capsys.readouterr().err


def test_curate_names_the_sets_that_wait(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], shared: Path, whole: Whole, tmp_path: Path
) -> None:
    arguments = ["curate", shared / "whole.yaml", "--out", tmp_path / "out", "--cache", shared / "cache", "--plain"]
    assert call(monkeypatch, *arguments) == 0
    assert "The set pairs needs a trained model" in capsys.readouterr().out
    assert not (tmp_path / "out/sft").exists()


SHORT = ["max_steps=1", "capacity=256", "packs_per_step=1", "lora.rank=2", "threads=1"]


def test_sft_on_a_curated_folder_and_on_raw_data(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], shared: Path, whole: Whole, tmp_path: Path
) -> None:
    model = next((shared / "cache/models").iterdir())
    curated = shared / "whole/curated/clean"
    assert call(monkeypatch, "sft", curated, *SHORT, "--model", model, "--out", tmp_path / "a") == 0
    assert read_json(tmp_path / "a/sft/run.json")["settings"]["max_steps"] == 1
    assert (tmp_path / "a/sft/adapter/adapter_model.safetensors").is_file()

    arguments = [shared / "chats.jsonl", *SHORT, "--model", model, "--out", tmp_path / "b", "--licence", "MIT"]
    assert call(monkeypatch, "sft", *arguments) == 0
    manifest = read_manifest(tmp_path / "b/curated/data")
    assert manifest["sources"][0]["licence"] == "MIT"
    assert manifest["rows"] == 150  # nothing is held out, the unreadable line is in quarantine
    assert (tmp_path / "b/sft/adapter/adapter_model.safetensors").is_file()

    (tmp_path / "chats.jsonl").write_bytes((shared / "chats.jsonl").read_bytes())
    again = [tmp_path / "chats.jsonl", *SHORT, "--model", model, "--out", tmp_path / "d"]
    assert call(monkeypatch, "sft", *again) == 0
    with (tmp_path / "chats.jsonl").open("a") as more:
        more.write('{"prompt": "One more?", "completion": "Yes, one more row."}\n')
    assert call(monkeypatch, "sft", *again) == 1
    assert "The rows of a run never change: choose another --out" in capsys.readouterr().err

    assert call(monkeypatch, "sft", curated, "max_stps=1", "--model", model, "--out", tmp_path / "c") == 1
    assert "unknown key 'max_stps' in Training; did you mean 'max_steps'?" in capsys.readouterr().err


def test_a_folder_that_another_run_writes_in_is_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], shared: Path, whole: Whole, tmp_path: Path
) -> None:
    model = next((shared / "cache/models").iterdir())
    other = "import sys, pathlib; from gristmill.curation.folder import sole\n"
    other += "with sole(pathlib.Path(sys.argv[1])): print('held', flush=True); sys.stdin.read()"
    command = [sys.executable, "-c", other, tmp_path / "äöü out"]
    arguments = [*SHORT, "--model", model, "--out", tmp_path / "äöü out"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as held:
        assert held.stdout is not None and held.stdout.readline() == "held\n"
        for data in (shared / "whole/curated/clean", shared / "chats.jsonl"):
            assert call(monkeypatch, "sft", data, *arguments) == 1
            assert "another run is writing in" in capsys.readouterr().err
        held.communicate("")
    assert call(monkeypatch, "sft", shared / "chats.jsonl", *arguments) == 0  # a name that is not ASCII
    (tmp_path / "file").write_text("")
    assert call(monkeypatch, "sft", shared / "chats.jsonl", *arguments[:-1], tmp_path / "file") == 1
    assert "cannot write in" in capsys.readouterr().err


def test_dpo_refuses_sft_data_and_continues_an_adapter(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], shared: Path, whole: Whole, tmp_path: Path
) -> None:
    model = next((shared / "cache/models").iterdir())
    start = ["--model", model, "--out", tmp_path / "out"]
    assert call(monkeypatch, "dpo", shared / "chats.jsonl", "--model", model, "--out", tmp_path / "other") == 1
    said = capsys.readouterr().err
    assert (
        "chats.jsonl holds rows of the shape" in said
        and "`gristmill dpo` trains on preference pairs, `gristmill sf" in said
    )
    assert call(monkeypatch, "dpo", shared / "whole/curated/clean", *SHORT, *start) == 1
    assert "dpo trains on data of kind 'preference'" in capsys.readouterr().err
    settings = [*SHORT[:3], "lora.rank=4", "threads=1"]
    adapter = ["--start", shared / "whole/sft"]
    assert call(monkeypatch, "dpo", shared / "whole/curated/pairs", *settings, *start, *adapter) == 0
    losses = [json.loads(line)["loss"] for line in (tmp_path / "out/dpo/metrics.jsonl").read_text().splitlines()]
    assert losses[0] == pytest.approx(0.6931472, abs=1e-6)  # ln 2: policy and reference begin equal


def test_new_model_is_a_folder_that_loads(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], shared: Path, tmp_path: Path
) -> None:
    arguments = ["--corpus", shared / "chats.jsonl", "--params", "200K", "vocab=300", "tokens=500", "context=128"]
    assert call(monkeypatch, "new-model", tmp_path / "model", *arguments) == 0
    assert read_json(tmp_path / "model/config.json")["vocab_size"] == 300
    assert "parameters" in capsys.readouterr().out
    assert call(monkeypatch, "new-model", tmp_path / "model", *arguments) == 1
    assert "is not empty" in capsys.readouterr().err
