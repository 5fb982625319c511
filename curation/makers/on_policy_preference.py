"""Preference pairs out of a policy's own answers, told apart by a verifier."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import pyarrow as pa

from ..door import Sampling
from ..folder import HouseError
from ..preferring import Said, distinct, grouped, matched, pair_row, questions, sampled, samples
from ..rows import Row, table
from ..steps import Corpus
from ..synthesis import Session
from ..verifying import Finding, Verifier


@dataclass(frozen=True)
class OnPolicyPreference:
    """Pairs of a right and a wrong answer that the policy itself gave: PLUM (arXiv 2406.06887) where the verifier runs
    tests, the same for maths by answers, for schemas, constraints or any other verifier.

    model: the policy, a training stage or a model of the recipe. verifier: what tells right from wrong; it is given the
    prompt's reference answer and meta, and verifies while other answers are still asked for. set_name: the earlier set
    whose prompts are asked; prompts, test_prompts: how many of its splits train and test, the lowest by hash of (seed,
    row_id). answers: sampled of each prompt, with temperature, top_p and max_tokens (new tokens).

    pairs: at most of one prompt, drawn by a hash; an answer stands in a second pair only where it must. length_ratio:
    the longer answer of a pair has at most so many times the characters of the shorter one (None: any). right_share:
    only prompts of which this share of the verified answers is right (from, to; both included) give pairs: (0.2, 0.8)
    leaves out what the policy knows or never finds. Answers that are empty or cut off are left out, answers that say
    the same count once, answers on which the verifier abstains are in no pair.

    Rows: chosen and rejected, parent the prompt's row; meta: score_chosen 1, score_rejected 0, right_share, what the
    verifier saw of both, and where both come from. Parents stay.
    """

    model: str
    verifier: Verifier
    set_name: str = "sft"
    prompts: int = 400
    test_prompts: int = 100
    answers: int = 8
    pairs: int = 1
    temperature: float = 1.0
    top_p: float = 1.0
    max_tokens: int = 512
    length_ratio: float | None = None
    right_share: tuple[float, float] = (0.0, 1.0)
    seed: int = 0

    scope: ClassVar[Literal["maker"]] = "maker"
    consumes: ClassVar[str | None] = None

    def __post_init__(self) -> None:
        if min(self.prompts, self.test_prompts) < 0 or self.answers < 2 or self.pairs < 1 or self.max_tokens < 1:
            raise HouseError(f"{self}: answers is at least 2, pairs and max_tokens at least 1, prompts at least 0")
        if self.length_ratio is not None and self.length_ratio < 1:
            raise HouseError(f"{self}: length_ratio is longer over shorter, so at least 1")
        if not 0 <= self.right_share[0] <= self.right_share[1] <= 1:
            raise HouseError(f"{self}: right_share is two shares in order, such as [0.2, 0.8]")

    def make(self, corpus: Corpus) -> Iterator[pa.Table]:
        """One table of new rows."""
        counts = {"train": self.prompts, "test": self.test_prompts}
        asked = list(questions(corpus, self.set_name, counts, self.seed))
        sampling = Sampling(self.temperature, self.top_p, self.max_tokens)
        made: list[Row] = []
        with Session(self, corpus, self.model, "on_policy_preference") as session:
            found = sampled(session, samples(asked, self.answers, sampling, self.seed), self.verifier)
            for own in grouped(found, lambda one: one[0].ask.about.row_id).values():
                made += self._rows(session, own)
        if made:
            yield table(made)

    def _rows(self, session: Session, found: list[tuple[Said, Finding]]) -> list[Row]:
        """The pairs of one prompt."""
        known = [one for one in found if one[1].right is not None]
        share = sum(bool(finding.right) for _, finding in known) / len(known) if known else 0.0
        sides = [
            distinct([one for one in known if one[1].right is right], lambda one: one[0].text)
            for right in (True, False)
        ]
        problem = self._problem(len(known), share)
        good, bad = sides
        seed = ("pair", self.seed, found[0][0].ask.about.row_id)
        drawn = [] if problem else matched(_texts(good), _texts(bad), self.pairs, seed, self.length_ratio)
        if not drawn:
            session.refused(problem or "length")
        rows = []
        for i, j in drawn:
            about: dict[str, Any] = {"score_chosen": 1.0, "score_rejected": 0.0, "right_share": share}
            about |= {"verified": {"chosen": good[i][1].detail, "rejected": bad[j][1].detail}}
            rows.append(pair_row(good[i][0], bad[j][0], about))
        return rows

    def _problem(self, known: int, share: float) -> str | None:
        """Why a prompt gives no pair, whatever the lengths."""
        if not known:
            return "verifier_abstains"
        if share in (0, 1):
            return "all_right" if share else "all_wrong"
        low, high = self.right_share
        return None if low <= share <= high else "right_share"


def _texts(side: list[tuple[Said, Finding]]) -> list[str]:
    return [said.text for said, _ in side]
