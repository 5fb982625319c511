"""The Triton kernels of the gated product in the interpreter, fp32 and fp16, against torch in fp64; on a GPU."""

import pytest
import torch

from tests.kernels.triton_process import run

pytest.importorskip("triton")

CHECK = """
import sys
import torch
from gristmill.kernels import glu_triton
from gristmill.kernels.glu import glu_backward

device, dtypes = sys.argv[1], [getattr(torch, name) for name in sys.argv[2:]]
for dtype in dtypes:
    for shape in ((1, 1), (7, 42), (33, 257), (0, 8)):
        generator = torch.Generator().manual_seed(5)
        gate, up, dh = (torch.randn(shape, generator=generator).mul_(3).to(dtype) for _ in range(3))
        for act in ("silu", "gelu_tanh"):
            right = glu_backward(dh.double(), gate.double(), up.double(), act)
            plain = glu_backward(dh.clone(), gate.clone(), up.clone(), act)
            moved = [tensor.to(device) for tensor in (dh.clone(), gate.clone(), up.clone())]
            ours = glu_triton.glu_backward(*moved, act)
            forward = glu_triton.glu(moved[1], moved[2], act)
            assert torch.equal(forward, ours[0]), (dtype, shape, act)
            assert ours[1].data_ptr() == moved[0].data_ptr()
            for name, mine, torchs, exact in zip(("h", "dgate", "dup"), ours, plain, right):
                mine = mine.cpu()
                assert mine.dtype == dtype and not mine.isnan().any()
                if mine.numel():
                    error, theirs = ((found.double() - exact).abs().max() for found in (mine, torchs))
                    assert error <= 3 * theirs + 1e-5, (name, dtype, shape, act, float(error), float(theirs))
            if shape == (7, 42):  # the check sees a wrong derivative
                wrong = glu_triton.glu_backward(dh.clone().to(device), moved[2], moved[1], act)
                assert (wrong[1].cpu().double() - right[1]).abs().max() > 0.1
print("held")
"""


def test_in_the_interpreter() -> None:
    run(CHECK, "cpu", "float32", "float16", interpret=True)


@pytest.mark.gpu
def test_on_a_gpu() -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device here")
    run(CHECK, "cuda", "float32", "float16", "bfloat16", interpret=False)
