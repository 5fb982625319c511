import json
import random
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file

from gristmill.curation.rows import content_id, counted_row_id, message, table
from gristmill.curation.shards import write_curated
from gristmill.tuning import sharded
from gristmill.tuning.adapted import FrozenLinear
from gristmill.tuning.checkpoint import find_latest
from gristmill.tuning.loop import train
from gristmill.tuning.lora import add_lora
from gristmill.tuning.models import load_model, make_model
from gristmill.tuning.ranks import ALONE, World, world
from gristmill.tuning.settings import Lora, NewModel, Training
from gristmill.tuning.sharded import rows_of, spread

Together = Callable[..., list[Any]]
WORDS = ("mill", "grist", "stone", "water", "wheel", "grain", "flour", "sack", "miller", "river", "sluice", "bread")
DATA = {"sft": "sft", "dpo": "preference", "kto": "kto"}
WEIGHTS = "adapter/adapter_model.safetensors"
PARALLEL = ("ddp", "fsdp")
SMALL = Training(
    capacity=150, packs_per_step=3, learning_rate=1e-2, warmup=0.2, checkpoint_every=2, threads=1,
    lora=Lora(rank=3, alpha=8.0, dropout=0.1),
)  # fmt: skip


def talk(draw: random.Random, most: int = 18) -> str:
    return " ".join(draw.choices(WORDS, k=draw.randint(1, most)))


def made(kind: str, count: int) -> list[dict[str, Any]]:
    draw, rows = random.Random(0), []
    for position in range(count):
        row: dict[str, Any] = {"source": "made", "position": position, "messages": [message("user", talk(draw))]}
        if kind == "sft":
            row["messages"].append(message("assistant", talk(draw)))
        elif kind == "kto":
            row |= {"chosen": [message("assistant", talk(draw))], "label": position % 3 != 0}
        else:
            row |= {"chosen": [message("assistant", talk(draw))], "rejected": [message("assistant", talk(draw, 8))]}
        row["content_id"] = content_id(row)
        row["row_id"] = counted_row_id("made", row["content_id"], 0)
        rows.append(row)
    return rows


def settings_of(name: str) -> Training:
    assert SMALL.lora is not None
    more: dict[str, Training] = {
        "full": replace(SMALL, lora=None, learning_rate=1e-3, max_steps=2),
        "recomputed": replace(
            SMALL, lora=replace(SMALL.lora, base="fp32"), checkpointing="layers", optimizer="lion", learning_rate=1e-3
        ),
    }
    return more.get(name, SMALL)


def run(home: str | Path, out: Path, name: str, parallel: str = "ddp") -> list[dict[str, Any]]:
    """Trains the stage `name` in `out`; the events that it tells."""
    objective: Any = name if name in DATA else "sft"
    settings = replace(settings_of(name), parallel=parallel)
    events: list[dict[str, Any]] = []
    train(objective, Path(home) / DATA[objective], Path(home) / "model", out, settings, progress=events.append)
    return events


NAMES = (*DATA, "full", "recomputed")


def all_on_two(home: str) -> None:
    """Every stage with ddp and fsdp."""
    sharded.SMALL = 64
    with world():
        for parallel in PARALLEL:
            for name in NAMES:
                run(home, Path(home) / parallel / name, name, parallel)


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory, together: Together) -> Path:
    """A model of some 20,000 parameters, a set of each kind, and every stage trained on one process (in one/) and on
    two (in ddp/ and fsdp/)."""
    home = tmp_path_factory.mktemp("home")
    spec = NewModel(params="60K", vocab=300, context=256, tokens=0)
    make_model(home / "model", spec, iter([talk(random.Random(1), 400) for _ in range(20)]))
    for kind, count in (("sft", 26), ("preference", 20), ("kto", 24)):
        write_curated(home / kind, kind, {"train": [table(made(kind, count))]}, {}, lambda manifest: {})
    for name in NAMES:
        run(home, home / "one" / name, name)
    assert together(2, home / "ranks", all_on_two, str(home)) == [None, None]
    return home


def metrics(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("parallel", PARALLEL)
@pytest.mark.parametrize("name", NAMES)
def test_two_processes_give_the_curve_of_one(home: Path, name: str, parallel: str) -> None:
    ours, alone = metrics(home / parallel / name), metrics(home / "one" / name)
    assert len(ours) == len(alone) >= 2
    for key in ("loss", "grad_norm", "tokens", "target_tokens", "lr", "margin", "kl"):
        if key in alone[0]:
            floor = 2e-5 if key == "kl" else 1e-6  # kl: a difference of fp32 sums of some 100, rounded at 4e-6
            assert [line[key] for line in ours] == pytest.approx([line[key] for line in alone], rel=2e-5, abs=floor)
    assert abs(alone[-1]["loss"] - alone[0]["loss"]) > 1e-3  # it learned something to disagree on


@pytest.mark.parametrize("parallel", PARALLEL)
@pytest.mark.parametrize("name", NAMES)
def test_two_processes_end_in_the_weights_and_row_losses_of_one(home: Path, name: str, parallel: str) -> None:
    file = "model/model.safetensors" if name == "full" else WEIGHTS
    ours, alone = load_file(home / parallel / name / file), load_file(home / "one" / name / file)
    assert ours.keys() == alone.keys()
    for key, weight in alone.items():
        torch.testing.assert_close(ours[key], weight, rtol=0, atol=2e-5, msg=key)
    losses = [pq.read_table(home / where / name / "row_losses/train.parquet") for where in (parallel, "one")]
    assert losses[0]["row_id"].equals(losses[1]["row_id"]) and losses[0]["step"].equals(losses[1]["step"])
    assert losses[0]["loss"].to_pylist() == pytest.approx(losses[1]["loss"].to_pylist(), rel=2e-5, abs=1e-6)


def test_the_last_step_leaves_a_rank_without_a_pack(home: Path) -> None:
    plan = json.loads((home / "one" / "sft" / "plan.json").read_text())
    assert plan["packs"] % 3 == 1 and plan["steps"] == 4  # three packs a step and one in the last, in the curves above


def test_one_process_writes(home: Path) -> None:
    for parallel in PARALLEL:
        lines = metrics(home / parallel / "sft")
        assert [line["step"] for line in lines] == list(range(1, len(lines) + 1))
        record = json.loads((home / parallel / "sft" / "run.json").read_text())
        assert record["processes"] == 2 and record["status"] == "complete"


def checkpoint_of(out: Path) -> Path:
    (path,) = (out / "checkpoints").glob("step-*")
    return path


def test_each_rank_of_a_sharded_model_writes_its_piece(home: Path) -> None:
    whole, pieces = checkpoint_of(home / "ddp" / "sft"), checkpoint_of(home / "fsdp" / "sft")
    assert {file.name for file in whole.glob("*.safetensors")} == {"state.safetensors"}
    assert {file.name for file in pieces.glob("*.safetensors")} == {"state.safetensors", "state-1.safetensors"}
    assert set(json.loads((pieces / "COMPLETE").read_text())) == {
        "state.safetensors", "state-1.safetensors", "state.json"
    }  # fmt: skip
    ours, theirs = find_latest(pieces.parent, print), find_latest(whole.parent, print)
    assert ours is not None and theirs is not None and set(ours.tensors) == set(theirs.tensors)
    for name, tensor in theirs.tensors.items():
        torch.testing.assert_close(ours.tensors[name], tensor, rtol=1e-5, atol=2e-5, msg=name)


def test_a_damaged_piece_is_found(home: Path, tmp_path: Path) -> None:
    shutil.copytree(checkpoint_of(home / "fsdp" / "sft"), tmp_path / "step-000002")
    piece = tmp_path / "step-000002" / "state-1.safetensors"
    raw = bytearray(piece.read_bytes())
    raw[-1] ^= 1
    piece.write_bytes(raw)
    said: list[str] = []
    assert find_latest(tmp_path, said.append) is None
    assert "state-1.safetensors does not have the SHA-256" in said[0]


def stopped(done: Path, out: Path) -> Path:
    """`done` as it would lie there had the run been killed after its last checkpoint."""
    shutil.copytree(done, out)
    shutil.rmtree(out / "adapter")
    record = json.loads((out / "run.json").read_text())
    (out / "run.json").write_text(json.dumps(record | {"status": "running"}))
    return out


def continued(home: str, folder: str) -> list[int]:
    sharded.SMALL = 64
    with world():
        for parallel, began in (("fsdp", "one"), ("ddp", "fsdp"), ("fsdp", "ddp")):
            events = run(home, Path(folder) / f"{began}-{parallel}", "sft", parallel)
    return [event["step"] for event in events if event["event"] == "resume"]


def test_a_checkpoint_of_any_number_of_processes_continues_on_any_other(
    home: Path, tmp_path: Path, together: Together
) -> None:
    for began, parallel in (("one", "fsdp"), ("fsdp", "ddp"), ("ddp", "fsdp")):
        stopped(home / began / "sft", tmp_path / f"{began}-{parallel}")
    assert together(2, tmp_path / "ranks", continued, str(home), str(tmp_path)) == [[2], []]
    for began in PARALLEL:
        events = run(home, stopped(home / began / "sft", tmp_path / f"{began}-one"), "sft", "ddp")
        assert [event["step"] for event in events if event["event"] == "resume"] == [2]
    alone = load_file(home / "one" / "sft" / WEIGHTS)
    for name in ("one-fsdp", "fsdp-ddp", "ddp-fsdp", "ddp-one", "fsdp-one"):
        found = load_file(tmp_path / name / WEIGHTS)
        assert [line["loss"] for line in metrics(tmp_path / name)] == pytest.approx(
            [line["loss"] for line in metrics(home / "one" / "sft")], rel=2e-5
        )
        for key, weight in alone.items():
            torch.testing.assert_close(found[key], weight, rtol=0, atol=2e-5, msg=f"{name} {key}")


def held(home: str, base: Any) -> list[int]:
    """Bytes of the decoder blocks that this process holds: in parameters, and in buffers."""
    sharded.SMALL = 64
    with world() as here:
        model = load_model(Path(home) / "model", dtype="fp32", device="cpu")
        add_lora(model, Lora(rank=4, base=base), seed=0)
        spread(model, here, "fsdp")
        blocks: Any = model.base_model.layers
        parts = [getattr(p, "_local_tensor", p) for p in blocks.parameters()]
        assert all(
            layer._nf4 is None or not layer._nf4.packed.numel() for layer in blocks[0].modules() if is_frozen(layer)
        )
        return [sum(part.nbytes for part in parts), sum(buffer.nbytes for buffer in blocks.buffers())]


def is_frozen(layer: Any) -> bool:
    return isinstance(layer, FrozenLinear)


@pytest.mark.parametrize("base", ["nf4", "fp32"])
def test_a_rank_holds_half_of_the_blocks(home: Path, tmp_path: Path, base: Any, together: Together) -> None:
    model = load_model(home / "model", dtype="fp32", device="cpu")
    add_lora(model, Lora(rank=4, base=base), seed=0)
    blocks: Any = model.base_model.layers
    large = [buffer.nbytes for buffer in blocks.buffers() if buffer.numel() >= 64]
    whole = sum(p.nbytes for p in blocks.parameters()) + sum(large)
    small = sum(buffer.nbytes for buffer in blocks.buffers()) - sum(large)
    assert bool(large) == (base == "nf4")
    for parameters, buffers in together(2, tmp_path / "ranks", held, str(home), base):
        assert parameters == pytest.approx(whole / 2, rel=0.05) and buffers == small


@pytest.mark.parametrize("total", [1, 2, 3, 7, 8, 9])
def test_rows_follow_torch_chunks(total: int) -> None:
    whole = torch.arange(total)
    chunks = list(whole.chunk(4)) + [whole[:0]] * (4 - len(whole.chunk(4)))
    for rank, chunk in enumerate(chunks):
        assert torch.equal(rows_of(total, World(rank, 4)).of(whole), chunk)


def test_the_norm_is_torchs_own_and_gradients_shrink_to_it(home: Path) -> None:
    model = load_model(home / "model", dtype="fp32", device="cpu")
    model.requires_grad_(True)
    one = spread(model, ALONE, "ddp")
    for parameter in one.parameters.values():
        parameter.grad = torch.randn_like(parameter)
    before = {name: p.grad.clone() for name, p in one.parameters.items() if p.grad is not None}
    norm = one.clip(1.0)
    assert norm == pytest.approx(float(torch.linalg.vector_norm(torch.cat([g.flatten() for g in before.values()]))))
    expected = [nn_grad / (norm + 1e-6) for nn_grad in before.values()]
    for parameter, grad in zip(one.parameters.values(), expected, strict=True):
        torch.testing.assert_close(parameter.grad, grad)
    assert one.clip(10.0) == pytest.approx(1.0, rel=1e-5)
