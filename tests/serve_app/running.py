"""An application on a real Ray Serve, deployed from a config as an operator would; its processes; clients that never stop asking."""

from __future__ import annotations

import contextlib
import io
import socket
import threading
import time
from base64 import b64decode

import httpx
import numpy as np
import psutil
from PIL import Image

PATH = "/v1/images/generations"


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def wait(condition, seconds=120):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.05)


def processes(application, deployment):
    """Processes of a deployment's replicas, by their title."""
    title = f"ray::ServeReplica:{application}:{deployment}"
    found = []
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            if " ".join(process.cmdline()).startswith(title):
                found.append(process)
    return found


def pixels(item):
    return np.asarray(Image.open(io.BytesIO(b64decode(item["b64_json"]))))


class Application:
    """Deployed with Serve's own config, whose ``deployments`` an operator changes while it serves."""

    def __init__(self, port, name="app", **arguments):
        self.name, self.arguments, self.port = name, arguments, port
        self.url = f"http://127.0.0.1:{port}/{name}"

    def deploy(self, **user_configs):
        """``deploy(ExpertGroup_0={...})``; returns when Serve has taken it."""
        from ray.serve.context import _get_global_client
        from ray.serve.schema import ServeDeploySchema

        changed = [{"name": name.replace("_", "-"), "user_config": config} for name, config in user_configs.items()]
        application = {"name": self.name, "route_prefix": f"/{self.name}", "import_path": "serve_app.app:build", "args": self.arguments}
        config = {"http_options": {"host": "127.0.0.1", "port": self.port}, "applications": [{**application, "deployments": changed}]}
        _get_global_client().deploy_apps(ServeDeploySchema.model_validate(config))

    def ready(self):
        with contextlib.suppress(httpx.HTTPError):
            return httpx.get(f"{self.url}/health/ready", timeout=5).status_code == 200
        return False

    def get(self, path):
        return httpx.get(self.url + path, timeout=30).json()

    def states(self):
        return [one["state"] for one in self.get("/v1/experts")["data"]]

    def whole(self, samplers, **replicas):
        """Whether Serve has so many replicas of deployments running, and each of the samplers says that all experts are ready."""
        from ray import serve

        deployments, heard = serve.status().applications[self.name].deployments, set()
        for word, count in replicas.items():
            name = word.replace("_", "-")
            if deployments[name].replica_states.get("RUNNING", 0) != count or len(self.processes(name)) != count:
                return False
        for _ in range(20 * samplers):  # which one answers is Serve's choice
            said = httpx.get(f"{self.url}/v1/experts", timeout=30)
            if said.status_code != 200 or any(one["state"] != "ready" for one in said.json()["data"]):
                return False
            heard.add(said.json()["load"]["sampler"])
            if len(heard) == samplers:
                return True
        return False

    def idle(self):
        load = self.get("/v1/experts")["load"]
        return (load["queued"], load["active"]) == (0, 0)

    def processes(self, deployment):
        return processes(self.name, deployment)

    def ask(self, timeout=60, **fields):
        return httpx.post(self.url + PATH, json={"prompt": "red apple", **fields}, timeout=timeout)


class Load:
    """Clients that ask for the same few seeds again and again; what each got is kept: ``(when, seconds, status or error, body)``.

    Args:
        application: whom they ask.
        clients: how many.
        fields: of each request, beside the seed.
    """

    def __init__(self, application, clients=4, **fields):
        self.application, self.fields = application, fields
        self.got, self._stop = [], threading.Event()
        self._threads = [threading.Thread(target=self._run, args=(seed,), daemon=True) for seed in range(clients)]

    def __enter__(self):
        for thread in self._threads:
            thread.start()
        try:
            wait(lambda: len(self.answers) >= len(self._threads))
        except BaseException:
            self._stop.set()
            raise
        return self

    def __exit__(self, *_):
        self._stop.set()
        for thread in self._threads:
            thread.join()

    def _run(self, seed):
        while not self._stop.is_set():
            began = time.monotonic()
            try:
                response = self.application.ask(seed=seed, **self.fields)
                outcome, body = response.status_code, response.json() if "json" in response.headers.get("content-type", "") else response.text
            except httpx.HTTPError as error:
                outcome, body = type(error).__name__, None
            self.got.append((began, time.monotonic() - began, outcome, body))

    @property
    def answers(self):
        return [body for *_, outcome, body in self.got if outcome == 200]

    @property
    def failures(self):
        return [(outcome, body) for *_, outcome, body in self.got if outcome != 200]

    def first_answer_after(self, moment):
        """Seconds from a moment to the first answer to a request that was begun after it."""
        ends = [began + seconds for began, seconds, outcome, _ in list(self.got) if outcome == 200 and began > moment]
        return min(ends) - moment if ends else None

    def same_bytes(self, expected):
        """Every answer of all experts has the expected pixels of its seed; returns how many there were."""
        whole = [body for body in self.answers if not body["degraded"]]
        for body in whole:
            np.testing.assert_array_equal(pixels(body["data"][0]), expected[body["seed"]])
        return len(whole)
