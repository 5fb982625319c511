"""The whole loop on a tiny recipe: what stands at its end, what a second run does, and what a killed one ends in."""

import hashlib
import json
import os
import signal
import sqlite3
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from gristmill.curation.folder import HouseError, read_json
from gristmill.curation.overrides import OVERRIDES
from gristmill.curation.rows import message, table
from gristmill.curation.shards import read_manifest
from gristmill.flows.models import Workshop, evenly
from gristmill.flows.progress import Done, Silent
from gristmill.flows.recipe import Recipe, load_recipe, load_text
from gristmill.flows.run import Result, run

Whole = tuple[Recipe, Result, Silent]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


class Recorded(Silent):
    """Keeps how each job ended."""

    def __init__(self) -> None:
        super().__init__()
        self.ended: dict[str, Done] = {}

    def finish(self, name: str, done: Done, seconds: float) -> None:
        super().finish(name, done, seconds)
        self.ended[name] = done


def test_every_part_of_the_recipe_stands(whole: Whole) -> None:
    _, result, show = whole
    root = result.folder.root
    assert show.done[0] == "read chats" and show.done[-2:] == ["evaluate", "report"]
    assert show.done.count("make model base") == 1
    assert show.done.index("make model base") < show.done.index("clean 05-PerplexityQuantile")  # made when first needed
    assert (root / "sft/adapter/adapter_config.json").is_file() and (root / "dpo/adapter/adapter_config.json").is_file()
    assert read_manifest(root / "curated/pairs")["kind"] == "preference"
    assert (root / "report.html").stat().st_size > 1000
    assert load_recipe(root / "recipe.yaml") == whole[0]


def test_the_manifest_names_the_run(whole: Whole) -> None:
    recipe, result, _ = whole
    manifest = read_manifest(result.folder.curated("clean"))
    assert manifest["created"] == read_json(result.folder.root / "started.json")["created"]
    assert load_text(manifest["recipe"]) == recipe
    assert manifest["previous"] is None
    assert all(s["came"] + s["made"] == s["kept"] + s["dropped"] for s in manifest["funnel"])


def test_the_evaluation_compares_before_and_after(whole: Whole) -> None:
    found = {(row["set"], row["metric"], row["model"]): row for row in whole[1].evaluation()}
    losses = {model: found[("clean", "loss", model)]["value"] for model in ("base", "sft", "dpo")}
    assert losses["sft"] != losses["base"] != losses["dpo"]
    assert found[("pairs", "accuracy", "sft")]["value"] == 0.5  # against itself every pair is a tie
    assert found[("pairs", "margin", "sft")]["value"] == 0.0
    assert found[("pairs", "margin", "dpo")]["value"] != 0.0
    assert ("pairs", "accuracy", "base") not in found
    for name in ("clean", "pairs"):
        files = read_manifest(whole[1].folder.curated(name))["files"]
        held_out = sum(file["rows"] for file in files if file["split"] == "test")
        assert {row["rows"] for key, row in found.items() if key[0] == name} == {held_out}


def test_a_new_model_never_sees_held_out_rows(whole: Whole) -> None:
    recipe, result, _ = whole
    shop = Workshop(recipe, result.folder)
    held_out = {row["messages"][0]["content"] for t in shop.curated("clean", "test") for row in t.to_pylist()}
    read = [turns[0]["content"] for turns in shop._texts("base", 1000)]
    assert held_out and not held_out & set(read)
    assert len(list(shop._texts("base", 7))) == 7


def test_curated_gives_rows_of_both_splits(whole: Whole) -> None:
    recipe, result, _ = whole
    manifest = read_manifest(result.folder.curated("clean"))
    for split in ("train", "test"):
        rows = sum(table.num_rows for table in Workshop(recipe, result.folder).curated("clean", split))
        assert rows == sum(file["rows"] for file in manifest["files"] if file["split"] == split) > 0


def test_a_finished_recipe_answers_before_anything_heavy_is_imported(shared: Path, whole: Whole) -> None:
    code = (
        "import sys; from gristmill.flows.run import run_in_prefect; from gristmill.flows.recipe import load_recipe\n"
        f"result = run_in_prefect(load_recipe({str(shared / 'whole.yaml')!r}), {str(shared / 'whole')!r},"
        f" cache={str(shared / 'cache')!r})\n"
        "assert result.cached\n"
        "print([name for name in ('prefect', 'torch', 'duckdb', 'transformers') if name in sys.modules])"
    )
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=ENVIRONMENT)
    assert ended.stdout.strip() == "[]", ended.stderr


def test_another_recipe_in_the_same_folder_is_refused_with_the_difference(shared: Path, whole: Whole) -> None:
    other = load_recipe(shared / "whole.yaml", ["seed=5", "stages.sft.max_steps=9"])
    with pytest.raises(HouseError, match=r"(?s)another recipe.*-seed: 0\n\+seed: 5.*\+    max_steps: 9") as caught:
        run(other, shared / "whole", cache=shared / "cache")
    assert "choose another --out" in str(caught.value)


def test_only_what_is_missing_is_done_again(shared: Path, whole: Whole) -> None:
    recipe, result, _ = whole
    before = (result.folder.curated("clean") / "manifest.json").read_bytes()
    (result.folder.root / "evaluation.json").unlink()
    (result.folder.root / "ledger/clean/04-ExactDuplicate/step.json").unlink()
    show = Recorded()
    assert not run(recipe, shared / "whole", cache=shared / "cache", show=show).cached
    assert {name for name, done in show.ended.items() if not done.cached} == {
        "clean 04-ExactDuplicate",
        "evaluate",
        "report",
    }
    assert (result.folder.curated("clean") / "manifest.json").read_bytes() == before


def test_a_changed_override_wakes_a_finished_run(shared: Path, whole: Whole, tmp_path: Path) -> None:
    recipe = load_recipe(shared / "curation.yaml")
    first = run(recipe, tmp_path / "out", cache=shared / "cache")
    assert run(recipe, tmp_path / "out", cache=shared / "cache").cached
    row_id = next(Workshop(recipe, first.folder).curated("clean", "train"))["row_id"][0].as_py()
    override = {"row_id": row_id, "action": "drop", "who": "a person", "why": "to see it go"}
    pq.write_table(pa.Table.from_pylist([override], schema=OVERRIDES), first.folder.root / "overrides.parquet")
    show = Recorded()
    again = run(recipe, tmp_path / "out", cache=shared / "cache", show=show)
    assert {name for name, done in show.ended.items() if not done.cached} == {
        "clean 05-Overrides",
        "clean shards",
        "report",
    }
    kept = [row for table in Workshop(recipe, again.folder).curated("clean", "train") for row in table["row_id"]]
    assert row_id not in [row.as_py() for row in kept]
    assert run(recipe, tmp_path / "out", cache=shared / "cache").cached


def test_a_new_release_measures_nothing_twice(shared: Path, whole: Whole, tmp_path: Path) -> None:
    recipe, _, _ = whole
    before = {path: path.stat().st_mtime_ns for path in (shared / "cache").rglob("*") if path.is_file()}
    show = Recorded()
    result = run(recipe, tmp_path / "out", cache=shared / "cache", parts="curate", previous="20250101", show=show)
    after = {path: path.stat().st_mtime_ns for path in (shared / "cache").rglob("*") if path.is_file()}
    assert after == before and show.ended["make model base"].cached
    assert result.waiting == ("pairs",)  # it needs the trained stage
    assert read_manifest(result.folder.curated("clean"))["previous"] == "20250101"
    assert not (tmp_path / "out/sft").exists()


def test_bad_input_is_refused_before_anything_is_read(shared: Path, tmp_path: Path) -> None:
    recipe = load_recipe(shared / "curation.yaml", ["models.base={path: no/such/model}"])
    with pytest.raises(HouseError, match=r"model 'base': no/such/model holds no config\.json"):
        run(recipe, tmp_path / "out")
    (tmp_path / "file").write_text("")
    with pytest.raises(HouseError, match="cannot write in"):
        run(load_recipe(shared / "curation.yaml"), tmp_path / "file" / "out")
    nowhere = load_recipe(shared / "curation.yaml", ["sources.chats.path=/no/such.jsonl"])
    with pytest.raises(HouseError, match=r"no/such\.jsonl"):
        run(nowhere, tmp_path / "out2")


def test_an_interrupted_and_a_killed_run_end_in_the_same_bytes(shared: Path, whole: Whole, tmp_path: Path) -> None:
    out = tmp_path / "out"
    command = ["run", str(shared / "whole.yaml"), "--out", str(out), "--cache", str(shared / "cache"), "--plain"]
    process = _start(command)
    assert process.stdout is not None
    for line in process.stdout:
        if "clean 03" in line:
            process.send_signal(signal.SIGINT)
            break
    said = process.stdout.read() + (process.stderr.read() if process.stderr else "")
    assert process.wait(60) == 130 and "Traceback" not in said
    assert "Interrupted." in said and "continue with" in said and "--plain" in said

    process = _start(command)
    metrics = out / "sft" / "metrics.jsonl"
    while process.poll() is None and not (metrics.is_file() and metrics.stat().st_size):
        time.sleep(0.005)
    process.kill()
    process.communicate()

    assert _start(command).wait(240) == 0
    assert _digests(out) == _digests(shared / "whole")


def _start(command: list[str]) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [sys.executable, "-m", "gristmill.flows.cli", *command],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=ENVIRONMENT,
    )


def _digests(out: Path) -> dict[str, str]:
    """sha256 of curated shards and adapters; manifests but for the time of the start."""
    files = [*out.glob("curated/*/data/*.parquet"), *out.glob("*/adapter/*.safetensors")]
    found = {str(path.relative_to(out)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}
    for path in out.glob("curated/*/manifest.json"):
        manifest = read_json(path) | {"created": ""}
        found[str(path.relative_to(out))] = json.dumps(manifest, sort_keys=True)
    return found


@pytest.mark.server
def test_prefect_shows_what_stood_as_cached(shared: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    run(load_recipe(shared / "curation.yaml"), out)
    (out / "run.json").unlink()
    (out / "ledger/clean/03-ResponseLength/step.json").unlink()
    environment = ENVIRONMENT | {"PREFECT_HOME": str(tmp_path / "prefect")}
    environment.pop("PREFECT_API_URL", None)
    command = [sys.executable, "-m", "gristmill.flows.cli", "run", str(shared / "curation.yaml"), "--out", str(out)]
    ended = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=400)
    assert ended.returncode == 0, ended.stderr
    assert ended.stderr == ""
    with sqlite3.connect(tmp_path / "prefect" / "prefect.db") as database:
        states = dict(database.execute("select name, state_name from task_run").fetchall())
        flows = database.execute("select state_name from flow_run").fetchall()
    assert flows == [("Completed",)]
    assert states.pop("clean 03-ResponseLength") == "Completed"
    assert states.pop("report") == "Completed"
    assert set(states.values()) == {"Cached"} and "read chats" in states


def test_a_sample_of_a_corpus_passes_over_parts_that_give_none() -> None:
    def part(*prompts: str) -> Any:
        return table([{"messages": [message("user", prompt)]} for prompt in prompts])

    parts = [part("a", "b", "c", "d"), part("e"), part(), part("f", "g")]
    assert [turns[0]["content"] for turns in evenly(parts, 7, 2)] == ["a", "d"]
    assert [turns[0]["content"] for turns in evenly(parts, 7, 100)] == list("abcdefg")
