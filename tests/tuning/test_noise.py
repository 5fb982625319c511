"""Noise on inputs: what it touches, how large it is, and that packing, resuming and repeating do not change it."""

from dataclasses import fields, replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel, Qwen3Config
from transformers.integrations.neftune import neftune_post_forward_hook

from gristmill.curation.folder import HouseError
from gristmill.tuning.attention import isolate
from gristmill.tuning.chat import Tokens
from gristmill.tuning.forward import pack_logps
from gristmill.tuning.noise import mask_token_of, masked_share, masked_thought, neftune
from gristmill.tuning.packing import Pack, build_pack

MASK, VOCABULARY, WIDTH = 60, 61, 32


def documents(lengths: tuple[int, ...] = (9, 40, 17, 25), prompt: int = 3) -> list[Tokens]:
    draw = np.random.default_rng(0)
    return [
        Tokens(draw.integers(0, MASK, length).astype(np.int32), (np.arange(length) >= prompt).astype(np.float32))
        for length in lengths
    ]


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    torch.manual_seed(0)
    config = Qwen3Config(
        hidden_size=WIDTH, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        head_dim=8, vocab_size=VOCABULARY, max_position_embeddings=128,
    )  # fmt: skip
    made: PreTrainedModel = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    isolate(made)
    return made.train()


def split(pack: Pack, values: np.ndarray) -> list[np.ndarray]:
    """`values` of the pack's tokens, document by document, padding left out."""
    ends = np.cumsum(pack.lengths)[: len(pack.documents)]
    return [values[stop - length : stop] for stop, length in zip(ends, pack.lengths, strict=False)]


def noise_of(model: PreTrainedModel, pack: Pack, seed: int, alpha: float) -> torch.Tensor:
    """(T, d) what neftune adds to the embeddings of the pack's tokens."""
    embedding, tokens = model.get_input_embeddings(), torch.from_numpy(pack.tokens)[None]
    clean = embedding(tokens)
    with neftune(model, pack, seed, alpha):
        return (embedding(tokens) - clean)[0].detach()


def test_masked_thought_hides_a_share_of_trained_tokens_alone() -> None:
    examples = documents((400, 700), prompt=100)
    pack = build_pack(examples, [0, 1], pad_to=1200)
    noisy = masked_thought(pack, 7, 0.3, mask_token=MASK)
    changed = np.flatnonzero(noisy.tokens != pack.tokens)
    assert (noisy.tokens[changed] == MASK).all() and set(changed) <= set(pack.targets)
    assert abs(len(changed) / 900 - 0.3) < 0.06
    for field in fields(Pack):  # the targets of the loss, their weights and places stay
        if field.name != "tokens":
            np.testing.assert_array_equal(getattr(noisy, field.name), getattr(pack, field.name))
    assert (noisy.ids == pack.ids).all() and not (pack.tokens == MASK).any()


def test_masked_thought_of_no_share_changes_nothing_and_of_a_vocabulary_draws_from_it() -> None:
    pack = build_pack(documents((2000,)), [0])
    assert (masked_thought(pack, 7, 0.0, mask_token=MASK).tokens == pack.tokens).all()
    replaced = masked_thought(pack, 7, 0.5, vocabulary=10).tokens
    changed = replaced[replaced != pack.tokens]
    assert set(changed) == set(range(10)) and 0.35 < len(changed) / 2000 < 0.5
    for share in (1.0, -0.1, float("nan")):
        with pytest.raises(HouseError, match="masked_thought"):
            masked_thought(pack, 7, share, mask_token=MASK)
    with pytest.raises(ValueError, match="mask token"):
        masked_thought(pack, 7, 0.5)


def test_masked_thought_is_the_same_however_rows_are_packed_and_differs_by_seed_and_row() -> None:
    examples = documents((50, 50, 80))
    examples[1] = examples[0]
    together = masked_thought(build_pack(examples, [2, 0, 1]), 7, 0.4, mask_token=MASK)
    again = masked_thought(build_pack(examples, [2, 0, 1]), 7, 0.4, mask_token=MASK)
    assert (together.tokens == again.tokens).all()
    parts = dict(zip((2, 0, 1), split(together, together.tokens), strict=True))
    for index, part in parts.items():
        alone = masked_thought(build_pack(examples, [index], pad_to=90), 7, 0.4, mask_token=MASK)
        assert (split(alone, alone.tokens)[0] == part).all()
    assert (parts[0] != parts[1]).any()  # equal rows, each with its own draw
    assert (masked_thought(build_pack(examples, [2, 0, 1]), 8, 0.4, mask_token=MASK).tokens != together.tokens).any()


def test_masked_thought_of_answers_that_share_their_prompt_and_beginning() -> None:
    prompt = np.arange(20, dtype=np.int32)
    tails = [np.full(30, 50 + i, np.int32) for i in range(3)]
    weights = (np.arange(50) >= 10).astype(np.float32)  # ten trained tokens are shared
    pack = build_pack([Tokens(np.concatenate([prompt, tail]), weights) for tail in tails], [0, 1, 2], trees=[3])
    noisy = masked_thought(pack, 7, 0.5, mask_token=MASK)
    changed = np.flatnonzero(noisy.tokens != pack.tokens)
    assert set(changed) <= set(pack.targets) and (changed >= 10).all()
    assert {int(place >= 20) + int(place >= 50) + int(place >= 80) for place in changed} == {0, 1, 2, 3}


def test_masked_share_rises_to_its_end_and_stays() -> None:
    shares = [masked_share(step, 100, 0.4) for step in range(100)]
    assert shares == sorted(shares) and shares[0] == pytest.approx(0.4 / 66) and shares[65:] == [0.4] * 35
    assert masked_share(0, 1, 0.4) == masked_share(0, 10, 0.4, warmup=0.0) == 0.4


def test_mask_token_is_the_mask_the_padding_or_the_unknown_token() -> None:
    tokens = {"mask_token_id": 4, "pad_token_id": 0, "unk_token_id": 9}
    assert mask_token_of(SimpleNamespace(**tokens)) == 4  # type: ignore[arg-type]
    assert mask_token_of(SimpleNamespace(**tokens | {"mask_token_id": None})) == 0  # type: ignore[arg-type]
    with pytest.raises(HouseError, match="masked_thought"):
        mask_token_of(SimpleNamespace(**dict.fromkeys(tokens)))  # type: ignore[arg-type]


def test_neftune_of_one_document_is_as_large_as_transformers_makes_it(model: PreTrainedModel) -> None:
    pack = build_pack(documents((40,)), [0])
    noise = noise_of(model, pack, 3, 5.0)
    module = SimpleNamespace(training=True, neftune_noise_alpha=5.0)
    theirs = neftune_post_forward_hook(module, None, torch.zeros(1, 40, WIDTH))[0]
    bound = 5.0 / (40 * WIDTH) ** 0.5
    for found in (noise, theirs):
        assert 0.99 * bound < found.abs().max() <= bound * (1 + 1e-5)
        assert found.std().item() == pytest.approx(bound / 3**0.5, rel=0.05)
        assert abs(found.mean().item()) < 4 * bound / (3 * 40 * WIDTH) ** 0.5


def test_neftune_scales_by_the_document_and_not_by_the_pack(model: PreTrainedModel) -> None:
    """transformers' hook takes the length of the row: a packed document would have a fraction of its noise."""
    examples = documents((10, 90))
    noise = noise_of(model, build_pack(examples, [0, 1], pad_to=128), 3, 5.0)
    assert 0.98 * 5 / (10 * WIDTH) ** 0.5 < noise[:10].abs().max() <= 5 / (10 * WIDTH) ** 0.5 * (1 + 1e-5)
    assert 0.98 * 5 / (90 * WIDTH) ** 0.5 < noise[10:100].abs().max() <= 5 / (90 * WIDTH) ** 0.5 * (1 + 1e-5)
    assert not noise[100:].any()  # padding


def test_neftune_is_the_same_however_rows_are_packed(model: PreTrainedModel) -> None:
    """Log-probabilities under noise, packed and each row alone."""
    examples = documents()
    together = build_pack(examples, [3, 0, 2, 1], pad_to=100)
    with neftune(model, together, 5, 10.0):
        packed, _, owners = pack_logps(model, together)
    clean = pack_logps(model, together)[0]
    assert (packed - clean).abs().max() > 1e-2
    for place, index in enumerate((3, 0, 2, 1)):
        alone = build_pack(examples, [index])
        with neftune(model, alone, 5, 10.0):
            torch.testing.assert_close(pack_logps(model, alone)[0], packed[owners == place], rtol=1e-4, atol=1e-5)


def test_neftune_repeats_with_its_seed_and_ends_with_its_block(model: PreTrainedModel) -> None:
    pack = build_pack(documents(), [0, 1, 2, 3])
    first = noise_of(model, pack, 3, 5.0)
    torch.manual_seed(99)  # nor does it touch or read the generator of dropout
    state = torch.get_rng_state()
    assert torch.equal(noise_of(model, pack, 3, 5.0), first) and torch.equal(torch.get_rng_state(), state)
    assert not torch.equal(noise_of(model, pack, 4, 5.0), first)
    clean = pack_logps(model, pack)[0]
    with neftune(model, pack, 3, 5.0):
        noisy = pack_logps(model, pack)[0]
        model.train(False)
        assert torch.equal(pack_logps(model, pack)[0], clean)  # evaluation is without noise
        model.train()
        assert torch.equal(pack_logps(model, pack)[0], noisy)  # a forward run again
    assert torch.equal(pack_logps(model, pack)[0], clean) and not torch.equal(noisy, clean)
    with pytest.raises(HouseError, match="neftune_alpha"), neftune(model, pack, 3, 0.0):
        pass
    longer = replace(pack, tokens=np.concatenate([pack.tokens, pack.tokens]))
    with pytest.raises(ValueError, match="embeddings of a pack"), neftune(model, pack, 3, 5.0):
        model.get_input_embeddings()(torch.from_numpy(longer.tokens)[None])


def test_neftune_of_answers_that_share_their_prompt(model: PreTrainedModel) -> None:
    prompt, weights = np.arange(20, dtype=np.int32), (np.arange(50) >= 20).astype(np.float32)
    answers = [Tokens(np.concatenate([prompt, np.full(30, 50 + i, np.int32)]), weights) for i in range(2)]
    noise = noise_of(model, build_pack(answers, [0, 1], pad_to=90, trees=[2]), 3, 5.0)
    for part, tokens in ((noise[:20], 20), (noise[20:50], 50), (noise[50:80], 50)):
        bound = 5 / (tokens * WIDTH) ** 0.5
        assert 0.97 * bound < part.abs().max() <= bound * (1 + 1e-5)
    assert not torch.equal(noise[20:50], noise[50:80]) and not noise[80:].any()
