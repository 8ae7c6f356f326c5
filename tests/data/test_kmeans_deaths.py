"""k-means on a real cluster while its actors, a node and the driver die: the same bits as undisturbed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from paris_ray.data import partition, schema
from paris_ray.data.kmeans import Fit, Rows, lloyd, start
from paris_ray.data.remote_rows import RemoteRows, load
from paris_ray.storage import Folder

from .fabricated_corpus import ENCODERS, make_corpus, shard_bytes, without_pictures

N, WIDTH, K = 6000, 8, 12
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    """A head, and two nodes with room for all actors on either."""
    import ray
    from ray.cluster_utils import Cluster

    made = Cluster(initialize_head=True, connect=True, head_node_args={"num_cpus": 1, "memory": 1 << 20, "include_dashboard": False})
    for _ in range(2):
        made.add_node(num_cpus=1, memory=4 << 30)
    yield made
    ray.shutdown()
    made.shutdown()


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Folder:
    folder = Folder(tmp_path_factory.mktemp("corpus"))
    g = np.random.default_rng(1)
    kind = schema.corpus_schema({**ENCODERS, "embedding": {"width": WIDTH}}, "states").field("embedding")
    for i in range(3):
        embedding = g.standard_normal((N // 3, WIDTH)).astype(np.float16)
        schema.write_table(folder, schema.part_name(i), schema.table(schema.pa.schema([kind]), {"embedding": embedding}))
    return folder


def pieces() -> list[tuple[str, np.ndarray]]:
    return [(schema.part_name(i), np.arange(N // 3)) for i in range(3)]


Outcome = tuple[Fit, np.ndarray, list[int]]
"""The fit, the labels, and how many rows moved at each iteration."""


def undisturbed(corpus: Folder) -> Outcome:
    rows, moved = Rows(*load(corpus, pieces(), WIDTH, "cosine", N)), list[int]()
    fit = lloyd(rows, start(rows, K, 0), 12, lambda iteration, inertia, changed: moved.append(changed))
    return fit, rows.labels(fit.centroids), moved


def disturbed(corpus: Folder, disturb: Callable[[RemoteRows], None]) -> Outcome:
    """The same over three actors; something happens after the fourth iteration, and again before the labels are asked for."""
    rows = RemoteRows(corpus, pieces(), np.arange(N), WIDTH, "cosine", "numpy", N // 3 * WIDTH * 2, lambda _: None)
    assert len(rows.actors) == 3
    moved: list[int] = []

    def tell(iteration: int, inertia: float, changed: int) -> None:
        moved.append(changed)
        if iteration == 3:
            disturb(rows)

    fit = lloyd(rows, start(rows, K, 0), 12, tell)
    disturb(rows)
    labels = rows.labels(fit.centroids)
    rows.close()
    return fit, labels, moved


def assert_equal(a: Outcome, b: Outcome) -> None:
    assert a[0].centroids.tobytes() == b[0].centroids.tobytes()
    assert a[0].inertia == b[0].inertia
    assert (a[0].counts == b[0].counts).all()
    assert (a[1] == b[1]).all()
    assert a[2] == b[2]


def pids(rows: RemoteRows) -> list[int]:
    import ray

    return ray.get([actor.__ray_call__.remote(lambda self: os.getpid()) for actor in rows.actors])


def test_an_actor_killed_twice(cluster: Any, corpus: Folder) -> None:
    killed = []

    def kill(rows: RemoteRows) -> None:
        killed.append(pids(rows)[1])
        os.kill(killed[-1], signal.SIGKILL)

    assert_equal(disturbed(corpus, kill), undisturbed(corpus))
    assert len(set(killed)) == 2


def test_a_node_lost(cluster: Any, corpus: Folder) -> None:
    import ray

    gone = []

    def lose(rows: RemoteRows) -> None:
        if not gone:
            homes = ray.get([actor.__ray_call__.remote(lambda self: ray.get_runtime_context().get_node_id()) for actor in rows.actors])
            node = next(node for node in cluster.worker_nodes if node.node_id == homes[0])
            assert len(set(homes)) == 2  # on as many nodes as there are, though each has room for all
            gone.append(homes.count(homes[0]))
            cluster.remove_node(node, allow_graceful=False)

    assert_equal(disturbed(corpus, lose), undisturbed(corpus))
    assert gone[0] >= 1
    cluster.add_node(num_cpus=1, memory=4 << 30)


SLOWLY = """
import sys, time
import ray
from paris_ray import config
from paris_ray.data import fit, partition
from paris_ray.storage import Folder

ray.init(address=sys.argv[1])
fit.DRIVER_BYTES, fit.SAVE_SECONDS = 64 * 16 * 2, 0.0
partition.draw_sheets = lambda config: None
partition.write_report = lambda config, sheets: (Folder(config.run_dir) / "clusters").write_bytes("report.html", b"")
write = Folder.write_bytes
def slowly(folder, name, data):
    write(folder, name, data)
    if name.startswith("_kmeans"):
        print("saved", flush=True)
        time.sleep(float(sys.argv[3]))
Folder.write_bytes = slowly
partition.partition(config.load("tiny", [f"run_dir={sys.argv[2]}", "data.store_text=states"]))
"""


def test_the_driver_killed(cluster: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = make_corpus(tmp_path / "whole")
    without_pictures(monkeypatch)
    partition.partition(whole)  # in one process, without Ray
    make_corpus(tmp_path / "run")

    def run(pause: float) -> subprocess.Popen[bytes]:
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        return subprocess.Popen(
            [sys.executable, "-c", SLOWLY, cluster.address, str(tmp_path / "run"), str(pause)], env=environment, stdout=subprocess.PIPE
        )

    def iterations() -> int:
        found = list((tmp_path / "run/clusters").glob("_kmeans-*.safetensors"))
        return len(load_file(found[0])["inertia"]) if found else -1

    first = run(2.0)
    try:
        while iterations() < 2:
            assert first.poll() is None
            time.sleep(0.05)
    finally:
        first.kill()
        first.wait()
    at = iterations()
    assert not (tmp_path / "run/clusters/labels.parquet").exists()
    second = run(0.0)
    said, _ = second.communicate()
    assert second.returncode == 0
    iterations_in_all = len(Folder(tmp_path / "run").read_json("clusters/clusters.json")["inertia"][0])
    assert said.count(b"saved") == iterations_in_all - 1 - at  # it went on, and did not begin anew
    assert shard_bytes(tmp_path / "run") == shard_bytes(tmp_path / "whole")
    for name in ("labels.parquet", "centroids.safetensors", "clusters.json"):
        assert (tmp_path / "run/clusters" / name).read_bytes() == (tmp_path / "whole/clusters" / name).read_bytes()
    assert not list((tmp_path / "run/clusters").glob("_kmeans-*"))
