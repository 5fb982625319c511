"""Chunked target log-probabilities against log_softmax over the whole matrix: values and every gradient."""

import importlib.util
import sys
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from gristmill.kernels import logprob, logprob_chunk
from gristmill.kernels.logprob import (
    chunk_of,
    naive_target_logprobs,
    path_of,
    target_logprobs,
    target_logprobs_lse,
)

CASES = [(1, 6, 42), (13, 6, 42), (123, 31, 431), (64, 16, 50)]
BENT = [{"scale": 0.25}, {"softcap": 3.0}, {"scale": 2.5, "softcap": 7.0}]


def drawn(tokens: int, width: int, words: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(2)
    hidden = torch.randn(tokens, width, generator=generator, dtype=torch.float64)
    head = torch.randn(words, width, generator=generator, dtype=torch.float64)
    targets = torch.randint(words, (tokens,), generator=generator)
    dy = torch.randn(tokens, generator=generator, dtype=torch.float64)
    bias = torch.randn(words, generator=generator, dtype=torch.float64)
    return hidden.to(dtype), head.to(dtype), targets, dy, bias.to(dtype)


@pytest.mark.parametrize("train", ["hidden", "head", "both", "both+bias"])
@pytest.mark.parametrize("chunk", [1, 7, 64, None], ids=str)
@pytest.mark.parametrize(("tokens", "width", "words"), CASES, ids=str)
def test_equals_log_softmax(tokens: int, width: int, words: int, chunk: int | None, train: str) -> None:
    hidden, head, targets, dy, bias = drawn(tokens, width, words)
    leaves = []
    if train != "head":
        leaves.append(hidden.requires_grad_())
    if train != "hidden":
        leaves.append(head.requires_grad_())
    added = bias.requires_grad_() if "bias" in train else None
    leaves += [] if added is None else [added]
    check(hidden, head, targets, dy, leaves, bias=added, chunk_tokens=chunk)


@pytest.mark.parametrize("options", BENT, ids=str)
@pytest.mark.parametrize("train", ["hidden", "all"])
def test_scaled_and_capped_logits(train: str, options: dict[str, Any]) -> None:
    hidden, head, targets, dy, bias = drawn(123, 31, 431)
    leaves = [hidden.requires_grad_()]
    if train == "all":
        leaves += [head.requires_grad_(), bias.requires_grad_()]
    check(hidden, head, targets, dy, leaves, bias=bias, chunk_tokens=50, **options)


def check(hidden: Tensor, head: Tensor, targets: Tensor, dy: Tensor, leaves: list[Tensor], **options: Any) -> None:
    ours = target_logprobs(hidden, head, targets, **options)
    del options["chunk_tokens"]
    naive = naive_target_logprobs(hidden, head, targets, **options)
    assert ours.dtype == torch.float32
    torch.testing.assert_close(ours, naive, rtol=1e-5, atol=1e-5)
    for one, other in zip(
        torch.autograd.grad(ours, leaves, dy.float()), torch.autograd.grad(naive, leaves, dy.float()), strict=True
    ):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("train_head", [False, True], ids=["frozen", "trained"])
def test_gradcheck(train_head: bool) -> None:
    hidden, head, targets, _, bias = drawn(5, 4, 7, torch.float64)
    hidden.requires_grad_()
    if train_head:
        head.requires_grad_()
        bias.requires_grad_()
    assert torch.autograd.gradcheck(
        lambda h, w, b: target_logprobs(h, w, targets, bias=b, chunk_tokens=2), (hidden, head, bias)
    )


def test_head_tied_to_the_embedding_gets_both_gradients() -> None:
    _, embedding, targets, dy, _ = drawn(13, 6, 42)
    embedding.requires_grad_()
    found = []
    for function in (target_logprobs, naive_target_logprobs):
        hidden = torch.nn.functional.embedding(targets.roll(1), embedding).tanh()
        found += torch.autograd.grad(function(hidden, embedding, targets), embedding, dy.float())
    torch.testing.assert_close(found[0], found[1], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("train_head", [False, True], ids=["frozen", "trained"])
def test_half_precision_errs_no_more_than_plain_torch(train_head: bool) -> None:
    hidden, head, targets, dy, _ = drawn(64, 48, 300, torch.bfloat16)

    def run(function: object, dtype: torch.dtype) -> list[Tensor]:
        h, w = hidden.to(dtype).requires_grad_(), head.to(dtype).requires_grad_(train_head)
        y = function(h, w, targets)  # type: ignore[operator]
        return [t.double() for t in (y.detach(), *torch.autograd.grad(y, [h, w][: 1 + train_head], dy.to(y.dtype)))]

    truth = run(naive_target_logprobs, torch.float64)
    plain = run(naive_target_logprobs, torch.bfloat16)
    for mine, theirs, right in zip(run(target_logprobs, torch.bfloat16), plain, truth, strict=True):
        assert (mine - right).abs().max() <= 3 * (theirs - right).abs().max() + 1e-5


@pytest.mark.parametrize("train_head", [False, True], ids=["frozen", "trained"])
def test_no_targets(train_head: bool) -> None:
    hidden, head, targets, _, _ = drawn(1, 6, 42)
    hidden, targets = hidden[:0].requires_grad_(), targets[:0]
    head.requires_grad_(train_head)
    values = target_logprobs(hidden, head, targets)
    assert values.shape == (0,)
    values.sum().backward()
    assert hidden.grad is not None and hidden.grad.shape == (0, 6)
    assert not train_head or not head.grad.any()  # type: ignore[union-attr]


def test_nan_stays_with_its_token() -> None:
    hidden, head, targets, _, _ = drawn(13, 6, 42)
    hidden[4, 2] = float("nan")
    hidden.requires_grad_()
    values = target_logprobs(hidden, head, targets, chunk_tokens=5)
    assert values.isnan().nonzero().tolist() == [[4]]
    (gradient,) = torch.autograd.grad(values.sum(), hidden)
    assert gradient.isnan().any(dim=1).nonzero().tolist() == [[4]]


def test_large_logits_do_not_overflow() -> None:
    hidden, head, targets, _, _ = drawn(13, 6, 42)
    values = target_logprobs(hidden * 1e4, head, targets)
    assert torch.isfinite(values).all()
    torch.testing.assert_close(values, naive_target_logprobs(hidden * 1e4, head, targets))


def test_values_do_not_depend_on_the_other_tokens() -> None:
    hidden, head, targets, _, _ = drawn(123, 31, 431)
    whole = target_logprobs(hidden, head, targets, chunk_tokens=16)
    order = torch.randperm(123, generator=torch.Generator().manual_seed(0))
    shuffled = target_logprobs(hidden[order], head, targets[order], chunk_tokens=16)
    torch.testing.assert_close(shuffled, whole[order], rtol=1e-6, atol=1e-6)


def test_never_more_logits_than_a_chunk() -> None:
    """The largest tensor alive is one chunk of logits, not tokens x words."""
    hidden, head, targets, _, _ = drawn(512, 8, 1000)
    largest = 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            nonlocal largest
            result = function(*args, **(kwargs or {}))
            largest = max(
                [largest, *(t.numel() for t in torch.utils._pytree.tree_leaves(result) if torch.is_tensor(t))]
            )
            return result

    plain = (hidden, head, targets, None, 1.0, None, 32)
    with Watch():
        _, lse, _ = logprob._forward(*plain, True, "torch")
        logprob._backward(*plain, "torch", lse, lse, lse, [True, True, False])
    assert largest == 32 * 1000


def test_shapes_that_do_not_fit_say_so() -> None:
    hidden, head, targets, _, _ = drawn(13, 6, 42)
    with pytest.raises(ValueError, match="do not fit"):
        target_logprobs(hidden[:, :5], head, targets)
    with pytest.raises(ValueError, match="chunk_tokens"):
        target_logprobs(hidden, head, targets, chunk_tokens=0)
    with pytest.raises(ValueError, match=r"float16.*cast"):
        target_logprobs(hidden.half(), head, targets)
    with pytest.raises(ValueError, match="softcap"):
        target_logprobs(hidden, head, targets, softcap=0.0)


def test_targets_at_both_ends_of_the_vocabulary() -> None:
    hidden, head, targets, dy, _ = drawn(13, 6, 42)
    targets[::2], targets[1::2] = 0, 41
    check(hidden.requires_grad_(), head, targets, dy, [hidden], chunk_tokens=5)


@pytest.mark.parametrize("wrong", [-1, 42])
def test_a_target_outside_the_vocabulary_says_so(wrong: int) -> None:
    hidden, head, targets, _, _ = drawn(13, 6, 42)
    targets[7] = wrong
    with pytest.raises(IndexError, match=f"{wrong}.*vocabulary of 42"):
        target_logprobs(hidden, head, targets)


@pytest.mark.parametrize("train_head", [False, True], ids=["frozen", "trained"])
@pytest.mark.parametrize("options", [{}, *BENT], ids=str)
def test_log_sum_and_its_gradient(options: dict[str, Any], train_head: bool) -> None:
    """A z-loss, alone and beside the likelihood: Σ w log p + 0.1 lse²."""
    hidden, head, targets, dy, _ = drawn(13, 6, 42, torch.float64)
    hidden.requires_grad_()
    leaves = [hidden, *([head.requires_grad_()] if train_head else [])]
    logits = hidden @ head.t() * options.get("scale", 1.0)
    if "softcap" in options:
        logits = options["softcap"] * torch.tanh(logits / options["softcap"])
    right = logits.logsumexp(1)
    picked = logits.gather(1, targets[:, None])[:, 0]
    values, lse = target_logprobs_lse(hidden, head, targets, chunk_tokens=5, **options)
    torch.testing.assert_close(lse, right)
    for ours, naive in (
        (0.1 * lse.square().sum(), 0.1 * right.square().sum()),
        ((values * dy + 0.1 * lse.square()).sum(), ((picked - right) * dy + 0.1 * right.square()).sum()),
    ):
        for one, other in zip(
            torch.autograd.grad(ours, leaves, retain_graph=True),
            torch.autograd.grad(naive, leaves, retain_graph=True),
            strict=True,
        ):
            torch.testing.assert_close(one, other)


def test_the_targets_own_logit_is_not_rounded() -> None:
    """In bf16 log p errs by the rounding of the target's product, which ours makes again in fp32."""
    hidden, head, targets, _, _ = drawn(64, 32, 2000, torch.bfloat16)
    hidden = hidden * 0.3
    truth = naive_target_logprobs(hidden.double(), head.double(), targets)
    plain = (naive_target_logprobs(hidden, head, targets) - truth).square().mean().sqrt()
    ours = (target_logprobs(hidden, head, targets) - truth).square().mean().sqrt()
    assert ours < plain / 2


def test_masked_words_of_the_vocabulary() -> None:
    """A bias of -inf takes words out, also a whole block of them."""
    hidden, head, targets, dy, bias = drawn(13, 6, 42)
    targets, bias[20:] = targets % 20, float("-inf")
    check(hidden.requires_grad_(), head, targets, dy, [hidden], bias=bias, chunk_tokens=5)


@pytest.mark.parametrize("train_head", [False, True], ids=["frozen", "trained"])
def test_opcheck(train_head: bool) -> None:
    hidden, head, targets, _, bias = drawn(13, 6, 42)
    hidden.requires_grad_()
    head.requires_grad_(train_head)
    bias.requires_grad_(train_head)
    arguments = (hidden, head, targets, bias, 0.5, 3.0, 5, not train_head, "torch")
    torch.library.opcheck(torch.ops.gristmill.logprob.default, arguments)
    plain, lse = [tensor.detach() for tensor in (hidden, head)], torch.randn(13)
    if train_head:
        wanted = (*plain, targets, None, 1.0, None, 5, "torch", lse, lse, lse, [True, True, False])
        torch.library.opcheck(torch.ops.gristmill.logprob_backward.default, wanted)
    else:
        scaled = (*plain, targets, 1.0, 3.0, lse, lse, lse)
        torch.library.opcheck(torch.ops.gristmill.logprob_scaled.default, scaled)


@pytest.mark.parametrize("train_head", [False, True], ids=["frozen", "trained"])
def test_compiles_as_one_graph(train_head: bool) -> None:
    hidden, head, targets, dy, _ = drawn(13, 6, 42)
    leaves = [hidden.requires_grad_(), *([head.requires_grad_()] if train_head else [])]

    def loss(hidden: Tensor, head: Tensor) -> Tensor:
        return (target_logprobs(hidden.tanh(), head, targets, chunk_tokens=5) * dy.float()).sum()

    plain = torch.autograd.grad(loss(hidden, head), leaves)
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    for one, other in zip(torch.autograd.grad(compiled(hidden, head), leaves), plain, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("train_head", [False, True], ids=["frozen", "trained"])
def test_second_derivatives_are_refused(train_head: bool) -> None:
    hidden, head, targets, dy, _ = drawn(13, 6, 42)
    hidden.requires_grad_()
    head.requires_grad_(train_head)
    (first,) = torch.autograd.grad(
        target_logprobs(hidden, head, targets) @ dy.float(), hidden, create_graph=True
    )  # fmt: skip
    with pytest.raises(RuntimeError):
        first.square().sum().backward()


def test_a_frozen_head_gets_no_gradient_and_no_work() -> None:
    """One product forward, one for the gradient, none in the backward."""
    hidden, head, targets, _, _ = drawn(13, 6, 42)
    hidden.requires_grad_()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as run:
        target_logprobs(hidden, head, targets).sum().backward()
    assert sum(event.count for event in run.key_averages() if event.key == "aten::mm") == 2
    assert head.grad is None


def test_parts_are_equal_and_large() -> None:
    for tokens in (1, 255, 2048, 2049, 5000, 16384):
        for words, most in ((128_256, 2093), (32_000, 8388)):
            chunk = chunk_of(tokens, words, "cuda")
            parts = -(-tokens // chunk)
            assert chunk <= most + 64 and parts == -(-tokens // most)
            assert tokens - (parts - 1) * chunk > chunk - 64 * parts
    assert chunk_of(1000, 10**6, "cpu") == 256


def test_the_door_says_which_path() -> None:
    assert path_of("cpu", torch.bfloat16) == "torch"
    assert path_of("cuda", torch.float64) == "torch"


Fold = Callable[..., None]


def _shifted(fold: Fold) -> Fold:
    return lambda products, hidden, head, targets, *rest: fold(products, hidden, head, targets.roll(1), *rest)


def _last_words_dropped(fold: Fold) -> Fold:
    def mutant(products: Tensor, hidden: Tensor, head: Tensor, *rest: Any) -> None:
        cut = products[:, :-11].contiguous()
        fold(cut, hidden, head[:-11], *rest)

    return mutant


def _wrong_sign(fold: Fold) -> Fold:
    def mutant(products: Tensor, hidden: Tensor, head: Tensor, *rest: Any) -> None:
        fold(products, hidden, head, *rest)
        products.neg_()

    return mutant


@pytest.mark.parametrize("mutation", [_shifted, _last_words_dropped, _wrong_sign], ids=lambda f: f.__name__)
def test_mutations_are_caught(mutation: Callable[[Fold], Fold], monkeypatch: pytest.MonkeyPatch) -> None:
    """Targets shifted by one, the last words left out of the sum, a gradient of the wrong sign."""
    hidden, head, targets, dy, _ = drawn(13, 6, 42)
    targets %= 31
    check(hidden.requires_grad_(), head, targets, dy, [hidden], chunk_tokens=5)
    monkeypatch.setattr(logprob_chunk, "fold", mutation(logprob_chunk.fold))
    with pytest.raises(AssertionError):
        check(hidden, head, targets, dy, [hidden], chunk_tokens=5)


def test_a_forgotten_maximum_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    hidden, head, targets, dy, _ = drawn(13, 6, 42)
    monkeypatch.setattr(Tensor, "amax", lambda z, **_: torch.zeros_like(z[:, :1]))
    check(hidden.requires_grad_(), head, targets, dy, [hidden], chunk_tokens=5)  # small logits do not show it
    assert not torch.isfinite(target_logprobs(hidden * 1e4, head, targets)).all()


def test_equals_trl(monkeypatch: pytest.MonkeyPatch) -> None:
    """TRL's chunked operation, its file alone: importing all of trl takes ten seconds."""
    found = importlib.util.find_spec("trl")
    file = Path(found.origin or "").parent / "kernels" / "chunked_logprob.py" if found else Path("absent")
    if not file.is_file():
        pytest.skip("no TRL with kernels/chunked_logprob.py")
    utils = ModuleType("oracle.trainer.utils")
    utils.maybe_gather_lm_head_ctx = lambda *_, **__: nullcontext()  # type: ignore[attr-defined]
    for name in ("oracle", "oracle.kernels", "oracle.trainer"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    monkeypatch.setitem(sys.modules, utils.__name__, utils)
    spec = importlib.util.spec_from_file_location("oracle.kernels.chunked_logprob", file)
    assert spec is not None and spec.loader is not None
    chunked = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(chunked)
    hidden, head, targets, dy, bias = drawn(123, 31, 431)
    leaves = [hidden.requires_grad_(), head.requires_grad_()]
    ours = target_logprobs(hidden, head, targets, bias=bias, scale=0.5, softcap=4.0)
    theirs = chunked.ChunkedLogProbFunction.apply(hidden, head, bias, targets, 1.0, 100, 4.0, 0.5, ())[0]
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    for one, other in zip(
        torch.autograd.grad(ours, leaves, dy.float()), torch.autograd.grad(theirs, leaves, dy.float()), strict=True
    ):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
