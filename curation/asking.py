"""What measures say to a language model about a row, and how they hear its answers: never a failure as a number."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from .door import ChatAnswer, ChatModel, ChatRequest, Progress
from .rows import digest

Turns = tuple[tuple[str, str], ...]
RETRY_TEMPERATURE = 0.7  # of the second try; greedy again would say the same again


@dataclass(frozen=True)
class Exchange:
    """A row as a judge sees it: the turns before its response, as a chat request has them, and the response."""

    turns: Turns
    response: str

    @property
    def question(self) -> str:
        """The turns as one text: a lone user turn as it is, several with the name of who speaks."""
        if len(self.turns) == 1:
            return self.turns[0][1]
        return "\n\n".join(f"{role}: {content}" for role, content in self.turns)


def exchange(row: Mapping[str, Any], field: str = "chosen") -> Exchange | None:
    """The last assistant turn after all before it, of a preference row `field` (chosen or rejected) after its prompt;
    None where there is no prompt or no response."""
    turns = list(row["messages"] or ())
    if row["chosen"] is not None or row["rejected"] is not None:
        turns += row[field] or ()
    last = max((at for at, turn in enumerate(turns) if turn["role"] == "assistant"), default=0)
    said = tuple((turn["role"], turn["content"] or "") for turn in turns[:last])
    if not any(content.strip() for _, content in said) or not (turns[last]["content"] or "").strip():
        return None
    return Exchange(said, turns[last]["content"])


def seed_of(*pieces: object) -> int:
    """A request's seed: a hash of what it is about, so that an answer depends on no other row."""
    return int(digest(*map(str, pieces))[:8], 16)


def ask(
    chat: ChatModel,
    requests: Sequence[ChatRequest],
    read: Callable[[ChatAnswer], float | None],
    progress: Progress | None = None,
) -> list[float | None]:
    """What `read` makes of each answer; requests whose answer failed or could not be read are asked once more, with
    another seed and some temperature. None where that failed too."""
    found = _read(chat, requests, read, progress)
    unread = [place for place, value in enumerate(found) if value is None]
    second = [again(requests[place]) for place in unread]
    for place, value in zip(unread, _read(chat, second, read, progress), strict=True):
        found[place] = value
    return found


def again(request: ChatRequest) -> ChatRequest:
    """The request with another seed and some temperature: greedy again would say the same again."""
    sampling = replace(request.sampling, temperature=max(request.sampling.temperature, RETRY_TEMPERATURE))
    return replace(request, seed=seed_of("again", request.seed), sampling=sampling)


def _read(
    chat: ChatModel,
    requests: Sequence[ChatRequest],
    read: Callable[[ChatAnswer], float | None],
    progress: Progress | None,
) -> list[float | None]:
    answers = chat.complete(requests, progress) if requests else []
    return [read(answer) if isinstance(answer, ChatAnswer) else None for answer in answers]
