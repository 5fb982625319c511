"""Evaluation sets as decontamination reads them: where they lie, which columns hold an item's prompt, options and
answer, and the texts that are looked for. Nothing of a set is skipped in silence: what cannot be read is an error."""

import ast
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from difflib import get_close_matches
from itertools import count
from typing import Any, NamedTuple

from ..folder import HouseError, about
from ..reading.chunks import file_chunks
from ..reading.files import files_digest, find_files
from ..reading.source import Source, Unreadable, iter_rows
from .view import prompt_of, response_of

PROMPT, ANSWER = 0, 1  # kinds of fields
BRIEF = 4  # words; a shorter prompt ("Tell me more") is found only where it is a whole turn
LONG_FIELD = 13  # words from which on an answer, or a part of a prompt, is looked for by itself
IDS = ("id", "task_id", "question_id", "unique_id", "key", "idx")  # columns that name an item, the first that is there


@dataclass(frozen=True)
class EvaluationSet:
    """One evaluation set to decontaminate against.

    path: a file, folder or address that reading knows. name: as the evidence shows it (default: from the path). prompt,
    options, answer: columns that hold them; several of a kind belong together, `a|b` means a or, where there is no a,
    b. Without `prompt` the columns are recognised as those of a source are.
    """

    path: str
    name: str = ""
    prompt: tuple[str, ...] = ()
    options: tuple[str, ...] = ()
    answer: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not self.path:
            raise HouseError(f"evaluation set {self.name or '?'}: it has no path")
        if not self.prompt and (self.options or self.answer):
            raise HouseError(f"evaluation set {self.title}: name the column of its prompt too")

    @property
    def title(self) -> str:
        return self.name or re.sub(r"(\.\w+)+$", "", self.path.rstrip("/").rsplit("/", 1)[-1]) or self.path


class Field(NamedTuple):
    """A text that is looked for if it has at least `least` words."""

    kind: int  # PROMPT or ANSWER
    text: str
    least: int


class Item(NamedTuple):
    """One item of a set: its number there from 0, its own id where it has one, and its fields."""

    set: str
    number: int
    id: str | None
    fields: tuple[Field, ...]


class Known(NamedTuple):
    """A usual evaluation set: its name on the Hugging Face hub, configuration and split, and its columns."""

    hub: str
    config: str | None
    split: str
    prompt: tuple[str, ...]
    options: tuple[str, ...] = ()
    answer: tuple[str, ...] = ()


_QUESTION, _A_TO_E = ("question|Question",), ("choices|options|A", "B", "C", "D", "E")
KNOWN: dict[str, Known] = {
    "agieval": Known("hails/agieval-sat-en", None, "test", ("query|question",), ("choices|options",)),
    "alpaca_eval": Known("tatsu-lab/alpaca_eval", "alpaca_eval", "eval", ("instruction",), (), ("output",)),
    "aqua": Known("deepmind/aqua_rat", "raw", "test", ("question",), ("options",), ("rationale",)),
    "arc_challenge": Known("allenai/ai2_arc", "ARC-Challenge", "test", _QUESTION, ("choices",)),
    "arc_easy": Known("allenai/ai2_arc", "ARC-Easy", "test", _QUESTION, ("choices",)),
    "arena_hard": Known("lmarena-ai/arena-hard-auto-v0.1", None, "train", ("turns|prompt",)),
    "bbh": Known("lukaemon/bbh", None, "test", ("input",), (), ("target",)),
    "bigcodebench": Known(
        "bigcode/bigcodebench", None, "v0.1.4", ("instruct_prompt|complete_prompt",), (), ("canonical_solution",)
    ),
    "boolq": Known("google/boolq", None, "validation", ("question",)),
    "drop": Known("ucinlp/drop", None, "validation", ("passage", "question")),
    "gpqa": Known("Idavidrein/gpqa", "gpqa_main", "train", ("Question|question",), (), ("Explanation",)),
    "gsm8k": Known("openai/gsm8k", "main", "test", ("question",), (), ("answer",)),
    "hellaswag": Known("Rowan/hellaswag", None, "validation", ("ctx",), ("endings",)),
    "humaneval": Known("openai/openai_humaneval", None, "test", ("prompt",), (), ("canonical_solution",)),
    "humaneval_plus": Known("evalplus/humanevalplus", None, "test", ("prompt",), (), ("canonical_solution",)),
    "ifeval": Known("google/IFEval", None, "train", ("prompt",)),
    "math": Known("EleutherAI/hendrycks_math", None, "test", ("problem",), (), ("solution",)),
    "math500": Known("HuggingFaceH4/MATH-500", None, "test", ("problem",), (), ("solution",)),
    "mbpp": Known("google-research-datasets/mbpp", "full", "test", ("text|prompt",), (), ("code|canonical_solution",)),
    "mbpp_plus": Known("evalplus/mbppplus", None, "test", ("prompt",), (), ("code",)),
    "mmlu": Known("cais/mmlu", "all", "test", ("question",), _A_TO_E),
    "mmlu_pro": Known("TIGER-Lab/MMLU-Pro", None, "test", ("question",), ("options",)),
    "mt_bench": Known("HuggingFaceH4/mt_bench_prompts", None, "train", ("turns|prompt",), (), ("reference",)),
    "openbookqa": Known("allenai/openbookqa", "main", "test", ("question_stem",), ("choices",)),
    "piqa": Known("ybisk/piqa", None, "validation", ("goal",), ("sol1", "sol2")),
    "popqa": Known("akariasai/PopQA", None, "test", ("question",)),
    "simpleqa": Known("basicv8vc/SimpleQA", None, "test", ("problem",), (), ("answer",)),
    "social_iqa": Known(
        "allenai/social_i_qa", None, "validation", ("context", "question"), ("answerA", "answerB", "answerC")
    ),
    "squad": Known("rajpurkar/squad", None, "validation", ("question",)),
    "svamp": Known("ChilleD/SVAMP", None, "test", ("question_concat|Body", "Question")),
    "triviaqa": Known("mandarjoshi/trivia_qa", "rc.nocontext", "validation", ("question",)),
    "truthfulqa": Known(
        "truthfulqa/truthful_qa", "generation", "validation", _QUESTION, (), ("best_answer|Best Answer",)
    ),
    "vicuna": Known("zhengxuanzenwu/vicuna-eval-with-gpt4", None, "test", ("turns|instruction|prompt",)),
    "winogrande": Known("allenai/winogrande", "winogrande_xl", "validation", ("sentence",), ("option1", "option2")),
    "xstest": Known("walledai/XSTest", None, "test", ("prompt",)),
}  # fmt: skip


def known_set(name: str, path: str) -> EvaluationSet:
    """The usual evaluation set `name` with its columns, read from `path`."""
    if name not in KNOWN:
        close = get_close_matches(name.lower(), KNOWN, n=1)
        meant = f"did you mean {close[0]!r}? There" if close else "there"
        raise HouseError(
            f"no usual evaluation set is called {name!r}; {meant} are {', '.join(KNOWN)}. Give any other in `against`, "
            "as its path or as {path: …, name: …, prompt: [COLUMN], answer: [COLUMN]}"
        )
    known = KNOWN[name]
    return EvaluationSet(path, name, known.prompt, tuple(f"?{column}" for column in known.options),
                         tuple(f"?{column}" for column in known.answer))  # fmt: skip


def sets_digest(sets: tuple[EvaluationSet, ...]) -> str:
    """Digest of the sets' settings and of their files' bytes."""
    found = []
    for one in sets:
        with about(f"evaluation set {one.title}"):
            found.append([repr(one), files_digest(find_files(one.path))])
    return json.dumps(found)


def items(one: EvaluationSet) -> Iterator[Item]:
    """Every item of a set; a HouseError where the set, or one record of it, cannot be read."""
    empty = True
    for item in _by_columns(one) if one.prompt else _by_shape(one):
        empty = False
        yield item
    if empty:
        raise HouseError(f"evaluation set {one.title}: {one.path} holds no item")


def _by_shape(one: EvaluationSet) -> Iterator[Item]:
    source = Source(re.sub(r"\W", "_", f"evaluation_{one.title}"), one.path, "")
    rows = iter_rows(source)
    for number in count():
        with about(f"evaluation set {one.title}"):
            row = next(rows, None)
        if row is None:
            return
        if isinstance(row, Unreadable):
            raise _unreadable(one, row)
        yield Item(one.title, number, _id(_meta(row)), fields_of(row))


def _by_columns(one: EvaluationSet) -> Iterator[Item]:
    chunks = (chunk for file in find_files(one.path) for chunk in file_chunks(file))
    found = (record for chunk in chunks for _, _, record in chunk.records())
    for number, record in enumerate(found):
        if isinstance(record, Unreadable):
            raise _unreadable(one, record)
        pieces = (_pieces(one, columns, record.fields) for columns in (one.prompt, one.options, one.answer))
        yield Item(one.title, number, _id(record.fields), parts(*pieces))


def _unreadable(one: EvaluationSet, record: Unreadable) -> HouseError:
    return HouseError(
        f"evaluation set {one.path}: line {record.line} of {record.file} cannot be read: {record.error}. "
        "Mend or remove it: nothing is decontaminated against half a set."
    )


def fields_of(row: Mapping[str, Any]) -> tuple[Field, ...]:
    """The fields of an item that came as a row: a conversation, a document, or a multiple-choice item."""
    if row["text"] is not None:
        return parts([row["text"]], [], [])
    meta = _meta(row)
    found = parts([prompt_of(row)], [], [response_of(row)])
    if "question" in meta and "choices" in meta:  # multiple choice: the question also without its options
        found = (*found, Field(PROMPT, str(meta["question"]), LONG_FIELD))
    return found


def parts(prompt: list[str], options: list[str], answer: list[str]) -> tuple[Field, ...]:
    """The fields of an item: its prompt whole; long enough pieces of it, such as the turns of a conversation or the
    question without its options; its answer."""
    found = [Field(PROMPT, "\n".join([*prompt, *options]), 1)]
    if options:
        found.append(Field(PROMPT, "\n".join(prompt), LONG_FIELD))
    if len(prompt) > 1:
        found += [Field(PROMPT, piece, LONG_FIELD) for piece in prompt]
    return (*found, Field(ANSWER, "\n".join(answer), LONG_FIELD))


def _pieces(one: EvaluationSet, columns: tuple[str, ...], record: Mapping[str, Any]) -> list[str]:
    """The texts of these columns; a leading `?` marks a column that may be absent."""
    found: list[str] = []
    for column in columns:
        names = column.removeprefix("?").split("|")
        name = next((name for name in names if name in record), None)
        if name is not None:
            found += [text for text in _texts(record[name]) if text]
        elif not column.startswith("?"):
            raise HouseError(
                f"evaluation set {one.title}: no column {' or '.join(map(repr, names))} in {one.path}; "
                f"it has {', '.join(record)}. Name its columns: {{path: …, prompt: [COLUMN], answer: [COLUMN]}}"
            )
    return found


def _texts(value: Any) -> Iterator[str]:
    """The texts in a cell: itself, the elements of a list (also of one written as text), the content of a turn."""
    if value is None:
        return
    if isinstance(value, str):
        listed = _listed(value)
        if listed is None:
            yield value
        else:
            yield from _texts(listed)
    elif isinstance(value, Mapping):
        named = [name for name in ("content", "value", "text") if name in value]
        for inner in [value[named[0]]] if named else value.values():
            yield from _texts(inner)
    elif isinstance(value, list | tuple):
        for inner in value:
            yield from _texts(inner)
    else:
        yield str(value)


def _listed(text: str) -> list[str] | None:
    """The list of strings that a text spells as JSON or in Python's way, as in a CSV cell."""
    if not (text.startswith("[") and text.endswith("]")):
        return None
    try:
        found = json.loads(text)
    except ValueError:
        try:
            found = ast.literal_eval(text)
        except (ValueError, SyntaxError, MemoryError, RecursionError):
            return None
    strings = isinstance(found, list) and len(found) > 0 and all(isinstance(item, str) for item in found)
    return found if strings else None


def _meta(row: Mapping[str, Any]) -> dict[str, Any]:
    meta = json.loads(row["meta"]) if row["meta"] else {}
    return meta if isinstance(meta, dict) else {}


def _id(record: Mapping[str, Any]) -> str | None:
    found = next((record[name] for name in IDS if record.get(name) is not None), None)
    return None if found is None else str(found)


def resolved(against: tuple[str | EvaluationSet, ...], sets: Mapping[str, str]) -> tuple[EvaluationSet, ...]:
    """All sets, each under a title of its own: a second `test` becomes `test-2`."""
    given = [EvaluationSet(one) if isinstance(one, str) else one for one in against]
    given += [known_set(name, path) for name, path in sets.items()]
    seen: dict[str, int] = {}
    found = []
    for one in given:
        seen[one.title] = seen.get(one.title, 0) + 1
        found.append(one if seen[one.title] == 1 else replace(one, name=f"{one.title}-{seen[one.title]}"))
    return tuple(found)
