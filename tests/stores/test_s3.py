"""A run in an object store that throttles, fails and breaks connections: nothing is lost, and the bits are those of a local folder."""

from __future__ import annotations

import hashlib
import os
import pickle
import signal
import subprocess
import sys
import time
from pathlib import Path

import fake_training_run as fake
import pytest
import torch
from s3 import SERVER, Proxy, faulty, server

from jobs import doctor, store_facts
from jobs.findings import Facts
from jobs.local_cluster import PROJECT
from paris_ray import lock
from paris_ray.lock import Lock, LockedError
from paris_ray.storage import Folder, copy_file
from paris_ray.training import checkpoint, worker
from paris_ray.training.loop import Place

pytestmark = pytest.mark.skipif(not SERVER.exists(), reason="no S3 server here; `make test` installs it")
SEED = int(os.environ.get("CHAOS_SEED", "3"))
ENV = {"AWS_ACCESS_KEY_ID": "x", "AWS_SECRET_ACCESS_KEY": "x", "AWS_REGION": "us-east-1", "AWS_EC2_METADATA_DISABLED": "true"}


@pytest.fixture(scope="module")
def upstream(tmp_path_factory):
    with server(tmp_path_factory.mktemp("s3") / "log") as address:
        yield address


@pytest.fixture
def store(upstream, monkeypatch):
    """A proxy that fails every fifth request; the environment names it, as it would name a store of one's own."""
    with faulty(upstream, 0.2, SEED) as proxy:
        for name, value in {**ENV, "AWS_ENDPOINT_URL": proxy.url}.items():
            monkeypatch.setenv(name, value)
        yield proxy
        print(f"CHAOS_SEED={SEED}: {dict(proxy.count)}")


def test_operations(store: Proxy, tmp_path: Path) -> None:
    """Against a dictionary that does the same."""
    folder, kept = Folder("s3://bucket/operations"), {}
    for i in range(8):
        kept[f"d{i % 2}/f{i}"] = os.urandom(1000 if i else 11 << 20)  # the first in several parts
        folder.write_bytes(f"d{i % 2}/f{i}", kept[f"d{i % 2}/f{i}"])
    folder.rename("d1/f1", "d0/f2")
    kept["d0/f2"] = kept.pop("d1/f1")
    folder.delete("d1/f3")
    folder.delete("d1/f3")
    del kept["d1/f3"]
    assert {one.name: one.size for one in folder.files(recursive=True)} == {name: len(data) for name, data in kept.items()}
    assert folder.folders() == ["d0", "d1"]
    for name, data in kept.items():
        assert folder.sha256(name) == hashlib.sha256(data).hexdigest()
    again = pickle.loads(pickle.dumps(folder))
    assert Path(again.local_copy("d0/f0", cache=str(tmp_path))).read_bytes() == kept["d0/f0"]
    assert not folder.exists("nothing")
    with pytest.raises(FileNotFoundError):
        folder.read_bytes("nothing")
    with Lock(folder, "one"), pytest.raises(LockedError), Lock(folder, "another"):
        pass
    folder.delete_all()
    assert not folder.files(recursive=True)
    assert sum(store.count[name] for name in store.count if name != "passed") > 5


def test_a_store_that_is_away_for_a_while(store: Proxy) -> None:
    """For longer than the six seconds that pyarrow by itself asks five times a second; we ask ever less often."""
    store.share = 0.0
    folder = Folder("s3://bucket/away")
    folder.write_bytes("a", b"1")
    store.away_until = time.monotonic() + 9.0
    assert folder.read_bytes("a") == b"1"
    assert 1 < store.count["away"] < 10


def test_a_lock_whose_renewal_hangs_ends_its_owner_before_its_lease(
    store: Proxy, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], request: pytest.FixtureRequest
) -> None:
    """The renewal is on its way for longer than the lease, and another has taken the lock by then: nobody writes for the first one any more."""
    store.share = 0.0
    monkeypatch.setattr(lock, "LEASE_SECONDS", 4.0)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    request.addfinalizer(lambda: signal.signal(signal.SIGINT, before))
    with pytest.raises(KeyboardInterrupt), Lock(Folder("s3://bucket/held"), "old"):  # noqa: PT012
        begun = time.monotonic()
        store.puts_held_until = begun + 8
        time.sleep(20)
    assert time.monotonic() - begun < 5
    assert "it could not be renewed for" in capsys.readouterr().err


WRITER = """
import signal, sys
from paris_ray import lock, storage_io
from paris_ray.storage import Folder
lock.LEASE_SECONDS, storage_io.SOON_S = 8.0, float(sys.argv[2])
signal.signal(signal.SIGINT, signal.default_int_handler)
folder = Folder(sys.argv[1])
with lock.Lock(folder, "the writer"):
    print("holds", flush=True)
    sys.stdin.readline()
    print("sends", flush=True)
    folder.write_json("_manifest.json", "new")
print("has sent", flush=True)
"""


def writer(folder: Folder, soon: float) -> subprocess.Popen[str]:
    """A process that has the lock, and at a line of input writes a manifest."""
    folder.write_json("_manifest.json", "old")
    process = subprocess.Popen([sys.executable, "-c", WRITER, folder.uri, str(soon)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "holds\n"
    return process


def send(process: subprocess.Popen[str]) -> None:
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write("\n")
    process.stdin.flush()
    assert process.stdout.readline() == "sends\n"


def test_an_upload_does_not_arrive_after_its_lease(store: Proxy) -> None:
    """The store is away for longer than the lease while a manifest is written, and asked again all the time."""
    store.share = 0.0
    folder = Folder("s3://bucket/late")
    process = writer(folder, soon=60)
    store.away_until = time.monotonic() + 12
    begun = time.monotonic()
    send(process)
    assert process.wait(30) == lock.EXIT
    assert time.monotonic() - begun < 10  # 7.5 s at most, by its own clock
    assert folder.read_json("_manifest.json") == "old"  # when it is back


@pytest.mark.parametrize("times", [1, 2])
def test_ctrl_c_while_a_store_is_away_ends_an_upload_soon(store: Proxy, times: int) -> None:
    """After the while that it is given, or at the second time at once. The object is whole, and who comes next need not wait."""
    store.share = 0.0
    folder = Folder(f"s3://bucket/interrupted-{times}")
    process = writer(folder, soon=1 if times == 1 else 60)
    store.away_until = time.monotonic() + 120
    send(process)
    begun = time.monotonic()
    for _ in range(times):
        time.sleep(0.5)
        process.send_signal(signal.SIGINT)
    assert process.wait(30) == 130
    assert time.monotonic() - begun < 6
    store.away_until = 0.0
    assert folder.read_json("_manifest.json") == "old"
    with Lock(folder, "next"):
        pass


def test_ctrl_c_lets_an_upload_arrive_that_is_on_its_way(store: Proxy) -> None:
    store.share = 0.0
    folder = Folder("s3://bucket/arrives")
    process = writer(folder, soon=20)
    store.puts_held_until = time.monotonic() + 2.5
    send(process)
    time.sleep(0.5)
    process.send_signal(signal.SIGINT)
    assert process.wait(30) == -signal.SIGINT
    assert folder.read_json("_manifest.json") == "new"
    assert not folder.exists("_lock.json")


def test_a_bucket_that_does_not_exist_is_said_at_once(store: Proxy) -> None:
    store.share = 0.0
    found = store_facts.store("s3://nowhere/run", 1000)
    assert sum(store.count.values()) < 6, store.count
    (fault,) = [one for one in doctor.judge(Facts(stores={"here": found})) if one.state == "fault" and one.what == "storage"]
    assert "bucket" in fault.value
    assert "make the bucket" in fault.remedy


def test_a_training_has_the_bits_of_one_in_a_local_folder(store: Proxy, tmp_path: Path) -> None:
    sets = {"expert__train__images": 24, "expert__train__sample_images": 16, "expert__train__checkpoint_images": 16}
    local = fake.make_run(tmp_path / "run", experts=[0], **sets)
    there = fake.make_config("s3://bucket/training", **sets)
    here, run = Folder(tmp_path / "run"), Folder("s3://bucket/training")
    for one in here.files(recursive=True):
        copy_file(here, one.name, run)
    weights = []
    for config, folder in ((local, here), (there, run)):
        worker.run(config, "expert-0", Place(torch.device("cpu")))
        found = checkpoint.latest(folder / "experts/0")
        assert found is not None
        assert found.images == 24
        weights.append(found.tensors("model"))
    assert weights[0].keys() == weights[1].keys()
    assert all(torch.equal(value, weights[1][name]) for name, value in weights[0].items())
    assert sum(store.count[name] for name in store.count if name != "passed") > 5


@pytest.mark.chaos
def test_a_whole_run(store: Proxy, tmp_path: Path) -> None:
    """Every stage of ``tiny``, by ``jobs.run_all``."""
    runs = {"local": str(tmp_path / "run"), "store": "s3://bucket/whole"}
    for name, run_dir in runs.items():
        command = [sys.executable, "-m", "jobs.run_all", "--config", "tiny", "--set", f"run_dir={run_dir}", "--set", f"name={name}"]
        subprocess.run(command, cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(PROJECT)}, check=True, timeout=1500)
    results = [
        {one.name: folder.sha256(one.name) for one in folder.files(recursive=True) if one.name.endswith((".parquet", ".safetensors"))}
        for folder in map(Folder, runs.values())
    ]
    made = [{name: sha for name, sha in result.items() if name.startswith(("corpus/", "shards/", "model/"))} for result in results]
    assert len(made[0]) > 8
    assert made[0] == made[1]
    assert sum(store.count[name] for name in store.count if name != "passed") > 100
