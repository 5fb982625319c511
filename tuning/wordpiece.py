"""Token ids of many texts: each distinct word goes through the tokenizer once.

BERT's tokenizers part a text at white space and punctuation and then look at one word at a time, so that for plain
ASCII text a dictionary of words gives the same ids in a tenth of the time. Every other text, and every other kind of
tokenizer, goes through the tokenizer itself.
"""

import json
import re
from collections.abc import Sequence
from typing import Any

from tokenizers import Tokenizer

WORD = re.compile(r"[A-Za-z0-9]+|[!-/:-@\[-`{-~]")
PLAIN = re.compile(r"[\t\n\r -~]*")  # control characters vanish from words: left to the tokenizer
MOST = 1_000_000  # words remembered


class WordPieces:
    """texts -> token ids without special tokens."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        """tokenizer: without truncation and padding."""
        self._tokenizer = tokenizer
        self._known: dict[str, list[int]] = {}
        said: dict[str, Any] = json.loads(tokenizer.to_str())
        normal = said["normalizer"] or {}
        self._by_word = (
            normal.get("type") == "BertNormalizer"
            and (said["pre_tokenizer"] or {}).get("type") == "BertPreTokenizer"
            and said["model"]["type"] == "WordPiece"
        )
        self._lower = bool(normal.get("lowercase"))
        special = [token["content"] for token in said["added_tokens"]]
        self._special = re.compile("|".join(map(re.escape, special)) or r"(?!)", re.IGNORECASE)

    def __call__(self, texts: Sequence[str]) -> list[list[int]]:
        if not self._by_word:
            return self._tokenised(texts)
        words: list[list[str] | None] = list(map(self._words, texts))
        self._learn({word for said in words if said is not None for word in said})
        known = self._known
        found = [None if said is None else [id for word in said for id in known[word]] for said in words]
        others = [place for place, ids in enumerate(found) if ids is None]
        for place, ids in zip(others, self._tokenised([texts[place] for place in others]), strict=True):
            found[place] = ids
        return [ids or [] for ids in found]

    def _words(self, text: str) -> list[str] | None:
        """The text's words, or None where only the tokenizer knows."""
        if not text.isascii() or PLAIN.fullmatch(text) is None or self._special.search(text):
            return None
        return WORD.findall(text.lower() if self._lower else text)

    def _learn(self, words: set[str]) -> None:
        if len(self._known) > MOST:
            self._known.clear()
        new = sorted(words - self._known.keys())
        self._known.update(zip(new, self._tokenised(new), strict=True))

    def _tokenised(self, texts: Sequence[str]) -> list[list[int]]:
        return [each.ids for each in self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)]


def special_ends(tokenizer: Tokenizer) -> tuple[list[int], list[int]]:
    """The special tokens that the tokenizer puts before and after a text."""
    bare, full = (tokenizer.encode("a", add_special_tokens=special).ids for special in (False, True))
    at = next(start for start in range(len(full)) if full[start : start + len(bare)] == bare)
    return full[:at], full[at + len(bare) :]
