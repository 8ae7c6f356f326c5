"""Placement against all assignments there are, and goodput against simulated interruptions."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest

from paris_ray.training import placement
from paris_ray.training.goodput import best_interval, goodput, goodput_with_notice
from paris_ray.training.placement import place


def brute(hours: list[list[float | None]], counts: list[int], prices: list[float]) -> tuple[float, float]:
    """(hours, cost) of the best of all assignments of trainings to single devices."""
    devices = [(kind, d) for kind, count in enumerate(counts) for d in range(count)]
    best = (math.inf, math.inf)
    for assigned in itertools.product(range(len(devices)), repeat=len(hours)):
        busy = [0.0] * len(devices)
        for i, at in enumerate(assigned):
            lasts = hours[i][devices[at][0]]
            busy[at] += math.inf if lasts is None else lasts
        if max(busy) < math.inf:
            best = min(best, (round(max(busy), 9), round(sum(b * prices[kind] for b, (kind, _) in zip(busy, devices, strict=True)), 9)))
    return best


@pytest.mark.parametrize("seed", range(12))
def test_no_assignment_is_better(seed: int) -> None:
    g = np.random.default_rng(seed)
    counts = [[2, 1], [1, 1, 1], [3], [2, 2]][seed % 4]
    prices = [float(p) for p in g.integers(1, 9, len(counts))]
    hours: list[list[float | None]] = [[float(h) if g.random() < 0.9 else None for h in g.integers(1, 20, len(counts))] for _ in range(5)]
    for row in hours:
        row[0] = row[0] or 7.0
    found = place(hours, [1] * 5, counts, prices)
    assert found.exact
    assert (found.hours, found.cost) == brute(hours, counts, prices)
    # And it is one: no device does two things at once, and the figures are those of the spots.
    used: dict[tuple[int, int], list[tuple[float, float]]] = {}
    for row, spot in zip(hours, found.spots, strict=True):
        assert spot.ends - spot.begins == pytest.approx(row[spot.kind])
        used.setdefault((spot.kind, *spot.devices), []).append((spot.begins, spot.ends))
    for spans in used.values():
        assert all(a[1] <= b[0] for a, b in itertools.pairwise(sorted(spans)))
    assert max(spot.ends for spot in found.spots) == pytest.approx(found.hours)


def test_of_equal_ends_the_cheapest() -> None:
    """The long training fixes the end; the short one may take the slow, cheap machine."""
    found = place([[10.0, 40.0], [2.0, 8.0]], [1, 1], [2, 1], [5.0, 0.5])
    assert (found.hours, found.cost) == (10.0, 10 * 5.0 + 8 * 0.5)
    assert found.spots[1].kind == 1


def test_several_workers_take_as_many_devices_of_one_kind() -> None:
    found = place([[4.0, 9.0], [3.0, 9.0], [3.0, 9.0]], [2, 1, 1], [2, 1], [1.0, 1.0])
    assert found.spots[0].devices == (0, 1)
    assert found.hours == 7.0
    with pytest.raises(ValueError, match="training 0 can run on no machine"):
        place([[4.0, None]], [3], [2, 9], [1.0, 1.0])


def test_a_search_that_is_cut_short_says_so_and_still_has_a_placement(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(placement, "MOST", 30)
    g = np.random.default_rng(0)
    hours: list[list[float | None]] = [[float(h), float(h) * 1.7] for h in g.integers(50, 99, 12)]
    found = place(hours, [1] * 12, [3, 2], [1.0, 2.0])
    assert not found.exact
    assert found.hours < 1.34 * sum(min(row) for row in hours if row) / 3  # no worse than longest-first on the three fast ones (Graham 1969)


def simulated(interval: float, write: float, restart: float, between: float, segments: int = 100_000) -> float:
    """Share of time in steps that counted, over exponential interruptions; steps go on while a checkpoint is written."""
    g = np.random.default_rng(0)
    clock, done, unsafe = 0.0, 0, 0.0
    upcoming = g.exponential(between)
    while done < segments:
        if clock + interval <= upcoming:
            clock, unsafe = clock + interval, write
            done += 1
            continue
        if upcoming - clock < unsafe:
            done -= 1  # the checkpoint was not whole yet
        clock, unsafe = upcoming, 0.0
        while True:  # an interruption may come during the restart, too
            upcoming = clock + g.exponential(between)
            if upcoming - clock > restart:
                clock += restart
                break
            clock = upcoming
    return segments * interval / clock


@pytest.mark.parametrize(("interval", "write", "restart", "between"), [(900, 28, 300, 14_400), (4000, 60, 300, 14_400), (600, 100, 60, 1800)])
def test_goodput_is_what_interruptions_leave(interval: float, write: float, restart: float, between: float) -> None:
    expected = goodput(interval, write, restart, between)
    assert simulated(interval, write, restart, between) == pytest.approx(expected, rel=0.01)
    assert goodput(interval, write, restart, 1e12) == pytest.approx(goodput(interval, write, restart, None), rel=1e-6)
    # In 1000 hours of steps that are announced to be interrupted, by hand: each time a restart and a write.
    notice = goodput_with_notice(write, restart, between)
    wall = 1000 / notice
    assert wall == pytest.approx(1000 + 1000 * 3600 / between * (restart + write) / 3600, rel=1e-9)
    assert expected < notice < 1 == goodput_with_notice(write, restart, None)


def test_what_never_ends_is_a_number_all_the_same() -> None:
    assert 0 < goodput(1e9, 30.0, 300.0, 3600.0) < 1e-30
    assert 0 < goodput(600.0, 30.0, 1e9, 3600.0) < 1e-30


def test_youngs_interval_is_the_best_where_steps_wait() -> None:
    """By Daly's formula, written out."""
    write, restart, between = 28.0, 300.0, 14_400.0

    def waiting(interval: float) -> float:
        return interval / (between * math.exp(restart / between) * (math.exp((interval + write) / between) - 1))

    best = max(waiting(t) for t in np.linspace(100, 4000, 2000))
    young = best_interval(write, between)
    assert waiting(young) > best - 0.001
    assert goodput(young, write, restart, between) > waiting(young)
