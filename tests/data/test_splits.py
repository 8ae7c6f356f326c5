import collections

import numpy as np
from PIL import Image

from paris_ray.config import SplitConfig
from paris_ray.data import splits

from .reading import read


def noise(path, seed, **options):
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (20, 20, 3), dtype=np.uint8)).save(path, **options)


def test_pictures_that_look_alike_share_a_group_and_a_fate(tmp_path):
    for name, seed, caption in (("a", 1, "one"), ("b", 1, "two"), ("c", 1, "one"), ("d", 2, "one")):
        noise(tmp_path / f"{name}.png", seed)
        (tmp_path / f"{name}.txt").write_text(caption)
    noise(tmp_path / "e.webp", 1, lossless=True)  # the same picture in another format
    (tmp_path / "e.txt").write_text("one")
    found = read(tmp_path)
    assert found["a.png"].group == found["b.png"].group == found["c.png"].group == found["e.webp"].group != found["d.png"].group
    assert found["a.png"].id == found["c.png"].id
    assert len({found[name].id for name in ("a.png", "b.png", "d.png", "e.webp")}) == 4
    # Captions of one picture are never divided over splits, whichever they are.
    (tmp_path / "many").mkdir()
    for seed in range(24):
        for caption in ("one", "two"):
            noise(tmp_path / "many" / f"{seed}{caption}.png", seed)
            (tmp_path / "many" / f"{seed}{caption}.txt").write_text(caption)
    found = read(tmp_path / "many", split={"held_out_groups": 0.1, "held_out_rows": 0.3, "validation_rows": 0.3})
    fates = [{found[f"{seed}{caption}.png"].split for caption in ("one", "two")} for seed in range(24)]
    assert all(len(fate) == 1 for fate in fates)
    assert set.union(*fates) == {"train", "validation", "held_out"}


def test_split_shares_and_disjointness():
    split = SplitConfig(held_out_groups=0.1, held_out_rows=0.05, validation_rows=0.1)
    drawn = collections.Counter()
    by_group = collections.defaultdict(set)
    for group in range(4000):
        for row in range(5):
            kind = splits.split_of(split, 3, f"g{group}", f"g{group}r{row}")
            drawn[kind] += 1
            by_group[group].add(kind)
    n = 20_000
    # Expected shares, within five standard deviations (of 4000 groups for the first).
    assert abs(drawn["held_out"] / n - (0.1 + 0.9 * 0.05)) < 5 * (0.1 * 0.9 / 4000) ** 0.5
    assert abs(drawn["validation"] / n - 0.9 * 0.1) < 5 * (0.09 * 0.91 / n) ** 0.5 + 5 * 0.1 * (0.1 * 0.9 / 4000) ** 0.5
    # Whole groups are held out, more of them than would be by rows.
    assert abs(sum(kinds == {"held_out"} for kinds in by_group.values()) / 4000 - 0.1) < 0.024


def test_split_depends_on_seed_and_on_nothing_else():
    split = SplitConfig()
    rows = [(f"g{i // 3}", f"r{i}") for i in range(600)]
    once = [splits.split_of(split, 1, *row) for row in rows]
    assert once == [splits.split_of(split, 1, *row) for row in reversed(rows)][::-1]
    assert once != [splits.split_of(split, 2, *row) for row in rows]
    none = SplitConfig(held_out_groups=0, held_out_rows=0, validation_rows=0)
    assert {splits.split_of(none, 1, *row) for row in rows} == {"train"}


def test_a_source_that_says_what_is_held_out_is_believed():
    split = SplitConfig(held_out_groups=0.3, held_out_rows=0.3, validation_rows=0.1)
    rows = [(f"g{i}", f"r{i}") for i in range(4000)]
    assert {splits.split_of(split, 1, *row, held_out=True) for row in rows} == {"held_out"}
    drawn = collections.Counter(splits.split_of(split, 1, *row, held_out=False) for row in rows)
    assert set(drawn) == {"train", "validation"}
    assert abs(drawn["validation"] / 4000 - 0.1) < 5 * (0.09 / 4000) ** 0.5
