"""A run and the file of a cluster together: whether its machines have what the experts ask for, and need, and what would cost more than it need."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest

from cluster_configs import check, check_run, render
from cluster_configs.demand import Demand, fits, selects, trainings
from paris_ray import config as configs

ROOT = Path(__file__).parents[2]
CLOUDS = ("aws", "gcp", "azure")


def load(name: str) -> dict[str, Any]:
    return copy.deepcopy(check.read(ROOT / "cluster_configs" / f"{name}.yaml"))


def run(**changes: Any) -> configs.RunConfig:
    """The demo, of whose experts the third asks for something else."""
    tree = configs.load("demo").model_dump(mode="json", exclude={"experts"})
    return configs.build({**tree, "experts": [{}, {}, {"resources": changes}]})


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ({"gpus": 1, "accelerator_type": "L4"}, None),
        ({"gpus": 1, "accelerator_type": "L40S"}, "L40S, which no node type has"),
        ({"gpus": 1, "labels": {"gpu_memory": "80"}}, None),
        ({"gpus": 1, "labels": {"gpu_memory": "81"}}, "label gpu_memory=81"),
        ({"gpus": 1, "labels": {"market": "!spot"}}, None),
        ({"gpus": 1, "labels": {"ray.io/accelerator-type": "in(L4, A100)"}}, None),
        ({"gpus": 1, "labels": {"ray.io/accelerator-type": "!in(L4, A10G, A100, H100)"}}, "which no node type has"),
        ({"cpus": 97}, "97 CPU"),
        ({"gpus": 2, "labels": {"gpu_memory": "24"}}, "2 GPU"),
        ({"gpus": 1, "custom": {"disk": 1}}, "1 disk"),
        ({"gpus": 1, "accelerator_type": "L4", "labels": {"market": "on-demand"}, "num_workers": 3}, "l4_on_demand.max_workers is 2"),
        ({"gpus": 1, "fallback": {"labels": {"market": "reserved"}}}, "experts.2.resources.fallback"),
    ],
)
def test_what_an_expert_asks_for_is_there_or_said(asked, said):
    batch = {"num_workers": 3} if "num_workers" in asked else {}
    tree = (
        run(**asked)
        if not batch
        else configs.build(
            {
                **configs.load("demo").model_dump(mode="json", exclude={"experts"}),
                "experts": [{}, {}, {"resources": asked, "train": {"batch_size": 12}}],
            }
        )
    )
    found = list(check_run.unmet_demands(load("aws"), tree))
    assert found == [] if said is None else len(found) == 1 and said in found[0], found


def test_selectors_are_those_of_ray():
    from ray._private.label_utils import validate_label_selector_value

    for selector, takes, refuses in [
        ("a", ["a"], ["b", None]),
        ("!a", ["b", None], ["a"]),
        ("in(a, b)", ["a", "b"], ["c", None]),
        ("!in(a,b)", ["c", None], ["a", "b"]),
    ]:
        assert validate_label_selector_value(selector) is None
        assert all(selects(selector, one) for one in takes)
        assert not any(selects(selector, one) for one in refuses)


def test_only_the_experts_of_a_cluster_are_asked_for():
    tree = configs.load("demo").model_dump(mode="json", exclude={"experts"})
    clusters = {"eu": {"address": "https://ray.eu.example"}}
    made = configs.build({**tree, "clusters": clusters, "experts": [{}, {"cluster": "eu", "resources": {"gpus": 9}}]})
    assert list(check_run.unmet_demands(load("aws"), made)) == []
    assert "experts.1.resources" in next(iter(check_run.unmet_demands(load("aws"), made, "eu")))


@pytest.mark.parametrize(
    ("has", "asks", "count"),
    [
        ({"CPU": 1}, {"CPU": 0.1}, 10),  # 1 // 0.1 is 9
        ({"CPU": 3}, {"CPU": 0.3}, 10),
        ({"CPU": 8, "GPU": 8}, {"CPU": 1, "GPU": 0.5}, 8),
        ({"CPU": 96, "GPU": 8}, {"CPU": 1, "GPU": 0.6}, 8),  # no part of one on two of them
        ({"CPU": 96, "GPU": 8}, {"CPU": 1, "GPU": 0.3}, 24),
        ({"CPU": 8, "GPU": 1}, {"CPU": 1, "GPU": 2}, 0),
        ({"CPU": 1, "accelerator_type:L4": 1}, {"CPU": 0.2, "accelerator_type:L4": 0.001}, 5),
    ],
)
def test_parts_of_a_resource_are_counted_as_ray_counts(has, asks, count):
    assert fits(Demand("x", asks), {"resources": has}) == count


@pytest.mark.parametrize("size", ["paris_b2", "paris_xl2"])
@pytest.mark.parametrize("name", CLOUDS)
def test_all_experts_of_the_paper_have_a_gpu_on_spot_at_once(name, size):
    types = check_run.workers(render.sized(load(name), size))
    spot = [one for one in types.values() if one["labels"]["market"] == "spot"]
    expert = next(trainings(configs.load(size)))
    assert expert.resources["GPU"] == 1
    assert sum(fits(expert, one) * one["max_workers"] for one in spot) >= 8


@pytest.mark.parametrize(("name", "scheme"), [("aws", "s3://theirs"), ("gcp", "gs://theirs"), ("azure", "abfs://runs@theirs.dfs.core.windows.net")])
def test_the_run_that_is_shipped_goes_with_each_clouds_file(name, scheme, tmp_path, capsys):
    text = (ROOT / "cluster_configs/run.yaml").read_text()
    (tmp_path / "run.yaml").write_text(text.replace("s3://bucket", scheme).replace("preemption: aws", f"preemption: {name}"))
    assert check.main([str(ROOT / f"cluster_configs/{name}.yaml"), "--run", str(tmp_path / "run.yaml"), "--template"]) == 0
    assert "warning" not in capsys.readouterr().out
    assert check.main([str(ROOT / "cluster_configs/aws.yaml"), "--run", str(ROOT / "cluster_configs/run.yaml")]) == 1
    assert "cluster_configs/run.yaml:11: still to be filled in: s3://bucket/pictures" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("name", "sets", "said"),
    [
        ("aws", [], None),  # 43 GiB of 0.9 of one: the preset asks for what is larger than 40 GB
        ("aws", ["expert.resources.labels.gpu_memory='!16'"], "48 GB (counted), and may land on l4 24 GB, a10g 24 GB, l4_on_demand 24 GB; set"),
        ("gcp", ["expert.resources.labels.gpu_memory='!24'"], 'experts.0.resources.labels.gpu_memory: "!in(24, 40)"'),
        ("aws", ["expert.resources.labels.gpu_memory='24'"], "no node type that it asks for has one (l4 24 GB, a10g 24 GB, l4_on_demand 24 GB)"),
        ("aws", ["expert.resources.labels.gpu_memory='24'", "expert.train.gradient_checkpointing=true"], None),
        ("aws", ["expert.resources.labels.gpu_memory='24'", "expert.train.micro_batch=16"], None),  # 12 + 16 × 0.46 GB
        ("azure", ["expert.resources.gpus=0.5"], "needs a GPU of 96 GB (counted), and no node type"),  # of 80, half
    ],
)
def test_a_gpu_that_is_too_small_for_an_expert_is_said(name, sets, said):
    found = list(check_run.unmet_demands(load(name), configs.load("paris_xl2", sets)))
    if said is None:
        assert found == []
    else:
        assert [one.split(":")[0] for one in found] == [f"experts.{k}.resources" for k in range(8)]
        assert all(said in one for one in found[:1]), found[0]


SPOT_GPUS = ["run_dir=s3://theirs/run", "data.source.uri=s3://theirs/pictures", "expert.resources.preemption=aws", "router.resources.preemption=aws"]


@pytest.mark.parametrize(
    ("name", "sets", "said"),
    [
        ("aws", [], []),
        ("aws", ["expert.resources.preemption=gcp"], ["experts.0.resources.preemption (and 7 more) is gcp, and the file is of aws"]),
        ("aws", ["expert.resources.preemption=null"], ["experts.0.resources.preemption (and 7 more) is not set, and a100x8, h100 are on spot"]),
        ("aws", ["expert.resources.preemption=null", "expert.resources.labels.market=on-demand"], []),
        ("aws", ["router.resources={gpus: 0, cpus: 1, labels: {}, preemption: null}"], []),  # no GPU, little lost
        ("aws", ["run_dir=gs://theirs/run"], ["run_dir is gs://theirs/run, a store of gcp, and the machines are of aws"]),
        ("aws", ["data.source.uri=abfs://c@theirs.dfs.core.windows.net/p"], ["data.source.uri is abfs://"]),
        (
            "gcp",
            ["run_dir=gs://theirs/run"],
            ["experts.0.resources.preemption (and 8 more) is aws", "data.source.uri is s3://"],
        ),
        (
            "on_prem",
            ["expert.resources.preemption=null"],
            ["router.resources.preemption is aws, and machines of one's own", "encoder", "(of 48 GB, counted)", "router"],
        ),
    ],
)
def test_what_would_cost_more_than_it_need_is_warned_of(name, sets, said, monkeypatch):
    monkeypatch.delenv("AWS_ENDPOINT_URL", raising=False)
    warned = check_run.costly(load(name), configs.load("paris_xl2", [*SPOT_GPUS, *sets]))
    assert len(warned) == len(said), warned
    assert all(part in one for part, one in zip(said, warned, strict=True)), warned


def test_an_s3_of_ones_own_is_of_no_cloud(monkeypatch):
    config = configs.load("demo", ["run_dir=s3://theirs/run"])
    monkeypatch.delenv("AWS_ENDPOINT_URL", raising=False)
    assert "a store of aws" in check_run.costly(load("gcp"), config)[0]
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://store:9000")
    assert check_run.costly(load("gcp"), config) == []


def test_another_clusters_store_is_the_one_that_it_sees():
    clusters = "clusters={eu: {address: 'https://ray.eu.example', storage: 'gs://theirs/run'}}"
    config = configs.load("demo", ["run_dir=s3://theirs/run", clusters, "experts=[{}, {cluster: eu}]"])
    assert check_run.costly(load("gcp"), config, "eu") == []
    assert "clusters.eu.storage is gs://theirs/run, a store of gcp" in check_run.costly(load("aws"), config, "eu")[0]
