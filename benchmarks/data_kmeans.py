"""Our k-means against scikit-learn's Lloyd iteration and faiss' k-means iteration: ratios of time, in one run.

    python benchmarks/data_kmeans.py --out benchmarks/results/data_kmeans.md
    python benchmarks/data_kmeans.py --rows 50000 --width 64 --centroids 128      # a quick look

All get the same generated rows and, in each round, the same centroids: those of our own run from rows drawn at random. A pass assigns all rows and
sums them up for the next centroids. Ours reads float16; theirs, float32. Theirs are scikit-learn's ``lloyd_iter_chunked_dense``, the body of its
loop, and the time that faiss' ``Clustering`` itself reports. faiss is measured if it is installed (``pip install faiss-cpu``); nothing depends on it.

Ours gets faster as the centroids come to rest, theirs does not. So there are three rows: the first pass, repeated; the passes after it up to
``--passes``, of which the early ones are the slowest; and all of them together.

A ratio is theirs over ours (above 1: ours is faster): the median of the rounds, with the interval of order statistics that covers the median with at
least 95 % probability. Rounds alternate, A B C C B A, so that all see the same machine.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # from any folder, without installation

import numpy as np
import sklearn
import threadpoolctl
from sklearn.cluster._k_means_lloyd import lloyd_iter_chunked_dense

from benchmarks.alternating import HEAD, alternate, hardware, ratios
from benchmarks.output import command, write
from paris_ray.data import kmeans, nearest

try:
    import faiss
except ImportError:
    faiss = None


def generate(rows: int, width: int) -> np.ndarray:
    """Overlapping clusters, float16."""
    g = np.random.default_rng(0)
    centres = g.standard_normal((4096, width), np.float32)
    return np.concatenate(
        [
            (centres[g.integers(0, 4096, n)] + g.standard_normal((n, width), np.float32)).astype(np.float16)
            for n in [8192] * (rows // 8192) + [rows % 8192]
        ]
    )


def seconds(function: Callable[[], object]) -> float:
    """Of one call."""
    begun = time.perf_counter()
    function()
    return time.perf_counter() - begun


def of_sklearn(x: np.ndarray, threads: int) -> Callable[[np.ndarray], float]:
    """Its iteration from given centroids."""
    ones, labels = np.ones(len(x), np.float32), np.full(len(x), -1, np.int32)

    def run(centroids: np.ndarray) -> float:
        new, weight, shift = np.zeros_like(centroids), np.zeros(len(centroids), np.float32), np.zeros(len(centroids), np.float32)
        with threadpoolctl.threadpool_limits(1, user_api="blas"):
            return seconds(lambda: lloyd_iter_chunked_dense(x, ones, centroids, new, weight, labels, shift, threads))

    return run


def of_faiss(x: np.ndarray, threads: int) -> Callable[[np.ndarray], float]:
    """The same."""

    def run(centroids: np.ndarray) -> float:
        faiss.omp_set_num_threads(threads)
        with threadpoolctl.threadpool_limits(threads, user_api="blas"):
            clustering = faiss.Clustering(*reversed(centroids.shape))
            clustering.niter, clustering.max_points_per_centroid = 1, len(x)
            faiss.copy_array_to_vector(centroids.ravel(), clustering.centroids)
            clustering.train(x, faiss.IndexFlatL2(x.shape[1]))
            return float(clustering.iteration_stats.at(0).time)

    return run


def main() -> None:
    """Parse, measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--centroids", type=int, default=1024)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--backend", default="numpy", choices=["numpy", "torch", "faiss"])
    parser.add_argument("--passes", type=int, default=25)
    parser.add_argument("--repeats", type=int, default=9, help="of the first pass; at least 6, for an interval")
    parser.add_argument("--out", type=Path, help="Markdown file for the table")
    args = parser.parse_args()
    stored = generate(args.rows, args.width)
    rows = kmeans.Rows(stored, nearest.scales(stored, "cosine", args.rows), backend=args.backend, threads=args.threads)
    x = np.concatenate([rows.at(np.arange(low, min(low + 8192, args.rows))) for low in range(0, args.rows, 8192)])
    start = x[np.random.default_rng(1).choice(args.rows, args.centroids, replace=False)]
    others = {"scikit-learn": of_sklearn(x, args.threads), **({"faiss": of_faiss(x, args.threads)} if faiss else {})}
    moved: list[int] = []

    def first(_: int) -> dict[str, Callable[[], float]]:
        return {"ours": lambda: seconds(lambda: rows.assign(start)), **{name: lambda f=f: f(start) for name, f in others.items()}}

    def later() -> Iterator[dict[str, Callable[[], float]]]:
        previous, part = start, rows.assign(start)
        for _ in range(args.passes - 1):
            centroids = np.where(part.counts[:, None] > 0, kmeans.means(part), previous)

            def ours(now: np.ndarray = centroids, before: np.ndarray = previous) -> float:
                nonlocal part
                begun = time.perf_counter()
                part = rows.assign(now, before)
                return time.perf_counter() - begun

            yield {"ours": ours, **{name: lambda f=f, c=centroids: f(c) for name, f in others.items()}}
            moved.append(part.changed)
            previous = centroids

    libraries = f"NumPy {np.__version__}, scikit-learn {sklearn.__version__}" + (f", faiss {faiss.__version__}" if faiss else "")
    head = [
        "# k-means",
        "",
        f"{hardware(args.threads)}, {libraries}",
        f"{args.rows} rows of {args.width}, {args.centroids} centroids, cosine, backend {args.backend}. Seconds are medians of a pass; the ratio is "
        "theirs over ours, median of the rounds, with its 95 % interval.",
        command(),
        "",
        *HEAD,
    ]
    print("\n".join(head), flush=True)
    for function in others.values():  # libraries' own first calls
        function(start)
    firsts = alternate(map(first, range(args.repeats)))
    table = ratios("first pass", firsts)
    print("\n".join(table), flush=True)
    times = alternate(later())
    table += (others_ := ratios(f"passes 2 to {args.passes}", times))
    total = {name: statistics.median(firsts[name]) + sum(times[name]) for name in times}
    for name in others:
        mean = [total[which] / args.passes for which in ("ours", name)]
        others_.append(f"| passes 1 to {args.passes}, mean | {name} | {mean[0]:.3f} | {mean[1]:.3f} | {mean[1] / mean[0]:.3f} | – | {args.passes} |")
    table += others_[len(others) :]
    tail = [
        "",
        f"Rows that moved, passes 2 to {args.passes}: {', '.join(f'{n / args.rows:.1%}' for n in moved)}.",
        f"Ours, passes 2 to {args.passes}, seconds: {', '.join(f'{value:.2f}' for value in times['ours'])}.",
        f"Ours, over all passes: {args.rows * args.passes / total['ours']:,.0f} rows/s on {args.threads} thread(s).",
    ]
    print("\n".join([*others_, *tail]), flush=True)
    write(args.out, [*head, *table, *tail])


if __name__ == "__main__":
    main()
