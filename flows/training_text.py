"""Training in words: the plan before its first step, the line while it runs, how it ended, and what of the held-out
rows was not measured."""

from collections.abc import Iterable, Mapping
from typing import Any

Row = Mapping[str, Any]
PLACES = {"host": "host", "device": "GPU"}


def plan_text(plan: Row) -> str:
    """What will be trained and what not, what it needs and how fast it can be at best: lines for the terminal."""
    lines = [
        f"plan      {plan['rows']:,} rows, {plan['tokens']:,} tokens ({plan['target_tokens']:,} of them targets) in "
        f"{plan['packs']:,} packs, {percent(plan['fill'])} full; {plan['steps']:,} steps, {plan['epochs']} epochs",
        *_not_reached(plan),
        *_shared(plan),
        f"left out  {_left_out(plan) or 'no row'}",
    ]
    if plan["truncated"]:
        lines.append(f"cut       {plan['truncated']:,} rows lose their prompt's head{_ids(plan, 'truncated')}")
    if "held_out" in plan:
        lines.append(f"held out  {plan['held_out']['rows']:,} rows measured{_not_measured(plan)}")
    memory = {name: value for name, value in plan["memory"].items() if value and name != "total"}
    parts = ", ".join(f"{name} {size(value)}" for name, value in memory.items())
    line, loading = plan["roofline"], plan["loading"]
    where = " and ".join(f"{size(loading[key])} on the {name}" for key, name in PLACES.items() if key in loading)
    lines += [
        f"loading   about {where}",
        f"memory    about {size(plan['memory']['total'])} ({parts})",
        f"roofline  at most {line['tokens_per_s']:,.0f} tokens/s: {line['gflop_per_token']:.4g} GFLOP a token at "
        f"{line['peak_tflops']:.4g} TFLOP/s ({line['peak']}); at least {span(plan['seconds'])} in all",
    ]
    return "\n".join([*lines, *(f"! {warning}" for warning in plan["warnings"])])


def step_text(step: Row) -> str:
    """loss, tokens a second, share of the roofline, memory, time left."""
    shown = [f"loss {step['loss']:.4f}"]
    if "accuracy" in step:
        shown.append(f"accuracy {percent(step['accuracy'])}")
    if "held_out_loss" in step:
        shown.append(f"held out {step['held_out_loss']:.4f}")
    if "held_out_auc" in step:
        shown.append(f"AUC {step['held_out_auc']:.4f}")
    shown += [f"{step['tokens_per_s']:,.0f} tokens/s", f"{percent(step['roofline_share'])} of the roofline"]
    return "  ".join([*shown, size(step["memory"]), f"{span(step['eta'])} left"])


def end_text(run: Row, where: Any) -> str:
    """How a stage ended, and the formula of its share of the roofline."""
    lines = [
        f"{run['plan']['steps']:,} steps, loss {run['loss']:.4f}, {run['tokens_per_s']:,.0f} tokens/s, "
        f"{percent(run['roofline_share'])} of the roofline -> {where}"
    ]
    if run["best"] is not None:
        lines.append(
            f"    best on held-out rows: loss {run['best']['loss']:.4f} after step {run['best']['step']}, in best/"
        )
    return "\n".join([*lines, f"    {run['roofline_formula']}"])


def unmeasured_text(rows: Iterable[Row]) -> list[str]:
    """How many held-out rows the lines of evaluation.json leave out, by set and reason."""
    said = [
        f"{row['set']}, held-out rows not measured: {_counts(row['excluded'])}" for row in rows if "excluded" in row
    ]
    return list(dict.fromkeys(said))


def percent(share: float) -> str:
    return f"{100 * share:.3g} %"


def size(count: float) -> str:
    """1.43 GB, 640 MB, 12 kB."""
    for unit, scale in (("GB", 1e9), ("MB", 1e6)):
        if count >= scale:
            return f"{count / scale:.3g} {unit}"
    return f"{count / 1e3:.3g} kB"


def span(seconds: float) -> str:
    from .progress import duration

    return duration(seconds)


def _shared(plan: Row) -> list[str]:
    saved = plan["unshared_tokens"] - plan["tokens"]
    return [f"shared    {saved:,} tokens that answers have in common lie once"] if saved else []


def _not_reached(plan: Row) -> list[str]:
    count = plan.get("not_reached", 0)
    return (
        [f"in no step {count:,} rows: the steps end before the first epoch does (max_steps, epochs)"] if count else []
    )


def _left_out(plan: Row) -> str:
    return ", ".join(f"{reason} {count:,}{_ids(plan, reason)}" for reason, count in plan["excluded"].items())


def _not_measured(plan: Row) -> str:
    excluded = plan["held_out"]["excluded"]
    return f", not: {_counts(excluded)}" if excluded else ""


def _counts(excluded: Mapping[str, int]) -> str:
    return ", ".join(f"{reason} {count:,}" for reason, count in excluded.items())


def _ids(plan: Row, reason: str) -> str:
    row_ids = plan.get("excluded_rows", {}).get(reason, [])
    return f" ({', '.join(row_ids[:3])}{', …' if len(row_ids) > 3 else ''})" if row_ids else ""
