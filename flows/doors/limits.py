"""How hard a server may be pressed: limits per minute, pauses between tries, and a breaker for a server that is down.

All of it lives in one event loop. Time comes from outside (`clock`, `sleep`), so that tests need not wait.
"""

import asyncio
import random
import time
from collections import deque
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field

from .wire import Trouble

MINUTE = 60.0
LONGEST_PAUSE = 30.0  # seconds between two tries of one request, unless the server asks for more
PROBE_EVERY = (0.5, 10.0)  # seconds before the first probe of a server that is down, and between the last ones
MANY = 20  # failures in a row, at least, before a server counts as down: ten per cent bad luck never gets so far
UNREACHED = 3  # connections refused in a row that say the same

Clock = Callable[[], float]
Sleep = Callable[[float], Awaitable[None]]


def pause(tries: int, backoff: float, after: float | None) -> float:
    """Seconds before the next try, after `tries` that failed: doubled each time, shortened by chance by up to half (so
    that requests which failed together do not come back together), and never before the server wants it."""
    longest = min(backoff * 2.0 ** min(tries - 1, 16), LONGEST_PAUSE)
    return max(longest * random.uniform(0.5, 1.0), after or 0.0)


@dataclass
class Pace:
    """At most `per_minute` of something in any 60 seconds. None: no limit."""

    per_minute: int | None
    clock: Clock = time.monotonic
    sleep: Sleep = asyncio.sleep
    taken: deque[list[float]] = field(default_factory=deque)  # [when, how much]
    total: float = 0.0
    _turn: asyncio.Lock = field(default_factory=asyncio.Lock)

    async def take(self, amount: float) -> list[float]:
        """Waits until `amount` more is allowed. What is larger than the limit waits for an empty minute. Returns the
        entry, for `correct`."""
        entry = [self.clock(), amount]
        if self.per_minute is None:
            return entry
        async with self._turn:
            while self._forget() and self.total + amount > self.per_minute:
                await self.sleep(max(self.taken[0][0] + MINUTE - self.clock(), 0.001))
            entry[0] = self.clock()
            self.taken.append(entry)
            self.total += amount
        return entry

    def correct(self, entry: list[float], amount: float) -> None:
        """What an entry turned out to be."""
        if self.per_minute is not None and entry[0] > self.clock() - MINUTE:
            self.total += amount - entry[1]
            entry[1] = amount

    def _forget(self) -> int:
        while self.taken and self.taken[0][0] <= self.clock() - MINUTE:
            self.total -= self.taken.popleft()[1]
        return len(self.taken)


class Breaker:
    """Keeps requests back while a server is down. Failures in a row open it; then one probe at a time is let through,
    any answer closes it, and when `patience` seconds have brought none it gives up: `given_up` is the last trouble."""

    def __init__(self, concurrency: int, patience: float, clock: Clock = time.monotonic, sleep: Sleep = asyncio.sleep):
        self.many = max(MANY, 2 * concurrency)
        self.patience, self.clock, self.sleep = patience, clock, sleep
        self.failures = 0.0
        self.opened: float | None = None
        self.next_probe, self.step = 0.0, PROBE_EVERY[0]
        self.probing = False
        self.given_up: Trouble | None = None
        self._idle = 0.0

    def idle(self) -> float:
        """Seconds that this breaker has been open so far: clocks of requests stand still meanwhile."""
        return self._idle + (0.0 if self.opened is None else self.clock() - self.opened)

    def try_again(self) -> None:
        """After it gave up: the next request is a probe."""
        if self.given_up is not None:
            self.given_up, self.probing = None, False
            self.opened, self.next_probe = self.clock() - self.patience, 0.0

    async def enter(self) -> bool:
        """Waits until a request may be sent; True where it is the probe. Once given up, False at once."""
        while self.opened is not None and self.given_up is None:
            now = self.clock()
            if now >= self.next_probe and not self.probing:
                self.probing = True
                return True
            await self.sleep(min(max(self.next_probe - now, 0.01), 0.05))
        return False

    def succeeded(self) -> None:
        """The server answered, whatever it said."""
        if self.opened is not None:
            self._idle = self.idle()
        self.failures, self.opened, self.probing, self.given_up = 0.0, None, False, None
        self.step = PROBE_EVERY[0]

    def failed(self, trouble: Trouble, probe: bool) -> None:
        now = self.clock()
        if self.opened is None:
            self.failures += self.many / UNREACHED if trouble.down else 1.0
            if self.failures >= self.many - 1e-9:
                self.opened, self.next_probe = now, now + max(self.step, trouble.after or 0.0)
        elif probe:
            self.probing = False
            if now - self.opened >= self.patience:
                self.given_up = trouble
            self.step = min(self.step * 2, PROBE_EVERY[1])
            self.next_probe = now + max(self.step, trouble.after or 0.0)
