"""NF4 against bitsandbytes: dequantisation bit for bit, quantisation up to ties, files in both directions."""

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from bitsandbytes import functional as peer
from bitsandbytes.nn import Params4bit

from gristmill.kernels import nf4

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
SHAPES = [(64, 128), (7, 42), (3, 5, 9), (129,), (1, 1), (123, 431)]  # full, short, odd and lone blocks


@pytest.fixture(autouse=True)
def eager() -> Iterator[None]:
    """bitsandbytes compiles its fallback for each odd shape: 60 s for this file."""
    with torch.compiler.set_stance("force_eager"):
        yield


def drawn(shape: tuple[int, ...], dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(shape, generator=generator) * 0.03).to(dtype)


def same_bits(one: torch.Tensor, other: torch.Tensor) -> bool:
    return (
        one.dtype == other.dtype
        and one.shape == other.shape
        and torch.equal(one.reshape(-1).view(torch.uint8), other.reshape(-1).view(torch.uint8))
    )


def from_peer(weight: torch.Tensor, double: bool, blocksize: int = 64) -> tuple[nf4.NF4, torch.Tensor, object]:
    """bitsandbytes' own quantisation of `weight`, as ours and as theirs."""
    packed, state = peer.quantize_4bit(weight, blocksize=blocksize, compress_statistics=double, quant_type="nf4")
    ours = nf4.NF4(packed, state.absmax, tuple(weight.shape), weight.dtype, blocksize)
    if double:
        inner = state.state2
        ours = replace(ours, nested_absmax=inner.absmax, nested_code=inner.code, offset=state.offset)
    return ours, packed, state


@pytest.mark.parametrize("double", [False, True], ids=["single", "double"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_dequantise_equals_bitsandbytes(shape: tuple[int, ...], dtype: torch.dtype, double: bool) -> None:
    ours, packed, state = from_peer(drawn(shape, dtype), double)
    theirs = peer.dequantize_4bit(packed, state).view(shape)
    assert same_bits(nf4.dequantise(ours), theirs)
    assert same_bits(nf4.naive_dequantise(ours), theirs)
    out = torch.full(shape, float("nan"), dtype=dtype)
    assert nf4.dequantise(ours, out=out) is out
    assert same_bits(out, theirs)


@pytest.mark.parametrize("blocksize", [32, 128, 4096])
def test_dequantise_other_block_sizes(blocksize: int) -> None:
    ours, packed, state = from_peer(drawn((100, 84)), True, blocksize)
    assert same_bits(nf4.dequantise(ours), peer.dequantize_4bit(packed, state))


def test_dequantise_into_another_dtype() -> None:
    ours, packed, state = from_peer(drawn((31, 66)), True)
    wide = peer.dequantize_4bit(packed, state)
    assert same_bits(nf4.dequantise(ours, torch.bfloat16), wide.to(torch.bfloat16))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_quantise_equals_bitsandbytes(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    weight = drawn(shape, dtype, seed=1)
    ours = nf4.quantise(weight, double=False)
    theirs, _, _ = from_peer(weight, False)
    assert same_bits(ours.absmax, theirs.absmax)
    full = weight.numel() // 128 * 64  # bytes of full blocks
    assert torch.equal(ours.packed[:full], theirs.packed[:full])
    # the short last block: theirs divides there, ours multiplies by the reciprocal as everywhere, which is CUDA's rule
    differs = ours.packed[full:] != theirs.packed[full:]
    assert int(differs.sum()) <= 1


@pytest.mark.parametrize("shape", [*SHAPES[:3], (123, 431), (600, 431)], ids=str)
def test_double_quantisation_takes_the_nearest_code(shape: tuple[int, ...]) -> None:
    """Scales and offset are bitsandbytes' bit for bit. Its CPU code misses the nearest 8-bit code by one step now and
    then (5 of 4,041 at worst here), ours never."""
    weight = drawn(shape, seed=1)
    ours, (theirs, _, _) = nf4.quantise(weight), from_peer(weight, True)
    assert ours.nested_absmax is not None and ours.nested_code is not None and ours.offset is not None
    assert same_bits(ours.nested_absmax, theirs.nested_absmax)
    assert same_bits(ours.nested_code, theirs.nested_code)
    assert same_bits(ours.offset, theirs.offset)
    gap = (ours.absmax.int() - theirs.absmax.int()).abs()
    assert gap.max() <= 1 and int(gap.sum()) <= gap.numel() // 200
    exact = nf4.quantise(weight, double=False).absmax.double() - ours.offset.double()
    scaled = exact / ours.nested_absmax.double().repeat_interleave(256)[: exact.numel()]
    distance = (scaled[:, None] - ours.nested_code.double()).abs()
    chosen = distance.gather(1, ours.absmax.long()[:, None])[:, 0]
    assert (chosen - distance.amin(dim=1)).max() < 1e-7


def test_ties_follow_the_cuda_thresholds() -> None:
    """A scaled weight equal to a threshold keeps the lower code (the rule is >), one ulp above it the upper."""
    edges = torch.tensor(nf4.THRESHOLDS)
    above = torch.nextafter(edges, torch.tensor(2.0))
    weight = torch.cat([torch.ones(1), edges, above, torch.zeros(33)])
    q = nf4.quantise(weight, double=False)
    index = torch.stack([q.packed >> 4, q.packed & 15], dim=1).view(-1)
    assert index[0] == 15
    assert index[1:16].tolist() == list(range(15))
    assert index[16:31].tolist() == list(range(1, 16))
    assert index[31:].unique().tolist() == [nf4.ZERO]
    assert torch.equal(from_peer(weight, False)[0].packed, q.packed)


def test_first_weight_is_in_the_high_bits() -> None:
    q = nf4.quantise(torch.tensor([1.0, -1.0, 0.0]), double=False)
    assert q.packed.view(-1).tolist() == [0xF0, 0x77]


@pytest.mark.parametrize("double", [False, True], ids=["single", "double"])
def test_a_block_of_zeros_stays_zero(double: bool) -> None:
    weight = drawn((4, 64))
    weight[2] = 0
    q = nf4.quantise(weight, double=False)
    assert q.packed.view(4, 32)[2].unique().tolist() == [0x77]
    assert same_bits(nf4.dequantise(q)[2], torch.zeros(64))
    back = nf4.dequantise(nf4.quantise(weight, double=double))
    assert same_bits(back[2], torch.zeros(64)) and torch.isfinite(back).all()
    assert same_bits(nf4.dequantise(nf4.quantise(torch.zeros(3, 64), double=double)), torch.zeros(3, 64))


@pytest.mark.parametrize("double", [False, True], ids=["single", "double"])
def test_bitsandbytes_loads_our_keys(double: bool) -> None:
    weight = drawn((37, 70), torch.bfloat16)
    q = nf4.quantise(weight, double=double)
    tensors = nf4.to_tensors(q, "layer.weight")
    stats = {key.removeprefix("layer.weight."): value for key, value in tensors.items() if key != "layer.weight"}
    theirs = Params4bit.from_prequantized(tensors["layer.weight"], stats, device="cpu")
    assert theirs.quant_state.nested == double
    assert same_bits(peer.dequantize_4bit(theirs.data, theirs.quant_state), nf4.dequantise(q))


@pytest.mark.parametrize("double", [False, True], ids=["single", "double"])
def test_we_load_bitsandbytes_keys(double: bool) -> None:
    _, packed, state = from_peer(drawn((37, 70), torch.float16), double)
    tensors = {"w": packed} | {f"w.{key}": value for key, value in state.as_dict(packed=True).items()}
    assert same_bits(nf4.dequantise(nf4.from_tensors(tensors, "w")), peer.dequantize_4bit(packed, state))
    tensors["w"] = torch.nn.functional.pad(packed.view(-1), (0, packed.numel() % 2)).view(torch.bfloat16)[:, None]
    if packed.numel() % 2 == 0:  # bnb_4bit_quant_storage=bfloat16 needs an even number of bytes
        assert same_bits(nf4.dequantise(nf4.from_tensors(tensors, "w")), peer.dequantize_4bit(packed, state))


def test_mutations_are_seen() -> None:
    """The comparison above would fail for swapped halves, a forgotten offset, or absmax of the wrong block."""
    ours, packed, state = from_peer(drawn((64, 128)), True)
    theirs = peer.dequantize_4bit(packed, state)
    swapped = replace(ours, packed=(ours.packed << 4) | (ours.packed >> 4))
    no_offset = replace(ours, offset=torch.zeros(()))
    shifted = replace(ours, absmax=ours.absmax.roll(1))
    for mutant in (swapped, no_offset, shifted):
        assert not same_bits(nf4.dequantise(mutant), theirs)


def test_what_cannot_be_quantised_says_so() -> None:
    with pytest.raises(ValueError, match="float64"):
        nf4.quantise(torch.zeros(4, dtype=torch.float64))
    with pytest.raises(ValueError, match="block size 48"):
        nf4.quantise(torch.zeros(4), blocksize=48)
    with pytest.raises(ValueError, match="empty"):
        nf4.quantise(torch.zeros(0, 4))
    with pytest.raises(ValueError, match="inf or NaN"):
        nf4.quantise(torch.tensor([1.0, float("nan")]))
    q = nf4.quantise(drawn((8, 64)))
    with pytest.raises(ValueError, match="must stay fp32"):
        nf4.dequantise(replace(q, nested_absmax=q.nested_absmax.bfloat16()))
    with pytest.raises(ValueError, match="needs 256 bytes"):
        nf4.dequantise(replace(q, packed=q.packed[:-1]))
    with pytest.raises(ValueError, match="out must be contiguous"):
        nf4.dequantise(q, out=torch.empty(64, 8).t())
    with pytest.raises(ValueError, match="key"):
        nf4.from_tensors({"weight": q.packed})
