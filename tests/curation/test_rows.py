"""Ids of rows: what they depend on and what they do not; text views; whole files."""

import json
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gristmill.curation.folder import HouseError, sole, sweep, whole_file, whole_folder, write_json, write_parquet
from gristmill.curation.rows import ROW, content_id, counted_row_id, digest, made_row, message, table
from gristmill.curation.text.view import normal, pair_of, prompt_of, response_of, words

Make = Callable[..., dict[str, Any]]


@given(st.lists(st.text(), min_size=1, max_size=4), st.lists(st.text(), min_size=1, max_size=4))
def test_digests_are_equal_only_for_equal_pieces(a: list[str], b: list[str]) -> None:
    assert (digest(*a) == digest(*b)) == (a == b)


def test_content_id_ignores_nulls_and_names_and_sees_every_content_field(make_row: Make) -> None:
    row = make_row("a", 0, "q", "r")
    short = row | {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "r"}]}
    assert content_id(row) == content_id(short) == content_id(row | {"source": "b", "meta": "{}", "position": 9})
    changed = [{"label": True}, {"text": "t"}, {"tools": "[]"}, {"chosen": [message("assistant", "x")]}]
    assert len({content_id(row), *(content_id(row | change) for change in changed)}) == 5


VALUE = st.none() | st.text(max_size=8)
TURNS = st.none() | st.lists(
    st.fixed_dictionaries(
        {"role": VALUE, "content": VALUE},
        optional=dict.fromkeys(("name", "tool_calls", "tool_call_id", "reasoning_content"), VALUE),
    ),
    max_size=3,
)
SPANS = st.none() | st.lists(
    st.fixed_dictionaries({"field": st.just("chosen"), "turn": st.none() | st.integers(0, 3), "weight": st.just(0.5)}),
    max_size=2,
)
CONTENTS = st.fixed_dictionaries(
    {}, optional=dict.fromkeys(("messages", "chosen", "rejected"), TURNS)
    | {"label": st.none() | st.booleans(), "text": VALUE, "tools": VALUE, "spans": SPANS},
)  # fmt: skip


def bare(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: bare(item) for key, item in value.items() if item is not None}
    return [bare(item) for item in value] if isinstance(value, list) else value


@settings(deadline=None)
@given(CONTENTS)
def test_content_ids_are_those_of_canonical_json(row: dict[str, Any]) -> None:
    plain = json.dumps(bare(row), sort_keys=True, ensure_ascii=False, separators=(",", ":"))
    assert content_id(row) == digest(plain)


def test_row_ids_tell_occurrences_and_sources_apart() -> None:
    ids = {counted_row_id(source, content, n) for source in "ab" for content in "xy" for n in range(3)}
    assert len(ids) == 12 and all(len(row_id) == 32 for row_id in ids)


def test_made_rows_are_named_by_maker_parents_and_content() -> None:
    def make(**change: Any) -> dict[str, Any]:
        base: dict[str, Any] = {"maker": "M()", "parents": ["p"], "position": 0, "source": "m", "text": "t"}
        return made_row(**(base | change))

    assert make()["row_id"] == make(position=5)["row_id"]
    assert (
        len({make()["row_id"], *(make(**c)["row_id"] for c in ({"maker": "N()"}, {"parents": ["q"]}, {"text": "u"}))})
        == 4
    )
    assert table([make()]).schema == ROW


def test_views_of_each_shape(make_row: Make) -> None:
    row = make_row("a", 0, "q", "r")
    assert (prompt_of(row), response_of(row), pair_of(row)) == ("q", "r", "q\n\nr")
    turns = [message("user", "q1"), message("assistant", "r1"), message("user", "q2"), message("assistant", "r2")]
    assert (prompt_of(row | {"messages": turns}), response_of(row | {"messages": turns})) == ("q1\n\nr1\n\nq2", "r2")
    pair = row | {
        "messages": turns[:1],
        "chosen": [message("assistant", "good")],
        "rejected": [message("assistant", "bad")],
    }
    assert (prompt_of(pair), response_of(pair), pair_of(pair)) == ("q1", "good", "q1\n\ngood\n\nbad")
    raw = dict.fromkeys(ROW.names) | {"text": "document"}
    assert (prompt_of(raw), response_of(raw), pair_of(raw)) == ("", "document", "document")
    unanswered = make_row("a", 0, "q", None)
    assert (prompt_of(unanswered), response_of(unanswered)) == ("q", "")


def test_normal_form_and_words() -> None:
    assert normal("  Ｈello\u2028 WORLD\t!\n") == "hello world !"
    assert words("It's ﬁne, ÉCOLE 42") == ["it", "s", "fine", "école", "42"]


def test_a_file_or_folder_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), whole_file(tmp_path / "f") as part:
        part.write_text("half")
        raise KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt), whole_folder(tmp_path / "d") as part:
        (part / "x").write_text("half")
        raise KeyboardInterrupt
    assert list(tmp_path.iterdir()) == []
    write_json(tmp_path / "f", {"a": 1})
    with pytest.raises(ZeroDivisionError), whole_file(tmp_path / "f") as part:
        part.write_text(str(1 // 0))
    assert (tmp_path / "f").read_text() == '{\n  "a": 1\n}\n'


def test_what_a_killed_run_left_half_written_is_swept_and_nothing_else(tmp_path: Path) -> None:
    for name in (".a.json.x1.tmp", "ledger/sft/.03-Step.y2.tmp/step.json", "rows/a.parquet", "notes.tmp", ".hidden"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("x")
    sweep(tmp_path)
    left = sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file())
    assert left == [".hidden", "notes.tmp", "rows/a.parquet"]


def test_one_run_at_a_time(tmp_path: Path) -> None:
    def another() -> None:
        with sole(tmp_path / "out"):
            pass

    with sole(tmp_path / "out"), ThreadPoolExecutor(1) as elsewhere:
        another()  # of the same run
        with pytest.raises(HouseError, match="another run is writing in"):
            elsewhere.submit(another).result()
    another()


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(HouseError, match=r"cannot write in .*file.*another --out"):
        write_parquet(tmp_path / "file" / "x.parquet", pa.table({"a": [1]}))
