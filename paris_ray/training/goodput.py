"""How much of a training's time is steps that count, where machines are taken away. Imports nothing heavy.

J. T. Daly, "A higher order estimate of the optimum checkpoint interval for restart dumps", Future Generation Computer Systems 22 (2006); J. W. Young,
"A first order approximation to the optimum checkpoint interval", Communications of the ACM 17 (1974).
"""

from __future__ import annotations

import math

NEVER = 100.0
"""Of something so many times longer than the time between two interruptions nobody sees the end; a larger exponent would only be no number."""


def goodput(interval: float, write: float, restart: float, between: float | None) -> float:
    """Expected share of the time that is spent in steps which count (Daly), for interruptions that come as a Poisson process.

    It counts a checkpoint as if steps waited until it is written. Here they go on, and an interruption costs the time of a write more instead: less,
    as long as interruptions are rarer than checkpoints.

    Args:
        interval: seconds of steps between two checkpoints.
        write: seconds until a checkpoint is written.
        restart: seconds from an interruption until steps go on.
        between: mean seconds between two interruptions; ``None``: there are none.
    """
    if between is None:
        return interval / (interval + write)
    attempts = math.expm1(min((interval + write) / between, NEVER))
    return interval / (between * math.exp(min(restart / between, NEVER)) * attempts)


def goodput_with_notice(interval: float, write: float, restart: float, between: float | None) -> float:
    """The same where each interruption is announced early enough for a checkpoint: it costs this one and the restart, and no step."""
    lost = 0.0 if between is None else (restart + write) / between
    return interval / (interval + write) / (1.0 + lost)


def best_interval(write: float, between: float) -> float:
    """Young's interval in seconds, √(2 · write · between): what longer ones lose to interruptions, shorter ones lose to writing."""
    return math.sqrt(2 * write * between)
