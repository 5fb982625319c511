"""The task types of Bonito (arXiv 2402.18334): what is asked of a model about a text, how its answer is read, what of
it can be checked without a model, and how it becomes an instruction and a response."""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from .asking import seed_of
from .text.labelled import first_line, labelled
from .text.view import normal, words

Fields = Mapping[str, str]
YES_NO = ("yes", "no")
_PLACEHOLDER = re.compile(r"<[^<>\n]{3,}>|\[[^\[\]\n]{3,}\]|\.{3,}|…")
_OPTION = re.compile(r"^[ \t>*\-]*\(?([A-Ha-h])[).:][*]*[ \t]+(\S.*?)[ \t]*$", re.M)


@dataclass(frozen=True)
class TextTask:
    """name, and short as Bonito's authors abbreviate it. labels: of the lines asked for; those in `long` may run over
    several lines. check: what is wrong with the fields, given the text, or None. choices: the answers there are, if
    `Answer` is one of a few. phrasings: instructions with {context} and the fields in lower case, _ for a space; which
    is drawn by a hash. response: the field that answers."""

    name: str
    short: str
    labels: tuple[str, ...]
    phrasings: tuple[str, ...]
    check: Callable[[Fields, str], str | None]
    response: str = "Answer"
    long: tuple[str, ...] = ()
    choices: tuple[str, ...] = ()
    proven: bool = False  # the response stands in the text, which `check` looks up


@dataclass(frozen=True)
class Exercise:
    instruction: str
    response: str


def read(task: TextTask, said: str, finished: bool) -> dict[str, str] | str:
    """The fields of an answer, or why it has none: no_LABEL, placeholder, cut, no_choice, few_options."""
    if not said.strip():
        return "empty"
    found = labelled(said, task.labels)
    values: dict[str, str] = {}
    for label in task.labels:
        value = found.values.get(label, "")
        values[label] = value if label in task.long else first_line(value)
        if not values[label]:
            return f"no_{label.lower().replace(' ', '_')}"
        if _PLACEHOLDER.fullmatch(values[label]):
            return "placeholder"
        open_ended = found.last == label and (label in task.long or "\n" not in value)
        if open_ended and not finished:
            return "cut"
    if task.choices:
        choice = one_of(values["Answer"], task.choices)
        if choice is None:
            return "no_choice"
        values["Answer"] = choice.capitalize()
    if "Options" in task.labels:
        return _with_option(values)
    return values


def one_of(answer: str, choices: Sequence[str]) -> str | None:
    """The choice that an answer is, or begins with before a mark: `Yes, because …` is yes, `No one` is none."""
    said = answer.strip().strip("*_`\"'()").casefold()
    for choice in choices:
        if re.match(rf"{re.escape(choice.casefold())}[*_`\"')]*(?:\s*[.,;:!(—–-]|\s*$)", said):
            return choice
    return None


def options(text: str) -> list[str]:
    """The texts of lettered options, if they are lettered from A on without a gap."""
    found = [(mark[1].upper(), mark[2]) for mark in _OPTION.finditer(text)]
    return [said for _, said in found] if [letter for letter, _ in found] == list("ABCDEFGH"[: len(found)]) else []


def _with_option(values: dict[str, str]) -> dict[str, str] | str:
    """The fields of a question with options, each option and the answer in one form; or why not."""
    listed = options(values["Options"])
    if len(listed) < 2 or len({normal(one) for one in listed}) < len(listed):
        return "few_options"
    lettered = [f"{'ABCDEFGH'[place]}) {one}" for place, one in enumerate(listed)]
    chosen = _chosen(values["Answer"], listed)
    if chosen is None:
        return "no_option"
    return values | {"Options": "\n".join(lettered), "Answer": lettered[chosen]}


def _chosen(answer: str, listed: Sequence[str]) -> int | None:
    """Place of the option that an answer names by letter, by text, or by both where they agree."""
    names = [normal(one) for one in listed]
    if normal(answer) in names:
        return names.index(normal(answer))
    mark = re.fullmatch(r"[(*]*([A-Ha-h])[).:*]*(?:\s+(.*))?", answer.strip())
    if mark is None:
        return None
    place = "ABCDEFGH".index(mark[1].upper())
    said = normal(mark[2] or "").rstrip(".")
    fits = place < len(listed) and (not said or said == names[place].rstrip("."))
    return place if fits else None


def exercise(task: TextTask, values: Fields, context: str, draw: Sequence[object]) -> Exercise:
    """Instruction and response. draw: what the phrasing is drawn by."""
    form = task.phrasings[seed_of("phrasing", task.short, *draw) % len(task.phrasings)]
    named = {label.lower().replace(" ", "_"): value for label, value in values.items()}
    return Exercise(form.format(context=context, **named), values[task.response])


# ---- checks


def within(piece: str, text: str) -> bool:
    """Whether a piece stands in a text, but for case, width and white space; a full stop at its end may be its own."""
    said = normal(piece)
    return bool(said) and (said in normal(text) or said.rstrip(".") in normal(text))


def copied(answer: str, text: str) -> bool:
    """Whether an answer is the text, or half of it or more, word for word."""
    return 2 * len(normal(answer)) >= len(normal(text)) and within(answer, text)


def _extracted(values: Fields, text: str) -> str | None:
    return None if within(values["Answer"], text) else "not_in_text"


def _own(label: str) -> Callable[[Fields, str], str | None]:
    return lambda values, text: "copied" if copied(values[label], text) else None


def _new(label: str) -> Callable[[Fields, str], str | None]:
    """A field that has to say something which does not stand in the text as it is."""
    return lambda values, text: "copied" if within(values[label], text) else None


def _question(values: Fields, text: str) -> str | None:
    if not re.search(r"[?？]", values["Question"]):
        return "no_question"
    return "copied" if within(values["Question"], text) else None


def _referent(values: Fields, text: str) -> str | None:
    sentence, word, answer = values["Sentence"], values["Word"], values["Answer"]
    if not within(sentence, text) or not within(answer, text):
        return "not_in_text"
    if normal(word) not in words(sentence):
        return "word_not_in_sentence"
    return "same_word" if normal(word) == normal(answer) else None


def _paraphrase(values: Fields, text: str) -> str | None:
    if not within(values["Sentence"], text):
        return "not_in_text"
    return "copied" if within(values["Paraphrase"], text) else None


def _pair(values: Fields, text: str) -> str | None:
    if not within(values["Sentence 1"], text):
        return "not_in_text"
    return "same_sentence" if normal(values["Sentence 1"]) == normal(values["Sentence 2"]) else None


def _halves(values: Fields, text: str) -> str | None:
    whole = normal(text)
    both = {normal(f"{values['Beginning']}{space}{values['Ending']}") for space in ("", " ")}
    return None if any(one in whole for one in both) else "not_in_text"


def _summary(values: Fields, text: str) -> str | None:
    if within(values["Summary"], text):
        return "copied"
    return "too_long" if 2 * len(words(values["Summary"])) > len(words(text)) else None


def _topic(values: Fields, text: str) -> str | None:
    topics = [one.strip(" .*") for one in re.split(r"[,;\n]", values["Topics"]) if one.strip(" .*")]
    if len({normal(one) for one in topics}) < 2:
        return "few_options"
    return None if normal(values["Answer"]).rstrip(".") in {normal(one) for one in topics} else "no_option"


def _senses(values: Fields, text: str) -> str | None:
    for label in ("Sentence 1", "Sentence 2"):
        if normal(values["Word"]) not in words(values[label]):
            return "word_not_in_sentence"
    return _pair(values, text)


_ASK = ("{context}\n\n{question}", "{question}\n\nText:\n{context}")
TASKS = {
    task.short: task
    for task in (
        TextTask(
            "extractive question answering", "exqa", ("Question", "Answer"),
            ("{context}\n\n{question} Answer in the words of the text.",
             "Answer the question with words taken from the text.\n\nQuestion: {question}\n\nText:\n{context}"),
            _extracted, proven=True,
        ),
        TextTask(
            "multiple-choice question answering", "mcqa", ("Question", "Options", "Answer"),
            ("{context}\n\n{question}\n{options}", "{question}\n{options}\n\nChoose by this text:\n{context}"),
            lambda values, text: None, long=("Options",),
        ),
        TextTask(
            "question generation", "qg", ("Question",),
            ("{context}\n\nAsk a question that this text answers.", "Write a question about this text:\n\n{context}"),
            _question, response="Question",
        ),
        TextTask(
            "question answering without choices", "qa", ("Question", "Answer"), _ASK, _own("Answer"), long=("Answer",),
        ),
        TextTask(
            "yes-no question answering", "ynqa", ("Question", "Answer"),
            ("{context}\n\n{question} Answer yes, no or maybe.", "{question} (yes, no or maybe)\n\nText:\n{context}"),
            lambda values, text: None, choices=("yes", "no", "maybe"),
        ),
        TextTask(
            "coreference resolution", "coref", ("Sentence", "Word", "Answer"),
            ('{context}\n\nIn the sentence "{sentence}", what does "{word}" stand for?',
             'What does "{word}" mean in "{sentence}"? Look at the whole text:\n\n{context}'),
            _referent, proven=True,
        ),
        TextTask(
            "paraphrase generation", "paraphrase", ("Sentence", "Paraphrase"),
            ("Say this in other words: {sentence}", "{sentence}\n\nWrite a paraphrase of this sentence."),
            _paraphrase, response="Paraphrase",
        ),
        TextTask(
            "paraphrase identification", "paraphrase_id", ("Sentence 1", "Sentence 2", "Answer"),
            ("1: {sentence_1}\n2: {sentence_2}\n\nDo these sentences say the same? Yes or no.",
             'Is "{sentence_2}" a paraphrase of "{sentence_1}"? Answer yes or no.'),
            _pair, choices=YES_NO,
        ),
        TextTask(
            "sentence completion", "sent_comp", ("Beginning", "Ending"),
            ("Complete this sentence: {beginning}", "How does this sentence end?\n\n{beginning}"),
            _halves, response="Ending", proven=True,
        ),
        TextTask(
            "sentiment", "sentiment", ("Answer",),
            ("{context}\n\nIs this text positive, negative or neutral?",
             "Name the sentiment of this text (positive, negative or neutral):\n\n{context}"),
            lambda values, text: None, choices=("positive", "negative", "neutral"),
        ),
        TextTask(
            "summarization", "summarization", ("Summary",),
            ("{context}\n\nSummarize this text.", "Write a short summary of the following text:\n\n{context}"),
            _summary, response="Summary", long=("Summary",),
        ),
        TextTask(
            "text generation", "text_gen", ("Instruction", "Text"), ("{instruction}",), _own("Text"),
            response="Text", long=("Text",),
        ),
        TextTask(
            "topic classification", "topic_class", ("Topics", "Answer"),
            ("{context}\n\nWhich of these topics is the text about? {topics}",
             "Choose the topic of the text.\nTopics: {topics}\n\nText:\n{context}"),
            _topic,
        ),
        TextTask(
            "word sense disambiguation", "wsd", ("Word", "Sentence 1", "Sentence 2", "Answer"),
            ('1: {sentence_1}\n2: {sentence_2}\n\nDoes "{word}" mean the same in both sentences? Yes or no.',
             'Has "{word}" one sense in "{sentence_1}" and "{sentence_2}"? Answer yes or no.'),
            _senses, choices=YES_NO,
        ),
        TextTask(
            "textual entailment", "te", ("Hypothesis", "Answer"),
            ('{context}\n\nDoes it follow that "{hypothesis}"? Yes or no.',
             'Is "{hypothesis}" implied by this text? Answer yes or no.\n\n{context}'),
            _new("Hypothesis"), choices=YES_NO,
        ),
        TextTask(
            "natural language inference", "nli", ("Hypothesis", "Answer"),
            ('Premise: {context}\n\nHypothesis: {hypothesis}\n\nEntailment, neutral or contradiction?',
             '{context}\n\nSay of "{hypothesis}" whether the text entails it, contradicts it or is neutral: answer'
             " entailment, contradiction or neutral."),
            _new("Hypothesis"), choices=("entailment", "neutral", "contradiction"),
        ),
    )
}  # fmt: skip
