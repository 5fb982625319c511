"""Every answer kept on disk by what was asked, so that a killed run resumes and pays for nothing twice.

One SQLite file holds them: (digest of the model's digest and the request with its seed and sampling) -> answer. An
answer is in the file before anyone sees it, and the file's write-ahead log survives kill -9 and a second process. What
comes while nobody looks is kept too: a model that streams is read in a thread of its own, which waits for nobody.

Errors are not kept: most pass, and those that do not (too_long, refused) are found again for nothing.
"""

import json
import queue
import sqlite3
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from ...curation.door import ChatAnswer, ChatError, ChatModel, ChatRequest, Progress, Sampling, StreamingChat, cost
from ...curation.folder import HouseError
from ...curation.rows import digest as digest_of
from .settings import Price
from .spend import Spend
from .wire import Told, in_order, whole_characters

GROUP = 1024  # requests handed at once to a model that does not stream: all of them are kept together
ASK = 500  # keys in one query; SQLite takes 32,766
BUSY = 60.0  # seconds to wait for another process that writes
SCHEMA = """
CREATE TABLE IF NOT EXISTS answers (
    key BLOB PRIMARY KEY, model TEXT NOT NULL, run TEXT NOT NULL, answer TEXT NOT NULL,
    prompt_tokens INTEGER NOT NULL, tokens INTEGER NOT NULL
) WITHOUT ROWID;
CREATE INDEX IF NOT EXISTS answers_of_run ON answers (run, model, prompt_tokens, tokens);
"""


def request_json(request: ChatRequest) -> str:
    """The request as JSON that is equal for equal requests."""
    return json.dumps(asdict(request), ensure_ascii=True, sort_keys=True, separators=(",", ":"))


def request_from(said: dict[str, Any]) -> ChatRequest:
    """What `request_json` wrote, parsed."""
    sampling = _with_tuples(said["sampling"])
    messages = tuple((role, content) for role, content in said["messages"])
    return ChatRequest(messages, said["seed"], Sampling(**sampling))


def key_of(model: str, request: ChatRequest) -> bytes:
    """What an answer is kept under. model: its digest."""
    return bytes.fromhex(digest_of("answer", model, request_json(request)))


def answer_json(answer: ChatAnswer) -> str:
    """The answer as JSON, `cached` left out."""
    return json.dumps({name: value for name, value in asdict(answer).items() if name != "cached"}, ensure_ascii=True)


def answer_from(said: dict[str, Any]) -> ChatAnswer:
    """What `answer_json` wrote, parsed; `cached`."""
    said = _with_tuples(said)
    return ChatAnswer(**said | {"text": whole_characters(said["text"])}, cached=True)


def _with_tuples(said: Mapping[str, Any]) -> dict[str, Any]:
    """JSON's lists as the tuples that they were."""
    return {name: tuple(value) if isinstance(value, list) else value for name, value in said.items()}


class Answers:
    """The file. Safe from several threads and processes."""

    def __init__(self, path: Path) -> None:
        """path: made with its folder where it is not there."""
        self.path = path
        self._lock = threading.Lock()
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = sqlite3.connect(path, timeout=BUSY, check_same_thread=False, isolation_level=None)
            self._file.execute("PRAGMA journal_mode=WAL")  # where the disk cannot (NFS), SQLite keeps its own mode
            self._file.execute("PRAGMA synchronous=NORMAL")  # what was written survives kill -9, not a power cut
            self._file.executescript(SCHEMA)
        except (OSError, sqlite3.Error) as error:
            raise HouseError(
                f"cannot keep answers in {path}: {error}. Mend or remove that file, or --cache elsewhere"
            ) from error

    def find(self, keys: Sequence[bytes]) -> dict[bytes, ChatAnswer]:
        """The answers that are there."""
        found: dict[bytes, ChatAnswer] = {}
        for start in range(0, len(keys), ASK):
            some = keys[start : start + ASK]
            marks = ",".join("?" * len(some))
            with self._lock:
                rows = self._file.execute(f"SELECT key, answer FROM answers WHERE key IN ({marks})", some).fetchall()
            found.update((key, answer_from(json.loads(answer))) for key, answer in rows)
        return found

    def keep(self, answers: Iterable[tuple[bytes, ChatAnswer]], model: str, run: str) -> None:
        """Writes them, all or none; what is there already stays."""
        rows = [(k, model, run, answer_json(a), a.prompt_tokens, a.tokens) for k, a in answers]
        with self._lock:
            try:
                self._file.execute("BEGIN IMMEDIATE")
                self._file.executemany("INSERT OR IGNORE INTO answers VALUES (?, ?, ?, ?, ?, ?)", rows)
                self._file.execute("COMMIT")
            except sqlite3.Error as error:
                if self._file.in_transaction:
                    self._file.execute("ROLLBACK")
                raise HouseError(f"cannot keep answers in {self.path}: {error}. Make room, and run it again") from error

    def spent(self, model: str, run: str, price: Price) -> tuple[int, float]:
        """(tokens, money) that the run paid for answers of a model which are kept."""
        query = "SELECT coalesce(sum(prompt_tokens), 0), coalesce(sum(tokens), 0) FROM answers WHERE run=? AND model=?"
        with self._lock:
            prompt_tokens, tokens = self._file.execute(query, (run, model)).fetchone()
        return prompt_tokens + tokens, cost(price, prompt_tokens, tokens)

    def close(self) -> None:
        with self._lock:
            self._file.close()


class KeptChat:
    """ChatModel that asks another only what is not kept yet, and that streams whatever the other does.

    make: the other model, called for where something is not kept: where all is, none is loaded. It is called each time,
    and nothing here holds on to the model. A request that is there twice in one call is asked once; its second answer
    is `cached`."""

    def __init__(
        self,
        answers: Answers,
        make: Callable[[], ChatModel],
        *,
        name: str,
        digest: str,
        licence: str = "unknown",
        price: Price = (0.0, 0.0),
        spend: Spend | None = None,
        run: str = "",
    ) -> None:
        """run: who pays, by which `Answers.spent` sums up."""
        self.name, self.digest, self.licence, self.price = name, digest, licence, price
        self.spend = Spend(price) if spend is None else spend
        self._answers, self._make, self._run = answers, make, run
        self._making = threading.Lock()

    def complete(
        self, requests: Sequence[ChatRequest], progress: Progress | None = None
    ) -> list[ChatAnswer | ChatError]:
        """One answer or error per request, in order."""
        return in_order(self._stream(requests, progress), len(requests), progress)

    def stream(self, requests: Sequence[ChatRequest]) -> Iterator[Told]:
        """(place, answer or error): what is kept first, then the rest as it comes."""
        return self._stream(requests, None)

    def _stream(self, requests: Sequence[ChatRequest], progress: Progress | None) -> Iterator[Told]:
        self.spend.ask(len(requests))
        places: dict[bytes, list[int]] = {}
        for place, request in enumerate(requests):
            places.setdefault(key_of(self.digest, request), []).append(place)
        found = self._answers.find(list(places))
        for key, answer in found.items():
            yield from self._hand_out(places.pop(key), answer)
        if not places:
            return
        keys, rest = list(places), [requests[where[0]] for where in places.values()]
        model = self._other()
        if isinstance(model, StreamingChat):
            come = self._streamed(keys, rest, model)
        else:
            come = self._grouped(keys, rest, model, progress, len(requests))
        for at, told in come:
            yield from self._hand_out(places[keys[at]], told)

    def _hand_out(self, places: Sequence[int], answer: ChatAnswer | ChatError) -> Iterator[Told]:
        for nth, place in enumerate(places):
            again = replace(answer, cached=True) if nth and isinstance(answer, ChatAnswer) else answer
            self.spend.told(again)
            yield place, again

    def _other(self) -> ChatModel:
        with self._making:
            return self._make()

    def _keep(self, told: Iterable[tuple[bytes, ChatAnswer | ChatError]]) -> None:
        good = [(key, answer) for key, answer in told if isinstance(answer, ChatAnswer) and not answer.cached]
        if good:
            self._answers.keep(good, self.digest, self._run)

    def _streamed(self, keys: Sequence[bytes], requests: Sequence[ChatRequest], model: StreamingChat) -> Iterator[Told]:
        """Asks in a thread that keeps each answer when it comes, however long the reader takes over those before."""
        arrived: queue.SimpleQueue[Told | BaseException | None] = queue.SimpleQueue()
        stop = threading.Event()

        def work() -> None:
            try:
                for at, answer in model.stream(requests):
                    self._keep([(keys[at], answer)])
                    arrived.put((at, answer))
                    if stop.is_set():
                        return
                arrived.put(None)
            except BaseException as error:  # raised again where the answers are read
                arrived.put(error)

        threading.Thread(target=work, name=f"asks {self.name}", daemon=True).start()
        try:
            while (told := arrived.get()) is not None:
                if isinstance(told, BaseException):
                    raise told
                yield told
        finally:
            stop.set()

    def _grouped(
        self,
        keys: Sequence[bytes],
        requests: Sequence[ChatRequest],
        model: ChatModel,
        progress: Progress | None,
        total: int,
    ) -> Iterator[Told]:
        """Asks a model that does not stream, GROUP requests at a time."""
        for start in range(0, len(requests), GROUP):
            some = slice(start, start + GROUP)
            before = total - len(requests) + start

            def step(done: int, _: int, before: int = before) -> None:
                if progress is not None:
                    progress(before + done, total)

            answers = model.complete(requests[some], step)
            self._keep(zip(keys[some], answers, strict=True))
            yield from enumerate(answers, start)
