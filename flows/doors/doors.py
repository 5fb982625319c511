"""Which door stands before which model of a recipe: kept answers in front, a cassette, a server, vLLM or transformers
behind. What was asked and spent is told after each step and written into the run, as spend.json."""

from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from ...curation.door import ChatModel
from ...curation.folder import HouseError, read_json, write_json
from ...curation.rows import digest as digest_of
from ...tuning.servable import needed_rank
from ..progress import interrupts_wait
from .kept import Answers, KeptChat
from .settings import Serve, Server, Vllm
from .spend import Spend, told

if TYPE_CHECKING:
    from ..models import Workshop
    from ..stages import Model
    from .cassette import CassetteChat
    from .server import Card, ServerChat
    from .serving import Serving
    from .vllm_engine import VllmChat

E = TypeVar("E", Vllm, Serve)
UNKNOWN = "unknown"  # a licence that nobody stated


class Doors:
    """The chat models of one run, by their names in its recipe."""

    def __init__(self, shop: "Workshop") -> None:
        self.shop = shop
        self.home = shop.folder.measures.parent / "answers"  # shared where the run has a --cache
        self.spends: dict[str, Spend] = {}
        self._told: dict[str, dict[str, Any]] = {}
        self._cards: dict[str, Card] = {}
        self._servers: dict[str, ServerChat] = {}
        self._cassettes: dict[str, CassetteChat] = {}
        self._servings: dict[Path, Serving] = {}
        self.note: Callable[[str], None] = lambda text: None  # is told how a server's start goes
        self._answers: Answers | None = None
        self._started = datetime.now(UTC).isoformat(timespec="seconds")

    @property
    def answers(self) -> Answers:
        """The file of kept answers."""
        if self._answers is None:
            self._answers = Answers(self.home / "answers.sqlite")
        return self._answers

    @property
    def run(self) -> str:
        """Who pays: this run, over all its starts."""
        path = self.shop.folder.root / "started.json"
        return digest_of(str(self.shop.folder.root.resolve()), read_json(path)["created"] if path.is_file() else "")

    def chat(self, name: str) -> KeptChat:
        """The model that the recipe calls `name`, or that the stage `name` ended with, each answer kept on disk."""
        spec, digest = self.spec(name), self.shop.digest(name)
        tape = self._cassette(name) if self._on_cassette(name) else None
        price = spec.price or (tape.price if tape else (0.0, 0.0))
        before = self.answers.spent(digest, self.run, price)
        spend = self.spends.setdefault(name, Spend(price, before))
        return KeptChat(
            self.answers,
            lambda: self._behind(name),
            name=tape.name if tape else self._cards[name].model if name in self._cards else name,
            digest=digest,
            licence=spec.licence or (tape.licence if tape else UNKNOWN),
            price=price,
            spend=spend,
            run=self.run,
        )

    def digest(self, name: str) -> str:
        """Digest of a model that can only be asked."""
        return self._cassette(name).digest if self._on_cassette(name) else self._card(name).digest

    def spec(self, name: str) -> "Model":
        """What the recipe says of the model, or of the one that a stage trains."""
        return self.shop.recipe.models[self.shop.base(name)]

    # ---- who answers

    def _on_cassette(self, name: str) -> bool:
        return self.spec(name).cassette is not None and name in self.shop.recipe.models

    def _behind(self, name: str) -> ChatModel:
        """The door behind the kept answers."""
        return self._cassette(name) if self._on_cassette(name) else self._live(name)

    def _cassette(self, name: str) -> "CassetteChat":
        if name not in self._cassettes:
            from .cassette import CassetteChat

            spec = self.spec(name)
            assert spec.cassette is not None
            live = spec.server is not None or spec.has_weights
            make = (lambda: self._live(name)) if live else None
            self._cassettes[name] = CassetteChat(Path(spec.cassette), make, licence=spec.licence, price=spec.price)
        return self._cassettes[name]

    def _live(self, name: str) -> ChatModel:
        spec = self.spec(name)
        if spec.server is not None:
            return self._server(name)
        if spec.serve is not None:
            return self._served(name, spec.serve)
        return self.shop.transformers(name) if spec.vllm is None else self.vllm(name, spec.vllm)

    def vllm(self, name: str, settings: Vllm) -> "VllmChat":
        """The model through vLLM in process: one engine for a base and all adapters on it."""
        with interrupts_wait():
            from .vllm_engine import Engine, VllmChat

        home, adapter = self.shop.where(name)
        ranks, settings = self._ranks(name), self._fitted(name, settings)
        engine = self.shop.kept(f"vllm {home} {settings}", lambda: Engine(home, settings, lora=bool(ranks)))
        chat = VllmChat(home, adapter, settings, engine=engine)
        chat.name = name  # as the recipe calls it, not where it lies
        return chat

    def _served(self, name: str, settings: Serve) -> "ServerChat":
        """The model, or the adapter of a stage, behind a server of the run's own."""
        with interrupts_wait():
            from .serving import Serving

        home, adapter = self.shop.where(name)
        serving = self._servings.get(home)
        if serving is None or not serving.running:
            log = self.shop.folder.root / "answers" / f"vllm-{self.shop.base(name)}.log"
            base = self.shop.base(name) if adapter is not None else name
            fitted = self._fitted(name, settings)
            self._servings[home] = serving = Serving(home, fitted, log=log, name=base, note=self.note)
        spec, spend = self.spec(name), self.spends.get(name)
        return serving.chat(
            name,
            adapter,
            licence=spec.licence or UNKNOWN,
            price=spec.price or (0.0, 0.0),
            budget=spec.budget,
            spend=spend,
            halts=True,
        )

    def _ranks(self, name: str) -> list[int]:
        """Of the adapters that the recipe trains on the model."""
        stages = [one for one in self.shop.recipe.trained().values() if one.model == self.shop.base(name)]
        return [one.settings.lora.rank for one in stages if one.settings.lora is not None]

    def _fitted(self, name: str, settings: E) -> E:
        """The settings with the rank that the recipe's adapters need, where they leave it open."""
        ranks = self._ranks(name)
        if settings.max_lora_rank is not None or not ranks:
            return settings
        return replace(settings, max_lora_rank=needed_rank(max(ranks)))

    def before_training(self) -> None:
        """Ends the servers that are not to stay beside training; they start again when they are asked."""
        for home, serving in list(self._servings.items()):
            if not serving.settings.stay:
                self._servings.pop(home).stop()

    def close(self) -> None:
        """Ends all servers."""
        while self._servings:
            self._servings.popitem()[1].stop()

    def _server(self, name: str) -> "ServerChat":
        spec = self.spec(name)
        if name not in self._servers:
            from .server import ServerChat

            assert spec.server is not None
            price = spec.price or (0.0, 0.0)
            card = self._card(name)
            spend = self.spends.setdefault(name, Spend(price, self.answers.spent(card.digest, self.run, price)))
            self._servers[name] = ServerChat(
                spec.server,
                card,
                licence=spec.licence or UNKNOWN,
                price=price,
                budget=spec.budget,
                spend=spend,
                halts=True,
            )
        return self._servers[name]

    def _card(self, name: str) -> "Card":
        """What the server says of its model; where it is down, what it said last (all that is asked may be kept)."""
        from .server import Card, look

        server = self.spec(name).server
        assert server is not None
        if name not in self._cards:
            path = self.home / f"{_place(server)}.json"
            try:
                self._cards[name] = card = look(server)
                write_json(path, vars(card))
            except HouseError:
                if not path.is_file():
                    raise
                self._cards[name] = Card(**read_json(path))
        return self._cards[name]

    # ---- what it cost

    def report(self) -> list[str]:
        """A line for each model that was asked since the last report, and one for each kind of error, in the words of
        its last; also written to OUT/spend.json."""
        lines = []
        for name, spend in self.spends.items():
            now = spend.record()
            line = told(name, self._told.get(name, {}), now)
            if line is not None:
                before = self._told.get(name, {}).get("failed", {})
                kinds = [kind for kind, count in now["failed"].items() if count > before.get(kind, 0)]
                lines += [line, *(f"  {kind}: {now['why'][kind]}" for kind in kinds)]
                self._told[name] = now
        if lines:
            self._write()
        return lines

    def _write(self) -> None:
        """spend.json: what each start of the run asked, and what the run has paid for kept answers in all."""
        path = self.shop.folder.root / "spend.json"
        starts = read_json(path)["starts"] if path.is_file() else []
        starts = [start for start in starts if start["started"] != self._started]
        starts.append({"started": self._started, "models": dict(sorted(self._told.items()))})
        paid = {}
        for name in sorted(self._told):
            tokens, money = self.answers.spent(self.shop.digest(name), self.run, self.spends[name].price)
            paid[name] = {"tokens": tokens, "money": round(money, 6)}
        write_json(path, {"paid": paid, "starts": starts})


def _place(server: Server) -> str:
    return f"server-{digest_of(server.url.rstrip('/'), server.model or '')[:12]}"
