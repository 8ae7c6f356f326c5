"""What a row must be beside readable: its caption, its key, its score, the shape of its image. Each check raises RejectError with the reason."""

from __future__ import annotations

import decimal
import math
from typing import Any

from paris_ray.config import FilterConfig
from paris_ray.data.images import RejectError


def check_caption(value: Any, rules: FilterConfig) -> str:
    """A caption, whatever was found as one, with its white space collapsed."""
    if value is None:
        raise RejectError("no caption: it is null")
    if isinstance(value, bytes):
        try:
            value = value.decode("utf-8-sig")
        except UnicodeDecodeError as error:
            raise RejectError(f"undecodable caption: {error}") from None
    if not isinstance(value, str):
        raise RejectError(f"caption is not text: {type(value).__name__}")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise RejectError("undecodable caption: it is not valid Unicode") from None
    text = " ".join(value.replace("\0", " ").split())
    if not text:
        raise RejectError("empty caption: it has no characters")
    if len(text) < rules.min_caption_chars:
        raise RejectError(f"caption too short: {len(text)} characters, data.filter.min_caption_chars is {rules.min_caption_chars}")
    if len(text) > rules.max_caption_chars:
        raise RejectError(f"caption too long: {len(text)} characters, data.filter.max_caption_chars is {rules.max_caption_chars}")
    return text


def check_key(value: str) -> str:
    """What identifies a row, where its source has that. Bytes of a column that are no UTF-8 are told apart; half a character of JSON has no bytes."""
    try:
        value.encode("utf-8", "surrogateescape")
    except UnicodeEncodeError:
        raise RejectError(f"no key: {value[:40]!r} is not valid Unicode") from None
    return value


def check_score(value: Any, rules: FilterConfig) -> None:
    """A row's score, where the config asks for one."""
    if rules.score_column is None or rules.min_score is None:
        return
    try:
        number = isinstance(value, int | float | decimal.Decimal) and not isinstance(value, bool) and not math.isnan(value)
    except OverflowError:  # JSON has integers beyond all floats
        number = False
    if not number:
        raise RejectError(f"no score: {rules.score_column!r} is {value!r}")
    if value < rules.min_score:
        raise RejectError(f"low score: {rules.score_column!r} is {value:.6g}, data.filter.min_score is {rules.min_score}")


def check_shape(width: int, height: int, rules: FilterConfig) -> None:
    """Width and height of an image, in pixels."""
    short, long = sorted((width, height))
    if short < rules.min_side:
        raise RejectError(f"image too small: {width} × {height}, data.filter.min_side is {rules.min_side}")
    if rules.max_aspect is not None and long > rules.max_aspect * short:
        raise RejectError(f"image too long: {width} × {height}, data.filter.max_aspect is {rules.max_aspect:g}")
