"""The door, through a real vLLM: a server that gristmill starts, and an engine in this process, asked the same.

One server and one engine for all tests. Not among the tests that `pytest` collects by itself: `make test-vllm`.
"""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import pytest
from safetensors.torch import load_file, save_file

from gristmill.curation.door import ChatAnswer, ChatError, ChatModel, ChatRequest, Sampling, StreamingChat
from gristmill.curation.folder import HouseError
from gristmill.curation.rows import message, table
from gristmill.flows.doors.kept import Answers, KeptChat
from gristmill.flows.doors.serving import Serving
from gristmill.flows.doors.settings import Serve, Vllm
from gristmill.flows.doors.wire import Told
from gristmill.tuning.generate import TransformersChat
from gristmill.tuning.score import PackedScorer
from tests.vllm.conftest import CONTEXT, TALK

pytest.importorskip("vllm", reason="vLLM is not installed here: run `make test-vllm`")
pytestmark = pytest.mark.timeout(3600)  # a server takes a minute to start, on a busy machine many
HOW: dict[str, Any] = {"dtype": "float32", "eager": True, "concurrency": 16, "max_lora_rank": 8, "context": CONTEXT}


@dataclass
class Door:
    """A base model, a tuned adapter on it, and another adapter, which says other things."""

    base: Any
    tuned: Any
    other: Any
    serving: Serving | None = None


@pytest.fixture(scope="session")
def other(home: Path) -> Path:
    """The adapter with its sign turned."""
    folder = home / "other"
    folder.mkdir()
    weights = load_file(home / "run/adapter/adapter_model.safetensors")
    turned = {name: -weight if "lora_B" in name else weight for name, weight in weights.items()}
    save_file(turned, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text((home / "run/adapter/adapter_config.json").read_text())
    return folder


@pytest.fixture(scope="session")
def served(home: Path, other: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Door]:
    """A server that begins with one adapter and is given the other while it runs."""
    log = tmp_path_factory.mktemp("log") / "vllm.log"
    with Serving(home / "base", Serve(**HOW), log=log, adapters={"tuned": home / "run/adapter"}) as serving:
        yield Door(serving.chat(), serving.chat("t", home / "run/adapter"), serving.chat("other", other), serving)


@pytest.fixture(scope="session")
def in_process(home: Path, other: Path) -> Iterator[Door]:
    from gristmill.flows.doors.vllm_engine import Engine, VllmChat

    engine = Engine(home / "base", Vllm(**HOW))
    yield Door(*(VllmChat(home / "base", one, engine=engine) for one in (None, home / "run/adapter", other)))
    engine.close()
    with pytest.raises(HouseError, match="was closed"):
        VllmChat(home / "base", engine=engine).complete(asked(1))


@pytest.fixture(scope="session", params=["served", "in process"])
def door(request: pytest.FixtureRequest) -> Door:
    found: Door = request.getfixturevalue(request.param.replace(" ", "_"))
    return found


@pytest.fixture(scope="session")
def ours(home: Path) -> Door:
    """The same models by transformers."""
    adapters = (None, home / "run/adapter", home / "other")
    return Door(*(TransformersChat(home / "base", one, dtype="fp32", device="cpu") for one in adapters))


def asked(count: int, **sampling: Any) -> list[ChatRequest]:
    how = Sampling(**({"temperature": 1.0, "top_p": 0.9, "max_tokens": 12} | sampling))
    return [ChatRequest((("user", f"{TALK[at % 3][0]} {'river ' * (at % 5)}"),), at, how) for at in range(count)]


def talk(**sampling: Any) -> list[ChatRequest]:
    how = Sampling(**({"temperature": 0.0, "max_tokens": 12} | sampling))
    return [ChatRequest((("user", ask),), 0, how) for ask, _ in TALK]


def answers(chat: ChatModel, requests: Sequence[ChatRequest]) -> list[ChatAnswer]:
    found = chat.complete(requests)
    assert all(isinstance(one, ChatAnswer) for one in found), found
    return [one for one in found if isinstance(one, ChatAnswer)]


def test_what_was_learnt_is_said_in_order(door: Door, ours: Door) -> None:
    seen: list[tuple[int, int]] = []
    found = door.tuned.complete(talk(), lambda done, total: seen.append((done, total)))
    assert [one.text for one in found] == [say for _, say in TALK]
    assert all(one.finished and not one.cached for one in found)
    assert seen == [(1, 3), (2, 3), (3, 3)]
    assert [(a.text, a.prompt_tokens, a.tokens, a.finished) for a in found] == [
        (a.text, a.prompt_tokens, a.tokens, a.finished) for a in answers(ours.tuned, talk())
    ]
    assert door.tuned.digest == ours.tuned.digest and door.base.digest == ours.base.digest
    assert isinstance(door.base, StreamingChat) and door.base.complete([]) == []


def test_answers_depend_on_their_seeds_alone(door: Door) -> None:
    requests = asked(24)
    together = answers(door.base, requests)
    alone = [answers(door.base, [request])[0] for request in requests[:6]]
    backwards = answers(door.base, requests[::-1])[::-1]
    assert alone == together[:6] and backwards == together
    again = [ChatRequest(request.messages, request.seed + 1000, request.sampling) for request in requests]
    assert sum(a.text != b.text for a, b in zip(together, answers(door.base, again), strict=True)) > 12


def test_both_doors_draw_alike(served: Door, in_process: Door) -> None:
    """One engine behind both: what a seed draws does not depend on how it was asked."""
    pairs = zip(answers(served.base, asked(24)), answers(in_process.base, asked(24)), strict=True)
    assert sum(a.text == b.text for a, b in pairs) == 24


def test_adapters_answer_beside_their_base(door: Door, ours: Door) -> None:
    texts = []
    streams = [chat.stream(talk()) for chat in (door.base, door.tuned, door.other)]  # all under way at once
    for told, own in zip(streams, (ours.base, ours.tuned, ours.other), strict=True):
        found = dict(told)
        texts.append([found[place].text.rstrip("�") for place in range(3)])
        # vLLM leaves out a letter that the last token only begins
        assert texts[-1] == [one.text.rstrip("�") for one in answers(own, talk())]
    assert texts[0] != texts[1] != texts[2] != texts[0]


def test_too_long_prompts_harm_no_other(door: Door) -> None:
    long = ChatRequest((("user", "river " * 400),), 1, Sampling(max_tokens=4))
    (first, second, third) = door.base.complete([talk()[0], long, talk(max_tokens=1000)[1]])
    assert isinstance(first, ChatAnswer) and isinstance(second, ChatError) and second.kind == "too_long"
    assert isinstance(third, ChatAnswer) and third.prompt_tokens + third.tokens <= CONTEXT  # cut to what is left


def test_an_answer_ends_before_what_stops_it(door: Door) -> None:
    whole = answers(door.tuned, talk())
    stopped = answers(door.tuned, talk(stop=("river", "bread")))
    assert [one.text for one in whole] == ["The mill.", "The river.", "Flour, then bread."]
    assert [one.text for one in stopped] == ["The mill.", "The ", "Flour, then "]
    assert all(one.finished for one in stopped)
    (short,) = answers(door.tuned, talk(max_tokens=2)[:1])
    assert short.tokens == 2 and not short.finished


def test_a_schema_is_held(door: Door) -> None:
    schema = json.dumps({"type": "object", "properties": {"it": {"enum": ["mill", "river"]}}, "required": ["it"],
                         "additionalProperties": False})  # fmt: skip
    for one in answers(door.base, asked(6, schema=schema, max_tokens=60)):
        assert not one.finished or json.loads(one.text)["it"] in ("mill", "river")
        assert one.text.lstrip().startswith("{")
    no_json, no_schema, fine = door.base.complete([*asked(1, schema="{"), *asked(1, schema='{"type": 5}'), *talk()[:1]])
    assert isinstance(no_json, ChatError) and no_json.kind == "refused" and isinstance(fine, ChatAnswer)
    if door.serving is None:  # what a server refuses of an answer's form is left out, and asked again
        assert isinstance(no_schema, ChatError) and no_schema.kind == "refused"


def test_log_probabilities_are_the_model_s_own(door: Door, ours: Door) -> None:
    found, own = (answers(one.tuned, talk(logprobs=True)) for one in (door, ours))
    for a, b in zip(found, own, strict=True):
        assert a.logprobs is not None and len(a.logprobs) == a.tokens
        assert a.logprobs == pytest.approx(b.logprobs, abs=2e-3)
    (drawn,) = answers(door.tuned, talk(logprobs=True, temperature=0.3)[:1])
    assert drawn.text == found[0].text and drawn.logprobs == pytest.approx(found[0].logprobs, abs=2e-3)
    assert answers(door.tuned, talk())[0].logprobs is None


def test_options_are_told_by_their_first_tokens(door: Door, ours: Door) -> None:
    options = ("The", ".")
    mixed = [*talk(options=options), *talk(options=options, logprobs=True), *talk(logprobs=True)]
    found, own = answers(door.tuned, mixed), answers(ours.tuned, mixed)
    for a, b in zip(found, own, strict=True):
        assert (a.logprobs is None) == (b.logprobs is None)
        told = [(x, y) for x, y in zip(a.options or (), b.options or (), strict=False) if x > float("-inf")]
        assert all(x == pytest.approx(y, abs=5e-3) for x, y in told)
        assert b.options is None or len(told) == 2 or door.serving is not None  # which tells of the likeliest 20
    assert max(found[0].options or (-9.0,)) > -0.1 and found[-1].options is None


def test_answers_come_before_the_last_is_done(door: Door) -> None:
    requests = [*asked(40, max_tokens=60, stop=()), *asked(1, max_tokens=1)]
    places = [place for place, _ in door.base.stream(requests)]
    assert sorted(places) == list(range(41)) and places != sorted(places)
    stream = door.base.stream(requests)
    next(stream)
    stream.close()  # drops the rest
    assert answers(door.tuned, talk())[0].text == "The mill."


@dataclass
class Counting:
    """Counts what is asked."""

    chat: Any
    asked: list[ChatRequest] = field(default_factory=list)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.chat, name)

    def complete(self, requests: Sequence[ChatRequest], progress: Any = None) -> list[ChatAnswer | ChatError]:
        self.asked += requests
        return list(self.chat.complete(requests, progress))

    def stream(self, requests: Sequence[ChatRequest]) -> Iterator[Told]:
        self.asked += requests
        yield from self.chat.stream(requests)


def kept(path: Path, chat: Any) -> KeptChat:
    return KeptChat(Answers(path), lambda: chat, name="kept", digest=chat.digest)


def test_what_was_answered_is_not_asked_again(door: Door, tmp_path: Path) -> None:
    first = kept(tmp_path / "a.sqlite", door.base)
    half = answers(first, asked(20))
    counting = Counting(door.base)
    whole = answers(kept(tmp_path / "a.sqlite", counting), asked(30))
    assert [one.text for one in whole[:20]] == [one.text for one in half] and len(counting.asked) == 10
    assert [one.cached for one in whole] == [True] * 20 + [False] * 10


ASKS = """
import os, signal, sys
from pathlib import Path
from gristmill.curation.door import ChatRequest, Sampling
from gristmill.flows.doors.kept import Answers, KeptChat
from gristmill.flows.doors.server import ServerChat
from gristmill.flows.doors.settings import Server
chat = ServerChat(Server(sys.argv[1], "base", concurrency=2))
kept = KeptChat(Answers(Path(sys.argv[2])), lambda: chat, name="kept", digest=sys.argv[3])
how = Sampling(temperature=1.0, top_p=0.9, max_tokens=100)
told = kept.stream([ChatRequest((("user", f"river {at}"),), at, how) for at in range(40)])
for _ in range(5):
    next(told)
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_killed_run_goes_on_where_it_was(served: Door, tmp_path: Path) -> None:
    assert served.serving is not None
    path = tmp_path / "answers.sqlite"
    command = [sys.executable, "-c", ASKS, served.serving.url, str(path), served.base.digest]
    assert subprocess.run(command, check=False).returncode == -signal.SIGKILL
    how = Sampling(temperature=1.0, top_p=0.9, max_tokens=100)
    requests = [ChatRequest((("user", f"river {at}"),), at, how) for at in range(40)]
    counting = Counting(served.base)
    found = answers(kept(path, counting), requests)
    assert 0 < len(counting.asked) <= 35 and sum(one.cached for one in found) == 40 - len(counting.asked)
    assert [one.text for one in found] == [one.text for one in answers(served.base, requests)]


def test_scores_are_those_of_packed_scoring(in_process: Door, home: Path) -> None:
    say = [*[say for _, say in TALK], "river " * 300, "", "The mill. " * 8]
    turns = [[message("user", "What grinds?"), message("assistant", one)] for one in say]
    rows = table([{"messages": one} for one in [*turns, turns[0][:1]]])
    seen: list[tuple[int, int]] = []
    for chat, adapter in ((in_process.base, None), (in_process.tuned, home / "run/adapter")):
        found = chat.response_scores(rows, lambda *at: seen.append(at), alone=True)
        own = PackedScorer(home / "base", adapter, dtype="fp32", device="cpu").response_scores(rows, alone=True)
        assert found.schema == own.schema
        for name in ("tokens", "prompt_tokens"):
            assert found[name].to_pylist() == own[name].to_pylist()
        for name in ("nll", "alone_nll", "mean_prob", "min_prob"):
            for x, y, many in zip(
                found[name].to_pylist(), own[name].to_pylist(), own["tokens"].to_pylist(), strict=True
            ):
                assert (x is None) == (y is None) and (x is None or x == pytest.approx(y, abs=1e-4 * many)), name
        assert found["nll"].null_count == 2  # the one too long, and the one without an answer
    assert seen and all(total == 7 and 0 <= done <= 7 for done, total in seen)


def test_an_adapter_that_vllm_does_not_take(door: Door, home: Path, tmp_path: Path) -> None:
    from gristmill.flows.doors.vllm_engine import VllmChat

    said = json.loads((home / "run/adapter/adapter_config.json").read_text())
    (tmp_path / "adapter_model.safetensors").write_bytes((home / "other/adapter_model.safetensors").read_bytes())
    (tmp_path / "adapter_config.json").write_text(json.dumps(said | {"r": 16}))
    with pytest.raises(HouseError, match="`max_lora_rank: 16`"):
        if door.serving is not None:
            door.serving.chat("wide", tmp_path)
        else:
            VllmChat(home / "base", tmp_path, engine=door.base.engine)


def test_a_server_ends_with_its_parent_however_that_dies(home: Path, tmp_path: Path) -> None:
    """Killed without a word while its server starts: nothing of it is left."""
    script = (
        "import sys; from pathlib import Path; from gristmill.flows.doors.serving import Serving\n"
        "Serving(Path(sys.argv[1]), log=Path(sys.argv[2]))\n"
    )
    process = subprocess.Popen([sys.executable, "-c", script, str(home / "base"), str(tmp_path / "log")])
    until(lambda: any("api_server" in " ".join(one.cmdline()) for one in children(process.pid)))
    offspring = children(process.pid)
    process.kill()
    process.wait()
    until(lambda: not any(one.is_running() and one.status() != psutil.STATUS_ZOMBIE for one in offspring))


def children(pid: int) -> list[psutil.Process]:
    try:
        return [one for one in psutil.Process(pid).children(recursive=True) if one.is_running()]
    except psutil.NoSuchProcess:
        return []


def until(true: Any, seconds: float = 600.0) -> None:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        try:
            if true():
                return
        except psutil.NoSuchProcess:
            pass
        time.sleep(0.2)
    raise AssertionError(f"not within {seconds:g} s")


def test_a_folder_without_a_model_is_told_with_the_log_s_end(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(HouseError, match="ended while it started") as caught:
        Serving(tmp_path, Serve(), log=tmp_path / "vllm.log")
    assert "vllm.log" in str(caught.value) and len(str(caught.value).splitlines()) > 3


RECIPE = """\
name: served
licences: [MIT]
sources:
  chats: {path: "CHATS", licence: MIT}
models:
  base: {path: "BASE", licence: MIT, serve: {context: 128, dtype: float32, eager: true, concurrency: 16}}
stages:
  - curate: {set: clean, sources: [chats], held_out: 0.1, steps: [ExactDuplicate]}
  - sft: {set: clean, model: base, max_steps: 2, capacity: 128, packs_per_step: 1, threads: 1, lora: {rank: 4}}
  - curate:
      set: pairs
      kind: preference
      steps:
        - PreferenceFromModel: {model: base, set_name: clean, prompts: 6, test_prompts: 2, max_tokens: 6}
        - PreferenceFromModel: {model: sft, set_name: clean, prompts: 6, test_prompts: 2, max_tokens: 6}
"""


def test_a_run_starts_its_server_and_asks_a_stage_through_it(home: Path, tmp_path: Path) -> None:
    from gristmill.flows.progress import Silent
    from gristmill.flows.recipe import load_text
    from gristmill.flows.run import run

    chats = tmp_path / "chats.jsonl"
    with chats.open("w") as file:
        for at in range(40):
            turns = [
                {"role": "user", "content": f"{TALK[at % 3][0]} {at}"},
                {"role": "assistant", "content": f"Mill {at}."},
            ]
            file.write(json.dumps({"messages": turns}) + "\n")
    recipe = load_text(RECIPE.replace("CHATS", str(chats)).replace("BASE", str(home / "base")))
    before = {one.pid for one in children(os.getpid())}
    run(recipe, tmp_path / "out", show=Silent())
    told = json.loads((tmp_path / "out/spend.json").read_text())
    models = told["starts"][0]["models"]
    assert models["base"]["answered"] == 8 and models["sft"]["answered"] == 8
    assert len(list((tmp_path / "out/answers").glob("*.log"))) == 1  # one server for both
    assert {one.pid for one in children(os.getpid())} <= before
