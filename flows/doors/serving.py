"""A vLLM server of our own on this machine: started with a model's folder, adapters loaded beside it while it runs.

    with Serving(Path("models/small"), Serve(context=1024), log=Path("vllm.log")) as server:
        base = server.chat()
        tuned = server.chat("sft", Path("out/sft/adapter"))

It listens on 127.0.0.1 alone, speaks to no one else, and ends with this process, however that ends (guard.py).
"""

import contextlib
import importlib.util
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import httpx

from ...curation.folder import HouseError, read_json
from ...tuning.digests import model_digest
from ...tuning.servable import TARGETS, needed_rank
from .guard import GRACE
from .server import ServerChat, look
from .settings import Serve, Server, Vllm, lora_rank

QUIET = {"VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1", "HF_HUB_OFFLINE": "1", "VLLM_LOGGING_LEVEL": "INFO"}
ON_CPU = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_EXECUTE_MODEL_TIMEOUT_SECONDS": "3600"}  # GiB; a busy machine is slow
# A prompt with a seed that is taken in pieces ends vLLM's engine on a CPU, whose random numbers have no offset.
CHUNKED = "enable-chunked-prefill"
TAIL = 12  # lines of a log in an error
INSTALL = (
    "With a GPU: pip install vllm. Without one, as tests/vllm/requirements.txt says (`make test-vllm` makes such an"
    " environment, .venv-vllm). If it has an environment of its own, name that: `serve: {python: …/bin/python}`. Or"
    " leave `vllm` and `serve` out: transformers answers then, slower"
)

Note = Callable[[str], None]


class Serving:
    """A running server. url: up to its version. name: the model's, by which it is asked."""

    def __init__(
        self,
        home: Path,
        settings: Serve | None = None,
        *,
        log: Path,
        name: str = "base",
        adapters: Mapping[str, Path] | None = None,
        note: Note | None = None,
    ) -> None:
        """Starts it and waits until it answers. home: the model's folder; log: what the server says, appended;
        adapters: those that it starts with, by name; note: is told how the start goes.

        Raises HouseError where vLLM is not installed or the server ends or stays silent for `settings.startup`."""
        self.home, self.settings, self.name, self.log = home, settings or Serve(), name, log
        check_installed(self.settings.python)
        self.digest = model_digest(home)
        self._note: Note = note or (lambda text: None)
        self._chats: dict[str, ServerChat] = {}
        port = self.settings.port or free_port()
        self.url = f"http://127.0.0.1:{port}/v1"
        begun = [self._named(key, folder) for key, folder in (adapters or {}).items()]
        self._loaded = {model_digest(Path(path)): served for served, path in begun}  # names of adapters
        command = [*vllm_command(home, name, port, self.settings), *_modules(begun)]
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("ab") as said:
            self._start_of_log = said.tell()
            self._process = subprocess.Popen(
                [sys.executable, "-m", f"{__package__}.guard", *command],
                env=environment(VLLM_ALLOW_RUNTIME_LORA_UPDATING="True"),
                stdin=subprocess.PIPE,
                stdout=said,
                stderr=said,
                start_new_session=True,  # out of the terminal's reach: Ctrl-C ends it through us
            )
        try:
            self._wait()
        except BaseException:
            self.stop()
            raise

    # ---- asking

    def chat(
        self,
        name: str | None = None,
        adapter: Path | None = None,
        **how: Any,
    ) -> ServerChat:
        """The model itself or, with `adapter`, the adapter in that folder, which is loaded where it is not there yet.
        name: as the recipe calls the adapter. how: licence, price, budget and spend, as of ServerChat."""
        served, digest = self.name, self.digest
        if adapter is not None:
            served = self.load(name or adapter.name, adapter)
            digest = f"{self.digest}+{model_digest(adapter)}"
        if served not in self._chats:
            asked = Server(
                self.url,
                served,
                concurrency=2 * self.settings.concurrency,  # those that the server has waiting keep its batch full
                timeout=self.settings.timeout,
                deadline=self.settings.deadline,
                retries=self.settings.retries,
                context=self.settings.context,
                tokenizer=str(self.home),
            )
            self._chats[served] = ServerChat(asked, look(asked, digest), **how)
        return self._chats[served]

    def load(self, name: str, folder: Path) -> str:
        """Loads an adapter beside the model; the name under which it is asked, which tells its contents: another one
        of the same name is served beside it."""
        digest = model_digest(folder)
        if digest in self._loaded:
            return self._loaded[digest]
        served, path = self._named(name, folder)
        answer = self._post("load_lora_adapter", {"lora_name": served, "lora_path": path})
        if answer.status_code != 200:
            raise HouseError(f"vLLM does not serve the adapter in {folder}: {_words(answer)}. Its log: {self.log}")
        self._loaded[digest] = served
        return served

    def _named(self, name: str, folder: Path) -> tuple[str, str]:
        check_rank(folder, self.settings)
        return f"{name}-{model_digest(folder)[:8]}", str(folder.resolve())

    def _post(self, path: str, said: dict[str, Any]) -> httpx.Response:
        try:
            return httpx.post(f"{self.url}/{path}", json=said, timeout=self.settings.timeout, trust_env=False)
        except httpx.HTTPError as error:
            raise HouseError(f"the vLLM server of {self.home} does not answer: {error}.\n{self._tail()}") from error

    # ---- beginning and end

    @property
    def running(self) -> bool:
        return self._process.poll() is None

    def stop(self) -> None:
        """Ends the server and all its processes. Twice does no harm."""
        for chat in self._chats.values():
            with contextlib.suppress(Exception):
                chat.close()
        self._chats = {}
        process = self._process
        if process.stdin is not None:
            process.stdin.close()
        try:
            process.wait(GRACE + 20)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def _wait(self) -> None:
        begun = time.monotonic()
        health = self.url.removesuffix("/v1") + "/health"
        while time.monotonic() - begun < self.settings.startup:
            if not self.running:
                raise HouseError(f"vLLM's server of {self.home} ended while it started. {self._tail()}")
            self._note(f"vLLM's server starts, {time.monotonic() - begun:.0f} s: {self._last()}")
            with contextlib.suppress(httpx.HTTPError):
                if httpx.get(health, timeout=5, trust_env=False).status_code == 200:
                    return
            time.sleep(0.25)
        raise HouseError(
            f"vLLM's server of {self.home} did not answer within {self.settings.startup:g} s: give it more, as"
            f" `startup`. {self._tail()}"
        )

    def _lines(self) -> list[str]:
        with self.log.open("rb") as said:
            said.seek(max(self._start_of_log, self.log.stat().st_size - 20_000))
            lines = said.read().decode(errors="replace").splitlines()
        return [line for line in lines if line.strip()]

    def _last(self) -> str:
        lines = self._lines()
        return lines[-1].split("] ", 1)[-1][:80] if lines else ""

    def _tail(self) -> str:
        return f"The end of its log, {self.log}:\n" + "\n".join(self._lines()[-TAIL:])


# ---- what vLLM is told


def check_installed(python: str | None = None) -> None:
    """HouseError, with what to install, where vLLM is not there. python: of another environment than this one."""
    if not python:
        if importlib.util.find_spec("vllm") is None:
            raise HouseError(f"vLLM is not installed in {sys.executable}. {INSTALL}")
        return
    asked = [python, "-c", "import importlib.util, sys; sys.exit(importlib.util.find_spec('vllm') is None)"]
    try:
        found = subprocess.run(asked, capture_output=True, text=True)
    except OSError as error:
        raise HouseError(f"`python: {python}` of `serve` does not start: {error}") from error
    if found.returncode:
        raise HouseError(f"vLLM is not installed in {python}. {INSTALL}")


def environment(**more: str) -> dict[str, str]:
    """This process' environment with vLLM's settings where the user has set none: quiet, offline, and on a CPU with a
    cache of a size that any machine has."""
    import torch

    ours = QUIET | more | ({} if torch.cuda.is_available() else ON_CPU)
    return ours | dict(os.environ)


def check_rank(adapter: Path, settings: Vllm | Serve) -> None:
    """HouseError where an adapter's rank is above what the engine was started for."""
    path = adapter / "adapter_config.json"
    if not path.is_file():
        raise HouseError(f"{adapter} holds no adapter_config.json: give the folder of a LoRA adapter")
    said = read_json(path)
    rank = max([said.get("r", 0), *(said.get("rank_pattern") or {}).values()])
    if rank > lora_rank(settings):
        raise HouseError(
            f"the adapter in {adapter} has rank {rank}, and vLLM was started for {lora_rank(settings)}: give the"
            f" model `max_lora_rank: {needed_rank(rank) or 512}`"
        )


def vllm_command(home: Path, name: str, port: int, settings: Serve) -> list[str]:
    """The server's command line. `python -m`, since the command `vllm` is missing from the CPU build."""
    import torch

    said = {
        "model": str(home.resolve()),
        "served-model-name": name,
        "host": "127.0.0.1",
        "port": port,
        "dtype": settings.dtype,
        "seed": settings.seed,
        "max-num-seqs": settings.concurrency,
        "max-lora-rank": lora_rank(settings),
        "max-loras": settings.adapters,
        "gpu-memory-utilization": settings.memory,
        "generation-config": "vllm",  # no sampling but what a request says; end tokens are read all the same
    }
    if settings.context is not None:
        said["max-model-len"] = settings.context
    flags = ["--enable-lora", "--lora-target-modules", *sorted(TARGETS), "--no-enable-log-requests"]
    flags += ["--disable-uvicorn-access-log", *(["--enforce-eager"] if settings.eager else [])]
    flags += [] if torch.cuda.is_available() else [f"--no-{CHUNKED}"]
    pairs = [part for key, value in said.items() for part in (f"--{key}", str(value))]
    return [
        settings.python or sys.executable,
        "-m",
        "vllm.entrypoints.openai.api_server",
        *pairs,
        *flags,
        *settings.arguments,
    ]


def _modules(named: list[tuple[str, str]]) -> list[str]:
    return ["--lora-modules", *(f"{name}={path}" for name, path in named)] if named else []


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _words(answer: httpx.Response) -> str:
    from .wire import shortened, words_of

    return shortened(words_of(answer.content))
