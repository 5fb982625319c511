"""Packed attention against one dense mask: values, gradients, windows, grouped heads, and no leak between documents."""

from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from gristmill.kernels import attention
from gristmill.kernels.attention import naive_packed_attention, packed_attention, path_of

LENGTHS = [(17,), (5, 3, 5, 1, 9), (1, 1, 1), (4, 4, 4), (2, 30, 1, 7, 30)]
HEADS = [(4, 4), (4, 2), (6, 1)]
TREES = [  # lengths and parents of the segments
    ((6, 3, 4), (-1, 0, 0)),
    ((5, 1, 1, 7, 2, 9, 3), (-1, 0, 0, -1, -1, 4, 4)),  # branches of one token; a document alone; a long branch
    ((1, 17, 30, 2, 8, 8, 8, 9), (-1, 0, 0, 0, -1, 4, 4, -1)),  # three branches; two of equal length; padding
    ((3, 4, 5, 2), (-1, -1, 0, 1)),  # branches that do not follow their parent at once
]


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


def compared(lengths, parents, heads, dtype=torch.float32, **options):  # type: ignore[no-untyped-def]
    """Outputs and gradients of packed_attention, and of the dense mask."""
    q, k, v = (tensor.detach().to(dtype).requires_grad_() for tensor in drawn(lengths, heads))
    found = []
    for function in (packed_attention, naive_packed_attention):
        output = function(q, k, v, lengths, parents, **options)
        dy = torch.randn(output.shape, generator=torch.Generator().manual_seed(4)).to(dtype)
        found.append((output, *torch.autograd.grad(output, (q, k, v), dy)))
    return found


@pytest.mark.parametrize("window", [None, 1, 3, 7, 100], ids=str)
@pytest.mark.parametrize("heads", HEADS, ids=str)
@pytest.mark.parametrize(("lengths", "parents"), TREES, ids=str)
def test_trees_equal_a_dense_mask(
    lengths: tuple[int, ...], parents: tuple[int, ...], heads: tuple[int, int], window: int | None
) -> None:
    ours, naive = compared(lengths, parents, heads, torch.float64, window=window)
    for one, other in zip(ours, naive, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("lengths", "parents"), TREES, ids=str)
def test_a_tree_equals_each_branch_after_its_own_copy_of_the_prefix(
    lengths: tuple[int, ...], parents: tuple[int, ...]
) -> None:
    """An oracle that knows no trees: unshared documents, their prefixes' gradients summed."""
    q, k, v = (tensor.detach().double().requires_grad_() for tensor in drawn(lengths, (4, 2)))
    edges = [0, *torch.tensor(lengths).cumsum(0).tolist()]
    output = packed_attention(q, k, v, lengths, parents, window=9)
    rows = []
    for segment, parent in enumerate(parents):
        places = torch.arange(edges[segment], edges[segment + 1])
        if parent >= 0:
            places = torch.cat([torch.arange(edges[parent], edges[parent + 1]), places])
        alone = packed_attention(*(t[:, :, places] for t in (q, k, v)), [len(places)], window=9)
        rows.append(alone[:, -lengths[segment] :])
    unshared = torch.cat(rows, 1)
    torch.testing.assert_close(output, unshared, rtol=1e-12, atol=1e-12)
    dy = torch.randn(output.shape, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    for one, other in zip(
        torch.autograd.grad(output, (q, k, v), dy), torch.autograd.grad(unshared, (q, k, v), dy), strict=True
    ):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("window", [None, 4], ids=str)
def test_branches_never_see_each_other_nor_other_trees(window: int | None) -> None:
    """The gradient of a branch's output with respect to all but its parent and itself is exactly zero."""
    lengths, parents = TREES[1]
    q, k, v = drawn(lengths, (4, 2))
    edges = [0, *torch.tensor(lengths).cumsum(0).tolist()]
    for segment, parent in enumerate(parents):
        allowed = torch.zeros(sum(lengths), dtype=torch.bool)
        for own in (segment, *([parent] if parent >= 0 else [])):
            allowed[edges[own] : edges[own + 1]] = True
        output = packed_attention(q, k, v, lengths, parents, window=window)
        gradients = torch.autograd.grad(output[:, edges[segment] : edges[segment + 1]].sum(), (q, k, v))
        for gradient in gradients:
            assert not gradient[:, :, ~allowed].any()
        assert gradients[2][:, :, edges[segment] : edges[segment + 1]].any()
        if parent >= 0 and window is None:
            assert gradients[2][:, :, edges[parent] : edges[parent + 1]].any()


def test_a_shifted_or_forgotten_mask_would_be_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """Mutations of the branches' mask fail the comparison: a token too few, one too many, a shorter prefix, none."""
    lengths, parents = TREES[1]
    right = attention._mask.__wrapped__

    def differs() -> bool:
        ours, naive = compared(lengths, parents, (4, 2), torch.float64)
        return not all(torch.allclose(one, other, rtol=1e-6, atol=1e-6) for one, other in zip(ours, naive, strict=True))

    assert not differs()
    mutants = [
        lambda batch, *given: right(batch, *given).roll(-1, 3),
        lambda batch, *given: right(batch, *given).roll(1, 3) | right(batch, *given),
        lambda batch, *given: right(replace(batch, before=tuple(max(0, n - 1) for n in batch.before)), *given),
        lambda batch, *given: torch.ones_like(right(batch, *given)),
    ]
    for mutant in mutants:
        monkeypatch.setattr(attention, "_mask", mutant)
        assert differs()


@pytest.mark.parametrize("window", [None, 3], ids=str)
@pytest.mark.parametrize("heads", HEADS, ids=str)
@pytest.mark.parametrize(("lengths", "parents"), [*TREES[:3], ((5, 3, 5, 1, 9), None), ((4, 4), None)], ids=str)
def test_soft_capped_scores(
    lengths: tuple[int, ...], parents: tuple[int, ...] | None, heads: tuple[int, int], window: int | None
) -> None:
    ours, naive = compared(lengths, parents, heads, torch.float64, window=window, softcap=0.7, scale=0.9)
    for one, other in zip(ours, naive, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-11, atol=1e-11)
    uncapped = compared(lengths, parents, heads, torch.float64, window=window, scale=0.9)[0]
    assert (ours[0] - uncapped[0]).abs().max() > 1e-3  # the cap matters here


def test_path_of_says_what_is_taken() -> None:
    q = torch.zeros(1, 2, 3, 4)
    assert path_of(q) == "by_shape"
    assert path_of(q, softcap=30.0) == "scores"
    if torch.cuda.is_available():
        taken = [path_of(torch.zeros(1, 2, 3, size, device="cuda").half()) for size in (64, 60, 264)]
        assert taken == ["variable_length", "by_shape", "by_shape"]


def test_long_packs_are_split_below_the_kernels_int32(monkeypatch: pytest.MonkeyPatch) -> None:
    """FACTS: (queries + 128 segments) · heads · depth to a multiple of 32, from 2^31 on an illegal access."""
    lengths = [4096] * 130
    heads, depth = 32, 128
    calls = attention._calls(lengths, heads, depth)
    assert len(calls) > 1 and calls[0][0] == 0 and calls[-1][1] == len(lengths)
    assert all(stop == start for (_, stop), (start, _) in pairwise(calls))
    assert all((sum(lengths[a:b]) + 128 * (b - a)) * heads * depth < 2**31 for a, b in calls)
    assert (sum(lengths) + 128 * len(lengths)) * heads * depth >= 2**31
    assert attention._calls([4096] * 4, heads, depth) == [(0, 4)]
    assert attention._calls([100, 100], 3, 33) == [(0, 2)] and len(attention._calls([100] * 9, 3, 33, 3 * 64 * 500)) > 4
    with pytest.raises(ValueError, match="exceeds one kernel call"):
        attention._calls([2**31], 1, 32)


@pytest.mark.parametrize("window", [None, 4], ids=str)
@pytest.mark.parametrize("limit", [2**31, 40_000], ids=["one-call", "many-calls"])
@pytest.mark.parametrize(("lengths", "parents"), [*TREES, ((5, 3, 5, 1, 9), (-1,) * 5)], ids=str)
def test_what_the_variable_length_kernel_is_given(
    monkeypatch: pytest.MonkeyPatch, lengths: tuple[int, ...], parents: tuple[int, ...], limit: int, window: int | None
) -> None:
    """The CUDA path with the kernel played by its definition: causal to the bottom right, window tokens to the left."""

    def kernel(q, k, v, at_q, at_k, most_q, most_k, *, scale, window_size, enable_gqa):  # type: ignore[no-untyped-def]
        assert enable_gqa and at_q.dtype == at_k.dtype == torch.int32
        many, outputs = q.shape[1] // k.shape[1], []
        for (a, b), (c, d) in zip(pairwise(at_q.tolist()), pairwise(at_k.tolist()), strict=True):
            assert b - a <= most_q and d - c <= most_k
            last = torch.arange(b - a)[:, None] + (d - c) - (b - a)
            gap = last - torch.arange(d - c)
            seen = (gap >= 0) & ((gap <= window_size[0]) if window_size[0] >= 0 else True)
            scores = torch.einsum("qhd,khd->hqk", q[a:b], k[c:d].repeat_interleave(many, 1)) * scale
            shares = scores.masked_fill(~seen, float("-inf")).softmax(-1)
            outputs.append(torch.einsum("hqk,khd->qhd", shares, v[c:d].repeat_interleave(many, 1)))
        return torch.cat(outputs)

    monkeypatch.setattr(attention, "varlen_attn", kernel)
    monkeypatch.setattr(attention, "path_of", lambda *_: "variable_length")
    monkeypatch.setattr(attention._calls, "__defaults__", (limit,))
    ours, naive = compared(lengths, parents, (4, 2), torch.float64, scale=0.3, window=window)
    for one, other in zip(ours, naive, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-11, atol=1e-11)


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
    tree = ((2, 1, 2, 2), (-1, 0, 0, -1))
    assert torch.autograd.gradcheck(lambda *qkv: packed_attention(*qkv, *tree), (q, k, v))
    assert torch.autograd.gradcheck(lambda *qkv: packed_attention(*qkv, *tree, softcap=1.5, window=2), (q, k, v))


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
    for parents in ((-1,), (-1, 1), (-1, -2), (0, -1)):
        with pytest.raises(ValueError, match="a root before it"):
            packed_attention(q, k, v, (5, 3), parents)
    with pytest.raises(ValueError, match="a root before it"):
        packed_attention(q, k, v, (3, 3, 2), (-1, 0, 1))
    with pytest.raises(ValueError, match="do not fit"):
        packed_attention(q[:, :3], k, v, (5, 3))
    with pytest.raises(ValueError, match="window of 0"):
        packed_attention(q, k, v, (5, 3), window=0)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("window", [None, 3], ids=str)
@pytest.mark.parametrize("heads", HEADS, ids=str)
@pytest.mark.parametrize(
    ("lengths", "parents"), [*((lengths, None) for lengths in LENGTHS), *TREES, ((300, 70, 129), (-1, 0, 0))], ids=str
)
def test_variable_length_kernel(
    lengths: tuple[int, ...], parents: tuple[int, ...] | None, heads: tuple[int, int], window: int | None
) -> None:
    q, k, v = (t.detach().cuda().bfloat16().requires_grad_() for t in drawn(lengths, heads, depth=64))
    exact = [t.detach().double().requires_grad_() for t in (q, k, v)]
    ours, plain, truth = (
        function(*tensors, lengths, parents, window=window)
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
