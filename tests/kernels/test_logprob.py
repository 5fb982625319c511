"""Chunked target log-probabilities against log_softmax over the whole matrix: values and every gradient."""

import pytest
import torch
from torch import Tensor

from gristmill.kernels.logprob import naive_target_logprobs, target_logprobs

CASES = [(1, 6, 42), (13, 6, 42), (123, 31, 431), (64, 16, 50)]


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
    ours = target_logprobs(hidden, head, targets, bias=added, chunk_tokens=chunk)
    naive = naive_target_logprobs(hidden, head, targets, bias=added)
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
    hidden.requires_grad_()
    largest = 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            nonlocal largest
            result = function(*args, **(kwargs or {}))
            largest = max(
                [largest, *(t.numel() for t in torch.utils._pytree.tree_leaves(result) if torch.is_tensor(t))]
            )
            return result

    with Watch():
        target_logprobs(hidden, head.requires_grad_(), targets, chunk_tokens=32).sum().backward()
    assert largest == 32 * 1000


def test_shapes_that_do_not_fit_say_so() -> None:
    hidden, head, targets, _, _ = drawn(13, 6, 42)
    with pytest.raises(ValueError, match="do not fit"):
        target_logprobs(hidden[:, :5], head, targets)
    with pytest.raises(ValueError, match="chunk_tokens"):
        target_logprobs(hidden, head, targets, chunk_tokens=0)
