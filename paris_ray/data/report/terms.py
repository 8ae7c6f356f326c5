"""Words that set the captions of each expert apart."""

from __future__ import annotations

import collections
import math
import re
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray


def terms(captions: Sequence[str], expert: NDArray[np.int32], num_experts: int, n: int = 10) -> list[list[tuple[str, float]]]:
    """Words that stand out in each expert's captions, with z-scores, best first.

    Log-odds of a caption having the word, in the cluster against the others, with an informative Dirichlet prior, over its standard deviation
    (Monroe, Colaresi & Quinn 2008, eqs. 16 and 22). Words with z > 1.64 in at least two captions.
    """
    counts = [collections.Counter[str]() for _ in range(num_experts)]
    for caption, k in zip(captions, expert.tolist(), strict=True):
        counts[k].update(set(re.findall(r"[^\W\d_]{2,}", caption.lower())))
    every = sum(counts, collections.Counter[str]())
    total = every.total()
    prior = min(500.0, 0.1 * total) / max(total, 1)
    found = []
    for own in counts:
        n_own, scored = own.total(), []
        for word, y in own.items():
            if every[word] == total:
                continue  # the only word of all captions tells nothing apart, and its odds are infinite
            a, rest = prior * every[word], every[word] - y
            a0 = prior * total
            delta = math.log((y + a) / (n_own + a0 - y - a)) - math.log((rest + a) / (total - n_own + a0 - rest - a))
            z = delta / math.sqrt(1 / (y + a) + 1 / (rest + a))
            if z > 1.64 and y >= 2:
                scored.append((word, z))
        found.append(sorted(scored, key=lambda pair: (-pair[1], pair[0]))[:n])
    return found
