"""Reading: every format, parts, ids, conservation, and every kind of bad input."""

import csv
import gzip
import io
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from gristmill.curation.folder import HouseError, RunFolder, read_json
from gristmill.curation.reading import chunks
from gristmill.curation.reading import source as reading
from gristmill.curation.reading.source import Source, Unreadable, iter_rows, read_source
from gristmill.curation.rows import ROW
from gristmill.curation.text.view import prompt_of, response_of

ALPACA = [
    {"instruction": f"Say {n}.", "input": "" if n % 2 else f"in {n}", "output": f"{n} \u2028 é\x85"} for n in range(7)
]


def rows_of(folder: RunFolder, record: dict[str, Any]) -> list[dict[str, Any]]:
    tables = [pq.read_table(folder.rows / part) for part in record["parts"]]
    assert all(table.schema == ROW for table in tables)
    return list(pa.concat_tables(tables).to_pylist())


def faults_of(folder: RunFolder, name: str) -> list[dict[str, Any]]:
    return list(pq.read_table(folder.quarantine / f"{name}.parquet").to_pylist())


def lines(records: list[Any]) -> bytes:
    return b"".join(json.dumps(record, ensure_ascii=False).encode() + b"\n" for record in records)


def as_csv(records: list[dict[str, Any]], delimiter: str = ",") -> bytes:
    out = io.StringIO(newline="")
    writer = csv.DictWriter(out, list(records[0]), delimiter=delimiter)
    writer.writeheader()
    writer.writerows(records)
    return out.getvalue().encode()


def as_parquet(records: list[dict[str, Any]]) -> bytes:
    out = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(records), out)
    return out.getvalue()


def as_arrow(records: list[dict[str, Any]], new: Callable[..., Any]) -> bytes:
    out = io.BytesIO()
    table = pa.Table.from_pylist(records)
    with new(out, table.schema) as writer:
        writer.write_table(table, max_chunksize=3)
    return out.getvalue()


def zstd(raw: bytes, frames: int = 1) -> bytes:
    codec = pa.Codec("zstd")
    cut = len(raw) // frames + 1
    return b"".join(bytes(codec.compress(raw[i : i + cut])) for i in range(0, len(raw), cut))


FORMATS: dict[str, Callable[[list[Any]], bytes]] = {
    "a.json": lambda r: json.dumps(r).encode(),
    "indented.json": lambda r: b"\xef\xbb\xbf" + json.dumps(r, indent=4, ensure_ascii=False).encode(),
    "lines.json": lines,
    "a.jsonl": lines,
    "crlf.jsonl": lambda r: b"\xef\xbb\xbf" + lines(r).replace(b"\n", b"\r\n") + b"\r\n \n",
    "a.jsonl.gz": lambda r: gzip.compress(lines(r)),
    "a.json.gz": lambda r: gzip.compress(json.dumps(r).encode()),
    "a.jsonl.zst": lambda r: zstd(lines(r)),
    "frames.jsonl.zst": lambda r: zstd(lines(r), frames=3),
    "a.csv": as_csv,
    "a.csv.gz": lambda r: gzip.compress(as_csv(r)),
    "a.tsv": lambda r: as_csv(r, "\t"),
    "a.parquet": as_parquet,
    "a.arrow": lambda r: as_arrow(r, pa.ipc.new_file),
    "stream.arrow": lambda r: as_arrow(r, pa.ipc.new_stream),
}


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_gives_the_same_rows(name: str, tmp_path: Path, folder: RunFolder) -> None:
    (tmp_path / name).write_bytes(FORMATS[name](ALPACA))
    record = read_source(Source("s", str(tmp_path / name), "MIT"), folder)
    rows = rows_of(folder, record)
    assert [response_of(row) for row in rows] == [given["output"] for given in ALPACA]
    assert prompt_of(rows[2]) == "Say 2.\n\nin 2" and prompt_of(rows[3]) == "Say 3."
    assert [row["position"] for row in rows] == list(range(7))
    expected = {"name": "s", "shape": "alpaca", "licence": "MIT", "rows": 7, "quarantined": 0, "read": 7}
    assert record.items() >= expected.items() and record["parts"] == ["s-00000.parquet"]
    assert record == read_json(folder.rows / "s.json")
    plain = tmp_path / "reference.jsonl"
    plain.write_bytes(lines(ALPACA))
    reference = [row for row in iter_rows(Source("s", str(plain), "MIT")) if not isinstance(row, Unreadable)]
    assert [row["row_id"] for row in rows] == [row["row_id"] for row in reference]


def test_saved_datasets(tmp_path: Path, folder: RunFolder) -> None:
    datasets = pytest.importorskip("datasets")
    made = datasets.Dataset.from_list(ALPACA)
    made.save_to_disk(str(tmp_path / "one"), num_shards=2)
    datasets.DatasetDict(train=made, test=made.select([0])).save_to_disk(str(tmp_path / "dict"))
    one = rows_of(folder, read_source(Source("one", str(tmp_path / "one"), "MIT"), folder))
    assert [response_of(row) for row in one] == [given["output"] for given in ALPACA]
    both = rows_of(folder, read_source(Source("both", str(tmp_path / "dict"), "MIT"), folder))
    assert [json.loads(row["meta"])["split"] for row in both] == ["train"] * 7 + ["test"]


def test_folders_globs_and_other_file_systems(tmp_path: Path, folder: RunFolder) -> None:
    for name, part in (("b/2.jsonl", ALPACA[3:]), ("a.jsonl", ALPACA[:3]), (".hidden.jsonl", ALPACA), ("x.txt", [])):
        (tmp_path / "d" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "d" / name).write_bytes(lines(part))
    (tmp_path / "d/dataset_info.json").write_text("{}")
    want = [given["output"] for given in ALPACA]
    for number, path in enumerate((f"{tmp_path}/d", f"file://{tmp_path}/d", f"{tmp_path}/d/**/[!.]*.jsonl")):
        rows = rows_of(folder, read_source(Source(f"s{number}", path, "MIT"), folder))
        assert [response_of(row) for row in rows] == want
    import fsspec

    with fsspec.open("memory://reading/a.jsonl", "wb") as out:
        out.write(lines(ALPACA))
    rows = rows_of(folder, read_source(Source("memory", "memory://reading/a.jsonl", "MIT"), folder))
    assert [response_of(row) for row in rows] == want


def test_bad_lines_are_quarantined_with_line_error_and_raw_text(tmp_path: Path, folder: RunFolder) -> None:
    good = lines(ALPACA[:1]).strip()
    bad = [
        b'{"instruction": "a", "output": ',
        b'{"instruction": "caf\xe9", "output": "b"}',
        b"[1, 2]",
        b'{"instruction": "half \\ud83d", "output": "b"}',
        b'{"instruction": "no output"}',
        b'{"instruction": "a", "output": 3}',
        b'{"instruction": "a", "output": null}',
        b"[" * 100_000,
    ]
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"\n".join(piece for line in bad for piece in (good, line)))
    record = read_source(Source("s", str(path), "MIT"), folder)
    assert (record["read"], record["rows"], record["quarantined"]) == (16, 8, 8)
    faults = faults_of(folder, "s")
    assert [fault["line"] for fault in faults] == [2, 4, 6, 8, 10, 12, 14, 16]
    assert {fault["file"] for fault in faults} == {str(path)} and {fault["source"] for fault in faults} == {"s"}
    says = ["invalid JSON", "invalid UTF-8 at byte", "a list, not an object", "surrogate", "no output"]
    says += ["output is a number", "no output", "invalid JSON"]
    assert all(say in fault["error"] for say, fault in zip(says, faults, strict=True))
    assert faults[1]["raw"] == '{"instruction": "caf\\xe9", "output": "b"}'
    assert [fault["raw"] for fault in faults[2:]] == [line.decode() for line in bad[2:]]
    assert [row["position"] for row in rows_of(folder, record)] == list(range(0, 16, 2))


@pytest.mark.parametrize("window", [3, 64, 1 << 20])
def test_a_malformed_array_element_costs_no_other(window: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gristmill.curation.reading.formats._CHUNK", window)
    given = [json.dumps(record) for record in ALPACA]
    bad = ['{"instruction": "a" "output": "b"}', '{"instruction": "no end, "output": "b"}', "oops", "7"]
    bad += ['{"instruction": "a", "output": [{"x": 1}, {"x": }]}', '{"instruction": "\udce9", "output": "b"}']
    mixed = [piece for pair in zip(given, bad, strict=False) for piece in pair]
    path = tmp_path / "a.json"
    path.write_bytes(("[" + " ,\n".join([*mixed, given[6]]) + "]\n").encode("utf-8", "surrogateescape"))
    found = list(iter_rows(Source("s", str(path), "MIT")))
    assert [response_of(row) for row in found if not isinstance(row, Unreadable)] == [r["output"] for r in ALPACA]
    faults = [row for row in found if isinstance(row, Unreadable)]
    assert [fault.raw for fault in faults[:-1]] == bad[:-1]
    assert [fault.line for fault in faults] == [2, 4, 6, 8, 10, 12]
    assert "invalid UTF-8" in faults[-1].error and "\\xe9" in faults[-1].raw


@pytest.mark.parametrize(
    ("end", "error"), [("", "not closed"), ('{"instruction": "cut', "Unterminated"), ("] x", "after")]
)
def test_the_end_of_an_array(end: str, error: str, tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text("[" + "".join(json.dumps(record) + "," for record in ALPACA) + end)
    found = list(iter_rows(Source("s", str(path), "MIT")))
    faults = [row for row in found if isinstance(row, Unreadable)]
    assert len(found) - len(faults) == 7 and error in faults[0].error


def test_bad_csv_rows(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_bytes(b'instruction,output\na,"b\nb"\nonly one\nx,y,z\n\xff,b\n"a"b,c\nd,e\nf,"never closed\ng,h\n')
    found = list(iter_rows(Source("s", str(path), "MIT")))
    assert [response_of(row) for row in found if not isinstance(row, Unreadable)] == ["b\nb", "e"]
    faults = [row for row in found if isinstance(row, Unreadable)]
    assert [fault.line for fault in faults] == [4, 5, 6, 7, 9]
    assert [fault.raw for fault in faults] == ["only one", "x,y,z", "\\xff,b", '"a"b,c\n', 'f,"never closed\ng,h\n']


def test_invalid_utf8_inside_parquet(tmp_path: Path) -> None:
    broken = pa.Array.from_buffers(pa.string(), 2, pa.array([b"fine", b"caf\xe9"]).buffers())
    pq.write_table(pa.table({"instruction": ["a", "b"], "output": broken}), tmp_path / "a.parquet")
    good, bad = iter_rows(Source("s", str(tmp_path / "a.parquet"), "MIT"))
    assert not isinstance(good, Unreadable) and response_of(good) == "fine"
    assert isinstance(bad, Unreadable) and bad.line == 2 and "UTF-8" in bad.error and "xe9" in bad.raw


@pytest.mark.parametrize(
    ("name", "raw", "says"),
    [
        ("a.jsonl", b"", "a.jsonl is empty"),
        ("a.json", b"[]", "a.json is empty"),
        ("a.csv", b"instruction,output\n", "a.csv is empty"),
        ("a.parquet", b"", "a.parquet is damaged"),
        ("a.parquet", b"PAR1 no more", "a.parquet is damaged"),
        ("a.jsonl.gz", gzip.compress(lines(ALPACA * 99))[:-30], "damaged or not of its format, after"),
        ("a.jsonl.zst", b"no zstd at all", "damaged"),
        ("a.txt", b"hello", "unknown format. Known endings: .json"),
        ("a.jsonl", b'{"x": 1, "y": 2}', "Columns seen: x, y.\nShapes and their columns:\n"),
        (
            "a.jsonl",
            b'{"instruction": "a", "output": 1}',
            "all 1 records are unreadable, the first: output is a number",
        ),
        ("a.jsonl", b"oops\n" * 1500, "the first 1000 records"),
    ],
)
def test_what_stops_reading(name: str, raw: bytes, says: str, tmp_path: Path, folder: RunFolder) -> None:
    (tmp_path / name).write_bytes(raw)
    with pytest.raises(HouseError) as error:
        read_source(Source("s", str(tmp_path / name), "MIT"), folder)
    assert says in str(error.value)
    assert not (folder.rows / "s.json").exists()


def test_columns_that_are_not_there(tmp_path: Path, folder: RunFolder) -> None:
    with pytest.raises(HouseError, match="no such file"):
        read_source(Source("s", str(tmp_path / "none.jsonl"), "MIT"), folder)
    path = tmp_path / "a.jsonl"
    path.write_bytes(lines([{"ask": "a", "reply": "b", "output": "c"}]))
    with pytest.raises(HouseError, match=r"no column 'rply'.*nearest is 'reply'"):
        read_source(Source("s", str(path), "MIT", columns={"prompt": "ask", "completion": "rply"}), folder)
    with pytest.raises(HouseError, match="do not make the shape kto"):
        read_source(Source("s", str(path), "MIT", shape="kto"), folder)
    with pytest.raises(HouseError, match="unknown shape 'sharegtp'"):
        read_source(Source("s", str(path), "MIT", shape="sharegtp"), folder)
    record = read_source(Source("s", str(path), "MIT", columns={"prompt": "ask", "output": "reply"}), folder)
    row = rows_of(folder, record)[0]
    assert (prompt_of(row), response_of(row), json.loads(row["meta"])) == ("a", "b", {"output_unmapped": "c"})


def test_ids_do_not_depend_on_the_order_of_rows(tmp_path: Path) -> None:
    given = [{"key": n, **record} for n, record in enumerate(ALPACA + ALPACA[:3])]
    shuffled = random.Random(0).sample(given, len(given))

    def ids(records: list[dict[str, Any]], own: str | None) -> dict[str, str]:
        (tmp_path / "a.jsonl").write_bytes(lines(records))
        found = list(iter_rows(Source("s", str(tmp_path / "a.jsonl"), "MIT", id=own)))
        return {row["row_id"]: row["content_id"] for row in found if not isinstance(row, Unreadable)}

    assert len(ids(given, None)) == 10 and len(set(ids(given, None).values())) == 7
    assert ids(given, None) == ids(shuffled, None)
    assert ids(given, "key") == ids(shuffled, "key") != ids(given, None)


def test_own_ids_are_unique(tmp_path: Path) -> None:
    given = [{"key": key, **ALPACA[0]} for key in ("a", "b", "a", None, 1.5)]
    (tmp_path / "a.jsonl").write_bytes(lines(given))
    found = list(iter_rows(Source("s", str(tmp_path / "a.jsonl"), "MIT", id="key")))
    faults = [row for row in found if isinstance(row, Unreadable)]
    assert [(fault.line, fault.error[:24]) for fault in faults] == [
        (3, "the id 'a' was used befo"), (4, "no id in column key"), (5, "the id 1.5 is no text or"),
    ]  # fmt: skip


def test_parts_limit_progress_and_leftovers(tmp_path: Path, folder: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reading, "PART_ROWS", 40)
    monkeypatch.setattr(chunks, "LINE_BYTES", 300)
    given: list[dict[str, Any]] = [{"text": f"document {n}"} for n in range(100)]
    given[5] = {"text": 5}
    (tmp_path / "a.jsonl").write_bytes(lines(given))
    folder.rows.mkdir(parents=True)
    for name in ("s-00009.parquet", "s-x-00000.parquet"):
        (folder.rows / name).write_bytes(b"left behind")
    seen: list[int] = []
    record = read_source(Source("s", str(tmp_path / "a.jsonl"), "MIT", limit=95), folder, seen.append)
    assert (record["read"], record["rows"], record["quarantined"]) == (95, 94, 1)
    assert [pq.read_metadata(folder.rows / part).num_rows for part in record["parts"]] == [40, 40, 14]
    assert [row["text"] for row in rows_of(folder, record)] == [f"document {n}" for n in range(95) if n != 5]
    assert seen == sorted(seen) and seen[-1] == 94
    assert sorted(path.name for path in folder.rows.iterdir()) == sorted(
        [*record["parts"], "s-x-00000.parquet", "s.json"]
    )


def test_a_source_is_read_once_and_never_changes(tmp_path: Path, folder: RunFolder) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(lines(ALPACA))
    source = Source("s", str(path), "MIT")
    record = read_source(source, folder)
    part = folder.rows / record["parts"][0]
    before = part.stat().st_mtime_ns
    assert read_source(source, folder) == record and part.stat().st_mtime_ns == before
    with pytest.raises(HouseError, match="with limit None, now 3"):
        read_source(Source("s", str(path), "MIT", limit=3), folder)
    path.write_bytes(lines(ALPACA[:2]))
    with pytest.raises(HouseError, match=r"with digest.*another --out"):
        read_source(source, folder)


def test_equal_files_give_equal_bytes(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(lines(ALPACA))
    source = Source("s", str(tmp_path / "a.jsonl"), "MIT")
    both = [RunFolder(tmp_path / name) for name in ("one", "two")]
    records = [read_source(source, folder) for folder in both]
    assert records[0] == records[1]
    one, two = ((folder.rows / "s-00000.parquet").read_bytes() for folder in both)
    assert one == two


def test_source_names() -> None:
    for name in ("", "a/b", "../a", "a-00000", ".a"):
        with pytest.raises(HouseError, match="name"):
            Source(name, "x.jsonl", "MIT")


def test_real_files_in_their_published_forms(data: Path, folder: RunFolder) -> None:
    pairs = {"alpaca_5000.json": "alpaca_raw_random5000", "hh_rlhf_harmless_test.jsonl.gz": "hh_rlhf_harmless_test",
             "mbpp.jsonl": "mbpp974", "kto_en_demo.json": "lf_kto_en_demo300", "dpo_en_demo.json": "lf_dpo_en_demo300",
             "HumanEval.jsonl.gz": "humaneval164"}  # fmt: skip
    for original, parquet in pairs.items():
        ids = []
        for path in (data / "original" / original, data / f"{parquet}.parquet"):
            found = list(iter_rows(Source("s", str(path), "MIT", limit=400)))
            assert not [row for row in found if isinstance(row, Unreadable)]
            ids.append([row["content_id"] for row in found if not isinstance(row, Unreadable)])
        assert ids[0] == ids[1]


@pytest.mark.parametrize("name", ["gsm8k_train", "lingua_sentences", "mmlu", "docs_wikitext2"])
def test_line_separators_inside_real_strings(name: str, data: Path, folder: RunFolder, tmp_path: Path) -> None:
    given = [r for r in pq.read_table(data / f"{name}.parquet").to_pylist() if any(s in str(r) for s in "\u2028\x85")]
    given = given or pq.read_table(data / f"{name}.parquet").slice(0, 5).to_pylist()
    (tmp_path / "a.jsonl").write_bytes(lines(given))
    record = read_source(Source(name, str(tmp_path / "a.jsonl"), "MIT"), folder)
    assert (record["rows"], record["quarantined"]) == (len(given), 0)
