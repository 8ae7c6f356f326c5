"""What all benchmarks write: the command, and a Markdown file of what was printed."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path


def command() -> str:
    """The command that makes this table again, as Markdown."""
    return f"`python benchmarks/{Path(sys.argv[0]).name} {' '.join(sys.argv[1:])}`"


def write(out: Path | None, lines: Sequence[str]) -> None:
    """Write the lines to a file, if one is asked for."""
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text("\n".join([*lines, ""]))
