"""The gates that every set passes, named in its recipe or not: what is held out, and what can be trained on."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import pyarrow as pa

from ..flags import flagged
from ..rows import digest
from ..steps import Unmeasured, verdicts
from ..text.view import VIEW_COLUMNS, contents, normal

READ = (*VIEW_COLUMNS, "label")
ROLES = {"system", "developer", "user", "assistant", "tool"}


def untrainable(row: Mapping[str, Any], kind: str) -> str | None:
    """Why a row cannot be trained on as `kind` (sft, preference, kto, text), or None where it can."""
    if kind == "text":
        return None if (row["text"] or "").strip() else "empty_text"
    if row["messages"] is None:
        return "wrong_shape"
    turns = [*row["messages"], *(row["chosen"] or ()), *(row["rejected"] or ())]
    if any(turn["role"] not in ROLES for turn in turns):
        return "unknown_role"
    if kind == "sft":
        return _untrainable_conversation(row)
    answers = [row["chosen"]] if kind == "kto" else [row["chosen"], row["rejected"]]
    if any(answer is None for answer in answers) or (kind == "kto" and row["label"] is None):
        return "wrong_shape"
    if not contents(row["messages"]).strip():
        return "empty_prompt"
    if any(not contents(answer).strip() for answer in answers):
        return "empty_response"
    if kind == "preference" and normal(contents(row["chosen"])) == normal(contents(row["rejected"])):
        return "equal_answers"
    return None


def _untrainable_conversation(row: Mapping[str, Any]) -> str | None:
    if row["chosen"] is not None or row["rejected"] is not None:
        return "wrong_shape"
    answers = [turn for turn in row["messages"] if turn["role"] == "assistant"]
    if not answers:
        return "no_assistant_turn"
    if not any((turn["content"] or "").strip() or turn["tool_calls"] for turn in answers):
        return "empty_response"
    return None


def is_held_out(prompt: str, share: float) -> bool:
    """Whether rows of this prompt are held out: a hash of its normal form falls in the first `share` of all hashes.
    The same prompt falls on the same side in every set, recipe and release."""
    return int(digest("held_out", normal(prompt))[:12], 16) < share * 16**12


@dataclass(frozen=True)
class HeldOut(Unmeasured):
    """Holds out a share of the prompts for evaluation, before any judge has looked.

    share: of prompts, 0 to 1. Rows that cannot be trained on as `kind` are never held out. Reason: held_out.
    """

    share: float = 0.02
    kind: str = "sft"
    scope: ClassVar[Literal["row"]] = "row"
    reads: ClassVar[tuple[str, ...]] = READ

    def judge(self, rows: pa.Table, values: pa.Table) -> pa.Table:
        """Drops held-out rows with reason held_out."""
        from ..text.texts import texts

        prompts = texts(rows, "prompt").to_pylist()
        drawn = [index for index, prompt in enumerate(prompts) if is_held_out(prompt, self.share)]
        few = zip(drawn, rows.select(READ).take(pa.array(drawn, pa.int64())).to_pylist(), strict=True)
        held_out = (index for index, row in few if untrainable(row, self.kind) is None)
        return flagged(rows.num_rows, dict.fromkeys(held_out, ("held_out", None)))


@dataclass(frozen=True)
class Trainable(Unmeasured):
    """Drops rows that cannot be trained on as `kind`: no messages, no assistant turn, an empty prompt or response, an
    unknown role, equal answers. The reason names the fault."""

    kind: str = "sft"
    scope: ClassVar[Literal["row"]] = "row"
    reads: ClassVar[tuple[str, ...]] = READ

    def judge(self, rows: pa.Table, values: pa.Table) -> pa.Table:
        """Drops rows with the reason that `untrainable` gives."""
        reasons = [untrainable(row, self.kind) for row in rows.select(READ).to_pylist()]
        return verdicts([reason is None for reason in reasons], reasons)
