"""The guides from an empty account to a picture: what of them can be run without a cloud is run, and the names in them are those of the files."""

from __future__ import annotations

import importlib
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from unittest.mock import MagicMock

import pytest
import yaml
from kustomize import build

from cluster_configs import check, check_kubernetes, check_together, render
from cluster_configs.providers import machines
from jobs.access_facts import AWS_QUOTAS
from jobs.plan import plan
from paris_ray import config as configs

ROOT = Path(__file__).parents[2]
PAGES = {cloud: (ROOT / f"docs/{cloud}.md").read_text() for cloud in ("aws", "gcp", "azure", "kubernetes")}
OPERATIONS = (ROOT / "docs/operations.md").read_text()
YOURS = {
    "aws": {"AWS_REGION": "eu-west-1", "GROUP": "sg-0a1", "SUBNETS": "(subnet-0a1 subnet-0a2 subnet-0a3)", "BUCKET": "paris-1", "RUN": "first"},
    "gcp": {"PROJECT": "their-project", "REGION": "europe-west4", "ZONE": "europe-west4-b", "BUCKET": "their-runs", "RUN": "first"},
    "azure": {"LOCATION": "westeurope", "RUNS": "abfs://runs@theirs.dfs.core.windows.net/first", "SUBSCRIPTION": "0a1-0a2"},
}


def blocks(page: str) -> list[str]:
    return re.findall(r"^ *```sh\n(.*?)^ *```", PAGES[page], re.M | re.S)


def told(page: str) -> str:
    return "\n".join(blocks(page))


def lines(page: str, *begins: str) -> str:
    """Commands of a page that begin so, with the lines that they go on in."""
    return "\n".join(re.findall(rf"^(?:{'|'.join(begins)})(?:[^\n]*\\\n)*[^\n]*", told(page), re.M))


def bash(script: str, folder: Path) -> str:
    done = subprocess.run(["bash", "-euo", "pipefail", "-c", script], cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("page", PAGES)
def test_blocks_are_bash_and_say_what_was_run(page):
    assert len(blocks(page)) >= 6
    for block in blocks(page):
        done = subprocess.run(["bash", "-n"], input=block, capture_output=True, text=True, check=False)
        assert done.returncode == 0, f"{block[:200]}\n{done.stderr}"
    assert re.search(r"\*\*No command here has met (a )?[A-Z]", PAGES[page])
    assert "--max-cost" not in told(page) or "price_per_hour" in told(page)  # without which run_all refuses it
    # In this order, whatever is between.
    serves = "model=" if page != "kubernetes" else "apply -k my_kuberay/overlays/demo_serving"
    places = [told(page).index(one) for one in ("jobs.doctor", "jobs.run_all", serves, "lion face")]
    assert places == sorted(places)


@pytest.mark.parametrize("cloud", YOURS)
def test_the_clusters_are_looked_at_before_training_and_tunnels_read_no_keyboard(cloud):
    page = told(cloud)
    run = "python -m jobs.run_all --config run.yaml --address $RAY_ADDRESS"
    places = [page.index(one) for one in (f"{run} --until partition\n", "clusters/report.html", f"{run}  ", "jobs.status", "ray down")]
    assert places == sorted(places)
    assert "#7-the-end" in PAGES[cloud]
    # ssh -tt, with which Ray makes tunnels, is stopped by the terminal that it would read in the background.
    tunnels = re.findall(r"ray dashboard [^\n]*", page)
    assert len(tunnels) == 2
    assert all("< /dev/null &" in one for one in tunnels)


@pytest.mark.parametrize("cloud", YOURS)
def test_rays_environment_is_the_same_wherever_it_is_told(cloud):
    """Ray of the pins' version; on Azure the packages that its head gets."""
    (given,) = re.findall(r"ray_up/bin/pip install ((?:[^\n]*\\\n)*[^\n#]*)", told(cloud))
    packages = sorted(given.replace("\\\n", " ").split())
    pinned = re.search(r"^ray==([\d.]+)", (ROOT / "constraints.txt").read_text(), re.M)
    assert pinned is not None
    assert f"'ray[default]=={pinned[1]}'" in packages
    everywhere = [sorted(one.replace("\\\n", " ").split()) for one in re.findall(r"ray_up/bin/pip install ((?:[^\n]*\\\n)*[^\n#]*)", OPERATIONS)]
    assert packages in everywhere
    head = yaml.safe_load((ROOT / f"cluster_configs/{cloud}.yaml").read_text())["head_setup_commands"][0].split("env/bin/python ")[1].split()
    names = {one.partition("==")[0] for one in packages} - {"'ray[default]"}
    assert names == {one.partition("==")[0] for one in head}
    if cloud == "azure":
        assert set(head) < set(packages)


def test_azures_network_is_the_one_that_ray_would_make(tmp_path, monkeypatch):
    """Ray's own bootstrap with a client that writes down what it is asked, beside the page's names and its paragraph."""
    for name in ("common", "common.credentials", "core", "core.exceptions", "identity", "mgmt", "mgmt.resource"):
        monkeypatch.setitem(sys.modules, f"azure.{name}", MagicMock())
    monkeypatch.setitem(sys.modules, "azure", MagicMock())
    monkeypatch.setitem(sys.modules, "azure.mgmt.resource.resources.models", MagicMock())
    monkeypatch.delitem(sys.modules, "ray.autoscaler._private._azure.config", raising=False)
    azure = importlib.import_module("ray.autoscaler._private._azure.config")
    monkeypatch.delitem(sys.modules, "ray.autoscaler._private._azure.config")
    client = MagicMock()
    client.resources.list_by_resource_group.return_value = []
    monkeypatch.setattr(azure, "ResourceManagementClient", lambda credential, subscription: client)
    file = yaml.safe_load((ROOT / "cluster_configs/azure.yaml").read_text())
    file["provider"]["subscription_id"] = "0a1"  # as the page's own sed puts it there; without it Ray looks for a package of 2021
    azure._configure_resource_group(file)
    asked = client.deployments.create_or_update.call_args.kwargs
    assert asked["resource_group_name"] == "paris-ray"
    given = {name: one["value"] for name, one in asked["parameters"]["properties"]["parameters"].items()}
    assert given["createMsi"] is False
    page = bash(lines("azure", "ID=", "NET=") + '\necho "$ID $NET"', tmp_path).split()
    assert [given["clusterId"], given["subnet"]] == [f"paris-{page[0]}", page[1]]
    assert f"`{page[0]}` for `paris-ray`" in PAGES["azure"]
    assert f"its seed, {page[1].split('.')[1]}" in PAGES["azure"]
    template = asked["parameters"]["properties"]["template"]
    for kind in ("vnet", "subnet", "nsg"):
        assert template["variables"][f"{kind}Name"] == f"[concat('ray-', parameters('clusterId'), '-{kind}')]"
    assert re.search(r"vnet create --name ray-paris-\$ID-vnet .*--subnet-name ray-paris-\$ID-subnet", told("azure").replace("\\\n", " "))
    # The network is looked for by ID, in the group.
    assert page[0] in client.resources.list_by_resource_group.call_args.args[1]
    # The desk's interface lies in it: a group whose network has one cannot be deleted.
    assert "--nic-delete-option Delete" in told("azure")


@pytest.mark.parametrize("cloud", YOURS)
def test_a_clusters_file_is_made_as_the_page_says(cloud, tmp_path, capsys):
    """Its own `sed` and `printf`, then the renderer and the check: sound, and nothing of anybody's is left to fill in."""
    shutil.copytree(ROOT / "cluster_configs", tmp_path / "cluster_configs", ignore=shutil.ignore_patterns("__pycache__"))
    given = "\n".join(f"{name}={value}" for name, value in YOURS[cloud].items())
    bash(f"{given}\n{lines(cloud, 'sed ', 'printf ')}", tmp_path)
    [mine] = re.findall(rf"^python -m cluster_configs\.render (\w+\.yaml) --size demo > {cloud}\.yaml", told(cloud), re.M)
    assert render.main([str(tmp_path / mine), "--size", "demo"]) == 0
    made = tmp_path / f"{cloud}.yaml"
    made.write_text(capsys.readouterr().out)
    [run] = re.findall(r"^printf .* > (\w+\.yaml)", told(cloud), re.M)
    assert check.main([str(made), "--run", str(tmp_path / run)]) == 0
    assert capsys.readouterr().out == f"{made}: nothing found\n"
    text = yaml.safe_dump({key: value for key, value in yaml.safe_load(made.read_text()).items() if key != "file_mounts"})
    assert not re.search("us-west-2|us-central1|eastus", text)  # where the project's file is
    assert not re.search("europe-west4-[^b]", text)  # the zone's own sed, before the region's
    config = configs.load(str(tmp_path / run))
    assert config.run_dir.endswith("/first")
    assert config.name == "first"
    assert [mine, run] == [f"my_{cloud}.yaml", "run.yaml"]
    assert yaml.safe_load(made.read_text())["provider"].get("subscription_id") == YOURS[cloud].get("SUBSCRIPTION")


@pytest.mark.parametrize(("cloud", "component"), [("aws", "eks"), ("gcp", "gke"), ("azure", "aks")])
def test_an_overlay_is_made_as_the_page_says(cloud, component, tmp_path):
    shutil.copytree(ROOT / "cluster_configs/kuberay", tmp_path / "cluster_configs/kuberay")
    model = {"aws": "s3://theirs/first/model", "gcp": "gs://theirs/first/model", "azure": "abfs://runs@theirs.dfs.core.windows.net/first/model"}[
        cloud
    ]
    ids = "STAGES=11111111-2222-3333-4444-555555555555 SERVE=11111111-2222-3333-4444-666666666666"
    said = lines("kubernetes", "cp -r ", "sed -i ").replace("#s3://$BUCKET/$RUN/model#", f"#{model}#")
    said = said.replace("components/gke#", f"components/{component}#")  # as its comment says
    bash(f"REGISTRY=their.registry/x BUCKET=theirs RUN=first ACCOUNT=123456789012 PROJECT=theirs {ids}\n{said}", tmp_path)
    for pair in (("demo", "demo_serving"), ("paris_b2", "paris_serving"), ("paris_xl2", "paris_serving")):
        made = [one for name in pair for one in build(tmp_path / "my_kuberay/overlays" / name)]
        assert list(check_kubernetes.problems(made)) == []
        assert check_together.unfilled(made) == []
    accounts = {str(one["metadata"]["annotations"]) for one in made if one["kind"] == "ServiceAccount"}
    assert len(accounts) == 2
    theirs = {"eks": "123456789012", "gke": "@theirs.iam", "aks": "11111111-2222"}[component]
    assert all(theirs in one for one in accounts)
    assert any(model in one["spec"]["serveConfigV2"] for one in made if one["kind"] == "RayService")


def test_kubernetes_names_are_those_of_the_files():
    page = PAGES["kubernetes"]
    made = [one for part in ("base", "training", "serving") for one in build(ROOT / "cluster_configs/kuberay" / part)]
    called = {one["kind"]: one["metadata"]["name"] for one in made}
    cluster, service = called["RayCluster"], called["RayService"]
    # KubeRay's GenerateHeadServiceName and GenerateServeServiceName.
    assert set(re.findall(r"(?<!ray)service/([\w-]+)", page)) == {f"{cluster}-head-svc", f"{service}-serve-svc"}
    assert set(re.findall(r"rayservice[ /]([\w-]+)", page)) == {service}
    assert f"get secret {cluster} -o" in page
    pools = {
        group["template"]["spec"]["nodeSelector"]["paris-ray/pool"]
        for one in made
        if one["kind"] in check_together.CLUSTER_SPEC
        for group in (check_together.cluster_of(one)["headGroupSpec"], *check_together.cluster_of(one)["workerGroupSpecs"])
    }
    eks = page[page.index("cat > eks.yaml") : page.index("eksctl create")]
    for pool in pools:
        assert re.search(rf"\b{pool}\b", eks), pool
    assert set(re.findall(r"paris-ray/pool: ([\w-]+)", eks)) <= pools
    assert set(re.findall(r"^#? ?pool ([\w-]+) ", page, re.M)) <= pools
    accounts = {one["metadata"]["name"] for one in made if one["kind"] == "ServiceAccount"}
    for cloud in re.findall(r"for (?:role|who) in ([\w -]+);", page):
        assert set(cloud.split()) == accounts
    assert "--from-file=api_keys" in page
    keys = next(one for one in made if one["kind"] == "RayService")["spec"]["rayClusterConfig"]["headGroupSpec"]["template"]["spec"]
    assert {"name": "PARIS_API_KEYS_FILE", "value": "/etc/paris/api_keys"} in keys["containers"][0]["env"]
    assert "--version 1.7.0" in page


def test_what_the_eks_file_says_is_yaml_with_machines_that_pods_fit_on():
    page = PAGES["kubernetes"]
    text = page[page.index("apiVersion: eksctl") : page.index("\nEND\n")]
    groups = {one["name"]: one for one in yaml.safe_load(text)["managedNodeGroups"]}
    assert set(groups) == {"head", "cpu"}  # the demo's
    made = [one for name in ("demo", "demo_serving") for one in build(ROOT / "cluster_configs/kuberay/overlays" / name)]
    assert {one["kind"] for one in made} >= {"RayCluster", "RayService"}
    for one in made:
        if one["kind"] not in check_together.CLUSTER_SPEC:
            continue
        cluster = check_together.cluster_of(one)
        for spec in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
            pod = spec["template"]["spec"]
            group = groups[pod["nodeSelector"]["paris-ray/pool"]]
            machine = machines("aws")[group.get("instanceType") or group["instanceTypes"][0]]
            asked = pod["containers"][0]["resources"]["requests"]
            beside = 0.5 if spec is cluster["headGroupSpec"] else 0.0  # the autoscaler, in the head's pod
            assert float(asked["cpu"]) + beside + 0.5 <= machine.cpus  # and the system's own pods
            assert float(asked["memory"].removesuffix("Gi")) <= 0.85 * machine.memory
            assert float(asked["ephemeral-storage"].removesuffix("Gi")) * 2 <= group["volumeSize"]
            spot = [taint["key"] for taint in group.get("taints", [])]
            assert set(spot) <= {each["key"] for each in pod.get("tolerations", [])}


def test_quotas_and_machines_are_those_of_the_files():
    page, known = PAGES["aws"], machines("aws")
    assert set(re.findall(r"L-[0-9A-F]{8}", page)) <= set(AWS_QUOTAS)
    for name, count in re.findall(r"\(`(\w+\.\w+)`\)(?: takes)? (\d+) of", page):
        assert known[name].cpus == int(count), name
    demo = yaml.safe_load((ROOT / "cluster_configs/sizes.yaml").read_text())["demo"]
    assert f"{demo['cpu'] * 16} on spot" in page
    assert "64 for four machines of 16" in PAGES["gcp"]


def test_rays_commands_have_these_options():
    from ray.dashboard.modules.job.cli import submit
    from ray.scripts.scripts import cli

    commands = {**cli.commands, "job submit": submit}
    seen = set()
    for page in PAGES:
        for found in re.finditer(r"(?:^|[;&] |/bin/)ray (job submit|[\w-]+)((?:[^\n]*\\\n)*[^\n]*)", told(page), re.M):
            name, rest = found[1], re.split(r" -- | #|[;&|]", found[2])[0]
            options = {one for each in commands[name].params for one in (*each.opts, *each.secondary_opts)}
            used = {one for one in rest.split() if re.fullmatch(r"--?[a-z][\w-]*", one)}
            assert used <= options, (page, name, used - options)
            seen.add(name)
    assert {"up", "down", "dashboard", "job submit"} <= seen


@pytest.mark.parametrize(("cloud", "at_most"), [("aws", "MaxPrice"), ("azure", "maxPrice")])
def test_the_demos_price_an_hour_is_that_of_its_machines(cloud, at_most):
    """What idles and the highest bids of its spot machines; and idle it is what operations.md says, an hour and a day."""
    told = re.search(r"While it runs ([\d.]+) \$ an hour.*while nothing runs ([\d.]+) \$ an hour, (\d+) \$ a day", PAGES[cloud], re.S)
    running, idle, day = told.groups()
    bid = re.search(rf'{at_most}: "?([\d.]+)', (ROOT / f"cluster_configs/{cloud}.yaml").read_text())
    assert float(running) == pytest.approx(float(idle) + 4 * float(bid[1]))
    assert float(day) == pytest.approx(24 * float(idle), abs=0.5)
    assert re.search(rf"\| {idle} \$: head 0\.40.* \| {day} \$ \|", OPERATIONS)


def test_what_it_costs_is_what_the_plan_says():
    encoders = {"codec": {"channels": 4, "latent_size": 32}, "text": {"max_length": 77, "width": 768}}
    for preset in ("paris_b2", "paris_xl2"):
        config = configs.load(preset, ["evaluation.control_router=false"])
        asked = plan.trainings(config, [1_375_000] * 8, encoders)
        cells = []
        for device, price in (("A100", 1.6), ("H100", 3.0)):
            spot = {"hours_between_preemptions": 4, "preemption": "aws"}
            where = plan.Devices(name=device, device=device, count=9, memory_gib=80, storage_mb_per_s=300, price_per_hour=price, **spot)
            made = plan.make(asked, [where]).placement
            cells.append(f"{made.hours:.0f} hours, {made.cost:,.0f} $")
        assert f"| `{preset}` | {' | '.join(cells)} |" in OPERATIONS


@pytest.mark.skipif(shutil.which("kubectl") is None, reason="no kubectl")
def test_kubectls_commands_have_these_options():
    """Of those that say what they take without a cluster."""
    for name in ("create secret generic", "port-forward", "wait", "delete", "apply", "get", "logs"):
        said = subprocess.run(
            ["kubectl", *name.split(), "--help"], capture_output=True, text=True, check=True, env={**os.environ, "HOME": "/nonexistent"}
        ).stdout
        used = re.findall(rf"kubectl (?:-n paris )?{name} ([^\n|#]*)", told("kubernetes"))
        assert used, name
        for one in (each for line in used for each in line.split() if re.fullmatch(r"--[a-z-]+(=.*)?", each)):
            assert f"{one.partition('=')[0]}=" in said, (name, one)
