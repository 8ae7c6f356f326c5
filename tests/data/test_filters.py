import decimal
import math

import pytest

from paris_ray.config import FilterConfig
from paris_ray.data.filters import check_caption, check_key, check_score, check_shape
from paris_ray.data.images import RejectError


@pytest.mark.parametrize(("value", "text"), [("  a\n\tb\0c ", "a b c"), (b"\xef\xbb\xbfcaf\xc3\xa9", "café"), ("x" * 10, "x" * 10)])
def test_captions_that_can_be_used(value, text):
    assert check_caption(value, FilterConfig(max_caption_chars=10)) == text


@pytest.mark.parametrize(("value", "reason"), [
    (None, "no caption: it is null"), (" \n\0", "empty caption"), (b"", "empty caption"), (b"caf\xe9", "undecodable caption"),
    ("\ud800", "undecodable caption"),
    (5, "caption is not text: int"), (["a"], "caption is not text: list"), (math.nan, "caption is not text: float"),
    ("x", r"caption too short: 1 characters, data.filter.min_caption_chars is 2"),
    ("x" * 11, r"caption too long: 11 characters, data.filter.max_caption_chars is 10"),
])  # fmt: skip
def test_captions_that_cannot(value, reason):
    with pytest.raises(RejectError, match=f"^{reason}"):
        check_caption(value, FilterConfig(min_caption_chars=2, max_caption_chars=10))


def test_scores():
    rules = FilterConfig(score_column="aesthetic", min_score=5.5)
    for value in (5.5, 6, decimal.Decimal("5.6"), math.inf):
        check_score(value, rules)
    for value in (None, math.nan, "7", True, [7], 10**400, -(10**400)):
        with pytest.raises(RejectError, match=r"^no score: 'aesthetic' is"):
            check_score(value, rules)
    for value in (5.49, decimal.Decimal(5), -math.inf):
        with pytest.raises(RejectError, match=r"^low score: 'aesthetic' is .*, data.filter.min_score is 5.5"):
            check_score(value, rules)
    check_score(None, FilterConfig())


def test_keys():
    for value in ("a", "", "写真", b"\xff".decode("utf-8", "surrogateescape")):
        assert check_key(value) == value
    for value in ("\ud800", "a" * 1000 + "\udfff"):
        with pytest.raises(RejectError, match=r"^no key: .{,60} is not valid Unicode$"):
            check_key(value)


def test_shapes():
    rules = FilterConfig(min_side=100, max_aspect=2)
    for size in ((100, 100), (200, 100), (100, 200)):
        check_shape(*size, rules)
    for size in ((99, 100), (100, 99)):
        with pytest.raises(RejectError, match=r"^image too small: .*data.filter.min_side is 100"):
            check_shape(*size, rules)
    for size in ((201, 100), (100, 201)):
        with pytest.raises(RejectError, match=r"^image too long: .*data.filter.max_aspect is 2"):
            check_shape(*size, rules)
    check_shape(1, 10_000, FilterConfig())
