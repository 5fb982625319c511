"""The house holds: arrows between rooms, packaging, light imports, and a `kernels` folder that shadows nobody's."""

import ast
import os
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ROOMS = ("curation", "flows", "kernels", "tuning")
ARROWS = {
    "flows": {"curation", "tuning", "kernels"},
    "tuning": {"kernels", "curation"},
    "curation": set(),
    "kernels": set(),
}
SHARDS = {"shards", "folder", "rows"}  # all of curation that tuning may import: shards.py and what that imports
DOOR = {"door"}  # and the protocols that it implements
LIGHT = {
    "numpy",
    "pyarrow",
    "safetensors",
    "tokenizers",
    "torch",
    "transformers",
    "jinja2",
    "huggingface_hub",
}  # all that a training node has
LAZY = {  # imported when they are needed; without them training takes another path, or a message says what to install
    "kernels/glu_triton.py": {"triton"},
    "kernels/rms_norm_triton.py": {"triton"},
    "kernels/int8.py": {"numba"},
    "kernels/logprob_triton.py": {"triton"},
    "kernels/nf4_cpu.py": {"numba", "llvmlite"},
    "kernels/nf4_triton.py": {"triton"},
    "kernels/vectors16.py": {"numba", "llvmlite"},
    "tuning/embed.py": {"sentence_transformers"},
    "tuning/trackers.py": {"trackio", "wandb"},
}
SOURCES = sorted(path for room in ROOMS for path in (ROOT / room).rglob("*.py"))


def imports(path: Path) -> Iterator[tuple[str, bool]]:
    """(dotted module, whether it is the house's own) of every import in a file, those inside functions included."""
    package = ("gristmill", *path.relative_to(ROOT).parent.parts)
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((alias.name, alias.name.split(".")[0] == "gristmill") for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            yield str(node.module), str(node.module).split(".")[0] == "gristmill"
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1]
            tail = node.module.split(".") if node.module else []
            names = [] if tail else [alias.name for alias in node.names]
            for name in names or [None]:
                yield ".".join([*base, *tail, *([name] if name else [])]), True


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_arrows(path: Path) -> None:
    room = path.relative_to(ROOT).parts[0]
    for module, own in imports(path):
        parts = module.split(".")
        if own and len(parts) > 1 and parts[1] in ROOMS:
            assert parts[1] == room or parts[1] in ARROWS[room], f"{room} imports {module}"
            if room == "tuning" and parts[1] == "curation":
                assert parts[2] in SHARDS | DOOR, f"tuning imports {module}: of curation only shards"
        elif not own:
            assert parts[0] not in ROOMS, f"{path} imports {module} by a bare name: use a relative import"
            assert room == "flows" or parts[0] != "prefect", f"{room} imports prefect"
            if room in ("tuning", "kernels"):
                known = LIGHT | LAZY.get(str(path.relative_to(ROOT)), set())
                assert parts[0] in known or parts[0] in sys.stdlib_module_names, f"{room} imports {module}"
        else:
            assert module == "gristmill" or room == "flows", f"{path} imports {module} absolutely"


@pytest.mark.parametrize("name", ["shards", "folder", "rows", "door"])
def test_what_tuning_imports_of_curation_imports_no_more(name: str) -> None:
    for module, own in imports(ROOT / "curation" / f"{name}.py"):
        parts = module.split(".")
        allowed = parts[2] in SHARDS | DOOR if own else parts[0] in LIGHT or parts[0] in sys.stdlib_module_names
        assert allowed, f"curation/{name}.py imports {module}"


def test_packages_are_listed_and_folders_have_no_init() -> None:
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    found = {"gristmill"} | {"gristmill." + ".".join(p.parent.relative_to(ROOT).parts) for p in SOURCES}
    assert set(listed) - {"gristmill.flows.recipes"} == found
    assert not [path for path in SOURCES if path.name == "__init__.py"]
    assert {path.name for path in ROOT.glob("*.py")} == {"__init__.py"}


def python(code: str, cwd: Path, **env: str) -> str:
    ran = subprocess.run([sys.executable, "-c", code], cwd=cwd, env=os.environ | env, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    return ran.stdout.strip()


def test_the_command_line_starts_without_anything_heavy(tmp_path: Path) -> None:
    heavy = "torch transformers prefect duckdb sklearn numba datasets"
    code = f"import sys, gristmill.flows.cli; print([m for m in {heavy.split()!r} if m in sys.modules])"
    assert python(code, tmp_path) == "[]"


def test_steps_are_found_without_anything_heavy(tmp_path: Path) -> None:
    code = (
        "import sys; from gristmill.curation.steps import find_steps; found = find_steps();"
        "print(sorted(found)); print([m for m in ('torch', 'numba', 'sklearn', 'duckdb') if m in sys.modules])"
    )
    names, heavy = python(code, tmp_path).splitlines()
    assert heavy == "[]"
    assert {"ExactDuplicate", "NearDuplicate", "Decontaminate", "KMeansQuality"} <= set(ast.literal_eval(names))


def test_training_side_imports_where_nothing_else_is_installed(tmp_path: Path) -> None:
    code = """
import sys
from importlib import import_module
ABSENT = {absent}
class Without:
    def __init__(self, finder):
        self.finder = finder
    def find_spec(self, name, path=None, target=None):
        return None if name.split(".")[0] in ABSENT else self.finder.find_spec(name, path, target)
    def __getattr__(self, name):
        return getattr(self.finder, name)
sys.meta_path = [Without(finder) for finder in sys.meta_path]
for name in {modules}:
    import_module(name)
print("ok")
"""
    absent = {"duckdb", "prefect", "datasets", "numba", "llvmlite", "sklearn", "scipy", "peft", "trl", "bitsandbytes"}
    absent |= {"triton", "sentence_transformers", "tensorboard", "trackio", "wandb"}
    files = [path.relative_to(ROOT) for path in SOURCES if path.parent in (ROOT / "tuning", ROOT / "kernels")]
    needed = [path for path in files if path.parent.name == "tuning" or str(path) not in LAZY]
    modules = ["gristmill.curation.shards", *(f"gristmill.{path.parent.name}.{path.stem}" for path in needed)]
    assert python(code.replace("{absent}", repr(absent)).replace("{modules}", repr(modules)), tmp_path) == "ok"


def test_hugging_face_kernels_are_still_found_beside_ours() -> None:
    """With Hugging Face's `kernels` installed, theirs is imported even from our root, and transformers' models load."""
    pytest.importorskip("kernels", reason="Hugging Face's kernels package is not installed (extra: test)")
    code = (
        "import kernels; from transformers import LlamaForCausalLM;"
        "print(kernels.get_kernel.__module__.split('.')[0], kernels.__file__)"
    )
    name, path = python(code, ROOT).splitlines()[-1].split()
    assert name == "kernels" and not Path(path).is_relative_to(ROOT / "kernels")


def test_no_path_of_one_machine_and_no_large_file() -> None:
    tracked = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True).stdout.split("\0")
    for name in filter(None, tracked):
        path = ROOT / name
        if path.is_file():
            assert path.stat().st_size < 2**20, f"{name} is over 1 MiB"
            if path.suffix in {".py", ".md", ".yaml", ".toml", ".html"} or path.name in {"Makefile", "run"}:
                machine = "/" + "work/"
                assert machine not in path.read_text(encoding="utf-8"), f"{name} names a path of one machine"
