"""Conversations to token ids and loss weights, by the model's own chat template.

The template is rendered to text, the text is tokenised once without special tokens of the tokenizer's own (a template
writes its BOS itself), and the loss mask comes from character offsets. Where an assistant turn begins is what the
template renders for the turns before it with a generation prompt, so that training sees a turn exactly as generation
will start it. A template that rewrites earlier turns (Qwen3 takes reasoning out of the history) gives one example per
assistant turn instead of one per conversation.
"""

import json
import sys
from bisect import bisect_left
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from typing import Any, Literal

import numpy as np
import pyarrow as pa
from jinja2 import TemplateSyntaxError
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import render_jinja_template

from ..curation.folder import HouseError
from ..curation.shards import plain_messages
from .templates import Plain, Shape, plain

Message = Mapping[str, Any]
Train = Literal["assistant", "last"]

BATCH_ROWS = 2_000  # rows rendered and tokenised at once
_MARK = "\ue000content\ue001"  # stands for a turn's content while its place in the rendered text is looked up


@dataclass(frozen=True)
class Tokens:
    """One training example. weights[t] is the loss weight of predicting ids[t] from the ids before it, 0 where nothing
    is learnt; weights[0] is always 0."""

    ids: NDArray[np.int32]
    weights: NDArray[np.float32]


@dataclass(frozen=True)
class _Draft:
    """Rendered text and its weighted characters (start, end, weight), a later one overriding an earlier one."""

    text: str
    spans: tuple[tuple[int, int, float], ...] = ()


class Template:
    """A tokenizer's chat template, ready to render many conversations."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        self._tokens: dict[str, Any] = dict(tokenizer.special_tokens_map)
        special = {str(token) for token in tokenizer.added_tokens_decoder.values() if token.special}
        self._closing = tuple(special | {tokenizer.eos_token} - {None})
        self._plain: dict[tuple[Shape, bool], Plain | None] = {}

    def render(self, messages: Sequence[Message], tools: list[Any] | None = None, *, prompt: bool = False) -> str:
        """The conversation as text; with `prompt`, up to where the assistant's next turn begins.

        HouseError where the template refuses the conversation, with the template's own words."""
        try:
            text = None if tools else self._fast(messages, prompt)
            if text is None:
                text = self._render(messages, tools, prompt)
            text.encode()  # a lone surrogate would fail the whole batch in the tokenizer
        except TemplateSyntaxError as error:
            raise HouseError(f"the chat template is no Jinja template: line {error.lineno}: {error.message}") from error
        except Exception as error:  # a template is foreign code
            raise HouseError(f"the chat template refuses this conversation: {error}") from error
        return text

    def _render(self, messages: Sequence[Message], tools: list[Any] | None, prompt: bool) -> str:
        texts: Any = render_jinja_template(
            conversations=[[{"content": "", **turn} for turn in messages]],
            tools=tools,
            chat_template=self._tokenizer.get_chat_template(None, tools),
            add_generation_prompt=prompt,
            **self._tokens,
        )
        return str(texts[0][0])

    def _fast(self, messages: Sequence[Message], prompt: bool) -> str | None:
        """The conversation by a plain template's pieces; None where it takes Jinja."""
        contents = []
        for turn in messages:
            content = turn.get("content", "")
            if len(turn) > 2 or type(content) is not str or (len(turn) == 2 and "content" not in turn):
                return None
            contents.append(content)
        shape = tuple((turn["role"], content != "") for turn, content in zip(messages, contents, strict=True))
        if (shape, prompt) not in self._plain:
            template = self._tokenizer.get_chat_template(None, None)
            variables = {"tools": None, "documents": None, "add_generation_prompt": prompt, **self._tokens}
            self._plain[shape, prompt] = plain(template, shape, variables)
        found = self._plain[shape, prompt]
        return None if found is None else found.render(contents)

    def turn(self, messages: Sequence[Message], index: int, tools: list[Any] | None) -> tuple[str, int, int]:
        """The text up to and with assistant turn `index`, and where that turn starts and ends in it (characters, the
        end-of-turn token included, white space after it not)."""
        try:
            prefix = self.render(messages[:index], tools, prompt=True)
            text = self.render(messages[: index + 1], tools)
        except HouseError as error:
            raise HouseError(f"turn {index}: {error}") from error
        if not text.startswith(prefix):
            raise HouseError(
                f"turn {index}: the chat template renders the prompt of this assistant turn otherwise than the turn "
                f"itself (prompt ends in {prefix[-40:]!r}, turn begins {text[max(0, len(prefix) - 40) :][:60]!r}), so "
                "nothing says where it starts; use a template whose generation prompt is a prefix of the finished turn"
            )
        body = text[len(prefix) :].rstrip()
        if not body.endswith(self._closing):
            raise HouseError(
                f"turn {index}: the chat template ends an assistant turn in {text[-20:]!r}, which is no special token: "
                "a model tuned with it would never learn to stop; end each assistant turn with the EOS token"
            )
        return text, len(prefix), len(prefix) + len(body)


def tokenise_messages(
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[Message],
    *,
    tools: list[Any] | None = None,
    spans: Sequence[Mapping[str, Any]] | None = None,
    train: Train = "assistant",
) -> list[Tokens]:
    """The training examples of one conversation: one, or one per assistant turn where the template does not nest.

    messages: turns as a chat template expects them (`plain_messages`). Turns after the last assistant turn teach
    nothing and are left out. train: all assistant turns, or the last one alone; trained are content and end-of-turn
    token. spans: of field `messages` give their characters a weight of their own inside trained turns; one that
    reaches its content's end covers the end-of-turn token too, and one of no characters at that end nothing else.
    Without an assistant turn nothing is trained (all
    weights 0). HouseError names the turn where the template does not let its start or end be told.
    """
    return _tokenise(tokenizer, _drafts(Template(tokenizer), messages, tools, _of(spans, "messages"), train))


def tokenise_pair(
    tokenizer: PreTrainedTokenizerBase,
    prompt: Sequence[Message],
    chosen: Sequence[Message],
    rejected: Sequence[Message],
    *,
    tools: list[Any] | None = None,
    spans: Sequence[Mapping[str, Any]] | None = None,
) -> tuple[Tokens, Tokens]:
    """(chosen, rejected), each after the whole prompt, of which nothing is trained. spans: of fields `chosen` and
    `rejected`, their `turn` counted within the completion. Errors as tokenise_messages."""
    template = Template(tokenizer)
    completions = {"chosen": chosen, "rejected": rejected}
    drafts = [
        _completion(template, prompt, turns, tools, _of(spans, name), name) for name, turns in completions.items()
    ]
    first, second = _tokenise(tokenizer, drafts)
    return first, second


def tokenise_rows(
    tokenizer: PreTrainedTokenizerBase, rows: pa.Table, *, train: Train = "assistant"
) -> list[list[Tokens]]:
    """Examples of each row, in order, of a table with the column `messages` and maybe `tools`, `spans` and `row_id`.

    As tokenise_messages; a HouseError names the row."""
    template = Template(tokenizer)
    examples: list[list[Tokens]] = []
    for batch in _batches(rows, ("messages",)):
        drafts = []
        for row in batch:
            with _naming(row):
                spans = _of(row.get("spans"), "messages")
                drafts.append(_drafts(template, plain_messages(row["messages"]), _tools(row), spans, train))
        tokens = iter(_tokenise(tokenizer, list(chain.from_iterable(drafts))))
        examples += [[next(tokens) for _ in own] for own in drafts]
    return examples


def tokenise_pairs(tokenizer: PreTrainedTokenizerBase, rows: pa.Table) -> list[tuple[Tokens, Tokens]]:
    """(chosen, rejected) of each row, in order, of a table with the columns `prompt`, `chosen`, `rejected` and maybe
    `tools`, `spans` and `row_id`. As tokenise_pair; a HouseError names the row."""
    template = Template(tokenizer)
    pairs: list[tuple[Tokens, Tokens]] = []
    for batch in _batches(rows, ("prompt", "chosen", "rejected")):
        drafts = []
        for row in batch:
            with _naming(row):
                prompt, tools = plain_messages(row["prompt"]), _tools(row)
                for name in ("chosen", "rejected"):
                    spans = _of(row.get("spans"), name)
                    drafts.append(_completion(template, prompt, plain_messages(row[name]), tools, spans, name))
        tokens = iter(_tokenise(tokenizer, drafts))
        pairs += list(zip(tokens, tokens, strict=True))
    return pairs


def tokenise_completions(tokenizer: PreTrainedTokenizerBase, rows: pa.Table) -> list[Tokens]:
    """The completion of each row after its prompt, of which nothing is trained: of a table with the columns `prompt`,
    `completion` and maybe `tools`, `spans` (of field `chosen`, as the schema ROW calls a completion) and `row_id`. As
    tokenise_pair; a HouseError names the row."""
    template = Template(tokenizer)
    examples: list[Tokens] = []
    for batch in _batches(rows, ("prompt", "completion")):
        drafts = []
        for row in batch:
            with _naming(row):
                prompt, turns, tools = plain_messages(row["prompt"]), plain_messages(row["completion"]), _tools(row)
                spans = _of(row.get("spans"), "chosen")
                drafts.append(_completion(template, prompt, turns, tools, spans, "completion"))
        examples += _tokenise(tokenizer, drafts)
    return examples


def tokenise_each(tokenizer: PreTrainedTokenizerBase, rows: pa.Table) -> list[list[Tokens] | HouseError]:
    """All that could be trained of each row (schema ROW), with its weights: of a conversation its examples, of a
    preference row chosen and rejected, of a row with one answer that answer, of raw text its document. A row that has
    none of them, or that the template refuses, gives the error instead."""
    template = Template(tokenizer)
    results: list[list[Tokens] | HouseError] = []
    for batch in _batches(rows, ("messages", "chosen", "rejected", "text")):
        drafts: list[list[_Draft] | HouseError] = []
        for row in batch:
            try:
                drafts.append(_each(template, row))
            except HouseError as error:
                drafts.append(error)
        tokens = iter(_tokenise(tokenizer, [draft for own in drafts if isinstance(own, list) for draft in own]))
        texts = iter(tokenise_texts(tokenizer, [row["text"] for row in batch if row["text"] is not None]))
        for row, own in zip(batch, drafts, strict=True):
            if row["text"] is not None:
                results.append([next(texts)])
            else:
                results.append(own if isinstance(own, HouseError) else [next(tokens) for _ in own])
    return results


def tokenise_responses(tokenizer: PreTrainedTokenizerBase, rows: pa.Table) -> list[Tokens | HouseError]:
    """The response of each row (schema ROW) after its prompt: `chosen` of a preference row, else the last assistant
    turn. A row that has none, or that the template refuses, gives the error instead."""
    template = Template(tokenizer)
    results: list[Tokens | HouseError] = []
    for batch in _batches(rows, ("messages", "chosen")):
        drafts: list[_Draft | HouseError] = []
        for row in batch:
            try:
                drafts.append(_response(template, row))
            except HouseError as error:
                drafts.append(error)
        results += _tokenise_some(tokenizer, drafts)
    return results


def tokenise_texts(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> list[Tokens]:
    """Raw documents: every token is trained, and the EOS token that ends them; BOS only if the tokenizer sets one."""
    examples: list[Tokens] = []
    if not texts:
        return examples
    for ids in tokenizer(list(texts), add_special_tokens=True, verbose=False)["input_ids"]:
        whole = ids if ids and ids[-1] == tokenizer.eos_token_id else [*ids, tokenizer.eos_token_id]
        weights = np.ones(len(whole), np.float32)
        weights[0] = 0.0
        examples.append(Tokens(np.asarray(whole, np.int32), weights))
    return examples


def conversation_ids(
    tokenizer: PreTrainedTokenizerBase, conversations: Iterable[Sequence[Message]], *, prompt: bool = False
) -> list[NDArray[np.int32] | HouseError]:
    """Token ids of each conversation, with `prompt` up to where the assistant's next turn begins; where the template
    refuses one, the error in its place."""
    template = Template(tokenizer)
    drafts: list[_Draft | HouseError] = []
    for messages in conversations:
        try:
            drafts.append(_Draft(template.render(messages, prompt=prompt)))
        except HouseError as error:
            drafts.append(error)
    return [item.ids if isinstance(item, Tokens) else item for item in _tokenise_some(tokenizer, drafts)]


def end_of_turn(tokenizer: PreTrainedTokenizerBase) -> int:
    """Id of the token that the chat template ends an assistant's turn with, at which generation has to stop.

    HouseError where the template ends it with no special token."""
    asked = [{"role": "user", "content": "?"}, {"role": "assistant", "content": "."}]
    text, _, end = Template(tokenizer).turn(asked, 1, None)
    (tokens,) = _tokenise(tokenizer, [_Draft(text[:end])])
    return int(tokens.ids[-1])


def turn_opening(tokenizer: PreTrainedTokenizerBase) -> NDArray[np.int32]:
    """Token ids after which an assistant's turn stands alone, without any prompt: the BOS token where the template
    writes one, then what the template's generation prompt opens a turn with (ChatML: `<|im_start|>assistant\\n`); the
    BOS or else the EOS token where that is nothing."""
    template, ask = Template(tokenizer), [{"role": "user", "content": "?"}]
    bare, asked = template.render(ask), template.render(ask, prompt=True)
    text = asked[len(bare) :] if asked.startswith(bare) else ""
    if tokenizer.bos_token and bare.startswith(tokenizer.bos_token):
        text = tokenizer.bos_token + text
    (tokens,) = _tokenise(tokenizer, [_Draft(text)])
    first = tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
    return tokens.ids if len(tokens.ids) else np.asarray([first], np.int32)


def _drafts(
    template: Template,
    messages: Sequence[Message],
    tools: list[Any] | None,
    spans: Sequence[Mapping[str, Any]],
    train: Train,
) -> list[_Draft]:
    turns = [index for index, turn in enumerate(messages) if turn["role"] == "assistant"]
    if not turns:
        return [_Draft(template.render(messages, tools))]
    rendered = {
        index: template.turn(messages, index, tools) for index in (turns if train == "assistant" else turns[-1:])
    }
    weighted = {
        index: _weighted(template, messages, index, tools, rendered[index], _at(spans, index)) for index in rendered
    }
    whole = rendered[turns[-1]][0]
    if all(whole.startswith(text) for text, _, _ in rendered.values()):
        return [_Draft(whole, tuple(chain.from_iterable(weighted.values())))]
    return [_Draft(rendered[index][0], weighted[index]) for index in rendered]


def _completion(
    template: Template,
    prompt: Sequence[Message],
    completion: Sequence[Message],
    tools: list[Any] | None,
    spans: Sequence[Mapping[str, Any]],
    name: str,
) -> _Draft:
    if not any(turn["role"] == "assistant" for turn in completion):
        raise HouseError(f"{name} has no assistant turn")
    messages = [*prompt, *completion]
    turns = [i for i in range(len(prompt), len(messages)) if messages[i]["role"] == "assistant"]
    rendered = {index: template.turn(messages, index, tools) for index in turns}
    whole = rendered[turns[-1]][0]
    for index in turns:
        if not whole.startswith(rendered[index][0]):
            raise HouseError(
                f"{name}, turn {index - len(prompt)}: the chat template rewrites this assistant turn once another "
                "follows, so the completion is no one sequence; keep its last assistant turn, the rest in the prompt"
            )
    pieces = (
        _weighted(template, messages, index, tools, rendered[index], _at(spans, index - len(prompt))) for index in turns
    )
    return _Draft(whole, tuple(chain.from_iterable(pieces)))


def _each(template: Template, row: Mapping[str, Any]) -> list[_Draft]:
    if row["text"] is not None:
        return []
    messages, tools, spans = plain_messages(row["messages"]), _tools(row), row.get("spans")
    answers = [name for name in ("chosen", "rejected") if row[name] is not None]
    if answers:
        return [
            _completion(template, messages, plain_messages(row[name]), tools, _of(spans, name), name)
            for name in answers
        ]
    if not any(turn["role"] == "assistant" for turn in messages):
        raise HouseError("no assistant turn")
    return _drafts(template, messages, tools, _of(spans, "messages"), "assistant")


def _response(template: Template, row: Mapping[str, Any]) -> _Draft:
    messages, tools = plain_messages(row["messages"]), _tools(row)
    if row["chosen"] is not None:
        return _completion(template, messages, plain_messages(row["chosen"]), tools, (), "chosen")
    if not any(turn["role"] == "assistant" for turn in messages):
        raise HouseError("no assistant turn")
    return _drafts(template, messages, tools, (), "last")[0]


def _weighted(
    template: Template,
    messages: Sequence[Message],
    index: int,
    tools: list[Any] | None,
    rendered: tuple[str, int, int],
    spans: Sequence[Mapping[str, Any]],
) -> tuple[tuple[int, int, float], ...]:
    """The weighted characters of one trained turn: all of it 1, then `spans` of its content."""
    text, start, end = rendered
    if not spans:
        return ((start, end, 1.0),)
    content = messages[index].get("content") or ""
    marked = template.render([*messages[:index], {**messages[index], "content": _MARK}], tools)
    place = marked.find(_MARK, start)
    zero = place  # of the content's first character; a template may strip it
    if not text.startswith(content, place):
        zero -= len(content) - len(content.lstrip())
    if place < 0 or text[start:place] != marked[start:place] or not text[place:].lstrip().startswith(content.strip()):
        raise HouseError(f"turn {index}: the chat template rewrites its content, so spans cannot be placed in it")
    weighted = [(start, end, 1.0)]
    for span in spans:
        tail = span["start"] == span["end"] == len(content)  # of no characters: what closes the turn
        if not tail and not 0 <= span["start"] < span["end"] <= len(content):
            raise HouseError(
                f"turn {index}: span {span['start']}..{span['end']} lies outside its {len(content)} characters"
            )
        stop = end if span["end"] >= len(content.rstrip()) else zero + span["end"]
        start_at = zero + (len(content.rstrip()) if tail else span["start"])
        weighted.append((max(place, start_at), stop, float(span["weight"])))
    return tuple(weighted)


def _tokenise(tokenizer: PreTrainedTokenizerBase, drafts: Sequence[_Draft]) -> list[Tokens]:
    """Ids and weights of many rendered texts, tokenised in one call, by as many threads as the tokenizer takes.

    A token's characters run from where the token before it ended (offsets leave out leading spaces, and the later
    bytes of one character repeat it); its weight is the largest among them."""
    if not drafts:
        return []
    inner: Any = tokenizer.backend_tokenizer
    inner.no_truncation()
    inner.no_padding()
    found = []
    for draft, encoded in zip(
        drafts, inner.encode_batch([d.text for d in drafts], add_special_tokens=False), strict=True
    ):
        ids = np.asarray(encoded.ids, np.int32)
        weights = np.zeros(len(ids), np.float32)
        if len(draft.spans) == 1 and draft.spans[0][0] < draft.spans[0][1]:
            start, end, weight = draft.spans[0]
            weights[_covered(encoded, len(ids), start, end)] = weight
        elif draft.spans and len(ids):
            weights = _token_weights(draft, np.asarray(encoded.offsets, np.int64))
        weights[:1] = 0.0
        found.append(Tokens(ids, weights))
    return found


def _covered(encoded: Any, count: int, start: int, end: int) -> slice:
    """The tokens that hold any of the characters start … end - 1, as `_token_weights` has it: by bisection, since the
    offsets of all tokens as Python numbers cost three times what their ids do."""

    def begins(token: int) -> int:
        if token == 0:
            return 0
        if token == count:
            return sys.maxsize
        return int(min(encoded.token_to_chars(token)[0], encoded.token_to_chars(token - 1)[1]))

    tokens = range(count)
    first = bisect_left(tokens, True, key=lambda token: begins(token) >= start or begins(token + 1) > start)
    return slice(first, bisect_left(tokens, True, lo=first, key=lambda token: begins(token) >= end))


def _tokenise_some(
    tokenizer: PreTrainedTokenizerBase, drafts: Sequence[_Draft | HouseError]
) -> list[Tokens | HouseError]:
    tokens = iter(_tokenise(tokenizer, [draft for draft in drafts if isinstance(draft, _Draft)]))
    return [next(tokens) if isinstance(draft, _Draft) else draft for draft in drafts]


def _token_weights(draft: _Draft, offsets: NDArray[np.int64]) -> NDArray[np.float32]:
    characters = np.zeros(len(draft.text) + 1, np.float32)
    for start, end, weight in draft.spans:
        characters[start:end] = weight
    before = np.concatenate([[0], np.maximum.accumulate(offsets[:, 1])[:-1]])
    return np.maximum.reduceat(characters, np.minimum(offsets[:, 0], before))


def _batches(rows: pa.Table, columns: tuple[str, ...]) -> Iterable[list[dict[str, Any]]]:
    wanted = [*columns, *(name for name in ("tools", "spans", "row_id") if name in rows.column_names)]
    for start in range(0, rows.num_rows, BATCH_ROWS):
        yield rows.select(wanted).slice(start, BATCH_ROWS).to_pylist()


def _tools(row: Mapping[str, Any]) -> list[Any] | None:
    return json.loads(row["tools"]) if row.get("tools") else None


def _of(spans: Sequence[Mapping[str, Any]] | None, field: str) -> list[Mapping[str, Any]]:
    return [span for span in spans or () if span["field"] == field]


def _at(spans: Sequence[Mapping[str, Any]], turn: int) -> list[Mapping[str, Any]]:
    return [span for span in spans if span["turn"] == turn]


@contextmanager
def _naming(row: Mapping[str, Any]) -> Iterator[None]:
    """Puts the row's id before the message of a HouseError."""
    try:
        yield
    except HouseError as error:
        raise HouseError(f"row {row['row_id']}, {error}" if row.get("row_id") else str(error)) from error
