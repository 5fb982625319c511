"""Conversations that go on: further user turns and their answers, written by models."""

import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import pyarrow as pa

from ..door import ChatAnswer, Sampling
from ..folder import HouseError
from ..judges.refusal import refusal
from ..preferring import usable
from ..rows import Row, digest, message, table
from ..steps import Corpus
from ..synthesis import Ask, Session, asking, prompt
from ..text.view import normal, words

_ROLE = re.compile(r"\A\W{0,4}(?:user|human|person|me)\W{0,3}:\W{0,3}(?=\w)", re.IGNORECASE)
_OTHER = re.compile(r"\A\W{0,4}(?:assistant|ai|bot|chatbot)\W{0,3}:", re.IGNORECASE)
_PARTING = re.compile(
    r"\W*(?:ok(?:ay)?|great|perfect|awesome|wonderful|got it|i see|oh|well|yes|no)?\W*"
    r"(?:(?:many |no,? )?(?:thanks|thank you|thx|cheers)|good-?bye|bye\b|have a (?:nice|good|great)|see you"
    r"|that(?:'s| is|’s) (?:all|very helpful|helpful|it)|you(?:'re|’re| are) welcome)",
    re.IGNORECASE,
)


@dataclass
class _Talk:
    """A row with the turns that came after it."""

    row: Row
    turns: list[dict[str, str | None]] = field(default_factory=list)
    made: list[tuple[Ask, ChatAnswer, Session]] = field(default_factory=list)  # of each new turn

    @property
    def messages(self) -> list[dict[str, Any]]:
        return [*self.row["messages"], *self.turns]

    def heard(self, role: str) -> list[str]:
        return [turn["content"] or "" for turn in self.messages if turn["role"] == role]


@dataclass(frozen=True)
class ExtendConversation:
    """Conversations extended by up to `turns` further rounds of a user turn and an answer, as UltraChat (arXiv
    2305.14233) and Parrot (arXiv 2310.07301) simulate users: the user's next turn comes from a model that sees the
    conversation with the roles exchanged (prompts/extend_user.md, in our own words), the answer from `model`, which
    sees it as it is.

    model: answers. user: plays the user; None: `model`. set_name: conversations of an earlier set, its split train;
    None: the live rows of this set. limit: conversations at most, the lowest by hash of (seed, row_id). Only rows with
    turns of system, user and assistant in alternation, ending with an answer and without calls of tools or a preference
    are extended; the step's record counts the others (not_extended), and conversations by the rounds that they got.
    user_tokens, max_tokens: of a user turn, of an answer.

    A conversation ends early, and keeps the rounds that were completed: where the user's turn is a parting or thanks
    (parting), says an earlier turn again (repeats: at least `similarity` of the words of both are shared), speaks as
    the assistant (plays_assistant); where the answer refuses (refusal) or says an earlier
    answer again (repeats_answer); where either is empty or cut by its limit. A row is made where one round at least was
    completed: its old turns, spans and their weights, and tools are as they were; it ends with an answer. Parent the
    old row, which leaves with reason extended; meta: as the old row's, with extended (rounds) and turns_made (the
    origin of each new turn).
    """

    model: str
    user: str | None = None
    set_name: str | None = None
    limit: int | None = None
    turns: int = 2
    similarity: float = 0.8
    temperature: float = 0.8
    top_p: float = 0.95
    user_tokens: int = 128
    max_tokens: int = 512
    seed: int = 0

    scope: ClassVar[Literal["maker"]] = "maker"
    consumes: ClassVar[str | None] = "extended"

    def __post_init__(self) -> None:
        if min(self.turns, self.user_tokens, self.max_tokens) < 1:
            raise HouseError(f"{self}: turns, user_tokens and max_tokens are at least 1")
        if not 0 < self.similarity <= 1 or (self.limit is not None and self.limit < 0):
            raise HouseError(f"{self}: similarity is above 0 and at most 1; limit at least 0, or null")

    @property
    def models(self) -> tuple[str, ...]:
        """Further models whose words become rows."""
        return () if self.user in (None, self.model) else (self.user or "",)

    def make(self, corpus: Corpus) -> Iterator[pa.Table]:
        """One table of new rows."""
        talks = [_Talk(row) for row in self._rows(corpus)]
        with Session(self, corpus, self.model, "extend_conversation") as session:
            user = session if self.user is None else session.beside(self.user)
            going = talks
            for turn in range(self.turns):
                asked = self._user_turns(user, going, turn)
                going = self._answers(session, asked, turn)
            made = [_row(session, talk) for talk in talks if talk.turns]
            rounds = Counter(len(talk.turns) // 2 for talk in talks)
            corpus.record(rounds={str(count): rounds[count] for count in sorted(rounds)})
        if made:
            yield table(made)

    def _rows(self, corpus: Corpus) -> list[Row]:
        """The rows to extend."""
        parts = corpus.tables() if self.set_name is None else corpus.tools.curated(self.set_name, "train")
        rows = [row for part in parts for row in part.to_pylist()]
        fit = [row for row in rows if extendable(row)]
        corpus.record(not_extended=len(rows) - len(fit))
        if self.limit is not None:
            fit = sorted(fit, key=lambda row: digest("extend", str(self.seed), row["row_id"]))[: self.limit]
        return fit

    def _user_turns(self, user: Session, going: list[_Talk], turn: int) -> list[tuple[_Talk, str, Ask, ChatAnswer]]:
        """What the user says next in each conversation that goes on."""
        form, sampling = prompt("extend_user"), Sampling(self.temperature, self.top_p, self.user_tokens)
        asks = []
        for talk in going:
            name = talk.row["row_id"]
            key = ("extend", self.seed, name, turn, "user")
            asks.append(asking(form, exchanged(form.turns(), talk.messages), sampling, key, (name,), talk))
        found = []
        for ask, answer in user.ask(asks):
            said = _ROLE.sub("", answer.text.strip())
            if usable(user, answer):
                problem = ends(said, ask.about.heard("user"), ask.about.heard("assistant"), self.similarity)
                if problem is None:
                    found.append((ask.about, said, ask, answer))
                else:
                    user.refused(problem)
        return found

    def _answers(self, session: Session, asked: list[tuple[_Talk, str, Ask, ChatAnswer]], turn: int) -> list[_Talk]:
        """The conversations whose new user turn was answered, both turns added."""
        sampling = Sampling(self.temperature, self.top_p, self.max_tokens)
        user = session if self.user is None else session.beside(self.user)
        asks = []
        for place, (talk, said, _, _) in enumerate(asked):
            name = talk.row["row_id"]
            turns = (*((one["role"], one["content"] or "") for one in talk.messages), ("user", said))
            asks.append(asking(None, turns, sampling, ("extend", self.seed, name, turn, "answer"), (name,), place))
        going = []
        for ask, answer in session.ask(asks):
            talk, said, user_ask, user_answer = asked[ask.about]
            if not usable(session, answer):
                continue
            reply = answer.text.strip()
            same = any(alike(reply, one, self.similarity) for one in talk.heard("assistant"))
            if same or refusal(said, reply) is not None:
                session.refused("repeats_answer" if same else "refusal")
                continue
            talk.turns += [message("user", said), message("assistant", reply)]
            talk.made += [(user_ask, user_answer, user), (ask, answer, session)]
            going.append(talk)
        return going


def extendable(row: Mapping[str, Any]) -> bool:
    """Whether a row is a conversation of alternating turns that ends with an answer and calls no tool."""
    turns = list(row["messages"] or ())
    said = turns[1:] if turns and turns[0]["role"] == "system" else turns
    roles = [turn["role"] for turn in said]
    plain = row["chosen"] is None and row["rejected"] is None and not any(turn["tool_calls"] for turn in turns)
    words_said = all((turn["content"] or "").strip() for turn in said)
    return plain and words_said and len(roles) > 1 and roles == ["user", "assistant"] * (len(roles) // 2)


def exchanged(opening: tuple[tuple[str, str], ...], turns: list[dict[str, Any]]) -> tuple[tuple[str, str], ...]:
    """The conversation as who plays the user sees it: after the opening, roles exchanged, without a system turn."""
    other = {"user": "assistant", "assistant": "user"}
    return (*opening, *((other[one["role"]], one["content"] or "") for one in turns if one["role"] in other))


def ends(said: str, asked: list[str], answered: list[str], similarity: float) -> str | None:
    """Why a conversation ends with this user turn, or None."""
    if _OTHER.match(said):
        return "plays_assistant"
    if _PARTING.match(said) and "?" not in said:
        return "parting"
    again = any(alike(said, one, similarity) for one in (*asked, *answered))
    return "repeats" if again else None


def alike(one: str, other: str, similarity: float) -> bool:
    """Whether two texts are the same, or share at least so much of their words (Jaccard)."""
    if normal(one) == normal(other):
        return True
    first, second = set(words(one)), set(words(other))
    return bool(first | second) and len(first & second) >= similarity * len(first | second)


def _row(session: Session, talk: _Talk) -> Row:
    """The extended conversation."""
    meta = json.loads(talk.row["meta"] or "{}")
    about = dict(meta) if isinstance(meta, dict) else {"meta": meta}
    about |= {"extended": len(talk.turns) // 2}
    about |= {"turns_made": [asked.origin(ask, answer) for ask, answer, asked in talk.made]}
    old = {name: talk.row[name] for name in ("label", "tools", "spans")}
    ask, answer, _ = talk.made[-1]
    return session.row(ask, answer, about, messages=talk.messages, **old)
