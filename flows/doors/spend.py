"""What was asked of a model, what came of it and what it cost; and the budget that it is held to."""

import threading
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from ...curation.door import ChatAnswer, ChatError, cost
from .settings import Budget, Price


@dataclass
class Spend:
    """Counts of one model in one start of a run; asked = answered + failed + under way. cached: answered from what was
    paid for before; tokens and money are of the others. why: the last error of each kind, in words. tries: requests
    sent; lost: tries that came to nothing and were tried again, by kind. busy: seconds in which requests were under
    way. before: (tokens, money) of earlier starts."""

    price: Price = (0.0, 0.0)
    before: tuple[int, float] = (0, 0.0)
    asked: int = 0
    answered: int = 0
    cached: int = 0
    failed: Counter[str] = field(default_factory=Counter)
    why: dict[str, str] = field(default_factory=dict)
    tries: int = 0
    lost: Counter[str] = field(default_factory=Counter)
    prompt_tokens: int = 0
    tokens: int = 0
    busy: float = 0.0
    _lock: Any = field(default_factory=threading.Lock, repr=False)

    @property
    def money(self) -> float:
        return cost(self.price, self.prompt_tokens, self.tokens)

    def ask(self, count: int) -> None:
        with self._lock:
            self.asked += count

    def told(self, answer: ChatAnswer | ChatError) -> None:
        with self._lock:
            if isinstance(answer, ChatError):
                self.failed[answer.kind] += 1
                self.why[answer.kind] = answer.detail
                return
            self.answered += 1
            if answer.cached:
                self.cached += 1
            else:
                self.prompt_tokens += answer.prompt_tokens
                self.tokens += answer.tokens

    def record(self) -> dict[str, Any]:
        """As JSON holds it, with rates."""
        return {
            "asked": self.asked,
            "answered": self.answered,
            "cached": self.cached,
            "failed": dict(sorted(self.failed.items())),
            "why": dict(sorted(self.why.items())),
            "tries": self.tries,
            "lost": dict(sorted(self.lost.items())),
            "prompt_tokens": self.prompt_tokens,
            "tokens": self.tokens,
            "money": round(self.money, 6),
            "busy_seconds": round(self.busy, 3),
            "tokens_per_second": round(self.tokens / self.busy, 1) if self.busy else None,
        }


def told(name: str, before: dict[str, Any], now: dict[str, Any]) -> str | None:
    """One line on what a step asked of the model `name`: the difference of two records. None where nothing."""
    asked = now["asked"] - before.get("asked", 0)
    if not asked:
        return None
    new = {key: now[key] - before.get(key, 0) for key in ("answered", "cached", "prompt_tokens", "tokens")}
    failed = Counter(now["failed"]) - Counter(before.get("failed", {}))
    money = now["money"] - before.get("money", 0.0)
    seconds = now["busy_seconds"] - before.get("busy_seconds", 0.0)
    parts = [f"{name} was asked {asked:,}: {new['answered']:,} answered"]
    parts += [f"{new['cached']:,} of them kept from before"] if new["cached"] else []
    parts += [f"{count:,} {kind}" for kind, count in sorted(failed.items())]
    if new["tokens"] or new["prompt_tokens"]:
        parts.append(f"{new['prompt_tokens']:,} + {new['tokens']:,} tokens")
        parts += [f"{new['tokens'] / seconds:,.0f} tokens/s"] if seconds > 0 else []
        parts += [f"cost {money:,.4f}"] if money else []
    return ", ".join(parts)


@dataclass
class Purse:
    """A budget under use: what is spent and what requests under way may still cost."""

    budget: Budget | None
    price: Price
    tokens: int = 0  # spent
    money: float = 0.0
    held: dict[int, tuple[int, float]] = field(default_factory=dict)  # by ticket, of requests under way
    _next: int = 0

    def hold(self, prompt_tokens: int, tokens: int) -> int | None:
        """A ticket for a request that costs at most so much; None where it might go beyond the budget."""
        most = (prompt_tokens + tokens, cost(self.price, prompt_tokens, tokens))
        if self.budget is not None:
            held_tokens = sum(one for one, _ in self.held.values())
            held_money = sum(one for _, one in self.held.values())
            over_tokens = self.budget.tokens is not None and self.tokens + held_tokens + most[0] > self.budget.tokens
            over_money = self.budget.money is not None and self.money + held_money + most[1] > self.budget.money
            if over_tokens or over_money:
                return None
        self._next += 1
        self.held[self._next] = most
        return self._next

    def pay(self, ticket: int, answer: ChatAnswer | None) -> None:
        """Ends what `hold` began. answer: None where nothing came that a server would charge for."""
        self.held.pop(ticket)
        if answer is not None:
            self.tokens += answer.prompt_tokens + answer.tokens
            self.money += cost(self.price, answer.prompt_tokens, answer.tokens)
