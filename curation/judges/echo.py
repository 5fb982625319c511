"""A judge of answers that only say the prompt again."""

from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np
import pyarrow as pa

from ..flags import flagged
from ..steps import Unmeasured
from ..text.view import normal, words


@dataclass(frozen=True)
class Echo(Unmeasured):
    """Drops rows whose response is the prompt in normal form (NFKC, case-folded, white space collapsed), or is letter
    by letter the prompt's input: all that follows its first blank line.

    min_words: of the response (default 5): the answer to "Which is larger?" may be all of a short input. Reasons:
    answer_is_prompt, answer_copies_input. Where a sentence is to be corrected that has no fault a copy is the right
    answer: leave this judge out of such sets. Of a preference row `chosen` is judged; a raw document is kept.
    """

    min_words: int = 5

    scope: ClassVar[Literal["row"]] = "row"

    def judge(self, rows: pa.Table, values: pa.Table) -> pa.Table:
        """Verdicts, aligned with `rows`."""
        from ..text.echoes import same_end
        from ..text.texts import at, texts

        prompts, responses = texts(rows, "prompt"), texts(rows, "response")
        look = np.flatnonzero(same_end(prompts, responses))
        found = {}
        for row, prompt, response in zip(look.tolist(), at(prompts, look), at(responses, look), strict=True):
            reason = echo(prompt, response, self.min_words)
            if reason is not None:
                found[row] = reason, None
        return flagged(rows.num_rows, found)


def echo(prompt: str, response: str, min_words: int = 5) -> str | None:
    """Why the response only says the prompt again, or None."""
    said = response.strip()
    if not said or not prompt or len(words(said)) < min_words:
        return None
    if normal(said) == normal(prompt):
        return "answer_is_prompt"
    return "answer_copies_input" if prompt.partition("\n\n")[2].strip() == said else None
