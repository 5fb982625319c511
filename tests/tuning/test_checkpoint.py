import json
import shutil
from pathlib import Path

import pytest
import torch

from gristmill.curation.folder import HouseError
from gristmill.tuning.checkpoint import (
    Checkpoint,
    find_latest,
    optimizer_tensors,
    remove_torn,
    restore_optimizer,
    save_checkpoint,
)


def at(step):
    return Checkpoint(step, {"weights/a": torch.full((2, 3), float(step))}, {"threads": 2, "note": "ö"})


def silent(message):
    raise AssertionError(message)


def test_the_latest_comes_back_as_it_was_and_older_ones_go(tmp_path: Path) -> None:
    assert find_latest(tmp_path / "none", silent) is None
    for step in (5, 10, 999_999, 1_000_000):
        save_checkpoint(tmp_path, at(step), keep=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-1000000", "step-999999"]
    found = find_latest(tmp_path, silent)
    assert found.step == 1_000_000
    assert found.values == {"threads": 2, "note": "ö"}
    assert torch.equal(found.tensors["weights/a"], torch.full((2, 3), 1e6))


@pytest.mark.parametrize("harm", ["marker", "cut", "altered", "values", "missing", "marker text"])
def test_a_harmed_checkpoint_is_skipped_with_a_message(tmp_path: Path, harm: str) -> None:
    save_checkpoint(tmp_path, at(5), keep=2)
    path = save_checkpoint(tmp_path, at(10), keep=2)
    state = path / "state.safetensors"
    if harm == "marker":
        (path / "COMPLETE").unlink()
    elif harm == "cut":
        state.write_bytes(state.read_bytes()[:-7])
    elif harm == "altered":
        raw = bytearray(state.read_bytes())
        raw[-1] ^= 1
        state.write_bytes(raw)
    elif harm == "values":
        (path / "state.json").write_text(json.dumps({"step": 11}))
    elif harm == "missing":
        state.unlink()
    else:
        (path / "COMPLETE").write_text("{")
    said = []
    assert find_latest(tmp_path, said.append).step == 5
    assert len(said) == 1 and "step-000010 skipped" in said[0]
    shutil.rmtree(tmp_path / "step-000005")
    assert find_latest(tmp_path, said.append) is None


def test_a_save_that_fails_leaves_nothing(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, at(5), keep=2)
    with pytest.raises(TypeError):
        save_checkpoint(tmp_path, Checkpoint(10, {}, {"unjsonable": object()}), keep=1)
    assert [path.name for path in tmp_path.iterdir()] == ["step-000005"]


def test_a_full_disk_is_told_and_leaves_the_last_checkpoint(tmp_path: Path) -> None:
    """The kernel's limit on a file's size stands in for the disk."""
    resource = pytest.importorskip("resource", reason="limits of this kind are Unix's")
    save_checkpoint(tmp_path, at(5), keep=2)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, hard))
    try:
        with pytest.raises(HouseError, match=r"cannot write .*step-000010: .*Make room on that disk and run the same"):
            save_checkpoint(tmp_path, at(10), keep=2)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert [path.name for path in tmp_path.iterdir()] == ["step-000005"]


def test_torn_folders_are_removed(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, at(5), keep=2)
    (tmp_path / ".step-000010.x1.tmp").mkdir()
    (tmp_path / ".step-000010.x1.tmp" / "state.safetensors").write_bytes(b"half")
    assert find_latest(tmp_path, silent).step == 5
    remove_torn(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["step-000005"]
    remove_torn(tmp_path / "none")


def run(steps, parameters, optimizer):
    for step in steps:
        torch.manual_seed(step)
        for parameter in parameters.values():
            parameter.grad = torch.randn_like(parameter)
        optimizer.step()


def adamw(parameters):
    matrices = [p for p in parameters.values() if p.ndim > 1]
    vectors = [p for p in parameters.values() if p.ndim < 2]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=0.1, fused=True)


def test_the_optimizer_continues_bit_for_bit(tmp_path: Path) -> None:
    def fresh():
        torch.manual_seed(0)
        return {"b": torch.nn.Parameter(torch.randn(5)), "w": torch.nn.Parameter(torch.randn(4, 3))}

    straight = fresh()
    run(range(7), straight, adamw(straight))

    first = fresh()
    optimizer = adamw(first)
    run(range(3), first, optimizer)
    tensors = optimizer_tensors(optimizer, first) | {f"weights/{name}": p.detach() for name, p in first.items()}
    save_checkpoint(tmp_path, Checkpoint(3, tensors, {}), keep=1)

    second = fresh()
    optimizer = adamw(second)
    found = find_latest(tmp_path, silent)
    for name, parameter in second.items():
        parameter.data.copy_(found.tensors[f"weights/{name}"])
    restore_optimizer(optimizer, second, found.tensors)
    run(range(3, 7), second, optimizer)
    assert all(torch.equal(second[name], straight[name]) for name in straight)
