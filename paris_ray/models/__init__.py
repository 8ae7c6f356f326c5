"""The two networks of the paper, as plain torch modules."""

from paris_ray.models.dit import DiT
from paris_ray.models.router import Router

__all__ = ["DiT", "Router"]
