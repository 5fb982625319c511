"""ROUGE-L against the textbook's table, and the index of texts against every pair compared."""

import random

import pytest

from gristmill.curation.text.rouge import Alike, common, pieces, rouge_l


def naive(one: list[str], other: list[str]) -> int:
    table = [[0] * (len(other) + 1) for _ in range(len(one) + 1)]
    for i, left in enumerate(one):
        for j, right in enumerate(other):
            table[i + 1][j + 1] = table[i][j] + 1 if left == right else max(table[i][j + 1], table[i + 1][j])
    return table[-1][-1]


def test_the_longest_common_subsequence_is_the_tables() -> None:
    rng = random.Random(0)
    for _ in range(400):
        one, other = ([rng.choice("abcdefg") for _ in range(rng.randrange(80))] for _ in range(2))
        assert common(one, other) == naive(one, other) == common(other, one)


@pytest.mark.parametrize("limit", [0.3, 0.7, 1.0])
def test_the_index_finds_what_comparing_every_pair_finds(limit: float) -> None:
    rng = random.Random(1)
    words = "write a short story about the sea and why it is blue or list three facts on it".split()  # noqa: SIM905
    texts: list[str] = []
    for _ in range(300):
        if texts and rng.random() < 0.6:  # an earlier one with a few words changed
            said = rng.choice(texts).split()
            for _ in range(rng.randrange(4)):
                said[rng.randrange(len(said))] = rng.choice(words)
        else:
            said = [rng.choice(words) for _ in range(rng.randrange(1, 14))]
        texts.append(" ".join(said))
    seen, alike = Alike(limit), 0
    for place, text in enumerate(texts):
        scores = [rouge_l(text, other) for other in texts[:place]]
        best = max(scores, default=0.0)
        expected = (best, scores.index(best)) if best >= limit else None
        assert seen.nearest(text) == expected
        alike += expected is not None
        seen.add(text)
    assert 30 < alike < 300 and len(seen) == 300


def test_a_score_that_is_just_the_limit_is_found() -> None:
    seen = Alike(0.7, ["a b c d e f g x y z"])
    assert seen.nearest("a b c d e f g p q r") == (0.7, 0) and seen.nearest("a b c d e f o p q r") is None
    assert seen.nearest("g f e d c b a x y z") is None, "the same words in another order are another text"


def test_texts_without_words_and_scripts_without_spaces() -> None:
    seen = Alike(0.5, ["", "?!", "東京の天気は"])
    assert seen.nearest("") is None and seen.nearest("...") is None and rouge_l("", "") == 0.0
    assert pieces("東京 x") == ["東", "京", "x"]
    assert seen.nearest("東京の天気を") == (10 / 12, 2)
