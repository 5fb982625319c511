"""Generation against transformers' own, sampling against its distribution, and answers independent of their batch."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from gristmill.curation.door import ChatAnswer, ChatError, ChatModel, ChatRequest, Sampling
from gristmill.curation.folder import HouseError
from gristmill.tuning.generate import TransformersChat, sample, stopped
from gristmill.tuning.models import make_model
from gristmill.tuning.settings import NewModel

GREEDY = Sampling(temperature=0.0, max_tokens=24, logprobs=True)
WARM = Sampling(temperature=0.9, top_p=0.9, max_tokens=16)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("generate") / "model"
    turns = [(f"say {number}", f"{number} it is") for number in range(99)]
    corpus = [[{"role": "user", "content": a}, {"role": "assistant", "content": b}] for a, b in turns]
    make_model(made, NewModel(params="60K", vocab=300, context=96, tokens=15_000, learning_rate=1e-2), iter(corpus))
    return made


@pytest.fixture(scope="module")
def chat(folder: Path) -> ChatModel:
    return TransformersChat(folder, batch=5)


def ask(text: str, seed: int = 0, sampling: Sampling = WARM) -> ChatRequest:
    return ChatRequest((("user", text),), seed, sampling)


def answers(chat: ChatModel, requests: list[ChatRequest]) -> list[ChatAnswer]:
    got = chat.complete(requests)
    assert all(isinstance(one, ChatAnswer) for one in got)
    return [one for one in got if isinstance(one, ChatAnswer)]


def test_greedy_answers_are_those_of_transformers(folder: Path, chat: ChatModel) -> None:
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder)
    prompts = ["say 4", "say 55 and then say it again", "what?", "say 4 " * 9, "s", "", "say 17"]
    got = answers(chat, [ask(text, sampling=GREEDY) for text in prompts])
    assert any(one.finished for one in got)
    for text, one in zip(prompts, got, strict=True):
        ids = tokenizer.apply_chat_template(
            [{"role": "user", "content": text}], add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        whole = model.generate(**ids, do_sample=False, temperature=None, top_p=None, max_new_tokens=24)[0]
        new = whole[ids["input_ids"].shape[1] :]
        assert one.text == tokenizer.decode(new, skip_special_tokens=True)
        assert (one.prompt_tokens, one.tokens) == (ids["input_ids"].shape[1], len(new))
        assert one.finished == (new[-1] == tokenizer.eos_token_id)
        with torch.no_grad():
            logps = model(whole[None]).logits[0, -len(new) - 1 : -1].log_softmax(-1).gather(1, new[:, None])[:, 0]
        assert one.logprobs == pytest.approx(logps.tolist(), abs=2e-5)


def test_options_have_the_probabilities_of_the_answers_first_token(folder: Path, chat: ChatModel) -> None:
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder)
    options = ("1", "2", "6")
    asked = [ask(text, sampling=Sampling(0.0, 1.0, 3, options=options)) for text in ("say 4", "which of them is it?")]
    for request, one in zip(asked, answers(chat, [*asked, ask("none")]), strict=False):
        messages = [{"role": "user", "content": request.messages[0][1]}]
        ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
        with torch.no_grad():
            logps = model(**ids).logits[0, -1].log_softmax(-1)
        wanted = [logps[tokenizer(option, add_special_tokens=False)["input_ids"][0]].item() for option in options]
        assert one.options == pytest.approx(wanted, abs=2e-5)
    alike = answers(chat, [ask("say 4", sampling=Sampling(options=("1", "12 34"))), ask("say 4")])
    assert [one.options for one in alike] == [None, None]


def test_an_answer_does_not_depend_on_its_batch(folder: Path, chat: ChatModel) -> None:
    requests = [ask(f"say {seed} " * (1 + seed % 4), seed) for seed in range(12)]
    together = answers(chat, requests)
    backwards = answers(chat, requests[::-1])[::-1]
    alone = [answers(TransformersChat(folder, batch=1), [request])[0] for request in requests]
    assert together == backwards == alone
    assert len({one.text for one in together}) > 6


def test_seeds_alone_tell_answers_apart(chat: ChatModel) -> None:
    hot = Sampling(temperature=1.5, top_p=1.0, max_tokens=16)
    got = answers(chat, [ask("say 4", seed, hot) for seed in (1, 1, 2, -3, 2**70)])
    assert got[0] == got[1]
    assert len({one.text for one in got}) == 4


def test_limits_and_errors_harm_no_other_request(chat: ChatModel) -> None:
    narrator = ChatRequest((("narrator", "?"),), 0, GREEDY)
    requests = [
        ask("say 4", sampling=GREEDY),
        ask("say 4 " * 60, sampling=GREEDY),
        narrator,
        ask("say 4", sampling=Sampling(max_tokens=0)),
        ask("say 4", sampling=Sampling(temperature=5.0, top_p=1.0, max_tokens=3)),
    ]
    requests.append(ask("\ud800"))
    fine, long, refused, none, short, torn = chat.complete(requests)
    assert isinstance(fine, ChatAnswer) and fine.text == answers(chat, requests[:1])[0].text
    assert isinstance(long, ChatError) and long.kind == "too_long" and "context of 96" in long.detail
    assert isinstance(refused, ChatError) and refused.kind == "refused" and "unknown role narrator" in refused.detail
    assert isinstance(torn, ChatError) and torn.kind == "refused" and "surrogates" in torn.detail
    assert none == ChatAnswer("", fine.prompt_tokens, 0, False)
    assert isinstance(short, ChatAnswer) and short.tokens <= 3 and short.logprobs is None


def test_the_context_ends_an_answer(chat: ChatModel) -> None:
    endless = Sampling(temperature=50.0, top_p=1.0, max_tokens=10_000)
    for seed in range(3):
        (one,) = answers(chat, [ask("say 4", seed, endless)])
        assert one.finished or one.prompt_tokens + one.tokens == 96


def worded(one: ChatAnswer) -> ChatAnswer:
    """Without what rounding may change from batch to batch."""
    return replace(one, logprobs=None)


def test_a_stop_text_ends_an_answer_and_no_other(chat: ChatModel) -> None:
    whole = answers(chat, [ask(f"say {n}", n, GREEDY if n % 2 else WARM) for n in range(12)])
    asked: list[ChatRequest] = []
    for n, one in enumerate(whole):  # a third as it was, a third with a stop text that comes, a third with several
        middle = one.text[len(one.text) // 2 :]
        stop = ((), (middle[:2],), ("never said", middle[:1], middle))[n % 3]
        asked.append(ask(f"say {n}", n, replace(GREEDY if n % 2 else WARM, stop=stop)))
    shorter = 0
    for request, one, full in zip(asked, answers(chat, asked), whole, strict=True):
        stop = [text for text in request.sampling.stop if text in full.text]
        if not stop:
            assert worded(one) == worded(full)
            continue
        assert full.text.startswith(one.text) and one.finished and not any(text in one.text for text in stop)
        assert full.text.startswith(tuple(one.text + text for text in stop))
        assert one.tokens <= full.tokens and one.prompt_tokens == full.prompt_tokens
        if request.sampling.logprobs:
            assert full.logprobs is not None and one.logprobs is not None and len(one.logprobs) == one.tokens
            assert one.logprobs == pytest.approx(full.logprobs[: one.tokens], abs=1e-5)
        cut = [replace(request, sampling=replace(request.sampling, max_tokens=one.tokens - less)) for less in (0, 1)]
        at_limit, before = answers(chat, cut)
        assert worded(at_limit) == worded(one) and (before.tokens, before.finished) == (one.tokens - 1, False)
        shorter += one.tokens < full.tokens
    assert shorter > 3
    refused, fine = chat.complete([replace(asked[0], sampling=Sampling(stop=("a", ""))), asked[1]])
    assert isinstance(refused, ChatError) and refused.kind == "refused" and isinstance(fine, ChatAnswer)


class Dictated(TransformersChat):
    """Says what it is told to, token by token."""

    ids: tuple[int, ...] = ()

    def _step(self, group: Sequence[Any], logits: torch.Tensor, step: int) -> torch.Tensor:
        for live in group:
            live.tokens.append(self.ids[step])
        return torch.full((len(group),), self.ids[step])


def test_every_stop_text_is_seen_when_its_last_token_comes(folder: Path) -> None:
    chat, tokenizer = Dictated(folder), AutoTokenizer.from_pretrained(folder)
    special = next(one for one in tokenizer.all_special_ids if one not in chat._ends)
    text = "Naïve: «日本» 🙂 say it, say it."
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    chat.ids = (*ids[:9], special, special, *ids[9:], tokenizer.eos_token_id)
    assert len(chat.ids) < 80
    stops = sorted({text[at : at + size] for size in (1, 2, 5) for at in range(len(text) - size + 1)})
    got = answers(chat, [ask("s", sampling=Sampling(max_tokens=90, stop=(stop, "unsaid"))) for stop in stops])
    for stop, one in zip(stops, got, strict=True):
        texts = [tokenizer.decode(chat.ids[:count], skip_special_tokens=True) for count in range(len(chat.ids))]
        first = next(count for count, said in enumerate(texts) if stop in said)
        assert (one.text, one.tokens, one.finished) == (text[: text.index(stop)], first, True)
    (unstopped,) = answers(chat, [ask("s", sampling=Sampling(max_tokens=90, stop=("unsaid",)))])
    assert (unstopped.text, unstopped.tokens, unstopped.finished) == (text, len(chat.ids), True)


def test_the_stop_text_that_is_complete_first_ends_the_text() -> None:
    assert stopped("xabc", ("abc", "b")) == 2 and stopped("xabc", ("d", "abc")) == 1
    assert stopped("xab", ("ab", "b")) == 1 and stopped("xab", ("b", "ab")) == 2
    assert stopped("xab", ("c",)) is None and stopped("xab", ()) is None


def test_progress_and_the_empty_list(chat: ChatModel) -> None:
    seen: list[tuple[int, int]] = []
    chat.complete([ask("say 1", seed) for seed in range(7)], lambda *at: seen.append(at))
    assert seen == [(5, 7), (7, 7)]
    assert chat.complete([]) == []
    with pytest.raises(HouseError, match="batch of 0"):
        TransformersChat(Path("none"), batch=0)


def test_the_adapter_speaks(folder: Path, chat: ChatModel, tmp_path: Path) -> None:
    from gristmill.tuning.lora import add_lora, save_adapter
    from gristmill.tuning.models import load_model
    from gristmill.tuning.settings import Lora

    model, settings = load_model(folder), Lora(rank=2, base="nf4")
    add_lora(model, settings, seed=0)
    torch.manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(".B"):
                parameter.normal_(std=0.3)
    save_adapter(model, tmp_path / "adapter", settings, str(folder))
    tuned = TransformersChat(folder, tmp_path / "adapter")
    assert tuned.digest.startswith(chat.digest) and tuned.digest != chat.digest
    requests = [ask(f"say {n}", sampling=GREEDY) for n in range(3)]
    assert answers(tuned, requests) != answers(chat, requests)


def many(logits: list[float], temperature: float, top_p: float) -> np.ndarray:
    """Shares of the tokens over evenly spread draws: the distribution itself, but for 1 part in 10,000."""
    draws = (torch.arange(10_000, dtype=torch.float64) + 0.5) / 10_000
    full = torch.full_like(draws, temperature), torch.full_like(draws, top_p)
    tokens = sample(torch.tensor(logits).expand(10_000, -1), *full, draws)
    return np.bincount(tokens.numpy(), minlength=len(logits)) / 10_000


def test_sampling_follows_temperature_and_nucleus() -> None:
    probs = np.asarray([0.1, 0.5, 0.15, 0.25])
    logits = np.log(probs).tolist()
    assert many(logits, 1.0, 1.0) == pytest.approx(probs, abs=2e-4)
    hot = probs ** (1 / 2) / (probs ** (1 / 2)).sum()
    assert many(logits, 2.0, 1.0) == pytest.approx(hot, abs=2e-4)
    assert many(logits, 1.0, 0.7) == pytest.approx([0, 2 / 3, 0, 1 / 3], abs=2e-4)
    assert many(logits, 1.0, 0.8) == pytest.approx([0, 0.5 / 0.9, 0.15 / 0.9, 0.25 / 0.9], abs=2e-4)
    assert many(logits, 1.0, 0.0) == pytest.approx([0, 1, 0, 0])
    assert many(logits, 0.0, 1.0) == pytest.approx([0, 1, 0, 0])


def test_rows_of_one_batch_keep_their_own_settings() -> None:
    logits = torch.log(torch.tensor([[0.1, 0.5, 0.15, 0.25]])).expand(3, -1)
    settings = torch.tensor([[0.0, 1.0], [1.0, 1.0], [1.0, 0.5]], dtype=torch.float64)
    tokens = sample(logits, settings[:, 0], settings[:, 1], torch.full((3,), 0.999, dtype=torch.float64))
    assert tokens.tolist() == [1, 3, 1]
