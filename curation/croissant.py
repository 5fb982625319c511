"""croissant.json of a curated set: its files, their sha256 and their columns in MLCommons Croissant 1.0 (JSON-LD).

Equal manifests and columns give equal bytes. Each shard is one FileObject and one RecordSet of its name (`train`, or
`train-00000-of-00003` where a split has several), so that every byte read through it is held to its digest.
"""

import json
import re
from collections.abc import Mapping
from typing import Any

import pyarrow as pa

CONFORMS_TO = "http://mlcommons.org/croissant/1.0"
_CR = (
    *("citeAs", "column", "equivalentProperty", "extract", "field", "fileProperty", "fileObject", "fileSet", "format"),
    *("includes", "isLiveDataset", "jsonPath", "key", "md5", "parentField", "path", "recordSet", "references", "regex"),
    *("repeated", "replace", "samplingRate", "separator", "source", "subField", "transform"),
)
_CONTEXT: dict[str, Any] = {
    "@language": "en",
    "@vocab": "https://schema.org/",
    "conformsTo": "dct:conformsTo",
    "cr": "http://mlcommons.org/croissant/",
    "data": {"@id": "cr:data", "@type": "@json"},
    "dataType": {"@id": "cr:dataType", "@type": "@vocab"},
    "dct": "http://purl.org/dc/terms/",
    "examples": {"@id": "cr:examples", "@type": "@json"},
    "rai": "http://mlcommons.org/croissant/RAI/",
    "sc": "https://schema.org/",
    **{name: f"cr:{name}" for name in _CR},
}
_SAID = {
    "row_id": "Names the row in the ledger that this set comes with: which source, which verdicts.",
    "messages": "The conversation.",
    "prompt": "The turns before the answer.",
    "chosen": "The better answer.",
    "rejected": "The worse answer.",
    "completion": "The answer.",
    "label": "Whether the answer is wanted.",
    "text": "The document.",
    "tools": "JSON of the tools that the conversation may call.",
    "spans": "What to train on, by turn and characters, with weights.",
}
_KINDS = {
    "sft": "Conversations for supervised fine-tuning",
    "preference": "Preference pairs",
    "kto": "Answers with a label each",
    "text": "Raw documents",
}


def croissant(manifest: Mapping[str, Any], columns: pa.Schema) -> str:
    """The file's text, from the whole manifest (files included) and the schema of the shards."""
    splits: dict[str, int] = {}
    for file in manifest["files"]:
        splits[file["split"]] = splits.get(file["split"], 0) + 1
    sources = manifest["sources"]
    origin = ", ".join(f"{source['name']} ({source['licence']})" for source in sources) or "rows made by the recipe"
    name = re.sub(r"[^A-Za-z0-9_.-]+", "-", str(manifest["name"]))
    found = {
        "@context": dict(sorted(_CONTEXT.items())),
        "@type": "sc:Dataset",
        "name": name,
        "description": f"{_KINDS[manifest['kind']]}, {manifest['rows']:,} rows for training, curated by gristmill from"
        f" {origin}. The card beside this file tells what was dropped and why.",
        "conformsTo": CONFORMS_TO,
        "license": sorted({str(source["licence"]) for source in sources}) or ["unknown"],
        "keywords": ["gristmill", str(manifest["kind"]), "curated"],
        "citeAs": _citation(name, manifest),
        **(
            {"dateCreated": manifest["created"], "datePublished": manifest["created"]}
            if manifest.get("created")
            else {}
        ),
        **({"version": _version(manifest["version"])} if manifest.get("version") else {"version": "1.0.0"}),
        "isBasedOn": [source["name"] for source in sources],
        "distribution": [_file(file) for file in manifest["files"]],
        "recordSet": [_records(file, splits[file["split"]] == 1, columns) for file in manifest["files"]],
    }
    return json.dumps(found, indent=2, ensure_ascii=False) + "\n"


def _citation(name: str, manifest: Mapping[str, Any]) -> str:
    year = str(manifest.get("created") or "")[:4]
    when = f", year = {{{year}}}" if year else ""
    digest = str(manifest.get("ledger_digest") or "")[:16]
    return f"@misc{{{name}, title = {{{name}}}{when}, note = {{curated by gristmill, ledger {digest}}}}}"


def _version(said: Any) -> str:
    """MAJOR.MINOR.PATCH, as Croissant wants it; another version goes in as it is."""
    numbers = str(said).split(".")
    return ".".join([*numbers, "0", "0"][:3]) if all(part.isdecimal() for part in numbers) else str(said)


def _file(file: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "@type": "cr:FileObject",
        "@id": file["path"],
        "name": file["path"],
        "contentUrl": file["path"],
        "contentSize": f"{file['bytes']} B",
        "encodingFormat": "application/x-parquet",
        "sha256": file["sha256"],
    }


def _records(file: Mapping[str, Any], alone: bool, columns: pa.Schema) -> dict[str, Any]:
    name = file["split"] if alone else file["path"].removeprefix("data/").removesuffix(".parquet")
    return {
        "@type": "cr:RecordSet",
        "@id": name,
        "name": name,
        "description": f"{file['rows']:,} rows of split {file['split']}.",
        "key": {"@id": f"{name}/row_id"},
        "field": [_field(name, file["path"], field) for field in columns],
    }


def _field(records: str, path: str, field: pa.Field) -> dict[str, Any]:
    own = f"{records}/{field.name}"
    found: dict[str, Any] = {"@type": "cr:Field", "@id": own, "name": field.name}
    if field.name in _SAID:
        found["description"] = _SAID[field.name]
    source = {"fileObject": {"@id": path}, "extract": {"column": field.name}}
    if not pa.types.is_list(field.type):
        return found | {"dataType": _type(field.type), "source": source}
    inner = field.type.value_type
    parts = [
        {
            "@type": "cr:Field",
            "@id": f"{own}/{part.name}",
            "name": part.name,
            "dataType": _type(part.type),
            "source": source | {"transform": {"jsonPath": part.name}},
        }
        for part in inner
    ]
    return found | {"repeated": True, "subField": parts}


def _type(kind: pa.DataType) -> str:
    if pa.types.is_boolean(kind):
        return "sc:Boolean"
    if pa.types.is_integer(kind):
        return "sc:Integer"
    return "sc:Float" if pa.types.is_floating(kind) else "sc:Text"
