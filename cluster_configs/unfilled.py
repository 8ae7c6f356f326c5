"""What in a file is still to be filled in: accounts, networks, addresses, registries and buckets that stand for yours."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

PLACEHOLDER = re.compile(r"[\w-]+-0{6,}[\da-f]+|my-project|192\.0\.2\.\d+|\b0{12}\b|registry\.example|(?:s3|gs)://bucket\b")
"""What stands in the files of this folder for them."""
WORD = re.compile(rf"[^\s\"'\[\]{{}},]*(?:{PLACEHOLDER.pattern})[^\s\"'\[\]{{}},]*")
"""With what is written around it."""
UNFILLED = "still to be filled in:"


def placeholders(tree: Any) -> list[str]:
    """Those that are left in a file's content."""
    return sorted(set(PLACEHOLDER.findall(_text(tree))))


def places(files: Iterable[Path], tree: Any) -> list[str]:
    """Where they stand: FILE:LINE, and what.

    Args:
        files: of which the content was made; not all that stands in them need be in it, as one may be laid over another.
        tree: the content.
    """
    left = set(WORD.findall(_text(tree)))  # where a file has less, another added a version or a path
    found: dict[tuple[Path, str], list[int]] = {}
    for file in dict.fromkeys(files):
        for number, line in enumerate(file.read_text().splitlines(), start=1):
            said = "" if line.lstrip().startswith("#") else line.partition(" #")[0]
            for word in dict.fromkeys(WORD.findall(said)):
                if any(word in one for one in left):
                    found.setdefault((file, word), []).append(number)
    return [f"{file}:{numbers[0]}: {UNFILLED} {word}{_more(numbers)}" for (file, word), numbers in found.items()]


def ready(left: list[str]) -> str:
    """What is said when nothing is wrong, with what is left to fill in."""
    return f"nothing found, once your own stands for {', '.join(left)}" if left else "nothing found"


def _more(numbers: list[int]) -> str:
    rest = [str(one) for one in numbers[1:]]
    return f" (also in line {', '.join(rest[:3])}{' and later' if rest[3:] else ''})" if rest else ""


def _text(tree: Any) -> str:
    if isinstance(tree, dict):
        return "\n".join(_text(one) for pair in tree.items() for one in pair)
    return "\n".join(_text(one) for one in tree) if isinstance(tree, list) else str(tree)
