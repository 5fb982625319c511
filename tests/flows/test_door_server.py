"""The door to servers: against a real one that misbehaves, every request is answered or carries a typed error."""

import asyncio
import json
import logging
import threading
from collections import Counter

import httpx
import pytest

from gristmill.curation.door import KINDS, ChatAnswer, ChatError, ChatModel, ChatRequest, Sampling, StreamingChat
from gristmill.curation.folder import HouseError
from gristmill.flows.doors import server as server_module
from gristmill.flows.doors.server import ServerChat, look
from gristmill.flows.doors.settings import Budget, Server
from tests.flows.bad_server import RETRIED, TEN, BadServer, healthy

FAST = {"backoff": 0.005, "timeout": 60.0, "deadline": 120.0}  # no healthy answer is too late on a busy machine


def requests(count: int, **sampling: object) -> list[ChatRequest]:
    settings = Sampling(max_tokens=16, **sampling)  # type: ignore[arg-type]
    return [ChatRequest((("user", f"question {at}"),), at, settings) for at in range(count)]


def door(server: BadServer, **settings: object) -> ServerChat:
    return ServerChat(Server(server.url, **(FAST | settings)))  # type: ignore[arg-type]


def well(answer: ChatAnswer | ChatError, at: int) -> bool:
    return isinstance(answer, ChatAnswer) and answer.text == healthy(f"question {at}", at)


@pytest.mark.parametrize("fault", [*TEN])
def test_ten_per_cent_of_one_fault_harm_no_other_row(fault: str) -> None:
    with BadServer({fault: 0.1}, seed=1) as server:
        chat = door(server, concurrency=8, timeout=2.0 if fault == "hang" else 60.0)
        answers = chat.complete(requests(60))
        chat.close()
    assert isinstance(chat, StreamingChat) and server.faults[fault] >= 2
    good = [well(answer, at) for at, answer in enumerate(answers)]
    if fault in RETRIED:
        assert all(good)
        assert chat.spend.lost.total() == server.faults[fault] or fault == "hang"
    else:  # answers all the same: what an empty or too long one is worth is for who asked
        assert len(answers) - sum(good) == server.faults[fault] and all(isinstance(a, ChatAnswer) for a in answers)
    assert server.billed.total() == 60 + (server.faults[fault] if fault == "format" else 0) or fault == "hang"


def test_all_faults_together_end_in_answers_or_typed_errors() -> None:
    with BadServer(TEN, seed=3) as server:
        chat = door(server, concurrency=16, timeout=1.5, retries=2)
        found = list(chat.stream(requests(40)))
        chat.close()
    assert sorted(place for place, _ in found) == list(range(40))  # each once
    errors = [answer for _, answer in found if isinstance(answer, ChatError)]
    assert errors and all(error.kind in KINDS and "after 3 tries" in error.detail for error in errors)
    assert all(isinstance(answer, ChatAnswer | ChatError) for _, answer in found)
    assert server.most_at_once <= 16 and max(server.tries.values()) <= 3


def test_answers_and_errors_are_the_same_whatever_the_concurrency() -> None:
    shares = {fault: share for fault, share in TEN.items() if fault != "hang"}
    told: list[list[object]] = []
    for concurrency in (1, 16):
        with BadServer(shares, seed=3) as server:
            answers = door(server, concurrency=concurrency, retries=1).complete(requests(40))
        assert server.most_at_once <= concurrency and max(server.tries.values()) <= 2
        told.append([answer if isinstance(answer, ChatAnswer) else answer.kind for answer in answers])
    assert told[0] == told[1] and {type(one) for one in told[0]} == {str, ChatAnswer}


def test_a_pause_leaves_its_place_to_others() -> None:
    """The server answers only while four requests are there at once: pauses that held places would starve it."""
    with BadServer(gate=4, retry_after=0.4, patience=15) as server:
        server.script = {f"question {at}": ["429", "429"] for at in range(8)}
        answers = door(server, concurrency=4, timeout=30.0).complete(requests(40))
        assert all(well(answer, at) for at, answer in enumerate(answers))
    assert server.starved == 0 and server.most_at_once == 4 and server.faults["429"] == 16


def test_a_server_that_is_down_is_probed_and_then_left_alone() -> None:
    with BadServer() as server:
        chat = door(server, concurrency=4, patience=0.5, retries=50)
        server.down = True
        answers = chat.complete(requests(200))
        assert {a.kind for a in answers if isinstance(a, ChatError)} == {"connection"} and len(answers) == 200
        assert "was down for 0.5 s" in answers[-1].detail  # type: ignore[union-attr]
        server.down = False
        assert well(chat.complete(requests(1))[0], 0)  # up again: the next call finds out
    with pytest.raises(HouseError, match="no server answers at http"):
        look(Server(server.url))


@pytest.mark.parametrize(
    ("status", "said"),
    [
        (401, "401 from http.*the key is not accepted: no more"),
        (402, "nothing is left on the account: no more"),
        (404, "no such model or address: no more"),
        (307, "it redirects to another address: mend the url"),
    ],
)
def test_what_no_other_request_mends_ends_a_run_that_can_go_on(status: int, said: str) -> None:
    """Told as errors of all that is left, it would finish the step, whose requests are then never asked again."""
    with BadServer(refuse={"question 3": (status, "no more")}) as server:
        chat = ServerChat(Server(server.url, concurrency=1), halts=True)
        got = []
        with pytest.raises(HouseError, match=said) as caught:
            for told in chat.stream(requests(6)):
                got.append(told)
        assert [place for place, _ in got] == [0, 1, 2] and len(server.bodies) == 4
        assert "run the same command again" in str(caught.value)
        assert well(chat.complete(requests(1))[0], 0)
        others = ServerChat(Server(server.url, concurrency=1)).complete(requests(6))
    assert [type(answer).__name__ for answer in others].count("ChatAnswer") == 3
    assert {answer.kind for answer in others if isinstance(answer, ChatError)} == {"refused"}


def test_a_tokenizer_that_is_not_there_ends_a_run_that_can_go_on() -> None:
    long = ChatRequest((("user", "many words " * 100),), 1, Sampling(max_tokens=16))
    with BadServer(context=64) as server:
        chat = ServerChat(Server(server.url, tokenizer="/nowhere"), halts=True)
        with pytest.raises(HouseError, match="there is no model folder /nowhere"):
            chat.complete([long] * 3)
    assert not server.bodies


def test_a_server_that_is_not_reached_says_why() -> None:
    with pytest.raises(HouseError, match=r"no server answers at .* \(.*(refused|Connect call failed|attempts failed)"):
        look(Server("http://127.0.0.1:1/v1"))


def test_a_server_that_stays_down_ends_a_run_that_can_go_on() -> None:
    with BadServer() as server:
        chat = ServerChat(Server(server.url, concurrency=4, patience=0.3, retries=50, backoff=0.005), halts=True)
        server.down = True
        with pytest.raises(HouseError, match=r"was down for 0.3 s, so that no more was asked"):
            chat.complete(requests(80))


@pytest.mark.parametrize(
    ("response", "said"),
    [
        (httpx.Response(404, json={"error": "not here"}), "(404: not here)"),
        (httpx.Response(200, text="<html>log in</html>"), "(200: <html>log in</html>)"),
        (
            httpx.Response(302, headers={"Location": "https://h/v1/models"}),
            "(302, it redirects to https://h/v1/models)",
        ),
        (httpx.Response(200, json={"data": []}), "lists no model"),
    ],
)
def test_a_server_without_a_list_of_models_says_what_came(
    response: httpx.Response, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    transport = httpx.MockTransport(lambda request: response)
    monkeypatch.setattr(server_module, "_how", lambda *_: {"base_url": "http://h/v1/", "transport": transport})
    with pytest.raises(HouseError) as caught:
        look(Server("http://h/v1"))
    assert said in str(caught.value) and "mend the url (it ends with /v1)" in str(caught.value)


def test_a_server_that_comes_back_loses_nothing() -> None:
    with BadServer() as server:
        chat = door(server, concurrency=4, patience=20.0, deadline=5.0, retries=50)
        server.down = True
        threading.Timer(0.5, lambda: setattr(server, "down", False)).start()
        assert all(well(answer, at) for at, answer in enumerate(chat.complete(requests(30))))
    assert max(server.billed.values()) == 1


def test_what_a_server_refuses_is_left_out_from_then_on() -> None:
    schema = json.dumps({"type": "object"})
    with BadServer(refuse={"response_format": (400, "response_format is not supported")}) as server:
        chat = door(server, concurrency=1)
        answers = chat.complete(requests(5, schema=schema))
        assert all(well(answer, at) for at, answer in enumerate(answers))
    assert sum("response_format" in body for body in server.bodies) == 1 and len(server.bodies) == 6
    with BadServer(refuse={"question 2": (400, "this content is not allowed")}) as server:
        answers = door(server).complete(requests(5, schema=schema))
    assert [type(answer).__name__ for answer in answers].count("ChatError") == 1
    assert answers[2] == ChatError("refused", "400: this content is not allowed")
    assert all(body.get("response_format") or "question 2" in str(body["messages"]) for body in server.bodies)


def test_log_probabilities_and_options() -> None:
    with BadServer() as server:
        (one,) = door(server).complete(requests(1, logprobs=True, options=("1", "2", "9")))
        (none,) = door(server).complete(requests(1, options=("a", "b")))
    assert isinstance(one, ChatAnswer) and one.logprobs == (-0.5,) * one.tokens
    assert one.options == (-0.5, -1.0, float("-inf")) and isinstance(none, ChatAnswer) and none.options is None
    assert server.bodies[0]["top_logprobs"] == 20 and server.bodies[0]["seed"] == 0


def test_too_long_prompts_are_found_before_they_are_sent_or_told_by_the_server() -> None:
    long = ChatRequest((("user", "many words " * 100),), 1, Sampling(max_tokens=16))
    words = (
        "This model's maximum context length is 64 tokens. However, you requested {} tokens ({} in the messages, 16)"
    )
    with BadServer(context=64) as server:
        (answer,) = door(server).complete([long])
        assert isinstance(answer, ChatError) and answer.kind == "too_long" and not server.bodies
    with BadServer(context=None, refuse={"many words": (400, words.format(316, 300))}) as server:
        (answer,) = door(server).complete([long])
        assert isinstance(answer, ChatError) and answer.kind == "too_long" and len(server.bodies) == 1
    with BadServer(context=None, refuse={'"max_tokens": 16': (400, words.format(76, 60))}) as server:
        (answer,) = door(server).complete(requests(1))
        assert well(answer, 0) and [body["max_tokens"] for body in server.bodies] == [16, 4]


def test_the_key_is_nowhere_to_be_seen(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    key = "sk-secret-0123456789"
    with BadServer(key=key) as server:
        monkeypatch.setenv("DOOR_KEY", key)
        chat = door(server, key_env="DOOR_KEY")
        assert well(chat.complete(requests(1))[0], 0)
        server.key = "another"  # whose refusal says ours back
        answers = chat.complete(requests(40))
        assert {answer.kind for answer in answers if isinstance(answer, ChatError)} == {"refused"}
        assert len(answers) == 40 and len(server.bodies) == 1  # none got past the key
        with pytest.raises(HouseError, match="does not accept the key in DOOR_KEY") as caught:
            look(Server(server.url, key_env="DOOR_KEY"))
    told = [repr(chat), repr(chat.settings), repr(chat.spend), str(answers), str(caught.value), caplog.text]
    assert not any(key in one for one in told) and "***" in str(answers)
    monkeypatch.delenv("DOOR_KEY")
    with pytest.raises(HouseError, match="the environment variable DOOR_KEY"):
        door(server, key_env="DOOR_KEY")


def test_a_budget_is_never_exceeded() -> None:
    with BadServer() as server:
        settings = Server(server.url, concurrency=8)
        chat = ServerChat(settings, price=(1.0, 2.0), budget=Budget(tokens=400))
        answers = chat.complete(requests(200))
        kinds = Counter(a.kind if isinstance(a, ChatError) else "answered" for a in answers)
    spent = sum(a.prompt_tokens + a.tokens for a in answers if isinstance(a, ChatAnswer))
    most = 16 + 32 + 32  # of one more request: its answer, its prompt by estimate
    assert 400 - most <= spent <= 400 and set(kinds) == {"answered", "budget"}
    assert len(server.bodies) == kinds["answered"]  # what is over is not asked


def test_it_works_beside_a_running_loop_and_in_several_threads() -> None:
    with BadServer(gate=2) as server:
        chat: ChatModel = door(server, concurrency=4)

        async def inside() -> list[ChatAnswer | ChatError]:
            return chat.complete(requests(4))

        found: list[list[ChatAnswer | ChatError]] = []
        threads = [threading.Thread(target=lambda: found.append(asyncio.run(inside()))) for _ in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert len(found) == 3 and all(well(answer, at) for answers in found for at, answer in enumerate(answers))
    assert server.most_at_once <= 4


def test_an_iterator_that_is_closed_drops_what_is_under_way() -> None:
    with BadServer(delay=0.02) as server:
        chat = door(server, concurrency=2)
        come = chat.stream(requests(500))
        next(come)
        come.close()  # type: ignore[attr-defined]
        assert all(well(answer, at) for at, answer in enumerate(chat.complete(requests(3))))
    assert len(server.bodies) < 20


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ({"url": "127.0.0.1:8000"}, "is no http address"),
        ({"url": "http://me:pw@host/v1"}, "holds a password"),
        ({"url": "http://h/v1", "concurrency": 0}, "concurrency is at least 1"),
        ({"url": "http://h/v1", "requests_per_minute": 0}, "requests_per_minute is at least 1"),
    ],
)
def test_settings_that_cannot_work(how: dict[str, object], said: str) -> None:
    with pytest.raises(HouseError, match=said):
        Server(**how)  # type: ignore[arg-type]
