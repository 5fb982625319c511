"""What every maker that asks a model shares: prompts that lie as files beside it, requests of which each is accounted
for, and rows that say where they come from.

A `Session` is one maker at work on one corpus. It asks, hands out answers as they come, and counts: asked = answered +
failed (by kind); answered = parsed + unparsed (by reason); of what was parsed, rows are made or refused (by reason).
What a verifier asks of a model itself is counted apart (`judged`), where it gets the session's `tools`. The counts go
into the step's record, and a maker that made nothing says why in a warning.
"""

import json
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from copy import copy
from dataclasses import asdict, dataclass, field
from functools import cache
from pathlib import Path
from string import Formatter
from typing import Any, cast

from .asking import seed_of
from .door import ChatAnswer, ChatError, ChatModel, ChatRequest, Requests, Sampling, StreamingChat
from .folder import HouseError
from .rows import Row, digest, made_row
from .steps import Corpus, Tools
from .verifying import Bench

PROMPTS = Path(__file__).with_name("prompts")
TURN = "\n---\n"  # between the system turn and the user turn of a prompt's file, where it has both


@dataclass(frozen=True)
class Prompt:
    """A prompt as its file curation/prompts/NAME.md has it: {placeholders}, and a system turn above a line `---`."""

    name: str
    text: str

    @property
    def digest(self) -> str:
        return digest("prompt", self.text)

    def turns(self, **values: object) -> tuple[tuple[str, str], ...]:
        """The conversation to send, every placeholder filled. Values are put in as they are: braces in them stay."""
        wanted = {name for _, name, _, _ in Formatter().parse(self.text) if name is not None}
        if wanted != values.keys():
            raise ValueError(f"prompt {self.name} has the placeholders {sorted(wanted)}, given {sorted(values)}")
        said = [part.strip().format(**values) for part in self.text.split(TURN)]
        return tuple(zip(("system", "user") if len(said) == 2 else ("user",), said, strict=True))


@cache
def prompt(name: str) -> Prompt:
    """The prompt of curation/prompts/NAME.md."""
    path = PROMPTS / f"{name}.md"
    if not path.is_file():
        raise HouseError(f"no prompt {name!r}: {path} is missing from this installation")
    return Prompt(name, path.read_text(encoding="utf-8"))


@dataclass(frozen=True)
class Ask:
    """One request with what its answer is for. parents: row_ids that it is made from. about: anything that the maker
    wants back with the answer."""

    request: ChatRequest
    prompt: Prompt | None
    parents: tuple[str, ...] = ()
    about: Any = None


@dataclass
class Tally(Requests):
    """What became of every request of one maker, and of what was parsed out of the answers."""

    verified: int = 0
    refused: Counter[str] = field(default_factory=Counter)  # by reason: what a verifier or an elimination turned down
    made: int = 0


class Session:
    """One maker at work. Use as a context manager: at its end the tally is recorded."""

    def __init__(self, maker: object, corpus: Corpus, model: str, source: str) -> None:
        """maker: the dataclass, whose repr rows carry. model: by its name in the recipe. source: of the rows."""
        self.maker, self.corpus, self.source = maker, corpus, source
        self.chat: ChatModel = corpus.tools.chat(model)
        self.tally = Tally()
        self._bench = Bench(corpus.tools)

    @property
    def tools(self) -> Tools:
        """What a verifier of this session is given: the corpus's tools, by which what it asks is counted."""
        return cast(Tools, self._bench)

    def beside(self, model: str) -> "Session":
        """The same session, with its tally, asking another model of the recipe: a judge, or a second author."""
        other = copy(self)
        other.chat = self.corpus.tools.chat(model)
        return other

    def __enter__(self) -> "Session":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is not None:
            return
        told = self.tally.record() | {"model": self.chat.name, "licence": self.chat.licence}
        judged = self._bench.requests
        if judged.asked:
            told["judged"] = judged.record() | {"model": ", ".join(sorted(self._bench.models))}
        self.corpus.record(synthesis=told)
        name = type(self.maker).__name__
        unheard = {f"judge_{kind}": count for kind, count in judged.failed.items()}
        lost = {**self.tally.failed, **self.tally.unparsed, **self.tally.refused, **unheard}
        if not self.tally.made:
            why = ", ".join(f"{count} {reason}" for reason, count in sorted(lost.items()))
            warnings.warn(f"{name} made no row: {self.tally.asked} requests; {why or 'nothing to ask'}", stacklevel=2)
            return
        for whose, counts in (("", self.tally), (" of its judge", judged)):
            if counts.failed:
                kinds = ", ".join(f"{count} {kind}" for kind, count in sorted(counts.failed.items()))
                warnings.warn(f"{name}: {kinds} of {counts.asked} requests{whose} failed", stacklevel=2)

    def ask(self, asks: Sequence[Ask]) -> Iterator[tuple[Ask, ChatAnswer]]:
        """Answers with their requests, in the order of `asks`; failures are counted. Empty answers are handed out: what
        they are worth is the maker's to say (`unparsed`)."""
        found: dict[int, ChatAnswer | ChatError] = {}
        next_place = 0
        for place, answer in self._answers(asks):
            self.tally.count(answer, self.chat.price)
            found[place] = answer
            self.corpus.progress(self.tally.answered + self.tally.failed.total(), self.tally.asked)
            while next_place in found:  # in order, whatever came first: rows must not depend on a server's haste
                ready = found.pop(next_place)
                if isinstance(ready, ChatAnswer):
                    yield asks[next_place], ready
                next_place += 1

    def _answers(self, asks: Sequence[Ask]) -> Iterable[tuple[int, ChatAnswer | ChatError]]:
        self.tally.asked += len(asks)
        requests = [ask.request for ask in asks]
        if not requests:
            return ()
        if isinstance(self.chat, StreamingChat):
            return self.chat.stream(requests)
        return enumerate(self.chat.complete(requests, self.corpus.progress))

    def unparsed(self, reason: str) -> None:
        """Counts an answer that says nothing usable."""
        self.tally.unparsed[reason] += 1

    def refused(self, reason: str) -> None:
        """Counts what was parsed, and then turned down by a verifier or an elimination."""
        self.tally.refused[reason] += 1

    def row(self, ask: Ask, answer: ChatAnswer | None, meta: Mapping[str, Any] | None = None, **content: Any) -> Row:
        """A made row with its whole origin: parents, and in `meta` the prompt's name and digest, model, its digest and
        licence, sampling and seed, beside what the maker says in `meta`. Counted as made."""
        said = dict(meta or {}) | {"made": self.origin(ask, answer)}
        made = made_row(repr(self.maker), ask.parents, self.tally.made, self.source, meta=_json(said), **content)
        self.tally.made += 1
        return made

    def origin(self, ask: Ask, answer: ChatAnswer | None) -> dict[str, Any]:
        """Where an answer comes from, as made rows state it: model, its digest and licence, prompt, sampling, seed."""
        request = ask.request
        origin: dict[str, Any] = {
            "maker": type(self.maker).__name__,
            "model": self.chat.name,
            "model_digest": self.chat.digest,
            "licence": self.chat.licence,
            "prompt": None if ask.prompt is None else ask.prompt.name,
            "prompt_digest": None if ask.prompt is None else ask.prompt.digest,
            "sampling": {name: value for name, value in asdict(request.sampling).items() if value not in ((), None)},
            "seed": request.seed,
        }
        return origin if answer is None else origin | {"finished": answer.finished, "tokens": answer.tokens}


def _json(value: Mapping[str, Any]) -> str:
    return json.dumps(value, ensure_ascii=False, sort_keys=True)


def sampling_of(maker: Any) -> Sampling:
    """How a maker with these fields samples."""
    return Sampling(temperature=maker.temperature, top_p=maker.top_p, max_tokens=maker.max_tokens)


def asking(
    prompt: Prompt | None,
    turns: tuple[tuple[str, str], ...],
    sampling: Sampling,
    seed: Sequence[object],
    parents: Sequence[str] = (),
    about: Any = None,
) -> Ask:
    """An Ask whose seed is a hash of `seed` (the maker's own, the parents, which try), so that its answer depends on no
    other request."""
    return Ask(ChatRequest(turns, seed_of(*seed), sampling), prompt, tuple(parents), about)
