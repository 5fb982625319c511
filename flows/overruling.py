"""`gristmill override`: a person's word on one row."""

import getpass
import json
from pathlib import Path
from typing import Any, cast, get_args

from ..curation.folder import HouseError, RunFolder
from ..curation.look import find_row
from ..curation.overrides import Action, add_override
from ..curation.views import connect
from .stages import nearest


def overrule(
    folder: RunFolder, row_id: str, action: str, why: str, who: str | None = None, content: str | None = None
) -> str:
    """Adds the override and says what happens next. content: JSON, or @FILE that holds it."""
    if action not in get_args(Action):
        raise HouseError(f"unknown action {action!r}; {nearest(action, get_args(Action))}")
    if not why.strip():
        raise HouseError("--why is empty: whoever asks `gristmill why` wants a reason")
    with connect(folder) as con:
        full = find_row(con, row_id)
    add_override(folder, full, cast(Action, action), why, who or getpass.getuser(), _content(content))
    return (
        f"{action} {full}: noted in {folder.root / 'overrides.parquet'}. Run the recipe into the same --out again:"
        " only the last step and the shards are made anew."
    )


def _content(text: str | None) -> dict[str, Any] | None:
    if text is None:
        return None
    try:
        raw = Path(text[1:]).read_text(encoding="utf-8") if text.startswith("@") else text
        value = json.loads(raw)
    except OSError as error:
        raise HouseError(f"--content {text}: {error.strerror}") from error
    except json.JSONDecodeError as error:
        raise HouseError(f"--content is not JSON ({error})") from error
    if not isinstance(value, dict):
        raise HouseError('--content is a JSON object of fields to replace, such as {"messages": [...]}')
    return value
