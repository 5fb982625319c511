"""Language: identified on real sentences and instruction rows; code, short and empty texts are never dropped for it."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from gristmill.curation.cache import measure_key
from gristmill.curation.folder import HouseError
from gristmill.curation.judges.language import LanguageIs
from gristmill.curation.measures.language import LABELS, Language, prose
from gristmill.curation.rows import table

pytest.importorskip("fasttext")
Make = Callable[..., dict[str, Any]]

GERMAN = "Der schnelle braune Fuchs springt über den faulen Hund und läuft dann in den Wald."
FRENCH = "Le vif renard brun saute par-dessus le chien paresseux, puis il court dans la forêt."
CODE = "def add(a, b):\n    return a + b\n\nprint(add(1, 2))\nfor i in range(10):\n    print(i)\n"


def measured(rows: list[dict[str, Any]], measure: Language | None = None) -> pa.Table:
    return (measure or Language()).measure(table(rows), None, lambda done, total: None)  # type: ignore[arg-type]


def documents(make_row: Make, texts: list[str]) -> list[dict[str, Any]]:
    return [make_row("a", n, "", None, messages=None, text=text) for n, text in enumerate(texts)]


def judged(judge: LanguageIs, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    (measure,) = judge.needs
    assert isinstance(measure, Language)
    found: list[dict[str, Any]] = judge.judge(table(rows), measured(rows, measure)).to_pylist()
    return found


def test_tells_languages_apart_and_says_nothing_of_what_is_no_language(make_row: Make) -> None:
    texts = [GERMAN, FRENCH, "今日はとても良い天気ですね。", "Привет, как твои дела сегодня?"]
    texts += ["", "42", "OK", CODE, f"```python\n{CODE}```", "https://example.com/ein/langer/Pfad", "x = y + 2 * z"]
    found = measured(documents(make_row, texts))
    assert found["language"].to_pylist() == ["de", "fr", "ja", "ru", *[None] * 7]
    probs = found["language_prob"].to_pylist()
    assert all(0.8 < prob <= 1 for prob in probs[:4]) and probs[4:] == [None] * 7


def test_code_around_prose_does_not_count(make_row: Make) -> None:
    rows = documents(make_row, [f"{GERMAN}\n\n```python\n{CODE * 20}```\n\n`print` https://example.com/the/path"])
    assert measured(rows).to_pylist() == measured(documents(make_row, [GERMAN])).to_pylist()


def test_looks_at_both_ends_of_a_long_text() -> None:
    text = "a" * 200 + "m" * 500 + "z" * 200
    assert prose(pa.array([text, "b" * 300], pa.large_string()), 300).to_pylist() == [
        "a" * 150 + " " + "z" * 150,
        "b" * 300,
    ]


def test_drops_other_languages_and_by_wish_the_unsure(make_row: Make) -> None:
    mixed = "Translate: the cat sleeps on the sofa today. Die Katze schläft auf dem Sofa."
    texts = [GERMAN, FRENCH, "The quick brown fox jumps over the lazy dog and then runs away.", CODE, "", mixed]
    rows = documents(make_row, texts)
    prob = measured(rows)["language_prob"].to_pylist()
    assert prob[5] < 0.9
    found = judged(LanguageIs(("en", "fr"), min_prob=0.9), rows)
    assert [row["reason"] for row in found] == ["other_language", *[None] * 5]
    assert [row["score"] for row in found] == [prob[0], *[None] * 5]
    assert found[0]["evidence"] == f'{{"language": "de", "prob": {round(prob[0], 4)}}}'
    found = judged(LanguageIs(("en", "fr"), min_prob=0.9, unsure="drop"), rows)
    assert [row["reason"] for row in found][3:] == [None, None, "unsure_language"]
    assert all(row["keep"] for row in judged(LanguageIs(("de", "fr", "en"), min_prob=0), rows))


def test_refuses_unknown_languages_and_missing_models(tmp_path: Path) -> None:
    assert len(LABELS) == 176
    for wrong in ((), ("eng",), ("nb",), ("English",)):
        with pytest.raises(HouseError):
            LanguageIs(wrong)
    with pytest.raises(HouseError, match="cannot read"):
        Language(file=str(tmp_path / "none.bin")).inputs()
    (tmp_path / "no.bin").write_bytes(b"not a model")
    with pytest.raises(HouseError, match="no fastText model"):
        measured([], Language(file=str(tmp_path / "no.bin")))


def test_values_are_keyed_by_the_model_file(tmp_path: Path) -> None:
    file = tmp_path / "model.bin"
    measure = Language(file=str(file))
    file.write_bytes(b"one")
    first = measure_key(measure, None)  # type: ignore[arg-type]
    assert measure_key(measure, None) == first  # type: ignore[arg-type]
    file.write_bytes(b"another")
    assert measure_key(measure, None) != first  # type: ignore[arg-type]


def test_real_sentences_and_instruction_rows(data: Path, make_row: Make) -> None:
    sentences = pq.read_table(data / "lingua_sentences.parquet")
    drawn = sentences.take(np.random.default_rng(0).choice(sentences.num_rows, 4000, replace=False))
    truth = np.array(drawn["lang"].to_pylist())
    truth[truth == "nb"] = "no"
    known = np.isin(truth, sorted(LABELS))
    found = np.array(measured(documents(make_row, drawn["text"].to_pylist()))["language"].to_pylist(), dtype=object)
    assert (found == truth)[known].mean() > 0.87
    alpaca = pq.read_table(data / "alpaca_raw_random5000.parquet").slice(0, 2000).to_pylist()
    rows = [
        make_row("a", n, f"{row['instruction']}\n\n{row['input']}".strip(), row["output"])
        for n, row in enumerate(alpaca)
    ]
    found = np.array(measured(rows)["language"].to_pylist(), dtype=object)
    assert (found == "en").mean() > 0.985 and (found == None).mean() < 0.01  # noqa: E711
    dropped = [row for row, verdict in zip(alpaca, judged(LanguageIs(), rows), strict=True) if not verdict["keep"]]
    assert len(dropped) < 10  # translations, and lists of foreign names
    codes = pq.read_table(data / "codealpaca_2k.parquet").slice(0, 1000).to_pylist()
    rows = [make_row("a", n, row["instruction"], row["output"]) for n, row in enumerate(codes)]
    assert sum(not row["keep"] for row in judged(LanguageIs(view="response"), rows)) <= 5
    assert all(row["keep"] for row in judged(LanguageIs(), rows))
