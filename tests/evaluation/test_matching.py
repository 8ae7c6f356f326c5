"""What a run and a picture cost, by hand and by torch's own counter."""

from __future__ import annotations

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from paris_ray import config as configs
from paris_ray.diffusion import solvers
from paris_ray.evaluation import compare_config, compare_rows, matching
from paris_ray.evaluation.compare_rows import ROWS, Run
from paris_ray.models.dit import DiT
from paris_ray.models.router import Router
from paris_ray.training import ema
from paris_ray.training.budget import text_flops

N = 8  # on a CPU matrix products are padded to multiples of eight rows


def counted(function) -> int:
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        function()
    return counter.get_total_flops()


@pytest.fixture(scope="module")
def compare():
    return compare_config.load("compare_tiny")


def networks(run):
    inputs, spec = matching.inputs_of(run), run.experts[0].model
    shape = {"image_size": inputs.side, "in_channels": inputs.channels, "text_embed_dim": inputs.text_width}
    expert = DiT(out_channels=inputs.channels, **shape, **spec.model_dump(exclude={"size"}))
    return inputs, expert, Router(run.num_experts, **shape | run.router.model.model_dump(exclude={"size"}))


def test_a_picture_costs_what_torch_counts(compare):
    """Of top-2 with guidance: two experts, two branches, one router pass at each step; captions once in each expert."""
    run = compare_rows.run_config(compare, Run("experts", 0, 1e-3))
    inputs, expert, router = networks(run)
    x, t = torch.randn(N, inputs.channels, inputs.side, inputs.side), torch.rand(N)
    text = torch.randn(N, inputs.text_tokens, inputs.text_width)
    keys_values = expert.text_keys_values(text)
    step, once = counted(lambda: expert(x, t, keys_values=keys_values)) / N, counted(lambda: expert.text_keys_values(text)) / N
    routed = counted(lambda: router(x, t, text[:, 0])) / N
    assert text_flops(run.experts[0].model, inputs) == once
    assert matching.picture_flops(run, inputs, "top-2") == 25 * (2 * 2 * step + routed) + 2 * once
    assert matching.picture_flops(run, inputs, "full", guidance=1.0) == 25 * (4 * step + routed) + 4 * once
    assert matching.picture_flops(run, inputs, "caption", steps=10) == 10 * 2 * step + once + routed
    for alone in ("oracle", "expert-3"):
        assert matching.picture_flops(run, inputs, alone) == 25 * 2 * step + once
    assert matching.picture_flops(run, inputs, "threshold", asked=1.5, visited=3.0) == 25 * (1.5 * 2 * step + routed) + 3 * once


def test_every_row_costs_what_the_main_row_does(compare):
    """Training FLOPs, with the router's, by the counter's own figures; batch, steps and share of the average's half-life."""
    main = compare_rows.run_config(compare, Run("experts", 0, 1e-3))
    inputs, expert, router = networks(main)
    x, t = torch.randn(N, inputs.channels, inputs.side, inputs.side), torch.rand(N)
    text = torch.randn(N, inputs.text_tokens, inputs.text_width)
    forward, routed = counted(lambda: expert(x, t, text)) / N, counted(lambda: router(x, t, text[:, 0])) / N
    total = 3 * (122_880 * forward + 16_000 * routed)
    taught = {"distilled": 2 * forward + routed}
    found = {
        name: matching.matched(compare_rows.run_config(compare, Run(name, 0, 1e-3)), compare_rows.routing(compare, name), taught.get(name, 0.0))
        for name in ROWS
    }
    assert found["experts"].training_flops == total
    assert found["experts"].images == 122_880
    assert found["monolith"].images == pytest.approx(total / 3 / forward, abs=64)
    for name, one in found.items():
        assert one.training_flops == pytest.approx(total, rel=0.005), name
        assert one.batch == (16 if name == "monolith-steps" else 64)
        assert one.ema_share == pytest.approx((2000 * 4 / 122_880,) * 2, rel=0.01), name
        assert one.warmup_share == pytest.approx((1600 * 4 / 122_880,) * 2, rel=0.01), name
    assert found["distilled"].images == pytest.approx(total / (5 * forward + routed), abs=64)
    assert found["distilled"].picture_flops == found["monolith"].picture_flops
    wide, main_picture = found["monolith-inference"].picture_flops, found["experts"].picture_flops
    assert wide == pytest.approx(main_picture, rel=0.03)
    assert found["monolith"].picture_flops < 0.5 * main_picture
    assert found["experts-2"].steps == found["experts"].steps == (1920, 1920)


@pytest.mark.parametrize("half_life", [2000, 20_000])
def test_the_share_of_the_average_is_the_one_in_force(half_life):
    """At the end of a training, by what the average itself keeps of an update."""
    run = compare_config.load("compare_tiny", [f"base.expert.train.ema_half_life_images={half_life}"])
    main = compare_rows.run_config(run, Run("experts", 0, 1e-3))
    images, share = main.experts[0].train.images, matching.matched(main, "top-2").ema_share[0]
    assert ema.decay(images, 16, half_life) == pytest.approx(0.5 ** (16 / (share * images)))


def test_images_are_shared_as_rows_are(compare):
    run = compare_rows.run_config(compare, Run("experts-4", 0, 1e-3), sizes=(400, 300, 200, 100))
    assert [spec.train.images for spec in run.experts] == [49_152, 36_864, 24_576, 12_288]
    assert [spec.train.batch_size for spec in run.experts] == [16] * 4
    # 1600 images of warm-up and 2000 of half-life for each of them; the average's half-life is a tenth of the images so far at most.
    found = matching.matched(run, "top-2")
    assert found.steps == (768, 3072)
    assert found.warmup_share == pytest.approx((1600 / 49_152, 1600 / 12_288))
    assert found.ema_share == pytest.approx((2000 / 49_152, 0.1))
    mixed = compare_rows.run_config(compare, Run("mixed", 0, 1e-3))
    assert [spec.objective for spec in mixed.experts] == ["ddpm"] * 2 + ["flow"] * 2


@pytest.mark.parametrize("solver", solvers.SOLVERS)
@pytest.mark.parametrize("steps", [1, 2, 25])
def test_evaluations_are_the_solvers_own(solver, steps):
    assert matching.evaluations(solver, steps) == solvers.evaluations(solver, steps)


@pytest.mark.parametrize("preset", compare_config.PRESETS)
def test_presets_can_be_written_and_read(preset, tmp_path):
    config = compare_config.load(preset)
    (tmp_path / "config.yaml").write_text(compare_config.dump(config))
    assert compare_config.load(str(tmp_path / "config.yaml")) == config


def test_a_base_can_be_another_preset():
    changed = compare_config.load("compare_tiny", ["base={preset: paris_b2, router: {train: {images: 100, passes: 1}}}", "learning_rates=[0.001]"])
    assert changed.base.expert.model.size == "B/2"
    assert changed.base.data.source.kind == "folder"
    assert changed.images == 122_880


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ("rows=[experts, monolit]", "rows: 'monolit' is not a row. Did you mean 'monolith'?"),
        ("rows=[monolith]", "compared with experts, which is missing; add it"),
        ("base.router.train.images=null", "base.router.train.images is null; say how many"),
        ("learning_rates=[]", "learning_rates: "),
        ("base.experts=2", "with 2 experts: routing: 'top-3' is not one of top-1 … top-2"),
        ("seeds=[1, 1]", "seeds: [1, 1] names something twice"),
        ("base.experts=[{}, {objective: ddpm}]", "at least two experts, all alike"),
        ("base.expert.train.batch_size=1", "experts-16 has 16 experts, which must divide the batch of all experts together, 4"),
        ("judge={kind: inception}", "seen_captions is 256; FID needs more pictures than there are features, 2048"),
        ("base={preset: dmo}", "base.preset: 'dmo' does not exist. Did you mean 'demo'?"),
    ],
)
def test_errors_name_key_value_and_remedy(setting, said):
    extra = ["rows=[experts, experts-16]"] if "batch_size" in setting else []
    with pytest.raises(configs.ConfigError) as caught:
        compare_config.load("compare_tiny", [*extra, setting])
    assert said in str(caught.value)
