"""How much of a training's time is steps that count, where machines are taken away. Imports nothing heavy.

J. T. Daly, "A higher order estimate of the optimum checkpoint interval for restart dumps", Future Generation Computer Systems 22 (2006); J. W. Young,
"A first order approximation to the optimum checkpoint interval", Communications of the ACM 17 (1974).
"""

from __future__ import annotations

import math

NEVER = 100.0
"""Of something so many times longer than the time between two interruptions nobody sees the end; a larger exponent would only be no number."""


def goodput(interval: float, write: float, restart: float, between: float | None) -> float:
    """Expected share of the time that is spent in steps which count, for interruptions that come as a Poisson process.

    Daly's formula has steps wait until a checkpoint is written. Here they go on, so that writing costs nothing between interruptions, and each of
    these the time of a write, beside the restart: what was done since a checkpoint began that is not whole is lost, too.

    Args:
        interval: seconds of steps between two checkpoints.
        write: seconds until a checkpoint is written.
        restart: seconds from an interruption until steps go on.
        between: mean seconds between two interruptions; ``None``: there are none.
    """
    if between is None:
        return 1.0
    attempts = math.expm1(min(interval / between, NEVER))
    return interval / (between * math.exp(min((restart + write) / between, NEVER)) * attempts)


def goodput_with_notice(write: float, restart: float, between: float | None) -> float:
    """The same where each interruption is announced early enough for a checkpoint: it costs this one and the restart, and no step."""
    return 1.0 if between is None else 1.0 / (1.0 + (restart + write) / between)


def best_interval(write: float, between: float) -> float:
    """Young's interval in seconds, √(2 · write · between): where steps wait for writing, the best; where they do not, short enough and no burden."""
    return math.sqrt(2 * write * between)
