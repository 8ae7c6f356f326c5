"""Measure the retrieval table of a run over HTTP, with its controls, and write RUN/report.html.

python -m jobs.evaluate --config RUN/config.yaml --endpoint http://127.0.0.1:8000

The model must be served already (make serve). Pictures made by an earlier attempt are kept. --report-only writes the report of whatever is there.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from jobs import cli
from paris_ray import config as configs
from paris_ray.config import ConfigError, RunConfig


def evaluate(config: RunConfig, args: argparse.Namespace) -> int:
    """Measure, print the table, write the report."""
    from paris_ray.evaluation.asking import EndpointError
    from paris_ray.evaluation.evaluate import evaluate as work
    from paris_ray.evaluation.evaluate import markdown

    try:
        table = work(config, args.endpoint)
    except EndpointError as error:
        print(f"evaluate: {error}", file=sys.stderr)
        return 1 if args.endpoint else cli.USER_ERROR
    print(markdown(table))
    return report(config)


def report(config: RunConfig) -> int:
    """Write the report and say where it is."""
    from paris_ray.evaluation.report import write_report

    print(f"evaluate: report in {write_report(config)}")
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Run the job; returns its exit code."""
    parser = argparse.ArgumentParser(prog="python -m jobs.evaluate", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--endpoint", metavar="URL", help="where the model of this run is served, e.g. http://127.0.0.1:8000")
    parser.add_argument("--report-only", action="store_true", help="measure nothing; write the report of what is there, a run in part included")
    given = list(sys.argv[1:] if argv is None else argv)
    if "--report-only" not in given:
        return cli.run(parser, evaluate, given, stage="evaluate")
    # A report may be written while stages run, or when they have not: no lock, no parents.
    configs.add_arguments(parser)
    args = parser.parse_args(given)
    try:
        config = cli.load(args)
        if args.rebuild:
            raise ConfigError("--rebuild: a report is always made anew; leave it out")
        if args.dry_run:
            cli.print_plan(config)
            return 0
        return report(config)
    except ConfigError as error:
        return cli.complain(parser, error)


if __name__ == "__main__":
    sys.exit(main())
