"""Answers of a small local model: the ChatModel for which nothing beyond transformers is needed.

Requests run in batches sorted by prompt length, with a KV cache of their own; answers that have ended, by their own
token, at a text of the request's `stop` or at their limit, leave the batch.
Each request draws from a generator of its own, seeded by it alone, so that its random numbers do not depend on its
batch. What remains is floating point: left padding and the batch's matrix sizes change logits in their last bits, which
turns a draw only where it falls within about 1e-6 of the border between two tokens (greedy: where two logits tie so).
The same requests with the same batch size and thread count give the same answers.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor
from transformers import DynamicCache

from ..curation.door import ChatAnswer, ChatError, ChatRequest, Progress, Sampling
from ..curation.folder import HouseError
from .chat import conversation_ids
from .digests import model_digest
from .forward import context_of
from .lora import unpack
from .models import load_model, load_tokenizer

MARGIN = 16  # tokens before those of a stop text that are read with them, as a text's first tokens may read otherwise


@dataclass
class _Live:
    """One request under way."""

    place: int  # in the order of the requests
    prompt: list[int]
    limit: int  # new tokens at most
    draws: Tensor  # (limit,) fp64 uniform in [0, 1)
    sampling: Sampling
    options: list[int] = field(default_factory=list)  # first tokens of sampling.options
    tokens: list[int] = field(default_factory=list)
    logps: list[float] = field(default_factory=list)
    told: tuple[float, ...] = ()  # log-probabilities of `options`


class TransformersChat:
    """ChatModel by transformers: sampling in batches with a KV cache, on the CPU or one GPU."""

    def __init__(
        self,
        model: Path,
        adapter: Path | None = None,
        *,
        batch: int = 64,
        dtype: str = "auto",
        device: str | None = None,
    ) -> None:
        """model: folder of the model; adapter: folder of a LoRA adapter on it; batch: requests under way at once."""
        if batch < 1:
            raise HouseError(f"a batch of {batch} requests generates nothing; give at least 1")
        self.name = str(model) if adapter is None else f"{model} + {adapter}"
        self.digest = model_digest(model) + ("" if adapter is None else "+" + model_digest(adapter))
        self.licence, self.price = "unknown", (0.0, 0.0)
        self._batch = batch
        self._tokenizer = load_tokenizer(model)
        self._model: Any = load_model(model, dtype=dtype, device=device, adapter=adapter)
        if adapter is not None:
            unpack(self._model)
        self._model.set_attn_implementation("sdpa")  # per-document attention keeps no cache
        self._context = context_of(self._model.config)
        self._ends = _end_tokens(self._model, self._tokenizer.eos_token_id)

    def complete(
        self, requests: Sequence[ChatRequest], progress: Progress | None = None
    ) -> list[ChatAnswer | ChatError]:
        """One answer or error per request, in order.

        Errors: `too_long` (the prompt fills the model's context), `refused` (by the chat template, in its words). A
        limit beyond the context's end is cut to it. `tokens` and `logprobs` count what was generated: the end-of-turn
        token, and those of a stop text; log-probabilities are the model's own, before temperature and nucleus. A text
        of `stop` ends an answer, which is then finished, and is not part of it; an empty one is refused."""
        results: list[ChatAnswer | ChatError | None] = [None] * len(requests)
        conversations = ([{"role": role, "content": text} for role, text in r.messages] for r in requests)
        waiting = []
        for place, ids in enumerate(conversation_ids(self._tokenizer, conversations, prompt=True)):
            ready = self._admit(place, requests[place], ids)
            if isinstance(ready, _Live):
                waiting.append(ready)
            else:
                results[place] = ready
        waiting.sort(key=lambda live: (len(live.prompt), live.limit))
        done = len(requests) - len(waiting)
        for start in range(0, len(waiting), self._batch):
            group = waiting[start : start + self._batch]
            with torch.inference_mode():
                self._generate(group)
            for live in group:
                results[live.place] = self._answer(live)
            done += len(group)
            if progress is not None:
                progress(done, len(requests))
        return cast(list[ChatAnswer | ChatError], results)

    def _admit(self, place: int, request: ChatRequest, ids: Any) -> _Live | ChatAnswer | ChatError:
        if isinstance(ids, HouseError):
            return ChatError("refused", str(ids))
        if not len(ids):
            return ChatError("refused", "the chat template renders this conversation as nothing")
        if not all(request.sampling.stop):
            return ChatError("refused", "an empty text in `stop` would end every answer before it begins")
        sampling, room = request.sampling, new_tokens(request.sampling, len(ids), self._context)
        if not isinstance(room, int):
            return room
        generator = torch.Generator().manual_seed(request.seed % 2**63)
        draws = torch.rand(room, generator=generator, dtype=torch.float64)
        return _Live(place, ids.tolist(), room, draws, sampling, first_tokens(self._tokenizer, sampling.options))

    def _generate(self, group: list[_Live]) -> None:
        """Fills `tokens` and `logps` of every request of the group."""
        device = self._model.device
        longest = max(len(live.prompt) for live in group)
        lacks = torch.tensor([longest - len(live.prompt) for live in group], device=device)
        rows = [[0] * (longest - len(live.prompt)) + live.prompt for live in group]
        inputs = torch.tensor(rows, device=device)
        places = torch.arange(longest, device=device)[None]
        mask = (places >= lacks[:, None]).long()
        positions = (places - lacks[:, None]).clamp_(min=0)
        cache = DynamicCache()
        for step in range(max(live.limit for live in group)):
            output = self._model(
                input_ids=inputs,
                attention_mask=mask if bool(lacks.any()) else None,
                position_ids=positions,
                past_key_values=cache,
                use_cache=True,
                logits_to_keep=1,
            )
            tokens = self._step(group, output.logits[:, -1].float(), step)
            keep = [i for i, live in enumerate(group) if not self._over(live)]
            if not keep:
                return
            inputs, positions = tokens[:, None], positions[:, -1:] + 1
            mask = torch.cat([mask, mask.new_ones(len(group), 1)], dim=1)
            if len(keep) < len(group):
                group, kept = [group[i] for i in keep], torch.tensor(keep, device=device)
                inputs, positions, mask, lacks = inputs[kept], positions[kept], mask[kept], lacks[kept]
                cache.batch_select_indices(kept)

    def _step(self, group: Sequence[_Live], logits: Tensor, step: int) -> Tensor:
        """The next token of every request, appended to it."""
        wanted = [(live.sampling.temperature, live.sampling.top_p) for live in group]
        temperature, top_p = torch.tensor(wanted, dtype=torch.float64).T
        draws = torch.stack([live.draws[step] for live in group])
        tokens = sample(logits, temperature, top_p, draws)
        if any(live.sampling.logprobs for live in group):
            logps = logits.log_softmax(-1).gather(1, tokens[:, None])[:, 0].tolist()
            for live, logp in zip(group, logps, strict=True):
                live.logps.append(logp)
        if step == 0 and any(live.options for live in group):
            for live, told in zip(group, logits.log_softmax(-1), strict=True):
                live.told = tuple(told[live.options].tolist())
        for live, token in zip(group, tokens.tolist(), strict=True):
            live.tokens.append(token)
        return tokens

    def _over(self, live: _Live) -> bool:
        """Whether the newest token ended the answer. Where there are stop texts, the last tokens tell whether it can
        have completed one: each holds at least a quarter of a character, but for the special ones."""
        if live.tokens[-1] in self._ends or len(live.tokens) >= live.limit:
            return True
        stops = live.sampling.stop
        if not stops:
            return False
        last = live.tokens[-4 * max(map(len, stops)) - MARGIN :]
        return stopped(self._text(last), stops) is not None and stopped(self._text(live.tokens), stops) is not None

    def _text(self, tokens: list[int]) -> str:
        return str(self._tokenizer.decode(tokens, skip_special_tokens=True))

    def _answer(self, live: _Live) -> ChatAnswer:
        ended = live.tokens[-1] in self._ends
        text = self._text(live.tokens[: len(live.tokens) - ended])
        end = stopped(text, live.sampling.stop)
        logps = tuple(live.logps) if live.sampling.logprobs else None
        finished = ended or end is not None
        return ChatAnswer(text[:end], len(live.prompt), len(live.tokens), finished, logps, live.told or None)


def new_tokens(sampling: Sampling, prompt: int, context: int | None) -> int | ChatAnswer | ChatError:
    """New tokens that a prompt of so many leaves room for, at least one; else what is said of it without asking."""
    room = sampling.max_tokens if context is None else min(sampling.max_tokens, context - prompt)
    if room <= 0 < sampling.max_tokens:
        return ChatError("too_long", f"a prompt of {prompt} tokens in a context of {context}")
    return room if room > 0 else ChatAnswer("", prompt, 0, False, () if sampling.logprobs else None)


def stopped(text: str, stops: Sequence[str]) -> int | None:
    """Where a text ends that the first of `stops` to be complete in it ends, as vLLM has it: of two that are complete
    at once, the one named first. None where none is in it."""
    found = [(at + len(stop), place, at) for place, stop in enumerate(stops) if (at := text.find(stop)) >= 0]
    return min(found)[2] if found else None


def first_tokens(tokenizer: Any, options: Sequence[str]) -> list[int]:
    """The first token of each option; none of them where two begin alike, so that nothing could tell them apart."""
    found = [tokenizer(option, add_special_tokens=False)["input_ids"][:1] for option in options]
    firsts = [token for ids in found for token in ids]
    return firsts if len(set(firsts)) == len(options) else []


def sample(logits: Tensor, temperature: Tensor, top_p: Tensor, draws: Tensor) -> Tensor:
    """One token (B,) for each row of fp32 logits (B, V) by inverting the nucleus' cumulative distribution at `draws`.

    temperature, top_p, draws: fp64 (B,). Temperature 0 is greedy. The nucleus holds the likeliest tokens up to the one
    that brings their sum to top_p (arXiv 1904.09751), the likeliest always among them. The distribution runs in the
    order of token ids: in order of likelihood, rounding that swaps two equally likely tokens would change the draw.
    """
    temperature, top_p, draws = (value.to(logits.device)[:, None] for value in (temperature, top_p, draws))
    greedy = temperature <= 0
    best = logits.argmax(-1)
    if bool(greedy.all()):
        return best
    probs = torch.softmax(logits / torch.where(greedy, 1.0, temperature).float(), dim=-1)
    if bool((top_p < 1).any()):
        falling = _falling(probs)
        before = falling.double().cumsum(-1) - falling
        last = (before < top_p).sum(-1, keepdim=True).clamp_(min=1) - 1
        probs = torch.where((probs >= falling.gather(1, last)) | (top_p >= 1), probs, 0.0)
    sums = probs.double().cumsum(-1)
    chosen = torch.searchsorted(sums, draws * sums[:, -1:], right=True)
    chosen = torch.where(greedy | (chosen >= logits.shape[1]), best[:, None], chosen)  # draw * mass may round to mass
    return chosen[:, 0]


def _falling(probs: Tensor) -> Tensor:
    """Each row's values, largest first. numpy sorts floats by vector instructions: 64 rows of 4,096 in some 2 ms,
    torch's topk in 10."""
    if probs.device.type != "cpu":
        return probs.sort(dim=-1, descending=True).values
    return torch.from_numpy(np.sort(probs.numpy(), axis=-1)).flip(-1)


def _end_tokens(model: Any, own: int | None) -> frozenset[int]:
    """The tokenizer's EOS and whatever the model's generation config names besides."""
    named = getattr(model.generation_config, "eos_token_id", None)
    more = named if isinstance(named, list) else [named]
    return frozenset(token for token in (own, *more) if token is not None)
