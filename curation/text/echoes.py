"""Which answers may be the end of their prompts: a compiled first look at the letters alone."""

from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from ..duplicates.shingles import compiled


def same_end(prompts: pa.Array, responses: pa.Array) -> npt.NDArray[np.bool_]:
    """Rows whose response (large_string) has the ASCII letters and digits, case aside, that its prompt ends in, with at
    least one character; every row with other letters as well, as those may have several forms."""
    found = np.zeros(len(prompts), np.bool_)
    _same_end(*_buffers(prompts), *_buffers(responses), found)
    return found


def _buffers(strings: pa.Array) -> tuple[Any, Any]:
    _, offsets, data = strings.buffers()
    ends = np.zeros(1, np.int64) if offsets is None else np.frombuffer(offsets, np.int64)[strings.offset :]
    return np.zeros(0, np.uint8) if data is None else np.frombuffer(data, np.uint8), ends


@compiled
def _plain(byte):  # type: ignore[no-untyped-def]
    """The byte in lower case where it is an ASCII letter or digit, else 0."""
    if byte >= 65 and byte <= 90:
        return byte + 32
    return byte if (byte >= 97 and byte <= 122) or (byte >= 48 and byte <= 57) else 0


@compiled
def _same_end(prompts, prompt_ends, responses, response_ends, found):  # type: ignore[no-untyped-def]
    for row in range(found.size):
        low, at = prompt_ends[row], prompt_ends[row + 1] - 1
        first, place = response_ends[row], response_ends[row + 1] - 1
        same = place >= first and at >= low
        while same and place >= first:
            if responses[place] >= 128:  # has other forms: let Python look
                break
            letter = _plain(responses[place])
            place -= 1
            if letter == 0:
                continue
            while at >= low and _plain(prompts[at]) == 0 and prompts[at] < 128:
                at -= 1
            if at >= low and prompts[at] >= 128:
                break
            same = at >= low and _plain(prompts[at]) == letter
            at -= 1
        found[row] = same
