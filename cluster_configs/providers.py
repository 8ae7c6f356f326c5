"""What each provider of machines takes in a node type, and what a node type says there: machine, market, disk, image, who it is, who can reach it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from paris_ray.config_errors import nearest

SCHEMAS = Path(__file__).parent / "schemas"
WORLD = ("0.0.0.0/0", "::/0")

PROVIDER_KEYS = {
    "aws": ("type", "region", "availability_zone", "cache_stopped_nodes", "use_internal_ips", "security_group", "key_pair"),
    "gcp": ("type", "region", "availability_zone", "project_id", "cache_stopped_nodes", "use_internal_ips"),
    "azure": (
        "type", "location", "resource_group", "subscription_id", "unique_id", "subnet_mask", "tags", "msi_name", "msi_resource_group",
        "availability_zone", "cache_stopped_nodes", "use_internal_ips", "use_external_head_ip",
    ),
    "local": ("type", "head_ip", "worker_ips", "external_head_ip"),
}  # fmt: skip
"""Keys of ``provider`` that Ray's node providers read and a file may hold; Ray itself lets any pass. Secrets among them have no place in a file."""


@dataclass(frozen=True)
class Machine:
    """What a machine type has.

    Attributes:
        memory: GB.
        gpu: as Ray calls it.
        gpu_memory: GB of each.
    """

    cpus: int
    memory: int
    gpu: str | None = None
    gpus: int = 0
    gpu_memory: int | None = None


@cache
def machines(provider: str) -> dict[str, Machine]:
    """The machine types that are known of a provider."""
    return {name: Machine(**what) for name, what in yaml.safe_load((SCHEMAS / "machines.yaml").read_text())[provider].items()}


@cache
def schema(provider: str) -> dict[str, Any]:
    """JSON Schema of ``node_config``."""
    if provider == "azure":
        return _azure_schema()
    return dict(json.loads((SCHEMAS / f"{provider}.json").read_text()))


def _azure_schema() -> dict[str, Any]:
    """From the template that Ray deploys for each node, without what Ray fills in."""
    import ray.autoscaler._private as autoscaler

    template = json.loads((Path(autoscaler.__path__[0]) / "_azure/azure-vm-template.json").read_text())
    kinds = {"string": "string", "int": "integer", "bool": "boolean", "object": "object", "array": "array", "securestring": "string"}
    rays_own = ("vmName", "vmTags", "vmCount", "provisionPublicIp", "msi", "nsg", "subnet", "zones", "adminUsername", "publicKey")
    asked: dict[str, dict[str, Any]] = {
        name: {"type": kinds[one["type"].lower()]} for name, one in template["parameters"].items() if name not in rays_own
    }
    asked["availability_zone"] = {"type": "string"}  # Ray's, for zones
    # The template hands these on to Microsoft.Compute/virtualMachines as they are.
    asked["priority"] = {"type": "string", "enum": ["Regular", "Spot", "Low"]}
    asked["evictionPolicy"] = {"type": "string", "enum": ["Deallocate", "Delete"]}
    asked["billingProfile"] = {"type": "object", "additionalProperties": False, "properties": {"maxPrice": {"type": "number"}}}
    parameters = {"type": "object", "additionalProperties": False, "required": ["vmSize"], "properties": asked}
    tags = {"type": "object", "additionalProperties": {"type": "string"}}
    properties = {"azure_arm_parameters": parameters, "tags": tags}
    return {"type": "object", "additionalProperties": False, "required": ["azure_arm_parameters"], "properties": properties}


def request_problems(provider: str, node_config: dict[str, Any]) -> Iterator[str]:
    """Where a ``node_config`` is not what the provider takes: unknown keys, wrong types, values that are none of the allowed."""
    return schema_problems(schema(provider), node_config, "node_config")


def schema_problems(schema: dict[str, Any], tree: Any, name: str) -> Iterator[str]:
    """Where a tree is not what a JSON Schema says, with hints at what was meant.

    Args:
        schema: the schema.
        tree: what to look at.
        name: how to call its root.
    """
    import jsonschema

    for error in jsonschema.Draft202012Validator(schema).iter_errors(tree):
        where = ".".join([name, *(str(one) for one in error.absolute_path)])
        if error.validator == "additionalProperties" and isinstance(error.schema.get("properties"), dict):
            known = sorted(error.schema["properties"])
            for key in sorted(set(error.instance) - set(known)):
                yield f"{where}.{key}: there is no such key.{nearest(key, known)}"
        elif error.validator == "enum":
            allowed = [one for one in error.validator_value if isinstance(one, str)]
            said = "" if len(allowed) > 12 else f" Known: {', '.join(allowed)}"
            yield f"{where}: {error.instance!r} is none of the {len(allowed)} allowed values.{nearest(str(error.instance), allowed)}{said}"
        else:
            yield f"{where}: {error.message[:200]}"


class Node:
    """What a node type's ``node_config`` says, in the provider's own terms.

    Args:
        provider: ``aws``, ``gcp`` or ``azure``.
        config: the ``node_config``.
    """

    def __init__(self, provider: str, config: dict[str, Any]):
        self.provider, self.config = provider, config
        self.arm = config.get("azure_arm_parameters") or {}

    @property
    def machine(self) -> str | None:
        return {"aws": self.config.get("InstanceType"), "gcp": self.config.get("machineType"), "azure": self.arm.get("vmSize")}[self.provider]

    @property
    def spot(self) -> bool:
        if self.provider == "aws":
            return bool((self.config.get("InstanceMarketOptions") or {}).get("MarketType") == "spot")
        if self.provider == "azure":
            return self.arm.get("priority") in ("Spot", "Low")
        found = self.config.get("scheduling") or {}
        return found.get("provisioningModel") == "SPOT" or bool(found.get("preemptible"))

    @property
    def has_price_limit(self) -> bool:
        """Whether a spot machine has a highest price; Google has none to set."""
        if self.provider == "aws":
            return "MaxPrice" in ((self.config.get("InstanceMarketOptions") or {}).get("SpotOptions") or {})
        return self.provider == "gcp" or (self.arm.get("billingProfile") or {}).get("maxPrice", -1) > 0

    @property
    def disk(self) -> int:
        """GB of the boot disk; 0 where it is not said."""
        if self.provider == "aws":
            return max((int(one.get("Ebs", {}).get("VolumeSize", 0)) for one in self.config.get("BlockDeviceMappings", [])), default=0)
        if self.provider == "azure":
            return int(self.arm.get("osDiskSize", 0))
        boot = [one.get("initializeParams", {}) for one in self.config.get("disks", []) if one.get("boot")]
        return max((int(one.get("diskSizeGb", 0)) for one in boot), default=0)

    def missing(self) -> Iterator[str]:
        """What must be said, as Ray's defaults are not wanted."""
        if self.provider == "aws":
            if not self.config.get("ImageId"):
                yield "ImageId is not set; Ray would take an image of Ubuntu 18.04"
            if not self.config.get("IamInstanceProfile"):
                yield "IamInstanceProfile is not set; Ray would give the head one that may do all in EC2 and S3, and workers none"
        if self.provider == "gcp":
            if not self.config.get("serviceAccounts"):
                yield "serviceAccounts is not set; Ray would give the head one that may do all in the project's stores"
            if not any((one.get("initializeParams") or {}).get("sourceImage") for one in self.config.get("disks", [])):
                yield "disks has no sourceImage"
        if self.provider == "azure" and not (self.arm.get("imageId") or self.arm.get("imagePublisher")):
            yield "azure_arm_parameters names no image"

    def open_to_the_world(self) -> Iterator[str]:
        """Why others than the cluster could reach such a node."""
        if self.provider == "aws":
            groups = self.config.get("SecurityGroupIds") or [
                one for each in self.config.get("NetworkInterfaces", []) for one in each.get("Groups", [])
            ]
            if not groups:
                yield "SecurityGroupIds is not set; Ray would make a group that opens port 22 to the world"
            if any(one.get("AssociatePublicIpAddress") for one in self.config.get("NetworkInterfaces", [])):
                yield "NetworkInterfaces gives it a public address"
        if self.provider == "gcp":
            found = self.config.get("networkInterfaces")
            if not found:
                yield "networkInterfaces is not set; Ray would take any network, whose rules may open port 22, and a public address"
            if any(one.get("accessConfigs") or one.get("ipv6AccessConfigs") for one in found or []):
                yield "networkInterfaces.accessConfigs gives it a public address"


def provider_problems(provider: dict[str, Any]) -> Iterator[str]:
    """What is wrong with the part ``provider`` of a file."""
    kind = provider["type"]
    for key in sorted(set(provider) - set(PROVIDER_KEYS[kind])):
        yield f"provider.{key}: there is no such key.{nearest(key, PROVIDER_KEYS[kind])}"
    if kind == "local":
        return
    if provider.get("use_internal_ips") is not True:
        yield "provider.use_internal_ips is not true, so that nodes are reached by public addresses; set it, and reach them through a tunnel"
    if provider.get("use_external_head_ip"):
        yield "provider.use_external_head_ip gives the head a public address; leave it out"
    if kind == "azure" and not (provider.get("msi_name") and provider.get("msi_resource_group")):
        yield "provider.msi_name and msi_resource_group are not both set; each `ray up` would make another identity, with no role"
    if provider.get("cache_stopped_nodes") is not False:
        yield "provider.cache_stopped_nodes is not false: nodes are stopped, not ended, and their disks go on to cost"
    for rule in (provider.get("security_group") or {}).get("IpPermissions", []):
        ranges = [one.get("CidrIp") or one.get("CidrIpv6") for one in [*rule.get("IpRanges", []), *rule.get("Ipv6Ranges", [])]]
        if any(one in WORLD for one in ranges):
            yield f"provider.security_group opens port {rule.get('FromPort')} to the world; name the addresses that need it"
