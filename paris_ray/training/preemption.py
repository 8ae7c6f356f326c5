"""A cloud's notice that it will take the machine away, which reaches neither Ray nor the process by itself: a small watcher asks for it.

=======  =====================================================================================  ==========================
cloud    what is asked, on the machine's own metadata address                                   time left, by its documents
=======  =====================================================================================  ==========================
aws      ``/latest/meta-data/spot/instance-action`` (IMDSv2)                                     two minutes
gcp      ``/computeMetadata/v1/instance/preempted``, ``…/maintenance-event``                     30 seconds; 60 minutes
azure    ``/metadata/scheduledevents``                                                           30 seconds
=======  =====================================================================================  ==========================

``AWS_EC2_METADATA_SERVICE_ENDPOINT`` and ``GCE_METADATA_HOST`` name other addresses, as they do for the clouds' own libraries.
"""

from __future__ import annotations

import datetime
import email.utils
import json
import os
import threading
import urllib.error
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

GRACE_S = {"aws": 120.0, "gcp": 30.0, "azure": 30.0}
"""Seconds from a notice to the end, by the clouds' documents."""

EVERY_S = 5.0
TIMEOUT_S = 3.0
STEP_S = 2.5
"""Seconds allowed for a step where nobody knows how long it takes."""

MOST_BYTES = 1 << 20
GOING = ("Preempt", "Terminate", "Redeploy", "Reboot")
"""Azure's events after which the processes of a machine are gone; ``Freeze`` is a pause."""


def loses_nothing(cloud: str, checkpoint_seconds: float, workers: int, step_seconds: float = STEP_S) -> bool:
    """Whether a checkpoint is written between a cloud's notice and the end, outside validation, which is not broken off.

    The notice is seen late, by two requests that may be slow; the step at hand and one that the device has queued are finished; and a checkpoint that
    is being written goes first. Several workers agree to go at a metrics line, which may come too late.
    """
    return workers == 1 and EVERY_S + 2 * (TIMEOUT_S + step_seconds + checkpoint_seconds) <= GRACE_S[cloud]


@dataclass(frozen=True)
class Notice:
    """What the cloud said.

    Attributes:
        text: for people.
        seconds: until the machine goes, as far as it is known.
    """

    text: str
    seconds: float


def _ask(url: str, headers: dict[str, str], method: str = "GET") -> str | None:
    """The answer's text; ``None`` if there is no such thing (404). Raises OSError."""
    request = urllib.request.Request(url, headers=headers, method=method)
    # Without the proxies that the environment may name: the address is the machine's own.
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(request, timeout=TIMEOUT_S) as answer:
            return str(answer.read(MOST_BYTES).decode())
    except urllib.error.HTTPError as error:
        if error.code == 404:
            return None
        raise


def _left(when: datetime.datetime) -> float:
    return max(0.0, (when - datetime.datetime.now(datetime.UTC)).total_seconds())


def aws(base: str | None = None) -> Notice | None:
    """A spot interruption."""
    base = (base or os.environ.get("AWS_EC2_METADATA_SERVICE_ENDPOINT") or "http://169.254.169.254").rstrip("/")
    token = _ask(f"{base}/latest/api/token", {"X-aws-ec2-metadata-token-ttl-seconds": "60"}, "PUT")
    found = _ask(f"{base}/latest/meta-data/spot/instance-action", {"X-aws-ec2-metadata-token": token or ""})
    if found is None:
        return None
    action: dict[str, Any] = json.loads(found)
    when = datetime.datetime.fromisoformat(action["time"].replace("Z", "+00:00"))
    return Notice(f"AWS will {action['action']} this instance at {action['time']}", _left(when))


def gcp(base: str | None = None) -> Notice | None:
    """A preemption, or a host maintenance that ends the machine."""
    base = (base or f"http://{os.environ.get('GCE_METADATA_HOST', 'metadata.google.internal')}").rstrip("/")
    instance, headers = f"{base}/computeMetadata/v1/instance", {"Metadata-Flavor": "Google"}
    if (_ask(f"{instance}/preempted", headers) or "").strip() == "TRUE":
        return Notice("Google Cloud preempts this instance", 30.0)
    if (event := (_ask(f"{instance}/maintenance-event", headers) or "").strip()) == "TERMINATE_ON_HOST_MAINTENANCE":
        return Notice(f"Google Cloud ends this instance for maintenance ({event})", 3600.0)
    return None


def azure(base: str | None = None) -> Notice | None:
    """A scheduled event after which the machine's processes are gone."""
    base = (base or "http://169.254.169.254").rstrip("/")
    found = _ask(f"{base}/metadata/scheduledevents?api-version=2020-07-01", {"Metadata": "true"})
    for event in json.loads(found or "{}").get("Events", []):
        if event.get("EventType") in GOING:
            when = email.utils.parsedate_to_datetime(event["NotBefore"]) if event.get("NotBefore") else None  # empty once it has begun
            return Notice(f"Azure: {event['EventType']} of this machine, not before {event.get('NotBefore') or 'now'}", _left(when) if when else 0.0)
    return None


CLOUDS: dict[str, Callable[[], Notice | None]] = {"aws": aws, "gcp": gcp, "azure": azure}


class Watcher:
    """Asks a cloud for its notice every few seconds, in a thread of its own, until there is one.

    Args:
        cloud: ``aws``, ``gcp`` or ``azure``.
        on_notice: called once, from that thread.
        every: seconds between questions.
    """

    def __init__(self, cloud: str, on_notice: Callable[[Notice], None], every: float = EVERY_S):
        self._look, self._on_notice, self._every, self.cloud = CLOUDS[cloud], on_notice, every, cloud
        self._stop, self._failing = threading.Event(), False
        self._thread = threading.Thread(target=self._run, daemon=True, name="preemption")

    def __enter__(self) -> Watcher:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join(2 * TIMEOUT_S + 1)

    def _run(self) -> None:
        while not self._stop.is_set():
            try:
                notice, self._failing = self._look(), False
            except (OSError, ValueError, KeyError, TypeError) as error:  # no such cloud here, or an answer that is none
                if not self._failing:  # once, not every five seconds
                    print(f"no word from {self.cloud} on interruptions: {type(error).__name__}: {error}; asking on", flush=True)
                notice, self._failing = None, True
            if notice is not None:
                self._on_notice(notice)
                return
            self._stop.wait(self._every)
