"""Models by the names that a recipe gives them: where they lie, made when first needed, handed up to curation.

A stage's name stands for the model that it ended with: its base model with OUT/STAGE/adapter, or OUT/STAGE/model.
"""

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa

from ..curation.door import ChatModel, Embedder, EntailmentModel, Progress, ResponseScorer
from ..curation.folder import HouseError, RunFolder
from ..curation.ledger import State
from ..curation.rows import digest as digest_of
from ..curation.sift import SetPlan, full_steps, held_out_rows, state_before, step_name
from ..tuning.digests import model_digest
from ..tuning.hub import model_folder
from .doors.doors import Doors
from .progress import Done, interrupts_wait
from .recipe import Curate, Recipe, plain
from .stages import nearest, steps_of


def set_plan(recipe: Recipe, stage: Curate) -> SetPlan:
    """What curation needs to know of one set."""
    return SetPlan(stage.set, stage.kind, stage.sources, steps_of(recipe, stage), stage.held_out, recipe.seed)


class Workshop:
    """The models and finished sets of one run (protocol curation.steps.Tools). Keeps one loaded model at a time."""

    def __init__(self, recipe: Recipe, folder: RunFolder) -> None:
        self.recipe, self.folder = recipe, folder
        self.announced: set[str] = set()  # new models that a job of this run makes or finds made
        self.digests: dict[str, str] = {}
        self.loaded: tuple[str, Any] | None = None
        self.chats: dict[str, ChatModel] = {}
        self.doors = Doors(self)

    def base(self, name: str) -> str:
        """The recipe's model behind a model's or stage's name."""
        stage = self.recipe.trained().get(name)
        if stage is None and name not in self.recipe.models:
            known = [*self.recipe.models, *self.recipe.trained()]
            raise HouseError(f"unknown model or stage {name!r}; {nearest(name, known)}")
        return name if stage is None else stage.model

    def base_folder(self, name: str) -> Path:
        """The folder of the base model; one that is made is keyed by what it is and what it learns from."""
        base = self.base(name)
        model = self.recipe.models[base]
        if model.path is not None:
            return model_folder(model.path)
        if model.distil is not None:
            key = digest_of("distil", self.digest(model.distil))
            return self.folder.models / f"{base}-{key[:12]}"
        if not model.has_weights:
            raise HouseError(f"model {base!r} can only be asked: this step needs the weights of a model with a `path`")
        assert model.corpus is not None
        sources = [plain(self.recipe.source(source)) for source in self.recipe.sets()[model.corpus].sources]
        key = digest_of(repr(model.new), model.corpus, repr(sources))
        return self.folder.models / f"{base}-{key[:12]}"

    def where(self, name: str) -> tuple[Path, Path | None]:
        """Model folder, and adapter folder where there is one."""
        stage = self.recipe.trained().get(name)
        if stage is None:
            return self.base_folder(name), None
        out = self.folder.stage(stage.name)
        if (out / "model" / "config.json").is_file():
            return out / "model", None
        if not (out / "adapter" / "adapter_config.json").is_file():
            raise HouseError(f"stage {name!r} has no model yet in {out}: it has not finished")
        base = self.base_folder(name) if stage.start is None else self.where(stage.start)[0]
        return base, out / "adapter"  # an adapter that continues full weights lies on those

    def is_made(self, name: str) -> bool:
        """Whether the model is made or distilled in a run."""
        model = self.recipe.models[self.base(name)]
        return model.new is not None or model.distil is not None

    def make(self, name: str, progress: Progress) -> Done:
        """Makes a new or distilled model, or finds it made."""
        home = self.base_folder(name)
        cached = (home / "config.json").is_file()
        model = self.recipe.models[self.base(name)]
        spec = model.new
        if not cached and spec is not None:
            with interrupts_wait():
                from ..tuning.models import make_model

            make_model(home, spec, self._texts(name, spec.rows), progress)
        elif not cached and model.distil is not None:
            with interrupts_wait():
                from ..tuning.static import distil

            distil(self.base_folder(model.distil), home, progress=progress)
        return Done(str(home), cached)

    def _texts(self, name: str, limit: int) -> Iterator[Any]:
        """Conversations or documents of the corpus set that live now, at most `limit` of them, evenly spaced."""
        corpus = self.recipe.models[self.base(name)].corpus
        assert corpus is not None
        state = self._live(set_plan(self.recipe, self.recipe.sets()[corpus]))
        return evenly(state.tables(["messages", "chosen", "text"]), state.rows, limit)

    def _live(self, plan: SetPlan) -> State:
        """The rows of a set that live after its last finished step."""
        home = self.folder.ledger / plan.name
        done = 0
        for index, step in enumerate(full_steps(plan)):
            if not (home / step_name(index, step) / "step.json").is_file():
                break
            done = index + 1
        if done == 0:
            raise HouseError(f"the set {plan.name!r}, from which a new model learns, has not been begun")
        return state_before(self.folder, plan, done)

    def load(self, name: str) -> Any:
        """The loaded model, in evaluation mode."""
        with interrupts_wait():
            from ..tuning.models import load_model

        home, adapter = self.where(name)
        stage = self.recipe.trained().get(name)
        return load_model(home, dtype="auto" if stage is None else stage.settings.dtype, adapter=adapter)

    # ---- the protocol Tools

    def scorer(self, model: str) -> ResponseScorer:
        with interrupts_wait():
            from ..tuning.score import PackedScorer

        vllm = self.recipe.models[self.base(model)].vllm
        if vllm is not None and vllm.scores:
            return self.doors.vllm(model, vllm)
        scorer: ResponseScorer = self.kept(f"scorer {model}", lambda: PackedScorer(*self.where(model)))
        return scorer

    def chat(self, model: str) -> ChatModel:
        """A model to ask: each answer kept on disk, from its server, vLLM, transformers or cassette."""
        if model not in self.chats:
            self.chats[model] = self.doors.chat(model)
        return self.chats[model]

    def transformers(self, model: str) -> ChatModel:
        """The model asked by transformers, without anything kept."""
        with interrupts_wait():
            from ..tuning.generate import TransformersChat

        chat: ChatModel = self.kept(f"chat {model}", lambda: TransformersChat(*self.where(model)))
        chat.name = model  # as the recipe calls it, not where it lies
        return chat

    def entailment(self, model: str) -> EntailmentModel:
        with interrupts_wait():
            from ..tuning.entail import CrossEncoder

        nli: EntailmentModel = self.kept(f"entailment {model}", lambda: CrossEncoder(self.base_folder(model)))
        return nli

    def embedder(self, model: str) -> Embedder:
        with interrupts_wait():
            from ..tuning.embed import load_embedder

        embedder: Embedder = self.kept(f"embedder {model}", lambda: load_embedder(*self.where(model)))
        return embedder

    def token_counts(self, model: str, rows: pa.Table) -> pa.Table:
        with interrupts_wait():
            from ..tuning.counts import token_counts
            from ..tuning.models import load_tokenizer

        return token_counts(self.kept(f"tokenizer {model}", lambda: load_tokenizer(self.base_folder(model))), rows)

    def kept(self, key: str, make: Any) -> Any:
        """What `make` makes, until another is asked for: one loaded model at a time."""
        if self.loaded is None or self.loaded[0] != key:
            self.loaded = None  # the one before may go before the next is loaded
            self.loaded = (key, make())
        return self.loaded[1]

    def close(self) -> None:
        """Ends what runs beside this process: engines and servers."""
        before, self.loaded = self.loaded, None
        if before is not None and hasattr(before[1], "close"):
            before[1].close()
        self.doors.close()

    def digest(self, model: str) -> str:
        if model not in self.digests:
            if not self.recipe.models[self.base(model)].has_weights:
                self.digests[model] = self.doors.digest(model)
                return self.digests[model]
            home, adapter = self.where(model)
            base = model_digest(home)
            self.digests[model] = base if adapter is None else f"{base}+{model_digest(adapter)}"
        return self.digests[model]

    def curated(self, set_name: str, split: str) -> Iterator[pa.Table]:
        stage = self.recipe.sets().get(set_name)
        if stage is None or not (self.folder.curated(set_name) / "manifest.json").is_file():
            raise HouseError(f"the set {set_name!r} is not finished yet, so its rows cannot be used")
        plan = set_plan(self.recipe, stage)
        steps = len(full_steps(plan))
        state = state_before(self.folder, plan, steps)
        return state.tables() if split == "train" else held_out_rows(self.folder, plan, steps, state)


def evenly(tables: Iterable[pa.Table], total: int, limit: int) -> Iterator[Any]:
    """At most `limit` of the `total` rows of `tables`, evenly spaced, as `make_model` takes them."""
    size = min(limit, total)
    chosen = iter(index * total // size for index in range(size))
    wanted, start = next(chosen, None), 0
    for table in tables:
        offsets = []
        while wanted is not None and wanted < start + table.num_rows:
            offsets.append(wanted - start)
            wanted = next(chosen, None)
        start += table.num_rows
        rows = table.select(["messages", "chosen", "text"]).take(pa.array(offsets, pa.int64()))
        yield from (_text(row) for row in rows.to_pylist())


def _text(row: Mapping[str, Any]) -> Any:
    """A row as `make_model` takes it: a conversation, or the raw text of a document."""
    if row["text"] is not None:
        return row["text"]
    return [turn for part in (row["messages"], row["chosen"]) for turn in part or ()]
