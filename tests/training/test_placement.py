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


def simulated(interval: float, write: float, restart: float, between: float, beside: bool, segments: int = 60_000) -> float:
    """Share of time in steps that counted, over exponential interruptions; ``beside``: steps go on while a checkpoint is written."""
    g = np.random.default_rng(0)
    clock, done, unsafe = 0.0, 0, 0.0
    upcoming = g.exponential(between)
    while done < segments:
        lasts = interval if beside else interval + write
        if clock + lasts <= upcoming:
            clock, unsafe = clock + lasts, write if beside else 0.0
            done += 1
            continue
        if beside and unsafe and upcoming - clock < unsafe:
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
    assert simulated(interval, write, restart, between, beside=False) == pytest.approx(expected, rel=0.01)
    assert simulated(interval, write, restart, between, beside=True) > expected  # what is really done
    assert goodput(interval, write, restart, 1e12) == pytest.approx(goodput(interval, write, restart, None), rel=1e-6)
    notice = goodput_with_notice(interval, write, restart, between)
    assert notice > expected
    # In 1000 hours of steps, written by hand: each interval a write, each interruption a restart and a write.
    wall = 1000 * (interval + write) / interval
    assert notice == pytest.approx(1000 / (wall + wall * (restart + write) / between), rel=1e-9)


def test_what_never_ends_is_a_number_all_the_same() -> None:
    assert 0 < goodput(1e9, 30.0, 300.0, 3600.0) < 1e-30
    assert 0 < goodput(600.0, 30.0, 1e9, 3600.0) < 1e-30


def test_youngs_interval_is_near_the_best() -> None:
    write, between = 28.0, 14_400.0
    tried = np.linspace(100, 4000, 2000)
    best = max(goodput(t, write, 300.0, between) for t in tried)
    assert goodput(best_interval(write, between), write, 300.0, between) > best - 0.001
