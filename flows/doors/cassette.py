"""A model's answers in a JSONL file that can lie beside a recipe: recorded from a real model once, replayed anywhere.

The first line says whose answers they are (name, digest, licence, price), so that what is made of a replay carries the
same origin; every other line is one request with its answer, or with an error that no retry mends.
"""

import fcntl
import json
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from ...curation.door import ChatAnswer, ChatError, ChatModel, ChatRequest, Progress, StreamingChat
from ...curation.folder import HouseError
from ...curation.rows import digest as digest_of
from .kept import answer_from, answer_json, request_from, request_json
from .settings import Price
from .wire import Told, in_order

VERSION = 1
LASTING = ("too_long", "refused")  # errors that are recorded: the same request meets them again


def request_digest(request: ChatRequest) -> str:
    """What a cassette knows a request by: whichever model answers it."""
    return digest_of("cassette", request_json(request))


class CassetteChat:
    """ChatModel that answers from a cassette, and records what another model answers where it has one (`make`).

    A request that is not there, and nobody to ask, fails with `refused` and says what to do. Answers of the cassette
    are `cached`. name, digest, licence and price are the recording's (those of `make` where it is still to be made)."""

    def __init__(
        self,
        path: Path,
        make: Callable[[], ChatModel] | None = None,
        *,
        licence: str | None = None,
        price: Price | None = None,
    ) -> None:
        """make: makes the model to record from, at the first request that is not there. licence, price: what the recipe
        says instead of the recording. Raises HouseError where there is neither a cassette nor a model."""
        self.path, self._make = path, make
        self._lock = threading.Lock()
        head, self._told = read_cassette(path) if path.is_file() else (None, {})
        if head is None and make is None:
            raise HouseError(f"there is no cassette {path}. Give its path, or record one: put `server:` beside it")
        if head is None:
            model = self._other()
            head = {"name": model.name, "digest": model.digest, "licence": model.licence, "price": list(model.price)}
        self.name, self.digest = str(head["name"]), str(head["digest"])
        self.licence = licence or str(head["licence"])
        self.price: Price = price or (float(head["price"][0]), float(head["price"][1]))

    def complete(
        self, requests: Sequence[ChatRequest], progress: Progress | None = None
    ) -> list[ChatAnswer | ChatError]:
        """One answer or error per request, in order."""
        return in_order(self.stream(requests), len(requests), progress)

    def stream(self, requests: Sequence[ChatRequest]) -> Iterator[Told]:
        """(place, answer or error): what is on the cassette first, then what the other model says, recorded."""
        lacking = []
        for place, request in enumerate(requests):
            told = self._told.get(request_digest(request))
            if told is not None:
                yield place, told
            elif self._make is None:
                yield place, self._unknown(request)
            else:
                lacking.append(place)
        if lacking:
            rest = [requests[place] for place in lacking]
            model = self._other()
            come = model.stream(rest) if isinstance(model, StreamingChat) else enumerate(model.complete(rest))
            for at, told in come:
                self._record(rest[at], told, model)
                yield lacking[at], told

    def _other(self) -> ChatModel:
        assert self._make is not None
        with self._lock:
            return self._make()

    def _unknown(self, request: ChatRequest) -> ChatError:
        began = " ".join(request.messages[-1][1].split())[:60] if request.messages else ""
        return ChatError(
            "refused",
            f"{self.path} holds no answer to this request ({began!r}…, seed {request.seed}): prompt, seed or sampling"
            " are not those that were recorded. Put `server:` beside the cassette to record what it lacks",
        )

    def _record(self, request: ChatRequest, told: ChatAnswer | ChatError, model: ChatModel) -> None:
        if isinstance(told, ChatError) and told.kind not in LASTING:
            return
        said = {"error": asdict(told)} if isinstance(told, ChatError) else {"answer": json.loads(answer_json(told))}
        line = {"request": json.loads(request_json(request))} | said
        head = {"cassette": VERSION, "name": model.name, "digest": model.digest, "licence": model.licence}
        with self._lock:
            append(self.path, head | {"price": list(model.price)}, line)
            self._told[request_digest(request)] = told if isinstance(told, ChatError) else replace(told, cached=True)


def append(path: Path, head: dict[str, Any], line: dict[str, Any]) -> None:
    """Adds a line to the cassette, whole: `head` first where it is new; half a line of a killed process is cut off."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+b") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        end = file.seek(0, 2)
        if end:
            file.seek(max(0, end - 1))
            if file.read(1) != b"\n":
                file.seek(0)
                file.truncate(file.read().rfind(b"\n") + 1)
        lines = [line] if file.seek(0, 2) else [head, line]
        file.write(
            "".join(json.dumps(one, ensure_ascii=False) + "\n" for one in lines).encode("utf-8", "backslashreplace")
        )


def read_cassette(path: Path) -> tuple[dict[str, Any], dict[str, ChatAnswer | ChatError]]:
    """The first line, and answers and errors by `request_digest`. HouseError for a file that is no cassette."""
    told: dict[str, ChatAnswer | ChatError] = {}
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise HouseError(f"cannot read the cassette {path}: {error}") from error
    lines.pop()  # empty, or half a line of a process that was killed
    head: dict[str, Any] = {}
    for number, line in enumerate(lines, 1):
        try:
            said = json.loads(line)
            if number == 1:
                head = said
                if said["cassette"] != VERSION or not {"name", "digest", "licence", "price"} <= said.keys():
                    raise ValueError(f"version {said['cassette']}")
                continue
            key = request_digest(request_from(said["request"]))
            told[key] = ChatError(**said["error"]) if "error" in said else answer_from(said["answer"])
        except (ValueError, KeyError, TypeError) as error:
            raise HouseError(f"{path}:{number}: no line of a cassette ({type(error).__name__}: {error})") from error
    if not head:
        raise HouseError(f"{path} is empty: no cassette")
    return head, told
