"""What a training worker sets for its process does not outlast the test that ran one in this process."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch


@pytest.fixture(autouse=True)
def process_as_it_was() -> Iterator[None]:
    threads, deterministic = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()
    yield
    torch.set_num_threads(threads)
    torch.set_flush_denormal(False)  # the sums of k-means, for one, have other last bits with it
    torch.use_deterministic_algorithms(deterministic)
