"""A number with what it means: how it was measured, how sure it is, and what nothing or chance would have given."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from paris_ray.evaluation.intervals import Interval


@dataclass(frozen=True)
class Protocol:
    """How pictures were made and measured; a number without it cannot be compared with another.

    Attributes:
        made: how many pictures, of which model.
        reference: what they are compared with, and how many rows that has; empty where there is no reference.
        prompts: whose captions, how many.
        seeds: how noise was drawn, and how often for each prompt.
        encoder: what judges; empty where nothing is encoded.
        resize: from the picture to what the encoder sees.
        fingerprints: of model, encoder, reference, by name.
    """

    made: str
    prompts: str
    seeds: str
    reference: str = ""
    encoder: str = ""
    resize: str = ""
    fingerprints: Mapping[str, str] = field(default_factory=dict)

    def as_json(self) -> dict[str, Any]:
        return {name: dict(value) if isinstance(value, Mapping) else value for name, value in asdict(self).items() if value}

    def __str__(self) -> str:
        said = [f"{name} {value}" for name, value in self.as_json().items() if name != "fingerprints"]
        return "; ".join([*said, *(f"{name} {value}" for name, value in self.fingerprints.items())])


@dataclass(frozen=True)
class Figure:
    """One number.

    Attributes:
        name: such as ``Fréchet distance (DINOv2 ViT-S/14)``.
        value: it.
        protocol: how it came about.
        interval: its 95 % interval.
        floor: what rows of the reference itself get (:func:`paris_ray.evaluation.intervals.split_floor`).
        chance: what shuffled captions get, or the prior.
    """

    name: str
    value: float
    protocol: Protocol
    interval: Interval | None = None
    floor: Interval | None = None
    chance: float | None = None

    def as_json(self) -> dict[str, Any]:
        found: dict[str, Any] = {"name": self.name, "value": self.value, "protocol": self.protocol.as_json()}
        found |= {} if self.interval is None else {"low": self.interval.low, "high": self.interval.high}
        found |= {} if self.floor is None else {"floor": self.floor.as_json()}
        return found | ({} if self.chance is None else {"chance": self.chance})

    def __str__(self) -> str:
        said = f"{self.name}: {self.value:.4g}"
        if self.interval is not None:
            said += f" (95 %: {self.interval.low:.4g} … {self.interval.high:.4g})"
        if self.floor is not None:
            said += f", floor {self.floor.value:.4g} ({self.floor.low:.4g} … {self.floor.high:.4g})"
        if self.chance is not None:
            said += f", chance {self.chance:.4g}"
        return f"{said} [{self.protocol}]"
