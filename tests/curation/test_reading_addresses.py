"""Message trees, LLaMA-Factory's dataset_info.json, and data sets of the hub by name."""

import json
from pathlib import Path
from typing import Any

import pytest

from gristmill.curation.folder import HouseError, RunFolder
from gristmill.curation.reading.source import Source, Unreadable, iter_rows, read_source
from gristmill.curation.rows import Row
from gristmill.curation.text.view import prompt_of, response_of


def rows_of(source: Source) -> list[Row]:
    found = list(iter_rows(source))
    assert not [row for row in found if isinstance(row, Unreadable)]
    return [row for row in found if not isinstance(row, Unreadable)]


def node(own: str, parent: str | None, role: str, rank: int | None = None, **more: Any) -> dict[str, Any]:
    return {"message_id": own, "parent_id": parent, "role": role, "text": f"says {own}", "rank": rank} | more


FLAT = [
    node("r", None, "prompter", lang="en", message_tree_id="r"),
    node("b", "r", "assistant", 1),
    node("a", "r", "assistant", 0),
    node("x", "r", "assistant", 2, deleted=True),
    node("a1", "a", "prompter", None),
    node("a0", "a", "prompter", 0),
    node("a0b", "a0", "assistant", 1),
    node("a0a", "a0", "assistant", 0),
    node("a0c", "a0", "assistant", 2),
    node("a0a0", "a0a", "prompter", 0),
    node("lone", None, "prompter"),
    node("orphan", "gone", "assistant"),
    node("a", "r", "assistant", 5),
]


def lines(records: list[dict[str, Any]]) -> str:
    return "".join(json.dumps(record) + "\n" for record in records)


def test_a_tree_is_read_along_its_best_ranks(tmp_path: Path) -> None:
    (tmp_path / "t.jsonl").write_text(lines(FLAT))
    found = list(iter_rows(Source("t", str(tmp_path / "t.jsonl"), "x")))
    (row,) = [row for row in found if not isinstance(row, Unreadable)]
    turns = [(turn["role"], turn["content"]) for turn in row["messages"]]
    assert turns == [("user", "says r"), ("assistant", "says a"), ("user", "says a0"), ("assistant", "says a0a")]
    meta = json.loads(row["meta"])
    assert meta == {"message_tree_id": "r", "lang": "en", "message_ids": ["r", "a", "a0", "a0a"]}
    assert {row.error for row in found if isinstance(row, Unreadable)} == {
        "no reply of an assistant in this tree", "its parent 'gone' is not in the source",
        "the message_id 'a' was used before",
    }  # fmt: skip


def test_ranked_siblings_make_pairs(tmp_path: Path) -> None:
    (tmp_path / "t.jsonl").write_text(lines(FLAT[:10]))
    rows = rows_of(Source("t", str(tmp_path / "t.jsonl"), "x", shape="tree_preference"))
    pairs = [(len(r["messages"]), r["chosen"][0]["content"], r["rejected"][0]["content"]) for r in rows]
    assert pairs == [(1, "says a", "says b"), (3, "says a0a", "says a0c")]


def test_flat_and_nested_trees_are_the_same(data: Path) -> None:
    paths = [data / "oasst_en_100_trees.parquet", data / "original" / "en_100_tree.jsonl"]
    for shape, count in (("auto", 100), ("tree_preference", 212)):
        flat, nested = ([row["content_id"] for row in rows_of(Source("t", str(p), "x", shape=shape))] for p in paths)
        assert flat == nested and len(flat) == count
    one = rows_of(Source("t", str(paths[0]), "x", id="message_tree_id"))
    assert all(row["messages"][0]["role"] == "user" and row["messages"][-1]["role"] == "assistant" for row in one)


FACTORY: dict[str, Any] = {
    "plain": {"file_name": "plain.json"},
    "named": {"file_name": "named.json", "columns": {"prompt": "ask", "query": "more", "response": "reply"}},
    "chat": {
        "file_name": "chat.json", "formatting": "sharegpt", "columns": {"messages": "talk"},
        "tags": {"role_tag": "who", "content_tag": "says", "user_tag": "Q", "assistant_tag": "A"},
    },
    "pairs": {"file_name": "pairs.json", "formatting": "sharegpt", "ranking": True},
    "script": {"script_url": "x"},
    "odd": {"file_name": "plain.json", "formatting": "odd"},
}  # fmt: skip


@pytest.fixture
def factory(tmp_path: Path) -> Path:
    files: dict[str, list[dict[str, Any]]] = {
        "plain.json": [{"instruction": "add", "input": "1 2", "output": "3"}],
        "named.json": [{"ask": "add", "more": "1 2", "reply": "3", "output": "kept"}],
        "chat.json": [{"talk": [{"who": "Q", "says": "add 1 2"}, {"who": "A", "says": "3"}], "topic": "sums"}],
        "pairs.json": [
            {"conversations": [{"from": "human", "value": "add 1 2"}], "chosen": {"from": "gpt", "value": "3"},
             "rejected": {"from": "gpt", "value": "4"}},
        ],
    }  # fmt: skip
    for name, records in files.items():
        (tmp_path / name).write_text(json.dumps(records))
    (tmp_path / "dataset_info.json").write_text(json.dumps(FACTORY))
    return tmp_path


@pytest.mark.parametrize(
    ("name", "prompt", "response"),
    [("plain", "add\n\n1 2", "3"), ("named", "add\n\n1 2", "3"), ("chat", "add 1 2", "3"), ("pairs", "add 1 2", "3")],
)
def test_entries_of_dataset_info(name: str, prompt: str, response: str, factory: Path) -> None:
    (row,) = rows_of(Source("f", f"factory:{factory}:{name}", "x"))
    assert (prompt_of(row), response_of(row)) == (prompt, response)
    if name == "named":
        assert json.loads(row["meta"]) == {"output_unmapped": "kept"}
    if name == "chat":
        assert json.loads(row["meta"]) == {"topic": "sums"}


def test_another_entry_is_another_source(factory: Path, folder: RunFolder) -> None:
    source = Source("f", f"factory:{factory}:plain", "x")
    read_source(source, folder)
    (factory / "dataset_info.json").write_text(
        json.dumps(FACTORY | {"plain": {"file_name": "plain.json", "columns": {}}})
    )
    with pytest.raises(HouseError, match="choose another --out"):
        read_source(source, folder)


@pytest.mark.parametrize(
    ("address", "says"),
    [
        ("factory:{}:none", "has no entry 'none'; it has chat, named, odd, pairs, plain, script"),
        ("factory:{}/no:plain", "cannot read .*dataset_info.json"),
        ("factory:plain", "say factory:FOLDER:NAME"),
        ("factory:{}:script", "names neither file_name nor hf_hub_url"),
        ("factory:{}:odd", "formatting 'odd'; known are alpaca, sharegpt"),
        ("hub:", "say hub:ORG/NAME"),
        ("hub:a/b:c:d:e", "say hub:ORG/NAME"),
    ],
)
def test_addresses_that_name_nothing(address: str, says: str, factory: Path) -> None:
    with pytest.raises(HouseError, match=says):
        list(iter_rows(Source("f", address.format(factory), "x")))


def test_hub_names_are_loaded_by_datasets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets", reason="datasets is not installed (extra: hub)")
    (tmp_path / "a").mkdir()
    for split, size in (("train", 3), ("test", 2)):
        records = [{"question": f"{split} {i}?", "answer": str(i)} for i in range(size)]
        (tmp_path / "a" / f"{split}.jsonl").write_text(lines(records))
    real = datasets.load_dataset
    asked = []

    def load(name: str, config: Any, split: Any, revision: Any) -> Any:
        asked.append((name, config, split, revision))
        return real(str(tmp_path / "a"), split=split, cache_dir=str(tmp_path / "cache"))

    monkeypatch.setattr(datasets, "load_dataset", load)
    rows = rows_of(Source("h", "hub:org/name@v1:main:train", "x"))
    assert [prompt_of(row) for row in rows] == ["train 0?", "train 1?", "train 2?"] and rows[0]["meta"] is None
    every = rows_of(Source("h", "hub:org/name", "x"))
    assert [json.loads(row["meta"])["split"] for row in every] == ["train"] * 3 + ["test"] * 2
    assert asked == [("org/name", "main", "train", "v1"), ("org/name", None, None, None)]


def test_a_hub_name_that_cannot_be_had_is_named() -> None:
    pytest.importorskip("datasets", reason="datasets is not installed (extra: hub)")
    with pytest.raises(HouseError, match="cannot load hub:nobody/nothing-at-all with `datasets`"):
        list(iter_rows(Source("h", "hub:nobody/nothing-at-all", "x")))
