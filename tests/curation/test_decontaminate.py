"""Decontamination against small planted sets, a naive oracle, and the real evaluation sets."""

import json
import os
import random
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from gristmill.curation.folder import HouseError
from gristmill.curation.judges.decontaminate import Decontaminate
from gristmill.curation.reading.source import Source, Unreadable, iter_rows
from gristmill.curation.rows import ROW, message, table
from gristmill.curation.steps import VERDICT, CorpusJudge
from gristmill.curation.text import overlap
from gristmill.curation.text.benchmark_sets import KNOWN, EvaluationSet, resolved
from gristmill.curation.text.overlap import passages, read_index
from gristmill.curation.text.spans import string_spans
from gristmill.curation.text.view import words

Make = Callable[..., dict[str, Any]]

QUESTION = (
    "Janet's ducks lay 16 eggs per day. She eats three for breakfast every morning and bakes muffins "
    "for her friends every day with four. How much does she make at the farmers' market?"
)
ANSWER = "Janet sells 16 - 3 - 4 = 9 duck eggs a day. She makes 9 * 2 = 18 dollars every day at the market."


KEPT = tempfile.TemporaryDirectory()


@dataclass
class Given:
    """A corpus of rows that lie in memory."""

    parts: list[pa.Table]
    seed: int = 0
    kept: Path = field(default_factory=lambda: Path(tempfile.mkdtemp(dir=KEPT.name)))
    tools: Any = None
    readable: tuple[str, ...] = tuple(ROW.names)
    seen: list[tuple[int, int]] = field(default_factory=list)

    @property
    def rows(self) -> int:
        return sum(part.num_rows for part in self.parts)

    def progress(self, done: int, total: int) -> None:
        self.seen.append((done, total))

    def tables(self, columns: Sequence[str] | None = None) -> Iterator[pa.Table]:
        assert set(columns or ROW.names) <= set(self.readable)
        return (part if columns is None else part.select(columns) for part in self.parts)

    values = held_out = tables  # not asked for


def judged(judge: Decontaminate, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    found = judge.judge(Given([table(rows)]))  # type: ignore[arg-type]
    assert found.schema == VERDICT and found.num_rows == len(rows)
    rows_found = found.to_pylist()
    for row in rows_found:
        row["evidence"] = row["evidence"] and json.loads(row["evidence"])
    return list(rows_found)


@pytest.fixture
def evaluation(tmp_path: Path) -> Callable[..., str]:
    def write(*records: dict[str, Any], name: str = "ducks.jsonl") -> str:
        (tmp_path / name).write_text("\n".join(json.dumps(record) for record in records))
        return str(tmp_path / name)

    return write


Write = Callable[..., str]


def test_it_is_a_corpus_judge_and_takes_nothing(evaluation: Write) -> None:
    judge = Decontaminate((evaluation({"question": QUESTION, "answer": ANSWER}),))
    assert isinstance(judge, CorpusJudge) and judge.needs == () and judge.limits() == (None, 0.5)
    assert judge.judge(Given([])).num_rows == 0  # type: ignore[arg-type]
    assert judge.judge(Given([ROW.empty_table()])).num_rows == 0  # type: ignore[arg-type]


def test_planted_items_are_found_and_shown(evaluation: Write, make_row: Make) -> None:
    path = evaluation(
        {"question": "What else is there to ask about?", "answer": "9"}, {"question": QUESTION, "answer": ANSWER}
    )
    loud = QUESTION.upper().replace(" ", " - ").replace(".", "!?")
    quoted = f"Please solve:\n\n{QUESTION}\n\nThank you."
    rows = [
        make_row("s", 0, QUESTION, "18"),
        make_row("s", 1, loud, "18"),
        make_row("s", 2, "Quote the famous puzzle.", quoted),
        make_row("s", 3, "Tell me of ducks.", "Ducks lay eggs every day."),
        make_row("s", 4, "Tell me.", ANSWER),
    ]
    found = judged(Decontaminate((path,)), rows)
    assert [row["keep"] for row in found] == [False, False, False, True, False]
    assert [row["reason"] for row in found] == ["contaminated"] * 3 + [None, "contaminated_ngram13"]
    assert [row["score"] for row in found] == [1, 1, 1, None, None]
    said = words(QUESTION)
    for row, matched in zip(found[:3], (QUESTION[:-1], loud, QUESTION[:-1]), strict=True):
        assert row["evidence"] | {"matched": ""} == {
            "set": "ducks", "item": 1, "rule": "coverage", "threshold": 0.5, "coverage": 1.0, "words": len(said),
            "matched": "",
        }  # fmt: skip
        assert row["evidence"]["matched"] == matched.rstrip("!?")
    assert found[3]["evidence"] is None
    proof = found[4]["evidence"]
    assert (proof["rule"], proof["threshold"], proof["matched"]) == ("ngram13", 13, ANSWER[:-1])
    assert proof["coverage"] == 0.5  # of prompt and answer the one


def test_every_planted_item_is_found(evaluation: Write, make_row: Make) -> None:
    """Verbatim, re-punctuated, re-cased, shorter than the n-gram, in prompt or answer: recall 1.0, and no other row."""
    draw = random.Random(7)
    items = [[f"a{draw.randint(0, 10**6)}" for _ in range(1 + n % 30)] for n in range(300)]
    path = evaluation(*({"prompt": " ".join(item)} for item in items))
    rows, planted = [], []
    for n in range(900):
        item = items[n % 300]
        text = {
            0: " ".join(item),
            1: draw.choice([", ", "—", "\n - ", "... "]).join(item) + "?!",
            2: " ".join(draw.choice([word.upper(), word.title()]) for word in item),
        }[n // 300]
        around = [" ".join(f"b{draw.randint(0, 10**6)}" for _ in range(draw.randint(0, 20))) for _ in range(2)]
        whole = text if len(item) < 4 else f"{around[0]} {text}\n{around[1]}"
        rows.append(make_row("s", n, whole, "so") if draw.random() < 0.5 else make_row("s", n, "what", whole))
        planted.append(n % 300)
    rows += [make_row("s", n, f"b{n} b{n + 1} b{n + 2}", "a" * n) for n in range(900, 1000)]
    found = judged(Decontaminate((path,)), rows)
    assert [row["evidence"] and row["evidence"]["item"] for row in found] == [*planted, *[None] * 100]
    assert {row["score"] for row in found[:900]} == {1.0}


def test_half_copied_items_by_threshold(evaluation: Write, make_row: Make) -> None:
    said = [f"word{n}" for n in range(20)]
    path = evaluation({"prompt": " ".join(said)})
    rows = [make_row("s", n, " ".join(["new", *said[:n], "end"]), "so it is") for n in range(21)]
    shares = [n / 20 if n >= 8 else 0 for n in range(21)]
    for coverage in (0.0, 0.5, 0.55, 0.9):
        found = judged(Decontaminate((path,), coverage=coverage, overlap=0), rows)
        assert [row["score"] or 0 for row in found] == pytest.approx(shares)
        assert [row["keep"] for row in found] == [share <= coverage for share in shares]
    found = judged(Decontaminate((path,), coverage=1.0), rows)
    assert [row["keep"] for row in found] == [n < 13 for n in range(21)]
    assert {row["evidence"]["rule"] for row in found if row["evidence"]} == {"ngram13"}
    scattered = make_row("s", 0, " x ".join(" ".join(said[n : n + 8]) for n in (0, 6, 12)), "so it is")
    (found_one,) = judged(Decontaminate((path,)), [scattered])  # three runs of 8, overlapping in the item
    assert found_one["score"] == 1.0 and found_one["evidence"]["words"] == 8


def test_items_shorter_than_an_ngram(evaluation: Write, make_row: Make) -> None:
    path = evaluation({"prompt": "Name the largest moon"}, {"prompt": "Say yes now"}, {"prompt": " … "})
    rows = [
        make_row("s", 0, "Name the LARGEST moon!", "Ganymede"),
        make_row("s", 1, "Name the second largest moon", "Titan"),
        make_row("s", 2, "SAY: yes, now!", "yes"),
        make_row("s", 3, "Please say yes now", "yes"),
        make_row("s", 4, "Say", "yes now"),
    ]
    with pytest.warns(UserWarning, match="set ducks: 1 of 3 items say nothing"):
        found = judged(Decontaminate((path,)), rows)
    assert [row["keep"] for row in found] == [False, True, False, True, True]
    assert found[0]["evidence"]["matched"] == "Name the LARGEST moon" and found[0]["evidence"]["words"] == 4


def test_every_part_of_a_row_is_looked_at(evaluation: Write, make_row: Make) -> None:
    judge = Decontaminate((evaluation({"question": QUESTION, "answer": "18"}),))
    asked, said = [message("user", "Which?")], [message("assistant", QUESTION)]
    pair = make_row("s", 0, "x", None, messages=asked, chosen=[message("assistant", "none")], rejected=said)
    document = make_row("s", 1, "x", None, messages=None, text=f"It is known. {QUESTION}")
    empty = make_row("s", 2, "x", None, messages=None)
    assert [row["keep"] for row in judged(judge, [pair, document, empty])] == [False, False, True]


def test_fields_of_an_item(evaluation: Write) -> None:
    def of(record: dict[str, Any]) -> list[tuple[int, int]]:
        return looked_for(EvaluationSet(evaluation(record)))

    twelve, thirteen = " ".join("abcdefghijkl"), " ".join("abcdefghijklm")
    assert of({"question": twelve, "answer": twelve}) == [(0, 12)]
    assert of({"question": "a b c", "answer": thirteen}) == [(0, 3), (1, 13)]
    assert of({"question": twelve, "A": "x", "B": "y", "answer": "A"}) == [(0, 16)]
    assert of({"question": thirteen, "A": "x", "B": "y", "answer": "A"}) == [(0, 17), (0, 13)]
    assert of({"text": thirteen}) == [(0, 13)]


def looked_for(one: EvaluationSet) -> list[tuple[int, int]]:
    table = read_index((one,), 8).table
    return list(zip(table.kind.tolist(), table.length.tolist(), strict=True))


def naive(item: list[str], row: list[str], n: int) -> tuple[float, int]:
    """Covered share of the item, and words of the longest run common to both."""
    size = min(n, len(item))
    have = {tuple(row[i : i + size]) for i in range(len(row) - size + 1)}
    covered = np.zeros(len(item), bool)
    for i in range(len(item) - size + 1):
        if tuple(item[i : i + size]) in have:
            covered[i : i + size] = True
    longest = 0
    for i in range(len(item)):
        for j in range(len(row)):
            k = 0
            while i + k < len(item) and j + k < len(row) and item[i + k] == row[j + k]:
                k += 1
            longest = max(longest, k)
    return float(covered.mean()), longest


@pytest.mark.parametrize("colliding", [False, True], ids=["hashed", "all-hashes-collide"])
def test_against_a_naive_oracle(
    colliding: bool, evaluation: Write, make_row: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    if colliding:
        monkeypatch.setattr(overlap, "word_factors", lambda n: np.zeros(n, np.uint64))
    monkeypatch.setattr(overlap, "BLOCK", 1 << 8)
    draw = random.Random(1)
    letters = "abc"
    items = [[draw.choice(letters) for _ in range(draw.randint(2, 16))] for _ in range(12)]
    path = evaluation(*({"prompt": " ".join(item)} for item in items))
    texts = [[draw.choice(letters + "z") for _ in range(draw.randint(1, 40))] for _ in range(60)] + [
        items[0],
        items[-1],
    ]
    rows = [make_row("s", n, " ".join(text), None) for n, text in enumerate(texts)]
    found = judged(Decontaminate((path,), n=5, coverage=0.6, overlap=7), rows)
    kept = 0
    for text, row in zip(texts, found, strict=True):
        truth = {number: naive(item, text, 5) for number, item in enumerate(items) if len(item) >= 4 or item == text}
        most = max(share for share, _ in truth.values())
        bad = {number for number, (share, run) in truth.items() if share > 0.6 or run >= 7}
        assert row["keep"] == (not bad)
        kept += row["keep"]
        assert (row["score"] or 0) == pytest.approx(0 if row["reason"] == "contaminated_ngram7" else most)
        if bad:
            share, run = truth[row["evidence"]["item"]]
            assert row["evidence"]["coverage"] == pytest.approx(share, abs=1e-4)
            assert row["evidence"]["words"] == run and f" {row['evidence']['matched']} " in f" {' '.join(text)} "
            by_share = row["reason"] == "contaminated"
            assert by_share == (most > 0.6) and row["evidence"]["rule"] == ("coverage" if by_share else "ngram7")
            assert share == most if by_share else run == max(found_run for _, found_run in truth.values())
    assert 5 < kept < 57


def test_parts_do_not_matter(evaluation: Write, make_row: Make) -> None:
    judge = Decontaminate((evaluation({"question": QUESTION, "answer": ANSWER}),))
    rows = [make_row("s", n, QUESTION[n:], ANSWER[: 5 * n]) for n in range(20)]
    whole = Given([table(rows)])
    parts = Given([table(rows[:3]), ROW.empty_table(), table(rows[3:])])
    assert judge.judge(whole).equals(judge.judge(parts))  # type: ignore[arg-type]
    assert parts.seen[-1] == (20, 20)


def test_passages_are_the_words_as_written() -> None:
    texts = pa.array(["One, TWO — three.", "ﬁne İstanbul x", "日本語 text", "…"], pa.large_string())
    first, count = np.array([1, 1, 1, 0]), np.array([2, 2, 3, 1])
    assert passages(texts, first, count) == ["TWO — three", "İstanbul", "本語 text", ""]


def test_what_is_refused(evaluation: Write, tmp_path: Path) -> None:
    good = evaluation({"question": QUESTION, "answer": ANSWER})
    (tmp_path / "half.jsonl").write_text(Path(good).read_text() + '\n{"question": \n')
    with pytest.raises(HouseError, match=r"half\.jsonl: line 2 .* invalid JSON"):
        Decontaminate((good, str(tmp_path / "half.jsonl"))).judge(Given([]))  # type: ignore[arg-type]
    with pytest.raises(HouseError, match="no such file"):
        Decontaminate((str(tmp_path / "none.jsonl"),)).judge(Given([]))  # type: ignore[arg-type]
    for bad in ({"n": 3}, {"overlap": 7}, {"coverage": 1.5}):
        with pytest.raises(HouseError, match="Decontaminate"):
            Decontaminate((good,), **bad)


SCRIPT = """
import sys
import tempfile
from gristmill.curation.text.benchmark_sets import EvaluationSet
from gristmill.curation.text.overlap import read_index
print(read_index((EvaluationSet(sys.argv[1]),), 8).table.hashes.tolist())
"""


def test_equal_in_every_process(evaluation: Write) -> None:
    path = evaluation({"question": QUESTION, "answer": ANSWER})
    said = [
        subprocess.run(
            [sys.executable, "-c", SCRIPT, path], env=os.environ | {"PYTHONHASHSEED": seed},
            capture_output=True, text=True, check=True,
        ).stdout
        for seed in ("1", "2")
    ]  # fmt: skip
    assert said[0] == said[1] != ""


def test_other_thresholds_without_reading_text(evaluation: Write, make_row: Make, tmp_path: Path) -> None:
    draw = random.Random(3)
    said = [[f"w{draw.randint(0, 40)}" for _ in range(30)] for _ in range(8)]
    path = evaluation(*({"question": " ".join(item[:15]), "answer": " ".join(item[15:]), "id": n}
                        for n, item in enumerate(said)))  # fmt: skip
    rows = []
    for n in range(120):
        item, start = draw.choice(said), draw.randint(0, 20)
        words_of = (
            item[start : start + draw.randint(0, 20)] if n % 2 else [f"w{draw.randint(0, 40)}" for _ in range(20)]
        )
        rows.append(make_row(f"s{n % 3}", n, " ".join(words_of), "yes"))
    whole = Given([table(rows[:50]), table(rows[50:])])
    came = np.array([draw.random() < 0.7 for _ in rows])
    left = Given([table([row for row, here in zip(rows, came, strict=True) if here])])
    changes = [{}, {"coverage": 0.2}, {"coverage": 1.0}, {"overlap": 0}, {"overlap": 9, "coverage": 0.9}]
    first = Decontaminate((path,))
    first.judge(whole)  # type: ignore[arg-type]
    outcomes = set()
    for change in changes:
        judge = Decontaminate((path,), **change)  # type: ignore[arg-type]
        for corpus, mask in ((whole, np.ones(120, np.bool_)), (left, came)):
            unread = Given(corpus.parts, readable=("source",))
            again = judge.rejudge(unread, whole.kept, mask)  # type: ignore[arg-type]
            fresh = judge.judge(Given(corpus.parts))  # type: ignore[arg-type]
            assert again is not None and again.equals(fresh)
            outcomes.add(again["keep"].to_pylist().count(False))
    assert len(outcomes) > 5
    for other in (Decontaminate((path,), n=7), Decontaminate((path,), view="prompt"), Decontaminate((path, path)),
                  Decontaminate((path,), level="source")):  # fmt: skip
        assert other.rejudge(whole, whole.kept, np.ones(120, np.bool_)) is None  # type: ignore[arg-type]
    assert first.rejudge(whole, tmp_path / "none", np.ones(120, np.bool_)) is None  # type: ignore[arg-type]
    Path(path).write_text('{"question": "another set now", "answer": "yes"}')
    assert first.rejudge(whole, whole.kept, np.ones(120, np.bool_)) is None  # type: ignore[arg-type]


def test_whole_sources_go(evaluation: Write, make_row: Make) -> None:
    said = [" ".join(f"w{n}x{k}" for k in range(10)) for n in range(100)]
    path = evaluation(*({"prompt": item} for item in said))
    rows = [make_row("clean", n, f"a question of its own {n}", "yes") for n in range(5)]
    rows += [make_row("two", n, said[n], "yes") for n in (3, 3, 3, 4)] + [make_row("two", 9, "other", "yes")]
    rows += [make_row("three", n, said[n], "yes") for n in (4, 5, 6)] + [make_row("three", 9, "another", "yes")]
    judge = Decontaminate((path,), level="source")
    corpus = Given([table(rows[:7]), table(rows[7:])])
    found = judge.judge(corpus)  # type: ignore[arg-type]
    reasons = found["reason"].to_pylist()
    assert reasons == [None] * 5 + ["contaminated"] * 4 + [None] + ["contaminated"] * 3 + ["contaminated_source"]
    assert json.loads(found["evidence"][13].as_py()) == {
        "set": "ducks", "items": 3, "of_items": 100, "share": 0.03, "threshold": 0.02, "rule": "source",
    }  # fmt: skip
    strict = Decontaminate((path,), level="source", source_share=0.019, coverage=0.9)
    again = strict.rejudge(Given(corpus.parts, readable=("source",)), corpus.kept, np.ones(14, np.bool_))  # type: ignore[arg-type]
    assert again is not None and again.equals(strict.judge(Given(corpus.parts)))  # type: ignore[arg-type]
    assert again["reason"].to_pylist().count("contaminated_source") == 2
    assert strict.rejudge(Given(corpus.parts), corpus.kept, np.arange(15) > 0) is None  # type: ignore[arg-type]
    idiom = make_row("four", 0, " ".join(f"z{k}" for k in range(13)), "yes")
    long = evaluation(*({"prompt": idiom["messages"][0]["content"] + f" y{n}" * 20} for n in range(10)), name="l.jsonl")
    for coverage, reason in ((0.5, None), (1.0, "contaminated_source")):  # idioms alone cost no source
        judge = Decontaminate((long,), level="source", coverage=coverage)
        other = judge.judge(Given([table([idiom, make_row("four", 1, "other", "yes")])]))  # type: ignore[arg-type]
        assert other["reason"].to_pylist() == ["contaminated_ngram13", reason]
    rows_alone = Decontaminate((path,)).rejudge(Given(corpus.parts, readable=()), corpus.kept, np.ones(14, np.bool_))  # type: ignore[arg-type]
    assert rows_alone is not None and rows_alone.equals(Decontaminate((path,)).judge(Given(corpus.parts)))  # type: ignore[arg-type]


def test_sides_of_the_training_rows(evaluation: Write, make_row: Make) -> None:
    path = evaluation({"question": QUESTION, "answer": ANSWER})
    rows = [make_row("s", 0, QUESTION, "none"), make_row("s", 1, "none", QUESTION)]
    assert [row["keep"] for row in judged(Decontaminate((path,), view="prompt"), rows)] == [False, True]
    assert [row["keep"] for row in judged(Decontaminate((path,), view="response"), rows)] == [True, False]


def test_columns_and_usual_sets(evaluation: Write, make_row: Make) -> None:
    turns = [QUESTION, "Now write it as a poem of four lines in the manner of your favourite author, without rhymes."]
    path = evaluation({"ask": turns, "pick": {"text": ["one duck", "two ducks"], "label": ["A", "B"]}, "told": ANSWER,
                       "question_id": 81}, name="bench.jsonl")  # fmt: skip
    one = EvaluationSet(path, "bench", ("prompt|ask",), ("pick",), ("told",))
    sizes = [len(words(text)) for text in turns]
    whole = sum(sizes) + 6  # the options and their labels
    assert looked_for(one)[0][0] == 0 and whole - looked_for(one)[0][1] in (0, 2)
    assert looked_for(one)[1:] == [(0, sum(sizes)), *((0, size) for size in sizes), (1, len(words(ANSWER)))]
    rows = [make_row("s", 0, turns[1], "yes"), make_row("s", 1, "two ducks", "yes")]
    found = judged(Decontaminate((one,)), rows)
    assert [row["keep"] for row in found] == [False, True]
    assert found[0]["evidence"]["id"] == "81" and found[0]["evidence"]["set"] == "bench"
    with pytest.raises(HouseError, match=r"no column 'asked' in .*bench\.jsonl; it has ask, pick, told"):
        looked_for(EvaluationSet(path, "bench", ("asked",)))
    listed = evaluation({"turns": json.dumps(turns), "category": "x"}, name="mt.jsonl")
    (found_one,) = judged(Decontaminate(sets={"mt_bench": listed}), [make_row("s", 0, turns[1], "yes")])
    assert not found_one["keep"] and found_one["evidence"]["set"] == "mt_bench"
    assert len(KNOWN) >= 30 and all(known.prompt and known.hub and known.split for known in KNOWN.values())
    for bad in ({"path": ""}, {"path": "a", "answer": ("b",)}):
        with pytest.raises(HouseError, match="evaluation set"):
            EvaluationSet(**bad)  # type: ignore[arg-type]
    twice = [one.title for one in resolved((path, path), {})]
    assert twice == ["bench", "bench-2"]


def test_nothing_named_is_said() -> None:
    with pytest.warns(UserWarning, match="no evaluation set is named"):
        assert Decontaminate().judge(Given([])).num_rows == 0  # type: ignore[arg-type]


LETTERS = "aZ09_ .,-\u00e9\u0301\u00df\u0130\ufb01\u2460\u4e2d\u65e5\u30ac\u0e01\u3316\U0001f600\u0915\u093e\u00b2"


def test_passages_count_words_as_the_index_does() -> None:
    draw = random.Random(0)
    texts = ["".join(draw.choice(LETTERS) for _ in range(draw.randint(1, 40))) for _ in range(2000)]
    _, counts = overlap._words(string_spans(pa.array(texts)), 1)
    for text, count in zip(texts, counts.tolist(), strict=True):
        if not count:
            continue
        column = pa.array([text] * count, pa.large_string())
        each = passages(column, np.arange(count), np.ones(count, np.int64))
        hashes, sizes = overlap._words(string_spans(pa.array([*each, text])), 1)
        if "\u3316" not in text:  # one letter that folds into several words
            assert sizes[:-1].tolist() == [1] * count and hashes[:count].tolist() == hashes[count:].tolist()
        assert passages(column[:1], np.array([0]), np.array([count]))[0] in text


def real(data: Path, name: str, limit: int | None = None) -> list[dict[str, Any]]:
    found = list(iter_rows(Source(name, str(data / f"{name}.parquet"), "", limit=limit)))
    return [row for row in found if not isinstance(row, Unreadable)]


def test_real_train_set_against_its_test_set(data: Path) -> None:
    judge = Decontaminate((str(data / "gsm8k_test.parquet"),))
    found = judged(judge, real(data, "gsm8k_train"))
    twins = [row for row in found if row["evidence"] and row["evidence"]["rule"] == "coverage"]
    assert len(twins) == 3  # the template twins that the data's README names
    assert sum(not row["keep"] for row in found) < 20
    assert all(not row["keep"] for row in judged(judge, real(data, "gsm8k_model_solutions", 200)))  # the test questions


def test_real_sets_find_themselves_and_spare_others(data: Path) -> None:
    names = ("humaneval164", "mbpp974", "ifeval541")
    judge = Decontaminate(tuple(str(data / f"{name}.parquet") for name in names))
    for name in names:
        rows = real(data, name, 100)
        assert all(not row["keep"] for row in judged(judge, rows))
    dolly = judged(judge, real(data, "dolly_sample2000"))
    assert 0 < sum(not row["keep"] for row in dolly) < 10
    war = next(row for row in dolly if row["evidence"] and row["evidence"]["set"] == "ifeval541")
    assert "World War II or the Second World War" in war["evidence"]["matched"]
    assert pq.read_metadata(data / "dolly_sample2000.parquet").num_rows == len(dolly)


def test_real_subset_is_found_whole(data: Path) -> None:
    judge = Decontaminate(sets={"math": str(data / "math_test5000.parquet")})
    assert all(not row["keep"] for row in judged(judge, real(data, "math500")))
    back = judged(Decontaminate(sets={"math500": str(data / "math500.parquet")}), real(data, "math_test5000"))
    covered = {row["evidence"]["item"] for row in back if row["reason"] == "contaminated" and row["score"] == 1}
    assert len(covered) >= 495  # a few problems stand twice in one of the sets


def test_real_rows_against_plain_python(data: Path) -> None:
    """Coverage of every item by n-grams in dicts and sets: no row is hit beyond what they say."""
    names, n = ("mbpp974", "humaneval164"), 8
    index = read_index(tuple(EvaluationSet(str(data / f"{name}.parquet")) for name in names), n)
    places: dict[tuple[str, ...], set[tuple[int, int]]] = {}
    fields = [
        (number, one.kind, words(one.text))
        for number, item in enumerate(index.items)
        for one in item.fields
        if len(words(one.text)) >= one.least
    ]
    for number, (_, _, said) in enumerate(fields):
        size = min(n, len(said))
        for at in range(len(said) - size + 1):
            places.setdefault(tuple(said[at : at + size]), set()).add((number, at))
    rows = [row for row in real(data, "codealpaca_2k", 2000)
            if all(turn["content"].isascii() for turn in row["messages"])]  # fmt: skip
    found = judged(Decontaminate(tuple(str(data / f"{name}.parquet") for name in names)), rows)
    some = 0
    for row, verdict in zip(rows, found, strict=True):
        said = [word for turn in row["messages"] for word in words(turn["content"])]
        covered: dict[int, set[int]] = {}
        for size in range(4, n + 1):
            for at in range(len(said) - size + 1):
                for number, there in places.get(tuple(said[at : at + size]), ()):
                    covered.setdefault(number, set()).update(range(there, there + size))
        shares: dict[int, dict[int, float]] = {}
        for number, at_words in covered.items():
            item, kind, text = fields[number]
            of = shares.setdefault(item, {})
            of[kind] = max(of.get(kind, 0.0), len(at_words) / len(text))
        both = {item for item, kind, _ in fields if kind == 1} & {item for item, kind, _ in fields if kind == 0}
        values = [max(of.get(0, 0.0), sum(of.values()) / (2 if item in both else 1)) for item, of in shares.items()]
        most = max(values, default=0.0)
        assert (verdict["reason"] == "contaminated") == (most > 0.5)
        if verdict["score"] is not None:
            some += 1
            assert verdict["score"] == pytest.approx(most)
    assert some > 20
