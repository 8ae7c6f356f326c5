"""Quotas of vCPUs against those of AWS's machines: g6.xlarge 4, g6.2xlarge 8, p4de.24xlarge 96 (8 GPUs), p5.4xlarge 16, m7i.2xlarge 8."""

from __future__ import annotations

import sys
import types

import pytest
from doctor_facts import healthy, the_fault
from fabricated_cluster import tiny

from jobs import access_facts, doctor
from jobs.findings import Facts, clouds

PLENTY = dict.fromkeys(access_facts.AWS_QUOTAS.values(), 999.0)


def found(config, **quotas):
    """The values of the faults, where there is plenty of all other quotas."""
    names = {"g": "on-demand G and VT", "spot_g": "spot G and VT", "p": "on-demand P", "spot_p4": "spot P4, P3 and P2", "spot_p5": "spot P5"}
    names |= {"standard": "on-demand Standard", "spot_standard": "spot Standard"}
    told = PLENTY | {names[key]: float(value) for key, value in quotas.items()}
    return [one.value for one in doctor.judge(Facts(config=config, quotas={"aws": told})) if one.state == "fault"]


def test_an_account_that_may_have_nothing(tmp_path, monkeypatch):
    config = tiny(tmp_path, "expert.resources.gpus=1", "expert.resources.preemption=aws")
    assert clouds(config) == ["aws"]
    told = types.SimpleNamespace(get_service_quota=lambda ServiceCode, QuotaCode: {"Quota": {"Value": 0.0}})
    monkeypatch.setitem(sys.modules, "boto3", types.SimpleNamespace(client=lambda name: told))
    node = healthy(gpus=1, driver="580.1")
    judged = [one for one in doctor.judge(Facts(config=config, here=node, quotas={"aws": access_facts.quotas("aws")})) if one.state == "fault"]
    assert {(one.what, one.where) for one in judged} == {("quotas", "aws")}
    assert all("Service Quotas" in one.remedy for one in judged)
    assert [one.value for one in judged] == [  # the head, the experts' GPUs, the router's cores
        "on-demand Standard: 0 vCPUs",
        "spot G and VT: 0 vCPUs, spot P4, P3 and P2: 0 vCPUs, spot P5: 0 vCPUs",
        "on-demand Standard: 0 vCPUs, spot Standard: 0 vCPUs",
    ]
    for cloud, module in (("aws", None), ("gcp", None)):
        monkeypatch.setitem(sys.modules, "boto3", module)
        judged = doctor.judge(Facts(config=config, here=node, quotas={cloud: access_facts.quotas(cloud)}))
        assert [one.state for one in judged if one.what == "quotas"] == ["not asked"]


@pytest.mark.parametrize(
    ("resources", "quotas", "lacks"),
    [
        ("accelerator_type: L4, labels: {market: spot}", {"g": 0, "p": 0}, ""),
        ("accelerator_type: A100, labels: {market: spot}", {"spot_p4": 0}, "spot P4, P3 and P2: 0 vCPUs"),
        ("accelerator_type: H100, labels: {market: spot}", {"spot_p4": 0}, ""),
        ("accelerator_type: H100, labels: {market: on-demand}", {"p": 0}, "on-demand P: 0 vCPUs"),
        ("labels: {gpu_memory: '80', market: on-demand}", {"p": 0}, "on-demand P: 0 vCPUs"),
        ("labels: {gpu_memory: '24'}", {"p": 0, "spot_p4": 0, "spot_p5": 0, "g": 0}, ""),  # be it spot
        ("labels: {gpu_memory: '40', market: spot}", {"spot_p4": 0}, "spot P4, P3 and P2: 0 vCPUs"),
        ("accelerator_type: L40S, labels: {market: spot}", {"spot_g": 0}, "spot G and VT: 0 vCPUs"),  # of a machine that is not in our table
        ("accelerator_type: L40S, labels: {market: spot}", {"spot_g": 1}, ""),
    ],
)
def test_the_quota_is_that_of_the_machines_that_the_gpus_are_in(tmp_path, resources, quotas, lacks):
    config = tiny(tmp_path, f"expert.resources={{{resources}, gpus: 1}}")
    assert found(config, **quotas) == ([lacks] if lacks else [])


def eight(folder, resources, *sets):
    return tiny(folder, "experts=8", "max_parallel=8", f"expert.resources={{{resources}, gpus: 1, preemption: aws}}", *sets)


@pytest.mark.parametrize(
    ("resources", "sets", "quota", "least"),
    [
        ("accelerator_type: L4, cpus: 4", (), "spot_g", 8 * 4),
        ("accelerator_type: L4, cpus: 8", (), "spot_g", 8 * 8),
        ("accelerator_type: L4, cpus: 8", ("max_parallel=2",), "spot_g", 2 * 8),
        ("accelerator_type: L4, cpus: 1", ("expert.resources.gpus=0.25",), "spot_g", 2 * 4),  # four on a GPU
        ("accelerator_type: L4, cpus: 4", ("expert.resources.num_workers=2",), "spot_g", 16 * 4),
        (
            "accelerator_type: L4, cpus: 4",
            ("router.resources={accelerator_type: L4, cpus: 8, gpus: 1, preemption: aws}",),
            "spot_g",
            6 * 4 + 2 * 8,
        ),
        ("accelerator_type: A100, labels: {gpu_memory: '80'}", (), "spot_p4", 96),  # all on one machine
        ("accelerator_type: A100, labels: {gpu_memory: '80'}", ("max_parallel=1",), "spot_p4", 96),  # which no one has less of
        ("accelerator_type: A100", ("expert.resources.num_workers=2",), "spot_p4", 192),
        ("accelerator_type: H100, cpus: 8", (), "spot_p5", 8 * 16),
    ],
)
def test_as_many_vcpus_as_the_machines_have_that_are_wanted_at_once(tmp_path, resources, sets, quota, least):
    """A new account's few vCPUs are more than none, and start nothing."""
    config = eight(tmp_path, resources, *sets)
    assert found(config, **{quota: least}) == []
    (one,) = found(config, **{quota: least - 1})
    assert one.endswith(f": {least - 1} vCPUs")


def test_who_wants_how_much_is_told(tmp_path):
    config = eight(tmp_path, "accelerator_type: L4, cpus: 8", "max_parallel=2")
    one = the_fault(Facts(config=config, quotas={"aws": PLENTY | {"spot G and VT": 8.0}}), "quotas", "spot G and VT: 8 vCPUs", "max_parallel")
    assert one.rule == "expert-0, expert-1 train at once, in machines of at least 16 vCPUs"


@pytest.mark.parametrize(
    ("resources", "quotas", "lacks"),
    [
        ("preemption: aws", {"standard": 8}, []),  # the head, an m7i.2xlarge
        ("preemption: aws", {"standard": 7}, ["on-demand Standard: 7 vCPUs"]),
        ("preemption: aws, cpus: 16", {"spot_standard": 8 * 16}, []),
        ("preemption: aws, cpus: 16", {"spot_standard": 8 * 16 - 1}, ["spot Standard: 127 vCPUs"]),
        ("preemption: aws, cpus: 0.5", {"spot_standard": 4}, []),  # all on an m7i.xlarge
        ("preemption: aws, cpus: 0.5", {"spot_standard": 3}, ["spot Standard: 3 vCPUs"]),
        ("labels: {market: on-demand}, cpus: 16", {"standard": 8 * 16 + 8}, []),  # beside the head
        ("labels: {market: on-demand}, cpus: 16", {"standard": 8 * 16 + 7}, ["on-demand Standard: 135 vCPUs"]),
    ],
)
def test_the_head_and_trainings_without_a_gpu_come_out_of_the_ordinary_quotas(tmp_path, resources, quotas, lacks):
    config = tiny(
        tmp_path, "experts=8", "max_parallel=8", f"expert.resources={{{resources}}}", "router.resources={cpus: 0.25, labels: {market: spot}}"
    )
    assert found(config, **quotas) == lacks


def test_one_of_several_quotas_is_enough_and_each_cluster_has_its_own(tmp_path):
    config = tiny(tmp_path, "max_parallel=1", "expert.resources={accelerator_type: L4, cpus: 8, gpus: 1}")
    assert found(config, g=7, spot_g=8) == found(config, g=8, spot_g=7) == []
    assert found(config, g=7, spot_g=7) == ["on-demand G and VT: 7 vCPUs, spot G and VT: 7 vCPUs"]
    two = tiny(
        tmp_path, "experts=[{}, {cluster: eu}]", "clusters={eu: {address: 'http://127.0.0.1:1'}}",
        "expert.resources={accelerator_type: L4, cpus: 8, gpus: 1, labels: {market: spot}}",
    )  # fmt: skip
    assert found(two, spot_g=8) == []
    assert len(found(two, spot_g=7)) == 2
