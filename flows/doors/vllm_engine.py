"""vLLM in this process: one engine for a base model and all adapters on it, to which several callers may talk at once.

The engine is stepped in a thread of its own, so that answers are read, kept and verified while others are made;
requests of all callers and adapters share its batches. A request is sent as token ids of our own rendering of the chat
template, with a seed of its own: what it draws depends on it alone. What is left to its batch is floating point, since
vLLM's kernels pick other matrix sizes for other batches: in float32 on a CPU, answers were equal whatever the batch,
order and concurrency (tests/vllm/door.py); in bfloat16 a token whose rival is within rounding may change, and the
answer from there on. On GPUs that vLLM lists for it, VLLM_BATCH_INVARIANT=1 buys equal answers with some speed.
"""

import json
import os
import queue
import subprocess
import sys
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import count, islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from ...curation.door import ChatAnswer, ChatError, ChatRequest, Progress
from ...curation.folder import HouseError
from ...tuning.chat import Tokens, conversation_ids
from ...tuning.digests import model_digest
from ...tuning.generate import first_tokens, new_tokens
from ...tuning.models import load_tokenizer
from ...tuning.score import Scorer
from ...tuning.servable import TARGETS, check_servable
from .serving import CHUNKED, ON_CPU, check_installed, check_rank
from .settings import Vllm, lora_rank
from .wire import Told, in_order, shortened

AT_ONCE = 256  # requests rendered, and taken in between two steps, at once
MOST_OPTIONS = 64  # of one request; of more, none are told


@dataclass(frozen=True)
class _Job:
    """One request of vLLM's own kind. place: its caller's name for it; reply: where what comes of it is put."""

    place: int
    prompt: list[int]
    params: Any
    lora: Any
    reply: "queue.SimpleQueue[_Reply]"


@dataclass(frozen=True)
class _Drop:
    """All requests of a caller that no longer listens."""

    reply: "queue.SimpleQueue[_Reply]"


_Reply = tuple[int, Any] | BaseException  # a place with vLLM's output, or with what it said against the request


class Engine:
    """A loaded base model. Ended by `close`, or when nobody holds it and nobody is being answered any more."""

    def __init__(self, home: Path, settings: Vllm | None = None, *, lora: bool = True, llm: Any = None) -> None:
        """home: the base model's folder. lora: whether adapters may be asked for. llm: what `load` loaded, if it is
        loaded already; nobody else may ask it meanwhile. Raises HouseError where vLLM is not installed or does not take
        the model, in its words."""
        if llm is None:
            check_installed()  # before anything else can go wrong
        self.home, self.settings, self.lora = home, settings or Vllm(), lora
        self.digest, self.tokenizer = model_digest(home), load_tokenizer(home)
        self._adapters: dict[str, Any] = {}
        before = _children()
        engine = (load(home, self.settings, lora) if llm is None else llm).llm_engine
        watch = _watch(_children() - before)
        self.context = int(engine.model_config.max_model_len)
        self._inbox: queue.SimpleQueue[_Job | _Drop | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=_pump, args=(engine, self._inbox), name="vllm", daemon=True)
        self._thread.start()
        self._end = weakref.finalize(self, _end, self._inbox, self._thread, watch)

    def close(self) -> None:
        """Ends the engine and gives its memory back. Twice does no harm."""
        self._end()

    def adapter(self, folder: Path | None) -> tuple[str, Any]:
        """Digest of the adapter in a folder, and what vLLM calls it; of none, where there is none."""
        if folder is None:
            return "", None
        if not self.lora:
            raise HouseError(f"this engine of {self.home} was started without adapters and cannot take {folder}")
        digest = model_digest(folder)
        if digest not in self._adapters:
            from vllm.lora.request import LoRARequest

            check_rank(folder, self.settings)
            self._adapters[digest] = LoRARequest(digest, len(self._adapters) + 1, str(folder.resolve()))
        return digest, self._adapters[digest]

    def run(self, asked: Iterator[tuple[int, list[int], Any]], lora: Any) -> Iterator[tuple[int, Any]]:
        """(place, vLLM's output, or the ValueError with which it refused the request) for (place, prompt, sampling
        parameters), as they come. Closing the iterator drops what is under way."""
        if not self._thread.is_alive():
            raise HouseError(f"vLLM's engine of {self.home} was closed")
        reply: queue.SimpleQueue[_Reply] = queue.SimpleQueue()
        out = 0
        try:
            while True:
                some = list(islice(asked, AT_ONCE))
                for place, prompt, params in some:
                    self._inbox.put(_Job(place, prompt, params, lora, reply))
                out += len(some)
                # while more is to be rendered, only what is there already is handed out
                while out and not (some and reply.empty()):
                    told = reply.get()
                    if isinstance(told, BaseException):
                        raise HouseError(f"vLLM's engine of {self.home} ended: {told}") from told
                    out -= 1
                    yield told
                if not some:
                    return
        finally:
            if out:
                self._inbox.put(_Drop(reply))


class VllmChat:
    """ChatModel, StreamingChat and ResponseScorer by vLLM in this process.

    Errors: `too_long` (the prompt fills the context), `refused` (by the chat template, or by vLLM: a schema that it
    cannot follow), `server` (given up by the engine). A limit beyond the context's end is cut to it. `tokens` and
    `logprobs` count the end-of-turn token; log-probabilities are the model's own, before temperature and nucleus."""

    def __init__(
        self, home: Path, adapter: Path | None = None, settings: Vllm | None = None, *, engine: Engine | None = None
    ) -> None:
        """home: the model's folder; adapter: of a LoRA adapter on it; engine: one that is loaded already, of `home`."""
        if adapter is not None:
            _check_adapter(home, adapter)
        self.engine = engine or Engine(home, settings, lora=adapter is not None)
        own, self._lora = self.engine.adapter(adapter)
        self.name = str(home) if adapter is None else f"{home} + {adapter}"
        self.digest = self.engine.digest + (f"+{own}" if own else "")
        self.licence, self.price = "unknown", (0.0, 0.0)

    def complete(
        self, requests: Sequence[ChatRequest], progress: Progress | None = None
    ) -> list[ChatAnswer | ChatError]:
        """One answer or error per request, in order."""
        return in_order(self.stream(requests), len(requests), progress)

    def stream(self, requests: Sequence[ChatRequest]) -> Iterator[Told]:
        """(place, answer or error) as they come. Closing the iterator drops what is under way."""
        found: list[Told] = []  # what needs no engine
        options: dict[int, list[int]] = {}
        for place, output in self.engine.run(self._jobs(requests, found, options), self._lora):
            yield from _emptied(found)
            yield place, _answer(output, requests[place], options.get(place, []))
        yield from _emptied(found)

    def response_scores(self, rows: pa.Table, progress: Progress | None = None, *, alone: bool = False) -> pa.Table:
        """As tuning.score.PackedScorer, by vLLM's log-probabilities of prompts: equal within what the kernels round
        (float32 on a CPU: 1e-4 nats a token)."""
        return _Scores(self).response_scores(rows, progress, alone=alone)

    def _jobs(
        self, requests: Sequence[ChatRequest], found: list[Told], options: dict[int, list[int]]
    ) -> Iterator[tuple[int, list[int], Any]]:
        engine = self.engine
        for start in range(0, len(requests), AT_ONCE):
            some = requests[start : start + AT_ONCE]
            said = ([{"role": role, "content": text} for role, text in request.messages] for request in some)
            for place, ids in enumerate(conversation_ids(engine.tokenizer, said, prompt=True), start):
                request = requests[place]
                ready = _admit(ids, request, engine.context)
                if not isinstance(ready, tuple):
                    found.append((place, ready))
                    continue
                if 0 < len(request.sampling.options) <= MOST_OPTIONS:
                    options[place] = first_tokens(engine.tokenizer, request.sampling.options)
                try:
                    yield place, ready[0], sampling_params(request, ready[1], options.get(place, []))
                except (ValueError, RecursionError) as error:
                    found.append((place, ChatError("refused", shortened(str(error)))))


class _Scores(Scorer):
    """Log-probabilities of responses by a VllmChat. The last token is scored as the first new one, so that a response
    may end where the context does."""

    def __init__(self, chat: VllmChat) -> None:
        super().__init__(chat.engine.tokenizer, chat.engine.context, chat.digest)
        self._chat = chat

    def _measured(self, documents: Sequence[Tokens], told: Callable[[Sequence[int]], None]) -> NDArray[np.float64]:
        found = np.full((len(documents), 4), np.nan)
        for place, output in self._chat.engine.run(self._jobs(documents), self._chat._lora):
            if isinstance(output, Exception) or not output.outputs[0].logprobs:
                raise HouseError(f"vLLM cannot score a response: {output}")
            document = documents[place]
            first, last = output.prompt_logprobs, output.outputs[0].logprobs[0][int(document.ids[-1])].logprob
            places = np.asarray(first.start_indices[1:], np.int64)
            logps = np.append(np.asarray(first.logprobs, np.float64)[places], last)[document.weights[1:] != 0]
            probs = np.exp(logps)
            found[place] = len(logps), -logps.sum(), probs.mean(), probs.min()
            told([place])
        return found

    def _jobs(self, documents: Sequence[Tokens]) -> Iterator[tuple[int, list[int], Any]]:
        from vllm import SamplingParams

        for place, document in enumerate(documents):
            ids = document.ids.tolist()
            yield (
                place,
                ids[:-1],
                SamplingParams(
                    temperature=0.0,
                    max_tokens=1,
                    prompt_logprobs=0,
                    logprob_token_ids=ids[-1:],
                    flat_logprobs=True,
                    detokenize=False,
                    output_kind=_final(),
                    skip_clone=True,
                ),
            )


# ---- requests and answers


def sampling_params(request: ChatRequest, room: int, options: Sequence[int]) -> Any:
    """What vLLM calls a request's sampling. room: new tokens; options: token ids of the first place to tell of."""
    from vllm import SamplingParams
    from vllm.sampling_params import StructuredOutputsParams

    sampling = request.sampling
    schema = None if sampling.schema is None else StructuredOutputsParams(json=json.loads(sampling.schema))
    return SamplingParams(
        temperature=max(sampling.temperature, 0.0),
        top_p=min(max(sampling.top_p, 1e-6), 1.0),
        seed=request.seed % 2**63,
        max_tokens=room,
        stop=list(sampling.stop) or None,
        logprobs=0 if sampling.logprobs and not options else None,
        logprob_token_ids=list(options) or None,
        structured_outputs=schema,
        output_kind=_final(),
        skip_clone=True,  # each is of one request
    )


def _final() -> Any:
    from vllm.sampling_params import RequestOutputKind

    return RequestOutputKind.FINAL_ONLY


def _admit(ids: Any, request: ChatRequest, context: int) -> tuple[list[int], int] | ChatAnswer | ChatError:
    """The prompt and how many new tokens it may have; else what is said of it without asking."""
    if isinstance(ids, HouseError):
        return ChatError("refused", str(ids))
    if not len(ids):
        return ChatError("refused", "the chat template renders this conversation as nothing")
    room = new_tokens(request.sampling, len(ids), context)
    return (ids.tolist(), room) if isinstance(room, int) else room


def _answer(output: Any, request: ChatRequest, options: Sequence[int]) -> ChatAnswer | ChatError:
    if isinstance(output, Exception):
        return ChatError("refused", shortened(str(output)))
    (said,) = output.outputs
    if said.finish_reason not in ("stop", "length"):
        return ChatError("server", f"vLLM gave the request up: {said.finish_reason}")
    told: tuple[float, ...] | None = None
    if options and said.logprobs:
        told = tuple(float(said.logprobs[0][token].logprob) for token in options)
    logps = None
    if request.sampling.logprobs:
        pairs = zip(said.token_ids, said.logprobs or (), strict=True)
        logps = tuple(float(place[token].logprob) for token, place in pairs)
    tokens, prompt = len(said.token_ids), len(output.prompt_token_ids)
    return ChatAnswer(said.text, prompt, tokens, said.finish_reason == "stop", logps, told)


def _emptied(found: list[Told]) -> Iterator[Told]:
    while found:
        yield found.pop()


def _check_adapter(home: Path, adapter: Path) -> None:
    """HouseError where vLLM is known not to take the adapter."""
    from transformers import AutoConfig

    path = adapter / "adapter_config.json"
    if not path.is_file():
        raise HouseError(f"{adapter} holds no adapter_config.json: give the folder of a LoRA adapter")
    problems = check_servable(AutoConfig.from_pretrained(home), json.loads(path.read_text(encoding="utf-8")))
    if problems:
        raise HouseError(f"vLLM cannot answer by the adapter in {adapter}: {'; '.join(problems)}")


# ---- the engine


def load(home: Path, settings: Vllm, lora: bool) -> Any:
    """A vllm.LLM. HouseError where vLLM does not take the model, in its words."""
    import torch

    quiet = {"VLLM_LOGGING_LEVEL": "WARNING", "VLLM_NO_USAGE_STATS": "1"}
    for name, value in (quiet | ({} if torch.cuda.is_available() else ON_CPU)).items():
        os.environ.setdefault(name, value)
    from vllm import LLM

    how: dict[str, Any] = {
        "dtype": settings.dtype,
        "seed": settings.seed,
        "max_model_len": settings.context,
        "enforce_eager": settings.eager,
        "gpu_memory_utilization": settings.memory,
        "max_num_seqs": settings.concurrency,
        "max_logprobs": MOST_OPTIONS,
        "generation_config": "vllm",  # no sampling but what a request says; end tokens are read all the same
    }
    if not torch.cuda.is_available():
        how[CHUNKED.replace("-", "_")] = False
    if lora:  # named, so that the head takes none: on a CPU its adapters break log-probabilities of prompts
        how |= {"enable_lora": True, "max_lora_rank": lora_rank(settings), "max_loras": settings.adapters}
        how |= {"lora_target_modules": sorted(TARGETS)}
    try:
        return LLM(model=str(home.resolve()), **how)
    except (ValueError, RuntimeError) as error:
        raise HouseError(f"vLLM does not load {home}: {shortened(str(error))}") from error


@dataclass
class _Waiting:
    """Requests under way, by vLLM's names for them."""

    jobs: dict[str, _Job] = field(default_factory=dict)
    names: Iterator[int] = field(default_factory=count)

    def take_in(self, engine: Any, inbox: "queue.SimpleQueue[_Job | _Drop | None]") -> bool:
        """What is asked meanwhile; waits for it where nothing is under way. False: it is time to end."""
        for _ in range(AT_ONCE):
            if self.jobs and inbox.empty():
                break
            asked = inbox.get()
            if asked is None:
                return False
            if isinstance(asked, _Drop):
                self.drop(engine, asked.reply)
            else:
                self.add(engine, asked)
        return True

    def add(self, engine: Any, job: _Job) -> None:
        from vllm.inputs.engine import tokens_input
        from vllm.v1.engine.exceptions import EngineDeadError

        name = str(next(self.names))
        self.jobs[name] = job
        try:
            engine.add_request(name, tokens_input(job.prompt), job.params, lora_request=job.lora)
        except EngineDeadError:
            raise
        except Exception as error:  # vLLM's word against this one request
            del self.jobs[name]
            job.reply.put((job.place, error))

    def drop(self, engine: Any, reply: "queue.SimpleQueue[_Reply]") -> None:
        gone = [name for name, job in self.jobs.items() if job.reply is reply]
        engine.abort_request(gone)
        for name in gone:
            del self.jobs[name]

    def step(self, engine: Any) -> None:
        for output in engine.step():
            if output.finished and (job := self.jobs.pop(output.request_id, None)) is not None:
                job.reply.put((job.place, output))

    def fail(self, error: BaseException) -> None:
        """Tells all that wait."""
        for reply in {id(job.reply): job.reply for job in self.jobs.values()}.values():
            reply.put(error)
        self.jobs.clear()


def _pump(engine: Any, inbox: "queue.SimpleQueue[_Job | _Drop | None]") -> None:
    """The engine's thread: takes in what is asked, steps, and hands out what is finished, until it is told to end."""
    waiting = _Waiting()
    try:
        while waiting.take_in(engine, inbox):
            if waiting.jobs:
                waiting.step(engine)
        waiting.fail(RuntimeError("it was closed"))
    except Exception as error:  # the engine is dead: all that wait are told, and all that come
        waiting.fail(error)
        while (asked := inbox.get()) is not None:
            asked.reply.put(error)
    finally:
        engine.engine_core.shutdown(timeout=10)


def _end(
    inbox: "queue.SimpleQueue[_Job | _Drop | None]", thread: threading.Thread, watch: "subprocess.Popen[bytes]"
) -> None:
    inbox.put(None)
    if thread is not threading.current_thread():
        thread.join(60.0)
    watch.kill()
    watch.communicate()


def _children() -> set[int]:
    import psutil  # vLLM needs it

    return {child.pid for child in psutil.Process().children(recursive=True)}


def _watch(pids: set[int]) -> "subprocess.Popen[bytes]":
    """A process that kills vLLM's own, which outlive this one where it is killed."""
    command = [sys.executable, "-m", f"{__package__}.guard", "--kill", *map(str, sorted(pids))]
    return subprocess.Popen(command, stdin=subprocess.PIPE, start_new_session=True)
