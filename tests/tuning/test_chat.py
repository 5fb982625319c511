"""Loss masks as golden tables: which pieces of the rendered text are trained, for the templates of six families."""

from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from gristmill.curation.folder import HouseError
from gristmill.curation.rows import message, table
from gristmill.tuning import chat
from gristmill.tuning.chat import (
    Tokens,
    conversation_ids,
    end_of_turn,
    tokenise_messages,
    tokenise_pair,
    tokenise_pairs,
    tokenise_responses,
    tokenise_rows,
    tokenise_texts,
)
from gristmill.tuning.models import train_tokenizer

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LLAMA3 = (
    "{{ bos_token }}{% for m in messages %}<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n{{ m.content | trim }}"
    "<|eot_id|>{% endfor %}{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
QWEN3 = (  # reasoning of a turn is rendered after the last user turn only
    "{% set ns = namespace(last=0) %}{% for m in messages %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}"
    "{% endif %}{% endfor %}{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.role == 'assistant' and loop.index0 > ns.last %}<think>\n{{ m.reasoning_content or '' }}\n</think>\n\n"
    "{% endif %}{{ m.content }}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# The following say what the families' own templates say, in fewer words.
QWEN25 = (  # a system prompt of its own, calls inside the assistant's turn, results of tools inside a user's
    "{% if messages[0].role != 'system' %}<|im_start|>system\nYou help.{% if tools %}{{ '\n# Tools\n' }}"
    "{{ tools | tojson }}{% endif %}<|im_end|>\n{% endif %}{% for m in messages %}"
    "{% if m.role == 'tool' %}{% if messages[loop.index0 - 1].role != 'tool' %}<|im_start|>user{% endif %}"
    "{{ '\n<tool_response>\n' + m.content }}\n</tool_response>"
    "{% if loop.last or messages[loop.index0 + 1].role != 'tool' %}<|im_end|>\n{% endif %}"
    "{% elif m.tool_calls %}<|im_start|>assistant{% if m.content %}{{ '\n' + m.content }}{% endif %}"
    "{% for call in m.tool_calls %}{{ '\n<tool_call>\n' }}{{ call.function | tojson }}\n</tool_call>{% endfor %}"
    "<|im_end|>\n{% else %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LLAMA31 = (  # one call a turn, as JSON; what a tool says comes from ipython
    "{{ bos_token }}{% for m in messages %}{% if m.tool_calls %}"
    "{% if m.tool_calls | length > 1 %}{{ raise_exception('one tool call a turn') }}{% endif %}"
    '<|start_header_id|>assistant<|end_header_id|>\n\n{"name": "{{ m.tool_calls[0].function.name }}", '
    '"parameters": {{ m.tool_calls[0].function.arguments | tojson }}}<|eot_id|>'
    "{% else %}<|start_header_id|>{{ 'ipython' if m.role == 'tool' else m.role }}<|end_header_id|>\n\n"
    "{{ m.content | trim }}<|eot_id|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
MISTRAL = (  # no generation prompt; the system prompt goes into the last user's turn, which rewrites the history
    "{{ bos_token }}{% set ns = namespace(last=0, system='') %}{% for m in messages %}"
    "{% if m.role == 'user' %}{% set ns.last = loop.index0 %}{% endif %}"
    "{% if m.role == 'system' %}{% set ns.system = m.content + '\n\n' %}{% endif %}{% endfor %}{% for m in messages %}"
    "{% if m.role == 'user' %}[INST] {{ ns.system if loop.index0 == ns.last else '' }}{{ m.content }}[/INST]"
    "{% elif m.tool_calls %}[TOOL_CALLS] {{ m.tool_calls | map(attribute='function') | list | tojson }}{{ eos_token }}"
    "{% elif m.role == 'tool' %}[TOOL_RESULTS] {{ m.content }}[/TOOL_RESULTS]"
    "{% elif m.role == 'assistant' %} {{ m.content | trim }}{{ eos_token }}{% endif %}{% endfor %}"
)
GEMMA = (  # no system role, an assistant called model, and an end of turn that is not the EOS token
    "{{ bos_token }}{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate user/assistant') }}{% endif %}"
    "<start_of_turn>{{ 'model' if m.role == 'assistant' else m.role }}\n{{ m.content | trim }}<end_of_turn>\n"
    "{% endfor %}"
    "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|begin_of_text|>", "<|start_header_id|>"]
SPECIAL += ["<|end_header_id|>", "<|eot_id|>", "<start_of_turn>", "<end_of_turn>", "[INST]", "[/INST]", "</s>"]
BOS_ONCE = (LLAMA3, LLAMA31, MISTRAL, GEMMA)
EOS = {LLAMA3: "<|eot_id|>", LLAMA31: "<|eot_id|>", MISTRAL: "</s>", GEMMA: "<|endoftext|>"}  # else <|im_end|>


def tokenizer(template: str, eos: str = "<|im_end|>", pad: str = "<|endoftext|>") -> PreTrainedTokenizerFast:
    """Byte-level, one token per byte, adding its own BOS when asked for special tokens (as Llama 3's does)."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    inner = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    inner.add_special_tokens(SPECIAL)
    bos = inner.token_to_id("<|begin_of_text|>")
    inner.post_processor = processors.Sequence(
        [
            processors.ByteLevel(trim_offsets=True),
            processors.TemplateProcessing(single="<|begin_of_text|> $A", special_tokens=[("<|begin_of_text|>", bos)]),
        ]
    )
    made = PreTrainedTokenizerFast(
        tokenizer_object=inner,
        eos_token=eos,
        pad_token=pad,
        bos_token="<|begin_of_text|>",
        additional_special_tokens=SPECIAL,
    )
    made.chat_template = template
    return made


def trained(kind: PreTrainedTokenizerFast, tokens: Tokens) -> list[str]:
    """The maximal runs of trained tokens, as text."""
    assert tokens.ids.dtype == np.int32 and tokens.weights.dtype == np.float32
    assert tokens.ids.shape == tokens.weights.shape
    edges = np.flatnonzero(np.diff(np.concatenate([[0], tokens.weights != 0, [0]]).astype(int)))
    return [kind.decode(tokens.ids[a:b].tolist()) for a, b in edges.reshape(-1, 2)]


MERGED = train_tokenizer(["a aab öß a.\n\nabc cab\n 🎉🎉 ab ab"] * 3, 400, 64)


def turn(role: str, content: str, **more: Any) -> dict[str, Any]:
    return {"role": role, "content": content, **more}


SYSTEM, ASK, MORE = turn("system", "Be brief."), turn("user", "Größe?  "), turn("user", "And?")
SAY, LAST = turn("assistant", "Zwölf 🎉."), turn("assistant", "No.")
CALL = [{"type": "function", "function": {"name": "size", "arguments": {"of": "it"}}}]
TWICE = [*CALL, {"type": "function", "function": {"name": "now", "arguments": {}}}]
CALLS, RESULT, THEN = turn("assistant", "", tool_calls=CALL), turn("tool", "12"), turn("assistant", "Zwölf.")
AH = turn("assistant", "12", reasoning_content="ah")
SIZE = '{"name": "size", "arguments": {"of": "it"}}'
NOW = '{"name": "now", "arguments": {}}'
GOLDEN = {
    "chatml-one": (CHATML, [ASK, SAY], [["Zwölf 🎉.<|im_end|>"]]),
    "chatml-system-two": (CHATML, [SYSTEM, ASK, SAY, MORE, LAST], [["Zwölf 🎉.<|im_end|>", "No.<|im_end|>"]]),
    "chatml-empty": (CHATML, [ASK, turn("assistant", "")], [["<|im_end|>"]]),
    "chatml-assistant-first": (CHATML, [SAY], [["Zwölf 🎉.<|im_end|>"]]),
    "chatml-trailing-user": (CHATML, [ASK, SAY, MORE], [["Zwölf 🎉.<|im_end|>"]]),
    "chatml-ends-in-space": (CHATML, [ASK, turn("assistant", "a  ")], [["a  <|im_end|>"]]),
    "chatml-same-words": (CHATML, [turn("user", "No."), LAST, turn("user", "No."), LAST], [["No.<|im_end|>"] * 2]),
    "chatml-none": (CHATML, [SYSTEM, ASK], [[]]),
    "llama3-two": (LLAMA3, [ASK, SAY, MORE, LAST], [["Zwölf 🎉.<|eot_id|>", "No.<|eot_id|>"]]),
    "llama3-trimmed": (LLAMA3, [ASK, turn("assistant", "  a \n")], [["a<|eot_id|>"]]),
    "qwen3-one": (QWEN3, [ASK, SAY], [["<think>\n\n</think>\n\nZwölf 🎉.<|im_end|>"]]),
    "qwen3-two": (
        QWEN3,
        [ASK, turn("assistant", "12", reasoning_content="hm"), MORE, LAST],
        [["<think>\nhm\n</think>\n\n12<|im_end|>"], ["<think>\n\n</think>\n\nNo.<|im_end|>"]],
    ),
    "qwen3-steps-of-one-answer": (  # all after the last user's turn: nothing is rewritten, so one example
        QWEN3,
        [
            ASK,
            turn("assistant", "Look.", reasoning_content="hm"),
            RESULT,
            turn("assistant", "12", reasoning_content="ah"),
        ],
        [["<think>\nhm\n</think>\n\nLook.<|im_end|>", "<think>\nah\n</think>\n\n12<|im_end|>"]],
    ),
    "qwen2.5-own-system-prompt": (QWEN25, [ASK, SAY, MORE, LAST], [["Zwölf 🎉.<|im_end|>", "No.<|im_end|>"]]),
    "qwen2.5-tools": (
        QWEN25,
        [ASK, CALLS, RESULT, RESULT, THEN],
        [[f"<tool_call>\n{SIZE}\n</tool_call><|im_end|>", "Zwölf.<|im_end|>"]],
    ),
    "qwen2.5-says-and-calls-twice": (
        QWEN25,
        [ASK, turn("assistant", "Look:", tool_calls=TWICE)],
        [[f"Look:\n<tool_call>\n{SIZE}\n</tool_call>\n<tool_call>\n{NOW}\n</tool_call><|im_end|>"]],
    ),
    "llama3.1-tools": (
        LLAMA31,
        [SYSTEM, ASK, CALLS, RESULT, THEN],
        [['{"name": "size", "parameters": {"of": "it"}}<|eot_id|>', "Zwölf.<|eot_id|>"]],
    ),
    "mistral-two": (MISTRAL, [ASK, SAY, MORE, LAST], [[" Zwölf 🎉.</s>", " No.</s>"]]),
    "mistral-system-moves": (MISTRAL, [SYSTEM, ASK, SAY, MORE, LAST], [[" Zwölf 🎉.</s>"], [" No.</s>"]]),
    "mistral-tools": (MISTRAL, [ASK, CALLS, RESULT, THEN], [[f"[TOOL_CALLS] [{SIZE}]</s>", " Zwölf.</s>"]]),
    "gemma-two": (GEMMA, [ASK, SAY, MORE, LAST], [["Zwölf 🎉.<end_of_turn>", "No.<end_of_turn>"]]),
    "gemma-trimmed": (GEMMA, [ASK, turn("assistant", " a\n")], [["a<end_of_turn>"]]),
}


@pytest.mark.parametrize("name", GOLDEN)
def test_what_is_trained(name: str) -> None:
    template, messages, expected = GOLDEN[name]
    kind = tokenizer(template, EOS.get(template, "<|im_end|>"))
    assert [trained(kind, tokens) for tokens in tokenise_messages(kind, messages)] == expected


@pytest.mark.parametrize("name", GOLDEN)
def test_ids_are_those_of_the_template_and_bos_stands_once(name: str) -> None:
    template, messages, _ = GOLDEN[name]
    kind = tokenizer(template, EOS.get(template, "<|im_end|>"))
    last = max((i for i, m in enumerate(messages) if m["role"] == "assistant"), default=len(messages) - 1)
    ids = tokenise_messages(kind, messages)[-1].ids.tolist()
    assert ids == kind.apply_chat_template(messages[: last + 1], tokenize=True, return_dict=False)
    assert ids.count(kind.bos_token_id) == (1 if template in BOS_ONCE else 0)  # trap 10


@pytest.mark.parametrize("name", [name for name in GOLDEN if name.split("-")[0] in ("gemma", "mistral", "llama3")])
def test_the_stop_token_is_trained_and_is_where_generation_stops(name: str) -> None:
    """Trap 9: the token that ends a turn is the template's, whatever the tokenizer calls its EOS."""
    template, messages, _ = GOLDEN[name]
    kind = tokenizer(template, EOS[template])
    for tokens in tokenise_messages(kind, messages):
        assert tokens.ids[np.flatnonzero(tokens.weights)[-1]] == end_of_turn(kind)
    assert kind.convert_ids_to_tokens(end_of_turn(kind)) == ("<end_of_turn>" if template is GEMMA else EOS[template])


def test_what_a_family_s_template_refuses_is_said_in_its_words() -> None:
    with pytest.raises(HouseError, match=r"turn 2: .*System role not supported"):
        tokenise_messages(tokenizer(GEMMA), [SYSTEM, ASK, SAY])
    with pytest.raises(HouseError, match="roles must alternate"):
        tokenise_messages(tokenizer(GEMMA), [ASK, MORE, SAY])
    with pytest.raises(HouseError, match="one tool call a turn"):
        tokenise_messages(tokenizer(LLAMA31, "<|eot_id|>"), [ASK, turn("assistant", "", tool_calls=TWICE)])


def sentencepiece() -> PreTrainedTokenizerFast:
    """Pieces as Llama 2 and Mistral have them: a marker for the space before a word, bytes for unknown characters."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "▁yes", "[", "]", "/"]
    pieces += [*"INSThiyes", "▁[", "▁hi"]
    inner = Tokenizer(models.Unigram([(piece, -1.0) for piece in dict.fromkeys(pieces)], unk_id=0, byte_fallback=True))
    inner.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="first", split=False)
    inner.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    inner.add_special_tokens(["<unk>", "<s>", "</s>"])
    made = PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    made.chat_template = (
        "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]"
        "{% else %} {{ m.content }}{{ eos_token }}{% endif %}{% endfor %}"
    )
    return made


def test_sentencepiece_offsets() -> None:
    kind = sentencepiece()
    messages = [turn("user", "hi ü"), turn("assistant", "yes 🎉 ü"), turn("user", "hi"), turn("assistant", "yes")]
    (tokens,) = tokenise_messages(kind, messages)
    assert [run.strip() for run in trained(kind, tokens)] == ["yes 🎉 ü</s>", "yes</s>"]
    assert tokens.ids.tolist().count(kind.bos_token_id) == 1


LETTERS = st.text(st.sampled_from("abc öß\n.🎉"), max_size=12).map(lambda text: "a" + text)


@settings(deadline=None)
@given(st.lists(st.tuples(LETTERS, LETTERS), min_size=1, max_size=4))
def test_any_conversation_trains_what_was_said_and_its_ends(exchanges: list[tuple[str, str]]) -> None:
    messages = [turn(role, text) for pair in exchanges for role, text in zip(("user", "assistant"), pair, strict=True)]
    (tokens,) = tokenise_messages(MERGED, messages)
    assert trained(MERGED, tokens) == [answer + "<|im_end|>" for _, answer in exchanges]


KINDS = (MERGED, tokenizer(CHATML), sentencepiece())


@settings(max_examples=50, deadline=None)
@given(st.text(st.sampled_from("abc öß\n.🎉"), max_size=20), st.data())
def test_one_span_weighs_the_tokens_that_many_do(text: str, data: st.DataObject) -> None:
    """The same characters as one span, found by bisection, and as one span a character, found by the offsets of all."""
    start = data.draw(st.integers(0, len(text)))
    end = data.draw(st.integers(start, len(text)))
    for kind in KINDS:
        pieces = tuple((at, at + 1, 1.0) for at in range(start, end)) + ((start, start, 1.0),) * 2
        one, many = chat._tokenise(kind, [chat._Draft(text, ((start, end, 1.0),)), chat._Draft(text, pieces)])
        assert one.ids.tolist() == many.ids.tolist() == kind(text, add_special_tokens=False)["input_ids"]
        assert one.weights.tolist() == many.weights.tolist()


def test_last_turn_alone_and_a_pad_that_is_the_eos() -> None:
    kind = tokenizer(CHATML, pad="<|im_end|>")
    (tokens,) = tokenise_messages(kind, [ASK, SAY, MORE, LAST], train="last")
    assert trained(kind, tokens) == ["No.<|im_end|>"]


def test_the_first_token_is_never_trained() -> None:
    kind = tokenizer("{% for m in messages %}{{ m.content }}<|im_end|>{% endfor %}")
    (tokens,) = tokenise_messages(kind, [turn("assistant", "abc")])
    assert tokens.weights.tolist() == [0, 1, 1, 1]


def test_a_template_whose_prompt_is_no_prefix_is_refused() -> None:
    thinks = CHATML.replace("assistant\n{% endif %}", "assistant\n<think>{% endif %}")
    with pytest.raises(HouseError, match=r"turn 3: the chat template renders the prompt of this assistant turn"):
        tokenise_messages(tokenizer(thinks), [ASK, MORE, ASK, SAY])


def test_a_template_without_an_end_of_turn_is_refused() -> None:
    with pytest.raises(HouseError, match=r"turn 1: .* never learn to stop"):
        tokenise_messages(tokenizer(CHATML.replace("<|im_end|>", "")), [ASK, SAY])


def test_a_template_that_does_not_parse_is_refused_with_its_line() -> None:
    broken = tokenizer("{% for m in messages %}\n{{ m.content }\n{% endfor %}")
    with pytest.raises(HouseError, match=r"no Jinja template: line 2: unexpected '}'"):
        tokenise_messages(broken, [turn("user", "a"), turn("assistant", "b")])


def test_a_template_that_raises_is_refused_in_its_own_words() -> None:
    strict = "{% if messages[0].role == 'system' %}{{ raise_exception('no system role') }}{% endif %}" + CHATML
    with pytest.raises(HouseError, match="no system role"):
        tokenise_messages(tokenizer(strict), [SYSTEM, ASK, SAY])


def span(field: str, at: int, start: int, end: int, weight: float) -> dict[str, object]:
    return {"field": field, "turn": at, "start": start, "end": end, "weight": weight}


WEIGHED = {
    "chatml": (CHATML, " on end <|im_end|>"),
    "llama3": (LLAMA3, "on end<|eot_id|>"),
    "qwen3": (QWEN3, "<think>\n\n</think>\n\n on end <|im_end|>"),
}


@pytest.mark.parametrize("name", WEIGHED)
def test_spans_weigh_characters_of_trained_turns(name: str) -> None:
    template, plain = WEIGHED[name]
    kind = tokenizer(template, "<|eot_id|>" if name == "llama3" else "<|im_end|>")
    spans = [span("messages", 1, 3, 5, 0.5), span("messages", 1, 5, 8, 0.0), span("chosen", 1, 0, 1, 9.0)]
    (tokens,) = tokenise_messages(kind, [ASK, turn("assistant", " one two end ")], spans=spans, train="last")
    assert kind.decode(tokens.ids[tokens.weights == 0.5].tolist()) == "e "
    assert kind.decode(tokens.ids[tokens.weights == 1.0].tolist()) == plain
    assert set(tokens.weights.tolist()) == {0.0, 0.5, 1.0}


def test_a_span_to_the_end_of_a_turn_covers_its_end_token() -> None:
    kind = tokenizer(CHATML)
    messages = [ASK, SAY, MORE, LAST]
    (tokens,) = tokenise_messages(kind, messages, spans=[span("messages", 1, 0, len(SAY["content"]), 0.0)])
    assert trained(kind, tokens) == ["No.<|im_end|>"]
    with pytest.raises(HouseError, match=r"turn 3: span 0\.\.9 lies outside its 3 characters"):
        tokenise_messages(kind, messages, spans=[span("messages", 3, 0, 9, 0.0)])


def test_pairs_train_completions_only() -> None:
    kind = tokenizer(LLAMA3, "<|eot_id|>")
    spans = [span("rejected", 0, 0, 2, 0.0)]
    chosen, rejected = tokenise_pair(kind, [SYSTEM, ASK, SAY, MORE], [LAST], [turn("assistant", "Yes")], spans=spans)
    assert trained(kind, chosen) == ["No.<|eot_id|>"]
    assert trained(kind, rejected) == ["s<|eot_id|>"]
    (ids,) = conversation_ids(kind, [[SYSTEM, ASK, SAY, MORE]], prompt=True)
    assert isinstance(ids, np.ndarray)
    prompt = len(ids)
    assert (chosen.ids[:prompt] == rejected.ids[:prompt]).all() and not chosen.weights[:prompt].any()
    with pytest.raises(HouseError, match="chosen has no assistant turn"):
        tokenise_pair(kind, [ASK], [MORE], [LAST])


def rows() -> pa.Table:
    base = {"row_id": "a", "content_id": "c", "source": "s", "position": 0}
    sft = base | {"messages": [message("user", "hi"), message("assistant", "yo"), message("user", "so?")]}
    pair = base | {"row_id": "b", "messages": [message("user", "hi")]}
    pair |= {"chosen": [message("assistant", "good")], "rejected": [message("assistant", "bad")]}
    return table([sft, pair, base | {"row_id": "d", "messages": [message("user", "hm")]}, base | {"text": "raw"}])


def test_rows_equal_the_same_conversations_one_by_one() -> None:
    kind = tokenizer(CHATML)
    got = tokenise_rows(kind, rows().slice(0, 1).select(["row_id", "messages", "tools", "spans"]))
    (expected,) = tokenise_messages(kind, [turn("user", "hi"), turn("assistant", "yo")])
    assert got[0][0].ids.tolist() == expected.ids.tolist()
    assert got[0][0].weights.tolist() == expected.weights.tolist()
    pairs = rows().slice(1, 1).rename_columns({"messages": "prompt"})
    ((chosen, rejected),) = tokenise_pairs(kind, pairs)
    assert (trained(kind, chosen), trained(kind, rejected)) == (["good<|im_end|>"], ["bad<|im_end|>"])
    assert tokenise_rows(kind, rows().slice(0, 0)) == []


def test_a_refused_row_is_named() -> None:
    strict = "{% for m in messages %}{% if m.content == 'yo' %}{{ raise_exception('no yo') }}{% endif %}{% endfor %}"
    with pytest.raises(HouseError, match=r"row a, turn 1: .*no yo"):
        tokenise_rows(tokenizer(strict + CHATML), rows().slice(0, 1))


def test_responses_of_every_kind_of_row() -> None:
    kind = tokenizer(CHATML)
    first, second, third, fourth = tokenise_responses(kind, rows())
    assert isinstance(first, Tokens) and trained(kind, first) == ["yo<|im_end|>"]
    assert isinstance(second, Tokens) and trained(kind, second) == ["good<|im_end|>"]
    assert isinstance(third, HouseError) and isinstance(fourth, HouseError)


def test_texts_are_trained_whole_and_end() -> None:
    kind = tokenizer(CHATML)
    (tokens,) = tokenise_texts(kind, ["ab"])
    assert tokens.ids.tolist() == [
        kind.bos_token_id,
        *kind("ab", add_special_tokens=False)["input_ids"],
        kind.eos_token_id,
    ]
    assert tokens.weights.tolist() == [0, 1, 1, 1]


def test_prompts_and_tools() -> None:
    kind = tokenizer("{% if tools %}<{{ tools[0].name }}>{% endif %}" + CHATML)
    (ids,) = conversation_ids(kind, [[ASK]], prompt=True)
    assert isinstance(ids, np.ndarray) and kind.decode(ids.tolist()).endswith("<|im_start|>assistant\n")
    (tokens,) = tokenise_messages(kind, [ASK, SAY], tools=[{"name": "look"}])
    assert kind.decode(tokens.ids.tolist()).startswith("<look>") and trained(kind, tokens) == ["Zwölf 🎉.<|im_end|>"]
