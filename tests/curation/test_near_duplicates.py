"""Near duplicates against plain Python: words, shingle sets, Jaccard of every pair, and the rule of survival."""

import json
import random
import tempfile
import unicodedata
from collections.abc import Iterator, Sequence
from itertools import combinations, pairwise
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from gristmill.curation.duplicates.minhash import RECALL, banding, jaccards, near_pairs, near_pairs_between
from gristmill.curation.duplicates.shingles import SPACELESS, Shingles, shingle_sets
from gristmill.curation.folder import HouseError
from gristmill.curation.judges.duplicates import NearDuplicate
from gristmill.curation.rows import message, table
from gristmill.curation.text.view import WORD, View, view, words

np = pytest.importorskip("numpy")
pytest.importorskip("numba")

Row = dict[str, Any]
HOME = tempfile.TemporaryDirectory()
VOCABULARY = [a + b for a in "ba ce di fo gu ha je ki lo mu".split() for b in "n r s t l ck mp st x y".split()]  # noqa: SIM905


class Parts:
    """A corpus of tables in memory."""

    seed, tools = 0, None

    def __init__(self, rows: Sequence[Row], parts: int = 1, held: Sequence[Row] = (), values: Any = None) -> None:
        self.rows, self.measured = len(rows), values
        self.scratch = self.kept = Path(tempfile.mkdtemp(dir=HOME.name))
        size = max(1, -(-len(rows) // parts))
        self.parts = [table(rows[low : low + size]) for low in range(0, len(rows), size)]
        self.held = table(held)
        self.done = 0

    def progress(self, done: int, total: int) -> None:
        assert self.done <= done <= total
        self.done = done

    def tables(self, columns: Sequence[str] | None = None) -> Iterator[pa.Table]:
        for part in self.parts:
            yield part if columns is None else part.select(list(columns))

    def held_out(self, columns: Sequence[str] | None = None) -> Iterator[pa.Table]:
        if self.held.num_rows:
            yield self.held if columns is None else self.held.select(list(columns))

    def values(self, columns: Sequence[str]) -> pa.Table:
        found: pa.Table = self.measured.select(list(columns))
        return found


def row(position: int, prompt: str | None, answer: str | None, source: str = "a", **more: Any) -> Row:
    turns = [message("user", prompt), message("assistant", answer)]
    return {"row_id": f"{source}{position}", "content_id": "c", "source": source, "position": position,
            "messages": turns} | more  # fmt: skip


def said(*texts: str) -> list[Row]:
    return [row(i, None, text) for i, text in enumerate(texts)]


def plain_words(text: str) -> list[str]:
    """The definition in shingles.py: fold each code point by itself, cut at what is not a letter, digit or _, and split
    letters of scripts without spaces."""
    folded = "".join(unicodedata.normalize("NFKC", letter).casefold() for letter in text)
    spaced = "".join(f" {x} " if any(a <= ord(x) <= b for a, b in SPACELESS) else x for x in folded)
    found: list[str] = WORD.findall(spaced)
    return found


def plain_set(text: str, ngram: int) -> set[tuple[str, ...]]:
    said = plain_words(text)
    if len(said) < ngram:
        return {tuple(said)} if said else set()
    return {tuple(said[i : i + ngram]) for i in range(len(said) - ngram + 1)}


def plain_jaccard(a: set[Any], b: set[Any]) -> float:
    return len(a & b) / len(a | b) if a | b else 0.0


def edited(text: str, share: float, rng: random.Random) -> str:
    return " ".join(rng.choice(VOCABULARY) if rng.random() < share else word for word in text.split())


def corpus_rows(count: int, seed: int) -> list[Row]:
    """`count` random rows, then as many edited ones, by a share of 0 to 8 % of their words."""
    rng = random.Random(seed)
    texts = [" ".join(rng.choices(VOCABULARY, k=rng.randint(3, 60))) for _ in range(count)]
    texts += [edited(text, rng.choice([0, 0.02, 0.04, 0.08]), rng) for text in texts]
    return [row(i, text[: len(text) // 3], text[len(text) // 3 :]) for i, text in enumerate(texts)]


def sets_of(rows: Sequence[Row], ngram: int = 5, which: View = "pair", threads: int = 0) -> Shingles:
    return shingle_sets(table(rows), which, ngram, threads=threads)


def verdicts(rows: Sequence[Row], parts: int = 1, **fields: Any) -> list[Row]:
    found: list[Row] = NearDuplicate(**fields).judge(Parts(rows, parts)).to_pylist()
    return found


def kept(rows: Sequence[Row], **fields: Any) -> list[str]:
    return [r["row_id"] for r, v in zip(rows, verdicts(rows, **fields), strict=True) if v["keep"]]


def pairs_of(shingles: Shingles, floor: float = 0.7) -> dict[tuple[int, int], float]:
    """Pairs of units (of equal ones: the first with the others)."""
    found = near_pairs(shingles, floor, *banding(floor))
    units: dict[int, list[int]] = {}
    for unit, group in enumerate(found.group.tolist()):
        units.setdefault(group, []).append(unit)
    units.pop(-1, None)
    near = {(same[0], other): 1.0 for same in units.values() for other in same[1:]}
    ends = zip(found.left.tolist(), found.right.tolist(), found.similarity.tolist(), strict=True)
    return near | {(min(units[a][0], units[b][0]), max(units[a][0], units[b][0])): s for a, b, s in ends}


# ---------------------------------------------------------------- words and shingles


@settings(max_examples=150, deadline=None)
@given(st.lists(st.text(max_size=40), min_size=1, max_size=8))
@example(["Straße ﬁn İstanbul", "½ ㈱ ㌖ ﷺ", "中文字 a中b カナ ภาษาไทย", "_x_1 ΣΑΣ Жук"])
@example(["\U0001f600 𝐀𝐛 𐐀", "x\u0301 \xa0\u2028 ²", "a" * 70, "ⅷ", "𠀀𠀁", "ǆ", "\U000e0041"])
def test_words_and_sets_are_those_of_plain_python(texts: list[str]) -> None:
    clean = [text.encode("utf-8", "ignore").decode() for text in texts]
    for ngram in (1, 3):
        found = sets_of(said(*clean), ngram)
        assert found.words.tolist() == [len(plain_words(text)) for text in clean]
        sets = [set(found.hashes[a:b].tolist()) for a, b in pairwise(found.offsets)]
        plain = [plain_set(text, ngram) for text in clean]
        assert [len(x) for x in sets] == [len(x) for x in plain]
        for (a, b), (c, d) in zip(combinations(sets, 2), combinations(plain, 2), strict=True):
            assert len(a & b) == len(c & d)


@given(st.text(st.characters(max_codepoint=0x24F, exclude_characters="İŉǰ"), max_size=60))
def test_plain_words_are_the_words_of_text_in_latin_script(text: str) -> None:
    assert plain_words(text) == words(text)


@pytest.mark.parametrize("which", ["pair", "prompt", "response"])
def test_a_view_is_that_of_text(which: View) -> None:
    chosen, rejected = [message("assistant", "yes it is")], [message("assistant", "no"), message("user", "why")]
    many = [message("system", "be kind"), message("user", "a b"), message("assistant", "c"), message("user", "d e"),
            message("assistant", "f g h"), message("user", "left over")]  # fmt: skip
    rows = [
        row(0, "what is it", "a thing"),
        row(1, "q", None, chosen=chosen, rejected=rejected),
        row(2, "q", "r", chosen=chosen),
        row(3, "q", "r", rejected=rejected),
        row(4, None, None, messages=many),
        row(5, None, None, messages=None, text="a raw document"),
        row(6, None, None, messages=many, text="both of them"),
        row(7, None, None, messages=[]),
        row(8, None, None, messages=None),
        row(9, None, None, messages=many[:2]),
        row(10, None, None, messages=None, chosen=[], rejected=rejected),
    ]
    for part in (rows, rows[:1], rows[5:6], rows[8:9]):
        expected = [len(words(text)) for text in view(table(part), which)]
        assert sets_of(part, 3, which).words.tolist() == expected
    whole = pa.concat_tables([table(rows), table(rows)])  # slices that start inside a chunk
    expected = [len(words(text)) for text in view(whole.slice(3, 13), which)]
    assert shingle_sets(whole.slice(3, 13), which, 3).words.tolist() == expected


def test_large_strings_and_lists_are_read_too() -> None:
    rows = [row(0, "what is it", "a thing"), row(1, None, None, messages=None, text="a raw document of many words")]
    usual = table(rows)
    turn = pa.struct([pa.field(f.name, pa.large_string()) for f in usual.schema.field("messages").type.value_type])
    wide = usual.set_column(4, "messages", usual["messages"].cast(pa.large_list(turn)))
    wide = wide.set_column(8, "text", usual["text"].cast(pa.large_string()))
    assert wide.schema.names == usual.schema.names and wide.schema != usual.schema
    assert shingle_sets(wide, "pair", 2).hashes.tolist() == sets_of(rows, 2).hashes.tolist()


# ---------------------------------------------------------------- pairs


def test_pairs_are_the_true_ones_and_nearly_all_of_them() -> None:
    rows = corpus_rows(2000, seed=1)
    sets = [plain_set(text, 5) for text in view(table(rows), "pair")]
    found = pairs_of(sets_of(rows))
    assert all(a < b and s == plain_jaccard(sets[a], sets[b]) >= 0.7 for (a, b), s in found.items())
    holders: dict[Any, list[int]] = {}
    for index, shingles in enumerate(sets):
        for shingle in shingles:
            holders.setdefault(shingle, []).append(index)
    sharing = {pair for group in holders.values() for pair in combinations(group, 2)}
    near = [pair for pair in sharing if plain_jaccard(sets[pair[0]], sets[pair[1]]) >= 0.75]
    assert len(near) > 1200
    assert sum(pair in found for pair in near) >= 0.98 * len(near)
    short = {(a, b) for a, b in near if len(sets[a]) == 1}
    assert short and short <= found.keys()


def test_pairs_between_two_corpora() -> None:
    rows = corpus_rows(400, seed=2)
    left, right = rows[:400], rows[400:] + rows[:3] * 2
    plain = [[plain_set(text, 5) for text in view(table(part), "pair")] for part in (left, right)]
    i, j, similarity = near_pairs_between(sets_of(left), sets_of(right), 0.7, *banding(0.7))
    found = dict(zip(zip(i.tolist(), j.tolist(), strict=True), similarity.tolist(), strict=True))
    near = {(a, b): plain_jaccard(x, y) for a, x in enumerate(plain[0]) for b, y in enumerate(plain[1]) if x & y}
    assert all(s == near[pair] >= 0.7 for pair, s in found.items())
    sure = [pair for pair, s in near.items() if s >= 0.75]
    assert len(sure) > 200 and sum(pair in found for pair in sure) >= 0.98 * len(sure)
    assert {(k, 400 + k + 3 * t) for k in range(3) for t in range(2)} <= found.keys()
    none = sets_of([])
    assert len(near_pairs_between(none, sets_of(left), 0.7, 25, 5)[0]) == 0
    assert len(near_pairs_between(sets_of(left), none, 0.7, 25, 5)[0]) == 0


def test_a_huge_bucket_costs_no_square_and_stays_one_cluster() -> None:
    template = " ".join(VOCABULARY[:60])
    rows = said(*(f"{template} {number}" for number in range(3000)))
    found = near_pairs(sets_of(rows), 0.7, 25, 5)
    assert 0 < len(found.left) < 3000 * 32 * 25 and found.similarity.min() == pytest.approx(56 / 58)
    assert kept(rows) == ["a0"]


def test_bands_for_a_threshold_reach_the_recall() -> None:
    for threshold in (0.1, 0.3, 0.5, 0.7, 0.8, 0.9, 0.99, 1.0):
        bands, rows = banding(threshold)
        assert 1 - (1 - threshold**rows) ** bands >= RECALL - 1e-12


def test_jaccards_of_chosen_pairs() -> None:
    rows = said("a b c d e f", "a b c d e g", "", "x")
    ones = jaccards(sets_of(rows, 1), np.array([0, 0, 2, 3, 3]), np.array([1, 0, 2, 2, 3]))
    assert ones.tolist() == [5 / 7, 1.0, 0.0, 0.0, 1.0]


# ---------------------------------------------------------------- the judge


def test_six_distinct_short_rows_stay_six_and_two_equal_ones_become_one() -> None:
    short = ["What is AI?", "Name a fruit", "Hi", "Define gravity now", "2 + 2", "This one has more than five words"]
    assert len(kept(said(*short))) == 6
    assert kept(said("What is AI?", "what is  ai", "What is")) == ["a0", "a2"]


def test_rows_without_words_are_never_duplicates() -> None:
    assert kept(said("", "", "!?", "!?", "🙂")) == ["a0", "a1", "a2", "a3", "a4"]


def test_spaceless_scripts_and_code() -> None:
    han = "今天天气很好我们一起去公园散步然后回家吃饭看书睡觉明天再去爬山"
    code = "def area(r):\n    return 3.14 * r ** 2\n\nfor r in range(10):\n    print(area(r))\n" * 2
    rows = said(han, han[:-1] + "水", han[::-1], code, code.replace("    ", "\t"), code.replace("area", "volume"))
    found = verdicts(rows)
    assert [v["keep"] for v in found] == [True, False, True, True, False, True]
    assert found[1]["score"] == plain_jaccard(plain_set(han, 5), plain_set(han[:-1] + "水", 5)) > 0.9
    assert found[4]["score"] == 1.0


def test_evidence_names_the_survivor_and_the_way_to_it() -> None:
    w = VOCABULARY[:40]
    chain = [" ".join(w), " ".join([*w[:-3], *"p q r".split()]), " ".join(["u", "v", "z", *w[3:-3], *"p q r".split()])]  # noqa: SIM905
    sets = [plain_set(text, 5) for text in chain]
    near, next_, far = (plain_jaccard(sets[a], sets[b]) for a, b in ((0, 1), (1, 2), (0, 2)))
    assert far < 0.8 <= min(near, next_)
    found = verdicts(said(*chain, "something else entirely of six words"), threshold=0.8)
    assert [v["keep"] for v in found] == [True, False, False, True]
    assert [v["reason"] for v in found] == [None, "near_duplicate", "near_duplicate", None]
    assert [v["score"] for v in found] == [None, near, next_, None]
    assert json.loads(found[1]["evidence"]) == {"duplicate_of": "a0", "similarity": near, "cluster": 0}
    assert json.loads(found[2]["evidence"]) == {
        "duplicate_of": "a0", "similarity": far, "cluster": 0, "via": "a1", "via_similarity": next_}  # fmt: skip
    found = verdicts(said(*chain), threshold=0.8, floor=0.75)
    assert "similarity" not in json.loads(found[2]["evidence"])  # not measured below the floor


def test_who_survives() -> None:
    text = " ".join(VOCABULARY[:50])
    rows = [row(7, None, text, "b"), row(3, None, text + " more", "b"), row(0, None, text), row(1, None, text)]
    assert kept(rows) == ["b3"]
    assert kept(rows[2:] + rows[:2]) == ["a0"]
    assert kept(rows[2:] + rows[:2], survivor="longest") == ["b3"]


def test_order_parts_and_threads_change_nothing() -> None:
    rows = corpus_rows(300, seed=3)
    expected = verdicts(rows)
    assert sum(not v["keep"] for v in expected) > 150
    assert verdicts(rows, parts=7) == expected
    shuffled = random.Random(0).sample(rows, len(rows))
    again = {r["row_id"]: v for r, v in zip(shuffled, verdicts(shuffled), strict=True)}
    same = {r["row_id"]: v for r, v in zip(rows, expected, strict=True)}
    assert again == same  # one source: the smallest position survives wherever it lies
    one, two = (near_pairs(sets_of(rows, threads=t), 0.7, 25, 5, threads=t) for t in (1, 3))
    assert all(a.tolist() == b.tolist() for a, b in zip(vars(one).values(), vars(two).values(), strict=True))


def test_views_and_preferences() -> None:
    text = " ".join(VOCABULARY[:30])
    other = " ".join(VOCABULARY[30:60])
    good, bad = [message("assistant", other)], [message("assistant", "no")]
    rows = [row(0, text, other), row(1, text, text), row(2, text, None, chosen=good, rejected=bad)]
    assert kept(rows) == ["a0", "a1"]
    assert kept(rows, view="prompt") == ["a0"]
    assert kept(rows, view="response") == ["a0", "a1"]


def test_real_rows_that_two_sources_share(data: Path) -> None:
    """codealpaca_new4535 holds the rows of gpteacher_codegen: every one of them is found, to the source's first row."""
    rows = []
    for name, answer in (("codealpaca_new4535", "output"), ("gpteacher_codegen", "response")):
        for i, real in enumerate(pq.read_table(data / f"{name}.parquet").to_pylist()):
            rows.append(row(i, f"{real['instruction']}\n{real['input']}", real[answer], name))
    found = verdicts(rows, parts=3, threshold=0.9)
    assert all(v["keep"] for v in found[:4535])
    assert all(v["score"] == 1.0 and not v["keep"] for v in found[4535:])
    owners = [json.loads(v["evidence"])["duplicate_of"] for v in found[4535:]]
    assert owners == [f"codealpaca_new4535{i}" for i in range(4535)]


def test_small_corpora_and_wrong_fields() -> None:
    assert verdicts([]) == []
    assert kept(said("only one row here")) == ["a0"]
    for fields in ({"threshold": 0.0}, {"threshold": 1.1}, {"ngram": 0}, {"bands": 0}, {"rows_per_band": 0}):
        with pytest.raises(HouseError):
            NearDuplicate(**fields)


# ---------------------------------------------------------------- what a user may ask for


@pytest.mark.parametrize(("threshold", "fields"), [(0.7, {}), (0.85, {"floor": 0.85})])
def test_recall_holds_in_every_bin_of_jaccard_and_no_pair_is_wrong(threshold: float, fields: dict[str, Any]) -> None:
    rng = random.Random(5)
    texts = [rng.choices(VOCABULARY, k=rng.randint(12, 50)) for _ in range(4000)]
    cuts = [rng.randint(0, len(text) // 3) for text in texts]
    longer = [text[:cut] + rng.choices(VOCABULARY, k=rng.randint(0, 4)) + text[cut:]
              for text, cut in zip(texts, cuts, strict=True)]  # fmt: skip
    texts += longer + [edited(" ".join(text), rng.choice([0.01, 0.02, 0.03]), rng).split() for text in texts]
    rows = said(*map(" ".join, texts))
    judge = NearDuplicate(threshold=threshold, **fields)
    found = near_pairs(sets_of(rows), judge._floor(), *judge._bands())
    group = found.group.tolist()
    known = {(a, b): s for a, b, s in zip(found.left.tolist(), found.right.tolist(), found.similarity, strict=True)}
    sets = [plain_set(" ".join(text), 5) for text in texts]
    unit = {g: index for index, g in enumerate(group)}
    assert all(s == plain_jaccard(sets[unit[a]], sets[unit[b]]) >= judge._floor() for (a, b), s in known.items())
    bins: dict[int, list[bool]] = {}
    for copy in range(4000, 12000):
        original = copy % 4000
        similarity = plain_jaccard(sets[copy], sets[original])
        if similarity >= threshold:
            ends = min(group[copy], group[original]), max(group[copy], group[original])
            bins.setdefault(int(similarity * 20 + 1e-9), []).append(ends[0] == ends[1] or ends in known)
    wide = [hits for hits in bins.values() if len(hits) >= 50]
    assert len(bins[int(threshold * 20 + 1e-9)]) >= 200  # where pairs are missed: of 6,495 at 0.7 0.9966 were found
    assert len(wide) >= (1 - threshold) * 20 - 1 and sum(map(len, wide)) > 3000
    assert all(sum(hits) >= 0.98 * len(hits) for hits in wide)


def test_derived_bands_and_conventions() -> None:
    assert NearDuplicate()._bands() == (25, 5)
    assert NearDuplicate(threshold=0.85)._bands() == (25, 5) and NearDuplicate(threshold=0.85)._floor() == 0.7
    assert NearDuplicate(threshold=0.66)._floor() == 0.6
    assert NearDuplicate(bands=14, rows_per_band=8)._bands() == (14, 8)
    text = " ".join(VOCABULARY[:50])
    assert kept(said(text, f"{text} more"), bands=32, rows_per_band=8) == ["a0"]
    assert repr(NearDuplicate(threshold=0.8)).startswith(
        "NearDuplicate(threshold=0.8, ngram=5, view='pair', bands=None"
    )


def test_letters_of_short_rows_on_request() -> None:
    short = ["What is AI?", "Name a fruit", "Hi", "Define gravity now", "2 + 2", "This one has more than five words"]
    assert len(kept(said(*short), chars=5)) == 6
    near = [
        "Define gravitation now",
        "define  Gravitation, now!",
        "Define gravitations now",
        "Hi",
        "hi",
        "Ho",
        "?",
        "!",
    ]
    assert kept(said(*near)) == ["a0", "a2", "a3", "a5", "a6", "a7"]
    assert kept(said(*near), chars=5, threshold=0.6) == ["a0", "a3", "a5", "a6", "a7"]
    score = verdicts(said(*near), chars=5, threshold=0.6)[2]["score"]

    def runs(text: str) -> set[str]:
        return {text[i : i + 5] for i in range(len(text) - 4)}

    assert score == plain_jaccard(runs("define gravitation now"), runs("define gravitations now"))
    han = said("今天天气", "今天天氣", "今天天气!", "ﬁne  day", "fine day")
    assert kept(han, chars=2) == ["a0", "a1", "a3"]  # 2 of 4 pairs of letters are shared
    assert kept(said("a b c d", "a b c d e"), chars=3) == ["a0", "a1"]  # a short text meets short texts alone


def test_any_turn_makes_a_duplicate_but_short_turns_do_not_count() -> None:
    long, other, third = (" ".join(VOCABULARY[low : low + 20]) for low in (0, 20, 40))
    thanks = "Thank you very much!"

    def talk(position: int, *turns: tuple[str, str]) -> Row:
        return row(position, None, None, messages=[message(role, text) for role, text in turns])

    rows = [
        talk(0, ("user", long), ("assistant", "yes"), ("user", thanks), ("assistant", other)),
        talk(1, ("user", thanks), ("assistant", third)),
        talk(2, ("user", third + " indeed"), ("assistant", thanks)),
        talk(3, ("system", long), ("user", "Hello"), ("tool", other), ("assistant", "Hello you")),
        row(4, "q", None, chosen=[message("assistant", other)], rejected=[message("assistant", "no")]),
        row(5, None, None, messages=None, text=long),
        talk(6, ("user", long), ("assistant", long)) | {"messages": [message("user", "ab " * 30)] * 2},
    ]
    found = verdicts(rows, view="turn")
    assert [v["keep"] for v in found] == [True, True, False, True, False, False, True]
    owners = [json.loads(v["evidence"])["duplicate_of"] for v in found if v["evidence"]]
    assert owners == ["a1", "a0", "a0"]
    assert [v["score"] for v in found if v["evidence"]] == [16 / 17, 1.0, 1.0]
    assert [v["keep"] for v in verdicts(rows, view="turn", turn_bytes=10)] == [
        True,
        False,
        False,
        True,
        False,
        False,
        True,
    ]
    bridge = [talk(0, ("user", long)), talk(1, ("user", long), ("assistant", other)), talk(2, ("assistant", other))]
    last = verdicts(bridge, view="turn")[2]
    assert not last["keep"] and json.loads(last["evidence"]) == {
        "duplicate_of": "a0", "cluster": 0, "via": "a1", "via_similarity": 1}  # fmt: skip


def test_rows_of_equal_place_survive_by_their_name() -> None:
    text = " ".join(VOCABULARY[:20])
    rows = [row(0, None, text) | {"row_id": name} for name in ("c", "b", "d")]
    assert kept(rows) == ["b"] and kept(rows[::-1]) == ["b"]
