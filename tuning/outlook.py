"""What a stage will need and cannot exceed, for its plan and its live line; and what is said where memory runs out."""

import os
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from ..curation.folder import HouseError
from .data import Plan, summary
from .memory import Needs, needs_of, out_of_memory, plan_estimate, roofline_of
from .roofline import Load, Roofline, machine_peak
from .servable import check_servable
from .settings import Training

SMOOTHING = 0.1  # weight of the newest step in the mean that the remaining time is told from


@dataclass
class Outlook:
    """record: for plan.json (memory, roofline, seconds, warnings). pace: smoothed seconds of a step."""

    record: dict[str, Any]
    roofline: Roofline
    needs: Needs
    device: str
    pace: float | None = None

    def eta(self, seconds: float, left: int) -> float:
        """Seconds that the remaining steps will take, after one that took `seconds`."""
        self.pace = seconds if self.pace is None else (1 - SMOOTHING) * self.pace + SMOOTHING * seconds
        return round(self.pace * left, 1)

    def peak_memory(self) -> int:
        """Most bytes that were in use so far: of the GPU, else of this process."""
        if self.device == "cuda":
            return torch.cuda.max_memory_allocated()
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def outlook(
    config: Any, plan: Plan, settings: Training, device: str, dtype: torch.dtype, reference: bool, processes: int
) -> Outlook:
    """Memory and roofline of a stage, from shapes and its plan."""
    numbers, load = summary(plan, settings.capacity), load_of_plan(plan)
    needs = needs_of(config, numbers, settings, device=device, dtype=dtype, devices=processes)
    peak = machine_peak(needs.shape, device=device, dtype=dtype, tokens=settings.capacity)
    how: dict[str, Any] = {"device": device, "dtype": dtype, "load": load, "devices": processes, "peak": peak}
    record = plan_estimate(config, numbers, settings, reference=reference, **how)
    record["warnings"] = check_servable(config, settings.lora)
    return Outlook(record, roofline_of(needs, numbers, load, processes, peak), needs, device)


def load_of_plan(plan: Plan) -> Load:
    """What one epoch puts through a model: of each unit what its documents share, and what each has of its own."""
    units = plan.units
    own = np.add.reduceat(units.document_lengths, units.first[:-1])
    several = units.widths > 1
    common = np.where(several, (own - units.lengths) // np.maximum(units.widths - 1, 1), 0)
    starts = np.concatenate([np.zeros(len(common), np.int64), np.repeat(common, units.widths)])
    return Load(
        int(units.lengths.sum()), int(units.targets.sum()), starts, np.concatenate([common, units.document_lengths])
    )


@contextmanager
def enough_memory(view: Outlook, plan: Plan) -> Iterator[None]:
    """Turns an allocation that failed inside the block into a HouseError with the changes that would fit."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise HouseError(_said(view, plan, torch.cuda.get_device_properties(0).total_memory)) from error
    except (RuntimeError, MemoryError) as error:
        words = ("defaultcpuallocator", "can't allocate memory", "not enough memory")
        if not isinstance(error, MemoryError) and not any(word in str(error).lower() for word in words):
            raise
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        raise HouseError(_said(view, plan, memory)) from error


def _said(view: Outlook, plan: Plan, available: int) -> str:
    return f"{out_of_memory(view.needs, available, int(plan.units.lengths.max()))}\nThe last checkpoint stays."
