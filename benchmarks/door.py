"""The door to servers on this machine: does it keep a server saturated, and what does a request cost?

    python benchmarks/door.py [--requests 6000] [--concurrency 64] [--delay 0.5] [--json PATH]

A local server answers each request after --delay seconds, whatever their number. Compared: a plain asyncio client over
the same HTTP library with a semaphore and nothing else; the door; the door with kept answers, fresh and again; the door
on a server with ten per cent of every fault (its healthy share of the fault-free rate). The server runs in a process of
its own; `cpu` is the client's processor time per request. share: of what --concurrency places could answer at most.
full: of the places' time, how much was held by requests that the server was busy with (hung ones until their timeout):
what pauses, retries and the door itself cost is the rest. Pauses begin at a tenth of --delay, as half a second does
beside answers of five; with few requests the last ones' pauses weigh most
(of 1,500 at a second each 0.69 of the fault-free share, of 6,000 at half a second 0.97).
"""

import argparse
import asyncio
import json
import multiprocessing
import platform
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import UTC, datetime
from importlib.metadata import version
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import httpx

from gristmill.curation.door import ChatAnswer, ChatRequest, Sampling
from gristmill.flows.doors.kept import Answers, KeptChat
from gristmill.flows.doors.server import ServerChat
from gristmill.flows.doors.settings import Server
from gristmill.flows.doors.wire import body, read_answer

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "flows"))
from bad_server import RETRIED, TEN, BadServer


def serve(line: Connection, shares: dict[str, float], delay: float) -> None:
    with BadServer(shares, delay=delay) as server:
        line.send(server.url)
        line.recv()
        line.send((dict(server.faults), server.billed.total(), server.most_at_once))


def with_server(shares: dict[str, float], delay: float, work: Callable[[str], Any]) -> tuple[Any, dict[str, Any]]:
    """What `work` returns, with its seconds and those of the processor, and what the server saw."""
    ours, theirs = multiprocessing.Pipe()
    process = multiprocessing.get_context("spawn").Process(target=serve, args=(theirs, shares, delay), daemon=True)
    process.start()
    url = ours.recv()
    wall, cpu = time.perf_counter(), time.process_time()
    result = work(url)
    spent = {"seconds": time.perf_counter() - wall, "cpu": time.process_time() - cpu}
    ours.send(None)
    faults, billed, most = ours.recv()
    process.join()
    return result, spent | {"faults": faults, "billed": billed, "most_at_once": most}


def requests(count: int) -> list[ChatRequest]:
    return [
        ChatRequest((("user", f"question {at} " + "word " * 100),), at, Sampling(max_tokens=16)) for at in range(count)
    ]


def plain(url: str, asked: list[ChatRequest], concurrency: int) -> int:
    """The least that an asyncio client does."""

    async def run() -> int:
        places = asyncio.Semaphore(concurrency)
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=concurrency)
        async with httpx.AsyncClient(base_url=url + "/", limits=limits, timeout=60, trust_env=False) as client:

            async def one(request: ChatRequest) -> bool:
                async with places:
                    answer = await client.post("chat/completions", content=body(request, "bad", 16, (), {}))
                return isinstance(read_answer(answer.content, request), ChatAnswer)

            return sum(await asyncio.gather(*map(one, asked)))

    return asyncio.run(run())


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--requests", type=int, default=6000)
    parser.add_argument("--concurrency", type=int, default=64)
    parser.add_argument("--delay", type=float, default=0.5, help="seconds of an answer")
    parser.add_argument("--timeout", type=float, help="seconds of one try; default: 4 times --delay, at least 0.2")
    parser.add_argument("--json", type=Path)
    how = parser.parse_args()
    asked = requests(how.requests)
    timeout = how.timeout or max(4 * how.delay, 0.2)

    def door(url: str) -> ServerChat:
        return ServerChat(Server(url, concurrency=how.concurrency, timeout=timeout, backoff=max(how.delay / 10, 0.001)))

    def answered(chat: Any) -> int:
        return sum(isinstance(answer, ChatAnswer) for answer in chat.complete(asked))

    def kept(url: str) -> tuple[int, float]:
        with tempfile.TemporaryDirectory() as home:
            chat = door(url)
            front = KeptChat(Answers(Path(home) / "a.sqlite"), lambda: chat, name=chat.name, digest=chat.digest)
            count, start = answered(front), time.process_time()
            answered(front)
            return count, (time.process_time() - start) / len(asked)

    best = how.concurrency / how.delay if how.delay else None
    rows: dict[str, dict[str, Any]] = {}
    contenders: dict[str, tuple[dict[str, float], Callable[[str], Any]]] = {
        "plain asyncio": ({}, lambda url: plain(url, asked, how.concurrency)),
        "door": ({}, lambda url: answered(door(url))),
        "door, kept": ({}, kept),
        "door, faults": (dict(TEN), lambda url: answered(door(url))),
    }
    for name, (shares, work) in contenders.items():
        result, spent = with_server(shares, how.delay, work)
        count, again = result if isinstance(result, tuple) else (result, None)
        rate = count / spent["seconds"]
        faults = spent["faults"]
        busy = sum(many for fault, many in faults.items() if fault not in ("500", "429", "reset", "hang"))
        held = busy * how.delay + faults.get("hang", 0) * timeout
        rows[name] = spent | {
            "answered": count,
            "per_second": rate,
            "share": rate / best if best else None,
            "full": held / (how.concurrency * spent["seconds"]),
            "cpu_ms_per_request": 1e3 * spent["cpu"] / how.requests,
            "cpu_ms_kept_again": None if again is None else 1e3 * again,
        }
    tries = sum(rows["door, faults"]["faults"].values())
    lost = sum(rows["door, faults"]["faults"].get(fault, 0) for fault in RETRIED)
    found = {
        "faulty_of_healthy_full": rows["door, faults"]["full"] / rows["door"]["full"],
        "door_of_plain": rows["door"]["per_second"] / rows["plain asyncio"]["per_second"],
        "faulty_of_healthy_share": rows["door, faults"]["per_second"]
        / (rows["door"]["per_second"] * (1 - lost / tries)),
    }
    for name, row in rows.items():
        sys.stdout.write(
            f"{name:<14} {row['per_second']:8.1f}/s  cpu {row['cpu_ms_per_request']:.2f} ms  full {row['full']:.2f}\n"
        )
    sys.stdout.write("".join(f"{name} {value:.3f}\n" for name, value in found.items()))
    if how.json:
        about = {
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
            "command": " ".join(sys.argv),
            "hardware": {"machine": platform.machine(), "cores": multiprocessing.cpu_count()},
            "versions": {name: version(name) for name in ("gristmill", "httpx")}
            | {"python": platform.python_version()},
        }
        how.json.write_text(json.dumps(about | {"rows": rows} | found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
