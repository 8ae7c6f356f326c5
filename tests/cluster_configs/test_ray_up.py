"""The files for `ray up`: each passes all checks, and of each check there is a file that is wrong in one thing and caught."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from cluster_configs import check, check_run, render, unfilled
from cluster_configs.providers import Node, machines
from paris_ray import config as configs
from paris_ray.config import ConfigError

ROOT = Path(__file__).parents[2]
FILES = ("aws", "gcp", "azure", "on_prem")
CLOUDS = ("aws", "gcp", "azure")


def load(name: str) -> dict[str, Any]:
    return copy.deepcopy(check.read(ROOT / "cluster_configs" / f"{name}.yaml"))


@pytest.mark.parametrize("name", FILES)
def test_each_file_passes(name):
    assert list(check.problems(load(name), ROOT)) == []


@pytest.mark.parametrize("name", FILES)
def test_each_file_says_what_was_run_and_what_was_not(name):
    head = "".join(line for line in (ROOT / "cluster_configs" / f"{name}.yaml").open() if line.startswith("#"))
    assert "Never run: `ray up` itself" in head.replace("\n# ", " ")
    assert "python -m cluster_configs.check" in head


@pytest.mark.parametrize("name", CLOUDS)
def test_unlike_machines_on_spot_and_a_head_that_is_not(name):
    tree = load(name)
    nodes = {key: Node(name, one["node_config"]) for key, one in tree["available_node_types"].items()}
    head = nodes.pop(tree["head_node_type"])
    assert not head.spot
    assert machines(name)[head.machine].memory >= 32
    assert machines(name)[head.machine].gpus == 0
    gpus = {machines(name)[one.machine].gpu for one in nodes.values() if one.spot}
    assert len(gpus - {None}) >= 3  # unlike
    assert None in gpus  # and some without


@pytest.mark.parametrize("size", sorted(render.sizes()))
@pytest.mark.parametrize("name", CLOUDS)
def test_every_size_gives_a_file_that_passes_and_has_what_the_preset_asks_for(name, size):
    made = yaml.safe_load(render.text(render.sized(load(name), size)))
    assert list(check.problems(made, ROOT)) == []
    assert list(check_run.unmet_demands(made, configs.load(size))) == []
    kinds = {key: one["max_workers"] for key, one in made["available_node_types"].items()}
    asked = render.sizes()[size]
    assert kinds == {key: asked.get(key, 0) for key in load(name)["available_node_types"] if key in asked or key == "head"}
    assert made["max_workers"] == sum(kinds.values())


def test_a_size_names_no_kind_of_machine_that_no_cloud_has():
    kinds = {key for name in CLOUDS for key in load(name)["available_node_types"]}
    assert {kind for size in render.sizes().values() for kind in size} <= kinds


@pytest.mark.parametrize(
    ("name", "left"), [("gcp", ["my-project"]), ("azure", []), ("on_prem", ["192.0.2.10", "192.0.2.11", "192.0.2.12", "192.0.2.13"])]
)
def test_what_is_yours_to_fill_in_is_named(name, left):
    assert unfilled.placeholders(load(name)) == left


def test_files_for_clouds_copy_the_same_to_the_nodes():
    mounts = [load(name)["file_mounts"] for name in FILES]
    assert all(one == mounts[0] for one in mounts)
    assert not any(Path(here).is_absolute() for here in mounts[0].values())


# -- mistakes -----------------------------------------------------------------------------------------------------------


def put(path: str, value: Any) -> Callable[[dict[str, Any]], None]:
    """Set what is at a path of keys and indices, with spaces between them."""

    def change(tree: Any) -> None:
        *parents, last = path.split()
        for key in parents:
            tree = tree[int(key) if isinstance(tree, list) else key]
        tree[last] = value

    return change


def drop(path: str) -> Callable[[dict[str, Any]], None]:
    """Take away what is at a path."""

    def change(tree: Any) -> None:
        *parents, last = path.split()
        for key in parents:
            tree = tree[int(key) if isinstance(tree, list) else key]
        del tree[last]

    return change


def replace(path: str, old: str, new: str) -> Callable[[dict[str, Any]], None]:
    """Change a command."""

    def change(tree: Any) -> None:
        assert any(old in text for text in tree[path])
        tree[path] = [text.replace(old, new) for text in tree[path]]

    return change


TYPES = "available_node_types"
WORLD = {"GroupName": "g", "IpPermissions": [{"FromPort": 22, "ToPort": 22, "IpProtocol": "tcp", "IpRanges": [{"CidrIp": "0.0.0.0/0"}]}]}
SPOT = {"MarketType": "spot", "SpotOptions": {"MaxPrice": "0.60"}}
MISTAKES = [
    # Ray's own schema
    ("aws", put("max_wrokers", 3), "max_wrokers"),
    ("aws", put(f"{TYPES} l4 max_worker", 3), "max_worker"),
    ("gcp", put(f"{TYPES} l4 resources CPU", 7.5), "7.5"),
    ("azure", put("head_node_type", "haed"), "head_node_type"),
    ("aws", put(f"{TYPES} cpu min_workers", 99), "min_workers"),
    ("gcp", put("provider type", "gpc"), "Did you mean 'gcp'"),
    # what the provider takes
    ("aws", put(f"{TYPES} l4 node_config InstanceType", "g6.2xlrage"), "Did you mean 'g6.2xlarge'"),
    ("aws", put(f"{TYPES} l4 node_config InstanceTyp", "g6.2xlarge"), "Did you mean 'InstanceType'"),
    ("aws", put(f"{TYPES} l4 node_config InstanceMarketOptions SpotOptions MaxPrice", 0.8), "0.8 is not of type 'string'"),
    ("aws", put(f"{TYPES} l4 node_config InstanceMarketOptions MarketType", "sport"), "Did you mean 'spot'"),
    ("aws", put(f"{TYPES} cpu node_config BlockDeviceMappings 0 Ebs VolumeSize", "250"), "is not of type 'integer'"),
    ("aws", put(f"{TYPES} cpu node_config SecurityGroupIds", "sg-1"), "is not of type 'array'"),
    ("gcp", put(f"{TYPES} l4 node_config machine_type", "g2-standard-8"), "Did you mean 'machineType'"),
    ("gcp", put(f"{TYPES} l4 node_config scheduling provisioningModel", "spot"), "none of the"),
    ("gcp", put(f"{TYPES} l4 node_config scheduling", [{"preemptible": True}]), "is not of type 'object'"),
    ("gcp", put(f"{TYPES} cpu node_config disks 0 initializeParams diskSizeGB", 5), "Did you mean 'diskSizeGb'"),
    ("gcp", put(f"{TYPES} cpu node_config status", "RUNNING"), "status"),  # output only
    ("azure", put(f"{TYPES} t4 node_config azure_arm_parameters vmsize", "x"), "Did you mean 'vmSize'"),
    ("azure", put(f"{TYPES} t4 node_config azure_arm_parameters osDiskSize", "250"), "is not of type 'integer'"),
    ("azure", put(f"{TYPES} t4 node_config azure_arm_parameters billingProfile maxPrize", 1), "Did you mean 'maxPrice'"),
    ("azure", put(f"{TYPES} t4 node_config vmSize", "Standard_NC8as_T4_v3"), "there is no such key"),
    ("aws", put("provider use_internal_ip", True), "Did you mean 'use_internal_ips'"),
    # the head
    ("aws", put(f"{TYPES} head node_config InstanceMarketOptions", SPOT), "the head is a spot machine"),
    ("gcp", put(f"{TYPES} head node_config scheduling", {"preemptible": True}), "the head is a spot machine"),
    ("azure", put(f"{TYPES} head node_config azure_arm_parameters priority", "Spot"), "the head is a spot machine"),
    ("aws", put(f"{TYPES} head node_config InstanceType", "m7i.xlarge"), "16 GB of memory, and needs 32"),
    ("gcp", put(f"{TYPES} head node_config machineType", "n2-standard-4"), "16 GB of memory, and needs 32"),
    ("azure", drop(f"{TYPES} head resources CPU"), "must be said to be 0"),
    ("gcp", put(f"{TYPES} head resources CPU", 8), "must be said to be 0"),
    ("aws", put(f"{TYPES} head max_workers", 2), "of the head there is one"),
    # what is said of the machines
    ("aws", put(f"{TYPES} l4 resources GPU", 2), "has 1"),
    ("aws", put(f"{TYPES} a100x8 resources GPU", 1), "paid for and not used"),
    ("gcp", put(f"{TYPES} l4 resources CPU", 16), "has 8"),
    ("aws", put(f"{TYPES} l4 node_config InstanceType", "g5.2xlarge"), "accelerator types ['L4']"),
    ("gcp", put(f"{TYPES} l4 labels ray.io/accelerator-type", "T4"), "ray.io/accelerator-type is T4"),
    ("azure", put(f"{TYPES} a100 labels gpu_memory", "141"), "has 80 GB"),
    ("gcp", put(f"{TYPES} l4 labels market", "on-demand"), "its machines are spot"),
    ("azure", put(f"{TYPES} t4 labels market", "spot market"), "labels"),
    ("azure", put(f"{TYPES} t4 node_config azure_arm_parameters vmSize", "Standard_NC8as_T4_v9"), "machines.yaml"),
    ("aws", put(f"{TYPES} cpu node_config BlockDeviceMappings 0 Ebs VolumeSize", 30), "its disk has 30 GB"),
    ("gcp", drop(f"{TYPES} a100 max_workers"), "max_workers is not set"),
    ("gcp", put("max_workers", 10), "above the whole cluster's"),
    ("gcp", put(f"{TYPES} h100 min_workers", 9), "above max_workers 8"),
    # spot, prices
    ("aws", drop(f"{TYPES} h100 node_config InstanceMarketOptions SpotOptions"), "without a highest price"),
    ("azure", drop(f"{TYPES} h100 node_config azure_arm_parameters billingProfile"), "without a highest price"),
    # who is let in
    ("aws", drop(f"{TYPES} l4 node_config SecurityGroupIds"), "opens port 22 to the world"),
    ("aws", put("provider security_group", WORLD), "opens port 22 to the world"),
    ("aws", put("provider use_internal_ips", False), "use_internal_ips"),
    ("gcp", drop(f"{TYPES} a100 node_config networkInterfaces"), "networkInterfaces is not set"),
    ("gcp", put(f"{TYPES} cpu node_config networkInterfaces 0 accessConfigs", [{"type": "ONE_TO_ONE_NAT"}]), "public address"),
    ("azure", put("provider use_external_head_ip", True), "public address"),
    ("azure", drop("provider use_internal_ips"), "use_internal_ips"),
    ("azure", drop("provider msi_resource_group"), "another identity"),
    ("aws", drop(f"{TYPES} cpu node_config IamInstanceProfile"), "IamInstanceProfile is not set"),
    ("gcp", drop(f"{TYPES} head node_config serviceAccounts"), "serviceAccounts is not set"),
    ("aws", replace("head_start_ray_commands", "--dashboard-host=127.0.0.1", "--dashboard-host=0.0.0.0"), "lets others"),
    ("gcp", replace("worker_start_ray_commands", ". ~/paris_ray/node.env; ulimit", "ulimit"), "without a token"),
    ("on_prem", drop("file_mounts ~/.ray/auth_token"), "auth_token"),
    # commands and paths
    ("aws", drop(f"{TYPES} head node_config ImageId"), "ImageId is not set"),
    ("azure", replace("head_start_ray_commands", "--object-spilling-directory", "--object-spiling-directory"), "Did you mean"),
    ("on_prem", replace("worker_start_ray_commands", " --object-spilling-directory=$PARIS_SPILL", ""), "would spill to /tmp"),
    ("on_prem", replace("head_start_ray_commands", " --num-cpus=0", ""), "--num-cpus=0"),
    ("on_prem", put("auth ssh_private_key", "~/.ssh/id_ed25519"), "every job can read it"),
    ("gcp", replace("head_start_ray_commands", "--autoscaling-config=~/ray_bootstrap_config.yaml", ""), "no worker would ever start"),
    ("aws", drop("head_start_ray_commands"), "must hold one `ray start`"),
    ("aws", put("setup_commands", ["bash ~/paris_ray/set_up.sh"]), "~/paris_ray/set_up.sh"),
    ("aws", put("head_setup_commands", ["~/env/bin/python -m jobs.trian_expert"]), "jobs.trian_expert, which does not exist"),
    ("gcp", put("file_mounts", {"~/paris_ray/paris_ray": "paris_rey", "~/.ray/auth_token": "~/.ray/auth_token"}), "paris_rey does not exist"),
    ("aws", put("provider cache_stopped_nodes", True), "stopped, not ended"),
]


@pytest.mark.parametrize(("name", "mistake", "said"), MISTAKES, ids=[f"{i}-{one[0]}-{one[2][:24]}" for i, one in enumerate(MISTAKES)])
def test_a_mistake_is_caught(name, mistake, said):
    tree = load(name)
    mistake(tree)
    found = list(check.problems(tree, ROOT))
    assert any(said in one for one in found), found


@pytest.mark.parametrize("name", CLOUDS)
def test_gpus_on_demand_only_are_a_mistake(name):
    tree = load(name)
    for one in tree["available_node_types"].values():
        one["node_config"] = {key: value for key, value in one["node_config"].items() if key not in ("InstanceMarketOptions", "scheduling")}
        one["node_config"].get("azure_arm_parameters", {}).pop("priority", None)
        one["labels"]["market"] = "on-demand"
    assert list(check.problems(tree, ROOT)) == [
        "available_node_types: no GPU on spot; experts leave checkpoints, so that they may be taken away, and cost a third"
    ]


def test_a_key_that_is_there_twice_is_a_mistake(tmp_path):
    (tmp_path / "x.yaml").write_text("cluster_name: a\nprovider: {type: aws, region: a, region: b}\n")
    with pytest.raises(ConfigError, match="the key 'region' is there twice"):
        check.read(tmp_path / "x.yaml")


def test_a_token_that_is_not_asked_for_is_a_mistake(tmp_path):
    tree = load("aws")
    for here in tree["file_mounts"].values():
        if not here.startswith("~"):
            (tmp_path / here).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / here).touch()
    (tmp_path / "cluster_configs/node.env").write_text("export RAY_AUTH_MODE=disabled\n")
    assert any("does not say RAY_AUTH_MODE=token" in one for one in check.problems(tree, tmp_path))


def test_the_command_says_what_it_finds_and_how_it_ends(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    assert check.main(["cluster_configs/aws.yaml", "--run", "paris_xl2", "--set", "expert.resources.preemption=aws", "--template"]) == 0
    warned, said = capsys.readouterr().out.splitlines()
    assert warned.startswith("cluster_configs/aws.yaml: warning: router.resources.preemption is not set, and l4, a10g, a100x8, h100 are on spot: ")
    assert said.startswith("cluster_configs/aws.yaml: nothing found, once your own stands for sg-00000000000000001, subnet-00000000000000001, ")
    (tmp_path / "my_aws.yaml").write_text(re.sub("-0{10,}", "-0abc", (ROOT / "cluster_configs/aws.yaml").read_text()))
    assert check.main([str(tmp_path / "my_aws.yaml")]) == 0
    assert capsys.readouterr().out == f"{tmp_path}/my_aws.yaml: nothing found\n"
    (tmp_path / "bad.yaml").write_text(
        (ROOT / "cluster_configs/aws.yaml").read_text().replace("InstanceType: p5.4xlarge", "InstanceType: p5.4xlrage")
    )
    assert check.main([str(tmp_path / "bad.yaml")]) == 1
    assert "h100.node_config.InstanceType: 'p5.4xlrage'" in capsys.readouterr().out
    for none in (tmp_path / "none.yaml", tmp_path):
        assert check.main([str(none)]) == 2
        assert capsys.readouterr().err.endswith("; name a file for `ray up`\n")
    assert check.main(["cluster_configs/aws.yaml", "--run", "paris_xl2", "--cluster", "eu"]) == 2


def test_what_is_to_be_filled_in_is_told_with_its_lines(tmp_path, capsys):
    (tmp_path / "my_gcp.yaml").write_text("# my-project\n" + (ROOT / "cluster_configs/gcp.yaml").read_text())
    (tmp_path / "run.yaml").write_text("preset: demo\nname: x  # in gs://bucket/run\nrun_dir: gs://bucket/run\n")
    arguments = [str(tmp_path / "my_gcp.yaml"), "--run", str(tmp_path / "run.yaml")]
    assert check.main(arguments) == 1
    told = capsys.readouterr().out.splitlines()
    assert told[-1] == f"{tmp_path}/run.yaml:3: still to be filled in: gs://bucket/run"
    lines = (tmp_path / "my_gcp.yaml").read_text().splitlines()
    for one in told[:-1]:
        file, number, _, word = re.fullmatch(r"([^:]+):(\d+): (still to be filled in:) (\S+)(?: \(also .*\))?", one).groups()
        assert file == arguments[0]
        assert word in lines[int(number) - 1].partition("#")[0]
    assert len(told) == 6  # network, head's account, workers', project, tunnel; run
    assert check.main([*arguments, "--set", "run_dir=gs://mine/run", "--template"]) == 0
    (tmp_path / "my_gcp.yaml").write_text((ROOT / "cluster_configs/gcp.yaml").read_text().replace("my-project", "theirs"))
    assert check.main(arguments) == 1  # the run's is left
    assert check.main([*arguments, "--set", "run_dir=gs://mine/run"]) == 0


def test_a_size_is_printed_as_a_file(tmp_path, capsys):
    assert render.main([str(ROOT / "cluster_configs/gcp.yaml"), "--size", "demo"]) == 0
    made = yaml.safe_load(capsys.readouterr().out)
    assert set(made["available_node_types"]) == {"head", "cpu"}
    assert made["max_workers"] == 4
    assert "metadata" not in made
    assert render.main([str(ROOT / "cluster_configs/on_prem.yaml"), "--size", "demo"]) == 2
