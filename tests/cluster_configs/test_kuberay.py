"""The manifests for Kubernetes: each overlay passes all checks, and of each check there is one that is wrong in one thing and caught."""

from __future__ import annotations

import copy
import json
import re
import shutil
import subprocess
from pathlib import Path

import kustomize
import pytest
import yaml
from kustomize import build
from mistakes import change

from cluster_configs import check_kubernetes, check_together, rayjobs
from cluster_configs.check_kubernetes import problems
from jobs.attempt import module
from paris_ray import config as configs
from paris_ray import stages
from paris_ray.config import ConfigError

ROOT = Path(__file__).parents[2]
KUBERAY = ROOT / "cluster_configs/kuberay"
PARTS = ("base", "training", "serving")
TRAIN = ("overlays/demo", "overlays/paris_b2", "overlays/paris_xl2")
SERVE = ("overlays/demo_serving", "overlays/paris_serving", "overlays/paris_serving")
"""What is applied later, beside each."""


def parts() -> list[dict]:
    """All that there is, as the overlays take it."""
    return [one for part in PARTS for one in build(KUBERAY / part)]


@pytest.fixture(scope="module")
def base() -> str:
    return json.dumps(parts())


@pytest.mark.parametrize(("train", "later"), zip(TRAIN, SERVE, strict=True))
def test_each_overlay_passes_and_serving_beside_it(train, later):
    assert list(problems(parts())) == []
    assert list(problems(build(KUBERAY / train))) == []
    assert list(problems([*build(KUBERAY / train), *build(KUBERAY / later)])) == []


@pytest.mark.parametrize("train", TRAIN)
def test_training_starts_a_head_alone_and_serves_nothing(train):
    [one] = [one for one in build(KUBERAY / train) if one["kind"] in check_together.CLUSTER_SPEC]
    assert one["kind"] == "RayCluster"
    assert {(group["replicas"], group["minReplicas"]) for group in one["spec"]["workerGroupSpecs"]} == {(0, 0)}


@pytest.mark.parametrize("overlay", sorted(set(SERVE)))
def test_serving_ends_by_itself(overlay):
    """`kubectl delete -k` ends what is in it: nothing that a training needs."""
    kinds = {(one["kind"], one["metadata"]["name"]) for one in build(KUBERAY / overlay)}
    assert kinds == {("NetworkPolicy", "clients-to-serve"), ("PodDisruptionBudget", "serving"), ("RayService", "paris-serve")}


def test_the_smaller_size_has_fewer_machines():
    [small], [large] = ([one for one in build(KUBERAY / f"overlays/{name}") if one["kind"] == "RayCluster"] for name in ("paris_b2", "paris_xl2"))
    most = [{group["groupName"]: group["maxReplicas"] for group in one["spec"]["workerGroupSpecs"]} for one in (small, large)]
    assert most == [{"cpu": 4, "l4": 16, "a100": 8, "l4-on-demand": 2}, {"cpu": 8, "l4": 16, "a100": 8, "h100": 8, "l4-on-demand": 2}]


def overlay_of(cloud: str, folder: Path) -> Path:
    """The larger overlay with the component of a cloud."""
    shutil.copytree(KUBERAY, folder / "kuberay")
    plan = folder / "kuberay/overlays/paris_xl2/kustomization.yaml"
    assert "components/eks" in plan.read_text()
    plan.write_text(plan.read_text().replace("components/eks", f"components/{cloud}"))
    return plan.parent


CLOUDS = ("eks", "gke", "aks")


@pytest.mark.parametrize("cloud", CLOUDS)
def test_each_clouds_component_passes(cloud, tmp_path):
    made = build(overlay_of(cloud, tmp_path))
    assert list(problems(made)) == []
    assert {one["metadata"].get("namespace") for one in made if one["kind"] != "Namespace"} == {"paris"}
    accounts = [one["metadata"] for one in made if one["kind"] == "ServiceAccount"]
    assert len(accounts) == 2
    assert all(one["annotations"] for one in accounts)  # tied to a role of the cloud


def test_a_namespace_that_a_component_does_not_have_is_missed(tmp_path):
    plan = overlay_of("gke", tmp_path) / "kustomization.yaml"
    plan.write_text(plan.read_text().replace("namespace: paris\n", ""))
    [said] = problems(build(plan.parent))
    assert said.startswith("NetworkPolicy/workload-identity: namespace none, and the others are in paris")


@pytest.mark.parametrize("which", [*PARTS, *TRAIN, *sorted(set(SERVE)), *CLOUDS])
@pytest.mark.skipif(shutil.which("kubectl") is None, reason="no kubectl")
def test_kustomize_makes_the_same(which, tmp_path):
    folder = overlay_of(which, tmp_path) if which in CLOUDS else KUBERAY / which
    made = subprocess.run(["kubectl", "kustomize", str(folder)], capture_output=True, text=True, check=True).stdout
    theirs = {(one["kind"], one["metadata"]["name"]): one for one in yaml.safe_load_all(made)}
    ours = {(one["kind"], one["metadata"]["name"]): one for one in build(folder)}
    assert ours == theirs


def test_every_file_says_what_was_run_and_what_was_not():
    for file in ("training/cluster.yaml", "serving/service.yaml", *(f"{overlay}/kustomization.yaml" for overlay in (*TRAIN, *SERVE))):
        head = "".join(line for line in (KUBERAY / file).open() if line.startswith("#"))
        assert re.search("[Nn]ever applied", head), file
    assert "Never built here" in (ROOT / "cluster_configs/Containerfile").read_text()


def test_unlike_groups_scale_from_nothing(base):
    cluster = next(one for one in json.loads(base) if one["kind"] == "RayCluster")
    groups = [one for one in cluster["spec"]["workerGroupSpecs"] if "ray.io/accelerator-type" in one["labels"]]
    assert len({one["labels"]["ray.io/accelerator-type"] for one in groups}) >= 3
    assert all(one["minReplicas"] == 0 for one in cluster["spec"]["workerGroupSpecs"])


@pytest.mark.parametrize("preset", ["demo", "paris_b2", "paris_xl2"])
def test_groups_have_what_a_preset_asks_for(preset):
    config = configs.load(preset, ["run_dir=s3://bucket/run"])
    made = list(rayjobs.manifests(config, stages.names(config), "r/p:1"))
    for one in made:  # as `kubectl apply -n paris` does
        one["metadata"]["namespace"] = "paris"
    assert list(problems([*made, *parts()])) == []
    jobs = {one["metadata"]["labels"]["paris-ray/stage"]: one for one in made if one["kind"] == "RayJob"}
    assert list(jobs) == stages.names(config)
    for stage, job in jobs.items():
        assert job["spec"]["entrypoint"] == " ".join(["python", "-m", *module(stage), "--config", "/etc/paris-run/run.yaml"])
        pods = [job["spec"]["rayClusterSpec"]["headGroupSpec"], *job["spec"]["rayClusterSpec"]["workerGroupSpecs"]]
        own = f"paris-{stage}" if stage.startswith("expert-") else "paris-stages"
        assert {one["template"]["spec"]["serviceAccountName"] for one in pods} == {own}
        if stages.trains(stage):
            # KubeRay gives the head of a cluster that scales the right to change all pods of the namespace, and so to be any account.
            assert job["spec"]["rayClusterSpec"]["enableInTreeAutoscaling"] is False
            assert all(one["template"]["spec"]["automountServiceAccountToken"] is False for one in pods)
            assert len(pods) == 2
            # What only an autoscaler heeds, which the operator refuses without one.
            assert not {"idleTimeoutSeconds", "priority"} & set(pods[1])
        assert job["spec"]["backoffLimit"] == 0
    [stored] = [one for one in made if one["kind"] == "ConfigMap"]
    assert configs.build(yaml.safe_load(stored["data"]["run.yaml"])) == config


def test_a_training_has_the_first_group_that_fits_and_all_its_workers():
    asked = {"gpus": 1, "cpus": 8, "labels": {"gpu_memory": "80", "market": "spot"}, "num_workers": 2}
    tree = configs.load("paris_xl2").model_dump(mode="json", exclude={"experts"})
    config = configs.build({**tree, "run_dir": "s3://bucket/run", "experts": [{}, {"resources": asked}]})
    job = list(rayjobs.manifests(config, ["expert-1"], image="r/p:1", annotation="a.b/role=arn:x/{stage}"))
    groups = job[-1]["spec"]["rayClusterSpec"]["workerGroupSpecs"]
    assert [(one["groupName"], one["minReplicas"], one["replicas"], one["maxReplicas"]) for one in groups] == [("a100", 2, 2, 2)]
    assert all(one["template"]["spec"]["containers"][0]["image"] == "r/p:1" for one in groups)
    assert job[1]["metadata"]["annotations"] == {"a.b/role": "arn:x/expert-1"}
    # That L4s are too small for it is counted, where it does not say so: 24 GB of some 43.
    bare = configs.build(
        {**tree, "run_dir": "s3://bucket/run", "experts": [{}, {"resources": {**asked, "num_workers": 1, "labels": {"gpu_memory": "!16"}}}]}
    )
    job = list(rayjobs.manifests(bare, ["expert-1"], image="r/p:1"))
    assert [one["groupName"] for one in job[-1]["spec"]["rayClusterSpec"]["workerGroupSpecs"]] == ["a100"]
    small = configs.build({**tree, "run_dir": "s3://bucket/run", "experts": [{}, {"resources": {"labels": {"gpu_memory": "24"}}}]})
    with pytest.raises(ConfigError, match=r"no node type that it asks for has one \(l4 24 GB, l4-on-demand 24 GB\)"):
        list(rayjobs.manifests(small, ["expert-1"], "r/p:1"))
    none = configs.build({**tree, "run_dir": "s3://bucket/run", "experts": [{}, {"resources": {"gpus": 1, "accelerator_type": "TPU"}}]})
    with pytest.raises(ConfigError, match=r"TPU, label gpu_memory not in\(16, 24, 32, 40\), which no group"):
        list(rayjobs.manifests(none, ["expert-1"], "r/p:1"))


@pytest.mark.parametrize(
    ("sets", "options", "said"),
    [
        (["run_dir=runs/x"], {}, "run_dir is"),
        (["name=1st"], {}, "name is '1st'"),
        ([f"name={'a' * 40}"], {}, "at most 32"),
        (["expert.resources.preemption=aws"], {}, "whose notice no pod sees"),
        (["expert.resources.fallback={labels: {market: on-demand}}"], {}, "a second kind of machine"),
        (["expert.resources.num_workers=32", "expert.train.micro_batch=8"], {}, "takes 32 pods of a100, whose maxReplicas is 8"),
        ([], {"image": "paris-ray:0.1.0"}, "names no registry"),
        ([], {"annotation": "a.b/role"}, "is not KEY=VALUE"),
        ([], {"annotation": "a.b/role={expert}"}, "no other braces"),
    ],
)
def test_what_a_job_could_not_do_is_refused(sets, options, said):
    config = configs.load("paris_xl2", ["run_dir=s3://bucket/run", *sets])
    with pytest.raises(ConfigError, match=said):
        list(rayjobs.manifests(config, ["expert-1"], **{"image": "r/p:1", **options}))


def test_jobs_are_printed_for_kubectl(capsys):
    assert rayjobs.main(["--config", "paris_xl2", "--set", "run_dir=s3://bucket/run", "--image", "r/p:1", "--stages", "expert-3", "router"]) == 0
    told = capsys.readouterr()
    text = told.out
    assert "without --annotation" in told.err
    made = list(yaml.safe_load_all(text))
    assert [one["kind"] for one in made] == ["ConfigMap", "ServiceAccount", "RayJob", "RayJob"]
    assert "&id" not in text
    assert rayjobs.main(["--config", "paris_xl2", "--set", "run_dir=s3://bucket/run", "--image", "r/p:1", "--stages", "expert-8"]) == 2
    assert "Did you mean 'expert-7'" in capsys.readouterr().err


# -- mistakes -----------------------------------------------------------------------------------------------------------

HEAD = "headGroupSpec"
POD = "template spec"
FIRST = "workerGroupSpecs 0"
L4 = "workerGroupSpecs 1"


C, S = "RayCluster", "RayService"
SC = "spec rayClusterConfig"
MISTAKES = [
    (C, f"spec {FIRST} maxReplica", 3, "Did you mean 'maxReplicas'"),
    (C, f"spec {FIRST} minReplicas", "0", "is not of type 'integer'"),
    (C, f"spec {FIRST} groupname", "x", "Did you mean 'groupName'"),
    (C, f"spec {FIRST} rayStartParams", {"num-cpus": 0}, "is not of type 'string'"),
    (C, "spec authOptions mode", "tokens", "Did you mean 'token'"),
    (C, "spec authOptions", None, "authOptions.mode is not token"),
    (C, "spec rayVersion", "2.46.0", "the pinned Ray is"),
    (C, "spec autoscalerOptions version", "v1", "the first autoscaler knows no labels"),
    (C, "spec enableInTreeAutoscaling", None, "enableInTreeAutoscaling (autoscalerOptions.version v2) is needed"),
    (C, "metadata name", "paris-serve", "would share the service paris-serve-head-svc"),
    (C, f"spec {HEAD} resources CPU", "4", 'must be "0"'),
    (C, f"spec {HEAD} labels market", "spot", "the head may be on a spot machine"),
    (C, f"spec {HEAD} {POD} tolerations", [{"key": "paris-ray/spot", "operator": "Exists"}], "the head may be on a spot machine"),
    (C, f"spec {HEAD} {POD} containers 0 resources requests memory", "16Gi", "needs 32Gi"),
    (C, f"spec {HEAD} serviceType", "LoadBalancer", "reached from outside"),
    (C, f"spec {HEAD} {POD} containers 0 resource", {}, "resource"),
    (C, f"spec {L4} {POD} containers 0 lifecycle preStop exec comand", ["x"], "comand"),
    (C, f"spec {L4} {POD} terminationGracePeriodSeconds", 60, "terminationGracePeriodSeconds must be 20 more"),
    (C, f"spec {L4} {POD} containers 0 lifecycle", None, "no preStop drains"),
    (C, f"spec {L4} {POD} containers 0 resources limits nvidia.com/gpu", "0", "these go together"),
    (C, f"spec {L4} labels ray.io/accelerator-type", "T4", "these go together"),
    (C, f"spec {L4} resources CPU", "7.5", "must be a whole number"),
    (C, f"spec {L4} minReplicas", 17, "does not hold"),
    (C, f"spec {L4} groupName", "cpu", "two groups have one name"),
    (C, f"spec {L4} {POD} restartPolicy", "Always", "must be Never"),
    (C, f"spec {L4} {POD} serviceAccountName", "default", "and these files have paris-serve, paris-stages"),
    (C, f"spec {L4} {POD} containers 0 image", "paris-ray:latest", "has no version"),
    (C, f"spec {L4} {POD} containers 0 volumeMounts 0 name", "spil", "which is no volume"),
    (C, f"spec {L4} {POD} securityContext runAsNonRoot", False, "runAsNonRoot"),
    (C, f"spec {L4} {POD} nodeSelector", None, "no nodeSelector"),
    (C, "metadata name", "Paris_Ray", "metadata.name"),
    (C, "apiVersion", "ray.io/v1alpha1", "must be ray.io/v1"),
    (S, "spec upgradeStrategy type", "RollingUpdate", "none of the"),
    (S, "spec upgradeStrategy type", "NewClusterWithIncrementalUpgrade", "go together"),
    (S, f"{SC} authOptions mode", "disabled", "authOptions.mode is not token"),
    (S, "spec serveConfigV2", "applications: [{import_path: 'serve_app.app:biuld'}]", "nothing that can be imported"),
    ("NetworkPolicy", "spec podSelector", {"matchLabels": {"a": "b"}}, "no NetworkPolicy forbids"),
    ("NetworkPolicy", "spec ingress", [{"ports": [{"port": 8265}]}], "lets the world in"),
    ("NetworkPolicy", "spec ingress", [{"from": [{"ipBlock": {"cidr": "0.0.0.0/0"}}]}], "lets the world in"),
    ("NetworkPolicy", "spec policyType", ["Ingress"], "policyType"),
    (S, f"{SC} {HEAD} {POD} containers 0 resources requests memory", "4Gi", "needs 8Gi"),
    (S, f"{SC} {FIRST} template metadata labels", {}, "PodDisruptionBudget/serving: {'matchLabels': {'paris-ray/role': 'serve'"),
    (S, f"{SC} {FIRST} minReplicas", 2, "minAvailable is 2, and there may be 2 pods"),
    ("PodDisruptionBudget", "spec minAvailable", 1, "no PodDisruptionBudget keeps the heads"),
    ("PodDisruptionBudget", "spec minAvailable", None, "it needs minAvailable, a whole number"),
    ("PodDisruptionBudget", "spec minAvailable", "50%", "it needs minAvailable, a whole number"),
    ("PodDisruptionBudget", "spec selector", {"matchLabels": {"ray.io/node-type": "heads"}}, "guards nothing"),
    ("PodDisruptionBudget", "apiVersion", "policy/v1beta1", "knows no"),
    ("ServiceAccount", "metadata name", "paris-stage", "serviceAccountName is paris-stages"),
]


@pytest.mark.parametrize(("kind", "path", "value", "said"), MISTAKES, ids=[f"{i}-{one[0]}-{one[3][:24]}" for i, one in enumerate(MISTAKES)])
def test_a_mistake_is_caught(base, kind, path, value, said):
    documents = json.loads(base)
    change(documents, kind, path, value)
    found = list(problems(documents))
    assert any(said in one for one in found), found


# Of each policy in the base and of each pod that it lets in or out: a label that no pod has.
SELECTORS = [
    ("ray-nodes", "spec podSelector"),
    ("ray-nodes", "spec ingress 0 from 0 podSelector"),
    ("head-to-kubernetes", "spec podSelector"),
    ("jobs-to-head", "spec ingress 0 from 1 podSelector"),
    ("submitters", "spec podSelector"),
    ("submitters", "spec egress 0 to 0 podSelector"),
    ("clients-to-serve", "spec podSelector"),
    ("metrics", "spec podSelector"),
]


@pytest.mark.parametrize("value", [{"ray.io/originated-from-crd": "RayService"}, {"ray.io/node-type": "Head"}])
@pytest.mark.parametrize(("name", "path"), SELECTORS)
def test_a_policy_that_selects_no_pod_is_caught(base, name, path, value):
    documents = json.loads(base)
    [policy] = [one for one in documents if one["kind"] == "NetworkPolicy" and one["metadata"]["name"] == name]
    change([policy], "NetworkPolicy", path, {"matchLabels": value})
    [said] = problems(documents)
    assert said.startswith(f"NetworkPolicy/{name}: ")
    assert "selects no pod" in said


def test_one_kuberay_is_named_everywhere():
    """The first that has what is used here: a group's priority, and the label of the pods that submit jobs."""
    text = "".join(
        file.read_text()
        for file in (ROOT / "cluster_configs").rglob("*")
        if file.suffix in (".yaml", ".md", ".py") and "__pycache__" not in file.parts
    )
    named = re.findall(r"(?:KubeRay|KubeRay\]\([^)]*\)|operator) (\d+\.\d+)", text)
    assert len(named) >= 4
    assert set(named) == {"1.7"}


def test_what_is_yours_to_fill_in_is_said(capsys, tmp_path):
    for train, later in zip(TRAIN, SERVE, strict=True):
        assert check_together.unfilled(build(KUBERAY / train)) == ["000000000000", "registry.example"]
        assert check_together.unfilled(build(KUBERAY / later)) == ["registry.example", "s3://bucket"]
    left = check_together.unfilled(parts())
    assert [one for one in left if one.startswith(("image", "the annotation"))] == [
        "image paris-ray:0.1.0 (no registry)",
        "the annotation of ServiceAccount paris-serve, without which the store knows its pods by no role",
        "the annotation of ServiceAccount paris-stages, without which the store knows its pods by no role",
    ]


def test_what_else_must_not_be_in_a_manifest(base):
    documents = json.loads(base)
    secret = {"apiVersion": "v1", "kind": "Secret", "metadata": {"name": "k", "namespace": "paris"}, "stringData": {"api_keys": "x"}}
    named = {"name": "s", "namespace": "paris"}
    service = {"apiVersion": "v1", "kind": "Service", "metadata": named, "spec": {"type": "LoadBalancer", "ports": [{"port": 8000}]}}
    found = list(problems([*documents, secret, service, copy.deepcopy(documents[0])]))
    assert [one.partition(":")[0] for one in found] == ["Secret/k", "Service/s", "Namespace/paris is there twice"]


def test_a_job_of_no_module_and_one_that_stays_are_caught():
    config = configs.load("demo", ["run_dir=s3://bucket/run"])
    job = list(rayjobs.manifests(config, ["expert-0"], "r/p:1"))
    for key, value, said in [
        ("entrypoint", "python -m jobs.train_experts --expert 0", "runs no module"),
        ("shutdownAfterJobFinishes", False, "would stay, and cost"),
        ("backoffLimit", 3, "would start again"),
        ("submissionMode", "K8sJob", "Did you mean 'K8sJobMode'"),
    ]:
        wrong = json.loads(json.dumps(job))
        wrong[-1]["spec"][key] = value
        assert any(said in one for one in problems(wrong))


def test_the_command_reads_files_and_says_what_it_finds(capsys, tmp_path):
    files = [str(one) for part in PARTS for one in sorted((KUBERAY / part).glob("*.yaml"))]  # those of kustomize's own, too
    assert any(one.endswith("kustomization.yaml") for one in files)
    assert check_kubernetes.main([*files, "--template"]) == 0
    assert capsys.readouterr().out.startswith(
        "15 objects, nothing found, once your own stands for image paris-ray:0.1.0 (no registry), s3://bucket, "
    )
    assert check_kubernetes.main(files) == 1
    assert [one for one in capsys.readouterr().out.splitlines() if "s3://" in one] == [
        f"{KUBERAY}/serving/service.yaml:37: still to be filled in: s3://bucket/run/model"
    ]
    assert check_kubernetes.main(["--template", *files, files[0]]) == 1
    assert check_kubernetes.main([str(tmp_path / "none.yaml")]) == 2
    assert check_kubernetes.main([str(tmp_path)]) == 2
    assert f"{tmp_path} has no kustomization.yaml" in capsys.readouterr().err


def test_a_job_alone_lacks_the_account_that_it_names(tmp_path, capsys):
    made = list(rayjobs.manifests(configs.load("demo", ["run_dir=s3://theirs/run"]), ["router"], "r/p:1"))
    (tmp_path / "jobs.yaml").write_text(yaml.safe_dump_all(made))
    assert check_kubernetes.main([str(tmp_path / "jobs.yaml")]) == 1
    assert "serviceAccountName is paris-stages, and these files have none; name one of them, or also the file" in capsys.readouterr().out
    assert check_kubernetes.main(["--template", str(tmp_path / "jobs.yaml"), str(KUBERAY / "base/accounts.yaml")]) == 0


def test_an_overlay_is_built_and_each_line_to_edit_is_named(tmp_path, capsys, monkeypatch):
    """Those that another file is laid over are not: the base's model, where the demo's stands."""
    monkeypatch.setattr(check_kubernetes, "_built", lambda folder: yaml.safe_dump_all(kustomize.build(folder)))
    shutil.copytree(KUBERAY, tmp_path / "my_kuberay")
    monkeypatch.chdir(tmp_path)
    overlays = ["my_kuberay/overlays/demo", "my_kuberay/overlays/demo_serving"]
    assert check_kubernetes.main([*overlays, "--template"]) == 0
    capsys.readouterr()
    assert check_kubernetes.main(overlays) == 1
    told = capsys.readouterr().out.splitlines()
    found = [re.fullmatch(r"([^:]+):(\d+): still to be filled in: (\S+)", one).groups() for one in told]
    assert sorted({file for file, _, _ in found}) == [
        "my_kuberay/components/eks/kustomization.yaml",
        "my_kuberay/overlays/demo/kustomization.yaml",
        "my_kuberay/overlays/demo_serving/kustomization.yaml",
        "my_kuberay/overlays/demo_serving/serving.yaml",
    ]
    for file, number, word in found:
        path = tmp_path / file
        lines = path.read_text().splitlines()
        assert word in lines[int(number) - 1]
        path.write_text(
            "\n".join(
                [
                    *lines[: int(number) - 1],
                    lines[int(number) - 1]
                    .replace("000000000000", "123456789012")
                    .replace("registry.example", "their.registry")
                    .replace("s3://bucket", "s3://theirs"),
                    *lines[int(number) :],
                ]
            )
        )
    assert check_kubernetes.main(overlays) == 0
    assert capsys.readouterr().out == "15 objects, nothing found\n"


@pytest.mark.skipif(shutil.which("kubectl") is None, reason="no kubectl")
def test_kubectl_builds_a_folder(tmp_path, capsys, monkeypatch):
    assert check_kubernetes.main([str(KUBERAY / "overlays/paris_b2"), str(KUBERAY / "overlays/paris_serving"), "--template"]) == 0
    assert capsys.readouterr().out.startswith("15 objects, nothing found, once")
    (tmp_path / "kustomization.yaml").write_text("resources: [none.yaml]\n")
    assert check_kubernetes.main([str(tmp_path)]) == 2
    assert "kubectl kustomize says" in capsys.readouterr().err
    monkeypatch.setenv("PATH", str(tmp_path))
    assert check_kubernetes.main([str(tmp_path)]) == 2
    assert "is built by kubectl, which is not here" in capsys.readouterr().err


# -- the image ----------------------------------------------------------------------------------------------------------


def test_the_image_copies_what_is_there_and_installs_the_pins():
    text = (ROOT / "cluster_configs/Containerfile").read_text()
    for line in re.findall(r"(?m)^COPY (.*)$", text):
        *sources, _ = line.split()
        assert all((ROOT / source).exists() for source in sources), line
    assert "-c constraints.txt" in text
    assert re.search(r"(?m)^USER 1000$", text)
    assert "wget" in text  # KubeRay's probes
    assert not re.search(r"https?://", text)
