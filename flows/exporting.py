"""`gristmill export`: what a run ended with, as files that others load."""

from pathlib import Path
from typing import Any

from .progress import Done, Silent, interrupts_wait, timed


def export_command(source: Path, to: Path, kind: Any, model: str | None, dtype: Any, show: Silent) -> dict[str, Any]:
    """Exports `source` (a run's stage, an adapter or a model) into the folder `to`, says how near it is to what was
    trained and what vLLM would refuse, and returns its manifest."""
    with interrupts_wait():
        from ..tuning.export import export
        from ..tuning.hub import model_folder

    base = None if model is None else model_folder(model)

    def do(progress: Any) -> Done:
        manifest = export(source, to, kind, model=base, dtype=dtype, progress=progress)
        return Done(_told(manifest, to), data=manifest)

    return timed(f"export {kind}", show, do).data


def _told(manifest: dict[str, Any], to: Path) -> str:
    check = manifest["check"]
    size = sum(file["bytes"] for file in manifest["files"])
    lines = [
        f"{size / 1e6:,.1f} MB -> {to}",
        f"  logits differ from the trained model's by {check['difference']:.2g} of their spread, tolerance"
        f" {check['tolerance']:g}; KL {check['kl']:.2g} nats, same likeliest token {check['top1']:.1%}"
        f" ({check['computed_in']})",
        f"  generation stops at {', '.join(manifest['stop_tokens'])}",
    ]
    return "\n".join([*lines, *(f"  vLLM: {problem}" for problem in manifest["vllm"])])
