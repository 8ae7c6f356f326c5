"""When verdicts were given, with which settings, and what they were: who goes on until something is told is told it by chance. No torch."""

from __future__ import annotations

from typing import Any

from paris_ray.evaluation.compare_results import Results
from paris_ray.evaluation.compare_verdicts import LEAST_SEEDS, Findings, whole
from paris_ray.storage import Folder

LOOKS = "looks.json"
"""In the comparison's folder."""

SETTINGS = ("seeds", "learning_rates", "guidance_scales")
"""What may grow after a look."""


def keep(results: Results, findings: Findings) -> None:
    """Keep what is told now, beside what was told with other settings before; nothing while no verdict can be given."""
    now = _look(results, findings)
    if now["verdicts"] and len(results.compare.seeds) >= LEAST_SEEDS:
        Folder(results.compare.folder).write_json(LOOKS, {"looks": [*earlier(results), now]})


def earlier(results: Results) -> list[dict[str, Any]]:
    """Looks with other settings, or other choices, than there are now: the first one first."""
    folder = Folder(results.compare.folder)
    return [one for one in folder.read_json(LOOKS)["looks"] if _changes(one, _settings(results))] if folder.exists(LOOKS) else []


def said(results: Results, findings: Findings) -> list[str]:
    """In words, each of them: what was set and told otherwise."""
    now, found = _look(results, findings), []
    for one in earlier(results):
        verdicts = [
            f"{text}: {told}, now {now['verdicts'].get(text, 'not told')}"
            for text, told in one["verdicts"].items()
            if told != now["verdicts"].get(text)
        ]
        found.append(
            f"Verdicts were given before, with {'; '.join(_changes(one, now))}. "
            + (f"Others then: {'; '.join(verdicts)}." if verdicts else "They were the same.")
        )
    return [*found, "Who goes on until something is told is told it by chance more often."] if found else []


def _settings(results: Results) -> dict[str, Any]:
    """What verdicts depend on, and what was chosen for each way: learning rate and guidance."""
    ways = results.ways.values()
    settings = {name: list(getattr(results.compare, name)) for name in SETTINGS}
    return {**settings, "chosen": {way.key: [results.plan.rate(way.row), way.drawing.guidance] for way in ways}}


def _look(results: Results, findings: Findings) -> dict[str, Any]:
    papers, reading, asked = (
        {f"{both[0].pair.text}{more}": both[0].state for both in group if whole(results, both[0].interval)}
        for group, more in ((findings.papers, ""), (findings.reading, ", reading"), (findings.asked, ""))
    )
    return {**_settings(results), "verdicts": {**papers, **reading, **asked}}


def _changes(then: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """Settings and choices of then that are others now; ways that are only there now are no change."""
    found = [f"{name.replace('_', ' ')} {', '.join(f'{one:g}' for one in then[name])}" for name in SETTINGS if then[name] != now[name]]
    ways = [(key, own) for key, own in then["chosen"].items() if now["chosen"].get(key, own) != own]
    return found + [f"{key} at rate {rate:g} and guidance {guidance:g}" for key, (rate, guidance) in ways]
