import numpy as np
import pytest
import scipy.fft
from PIL import Image

from paris_ray.data import phash as module
from paris_ray.data.phash import near_components, phash


def picture(seed, side=64):
    """Smooth, as photographs are."""
    small = np.random.default_rng(seed).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    return np.asarray(Image.fromarray(small).resize((side, side), Image.Resampling.BICUBIC))


def distance(a, b):
    return (phash(a) ^ phash(b)).bit_count()


def test_bits_are_those_of_scipys_dct():
    for seed in range(50):
        image = picture(seed)
        grey = np.asarray(Image.fromarray(image).convert("L").resize((32, 32), Image.Resampling.LANCZOS), np.float64)
        low = scipy.fft.dctn(grey, type=2)[:8, :8]
        # scipy does not scale rows; ours are exact to the rounding of the cosines, so only coefficients at the median may differ.
        clear = np.abs(low - np.median(low)) > 1e-3 * np.abs(low).max()
        bits = np.array([int(bit) for bit in f"{phash(image):064b}"]).reshape(8, 8)
        assert (bits == (low > np.median(low)))[clear].all()
        assert clear.sum() > 40


def test_near_duplicates_are_near_and_others_are_not():
    for seed in range(20):
        image = picture(seed)
        smaller = np.asarray(Image.fromarray(image).resize((40, 40), Image.Resampling.LANCZOS))
        brighter = np.clip(image * 1.05 + 4, 0, 255).astype(np.uint8)
        assert distance(image, smaller) <= module.DISTANCE
        assert distance(image, brighter) <= 2 * module.DISTANCE
        assert distance(image, picture(seed + 100)) > 10


def test_flat_and_symmetric_pictures_have_no_bits_of_noise():
    flat = {phash(np.full((32, 32, 3), value, np.uint8)) for value in (1, 77, 128, 255)}
    assert flat == {1 << 63}  # the mean alone is above the median
    half = np.zeros((32, 32, 3), np.uint8)
    half[:, 10:22] = 200  # symmetric: odd frequencies along a row are exactly zero
    low = module._COSINES @ np.asarray(Image.fromarray(half).convert("L"), np.int64) @ module._COSINES.T
    assert (low[:, 1::2] == 0).all()


def brute(hashes, groups):
    """Components by comparing every pair."""
    n = len(hashes)
    parent = list(range(n))

    def find(i):
        while parent[i] != i:
            i = parent[i]
        return i

    for i in range(n):
        for j in range(i):
            if int(hashes[i] ^ hashes[j]).bit_count() <= 3 and groups[i] != groups[j]:
                parent[find(i)] = find(j)
    return [find(i) for i in range(n)]


def same_partition(a, b):
    pairs = set(zip(a, b, strict=True))
    return len(pairs) == len(set(a)) == len(set(b))


@pytest.mark.parametrize("seed", range(6))
def test_components_against_all_pairs(seed):
    g = np.random.default_rng(seed)
    centres = g.integers(0, 2**63, 40, dtype=np.uint64)
    hashes = np.repeat(centres, 8)
    for _ in range(2 + seed % 3):  # up to two to four bits of each are flipped, so some pairs are at a distance of three, some of four
        hashes = hashes ^ (np.uint64(1) << g.integers(0, 64, len(hashes), dtype=np.uint64))
    groups = g.integers(0, 60, len(hashes)).astype(np.uint64)
    alone = np.arange(len(hashes))
    for given, known in ((None, alone), (groups, groups)):
        component, unchecked = near_components(hashes, given)
        wanted = brute(hashes, known)
        assert unchecked == 0
        assert same_partition(component.tolist(), wanted)
        assert 40 <= len(set(wanted)) < len(hashes)


def test_a_pair_in_any_three_bits_is_found():
    base = np.uint64(0x0123456789ABCDEF)
    for bits in ((0, 1, 2), (0, 16, 32), (15, 31, 63), (48, 49, 20)):
        other = base
        for bit in bits:
            other ^= np.uint64(1) << np.uint64(bit)
        assert len(set(near_components(np.array([base, other]))[0].tolist())) == 1
        further = other ^ np.uint64(1 << 40)
        assert len(set(near_components(np.array([base, further]))[0].tolist())) == 2


def test_large_buckets_are_reported_and_cost_no_square():
    g = np.random.default_rng(0)
    # All share one band of sixteen bits; by the other bands pairs are still found.
    hashes = g.integers(0, 2**48, 1500, dtype=np.uint64)
    hashes[1] = hashes[0] ^ np.uint64(0b111)
    component, unchecked = near_components(hashes, largest=100)
    assert unchecked == 1500
    assert component[0] == component[1]
    assert len(set(component.tolist())) == 1499
    # Two that share no band but a crowded one may be missed.
    hashes[1] = hashes[0] ^ np.uint64(1 | 1 << 16 | 1 << 32)
    assert len(set(near_components(hashes, largest=100)[0].tolist())) == 1500
    assert len(set(near_components(hashes, largest=1500)[0].tolist())) == 1499
    # A crowd of near hashes in one bucket has half a million pairs, and is one component.
    crowd = np.arange(1000, dtype=np.uint64) % np.uint64(8) + np.uint64(1 << 20)
    assert set(near_components(crowd)[0].tolist()) == {0}


def test_empty():
    component, unchecked = near_components(np.empty(0, np.uint64))
    assert (len(component), unchecked) == (0, 0)
