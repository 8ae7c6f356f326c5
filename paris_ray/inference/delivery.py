"""Pictures as those who asked get them: previews and results, decoded."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias

import torch
from torch import Tensor

from paris_ray.inference.request import ImageResult, Preview
from paris_ray.inference.rows import Row, Ticket, pick

if TYPE_CHECKING:
    from paris_ray.data.codec import Codec


Fail: TypeAlias = "Callable[[Ticket, Exception], None]"


@dataclass(frozen=True, eq=False)
class Look:
    """A preview to be decoded."""

    ticket: Ticket
    evaluation: int
    t: float
    latent: Tensor


def show(looks: Sequence[Look], codec: Codec, fail: Fail) -> None:
    """Decode and deliver previews; a picture whose preview cannot be delivered fails."""
    if not looks:
        return
    images = codec.decode(torch.stack([look.latent for look in looks]))
    for look, image in zip(looks, images, strict=True):
        try:
            assert look.ticket.preview is not None
            look.ticket.preview(Preview(image, look.evaluation, look.ticket.evaluations, look.t))
        except Exception as error:
            fail(look.ticket, error)


def finish(ended: Sequence[Row], codec: Codec, conclude: Callable[[Ticket, str], bool], fail: Fail) -> None:
    """Decode finished rows and let them leave.

    Args:
        ended: the rows.
        codec: latents → pictures.
        conclude: takes a picture out of the engine; False if it was cancelled meanwhile.
        fail: takes one out that is not finite.
    """
    ended = [row for row in ended if not row.ticket.future.done()]  # of some the preview failed just now
    if not ended:
        return
    latents = torch.stack([row.x for row in ended])
    finite = torch.isfinite(latents).flatten(1).all(1).tolist()
    for row, fine in zip(ended, finite, strict=True):
        if not fine:
            fail(row.ticket, ArithmeticError("the picture has values that are not finite; lower guidance_scale, or check the experts"))
    good = [n for n, fine in enumerate(finite) if fine]
    if not good:
        return
    latents = pick(latents, good)
    images = codec.decode(latents)
    now = time.monotonic()
    for n, latent, image in zip(good, latents.cpu().numpy(), images, strict=True):
        row, ticket = ended[n], ended[n].ticket
        if conclude(ticket, "finished"):
            request, seconds = ticket.request, now - ticket.submitted
            what = (image, request.seed, request.index, row.history, sorted(row.masked), seconds, latent)
            ticket.future.set_result(ImageResult(*what, row.masked_probability, row.versions))
