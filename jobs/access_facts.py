"""Who can come in: tokens, ports, dashboards; and what a cloud lets an account have. Facts, which :mod:`jobs.access_checks` judges."""

from __future__ import annotations

import base64
import ipaddress
import json
import os
import re
import socket
import stat
import time
import urllib.error
import urllib.request
import uuid
from http.client import HTTPException
from pathlib import Path
from typing import Any

import psutil


def public_addresses() -> list[str]:
    """Addresses of this machine that the whole internet can route to."""
    found = [address.address.partition("%")[0] for addresses in psutil.net_if_addrs().values() for address in addresses]
    return sorted({one for one in found if is_public(one)})


def is_public(host: str) -> bool:
    """Whether a host is given as an address that the whole internet can route to."""
    try:
        return ipaddress.ip_address(host).is_global
    except ValueError:
        return False


def open_ports() -> list[dict[str, Any]]:
    """Where this user's processes of Ray listen, and not on loopback alone."""
    found = {}
    for process in psutil.process_iter():
        try:
            name = " ".join(process.cmdline()[:3])
            if not re.search(r"gcs_server|raylet|dashboard|ray::|ray\b", name):
                continue
            for one in process.net_connections("tcp"):
                ip = one.laddr.ip.removeprefix("::ffff:") if one.laddr else ""
                if one.status == psutil.CONN_LISTEN and not ipaddress.ip_address(ip).is_loopback:
                    found[ip, one.laddr[1]] = process.name()
        except (psutil.Error, OSError, ValueError):
            continue
    return [{"ip": ip, "port": port, "process": process} for (ip, port), process in sorted(found.items())]


def token_file() -> Path | None:
    """The file that Ray's clients would take their token from; ``None`` where ``RAY_AUTH_TOKEN`` holds it."""
    if os.environ.get("RAY_AUTH_TOKEN"):
        return None
    return Path(os.environ.get("RAY_AUTH_TOKEN_PATH") or "~/.ray/auth_token").expanduser()


def token() -> str | None:
    """The token that Ray's clients would take here, ``None`` without one."""
    path = token_file()
    return os.environ["RAY_AUTH_TOKEN"] if path is None else read_token(path)


def read_token(path: str | Path) -> str | None:
    """What a file of a token holds, ``None`` if that cannot be read."""
    try:
        return Path(path).expanduser().read_text().strip() or None
    except (OSError, UnicodeDecodeError):
        return None


def token_of_file(path: Path) -> dict[str, Any]:
    """Whose a file of a token is, who may read it, and what is in it: ``state`` is ``there``, ``absent``, ``unreadable`` or ``empty``."""
    found: dict[str, Any] = {"path": str(path), "state": "there", "mode": None, "own": None}
    try:
        info = path.stat()
        found |= {"mode": stat.S_IMODE(info.st_mode), "own": info.st_uid == os.getuid()}
        if not path.read_text().strip():
            found["state"] = "empty"
    except FileNotFoundError:
        found["state"] = "absent"
    except (OSError, UnicodeDecodeError):
        found["state"] = "unreadable"
    return found


def web_identity() -> dict[str, Any] | None:
    """The token for which AWS gives a role, if its file is named here: for how many seconds it is good in all (``good_s``) and still (``left_s``).

    Somebody puts a new one there before it ends: cron on another cloud's machine, the kubelet in a pod.
    """
    path = os.environ.get("AWS_WEB_IDENTITY_TOKEN_FILE")
    if not path:
        return None
    found: dict[str, Any] = {"path": path, "good_s": None, "left_s": None, "error": None}
    try:
        payload = Path(path).read_text().strip().split(".")[1]
        told = json.loads(base64.urlsafe_b64decode(payload + "=" * (-len(payload) % 4)))
        found |= {"good_s": float(told["exp"] - told["iat"]), "left_s": told["exp"] - time.time()}
    except OSError as error:
        found["error"] = error.strerror or type(error).__name__
    except (ValueError, IndexError, KeyError, TypeError):  # whose message may hold some of it
        found["error"] = "it holds no token (JWT) that says when it ends"
    return found


def dashboard(address: str, token: str | None, timeout: float = 10.0) -> dict[str, Any]:
    """What a dashboard answers to a question about its jobs: with no token, a wrong one, ours. Codes of HTTP, or why none came."""

    def ask(told: str | None) -> int | str:
        headers = {} if told is None else {"Authorization": f"Bearer {told}"}
        try:
            with urllib.request.urlopen(urllib.request.Request(f"{address.rstrip('/')}/api/jobs/", headers=headers), timeout=timeout) as answer:
                return int(answer.status)
        except urllib.error.HTTPError as error:
            return error.code
        except (OSError, HTTPException, ValueError) as error:  # nobody, somebody who speaks no HTTP, no such URL
            return " ".join(str(getattr(error, "reason", error)).split()) or type(error).__name__

    return {"address": address, "without": ask(None), "wrong": ask(uuid.uuid4().hex * 2), "ours": ask(token) if token else None}


def port(number: int) -> dict[str, Any]:
    """Who listens at a port of this machine: ``holder`` is ``None`` for nobody, else the process, or ``somebody``."""
    with socket.socket() as one:
        one.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            one.bind(("127.0.0.1", number))
            return {"port": number, "holder": None, "ray": False}
        except OSError:
            pass
    holder, ray = "somebody", False
    try:
        for found in psutil.net_connections("tcp"):
            if found.status == psutil.CONN_LISTEN and found.laddr and found.laddr[1] == number and found.pid:
                process = psutil.Process(found.pid)
                holder, ray = f"{process.name()} (process {found.pid})", bool(re.search(r"gcs_server|raylet|ray[/:.]", " ".join(process.cmdline())))
                break
    except psutil.Error:
        pass
    return {"port": number, "holder": holder, "ray": ray}


AWS_QUOTAS = {
    "L-1216C47A": "on-demand Standard",
    "L-34B43A08": "spot Standard",
    "L-DB2E81BA": "on-demand G and VT",
    "L-3819A6DF": "spot G and VT",
    "L-417A185B": "on-demand P",
    "L-7212CCBC": "spot P4, P3 and P2",
    "L-C4BD4855": "spot P5",
}
"""EC2's quotas of vCPUs by their codes."""


def quotas(cloud: str) -> dict[str, float] | str:
    """What a cloud lets this account have at once, by name; or why it was not asked."""
    if cloud != "aws":
        return f"no reader for {cloud}'s quotas; look at them in its console"
    try:
        import boto3
    except ImportError:
        return "boto3 is not installed here"
    try:
        client = boto3.client("service-quotas")
        return {name: float(client.get_service_quota(ServiceCode="ec2", QuotaCode=code)["Quota"]["Value"]) for code, name in AWS_QUOTAS.items()}
    except Exception as error:  # no region, no credentials, no right to ask: botocore has a class for each
        return f"{type(error).__name__}: {' '.join(str(error).split())}"[:200]
