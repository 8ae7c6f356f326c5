"""Serve the model of a run on this machine, in the background.

python -m jobs.serve            deploy RUN/model of the preset demo, say where it is, return
python -m jobs.serve --stop     end every local cluster that this copy of the project started
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence

from jobs import cli, run_all, serving
from jobs.local_cluster import ClusterError, LocalCluster, exit_on_signals, stop_all
from paris_ray import config as configs
from paris_ray import stages
from paris_ray.config import ConfigError, RunConfig
from paris_ray.manifest import published

EXAMPLE = """\
curl -s {url}/v1/images/generations -H 'content-type: application/json' \\
  -d '{{"prompt": "lion face", "response_format": "b64_json"}}' | python3 -c \\
  'import base64, json, sys; open("lion.png", "wb").write(base64.b64decode(json.load(sys.stdin)["data"][0]["b64_json"]))'"""


def main(argv: Sequence[str] | None = None) -> int:
    """Deploy or stop; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m jobs.serve", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    configs.add_arguments(parser)
    parser.add_argument("--stop", action="store_true", help="end the clusters instead")
    given = list(sys.argv[1:] if argv is None else argv)
    args = parser.parse_args(given if any(word.startswith("--config") for word in given) else ["--config", "demo", *given])
    exit_on_signals()
    if args.stop:
        stopped = stop_all()
        print("".join(f"ended the cluster of {folder}\n" for folder in stopped) or "nothing of this project is running\n", end="")
        return 0
    try:
        if args.rebuild:
            raise ConfigError("--rebuild: serving makes nothing anew; rebuild with jobs.run_all, then serve again")
        config = cli.load(args)
        if args.dry_run:
            cli.print_plan(config)
            return 0
        return _serve(config)
    except ConfigError as error:
        return cli.complain(parser, error)
    except (ClusterError, OSError) as error:
        print(f"{parser.prog}: {error}", file=sys.stderr)
        return 1


def _serve(config: RunConfig) -> int:
    model = stages.folder(config, "assemble")
    if published(model) is None:
        raise ConfigError(f"there is no model in {model.uri}; make one first: make demo, or python -m jobs.run_all --config …")
    serving.check_exposed(config)
    folder = os.path.join(run_all.local_folder(config), "serving")
    url = f"http://{config.serve.host}:{config.serve.port}"
    cluster = LocalCluster.find(folder)
    started = cluster is None
    if cluster is None:
        if serving.free_port(config.serve.host, config.serve.port) != config.serve.port:
            raise ConfigError(f"serve.port: somebody listens on {config.serve.port} already; name another one: --set serve.port=8001")
        print("starting Ray on 127.0.0.1", flush=True)
        cluster = LocalCluster(folder, num_cpus=serving.cpus(config)).start()
    elif changed := serving.changed_keys(cluster):
        raise ConfigError(f"{changed}: the model is being served with another setting of it; make stop, then make serve")
    try:
        url = serving.deploy(cluster, config, config.serve.port)
        serving.wait_ready(cluster, url)
    except BaseException:
        if started:
            cluster.stop()
        raise
    print(f"serving {model.uri} at {url} until `make stop`\n{url}/ is a page to try it; or:\n{EXAMPLE.format(url=url)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
