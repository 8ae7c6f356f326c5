"""Prompts as the models read them, each encoded once."""

from __future__ import annotations

import contextlib
import hashlib
import logging
from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from paris_ray.inference.weights import ParisModel

logger = logging.getLogger(__name__)

KEPT = 512
"""Encoded prompts kept."""


@dataclass(frozen=True)
class EncodedPrompt:
    """States (S, D) and pooled text (P,), float32 on the model's device, and a digest of the prompt."""

    states: Tensor
    pooled: Tensor
    digest: str


class Prompts:
    """Encodes prompts with a model's text encoder; the latest :data:`KEPT` distinct ones are remembered."""

    def __init__(self, model: ParisModel):
        self.model = model
        self._kept: OrderedDict[str, EncodedPrompt] = OrderedDict()

    @torch.inference_mode()
    def __call__(self, prompt: str) -> EncodedPrompt:
        """Encode a prompt; an empty one gives the model's null text. Alone, so that its bytes do not depend on what else is encoded."""
        if prompt not in self._kept:
            if prompt == "":
                self._keep([""], self.model.null_text.unsqueeze(0), torch.tensor([self.model.null_length]))
            else:
                self._encode([prompt])
        self._kept.move_to_end(prompt)
        return self._kept[prompt]

    @torch.inference_mode()
    def prepare(self, prompts: Iterable[str]) -> None:
        """Encode those of some prompts that are new in one pass, before each is asked for; on a CPU each waits until then."""
        new = [prompt for prompt in dict.fromkeys(prompts) if prompt and prompt not in self._kept]
        if self.model.device.type != "cpu" and len(new) > 1:
            # If it fails, asking for each alone will show whose fault it is.
            with contextlib.suppress(Exception):
                self._encode(new)

    def _encode(self, prompts: list[str]) -> None:
        encoder = self.model.text_encoder
        for prompt, count in zip(prompts, encoder.count(prompts), strict=True):
            if count > encoder.max_length:
                short = prompt if len(prompt) <= 60 else f"{prompt[:60]}…"
                logger.warning("prompt %r has %d tokens; the model reads the first %d", short, count, encoder.max_length)
        ids, lengths = (torch.as_tensor(array) for array in encoder.tokenize(prompts))
        self._keep(prompts, encoder.encode(ids, lengths), lengths)

    def _keep(self, prompts: list[str], states: Tensor, lengths: Tensor) -> None:
        """Remember prompts by their states (N, S, D) and numbers of tokens (N,)."""
        encoder, device = self.model.text_encoder, self.model.device
        pooled = encoder.pool(states, lengths.to(states.device))  # (N, P)
        for prompt, one, vector in zip(prompts, states.float().to(device), pooled.float().to(device), strict=True):
            digest = hashlib.sha256(f"{encoder.fingerprint}:{prompt}".encode()).hexdigest()[:32]
            self._kept[prompt] = EncodedPrompt(one, vector, digest)
        while len(self._kept) > max(KEPT, len(prompts)):
            self._kept.popitem(last=False)
