"""Encoding damage: repaired as ftfy would, found by the first look whatever the encodings, harmless text untouched."""

import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pytest

from gristmill.curation.folder import HouseError
from gristmill.curation.judges.encoding_damage import EncodingDamage
from gristmill.curation.makers.repair_encoding import RepairEncoding
from gristmill.curation.reading.source import Source, iter_rows
from gristmill.curation.rows import ROW, message, table
from gristmill.curation.text.contents import said
from gristmill.curation.text.encoding import damage, repaired, suspicious

ftfy = pytest.importorskip("ftfy")
Make = Callable[..., dict[str, Any]]

SENTENCES = (
    "Die Größe des Körpers über dem Boden ist schön — “sehr” schön… 5 €, ½ Liter",
    "Léopold déjà goûta l’œuvre française à Noël, ça va?",
    "Zażółć gęślą jaźń, příliš žluťoučký kůň",
    "√3 ≥ 1 and A ∪ B ≠ ∅ – ‘quoted’ • done ™",
    "Привет, как твои дела? Что нового",
    "Καλημέρα κόσμε, τι κάνεις",
    "日本語の文章です。中文句子，很好",
    "El niño comió piñas; ¿qué? ¡sí!",
    "مرحبا بالعالم، كيف حالك",
)
HARMLESS = (
    *SENTENCES,
    "if (a &lt; b &amp;&amp; c) { printf(\"%d\\n\", x); }",
    "“Curly” quotes’ and an em—dash… stay, so do ﬁ ligatures and ＦＵＬＬ width",
    "e\u0301 is not composed; tabs\tand\r\nline ends\rstay; nbsp\xa0too; a family: 👨‍👩‍👧",
    "à la carte, Âge, À propos, déjà vu É tude",
    "",
)  # fmt: skip


def mojibake() -> list[tuple[str, str]]:
    """Sentences read in wrong encodings, once and twice, where ftfy gets them back."""
    made = []
    for sentence in SENTENCES:
        for name in ("latin-1", "windows-1252", "windows-1251", "mac-roman", "windows-1250", "cp437"):
            try:
                once = sentence.encode().decode(name)
                made.append((once, sentence))
                made.append((once.encode().decode(name), sentence))
            except UnicodeDecodeError:
                continue
    return made


def plain(text: str) -> str:
    """ftfy itself, with the same settings and no shortcut."""
    config = ftfy.TextFixerConfig(unescape_html=False, uncurl_quotes=False, fix_latin_ligatures=False,
                                  fix_character_width=False, fix_line_breaks=False, normalization=None)  # fmt: skip
    return str(ftfy.fix_text(text, config))


def found(texts: Sequence[str]) -> list[bool]:
    look: list[bool] = pc.match_substring_regex(pa.array(texts, pa.string()), suspicious()).to_pylist()
    return look


def test_mojibake_is_found_and_repaired() -> None:
    pairs = mojibake()
    assert len(pairs) > 40
    fixed = [repaired(broken) == meant for broken, meant in pairs]
    assert sum(fixed) > 0.8 * len(pairs)  # what two encodings could both have made stays ambiguous
    assert all(repaired(broken) == plain(broken) for broken, _ in pairs)
    changed = [broken for broken, _ in pairs if repaired(broken) != broken]
    assert all(found(changed)) and all(damage(broken) for broken in changed)


def test_the_first_look_misses_no_short_sequence() -> None:
    texts = []
    for code in [*range(0xA0, 0x500), *range(0x2010, 0x2070), *range(0x2190, 0x2300), 0x20AC, 0x3042, 0x1F600]:
        for name in ("latin-1", "windows-1252", "windows-1251", "windows-1253", "windows-1257", "mac-roman", "cp437"):
            texts.append(f"say {chr(code).encode().decode(name, 'replace')} twice")
    changed = [text for text in texts if plain(text) != text]
    assert all(repaired(text) == plain(text) for text in texts)
    assert len(changed) > 1000 and all(found(changed))


@pytest.mark.parametrize("text", HARMLESS)
def test_harmless_text_stays(text: str) -> None:
    assert repaired(text) == text and damage(text) == 0


def test_controls_go_and_what_is_configured_too() -> None:
    broken = "a\x00b\x0bc\ufeffd\ufffce\x1b[31mred\x1b[0m"
    assert repaired(broken) == "abcdered" and found([broken]) == [True]
    assert repaired("a &amp; “b”", unescape_html=True, uncurl_quotes=True) == 'a & "b"'
    for text, more in (("a &amp; b", (True, False)), ("“b”", (False, True))):
        assert not found([text])[0] and pc.match_substring_regex(pa.array([text]), suspicious(*more))[0].as_py()


class Rows:
    def __init__(self, rows: list[dict[str, Any]], part: int) -> None:
        self.all, self.part, self.rows = rows, part, len(rows)

    def progress(self, done: int, total: int) -> None:
        assert done <= total

    def tables(self, columns: Sequence[str] | None = None) -> Iterator[pa.Table]:
        for start in range(0, len(self.all), self.part):
            yield table(self.all[start : start + self.part]).select(list(columns or ROW.names))


def broken_rows(make_row: Make) -> list[dict[str, Any]]:
    span = {"field": "messages", "turn": 1, "start": 13, "end": 20, "weight": 1.0}
    other = {"field": "messages", "turn": 0, "start": 1, "end": 3, "weight": 0.5}
    thought = [message("user", "Hm?"), message("assistant", "Ja", reasoning_content="schÃ¶n")]
    chosen, rejected = [message("assistant", "gut")], [message("assistant", "Ã¼bel")]
    return [
        make_row("a", 0, "Who?", "Fine “as it is” – &lt;b&gt;"),
        make_row("a", 1, "Who?", "Rue LÃ©opold, schÃ¶n 5", spans=[span, other], meta='{"k": 1}'),
        make_row("a", 2, "", None, messages=thought),
        make_row("a", 3, "q", None, chosen=chosen, rejected=rejected),
        make_row("a", 4, "", None, messages=None, text="x\x00y"),
        make_row("a", 5, "", None, messages=None, text="lost: \ufffd"),
    ]


def test_makes_repaired_rows_with_their_spans(make_row: Make) -> None:
    rows = broken_rows(make_row)
    made = [
        [row for part in RepairEncoding().make(Rows(rows, size)) for row in part.to_pylist()]  # type: ignore[arg-type]
        for size in (2, 6)
    ]
    assert made[0] == made[1] and [row["parents"] for row in made[0]] == [[rows[n]["row_id"]] for n in (1, 2, 3, 4)]
    first, thought, pair, document = made[0]
    answer = first["messages"][1]["content"]
    assert answer == "Rue Léopold, schön 5" and first["meta"] == '{"k": 1}' and first["position"] == 1
    assert [answer[s["start"] : s["end"]] for s in first["spans"][:1]] == [" schön"]
    assert rows[1]["messages"][1]["content"][13:20] == " schÃ¶n"
    assert first["spans"][1] == rows[1]["spans"][1]  # of a turn that stays
    assert thought["messages"][1]["reasoning_content"] == "schön" and thought["messages"][0] == rows[2]["messages"][0]
    assert pair["rejected"][0]["content"] == "übel" and pair["chosen"][0]["content"] == "gut"
    assert document["text"] == "xy"
    straight = [row for part in RepairEncoding(uncurl_quotes=True, unescape_html=True).make(Rows(rows[:1], 6))  # type: ignore[arg-type]
                for row in part.to_pylist()]  # fmt: skip
    assert straight[0]["messages"][1]["content"] == 'Fine "as it is" – <b>'


def test_drops_damage_above_a_share(make_row: Make) -> None:
    rows = broken_rows(make_row)
    verdicts = EncodingDamage().judge(table(rows), pa.table({})).to_pylist()
    assert [row["keep"] for row in verdicts] == [True, *[False] * 5]
    assert json.loads(verdicts[2]["evidence"]) == {"characters": 11, "damaged": 1, "field": "messages", "turn": 1}
    assert verdicts[5]["score"] == pytest.approx(1 / 7) and verdicts[0]["score"] is None
    long = table([make_row("a", n, "q", "word " * size + "\ufffd") for n, size in enumerate((10, 1000))])
    assert EncodingDamage(0.001).judge(long, pa.table({}))["keep"].to_pylist() == [False, True]
    assert EncodingDamage(0.0).judge(long, pa.table({}))["keep"].to_pylist() == [False, False]
    with pytest.raises(HouseError, match="share"):
        EncodingDamage(2)


def test_the_first_look_equals_ftfy_on_real_text(data: Path) -> None:
    changed = 0
    for name, limit in (
        ("flan_cot", 12000),
        ("alpaca_raw_random5000", 3000),
        ("docs_til", 575),
        ("dolly_sample2000", 2000),
    ):
        source = Source("s", str(data / f"{name}.parquet"), "x", limit=limit)
        rows = table(row for row in iter_rows(source) if isinstance(row, dict))
        for one in said(rows, ("content",)):
            strings = one.strings.filter(pc.match_substring_regex(one.strings, r"[^\t\n\r -~]"))
            looked = pc.match_substring_regex(strings, suspicious()).to_pylist()
            for text, look in zip(strings.to_pylist(), looked, strict=True):
                differs = len(text) < 3000 and plain(text) != text  # longer ones take ftfy seconds
                assert (look and repaired(text) != text) or not differs
                changed += differs
    assert changed >= 5  # of flan_cot
