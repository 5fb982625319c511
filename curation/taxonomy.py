"""Taxonomies of what can be known: disciplines with the fields above them, out of files and rows."""

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .folder import HouseError
from .inputs import read_text
from .rows import digest
from .steps import Corpus
from .text.view import normal


@dataclass(frozen=True)
class Place:
    """A node of the taxonomy: its name after those of the nodes above it."""

    path: tuple[str, ...]
    parents: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        return self.path[-1]


def distinct_places(found: Iterable[Place]) -> list[Place]:
    """The first place of each path, compared without case and spaces."""
    first: dict[tuple[str, ...], Place] = {}
    for one in found:
        first.setdefault(tuple(map(normal, one.path)), one)
    return list(first.values())


def read_taxonomy(path: str) -> list[Place]:
    """Disciplines of a file: the leaves of nested YAML or JSON, or lines of the form `Field > Part > Discipline`."""
    text = read_text(path)
    if Path(path).suffix in (".yaml", ".yml", ".json"):
        import yaml

        try:
            paths = list(_leaves(yaml.safe_load(text), ()))
        except yaml.YAMLError as error:
            raise HouseError(f"{path} is no YAML: {error}") from error
    else:
        lines = (line.split("#")[0] for line in text.split("\n"))
        split = (tuple(piece.strip() for piece in line.split(">")) for line in lines if line.strip())
        paths = [tuple(piece for piece in pieces if piece) for pieces in split]
    found = distinct_places(Place(one) for one in paths if one)
    if not found:
        raise HouseError(f"{path} names no discipline: write one a line, or nested lists in YAML")
    return found


def _leaves(value: Any, path: tuple[str, ...]) -> Iterator[tuple[str, ...]]:
    if isinstance(value, dict):
        for name, below in value.items():
            yield from _leaves(below, (*path, str(name)))
    elif isinstance(value, list):
        for one in value:
            yield from _leaves(one, path)
    else:
        yield path if value is None else (*path, str(value))


def places_of_rows(corpus: Corpus, column: str, seed: int) -> list[Place]:
    """The values of `column` in meta, each with the row that stands for it: the lowest by a hash."""
    first: dict[str, tuple[str, str, str]] = {}
    for part in corpus.tables(["row_id", "meta"]):
        for row in part.to_pylist():
            meta = json.loads(row["meta"] or "{}")
            value = meta.get(column) if isinstance(meta, dict) else None
            if isinstance(value, str) and value.strip():
                stands = (digest(str(seed), row["row_id"]), row["row_id"], value.strip())
                first[normal(value)] = min(stands, first.get(normal(value), stands))
    return [Place((value,), (row_id,)) for _, (_, row_id, value) in sorted(first.items())]
