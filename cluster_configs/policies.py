"""Print what a role may do in the store, as the cloud wants it said: what some experts need, or all of a run.

    python -m cluster_configs.policies aws   s3://bucket/run --experts 4,5          # an IAM policy, for `aws iam put-role-policy`
    python -m cluster_configs.policies gcp   gs://bucket/run --experts 4,5          # conditions, for `gcloud storage buckets add-iam-policy-binding`
    python -m cluster_configs.policies azure abfs://container@account.dfs.core.windows.net/run --experts 4,5    # for `az role assignment create`
    python -m cluster_configs.policies azure --role                                 # the role of who writes, once: `az role definition create`
    python -m cluster_configs.policies aws   s3://bucket/run --whole --source s3://bucket/pictures              # of the cluster where all stages run
    python -m cluster_configs.policies aws   --head --workers paris-workers         # what the head of a cluster needs besides, to start machines
    python -m cluster_configs.policies aws   --you paris-head --workers paris-workers    # what you need, who give such a cluster to `ray up`

An expert reads the config, the encoders and its own shard, and writes its own folder: nothing of its siblings, and nothing that it learns from.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import urllib.parse
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from paris_ray.config import ConfigError


@dataclass(frozen=True)
class Access:
    """What may be read and what may be written too, as beginnings of names below the run's folder."""

    read: tuple[str, ...] = ()
    write: tuple[str, ...] = ()


def expert(k: int) -> Access:
    """What the training of an expert does in the run's folder."""
    name = f"expert-{k}"
    return Access(
        read=("config.yaml", "encoders/", f"shards/expert={k}/"),
        # Its result; its progress, cost and whether it is to stop; what Ray Train keeps while it runs.
        write=(f"experts/{k}/", f"events/{name}.", f"events/machines/{name}.", f".ray/{name}/"),
    )


def experts(which: Iterable[int]) -> Access:
    """Of several experts."""
    found = [expert(k) for k in which]
    read = dict.fromkeys(one for each in found for one in each.read)
    return Access(tuple(read), tuple(one for each in found for one in each.write))


SERVING = Access(read=("model/",))
"""Of who serves the run's model."""
WHOLE = Access(write=("",))
"""Of the cluster where all stages run."""


@dataclass(frozen=True)
class Place:
    """Where a run is: bucket or container, account (Azure's), and the run's folder there, with a slash behind it."""

    bucket: str
    run: str
    account: str = ""


SCHEMES = {"aws": ("s3",), "gcp": ("gs",), "azure": ("abfs", "abfss")}


def place(cloud: str, uri: str) -> Place:
    """Of a run's URI. Raises ConfigError when it is not one of that cloud's."""
    parts = urllib.parse.urlsplit(uri)
    account = (parts.hostname or "").partition(".")[0] if parts.username else ""
    bucket = parts.username or parts.hostname or ""
    if parts.scheme not in SCHEMES[cloud] or not bucket or (cloud == "azure" and not account):
        wanted = {"aws": "s3://BUCKET/RUN", "gcp": "gs://BUCKET/RUN", "azure": "abfs://CONTAINER@ACCOUNT.dfs.core.windows.net/RUN"}[cloud]
        raise ConfigError(f"{uri!r} is not a run in the store of {cloud}; give {wanted}")
    if bad := sorted(set(re.findall(r"[^\w./:@=+-]", uri))):
        raise ConfigError(f"{uri!r} holds {' '.join(bad)}, which a policy would read as more than a name; choose another folder")
    folder = parts.path.strip("/")
    return Place(bucket, f"{folder}/" if folder else "", account)


def markers(where: Place, access: Access) -> list[str]:
    """Folders above what is written: an object store has none, but pyarrow makes and remakes an empty object for each."""
    names = [where.run + one for one in access.write]
    return sorted({name[: i + 1] for name in names for i, letter in enumerate(name[:-1]) if letter == "/"})


def own(where: Place, access: Access) -> list[str]:
    """The names of folders that are written, without the slash: pyarrow asks for such objects, too."""
    return [f"{where.run}{one}".rstrip("/") for one in access.write if f"{where.run}{one}".endswith("/")]


CLUSTER = "paris"
"""The cluster_name of aws.yaml, with which Ray tags its machines."""


# -- AWS ----------------------------------------------------------------------------------------------------------------


def aws(where: Place, access: Access, source: Place | None = None) -> dict[str, Any]:
    """An IAM policy."""
    bucket = f"arn:aws:s3:::{where.bucket}"
    named = [where.run + one for one in (*access.read, *access.write)]
    # A folder is looked for by its name without the slash, too.
    listed = sorted({one for name in named for one in (f"{name}*", name.rstrip("/"))} - {""})
    statements = [
        # IfExists: a question for the bucket itself, or for an object that is not there, has no prefix, and would be refused, not answered with no.
        # So does a list of the whole bucket: names of others' files are no secret to who has such a role, their content is.
        _statement("List", ["s3:ListBucket"], [bucket], {"StringLikeIfExists": {"s3:prefix": listed}}),
        _statement("Region", ["s3:GetBucketLocation"], [bucket]),
    ]
    read = [*(f"{where.run}{one}*" for one in access.read), *own(where, access)]
    if read:
        statements.append(_statement("Read", ["s3:GetObject"], [f"{bucket}/{one}" for one in read]))
    if folders := markers(where, access):
        statements.append(_statement("Folders", ["s3:PutObject"], [f"{bucket}/{one}" for one in folders]))
    if access.write:
        write = ["s3:GetObject", "s3:PutObject", "s3:DeleteObject", "s3:AbortMultipartUpload", "s3:ListMultipartUploadParts"]
        statements.append(_statement("Write", write, [f"{bucket}/{where.run}{one}*" for one in access.write]))
    if source is not None:
        pictures = f"arn:aws:s3:::{source.bucket}"
        listed = [f"{source.run}*", *([source.run.rstrip("/")] if source.run else [])]
        statements.append(_statement("ListSource", ["s3:ListBucket"], [pictures], {"StringLikeIfExists": {"s3:prefix": listed}}))
        statements.append(_statement("ReadSource", ["s3:GetObject"], [f"{pictures}/{source.run}*"]))
    return {"Version": "2012-10-17", "Statement": statements}


def aws_head(workers: str, cluster: str = CLUSTER, account: str = "*") -> dict[str, Any]:
    """What a head needs to start machines of its cluster whose role is ``workers``, to name them, and to end them, and no others."""
    describe = ["ec2:DescribeInstances", "ec2:DescribeInstanceTypes", "ec2:DescribeInstanceStatus", "ec2:DescribeImages", "ec2:DescribeSubnets"]
    # A request for spot machines makes the last of these.
    used = ["volume/*", "network-interface/*", "subnet/*", "security-group/*", "key-pair/*", "spot-instances-request/*"]
    instances = [f"arn:aws:ec2:*:{account}:instance/*"]
    ours = {"StringEquals": {"ec2:ResourceTag/ray-cluster-name": cluster}}
    return {
        "Version": "2012-10-17",
        "Statement": [
            _statement("Look", describe, ["*"]),
            _statement("Start", ["ec2:RunInstances"], instances, {"StringEquals": {"aws:RequestTag/ray-cluster-name": cluster}}),
            _statement("StartWith", ["ec2:RunInstances"], [f"arn:aws:ec2:*:{account}:{one}" for one in used] + ["arn:aws:ec2:*::image/*"]),
            # What it could name, it could end: only what it starts, or has started.
            _statement("NameNew", ["ec2:CreateTags"], instances, {"StringEquals": {"ec2:CreateAction": "RunInstances"}}),
            _statement("NameAndEnd", ["ec2:CreateTags", "ec2:TerminateInstances"], instances, ours),
            _statement("Image", ["ssm:GetParameters", "ssm:GetParameter"], ["arn:aws:ssm:*::parameter/aws/service/*"]),
            _statement(
                "Role", ["iam:PassRole"], [f"arn:aws:iam::{account}:role/{workers}"], {"StringEquals": {"iam:PassedToService": "ec2.amazonaws.com"}}
            ),
        ],
    }


def aws_you(head: str, workers: str, cluster: str = CLUSTER, account: str = "*") -> dict[str, Any]:
    """What who runs `ray up`, and the commands that go to its machines, needs: a head's rights, and what Ray asks only where you sit."""
    mine, others = aws_head(workers, cluster, account), f"arn:aws:ec2:*:{account}"
    look, role = (next(one for one in mine["Statement"] if one["Sid"] == sid) for sid in ("Look", "Role"))
    # Ray looks for its key, and for the network of the security group.
    look["Action"] += ["ec2:DescribeKeyPairs", "ec2:DescribeSecurityGroups"]
    role["Resource"].append(f"arn:aws:iam::{account}:role/{head}")
    # A session's name begins with that of who began it, which is this for users and for roles.
    sessions = ["arn:aws:ssm:*:*:session/${aws:userid}-*"]
    mine["Statement"] += [
        _statement("Key", ["ec2:CreateKeyPair"], [f"{others}:key-pair/ray-autoscaler_*"]),
        _statement("Ssh", ["ssm:StartSession"], ["arn:aws:ssm:*::document/AWS-StartSSHSession"]),
        _statement("SshTo", ["ssm:StartSession"], [f"{others}:instance/*"], {"StringEquals": {"ssm:resourceTag/ray-cluster-name": cluster}}),
        _statement("SshEnd", ["ssm:TerminateSession", "ssm:ResumeSession"], sessions),
        _statement("SshData", ["ssmmessages:OpenDataChannel"], sessions),
    ]
    return mine


def _statement(sid: str, actions: list[str], resources: list[str], condition: dict[str, Any] | None = None) -> dict[str, Any]:
    made = {"Sid": sid, "Effect": "Allow", "Action": actions, "Resource": resources}
    return made if condition is None else {**made, "Condition": condition}


# -- Google Cloud -------------------------------------------------------------------------------------------------------

OPERATORS = 12
"""The most logical operators that a condition may have; what needs more is several bindings."""


def gcp(where: Place, access: Access, source: Place | None = None) -> list[dict[str, Any]]:
    """Bindings of roles with conditions, each with the bucket that it is of."""
    made: list[dict[str, Any]] = []
    for role, bucket, names, folders in [
        ("roles/storage.objectViewer", where.bucket, [where.run + one for one in access.read], []),
        ("roles/storage.objectUser", where.bucket, [where.run + one for one in access.write], markers(where, access) + own(where, access)),
        ("roles/storage.objectViewer", source.bucket if source else "", [source.run] if source else [], []),
    ]:
        objects = f"projects/_/buckets/{bucket}/objects/"
        terms = [f'resource.name.startsWith("{objects}{name}")' for name in names]
        terms += [f'api.getAttribute("storage.googleapis.com/objectListPrefix", "").startsWith("{name}")' for name in names]
        terms += [f'resource.name == "{objects}{name}"' for name in folders]
        for i in range(0, len(terms), OPERATORS + 1):
            title = f"paris-{role.removeprefix('roles/storage.object').lower()}-{len(made)}"
            made.append({"bucket": bucket, "role": role, "condition": {"title": title, "expression": " || ".join(terms[i : i + OPERATORS + 1])}})
    return made


# -- Azure --------------------------------------------------------------------------------------------------------------

CONDITION = 8192
"""The most letters of a condition. There can be no second assignment of the same role at the same scope to divide it over."""
BLOBS = "Microsoft.Storage/storageAccounts/blobServices/containers/blobs"
WRITER = "Paris blob writer"
"""The role of who writes. Azure's own, Storage Blob Data Contributor, may also delete the container or open it to all; no condition limits that."""


def azure_role() -> dict[str, Any]:
    """That role's definition: what is done with blobs, and of the container no more than to see that it is there."""
    return {
        "Name": WRITER,
        "IsCustom": True,
        "Description": "Reads, writes and deletes blobs, where the assignment's condition lets it.",
        "Actions": [BLOBS.removesuffix("/blobs") + "/read"],
        "NotActions": [],
        "DataActions": [f"{BLOBS}/{one}" for one in ("read", "write", "add/action", "delete", "move/action")],
        "NotDataActions": [],
        "AssignableScopes": ["/subscriptions/SUBSCRIPTION"],
    }


def azure(where: Place, access: Access, source: Place | None = None) -> list[dict[str, Any]]:
    """Role assignments with conditions (Azure's attribute-based access control), each with the scope that it is of."""
    made: list[dict[str, Any]] = []
    for role, at, names in [
        ("Storage Blob Data Reader", where, [where.run + one for one in access.read]),
        (WRITER, where, [where.run + one for one in access.write]),
        ("Storage Blob Data Reader", source or where, [source.run] if source else []),
    ]:
        if names:
            scope = f"/subscriptions/SUBSCRIPTION/resourceGroups/GROUP/providers/Microsoft.Storage/storageAccounts/{at.account}"
            scope += f"/blobServices/default/containers/{at.bucket}"
            # Azure names a folder without its slash.
            folders = [one.rstrip("/") for one in markers(where, access) + own(where, access)] if role == WRITER else []
            condition = _azure_condition(names, folders, role == WRITER)
            made.append({"role": role, "scope": scope, "conditionVersion": "2.0", "condition": condition})
    return made


def _azure_condition(names: list[str], folders: list[str], write: bool) -> str:
    def any_of(attribute: str) -> str:
        return " OR ".join(f"@{attribute} StringLike '{name}*'" for name in names)

    exact = "".join(f" OR @Resource[{BLOBS}:path] StringEquals '{name}'" for name in folders)
    path, prefix = any_of(f"Resource[{BLOBS}:path]") + exact, any_of(f"Request[{BLOBS}:prefix]")
    read = f"ActionMatches{{'{BLOBS}/read'}}"
    others = [f"!(ActionMatches{{'{BLOBS}/{one}'}})" for one in ("write", "add/action", "delete", "move/action")] if write else []
    none = " AND ".join([f"!({read} AND NOT SubOperationMatches{{'Blob.List'}})", *others])
    made = f"(({none}) OR ({path})) AND (!({read} AND SubOperationMatches{{'Blob.List'}}) OR ({prefix}))"
    if len(made) > CONDITION:
        raise ConfigError(f"azure: the condition has {len(made)} letters, and may have {CONDITION}; give the role fewer experts, or --whole")
    return made


CLOUDS = {"aws": aws, "gcp": gcp, "azure": azure}


def main(argv: Sequence[str] | None = None) -> int:
    """Print it; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m cluster_configs.policies", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("cloud", choices=sorted(CLOUDS))
    parser.add_argument("run", nargs="?", metavar="URI", help="the run's folder in the store")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--experts", metavar="K,K…", help="those that the role trains")
    what.add_argument("--whole", action="store_true", help="all of the run")
    what.add_argument("--serve", action="store_true", help="read its model")
    what.add_argument("--role", action="store_true", help="the definition of the role of who writes (azure)")
    what.add_argument("--head", action="store_true", help="start and end machines (aws)")
    what.add_argument("--you", metavar="ROLE", help="run `ray up` for a cluster whose head has this role (aws)")
    parser.add_argument("--source", metavar="URI", help="where the pictures are, to be read")
    parser.add_argument("--workers", metavar="ROLE", help="with --head and --you: the role of the machines that the head starts")
    parser.add_argument("--cluster-name", default=CLUSTER, metavar="NAME", help=f"with these: cluster_name of its file (default {CLUSTER})")
    args = parser.parse_args(argv)
    try:
        print(json.dumps(_asked(args), indent=2))
    except ConfigError as error:
        print(f"{parser.prog}: {error}", file=sys.stderr)
        return 2
    return 0


def _asked(args: argparse.Namespace) -> Any:
    if args.head or args.you:
        if args.cloud != "aws" or not args.workers:
            raise ConfigError("--head and --you are for aws, with --workers ROLE; on gcp and azure the README names the roles that are there for it")
        return aws_you(args.you, args.workers, args.cluster_name) if args.you else aws_head(args.workers, args.cluster_name)
    if args.role:
        if args.cloud != "azure":
            raise ConfigError("--role is for azure; aws and gcp have roles that do no more than is needed")
        return azure_role()
    if args.run is None:
        raise ConfigError("name the run's folder in the store, such as s3://bucket/run")
    try:
        access = WHOLE if args.whole else SERVING if args.serve else experts(sorted({int(one) for one in args.experts.split(",")}))
    except ValueError:
        raise ConfigError(f"--experts: {args.experts!r} must be numbers of experts with commas between them, such as 0,3") from None
    source = place(args.cloud, args.source) if args.source else None
    return CLOUDS[args.cloud](place(args.cloud, args.run), access, source)


if __name__ == "__main__":
    sys.exit(main())
