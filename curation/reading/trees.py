"""Message trees (OASST): messages with message_id, parent_id, role, text and rank, flat or nested, as conversations.

Of each tree one conversation is read: from the root always to the best-ranked reply, the end being an assistant's turn.
As preferences (shape `tree_preference`) each prompt whose ranked replies differ gives one pair, its best reply against
its worst, after the turns that lead there. Deleted messages and what hangs on them are passed over.
"""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from .chunks import Found
from .formats import Record, Unreadable, shown
from .turns import ROLES, as_json, kind

TREES = {"tree": "messages", "tree_preference": "preference"}  # ours -> the shape of what comes out
Node = dict[str, Any]


def is_tree(fields: Mapping[str, Any]) -> bool:
    """Whether a record is one message of a tree, or a whole tree."""
    return {"message_id", "parent_id", "role", "text"} <= fields.keys() or _is_nested(fields)


def _is_nested(fields: Mapping[str, Any]) -> bool:
    root = fields.get("prompt")
    return isinstance(root, Mapping) and "replies" in root


def conversations(found: Iterable[Found], shape: str) -> Iterator[Found]:
    """A record for each conversation, or pair, of the trees among these records; what is no message comes through as
    Unreadable. Nested trees are drawn as they come; flat messages are held in memory until the last has come."""
    flat: list[tuple[str, Record]] = []
    for file, _, record in found:
        if isinstance(record, Unreadable):
            yield file, None, record
        elif _is_nested(record.fields):
            tree = {"message_tree_id": record.fields.get("message_tree_id")}
            yield from _drawn(file, record, tree | dict(record.fields["prompt"]), shape)
        else:
            flat.append((file, record))
    yield from _planted(flat, shape)


def _planted(flat: list[tuple[str, Record]], shape: str) -> Iterator[Found]:
    """The trees of flat messages, in the order of their roots."""
    nodes: dict[str, Node] = {}
    for _, record in flat:
        own = record.fields.get("message_id")
        if isinstance(own, str):
            nodes.setdefault(own, {**record.fields, "replies": []})
    seen: set[str] = set()
    roots: list[tuple[str, Record, Node]] = []
    for file, record in flat:
        own, parent = record.fields.get("message_id"), record.fields.get("parent_id")
        if not isinstance(own, str) or own in seen:
            why = f"the message_id {own!r} was used before" if isinstance(own, str) else "no message_id"
            yield file, None, _unreadable(file, record, why)
        elif parent is None:
            roots.append((file, record, nodes[own]))
        elif parent not in nodes:
            yield file, None, _unreadable(file, record, f"its parent {parent!r} is not in the source")
        else:
            nodes[parent]["replies"].append(nodes[own])
        if isinstance(own, str):
            seen.add(own)
    for file, record, root in roots:
        yield from _drawn(file, record, root, shape)


def _drawn(file: str, record: Record, root: Node, shape: str) -> Iterator[Found]:
    fault = _fault(root)
    if fault is not None:
        yield file, None, _unreadable(file, record, fault)
        return
    about = {name: root[name] for name in ("message_tree_id", "lang") if root.get(name) is not None}
    if shape == "tree_preference":
        for path, ranked in _ranked(root):
            best, worst = ranked[0], ranked[-1]
            ids = [node.get("message_id") for node in (*path, best, worst)]
            replies = [{name: one.get(name) for name in ("message_id", "rank", "text")} for one in ranked]
            pair = {"prompt": [_turn(node) for node in path], "chosen": [_turn(best)], "rejected": [_turn(worst)]}
            yield file, None, Record(record.line, {**pair, **about, "message_ids": ids, "replies": replies}, record.raw)
        return
    path = _best(root)
    while path and _role(path[-1]) != "assistant":
        path.pop()
    if not path:
        yield file, None, _unreadable(file, record, "no reply of an assistant in this tree")
        return
    ids = [node.get("message_id") for node in path]
    said = {"messages": [_turn(node) for node in path], **about, "message_ids": ids}
    yield file, None, Record(record.line, said, record.raw)


def _fault(node: Node) -> str | None:
    """What makes a tree unreadable, anywhere in it."""
    waiting = [node]
    while waiting:
        one = waiting.pop()
        if not isinstance(one.get("text"), str):
            return f"message {one.get('message_id')}: text is {kind(one.get('text'))}"
        if _role(one) is None:
            return f"message {one.get('message_id')} has the unknown role {one.get('role')!r}"
        waiting += one.get("replies") or ()
    return None


def _replies(node: Node) -> list[Node]:
    """What was answered, best rank first, unranked last, else in the order of the source."""
    kept = [reply for reply in node.get("replies") or () if not reply.get("deleted")]
    return sorted(kept, key=lambda reply: (reply.get("rank") is None, reply.get("rank") or 0))


def _best(root: Node) -> list[Node]:
    path = [root]
    while replies := _replies(path[-1]):
        path.append(replies[0])
    return path


def _ranked(root: Node) -> Iterator[tuple[list[Node], list[Node]]]:
    """(turns that lead there, an assistant's ranked replies, the best first) of each prompt with replies of different
    ranks."""
    waiting = [[root]]
    while waiting:
        path = waiting.pop()
        replies = _replies(path[-1])
        ranked = [one for one in replies if one.get("rank") is not None and _role(one) == "assistant"]
        if len(ranked) > 1 and ranked[0]["rank"] < ranked[-1]["rank"]:
            yield path, ranked
        waiting += [[*path, reply] for reply in reversed(replies)]


def _role(node: Node) -> str | None:
    return ROLES.get(str(node.get("role")).strip().lower())


def _turn(node: Node) -> dict[str, str]:
    return {"role": str(_role(node)), "content": node["text"]}


def _unreadable(file: str, record: Record, why: str) -> Unreadable:
    return Unreadable(file, record.line, why, shown(as_json(record.fields) if record.raw is None else record.raw))
