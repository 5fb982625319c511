"""Trees of answers, step by step, as lists with rewards (TPO)."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import pyarrow as pa

from ..beside import verified
from ..door import Sampling
from ..folder import HouseError
from ..preferring import Question, Said, list_pairs, pair_row, questions, usable
from ..rows import Row, message, table
from ..steps import Corpus
from ..synthesis import Ask, Session
from ..text.sentences import steps
from ..verifying import Verifier
from .step_pairs import continuation, without_prefix


@dataclass(frozen=True)
class _Leaf:
    """A whole answer: `path` are its beginnings at which the tree branched, `text` all of it."""

    said: Said
    path: tuple[str, ...]
    text: str
    right: bool


@dataclass(frozen=True)
class PreferenceTree:
    """Trees of multi-step answers, of which all answers are ranked at once: the data of tree preference optimisation
    (TPO, arXiv 2410.12854), for its loss `tpo`, `plackett_luce` or another of lists.

    model: the policy. branches: how many continuations are sampled at each level: (3, 2) samples three answers, takes
    their distinct first steps, and continues each of these twice; the continuations of the last level are the answers.
    separator: between steps. verifier: whether an answer ends right. set_name, prompts, test_prompts: questions of an
    earlier set, the lowest by hash of (seed, row_id).

    The value of a step is the share of the answers below it that end right; an answer's reward is half whether it ends
    right and half the mean value of its steps at which the tree branched: any right answer is worth more than any wrong
    one, and among wrong ones those that went wrong late are worth more. Rows: pairs of one prompt whose score_chosen
    and score_rejected (in meta) are these rewards, such that a trainer reads the list back from them: each answer
    stands in one of them at least, the best one in most. A tree whose answers are all worth the same gives none.
    Parent: the question's row; parents stay. Judges that drop near-duplicates may thin a list out.
    """

    model: str
    verifier: Verifier
    set_name: str = "sft"
    prompts: int = 100
    test_prompts: int = 0
    branches: tuple[int, ...] = (3, 2)
    separator: str = "\n"
    temperature: float = 1.0
    max_tokens: int = 512
    seed: int = 0

    scope: ClassVar[Literal["maker"]] = "maker"
    consumes: ClassVar[str | None] = None

    def __post_init__(self) -> None:
        if not self.branches or min(self.branches) < 1 or self.max_tokens < 1 or not self.separator:
            raise HouseError(f"{self}: branches are at least 1 each, max_tokens at least 1, separator some text")

    def make(self, corpus: Corpus) -> Iterator[pa.Table]:
        """One table of new rows."""
        counts = {"train": self.prompts, "test": self.test_prompts}
        asked = list(questions(corpus, self.set_name, counts, self.seed))
        made: list[Row] = []
        with Session(self, corpus, self.model, "preference_tree") as session:
            leaves = self._grown(session, asked)
            for question in asked:
                made += self._rows(session, leaves.get(question.row_id, []))
        if made:
            yield table(made)

    def _grown(self, session: Session, asked: Sequence[Question]) -> dict[str, list[_Leaf]]:
        """The distinct answers of each question's tree."""
        nodes: list[tuple[Question, tuple[str, ...]]] = [(one, ()) for one in asked]
        for level in range(len(self.branches) - 1):
            found: dict[tuple[str, str], tuple[Question, tuple[str, ...]]] = {}
            for _, question, path, rest in self._sampled(session, nodes, level):
                own = steps(rest, self.separator)
                if len(own) > 1:  # an answer that is one step is no place to branch at
                    longer = (path[-1] if path else "") + own[0]
                    found.setdefault((question.row_id, " ".join(longer.split())), (question, (*path, longer)))
                else:
                    session.refused("one_step")
            nodes = list(found.values())
        last = self._sampled(session, nodes, len(self.branches) - 1)
        cases = (
            ((said, path, text), question.case(text))
            for said, question, path, rest in last
            for text in [((path[-1] if path else "") + rest).strip()]
        )
        leaves: dict[str, dict[str, _Leaf]] = {}
        for (said, path, text), finding in verified(cases, self.verifier, session.tools):
            if finding.right is None:
                session.refused("verifier_abstains")
                continue
            session.tally.verified += 1
            own_leaves = leaves.setdefault(said.ask.about.row_id, {})
            own_leaves.setdefault(" ".join(text.split()), _Leaf(said, path, text, finding.right))
        return {name: list(own.values()) for name, own in leaves.items()}

    def _sampled(
        self, session: Session, nodes: Sequence[tuple[Question, tuple[str, ...]]], level: int
    ) -> Iterator[tuple[Said, Question, tuple[str, ...], str]]:
        """What is said after each node, as often as the level branches."""
        sampling = Sampling(self.temperature, 1.0, self.max_tokens)
        asks: list[Ask] = []
        for place, (question, path) in enumerate(nodes):
            for draw in range(self.branches[level]):
                seed = ("tree", self.seed, question.row_id, level, draw)
                asks.append(continuation(question, path[-1] if path else "", sampling, seed, place))
        for ask, answer in session.ask(asks):
            if usable(session, answer):
                question, path = nodes[ask.about]
                rest = without_prefix(answer.text, path[-1] if path else "")
                if rest:
                    yield Said(replace(ask, about=question), answer, session), question, path, rest

    def _rows(self, session: Session, leaves: Sequence[_Leaf]) -> list[Row]:
        worth = rewards([leaf.path for leaf in leaves], [leaf.right for leaf in leaves])
        drawn = list_pairs(worth)
        if not drawn:
            session.refused("one_answer" if len(leaves) < 2 else "equal_rewards")
        rows = []
        for i, j in drawn:
            about = {"score_chosen": worth[i], "score_rejected": worth[j], "answers": len(leaves)}
            sides = {name: [message("assistant", leaves[at].text)] for name, at in (("chosen", i), ("rejected", j))}
            rows.append(pair_row(leaves[i].said, leaves[j].said, about, **sides))
        return rows


def rewards(paths: Sequence[tuple[str, ...]], right: Sequence[bool]) -> list[float]:
    """Of each answer (its branching beginnings; whether it ends right) ½ · right + ½ · mean share of right answers
    below its beginnings; without any beginning, whether it is right."""
    below: dict[str, list[bool]] = {}
    for path, good in zip(paths, right, strict=True):
        for node in path:
            below.setdefault(node, []).append(good)
    value = {node: sum(own) / len(own) for node, own in below.items()}
    return [
        0.5 * good + 0.5 * sum(value[node] for node in path) / len(path) if path else float(good)
        for path, good in zip(paths, right, strict=True)
    ]
