"""Packed answers that share their prompt against the same documents unshared and alone, by a plain computation in fp64:
log-probabilities, losses of every kind and their gradients; and the traps of packing and masking, each by name."""

from dataclasses import replace
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from gristmill.tuning.attention import isolate
from gristmill.tuning.chat import Tokens
from gristmill.tuning.forward import answer_logps, pack_logps
from gristmill.tuning.packing import build_pack, pack_plan, shared_tokens, tree_size, tree_square
from gristmill.tuning.units import Units

VOCAB = 61
NOTHING = pa.table({"row_id": pa.array([], pa.string())})


def tiny(kind: str = "starcoder2", dtype: torch.dtype = torch.float64, **more: Any) -> PreTrainedModel:
    """starcoder2: a decoder of today (rotary positions, grouped queries, windows) whose norms compute in fp64."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        kind,
        **{
            "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
            "num_key_value_heads": 2, "vocab_size": VOCAB, "max_position_embeddings": 64, "sliding_window": None,
            "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
        } | more,
    )  # fmt: skip
    model: Any = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").eval()  # eager rounds to fp32
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.mul_(6)
    ready: PreTrainedModel = model.to(dtype)
    return ready


def document(ids: list[int], weights: list[float]) -> Tokens:
    return Tokens(np.asarray(ids, np.int32), np.asarray(weights, np.float32))


def tree(draw: np.random.Generator, prompt: int, common: int, own: list[int], weight: Any = None) -> list[Tokens]:
    """Documents of one prompt whose answers begin with `common` equal tokens, then `own` of their own."""
    shared = draw.integers(3, VOCAB, prompt + common)
    documents = []
    for place, length in enumerate(own):
        ids = np.concatenate([shared, [3 + place], draw.integers(3, VOCAB, length - 1)]).astype(np.int32)
        weights = np.ones(len(ids)) if weight is None else weight(draw, len(ids))
        weights[:prompt] = 0.0
        documents.append(Tokens(ids, weights.astype(np.float32)))
    return documents


def units_of(trees: list[list[Tokens]], *, shared: bool = True) -> Units:
    return Units(
        row_ids=[f"r{i}" for i in range(len(trees))],
        documents=[one for own in trees for one in own],
        first=np.cumsum([0, *(len(own) for own in trees)]),
        excluded=NOTHING,
        truncated=NOTHING,
        shared=shared,
    )


def spans(draw: np.random.Generator, length: int) -> np.ndarray:
    """Weights of spans: other ones in each answer, some 0, some negative (Mask-DPO, Step-DPO, unlikelihood)."""
    weights: np.ndarray = draw.choice([0.0, 0.25, 1.0, 2.0, -0.5], length)
    weights[-1] = 1.0
    return weights


def cases() -> dict[str, list[list[Tokens]]]:
    draw = np.random.default_rng(0)
    return {
        "sft": [tree(draw, p, 0, [a]) for p, a in [(3, 4), (1, 1), (7, 2), (2, 9)]],
        "pairs": [tree(draw, p, 0, [a, b]) for p, a, b in [(5, 3, 4), (2, 6, 1), (9, 1, 1)]],
        "pairs with a common answer prefix": [tree(draw, 4, 3, [2, 5]), tree(draw, 1, 6, [1, 1])],
        "pairs with spans": [tree(draw, 4, 3, [4, 5], spans), tree(draw, 3, 5, [1, 2], spans)],
        "answers of one token": [tree(draw, 3, 0, [1, 1]), tree(draw, 1, 0, [1, 4])],
        "one answer a prefix of the other": [
            [document([5, 6, 7, 8], [0, 0, 1, 1]), document([5, 6, 7, 8, 9], [0, 0, 1, 1, 1])],
            [document([5, 9], [0, 1]), document([5, 9, 9, 2], [0, 1, 1, 1])],
        ],
        "nothing in common": [[document([5, 6, 7], [0, 1, 1]), document([8, 6, 7], [0, 1, 1])]],
        "lists": [tree(draw, 4, 1, [3, 1, 5]), tree(draw, 6, 0, [2, 2, 2, 2]), tree(draw, 2, 2, [1, 7], spans)],
    }


CASES = cases()


def alone(model: PreTrainedModel, one: Tokens) -> tuple[Tensor, Tensor]:
    """Log-probabilities and weights of the targets of one document by the model's own attention, whole logits."""
    ids = torch.from_numpy(one.ids.astype(np.int64))
    logps = model(ids[None], use_cache=False).logits[0, :-1].log_softmax(-1).gather(1, ids[1:, None])[:, 0]
    weights = torch.from_numpy(one.weights[1:])
    return logps[weights != 0], weights[weights != 0]


def gradients(model: PreTrainedModel, loss: Tensor) -> dict[str, Tensor]:
    named = dict(model.named_parameters())
    return dict(zip(named, torch.autograd.grad(loss, list(named.values()), retain_graph=True), strict=True))


def assert_close(ours: Tensor, theirs: Tensor, what: str, relative: float = 1e-10) -> None:
    bound = relative * max(1.0, float(theirs.detach().abs().max()))
    assert float((ours - theirs).detach().abs().max()) <= bound, what


def family_losses(sums: Tensor, tokens: Tensor, owners: Tensor, logps: Tensor, weights: Tensor) -> dict[str, Tensor]:
    """One loss of each kind, of (D,) sums by answer and of entries: what they mean is tested elsewhere."""
    return {
        "tokens": -(logps * weights).sum(),
        "means": -(sums / tokens).sum(),
        "unpaired": torch.sigmoid(0.1 * sums + 0.3).sum(),
        "pairs": -F.logsigmoid(0.3 * (sums[0::2] - sums[1::2])).sum() if len(sums) % 2 == 0 else sums.sum(),
        "dynamic": ((-logps).exp().clamp(max=3.0) * weights * (owners + 1)).sum(),
    }


def by_owner(values: Tensor, owners: Tensor, count: int) -> Tensor:
    return torch.zeros(count, dtype=values.dtype).index_add(0, owners, values)


@pytest.mark.parametrize("window", [None, 4], ids=["full", "window-4"])
@pytest.mark.parametrize("name", CASES)
def test_packed_equals_unpacked_and_unshared_in_fp64(name: str, window: int | None) -> None:
    model, naive = tiny(sliding_window=window), tiny(sliding_window=window)
    isolate(model)
    trees = CASES[name]
    documents = [one for own in trees for one in own]
    scored = [alone(naive, one) for one in documents]
    whole = torch.cat([logps for logps, _ in scored])
    weight = torch.cat([weights for _, weights in scored])
    owner = torch.arange(len(documents)).repeat_interleave(torch.tensor([len(logps) for logps, _ in scored]))
    order = np.arange(len(trees))
    tokens = by_owner(weight, owner, len(documents))
    theirs = family_losses(by_owner(whole * weight, owner, len(documents)), tokens, owner, whole, weight)
    right = {kind: gradients(naive, loss) for kind, loss in theirs.items()}
    for shared in (True, False):
        units = units_of(trees, shared=shared)
        for pad_to in (None, int(units.lengths.sum()) + 5):
            pack = units.pack(order, pad_to)
            logps, weights, owners = pack_logps(model, pack)
            assert pack.size == units.lengths.sum()
            assert torch.equal(owners, owner) and torch.equal(weights, weight)
            assert_close(logps, whole, "log-probabilities")
        ours = family_losses(by_owner(logps * weights, owners, len(documents)), tokens, owners, logps, weights)
        for kind in ours if shared else ("pairs",):
            assert_close(ours[kind], theirs[kind], kind)
            found = gradients(model, ours[kind])
            assert len(found) > 20
            for parameter, gradient in found.items():
                assert_close(gradient, right[kind][parameter], f"{kind} {parameter}")


def test_packed_equals_unpacked_by_the_house_rule_in_fp32() -> None:
    """The error against fp64 is at most twice that of the unshared computation in fp32, and its gradients' too."""
    trees = CASES["pairs with spans"] + CASES["lists"] + CASES["pairs with a common answer prefix"]
    documents = [one for own in trees for one in own]
    pack = units_of(trees).pack(np.arange(len(trees)))
    found = []
    for kind, dtype in (("packed", torch.float32), ("alone", torch.float32), ("alone", torch.float64)):
        model = tiny("qwen3", dtype, head_dim=8)
        if kind == "packed":
            isolate(model)
            logps, weights, _ = pack_logps(model, pack)
        else:
            scored = [alone(model, one) for one in documents]
            logps, weights = (torch.cat(values) for values in zip(*scored, strict=True))
        found.append([logps, *gradients(model, (logps * weights).sum()).values()])
    for ours, plain, truth in zip(*found, strict=True):
        scale = float(truth.detach().abs().max())
        error, usual = (float((values.double() - truth).detach().abs().max()) for values in (ours, plain))
        assert error <= 3 * usual + 1e-6 * max(1.0, scale)


def test_what_a_pack_of_trees_holds() -> None:
    """A pair whose answers share a token that only one of them trains, and a document alone."""
    chosen = document([10, 11, 20, 21, 30], [0, 0, 0.5, 0, 1])
    rejected = document([10, 11, 20, 21, 40, 41], [0, 0, 2.0, 1, 1, 0])
    single = document([12, 22], [1, 1])
    pack = build_pack([chosen, rejected, single], [2, 0, 1], pad_to=12, trees=[1, 2])
    assert pack.tokens.tolist() == [12, 22, 10, 11, 20, 21, 30, 40, 41, 0, 0, 0]
    assert pack.positions.tolist() == [0, 1, 0, 1, 2, 3, 4, 4, 5, 0, 1, 2]
    assert pack.lengths.tolist() == [2, 4, 1, 2, 3]
    assert pack.parents.tolist() == [-1, -1, 1, 1, -1]
    assert pack.targets.tolist() == [1, 4, 5, 6, 7]
    assert pack.sources.tolist() == [0, 3, 4, 5, 5]  # both first own tokens follow the last shared one
    assert pack.ids.tolist() == [22, 20, 21, 30, 40]
    assert pack.entries.tolist() == [0, 1, 3, 1, 2, 4]
    assert pack.owners.tolist() == [0, 1, 1, 2, 2, 2]
    assert pack.weights.tolist() == [1, 0.5, 1, 2, 1, 1]
    assert (pack.documents.tolist(), pack.size) == ([2, 0, 1], 9)
    with pytest.raises(ValueError, match="trees of 2 documents do not fit 3"):
        build_pack([chosen, rejected, single], [2, 0, 1], trees=[2])


def test_answer_logps_are_the_weighted_sums_of_documents() -> None:
    model = tiny()
    isolate(model)
    trees = CASES["pairs with spans"]
    ours = answer_logps(model, units_of(trees).pack(np.arange(2), 64))
    naive = tiny()
    theirs = [(logps * weights).sum() for own in trees for logps, weights in (alone(naive, one) for one in own)]
    assert_close(ours, torch.stack(theirs), "sums")


def test_a_mutated_pack_would_be_seen() -> None:
    """Shifted sources, a forgotten parent, positions that start anew, wrong entries: each changes values."""
    model = tiny()
    isolate(model)
    pack = units_of(CASES["pairs with a common answer prefix"]).pack(np.arange(2))
    logps, _, _ = pack_logps(model, pack)
    branch = pack.parents[np.repeat(np.arange(len(pack.lengths)), pack.lengths)] >= 0
    own = np.concatenate([np.arange(length) for length in pack.lengths])
    mutants = {
        "sources": replace(pack, sources=np.where(pack.sources == pack.targets - 1, pack.sources, pack.targets - 1)),
        "parents": replace(pack, parents=np.full_like(pack.parents, -1)),
        "positions": replace(pack, positions=np.where(branch, own, pack.positions)),
        "entries": replace(pack, entries=np.roll(pack.entries, 1)),
    }
    for what, mutant in mutants.items():
        assert float((pack_logps(model, mutant)[0] - logps).detach().abs().max()) > 1e-3, what


@settings(max_examples=30, deadline=None)
@given(st.data())
def test_sizes_say_what_packs_hold(data: st.DataObject) -> None:
    width = data.draw(st.integers(1, 4))
    ids = data.draw(st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=7), min_size=width, max_size=width))
    documents = [document(one, [1.0] * len(one)) for one in ids]
    shared = shared_tokens(documents)
    assert all(one[:shared] == ids[0][:shared] for one in ids)
    longer = all(len(one) > shared + 1 and one[: shared + 1] == ids[0][: shared + 1] for one in ids)
    assert width == 1 or not longer
    assert width == 1 or all(len(one) > shared for one in ids)
    lengths = [len(one) for one in ids]
    pack = build_pack(documents, range(width), trees=[width])
    assert pack.size == tree_size(lengths, shared) == units_of([documents]).lengths[0]
    before = [0 if parent < 0 else int(pack.lengths[parent]) for parent in pack.parents]
    costs = [(own + first) ** 2 - first**2 for own, first in zip(pack.lengths.tolist(), before, strict=True)]
    assert sum(costs) == tree_square(lengths, shared) == units_of([documents]).squares[0]
    unfolded = build_pack(documents, range(width))
    assert len(pack.entries) == len(unfolded.entries) == len(unfolded.targets)
    assert pack.ids[pack.entries].tolist() == unfolded.ids.tolist()
    assert pack.tokens[pack.sources][pack.entries].tolist() == unfolded.tokens[unfolded.sources].tolist()
    assert pack.positions[pack.targets][pack.entries].tolist() == unfolded.positions[unfolded.targets].tolist()


# The traps that others' users have hit


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 40), st.integers(0, 10_000))
def test_trap_no_token_is_lost_at_any_capacity(capacity: int, seed: int) -> None:
    """trl 6669 (tokens lost at batch edges), 3887 (nothing packed unless a power of two): the multiset of tokens of all
    packs is that of all documents, what is shared once."""
    draw = np.random.default_rng(seed)
    trees = []
    for _ in range(draw.integers(1, 30)):
        own = tree(
            draw, int(draw.integers(1, 9)), int(draw.integers(0, 4)), draw.integers(1, 6, draw.integers(1, 4)).tolist()
        )
        if units_of([own]).lengths[0] <= capacity:
            trees.append(own)
    units = units_of(trees)
    plan = pack_plan(units.lengths, capacity)
    packs = [units.pack(pack, capacity) for pack in plan]
    assert all(len(pack.tokens) == capacity for pack in packs)
    held = np.concatenate([np.zeros(0, np.int64), *(pack.tokens[: pack.size] for pack in packs)])
    wanted = [own[0].ids[: shared_tokens(own)] for own in trees] + [
        one.ids[shared_tokens(own) :] for own in trees for one in own
    ]
    assert sorted(held.tolist()) == sorted(np.concatenate([np.zeros(0, np.int64), *wanted]).tolist())
    assert sum(len(pack.entries) for pack in packs) == int(units.targets.sum())


def test_trap_documents_do_not_contaminate_each_other() -> None:
    """trl 3067, 1230, LLaMA-Factory 4224: a changed document leaves what its neighbours give and their gradients as it
    was, bit for bit; so does a changed answer its sibling."""
    trees = CASES["pairs"] + [CASES["sft"][3]]
    found = []
    for change in (None, 0, 3):
        documents = [one for own in trees for one in own]
        if change is not None:
            ids = documents[change].ids.copy()
            ids[-1] = (ids[-1] + 1 - 3) % (VOCAB - 3) + 3
            documents[change] = Tokens(ids, documents[change].weights)
        units = units_of([documents[0:2], documents[2:4], documents[4:6], documents[6:7]])
        model = tiny(dtype=torch.float32)
        isolate(model)
        seen: list[Tensor] = []
        model.get_input_embeddings().register_forward_hook(lambda _m, _i, output, seen=seen: seen.append(output))
        pack = units.pack(np.arange(4), 64)
        logps, _, owners = pack_logps(model, pack)
        (gradient,) = torch.autograd.grad(logps[owners == 6].sum(), seen)
        found.append((logps.detach(), owners, gradient[0]))
    for change, (logps, owners, gradient) in zip((0, 3), found[1:], strict=True):
        others = owners != change
        assert torch.equal(logps[others], found[0][0][others])
        assert not torch.equal(logps[~others], found[0][0][~others])
        assert torch.equal(gradient, found[0][2])
    start = int(np.cumsum(pack.lengths)[-3])
    assert not gradient[:start].any() and gradient[start : pack.size].any() and not gradient[pack.size :].any()


def test_trap_gradient_of_an_answer_with_respect_to_its_sibling_is_zero() -> None:
    model = tiny(dtype=torch.float32)
    isolate(model)
    seen: list[Tensor] = []
    model.get_input_embeddings().register_forward_hook(lambda _m, _i, output: seen.append(output))
    pack = units_of([CASES["pairs"][0]]).pack(np.arange(1))
    logps, _, owners = pack_logps(model, pack)
    first, second = (
        slice(int(stop - n), int(stop)) for n, stop in zip(pack.lengths[1:], np.cumsum(pack.lengths)[1:], strict=True)
    )
    for answer, own, sibling in ((0, first, second), (1, second, first)):
        (gradient,) = torch.autograd.grad(logps[owners == answer].sum(), seen, retain_graph=True)
        assert not gradient[0, sibling].any() and gradient[0, : pack.lengths[0]].any()
        assert gradient[0, own].any() or own.stop - own.start == 1


def test_trap_padding_changes_nothing() -> None:
    """unsloth, trl: pad tokens are no targets and no document's context."""
    model = tiny()
    isolate(model)
    units = units_of(CASES["pairs"])
    bare = pack_logps(model, units.pack(np.arange(3)))[0]
    for capacity in (40, 50, 64):
        pack = units.pack(np.arange(3), capacity)
        assert pack.targets.max() < pack.size
        assert_close(pack_logps(model, pack)[0], bare, str(capacity))
