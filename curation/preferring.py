"""What makers of preferences share: the prompts they ask, answers verified while others are still asked, verdicts of a
judge that are heard twice, and which two answers make a pair."""

import heapq
import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

from .asking import again, exchange
from .beside import verified
from .door import ChatAnswer, Sampling
from .rows import digest, message
from .steps import Corpus
from .synthesis import Ask, Session, asking
from .text.view import normal
from .verifying import Case, Finding, Verifier

Turns = tuple[tuple[str, str], ...]
T = TypeVar("T")


@dataclass(frozen=True)
class Question:
    """A prompt that answers are sampled for. prompt: its turns as a row has them. reference: the known answer."""

    row_id: str
    prompt: tuple[Mapping[str, Any], ...]
    reference: str | None = None
    meta: Mapping[str, Any] = field(default_factory=dict)

    @property
    def turns(self) -> Turns:
        """As a chat request has them."""
        return tuple((turn["role"], turn["content"] or "") for turn in self.prompt)

    @property
    def said(self) -> str:
        """As one text: a lone user turn as it is, several with the name of who speaks."""
        turns = self.turns
        return turns[0][1] if len(turns) == 1 else "\n\n".join(f"{role}: {content}" for role, content in turns)

    def case(self, answer: str) -> Case:
        """The answer as a verifier takes it."""
        return Case(self.said, answer, self.reference, self.meta)


@dataclass(frozen=True)
class Said:
    """An answer with the request that it answers and the session that asked."""

    ask: Ask
    answer: ChatAnswer
    session: Session

    @property
    def text(self) -> str:
        return self.answer.text.strip()


def question_of(row: Mapping[str, Any]) -> Question | None:
    """The prompt of a row: the turns before its last assistant turn, which is the reference; of a preference row its
    prompt and `chosen`; of a row without an answer all its turns. None where no one asks anything."""
    found = exchange(row)
    turns = list(row["messages"] or ())
    if found is not None:
        turns, reference = turns[: len(found.turns)], found.response
    else:
        reference = None
    if not turns or turns[-1]["role"] == "assistant" or not any((turn["content"] or "").strip() for turn in turns):
        return None
    meta = json.loads(row["meta"] or "{}")
    return Question(row["row_id"], tuple(turns), reference, meta if isinstance(meta, dict) else {})


def questions(corpus: Corpus, set_name: str, counts: Mapping[str, int], seed: int) -> Iterator[Question]:
    """Of each split of an earlier set as many prompts as `counts` says, the rows lowest by hash of (seed, row_id); rows
    that ask nothing are passed over. Rows of one prompt are asked once."""
    columns = ["row_id", "messages", "chosen", "rejected", "meta"]
    for split, count in counts.items():
        if not count:
            continue
        rows = (row for part in corpus.tools.curated(set_name, split) for row in part.select(columns).to_pylist())
        asked = (found for row in rows if (found := question_of(row)) is not None)
        first: dict[str, Question] = {}
        for one in asked:
            name = digest(*(piece for turn in one.turns for piece in turn))
            if one.row_id < first.setdefault(name, one).row_id:  # the same row stands for its prompt in any order
                first[name] = one
        yield from heapq.nsmallest(count, first.values(), key=lambda one: digest(str(seed), one.row_id))


def samples(asked: Iterable[Question], count: int, sampling: Sampling, seed: object) -> list[Ask]:
    """`count` requests for each question, each with a seed of its own; about = the question."""
    return [
        asking(None, one.turns, sampling, (seed, one.row_id, draw), (one.row_id,), one)
        for one in asked
        for draw in range(count)
    ]


def usable(session: Session, answer: ChatAnswer, *, cut: bool = False) -> bool:
    """Whether an answer says something and came to its end (cut: or not); counted either way."""
    problem = "empty" if not answer.text.strip() else "cut" if not (answer.finished or cut) else None
    if problem is None:
        session.tally.parsed += 1
    else:
        session.unparsed(problem)
    return problem is None


def sampled(
    session: Session, asks: Sequence[Ask], verifier: Verifier, *, cut: bool = False
) -> list[tuple[Said, Finding]]:
    """Answers that say something, with what the verifier finds of them: of asks about questions."""
    came = (
        (Said(ask, answer, session), ask.about.case(answer.text))
        for ask, answer in session.ask(asks)
        if usable(session, answer, cut=cut)
    )
    found = list(verified(came, verifier, session.tools))
    session.tally.verified += sum(finding.right is not None for _, finding in found)
    return found


def heard(session: Session, asks: Sequence[Ask], read: Callable[[ChatAnswer], T | None]) -> list[T | None]:
    """What `read` makes of each answer; an answer that it cannot read is asked for once more with another seed. None
    where that failed too, or the request did: an abstention."""
    found: list[T | None] = [None] * len(asks)
    places = {id(ask): place for place, ask in enumerate(asks)}
    unread = []
    for ask, answer in session.ask(asks):
        value = found[places[id(ask)]] = read(answer)
        _count(session, value)
        if value is None:
            unread.append(places[id(ask)])
    second = [replace(asks[place], request=again(asks[place].request)) for place in unread]
    places = {id(ask): place for ask, place in zip(second, unread, strict=True)}
    for ask, answer in session.ask(second):
        value = found[places[id(ask)]] = read(answer)
        _count(session, value)
    return found


def _count(session: Session, value: object) -> None:
    if value is None:
        session.unparsed("no_verdict")
    else:
        session.tally.parsed += 1


def of_length(one: str, other: str, ratio: float | None) -> bool:
    """Whether the longer text has at most `ratio` times the characters of the shorter one; None: any."""
    short, long = sorted((len(one.strip()), len(other.strip())))
    return ratio is None or long <= ratio * short


def distinct(texts: Iterable[T], text: Callable[[T], str]) -> list[T]:
    """Without those that say what an earlier one said, but for case, width and white space."""
    seen: set[str] = set()
    kept = []
    for one in texts:
        name = normal(text(one))
        if name not in seen:
            seen.add(name)
            kept.append(one)
    return kept


def matched(
    good: Sequence[str], bad: Sequence[str], most: int, seed: Sequence[object], ratio: float | None = None
) -> list[tuple[int, int]]:
    """At most `most` pairs (place in `good`, place in `bad`) of fitting lengths, drawn by a hash of `seed`; an answer
    stands in a second pair only when every pair would repeat one."""
    fitting = [(i, j) for i, one in enumerate(good) for j, other in enumerate(bad) if of_length(one, other, ratio)]
    drawn = sorted(fitting, key=lambda pair: digest(*map(str, seed), good[pair[0]], bad[pair[1]]))
    uses: Counter[tuple[str, int]] = Counter()
    pairs: list[tuple[int, int]] = []
    while drawn and len(pairs) < most:
        best = min(drawn, key=lambda pair: uses["good", pair[0]] + uses["bad", pair[1]])
        drawn.remove(best)
        pairs.append(best)
        uses.update((("good", best[0]), ("bad", best[1])))
    return pairs


def pair_row(chosen: Said, rejected: Said, meta: Mapping[str, Any], /, **content: Any) -> dict[str, Any]:
    """A preference row of two answers to one question, with the origin of both: `made` is the chosen one's,
    `rejected_made` the other's."""
    question: Question = chosen.ask.about
    about = dict(meta) | {"rejected_made": rejected.session.origin(rejected.ask, rejected.answer)}
    sides = {
        name: [message("assistant", side.text)] for name, side in (("chosen", chosen), ("rejected", rejected))
    } | content
    return chosen.session.row(chosen.ask, chosen.answer, about, messages=list(question.prompt), **sides)


def grouped(found: Iterable[T], name: Callable[[T], str]) -> dict[str, list[T]]:
    """Things by name, in the order in which they came."""
    groups: dict[str, list[T]] = {}
    for one in found:
        groups.setdefault(name(one), []).append(one)
    return groups


def list_pairs(rewards: Sequence[float]) -> list[tuple[int, int]]:
    """Pairs (better, worse) through which a trainer reads a list of answers with these rewards back: each answer in at
    least one, none of equals, as few as that takes (the best against each that is worse; others that share the best's
    place against the worst). Empty where all are worth the same."""
    if not rewards or min(rewards) == max(rewards):
        return []
    order = sorted(range(len(rewards)), key=lambda place: -rewards[place])
    best, worst = order[0], order[-1]
    return [(best, one) if rewards[one] < rewards[best] else (one, worst) for one in order[1:]]
