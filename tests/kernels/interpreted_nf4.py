"""NF4's Triton kernels in triton's interpreter on a CPU: test_nf4_triton.py runs this file in a process of its own."""

from dataclasses import replace

import pytest
import torch
import triton
import triton.language as tl

from gristmill.kernels import nf4, nf4_triton

SHAPES = [(64, 128), (7, 42), (3, 5, 9), (129,), (1, 1), (123, 431)]  # full, short, odd and lone blocks


def drawn(shape: tuple[int, ...], dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    return (torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 0.03).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_both_directions_equal_torch(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    for blocksize in nf4.BLOCKS if shape == (123, 431) else (64, 4096):
        weight = drawn(shape, dtype)
        weight.view(-1)[: min(weight.numel() - 1, blocksize)] = 0  # a block of zeros, or part of one
        want = nf4.quantise(weight, blocksize=blocksize, path="torch", double=False)
        got = nf4.quantise(weight, blocksize=blocksize, path="triton", double=False)
        assert torch.equal(got.packed, want.packed) and torch.equal(got.absmax, want.absmax)
        for double in (False, True):
            q = nf4.quantise(weight, blocksize=blocksize, path="torch", double=double)
            out = torch.full(shape, float("nan"), dtype=dtype)
            assert nf4.dequantise(q, out=out, path="triton") is out
            assert torch.equal(out.view(torch.int16), nf4.naive_dequantise(q).view(torch.int16))


def test_packed_bytes_may_start_anywhere_and_nothing_beside_is_written() -> None:
    q = nf4.quantise(drawn((4096 + 77,), torch.float32), path="torch")
    moved = replace(q, packed=torch.cat([q.packed[:1], q.packed])[1:])
    buffer = torch.full((4096 + 100,), 9.0)
    nf4.dequantise(moved, out=buffer[3 : 3 + 4096 + 77], path="triton")
    assert torch.equal(buffer[3:-20], nf4.naive_dequantise(q))
    assert buffer[:3].eq(9).all() and buffer[-20:].eq(9).all()


def test_ties_and_tiny_blocks() -> None:
    edges = torch.tensor(nf4.THRESHOLDS)
    above = torch.nextafter(edges, torch.tensor(2.0))
    weight = torch.cat([torch.ones(1), edges, above, torch.zeros(33), torch.full((64,), 1e-39)])
    q = nf4.quantise(weight, double=False, path="triton")
    index = torch.stack([q.packed >> 4, q.packed & 15], dim=2).view(-1).tolist()
    assert index == [15, *range(15), *range(1, 16), *[nf4.ZERO] * 97]
    with pytest.raises(ValueError, match="inf or NaN"):
        nf4.quantise(torch.tensor([1.0, float("nan")]), path="triton")


def test_mutations_are_seen() -> None:
    q = nf4.quantise(drawn((64, 128), torch.float32), path="torch")
    want = nf4.dequantise(q, path="torch")
    swapped = replace(q, packed=(q.packed << 4) | (q.packed >> 4))
    for mutant in (swapped, replace(q, offset=torch.zeros(())), replace(q, absmax=q.absmax.roll(1))):
        assert not torch.equal(nf4.dequantise(mutant, path="triton"), want)


@triton.jit
def _first_place(program, out):  # type: ignore[no-untyped-def]
    tl.store(out + tl.arange(0, 16), nf4_triton._places(tl.load(program), 16))


def test_places_beyond_32_bits() -> None:
    out = torch.zeros(16, dtype=torch.int64)
    _first_place[(1,)](torch.tensor([2**28 + 1], dtype=torch.int32), out)
    assert out.tolist() == list(range(2**32 + 16, 2**32 + 32))


def test_the_path_on_a_cpu_is_chosen_by_name_only() -> None:
    assert nf4.path_of("cpu") != "triton" and nf4.path_of("cpu", "triton") == "triton"
