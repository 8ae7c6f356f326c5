"""Draws are functions of (seed, stream, index) and of nothing else."""

from __future__ import annotations

import numpy as np
from scipy import stats

from paris_ray import rng


def test_draws_do_not_depend_on_order_company_or_history() -> None:
    many = np.array([5, 0, 10**9, 2, 5])
    whole = rng.normal(7, "noise", many, (3, 2))
    for row, index in zip(whole, many, strict=True):
        assert (rng.normal(7, "noise", np.array([index]), (3, 2))[0] == row).all()
    assert (rng.normal(7, "noise", many[::-1].copy(), (3, 2)) == whole[::-1]).all()
    assert (rng.uniform(7, "t", many)[[0, 4]] == rng.uniform(7, "t", np.array([5]))).all()


def test_seeds_streams_and_indices_share_nothing() -> None:
    n = 4000
    base = rng.normal(1, "a", np.arange(n), (1,)).ravel()
    for other in (rng.normal(2, "a", np.arange(n), (1,)), rng.normal(1, "b", np.arange(n), (1,)), rng.normal(1, "a", np.arange(1, n + 1), (1,))):
        assert abs(np.corrcoef(base, other.ravel())[0, 1]) < 5 / np.sqrt(n)
    assert stats.kstest(base, "norm").pvalue > 1e-4
    assert stats.kstest(rng.uniform(1, "a", np.arange(n)), "uniform").pvalue > 1e-4
    assert len({rng.key(seed, index) for seed in range(50) for index in range(50)}) == 2500


def test_a_long_draw_of_one_index_does_not_run_into_the_next() -> None:
    long = rng.normal(3, "noise", np.array([0]), (100_000,))[0]
    following = rng.normal(3, "noise", np.array([1]), (100,))[0]
    assert not np.isin(following, long[:-100]).all()
    windows = np.lib.stride_tricks.sliding_window_view(long, 4)
    assert not (windows == following[:4]).all(1).any()


def test_keys_are_stable_63_bit_hashes() -> None:
    import hashlib

    expected = int.from_bytes(hashlib.blake2b(b"(1, 'x')", digest_size=8).digest(), "little") >> 1
    assert rng.key(1, "x") == expected
    assert rng.key(1) != rng.key(True)  # printed differently
    assert all(0 <= rng.key(i) < 2**63 for i in range(1000))


def test_permutation_is_one_and_differs_by_epoch() -> None:
    first, second = rng.permutation(0, "order", 0, 100), rng.permutation(0, "order", 1, 100)
    assert sorted(first) == sorted(second) == list(range(100))
    assert (first != second).any()
    assert (rng.permutation(0, "order", 0, 100) == first).all()
