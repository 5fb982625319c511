"""The data card: YAML that the Hub accepts, numbers of the manifest, a folder that `datasets` reads."""

import runpy
from pathlib import Path
from typing import Any

import pytest
import yaml

from gristmill.curation.cards import card, front_matter, merged_licence
from gristmill.curation.shards import read_manifest

write_run = runpy.run_path(str(Path(__file__).with_name("fake_run.py")))["write_run"]


@pytest.fixture(scope="module")
def fake(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return write_run(tmp_path_factory.mktemp("run"))


def test_hub_library_reads_the_yaml(fake: Any) -> None:
    hub = pytest.importorskip("huggingface_hub")
    found = hub.DatasetCard.load(fake.folder.curated("sft") / "README.md")
    assert isinstance(found.data, hub.DatasetCardData)
    assert found.data.license == "other" and found.data.license_name == "cc-by-nc-4.0-and-mit"
    assert found.data.task_categories == ["text-generation"]
    assert found.data.size_categories == ["n<1K"]
    files = found.data.to_dict()["configs"][0]["data_files"]
    assert files == [{"split": s, "path": f"data/{s}-*.parquet"} for s in ("train", "test")]
    assert hub.DatasetCard.load(fake.folder.curated("dpo") / "README.md").data.license == "mit"


@pytest.mark.parametrize("name", ["sft", "dpo"])
def test_datasets_reads_the_folder(fake: Any, tmp_path: Path, name: str) -> None:
    datasets = pytest.importorskip("datasets")
    home = fake.folder.curated(name)
    found = datasets.load_dataset(str(home), cache_dir=str(tmp_path))
    files = read_manifest(home)["files"]
    assert {split: rows.num_rows for split, rows in found.items()} == {f["split"]: f["rows"] for f in files}
    assert "row_id" in found["train"].column_names


def test_card_comes_from_the_manifest_alone(fake: Any) -> None:
    home = fake.folder.curated("sft")
    assert card(read_manifest(home)) == (home / "README.md").read_text(encoding="utf-8")


def test_card_tells_the_funnel_and_the_sources(fake: Any) -> None:
    manifest = read_manifest(fake.folder.curated("sft"))
    text = card(manifest)
    for step in manifest["funnel"]:
        assert f"| {step['came']:,} | {step['made']:,} | {step['kept']:,} | {step['dropped']:,} |" in text
    for source in manifest["sources"]:
        assert f"| {source['name']} | {source['licence']} | {source['rows']:,} |" in text
    assert "rows were made by the makers" in text and "7" in text and manifest["recipe_digest"] in text


@pytest.mark.parametrize(
    ("licences", "fields"),
    [
        (["MIT", "MIT"], {"license": "mit"}),
        (["Apache-2.0"], {"license": "apache-2.0"}),
        ([None], {"license": "unknown"}),
        ([], {"license": "unknown"}),
        (["MIT", None], {"license": "other", "license_name": "mit-and-unknown", "license_link": "#sources"}),
        (["My Own 1"], {"license": "other", "license_name": "my-own-1", "license_link": "#sources"}),
    ],
)
def test_licences_are_merged(licences: list[str | None], fields: dict[str, str]) -> None:
    assert merged_licence(licences) == fields


def test_language_and_sizes(fake: Any) -> None:
    manifest = read_manifest(fake.folder.curated("sft"))
    assert "language" not in front_matter(manifest)
    assert front_matter(manifest, "en")["language"] == ["en"]
    manifest["files"] = [{"path": "x", "split": "train", "rows": 36_000}]
    assert front_matter(manifest)["size_categories"] == ["10K<n<100K"]


def test_names_cannot_break_the_table_or_the_yaml(fake: Any) -> None:
    manifest = read_manifest(fake.folder.curated("sft"))
    manifest |= {"name": 'a: "b"\n---\n# c'}
    manifest["sources"] = [{"name": "x|y<b>\nz", "licence": "MIT", "rows": 1, "digest": "0" * 32}]
    text = card(manifest)
    assert yaml.safe_load(text.split("---\n")[1])["pretty_name"] == 'a: "b" --- # c'
    assert "| x\\|y&lt;b> z | MIT | 1 |" in text
