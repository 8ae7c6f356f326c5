"""What is wrong with a run's store, with tokens and with ports, from facts alone: a function for each question.

The facts are those of :mod:`jobs.store_facts` and :mod:`jobs.access_facts`.
"""

from __future__ import annotations

import re
import urllib.parse
from collections.abc import Iterator
from typing import Any

from jobs.access_facts import is_public
from jobs.findings import Facts, Finding, clouds, fault
from paris_ray.config import RunConfig
from paris_ray.progress import clock
from paris_ray.storage import Folder
from paris_ray.training import memory, preemption
from paris_ray.training.budget import Inputs

WRITE_S = 300.0
"""How long a checkpoint may take where no notice of a preemption is heeded."""
SLOWEST = 1.0
"""MB/s that a store must do at the least."""
SHORT = 4
"""A checkpoint goes up in many parts side by side, the file that is tried in two: so much faster it may be."""
MEASURED_BYTES = 100_000
"""What a smaller file takes says nothing of a rate."""
RENEWED = 0.85
"""Of a token's time, after which there should be another: a kubelet's comes after 80 %, that of multi_cloud/s3_from_gcp.sh after a third."""
TYPICAL = Inputs(4, 32, 77, 768)
"""What a network reads, where the run has no encoders yet; it hardly tells in the size of a checkpoint."""


def storage(facts: Facts) -> Iterator[Finding]:
    """Whether the run's store can be written, gives back what it was given, and is fast enough for checkpoints."""
    for where, one in facts.stores.items():
        name = f"{one['uri']} from {where}"
        if one["error"] is not None:
            yield fault(
                "storage",
                name,
                f"{one['step']}: {one['error']}",
                "a file can be written, read and deleted in the run's directory",
                _store_remedy(one),
            )
            continue
        if not one["same"]:
            yield fault(
                "storage",
                name,
                "what was read has another checksum than what was written",
                "a store gives back what it was given",
                "do not train here: look for a failing disk, a cache or a proxy on the way",
            )
        if not one["deleted"]:
            yield fault(
                "storage",
                name,
                "a file that was deleted is still there",
                "who may write may delete",
                "give the role the right to delete, without which no checkpoint goes and the store fills",
            )
        if one["sees"] is False:
            yield fault(
                "storage",
                name,
                "a file that was written here is not there",
                "all nodes and this machine see one and the same folder",
                "this is another folder than the one seen from here: mount a shared one under this path everywhere, or name an object store",
            )
        if one["bytes"] < MEASURED_BYTES:
            yield Finding("storage", name, "a file can be written, read and deleted")
            continue
        write, read = (one["bytes"] / 1e6 / max(one[key], 1e-6) for key in ("write_s", "read_s"))
        needs, why = _needed(facts.config)
        value = f"writes {write:,.0f} MB/s, reads {read:,.0f}, one file of {one['bytes'] / 1e6:,.0f} MB; {why}"
        if where == "here" and facts.dashboards:
            yield Finding("storage", name, f"writes {write:,.0f} MB/s, reads {read:,.0f}; nothing trains here")
        elif min(write, read) < max(SLOWEST, needs / SHORT):
            yield fault(
                "storage",
                name,
                value,
                f"at least {max(SLOWEST, needs / SHORT):,.3g} MB/s, a quarter of {needs:,.3g}, as checkpoints go up in many parts at once",
                "use a store in the nodes' region, a faster disk, or larger machines (their network grows with them); or train smaller experts",
            )
        else:
            yield Finding("storage", name, value)


def _store_remedy(one: dict[str, Any]) -> str:
    said = one["error"].lower()
    if re.search(r"no space|quota|errno 28|errno 122", said):
        return "free some space or raise the quota: `df -h`; old checkpoints are in RUN/experts/K"
    if re.search(r"read-only|errno 30", said):
        return "mount it for writing, or name another run_dir"
    if re.search(r"permission|denied|forbidden|403|unauthorized|credential|anonymous|errno 13", said):
        return "give this user or the node's role the right to write there (python -m cluster_configs.policies prints it), or name another run_dir"
    if re.search(r"no_such_bucket|bucket does not exist|not found|404|errno 2\b", said):
        return "make the bucket or the folder first, and look at its name and region"
    if re.search(r"not a directory|file exists|errno (17|20)\b", said):
        return "move away the file that stands where a folder belongs"
    if re.search(r"connect|resolve|timed? ?out|timeout|no answer|network", said):
        return "look at AWS_ENDPOINT_URL, the region, DNS and the way out of the nodes' network"
    return "look at the message; `python -m jobs.doctor` on a node says whether it is the same there"


def checkpoint_bytes(config: RunConfig) -> int:
    """The largest checkpoint of a run."""
    try:
        inputs = Inputs.of(Folder(config.run_dir).read_json("encoders/encoders.json"))
    except (OSError, ValueError):
        inputs = TYPICAL
    weights = [memory.expert_weights(one.model, inputs) for one in config.experts]
    return memory.CHECKPOINT_BYTES * max(*weights, memory.router_weights(config.router.model, inputs, config.num_experts))


def _needed(config: RunConfig | None) -> tuple[float, str]:
    """The rate that checkpoints need, in MB/s, and why."""
    if config is None:
        return SLOWEST, "no run was named"
    size, heeded = checkpoint_bytes(config), clouds(config)
    grace = min((_grace(cloud) for cloud in heeded), default=WRITE_S)
    why = f"a notice of {' and '.join(heeded)} leaves" if heeded else "taken as enough are"
    return max(SLOWEST, size / 1e6 / grace), f"the largest checkpoint is about {size / 1e6:,.0f} MB, for which {why} {grace:.0f} s"


def _grace(cloud: str) -> float:
    """The longest that a checkpoint may take so that a preemption loses nothing."""
    return max(float(s) for s in range(1, int(preemption.GRACE_S[cloud])) if preemption.loses_nothing(cloud, float(s), 1, 0.0))


def tokens(facts: Facts) -> Iterator[Finding]:
    """Whether every dashboard wants its token, ours is the right one, and nobody else can read it."""
    for name, one in facts.token_files.items():
        yield from _token_file(f"clusters.{name}.token_file", one, needed=True)
    mode = facts.here.get("auth_mode")
    if facts.token is not None and (mode == "token" or facts.token["state"] != "absent"):
        yield from _token_file("RAY_AUTH_TOKEN_PATH", facts.token, needed=mode == "token")
    if facts.address is not None and mode is None:
        yield fault(
            "tokens",
            "RAY_AUTH_MODE",
            "not set here",
            "the mode is set alike for head, nodes and clients",
            "export RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH=FILE wherever Ray or a client of it starts",
        )
    for node in facts.all_nodes():
        if facts.nodes and node["auth_mode"] != "token":
            yield fault(
                "tokens",
                node["node"],
                f"RAY_AUTH_MODE is {node['auth_mode'] or 'not set'}",
                "every node runs with RAY_AUTH_MODE=token",
                "set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN_PATH in its environment before `ray start`",
            )
    for name, one in facts.dashboards.items():
        where = f"{name} ({one['address']})"
        if not isinstance(one["without"], int):
            yield fault(
                "tokens",
                where,
                f"does not answer: {one['without']}",
                "its dashboard answers from here",
                "start the head, or open the tunnel (ray dashboard, kubectl port-forward); `ray status` on the head says whether it lives",
            )
            continue
        if one["without"] < 400 or one["wrong"] < 400:
            which = "no token" if one["without"] < 400 else "a wrong token"
            yield fault(
                "tokens",
                where,
                f"takes a request with {which}",
                "who has no token runs no code: jobs are refused with 401",
                "end the cluster, set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN_PATH on head and nodes, and start it again",
            )
        elif one["ours"] is None:
            yield fault(
                "tokens",
                where,
                "wants a token, and there is none here",
                "a client has the cluster's token",
                "copy it from the head, and name it: RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH=FILE (clusters.NAME.token_file for another)",
            )
        elif one["ours"] in (401, 403):
            yield fault(
                "tokens",
                where,
                "refuses the token from here",
                "a client has the cluster's own token",
                "copy that cluster's token again (the file that RAY_AUTH_TOKEN_PATH names on its head)",
            )
        elif isinstance(one["ours"], int) and one["ours"] < 400:
            yield Finding("tokens", where, "refuses who has no token or a wrong one, and takes ours")
        else:
            yield fault(
                "tokens",
                where,
                f"answers {one['ours']} to our token",
                "it lists its jobs for who has the token",
                "is it the address of a Ray dashboard, and is the head well? `ray status` there says so",
            )


def _token_file(key: str, one: dict[str, Any], needed: bool) -> Iterator[Finding]:
    where = f"{key} ({one['path']})"
    if one["state"] != "there":
        if needed:
            yield fault(
                "tokens",
                where,
                f"the file is {one['state']}",
                "a file holds the cluster's token",
                "ray get-auth-token --generate; or copy the file from the head",
            )
    elif not one["own"]:
        yield fault("tokens", where, "another user owns it", "who reads a token owns its file", f"sudo chown $(id -un) {one['path']}")
    elif one["mode"] & 0o077:
        yield fault(
            "tokens",
            where,
            f"mode {one['mode']:04o}",
            "only its owner can read it: who has it runs any code on the cluster",
            f"chmod 600 {one['path']}; if others use this machine, make another token, too",
        )
    else:
        yield Finding("tokens", where, f"mode {one['mode']:04o}")


def web_identities(facts: Facts) -> Iterator[Finding]:
    """Whether somebody renews the tokens for which AWS gives nodes their role."""
    for node in facts.all_nodes():
        one = node["web_identity"]
        if one is None:
            continue
        where, value = f"{node['node']}: AWS_WEB_IDENTITY_TOKEN_FILE ({one['path']})", one["error"]
        if value is None and one["left_s"] > (1 - RENEWED) * one["good_s"]:
            yield Finding("tokens", where, f"good for {clock(one['left_s'])} of {clock(one['good_s'])}")
            continue
        if value is None:
            ends = f"it ends in {clock(one['left_s'])}" if one["left_s"] > 0 else f"it ended {clock(-one['left_s'])} ago"
            value = f"{ends}, and was good for {clock(one['good_s'])}"
        yield fault(
            "tokens",
            where,
            value,
            f"a new one is there before {RENEWED:.0%} of its time are over: with one that has ended the store refuses everything",
            "on a machine see that cron runs (`pgrep cron`), and run what it runs, refresh.sh beside the token; in a pod read the kubelet's log",
        )


def ports(facts: Facts) -> Iterator[Finding]:
    """Whether the ports are free that will be needed, and the internet reaches none of Ray's."""
    for one in facts.ports:
        if one["holder"] is not None and not one["ray"]:
            yield fault(
                "ports",
                str(one["port"]),
                f"taken by {one['holder']}",
                "Ray's head and the endpoint find their ports free",
                "end what listens there (`ss -ltnp`), or choose another port (serve.port; ray start --port, --dashboard-port)",
            )
        else:
            yield Finding("ports", str(one["port"]), "free" if one["holder"] is None else f"a Ray listens there: {one['holder']}")
    for name, dashboard in facts.dashboards.items():
        parts = urllib.parse.urlsplit(dashboard["address"])
        if parts.scheme == "http" and is_public(parts.hostname or ""):
            yield fault(
                "ports",
                name,
                f"the dashboard is at a public address, {parts.hostname}",
                "the internet reaches no port of Ray",
                "close it in the firewall, listen on a private address, and come through a tunnel (ray dashboard, ssh -L, kubectl port-forward)",
            )
    for node in facts.all_nodes():
        public = node["public_addresses"]
        if node["cloud"] and not public:
            told = f"a machine of {node['cloud']}, whose public address, if it has one, cannot be seen on it; look in the cloud's console"
            yield Finding("ports", node["node"], told, "not asked")
        wide = [one for one in node["open_ports"] if one["ip"] in ("0.0.0.0", "::", *public)]
        if public and wide:
            listed = ", ".join(f"{one['port']} ({one['process']})" for one in wide[:5])
            yield fault(
                "ports",
                node["node"],
                f"it has the public address {public[0]}, and Ray listens at {listed}",
                "the internet reaches no port of Ray: they are remote code execution",
                "ray start --node-ip-address with a private address; a firewall that lets in only the cluster's nodes",
            )
