"""How many tokens a row takes, as training will see it, without a model's weights."""

from collections.abc import Callable

import pyarrow as pa
from transformers import PreTrainedTokenizerBase

from ..curation.folder import HouseError
from .chat import Tokens, tokenise_pairs, tokenise_responses, tokenise_rows, tokenise_texts
from .packing import target_tokens

COUNTS = pa.schema([(name, pa.int32()) for name in ("prompt_tokens", "response_tokens", "total_tokens")])
BATCH_ROWS = 2_000  # rows tokenised at once

Counts = tuple[int, int, int]
Total = Callable[[PreTrainedTokenizerBase, pa.Table], list[int]]


def token_counts(tokenizer: PreTrainedTokenizerBase, rows: pa.Table) -> pa.Table:
    """Counts (schema COUNTS) of each row (schema ROW), in order: of the response (`chosen`, else the last assistant
    turn, its end-of-turn token included; of a raw document all of it), of what comes before it, and of all that the row
    takes in a pack: its longest example, of a preference pair both answers with their prompts. Null where there is no
    assistant turn or the chat template refuses the conversation."""
    counts: list[Counts | None] = []
    for start in range(0, rows.num_rows, BATCH_ROWS):
        counts += _counts(tokenizer, rows.slice(start, BATCH_ROWS))
    columns = zip(*(count or (None,) * 3 for count in counts), strict=True) if counts else [[]] * 3
    return pa.table([pa.array(column, pa.int32()) for column in columns], schema=COUNTS)


def _counts(tokenizer: PreTrainedTokenizerBase, rows: pa.Table) -> list[Counts | None]:
    found: list[Counts | None] = [None] * rows.num_rows
    documents = rows["text"].is_valid().to_pylist()
    texts = [text for text in rows["text"].to_pylist() if text is not None]
    whole = iter(tokenise_texts(tokenizer, texts) if texts else [])
    answers = tokenise_responses(tokenizer, rows)
    for row, answer in enumerate(answers):
        if documents[row]:
            size = len(next(whole).ids)
            found[row] = 0, size, size
        elif isinstance(answer, Tokens):
            response = target_tokens(answer)
            found[row] = len(answer.ids) - response, response, len(answer.ids)
    roles = [[turn["role"] for turn in turns or ()] for turns in rows["messages"].to_pylist()]
    paired = (rows["chosen"].is_valid().to_numpy() & rows["rejected"].is_valid().to_numpy()).tolist()
    chosen = rows["chosen"].is_valid().to_pylist()
    live = [row for row, count in enumerate(found) if count is not None and not documents[row]]
    pairs = [row for row in live if paired[row]]
    several = [row for row in live if not chosen[row] and roles[row].count("assistant") > 1]
    for which, total in ((pairs, _pair_total), (several, _conversation_total)):
        for row, whole_size in zip(which, _totals(total, tokenizer, rows, which), strict=True):
            count = found[row]
            found[row] = None if whole_size is None or count is None else (count[0], count[1], whole_size)
    return found


def _totals(total: Total, tokenizer: PreTrainedTokenizerBase, rows: pa.Table, which: list[int]) -> list[int | None]:
    """`total` of the rows `which`, at once, or one by one where the template refuses any of them."""
    if not which:
        return []
    try:
        return [*total(tokenizer, rows.take(which))]
    except HouseError:
        return [None] if len(which) == 1 else [_totals(total, tokenizer, rows, [row])[0] for row in which]


def _pair_total(tokenizer: PreTrainedTokenizerBase, rows: pa.Table) -> list[int]:
    names = ["prompt" if name == "messages" else name for name in rows.column_names]
    pairs = tokenise_pairs(tokenizer, rows.rename_columns(names))
    return [sum(len(side.ids) for side in pair) for pair in pairs]


def _conversation_total(tokenizer: PreTrainedTokenizerBase, rows: pa.Table) -> list[int]:
    """With one assistant turn a row is as long as its response's example; with several the longest counts."""
    return [max(len(example.ids) for example in examples) for examples in tokenise_rows(tokenizer, rows)]
