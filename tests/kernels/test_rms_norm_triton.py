"""The Triton kernels of the norm in the interpreter, fp32 and fp16, against torch in fp64; for Hopper; on a GPU."""

import pytest
import torch

from tests.kernels.triton_process import run

pytest.importorskip("triton")

CHECK = """
import sys
import torch
from gristmill.kernels import rms_norm as door, rms_norm_triton

EPS = 1e-5
device, dtypes = sys.argv[1], [getattr(torch, name) for name in sys.argv[2:]]


def triton(dy, x, weight, form):
    y, inverse = torch.empty_like(x), x.new_empty((x.shape[0], 1), dtype=torch.float32)
    rms_norm_triton.forward(x, weight, EPS, form, y, inverse)
    return [y, *rms_norm_triton.backward(dy, x, weight, inverse, form, [1, 1])], inverse


def plain(dy, x, weight, form):
    y, inverse = door._forward(x, weight, EPS, form)
    return [y, *door._rms_norm_backward(dy, x, weight, inverse, form, [1, 1])], inverse


def exact(dy, x, weight, form):
    x, weight = x.double().requires_grad_(), weight.double().requires_grad_()
    hat = x / torch.sqrt((x * x).mean(-1, keepdim=True) + EPS)
    y = hat * (weight + 1 if form == "shifted" else weight)
    return [y.detach(), *torch.autograd.grad(y, (x, weight), dy.double())]


for dtype in dtypes:
    for shape in ((1, 1), (7, 42), (300, 16), (3, 4100), (0, 8)):
        generator = torch.Generator().manual_seed(5)
        x, dy = (torch.randn(shape, generator=generator).mul_(3).to(dtype) for _ in range(2))
        weight = torch.randn(shape[1], generator=generator).add_(1).to(dtype)
        for form in door.FORMS:
            right = exact(dy, x, weight, form)
            theirs, _ = plain(dy, x, weight, form)
            moved = [one.to(device) for one in (dy, x, weight)]
            ours, inverse = triton(*moved, form)
            for name, mine, torchs, true in zip(("y", "dx", "dweight"), ours, theirs, right):
                mine = mine.cpu()
                assert mine.dtype == dtype and not mine.isnan().any()
                if mine.numel():
                    error, accepted = ((found.double() - true).abs().max() for found in (mine, torchs))
                    slack = 1e-6 * max(1.0, float(true.abs().max()))
                    assert error <= 3 * accepted + slack, (name, dtype, shape, form, float(error), float(accepted))
            if shape[0]:
                (dx,) = rms_norm_triton.backward(*moved, inverse, form, [1, 0])
                (dweight,) = rms_norm_triton.backward(*moved, inverse, form, [0, 1])
                assert torch.equal(dx, ours[1]) and torch.equal(dweight, ours[2])
            if shape == (7, 42):  # the check sees a forgotten row
                wrong = rms_norm_triton.backward(moved[0], moved[1], moved[2], inverse.flip(0), form, [1, 0])[0]
                assert (wrong.cpu().double() - right[1]).abs().max() > 0.01
print("held")
"""


COMPILED = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from gristmill.kernels import rms_norm_triton

kinds = dict.fromkeys(("x", "weight", "y", "dy", "dx"), "*bf16") | dict.fromkeys(("inverse", "dweight"), "*fp32")
kinds |= {"n": "i32", "width": "i32", "eps": "fp32"}
fixed = {"ROUNDED": True, "SHIFTED": False, "WANT_X": True, "WANT_WEIGHT": True}
for width in (128, 4096):
    sizes = rms_norm_triton._sizes(width)
    for kernel in (rms_norm_triton._forward, rms_norm_triton._backward):
        names = kernel.arg_names
        whole = [(names.index(name),) for name in names if kinds.get(name, "").startswith(("*", "i"))]
        source = ASTSource(
            fn=kernel,
            signature={name: kinds.get(name, "constexpr") for name in names},
            constexprs={(names.index(name),): value for name, value in (fixed | sizes).items() if name in names},
            attrs={place: [["tt.divisibility", 16]] for place in whole},
        )
        options = {"num_warps": sizes["num_warps"]}
        code = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options).asm["ptx"]
        assert "ld.global.v4" in code and "st.global.v4" in code, (width, kernel)
        assert ".local" not in code, (width, kernel)
print("held")
"""


def test_in_the_interpreter() -> None:
    run(CHECK, "cpu", "float32", "float16", interpret=True)


def test_compiled_for_hopper() -> None:
    """In bf16, with 16-byte accesses and no register array in memory, for heads and for a decoder's width."""
    run(COMPILED, "cpu", interpret=False)


@pytest.mark.gpu
def test_on_a_gpu() -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device here")
    run(CHECK, "cuda", "float32", "float16", "bfloat16", interpret=False)
