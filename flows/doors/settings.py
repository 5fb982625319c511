"""What a recipe says of the doors to language models: which server, how hard to press it, how much may be spent."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

from ...curation.folder import HouseError
from ...tuning.servable import RANKS

Price = tuple[float, float]
"""Of a million prompt tokens and of a million new ones, in the user's currency."""


@dataclass(frozen=True)
class Server:
    """An OpenAI-compatible server of chat completions, `vllm serve` first of all.

    url: up to its version, `http://127.0.0.1:8000/v1`. model: as the server calls it; None: the only one it has.
    key_env: the environment variable that holds the API key, which is read from nowhere else and written nowhere.
    concurrency: requests under way at once. timeout: seconds for one try; deadline: seconds for one request with its
    retries and their pauses, but for those while the server is down. retries: tries after the first, each after about
    twice the pause of the one before, from `backoff` seconds to 30, shortened by chance by up to half. patience:
    seconds that a server which answers nothing is waited for, with a single probe now and then, before the run stops.
    requests_per_minute, tokens_per_minute: never more in any 60 seconds (tokens of a request under way: the prompt's by
    estimate and all that it may answer). context: tokens that prompt and answer share, where the server does not tell.
    tokenizer: a local folder or name whose tokenizer and chat template count prompts before they are sent; without it
    only prompts that are too long by any count are found before. extra: more fields of every request's body, such as
    {chat_template_kwargs: {enable_thinking: false}}.
    """

    url: str
    model: str | None = None
    key_env: str | None = None
    concurrency: int = 32
    timeout: float = 300.0
    deadline: float = 900.0
    retries: int = 8
    backoff: float = 0.5
    patience: float = 120.0
    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None
    context: int | None = None
    tokenizer: str | None = None
    extra: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        parts = urlsplit(self.url)
        if parts.username or parts.password:
            raise HouseError("Server: the url holds a password: name the variable that holds the key, as `key_env`")
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise HouseError(f"Server: {self.url!r} is no http address; write http://127.0.0.1:8000/v1")
        if parts.query or parts.fragment:
            raise HouseError("Server: the url ends with its path, such as /v1, without ? or #")
        if self.concurrency < 1 or self.retries < 0:
            raise HouseError("Server: concurrency is at least 1, retries at least 0")
        if min(self.timeout, self.deadline, self.backoff) <= 0 or self.patience < 0:
            raise HouseError("Server: timeout, deadline and backoff are above 0 seconds, patience at least 0")
        limits = {name: getattr(self, name) for name in ("requests_per_minute", "tokens_per_minute", "context")}
        for name, limit in limits.items():
            if limit is not None and limit < 1:
                raise HouseError(f"Server: {name} is at least 1; leave it out for no limit")


@dataclass(frozen=True)
class Vllm:
    """vLLM in process. dtype: auto, bfloat16, float16 or float32. context: tokens of prompt and answer, by default the
    model's own. eager: no compilation (starts sooner, answers slower). memory: share of the GPU's memory to take; on a
    CPU the environment variable VLLM_CPU_KVCACHE_SPACE says how many GiB the cache has. concurrency: sequences under
    way at once. max_lora_rank: of the adapters that it may be given, by default the least that the recipe's stages need
    (a CPU computes with all of it); adapters: how many answer in one batch. seed: the engine's own; every request has
    its own besides. scores: log-probabilities of responses, which judges ask for, are measured through vLLM too, and
    not by transformers."""

    dtype: str = "auto"
    context: int | None = None
    eager: bool = False
    memory: float = 0.9
    concurrency: int = 256
    max_lora_rank: int | None = None
    adapters: int = 4
    seed: int = 0
    scores: bool = False

    def __post_init__(self) -> None:
        check_engine(self)


@dataclass(frozen=True)
class Serve:
    """A vLLM server that a run starts when the model is first asked, and ends when it ends. The model's stages are
    served beside it, as adapters that are loaded when they are first asked.

    dtype, context, eager, memory, concurrency, max_lora_rank, adapters, seed: as for `vllm`; training has to find room
    beside `memory`. stay: false ends the server before a stage trains; it starts again when it is asked again. startup:
    seconds that it may take to answer. timeout, deadline, retries: as for `server`. port: by default a free one.
    arguments: more of vLLM's own, such as [--quantization, fp8]. python: the interpreter of the environment that vLLM
    is installed in, by default this one.
    """

    dtype: str = "auto"
    context: int | None = None
    eager: bool = False
    memory: float = 0.4
    concurrency: int = 256
    max_lora_rank: int | None = None
    adapters: int = 4
    seed: int = 0
    stay: bool = True
    startup: float = 1800.0
    timeout: float = 600.0
    deadline: float = 3600.0
    retries: int = 3
    port: int | None = None
    arguments: tuple[str, ...] = ()
    python: str | None = None

    def __post_init__(self) -> None:
        check_engine(self)
        if min(self.startup, self.timeout, self.deadline) <= 0 or self.retries < 0:
            raise HouseError("Serve: startup, timeout and deadline are above 0 seconds, retries at least 0")


DTYPES = ("auto", "bfloat16", "float16", "float32")
LORA_RANK = 64  # where neither the settings nor a recipe's stages say it


def lora_rank(settings: Vllm | Serve) -> int:
    """The largest rank of an adapter that the engine takes."""
    return settings.max_lora_rank or LORA_RANK


def check_engine(settings: Vllm | Serve) -> None:
    """HouseError for what no vLLM takes."""
    name = type(settings).__name__
    if settings.dtype not in DTYPES:
        raise HouseError(f"{name}: dtype {settings.dtype!r} is none of {', '.join(DTYPES)}")
    if not 0 < settings.memory <= 1:
        raise HouseError(f"{name}: memory is a share of the GPU's memory, above 0 and at most 1, not {settings.memory}")
    if min(settings.concurrency, settings.adapters, 1 if settings.context is None else settings.context) < 1:
        raise HouseError(f"{name}: concurrency, adapters and context are at least 1")
    if settings.max_lora_rank not in (None, *RANKS):
        raise HouseError(f"{name}: max_lora_rank is one of {', '.join(map(str, RANKS))}, not {settings.max_lora_rank}")


@dataclass(frozen=True)
class Budget:
    """What a run may spend on one model, over all its starts. tokens: of prompts and answers; money: in the currency of
    the model's price. A request that might go beyond it is not asked and fails with `budget`."""

    tokens: int | None = None
    money: float | None = None

    def __post_init__(self) -> None:
        if self.tokens is None and self.money is None:
            raise HouseError("Budget: give tokens, money or both")
        if min(self.tokens or 0, self.money or 0) < 0:
            raise HouseError("Budget: tokens and money are at least 0")
