"""A tiny recipe that goes through the whole loop, and one finished run of it for all tests."""

import json
import random
from pathlib import Path

import pytest

from gristmill.flows.progress import Silent
from gristmill.flows.recipe import Recipe, load_text
from gristmill.flows.run import Result, run

WORDS = ["river", "stone", "light", "wind", "cloud", "green", "small", "house", "garden", "music", "letter", "bread"]
CURATION = """\
name: whole
sources:
  chats: {path: "CHATS", licence: MIT}
models:
  base:
    new: {params: 300K, vocab: 400, context: 256, tokens: 2000}
    corpus: clean
stages:
  - curate:
      set: clean
      sources: [chats]
      held_out: 0.1
      steps:
        - ResponseLength: {low: 1, high: 500}
        - ExactDuplicate
"""
REST = """\
        - PerplexityQuantile: {model: base, drop_highest: 0.1}
  - sft: {set: clean, model: base, max_steps: 4, capacity: 256, packs_per_step: 2, checkpoint_every: 1, LORA}
  - curate:
      set: pairs
      kind: preference
      held_out: 0.1
      steps:
        - PreferenceFromModel: {model: sft, set_name: clean, prompts: 30, test_prompts: 10, max_tokens: 6}
        - EqualAnswers
  - dpo: {set: pairs, model: base, start: sft, max_steps: 2, capacity: 256, packs_per_step: 2, LORA}
  - evaluate: {models: [base, sft, dpo], sets: [clean, pairs]}
""".replace("LORA", "threads: 1, lora: {rank: 4}")


def write_chats(path: Path, rows: int = 150) -> Path:
    draw = random.Random(0)
    with path.open("w") as file:
        for index in range(rows):
            question = f"What is the meaning of {draw.choice(WORDS)} number {index % 140}?"
            answer = " ".join(draw.choice(WORDS) for _ in range(draw.randint(5, 20)))
            turns = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
            file.write(json.dumps({"messages": turns}) + "\n")
        file.write('{"messages": [\n')  # one line that cannot be read
    return path


@pytest.fixture(scope="session")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with chats.jsonl, whole.yaml, curation.yaml and the cache that runs of them share."""
    folder = tmp_path_factory.mktemp("flows")
    chats = write_chats(folder / "chats.jsonl")
    for name, text in (("whole", CURATION + REST), ("curation", CURATION)):
        (folder / f"{name}.yaml").write_text(text.replace("CHATS", str(chats)))
    return folder


@pytest.fixture(scope="session")
def whole(shared: Path) -> tuple[Recipe, Result, Silent]:
    """The whole loop, run once without Prefect: recipe, result, what was shown."""
    recipe = load_text((shared / "whole.yaml").read_text())
    show = Silent()
    return recipe, run(recipe, shared / "whole", cache=shared / "cache", show=show), show
