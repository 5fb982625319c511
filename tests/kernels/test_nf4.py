"""NF4 against bitsandbytes: dequantisation bit for bit, quantisation by its CUDA rule, files in both directions."""

import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from importlib.util import find_spec

import numpy as np
import pytest
import torch
from bitsandbytes import functional as peer
from bitsandbytes.nn import Params4bit

from gristmill.kernels import nf4

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
needs_numba = pytest.mark.skipif(find_spec("numba") is None, reason="the path needs numba")
PATHS = ["torch", pytest.param("cpu", marks=needs_numba)]
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


def cuda_rule(weight: torch.Tensor, blocksize: int = 64) -> tuple[torch.Tensor, torch.Tensor]:
    """(indices, absmax) by the decision tree of bitsandbytes' CUDA kernel, one weight at a time."""

    def tree(value: np.float32, low: int = 0, high: int = 15) -> int:
        if low == high:
            return low
        middle = (low + high) // 2
        above = value > np.float32(nf4.THRESHOLDS[middle])
        return tree(value, middle + 1, high) if above else tree(value, low, middle)

    values, indices, tops = weight.float().reshape(-1).numpy(), [], []
    for start in range(0, len(values), blocksize):
        block = values[start : start + blocksize]
        tops.append(np.abs(block).max())
        inverse = np.float32(1) / tops[-1] if tops[-1] > 3e-39 else np.float32(0)
        indices += [tree(value) for value in block * inverse]
    return torch.tensor(indices), torch.tensor(np.array(tops))


def indices(q: nf4.NF4) -> torch.Tensor:
    packed = q.packed.view(-1)
    return torch.stack([packed >> 4, packed & 15], dim=1).view(-1).long()


def ties(path: nf4.Path | None = None) -> bool:
    """A scaled weight equal to a threshold keeps the lower code (the rule is >), one ulp above it the upper."""
    edges = torch.tensor(EDGES)
    above = torch.nextafter(edges, torch.tensor(2.0))
    weight = torch.cat([torch.ones(1), edges, above, torch.zeros(33)])
    index = indices(nf4.quantise(weight, double=False, path=path)).tolist()
    return index == [15, *range(15), *range(1, 16), *[nf4.ZERO] * 33]


EDGES = nf4.THRESHOLDS  # as they are, whatever a mutation makes of them


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("double", [False, True], ids=["single", "double"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_dequantise_equals_bitsandbytes(
    shape: tuple[int, ...], dtype: torch.dtype, double: bool, path: nf4.Path
) -> None:
    ours, packed, state = from_peer(drawn(shape, dtype), double)
    theirs = peer.dequantize_4bit(packed, state).view(shape)
    assert same_bits(nf4.dequantise(ours, path=path), theirs)
    assert same_bits(nf4.naive_dequantise(ours), theirs)
    out = torch.full(shape, float("nan"), dtype=dtype)
    assert nf4.dequantise(ours, out=out, path=path) is out
    assert same_bits(out, theirs)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("blocksize", nf4.BLOCKS)
def test_dequantise_other_block_sizes(blocksize: int, path: nf4.Path) -> None:
    ours, packed, state = from_peer(drawn((100, 84)), True, blocksize)
    assert same_bits(nf4.dequantise(ours, path=path), peer.dequantize_4bit(packed, state))


@pytest.mark.parametrize("path", PATHS)
def test_dequantise_into_another_dtype(path: nf4.Path) -> None:
    ours, packed, state = from_peer(drawn((31, 66)), True)
    wide = peer.dequantize_4bit(packed, state)
    assert same_bits(nf4.dequantise(ours, torch.bfloat16, path=path), wide.to(torch.bfloat16))
    assert same_bits(nf4.dequantise(ours, torch.float16, path=path), wide.to(torch.float16))


@pytest.mark.parametrize("path", PATHS)
def test_dequantise_writes_its_own_place_only(path: nf4.Path) -> None:
    """Of a shared buffer, at an odd offset: nothing before and after it changes; packed bytes may start anywhere."""
    for n in (1, 31, 64, 4096 + 77):
        q = nf4.quantise(drawn((n,)))
        moved = replace(q, packed=torch.cat([q.packed[:1], q.packed])[1:])
        for dtype in DTYPES:
            buffer = torch.full((n + 50,), 9.0, dtype=dtype)
            nf4.dequantise(moved, out=buffer[3 : 3 + n], path=path)
            assert same_bits(buffer[3 : 3 + n], nf4.naive_dequantise(q, dtype))
            assert buffer[:3].eq(9).all() and buffer[3 + n :].eq(9).all()


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [*SHAPES[:5], (23, 131)], ids=str)
def test_quantise_follows_the_cuda_rule(shape: tuple[int, ...], dtype: torch.dtype, path: nf4.Path) -> None:
    weight = drawn(shape, dtype, seed=1)
    for blocksize in (64, 256):
        q = nf4.quantise(weight, blocksize=blocksize, double=False, path=path)
        index, absmax = cuda_rule(weight, blocksize)
        assert torch.equal(indices(q)[: weight.numel()], index) and same_bits(q.absmax, absmax)
        assert indices(q)[weight.numel() :].tolist() in ([], [nf4.ZERO])


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


def test_ties_against_bitsandbytes_cpu_rule_are_rare() -> None:
    """Its CPU thresholds lie up to an ulp beside CUDA's: in a million weights hardly one falls between."""
    weight = drawn((1024, 1024), seed=5)
    differ = int((indices(nf4.quantise(weight, double=False)) != indices(from_peer(weight, False)[0])).sum())
    assert differ <= 3


@pytest.mark.parametrize("path", PATHS)
def test_ties_follow_the_cuda_thresholds(path: nf4.Path) -> None:
    assert ties(path)


def test_a_threshold_off_by_one_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    for i in (0, 7, 14):
        wrong = list(EDGES)
        wrong[i] = float(np.nextafter(np.float32(wrong[i]), np.float32(-2)))
        monkeypatch.setattr(nf4, "THRESHOLDS", tuple(wrong))
        assert not ties("torch")
        wrong[i] = wrong[i + 1] if i < 14 else wrong[i - 1]
        monkeypatch.setattr(nf4, "THRESHOLDS", tuple(sorted(wrong)))
        assert not ties("torch")


@needs_numba
def test_cpu_path_equals_torch_on_any_number_of_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    from gristmill.kernels import nf4_cpu

    monkeypatch.setattr(nf4_cpu, "LEAST", 1)
    weight, before = drawn((701, 997), torch.bfloat16), torch.get_num_threads()
    want = nf4.quantise(weight, path="torch")
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            for entry in (nf4_cpu._torch_threads(), None):
                monkeypatch.setattr(nf4_cpu, "_torch_threads", lambda entry=entry: entry)
                q = nf4.quantise(weight, path="cpu")
                assert torch.equal(q.packed, want.packed) and torch.equal(q.absmax, want.absmax)
                assert same_bits(nf4.dequantise(q, path="cpu"), nf4.dequantise(want, path="torch"))
                monkeypatch.undo()
                monkeypatch.setattr(nf4_cpu, "LEAST", 1)
    finally:
        torch.set_num_threads(before)


@needs_numba
@pytest.mark.parametrize("cpu", ["haswell", "x86-64"])
def test_cpu_path_on_an_older_processor(cpu: str) -> None:
    """AVX2 looks up by bytes, with the same bits; where there is not even that, torch does the work."""
    code = """
import torch
from gristmill.kernels import nf4
weight = torch.randn(37, 130, generator=torch.Generator().manual_seed(0))
for dtype in nf4.DTYPES.values():
    for double in (False, True):
        q = nf4.quantise(weight.to(dtype), double=double)
        assert torch.equal(q.packed, nf4.quantise(weight.to(dtype), double=double, path="torch").packed)
        assert torch.equal(nf4.dequantise(q), nf4.naive_dequantise(q))
print(nf4.path_of("cpu"))
"""
    if not sys.platform.startswith("linux") or os.uname().machine != "x86_64":
        pytest.skip("older x86-64 processors")
    features = {"haswell": "+avx2,+avx,+f16c,+fma,+ssse3,+sse4.1,+sse4.2", "x86-64": "+sse2"}[cpu]
    env = os.environ | {"NUMBA_CPU_NAME": cpu, "NUMBA_CPU_FEATURES": features}
    ran = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.split() == [{"haswell": "cpu", "x86-64": "torch"}[cpu]]


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


def test_first_weight_is_in_the_high_bits() -> None:
    q = nf4.quantise(torch.tensor([1.0, -1.0, 0.0]), double=False)
    assert q.packed.view(-1).tolist() == [0xF0, 0x77]


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("double", [False, True], ids=["single", "double"])
def test_a_block_of_zeros_stays_zero(double: bool, path: nf4.Path) -> None:
    weight = drawn((4, 64))
    weight[2] = 0
    q = nf4.quantise(weight, double=False, path=path)
    assert q.packed.view(4, 32)[2].unique().tolist() == [0x77]
    assert same_bits(nf4.dequantise(q, path=path)[2], torch.zeros(64))
    back = nf4.dequantise(nf4.quantise(weight, double=double, path=path), path=path)
    assert same_bits(back[2], torch.zeros(64)) and torch.isfinite(back).all()
    zeros = nf4.quantise(torch.zeros(3, 64), double=double, path=path)
    assert same_bits(nf4.dequantise(zeros, path=path), torch.zeros(3, 64))


@pytest.mark.parametrize("path", PATHS)
def test_a_block_whose_reciprocal_overflows_becomes_zero(path: nf4.Path) -> None:
    weight = torch.cat([torch.full((64,), 1e-39), drawn((64,))])
    back = nf4.dequantise(nf4.quantise(weight, double=False, path=path), path=path)
    assert back[:64].eq(0).all() and torch.isfinite(back).all() and back[64:].abs().max() > 0.01


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


@pytest.mark.parametrize("storage", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_packed_bytes_under_another_dtype(storage: torch.dtype) -> None:
    """bnb_4bit_quant_storage: the same bytes, both ways."""
    weight = drawn((16, 64), torch.bfloat16)
    q = nf4.quantise(weight)
    tensors = nf4.to_tensors(q, "w", storage)
    assert tensors["w"].dtype == storage and tensors["w"].shape == (512 // storage.itemsize, 1)
    assert same_bits(nf4.dequantise(nf4.from_tensors(tensors, "w")), nf4.dequantise(q))
    _, state = peer.quantize_4bit(weight, compress_statistics=True, quant_type="nf4", quant_storage=storage)
    stats = {key.removeprefix("w."): value for key, value in tensors.items() if key != "w"}
    theirs = Params4bit.from_prequantized(tensors["w"], stats, device="cpu")
    assert theirs.quant_storage == storage and state.nested
    assert same_bits(peer.dequantize_4bit(theirs.data, theirs.quant_state), nf4.dequantise(q))
    with pytest.raises(ValueError, match="no whole numbers"):
        nf4.to_tensors(nf4.quantise(drawn((3, 7))), "w", storage)


@pytest.mark.parametrize("path", PATHS)
def test_mutations_are_seen(path: nf4.Path) -> None:
    """The comparison above would fail for swapped halves, a forgotten offset, or absmax of the wrong block."""
    ours, packed, state = from_peer(drawn((64, 128)), True)
    theirs = peer.dequantize_4bit(packed, state)
    assert ours.nested_code is not None
    swapped = replace(ours, packed=(ours.packed << 4) | (ours.packed >> 4))
    no_offset = replace(ours, offset=torch.zeros(()))
    shifted = replace(ours, absmax=ours.absmax.roll(1))
    fused = replace(ours, nested_code=torch.nextafter(ours.nested_code, torch.tensor(2.0)))
    for mutant in (swapped, no_offset, shifted, fused):
        assert not same_bits(nf4.dequantise(mutant, path=path), theirs)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("double", [False, True], ids=["single", "double"])
def test_ops_pass_opcheck(double: bool, path: nf4.Path) -> None:
    q = nf4.quantise(drawn((33, 65)), double=double)
    state = (q.packed, q.absmax, q.nested_absmax, q.nested_code, q.offset)
    torch.library.opcheck(nf4._dequantise_op, (*state, torch.empty(33, 65), 64, 256, path))
    torch.library.opcheck(nf4._quantise_op, (drawn((33, 65), torch.float16), 64, path))
    torch.library.opcheck(nf4._double_op, (nf4.quantise(drawn((33, 65)), double=False).absmax,))


def test_compiled_code_traces_through() -> None:
    def forward(q: nf4.NF4, x: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
        return x @ nf4.dequantise(q, out=out).t() + nf4.dequantise(nf4.quantise(x)).sum()

    q, x = nf4.quantise(drawn((32, 64))), drawn((3, 64), seed=2)
    want = forward(q, x, torch.empty(32, 64))
    out = torch.empty(32, 64)
    with torch.compiler.set_stance("default"):
        got = torch.compile(forward, backend="aot_eager", fullgraph=True)(q, x, out)
    assert torch.equal(got, want) and same_bits(out, nf4.naive_dequantise(q))


def test_autograd_knows_that_the_buffer_was_written() -> None:
    q, out, x = nf4.quantise(drawn((4, 64))), torch.ones(4, 64), torch.ones(4, 64, requires_grad=True)
    y = (x * out).sum()
    nf4.dequantise(q, out=out)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.backward()


def test_the_path_can_be_chosen_and_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    assert nf4.path_of("cpu") == ("cpu" if find_spec("numba") else "torch")
    assert nf4.path_of("mps") == "torch" and nf4.path_of("mps", "torch") == "torch"
    with pytest.raises(ValueError, match="not one of"):
        nf4.path_of("cpu", "cuda")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"does not run on a cpu tensor|cannot be taken"):
        nf4.quantise(drawn((2, 64)), path="triton")
    monkeypatch.setitem(sys.modules, "gristmill.kernels.nf4_cpu", None)
    nf4._module.cache_clear()
    try:
        assert nf4.path_of("cpu") == "torch"
        assert same_bits(nf4.dequantise(nf4.quantise(torch.ones(64), double=False)), torch.ones(64))
        with pytest.raises(ValueError, match="cannot be taken"):
            nf4.path_of("cpu", "cpu")
    finally:
        nf4._module.cache_clear()


def test_what_cannot_be_quantised_says_so() -> None:
    with pytest.raises(ValueError, match="float64"):
        nf4.quantise(torch.zeros(4, dtype=torch.float64))
    with pytest.raises(ValueError, match="block size 48"):
        nf4.quantise(torch.zeros(4), blocksize=48)
    with pytest.raises(ValueError, match="empty"):
        nf4.quantise(torch.zeros(0, 4))
    for path in (None, "torch"):
        for value in ("nan", "inf", "-inf"):
            for dtype in DTYPES:
                with pytest.raises(ValueError, match="inf or NaN"):
                    nf4.quantise(torch.tensor([1.0, float(value)], dtype=dtype), path=path)  # type: ignore[arg-type]
    q = nf4.quantise(drawn((8, 64)))
    with pytest.raises(ValueError, match="must stay fp32"):
        nf4.dequantise(replace(q, nested_absmax=q.nested_absmax.bfloat16()))
    with pytest.raises(ValueError, match="needs 256 bytes"):
        nf4.dequantise(replace(q, packed=q.packed[:-1]))
    with pytest.raises(ValueError, match="out must be contiguous"):
        nf4.dequantise(q, out=torch.empty(64, 8).t())
    with pytest.raises(ValueError, match=r"fp32, fp16 or bf16, not torch\.float64"):
        nf4.dequantise(q, torch.float64)
    with pytest.raises(ValueError, match="a code of 256"):
        nf4.dequantise(replace(q, nested_code=q.nested_code[:-1]))
    with pytest.raises(ValueError, match="block size 8 "):
        nf4.dequantise(replace(q, blocksize=8))


def test_what_cannot_be_read_says_so() -> None:
    q = nf4.quantise(drawn((8, 64)))
    whole = nf4.to_tensors(q)
    with pytest.raises(ValueError, match="key"):
        nf4.from_tensors({"weight": q.packed})
    with pytest.raises(ValueError, match="nested_absmax' is missing"):
        nf4.from_tensors({key: value for key, value in whole.items() if not key.endswith("nested_absmax")})
    with pytest.raises(ValueError, match="not NF4's"):
        nf4.from_tensors(whole | {"weight.quant_map": whole["weight.quant_map"].flip(0)})
    with pytest.raises(ValueError, match="needs 256 bytes"):
        nf4.from_tensors(whole | {"weight": q.packed[:-1]})
    with pytest.raises(ValueError, match="no JSON"):
        nf4.from_tensors(whole | {f"weight.{nf4.STATE}": torch.zeros(3, dtype=torch.uint8)})
