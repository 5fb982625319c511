"""Earlier releases on disk, for finding new rows that say again what one of them kept: a folder that each run extends.

`index.json` lists the releases by number; each lies in a folder of its own, written whole: `segment.json` (settings,
bytes of each file), `ids.npy`, and memory-mapped arrays: of near duplicates `keys.npy` (bands, texts), `hashes.npy`
and `offsets.npy` (shingles), of exact ones `keys.npy` (texts, 2). A run that is done again is compared with the
releases before it alone and replaces its own, so it ends as it did.
"""

import fcntl
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from ..folder import HouseError, read_json, whole_folder, write_json
from ..text.spans import Ints
from .minhash import BUCKET, Reals, band_keys, jaccards, matches
from .shingles import Shingles, in_threads
from .spill import let_go

INDEX, SEGMENT = "index.json", "segment.json"
_32, _LOW = np.uint64(32), np.uint64(0xFFFFFFFF)


@dataclass(frozen=True)
class Segment:
    """One earlier release."""

    home: Path
    release: str

    def array(self, name: str) -> np.ndarray:
        """A mapped array; copy-on-write, so that kernels see the type of any other array."""
        try:
            array: np.ndarray = np.load(self.home / f"{name}.npy", mmap_mode="c", allow_pickle=False)
            return array
        except (OSError, ValueError, EOFError) as error:
            raise _broken(self.home.parents[1], f"{self.home / name}.npy: {error}") from error


@dataclass(frozen=True)
class Index:
    """The releases that come before this run's own, oldest first."""

    folder: Path
    settings: str
    segments: tuple[Segment, ...]

    def names(self, rows: Ints) -> tuple[pa.Array, pa.Array]:
        """row_id and release (escaped for JSON) of texts that `nearest` or `equal` named; -1 gives null."""
        bounds = np.cumsum([0, *(len(segment.array("ids")) for segment in self.segments)])
        ids, releases = np.full(len(rows), None, object), np.full(len(rows), None, object)
        for number, segment in enumerate(self.segments):
            mine = np.flatnonzero((rows >= bounds[number]) & (rows < bounds[number + 1]))
            found = segment.array("ids")[rows[mine] - bounds[number]]
            ids[mine] = [name.decode() for name in found.tolist()]
            releases[mine] = json.dumps(segment.release)[1:-1]
        return pa.array(ids, pa.string()), pa.array(releases, pa.string())


def open_index(folder: Path, settings: str, home: Path | None) -> Index:
    """The index as the run at `home` (OUT / set; None: a preview) may see it. Begun where the folder does not exist yet
    or is empty; a HouseError where it is broken, of other settings, or holds another run's release of this name."""
    listed = _listed(folder)
    if home is not None and not (folder / INDEX).exists():
        with _alone(folder):
            write_json(folder / INDEX, {"releases": listed})
    release = None if home is None else _release(home)
    own = listed.get(release or "")
    if own is not None and own["origin"] != str(home):
        raise HouseError(
            f"the index {folder} holds a release {release} of {own['origin']}, this is {home}: give each release an OUT"
            " of its own name, or remove the old one from the index"
        )
    segments = []
    for name, entry in sorted(listed.items(), key=lambda item: item[1]["number"]):
        if own is not None and entry["number"] >= own["number"]:
            continue
        segment = Segment(folder / name, name)
        try:
            record = read_json(segment.home / SEGMENT)
            sizes = {file: (segment.home / file).stat().st_size for file in record["files"]}
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise _broken(folder, f"{segment.home}: {error}") from error
        if sizes != record["files"]:
            raise _broken(folder, f"{segment.home}: files of {sizes} bytes, written were {record['files']}")
        if record["settings"] != settings:
            raise HouseError(
                f"the index {folder} was made with {record['settings']}; this step has {settings}: use another folder"
            )
        segments.append(segment)
    return Index(folder, settings, tuple(segments))


def extend(index: Index, home: Path, ids: pa.Array, arrays: Mapping[str, Sequence[np.ndarray]]) -> None:
    """Adds the release of `home`, or replaces it: row_ids, and each array as pieces along its last axis (near) or first
    axis (exact), so that none need be whole in memory."""
    release = _release(home)
    with _alone(index.folder):
        with whole_folder(index.folder / release) as folder:
            try:
                np.save(folder / "ids.npy", np.array([name.encode() for name in ids.to_pylist()], "S"))
                for name, pieces in arrays.items():
                    _save(folder / f"{name}.npy", pieces)
            except OSError as error:
                raise HouseError(
                    f"cannot extend the index of earlier releases {index.folder} by {len(ids):,} texts:"
                    f" {error.strerror or error}. Free some space there and run again."
                ) from error
            files = {path.name: path.stat().st_size for path in sorted(folder.iterdir())}
            write_json(folder / SEGMENT, {"release": release, "settings": index.settings, "files": files})
        listed = _listed(index.folder)
        last = max((entry["number"] for entry in listed.values()), default=-1)
        listed.setdefault(release, {"number": last + 1, "origin": str(home)})
        write_json(index.folder / INDEX, {"releases": listed})


def nearest(
    index: Index, shingles: Shingles, units: Ints, floor: float, bands: int, width: int, seed: int, scratch: Path
) -> tuple[Ints, Reals]:
    """For each of `units` the text of an earlier release nearest to it, of equals the oldest, and their Jaccard; -1 and
    0 where none of Jaccard >= floor was found."""
    best, near = np.full(len(units), -1, np.int64), np.zeros(len(units))
    if not index.segments:
        return best, near
    keys = band_keys(shingles, units, bands, width, seed, scratch, name="earlier-keys.u64")
    base = 0
    for segment in index.segments:
        theirs, hashes, offsets = (segment.array(name) for name in ("keys", "hashes", "offsets"))
        pairs = np.zeros(0, np.uint64)
        for low in range(0, bands, 2):
            some = range(low, min(low + 2, bands))
            found = in_threads(partial(_matched, theirs, keys), some)
            pairs = np.unique(np.concatenate([pairs, *found]))
            let_go(keys)
        old, new = (pairs >> _32).astype(np.int64), (pairs & _LOW).astype(np.int64)
        similarity = jaccards(shingles, units[new], old, others=(hashes, offsets))
        good = np.flatnonzero(similarity >= floor)
        good = good[np.lexsort((old[good], -similarity[good], new[good]))]
        good = good[np.unique(new[good], return_index=True)[1]]
        good = good[similarity[good] > near[new[good]]]
        best[new[good]], near[new[good]] = base + old[good], similarity[good]
        base += len(offsets) - 1
    return best, near


def equal(index: Index, keys: np.ndarray) -> tuple[Ints, Reals]:
    """For each key (two columns; a second of 0 equals none) the oldest equal one, and 1; where there is none -1, 0."""
    best, base = np.full(len(keys), -1, np.int64), 0
    for segment in index.segments:
        theirs = segment.array("keys")
        pairs = matches(np.ascontiguousarray(theirs[:, 0]), np.ascontiguousarray(keys[:, 0]), BUCKET)
        old, new = (pairs >> _32).astype(np.int64), (pairs & _LOW).astype(np.int64)
        same = (theirs[old, 1] == keys[new, 1]) & (best[new] < 0) & (keys[new, 1] != 0)
        best[new[same]] = base + old[same]
        base += len(theirs)
    return best, (best >= 0).astype(np.float64)


def _matched(theirs: np.ndarray, keys: np.ndarray, band: int) -> np.ndarray:
    pairs: np.ndarray = matches(theirs[band], keys[band], 4 * BUCKET)
    return pairs


def shingle_pieces(shingles: Shingles, units: Ints, size: int = 1 << 16) -> tuple["Pieces", Ints]:
    """The shingles of `units` one after the other, in pieces, and their offsets."""
    counts = shingles.offsets[units + 1] - shingles.offsets[units]

    def piece(low: int) -> np.ndarray:
        some, many = units[low : low + size], counts[low : low + size]
        start = np.repeat(shingles.offsets[some] - (np.cumsum(many) - many), many)
        return np.asarray(shingles.hashes[start + np.arange(len(start))])

    return Pieces(piece, range(0, len(units), size), (int(counts.sum()),)), np.r_[0, np.cumsum(counts)]


class Pieces(Sequence[np.ndarray]):
    """Parts of an array of known shape, each made when it is asked for."""

    def __init__(self, make: Any, starts: range, shape: tuple[int, ...]) -> None:
        self.make, self.starts, self.shape = make, starts, shape

    def __len__(self) -> int:
        return len(self.starts)

    def __getitem__(self, index: Any) -> Any:
        return self.make(self.starts[index])


def _save(path: Path, pieces: Sequence[np.ndarray]) -> None:
    if not isinstance(pieces, Pieces):
        np.save(path, pieces[0], allow_pickle=False)
        return
    with path.open("wb") as file:
        header = {"descr": "<u8", "fortran_order": False, "shape": pieces.shape}
        np.lib.format.write_array_header_1_0(file, header)  # type: ignore[no-untyped-call]
        for piece in pieces:
            file.write(np.ascontiguousarray(piece, "<u8").data)


def _release(home: Path) -> str:
    return f"{home.parent.name}/{home.name}"


def _listed(folder: Path) -> dict[str, dict[str, Any]]:
    try:
        return dict(read_json(folder / INDEX)["releases"])
    except FileNotFoundError as error:
        if folder.is_dir() and any(path.is_dir() and not path.name.startswith(".") for path in folder.iterdir()):
            raise _broken(folder, f"{INDEX} is missing") from error
        return {}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise _broken(folder, f"{INDEX}: {error}") from error


def _broken(folder: Path, why: str) -> HouseError:
    return HouseError(f"the index of earlier releases {folder} cannot be read ({why}): restore it, or begin a new one")


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """One run at a time extends an index; the others wait."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = (folder / ".lock").open("w")
    except OSError as error:
        raise HouseError(f"cannot write the index of earlier releases {folder}: {error.strerror}") from error
    with lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
