"""A judge of refusals: responses in which an assistant declines, or speaks of itself instead of answering."""

import re
from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from ..flags import flagged
from ..steps import Unmeasured
from .requests import known_classes

# Every pattern is anchored at the response's first character: "I'm sorry" inside a story, a letter or a quotation is no
# refusal. Apostrophes are straight and white space is single by then; case does not matter.
_AI = (  # "AI", "responsible and ethical AI assistant", "language model AI"; not "AI researcher", "pioneer in AI"
    r"(?:(?!(?:in|of|for|with|on|at|to|by|from|using)\b)\w+[ -]){0,4}?"
    r"(?:a\.?i\.?|artificial intelligence|language model|llm|(?:chat)?bot|virtual assistant)\b"
    r"(?: \(?(?:ai|llm|language|chat|text|based|model|assistant|system|program|bot|chatbot)\b\)?)*"
)
_THEN = r"(?:[,.;:]| (?:i|and|so|but|that|who|which|with|without|to|designed|developed|trained|created|programmed)\b|$)"
_SORRY = (
    r"(?:(?:hello|hi|no)[.!,]* )?(?:i(?:'m| am) (?:\w+ )?(?:sorry|afraid)|(?:so |very )?sorry|i (?:\w+ )?apologi[sz]e"
    r"|unfortunately|my apologies)(?: for (?:the|any|my) \w+)?[,.!]? (?:but |however,? |that )?"
)
_UNABLE = (
    r"(?:(?:really |just )?(?:can't|cannot|can not|couldn't|won't|will not)"
    r"|(?:am |'m )(?:just )?(?:unable|not (?:currently )?(?:able|going|allowed|programmed|comfortable|capable))"
    r"(?: of| to| with)?)"
)
_SERVE = (
    r"(?: (?:be able to|directly|really|actually|accurately))?"
    r" (?:help|assist|answer|provid|fulfil|compl|generat|creat|execut|access|brows|search|retriev|draw|discuss|engag"
    r"|shar|recommend|support|advis|continu|perform|process|analy[sz]|classif|identif|estimat|give (?:you|out)"
    r"|tell you|do (?:that|this)|play|display|view|open|see|set up|writ|respond|participat|condon|promot|encourag)"
)
_MODEL = r"(?:gpt|(?:ai|language|the|this) models?\b)"

# I decline. Kept where the prompt asks for words that may well be an apology or a refusal (see _DRAFT).
_DECLINES = {
    "sorry_unable": rf"{_SORRY}i ?{_UNABLE}{_SERVE}",
    "unable": rf"i ?{_UNABLE} (?:help|assist|answer|fulfil|comply|provide (?:a |an |you |any |the )|set up|engage in"
    r"|participate in|discuss|condone|generate a |create a |share (?:that|this|personal))",
    "no_material": rf"{_SORRY}(?:(?:you|the (?:prompt|input|question)) (?:did not|didn't|have not|haven't|need to"
    r"|does not|doesn't) (?:provide|specif|includ|giv|mention|suppl)|there (?:is|are|was|were) no [\w ]{3,60}"
    r"(?:provided|given|specified))",
    "first_sentence": r"[^.!?]{0,80}[.!,] i (?:can't|cannot|won't) (?:help|assist)(?: you)?(?: with)?"
    r"(?: that| this| it)?[.!]",
}
# I am a machine. Kept where the prompt asks about machines.
_SPEAKS_OF_ITSELF = {
    "as_an_ai": rf"(?:{_SORRY})?(?:well,? |however,? )?as an? {_AI}(?:,| (?=i\b)).{{0,60}}?\b(?:i|my|me)\b",
    "i_am_an_ai": rf"(?:{_SORRY})?(?:while |although |since )?i(?:'m| am) (?:just |only |merely )?an? {_AI}(?={_THEN})",
}
# The annotator's note in place of an answer (Alpaca's "Sorry, the task requires a visual output").
_NOT_FOR_A_MODEL = {
    "sorry_task": r"sorry,? (?:but )?(?:the|this) (?:task|instruction|request)\b",
    "not_for_a_model": r"(?:this|the|your|you are) (?:type of )?(?:task|instruction|request(?:ing)?)\b[^.]{0,100}\b"
    rf"(?:cannot|can't|not|unable)\b[^.]{{0,60}}\b{_MODEL}",
}
_DRAFT = re.compile(
    r"\b(?:apolog|sorry|excuse|refus|declin|reject|repl[yi]|respon[ds]|customer|dialogue|conversation|rewrit|rephras"
    r"|reword|paraphras|translat|sentence|role-?play|script|e-?mail|letter|message|complain|tone\b|phrase|quote|speech)",
    re.IGNORECASE,
)
_MACHINE = re.compile(
    r"\b(?:a\.?i|artificial|language model|llm|gpt|(?:chat)?bot|robot|android|assistant|machine|you are a)\b", re.I
)


def _compiled(patterns: dict[str, str]) -> dict[str, re.Pattern[str]]:
    return {name: re.compile(pattern, re.IGNORECASE) for name, pattern in patterns.items()}


_RULES = (
    (_compiled(_NOT_FOR_A_MODEL), None),
    (_compiled(_SPEAKS_OF_ITSELF), _MACHINE),
    (_compiled(_DECLINES), _DRAFT),
)
_HEAD = 320  # characters of the response that are looked at; of a long prompt, as many at either end
# What RE2 looks for before Python looks closely: a word of each rule that no match can be without.
_LOOK = (
    r"(?i)\bcan.?t\b|cannot|\bcan[^!-~]+not|couldn|\bwon.?t\b|will[^!-~]+not|unable|not[^!-~]+(?:currently[^!-~]+)?(?:able"
    r"|going|allowed|programmed|comfortable|capable)|sorry|afraid|apolog|unfortunately|\ba\.?i\b|artificial|language"
    r"|\bllm|bot\b|virtual|\bgpt|model"
)


@dataclass(frozen=True)
class Refusal(Unmeasured):
    """Drops rows whose response declines ("I'm sorry, but I can't help with that") or opens with what the assistant is
    ("As an AI language model, I …"), in English. Reason: refusal; evidence: {matched, rule}.

    Looks at the response's first words alone, so that an apology inside a story, a letter or a dialogue is kept; a
    first-person refusal is kept where the prompt asks for such words (an excuse, a reply to a customer, a rewritten
    sentence), and talk about AI where the prompt asks about AI. Of a preference row `chosen` is judged. A refusal can
    be the right answer: leave this judge out of sets that teach harmlessness (of hh-rlhf's harmless answers it drops
    one in seventy).
    """

    scope: ClassVar[Literal["row"]] = "row"

    def judge(self, rows: pa.Table, values: pa.Table) -> pa.Table:
        """Verdicts, aligned with `rows`. A raw document is kept."""
        from ..text.texts import at, matching, texts

        prompts, responses = texts(rows, "prompt"), texts(rows, "response")
        likely = matching(pc.utf8_slice_codeunits(responses, 0, _HEAD), _LOOK) & ~rows["text"].is_valid().to_numpy()
        look = np.flatnonzero(likely)
        found = {}
        for row, prompt, response in zip(look.tolist(), at(prompts, look), at(responses, look), strict=True):
            proof = refusal(prompt, response)
            if proof is not None:
                found[row] = "refusal", proof
        return flagged(rows.num_rows, found)


def refusal(prompt: str, response: str) -> dict[str, str] | None:
    """The words by which `response` is a refusal and the rule that knows them, or None."""
    head = " ".join(response[:_HEAD].replace("’", "'").split())
    for patterns, excuse in _RULES:
        for name, pattern in patterns.items():
            match = pattern.match(head)
            if match and not (excuse and excuse.search(prompt[:_HEAD] + " " + prompt[-_HEAD:])):
                return {"matched": match[0], "rule": name}
    return None


_BOILERPLATE: dict[str, str] = {  # English; matched from the response's first word, anywhere, or in its last words
    "opening": r"\A\W*(?:sure(?: thing)?|certainly|absolutely|of course|definitely|great question|good question"
    r"|no problem"
    r"|okay|i(?:'d| would) be (?:happy|glad|delighted) to)\b[^\n.!?:]{0,20}(?:[,!.:]|-|—|\bto\b|\bhelp\b)[^\n]{0,20}?"
    r"(?:\b(?:here(?:'s| is| are)|let me|let's|i(?:'d| would) be|i(?:'ll| will| can)|below (?:is|are)"
    r"|help(?: you)?)\b)",
    "as_an_ai": rf"\b(?:as an? {_AI}(?:,| (?=i\b)).{{0,60}}?\b(?:i|my|me)\b|my (?:training data|knowledge cut-?off)\b"
    r"|(?:created|trained|developed) by openai\b|i am chatgpt\b)",
    "closing": r"(?:\bi? ?hope (?:this|that|it|these)(?: \w+){0,2} (?:helps?|useful|helpful|answers)\b"
    r"|\blet me know (?:if|how|what) (?:you|there|i)\b|\bfeel free to (?:ask|reach out|let me)\b"
    r"|\b(?:if you have|do you have) any (?:other|more|further|additional|questions)\b"
    r"|\b(?:is there )?anything else (?:i can|you(?:'d| would) like|you need)\b"
    r"|\bdon't hesitate to\b)[^\n]{0,100}\W*\Z",
}
BOILERPLATE = tuple(_BOILERPLATE)
_BOILERPLATE_RULES = _compiled(_BOILERPLATE)
_TAIL = 240  # characters of the response in which a closing is looked for
_LOOK_BOILERPLATE = (
    r"(?i)^[^a-z]*(?:sure|certainly|absolutely|of course|definitely|great question|good question|no problem|okay"
    r"|i.d be|i would"
    r" be)|\bas[^!-~]an? |training data|knowledge cut|openai|chatgpt|\bhope |let me know|feel free|if you have"
    r"|do you have"
    r"|anything else|hesitate"
)


@dataclass(frozen=True)
class Boilerplate(Unmeasured):
    """Drops rows whose response carries an assistant's phrases, which teach a manner and no matter, in English.

    classes (default all; each is a reason): opening ("Sure! Here is", "I'd be happy to help"), as_an_ai ("As an AI
    language model, I" anywhere), closing ("I hope this helps", "Let me know if you have any questions" in the last 240
    characters). Kept where the prompt asks for such words (a letter, a dialogue) or, for as_an_ai, about machines. Of a
    preference row `chosen` is judged; a raw document is kept. Evidence: {matched}. Answers of today's assistants open
    so by the thousand: look at the funnel before you drop them.
    """

    classes: tuple[str, ...] = BOILERPLATE

    scope: ClassVar[Literal["row"]] = "row"

    def __post_init__(self) -> None:
        known_classes(self, self.classes, BOILERPLATE)

    def judge(self, rows: pa.Table, values: pa.Table) -> pa.Table:
        """Verdicts, aligned with `rows`."""
        from ..text.texts import at, matching, texts

        prompts, responses = texts(rows, "prompt"), texts(rows, "response")
        look = np.flatnonzero(matching(responses, _LOOK_BOILERPLATE) & ~rows["text"].is_valid().to_numpy())
        found = {}
        for row, prompt, response in zip(look.tolist(), at(prompts, look), at(responses, look), strict=True):
            one = boilerplate(prompt, response, self.classes)
            if one is not None:
                found[row] = one[0], {"matched": one[1]}
        return flagged(rows.num_rows, found)


def boilerplate(prompt: str, response: str, classes: tuple[str, ...] = BOILERPLATE) -> tuple[str, str] | None:
    """The first of `classes` whose phrases the response has, and the phrase, or None."""
    asked = prompt[:_HEAD] + " " + prompt[-_HEAD:]
    plain = response.replace("’", "'")
    for name in classes:
        excuse = _MACHINE if name == "as_an_ai" else _DRAFT
        text = plain[-_TAIL:] if name == "closing" else plain
        match = _BOILERPLATE_RULES[name].search(text)
        if match and not excuse.search(asked):
            return name, " ".join(match[0].split())[:200]
    return None
