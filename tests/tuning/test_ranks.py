import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from gristmill.curation.folder import HouseError
from gristmill.tuning import ranks
from gristmill.tuning.ranks import ALONE, World, divided, sum_gradients, world

Together = Callable[..., list[Any]]


def test_without_torchrun_there_is_one_process_and_no_process_group(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    with world() as here:
        assert here == World(0, 1) and here.main
        tensor = torch.randn(3)
        assert here.total(tensor) is tensor
        assert here.told([1]) == [1] and here.first(lambda: 2) == 2
        here.barrier()
        assert not torch.distributed.is_initialized()


@pytest.mark.parametrize("size", [1, 2, 3, 8])
def test_packs_are_divided_evenly_and_none_twice(size: int) -> None:
    draw = np.random.default_rng(size)
    for count in (0, 1, 2, 7, 8, 40):
        costs = draw.integers(1, 1000, count).astype(float)
        shares = divided(costs, size)
        assert sorted(place for share in shares for place in share) == list(range(count))
        counts = [len(share) for share in shares]
        assert max(counts) - min(counts) <= 1
        assert shares == divided(costs, size) and all(share == sorted(share) for share in shares)


def test_the_dearest_packs_go_to_different_ranks() -> None:
    assert divided([9.0, 1.0, 1.0, 9.0], 2) == [[0, 1], [2, 3]]
    draw = np.random.default_rng(0)
    costs = draw.integers(1, 1000, 64).astype(float)
    loads = [costs[share].sum() for share in divided(costs, 4)]
    in_order = [costs[rank::4].sum() for rank in range(4)]
    assert max(loads) / min(loads) < 1.02 < max(in_order) / min(in_order)


def gradients(here: World) -> list[nn.Parameter]:
    """Three parameters, of which the last has a gradient on the first rank alone."""
    parameters = [nn.Parameter(torch.zeros(2, 3)), nn.Parameter(torch.zeros(4)), nn.Parameter(torch.zeros(1))]
    for index, parameter in enumerate(parameters[: 3 if here.main else 2]):
        parameter.grad = torch.full_like(parameter, 10.0**index * (here.rank + 1))
    return parameters


def sums() -> dict[str, object]:
    found: dict[str, object] = {}
    with world() as here:
        found["total"] = here.total(torch.tensor([here.rank + 1.0, 0.1], dtype=torch.float64)).tolist()
        found["told"] = here.told(f"rank {here.rank}")
        found["first"] = here.first(lambda: {"pid": os.getpid()})
        ranks.BUCKET = 5  # so that two flat pieces are needed
        parameters = gradients(here)
        sum_gradients(here, parameters)
        found["gradients"] = [p.grad.unique().tolist() for p in parameters if p.grad is not None]
    with world() as again:  # a process may train several stages
        found["again"] = again.total(torch.ones(1)).item()
    return found


def test_sums_over_two_processes(tmp_path: Path, together: Together) -> None:
    first, second = together(2, tmp_path / "two", sums)
    assert first == second
    assert first["total"] == [3.0, 0.2]
    assert first["told"] == "rank 0"
    assert first["gradients"] == [[3.0], [30.0], [100.0]]
    assert first["again"] == 2.0


def test_one_process_sums_nothing() -> None:
    parameters = gradients(ALONE)
    before = [parameter.grad for parameter in parameters]
    sum_gradients(ALONE, parameters)
    assert all(parameter.grad is grad for parameter, grad in zip(parameters, before, strict=True))


def fails(how: str) -> None:
    ranks.COURTESY = 0.1
    with world() as here:
        if how == "one" and here.rank == 1:
            raise HouseError("rank 1 has had enough")
        if how == "all":
            raise HouseError(f"loss nan, says {here.rank}")
        if how == "killed" and here.rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        here.barrier()


def test_a_rank_that_fails_stops_all_with_its_message(tmp_path: Path, together: Together) -> None:
    assert together(2, tmp_path / "two", fails, "one") == [
        {"exit": 1, "said": None},
        {"exit": 1, "said": "rank 1 has had enough"},
    ]


def test_ranks_that_fail_alike_say_so_once(tmp_path: Path, together: Together) -> None:
    found = together(2, tmp_path / "two", fails, "all")
    assert [one["exit"] for one in found] == [1, 1]
    assert len([one for one in found if one["said"] is not None]) == 1


def test_a_rank_that_is_killed_stops_the_others_with_a_message(tmp_path: Path, together: Together) -> None:
    left, killed = together(2, tmp_path / "two", fails, "killed")
    assert killed == {"exit": -signal.SIGKILL, "said": None}
    assert left["exit"] == 1 and "another process of this training has ended without a word" in left["said"]
