"""What the policies let a role do, as each cloud reads them: evaluators for IAM, Google's conditions and Azure's, from their documents."""

from __future__ import annotations

import importlib.util
import json
import re
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import pytest

from cluster_configs import policies
from cluster_configs.policies import WHOLE, experts, place
from paris_ray.config import ConfigError

URIS = {"aws": "s3://bucket/runs/a", "gcp": "gs://bucket/runs/a", "azure": "abfs://bucket@account.dfs.core.windows.net/runs/a"}


def iam(policy: dict[str, Any], action: str, key: str) -> bool:
    """IAM: nothing is allowed that no statement allows; * stands for any letters, slashes too. No statement here denies."""
    kind = {"read": "s3:GetObject", "write": "s3:PutObject", "delete": "s3:DeleteObject", "list": "s3:ListBucket"}[action]
    for one in policy["Statement"]:
        assert one["Effect"] == "Allow"
        if kind not in one["Action"]:
            continue
        if action == "list":
            if key == "(none)":  # IfExists: such a request has no prefix
                return True
            prefixes = one["Condition"]["StringLikeIfExists"]["s3:prefix"]  # these requests have one
            if one["Resource"] == ["arn:aws:s3:::bucket"] and any(fnmatchcase(key, like) for like in prefixes):
                return True
        elif any(fnmatchcase(f"arn:aws:s3:::bucket/{key}", like) for like in one["Resource"]):
            return True
    return False


def cel(bindings: list[dict[str, Any]], action: str, key: str) -> bool:
    """Google: a binding grants its role's permissions where its condition is true."""
    grants = {"roles/storage.objectViewer": {"read", "list"}, "roles/storage.objectUser": {"read", "list", "write", "delete"}}
    for one in bindings:
        assert one["bucket"] == "bucket"
        expression = one["condition"]["expression"]
        assert expression.count("||") <= 12
        name = "" if action == "list" else f"projects/_/buckets/bucket/objects/{key}"
        prefix = key if action == "list" else ""
        code = expression.replace(".startsWith(", ".startswith(").replace("||", "or")
        code = code.replace('api.getAttribute("storage.googleapis.com/objectListPrefix", "")', "prefix").replace("resource.name", "name")
        if action in grants[one["role"]] and eval(code, {"__builtins__": {}}, {"name": name, "prefix": prefix}):
            return True
    return False


def abac(assignments: list[dict[str, Any]], action: str, key: str) -> bool:
    """Azure: a role assignment counts where its condition is true; conditions guard the actions that they name and no others."""
    blobs = "Microsoft.Storage/storageAccounts/blobServices/containers/blobs"
    ours = policies.azure_role()
    grants = {"Storage Blob Data Reader": {"read", "list"}, ours["Name"]: {"list", *(one.removeprefix(f"{blobs}/") for one in ours["DataActions"])}}
    verb = {"list": "read"}.get(action, action)
    for one in assignments:
        assert one["conditionVersion"] == "2.0"
        assert len(one["condition"]) <= 8192
        code = one["condition"]
        code = re.sub(r"ActionMatches\{'([^']*)'\}", lambda found: str(found[1] == f"{blobs}/{verb}"), re.sub(r"SubOperationMatches", "§", code))
        code = re.sub(r"§\{'Blob.List'\}", str(action == "list"), code)
        code = re.sub(rf"@Resource\[{blobs}:path\] StringLike '([^']*)'", lambda found: str(action != "list" and fnmatchcase(key, found[1])), code)
        code = re.sub(rf"@Resource\[{blobs}:path\] StringEquals '([^']*)'", lambda found: str(action != "list" and key == found[1]), code)
        code = re.sub(rf"@Request\[{blobs}:prefix\] StringLike '([^']*)'", lambda found: str(action == "list" and fnmatchcase(key, found[1])), code)
        code = code.replace("AND", "and").replace("OR", "or").replace("NOT", "not").replace("!", " not ")
        if action in grants[one["role"]] and eval(code, {"__builtins__": {}}, {}):
            return True
    return False


READ_AS = {"aws": iam, "gcp": cel, "azure": abac}


def role(cloud: str, access: policies.Access, **options: Any) -> Any:
    return policies.CLOUDS[cloud](place(cloud, URIS[cloud]), access, **options)


@pytest.mark.parametrize("cloud", sorted(URIS))
def test_an_expert_reads_its_shard_and_writes_its_folder_and_nothing_else(cloud):
    allowed, made = READ_AS[cloud], role(cloud, experts([3]))
    for name in ("config.yaml", "encoders/encoders.json", "shards/expert=3/part-0000000.parquet"):
        assert allowed(made, "read", f"runs/a/{name}"), name
        assert not allowed(made, "write", f"runs/a/{name}"), name
        assert not allowed(made, "delete", f"runs/a/{name}"), name
    for name in ("experts/3/_manifest.json", "experts/3/checkpoints/images-80/model.safetensors", "events/expert-3.json", ".ray/expert-3/x"):
        assert all(allowed(made, action, f"runs/a/{name}") for action in ("read", "write", "delete")), name
    for name in (
        "shards/expert=4/part-0000000.parquet",
        "shards/expert=33/part-0000000.parquet",
        "experts/4/_manifest.json",
        "experts/31/_manifest.json",
        "events/expert-31.json",
        "router/_manifest.json",
        "model/paris.json",
        "corpus/part-0000000.parquet",
        "clusters/_manifest.json",
        "../a2/config.yaml",
    ):
        assert not any(allowed(made, action, f"runs/a/{name}") for action in ("read", "write", "delete", "list")), name
    for name in ("runs/b/config.yaml", "config.yaml", "runs/a2/experts/3/x", "other/runs/a/experts/3/x"):
        assert not any(allowed(made, action, name) for action in ("read", "write", "delete", "list")), name
    for name in ("shards/expert=3/", "encoders/", "experts/3/", "experts/3/checkpoints/"):
        assert allowed(made, "list", f"runs/a/{name}"), name
    for name in ("", "experts/", "shards/"):
        assert not allowed(made, "list", f"runs/a/{name}"), name


def requests() -> list[tuple[str, str]]:
    lines = Path(__file__).with_name("requests_of_an_expert.txt").read_text().splitlines()
    return [tuple(line.split(" ", 1)) for line in lines if not line.startswith("#")]  # type: ignore[misc]


def test_all_that_a_training_asks_of_the_store_is_allowed_on_aws():
    made = role("aws", experts([1]))
    assert {action for action, _ in requests()} == {"read", "write", "delete", "list"}
    assert [one for one in requests() if not iam(made, *one)] == []
    other = role("aws", experts([2]))
    assert [one for one in requests() if iam(other, *one) and "1" in one[1].split("/")] == []  # nothing of it with a sibling's role


@pytest.mark.parametrize("cloud", ["gcp", "azure"])
def test_objects_that_a_training_reads_and_writes_are_allowed_elsewhere(cloud):
    made = role(cloud, experts([1]))
    objects = [
        (action, key.rstrip("/") if cloud == "azure" else key) for action, key in requests() if action != "list"
    ]  # Azure: folders without slash
    assert [one for one in objects if not READ_AS[cloud](made, *one)] == []


@pytest.mark.parametrize("cloud", sorted(URIS))
def test_a_cluster_of_several_experts_has_what_each_of_them_has(cloud):
    allowed, made = READ_AS[cloud], role(cloud, experts(range(4, 8)))
    for k in range(4, 8):
        assert allowed(made, "read", f"runs/a/shards/expert={k}/part-0000000.parquet")
        assert allowed(made, "write", f"runs/a/experts/{k}/_manifest.json")
        assert allowed(made, "write", f"runs/a/events/machines/expert-{k}.json")
    assert not allowed(made, "read", "runs/a/shards/expert=3/part-0000000.parquet")
    assert not allowed(made, "write", "runs/a/experts/3/_manifest.json")


@pytest.mark.parametrize("cloud", sorted(URIS))
def test_the_cluster_of_all_stages_has_the_run_and_reads_the_pictures(cloud):
    allowed, made = READ_AS[cloud], role(cloud, WHOLE, source=place(cloud, URIS[cloud].replace("runs/a", "pictures")))
    for name in ("corpus/part-0000000.parquet", "model/paris.json", "config.yaml", "experts/3/x"):
        assert all(allowed(made, action, f"runs/a/{name}") for action in ("read", "write", "delete"))
    assert allowed(made, "read", "pictures/0001.jpg")
    assert not allowed(made, "write", "pictures/0001.jpg")
    assert not allowed(made, "read", "others/0001.jpg")


@pytest.mark.parametrize("cloud", sorted(URIS))
def test_who_serves_reads_the_model_and_nothing_else(cloud):
    allowed, made = READ_AS[cloud], role(cloud, policies.SERVING)
    assert allowed(made, "read", "runs/a/model/paris.json")
    assert not allowed(made, "write", "runs/a/model/paris.json")
    assert not any(allowed(made, "read", f"runs/a/{name}") for name in ("corpus/x", "experts/1/x", "config.yaml", "model2/x"))


def test_a_condition_that_azure_would_refuse_is_refused():
    with pytest.raises(ConfigError, match="fewer experts, or --whole"):
        role("azure", experts(range(16)))


def test_an_iam_policy_is_one_in_form_and_size():
    for made in (role("aws", experts(range(8))), policies.aws_head("paris-workers"), policies.aws_you("paris-head", "paris-workers")):
        assert made["Version"] == "2012-10-17"
        assert len(json.dumps(made, separators=(",", ":"))) <= 6144  # of a managed policy
        names = [one["Sid"] for one in made["Statement"]]
        assert len(set(names)) == len(names)
        assert all(re.fullmatch("[A-Za-z0-9]+", name) for name in names)
        assert all(set(one) <= {"Sid", "Effect", "Action", "Resource", "Condition"} for one in made["Statement"])
        assert all(re.fullmatch(r"(s3|ec2|ssm|ssmmessages|iam):[A-Z]\w+", action) for one in made["Statement"] for action in one["Action"])
        assert all(re.fullmatch(r"\*|arn:aws:(s3|ec2|ssm|iam):[^ ]+", each) for one in made["Statement"] for each in one["Resource"])


INSTANCE, EC2 = "arn:aws:ec2:us-west-2:1:instance/i-1", "arn:aws:ec2:us-west-2:1"
OURS, OTHERS = {"ec2:ResourceTag/ray-cluster-name": "paris"}, {"ec2:ResourceTag/ray-cluster-name": "theirs"}
AS_NEW = {"aws:RequestTag/ray-cluster-name": "paris", "ec2:CreateAction": "RunInstances"}
HEADS = [
    # A request for spot machines, resource by resource, as EC2 asks IAM.
    *(
        ("ec2:RunInstances", f"{EC2}:{one}", AS_NEW, True)
        for one in ("instance/*", "volume/*", "network-interface/*", "subnet/s", "security-group/g")
    ),
    ("ec2:RunInstances", f"{EC2}:spot-instances-request/*", AS_NEW, True),
    ("ec2:RunInstances", "arn:aws:ec2:us-west-2::image/ami-1", AS_NEW, True),
    ("ec2:CreateTags", INSTANCE, AS_NEW, True),
    ("ec2:RunInstances", f"{EC2}:instance/*", {"aws:RequestTag/ray-cluster-name": "theirs"}, False),
    ("ec2:RunInstances", f"{EC2}:instance/*", {}, False),
    # Its own machines later: Ray tags them with their state.
    ("ec2:CreateTags", INSTANCE, OURS, True),
    ("ec2:TerminateInstances", INSTANCE, OURS, True),
    # Another's, which it may neither end nor name as its own.
    *((action, INSTANCE, tags, False) for action in ("ec2:TerminateInstances", "ec2:CreateTags") for tags in (OTHERS, {})),
    ("ec2:CreateTags", INSTANCE, {**OTHERS, "aws:RequestTag/ray-cluster-name": "paris"}, False),
    ("ec2:StopInstances", INSTANCE, OURS, False),
    ("iam:PassRole", "arn:aws:iam::1:role/paris-workers", {"iam:PassedToService": "ec2.amazonaws.com"}, True),
    ("iam:PassRole", "arn:aws:iam::1:role/paris-workers", {"iam:PassedToService": "lambda.amazonaws.com"}, False),
    ("iam:PassRole", "arn:aws:iam::1:role/admin", {"iam:PassedToService": "ec2.amazonaws.com"}, False),
]


def allows(policy: dict[str, Any], action: str, resource: str, context: dict[str, str]) -> bool:
    """IAM: StringEquals is true where the request has the key with that value."""

    def one_does(one: dict[str, Any]) -> bool:
        conditions = one.get("Condition", {})
        assert set(conditions) <= {"StringEquals"}
        met = all(context.get(key) == value for key, value in conditions.get("StringEquals", {}).items())
        likes = [like.replace("${aws:userid}", "AIDA1") for like in one["Resource"]]
        return action in one["Action"] and any(fnmatchcase(resource, like) for like in likes) and met

    return any(one_does(one) for one in policy["Statement"])


@pytest.mark.parametrize(("action", "resource", "context", "granted"), HEADS)
def test_a_head_starts_and_ends_its_own_machines_and_no_others(action, resource, context, granted):
    assert allows(policies.aws_head("paris-workers"), action, resource, context) == granted
    if context.items() & OURS.items():
        assert not allows(policies.aws_head("others", "another"), action, resource, context)


YOURS = [
    *HEADS,
    ("iam:PassRole", "arn:aws:iam::1:role/paris-head", {"iam:PassedToService": "ec2.amazonaws.com"}, True),
    ("ec2:CreateKeyPair", f"{EC2}:key-pair/ray-autoscaler_1_us-west-2", {}, True),
    ("ec2:CreateKeyPair", f"{EC2}:key-pair/admin", {}, False),
    # A session through which ssh goes: with its document, to a machine of the cluster, and ended by who began it.
    ("ssm:StartSession", "arn:aws:ssm:us-west-2::document/AWS-StartSSHSession", {}, True),
    ("ssm:StartSession", "arn:aws:ssm:us-west-2:1:document/SSM-SessionManagerRunShell", {}, False),
    ("ssm:StartSession", INSTANCE, {"ssm:resourceTag/ray-cluster-name": "paris"}, True),
    ("ssm:StartSession", INSTANCE, {"ssm:resourceTag/ray-cluster-name": "theirs"}, False),
    ("ssmmessages:OpenDataChannel", "arn:aws:ssm:us-west-2:1:session/AIDA1-0a", {}, True),
    ("ssm:TerminateSession", "arn:aws:ssm:us-west-2:1:session/AIDA1-0a", {}, True),
    ("ssm:TerminateSession", "arn:aws:ssm:us-west-2:1:session/AIDA2-0a", {}, False),
]


@pytest.mark.parametrize(("action", "resource", "context", "granted"), YOURS)
def test_you_may_what_the_head_may_and_what_leads_to_its_machines(action, resource, context, granted):
    assert allows(policies.aws_you("paris-head", "paris-workers"), action, resource, context) == granted


ASKED = {
    "key_pairs": "DescribeKeyPairs",
    "security_groups": "DescribeSecurityGroups",
    "subnets": "DescribeSubnets",
    "instances": "DescribeInstances",
    "describe_instance_types": "DescribeInstanceTypes",
    "describe_images": "DescribeImages",
    "create_key_pair": "CreateKeyPair",
    "create_instances": "RunInstances",
    "create_tags": "CreateTags",
    "terminate_instances": "TerminateInstances",
}
"""How boto3 calls what EC2 calls otherwise."""
NEVER_ASKED = {
    "start_instances": "cache_stopped_nodes: false",
    "stop_instances": "cache_stopped_nodes: false",
    "describe_launch_template_versions": "no LaunchTemplate",
}
"""What Ray asks only where a file says otherwise than ours."""


def test_what_rays_provider_asks_of_ec2_is_allowed_to_you():
    """Of Ray's own source: a call that a new version makes more is not known here."""
    folder = Path(str(importlib.util.find_spec("ray").submodule_search_locations[0])) / "autoscaler/_private/aws"  # type: ignore[union-attr,index]
    text = "".join((folder / name).read_text() for name in ("config.py", "node_provider.py"))
    calls = set(re.findall(r"\bec2(?:_fail_fast)?\.(?:meta\.client\.)?([a-z_]+)\b", text)) - {"amazonaws"}
    assert calls == set(ASKED) | set(NEVER_ASKED)
    granted = {action for one in policies.aws_you("paris-head", "paris-workers")["Statement"] for action in one["Action"]}
    assert {f"ec2:{action}" for action in ASKED.values()} <= granted
    ours = (Path(__file__).parents[2] / "cluster_configs/aws.yaml").read_text()
    assert "cache_stopped_nodes: false" in ours
    assert "LaunchTemplate" not in ours


def test_on_aws_the_names_in_the_bucket_can_be_listed():
    """The exception to what an expert may, which pyarrow needs: a list without a prefix. What is in the files cannot be read."""
    made = role("aws", experts([3]))
    assert iam(made, "list", "(none)")
    assert not iam(made, "read", "runs/a/experts/4/_manifest.json")


def test_on_azure_who_writes_blobs_may_do_nothing_to_their_container():
    """Actions, unlike data actions, are limited by no condition: one that changes, deletes or opens the container would hold for all of it."""
    actions = policies.azure_role()["Actions"]
    assert actions == ["Microsoft.Storage/storageAccounts/blobServices/containers/read"]
    assert "Contributor" not in {one["role"] for access in (experts([3]), WHOLE) for one in role("azure", access)}


@pytest.mark.parametrize(
    ("cloud", "uri"),
    [
        ("aws", "gs://bucket/run"),
        ("gcp", "s3://bucket/run"),
        ("azure", "abfs://container/run"),
        ("aws", "/runs/a"),
        ("aws", "s3://bucket/a*"),
        ("gcp", 'gs://b/"'),
    ],
)
def test_another_place_is_refused(cloud, uri):
    with pytest.raises(ConfigError):
        place(cloud, uri)


def test_the_command_prints_what_the_clouds_tools_take(capsys):
    assert policies.main(["aws", "s3://bucket/runs/a", "--experts", "5,4"]) == 0
    assert json.loads(capsys.readouterr().out) == role("aws", experts([4, 5]))
    assert policies.main(["gcp", "gs://bucket/runs/a", "--whole"]) == 0
    assert json.loads(capsys.readouterr().out) == role("gcp", WHOLE)
    assert policies.main(["aws", "--head", "--workers", "w"]) == 0
    assert json.loads(capsys.readouterr().out) == policies.aws_head("w")
    assert policies.main(["aws", "--you", "h", "--workers", "w"]) == 0
    assert json.loads(capsys.readouterr().out) == policies.aws_you("h", "w")
    assert policies.main(["azure", "--role"]) == 0
    assert json.loads(capsys.readouterr().out) == policies.azure_role()
    for wrong in (
        ["aws", "--experts", "1"],
        ["aws", "s3://b/r", "--experts", "all"],
        ["gcp", "--head"],
        ["aws", "--role"],
        ["aws", "--you", "h"],
        ["azure", "s3://b/r", "--whole"],
    ):
        assert policies.main(wrong) == 2
        assert len(capsys.readouterr().err.splitlines()) == 1
