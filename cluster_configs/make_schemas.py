"""Make ``schemas/aws.json`` and ``schemas/gcp.json``: what a request for an instance may say, from the models that the providers publish.

    python -m cluster_configs.make_schemas --botocore FOLDER --googleapiclient FOLDER

The folders are those of the two unpacked packages; they are not installed here (botocore wants an older dateutil than the rest of this project).
"""

from __future__ import annotations

import argparse
import gzip
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent / "schemas"

RAYS_OWN = ("MinCount", "MaxCount", "SubnetId", "DryRun", "ClientToken")
"""Of RunInstances: what Ray's node provider fills in, and what makes no sense in a file that is used more than once."""


def main(argv: Sequence[str] | None = None) -> int:
    """Write both files."""
    parser = argparse.ArgumentParser(prog="python -m cluster_configs.make_schemas", description=__doc__)
    parser.add_argument("--botocore", type=Path, required=True)
    parser.add_argument("--googleapiclient", type=Path, required=True)
    args = parser.parse_args(argv)
    ec2 = json.loads(gzip.decompress((args.botocore / "data/ec2/2016-11-15/service-2.json.gz").read_bytes()))
    write("aws.json", aws(ec2))
    compute = json.loads((args.googleapiclient / "discovery_cache/documents/compute.v1.json").read_text())
    write("gcp.json", gcp(compute))
    return 0


def write(name: str, schema: dict[str, Any]) -> None:
    """One definition a line, so that a newer model shows as what has changed."""
    defs = ",\n".join(f"  {json.dumps(key)}: {json.dumps(value)}" for key, value in sorted(schema["$defs"].items()))
    head = "".join(f" {json.dumps(key)}: {json.dumps(value)},\n" for key, value in schema.items() if key != "$defs")
    (HERE / name).write_text(f'{{\n{head} "$defs": {{\n{defs}\n }}\n}}\n')


PLAIN = {"string": "string", "boolean": "boolean", "integer": "integer", "long": "integer", "double": "number", "float": "number"}


def aws(model: dict[str, Any]) -> dict[str, Any]:
    """JSON Schema of a node type's ``node_config`` from the EC2 model: RunInstances, with Ray's ``SubnetIds`` for its ``SubnetId``."""
    shapes = model["shapes"]
    defs: dict[str, Any] = {}

    def ref(name: str) -> dict[str, Any]:
        if name not in defs:
            defs[name] = {}  # it may contain itself
            defs[name] = convert(shapes[name])
        return {"$ref": f"#/$defs/{name}"}

    def convert(shape: dict[str, Any]) -> dict[str, Any]:
        kind = shape["type"]
        if kind == "structure":
            made = {"type": "object", "additionalProperties": False, "properties": {key: ref(one["shape"]) for key, one in shape["members"].items()}}
            return {**made, "required": shape["required"]} if shape.get("required") else made
        if kind == "list":
            return {"type": "array", "items": ref(shape["member"]["shape"])}
        if kind in ("timestamp", "blob"):
            return {"type": "string"}
        return {"type": PLAIN[kind], **({"enum": shape["enum"]} if "enum" in shape else {})}

    ref("RunInstancesRequest")
    asked = defs.pop("RunInstancesRequest")
    asked.pop("required", None)
    properties = {key: value for key, value in asked["properties"].items() if key not in RAYS_OWN}
    properties["SubnetIds"] = {"type": "array", "items": {"type": "string"}}
    said = f"EC2 RunInstances, API {model['metadata']['apiVersion']}, without {', '.join(RAYS_OWN)}; SubnetIds is Ray's"
    return {"$comment": said, "type": "object", "additionalProperties": False, "properties": properties, "$defs": _used(properties, defs)}


def gcp(model: dict[str, Any]) -> dict[str, Any]:
    """JSON Schema of a node type's ``node_config`` from the Compute Engine model: the Instance of instances.insert, without what is output only."""
    defs: dict[str, Any] = {}

    def convert(one: dict[str, Any]) -> dict[str, Any]:
        if "$ref" in one:
            if one["$ref"] not in defs:
                defs[one["$ref"]] = {}
                defs[one["$ref"]] = convert(model["schemas"][one["$ref"]])
            return {"$ref": f"#/$defs/{one['$ref']}"}
        if one["type"] == "array":
            return {"type": "array", "items": convert(one["items"])}
        if one["type"] == "object" and "additionalProperties" in one:
            return {"type": "object", "additionalProperties": convert(one["additionalProperties"])}
        if one["type"] == "object":
            asked = {key: convert(value) for key, value in one.get("properties", {}).items() if not _output(value)}
            return {"type": "object", "additionalProperties": False, "properties": asked}
        if one.get("format") in ("int64", "uint64"):  # Google writes these as text, and takes both
            return {"type": ["string", "integer"]}
        return {"type": one["type"], **({"enum": one["enum"]} if "enum" in one else {})}

    convert({"$ref": "Instance"})
    instance = defs.pop("Instance")
    said = f"Compute Engine instances.insert, {model['version']} of {model['revision']}, without what is output only"
    return {"$comment": said, **instance, "$defs": _used(instance["properties"], defs)}


def _output(field: dict[str, Any]) -> bool:
    return field.get("readOnly", False) or field.get("description", "").lower().startswith(("[output only]", "output only", "[output-only]"))


def _used(properties: dict[str, Any], defs: dict[str, Any]) -> dict[str, Any]:
    """Of the definitions, those that the properties lead to."""
    found: dict[str, Any] = {}

    def walk(node: Any) -> None:
        for one in node.values() if isinstance(node, dict) else node if isinstance(node, list) else ():
            walk(one)
        if isinstance(node, dict) and isinstance(node.get("$ref"), str):
            name = node["$ref"].removeprefix("#/$defs/")
            if name not in found:
                found[name] = defs[name]
                walk(defs[name])

    walk(properties)
    return found


if __name__ == "__main__":
    sys.exit(main())
