"""A node that its cloud takes away in mid-training: a checkpoint where training was, and the same bits from another node."""

from __future__ import annotations

import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import fake_training_run as fake
import psutil
import pytest
import ray
from ray.cluster_utils import Cluster

from paris_ray.storage import Folder
from paris_ray.training import worker
from paris_ray.training.expert import train_expert

IMAGES = 1600


@pytest.fixture
def cloud(monkeypatch):
    """Google Cloud's metadata service, which announces one preemption when it is told to."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            preempted = self.path.endswith("/preempted") and server.take.is_set()
            if preempted:
                server.take.clear()
            self.send_response(200)
            self.end_headers()
            self.wfile.write(b"TRUE" if preempted else b"FALSE")

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.take = threading.Event()
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    monkeypatch.setenv("GCE_METADATA_HOST", f"127.0.0.1:{server.server_port}")
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture
def two_nodes(cloud):
    """A head without room for a worker, and two nodes with room for one each; all inherit the address of the metadata service."""
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    for _ in range(2):
        cluster.add_node(num_cpus=1)
    ray.init(address=cluster.address, log_to_driver=False)
    yield cluster
    ray.shutdown()
    cluster.shutdown()


def train_worker() -> psutil.Process | None:
    for process in psutil.Process().children(recursive=True):
        try:
            if "RayTrainWorker" in " ".join(process.cmdline()):
                return process
        except psutil.Error:
            continue
    return None


@pytest.mark.timeout(300)
def test_it_goes_on_elsewhere_to_the_same_bits(tmp_path, cloud, two_nodes, monkeypatch):
    settings = {"expert__train__images": IMAGES, "expert__train__checkpoint_images": IMAGES, "expert__resources__preemption": "gcp"}
    taken, alone = fake.make_run(tmp_path / "taken", **settings), fake.make_run(tmp_path / "alone", **settings)
    stage, seen = Folder(taken.run_dir) / "experts" / "1", {}

    def watch() -> None:
        while (first := train_worker()) is None:
            time.sleep(0.02)
        seen["node"] = first.ppid()
        first.wait()
        seen["left"] = max(checkpoint_images(stage))
        while (second := train_worker()) is None or second.pid == first.pid:
            time.sleep(0.02)
        seen["other node"] = second.ppid()

    cloud.take.set()  # the watcher hears of it when it first asks, while training begins
    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    counts = train_expert(taken, 1)["counts"]
    thread.join(10)
    assert counts["restarts"] == 1
    assert 0 < seen["left"] < IMAGES  # no checkpoint was due before the end
    assert seen["node"] != seen["other node"]
    ray.shutdown()
    worker.run(alone, "expert-1", worker_place())
    name = "diffusion_pytorch_model.safetensors"
    assert (stage / "export").read_bytes(name) == (Folder(alone.run_dir) / "experts" / "1" / "export").read_bytes(name)


def checkpoint_images(stage: Folder) -> list[int]:
    names = (stage / "checkpoints").folders()
    return [int(name.removeprefix("images-")) for name in names if (stage / "checkpoints").exists(f"{name}/_manifest.json")]


def worker_place():
    import torch

    from paris_ray.training.loop import Place

    return Place(torch.device("cpu"))
