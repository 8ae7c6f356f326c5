"""What is made of the providers' models, and what runs on nodes."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import jsonschema
import pytest

from cluster_configs import make_schemas
from cluster_configs.providers import machines, schema

FOLDER = Path(__file__).parents[2] / "cluster_configs"

EC2 = {
    "metadata": {"apiVersion": "2016-11-15"},
    "shapes": {
        "RunInstancesRequest": {
            "type": "structure",
            "required": ["MinCount"],
            "members": {"MinCount": {"shape": "Number"}, "SubnetId": {"shape": "Text"}, "Kind": {"shape": "Kind"}, "Disks": {"shape": "Disks"}},
        },
        "Number": {"type": "integer"},
        "Text": {"type": "string"},
        "Kind": {"type": "string", "enum": ["a", "b"]},
        "Disks": {"type": "list", "member": {"shape": "Disk"}},
        "Disk": {"type": "structure", "required": ["Size"], "members": {"Size": {"shape": "Number"}, "Inner": {"shape": "Disk"}}},
        "Other": {"type": "string"},
    },
}
COMPUTE = {
    "version": "v1",
    "revision": "1",
    "schemas": {
        "Instance": {
            "type": "object",
            "properties": {
                "id": {"type": "string", "description": "[Output Only] Its number."},
                "disks": {"type": "array", "items": {"$ref": "Disk"}},
                "labels": {"type": "object", "additionalProperties": {"type": "string"}},
            },
        },
        "Disk": {"type": "object", "properties": {"sizeGb": {"type": "string", "format": "int64"}, "mode": {"type": "string", "enum": ["RW"]}}},
    },
}


@pytest.mark.parametrize(
    ("made", "good", "bad"),
    [
        (
            make_schemas.aws(EC2),
            [{}, {"Kind": "a", "SubnetIds": ["s"]}, {"Disks": [{"Size": 1, "Inner": {"Size": 2}}]}],
            [
                {"MinCount": 1},
                {"SubnetId": "s"},
                {"Kind": "c"},
                {"Disks": {}},
                {"Disks": [{}]},
                {"Disks": [{"Size": "1"}]},
                {"Disks": [{"Size": 1, "x": 1}]},
            ],
        ),
        (
            make_schemas.gcp(COMPUTE),
            [{}, {"disks": [{"sizeGb": "5"}, {"sizeGb": 5, "mode": "RW"}]}, {"labels": {"a": "b"}}],
            [{"id": "1"}, {"disks": [{"sizegb": 5}]}, {"disks": [{"mode": "RO"}]}, {"labels": {"a": 1}}, {"disks": {"sizeGb": 5}}],
        ),
    ],
)
def test_a_model_becomes_a_strict_schema(made, good, bad):
    validator = jsonschema.Draft202012Validator(json.loads(json.dumps(made)))
    assert all(validator.is_valid(one) for one in good)
    assert not any(validator.is_valid(one) for one in bad)


@pytest.mark.parametrize("provider", ["aws", "gcp", "azure"])
def test_a_schema_is_one(provider):
    jsonschema.Draft202012Validator.check_schema(schema(provider))


def test_machines_of_aws_are_kinds_that_ec2_knows():
    assert set(machines("aws")) <= set(schema("aws")["$defs"]["InstanceType"]["enum"])


@pytest.mark.parametrize("script", ["setup_node.sh", "multi_cloud/s3_from_gcp.sh"])
def test_scripts_are_scripts(script):
    subprocess.run(["bash", "-n", str(FOLDER / script)], check=True)
    assert "set -euo pipefail" in (FOLDER / script).read_text()


def test_a_node_knows_its_token_its_environment_and_where_to_spill(tmp_path):
    command = f". {FOLDER}/node.env; echo $RAY_AUTH_MODE $RAY_AUTH_TOKEN_PATH ${{PATH%%:*}} $PARIS_SPILL"
    said = subprocess.run(["sh", "-c", command], env={"HOME": str(tmp_path), "PATH": "/usr/bin:/bin"}, capture_output=True, text=True, check=True)
    mode, token, first, spill = said.stdout.split()
    assert (mode, token, first) == ("token", f"{tmp_path}/.ray/auth_token", f"{tmp_path}/env/bin")
    assert Path(spill).parent.is_dir()
