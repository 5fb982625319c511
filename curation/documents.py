"""Raw documents as makers read them: rows with `text`, cut into sections of which none is lost unsaid."""

import warnings
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import pyarrow as pa

from .steps import Corpus
from .text.sections import sections


@dataclass(frozen=True)
class Section:
    """A piece of the document `row_id`: its characters start to end, `text` without white space around them."""

    row_id: str
    text: str
    start: int
    end: int


def texts(corpus: Corpus, set_name: str | None) -> Iterator[tuple[str, str]]:
    """(row_id, text) of the live rows that are documents, or of split train of the earlier set `set_name`: what is held
    out there never comes into training rows here."""
    parts: Iterable[pa.Table]
    parts = corpus.tables(["row_id", "text"]) if set_name is None else corpus.tools.curated(set_name, "train")
    for part in parts:
        for row in part.select(["row_id", "text"]).to_pylist():
            if (row["text"] or "").strip():
                yield row["row_id"], row["text"]


def cut(corpus: Corpus, set_name: str | None, window: int, least: int) -> list[Section]:
    """The sections of at least `least` characters of all documents. The step's record says what became of every
    character: documents, sections, and how many sections and characters were too short."""
    found: list[Section] = []
    count: Counter[str] = Counter(documents=0, sections=0, characters=0, short_sections=0, short_characters=0)
    for row_id, text in texts(corpus, set_name):
        count["documents"] += 1
        for start, end in sections(text, window):
            said = text[start:end].strip()
            short = "short_" * (len(said) < least)
            count[f"{short}sections"] += 1
            count[f"{short}characters"] += end - start
            if not short:
                found.append(Section(row_id, said, start, end))
    corpus.record(documents=dict(count))
    if not found and count["documents"]:
        warnings.warn(
            f"none of {count['documents']:,} documents has a section of {least:,} to {window:,} characters: a smaller"
            " `least` or a larger `window` finds some",
            stacklevel=2,
        )
    elif not found:
        warnings.warn("there is no document: name a set of kind text, by set_name, or a source of texts", stacklevel=2)
    return found
