"""Kept answers, cassettes and limits: nothing is paid twice, nothing is lost by a kill, and what is told adds up."""

import asyncio
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from gristmill.curation.door import ChatAnswer, ChatError, ChatRequest, Sampling
from gristmill.curation.folder import HouseError
from gristmill.flows.doors.cassette import CassetteChat, read_cassette
from gristmill.flows.doors.kept import Answers, KeptChat, answer_from, key_of, request_from, request_json
from gristmill.flows.doors.limits import Breaker, Pace, pause
from gristmill.flows.doors.server import ServerChat
from gristmill.flows.doors.settings import Server
from gristmill.flows.doors.spend import told
from gristmill.flows.doors.wire import Trouble, option_logprobs, read_answer, retry_after
from tests.flows.bad_server import BadServer, healthy


class Echo:
    """Streams the last turn in capitals, the last request first; `bad` fails."""

    name, digest, licence, price = "echo", "d1", "MIT", (1.0, 10.0)

    def __init__(self) -> None:
        self.asked: list[ChatRequest] = []

    def answer(self, request: ChatRequest) -> ChatAnswer | ChatError:
        self.asked.append(request)
        said = request.messages[-1][1]
        return (
            ChatError(said, "no") if said in ("timeout", "too_long") else ChatAnswer(said.upper(), 5, 3, True, (-0.1,))
        )

    def complete(self, requests: Sequence[ChatRequest], progress: Any = None) -> list[ChatAnswer | ChatError]:
        return [self.answer(request) for request in requests]


class Stream(Echo):
    def stream(self, requests: Sequence[ChatRequest]) -> Iterator[tuple[int, ChatAnswer | ChatError]]:
        for place in reversed(range(len(requests))):
            yield place, self.answer(requests[place])


def ask(*texts: str) -> list[ChatRequest]:
    return [ChatRequest((("user", text),), 7, Sampling(stop=("\n",), options=("1",))) for text in texts]


def kept(path: Path, model: Echo, digest: str = "d1") -> KeptChat:
    return KeptChat(Answers(path), lambda: model, name="echo", digest=digest, price=(1.0, 10.0), run="r")


@pytest.mark.parametrize("kind", [Echo, Stream])
def test_what_was_answered_is_not_asked_again_and_errors_are(tmp_path: Path, kind: type[Echo]) -> None:
    model = kind()
    first = kept(tmp_path / "new" / "a.sqlite", model)
    one = first.complete(ask("a", "timeout", "b", "a"))
    assert [getattr(answer, "text", None) for answer in one] == ["A", None, "B", "A"] and len(model.asked) == 3
    assert [getattr(answer, "cached", None) for answer in one] == [False, None, False, True]
    assert first.spend.record() | {"busy_seconds": 0} == {
        "asked": 4, "answered": 3, "cached": 1, "failed": {"timeout": 1}, "why": {"timeout": "no"}, "tries": 0,
        "lost": {}, "prompt_tokens": 10, "tokens": 6, "money": 0.00007, "busy_seconds": 0, "tokens_per_second": None,
    }  # fmt: skip
    second = kept(tmp_path / "new" / "a.sqlite", model)  # as after a restart
    two = second.complete(ask("b", "timeout", "c", "a"))
    assert [request.messages[0][1] for request in model.asked[3:]] in (["timeout", "c"], ["c", "timeout"])
    assert two[0] == ChatAnswer("B", 5, 3, True, (-0.1,), cached=True)
    assert Answers(tmp_path / "new" / "a.sqlite").spent("d1", "r", (1.0, 10.0)) == (24, pytest.approx(0.000105))
    kept(tmp_path / "new" / "a.sqlite", model, digest="d2").complete(ask("a"))  # another model's answer is another
    assert len(model.asked) == 6


def test_a_slow_reader_keeps_no_answer_from_being_kept(tmp_path: Path) -> None:
    chat = kept(tmp_path / "a.sqlite", Stream())
    come = chat.stream(ask("a", "b", "c"))
    next(come)
    keys = [key_of("d1", request) for request in ask("a", "b", "c")]
    for _ in range(500):  # the reader does nothing meanwhile
        if len(Answers(tmp_path / "a.sqlite").find(keys)) == 3:
            break
        time.sleep(0.02)
    assert len(Answers(tmp_path / "a.sqlite").find(keys)) == 3


def test_keys_tell_seed_and_sampling_apart_and_requests_come_back_equal() -> None:
    (one,) = ask("a")
    others = [ChatRequest(one.messages, 8, one.sampling), ChatRequest(one.messages, 7, Sampling())]
    assert len({key_of("d1", request) for request in (one, *others)}) == 3
    assert all(request_from(json.loads(request_json(request))) == request for request in (one, *others))


RUN = """
import sys
from pathlib import Path
from gristmill.curation.door import ChatRequest, Sampling
from gristmill.flows.doors.kept import Answers, KeptChat
from gristmill.flows.doors.server import ServerChat
from gristmill.flows.doors.settings import Server

url, path = sys.argv[1:]
chat = ServerChat(Server(url, concurrency=4, backoff=0.01, timeout=5.0))
kept = KeptChat(Answers(Path(path)), lambda: chat, name=chat.name, digest=chat.digest)
asked = [ChatRequest((("user", f"question {at}"),), at, Sampling(max_tokens=16)) for at in range(80)]
for place, answer in kept.stream(asked):
    print(place, answer.text, flush=True)
"""


def test_a_killed_run_pays_nothing_twice(tmp_path: Path) -> None:
    path = tmp_path / "answers.sqlite"
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    with BadServer({"500": 0.1, "reset": 0.1, "truncated": 0.1}, delay=0.02) as server:
        command = [sys.executable, "-c", RUN, server.url, str(path)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=env) as first:
            assert first.stdout is not None
            for _ in range(15):
                first.stdout.readline()
            os.kill(first.pid, signal.SIGKILL)
        digest = ServerChat(Server(server.url)).digest
        asked = [ChatRequest((("user", f"question {at}"),), at, Sampling(max_tokens=16)) for at in range(80)]
        there = Answers(path).find([key_of(digest, request) for request in asked])
        had = [at for at, request in enumerate(asked) if key_of(digest, request) in there]
        before = dict(server.tries)
        again = subprocess.run(command, capture_output=True, text=True, env=env, check=True)
    told_again = dict(line.split() for line in again.stdout.splitlines())
    assert told_again == {str(at): healthy(f"question {at}", at) for at in range(80)}
    assert 15 <= len(had) < 80 and all(server.tries[f"question {at}"] == before[f"question {at}"] for at in had)
    assert server.billed.total() - 80 <= 4 and max(server.billed.values()) <= 2  # what was on its way at the kill


def test_two_processes_share_the_file(tmp_path: Path) -> None:
    with BadServer(delay=0.002) as server:
        command = [sys.executable, "-c", RUN, server.url, str(tmp_path / "a.sqlite")]
        pair = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
        told_by = [one.communicate()[0].splitlines() for one in pair]
    assert [one.returncode for one in pair] == [0, 0] and set(told_by[0]) == set(told_by[1])
    assert len(set(told_by[0])) == 80


# ---- cassettes


def test_a_cassette_is_recorded_and_replayed(tmp_path: Path) -> None:
    path, model = tmp_path / "tapes" / "a.jsonl", Stream()
    recorder = CassetteChat(path, lambda: model)
    live = recorder.complete(ask("a", "b", "too_long", "timeout"))
    replay = CassetteChat(path)
    again = replay.complete(ask("a", "b", "too_long", "timeout", "new"))
    assert (replay.name, replay.digest, replay.licence, replay.price) == ("echo", "d1", "MIT", (1.0, 10.0))
    assert [getattr(a, "text", a) for a in again[:3]] == [getattr(a, "text", a) for a in live[:3]]
    assert all(a.cached for a in again[:2] if isinstance(a, ChatAnswer))
    assert isinstance(again[3], ChatError) and again[3].kind == "refused"  # a timeout passes: it is not recorded
    assert isinstance(again[4], ChatError) and "holds no answer to this request ('new'…, seed 7)" in again[4].detail
    CassetteChat(path, lambda: model).complete(ask("a", "new"))
    assert [request.messages[0][1] for request in model.asked[4:]] == ["new"]  # only what it lacked
    assert len(read_cassette(path)[1]) == 4


def test_half_a_line_of_a_killed_recorder_is_cut_off(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    CassetteChat(path, Echo).complete(ask("a", "b"))
    path.write_bytes(path.read_bytes()[:-20])
    assert len(read_cassette(path)[1]) == 1
    CassetteChat(path, Echo).complete(ask("a", "b", "c"))
    assert len(read_cassette(path)[1]) == 3


def test_what_is_no_cassette_is_named(tmp_path: Path) -> None:
    with pytest.raises(HouseError, match=r"there is no cassette .* put `server:` beside it"):
        CassetteChat(tmp_path / "absent.jsonl")
    (tmp_path / "odd.jsonl").write_text(
        '{"cassette": 1, "name": "a", "digest": "d", "licence": "l", "price": [0, 0]}\n{}\n'
    )
    with pytest.raises(HouseError, match=r"odd.jsonl:2: no line of a cassette"):
        CassetteChat(tmp_path / "odd.jsonl")


# ---- limits, on a clock of their own


class Time:
    def __init__(self) -> None:
        self.now = 0.0

    def clock(self) -> float:
        return self.now

    async def sleep(self, seconds: float) -> None:
        self.now += seconds


def test_no_minute_holds_more_than_it_may() -> None:
    at = Time()

    async def work() -> list[tuple[float, float]]:
        pace = Pace(100, at.clock, at.sleep)
        taken = []
        for amount in (60.0, 30.0, 20.0, 500.0, 10.0):
            entry = await pace.take(amount)
            taken.append((entry[0], amount))
            at.now += 1
        pace.correct(entry, 90.0)
        assert (await pace.take(20.0))[0] >= entry[0] + 60
        return taken

    taken = asyncio.run(work())
    assert [when for when, _ in taken[:2]] == [0.0, 1.0]
    for when, amount in taken:
        window = sum(one for other, one in taken if when - 60 < other <= when)
        assert window <= 100 or (amount == 500.0 and window == 500.0)


def test_a_breaker_opens_probes_and_closes() -> None:
    at = Time()
    bad = Trouble(ChatError("server", "500: no"), again=True)

    async def work() -> None:
        breaker = Breaker(4, 30.0, at.clock, at.sleep)
        for _ in range(19):
            breaker.failed(bad, False)
        breaker.succeeded()
        for _ in range(19):
            breaker.failed(bad, False)
        assert not await breaker.enter() and at.now == 0  # never twenty in a row
        breaker.failed(bad, False)
        assert await breaker.enter() and at.now >= 0.5  # a probe, after a pause
        breaker.succeeded()
        assert not await breaker.enter() and breaker.idle() == pytest.approx(at.now)
        for _ in range(3):
            breaker.failed(Trouble(bad.error, again=True, down=True), False)
        probes = 0
        while breaker.given_up is None:
            assert await breaker.enter()
            probes += 1
            breaker.failed(bad, True)
        assert 30 <= breaker.idle() < 60 and probes <= 12 and not await breaker.enter()

    asyncio.run(work())


def test_pauses_grow_and_never_fall_short_of_what_the_server_wants() -> None:
    for tries in range(1, 12):
        longest = min(0.5 * 2 ** (tries - 1), 30.0)
        assert longest / 2 <= pause(tries, 0.5, None) <= longest
    assert pause(1, 0.5, 90.0) == 90.0
    assert retry_after("1.5") == 1.5 and retry_after("soon") is None and retry_after(None) is None
    assert retry_after("Wed, 21 Oct 2015 07:28:00 GMT") == 0.0


@pytest.mark.parametrize(
    "payload",
    ["", "[]", "null", "7", '{"choices": []}', '{"choices": [{}]}', '{"choices": [{"message": {"content": 7}}]}',
     '{"choices": [{"message": {"content": "a"}}, {"message": {"content": "b"}}]}', "[" * 9999],
)  # fmt: skip
def test_ugly_answers_are_malformed_and_never_raise(payload: str) -> None:
    told_so = read_answer(payload.encode(), ask("a")[0])
    assert isinstance(told_so, Trouble) and told_so.error.kind == "malformed" and told_so.again


def test_half_a_character_harms_no_row() -> None:
    """JSON can say a lone surrogate, which no file takes: it would fail the whole step, on each start again."""
    payload = rb'{"choices": [{"message": {"content": "a\ud800b \ud83d\ude00"}, "finish_reason": "stop"}]}'
    answer = read_answer(payload, ask("a")[0])
    assert isinstance(answer, ChatAnswer) and answer.text == "a\ufffdb \U0001f600"
    kept = answer_from({"text": "\ud800", "prompt_tokens": 1, "tokens": 1, "finished": True})
    assert kept.text == "\ufffd" and kept.cached


def test_options_that_cannot_be_told_are_none() -> None:
    top = [{"token": "1", "logprob": -1.0}, {"token": " 2", "logprob": -2.0}, {"token": "2", "logprob": -3.0}]
    one, two = option_logprobs(("1", "2"), top) or ()
    assert one == -1.0 and two == pytest.approx(-2.0 + 0.31326, abs=1e-4)  # both ways of writing it
    assert option_logprobs(("1", "10"), top) is None  # "10" may begin with the token "1"
    assert option_logprobs(("x",), top) is None and option_logprobs(("1", "x"), top) == (-1.0, float("-inf"))


def test_a_line_tells_what_a_step_asked() -> None:
    before = {"asked": 10, "answered": 10, "cached": 0, "failed": {}, "prompt_tokens": 50, "tokens": 100}
    before |= {"money": 0.5, "busy_seconds": 1.0}
    now = before | {"asked": 15, "answered": 14, "cached": 1, "failed": {"timeout": 1}, "prompt_tokens": 70}
    now |= {"tokens": 160, "money": 0.75, "busy_seconds": 3.0}
    line = (
        "big was asked 5: 4 answered, 1 of them kept from before, 1 timeout, 20 + 60 tokens, 30 tokens/s, cost 0.2500"
    )
    assert told("big", before, now) == line and told("big", now, now) is None
