"""A model by path or hub name."""

from pathlib import Path
from typing import Any

import pytest

from gristmill.curation.folder import HouseError
from gristmill.tuning.hub import model_folder


def test_a_folder_is_itself_and_a_name_is_looked_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub
    from huggingface_hub.errors import LocalEntryNotFoundError

    asked: list[tuple[str, bool]] = []

    def snapshot_download(name: str, local_files_only: bool = False, **_: Any) -> str:
        asked.append((name, local_files_only))
        if name == "org/cached" or (name == "org/served" and not local_files_only):
            return str(tmp_path)
        raise LocalEntryNotFoundError("no such thing\nand more")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    assert model_folder(str(tmp_path)) == tmp_path
    assert model_folder("deep/er/path") == Path("deep/er/path") and not asked
    assert model_folder("org/cached") == tmp_path and asked == [("org/cached", True)]
    assert model_folder("org/served") == tmp_path and asked[1:] == [("org/served", True), ("org/served", False)]
    with pytest.raises(HouseError, match=r"no folder org/none here.*no such thing\)"):
        model_folder("org/none")
