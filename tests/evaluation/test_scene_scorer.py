"""The scorer against what the scenes were made of, and chance against a count over labels alone."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from PIL import Image
from scipy.ndimage import gaussian_filter

from paris_ray.config import ScenesSource
from paris_ray.data.openmoji import GROUNDS, render
from paris_ray.data.scenes import Scene, Scenes, Thing, vocabulary
from paris_ray.evaluation import scene_scorer
from paris_ray.evaluation.scene_scorer import Reading, SceneScorer

N = 120


@pytest.fixture(scope="module")
def scorer():
    return SceneScorer(list(vocabulary()))


@pytest.fixture(scope="module")
def rows():
    source = Scenes(ScenesSource(seed=3), 32)
    return [source.scene("seen", i) for i in range(N)], np.stack([source.picture("seen", i) for i in range(N)])


@pytest.mark.parametrize(("side", "part"), [(32, "unseen"), (48, "seen"), (64, "seen"), (100, "seen"), (128, "unseen")])
def test_real_rows_are_right(scorer, side, part):
    source = Scenes(ScenesSource(seed=side), side)
    scenes = [source.scene(part, i) for i in range(N)]
    seen = scorer.read(np.stack([source.picture(part, i) for i in range(N)]))
    scores = scene_scorer.score(scenes, seen)
    for name in ("objects", "sizes", "colour", "texture", "clean", "all"):
        assert getattr(scores, name).mean() >= 0.99, name


def matches(scene, other):
    """All six scores of a caption against another row's labels, by hand."""
    labels = {one.place: one for one in other.things}
    n = len(scene.things)
    objects = sum(1 for one in scene.things if one.place in labels and labels[one.place].name == one.name) / n
    sizes = sum(1 for one in scene.things if labels.get(one.place) == one) / n
    colour, texture = float(scene.colour == other.colour), float(scene.texture == other.texture)
    clean = float(all(place in [one.place for one in scene.things] for place in labels))
    return np.array([objects, sizes, colour, texture, clean, float(sizes == 1 and colour and texture and clean)])


def test_shuffled_captions_are_at_chance(scorer, rows):
    scenes, pictures = rows
    seen = scorer.read(pictures)
    # From the labels alone, as every reading is right: the mean over all pairs is that over all permutations.
    expected = np.mean([matches(scene, other) for scene, other in itertools.product(scenes, scenes)], 0)
    found = scene_scorer.chance(scenes, seen)
    np.testing.assert_allclose(list(found.values()), expected, atol=1e-12)
    # One shuffle, as pictures are judged: within five standard errors of it.
    order = np.random.default_rng(0).permutation(N)
    scores = scene_scorer.score([scenes[i] for i in order], seen)
    for name, chance in found.items():
        values = getattr(scores, name)
        assert abs(values.mean() - chance) < 5 * max(values.std(), 0.05) / N**0.5, name
    # And what design says: one thing of 112 at a place that has one in half of the pictures; one colour of 8; one texture of 4.
    assert found["objects"] < 0.02
    assert found["colour"] == pytest.approx(1 / 8, abs=0.03)
    assert found["texture"] == pytest.approx(1 / 4, abs=0.04)
    assert found["all"] == pytest.approx(1 / N, abs=1e-9)  # no caption fits but its own


def test_chance_of_small_sets_is_the_mean_over_their_permutations():
    scenes = [Scene((Thing(name, "large", "top left"),), "blue", "plain") for name in ("fox", "fox", "owl", "egg")]
    seen = [Reading({"top left": Thing(name, "large", "top left")}, "blue", "plain") for name in ("fox", "owl", "owl", "pig")]
    means = [scene_scorer.score(scenes, order).all.mean() for order in itertools.permutations(seen)]
    assert scene_scorer.chance(scenes, seen)["all"] == pytest.approx(np.mean(means)) == pytest.approx(4 / 16)


def falls(values, slack=0.01):
    return all(later <= earlier + slack for earlier, later in itertools.pairwise(values)) and values[-1] < values[0] - 0.3


def test_scores_fall_with_blur_and_noise(scorer, rows):
    scenes, pictures = rows
    pictures, scenes = pictures[:60], scenes[:60]

    def right(changed):
        return scene_scorer.score(scenes, scorer.read(np.clip(np.rint(changed), 0, 255).astype(np.uint8)))

    blurred = [right(gaussian_filter(pictures.astype(float), (0, sigma, sigma, 0))) for sigma in (0.01, 0.7, 1.2, 1.8, 2.6)]
    noise = np.random.default_rng(1).normal(size=pictures.shape)
    noisy = [right(pictures + sigma * noise) for sigma in (0, 20, 60, 100, 160)]
    for ladder in (blurred, noisy):
        assert falls([scores.all.mean() for scores in ladder])
        assert falls([scores.objects.mean() for scores in ladder])
    # A codec blurs by less than half a pixel of 32, and its errors are a few of 255.
    assert blurred[1].all.mean() >= 0.97
    assert noisy[1].all.mean() == 1


def test_a_ground_that_is_darker_than_meant_is_read_as_it_is(scorer, rows):
    """A codec shifts tones. Twenty of 255 darker all over, half of the pictures are wholly right; against the nominal ground a quarter."""
    scenes, pictures = rows
    darker = np.clip(pictures.astype(int) - 20, 0, 255).astype(np.uint8)
    assert scene_scorer.score(scenes, scorer.read(darker)).all.mean() > 0.4


def test_a_picture_pasted_by_hand_is_read(scorer):
    """Drawn by Pillow, at 320 pixels, without any of the source's code but the glyph."""
    picture = Image.new("RGB", (320, 320), GROUNDS["green"])
    for name, width, corner in (("owl", 140, (165, 10)), ("key", 100, (50, 190))):
        glyph = render(vocabulary()[name], 300).resize((width, width), Image.Resampling.LANCZOS)
        picture.paste(glyph, corner, glyph)
    (reading,) = scorer.read(np.asarray(picture)[None])
    assert reading == Reading(
        {"top right": Thing("owl", "large", "top right"), "bottom left": Thing("key", "small", "bottom left")}, "green", "plain"
    )


def test_bare_grounds_and_flat_pictures_have_no_thing(scorer):
    flat = np.stack([np.full((32, 32, 3), colour, np.uint8) for colour in GROUNDS.values()])
    readings = scorer.read(flat)
    assert [one.colour for one in readings] == list(GROUNDS)
    assert all(one.things == {} and one.texture == "plain" for one in readings)
    (black,) = scorer.read(np.zeros((1, 32, 32, 3), np.uint8))
    assert black.texture in ("plain", "striped", "dotted", "checked")


def test_scores_of_what_is_partly_right():
    asked = Scene((Thing("fox", "small", "top left"), Thing("owl", "large", "top right")), "blue", "striped")
    fox = Thing("fox", "large", "top left")

    def scores(things, colour="blue", texture="striped"):
        found = scene_scorer.score([asked], [Reading({one.place: one for one in things}, colour, texture)])
        return [float(getattr(found, name)[0]) for name in ("objects", "sizes", "colour", "texture", "clean", "all")]

    assert scores(asked.things) == [1, 1, 1, 1, 1, 1]
    assert scores([fox, asked.things[1]]) == [1, 0.5, 1, 1, 1, 0]
    assert scores([Thing("owl", "large", "top left"), Thing("fox", "small", "top right")]) == [0, 0, 1, 1, 1, 0]
    assert scores([*asked.things, Thing("egg", "small", "bottom left")], "pink") == [1, 1, 0, 1, 0, 0]
    assert scores([], texture="plain") == [0, 0, 1, 0, 1, 0]


def test_what_cannot_be_read_is_refused(scorer):
    with pytest.raises(ValueError, match="40 × 32; scenes are square"):
        scorer.read(np.zeros((1, 32, 40, 3), np.uint8))
    with pytest.raises(ValueError, match="'dragon' is not of the vocabulary"):
        SceneScorer(["fox", "dragon"])
    with pytest.raises(ValueError, match="same pictures"):
        scene_scorer.score([], [Reading({}, "blue", "plain")])
