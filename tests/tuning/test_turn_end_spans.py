"""A span of no characters at a content's end weighs what closes the turn, and nothing else."""

import numpy as np
import pytest

from gristmill.curation.folder import HouseError
from gristmill.tuning.chat import tokenise_pair

from .test_chat import CHATML, LLAMA3, tokenizer

ASK = [{"role": "user", "content": "Why?"}]


def span(field: str, start: int, end: int, weight: float) -> dict[str, object]:
    return {"field": field, "turn": 0, "start": start, "end": end, "weight": weight}


@pytest.mark.parametrize(("template", "end"), [(CHATML, "<|im_end|>"), (LLAMA3, "<|eot_id|>")])
def test_the_end_of_a_turn_has_a_weight_of_its_own(template: str, end: str) -> None:
    own = tokenizer(template, end)
    good, bad = [{"role": "assistant", "content": "one two "}], [{"role": "assistant", "content": "one six"}]
    spans = [span("chosen", 0, 4, 0.0), span("chosen", 8, 8, 0.0), span("rejected", 4, 7, 0.0)]
    spans.append(span("rejected", 7, 7, 1.0))
    chosen, rejected = tokenise_pair(own, ASK, good, bad, spans=spans)
    # one token a byte: a step after its prefix, without the end of the turn; a masked last sentence, and the end
    assert own.decode(chosen.ids[np.flatnonzero(chosen.weights)]).strip() == "two"
    assert own.decode(rejected.ids[np.flatnonzero(rejected.weights)]) == f"one {end}"
    with pytest.raises(HouseError, match="lies outside"):
        tokenise_pair(own, ASK, good, bad, spans=[span("chosen", 3, 3, 0.0)])
