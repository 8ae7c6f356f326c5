"""Embed on a cluster of three nodes, where processes and a node are killed: nothing is lost, nothing doubled, the same bytes."""

import collections
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from paris_ray import stages
from paris_ray.data import attempts, schema
from paris_ray.data import embed as stage
from paris_ray.storage import Folder

from . import light
from .corpora import WRITERS, contents
from .test_embed_sources import rows

pytestmark = pytest.mark.timeout(1200)

ROWS = 80


@pytest.fixture(scope="module")
def cluster():
    """A head that runs no task, and two nodes of one processor."""
    import ray
    from ray.cluster_utils import Cluster

    tests = str(Path(__file__).parents[1])
    health = {"health_check_initial_delay_ms": 0, "health_check_period_ms": 1000, "health_check_failure_threshold": 10}
    with pytest.MonkeyPatch.context() as patch:
        # Workers find data.light.
        patch.setenv("PYTHONPATH", os.pathsep.join([tests, *filter(None, [os.environ.get("PYTHONPATH")])]))
        head = {"num_cpus": 0, "include_dashboard": False, "_system_config": health}
        try:
            made = Cluster(initialize_head=True, head_node_args=head)
        except Exception:  # Ray gives a node half a minute to start, which a busy machine may not have
            made = Cluster(initialize_head=True, head_node_args=head)
        nodes = [made.add_node(num_cpus=1) for _ in range(2)]
        ray.init(address=made.address, log_to_driver=False, configure_logging=False)
        yield made, nodes
        ray.shutdown()
        made.shutdown()


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """Tars, of which one row is there twice."""
    path = tmp_path_factory.mktemp("source") / "tars"
    some = rows(ROWS)
    return f"{{kind: webdataset, uri: {WRITERS['webdataset'](path, [*some, ('again.png', *some[5][1:])], files=9)}}}"


@pytest.fixture(autouse=True)
def slow(monkeypatch):
    monkeypatch.setattr(stage, "EncodePart", light.SlowEncode)
    monkeypatch.setattr(stage, "_save_frozen", light.save_frozen)


@pytest.fixture(scope="module")
def undisturbed(cluster, source, tmp_path_factory):
    run = tmp_path_factory.mktemp("undisturbed") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stage, "EncodePart", light.SlowEncode)
        patch.setattr(stage, "_save_frozen", light.save_frozen)
        manifest = stage.embed(light.light_config(run, source))
    assert (manifest["counts"]["rows"], manifest["counts"]["reasons"]) == (ROWS, {"duplicate": 1})
    return run, manifest


def parts(run):
    return len(schema.parts(Folder(run) / "corpus"))


def wait_for(condition, seconds=240):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "nothing happened"
        time.sleep(0.02)


def check(run, undisturbed):
    """As if nothing had happened."""
    other, manifest = undisturbed
    assert contents(Path(run) / "corpus") == contents(other / "corpus")
    assert contents(Path(run) / "rejected") == contents(other / "rejected")
    assert not [name for name in os.listdir(Path(run) / "corpus") if name.startswith(".tmp-")]
    ids = schema.read_columns(Folder(run) / "corpus", ["id"])["id"]
    assert collections.Counter(ids.tolist()).most_common(1)[0][1] == 1
    assert len(ids) == ROWS
    assert stages.published(Folder(run) / "corpus")["fingerprint"] == manifest["fingerprint"]


def embed_in_background(config):
    failed = []

    def run():
        try:
            stage.embed(config)
        except BaseException as error:
            failed.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    return thread, failed


def test_an_encoder_is_killed(cluster, source, undisturbed, tmp_path):
    run = tmp_path / "run"
    thread, failed = embed_in_background(light.light_config(run, source))
    wait_for(lambda: parts(run) >= 2)
    for pid in os.listdir(run / "pids"):
        os.kill(int(pid), signal.SIGKILL)
    assert parts(run) < 9
    thread.join()
    assert not failed
    assert len(os.listdir(run / "pids")) > 2  # others took their places
    check(run, undisturbed)


def test_the_driver_is_killed(cluster, source, undisturbed, tmp_path):
    made, _ = cluster
    run = tmp_path / "run"
    driver = subprocess.Popen([sys.executable, "-m", "data.light", made.address, str(run), source], cwd=Path(__file__).parents[1])
    try:
        wait_for(lambda: parts(run) >= 2 or driver.poll() is not None)
    finally:
        driver.kill()
        driver.wait()
    stamps = {path.name: path.stat().st_mtime_ns for path in (run / "corpus").glob("part-*")}
    assert 2 <= len(stamps) < 9
    assert not (run / "corpus/_manifest.json").exists()
    stage.embed(light.light_config(run, source))
    check(run, undisturbed)
    kept = [name for name, stamp in stamps.items() if (run / "corpus" / name).stat().st_mtime_ns == stamp]
    assert len(kept) >= len(stamps) - 1  # but for the one that had the duplicate


def test_a_node_is_killed(cluster, source, undisturbed, tmp_path):
    made, nodes = cluster
    run = tmp_path / "run"
    thread, failed = embed_in_background(light.light_config(run, source))
    wait_for(lambda: parts(run) >= 2)
    there = {path.read_text() for path in (run / "pids").iterdir()}
    (node, *_) = [node for node in nodes if node.node_id in there]
    made.remove_node(node, allow_graceful=False)
    assert parts(run) < 9
    thread.join()
    if failed:  # then the same command goes on
        stage.embed(light.light_config(run, source))
    check(run, undisturbed)


def test_a_part_that_kills_its_workers_is_named(cluster, source, tmp_path, monkeypatch):
    """Ray would start the worker again, without end."""
    run = tmp_path / "run"
    monkeypatch.setattr(stage, "EncodePart", light.MortalEncode)
    monkeypatch.setattr(attempts, "ATTEMPTS", 2)
    Folder(run / "deadly").write_bytes("caption", b"picture 3 ")  # the first row of the fourth tar
    with pytest.raises(attempts.WorkError, match=r"part 3 \('00003.tar'\): 2 workers have died on it, of memory, or of a decoder"):
        stage.embed(light.light_config(run, source, "data.encoder_batch=1"))
    assert len(os.listdir(run / "pids")) == 2
    (run / "deadly/caption").write_bytes(b"no picture of this name")  # the next command counts anew, and goes on
    assert stage.embed(light.light_config(run, source, "data.encoder_batch=1"))["counts"]["rows"] == ROWS
    assert not list(run.glob("*/_attempts*"))
