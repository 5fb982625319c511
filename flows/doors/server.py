"""A model behind any OpenAI-compatible server of chat completions: a ChatModel that streams.

Requests run in an event loop of a thread of its own, so that `stream` and `complete` are plain synchronous calls that
work beside a running loop; several threads may call them at once and share concurrency, limits and budget. A request
that has to wait before its next try gives its place to another. What each answer says depends on its request alone.
"""

import asyncio
import contextlib
import heapq
import math
import os
import queue
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import CancelledError
from dataclasses import dataclass, field
from itertools import count
from typing import Any
from urllib.parse import urlsplit

import httpx

from ...curation.door import ChatAnswer, ChatError, ChatRequest, Progress
from ...curation.folder import HouseError
from ...curation.rows import digest as digest_of
from . import wire
from .limits import Breaker, Pace, pause
from .settings import Budget, Price, Server
from .spend import Purse, Spend
from .wire import Told, Trouble, in_order

CONNECT = 10.0  # seconds
LOCAL = ("127.0.0.1", "localhost", "::1", "0.0.0.0")  # no proxy in between, whatever the environment names


@dataclass(frozen=True)
class Card:
    """What a server says of its model. context: tokens of prompt and answer, or None. digest: of its root (the weights'
    place or name) where it tells one, of its address and name besides."""

    model: str
    digest: str
    context: int | None


class _Halt(ChatError):
    """What fails every other request too."""


@dataclass(order=True)
class _Asked:
    """One request under way. due: when its next try may begin."""

    due: float
    order: int
    place: int = field(compare=False)
    request: ChatRequest = field(compare=False)
    began: float | None = field(compare=False, default=None)  # on the clock that stands still while the server is down
    tries: int = field(compare=False, default=0)
    limit: int | None = field(compare=False, default=None)  # new tokens, where the context leaves fewer than asked for
    without: frozenset[str] = field(compare=False, default=frozenset())


class ServerChat:
    """ChatModel by a server. name: the model's, as the server calls it.

    Every retriable failure (429, 5xx, timeouts, connections refused, reset or cut, answers that are no chat completion)
    is tried again until `retries` or the deadline are used up, then told as ChatError. 401, 402, 404, a redirection, a
    quota that is used up and a server that stays down stop the rest: no other request would fare better. What a server
    refuses of a request's extras with a 400 (structured output, log-probabilities, seed) is left out from then on.
    """

    def __init__(
        self,
        settings: Server,
        card: Card | None = None,
        *,
        licence: str = "unknown",
        price: Price = (0.0, 0.0),
        budget: Budget | None = None,
        spend: Spend | None = None,
        halts: bool = False,
    ) -> None:
        """card: what `look` found (asked now where None). spend: counts tries and busy time, and knows what earlier
        starts of the run have spent. halts: what stops the rest is no error of the requests that are left, it is raised
        as HouseError when all that was under way has come; for callers that keep answers and can be started again.
        Raises HouseError where the key's variable is not set or no server answers."""
        self._key = key_of(settings)
        card = look(settings) if card is None else card
        self.settings, self.licence, self.price = settings, licence, price
        self.name, self.digest, self.context = card.model, card.digest, settings.context or card.context
        self.spend = Spend(price) if spend is None else spend
        self._purse = Purse(budget, price, *self.spend.before)
        self._breaker = Breaker(settings.concurrency, settings.patience)
        self._requests, self._tokens = Pace(settings.requests_per_minute), Pace(settings.tokens_per_minute)
        self._slots = asyncio.Semaphore(settings.concurrency)
        self._without: frozenset[str] = frozenset()  # what this server was found not to take
        self._halts = halts
        self._stopped: _Halt | None = None
        self._order = count()
        self._client: httpx.AsyncClient | None = None
        self._tokenizer: Any = None
        self._under_way, self._since = 0, 0.0

    def __repr__(self) -> str:
        return f"ServerChat({self.name!r} at {self.settings.url})"

    def complete(
        self, requests: Sequence[ChatRequest], progress: Progress | None = None
    ) -> list[ChatAnswer | ChatError]:
        """One answer or error per request, in order."""
        return in_order(self.stream(requests), len(requests), progress)

    def stream(self, requests: Sequence[ChatRequest]) -> Iterator[Told]:
        """(place, answer or error) as they come. Closing the iterator drops what is under way."""
        if not requests:
            return
        halted: _Halt | None = None
        arrived: queue.SimpleQueue[Told | None] = queue.SimpleQueue()
        job = asyncio.run_coroutine_threadsafe(self._all(requests, arrived.put), event_loop())
        try:
            while (told := arrived.get()) is not None:
                if self._halts and isinstance(told[1], _Halt):
                    halted = told[1]
                else:
                    yield told
            job.result()
        finally:
            job.cancel()
        if halted is not None:
            raise HouseError(
                f"{halted.detail}\nAnswers that came are kept. Mend it and run the same command again: it asks what is"
                " missing, and nothing twice."
            )

    def close(self) -> None:
        """Closes the connections; the next request opens new ones."""
        if self._client is not None:
            client, self._client = self._client, None
            with contextlib.suppress(CancelledError):
                asyncio.run_coroutine_threadsafe(client.aclose(), event_loop()).result(CONNECT)

    # ---- in the event loop

    async def _all(self, requests: Sequence[ChatRequest], tell: Callable[[Told | None], None]) -> None:
        workers: list[asyncio.Task[None]] = []
        try:
            self._breaker.try_again()
            self._stopped = None
            if self._client is None:
                self._client = _client(self.settings, self._key)
            fresh = (_Asked(0.0, next(self._order), place, request) for place, request in enumerate(requests))
            later: list[_Asked] = []
            many = min(self.settings.concurrency, len(requests))
            workers += [asyncio.create_task(self._work(fresh, later, tell)) for _ in range(many)]
            await asyncio.gather(*workers)
        finally:
            for worker in workers:
                worker.cancel()
            tell(None)

    async def _work(self, fresh: Iterator[_Asked], later: list[_Asked], tell: Callable[[Told | None], None]) -> None:
        """Takes requests, those whose pause is over first, until none is left. A pause is spent on other requests."""
        while True:
            asked = heapq.heappop(later) if later and later[0].due <= time.monotonic() else next(fresh, None)
            if asked is None:
                if not later:
                    return
                await asyncio.sleep(max(later[0].due - time.monotonic(), 0.0))
                continue
            try:
                result = await self._advance(asked)
            except HouseError as error:  # a tokenizer that is not there
                result = self._stopped = _Halt("refused", str(error))
            except Exception as error:  # one bad request never harms another
                result = ChatError("refused", self._clean(f"{type(error).__name__}: {error}"))
            if result is None:
                heapq.heappush(later, asked)
            else:
                tell((asked.place, result))

    async def _advance(self, asked: _Asked) -> ChatAnswer | ChatError | None:
        """One try: an answer, an error for good, or None where `asked` is due again later."""
        probe = await self._breaker.enter()
        try:
            if self._stopped is not None:
                return self._stopped
            if self._breaker.given_up is not None:
                return self._down(self._breaker.given_up)
            if asked.began is None:
                asked.began = self._clock()
            if self._clock() - asked.began >= self.settings.deadline:
                return ChatError("timeout", f"no answer in {self.settings.deadline:g} s")
            too_long = self._fit(asked)
            if too_long is not None:
                return too_long
            return await self._try(asked, probe)
        finally:
            if probe and self._breaker.opened is not None:
                self._breaker.probing = False  # whatever became of the probe, another may follow

    async def _try(self, asked: _Asked, probe: bool) -> ChatAnswer | ChatError | None:
        limit = asked.limit or asked.request.sampling.max_tokens
        prompt = wire.most_tokens(asked.request)
        ticket = self._purse.hold(prompt, limit)
        while ticket is None and self._purse.held:  # what is under way may cost less than it might
            await asyncio.sleep(0.02)
            ticket = self._purse.hold(prompt, limit)
        if ticket is None:
            return ChatError("budget", f"the budget does not hold another request of up to {prompt + limit:,} tokens")
        answer: ChatAnswer | None = None
        try:
            await self._requests.take(1)
            entry = await self._tokens.take(prompt + limit)
            async with self._slots:
                asked.tries += 1
                outcome = await self._send(asked, limit)
            if isinstance(outcome, ChatAnswer):
                answer = outcome
                self._tokens.correct(entry, answer.prompt_tokens + answer.tokens)
        finally:
            self._purse.pay(ticket, answer)
        if isinstance(outcome, ChatAnswer):
            self._breaker.succeeded()
            self._without |= asked.without
            return outcome
        return self._failed(asked, outcome, probe)

    async def _send(self, asked: _Asked, limit: int) -> ChatAnswer | Trouble:
        """One POST."""
        assert self._client is not None and asked.began is not None
        without = asked.without = asked.without | self._without
        try:
            content = wire.body(asked.request, self.name, limit, without, self.settings.extra)
        except (ValueError, RecursionError) as error:
            return Trouble(ChatError("refused", f"the request cannot be written as JSON: {error}"))
        left = self.settings.deadline - (self._clock() - asked.began)
        self._busy(+1)
        try:
            async with asyncio.timeout(max(min(self.settings.timeout, left), 0.001)):
                response = await self._client.post("chat/completions", content=content)
        except TimeoutError:
            return Trouble(ChatError("timeout", f"no answer in {min(self.settings.timeout, left):.3g} s"), again=True)
        except (httpx.ConnectError, httpx.ConnectTimeout) as error:
            return Trouble(ChatError("connection", f"cannot reach {self.settings.url}: {error}"), again=True, down=True)
        except httpx.HTTPError as error:
            return Trouble(ChatError("connection", f"{type(error).__name__}: {error}"), again=True)
        finally:
            self._busy(-1)
        if response.status_code == 200:
            return wire.read_answer(response.content, asked.request)
        return wire.read_refusal(response.status_code, response.headers, response.content, self.settings.url)

    def _failed(self, asked: _Asked, trouble: Trouble, probe: bool) -> ChatError | None:
        """What follows from a try that came to nothing."""
        trouble = wire.scrubbed(trouble, self._key)
        error = trouble.error
        if trouble.again and error.kind != "malformed":
            self._breaker.failed(trouble, probe)
        else:
            self._breaker.succeeded()
        if trouble.fatal:
            self._stopped = _Halt(error.kind, error.detail)
            return self._stopped
        if not trouble.again:
            return self._mended(asked, trouble)
        wait = pause(asked.tries, self.settings.backoff, trouble.after)
        assert asked.began is not None
        if asked.tries > self.settings.retries or self._clock() - asked.began + wait >= self.settings.deadline:
            return ChatError(error.kind, f"{error.detail} (after {asked.tries} tries)")
        self.spend.lost[error.kind] += 1
        asked.due = time.monotonic() + wait
        return None

    def _mended(self, asked: _Asked, trouble: Trouble) -> ChatError | None:
        """None where the request may be put otherwise: with fewer new tokens, or without what the server refused."""
        if trouble.room is not None and asked.limit is None and trouble.room < asked.request.sampling.max_tokens:
            asked.limit = trouble.room
            return None
        if trouble.error.kind == "refused" and trouble.error.detail[:3] in ("400", "422", "501"):
            left_out = wire.lesson(asked.request, asked.without, trouble.error.detail)
            if left_out is not None:
                asked.without |= {left_out}
                return None
        return trouble.error

    def _fit(self, asked: _Asked) -> ChatError | None:
        """Cuts the answer to what the context leaves; an error where it leaves nothing."""
        wanted = asked.request.sampling.max_tokens
        if self.context is None or wire.prompt_bytes(asked.request) + 64 * len(
            asked.request.messages
        ) + 64 + wanted <= (self.context):
            return None  # no tokenizer makes more tokens than bytes
        prompt = self._count(asked.request)
        if isinstance(prompt, ChatError):
            return prompt
        if prompt is None:
            least = wire.least_tokens(asked.request)
            return self._no_room(f"at least {least}") if least >= self.context else None
        if prompt >= self.context:
            return self._no_room(str(prompt))
        asked.limit = min(wanted, self.context - prompt)
        return None

    def _no_room(self, tokens: str) -> ChatError:
        return ChatError("too_long", f"a prompt of {tokens} tokens in a context of {self.context}")

    def _count(self, request: ChatRequest) -> int | ChatError | None:
        """The prompt's tokens by the local tokenizer; None without one."""
        if self.settings.tokenizer is None:
            return None
        from ...tuning.chat import conversation_ids
        from ...tuning.hub import model_folder
        from ...tuning.models import load_tokenizer

        if self._tokenizer is None:
            self._tokenizer = load_tokenizer(model_folder(self.settings.tokenizer))
        said = [{"role": role, "content": content} for role, content in request.messages]
        (ids,) = conversation_ids(self._tokenizer, [said], prompt=True)
        return ChatError("refused", str(ids)) if isinstance(ids, HouseError) else len(ids)

    def _clock(self) -> float:
        return time.monotonic() - self._breaker.idle()

    def _busy(self, change: int) -> None:
        now = time.monotonic()
        if self._under_way:
            self.spend.busy += now - self._since
        self._since = now
        self._under_way += change
        self.spend.tries += change > 0

    def _down(self, trouble: Trouble) -> _Halt:
        waited = f"{self.settings.url} was down for {self.settings.patience:g} s, so that no more was asked"
        return _Halt(trouble.error.kind, f"{waited} (last: {trouble.error.detail})")

    def _clean(self, words: str) -> str:
        return words.replace(self._key, "***") if self._key else words


# ---- the server itself


def key_of(settings: Server) -> str | None:
    """The API key from the environment; HouseError where its variable is not set."""
    if settings.key_env is None:
        return None
    key = os.environ.get(settings.key_env, "").strip()
    if not key:
        raise HouseError(f"the environment variable {settings.key_env}, the key for {settings.url}, is not set: set it")
    return key


def look(settings: Server, digest: str | None = None) -> Card:
    """Asks /models for the model's name, root and context. digest: the weights' own, where the caller knows them.

    Raises HouseError where no server answers, where it wants another key, and where it has no such model."""
    try:
        with httpx.Client(**_how(settings, key_of(settings)), timeout=CONNECT) as client:
            response = client.get("models")
    except httpx.HTTPError as error:
        raise HouseError(
            f"no server answers at {settings.url} ({str(error) or type(error).__name__}). Start one, such as"
            f" `vllm serve MODEL --port {urlsplit(settings.url).port or 8000}`, or mend the url (it ends with /v1)"
        ) from error
    if response.status_code in (401, 403):
        named = f"the key in {settings.key_env}" if settings.key_env else "a request without a key: name one, `key_env`"
        raise HouseError(f"{settings.url} does not accept {named} ({response.status_code})")
    listed = _listed(response) if response.status_code == 200 else []
    known = [str(one["id"]) for one in listed]
    name = settings.model or (known[0] if len(known) == 1 else None)
    if name is None and known:
        raise HouseError(f"{settings.url} has {len(known)} models; say which, as `model`: {', '.join(known[:12])}")
    if name is None:
        raise HouseError(
            f"{settings.url}/models lists no model ({_about(response)}): mend the url (it ends with /v1), or name the"
            " model, as `model`, where the server has no list"
        )
    if known and name not in known:
        raise HouseError(f"{settings.url} has no model {name!r}; it has {', '.join(known[:12])}")
    found: dict[str, Any] = next((one for one in listed if one["id"] == name), {})
    context = found.get("max_model_len") or found.get("context_length") or found.get("context_window")
    about = [str(found[part]) for part in ("root", "parent") if found.get(part)]
    own = digest or digest_of("server", settings.url.rstrip("/"), name, *about)
    return Card(name, own, int(context) if isinstance(context, int | float) and math.isfinite(context) else None)


def _listed(response: httpx.Response) -> list[dict[str, Any]]:
    try:
        listed = response.json()["data"]
        return [one for one in listed if isinstance(one, dict) and "id" in one]
    except (ValueError, KeyError, TypeError):
        return []


def _about(response: httpx.Response) -> str:
    """A few words on an answer that holds no list of models."""
    if response.is_redirect:
        return f"{response.status_code}, it redirects to {response.headers.get('location')}"
    return f"{response.status_code}: {wire.shortened(wire.words_of(response.content))[:80]}"


def _how(settings: Server, key: str | None) -> dict[str, Any]:
    headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {key}"} if key else {})
    local = urlsplit(settings.url).hostname in LOCAL
    return {"base_url": settings.url.rstrip("/") + "/", "headers": headers, "trust_env": not local}


def _client(settings: Server, key: str | None) -> httpx.AsyncClient:
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=settings.concurrency)
    return httpx.AsyncClient(**_how(settings, key), limits=limits, timeout=httpx.Timeout(None, connect=CONNECT))


_loops: dict[int, asyncio.AbstractEventLoop] = {}
_starting = threading.Lock()


def event_loop() -> asyncio.AbstractEventLoop:
    """The loop in which all doors of this process ask, in a thread of its own; a forked process starts its own."""
    with _starting:
        loop = _loops.get(os.getpid())
        if loop is None:
            loop = _loops[os.getpid()] = asyncio.new_event_loop()
            threading.Thread(target=loop.run_forever, name="doors", daemon=True).start()
        return loop
