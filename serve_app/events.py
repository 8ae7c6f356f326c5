"""A job's events as OpenAI's images API streams them."""

from __future__ import annotations

import asyncio
import base64
import time
from collections.abc import AsyncGenerator
from typing import Any

from serve_app.cards import ModelCard
from serve_app.envelope import internal_error
from serve_app.metrics import BROKEN_STREAMS, Report
from serve_app.pictures import encode, to_file
from serve_app.protocol import ApiError
from serve_app.transport import server_sent
from serve_app.work import Event, Finished, Glimpse, Job, Queued

# Nothing is metered; OpenAI's clients want the field.
USAGE = {"input_tokens": 0, "input_tokens_details": {"image_tokens": 0, "text_tokens": 0}, "output_tokens": 0, "total_tokens": 0}


async def openai_events(
    first: Event, events: AsyncGenerator[Event, None], job: Job, card: ModelCard, format_: str, request_id: str, report: Report
) -> AsyncGenerator[bytes, None]:
    """``image_generation.partial_image`` and ``image_generation.completed``, for each picture; ``error`` ends it early.

    Beyond OpenAI's fields each has the picture's ``index`` and ``seed``; the completed ones what an answer in one piece says of a picture, too.
    """

    def common(file: bytes, index: int) -> dict[str, Any]:
        return {
            "b64_json": base64.b64encode(file).decode(),
            "created_at": int(time.time()),
            "size": card.size,
            "output_format": format_,
            "background": "opaque",
            "quality": "auto",
            "index": index,
            "seed": job.seed,
        }

    try:
        if isinstance(first, Queued) and first.ahead:
            yield _place(first)
        async for event in events:
            if isinstance(event, Queued):
                yield _place(event)
            elif isinstance(event, Glimpse):
                file = await asyncio.to_thread(to_file, event.pixels, format_)
                yield server_sent("image_generation.partial_image", {**common(file, event.index), "partial_image_index": event.number})
            elif isinstance(event, Finished):
                file = await asyncio.to_thread(encode, event.picture, format_, job, card, event.degraded)
                more = {
                    "usage": USAGE,
                    "model": card.id,
                    "routing": event.picture.routing(),
                    "masked_probability": event.picture.masked_probability,
                    "degraded": list(event.degraded),
                    "changed": event.picture.changed,
                    "timings": {"sampler": event.seconds},
                }
                yield server_sent("image_generation.completed", {**common(file, event.picture.index), **more})
    except ApiError as error:
        report(BROKEN_STREAMS, 1, reason=error.code or "error")
        yield server_sent("error", error.body())
    except Exception as error:
        report(BROKEN_STREAMS, 1, reason="internal_error")
        yield server_sent("error", internal_error(error, "while it was streamed", request_id).body())


def _place(queued: Queued) -> bytes:
    """As a comment, which OpenAI's clients pass over."""
    return f": {queued.ahead} ahead\n\n".encode()
