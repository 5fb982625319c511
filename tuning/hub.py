"""A model by its path: a folder here, or a name on the Hugging Face hub."""

import re
from pathlib import Path

from ..curation.folder import HouseError

NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
UNUSED = ["onnx/*", "openvino/*", "*.onnx", "*.h5", "*.msgpack", "*.ot", "*.gguf", "*.tflite", "*.ckpt.*"]


def model_folder(path: str) -> Path:
    """`path` where it is a folder; of a hub name such as org/name the snapshot in the local cache, fetched where it is
    not there. HouseError where neither serves."""
    here = Path(path)
    if here.is_dir() or NAME.fullmatch(path) is None:
        return here
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        return Path(snapshot_download(path, local_files_only=True, ignore_patterns=UNUSED))
    except LocalEntryNotFoundError:
        pass
    try:
        return Path(snapshot_download(path, ignore_patterns=UNUSED))
    except Exception as error:  # the hub's client lets through its own errors and those of the network below it
        raise HouseError(
            f"there is no folder {path} here, and the hub did not give a model of that name"
            f" ({type(error).__name__}: {str(error).strip().splitlines()[0]}). Give a folder that holds the model, or"
            " the name of one that this machine has in its cache or can fetch"
        ) from error
