"""Check a file for ``ray up`` before machines are paid for, without a cloud.

    python -m cluster_configs.check aws.yaml                                   # the file by itself
    python -m cluster_configs.check aws.yaml --run run.yaml                    # and whether it has what the run's experts ask for, and need
    python -m cluster_configs.check gcp.yaml --run run.yaml --cluster eu       # of those that train in that one of the run's clusters

Run it in the project's folder, as `ray up`. Says what is wrong and what is still to be filled in, a line each; ends with 0 when nothing is, 1 when
something is, 2 for wrong input. Warnings, of what would start and cost more than it need, change nothing of that.
"""

from __future__ import annotations

import argparse
import copy
import re
import shlex
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml

from cluster_configs.check_run import costly, unmet_demands
from cluster_configs.providers import Node, machines, provider_problems, request_problems
from cluster_configs.unfilled import placeholders, places, ready
from paris_ray import config as configs
from paris_ray.config import ConfigError
from paris_ray.config_errors import nearest
from paris_ray.resources import HERE

HEAD_GB = 32
"""Memory of the head: the drivers of eight trainings at 1.5 GB each, Ray's own processes, and 4 GB for the look-alikes of eleven million pictures."""
DISK_GB = 100
"""The least a node's disk has: 20 for the system, 10 for the environment, twice 32 of memory to spill."""
TOKEN, ENV = "~/.ray/auth_token", "~/paris_ray/node.env"


def main(argv: Sequence[str] | None = None) -> int:
    """Check; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m cluster_configs.check", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("files", nargs="+", metavar="FILE", help="what `ray up` would be given")
    parser.add_argument("--run", metavar="CONFIG", help="config of a run: a preset, or a YAML file")
    parser.add_argument("--set", dest="sets", action="append", default=[], metavar="a.b=c", help="as for jobs")
    parser.add_argument("--cluster", default=HERE, metavar="NAME", help=f"which of the run's clusters the file is of (default {HERE})")
    parser.add_argument("--template", action="store_true", help="pass what is still to be filled in, too")
    args = parser.parse_args(argv)
    bad = 0
    try:
        run = configs.load(args.run, args.sets) if args.run else None
        if run is not None and args.cluster not in (HERE, *run.clusters):
            raise ConfigError(
                f"--cluster {args.cluster} is none of the run's.{nearest(args.cluster, run.clusters)} Known: {', '.join([HERE, *run.clusters])}"
            )
        yours = [] if run is None or args.template or not Path(args.run).is_file() else places([Path(args.run)], run.model_dump(mode="json"))
        for file in args.files:
            tree = read(Path(file))
            found, warned = [f"{file}: {one}" for one in problems(tree)], []
            if run is not None and not found:
                found = [f"{file}: {one}" for one in unmet_demands(tree, run, args.cluster)]
                warned = [f"{file}: warning: {one}" for one in costly(tree, run, args.cluster)]
            if not args.template:
                found += places([Path(file)], tree)
            print(*warned, *(found or [f"{file}: {ready(placeholders(tree))}"]), sep="\n")
            bad += bool(found)
        print("".join(f"{one}\n" for one in yours), end="")
        bad += bool(yours)
    except ConfigError as error:
        print(f"{parser.prog}: {error}", file=sys.stderr)
        return 2
    return 1 if bad else 0


class _Loader(yaml.SafeLoader):
    """Refuses a key that is there twice, of which YAML would silently take the last."""

    def construct_mapping(self, node: Any, deep: bool = False) -> Any:
        if isinstance(node, yaml.MappingNode):
            seen = set()
            for key, _ in node.value:
                if key.tag != "tag:yaml.org,2002:merge":
                    name = self.construct_object(key, deep=True)
                    if name in seen:
                        raise yaml.constructor.ConstructorError(None, None, f"the key {name!r} is there twice", key.start_mark)
                    seen.add(name)
        return super().construct_mapping(node, deep)


def read(path: Path) -> dict[str, Any]:
    """A YAML file. Raises ConfigError."""
    try:
        tree = yaml.load(path.read_text(), _Loader)
    except OSError as error:
        raise ConfigError(f"{path} cannot be read ({error.strerror}); name a file for `ray up`") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(tree, dict):
        raise ConfigError(f"{path} holds no settings; name a file for `ray up`")
    return tree


def problems(tree: dict[str, Any], project: Path = Path(".")) -> Iterator[str]:
    """What is wrong with a file for ``ray up``.

    Args:
        tree: its content.
        project: the folder from which `ray up` will be run.
    """
    if (said := _rays_own(tree)) is not None:
        yield said
        return  # the rest would stumble
    provider = tree["provider"]
    yield from provider_problems(provider)
    if provider["type"] != "local":
        yield from _node_types(tree)
    yield from _key(tree)
    yield from _mounts(tree, project)
    yield from _commands(tree)


def _rays_own(tree: dict[str, Any]) -> str | None:
    """What Ray itself says against it."""
    import click
    import jsonschema
    from ray.autoscaler._private.util import prepare_config, validate_config

    kind = tree.get("provider", {}).get("type") if isinstance(tree.get("provider"), dict) else None
    if kind not in (known := ("aws", "gcp", "azure", "local")):
        return f"provider.type is {kind!r}, and must be one of {', '.join(known)}.{nearest(str(kind), known)}"
    try:
        # Without the mounts, of which it warns where one is a file; only Docker minds that.
        mounts: dict[str, Any] = {"file_mounts": {}} if isinstance(tree.get("file_mounts"), dict) else {}
        validate_config(prepare_config(copy.deepcopy({**tree, **mounts})))
    except jsonschema.ValidationError as error:
        return f"{'.'.join(str(one) for one in error.absolute_path) or 'the file'}: {error.message[:300]}"
    except (ValueError, KeyError, RuntimeError, click.ClickException) as error:
        return f"Ray refuses it: {error}"
    return None


def _node_types(tree: dict[str, Any]) -> Iterator[str]:
    provider, head, types = tree["provider"]["type"], tree["head_node_type"], tree["available_node_types"]
    sound = True
    for name, one in types.items():
        node = Node(provider, one["node_config"])
        said = [*request_problems(provider, one["node_config"])]
        sound &= not said
        if not said:
            said += [f"node_config.{text}" for text in (*node.missing(), *node.open_to_the_world())]
            said += _bounds(one, tree["max_workers"], name == head)
            said += _true_of(node, one)
            said += _head(node, one) if name == head else _worker(node)
        yield from (f"available_node_types.{name}.{text}" for text in said)
    if not sound:
        return
    gpus = [Node(provider, one["node_config"]) for one in types.values() if one["resources"].get("GPU")]
    if gpus and not any(node.spot for node in gpus):
        yield "available_node_types: no GPU on spot; experts leave checkpoints, so that they may be taken away, and cost a third"
    if all(one["resources"].get("GPU") for name, one in types.items() if name != head):
        yield "available_node_types: no workers without a GPU; reading, k-means and partition would take machines with one"


def _key(tree: dict[str, Any]) -> Iterator[str]:
    key = str(tree.get("auth", {}).get("ssh_private_key", ""))
    if Path(key).name.startswith("id_"):
        yield (
            f"auth.ssh_private_key is {key}, by its name your own; Ray lays it on the head, where every job can read it. "
            "Make one for this cluster alone: ssh-keygen -t ed25519 -N '' -f ~/.ssh/paris_cluster"
        )


def _bounds(one: dict[str, Any], most: int, head: bool) -> Iterator[str]:
    if "max_workers" not in one:
        yield f"max_workers is not set, and would be the whole cluster's {most}; say how many of these there may be"
    elif head and one["max_workers"]:
        yield f"max_workers is {one['max_workers']}; of the head there is one: 0"
    elif one.get("min_workers", 0) > one["max_workers"]:
        yield f"min_workers is {one['min_workers']}, above max_workers {one['max_workers']}"
    elif one["max_workers"] > most:
        yield f"max_workers is {one['max_workers']}, above the whole cluster's {most}; raise max_workers of the file"


def _true_of(node: Node, one: dict[str, Any]) -> Iterator[str]:
    """Whether resources and labels are what the machine has."""
    from ray._private.label_utils import validate_node_label_syntax

    known, resources, labels = machines(node.provider), one["resources"], one.get("labels", {})
    machine = known.get(node.machine or "")
    if machine is None:
        yield (
            f"node_config: the machine {node.machine!r} is not in cluster_configs/schemas/machines.yaml.{nearest(str(node.machine), known)} "
            "If it exists, put in there what it has"
        )
        return
    try:
        validate_node_label_syntax(labels)
    except ValueError as error:
        yield f"labels: {error}"
    for name, has in (("CPU", machine.cpus), ("GPU", machine.gpus)):
        if resources.get(name, 0) > has:
            yield f"resources.{name} is {resources[name]}, but a {node.machine} has {has}"
    if resources.get("GPU", 0) < machine.gpus:
        yield f"resources.GPU is {resources.get('GPU', 0)}, but a {node.machine} has {machine.gpus}, which would be paid for and not used"
    accelerators = [name.partition(":")[2] for name in resources if name.startswith("accelerator_type:")]
    wanted = [machine.gpu] if machine.gpu else []
    if accelerators != wanted:
        yield f"resources name the accelerator types {accelerators}, but a {node.machine} has {wanted}"
    if labels.get("ray.io/accelerator-type") != machine.gpu:
        yield f"labels.ray.io/accelerator-type is {labels.get('ray.io/accelerator-type')}, but a {node.machine} has {machine.gpu}"
    if machine.gpu_memory and not 0 < int(labels.get("gpu_memory") or 0) <= machine.gpu_memory:
        yield f"labels.gpu_memory is {labels.get('gpu_memory')}, but a {node.machine} has {machine.gpu_memory} GB"
    market = "spot" if node.spot else "on-demand"
    if labels.get("market") != market:
        yield f"labels.market is {labels.get('market')}, but its machines are {market}"
    if node.disk < DISK_GB:
        yield f"node_config: its disk has {node.disk} GB, and needs {DISK_GB} for system, environment and spilled objects"


def _head(node: Node, one: dict[str, Any]) -> Iterator[str]:
    machine = machines(node.provider).get(node.machine or "")
    if node.spot:
        yield "node_config: the head is a spot machine; when it is taken away, all jobs go with it"
    if one["resources"].get("CPU") != 0:
        yield "resources.CPU of the head must be said to be 0, so that no task takes its memory"
    if machine is not None and machine.gpus:
        yield f"node_config: the head has a GPU ({node.machine}), which nothing would use"
    if machine is not None and machine.memory < HEAD_GB:
        yield f"node_config: the head, a {node.machine}, has {machine.memory} GB of memory, and needs {HEAD_GB}"


def _worker(node: Node) -> Iterator[str]:
    if node.spot and not node.has_price_limit:
        yield "node_config: a spot machine without a highest price; set one below what it costs on demand"


def _mounts(tree: dict[str, Any], project: Path) -> Iterator[str]:
    """Files that are copied to the nodes: that they are there, and that nothing is named there that is not copied."""
    mounts = tree.get("file_mounts", {})
    for there, here in mounts.items():
        if not here.startswith("~") and not (project / here).exists():
            yield f"file_mounts.{there}: {here} does not exist; run `ray up` in the project's folder, or name what does"
    if TOKEN not in mounts:
        yield f"file_mounts has no {TOKEN}; without the token nobody gets in, or everybody does"
    if ENV not in mounts:
        yield f"file_mounts has no {ENV}, which turns token authentication on"
    elif (env := project / mounts[ENV]).is_file() and not re.search(r"^export RAY_AUTH_MODE=token$", env.read_text(), re.MULTILINE):
        yield f"{mounts[ENV]} does not say RAY_AUTH_MODE=token; without it whoever reaches Ray's ports runs what he likes"
    commands = [one for key, value in tree.items() if key.endswith("_commands") for one in value]
    for path in sorted({one for text in commands for one in re.findall(r"~/paris_ray/[\w./-]+", text)}):
        if path not in mounts and not any(path.startswith(f"{there}/") for there in mounts):
            yield f"a command names {path}, which is not under file_mounts"
    for text in commands:
        for module in re.findall(r"-m ([a-z_]+\.[\w.]+)", text):
            if not any((project / (module.replace(".", "/") + end)).exists() for end in (".py", "/__init__.py")):
                yield f"a command runs the module {module}, which does not exist"


def _commands(tree: dict[str, Any]) -> Iterator[str]:
    """The commands that start Ray: options that it has, the token, the dashboard on the node itself, a folder to spill to."""
    from ray.scripts.scripts import start

    known = {option for one in start.params for option in (*one.opts, *one.secondary_opts)}
    local = tree["provider"]["type"] == "local"
    for key in ("head_start_ray_commands", "worker_start_ray_commands"):
        commands = [text for text in tree.get(key, []) if "ray start" in text]
        if len(commands) != 1:
            yield f"{key} must hold one `ray start`, and holds {len(commands)}; Ray's own would turn no authentication on"
            continue
        before, _, text = commands[0].partition("ray start")
        words = [one.partition("=") for one in shlex.split(text.split(";")[0]) if one.startswith("-")]
        options = {name: value for name, _, value in words}
        for name in options:
            if name not in known:
                yield f"{key}: `ray start` has no option {name}.{nearest(name, known)}"
        if ENV not in before:
            yield f"{key} does not read {ENV} first, so that Ray starts without a token"
        if not options.get("--object-spilling-directory"):
            yield f"{key} names no --object-spilling-directory; Ray would spill to /tmp"
        if key.startswith("head"):
            if options.get("--dashboard-host", "127.0.0.1") not in ("127.0.0.1", "localhost", "::1"):
                yield f"{key}: --dashboard-host={options['--dashboard-host']} lets others at the dashboard; say 127.0.0.1"
            if "--autoscaling-config" not in options:
                yield f"{key} has no --autoscaling-config, so that no worker would ever start"
            if local and options.get("--num-cpus") != "0":
                yield f"{key} must say --num-cpus=0, so that no task takes the head's memory"


if __name__ == "__main__":
    sys.exit(main())
