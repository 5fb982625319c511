"""The Triton walk over a chunk of logits: in Triton's interpreter, compiled for Hopper without one, and on a GPU.

Triton decides at its import whether it interprets, so each of the first two runs in a process of its own: this file,
started as a script.
"""

import os
import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import Tensor

from gristmill.kernels.logprob import naive_target_logprobs, target_logprobs

CASES = [(1, 6, 42), (5, 31, 431), (3, 64, 256)]
BENT: list[dict[str, Any]] = [{}, {"scale": 0.7, "softcap": 5.0}]


def drawn(tokens: int, width: int, words: int, dtype: torch.dtype, device: str = "cpu") -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(tokens)
    hidden = torch.randn(tokens, width, generator=generator).to(device, dtype)
    head = torch.randn(words, width, generator=generator).to(device, dtype)
    bias = torch.randn(words, generator=generator).to(device, dtype)
    targets = torch.randint(words, (tokens,), generator=generator)
    targets[0] = words - 1
    return hidden, head, bias, targets.to(device), torch.randn(tokens, generator=generator).to(device)


def run(function: Any, given: tuple[Tensor, ...], dtype: torch.dtype, train: bool, options: dict[str, Any]) -> Any:
    """Values, and gradients of hidden, head and bias, in fp64."""
    hidden, head, bias = (tensor.detach().to(dtype).requires_grad_() for tensor in given[:3])
    head.requires_grad_(train)
    bias.requires_grad_(train)
    values = function(hidden, head, given[3], bias=bias, **options)
    leaves = [hidden, head, bias][: 3 if train else 1]
    return [t.detach().double() for t in (values, *torch.autograd.grad(values, leaves, given[4].to(values.dtype)))]


def check_numerics(given: tuple[Tensor, ...], dtype: torch.dtype, train: bool, options: dict[str, Any]) -> None:
    """Error against fp64 at most three times that of plain torch in the same dtype."""
    truth = run(naive_target_logprobs, given, torch.float64, train, options)
    plain = run(naive_target_logprobs, given, dtype, train, options)
    ours = run(target_logprobs, given, dtype, train, options | {"path": "triton", "chunk_tokens": 3})
    for name, mine, theirs, right in zip(("values", "hidden", "head", "bias"), ours, plain, truth, strict=False):
        error, allowed = (mine - right).abs().max(), 3 * (theirs - right).abs().max() + 1e-5
        assert error <= allowed, f"{name}: {error} > {allowed} ({dtype}, {train}, {options})"


def interpreted() -> None:
    from gristmill.kernels import logprob_triton

    logprob_triton.BLOCK = 128  # several blocks a row
    logprob_triton.fold.__defaults__ = logprob_triton.spread.__defaults__ = (128,)
    for dtype in (torch.float32, torch.float16):
        for case in CASES:
            for options in BENT:
                for train in (False, True):
                    check_numerics(drawn(*case, dtype), dtype, train, options)
    hidden, head, bias, targets, _ = drawn(5, 31, 431, torch.float32)
    assert target_logprobs(hidden[:0], head, targets[:0], path="triton").shape == (0,)
    huge = target_logprobs(hidden * 1e4, head, targets, path="triton")
    torch.testing.assert_close(huge, naive_target_logprobs(hidden * 1e4, head, targets))
    bias[:300] = float("-inf")  # the first blocks hold nothing else
    targets = targets.clamp(min=300)
    masked = target_logprobs(hidden, head, targets, bias=bias, path="triton")
    torch.testing.assert_close(masked, naive_target_logprobs(hidden, head, targets, bias=bias))
    hidden[2, 3] = float("nan")
    hidden.requires_grad_()
    values = target_logprobs(hidden, head, targets, path="triton")
    (gradient,) = torch.autograd.grad(values.sum(), hidden)
    assert values.isnan().tolist() == gradient.isnan().any(dim=1).tolist() == [False, False, True, False, False]
    mutants(logprob_triton)
    print("interpreted: held")


def mutants(module: Any) -> None:
    """A sum that forgets its last block, a target shifted by one, a slope left out: each must be caught."""
    given = drawn(5, 31, 431, torch.float32)
    fold = module.fold

    def dropped(products: Tensor, hidden: Tensor, head: Tensor, *rest: Any) -> None:
        fold(products[:, :384].contiguous(), hidden, head[:384].contiguous(), *rest)

    def shifted(products: Tensor, hidden: Tensor, head: Tensor, targets: Tensor, *rest: Any) -> None:
        fold(products, hidden, head, (targets - 1).clamp(min=0), *rest)

    def uncapped(products: Tensor, *rest: Any) -> None:
        fold(products, *rest)
        products.mul_(0.7)

    for mutant in (dropped, shifted, uncapped):
        module.fold = mutant
        try:
            check_numerics(given, torch.float32, False, {"softcap": 5.0})
        except AssertionError:
            continue
        finally:
            module.fold = fold
        raise SystemExit(f"the mutation {mutant.__name__} was not caught")


def compiled() -> None:
    """Both kernels as machine code for Hopper, in bf16, with 16-byte accesses and no register array in memory."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from gristmill.kernels import logprob_triton

    kinds = dict.fromkeys(("products", "hidden", "head", "bias"), "*bf16") | {"targets": "*i64"}
    kinds |= dict.fromkeys(("values", "lse", "of_target", "of_share"), "*fp32")
    kinds |= {"words": "i32", "width": "i32", "scale": "fp32", "softcap": "fp32"}
    fixed = {"HAS_BIAS": True, "HAS_CAP": True, "EXACT": True, "WRITE": True, "BLOCK": 8192, "BLOCK_H": 1024}
    for kernel in (logprob_triton._fold, logprob_triton._spread):
        names = kernel.arg_names
        whole = [(names.index(name),) for name in names if kinds.get(name, "").startswith(("*", "i"))]
        source = ASTSource(
            fn=kernel,
            signature={name: kinds.get(name, "constexpr") for name in names},
            constexprs={(names.index(name),): value for name, value in fixed.items() if name in names},
            attrs={place: [["tt.divisibility", 16]] for place in whole},
        )
        code = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 16}).asm["ptx"]
        assert "ld.global.v4" in code and "st.global.v4" in code
        assert ".local" not in code
    print("compiled: held")


@pytest.mark.parametrize("what", ["interpreted", "compiled"])
def test_in_a_process_of_its_own(what: str) -> None:
    pytest.importorskip("triton")
    environment = os.environ | {"TRITON_INTERPRET": str(int(what == "interpreted")), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, __file__, what]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr[-4000:]
    assert done.stdout.endswith(f"{what}: held\n")


@pytest.mark.gpu
@pytest.mark.parametrize("train", [False, True], ids=["frozen", "trained"])
@pytest.mark.parametrize("options", BENT, ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_on_a_gpu(dtype: torch.dtype, options: dict[str, Any], train: bool) -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    for case in ((1, 6, 42), (123, 31, 431), (300, 256, 32_000), (257, 512, 128_256)):
        check_numerics(drawn(*case, dtype, "cuda"), dtype, train, options)


if __name__ == "__main__":
    {"interpreted": interpreted, "compiled": compiled}[sys.argv[1]]()
