"""What all job scripts share: arguments, errors in one line, the dry run, the stage's lock, the connection to Ray."""

from __future__ import annotations

import argparse
import contextlib
import logging
import os
import secrets
import signal
import sys
from collections.abc import Callable, Iterator, Sequence

import yaml

from jobs import checks
from paris_ray import config as configs
from paris_ray import stages
from paris_ray.config import ConfigError, RunConfig
from paris_ray.data.report import cost
from paris_ray.diffusion.routing import Routing
from paris_ray.lock import Lock, LockedError
from paris_ray.manifest import StaleError, Status
from paris_ray.opening import absolute, heard, open_folder, why
from paris_ray.storage import Folder

CONFIG = "config.yaml"
USER_ERROR = 2
INTERRUPTED = 130
STOPPED = 3
"""Exit code of what ended in order before it was done, because somebody asked or a limit was reached."""
LOCK_SECONDS = 60.0
"""How long a job waits for another that writes the same stage: one whose cluster has just died may take so long to notice."""

Action = Callable[[RunConfig, argparse.Namespace], int | None]
"""What a job does; returns its exit code, ``None`` for 0."""


def run(parser: argparse.ArgumentParser, action: Action, argv: Sequence[str] | None, stage: str | Callable[[argparse.Namespace], str]) -> int:
    """The body of a job script: ``return cli.run(parser, action, argv, stage="embed")``.

    Adds the arguments of :func:`paris_ray.config.add_arguments`, loads the config, answers ``--dry-run``, checks what can be checked
    (:mod:`jobs.checks`), writes ``RUN/config.yaml``, takes the stage's lock, clears the stage's folders if ``--rebuild`` names it, and calls
    ``action(config, args)``. A wrong config, a stale or locked folder or a missing parent is one message on stderr and exit code 2, Ctrl-C exit
    code 130; any other error keeps its traceback.

    Args:
        parser: with the job's own arguments, if any.
        action: the work.
        argv: arguments without the program's name; ``None`` takes the process's.
        stage: the stage's name (:mod:`paris_ray.stages`), or how to tell it from the arguments.
    """
    configs.add_arguments(parser)
    args = parser.parse_args(argv)
    name = stage if isinstance(stage, str) else stage(args)
    try:
        config = load(args, [name])
        with heard("run_dir", config.run_dir):
            if args.dry_run:
                print_plan(config, args.rebuild)
                return 0
            checks.check(config, name, args.rebuild)
        with config_of_run(config, name, args.rebuild), Lock(stages.folder(config, name), f"the stage {name}", wait=LOCK_SECONDS):
            if name in args.rebuild:
                clear(config, name)
            return action(config, args) or 0
    except (ConfigError, StaleError, LockedError, checks.MissingParentError) as error:
        return complain(parser, error)
    except KeyboardInterrupt:  # how far it was, its progress has said
        return INTERRUPTED


def complain(parser: argparse.ArgumentParser, error: Exception) -> int:
    """Print a user's error, without a traceback; returns the exit code 2."""
    print(f"{parser.prog.removeprefix('python -m jobs.')}: {error}", file=sys.stderr)
    return USER_ERROR


def load(args: argparse.Namespace, stages_named: Sequence[str] = (), opened: bool = True) -> RunConfig:
    """The run's config from the arguments, with local paths made absolute: workers have another working directory.

    Args:
        args: those of :func:`paris_ray.config.add_arguments`.
        stages_named: by other arguments.
        opened: whether the run directory's store must open.

    Raises:
        ConfigError: also for a stage, in ``stages_named`` or ``--rebuild``, that the run does not have.
    """
    config = configs.load(args.config, args.sets)
    tree = config.model_dump(mode="json")
    tree["run_dir"] = open_folder("run_dir", config.run_dir).uri if opened else absolute(config.run_dir)
    try:
        Routing.parse(config.sampling.routing, config.num_experts)
    except ValueError as error:
        raise ConfigError(f"sampling.{error}") from None
    for cluster in tree["clusters"].values():
        if file := cluster["token_file"]:
            cluster["token_file"] = os.path.abspath(os.path.expanduser(file))
    data = tree["data"]
    named = [(data["source"], "uri"), (data["source"], "images"), (data["codec"], "source"), (data["text"], "source"), (data["embedding"], "weights")]
    for part, key in [*named, *((expert, "init_from") for expert in (tree["expert"], *tree["experts"], tree["router"]))]:
        value = part.get(key)
        if value and "://" not in value and os.path.exists(os.path.expanduser(value)):
            part[key] = os.path.abspath(os.path.expanduser(value))
    scheme, _, folder = str(data["embedding"].get("model")).partition("local-dir:")
    if folder and not scheme:
        data["embedding"]["model"] = f"local-dir:{os.path.abspath(os.path.expanduser(folder))}"
    config = configs.build(tree)
    allowed = [*stages.names(config), "evaluate"]
    for name in [*stages_named, *args.rebuild]:
        if name not in allowed:
            raise ConfigError(f"{name!r} is not a stage of this run; its stages are {', '.join(allowed)}")
    return config


def train(name: str, args: argparse.Namespace, config: RunConfig, action: Callable[[RunConfig], object]) -> int:
    """The body of a job that trains: connect, train, say why not; returns the exit code.

    Args:
        name: the stage.
        args: with ``fallback``, see :func:`add_fallback`.
        config: the run's.
        action: the training.
    """
    from paris_ray.training.launch import TrainingError
    from paris_ray.training.stopping import StoppedError

    if args.fallback:
        config = config.on_fallback(name)
    connect()
    try:
        action(config)
    except TrainingError as error:
        print(error, file=sys.stderr)
        return USER_ERROR  # another try would end the same
    except StoppedError as error:
        print(error, file=sys.stderr)
        return STOPPED
    return 0


def add_fallback(parser: argparse.ArgumentParser) -> None:
    """The argument of jobs that train."""
    parser.add_argument("--fallback", action="store_true", help="ask for the machine under resources.fallback")


# -- the plan -----------------------------------------------------------------------------------------------------------


def parts(config: RunConfig, name: str) -> list[str]:
    """The manifests that a job writes, in their order: ``embed`` fits the encoders first, ``partition`` writes a shard per expert."""
    if name == "embed":
        return ["encoders", "embed"]
    if name == "partition":
        return [*(f"shard-{k}" for k in range(config.num_experts)), "partition"]
    return [name]


def status(config: RunConfig, name: str) -> Status:
    """What a job would do now: :func:`paris_ray.stages.status` over all manifests that it writes."""
    found = [stages.status(config, part) for part in parts(config, name)]
    for state in ("damaged", "stale"):
        bad = [(part, one) for part, one in zip(parts(config, name), found, strict=True) if one.state == state]
        if bad:
            parts_of = {reason: part for part, one in reversed(bad) for reason in one.reasons}  # the first of those that say the same
            reasons = tuple(f"{part}: {reason}" for part, one in bad for reason in one.reasons if parts_of[reason] == part)
            return Status(state, reasons, found[-1].manifest)
    states = {one.state for one in found}
    if name == "embed" and found[0].state == "absent":
        return Status("absent")
    if len(states) == 1:
        return found[-1]
    return Status("partial", (), found[-1].manifest)


PLAN = {"absent": "run", "partial": "resume", "valid": "skip", "stale": "refuse", "damaged": "refuse", "waiting": "run after its parents"}


def print_plan(config: RunConfig, rebuild: Sequence[str] = (), names: Sequence[str] | None = None) -> None:
    """Print the resolved config, what each stage, or each of ``names``, would do, and what training would cost."""
    print(configs.dump(config))
    print(f"{'stage':<16}{'found':<10}would")
    for name in names or [*stages.names(config), "evaluate"]:
        found, would, problem = status(config, name), "", ""
        if name == "partition":
            try:
                checks.check_clusters(config, rebuild)
            except ConfigError as error:
                would, problem = "refuse", f"    {error}\n"
        would = would or ("delete it, make it anew" if name in rebuild and found.state != "absent" else PLAN[found.state])
        print(f"{name:<16}{found.state:<10}{would}\n{problem}", end="")
        if found.state in ("stale", "damaged") and name not in rebuild:
            print("".join(f"    {reason}\n" for reason in found.reasons), end="")
        print("".join(f"    {note}\n" for note in found.notes), end="")
    print_cost(config)


def print_cost(config: RunConfig) -> None:
    """Print what training would cost with this config, once the clusters are known; how it is estimated stands in ``clusters/report.html``."""
    run = Folder(config.run_dir)
    try:
        sizes, encoders = stages.cluster_sizes(config), run.read_json("encoders/encoders.json")
    except FileNotFoundError:
        return
    if len(sizes) != config.num_experts:
        return  # of another number of experts: the plan above refuses it
    found = cost.estimate(config, sizes, encoders)
    devices = list(found["peak_tflops"])
    print(f"\n{'training':<16}{'images':>12}{'passes':>10}{'PFLOP':>12}" + "".join(f"{'one ' + device:>14}" for device in devices))
    for line in found["stages"]:
        hours = "".join(f"{cost.time_text(line['gpu_hours'][device]):>14}" for device in devices)
        print(f"{line['stage']:<16}{line['images']:>12}{line['passes']:>10.1f}{line['flops'] / 1e15:>12.4g}{hours}")
    print(f"Times are estimates, at {found['mfu']:.0%} of a device's bfloat16 peak; small models reach far less.")
    print("".join(f"{warning}\n" for warning in cost.warnings(found)), end="")


def refused(config: RunConfig, rebuild: Sequence[str] = ()) -> dict[str, Status]:
    """The stages that are stale or damaged and that ``--rebuild`` does not name."""
    found = {name: status(config, name) for name in [*stages.names(config), "evaluate"] if name not in rebuild}
    return {name: one for name, one in found.items() if one.state in ("stale", "damaged")}


def write_config(config: RunConfig, rebuild: Sequence[str] = ()) -> None:
    """Write ``RUN/config.yaml``; one that says something else is replaced only when no stage was made from what differs.

    In another cluster, which sees the run under another name, it is left as it is.

    Raises:
        StaleError: a stage was; the message lists which and what.
    """
    run, text = Folder(config.run_dir), configs.dump(config).encode()
    found = written_config(config)
    if found == text:
        return
    if found is not None and run.uri in [one.storage for one in config.clusters.values()] and yaml.safe_load(found)["run_dir"] != run.uri:
        return
    if bad := refused(config, rebuild):
        raise StaleError(refusal(config, bad))
    try:
        run.write_bytes(CONFIG, text)
    except OSError as error:
        raise ConfigError(f"run_dir: {run.uri} cannot be written to: {why(error)}; or name another one, --set run_dir=…") from None


def written_config(config: RunConfig) -> bytes | None:
    """``RUN/config.yaml``, if it is there."""
    try:
        return Folder(config.run_dir).read_bytes(CONFIG)
    except FileNotFoundError:
        return None


@contextlib.contextmanager
def config_of_run(config: RunConfig, name: str, rebuild: Sequence[str] = ()) -> Iterator[None]:
    """:func:`write_config`; when settings are refused before the stage has made anything, what was there before is put back."""
    with heard("run_dir", config.run_dir):
        before = written_config(config)
        write_config(config, rebuild)
    try:
        yield
    except ConfigError:
        if status(config, name).state == "absent":
            run = Folder(config.run_dir)
            run.delete(CONFIG) if before is None else run.write_bytes(CONFIG, before)
        raise


def refusal(config: RunConfig, bad: dict[str, Status]) -> str:
    """Why a run does not start, and what can be done about it."""
    lines = [f"{Folder(config.run_dir).uri} holds stages that were made from other inputs or are damaged; nothing was started."]
    for name, found in bad.items():
        lines.append(f"  {name} ({found.state}):")
        lines += [f"    {reason}" for reason in found.reasons[:8]]
        lines += [f"    … and {len(found.reasons) - 8} more"] if len(found.reasons) > 8 else []
    flags = " ".join(f"--rebuild {name}" for name in bad)
    lines.append(f"Put back what changed, choose another run_dir, or pass {flags} to delete them and make them anew.")
    return "\n".join(lines)


def clear(config: RunConfig, name: str) -> None:
    """Delete what a job made, except its lock."""
    for part in parts(config, name):
        stages.folder(config, part).delete_all(keep=("_lock.json",))
    if name == "partition":
        (Folder(config.run_dir) / "shards").delete_all()  # of experts that were added, too
    if name == "embed":
        (Folder(config.run_dir) / "rejected").delete_all()


# -- Ray ----------------------------------------------------------------------------------------------------------------


def connect() -> None:
    """Connect to the cluster that ``RAY_ADDRESS`` names (a submitted job has it), or start Ray in this process.

    Raises:
        ConfigError: it names a dashboard, which only takes jobs.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    address = os.environ.get("RAY_ADDRESS")
    if address and address.startswith(("http://", "https://")):
        raise ConfigError(
            f"RAY_ADDRESS is {address}, a dashboard, which takes jobs: send this there with `ray job submit -- python -m …`, or all stages with "
            "jobs.run_all --address; to run it on this machine, unset RAY_ADDRESS"
        )
    if not address and "RAY_AUTH_MODE" not in os.environ:
        # Left unset, a new local cluster would write a token to the home folder and change how later clusters start.
        os.environ["RAY_AUTH_MODE"] = "token"
        os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)
    import ray

    if ray.is_initialized():
        return
    own = {} if address else {"num_cpus": max(2, os.cpu_count() or 2), "include_dashboard": False}
    # "local": else a head that somebody else started on this machine would be joined.
    ray.init(address=address or "local", logging_level=logging.WARNING, **own)
    # Ray's core meets SIGTERM with a trace of machine addresses, as if a job that is ended had crashed; the process ends as it would after it.
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
