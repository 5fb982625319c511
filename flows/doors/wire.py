"""What an OpenAI-compatible server is sent, and what its answers mean. Pure functions: nothing here touches a network.

Servers differ in what they take. What a server refuses with a 400 is left out from then on (`lesson`): structured
output, log-probabilities, seeds, and `max_tokens` where only `max_completion_tokens` will do.
"""

import json
import math
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any

from ...curation.door import ChatAnswer, ChatError, ChatRequest, Progress

Told = tuple[int, ChatAnswer | ChatError]  # place of a request, and what came of it

TOP = 20  # the most likely first tokens that servers tell at most (OpenAI's limit and vLLM's default)
LONGEST_TOKEN = 8  # characters a token, on average, are fewer in any language: English has 4 to 5, code less
SHORTEST_TOKEN = 2  # bytes a token are more wherever byte-level BPE merged anything, digits and CJK included
RUN = re.compile(r"(.)\1{3,}", re.DOTALL)  # of one character: indents and rules, of which a token may hold 100
TURN_TOKENS = 16  # of a chat template around each turn, at most
SHOWN = 300  # characters of a server's own words in an error
FATAL = {401: "the key is not accepted", 402: "nothing is left on the account", 404: "no such model or address"}
AGAIN = {408, 409, 425, 429}
LESSONS = {  # what may be left out -> words of a refusal that name it
    "schema": ("response_format", "json_schema", "schema", "guided", "structured", "grammar"),
    "logprobs": ("logprobs", "top_logprobs"),
    "seed": ("seed",),
    "max_tokens": ("max_completion_tokens",),
    "sampling": ("temperature", "top_p"),
    "stop": ("'stop'", '"stop"', "`stop`"),
}
CONTEXT = re.compile(r"(?:maximum|max)[a-z ]*?(?:context|model|sequence)? ?length (?:is|of) (\d+)", re.IGNORECASE)
PROMPT = re.compile(
    r"(\d+) (?:in the messages|input tokens|prompt tokens|tokens in the prompt)|prompt \(length (\d+)\)", re.IGNORECASE
)
TOO_LONG = re.compile(
    r"context[_ ](?:length|window|size)|maximum model length|too many tokens|prompt is too long|too long", re.IGNORECASE
)


def in_order(told: Iterable[Told], count: int, progress: Progress | None) -> list[ChatAnswer | ChatError]:
    """What came of `count` requests, each told once in any order, by their places."""
    answers: dict[int, ChatAnswer | ChatError] = {}
    for place, answer in told:
        answers[place] = answer
        if progress is not None:
            progress(len(answers), count)
    return [answers[place] for place in range(count)]


@dataclass(frozen=True)
class Trouble:
    """One try that came to nothing. again: another may fare better, `after` that many seconds where the server said so.
    down: the server was not reached at all. fatal: no other request would fare better. room: new tokens that would
    have been left, where the prompt fits and the answer asked for does not."""

    error: ChatError
    again: bool = False
    after: float | None = None
    down: bool = False
    fatal: bool = False
    room: int | None = None


def body(request: ChatRequest, model: str, limit: int, without: Collection[str], extra: Mapping[str, Any]) -> bytes:
    """The request as JSON. limit: new tokens; without: keys of LESSONS that this server does not take. ValueError where
    the request's schema is no JSON."""
    sampling = request.sampling
    said: dict[str, Any] = {
        "model": model,
        "messages": [{"role": role, "content": content} for role, content in request.messages],
        "max_completion_tokens" if "max_tokens" in without else "max_tokens": limit,
    }
    if "sampling" not in without:
        said |= {"temperature": sampling.temperature, "top_p": sampling.top_p}
    if "seed" not in without:
        said["seed"] = request.seed
    if sampling.stop and "stop" not in without:
        said["stop"] = list(sampling.stop)
    if (sampling.logprobs or sampling.options) and "logprobs" not in without:
        said |= {"logprobs": True} | ({"top_logprobs": TOP} if sampling.options else {})
    if sampling.schema is not None and "schema" not in without:
        schema = {"name": "answer", "schema": json.loads(sampling.schema), "strict": True}
        said["response_format"] = {"type": "json_schema", "json_schema": schema}
    return json.dumps(said | dict(extra), ensure_ascii=False).encode()


def uses(request: ChatRequest) -> set[str]:
    """Keys of LESSONS that the request makes use of."""
    sampling = request.sampling
    wanted = {"schema": sampling.schema, "logprobs": sampling.logprobs or sampling.options, "stop": sampling.stop}
    return {"seed", "max_tokens", "sampling"} | {name for name, value in wanted.items() if value}


def lesson(request: ChatRequest, without: Collection[str], words: str) -> str | None:
    """What to leave out after a 400 that says `words`, or None where nothing would help."""
    low = words.lower()
    open_ones = [name for name in LESSONS if name in uses(request) and name not in without]
    named = [name for name in open_ones if any(word in low for word in LESSONS[name])]
    if named:
        return named[0]
    return "schema" if "schema" in open_ones else None


# ---- answers


def read_answer(payload: bytes, request: ChatRequest) -> ChatAnswer | Trouble:
    """The answer in the body of a 200. Malformed ones are worth another try: the next seldom is."""
    try:
        said = json.loads(payload)
    except (ValueError, RecursionError):
        return _malformed(f"{len(payload)} bytes that are no JSON")
    try:
        if "error" in said and not said.get("choices"):  # some proxies answer 200 and mean 500
            return Trouble(ChatError("server", shortened(json.dumps(said["error"]))), again=True)
        (choice,) = said["choices"]
        message = choice["message"]
        text, refusal = message.get("content"), message.get("refusal")
        if refusal and not text:
            return Trouble(ChatError("refused", shortened(f"by the model: {refusal}")))
        if not isinstance(text, str | None):
            return _malformed(f"content is {type(text).__name__}, not text")
        return _answer(said, choice, whole_characters(text or ""), request)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        return _malformed(f"no chat completion ({type(error).__name__}: {error})")


def _answer(
    said: Mapping[str, Any], choice: Mapping[str, Any], text: str, request: ChatRequest
) -> ChatAnswer | Trouble:
    sampling, usage = request.sampling, said.get("usage") or {}
    tokens = usage.get("completion_tokens")
    prompt_tokens = usage.get("prompt_tokens")
    told = (choice.get("logprobs") or {}).get("content")
    logprobs = tuple(float(token["logprob"]) for token in told) if told is not None else None
    if sampling.logprobs and logprobs is not None and tokens is not None and not 0 <= tokens - len(logprobs) <= 1:
        return _malformed(f"{len(logprobs)} log-probabilities for {tokens} tokens")
    options = (
        option_logprobs(sampling.options, told[0].get("top_logprobs") or ()) if sampling.options and told else None
    )
    answer = ChatAnswer(
        text,
        2 * least_tokens(request) if prompt_tokens is None else int(prompt_tokens),
        math.ceil(len(text.encode()) / 4) if tokens is None else int(tokens),
        choice.get("finish_reason") in ("stop", "eos"),
        logprobs if sampling.logprobs else None,
        options,
    )
    return answer if min(answer.prompt_tokens, answer.tokens) >= 0 else _malformed("a negative number of tokens")


def whole_characters(text: str) -> str:
    """`text` without halves of surrogate pairs, which JSON can say and no file can hold: U+FFFD stands for them."""
    try:
        text.encode()
        return text
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def option_logprobs(options: Sequence[str], top: Sequence[Mapping[str, Any]]) -> tuple[float, ...] | None:
    """Log-probability of each option as the first token, from the server's list of the likeliest; -inf for one that is
    not among them (less likely than all that are). None where no option is, or where one is not and begins with another
    (its own first token cannot be told from that one)."""
    found: dict[str, float] = {}
    for token in top:
        name = token["token"] if token["token"] in options else token["token"].strip()
        before = found.get(name, -math.inf)
        found[name] = max(before, token["logprob"]) + math.log1p(math.exp(-abs(before - token["logprob"])))
    lacking = [option for option in options if option not in found]
    vague = any(option.startswith(other) for option in lacking for other in options if other != option)
    if vague or len(lacking) == len(options):
        return None
    return tuple(found.get(option, -math.inf) for option in options)


def _malformed(detail: str) -> Trouble:
    return Trouble(ChatError("malformed", detail), again=True)


# ---- refusals


def read_refusal(status: int, headers: Mapping[str, str], payload: bytes, url: str) -> Trouble:
    """What an answer other than 200 means."""
    words = shortened(words_of(payload))
    after = retry_after(headers.get("retry-after"))
    if status == 429:
        spent = "insufficient_quota" in words
        return Trouble(ChatError("rate_limited", f"429: {words}"), again=not spent, after=after, fatal=spent)
    if status >= 500 or status in AGAIN:
        return Trouble(ChatError("timeout" if status == 408 else "server", f"{status}: {words}"), True, after)
    if status in FATAL:
        return Trouble(ChatError("refused", f"{status} from {url}, {FATAL[status]}: {words}"), fatal=True)
    if 300 <= status < 400:
        said = f"{status} from {url}, it redirects to {headers.get('location', 'another address')}: mend the url"
        return Trouble(ChatError("refused", said), fatal=True)
    if status in (400, 413, 422) and (status == 413 or TOO_LONG.search(words)):
        return Trouble(ChatError("too_long", words), room=_room(words))
    return Trouble(ChatError("refused", f"{status}: {words}"))


def _room(words: str) -> int | None:
    context, prompt = CONTEXT.search(words), PROMPT.search(words)
    if context is None or prompt is None:
        return None
    room = int(context[1]) - int(prompt[1] or prompt[2])
    return room if room > 0 else None


def words_of(payload: bytes) -> str:
    """The message in a server's error, however it is wrapped."""
    text = payload.decode("utf-8", "replace")
    try:
        said = json.loads(text)
    except (ValueError, RecursionError):
        return text.strip()
    while isinstance(said, dict):
        inner = next((said[key] for key in ("error", "message", "detail") if said.get(key)), None)
        if not isinstance(inner, dict):
            code = said.get("code") if isinstance(said.get("code"), str) else None
            return f"{inner or json.dumps(said)}" + (f" ({code})" if code else "")
        said = inner
    return str(said)


def shortened(words: str) -> str:
    words = " ".join(words.split())
    return words if len(words) <= SHOWN else words[: SHOWN - 1] + "…"


def retry_after(value: str | None) -> float | None:
    """Seconds from a Retry-After header: a number, or a date."""
    if value is None:
        return None
    try:
        return max(0.0, float(value))
    except ValueError:
        pass
    try:
        return max(0.0, (parsedate_to_datetime(value) - datetime.now(UTC)).total_seconds())
    except (TypeError, ValueError):
        return None


def scrubbed(trouble: Trouble, key: str | None) -> Trouble:
    """`trouble` without the key, which a server may have said back."""
    if not key or key not in trouble.error.detail:
        return trouble
    return replace(trouble, error=replace(trouble.error, detail=trouble.error.detail.replace(key, "***")))


# ---- lengths


def least_tokens(request: ChatRequest) -> int:
    """Tokens that the prompt has at least, whatever the tokenizer."""
    return sum(len(RUN.sub(r"\1", content)) for _, content in request.messages) // LONGEST_TOKEN


def most_tokens(request: ChatRequest) -> int:
    """Tokens that the prompt has at most, for limits that must hold before the server has counted."""
    return prompt_bytes(request) // SHORTEST_TOKEN + TURN_TOKENS * (len(request.messages) + 1)


def prompt_bytes(request: ChatRequest) -> int:
    return sum(len(content.encode("utf-8", "replace")) for _, content in request.messages)
