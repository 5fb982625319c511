"""Log-probabilities under the weights that a stage starts from: computed once on the very packs of training, kept on
disk by weights and content, and found there by any stage that asks for the same."""

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from numpy.typing import NDArray
from transformers import PreTrainedModel

from ..curation.folder import write_parquet
from .data import Plan, Units, kl_units
from .forward import inference, pack_logps
from .objectives import Loss
from .packing import Ints, pack_plan
from .ranks import divided
from .sharded import Spread

Tell = Callable[[int, int], None]


@dataclass(frozen=True)
class Reference:
    """answers: (D,) weighted sums of log-probabilities of the answers. For losses with a `kl` also the units' prompts
    with strangers' answers, and (U,) log-probabilities of those."""

    answers: NDArray[np.float32]
    strangers: Units | None = None
    stranger_logps: NDArray[np.float32] | None = None


def reference_of(
    policy: Spread,
    plan: Plan,
    loss: Loss,
    capacity: int,
    context: int | None,
    weights: dict[str, Any],
    folder: Path,
    tell: Tell,
) -> Reference | None:
    """The reference that `loss` needs, from `folder` where it lies there, else computed and kept. None: it needs none.

    weights: all that says which weights the policy has now, and in which dtype and on what they are computed.
    """
    if not loss.reference and "kl" not in loss.tensors:
        return None
    strangers = _strangers(plan.units, capacity, context) if "kl" in loss.tensors else None
    key = _key(plan, [loss.tensors.count("kl"), capacity, context, weights])
    path = folder / f"{key}.parquet"
    found = policy.here.first(lambda: _read(path))
    if found is None:
        packs = [] if strangers is None else pack_plan(strangers.lengths, capacity)
        total = len(plan.packs) + len(packs)
        answers = _sums(policy, plan.units, plan.packs, lambda done: tell(done, total))
        others = None
        if strangers is not None:
            others = _sums(policy, strangers, packs, lambda done: tell(len(plan.packs) + done, total))
        found = answers, others
        if policy.here.main:
            _write(path, plan.units, answers, others)
    return Reference(found[0], strangers, found[1])


def _strangers(units: Units, capacity: int, context: int | None) -> Units:
    return kl_units(units, np.arange(len(units.row_ids)), capacity, context)


def document_sums(policy: PreTrainedModel, units: Units, members: Ints) -> torch.Tensor:
    """Weighted sums of log-probabilities of the documents of one pack of units, fp32."""
    logps, weights, owners = pack_logps(policy, units.pack(members))
    count = int(units.widths[members].sum())
    return torch.zeros(count, device=logps.device).index_add(0, owners, (logps * weights).float())


def _sums(policy: Spread, units: Units, packs: list[Ints], tell: Callable[[int], None]) -> NDArray[np.float32]:
    """(D,) weighted sums of log-probabilities of all answers; each process does its share of the packs."""
    sums = np.zeros(len(units.documents), np.float32)
    costs = [float(units.squares[pack].sum()) for pack in packs]
    with inference(policy.model):
        for done, place in enumerate(policy.turns(divided(costs, policy.here.size), learn=False)):
            members = packs[place]
            sums[units.documents_of(members)] = document_sums(policy.model, units, members).cpu().numpy()
            tell(done + 1)
    return policy.here.total(torch.from_numpy(sums)).numpy()


def _key(plan: Plan, inputs: list[Any]) -> str:
    """Of all that the log-probabilities depend on, to the last bit: weights, place, tokens, and how they are packed."""
    state = hashlib.sha256(json.dumps(inputs, sort_keys=True).encode())
    state.update(np.ascontiguousarray(plan.units.first, np.int64).tobytes())
    for document in plan.units.documents:
        state.update(len(document.ids).to_bytes(8, "little"))
        state.update(np.ascontiguousarray(document.ids, np.int32).tobytes())
        state.update(np.ascontiguousarray(document.weights, np.float32).tobytes())
    return state.hexdigest()[:32]


def _read(path: Path) -> tuple[NDArray[np.float32], NDArray[np.float32] | None] | None:
    if not path.is_file():
        return None
    table = pq.read_table(path)
    others = table["stranger_logp"].to_numpy() if "stranger_logp" in table.column_names else None
    return table["logp"].to_numpy(), others


def _write(path: Path, units: Units, answers: NDArray[np.float32], others: NDArray[np.float32] | None) -> None:
    owners = np.repeat(np.arange(len(units.row_ids)), units.widths)
    columns = {
        "row_id": pa.array(units.row_ids, pa.string()).take(pa.array(owners)),
        "answer": pa.array(np.arange(len(owners)) - units.first[owners], pa.int32()),
        "logp": answers,
    }
    write_parquet(path, pa.table(columns if others is None else columns | {"stranger_logp": others}))
