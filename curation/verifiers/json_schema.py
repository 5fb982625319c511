"""Answers that are JSON of a given schema."""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from ..folder import HouseError
from ..steps import Tools
from ..verifying import Case, Finding

FENCED = re.compile(r"```(?:json|JSON)?[ \t]*\n(.*?)```", re.DOTALL)


@dataclass(frozen=True)
class JsonSchema:
    """Right where the answer is JSON that the schema holds (JSON Schema 2020-12 or the draft that it names), checked by
    the library jsonschema.

    schema: JSON of the schema; None: each row's own, in its meta under `field` (an object or its JSON). bare: the whole
    answer has to be the JSON; else a single fenced block, or the text from the first brace, will do. Abstains where a
    row has no schema, or none that is one. References to other addresses are not followed. value: the JSON, keys
    sorted."""

    schema: str | None = None
    field: str = "schema"
    bare: bool = False

    model: ClassVar[None] = None

    def __post_init__(self) -> None:
        if self.schema is not None:
            try:
                json.loads(self.schema)
            except ValueError as error:
                raise HouseError(f"JsonSchema: schema is no JSON: {error}") from error

    def verify(self, cases: Sequence[Case], tools: Tools) -> list[Finding]:
        """One finding a case. detail: where the answer breaks the schema, and how."""
        checkers: dict[str, Any] = {}
        return [self._one(case, checkers) for case in cases]

    def _one(self, case: Case, checkers: dict[str, Any]) -> Finding:
        said = self.schema if self.schema is not None else case.meta.get(self.field)
        if said is None:
            return Finding(None, f"the row has no schema in meta.{self.field}")
        key = said if isinstance(said, str) else json.dumps(said, sort_keys=True)
        if key not in checkers:
            checkers[key] = _checker(key)
        if isinstance(checkers[key], str):
            return Finding(None, checkers[key])
        try:
            value = read_json(case.answer, self.bare)
        except (ValueError, RecursionError) as error:
            return Finding(False, f"no JSON: {error}")
        try:
            wrong = next(checkers[key].iter_errors(value), None)
        except Exception as error:  # a reference that leads nowhere, a pattern that re does not know
            return Finding(None, f"the schema cannot be checked: {error}")
        if wrong is not None:
            return Finding(False, f"{wrong.json_path}: {wrong.message}"[:500])
        return Finding(True, "as the schema says", json.dumps(value, sort_keys=True, ensure_ascii=False))


def _checker(said: str) -> Any:
    """A validator, or why there is none."""
    try:
        import jsonschema
    except ImportError as error:
        raise HouseError("JsonSchema needs jsonschema: pip install 'gristmill[curate]'") from error
    from referencing import Registry

    try:
        schema = json.loads(said)
        kind = jsonschema.validators.validator_for(schema)
        kind.check_schema(schema)
    except (ValueError, jsonschema.SchemaError) as error:
        return f"no schema: {str(error).splitlines()[0]}"
    return kind(schema, registry=Registry())  # an empty registry: nothing is fetched


def read_json(answer: str, bare: bool = False) -> Any:
    """The JSON that an answer is, or holds. ValueError where it holds none."""
    text = answer.strip()
    if bare:
        return json.loads(text)
    blocks = FENCED.findall(text)
    if len(blocks) == 1:
        return json.loads(blocks[0])
    try:
        return json.loads(text)
    except ValueError:
        starts = [place for place in (text.find("{"), text.find("[")) if place >= 0]
        if not starts:
            raise
        return json.JSONDecoder().raw_decode(text, min(starts))[0]
