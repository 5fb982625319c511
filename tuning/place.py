"""Where a stage runs: device, dtype, threads; and the bits that depend on them, recorded and restored."""

import logging
import os
import platform
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import transformers

from .models import torch_dtype
from .settings import Training

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Place:
    """A device (cuda, cpu), the dtype of the weights and of the computation (bf16, fp32), and torch's threads.

    A stage that tunes all weights computes in fp32, whatever the settings' dtype.
    """

    device: str
    dtype: str
    threads: int

    def record(self) -> dict[str, Any]:
        """What a result's bits depend on besides the inputs."""
        return {
            "device": torch.cuda.get_device_name() if self.device == "cuda" else _processor(),
            "dtype": self.dtype,
            "threads": self.threads,
            "versions": {
                "torch": torch.__version__,
                "transformers": transformers.__version__,
                "numpy": np.__version__,
                "python": platform.python_version(),
            },
        }


@contextmanager
def training_place(settings: Training, past: Mapping[str, Any] | None) -> Iterator[Place]:
    """Sets up the place and puts threads, random state and determinism back at the end.

    past: run.json of the run that is continued, whose thread count is taken over; what else differs from it, and so
    bars equal bits, is logged.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    bf16 = settings.lora is not None and torch_dtype(settings.dtype, device) == torch.bfloat16
    before, was_deterministic = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()
    threads = past["threads"] if past is not None else settings.threads or before
    here = Place(device, "bf16" if bf16 else "fp32", threads)
    for key, value in here.record().items():
        if past is not None and past[key] != value:
            log.warning("this run began with %s %s and continues with %s: not bit for bit", key, past[key], value)
    if settings.deterministic and device == "cuda":
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    try:
        torch.set_num_threads(threads)
        torch.use_deterministic_algorithms(settings.deterministic or was_deterministic)
        with torch.random.fork_rng([torch.cuda.current_device()] if device == "cuda" else []):
            yield here
    finally:
        torch.set_num_threads(before)
        torch.use_deterministic_algorithms(was_deterministic)


def _processor() -> str:
    return f"cpu {platform.machine()} {torch.backends.cpu.get_cpu_capability()}"
