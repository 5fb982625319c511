"""What a causal model's log-probabilities say of rows: IFD, and GRAPE's choice among answers, against plain Python."""

import json
import math
import random
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pyarrow as pa
import pytest

from gristmill.curation.judges.grape import Grape
from gristmill.curation.measures.ifd import Ifd
from gristmill.curation.rows import ROW, table
from gristmill.curation.text.view import normal, prompt_of

Make = Callable[..., dict[str, Any]]
NAN = math.nan


class Scorer:
    """Knows the scores beforehand."""

    def __init__(self, **columns: list[Any]) -> None:
        kinds = {"tokens": pa.int32(), "nll": pa.float64(), "alone_nll": pa.float64()}
        self.scores = pa.table({name: pa.array(column, kinds[name]) for name, column in columns.items()})

    def scorer(self, model: str) -> Any:
        assert model == "small"
        return self

    def response_scores(self, rows: pa.Table, progress: Any = None, *, alone: bool = False) -> pa.Table:
        assert alone
        return self.scores


def test_ifd_is_the_ratio_of_the_losses_and_of_the_perplexities() -> None:
    tools: Any = Scorer(tokens=[2, 4, None, 3, 1], nll=[3.0, 8.0, None, 1.0, 2e3], alone_nll=[6.0, 4.0, None, 0.0, 1.0])
    found = Ifd("small").measure(ROW.empty_table(), tools, lambda done, total: None)
    assert {field.name: field.type for field in found.schema} == Ifd.columns
    assert found["ifd"].to_pylist() == [0.5, 2.0, None, None, 2000.0]
    assert found["ifd_ppl"].to_pylist() == [math.exp(1.5 - 3), math.exp(2 - 1), None, math.exp(1 / 3), None]
    assert found["loss_conditioned"].to_pylist() == [1.5, 2.0, None, 1 / 3, 2000.0]
    assert found["loss_alone"].to_pylist() == [3.0, 1.0, None, 0.0, 1.0]
    assert found["tokens"].to_pylist() == [2, 4, None, 3, 1]


class Rows:
    """A corpus with known log-probabilities, in parts."""

    def __init__(self, rows: Sequence[dict[str, Any]], scores: Sequence[tuple[float | None, int | None]], part: int):
        self.table, self.rows, self.part = table(rows), len(rows), part
        nll, tokens = zip(*scores, strict=True)
        ratio = [None if n is None or not t else math.exp(n / t) for n, t in scores]
        self.measured = pa.table({"nll": pa.array(nll, pa.float64()), "tokens": pa.array(tokens, pa.int32()),
                                  "perplexity": pa.array(ratio, pa.float64())})  # fmt: skip

    def progress(self, done: int, total: int) -> None:
        assert done <= total

    def tables(self, columns: Sequence[str]) -> Iterator[pa.Table]:
        for start in range(0, self.rows, self.part):
            yield self.table.select(list(columns)).slice(start, self.part)

    def values(self, columns: Sequence[str]) -> pa.Table:
        return self.measured.select(list(columns))


def judged(judge: Grape, rows: Sequence[dict[str, Any]], scores: Sequence[Any], part: int = 100) -> list[Any]:
    found = judge.judge(Rows(rows, scores, part)).to_pylist()  # type: ignore[arg-type]
    return [row | {"evidence": json.loads(row["evidence"]) if row["evidence"] else None} for row in found]


def best_by_definition(rows: Sequence[dict[str, Any]], scores: Sequence[Any]) -> set[str]:
    """Of each normalised prompt the row of the highest log-probability per token, ties by id."""
    groups: dict[str, list[tuple[float, str]]] = {}
    for row, (nll, tokens) in zip(rows, scores, strict=True):
        if nll is not None and math.isfinite(nll) and tokens:
            groups.setdefault(normal(prompt_of(row)) or row["row_id"], []).append((nll / tokens, row["row_id"]))
    return {min(group)[1] for group in groups.values()}


@pytest.mark.parametrize("seed", range(4))
def test_grape_keeps_the_argmax_of_every_prompt_in_any_order(make_row: Make, seed: int) -> None:
    draw = random.Random(seed)
    prompts = ["What?", "what?", " WHAT?\n", "Größe", "GRÖSSE", "名前は", "", "other"]
    rows = [make_row("a", i, draw.choice(prompts), f"answer {i}") for i in range(120)]
    scores = [(draw.choice([None, NAN, 2.0, 4.0, 6.0, 6.5]), draw.choice([1, 2, 2, 3])) for _ in rows]
    found = judged(Grape("m"), rows, scores)
    assert {row["row_id"] for row, verdict in zip(rows, found, strict=True) if verdict["keep"]} == best_by_definition(
        rows, scores
    )
    order = draw.sample(range(len(rows)), len(rows))
    again = judged(Grape("m"), [rows[i] for i in order], [scores[i] for i in order], part=7)
    assert repr(again) == repr([found[i] for i in order])


def test_grape_shows_who_won_and_by_what(make_row: Make) -> None:
    rows = [make_row("a", i, "q", f"answer {i}") for i in range(4)] + [make_row("a", 9, "lone", "x")]
    names = [row["row_id"] for row in rows]
    found = judged(Grape("m"), rows, [(6.0, 2), (4.0, 2), (NAN, 3), (9.0, 3), (50.0, 1)])
    assert [row["reason"] for row in found] == ["not_best_fit", None, "not_scorable", "not_best_fit", None]
    tied = sorted([(names[0], 0), (names[3], 3)])  # both 3 nats a token
    for rank, (_, at) in enumerate(tied, start=2):
        assert found[at]["evidence"].items() >= {"best": names[1], "rank": rank, "answers": 3, "logprob": -3.0}.items()
    assert found[1]["evidence"]["rank"] == 1 and found[1]["evidence"]["group"] == found[0]["evidence"]["group"]
    assert found[2]["evidence"] is None and found[4]["evidence"] is None
    assert found[0]["score"] == pytest.approx(math.exp(3))


def test_grape_by_a_key_of_meta(make_row: Make) -> None:
    metas = ['{"task": 1}', '{"task": 1}', '{"task": "1"}', '{"other": 1}', None, "[1]"]
    rows = [make_row("a", i, "same", f"answer {i}", meta=meta) for i, meta in enumerate(metas)]
    found = judged(Grape("m", by="task"), rows, [(float(i + 1), 1) for i in range(6)])
    assert [row["keep"] for row in found] == [True, False, True, True, True, True]
