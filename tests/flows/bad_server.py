"""A real HTTP server of chat completions that misbehaves on purpose, and counts what it was asked and what it billed.

What becomes of a try is a hash of (seed, request, how many tries it had), so that it depends on no other request. An
answer is billed when it was written whole to a client that had not gone away.

    python bad_server.py SECONDS    # serves with ten per cent of every fault; prints its url, then its counts
"""

import asyncio
import hashlib
import json
import threading
from collections import Counter
from collections.abc import Mapping
from typing import Any

FAULTS = ("500", "429", "hang", "reset", "truncated", "empty", "format", "length")
RETRIED = (*FAULTS[:5], "format")  # the door tries these again; the rest are answers, of what worth is for others
TEN = dict.fromkeys(FAULTS, 0.1)


def healthy(question: str, seed: int) -> str:
    """What a well-behaved answer says: it depends on the request alone."""
    return hashlib.sha256(f"{question} {seed}".encode()).hexdigest()[:12]


class BadServer:
    """`with BadServer({"500": 0.1}) as server: server.url`. shares: of tries, by fault. delay: seconds of an answer.
    gate: answers wait until so many requests are there at once (`starved` counts those that waited in vain). refuse:
    words in a body -> (status, message) of the refusal. key: the API key that is asked for."""

    def __init__(
        self,
        shares: Mapping[str, float] | None = None,
        *,
        seed: int = 0,
        delay: float = 0.0,
        gate: int = 0,
        refuse: Mapping[str, tuple[int, str]] | None = None,
        key: str | None = None,
        context: int | None = 4096,
        retry_after: float = 0.01,
        patience: float = 20.0,
    ) -> None:
        self.shares, self.seed, self.delay, self.gate = dict(shares or {}), seed, delay, gate
        self.refuse, self.key, self.context = dict(refuse or {}), key, context
        self.retry_after, self.patience = retry_after, patience
        self.tries: Counter[str] = Counter()  # by question
        self.billed: Counter[str] = Counter()
        self.faults: Counter[str] = Counter()
        self.bodies: list[dict[str, Any]] = []
        self.at_once = self.most_at_once = self.starved = 0
        self.down = False
        self.script: dict[str, list[str]] = {}  # question -> faults of its first tries, before shares speak
        self.loop = asyncio.new_event_loop()
        self._enough = asyncio.Event()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/v1"

    def __enter__(self) -> "BadServer":
        ready = threading.Event()

        def serve() -> None:
            asyncio.set_event_loop(self.loop)
            self.server = self.loop.run_until_complete(asyncio.start_server(self._client, "127.0.0.1", 0))
            self.port = self.server.sockets[0].getsockname()[1]
            ready.set()
            self.loop.run_forever()

        self.thread = threading.Thread(target=serve, daemon=True)
        self.thread.start()
        ready.wait()
        return self

    def __exit__(self, *_: object) -> None:
        def stop() -> None:
            self.server.close()
            for task in asyncio.all_tasks(self.loop):
                task.cancel()
            self.loop.call_later(0.02, self.loop.stop)

        self.loop.call_soon_threadsafe(stop)
        self.thread.join(5)

    async def _client(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while await self._one(reader, writer):
                pass
        except (ConnectionError, asyncio.IncompleteReadError, asyncio.CancelledError):
            pass
        finally:
            writer.close()

    async def _one(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        head = (await reader.readuntil(b"\r\n\r\n")).decode()
        line, *rest = head.split("\r\n")
        headers = {name.lower(): value for name, _, value in (one.partition(": ") for one in rest)}
        content = await reader.readexactly(int(headers.get("content-length", 0)))
        if self.down:
            writer.transport.abort()
            return False
        if self.key is not None and headers.get("authorization") != f"Bearer {self.key}":
            said = headers.get("authorization", "")
            return await self._write(writer, 401, {"error": {"message": f"Incorrect API key provided: {said}"}})
        if line.startswith("GET"):
            card = {"id": "bad", "root": "models/bad", "object": "model", "max_model_len": self.context}
            return await self._write(writer, 200, {"data": [card]})
        self.at_once += 1
        self.most_at_once = max(self.most_at_once, self.at_once)
        try:
            return await self._chat(json.loads(content), writer)
        finally:
            self.at_once -= 1

    async def _chat(self, asked: dict[str, Any], writer: asyncio.StreamWriter) -> bool:
        self.bodies.append(asked)
        question = asked["messages"][-1]["content"]
        self.tries[question] += 1
        for words, (status, message) in self.refuse.items():
            if words in json.dumps(asked):
                return await self._write(writer, status, {"error": {"message": message}})
        fault = self._fault(question)
        self.faults[fault] += 1
        if fault == "500":
            return await self._write(writer, 500, {"error": {"message": "out of luck"}})
        if fault == "429":
            return await self._write(writer, 429, {"error": "slow down"}, {"Retry-After": str(self.retry_after)})
        if fault == "reset":
            writer.transport.abort()
            return False
        if fault == "hang":
            await asyncio.sleep(60)
        await self._wait()
        if fault == "truncated":
            writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 400\r\n\r\n" + b'{"choices": [{"mess')
            await writer.drain()
            return False
        said = answer(asked, question, fault)
        kept = await self._write(writer, 200, said)
        self.billed[question] += 1
        return kept

    async def _wait(self) -> None:
        await asyncio.sleep(self.delay)
        if not self.gate or self._enough.is_set():
            return
        if self.at_once >= self.gate:
            self._enough.set()
            self.loop.call_soon(self._enough.clear)
            return
        try:
            await asyncio.wait_for(self._enough.wait(), self.patience)
        except TimeoutError:
            self.starved += 1

    def _fault(self, question: str) -> str:
        if self.script.get(question):
            return self.script[question].pop(0)
        drawn = hashlib.sha256(f"{self.seed} {question} {self.tries[question]}".encode()).digest()
        place = int.from_bytes(drawn[:8], "big") / 2**64
        for fault, share in self.shares.items():
            if place < share:
                return fault
            place -= share
        return "healthy"

    async def _write(
        self, writer: asyncio.StreamWriter, status: int, said: Any, headers: Mapping[str, str] | None = None
    ) -> bool:
        content = json.dumps(said).encode()
        lines = [f"HTTP/1.1 {status} Said", f"Content-Length: {len(content)}", "Content-Type: application/json"]
        lines += [f"{name}: {value}" for name, value in (headers or {}).items()]
        writer.write("\r\n".join([*lines, "", ""]).encode() + content)
        await writer.drain()
        return True


def answer(asked: dict[str, Any], question: str, fault: str = "healthy") -> Any:
    """A chat completion, well or not so well."""
    if fault == "format":
        return {"object": "chat.completion", "choices": "none today", "usage": None}
    text = "" if fault == "empty" else healthy(question, asked.get("seed", 0))
    tokens = len(text) // 4
    if fault == "length":
        text, tokens = text * 50, tokens * 50
    choice: dict[str, Any] = {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": "stop"}
    if asked.get("logprobs"):
        top = [{"token": str(digit), "logprob": -0.5 * digit} for digit in range(1, 4)]
        choice["logprobs"] = {"content": [{"token": "1", "logprob": -0.5, "top_logprobs": top}] * tokens}
    usage = {"prompt_tokens": len(question.split()) + 4, "completion_tokens": tokens}
    return {"object": "chat.completion", "choices": [choice], "usage": usage}


if __name__ == "__main__":
    import sys
    import time

    with BadServer(TEN) as server:
        sys.stdout.write(f"{server.url}\n")
        sys.stdout.flush()
        time.sleep(float(sys.argv[1]))
        sys.stdout.write(json.dumps({"faults": server.faults, "billed": server.billed.total()}) + "\n")
