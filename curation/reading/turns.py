"""Turns of a conversation as sources write them: role/content, from/value, "Human: … Assistant: …" transcripts."""

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from ..rows import message

Turn = dict[str, str | None]

ROLES = {
    "user": "user",
    "human": "user",
    "prompter": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "model": "assistant",
    "bot": "assistant",
    "bing": "assistant",
    "system": "system",
    "developer": "developer",
    "tool": "tool",
    "observation": "tool",
    "function": "tool",
    "function_response": "tool",
    "tool_response": "tool",
    "ipython": "tool",
}
CALLS = {"function_call", "tool_call"}
FIELDS = {"role", "content", "from", "value", "reasoning_content", "name", "tool_calls", "tool_call_id"}
OPTIONAL = ("reasoning_content", "name", "tool_call_id")
_SPEAKER = re.compile(r"(?:^|\n\n)(Human|Assistant):")


class Unfit(ValueError):
    """A record that does not have the shape of its source; the message says in what."""


def kind(value: Any) -> str:
    """What a value is, for messages to people."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "true or false"
    names: tuple[tuple[type, str], ...] = ((str, "text"), (int | float, "a number"), (list, "a list"))  # type: ignore[assignment]
    return next((name for of, name in names if isinstance(value, of)), "an object")


def text(value: Any, name: str) -> str:
    """`value` if it is text."""
    if isinstance(value, str):
        return value
    raise Unfit(f"no {name}" if value is None else f"{name} is {kind(value)}, not text")


def text_or_number(value: Any, name: str) -> str:
    """Text, or a number as text (39.0 as 39: answers are often stored as floats)."""
    if isinstance(value, int | float) and not isinstance(value, bool):
        return str(int(value)) if isinstance(value, float) and value.is_integer() else str(value)
    return text(value, name)


def as_json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, default=str)


def parsed(value: Any, name: str) -> Any:
    """`value`, or what it holds where it is JSON as text (as in a CSV cell)."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError) as error:
        raise Unfit(f"{name} is text that is no JSON: {error}") from error


def turns(value: Any, name: str) -> list[Turn]:
    """A list of turns (or one turn, or either as JSON) as messages of the row schema."""
    value = parsed(value, name)
    if isinstance(value, Mapping):
        value = [value]
    if not isinstance(value, list):
        raise Unfit(f"no {name}" if value is None else f"{name} is {kind(value)}, not a list of turns")
    if not value:
        raise Unfit(f"{name} has no turn")
    return [_turn(item, f"{name}[{index}]") for index, item in enumerate(value)]


def _turn(item: Any, name: str) -> Turn:
    if not isinstance(item, Mapping):
        raise Unfit(f"{name} is {kind(item)}, not a turn")
    said = item.get("role")
    body, where = (item.get("value"), "value") if said is None else (item.get("content"), "content")
    said = item.get("from") if said is None else said
    if not isinstance(said, str):
        raise Unfit(f"{name} has no role")
    if said in CALLS:
        return _call(text(body, f"{name}.{where}"))
    role = ROLES.get(said.strip().lower())
    if role is None:
        raise Unfit(f"{name} has the unknown role {said!r}; known: {', '.join([*ROLES, *sorted(CALLS)])}")
    calls = item.get("tool_calls") or None
    if isinstance(body, list):
        body = _joined(body, f"{name}.{where}")
    if body is not None or not calls:
        text(body, f"{name}.{where}")
    if len(item) == 2:
        return message(role, body)
    more = {
        field: item[field] for field in ("reasoning_content", "name", "tool_call_id") if item.get(field) is not None
    }
    for field, given in more.items():
        text(given, f"{name}.{field}")
    if calls:
        more["tool_calls"] = calls if isinstance(calls, str) else as_json(calls)
    return message(role, body, **more)


def _call(body: str) -> Turn:
    """A ShareGPT function_call turn: JSON of name and arguments, or of a list of them; other text stays text."""
    try:
        calls = json.loads(body)
    except (ValueError, RecursionError):
        return message("assistant", body)
    calls = calls if isinstance(calls, list) else [calls]
    if not all(isinstance(call, dict) and isinstance(call.get("name"), str) for call in calls):
        return message("assistant", body)
    return message("assistant", None, tool_calls=as_json([{"type": "function", "function": call} for call in calls]))


def _joined(parts: list[Any], name: str) -> str:
    """Text parts of a content list; images and sound are no text."""
    said = []
    for part in parts:
        if isinstance(part, str):
            said.append(part)
        elif isinstance(part, Mapping) and part.get("type", "text") == "text":
            said.append(text(part.get("text"), name))
        else:
            raise Unfit(f"{name} has a part that is no text")
    return "\n\n".join(said)


def leftovers(value: Any) -> list[dict[str, Any]] | None:
    """Fields of turns that the row schema has no place for, turn by turn; None where there are none."""
    found = [
        {key: given for key, given in item.items() if key not in FIELDS and given is not None}
        if isinstance(item, Mapping) and len(item) > 2
        else {}
        for item in (value if isinstance(value, list) else [])
    ]
    return found if any(found) else None


def transcript(value: Any, name: str) -> list[Turn]:
    r"""Turns of a "\n\nHuman: …\n\nAssistant: …" text, white space at their ends taken off (hh-rlhf)."""
    pieces = _SPEAKER.split(text(value, name))
    if len(pieces) < 3 or pieces[0].strip():
        raise Unfit(f"{name} does not begin with 'Human:' or 'Assistant:'")
    speakers = {"Human": "user", "Assistant": "assistant"}
    return [message(speakers[who], said.strip()) for who, said in zip(pieces[1::2], pieces[2::2], strict=True)]


def parted(chosen: Sequence[Turn], rejected: Sequence[Turn]) -> tuple[list[Turn], list[Turn], list[Turn]]:
    """(prompt, chosen, rejected) of two conversations that share their prompt: parted after their longest common
    beginning, which leaves at least one turn to each and ends before an assistant turn of both."""
    limit = min(len(chosen), len(rejected)) - 1
    cut = 0
    while cut < limit and chosen[cut] == rejected[cut]:
        cut += 1
    if chosen == rejected:  # before the last answer
        cut = max((i for i, turn in enumerate(chosen) if turn["role"] == "assistant"), default=0)
    if chosen[cut]["role"] != "assistant" or rejected[cut]["role"] != "assistant":
        raise Unfit(f"chosen and rejected part at turn {cut + 1}, which is not an assistant turn of both")
    if cut == 0:
        raise Unfit("chosen and rejected share no prompt")
    return list(chosen[:cut]), list(chosen[cut:]), list(rejected[cut:])
