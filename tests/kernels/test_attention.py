"""Packed attention against one dense mask: values, gradients, windows, grouped heads, and no leak between documents."""

from itertools import pairwise

import pytest
import torch
from torch import Tensor

from gristmill.kernels.attention import naive_packed_attention, packed_attention

LENGTHS = [(17,), (5, 3, 5, 1, 9), (1, 1, 1), (4, 4, 4), (2, 30, 1, 7, 30)]
HEADS = [(4, 4), (4, 2), (6, 1)]


def drawn(lengths: tuple[int, ...], heads: tuple[int, int], depth: int = 8) -> list[Tensor]:
    generator = torch.Generator().manual_seed(3)
    tokens = sum(lengths)
    # transformers hands over transposed views of (1, T, H, D)
    shapes = [(1, tokens, many, depth) for many in (heads[0], heads[1], heads[1])]
    return [torch.randn(shape, generator=generator).transpose(1, 2).requires_grad_() for shape in shapes]


@pytest.mark.parametrize("window", [None, 1, 3, 100], ids=str)
@pytest.mark.parametrize("heads", HEADS, ids=str)
@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
def test_equals_a_dense_mask(lengths: tuple[int, ...], heads: tuple[int, int], window: int | None) -> None:
    q, k, v = drawn(lengths, heads)
    ours = packed_attention(q, k, v, lengths, scale=0.3, window=window)
    naive = naive_packed_attention(q, k, v, lengths, scale=0.3, window=window)
    assert ours.shape == (1, sum(lengths), heads[0], 8)
    torch.testing.assert_close(ours, naive, rtol=1e-5, atol=1e-6)
    dy = torch.randn(ours.shape, generator=torch.Generator().manual_seed(4))
    for one, other in zip(
        torch.autograd.grad(ours, (q, k, v), dy), torch.autograd.grad(naive, (q, k, v), dy), strict=True
    ):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


def test_default_scale() -> None:
    q, k, v = drawn((5, 3), (2, 2))
    torch.testing.assert_close(packed_attention(q, k, v, [5, 3]), naive_packed_attention(q, k, v, [5, 3]))


@pytest.mark.parametrize("window", [None, 2], ids=str)
@pytest.mark.parametrize("lengths", LENGTHS[1:], ids=str)
def test_documents_never_see_each_other(lengths: tuple[int, ...], window: int | None) -> None:
    """The gradient of a document's output with respect to every other document is exactly zero."""
    q, k, v = drawn(lengths, (4, 2))
    edges = [sum(lengths[:index]) for index in range(len(lengths) + 1)]
    for start, stop in pairwise(edges):
        output = packed_attention(q, k, v, lengths, window=window)
        for gradient in torch.autograd.grad(output[:, start:stop].sum(), (q, k, v)):
            assert not gradient[:, :, :start].any() and not gradient[:, :, stop:].any()
        assert torch.autograd.grad(packed_attention(q, k, v, lengths)[:, start:stop].sum(), v)[0][
            :, :, start:stop
        ].any()


def test_nan_stays_in_its_document() -> None:
    q, k, v = drawn((5, 3, 5), (2, 1))
    broken = k.detach().clone()
    broken[:, :, 6] = float("nan")
    output, whole = (packed_attention(q, keys, v, (5, 3, 5)) for keys in (broken, k))
    others = [*range(5), *range(8, 13)]
    assert output[0, 6:8].isnan().all()
    assert torch.equal(output[0, others], whole[0, others])


@pytest.mark.parametrize("window", [None, 4], ids=str)
def test_order_of_documents_does_not_matter(window: int | None) -> None:
    """Bit for bit: scoring packs must not depend on where a row lies."""
    lengths = (5, 30, 5, 9)
    q, k, v = (tensor.detach() for tensor in drawn(lengths, (4, 2)))
    starts = [0, 5, 35, 40]
    order = [2, 3, 0, 1]
    turned = torch.cat([torch.arange(starts[i], starts[i] + lengths[i]) for i in order])
    straight = packed_attention(q, k, v, lengths, window=window)
    other = packed_attention(
        q[:, :, turned], k[:, :, turned], v[:, :, turned], [lengths[i] for i in order], window=window
    )
    assert torch.equal(other, straight[:, turned])


def test_gradcheck() -> None:
    q, k, v = (tensor.detach().double().requires_grad_() for tensor in drawn((3, 1, 3), (2, 1), depth=3))
    assert torch.autograd.gradcheck(lambda *qkv: packed_attention(*qkv, (3, 1, 3), window=2), (q, k, v))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision_errs_no_more_than_plain_torch(dtype: torch.dtype) -> None:
    q, k, v = (tensor.detach().to(dtype) for tensor in drawn((17, 40, 17), (4, 2), depth=16))
    truth = naive_packed_attention(q.double(), k.double(), v.double(), (17, 40, 17))
    plain = (naive_packed_attention(q, k, v, (17, 40, 17)).double() - truth).abs().max()
    assert (packed_attention(q, k, v, (17, 40, 17)).double() - truth).abs().max() <= 2 * plain + 1e-5


def test_lengths_and_shapes_that_do_not_fit_say_so() -> None:
    q, k, v = drawn((5, 3), (4, 2))
    for lengths in ((5, 4), (5, 3, 0), ()):
        with pytest.raises(ValueError, match="sum to the row's 8 tokens"):
            packed_attention(q, k, v, lengths)
    with pytest.raises(ValueError, match="do not fit"):
        packed_attention(q[:, :3], k, v, (5, 3))
    with pytest.raises(ValueError, match="window of 0"):
        packed_attention(q, k, v, (5, 3), window=0)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("window", [None, 3], ids=str)
@pytest.mark.parametrize("heads", HEADS, ids=str)
@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
def test_variable_length_kernel(lengths: tuple[int, ...], heads: tuple[int, int], window: int | None) -> None:
    q, k, v = (t.detach().cuda().bfloat16().requires_grad_() for t in drawn(lengths, heads, depth=64))
    exact = [t.detach().double().requires_grad_() for t in (q, k, v)]
    ours, plain, truth = (
        function(*tensors, lengths, window=window)
        for function, tensors in (
            (packed_attention, (q, k, v)),
            (naive_packed_attention, (q, k, v)),
            (naive_packed_attention, exact),
        )
    )
    dy = torch.randn_like(ours)
    mine = [ours, *torch.autograd.grad(ours, (q, k, v), dy)]
    theirs = [plain, *torch.autograd.grad(plain, (q, k, v), dy)]
    right = [truth, *torch.autograd.grad(truth, exact, dy.double())]
    for one, other, true in zip(mine, theirs, right, strict=True):
        assert (one.double() - true).abs().max() <= 3 * (other.double() - true).abs().max() + 1e-5
