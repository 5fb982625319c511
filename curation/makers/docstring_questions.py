"""Questions and answers out of Python docstrings: instruction data with nothing to download."""

import heapq
import inspect
import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import pyarrow as pa

from ..rows import Row, digest, message
from ..steps import Corpus
from ..text.view import words
from ..unfolding import unfolded


@dataclass(frozen=True)
class DocstringQuestions:
    """Question/answer rows from raw documents whose `meta` carries qualified_name, kind, module and perhaps signature
    (the source `docstrings:stdlib`); other rows are left alone.

    Forms: purpose, explanation, arguments, return value, errors, example, signature, which-one-is-it, and writing the
    docstring itself. A form is asked only where the docstring holds its answer (an arguments section, a doctest, a
    sentence on what is raised); which of the fitting forms, and in which words, is drawn by a hash of the row_id.
    Answers are the docstring's own words, whole paragraphs or sentences, of 3 to `max_words` words.

    limit: documents to ask about at most (the lowest by hash of row_id; None: all). questions: rows made of one
    document at most. Documents that were asked about leave the set with reason source_document.
    """

    limit: int | None = None
    questions: int = 1
    max_words: int = 200

    scope: ClassVar[Literal["maker"]] = "maker"
    consumes: ClassVar[str | None] = "source_document"
    model: ClassVar[None] = None

    def make(self, corpus: Corpus) -> Iterator[pa.Table]:
        """Tables of new rows, one for each part that gave any."""
        asked = self._asked(corpus)

        def contents(row: Row) -> Iterator[dict[str, Any]]:
            document = read_document(row) if asked is None or row["row_id"] in asked else None
            if document is not None:
                for form, question, answer in ask(document, self.max_words)[: self.questions]:
                    about = {"form": form, "qualified_name": document.name}
                    turns = [message("user", question), message("assistant", answer)]
                    yield {"messages": turns, "meta": json.dumps(about)}

        wanted = "it wants documents with qualified_name, kind and module in meta, as the source docstrings:… has them"
        return unfolded(self, corpus, contents, "docstring_questions", wanted, ["row_id", "text", "meta"])

    def _asked(self, corpus: Corpus) -> set[str] | None:
        """row_ids of the documents to ask about, None for all."""
        if self.limit is None:
            return None
        parts = corpus.tables(["row_id", "text", "meta"])
        fit = (row["row_id"] for part in parts for row in part.to_pylist() if self._fits(row))
        return set(heapq.nsmallest(self.limit, fit, key=lambda name: digest("limit", name)))

    def _fits(self, row: dict[str, Any]) -> bool:
        document = read_document(row)
        return document is not None and bool(ask(document, self.max_words))


@dataclass(frozen=True)
class _Document:
    row_id: str
    name: str  # json.dumps
    leaf: str  # dumps
    kind: str  # function, method, class, module, …
    module: str
    signature: str  # "(obj, *, indent=None)" or empty
    text: str  # cleaned
    paragraphs: list[str]


# Many begin with the call: "detach() -> file descriptor", "trunc(self): Truncates …".
_SIGNATURE_LINE = re.compile(r"\A[\w.]+\((?:[^\n]*\)(?:[ ]*->[^\n]*)?(?:\n|\Z)|[^\n()]*\):[ ]+)")


def read_document(row: dict[str, Any]) -> _Document | None:
    """A row as a docstring, or None where it is none."""
    if not row["text"] or not row["meta"]:
        return None
    meta = json.loads(row["meta"])
    if not isinstance(meta, dict) or not meta.get("qualified_name"):
        return None
    name = str(meta["qualified_name"])
    leaf = name.rpartition(".")[2]
    text = _SIGNATURE_LINE.sub("", inspect.cleandoc(row["text"]).removeprefix(f"{leaf}: ")).strip("\n")
    if not text.strip():
        return None
    signature = str(meta.get("signature") or "")
    bare = signature[signature.find("(") :] if "(" in signature else ""
    if " at 0x" in bare:  # a default's memory address is noise
        bare = ""
    return _Document(
        row_id=row["row_id"],
        name=name,
        leaf=leaf,
        kind=str(meta.get("kind") or "object"),
        module=str(meta.get("module") or name.rpartition(".")[0]),
        signature=bare,
        text=text,
        paragraphs=[piece.strip("\n") for piece in re.split(r"\n\s*\n", text) if piece.strip()],
    )


def ask(document: _Document, max_words: int) -> list[tuple[str, str, str]]:
    """(form, question, answer) of every form that fits, in an order drawn by the document's row_id."""
    fitting = []
    for form, (phrasings, answer_of) in _FORMS.items():
        answer = answer_of(document, max_words)
        if answer and 3 <= len(words(answer)) <= max_words:
            draw = int(digest("phrasing", form, document.row_id)[:8], 16)
            question = phrasings[draw % len(phrasings)].format(
                name=document.name, kind=document.kind, module=document.module, description=_description(document),
                header=_header(document),
            )  # fmt: skip
            fitting.append((digest("form", form, document.row_id), form, question, answer.strip()))
    return [(form, question, answer) for _, form, question, answer in sorted(fitting)]


def _purpose(document: _Document, max_words: int) -> str | None:
    """The first paragraph, as running text."""
    return None if _is_code(document.paragraphs[0]) else " ".join(document.paragraphs[0].split())


def _explanation(document: _Document, max_words: int) -> str | None:
    """As many whole paragraphs as fit, at least two."""
    head = _head(document.paragraphs, max_words)
    return "\n\n".join(head) if len(head) > 1 else None


_SECTION = re.compile(
    r"^(?P<title>Args|Arguments|Keyword Arguments|Parameters|Returns?|Raises?):?[ ]*\n(?:-{3,}\n)?"
    r"(?P<body>(?:(?:[ \t]+.*|[ \t]*)(?:\n|\Z))+|(?:.+(?:\n|\Z))+)",
    re.MULTILINE,
)
_FIELD = re.compile(r"^[ \t]*:(?P<title>param|return|raise)s?(?P<body>[^:\n]*:.*(?:\n[ \t]+(?!:).*)*)", re.MULTILINE)


def _section(document: _Document, *titles: str) -> str | None:
    """Body of the first section (Google, numpy or Sphinx style) with one of these titles."""
    for match in _SECTION.finditer(document.text):
        if match["title"] in titles:
            return inspect.cleandoc("\n" + match["body"].rstrip())
    fields = [match["body"].strip() for match in _FIELD.finditer(document.text) if match["title"] in titles]
    return "\n".join(f"- {field.lstrip(': ')}" for field in fields) or None


def _arguments(document: _Document, max_words: int) -> str | None:
    return _section(document, "Args", "Arguments", "Keyword Arguments", "Parameters", "param")


def _returns(document: _Document, max_words: int) -> str | None:
    """The section on it, or a first paragraph that begins with "Return"."""
    found = _section(document, "Return", "Returns", "return")
    if found is None and document.kind not in ("class", "module") and re.match(r"Returns?\b", document.text):
        return _purpose(document, max_words)
    return found


_RAISING = re.compile(
    r"\b[Rr]ais(?:es?|ing)\b[^.]*?\b\w*(?:Error|Exception|Warning|StopIteration)\b"
    r"|\b[A-Z]\w*(?:Error|Exception|Warning)\b[^.]*\braised\b"
)


def _errors(document: _Document, max_words: int) -> str | None:
    """The section on it, or the sentences that name what is raised."""
    if document.kind == "module":
        return None
    found = _section(document, "Raise", "Raises", "raise")
    if found:
        return found
    prose = [" ".join(piece.split()) for piece in document.paragraphs if not _is_code(piece)]
    told = [sentence for piece in prose for sentence in _sentences(piece) if _RAISING.search(sentence)]
    return " ".join(told) or None


def _example(document: _Document, max_words: int) -> str | None:
    """The first doctest."""
    for piece in document.paragraphs:
        if piece.lstrip().startswith(">>> "):
            return f"```python\n{inspect.cleandoc(piece)}\n```"
    return None


def _call(document: _Document, max_words: int) -> str | None:
    """How it is called, and its first sentence."""
    if not document.signature or document.signature == "()":
        return None
    return f"`{document.name}{document.signature}`\n\n{_description(document)}"


def _which(document: _Document, max_words: int) -> str | None:
    """Its name, where the description does not give it away."""
    told = _description(document)
    if document.leaf.lower() in told.lower() or len(words(told)) < 6 or document.kind == "module":
        return None
    return f"This describes `{document.name}{document.signature}`."


def _docstring(document: _Document, max_words: int) -> str | None:
    """The docstring, where there is a signature to write it from."""
    return "\n\n".join(_head(document.paragraphs, max_words)) if document.signature else None


_Form = tuple[tuple[str, ...], Callable[[_Document, int], str | None]]
_FORMS: dict[str, _Form] = {
    "purpose": (("What does `{name}` do?", "What is the {kind} `{name}` for?", "Describe `{name}` briefly."), _purpose),
    "explanation": (
        ("Explain the {kind} `{name}`.", "How does the {kind} `{name}` work?", "Tell me about Python's `{name}`."),
        _explanation,
    ),
    "arguments": (("Which arguments does `{name}` take?", "Explain the parameters of `{name}`."), _arguments),
    "returns": (("What does `{name}` return?", "What is the return value of the {kind} `{name}`?"), _returns),
    "errors": (("Which exceptions can `{name}` raise, and when?", "When does `{name}` raise an exception?"), _errors),
    "example": (("Show an example of `{name}`.", "How is `{name}` used? Answer with code."), _example),
    "call": (("How is `{name}` called?", "What is the signature of `{name}`, and what does it do?"), _call),
    "which": (
        (
            "Which {kind} of the module `{module}` is meant? {description}",
            "Name the {kind} of `{module}` that fits this description: {description}",
        ),
        _which,
    ),
    "docstring": (
        ("Write the docstring of this {kind} of the module `{module}`:\n\n```python\n{header}\n```",
         "Document this code from `{module}`:\n\n```python\n{header}\n```"),
        _docstring,
    ),
}  # fmt: skip


def _header(document: _Document) -> str:
    if document.kind == "class":
        rest = document.signature[1:]
        return f"class {document.leaf}:\n    def __init__(self{', ' * (rest[:1] != ')')}{rest}: ..."
    return f"def {document.leaf}{document.signature}:"


def _description(document: _Document) -> str:
    """The first sentence."""
    return _sentences(" ".join(document.paragraphs[0].split()))[0]


def _sentences(text: str) -> list[str]:
    return re.split(r"(?<!e\.g\.)(?<!i\.e\.)(?<!etc\.)(?<=[.!?])\s+(?=[A-Z`*\"'(])", text)


def _is_code(paragraph: str) -> bool:
    return paragraph.lstrip().startswith(">>>") or all(line.startswith("    ") for line in paragraph.splitlines())


def _head(paragraphs: list[str], max_words: int) -> list[str]:
    """The first paragraphs that together have at most `max_words` words, no announcement last."""
    head: list[str] = []
    left = max_words
    for piece in paragraphs:
        left -= len(words(piece))
        if left < 0:
            break
        head.append(piece)
    while head and head[-1].rstrip().endswith(":"):  # it announces what did not fit
        head.pop()
    return head
