"""MinedTasks: what it finds stands in the text, and what it teaches is read by the maker that it teaches."""

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from gristmill.curation.folder import HouseError
from gristmill.curation.makers.mined_tasks import MINED, MinedTasks
from gristmill.curation.rows import ROW, content_id, table
from gristmill.curation.text_tasks import TASKS, read

GRAPH = """# Graphs in practice

Graphs are drawn wherever things meet, and this paragraph is here so that the section is long enough to be asked about.

A graph is a set of nodes and of edges between them. It is a simple thing.

Most people meet graphs first on the map of an underground railway.
"""
OTHERS = [
    f"# Title number {one}\n\nPlain words without any news, again and again, for the {one}th time." for one in range(4)
]
HEAP = "Title: Heaps\n\nThe heap is a tree whose root is its smallest item, and kept so by swaps of two neighbours."


class Corpus:
    """Documents that live, and none of an earlier set."""

    def __init__(self, texts: Sequence[str]) -> None:
        self.rows = [
            {"row_id": f"{i:032x}", "text": said, "source": "docs", "position": i} for i, said in enumerate(texts)
        ]
        for row in self.rows:
            row["content_id"] = content_id(row)
        self.facts: dict[str, Any] = {}

    def record(self, **facts: Any) -> None:
        self.facts |= facts

    def tables(self, columns: Sequence[str] | None = None) -> Iterator[pa.Table]:
        yield table(self.rows).select(list(columns or ROW.names))


def mined(texts: Sequence[str], maker: MinedTasks) -> dict[str, list[dict[str, Any]]]:
    """Rows by task."""
    found: dict[str, list[dict[str, Any]]] = {}
    for part in maker.make(Corpus(texts)):  # type: ignore[arg-type]
        for row in part.to_pylist():
            found.setdefault(json.loads(row["meta"])["task"], []).append(row)
    return found


def said(row: dict[str, Any]) -> tuple[str, str]:
    return row["messages"][-2]["content"], row["messages"][-1]["content"]


def test_definitions_titles_and_sentences_become_tasks() -> None:
    found = mined([GRAPH, HEAP, *OTHERS], MinedTasks(least=40))
    answers = {said(row)[1] for row in found["exqa"]}
    assert answers == {"a set of nodes and of edges between them", "a tree whose root is its smallest item"}
    assert {said(row)[1] for row in found["qg"]} == {"What is a graph?", "What is the heap?"}  # and not: What is It?
    ends = {said(row)[1] for row in found["sent_comp"]}
    assert "of edges between them." in ends and all(any(end in text for text in (GRAPH, HEAP, *OTHERS)) for end in ends)
    assert len(found["topic_class"]) == 6
    for row in found["topic_class"]:
        asked, answer = said(row)
        assert answer in asked.replace(GRAPH, "")
    assert any(said(row)[0] == "Write a paragraph about Graphs in practice." for row in found["text_gen"])
    (parent,) = found["text_gen"][0]["parents"]
    assert int(parent, 16) < 6


def test_a_no_is_said_of_what_another_document_defines() -> None:
    texts = [GRAPH.replace("A graph is", f"A thing{one} is").replace("edges", f"edges{one}") for one in range(20)]
    found = mined(texts, MinedTasks(rows={"ynqa": 50}, least=40))["ynqa"]
    right = Counter()
    for row in found:
        asked, answer = said(row)
        name = asked.partition("Is a thing")[2].partition(" ")[0]
        right[answer] += 1
        assert (f"edges{name} between them?" in asked) == (answer == "Yes")
    assert right.total() == 20 and min(right.values()) >= 3


def test_what_it_teaches_to_write_is_read_back(data: Path) -> None:
    texts = pq.read_table(data / "docs_18f_guides.parquet")["text"].to_pylist()[:60]
    plain, asks = (mined(texts, MinedTasks(rows=5, asks=asks, window=900)) for asks in (False, True))
    assert plain.keys() == asks.keys() == set(MINED)
    for short, rows in asks.items():
        for row, other in zip(rows, plain[short], strict=True):
            assert [turn["role"] for turn in row["messages"]] == ["system", "user", "assistant"]
            values = read(TASKS[short], said(row)[1], finished=True)
            assert isinstance(values, dict) and values[TASKS[short].response] == said(other)[1]
            assert row["parents"] == other["parents"]
    assert mined(texts, MinedTasks(rows=5, asks=True, window=900)) == asks
    assert mined(texts, MinedTasks(rows=5, asks=True, window=900, seed=1)) != asks


def test_what_cannot_be_mined_is_said() -> None:
    with pytest.raises(HouseError, match="nli cannot be mined; there are exqa"):
        MinedTasks(rows={"nli": 3})
    corpus = Corpus(["short"])
    assert list(MinedTasks().make(corpus)) == []  # type: ignore[arg-type]
    assert corpus.facts["mined"] == {"titles": 0, "definitions": 0}
