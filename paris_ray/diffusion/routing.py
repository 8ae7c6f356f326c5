"""Names of routing strategies. Imports nothing heavy, so that a front end can check a request without torch."""

from __future__ import annotations

import re
from dataclasses import dataclass


@dataclass(frozen=True)
class Routing:
    """A routing strategy.

    ``top-k`` (k largest, renormalised), ``threshold``, ``full`` (all), ``caption`` (one expert per picture, drawn once from p(k | caption)),
    ``expert-k`` (that one), ``oracle`` (the one of the caption's own cluster, which the caller knows: it has no name in a request, where it is
    ``expert-k``).
    """

    kind: str
    k: int = 0

    @property
    def once_per_picture(self) -> bool:
        """Whether a picture has one expert to its end; otherwise each step is routed anew."""
        return self.kind in ("caption", "expert", "oracle")

    @classmethod
    def parse(cls, text: str, num_experts: int) -> Routing:
        """Read ``top-2``, ``threshold``, ``full``, ``caption`` or ``expert-3``. Raises ValueError that says what is allowed."""
        if text in ("threshold", "full", "caption"):
            return cls(text)
        if match := re.fullmatch(r"(top|expert)-([0-9]{1,6})", text):
            kind, k = match[1], int(match[2])
            if kind == "top" and 1 <= k <= num_experts:
                return cls("top", k)
            if kind == "expert" and 0 <= k < num_experts:
                return cls("expert", k)
        raise ValueError(
            f"routing: {text[:80]!r} is not one of top-1 … top-{num_experts}, threshold, full, caption, expert-0 … expert-{num_experts - 1}"
        )

    def __str__(self) -> str:
        return f"{self.kind}-{self.k}" if self.kind in ("top", "expert") else self.kind
