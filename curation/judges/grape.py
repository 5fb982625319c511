"""Of several answers to one instruction, the one that the model to be tuned would most likely give itself."""

import json
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from ..duplicates.survivors import json_column
from ..measures.perplexity import ResponsePerplexity
from ..rows import digest
from ..steps import VERDICT, Corpus, Measure
from ..text.view import VIEW_COLUMNS

NOT_SCORABLE, NOT_BEST = "not_scorable", "not_best_fit"


@dataclass(frozen=True)
class Grape:
    """Keeps of all answers to one instruction the one with the highest log-probability per token under `model`, the
    model that is to be tuned (GRAPE, arXiv 2502.04194).

    by: "prompt" groups rows whose prompts are equal after NFKC, case folding and white space; any other word is the key
    of the rows' `meta` whose value names the instruction. A row without prompt or key is a group of its own. Only
    response tokens count, the end of the turn included, never the prompt's; ties go to the smallest row_id. Exactly one
    scored row of each group stays, so an instruction with one answer keeps it.

    Reasons: not_best_fit, and not_scorable where there is no finite log-probability. Evidence of every row whose group
    has several scored answers: {best (row_id), group (digest of what was grouped by), rank from 1, answers, logprob
    (nats per token)}. Memory: some 120 bytes a row.
    """

    model: str
    by: str = "prompt"

    scope: ClassVar[Literal["corpus"]] = "corpus"
    score: ClassVar[str | None] = "perplexity"

    @property
    def needs(self) -> tuple[Measure, ...]:
        return (ResponsePerplexity(self.model),)

    def limits(self) -> tuple[float | None, float | None]:
        return None, None  # the best of a group, whatever its perplexity

    def judge(self, corpus: Corpus) -> pa.Table:
        """Verdicts for all live rows, in the order of `corpus.tables()`."""
        ids: list[pa.Array] = []
        keys = [np.empty((0, 2), np.uint64)]
        for table in corpus.tables(["row_id", "meta", *VIEW_COLUMNS]):
            ids += table["row_id"].chunks
            keys += [_instructions(batch, self.by) for batch in table.to_batches()]
            corpus.progress(sum(map(len, keys)), corpus.rows)
        values = corpus.values(["nll", "tokens", "perplexity"])
        nll, tokens = (values[name].cast(pa.float64()).to_numpy() for name in ("nll", "tokens"))
        with np.errstate(divide="ignore", invalid="ignore"):
            logprob = -nll / tokens  # null has become NaN
        names = pa.chunked_array(ids, pa.string()).combine_chunks()
        return _best(names, np.concatenate(keys), logprob, values["perplexity"].cast(pa.float64()))


def _instructions(rows: pa.RecordBatch, by: str) -> npt.NDArray[np.uint64]:
    """(rows, 2) digest of what each row is grouped by; rows that name no instruction have one of their own."""
    if by == "prompt":
        from ..duplicates.normal_digests import normal_digests

        keys, empty, _ = normal_digests(rows, "prompt")
        named = ~empty
    else:
        said = [_named(meta, by) for meta in rows["meta"].to_pylist()]
        named = np.array([value is not None for value in said], np.bool_)
        keys = _numbers([digest("meta", value or "") for value in said])
    lone = np.flatnonzero(~named)
    keys[lone] = _numbers([digest("row", name) for name in rows["row_id"].take(pa.array(lone)).to_pylist()])
    return keys


def _named(meta: str | None, key: str) -> str | None:
    found: Any = json.loads(meta) if meta else None
    value = found.get(key) if isinstance(found, dict) else None
    return None if value is None else json.dumps(value, sort_keys=True)


def _numbers(digests: list[str]) -> npt.NDArray[np.uint64]:
    return np.frombuffer(bytearray.fromhex("".join(digests)), np.uint64).reshape(-1, 2)


def _best(
    ids: pa.Array, keys: npt.NDArray[np.uint64], logprob: npt.NDArray[np.float64], score: pa.ChunkedArray
) -> pa.Table:
    """Verdicts: of each group of equal `keys` the row of the highest `logprob` stays, ties by id."""
    place = np.empty(len(ids), np.int64)
    place[pc.sort_indices(ids).to_numpy()] = np.arange(len(ids))
    scored = np.isfinite(logprob)
    order = np.lexsort((place, -np.where(scored, logprob, -np.inf), keys[:, 0], keys[:, 1]))
    starts = np.flatnonzero(np.r_[True, (keys[order[1:]] != keys[order[:-1]]).any(axis=1)][: len(order)])
    counts = np.diff(starts, append=len(order))
    rank, best, answers = (np.empty(len(order), np.int64) for _ in range(3))
    rank[order] = np.arange(len(order)) - np.repeat(starts, counts) + 1
    best[order] = np.repeat(order[starts], counts)
    answers[order] = np.repeat(np.add.reduceat(scored[order], starts, dtype=np.int64), counts)
    keep = scored & (rank == 1)
    reason = pc.if_else(pa.array(scored), NOT_BEST, NOT_SCORABLE)
    shown = np.flatnonzero(scored & (answers > 1))
    proof = json_column(
        {
            "best": ids.take(pa.array(best[shown])),
            "group": pa.array([f"{one:016x}{two:016x}" for one, two in keys[shown].tolist()], pa.string()),
            "rank": pa.array(rank[shown]),
            "answers": pa.array(answers[shown]),
            "logprob": pa.array(logprob[shown]),
        }
    )
    pick = np.zeros(len(order), np.int64)
    pick[shown] = np.arange(len(shown))
    columns = [
        pa.array(keep),
        pc.if_else(pa.array(keep), pa.scalar(None, pa.string()), reason),
        score.combine_chunks(),
        proof.take(pa.array(pick, mask=~(scored & (answers > 1)))),
    ]
    return pa.Table.from_arrays(columns, schema=VERDICT)
