"""Shapes of records: which columns make which, how one is recognised, and how a record becomes a row's content.

A shape is a function of the columns seen; it answers None where they do not make it, else how to convert a record.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

from ..folder import HouseError
from ..rows import message
from .turns import (
    Turn,
    Unfit,
    as_json,
    kind,
    leftovers,
    parsed,
    parted,
    text,
    text_or_number,
    transcript,
    turns,
)

Fields = Mapping[str, Any]
Content = dict[str, Any]


class Shape(NamedTuple):
    """convert: record -> content fields of a row (and `meta`, what to add there). used: columns that it reads; all
    others go to the row's meta."""

    name: str
    convert: Callable[[Fields], Content]
    used: frozenset[str]


class Columns:
    """Column names of a sample of records, found without regard to case, with a first value of each."""

    def __init__(self, sample: Iterable[Fields]) -> None:
        self.first: dict[str, Any] = {}
        for record in sample:
            for name, value in record.items():
                if self.first.get(name) is None:
                    self.first[name] = value
        self.names: dict[str, str] = {}
        for name in self.first:
            self.names.setdefault(name.casefold(), name)

    def get(self, *aliases: str) -> str:
        """The column that the first known of `aliases` names, '' where there is none."""
        return next((self.names[alias] for alias in aliases if alias in self.names), "")

    def all(self, *aliases: str) -> list[str]:
        return [self.names[alias] for alias in aliases if alias in self.names]


Builder = Callable[[Columns], tuple[Callable[[Fields], Content], list[str]] | None]
PROMPT = ("prompt", "instruction", "question", "query", "problem")
PAIRS = (
    (("prompt", "query"), ("completion", "response", "canonical_solution", "output")),
    (("question",), ("answer", "response", "solution", "output")),
    (("problem",), ("solution", "answer")),
    (("input",), ("target", "output")),
    (("text",), ("code",)),
)


def preference_sharegpt(columns: Columns) -> Any:
    """conversations, chosen, rejected: turns, and one turn each (LLaMA-Factory)"""
    names = [columns.get("conversations"), columns.get("chosen"), columns.get("rejected")]
    if not all(names):
        return None
    said, chosen, rejected, tools = *names, columns.get("tools")

    def convert(row: Fields) -> Content:
        return {
            "messages": turns(row.get(said), said),
            "chosen": turns(row.get(chosen), chosen),
            "rejected": turns(row.get(rejected), rejected),
            **_tools(row, tools),
        }

    return convert, [*names, tools]


def preference_alpaca(columns: Columns) -> Any:
    """instruction, chosen, rejected (and input, system, history)"""
    names = [columns.get("instruction"), columns.get("chosen"), columns.get("rejected")]
    if not all(names):
        return None
    ask, used = _alpaca_prompt(columns)
    _, chosen, rejected = names

    def convert(row: Fields) -> Content:
        return {
            "messages": ask(row),
            "chosen": _answer(row.get(chosen), chosen),
            "rejected": _answer(row.get(rejected), rejected),
        }

    return convert, [*used, *names]


def preference(columns: Columns) -> Any:
    """prompt (or question, query), chosen, rejected: text or turns"""
    names = [columns.get("prompt", "question", "query"), columns.get("chosen"), columns.get("rejected")]
    if not all(names):
        return None
    prompt, chosen, rejected = names
    tools = columns.get("tools")

    def convert(row: Fields) -> Content:
        asked = _prompt(row.get(prompt), prompt)
        better, worse = _answer(row.get(chosen), chosen), _answer(row.get(rejected), rejected)
        if better[0]["role"] != "assistant":  # whole conversations, the prompt among them
            shared, better, worse = parted(better, worse)
            if not any(turn["content"] == asked[-1]["content"] for turn in shared):
                raise Unfit("chosen and rejected begin with another prompt than that of the prompt column")
            asked = shared
        return {"messages": asked, "chosen": better, "rejected": worse, **_tools(row, tools)}

    return convert, [*names, tools]


def hh_rlhf(columns: Columns) -> Any:
    r"""chosen, rejected: "\n\nHuman: … \n\nAssistant: …" transcripts"""
    chosen, rejected = columns.get("chosen"), columns.get("rejected")
    if not chosen or not rejected or not isinstance(columns.first[chosen], str):
        return None

    def convert(row: Fields) -> Content:
        better, worse = transcript(row.get(chosen), chosen), transcript(row.get(rejected), rejected)
        return dict(zip(("messages", "chosen", "rejected"), parted(better, worse), strict=True))

    return convert, [chosen, rejected]


def preference_implicit(columns: Columns) -> Any:
    """chosen, rejected: lists of turns that both contain the prompt"""
    chosen, rejected = columns.get("chosen"), columns.get("rejected")
    if not chosen or not rejected:
        return None
    tools = columns.get("tools")

    def convert(row: Fields) -> Content:
        better, worse = turns(row.get(chosen), chosen), turns(row.get(rejected), rejected)
        content = dict(zip(("messages", "chosen", "rejected"), parted(better, worse), strict=True))
        return content | _tools(row, tools)

    return convert, [chosen, rejected, tools]


def kto(columns: Columns) -> Any:
    """messages, label; or prompt, completion (or response), label: true where the answer is wanted"""
    label = columns.get("label")
    said = columns.get("messages", "conversations")
    prompt, answer = columns.get("prompt"), columns.get("completion", "response")
    if not label or not (said or (prompt and answer)) or not _is_label(columns.first[label]):
        return None
    tools = columns.get("tools")

    def convert(row: Fields) -> Content:
        if said:
            whole = turns(row.get(said), said)
            asked, given = whole[:-1], whole[-1:]
            if not asked or given[0]["role"] != "assistant":
                raise Unfit(f"{said} does not end with an assistant turn after a prompt")
        else:
            asked, given = _prompt(row.get(prompt), prompt), _answer(row.get(answer), answer)
        return {"messages": asked, "chosen": given, "label": _label(row.get(label), label), **_tools(row, tools)}

    return convert, [label, tools, *([said] if said else [prompt, answer])]


def messages(columns: Columns) -> Any:
    """messages: turns of role and content (and tools)"""
    return _conversation(columns, "messages")


def sharegpt(columns: Columns) -> Any:
    """conversations: turns of from and value (and system, tools)"""
    return _conversation(columns, "conversations", "conversation")


def alpaca(columns: Columns) -> Any:
    """instruction, output (or response) (and input, system, history)"""
    answers = columns.all("output", "response")
    if not columns.get("instruction") or not answers:
        return None
    ask, used = _alpaca_prompt(columns)
    answer = answers[0]

    def convert(row: Fields) -> Content:
        return {"messages": [*ask(row), message("assistant", text(row.get(answer), answer))]}

    return convert, [*used, answer]


def alpaca_ranked(columns: Columns) -> Any:
    """instruction, output: a list of the better and the worse answer (and input, system, history)"""
    output = columns.get("output")
    if not columns.get("instruction") or not output or not isinstance(columns.first[output], list):
        return None
    ask, used = _alpaca_prompt(columns)

    def convert(row: Fields) -> Content:
        given = row.get(output)
        if not isinstance(given, list) or len(given) != 2:
            raise Unfit(f"{output} is not a list of two answers")
        return {"messages": ask(row), "chosen": _answer(given[0], output), "rejected": _answer(given[1], output)}

    return convert, [*used, output]


def self_instruct(columns: Columns) -> Any:
    """instruction, instances: a list of one {input, output}"""
    instruction, instances = columns.get("instruction"), columns.get("instances")
    if not instruction or not instances:
        return None

    def convert(row: Fields) -> Content:
        given = parsed(row.get(instances), instances)
        if not isinstance(given, list) or len(given) != 1 or not isinstance(given[0], Mapping):
            raise Unfit(f"{instances} is not a list of one instance")
        asked = _with_input(text(row.get(instruction), instruction), given[0].get("input"))
        return {"messages": [message("user", asked), message("assistant", text(given[0].get("output"), "output"))]}

    return convert, [instruction, instances]


def multiple_choice(columns: Columns) -> Any:
    """question, answer (or correct), choices (or options), or columns A, B, C, …; meta keeps question and choices"""
    question, answer = columns.get("question"), columns.get("answer", "correct", "answerkey")
    listed, lettered = columns.get("choices", "options"), columns.all(*"abcdefghij")
    if not question or not answer or (not listed and len(lettered) < 2):
        return None

    def convert(row: Fields) -> Content:
        if not listed:
            options = [text_or_number(row[name], name) for name in lettered if row.get(name) is not None]
        else:
            given = parsed(row.get(listed), listed)
            if not isinstance(given, list) or len(given) < 2:
                raise Unfit(f"{listed} is not a list of options")
            options = [text_or_number(option, listed) for option in given]
        asked = text(row.get(question), question)
        said = row.get(answer)
        if isinstance(said, int) and not isinstance(said, bool) and 0 <= said < len(options):
            said = chr(65 + said)  # an index
        whole = "\n".join([asked, "", *(_option(index, option) for index, option in enumerate(options))])
        return {
            "messages": [message("user", whole), message("assistant", text_or_number(said, answer))],
            "meta": {"question": asked, "choices": options},
        }

    return convert, [question, answer, *([listed] if listed else lettered)]


def prompt_completion(columns: Columns) -> Any:
    """prompt (or query), completion (or response, canonical_solution, output): text or turns"""
    return _pair(columns, PAIRS[:1])


def question_answer(columns: Columns) -> Any:
    """question, answer; or problem, solution; or input, target; or text, code"""
    return _pair(columns, PAIRS[1:])


def raw_text(columns: Columns) -> Any:
    """text: a raw document"""
    name = columns.get("text")
    if not name or columns.get("parent_id"):  # a message tree is no document
        return None
    return lambda row: {"text": text(row.get(name), name)}, [name]


def prompt(columns: Columns) -> Any:
    """prompt (or instruction, question, query, problem, text) alone, or turns: a list of user turns; no answer"""
    name = columns.get(*PROMPT, "turns", "text")
    if not name or columns.get("parent_id"):
        return None
    return lambda row: {"messages": _prompt(row.get(name), name)}, [name]


SHAPES: dict[str, Builder] = {
    "preference_sharegpt": preference_sharegpt,
    "preference_alpaca": preference_alpaca,
    "preference": preference,
    "hh_rlhf": hh_rlhf,
    "preference_implicit": preference_implicit,
    "kto": kto,
    "messages": messages,
    "sharegpt": sharegpt,
    "alpaca_ranked": alpaca_ranked,
    "alpaca": alpaca,
    "self_instruct": self_instruct,
    "multiple_choice": multiple_choice,
    "prompt_completion": prompt_completion,
    "question_answer": question_answer,
    "text": raw_text,
    "prompt": prompt,
}  # in the order in which they are tried


def recognise(shape: str, sample: Iterable[Fields], source: str) -> Shape:
    """The shape called `shape`, or for `auto` the first that the sample's columns make. A HouseError names the columns
    seen and the shapes known where there is none."""
    columns = Columns(sample)
    if shape != "auto" and shape not in SHAPES:
        raise HouseError(
            f"source {source}: unknown shape {shape!r}; known: auto, {', '.join(SHAPES)}, tree, tree_preference"
        )
    for name in SHAPES if shape == "auto" else (shape,):
        if (built := SHAPES[name](columns)) is not None:
            convert, used = built
            return Shape(name, convert, frozenset(filter(None, used)))
    seen = ", ".join(columns.first) or "none"
    wanted = [f"  {name}: {SHAPES[name].__doc__}" for name in (SHAPES if shape == "auto" else (shape,))]
    what = "its columns make no known shape" if shape == "auto" else f"its columns do not make the shape {shape}"
    raise HouseError(
        f"source {source}: {what}.\nColumns seen: {seen}.\nShapes and their columns:\n" + "\n".join(wanted)
        + "\nName columns in the source: `columns: {ours: theirs}`, such as `{prompt: question, completion: reply}`."
    )  # fmt: skip


def _conversation(columns: Columns, *aliases: str) -> Any:
    name, tools, system = columns.get(*aliases), columns.get("tools"), columns.get("system")
    if not name:
        return None

    def convert(row: Fields) -> Content:
        said = turns(row.get(name), name)
        if system and row.get(system):
            said.insert(0, message("system", text(row[system], system)))
        content = {"messages": said, **_tools(row, tools)}
        left = leftovers(row[name])
        return content if left is None else content | {"meta": {"turn_fields": left}}

    return convert, [name, tools, system]


def _pair(columns: Columns, pairs: Iterable[tuple[tuple[str, ...], tuple[str, ...]]]) -> Any:
    for asks, answers in pairs:
        ask, answer = columns.get(*asks), columns.get(*answers)
        if ask and answer:
            break
    else:
        return None
    tools = columns.get("tools")

    def convert(row: Fields) -> Content:
        given = row.get(answer)
        said = _answer(text_or_number(given, answer) if isinstance(given, int | float) else given, answer)
        return {"messages": [*_prompt(row.get(ask), ask), *said], **_tools(row, tools)}

    return convert, [ask, answer, tools]


def _alpaca_prompt(columns: Columns) -> tuple[Callable[[Fields], list[Turn]], list[str]]:
    """How to make the prompt's turns of an Alpaca record, and the columns that this reads."""
    instruction, more = columns.get("instruction"), columns.get("input", "context")
    system, history = columns.get("system"), columns.get("history")

    def ask(row: Fields) -> list[Turn]:
        asked = _with_input(text(row.get(instruction), instruction), row.get(more) if more else None)
        before = []
        if system and row.get(system):
            before.append(message("system", text(row[system], system)))
        if history and row.get(history):
            before += _history(parsed(row[history], history))
        return [*before, message("user", asked)]

    return ask, [instruction, more, system, history]


def _history(rounds: Any) -> list[Turn]:
    if not isinstance(rounds, list) or not all(isinstance(pair, list) and len(pair) == 2 for pair in rounds):
        raise Unfit("history is not a list of [question, answer]")
    said = []
    for asked, given in rounds:
        said += [message("user", text(asked, "history")), message("assistant", text(given, "history"))]
    return said


def _with_input(instruction: str, given: Any) -> str:
    """Instruction and input, parted by a blank line."""
    if given is None or not text(given, "input").strip():
        return instruction
    return f"{instruction}\n\n{given}"


def _prompt(value: Any, name: str) -> list[Turn]:
    """A prompt that is text, a list of turns, or a list of texts (user turns)."""
    if isinstance(value, list) and value and all(isinstance(item, str) for item in value):
        return [message("user", item) for item in value]
    if isinstance(value, list | Mapping):
        return turns(value, name)
    return [message("user", text(value, name))]


def _answer(value: Any, name: str) -> list[Turn]:
    """An answer that is text, one turn or a list of turns."""
    if isinstance(value, list | Mapping):
        return turns(value, name)
    return [message("assistant", text(value, name))]


def _option(index: int, option: str) -> str:
    """An option under its letter, which some sources write into the option ("A)32400")."""
    letter = chr(65 + index)
    return option if option[:1] == letter and option[1:2] in (")", ".", ":") else f"{letter}. {option}"


LABELS = {True: True, "true": True, "1": True, False: False, "false": False, "0": False}  # 1 == True, 0 == False


def _is_label(value: Any) -> bool:
    return isinstance(value, str | int | float) and _plain(value) in LABELS


def _plain(value: Any) -> Any:
    return value.strip().lower() if isinstance(value, str) else value


def _label(value: Any, name: str) -> bool:
    """true, false, 1, 0, or these as text."""
    if not _is_label(value):
        raise Unfit(f"no {name}" if value is None else f"{name} is {kind(value)}, not true or false")
    return LABELS[_plain(value)]


def _tools(row: Fields, name: str) -> Content:
    tools = row.get(name) if name else None
    return {} if not tools else {"tools": tools if isinstance(tools, str) else as_json(tools)}
