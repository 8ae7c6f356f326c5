"""What KubeRay's operator refuses: of each rule of its ``utils/validation.go`` (1.7) a manifest that breaks it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from kustomize import build
from mistakes import change

from cluster_configs import rayjobs
from cluster_configs.check_kubernetes import problems
from paris_ray import config as configs

KUBERAY = Path(__file__).parents[2] / "cluster_configs/kuberay"
C, S, SC = "RayCluster", "RayService", "spec rayClusterConfig"
L4, CONTAINER = "workerGroupSpecs 1", "template spec containers 0"


@pytest.fixture(scope="module")
def base() -> str:
    return json.dumps([one for part in ("base", "training", "serving") for one in build(KUBERAY / part)])


def env(name: str, value: str = "1") -> list[dict[str, str]]:
    return [{"name": name, "value": value}]


INCREMENTAL = {"type": "NewClusterWithIncrementalUpgrade"}
STEPS = {"stepSizePercent": 60, "intervalSeconds": 10, "gatewayClassName": "x", "maxSurgePercent": 50}
REDIS = {"redisAddress": "r:6379"}
MISTAKES = [
    (C, {f"spec {L4} rayStartParams num-cpus": "8"}, "rayStartParams has num-cpus beside resources"),
    (C, {f"spec {L4} rayStartParams resources": '{"a": 1}'}, "rayStartParams has resources beside resources"),
    (C, {"spec headGroupSpec rayStartParams memory": "1"}, "headGroupSpec: rayStartParams has memory"),
    (C, {f"spec {L4} rayStartParams labels": "a=b"}, "rayStartParams has labels"),
    (C, {f"spec {L4} labels market": "spot market"}, "labels.market is 'spot market'"),
    (C, {f"spec {L4} labels market": "x" * 64}, "at most 63 letters"),
    (C, {f"spec {L4} labels -market": "spot"}, "'-market' is no name of a label"),
    (C, {f"spec {L4} labels Ray.io/market": "spot"}, "'Ray.io/market' is no name of a label"),
    (C, {f"spec {L4} labels ray.io/": "spot"}, "'ray.io/' is no name of a label"),
    (C, {f"spec {L4} labels a/b/c": "spot"}, "'a/b/c' is no name of a label"),
    (C, {"spec autoscalerOptions version": None}, "l4: idleTimeoutSeconds is set without autoscalerOptions.version v2"),
    (C, {"spec autoscalerOptions version": None}, "l4-on-demand: priority is set without"),
    (C, {f"spec {L4} suspend": True}, "suspend is set in a cluster that scales"),
    (C, {f"spec headGroupSpec {CONTAINER} env": env("RAY_enable_autoscaler_v2")}, "beside autoscalerOptions.version"),
    (C, {"spec autoscalerOptions env": env("KUBERAY_GEN_AUTOSCALER_START_CMD")}, "which is KubeRay's own"),
    (C, {f"spec headGroupSpec {CONTAINER} env": env("RAY_REDIS_ADDRESS")}, "RAY_REDIS_ADDRESS is set without"),
    (C, {f"spec headGroupSpec {CONTAINER} env": env("REDIS_USERNAME")}, "Redis' user stands in"),
    (C, {"spec headGroupSpec rayStartParams redis-username": "x"}, "Redis' user stands in"),
    (C, {"spec gcsFaultToleranceOptions": REDIS, "metadata annotations": {"ray.io/ft-enabled": "true"}}, "say the same; keep the former"),
    (C, {"spec gcsFaultToleranceOptions": REDIS, "spec headGroupSpec rayStartParams redis-password": "x"}, "where Redis is stands in"),
    (C, {"spec gcsFaultToleranceOptions": REDIS, f"spec headGroupSpec {CONTAINER} env": env("REDIS_PASSWORD")}, "where Redis is stands in"),
    (C, {"spec authOptions enableK8sTokenAuth": True, "spec authOptions secretName": "x"}, "without a secretName alone"),
    (S, {f"{SC} authOptions enableK8sTokenAuth": True}, "is for RayClusters"),
    (S, {f"{SC} upgradeStrategy": {"type": "Recreate"}}, "must not be set in a RayService"),
    (S, {f"{SC} headGroupSpec headService": {"metadata": {"name": "x"}}}, "headService.metadata.name must not be set"),
    (S, {"spec upgradeStrategy": {**INCREMENTAL, "clusterUpgradeOptions": STEPS}}, "more than maxSurgePercent"),
    (
        S,
        {"spec upgradeStrategy": {**INCREMENTAL, "clusterUpgradeOptions": STEPS}, f"{SC} enableInTreeAutoscaling": False},
        "needs enableInTreeAutoscaling",
    ),
    (C, {f"spec {L4} template spec containers": []}, "l4: it has no container"),
]


@pytest.mark.parametrize(("kind", "changes", "said"), MISTAKES, ids=[f"{i}-{one[2][:24]}" for i, one in enumerate(MISTAKES)])
def test_what_the_operator_refuses_is_found(base, kind, changes, said):
    documents = json.loads(base)
    for path, value in changes.items():
        change(documents, kind, path, value)
    found = list(problems(documents))
    assert any(said in one for one in found), found


def test_what_the_operator_takes_is_not_found(base):
    documents = json.loads(base)
    change(documents, C, f"spec {L4} labels example.com/a_b.c-D", "")  # a label may be empty
    change(documents, C, "spec gcsFaultToleranceOptions", REDIS)
    change(documents, S, "spec upgradeStrategy", {**INCREMENTAL, "clusterUpgradeOptions": {**STEPS, "stepSizePercent": 50}})
    assert list(problems(documents)) == []


JOBS = [
    ("spec rayClusterSpec workerGroupSpecs 0 idleTimeoutSeconds", 900, "a100: idleTimeoutSeconds is set without"),
    ("spec rayClusterSpec workerGroupSpecs 0 idleTimeoutSeconds", 0, "a100: idleTimeoutSeconds is set without"),
    ("spec rayClusterSpec workerGroupSpecs 0 priority", -1, "a100: priority is set without"),
    (f"spec rayClusterSpec headGroupSpec {CONTAINER} env", env("RAY_enable_autoscaler_v2"), "a cluster that does not scale"),
    ("spec rayClusterSpec upgradeStrategy", {"type": "None"}, "must not be set in a RayJob"),
    ("spec runtimeEnvYAML", "pip: [", "is no YAML"),
    ("spec runtimeEnvYAML", "- pip", "is no YAML"),
    ("spec submitterConfig", {"backoffLimit": 1}, "SidecarMode goes with no"),
]


@pytest.mark.parametrize(("path", "value", "said"), JOBS, ids=[f"{i}-{one[2][:24]}" for i, one in enumerate(JOBS)])
def test_of_a_job_that_trains_too(path, value, said):
    """The first three are what rayjobs once left in the group that it takes from the cluster."""
    config = configs.load("paris_xl2", ["run_dir=s3://bucket/run"])
    made = json.loads(json.dumps(list(rayjobs.manifests(config, ["expert-3"], "r/p:1"))))
    made[-1]["spec"]["submissionMode"] = "SidecarMode"
    assert list(problems(made)) == []
    change(made, "RayJob", path, value)
    assert any(said in one for one in problems(made))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"spec suspend": True, "spec shutdownAfterJobFinishes": False}, "spec.suspend needs"),
        ({"spec rayClusterSpec": None, "spec clusterSelector": {"cluster": "paris"}}, "must name ray.io/cluster"),
        ({"spec rayClusterSpec": None, "spec clusterSelector": {"ray.io/cluster": "paris"}, "spec backoffLimit": 1}, "goes with neither"),
        ({"spec submissionMode": "InteractiveMode", "spec backoffLimit": 1}, "goes with neither"),
    ],
)
def test_of_a_job_that_is_submitted_otherwise(changes, said):
    config = configs.load("paris_xl2", ["run_dir=s3://bucket/run"])
    made = json.loads(json.dumps(list(rayjobs.manifests(config, ["expert-3"], "r/p:1"))))
    for path, value in changes.items():
        change(made, "RayJob", path, value)
    assert any(said in one for one in problems(made))


def test_a_group_that_serves_by_priority_loses_it_in_a_job():
    asked = {"gpus": 1, "labels": {"market": "on-demand"}}
    tree = configs.load("paris_b2").model_dump(mode="json", exclude={"experts"})
    config = configs.build({**tree, "run_dir": "s3://bucket/run", "experts": [{}, {"resources": asked}]})
    [*_, job] = rayjobs.manifests(config, ["expert-1"], "r/p:1")
    [group] = job["spec"]["rayClusterSpec"]["workerGroupSpecs"]
    assert group["groupName"] == "l4-on-demand"
    assert not {"idleTimeoutSeconds", "priority"} & set(group)


def test_the_head_of_one_training_is_small_and_that_of_other_stages_is_not():
    config = configs.load("paris_xl2", ["run_dir=s3://bucket/run"])
    made = [one for one in rayjobs.manifests(config, ["embed", "expert-0", "router"], "r/p:1") if one["kind"] == "RayJob"]
    heads = [one["spec"]["rayClusterSpec"]["headGroupSpec"]["template"]["spec"] for one in made]
    asked = [(one["containers"][0]["resources"]["requests"]["cpu"], one["containers"][0]["resources"]["requests"]["memory"]) for one in heads]
    assert asked == [("6", "32Gi"), ("2", "8Gi"), ("2", "8Gi")]
    for head in heads:  # what may be spilled is no more than the pod may have
        assert head["volumes"][0]["emptyDir"]["sizeLimit"] == head["containers"][0]["resources"]["limits"]["ephemeral-storage"]
    accounts = {"apiVersion": "v1", "kind": "ServiceAccount", "metadata": {"name": "paris-stages"}}
    heads[0]["containers"][0]["resources"]["requests"]["memory"] = "8Gi"
    assert [one for one in problems([made[0], accounts]) if "needs 32Gi" in one]
    heads[1]["containers"][0]["resources"]["requests"]["memory"] = "4Gi"
    assert [one for one in problems([made[1], accounts]) if "needs 8Gi" in one]
