"""Hours, costs and checkpoints against arithmetic by hand."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from paris_ray import config as configs
from paris_ray.config import ConfigError
from paris_ray.training import plan
from paris_ray.training.memory import expert_activations
from paris_ray.training.plan import Devices, MachineTable, equal_hours, fit, make, trainings

ENCODERS = {"codec": {"channels": 4, "latent_size": 32}, "text": {"max_length": 77, "width": 768}}
ROWS = [1_375_000] * 8


def paris(*sets: str):
    return trainings(configs.load("paris_xl2", ["evaluation.control_router=false", *sets]), ROWS, ENCODERS)


def machine(**changes) -> Devices:
    settings = {"name": "a", "memory_gib": 80, "images_per_second": {"XL/2": 250, "router": 1000}, "storage_mb_per_s": 400, "start_seconds": 0}
    return Devices(**{**settings, **changes})


def fitted(one: plan.Training, where: Devices) -> plan.Fit:
    found = fit(one, where)
    assert found is not None
    return found


def test_hours_and_cost_by_hand() -> None:
    """Eight experts of 50,000,128 images at 250/s, a router of 275,000,064 at 1000/s, on nine devices for 2 an hour."""
    made = make(paris(), [machine(count=9, price_per_hour=2.0, storage_mb_per_s=1e9)])
    expert, router = 50_000_128 / 250 / 3600, 275_000_064 / 1000 / 3600
    assert made.placement.hours == pytest.approx(router)  # the longest: 76.4 hours
    assert made.placement.cost == pytest.approx(2 * (8 * expert + router))
    assert made.placement.exact
    assert made.critical == "expert-0"
    alone = make(paris(), [machine(price_per_hour=2.0, storage_mb_per_s=1e9, start_seconds=360)])
    assert alone.placement.hours == pytest.approx(8 * expert + router + 9 * 0.1)
    assert alone.placement.cost == pytest.approx(2 * alone.placement.hours)


def test_the_control_router_is_trained_as_well_unless_it_is_not() -> None:
    found = trainings(configs.load("paris_xl2"), ROWS, ENCODERS)
    assert [one.stage for one in found] == [*(f"expert-{k}" for k in range(8)), "router", "control_router"]
    assert found[-2].weights - found[-1].weights == 768 * 768 + 768  # what reads the text
    assert found[-2].flops - found[-1].flops == 3 * 2 * 768 * 768
    assert found[-1].images == found[-2].images == 275_000_064


def test_rates_come_from_the_stage_the_size_or_the_peak() -> None:
    one = paris()[0]
    assert fitted(one, machine()).rate == 250
    assert fitted(one, machine(images_per_second={"XL/2": 250, "expert-0": 99})).rate == 99
    assert fitted(one, machine(images_per_second={}, device="H100", mfu=0.5)).rate == pytest.approx(0.5 * 989.4e12 / one.flops)
    assert fitted(paris("expert.resources.num_workers=4")[0], machine()).rate == 1000
    with pytest.raises(ConfigError, match=r"machines.a: images_per_second has neither 'XL/2' nor 'expert-0'.*peak_tflops, or as device one of A40"):
        fit(one, machine(images_per_second={}, device="abacus"))


def test_a_checkpoint_is_the_weights_the_average_and_two_moments() -> None:
    assert fitted(paris()[0], machine(storage_mb_per_s=400)).checkpoint == pytest.approx(605_970_448 * 4 * 4 / 400e6)  # 24 s


def test_memory_decides_where_a_training_can_run() -> None:
    """The preset's 64 rows at once take 12 GB of state and 30 of activations, as counted (docs/notebook.md)."""
    one = paris()[0]
    assert 42e9 < one.memory < 48e9
    assert fit(one, machine(memory_gib=48)) is not None
    assert fit(one, machine(memory_gib=40)) is None
    auto = paris("expert.train.micro_batch=auto")[0]
    image = expert_activations(one.spec.model, plan.Inputs(4, 32, 77, 768), one.spec.train)
    assert one.memory - auto.memory == 63 * image
    with pytest.raises(ConfigError, match=r"expert-0: takes 1 × 4\d.\d GiB, and no machine has that \(usable: a: 1 × 36.0\).*micro_batch.*now 64"):
        make(paris(), [machine(memory_gib=40)])
    # Two workers have half of a batch of 128 each, and buckets of four bytes a weight.
    two = paris("expert.resources.num_workers=2", "expert.train.batch_size=128", "expert.train.micro_batch=null")[0]
    assert two.memory - one.memory == 4 * 605_970_448
    with pytest.raises(ConfigError, match="expert-0: takes 2 × "):
        make(paris("expert.resources.num_workers=2"), [machine()])


def by_hand(interval: float, write: float, restart: float, between: float) -> float:
    """Daly (2006), equation 13, with steps that go on while a checkpoint is written; simulated in test_placement.py."""
    return interval / (between * math.exp((restart + write) / between) * (math.exp(interval / between) - 1))


@pytest.mark.parametrize("device", ["H100", "A100", "A40", "two cores"])
@pytest.mark.parametrize("preset", ["demo", "paris_b2", "paris_xl2"])
def test_one_preemption_in_four_hours_leaves_nine_tenths(preset: str, device: str) -> None:
    """With the checkpoints that the plan proposes, on object storage of 200 MB/s and five minutes to start again."""
    rates = {"128x4": 140, "B/2": 2, "XL/2": 0.3, "router": 1.5} if device == "two cores" else {}
    spot = machine(images_per_second=rates, device=device, hours_between_preemptions=4, start_seconds=300, storage_mb_per_s=200, memory_gib=80)
    rows = [240] * 8 if preset == "demo" else ROWS
    for one in trainings(configs.load(preset), rows, ENCODERS):
        found = fitted(one, spot)
        assert found.best_goodput >= 0.9, one.stage
        interval = max(one.weights * 16 / 200e6, min(one.images, found.checkpoint_images) / found.rate)
        assert found.best_goodput == pytest.approx(by_hand(interval, one.weights * 16 / 200e6, 300, 4 * 3600))
        # And proposes what it counts with.
        train = one.spec.train.model_copy(update={"checkpoint_images": found.checkpoint_images})
        set_so = fitted(replace(one, spec=one.spec.model_copy(update={"train": train})), spot)
        assert set_so.goodput == found.best_goodput
        assert set_so.hours == pytest.approx((300 + one.images / set_so.rate / set_so.goodput) / 3600)


def test_a_notice_that_suffices_spares_the_steps() -> None:
    one = paris()[0]
    settings = {"hours_between_preemptions": 4, "start_seconds": 300}
    without, aws, gcp = (fitted(one, machine(**settings, preemption=cloud)) for cloud in (None, "aws", "gcp"))
    assert aws.loses_nothing  # 2 × 24 s in 120
    assert not gcp.loses_nothing  # and not in 30
    assert gcp.goodput == without.goodput < aws.goodput
    # Two steps of 256 images have to end first: of 29 s each there is time for (5 + 6 + 58 + 48.5), of 32 s there is not.
    slow = [fitted(one, machine(**settings, preemption="aws", images_per_second={"XL/2": 256 / seconds})) for seconds in (29, 32)]
    assert [there.loses_nothing for there in slow] == [True, False]


def test_equal_hours() -> None:
    """A device of twice the speed gets twice the images; two experts on one share it."""
    fast = machine(name="fast", images_per_second={"XL/2": 200}, storage_mb_per_s=1e9)
    slow = machine(images_per_second={"XL/2": 100}, storage_mb_per_s=1e9, count=2)
    run = configs.load("paris_xl2", ["experts=4", "expert.train.images=2560000"])
    found = [one for one in trainings(run, ROWS[:4], ENCODERS) if one.is_expert]
    ours = make(found, [fast, slow])
    assert sorted(spot.kind for spot in ours.placement.spots) == [0, 0, 1, 1]
    budgets = equal_hours(ours)  # two on the fast device, each at half its speed, and one on each slow one
    assert budgets == dict.fromkeys(budgets, 2_560_000)
    one_each = make(found[:2], [fast, machine(images_per_second={"XL/2": 120}, storage_mb_per_s=1e9)])
    split = equal_hours(one_each)
    again = [split[one.stage] / there.rate / there.goodput for one, there in zip(one_each.trainings, one_each.fits, strict=True)]
    assert again[0] == pytest.approx(again[1], rel=1e-3)
    assert sorted(split.values()) == pytest.approx([5_120_000 * 120 / 320, 5_120_000 * 200 / 320], rel=1e-3)


def test_a_table_that_is_wrong_is_refused_by_key(tmp_path) -> None:
    path = tmp_path / "machines.yaml"
    path.write_text("machines: [{name: a, memory: 80, storage_mb_per_s: 1}, {name: b, memory_gib: 8, storage_mb_per_s: -1}]")
    with pytest.raises(ConfigError) as caught:
        configs.read(MachineTable, str(path), "--machines")
    said = str(caught.value)
    assert said.startswith(f"{path}: machines.0.")
    assert "machines.0.memory: no such key. Did you mean 'memory_gib'?" in said
    assert "machines.1.storage_mb_per_s: Input should be greater than 0 (got -1)" in said
