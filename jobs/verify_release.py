"""Check a downloaded Paris checkpoint: files, headers, shapes, parameter counts, strict loading, one picture per routing.

python -m jobs.verify_release PATH --out DIR

Prints a report in Markdown, fit to post. The exit code is 0 only if everything holds, 1 if something does not. Works with memory for one expert.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence

from jobs import cli
from paris_ray.storage import Folder


def main(argv: Sequence[str] | None = None) -> int:
    """Run the job; returns its exit code."""
    parser = argparse.ArgumentParser(prog="python -m jobs.verify_release", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("path", metavar="PATH", help="folder or URI of the checkpoint")
    parser.add_argument("--out", metavar="DIR", help="also write report.md and the pictures there")
    parser.add_argument("--no-pictures", action="store_true", help="headers and checksums only; reads no weight's value")
    parser.add_argument("--steps", type=int, default=50, help="of each picture (50)")
    parser.add_argument("--device", default="cpu", help="where pictures are drawn (cpu)")
    parser.add_argument("--precision", default="fp32", choices=("fp32", "bf16", "int8"), help="of the experts for the pictures (fp32)")
    parser.add_argument("--max-resident", type=int, metavar="N", help="experts in memory at once while drawing (as many as fit)")
    parser.add_argument("--ignore-tensor", action="append", default=[], metavar="NAME", help="a tensor that files may hold besides; repeatable")
    parser.add_argument(
        "--ignore-setting", action="append", default=[], metavar="NAME", help="an unknown setting that configs may hold besides; repeatable"
    )
    parser.add_argument("--norm-eps", type=float, metavar="X", help="epsilon of the networks' norms, such as 1e-5 (the configs' own, or 1e-6)")
    parser.add_argument("--threads", type=int, default=1, metavar="N", help="while drawing on a CPU; a picture's last bits depend on them (1)")
    args = parser.parse_args(argv)

    from paris_ray.inference import release, release_report
    from paris_ray.inference.precision import check_device
    from paris_ray.inference.strict import check_norm_eps

    try:
        for name in ("threads", "steps", "max_resident"):
            if (value := getattr(args, name)) is not None and value < 1:
                raise ValueError(f"{name}: {value} must be at least 1")
        check_norm_eps(args.norm_eps)
        if not args.no_pictures:
            check_device(args.device)
        if args.out:
            Folder(args.out).check_not_a_file("out")
        folder = Folder(args.path)
        if not folder.files(recursive=True):
            raise ValueError(f"{args.path} is not there or holds no file; give the folder of a downloaded checkpoint")
        if folder.exists("model/config.json"):
            raise ValueError(f"{args.path} is the folder of a run; give its model, {folder.uri}/model")
    except (ValueError, OSError) as error:
        return cli.complain(parser, error)
    began = time.monotonic()
    report = release.verify(
        args.path, not args.no_pictures, args.device, args.precision, args.steps, args.max_resident, args.ignore_tensor,
        args.ignore_setting, args.norm_eps, args.threads,
        say=lambda line: print(f"verify_release: {line}", file=sys.stderr, flush=True),
    )  # fmt: skip
    text = release_report.hide_path(release_report.markdown(report, time.monotonic() - began), args.path)
    print(text, end="")
    if args.out:
        release_report.write(report, text, args.out)
    return 0 if report.holds else 1


if __name__ == "__main__":
    sys.exit(main())
