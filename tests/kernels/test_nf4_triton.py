"""NF4 in Triton: in the interpreter (in another process), compiled for a GPU that is not there, and on one that is."""

import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from gristmill.kernels import nf4

triton = pytest.importorskip("triton")
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def test_in_the_interpreter() -> None:
    cases = Path(__file__).with_name("interpreted_nf4.py")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--noconftest", str(cases)]
    env = os.environ | {"TRITON_INTERPRET": "1"}
    ran = subprocess.run(command, env=env, cwd=cases.parents[2], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert re.search(r"^17 passed", ran.stdout, re.MULTILINE), ran.stdout


def built(kernel: Any, signature: dict[str, str], constants: dict[str, Any]) -> str:
    """The PTX of a kernel for Hopper, its arguments aligned as tensors are."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = [*signature, *constants]
    source = ASTSource(
        kernel,
        signature=signature | dict.fromkeys(constants, "constexpr"),
        constexprs={(names.index(name),): value for name, value in constants.items()},
        attrs={(i,): [["tt.divisibility", 16]] for i in range(len(signature))},
    )
    made = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"enable_fp_fusion": False})
    return str(made.asm["ptx"])


@pytest.mark.skipif(triton.knobs.runtime.interpret, reason="triton was imported as an interpreter")
@pytest.mark.parametrize("tail", [False, True], ids=["whole", "tail"])
def test_it_compiles_for_hopper(tail: bool) -> None:
    """Stores are of 16 bytes, and no product is fused with a sum: that would round once where NF4 rounds twice."""
    from gristmill.kernels import nf4_triton

    floats = dict.fromkeys(("nested_absmax", "nested_code", "offset", "code"), "*fp32")
    signature = {"packed": "*u8", "absmax": "*u8"} | floats | {"out": "*bf16", "n": "i64" if tail else "i32"}
    constants = {"BLOCK": 64, "NESTED_BLOCK": 256, "WORDS": nf4_triton.WORDS, "TAIL": tail}
    ptx = built(nf4_triton._dequantise, signature, constants)
    assert "st.global.v4.b32" in ptx and "fma" not in ptx
    if not tail:
        assert len(re.findall(r"st\.global", ptx)) == len(re.findall(r"st\.global\.v4\.b32", ptx))
    ptx = built(
        nf4_triton._quantise,
        {"weight": "*bf16", "packed": "*u8", "absmax": "*fp32", "thresholds": "*fp32", "n": "i64" if tail else "i32"},
        {"BLOCK": 64, "ROWS": 64},
    )
    assert "div.rn.f32" in ptx and "fma" not in ptx  # 1 / absmax as IEEE says, not to within two ulp


def same_bits(one: torch.Tensor, other: torch.Tensor) -> bool:
    return one.dtype == other.dtype and torch.equal(one.view(-1).view(torch.uint8), other.view(-1).view(torch.uint8))


@pytest.mark.gpu
@needs_cuda
@pytest.mark.parametrize("double", [False, True], ids=["single", "double"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(64, 128), (7, 42), (129,), (1, 1), (123, 431), (4096, 1024)], ids=str)
def test_on_cuda_equals_bitsandbytes_and_torch(shape: tuple[int, ...], dtype: torch.dtype, double: bool) -> None:
    peer = pytest.importorskip("bitsandbytes.functional")
    weight = (torch.randn(shape, device="cuda") * 0.03).to(dtype)
    assert nf4.path_of(weight.device) == "triton"
    ours, plain = (nf4.quantise(weight, double=double, path=path) for path in (None, "torch"))
    for name, tensor in ours.tensors().items():
        assert same_bits(tensor, plain.tensors()[name])
    want = nf4.dequantise(ours.to("cpu"), path="torch")
    assert same_bits(nf4.dequantise(ours).cpu(), want)
    assert same_bits(nf4.dequantise(ours, path="torch").cpu(), want)
    packed, state = peer.quantize_4bit(weight, compress_statistics=double, quant_type="nf4")
    theirs = nf4.NF4(packed, state.absmax, tuple(shape), dtype)
    if double:
        inner = state.state2
        theirs = replace(theirs, nested_absmax=inner.absmax, nested_code=inner.code, offset=state.offset)
    assert same_bits(nf4.dequantise(theirs), peer.dequantize_4bit(packed, state).view(shape))
    differ = int((packed.view(-1) != ours.packed.view(-1)).sum())  # its reciprocal may be off by an ulp: fast math
    assert differ <= max(1, weight.numel() // 100_000)


@pytest.mark.gpu
@needs_cuda
def test_on_cuda_beyond_32_bits() -> None:
    """2 ** 31 and a few weights: the last ones are where they belong."""
    if torch.cuda.mem_get_info()[0] < 24 << 30:
        pytest.skip("needs 24 GB of GPU memory")
    n = 2**31 + 4096 + 5
    weight = torch.zeros(n, dtype=torch.bfloat16, device="cuda")
    weight[-5000:] = torch.randn(5000, device="cuda").bfloat16()
    q = nf4.quantise(weight)
    tail = nf4.dequantise(q)[-5000:].float()
    assert (tail - weight[-5000:].float()).abs().max() < 0.6 and tail.abs().max() > 1


@pytest.mark.gpu
@needs_cuda
@pytest.mark.parametrize("double", [False, True], ids=["single", "double"])
def test_ops_pass_opcheck_on_cuda(double: bool) -> None:
    q = nf4.quantise(torch.randn(33, 65, device="cuda"), double=double)
    state = (q.packed, q.absmax, q.nested_absmax, q.nested_code, q.offset)
    torch.library.opcheck(nf4._dequantise_op, (*state, torch.empty(33, 65, device="cuda"), 64, 256, "triton"))
    torch.library.opcheck(nf4._quantise_op, (torch.randn(33, 65, device="cuda"), 64, "triton"))
