"""Token counts of rows equal the sizes of the examples that training makes of them."""

from typing import Any

import pyarrow as pa

from gristmill.curation.rows import ROW, message, table
from gristmill.tuning.chat import tokenise_pairs, tokenise_rows, tokenise_texts
from gristmill.tuning.counts import COUNTS, token_counts
from gristmill.tuning.models import train_tokenizer
from gristmill.tuning.packing import target_tokens

TOKENIZER = train_tokenizer(["a question and an answer", "another answer to the same question"] * 20, 400, 64)


def row(messages: Any = None, **more: Any) -> dict[str, Any]:
    base: dict[str, Any] = dict.fromkeys(ROW.names) | {"row_id": "r", "content_id": "c", "source": "s", "position": 0}
    return base | {"messages": messages} | more


ASK, SAY = message("user", "a question"), message("assistant", "an answer")
MORE, AGAIN = message("user", "the same question"), message("assistant", "another answer to it")
ROWS = table([
    row([ASK, SAY]),
    row([ASK, SAY, MORE, AGAIN]),
    row([ASK], chosen=[AGAIN], rejected=[SAY]),
    row(text="a question and an answer"),
    row([ASK]),
    row(),
    row([ASK, SAY, MORE, AGAIN, ASK]),
])  # fmt: skip


def test_counts_are_what_training_makes() -> None:
    found = token_counts(TOKENIZER, ROWS)
    assert found.schema == COUNTS
    single, several, pair, document, open_end, nothing, trailing = found.to_pylist()
    examples = tokenise_rows(TOKENIZER, ROWS.take([0, 1]))
    assert single["total_tokens"] == len(examples[0][0].ids)
    assert single["response_tokens"] == target_tokens(examples[0][0])
    assert several["total_tokens"] == len(examples[1][0].ids)
    (last,) = tokenise_rows(TOKENIZER, ROWS.take([1]), train="last")[0]
    assert several["response_tokens"] == target_tokens(last)
    pairs = ROWS.take([2]).rename_columns(["prompt" if name == "messages" else name for name in ROW.names])
    chosen, rejected = tokenise_pairs(TOKENIZER, pairs)[0]
    assert pair["total_tokens"] == len(chosen.ids) + len(rejected.ids)
    assert pair["response_tokens"] == target_tokens(chosen)
    assert pair["prompt_tokens"] == len(chosen.ids) - target_tokens(chosen)
    whole = len(tokenise_texts(TOKENIZER, ["a question and an answer"])[0].ids)
    assert document == {"prompt_tokens": 0, "response_tokens": whole, "total_tokens": whole}
    assert set(open_end.values()) == set(nothing.values()) == {None}
    assert trailing == several  # what follows the last answer is not trained and not counted


def test_a_row_has_the_same_counts_alone() -> None:
    whole = token_counts(TOKENIZER, ROWS)
    parts = [token_counts(TOKENIZER, ROWS.slice(index, 1)) for index in range(ROWS.num_rows)]
    assert pa.concat_tables(parts).equals(whole)
    assert token_counts(TOKENIZER, ROWS.slice(0, 0)).equals(COUNTS.empty_table())
