"""Deploys a model on a local cluster through Ray Serve's REST API. Imports no Ray."""

from __future__ import annotations

import ipaddress
import math
import os
import socket
import time
import urllib.error
import urllib.request
from typing import Any

import psutil

from jobs.local_cluster import ClusterError, LocalCluster
from paris_ray import stages
from paris_ray.config import ConfigError, RunConfig
from paris_ray.manifest import published
from paris_ray.placement import serve_groups

APPLICATION = "paris"
READY_SECONDS = 400.0
KEYS = ("PARIS_API_KEYS_FILE", "PARIS_API_KEYS")


def deploy(cluster: LocalCluster, config: RunConfig, port: int) -> str:
    """Ask for the application; returns its URL at once, :func:`wait_ready` waits for it.

    Where Serve runs on the cluster already, it keeps listening where it does.

    Raises:
        ClusterError: the cluster refused or did not answer.
    """
    options = config.serve.model_dump(mode="json")
    host = options.pop("host")
    options.pop("port")
    if options.pop("contact_sheets"):
        options["clusters"] = stages.folder(config, "partition").uri
    # Serve compares arguments only: without it, a model made anew in the same folder would not be loaded.
    options["revision"] = (published(stages.folder(config, "assemble")) or {}).get("fingerprint", "")
    application = {
        "name": APPLICATION,
        "route_prefix": "/",
        "import_path": "serve_app.app:build",
        "args": {"model": stages.folder(config, "assemble").uri, **options},
    }
    try:
        found = cluster.request("/api/serve/applications/", timeout=120.0) or {}
        running = found.get("http_options") or {}
        host, port = running.get("host", host), running.get("port", port)
        body = {"proxy_location": "HeadOnly", "http_options": {"host": host, "port": port}, "applications": [application]}
        cluster.request("/api/serve/applications/", body, method="PUT", timeout=120.0)
    except OSError as error:
        said = error.read().decode(errors="replace")[:2000] if isinstance(error, urllib.error.HTTPError) else ""
        raise ClusterError(f"the model could not be deployed: {error} {said}".rstrip()) from error
    return f"http://{'127.0.0.1' if host == '0.0.0.0' else host}:{port}"


def cpus(config: RunConfig) -> int:
    """CPUs that a cluster of its own must hand out for the application to fit; Ray counts them and pins nothing."""
    own = config.serve.cpus
    groups = [group.most_replicas * (own if group.cpus is None else group.cpus) for group in serve_groups(config.serve.placement, config.num_experts)]
    return max(os.cpu_count() or 2, math.ceil(sum(groups or [own]) + 1.0 + 1.0))  # the sampler, and a little for the others


def check_exposed(config: RunConfig) -> None:
    """Raise ConfigError when other machines could reach the endpoint and no API key would be asked for."""
    host = config.serve.host
    local = host == "localhost" or (is_address(host) and ipaddress.ip_address(host).is_loopback)
    if not local and not any(os.environ.get(name) for name in KEYS):
        raise ConfigError(
            f"serve.host: {host} can be reached from other machines, and no API key is set; name a file of keys (PARIS_API_KEYS_FILE=FILE, one a "
            "line), or keep 127.0.0.1"
        )


def is_address(host: str) -> bool:
    """Whether a host is given as an IP address."""
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True


def wait_ready(cluster: LocalCluster, url: str) -> None:
    """Wait until the application answers ``/health/ready`` with 200.

    Raises:
        ClusterError: it could not be deployed, or is not ready after :data:`READY_SECONDS`.
    """
    deadline = time.monotonic() + READY_SECONDS
    while time.monotonic() < deadline:
        found = application(cluster)
        # Both: while a model is replaced, the old one still answers.
        if found.get("status") == "RUNNING" and answers(f"{url}/health/ready"):
            return
        if found.get("status") == "DEPLOY_FAILED":
            raise ClusterError(f"the model could not be deployed: {found.get('message')}")
        time.sleep(0.5)
    raise ClusterError(f"{url}/health/ready did not answer within {READY_SECONDS:.0f} s: {application(cluster)}")


def application(cluster: LocalCluster) -> dict[str, Any]:
    """What Serve says about the application: its status and message."""
    try:
        found = cluster.request("/api/serve/applications/")
    except OSError:
        return {}
    return dict((found or {}).get("applications", {}).get(APPLICATION, {}))


def changed_keys(cluster: LocalCluster) -> str:
    """Which setting of API keys differs between this process and the cluster's, whose processes read it; empty if none does."""
    theirs = psutil.Process(cluster.state["pid"]).environ()
    return " and ".join(name for name in KEYS if theirs.get(name) != os.environ.get(name))


def answers(url: str) -> bool:
    """Whether a URL answers with a 2xx."""
    try:
        with urllib.request.urlopen(url, timeout=5):
            return True
    except OSError:
        return False


def free_port(host: str, wanted: int) -> int:
    """The wanted port, or any free one when somebody listens on it."""
    for port in (wanted, 0):
        with socket.socket() as one:
            one.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                one.bind((host, port))
            except OSError:
                continue
            return int(one.getsockname()[1])
    raise ClusterError(f"no free port on {host}")
