"""vLLM without vLLM: how its server is started, watched and ended, what a recipe may say, what is told without it."""

import importlib.util
import json
import queue
import signal
import subprocess
import sys
import threading
import time
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from gristmill.curation.door import ChatAnswer, ChatRequest, Sampling
from gristmill.curation.folder import HouseError, RunFolder
from gristmill.flows.doors import serving
from gristmill.flows.doors.serving import Serving, vllm_command
from gristmill.flows.doors.settings import Serve, Vllm
from gristmill.flows.models import Workshop
from gristmill.flows.progress import Silent
from gristmill.flows.recipe import dump, load_text
from gristmill.flows.run import run
from tests.flows.conftest import write_chats

STUB = Path(__file__).with_name("vllm_stub.py")


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """What looks like a model's folder to all but those who load it."""
    home = tmp_path / "model"
    home.mkdir()
    (home / "config.json").write_text('{"model_type": "qwen3"}')
    (home / "model.safetensors").write_bytes(b"weights")
    return home


def adapter(folder: Path, weights: str = "a", rank: int = 8, **more: Any) -> Path:
    folder.mkdir()
    (folder / "adapter_config.json").write_text(json.dumps({"r": rank, "peft_type": "LORA"} | more))
    (folder / "adapter_model.safetensors").write_text(weights)
    return folder


@pytest.fixture
def stub(monkeypatch: pytest.MonkeyPatch) -> None:
    """vLLM's server is the stub, and vLLM is installed."""

    def command(home: Path, name: str, port: int, settings: Serve) -> list[str]:
        context = 512 if settings.context is None else 0 if settings.context == 1 else settings.context
        return [sys.executable, str(STUB), str(port), name, str(context)]

    monkeypatch.setattr(serving, "vllm_command", command)
    monkeypatch.setattr(serving, "check_installed", lambda python: None)
    monkeypatch.setattr(serving, "_modules", lambda named: [f"{name}={path}" for name, path in named])
    monkeypatch.setattr(serving.ServerChat, "_count", lambda self, request: 1)  # the model has no tokenizer


def says(chat: Any, text: str) -> str:
    (answer,) = chat.complete([ChatRequest((("user", text),), 0, Sampling(max_tokens=4))])
    assert isinstance(answer, ChatAnswer)
    return answer.text


def gone(pid: int) -> bool:
    """Whether a process ends within a while."""
    for _ in range(300):
        try:
            if Path(f"/proc/{pid}/stat").read_text().split(") ")[1][0] == "Z":
                return True
        except OSError:
            return True
        time.sleep(0.1)
    return False


def engine_of(log: Path) -> int:
    for _ in range(300):
        words = log.read_text().split() if log.is_file() else []
        if "engine" in words and len(words) > words.index("engine") + 1:
            return int(words[words.index("engine") + 1])
        time.sleep(0.1)
    raise AssertionError(f"nothing in {log}")


def test_a_server_answers_and_takes_adapters_while_it_runs(stub: None, model: Path, tmp_path: Path) -> None:
    first, second = adapter(tmp_path / "first"), adapter(tmp_path / "second", "b")
    log, notes = tmp_path / "logs/vllm.log", []
    with Serving(model, Serve(context=99), log=log, name="small", adapters={"one": first}, note=notes.append) as server:
        base, one = server.chat(), server.chat("whatever", first)
        assert (base.name, base.context) == ("small", 99) and says(base, "hello") == "small says hello"
        assert one.name.startswith("one-") and one.digest.startswith(f"{base.digest}+")
        two = server.chat("one", second)  # other weights by the same name
        assert says(two, "hello") == f"{two.name} says hello" and two.name != one.name
        assert server.chat("one", second) is two and server.chat() is base
        with pytest.raises(HouseError, match="Adapter bias is not supported") as caught:
            server.chat("bad", adapter(tmp_path / "bad", bias="all"))
        assert str(log) in str(caught.value)
        with pytest.raises(HouseError, match=r"rank 128, and vLLM was started for 64: .* `max_lora_rank: 128`"):
            server.chat("wide", adapter(tmp_path / "wide", rank=128))
        engine = engine_of(log)
        assert server.running
    server.stop()
    assert not server.running and gone(engine) and "starts" in notes[0]


def test_a_server_that_ends_or_stays_silent_is_told_with_its_log(
    stub: None, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = tmp_path / "log"
    log.write_text("of another start\n")
    with pytest.raises(HouseError, match="ended while it started") as caught:
        Serving(model, Serve(context=1), log=log)
    assert "this model has no context" in str(caught.value) and "another start" not in str(caught.value)
    silent = [sys.executable, "-c", "import time; print('waits', flush=True); time.sleep(600)"]
    monkeypatch.setattr(serving, "vllm_command", lambda *_: silent)
    with pytest.raises(HouseError, match="did not answer within 2 s: give it more, as `startup`"):
        Serving(model, Serve(startup=2.0), log=log)


def test_a_server_ends_with_its_parent_however_that_dies(model: Path, tmp_path: Path) -> None:
    log = tmp_path / "log"
    script = (
        "import os, sys, signal, time; from pathlib import Path\n"
        "from gristmill.flows.doors import serving\n"
        f"stub = [sys.executable, {str(STUB)!r}]\n"
        "serving.check_installed = lambda python: None\n"
        "serving.vllm_command = lambda home, name, port, settings: [*stub, str(port), name, '64']\n"
        f"serving.Serving(Path({str(model)!r}), log=Path({str(log)!r}))\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    assert subprocess.run([sys.executable, "-c", script], timeout=120).returncode == -signal.SIGKILL
    assert gone(engine_of(log))


def test_an_engine_s_processes_end_with_the_run_that_is_killed() -> None:
    script = (
        "import os, signal, subprocess, sys\n"
        "from gristmill.flows.doors.vllm_engine import _watch\n"
        "engine = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'])\n"
        "_watch({engine.pid})\n"
        "print(engine.pid, flush=True)\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    killed = subprocess.run([sys.executable, "-c", script], stdout=subprocess.PIPE, timeout=120)
    assert killed.returncode == -signal.SIGKILL and gone(int(killed.stdout))


def test_without_vllm_it_is_said_what_to_install(model: Path, tmp_path: Path) -> None:
    if importlib.util.find_spec("vllm") is not None:
        pytest.skip("vLLM is installed here")
    from gristmill.flows.doors.vllm_engine import VllmChat

    log, other = tmp_path / "log", Serve(python=sys.executable)
    for start in (lambda: Serving(model, log=log), lambda: Serving(model, other, log=log), lambda: VllmChat(model)):
        with pytest.raises(HouseError, match=f"vLLM is not installed in {sys.executable}.*pip install vllm"):
            start()
    with pytest.raises(HouseError, match="`python: /no/python` of `serve` does not start"):
        Serving(model, Serve(python="/no/python"), log=log)
    assert not (tmp_path / "log").exists()


def test_what_vllm_is_told(model: Path) -> None:
    said = vllm_command(model, "small", 8123, Serve(context=64, eager=True, arguments=("--quantization", "fp8")))
    assert said[1:3] == ["-m", "vllm.entrypoints.openai.api_server"] and said[-2:] == ["--quantization", "fp8"]
    pairs = dict(pairwise(said))
    assert (
        pairs["--max-model-len"] == "64" and pairs["--host"] == "127.0.0.1" and pairs["--generation-config"] == "vllm"
    )
    assert "--enforce-eager" in said and "--enable-lora" in said
    assert ("--no-enable-chunked-prefill" in said) != torch.cuda.is_available()  # its engine would die on a CPU


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"dtype": "fp8"}, "dtype 'fp8' is none of auto"),
        ({"memory": 1.5}, "memory is a share"),
        ({"concurrency": 0}, "concurrency, adapters and context are at least 1"),
        ({"max_lora_rank": 48}, "max_lora_rank is one of 1, 8, 16"),
    ],
)
def test_settings_that_no_vllm_takes(settings: dict[str, Any], said: str) -> None:
    for kind in (Vllm, Serve):
        with pytest.raises(HouseError, match=f"{kind.__name__}: {said}"):
            kind(**settings)


RECIPE = """\
name: served
licences: [MIT]
sources:
  chats: {path: "CHATS", licence: MIT}
models:
  small: SMALL
stages:
  - curate: {set: clean, sources: [chats], held_out: 0.1, steps: [ExactDuplicate]}
  - curate:
      set: pairs
      kind: preference
      steps:
        - PreferenceFromModel: {model: small, set_name: clean, prompts: 6, test_prompts: 2, max_tokens: 16}
"""


@pytest.mark.parametrize(
    ("small", "said"),
    [
        ("{server: {url: 'http://127.0.0.1:1/v1'}, serve: {}}", "model 'small' has no `path`: a server is started"),
        ("{path: a, serve: {}, vllm: {}}", "model 'small' has both `vllm` and `serve`"),
        ("{path: a, serve: {startup: 0}}", "startup, timeout and deadline are above 0"),
        ("{path: a, serve: {contxt: 5}}", "unknown key 'contxt' in Serve; did you mean 'context'?"),
    ],
)
def test_what_a_model_cannot_say(small: str, said: str) -> None:
    with pytest.raises(HouseError) as caught:
        load_text(RECIPE.replace("SMALL", small))
    assert said in str(caught.value)


def test_adapters_of_a_recipe_say_for_which_rank_vllm_is_started(tmp_path: Path) -> None:
    def rank(small: str, stages: str = "") -> int | None:
        text = RECIPE.replace("SMALL", small) + stages
        doors = Workshop(load_text(text), RunFolder(tmp_path / "out")).doors
        spec = doors.spec("small")
        return doors._fitted("small", spec.serve or spec.vllm or Vllm()).max_lora_rank

    stages = "".join(f"  - sft: {{set: clean, model: small, name: s{n}, lora: {{rank: {n}}}}}\n" for n in (4, 12))
    for kind in ("vllm", "serve"):
        assert rank(f"{{path: a, {kind}: {{}}}}") is None
        assert rank(f"{{path: a, {kind}: {{}}}}", stages) == 16  # the least that vLLM knows above 12
        assert rank(f"{{path: a, {kind}: {{max_lora_rank: 128}}}}", stages) == 128
        assert rank(f"{{path: a, {kind}: {{}}}}", "  - sft: {set: clean, model: small, lora: null}\n") is None


def test_a_run_starts_one_server_and_ends_it(stub: None, model: Path, tmp_path: Path) -> None:
    chats = write_chats(tmp_path / "chats.jsonl", 40)
    written = f"{{path: {model}, licence: MIT, serve: {{context: 512, arguments: [--seed, '1']}}}}"
    recipe = load_text(RECIPE.replace("SMALL", written).replace("CHATS", str(chats)))
    assert load_text(dump(recipe)) == recipe
    run(recipe, tmp_path / "out", show=Silent())
    assert gone(engine_of(tmp_path / "out/answers/vllm-small.log"))
    assert '"answered": 8' in (tmp_path / "out/spend.json").read_text()
    assert run(recipe, tmp_path / "out", show=Silent()).cached


def test_adapters_share_an_engine_and_a_closed_one_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """The engine's thread, with an engine that answers each request in the step after it came."""
    from gristmill.flows.doors import vllm_engine

    class Fake:
        def __init__(self) -> None:
            self.asked: list[str] = []
            self.engine_core = SimpleNamespace(shutdown=lambda timeout: None)
            self.dead = False

        def add_request(self, name: str, prompt: Any, params: Any, lora_request: Any) -> None:
            if params == "bad":
                raise ValueError("no such sampling")
            self.asked.append(name)

        def abort_request(self, names: list[str]) -> None:
            self.asked = [name for name in self.asked if name not in names]

        def step(self) -> list[Any]:
            if self.dead:
                raise RuntimeError("out of memory")
            done, self.asked = self.asked, []
            return [SimpleNamespace(finished=True, request_id=name) for name in done]

    errors = SimpleNamespace(EngineDeadError=type("EngineDeadError", (Exception,), {}))
    inputs = SimpleNamespace(tokens_input=lambda ids: ids)
    for name, module in (("vllm.v1.engine.exceptions", errors), ("vllm.inputs.engine", inputs)):
        monkeypatch.setitem(sys.modules, name, module)  # type: ignore[arg-type]
    fake = Fake()
    engine = object.__new__(vllm_engine.Engine)
    engine.home, engine._inbox = Path("model"), queue.SimpleQueue()
    engine._thread = threading.Thread(target=vllm_engine._pump, args=(fake, engine._inbox), daemon=True)
    engine._thread.start()
    asked = [(at, [at], "bad" if at == 3 else "good") for at in range(600)]
    found = dict(engine.run(iter(asked), None))
    assert sorted(found) == list(range(600)) and [at for at in found if isinstance(found[at], ValueError)] == [3]
    half = engine.run(iter(asked), None)
    next(half)
    half.close()
    assert len(dict(engine.run(iter(asked[:2]), "lora"))) == 2
    fake.dead = True
    for _ in range(2):  # those under way, and those that come later
        with pytest.raises(HouseError, match="vLLM's engine of model ended: out of memory"):
            list(engine.run(iter(asked[:5]), None))
    engine._inbox.put(None)
    engine._thread.join(10)
    with pytest.raises(HouseError, match="was closed"):
        list(engine.run(iter(asked[:5]), None))
