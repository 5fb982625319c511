"""How to share a data budget between supervised examples and preference pairs: the planner of "Balancing the Budget".

The rule (arXiv 2502.11284): below 1,000 examples all of it goes to SFT; above, a growing share to preferences; a base
model never meets DPO without SFT before it (the cold start costs 15 to 20 % on maths), and a share of less than 10 %
for SFT takes most of that away; a model that is tuned to instructions has had its SFT.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from math import log10
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from ..curation.folder import HouseError

if TYPE_CHECKING:
    from .stages import Recipe, Train

Kind = Literal["base", "instruct"]
SMALL = 1_000  # examples, below which SFT alone is best
GROWS = 100_000  # examples, from which on the preference share grows no more
LEAST = 0.10  # of the examples for SFT on a base model: the share that takes the cold start away
MOST = {"base": 1 - LEAST, "instruct": 1.0}  # preference share at GROWS


@dataclass(frozen=True)
class Plan:
    """What to buy: `sft` examples and `pairs`, at what price each, and why. left: money that buys no further one."""

    kind: Kind
    sft: int
    pairs: int
    prices: tuple[float, float]
    left: float
    reasons: tuple[str, ...]

    @property
    def examples(self) -> int:
        return self.sft + self.pairs

    @property
    def cost(self) -> float:
        return self.sft * self.prices[0] + self.pairs * self.prices[1]

    def text(self) -> str:
        """In words, a line each."""
        share = self.sft / self.examples if self.examples else 0.0
        lines = [f"{self.sft:,} SFT examples ({share:.0%}) and {self.pairs:,} preference pairs ({1 - share:.0%})"]
        if self.prices != (1.0, 1.0):
            of_sft, of_pair = self.prices
            spent = f"{self.sft:,} × {of_sft:g} + {self.pairs:,} × {of_pair:g} = {self.cost:,.10g}"
            lines.append(f"cost: {spent}, {self.left:,.6g} left")
        return "\n".join([*lines, *(f"- {reason}" for reason in self.reasons)])


def preference_share(examples: int, kind: Kind) -> float:
    """Share of preference pairs among so many examples: 0 below SMALL; from there it grows with the logarithm of their
    number, from one half to MOST at GROWS. The paper gives both ends and the direction; the line between is ours."""
    if examples < SMALL:
        return 0.0
    reach = min(1.0, log10(examples / SMALL) / log10(GROWS / SMALL))
    return 0.5 + (MOST[kind] - 0.5) * reach


def plan(
    budget: float, kind: Kind = "base", sft_price: float = 1.0, pair_price: float = 1.0, money: bool = False
) -> Plan:
    """The plan for a budget of so many examples, or with `money` of so much money at these prices of one SFT example
    and of one preference pair.

    HouseError for a budget that buys nothing, and for prices that are not above 0."""
    if kind not in MOST:
        raise HouseError(f"a model is base or instruct, not {kind!r}")
    prices = (float(sft_price), float(pair_price)) if money else (1.0, 1.0)
    if min(prices) <= 0 or not budget > 0 or budget == float("inf"):
        raise HouseError("budget and prices are numbers above 0")
    sft, pairs = _bought(budget, kind, prices)
    if not sft + pairs:
        raise HouseError(f"a budget of {budget:g} buys not even one SFT example at {prices[0]:g}")
    left = max(0.0, budget - sft * prices[0] - pairs * prices[1])
    return Plan(kind, sft, pairs, prices, left if money else 0.0, tuple(_reasons(sft, pairs, kind, prices)))


def _bought(budget: float, kind: Kind, prices: tuple[float, float]) -> tuple[int, int]:
    """Examples of both kinds. How many the budget buys depends on their shares, and the shares on how many: the largest
    number whose mix can be paid is found by bisection; what remains buys SFT examples."""

    def mix(examples: int) -> tuple[int, int]:
        pairs = int(examples * preference_share(examples, kind))
        return examples - pairs, pairs

    def cost(examples: int) -> float:
        sft, pairs = mix(examples)
        return sft * prices[0] + pairs * prices[1]

    budget *= 1 + 1e-12  # sums of prices such as 0.1 round
    all_sft = int(budget / prices[0])
    if all_sft < SMALL:
        return all_sft, 0
    low, high = 0, int(budget / min(prices)) + 1
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if cost(middle) <= budget else (low, middle)
    if low < SMALL:  # with pairs at their price it stays small: then all SFT
        return all_sft, 0
    sft, pairs = mix(low)
    more = int((budget - sft * prices[0] - pairs * prices[1]) / prices[0])
    return sft + more, pairs


def _reasons(sft: int, pairs: int, kind: Kind, prices: tuple[float, float]) -> Iterator[str]:
    examples = sft + pairs
    if not pairs:
        if examples < SMALL:
            yield f"{examples:,} examples are fewer than {SMALL:,}: there SFT alone does best"
        else:
            yield f"with pairs at {prices[1]:g} each the budget buys fewer than {SMALL:,} examples in all: SFT alone"
        return
    yield f"from {SMALL:,} examples on a mix does better than SFT alone; the more there are, the more should be pairs"
    if kind == "base":
        yield "a base model needs SFT before DPO: without any it starts cold, and loses 15 to 20 % on maths"
        yield f"at least {LEAST:.0%} of the examples are for SFT; that takes most of the cold start away"
    else:
        yield "the model follows instructions already, so the pairs may take all of a large budget"
    if prices[0] != prices[1]:
        dearer = "a pair" if prices[1] > prices[0] else "an SFT example"
        times = max(prices) / min(prices)
        yield f"{dearer} costs {times:.3g} times the other: the shares are of examples, not of money"


# ---- recipes


@dataclass(frozen=True)
class Look:
    """What a recipe trains a model on: SFT examples and pairs (None: not known before it has run)."""

    kind: Kind
    why_kind: str
    sft: int | None
    pairs: int | None
    warnings: tuple[str, ...]


def look(recipe: "Recipe", folder: Path | None = None, kind: Kind | None = None) -> list[Look]:
    """What each model of the recipe is trained on: rows of the sets that lie curated in `folder`. kind: of all of them;
    None: by their names."""
    trained = list(recipe.trained().values())
    looks = []
    for model in dict.fromkeys(stage.model for stage in trained):
        own = [stage for stage in trained if stage.model == model]
        found, why = (kind, "as said") if kind else kind_of(recipe, model)
        sft, pairs = _rows(own, "sft", folder), _rows(own, "dpo", folder)
        looks.append(
            Look(found, f"model {model}: {found} ({why})", sft, pairs, tuple(_warnings(own, found, sft, pairs)))
        )
    if not looks:
        raise HouseError(f"recipe {recipe.name!r} trains no model: there is nothing to share a budget between")
    return looks


def kind_of(recipe: "Recipe", model: str) -> tuple[Kind, str]:
    """Whether a model is a base or an instruct model, by its name; and how that was told."""
    path = recipe.models[model].path
    if path is None:
        return "base", "made in this run"
    named = re.search(r"(?i)(?:^|[-_./])(instruct|chat|it|sft|dpo|rlhf)(?:$|[-_./\d])", path)
    return ("instruct", f"its path says {named[1]}") if named else ("base", "its path names no instruction tuning")


def _rows(stages: "list[Train]", objective: str, folder: Path | None) -> int | None:
    """Training rows of the sets of these stages' objective; 0 without such a stage, None where one is not curated."""
    from ..curation.shards import read_manifest

    total = 0
    for name in dict.fromkeys(stage.set for stage in stages if (stage.objective == "sft") == (objective == "sft")):
        home = None if folder is None else folder / "curated" / name
        if home is None or not (home / "manifest.json").is_file():
            return None
        total += sum(file["rows"] for file in read_manifest(home)["files"] if file["split"] == "train")
    return total


def _warnings(stages: "list[Train]", kind: Kind, sft: int | None, pairs: int | None) -> Iterator[str]:
    """Where a recipe does otherwise than the rule."""
    tuned = {stage.name for stage in stages if stage.objective == "sft"}
    by_name = {stage.name: stage for stage in stages}
    for stage in stages:
        if stage.objective == "sft" or kind == "instruct":
            continue
        before: Any = stage.start
        while before is not None and before not in tuned:
            before = by_name[before].start if before in by_name else None
        if before is None:
            yield (
                f"stage {stage.name} trains a base model on preferences without SFT before it: it starts cold. Add a"
                f" stage sft on a tenth of the budget, and `start: sft` here"
            )
    if sft is None or pairs is None or not sft + pairs:
        return
    wanted = plan(sft + pairs, kind)
    if pairs and not wanted.pairs:
        yield f"{sft + pairs:,} examples are fewer than {SMALL:,}: spend them all on SFT"
    elif pairs and kind == "base" and sft < LEAST * (sft + pairs):
        yield f"{sft / (sft + pairs):.1%} of the examples are for SFT; give it {LEAST:.0%}"
    elif wanted.pairs and not pairs:
        yield f"all of {sft:,} examples are for SFT; from {SMALL:,} on a mix with preference pairs does better"


def explain(
    what: str,
    kind: str | None,
    sft_price: float | None,
    pair_price: float | None,
    folder: Path | None,
) -> str:
    """The answer of `gristmill plan`: of a budget (5000: examples; 200 with prices: money) or of a recipe."""
    if kind is not None and kind not in MOST:
        raise HouseError(f"--model-kind is base or instruct, not {kind!r}")
    asked: Any = kind
    money = sft_price is not None or pair_price is not None
    if money and (sft_price is None or pair_price is None):
        raise HouseError("give both prices, --sft-price and --pair-price, or neither")
    prices: dict[str, Any] = {"sft_price": sft_price, "pair_price": pair_price, "money": True} if money else {}
    try:
        budget = float(what.replace(",", "").replace("_", ""))
    except ValueError:
        return _explain_recipe(what, asked, prices, folder)
    if asked is not None:
        return plan(budget, asked, **prices).text()
    kinds: tuple[Kind, ...] = ("base", "instruct")
    return "\n\n".join(f"{one} model: {plan(budget, one, **prices).text()}" for one in kinds)


def _explain_recipe(what: str, kind: Kind | None, prices: dict[str, Any], folder: Path | None) -> str:
    from .recipe import load_recipe

    recipe = load_recipe(what)
    folder = folder or Path(recipe.name)
    said = []
    for one in look(recipe, folder, kind):
        lines = [one.why_kind]
        if one.sft is None or one.pairs is None:
            lines.append(f"how many rows it trains on is known once the sets lie in {folder}/curated (--out)")
        else:
            lines.append(f"trains on {one.sft:,} SFT examples and {one.pairs:,} preference rows")
            if one.sft + one.pairs:
                budget: float = one.sft + one.pairs
                if prices:
                    budget = one.sft * prices["sft_price"] + one.pairs * prices["pair_price"]
                advice = plan(budget, one.kind, **prices)
                lines.append(f"the same {'money' if prices else 'number'} by the rule: {advice.text()}")
        lines += [f"warning: {warning}" for warning in one.warnings]
        said.append("\n".join(lines))
    return "\n\n".join(said)
