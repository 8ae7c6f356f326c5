"""The whole system on one machine: every stage of the preset ``demo``, the model behind HTTP, the table measured over it, the report.

python -m jobs.demo

The same command again continues where it was cut off, and does nothing when all is done.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack

from jobs import cli, run_all, serving
from jobs.board import Board
from jobs.local_cluster import ClusterError, LocalCluster, exit_on_signals
from jobs.runner import ClusterLostError
from paris_ray import config as configs
from paris_ray import stages
from paris_ray.config import ConfigError, RunConfig
from paris_ray.lock import Lock, LockedError
from paris_ray.manifest import StaleError
from paris_ray.opening import heard
from paris_ray.progress import clock
from paris_ray.storage import Folder

REPORT = "report.html"
WAIT_SECONDS = 60.0
"""How long a demo that is just ending may take before another says that it is in the way."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the demo; returns its exit code."""
    parser = argparse.ArgumentParser(prog="python -m jobs.demo", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    configs.add_arguments(parser)
    parser.add_argument("--end-with-parent", type=int, metavar="PID", help="end in order when this process, which started this one, is gone")
    given = list(sys.argv[1:] if argv is None else argv)
    args = parser.parse_args(given if any(word.startswith("--config") for word in given) else ["--config", "demo", *given])
    exit_on_signals()
    if args.end_with_parent:
        _watch_parent(args.end_with_parent)
    try:
        config = cli.load(args)
        with heard("run_dir", config.run_dir):
            if args.dry_run:
                cli.print_plan(config)
                return 0
            complete = not args.rebuild and _complete(config)
        if complete:
            if not Folder(config.run_dir).exists(REPORT):
                _write_report(config)
            _farewell(config, "is complete already")
            return 0
        serving.check_exposed(config)
        run_all.check_source(config, args.rebuild)
        with _lock(config):
            run_all.prepare(config, args.rebuild)
            return _demo(config, args.rebuild)
    except (ConfigError, StaleError, LockedError) as error:
        return cli.complain(parser, error)
    except (ClusterError, ClusterLostError) as error:
        print(f"{parser.prog}: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("demo: interrupted; the same command continues from here", file=sys.stderr)
        return cli.INTERRUPTED


def _demo(config: RunConfig, rebuild: Sequence[str]) -> int:
    began = time.monotonic()
    board = Board(Folder(config.run_dir) / "events")
    with ExitStack() as stack:
        folder = run_all.local_folder(config)
        cluster = LocalCluster.find(folder)
        if cluster is None:
            board.say("starting Ray on 127.0.0.1")
            # Two CPUs more than there are: the endpoint comes up beside the last training, and only training is heavy all the time.
            cluster = LocalCluster(folder, num_cpus=max(2, os.cpu_count() or 2, serving.cpus(config)) + 2)
            cluster.start()
        if cluster.ours:
            stack.callback(cluster.stop)
        board.say(f"Ray is up: {cluster.address} (token in {cluster.temp_dir}/token)")
        port = serving.free_port(config.serve.host, config.serve.port)
        # Serve starts beside the training that is left, and nobody waits for its first answer.
        background = stack.enter_context(ThreadPoolExecutor(1))
        deployed: list[Future[str]] = []

        def deploy(name: str) -> None:
            if name == "assemble":
                deployed.append(background.submit(serving.deploy, cluster, config, port))
                board.say("the model is assembled; deploying it")

        runner = run_all.make_runner(config, cluster, rebuild=rebuild, on_done=deploy, planned=_names(config))
        runner.board = board
        if "assemble" not in rebuild and cli.status(config, "assemble").state == "valid":
            deploy("assemble")
        if not run_all.follow(runner, stages.names(config)):
            return 1
        before = time.monotonic()
        url = deployed[-1].result()
        serving.wait_ready(cluster, url)
        board.say(f"{url} answers (waited {clock(time.monotonic() - before)})")
        if not run_all.follow(runner, ["evaluate"], {"evaluate": ["--endpoint", url]}):
            return 1
        board.say("ending Ray")
    if not Folder(config.run_dir).exists(REPORT):
        _write_report(config)
    _timings(config, runner.seconds, time.monotonic() - began)
    _farewell(config, "is complete")
    return 0


def _names(config: RunConfig) -> list[str]:
    return [*stages.names(config), "evaluate"]


def _complete(config: RunConfig) -> bool:
    return all(cli.status(config, name).state == "valid" for name in _names(config))


def _write_report(config: RunConfig) -> None:
    from paris_ray.evaluation.report import write_report

    write_report(config)


def _timings(config: RunConfig, seconds: dict[str, float], total: float) -> None:
    print("\nstage           wall time")
    for name in _names(config):
        print(f"{name:<16}{clock(seconds[name]) if name in seconds else 'was done before'}")
    print(f"{'all':<16}{clock(total)}\n")
    run_all.print_goodput(config)


def _farewell(config: RunConfig, state: str) -> None:
    with contextlib.suppress(FileNotFoundError):
        print("\n" + (Folder(config.run_dir) / "eval").read_bytes("table.md").decode().rstrip())
    print(f"\nThe run {config.name} {state}. Report: {Folder(config.run_dir).uri}/{REPORT}")
    print(f"Next: make serve (the model behind http://{config.serve.host}:{config.serve.port} until make stop)")


def _lock(config: RunConfig) -> Lock:
    """The run's lock, patient enough for an earlier demo that is just ending."""
    return Lock(Folder(config.run_dir), "demo", wait=WAIT_SECONDS)


def _watch_parent(parent: int) -> None:
    """End this process as SIGTERM does when its parent has gone; a killed `make` tells nobody."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1.0)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=watch, daemon=True, name="parent").start()


if __name__ == "__main__":
    sys.exit(main())
