"""The walk over the stages: order, limits, retries, adoption. The cluster is pretended; tests/jobs/test_run_all.py uses a real one."""

from __future__ import annotations

import pytest
from fabricated_cluster import FakeClient, on, publish, tiny

from jobs import cli, run_all, runner
from jobs.forecast import work
from jobs.runner import ClusterLostError, Runner
from paris_ray import stages
from paris_ray.storage import Folder


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch):
    monkeypatch.setattr(runner, "POLL_SECONDS", 0.0)


@pytest.fixture
def config(tmp_path):
    return tiny(tmp_path)


def names(config):
    return stages.names(config)


def test_every_stage_is_its_own_job_after_its_parents(config):
    client = FakeClient(config)
    done = []
    assert Runner(config, on(client), on_done=done.append).run(names(config))
    assert sorted(client.order) == sorted(names(config))
    for name in names(config):
        assert all(client.order.index(parent) < client.order.index(name) for parent in stages.parents(config, name))
    assert client.most_training == config.max_parallel == 3
    assert sorted(done) == sorted(names(config))
    entry = {job.metadata["stage"]: job.entrypoint for job in client.list_jobs()}
    assert entry["expert-2"] == f"python -m jobs.train_expert --expert 2 --config {config.run_dir}/config.yaml"
    assert entry["control_router"].startswith("python -m jobs.train_router --control --config")
    ids = [job.submission_id for job in client.list_jobs()]
    assert len(set(ids)) == len(ids)
    assert all(one.startswith("tiny-") and one.endswith("-a1") for one in ids)


def test_the_longest_training_starts_first_and_the_control_last(tmp_path):
    config = tiny(tmp_path, "expert.train.images=null", "expert.train.passes=10", "max_parallel=1")
    client = FakeClient(config)
    assert Runner(config, on(client)).run(names(config))
    training = [name for name in client.order if stages.trains(name)]
    assert training[-1] == stages.CONTROL_ROUTER
    # Ten passes over 10 and 30 rows, in whole batches of 8; expert 2 has one layer of 48 instead of two of 32.
    assert work(config, "expert-0") == 104 * 2 * 32**2
    assert work(config, "expert-2") == 304 * 1 * 48**2
    assert training[:-1] == sorted(training[:-1], key=lambda name: -work(config, name))


def test_what_is_valid_is_not_submitted(config):
    for name in ("embed", "partition", "expert-1"):
        publish(config, name)
    client = FakeClient(config)
    assert Runner(config, on(client)).run(names(config))
    assert sorted(client.order) == sorted({*names(config)} - {"embed", "partition", "expert-1"})


def test_a_failed_job_is_tried_again_and_shows_its_last_lines(config, capsys):
    client = FakeClient(config, fail={"expert-0": 1})
    assert Runner(config, on(client), retries=1).run(names(config))
    assert client.order.count("expert-0") == 2
    out = capsys.readouterr().out
    assert "exit code 1" in out
    assert "expert-0-a1 line 49" in out
    assert "expert-0-a1 line 20" in out
    assert "expert-0-a1 line 19\n" not in out
    logs = Folder(config.run_dir) / "events" / "logs"
    assert "expert-0-a1 line 0" in logs.read_bytes("expert-0-a1.log").decode()
    assert {"expert-0-a1.log", "expert-0-a2.log"} < {entry.name for entry in logs.files()}


def test_one_that_keeps_failing_lets_the_others_finish(config, capsys):
    client = FakeClient(config, fail={"expert-1": 9})
    assert not Runner(config, on(client), retries=2).run(names(config))
    assert client.order.count("expert-1") == 3
    for name in ("expert-0", "expert-2", "router", "control_router"):
        assert cli.status(config, name).state == "valid"
    assert "assemble" not in client.order
    out = capsys.readouterr().out
    assert f"expert-1: failed; its logs are in {config.run_dir}/events/logs/expert-1-a*.log" in out
    assert "not started, because what they need failed: assemble" in out


def test_wrong_input_is_not_tried_again(config):
    client = FakeClient(config, fail={"partition": 1}, code=2)
    assert not Runner(config, on(client), retries=5).run(names(config))
    assert client.order == ["embed", "partition"]


def test_a_running_job_is_followed_not_submitted_again(config, capsys):
    first = FakeClient(config)
    Runner(config, on(first)).run(["embed", "partition"])
    client = FakeClient(config)
    other = Runner(config, on(client))
    meta = {"run_dir": Folder(config.run_dir).uri, "stage": "expert-1", "attempt": "3", "config": other._fingerprint("expert-1")}
    client.add(f"{other.prefix}-expert-1-a3", meta)
    foreign = client.add("tiny-ffffffff-expert-1-a1", {**meta, "run_dir": "/elsewhere"})
    changed = client.add(f"{other.prefix}-expert-2-a1", {**meta, "stage": "expert-2", "config": "another"})
    retired = client.add(f"{other.prefix}-expert-7-a1", {**meta, "stage": "expert-7"})
    foreign.left = 10**9
    assert other.run(names(config))
    assert "expert-1" not in client.order
    assert foreign.status == "RUNNING"
    assert changed.status == retired.status == "STOPPED"
    assert f"{other.prefix}-expert-2-a2" in client.jobs
    out = capsys.readouterr().out
    assert f"already running as {other.prefix}-expert-1-a3" in out
    assert "submitted with another config" in out


def test_what_is_to_be_made_anew_is_not_followed(config):
    client = FakeClient(config)
    one = Runner(config, on(client), rebuild=["embed"])
    meta = {"run_dir": Folder(config.run_dir).uri, "stage": "embed", "attempt": "1", "config": one._fingerprint("embed")}
    old = client.add(f"{one.prefix}-embed-a1", meta)
    assert one.run(["embed"])
    assert old.status == "STOPPED"
    assert client.order == ["embed"]


def test_attempts_count_on_across_clusters(config):
    logs = Folder(config.run_dir) / "events" / "logs"
    logs.write_bytes("embed-a4.log", b"of a cluster long gone")
    client = FakeClient(config)
    assert Runner(config, on(client)).run(["embed"])
    assert [job.submission_id.rsplit("-", 1)[1] for job in client.list_jobs()] == ["a5"]
    assert logs.read_bytes("embed-a4.log") == b"of a cluster long gone"


def test_rebuild_goes_to_the_attempt_that_deletes_and_to_no_later_one(config):
    publish(config, "embed")
    client = FakeClient(config, fail={"embed": 2})
    failing = client.get_job_status

    def status(submission_id):
        if submission_id.endswith("a2"):  # the first fails before it has deleted anything, the second after
            cli.clear(config, "embed")
        return failing(submission_id)

    client.get_job_status = status
    assert Runner(config, on(client), rebuild=["embed"], retries=2).run(["embed"])
    assert [("--rebuild embed" in job.entrypoint) for job in client.list_jobs()] == [True, True, False]


def test_stop_ends_what_runs_and_saves_its_log(config):
    client = FakeClient(config, polls=10**9)
    one = Runner(config, on(client))
    one._meet(["embed"])
    one._submit("embed", [])
    one.stop()
    assert [job.status for job in client.list_jobs()] == ["STOPPED"]
    assert one.logs.folder.exists("embed-a1.log")


def test_a_job_that_its_head_forgot_does_not_keep_the_others_from_being_stopped(config, capsys):
    for name in ("embed", "partition"):
        publish(config, name)
    client = FakeClient(config, polls=10**9)
    one = Runner(config, on(client))
    one._meet(names(config))
    for name in ("expert-0", "expert-1"):
        one._submit(name, [])
    client.jobs.pop(one.running["expert-0"].id)
    one.stop()
    assert [job.status for job in client.list_jobs()] == ["STOPPED"]
    assert "may go on there" not in capsys.readouterr().out


@pytest.mark.parametrize("function", ["get_job_status", "get_job_info"])
def test_what_somebody_on_the_way_answers_does_not_end_the_run(config, monkeypatch, function):
    client = FakeClient(config)
    ask, calls = getattr(client, function), []

    def first_a_proxy(submission_id):
        calls.append(submission_id)
        if len(calls) == 1:
            raise RuntimeError("Request failed with status code 404: <html>no such page</html>.")
        return ask(submission_id)

    monkeypatch.setattr(client, function, first_a_proxy)
    assert Runner(config, on(client)).run(["embed"])
    assert client.order == ["embed"]


def test_a_cluster_away_for_a_moment_and_one_gone(config, monkeypatch):
    client = FakeClient(config)
    status, calls = client.get_job_status, []

    def flaky(submission_id):
        calls.append(submission_id)
        if len(calls) % 3 == 1:
            raise ConnectionResetError("reset")
        return status(submission_id)

    monkeypatch.setattr(client, "get_job_status", flaky)
    assert Runner(config, on(client)).run(["embed"])

    def gone():
        raise ConnectionRefusedError("refused")

    monkeypatch.setattr(client, "list_jobs", gone)
    monkeypatch.setattr(runner, "LOST_SECONDS", 0.2)
    with pytest.raises(ClusterLostError, match="has not answered"):
        Runner(config, on(client)).run(["partition"])


def test_a_job_that_ends_well_without_its_manifest_has_failed(config, monkeypatch, capsys):
    client = FakeClient(config)
    monkeypatch.setattr("fabricated_cluster.publish", lambda *_: None)
    assert not Runner(config, on(client), retries=0).run(["embed"])
    assert "ended without finishing the stage" in capsys.readouterr().out


def test_a_run_says_how_much_of_its_trainings_time_was_steps(config, capsys):
    """90 of 100 seconds and 60 of 300: 150 of 400. Of one that somebody else trained nobody knows."""
    for name in names(config):
        figures = {"expert-0": {"seconds": 90, "goodput": 0.9}, "router": {"seconds": 60, "goodput": 0.2}}.get(name, {"seconds": 1000})
        publish(config, name, counts=figures)
    run_all.print_goodput(config)
    assert capsys.readouterr().out == "tiny: 38% of the 6 min 40 s of training were spent in steps (goodput)\n"


def test_until_a_stage_nothing_else_is_started_and_the_same_command_goes_on(config, monkeypatch, capsys):
    client = FakeClient(config)
    monkeypatch.setattr(run_all, "make_runner", lambda config, where, **options: Runner(config, on(client), **options))
    command = ["--config", "tiny", "--set", f"run_dir={config.run_dir}", "--address", "http://h:1"]
    assert run_all.main([*command, "--until", "partition"]) == 0
    assert client.order == ["embed", "partition"]
    said = capsys.readouterr().out
    assert f"partition is done; the clusters to look at, and what training will cost: {config.run_dir}/clusters/report.html" in said
    assert "the same command without --until goes on" in said
    assert run_all.main([*command, "--until", "partition"]) == 0
    assert "nothing to do" in capsys.readouterr().out
    assert run_all.main([*command, "--until", "expert-1"]) == 0
    assert client.order == ["embed", "partition", "expert-1"]
    assert run_all.main(command) == 0
    assert sorted(client.order) == sorted(names(config))
    assert run_all.main([*command, "--until", "partitoin"]) == 2
    assert "--until: 'partitoin' is not a stage of this run. Did you mean 'partition'? Known: embed, partition, expert-0," in capsys.readouterr().err
    assert run_all.main([*command, "--until", "partition", "--dry-run"]) == 0
    table = capsys.readouterr().out.split("stage           found")[1]
    assert [line.split()[0] for line in table.splitlines()[1:3]] == ["embed", "partition"]
    assert "expert-0" not in table
