"""Sessions: every request accounted for, answers in order whatever comes first, rows that say where they come from."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import pytest

from gristmill.curation.beside import verified
from gristmill.curation.door import ChatAnswer, ChatError, ChatRequest, Sampling
from gristmill.curation.folder import HouseError
from gristmill.curation.rows import message
from gristmill.curation.synthesis import Prompt, Session, asking, prompt
from gristmill.curation.verifiers.judge import JudgedRight
from gristmill.curation.verifying import Case


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


class Judge(Door):
    """Says yes to what is in capitals, nothing of use to `odd`; fails as its maker does."""

    name, price = "judge", (2.0, 20.0)

    def answer(self, request: ChatRequest) -> ChatAnswer | ChatError:
        said = request.messages[-1][1]
        if "lost" in said:
            return ChatError("server", "500")
        return ChatAnswer("Verdict: yes" if "odd" not in said else "Who knows?", 50, 5, True)


class Court(Corpus):
    """A corpus with a judge beside the door."""

    def chat(self, model: str) -> Door:
        return Judge() if model == "judge" else self.door


def test_what_a_verifier_asks_is_counted_apart() -> None:
    corpus, texts, judge = Court(Door()), [*map(str, range(70)), "odd", "lost"], JudgedRight("judge")
    lost = pytest.warns(UserWarning, match="Maker: 2 server of 144 requests of its judge failed")
    with lost, Session(Maker(), corpus, "m", "x") as at:  # type: ignore[arg-type]
        said = ((ask, Case("q", answer.text + ask.about, ask.about)) for ask, answer in at.ask(asks(*texts)))
        found = list(verified(said, judge, at.tools))
        at.row(found[0][0], None, messages=[message("user", "A")])
        at.tally.parsed += 72
    assert [finding.right for _, finding in found] == [True] * 70 + [None] * 2
    assert found[-1][1].detail == "judged server, server" and found[-2][1].detail == "judged no_verdict, no_verdict"
    told = corpus.facts["synthesis"]
    assert (told["asked"], told["answered"], told["failed"], told["prompt_tokens"]) == (72, 72, {}, 7200)
    assert told["judged"] == {
        "asked": 144, "answered": 142, "failed": {"server": 2}, "parsed": 140, "unparsed": {"no_verdict": 2},
        "cached": 0, "prompt_tokens": 7100, "tokens": 710, "model": "judge",
        "cost": pytest.approx(142 * (50 * 2.0 + 5 * 20.0) / 1e6),
    }  # fmt: skip


def test_a_maker_whose_verifier_asks_no_model_has_nothing_judged() -> None:
    corpus = Corpus(Door())
    with Session(Maker(), corpus, "m", "x") as at:  # type: ignore[arg-type]
        (one,) = at.ask(asks("a"))
        assert [f.right for _, f in verified([(one, Case("q", "a", "a"))], JudgedRight("m"), at.tools)] == [True]
        at.row(*one, messages=[message("user", "A")])
    assert "judged" not in corpus.facts["synthesis"]


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
