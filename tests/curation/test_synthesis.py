"""Sessions: every request accounted for, answers in order whatever comes first, rows that say where they come from."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import pytest

from gristmill.curation.door import ChatAnswer, ChatError, ChatRequest, Sampling
from gristmill.curation.folder import HouseError
from gristmill.curation.rows import message
from gristmill.curation.synthesis import Prompt, Session, asking, prompt


@dataclass(frozen=True)
class Maker:
    """Its repr is what rows carry."""

    style: str = "plain"


class Door:
    """Answers with the last turn in capitals; `fail` fails; `old` was paid for before."""

    name, digest, licence, price = "small", "d1", "MIT", (1.0, 10.0)

    def answer(self, request: ChatRequest) -> ChatAnswer | ChatError:
        said = request.messages[-1][1]
        if said == "fail":
            return ChatError("timeout", "60 s")
        return ChatAnswer(said.upper(), 100, 10, True, cached=said == "old")

    def complete(self, requests: Sequence[ChatRequest], progress: Any = None) -> list[ChatAnswer | ChatError]:
        return [self.answer(request) for request in requests]


class Backwards(Door):
    """The last answer comes first."""

    def stream(self, requests: Sequence[ChatRequest]) -> Iterator[tuple[int, ChatAnswer | ChatError]]:
        for place in reversed(range(len(requests))):
            yield place, self.answer(requests[place])


class Corpus:
    """A corpus for makers that look at no row."""

    def __init__(self, door: Door) -> None:
        self.door, self.facts, self.told = door, {}, []  # type: ignore[var-annotated]
        self.tools = self

    def chat(self, model: str) -> Door:
        return self.door

    def progress(self, done: int, total: int) -> None:
        self.told.append((done, total))

    def record(self, **facts: Any) -> None:
        self.facts |= facts


def asks(*texts: str) -> list[Any]:
    return [asking(None, (("user", text),), Sampling(), (0, text), (f"p-{text}",), text) for text in texts]


@pytest.mark.parametrize("door", [Door(), Backwards()])
def test_every_request_is_counted_and_answers_keep_their_order(door: Door) -> None:
    corpus = Corpus(door)
    with pytest.warns(UserWarning, match=r"1 timeout of 4 requests failed"), Session(Maker(), corpus, "m", "x") as at:  # type: ignore[arg-type]
        answers = list(at.ask(asks("a", "fail", "old", "b")))
        assert [(ask.about, answer.text) for ask, answer in answers] == [("a", "A"), ("old", "OLD"), ("b", "B")]
        at.tally.parsed += 2
        at.unparsed("no_question")
        at.refused("too_easy")
        row = at.row(*answers[0], {"topic": "t"}, messages=[message("user", "A")])
    told = corpus.facts["synthesis"]
    assert told["asked"] == 4 == told["answered"] + sum(told["failed"].values()) and told["failed"] == {"timeout": 1}
    assert told["answered"] == told["parsed"] + sum(told["unparsed"].values()) and told["made"] == 1
    assert (told["tokens"], told["cached"], told["refused"]) == (30, 1, {"too_easy": 1})
    assert told["cost"] == pytest.approx(2 * (100 * 1.0 + 10 * 10.0) / 1e6)  # the cached one is not paid for again
    made = json.loads(row["meta"])
    assert made["topic"] == "t" and row["parents"] == ["p-a"] and row["maker"] == "Maker(style='plain')"
    assert {"model": "small", "licence": "MIT", "model_digest": "d1"}.items() <= made["made"].items()
    assert made["made"]["sampling"]["temperature"] == 0.8 and made["made"]["seed"] == answers[0][0].request.seed


def test_a_maker_that_made_nothing_says_why() -> None:
    corpus = Corpus(Door())
    said = r"Maker made no row: 2 requests; 1 no_question, 1 timeout"
    with pytest.warns(UserWarning, match=said), Session(Maker(), corpus, "m", "x") as at:  # type: ignore[arg-type]
        for _ in at.ask(asks("a", "fail")):
            at.unparsed("no_question")
    assert corpus.facts["synthesis"]["made"] == 0


def test_prompts_fill_every_placeholder_and_nothing_else() -> None:
    both = Prompt("p", "You are {who}.\n---\nSay {what}: {{json}}")
    said = (("system", "You are a {x}."), ("user", "Say }: {json}"))
    assert both.turns(who="a {x}", what="}") == said
    assert Prompt("q", "Say {what}").turns(what="it") == (("user", "Say it"),)
    with pytest.raises(ValueError, match=r"placeholders \['what', 'who'\], given \['who'\]"):
        both.turns(who="a")
    assert both.digest != Prompt("p", both.text + " ").digest
    with pytest.raises(HouseError, match="no prompt 'absent'"):
        prompt("absent")


def test_seeds_depend_on_what_is_asked_alone() -> None:
    one, two, again = asks("a", "b", "a")
    assert one.request.seed == again.request.seed != two.request.seed
