"""The bill of a run against arithmetic by hand, and what it warns of."""

from __future__ import annotations

import pytest

from paris_ray import config as configs
from paris_ray.config import ModelConfig
from paris_ray.data.report.cost import estimate, warnings
from paris_ray.training.budget import Inputs, expert_flops, router_flops

ENCODERS = {"codec": {"channels": 4, "latent_size": 32}, "text": {"max_length": 77, "width": 768}}


def test_the_papers_run() -> None:
    run = configs.load("paris_xl2", ["experts.2.resources.num_workers=4", "experts.3.train.images=200000000", "experts.3.resources.num_workers=4"])
    found = estimate(run, [1_375_000] * 8, ENCODERS)
    first, third = found["stages"][0], found["stages"][3]
    # 50 M images of 3 × 293 GFLOP.
    per_image = 3 * expert_flops(ModelConfig.model_validate({"size": "XL/2"}), Inputs(4, 32, 77, 768))
    assert (first["images"], first["flops_per_image"], first["flops"]) == (50_000_128, per_image, 50_000_128 * per_image)
    assert first["passes"] == pytest.approx(36.36, abs=0.01)
    assert first["gpu_hours"]["A100"] == pytest.approx(50_000_128 * per_image / (0.4 * 312e12) / 3600)
    assert first["gpu_hours"]["H100"] == pytest.approx(first["gpu_hours"]["A100"] * 312 / 989.4)
    # Expert 3 has four times the images but as many workers: as long as the others. The first of the longest is named.
    assert third["flops"] == pytest.approx(4 * first["flops"], rel=1e-5)
    assert found["critical"] == "expert-0"
    router = found["stages"][-1]
    assert (router["stage"], router["rows"], router["images"]) == ("router", 11_000_000, 275_000_064)
    assert router["flops_per_image"] == 3 * router_flops(run.router.model, Inputs(4, 32, 77, 768), 8)
    blind = estimate(configs.load("paris_xl2", ["router.text=none"]), [1_375_000] * 8, ENCODERS)["stages"][-1]
    assert router["flops_per_image"] - blind["flops_per_image"] == 3 * 2 * 768 * 768
    again = estimate(configs.load("paris_xl2", ["expert.train.gradient_checkpointing=true"]), [1_375_000] * 8, ENCODERS)["stages"][0]
    assert again["flops_per_image"] * 3 == per_image * 4


def test_the_longest_is_critical() -> None:
    found = estimate(configs.load("demo"), [100, 300, 200, 100, 100, 100, 100, 100], ENCODERS)
    assert found["critical"] == "expert-1"
    assert [line["images"] for line in found["stages"][:3]] == [15_504, 34_800, 23_200]  # at least 15,500, in batches of 16; 116 passes


def test_few_passes_and_unequal_budgets_are_said() -> None:
    few = estimate(configs.load("demo", ["expert.train.images=8000"]), [100, 60, 70, 80, 60, 50, 60, 70], ENCODERS)
    (said,) = warnings(few)
    assert "expert-0 (80)" in said
    assert "expert-1" not in said
    large = estimate(configs.load("demo", ["expert.train.images=8000"]), [20_000] * 8, ENCODERS)
    assert warnings(large) == []  # measured on small clusters: nothing is said of large ones
    unequal = estimate(configs.load("demo"), [400, 150, 150, 150, 150, 150, 150, 150], ENCODERS)
    (said,) = warnings(unequal)
    assert "expert-0 takes 2.7 times the arithmetic of expert-1" in said
    assert warnings(estimate(configs.load("demo"), [180, 150, 150, 150, 150, 150, 150, 150], ENCODERS)) == []
