"""What a verification of a released checkpoint found, and its report in Markdown, fit to post."""

from __future__ import annotations

import platform
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from paris_ray.storage import Folder


@dataclass(frozen=True)
class Check:
    """One thing that was looked at: whether it holds, and what was found."""

    name: str
    holds: bool
    found: str


@dataclass(frozen=True)
class Drawn:
    """A picture: its routing, PNG, and the checksum of its pixels."""

    routing: str
    png: bytes
    sha256: str
    seconds: float
    shares: list[float]


@dataclass
class Report:
    """All of it.

    Attributes:
        name: of the model.
        checks: in the order they were made.
        files: name, bytes, sha256.
        networks: rows of the table of networks.
        pictures: one per routing, if they were asked for.
        options: what was asked for that is not the rule.
        settings: how the pictures were drawn.
    """

    name: str = "unknown"
    checks: list[Check] = field(default_factory=list)
    files: list[tuple[str, int, str]] = field(default_factory=list)
    networks: list[tuple[str, ...]] = field(default_factory=list)
    pictures: list[Drawn] = field(default_factory=list)
    options: str = ""
    settings: str = ""

    @property
    def holds(self) -> bool:
        """Whether everything does."""
        return bool(self.checks) and all(check.holds for check in self.checks)

    def attempt(self, name: str, look: Callable[[], str]) -> bool:
        """Make a check; an error is its failure, and the next one follows all the same."""
        try:
            self.checks.append(Check(name, True, look()))
        except Exception as error:
            self.checks.append(Check(name, False, f"{type(error).__name__}: {error}"))
        return self.checks[-1].holds


def markdown(report: Report, took: float | None = None) -> str:
    """The report as Markdown, fit to post: no paths of the machine it was made on."""
    import torch

    import paris_ray

    failed = [check for check in report.checks if not check.holds]
    verdict = f"**All {len(report.checks)} checks hold.**" if report.holds else f"**{len(failed)} of {len(report.checks)} checks fail.**"
    system = f"paris_ray {paris_ray.__version__}, torch {torch.__version__}, Python {platform.python_version()}, {platform.system()}"
    lines = [f"# Verification of {_cell(report.name)}", "", verdict, "", system + (f", {took:.0f} s" if took is not None else ""), ""]
    if report.options:
        lines += [f"Run with {_cell(report.options)}.", ""]
    if failed:
        lines += ["## What fails", "", *(f"- **{_cell(check.name)}**: {_cell(check.found)}" for check in failed), ""]
    lines += ["## Networks", "", *_table(("network", "tensors", "types", "parameters", "as published", "loads strictly"), report.networks), ""]
    if report.pictures:
        rows = [(d.routing, f"{d.seconds:.1f} s", " ".join(f"{100 * s:.0f}" for s in d.shares), f"`{d.sha256}`") for d in report.pictures]
        lines += [
            "## Pictures",
            "",
            report.settings,
            "",
            *_table(("routing", "time", "% of the weight, by expert", "sha256 of the pixels"), rows),
            "",
        ]
    lines += ["## Checks", "", *_table(("check", "", "found"), [(c.name, "holds" if c.holds else "**fails**", c.found) for c in report.checks]), ""]
    lines += ["## Files", "", *_table(("file", "bytes", "sha256"), [(name, f"{size:,}", f"`{digest}`") for name, size, digest in report.files])]
    return "\n".join(lines) + "\n"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    return [f"| {' | '.join(map(_cell, row))} |" for row in (head, ["---"] * len(head), *rows)]


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


def hide_path(text: str, path: str) -> str:
    """A report without the folder that was checked, which may say whose machine it is."""
    return text.replace(Folder(path).uri + "/", "").replace(Folder(path).uri, "the checkpoint")


def write(report: Report, text: str, out: str) -> None:
    """Write ``report.md`` and the pictures into a folder."""
    folder = Folder(out)
    for drawn in report.pictures:
        folder.write_bytes(f"{drawn.routing}.png", drawn.png)
    folder.write_bytes("report.md", text.encode())
