"""A cassette of what real models answered to GSM8K, from the solutions that OpenAI published beside it
(github.com/openai/grade-school-math, MIT): `python -m gristmill.flows.doors.published CASSETTE [RECIPE [OVERRIDE …]]`.

The set holds one solution of each of four models to each test question. They become the four tries of a question, in
the words, with the seeds and the sampling with which the recipe's makers ask, so that the recipe runs on them as it
would on a server. The models' own prompts and sampling are not those: the cassette's name says where the answers are
from, and each answer is the published text, unchanged. How many tokens they had is not published: 0 stands for it."""

import json
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from ...curation.door import ChatAnswer, ChatRequest
from ...curation.folder import HouseError
from ...curation.rows import digest, message
from ..recipe import load_recipe
from ..stages import Recipe

MODELS = ("6b_finetuning", "6b_verification", "175b_finetuning", "175b_verification")
NAME = f"published GSM8K solutions by {', '.join(MODELS)} (openai/grade-school-math)"


def write_cassette(path: Path, recipe: Recipe, solutions: Path) -> int:
    """Writes the cassette that `recipe`'s makers with a verifier are answered from; how many answers. solutions:
    gsm8k_model_solutions.parquet. A maker's tries beyond the fourth have no answer. HouseError for a recipe that has no
    such maker, and where `path` is there."""
    from .cassette import VERSION
    from .kept import answer_json, request_json

    if path.exists():
        raise HouseError(f"{path} is there: remove it, or name another file")
    rows = _read(solutions)
    said = {request_json(request): answer for request, answer in _answers(recipe, rows)}
    if not said:
        raise HouseError(f"recipe {recipe.name!r} has no maker that samples answers (RejectionSampling and its kin)")
    head = {"cassette": VERSION, "name": NAME, "digest": digest(NAME, *said), "licence": "MIT", "price": [0.0, 0.0]}
    lines = [json.dumps(head)]
    for request, answer in said.items():
        lines.append(json.dumps({"request": json.loads(request), "answer": json.loads(answer_json(answer))}))
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    part.write_text("\n".join(lines) + "\n", encoding="utf-8")
    part.replace(path)
    return len(said)


def _read(solutions: Path) -> list[dict[str, Any]]:
    """The questions, each with its reference and the text of each model's solution under the model's name."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    if not solutions.is_file():
        raise HouseError(f"there is no {solutions}. Set GRISTMILL_DATA to the folder that holds {solutions.name}")
    try:
        rows = pq.read_table(solutions).to_pylist()
        return [
            {"question": row["question"], "ground_truth": row["ground_truth"]}
            | {model: json.loads(row[model])["solution"] for model in MODELS}
            for row in rows
        ]
    except (OSError, pa.ArrowException, KeyError, TypeError, ValueError) as error:
        raise HouseError(
            f"{solutions} does not hold the published solutions (columns question, ground_truth, {', '.join(MODELS)}):"
            f" {type(error).__name__}: {error}. Set GRISTMILL_DATA to the folder that holds them"
        ) from error


def _answers(recipe: Recipe, rows: Sequence[dict[str, Any]]) -> Iterator[tuple[ChatRequest, ChatAnswer]]:
    from ...curation.sampling import Question, question_of, sample_ask
    from ...curation.synthesis import prompt, sampling_of

    for maker in samplers(recipe):
        solve = prompt(maker.solve)
        for row in rows:
            turns = [message("user", row["question"]), message("assistant", row["ground_truth"])]
            one = question_of({"row_id": "", "messages": turns, "meta": None}, solve, None)
            if not isinstance(one, Question):
                continue
            for attempt, model in enumerate(MODELS):
                text = row[model]
                finished = text.rsplit("\n", 1)[-1].startswith("A:")
                ask = sample_ask(one, 0, attempt, solve, sampling_of(maker), maker.seed)
                yield ask.request, ChatAnswer(text, 0, 0, finished)


def samplers(recipe: Recipe) -> list[Any]:
    """The recipe's makers that sample answers to questions."""
    steps = [step for stage in recipe.sets().values() for step in stage.steps]
    return [step for step in steps if hasattr(step, "solve") and hasattr(step, "verifier")]


def main(arguments: Sequence[str]) -> None:
    """The command line, as the module's docstring has it."""
    if not arguments:
        raise HouseError("name the cassette to write: python -m gristmill.flows.doors.published math-dart.jsonl")
    path, name, *overrides = [*arguments, "math-dart"] if len(arguments) == 1 else arguments
    data = Path(os.environ.get("GRISTMILL_DATA", "../shared/data"))
    count = write_cassette(Path(path), load_recipe(name, overrides), data / "gsm8k_model_solutions.parquet")
    sys.stdout.write(f"{path}: {count} answers, {NAME}\n")


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except HouseError as error:
        sys.exit(f"error: {error}")
