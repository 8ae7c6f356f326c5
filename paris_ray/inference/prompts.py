"""Prompts as the models read them, each encoded once."""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from paris_ray.inference.weights import ParisModel

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
        """Encode a prompt; empty gives the model's null text. Alone, so that its bytes do not depend on what else is encoded."""
        if prompt in self._kept:
            self._kept.move_to_end(prompt)
            return self._kept[prompt]
        model, encoder = self.model, self.model.text_encoder
        if prompt == "":
            states, length = model.null_text, model.null_length
        else:
            ids, lengths = encoder.tokenize([prompt])
            states, length = encoder.encode(torch.as_tensor(ids), torch.as_tensor(lengths))[0], int(lengths[0])
        pooled = encoder.pool(states.unsqueeze(0), torch.tensor([length], device=states.device))[0]
        digest = hashlib.sha256(f"{encoder.fingerprint}:{prompt}".encode()).hexdigest()[:32]
        encoded = EncodedPrompt(states.float().to(model.device), pooled.float().to(model.device), digest)
        self._kept[prompt] = encoded
        if len(self._kept) > KEPT:
            self._kept.popitem(last=False)
        return encoded
