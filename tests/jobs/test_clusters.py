"""Experts in several clusters, which are pretended (tests/jobs/test_two_clusters.py has real ones); last, what is sent to one, over real HTTP."""

from __future__ import annotations

import json
import subprocess
import threading
import time
import zipfile
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from fabricated_cluster import FakeClient, on, publish, tiny
from ray._private.runtime_env.packaging import create_package

from jobs import cli, clusters, run_all, runner
from jobs.clusters import AwayError
from jobs.runner import CostReachedError, Runner
from jobs.spending import Spending
from paris_ray import config as configs
from paris_ray import stages
from paris_ray.config import ConfigError
from paris_ray.storage import Folder
from paris_ray.training import stopping
from paris_ray.training.machines import QUEUED

EU = ("clusters.eu={address: 'http://127.0.0.1:1', storage: /mnt/run}", "experts.1.cluster=eu", "experts.2.cluster=eu")


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch):
    for module, name in ((runner, "POLL_SECONDS"), (runner, "LOOK_SECONDS"), (clusters, "FIRST_SECONDS"), (clusters, "SAY_SECONDS")):
        monkeypatch.setattr(module, name, 0.0)


class Both:
    """A run with two clusters."""

    def __init__(self, folder, *sets, **options):
        self.config = tiny(folder, *EU, *sets)
        self.here, self.eu = FakeClient(self.config), FakeClient(self.config)
        self.options = options

    def runner(self, **more):
        return Runner(self.config, on(self.here), [on(self.eu, "eu", "/mnt/run")], **{**self.options, **more})

    def run(self, **more):
        return self.runner(**more).run(stages.names(self.config))


def away(client, monkeypatch, error=None):
    """Let a client's cluster not answer; returns what lets it answer again."""
    patch = pytest.MonkeyPatch()

    def refuse(*_, **__):
        raise error or ConnectionRefusedError("refused")

    for name in ("submit_job", "list_jobs", "get_job_status", "get_job_info", "get_job_logs", "stop_job"):
        patch.setattr(client, name, refuse)
    monkeypatch.setattr(client, "restore", patch.undo, raising=False)
    return patch.undo


def test_each_expert_goes_to_its_own_cluster(tmp_path, monkeypatch):
    both, at_once = Both(tmp_path, "max_parallel=1"), []
    both.here.polls = 20
    one = both.runner()
    monkeypatch.setattr(one.board, "show", lambda done, total, running, *_: at_once.append({*running}))
    assert one.run(stages.names(both.config))
    # One in each, and neither waits for the other.
    assert {"expert-0", "expert-1"} in at_once
    assert {"expert-0", "expert-2"} in at_once
    assert sorted(both.eu.order) == ["expert-1", "expert-2"]
    assert sorted(both.here.order) == sorted({*stages.names(both.config)} - {"expert-1", "expert-2"})
    assert (both.here.most_training, both.eu.most_training) == (1, 1)
    entry = {job.metadata["stage"]: job.entrypoint for client in (both.here, both.eu) for job in client.list_jobs()}
    assert entry["expert-1"] == "python -m jobs.train_expert --expert 1 --config /mnt/run/config.yaml --set run_dir=/mnt/run"
    assert entry["expert-0"] == f"python -m jobs.train_expert --expert 0 --config {tmp_path}/config.yaml"


def test_the_others_go_on_while_one_does_not_answer(tmp_path, monkeypatch, capsys):
    both = Both(tmp_path)
    back = away(both.eu, monkeypatch)
    status = both.here.get_job_status

    def until_all_is_done_here(submission_id):
        found = status(submission_id)
        if all(cli.status(both.config, name).state == "valid" for name in ("expert-0", "router", "control_router")):
            back()
        return found

    monkeypatch.setattr(both.here, "get_job_status", until_all_is_done_here)
    assert both.run()
    assert both.here.order[-1] == "assemble"
    out = capsys.readouterr().out
    assert out.count("the cluster eu does not answer (refused)") == 1
    assert out.count("the cluster eu answers again, after") == 1


def test_a_job_whose_submission_got_no_answer_is_followed(tmp_path, monkeypatch, capsys):
    both = Both(tmp_path)
    submit, lost = both.eu.submit_job, []

    def received(**options):
        submit(**options)
        if not lost:
            lost.append(options["submission_id"])
            raise TimeoutError("no answer")

    monkeypatch.setattr(both.eu, "submit_job", received)
    assert both.run()
    assert sorted(both.eu.order) == ["expert-1", "expert-2"]
    assert f"already running as {lost[0]} in eu" in capsys.readouterr().out


def test_it_takes_up_the_jobs_of_all_clusters(tmp_path, capsys):
    both = Both(tmp_path)
    for name in ("embed", "partition"):
        publish(both.config, name)
    first = both.runner()
    for client, name in ((both.here, "expert-0"), (both.eu, "expert-1")):
        meta = {"run_dir": str(tmp_path), "stage": name, "attempt": "2", "config": first._fingerprint(name)}
        client.add(f"{first.prefix}-{name}-a2", meta)
    assert both.run()
    assert "expert-0" not in both.here.order
    assert both.eu.order == ["expert-2"]
    out = capsys.readouterr().out
    assert f"already running as {first.prefix}-expert-1-a2 in eu" in out


def test_a_head_that_was_started_anew_costs_no_retry(tmp_path, monkeypatch, capsys):
    both = Both(tmp_path, retries=0)
    status, calls = both.eu.get_job_status, []

    def restarted(submission_id):
        calls.append(submission_id)
        if len(calls) == 1:
            both.eu.jobs.clear()
        return status(submission_id)

    monkeypatch.setattr(both.eu, "get_job_status", restarted)
    assert both.run()
    assert sorted(both.eu.order) == ["expert-1", "expert-1", "expert-2", "expert-2"]
    assert "the cluster eu no longer knows" in capsys.readouterr().out
    assert sorted(job.rsplit("-", 1)[1] for job in both.eu.jobs) == ["a2", "a2"]


def test_an_expert_that_moves_leaves_nothing_behind(tmp_path, capsys):
    both = Both(tmp_path, "experts.2.cluster=here")
    for name in ("embed", "partition", "expert-1"):
        publish(both.config, name)
    one = both.runner()
    old = both.eu.add(
        f"{one.prefix}-expert-2-a1", {"run_dir": str(tmp_path), "stage": "expert-2", "attempt": "1", "config": one._fingerprint("expert-2")}
    )
    assert both.run()
    assert old.status == "STOPPED"
    assert both.eu.order == []
    assert f"{one.prefix}-expert-2-a2" in both.here.jobs
    assert "runs in the cluster eu, and the config now has it in the cluster, ending it" in capsys.readouterr().out


def moving(tmp_path):
    """A run whose expert 2 trains in eu, and is now to train here; its job there goes on until it is told otherwise."""
    both = Both(tmp_path, "experts.2.cluster=here")
    for name in ("embed", "partition", "expert-1"):
        publish(both.config, name)
    one = both.runner()
    meta = {"run_dir": str(tmp_path), "stage": "expert-2", "attempt": "1", "config": one._fingerprint("expert-2")}
    old = both.eu.add(f"{one.prefix}-expert-2-a1", meta)
    old.left = 10**9
    say(both.config, "expert-2", "running")
    return both, one, old


def test_an_expert_that_trains_and_moves_leaves_a_checkpoint_first_and_nobody_waits(tmp_path, monkeypatch, capsys):
    both, one, old = moving(tmp_path)
    wishes, beside, submit = [], [], both.here.submit_job
    monkeypatch.setattr(stopping, "wish", lambda folder, stage: wishes.append((stage, old.status)))

    def submitted(**options):
        if options["metadata"]["stage"] == "expert-2":
            assert old.status == "FAILED"  # never two at once
        submit(**options)

    def look(done, total, running, to_go, notes):
        if old.status == "RUNNING":
            beside.append((done, notes))
        if cli.status(both.config, "router").state == "valid":
            old.status, old.driver_exit_code = "FAILED", cli.STOPPED  # by itself

    monkeypatch.setattr(both.here, "submit_job", submitted)
    monkeypatch.setattr(one.board, "show", look)
    assert one.run(stages.names(both.config))
    assert wishes == [("expert-2", "RUNNING")]
    assert (old.status, old.driver_exit_code) == ("FAILED", cli.STOPPED)
    # Meanwhile the others were done, and the follower said why this one was not.
    assert max(done for done, _ in beside) >= 5
    assert beside[0][1] == ["expert-2 leaves the cluster eu"]
    assert "the config now has it in the cluster, ending it after a checkpoint" in capsys.readouterr().out
    assert f"{one.prefix}-expert-2-a2" in both.here.jobs


@pytest.mark.parametrize("answers", [True, False])
def test_one_that_moves_and_takes_too_long_for_its_checkpoint_is_ended(tmp_path, monkeypatch, answers):
    """Or counts as gone, where nobody answers any more."""
    both, one, old = moving(tmp_path)
    monkeypatch.setattr(stopping, "wish", lambda *_: None if answers else away(both.eu, monkeypatch))
    monkeypatch.setattr(stopping, "CHECKPOINT_S", 0.3)
    began = time.monotonic()
    assert one.run(stages.names(both.config))
    assert time.monotonic() - began > 0.3
    assert old.status == ("STOPPED" if answers else "RUNNING")
    assert "expert-2" in both.here.order


def test_one_that_lets_us_wait_does_not_make_the_other_lost(tmp_path, monkeypatch):
    """The cluster here has answered badly once, and was not asked again while another took a minute to answer."""
    both, late, refused = Both(tmp_path), [0.0], []
    clock, mine, theirs = time.monotonic, both.here.list_jobs, both.eu.list_jobs
    monkeypatch.setattr(time, "monotonic", lambda: clock() + late[0])

    def once():
        if not refused:
            refused.append(True)
            raise ConnectionRefusedError("refused")
        return mine()

    def slow():
        late[0] += 0 if late[0] else runner.LOST_SECONDS + 1
        return theirs()

    monkeypatch.setattr(both.here, "list_jobs", once)
    monkeypatch.setattr(both.eu, "list_jobs", slow)
    assert both.run()
    assert late[0] > runner.LOST_SECONDS


def test_a_cluster_with_a_store_of_its_own_is_found_out(tmp_path, monkeypatch, capsys):
    both = Both(tmp_path, retries=0)
    make = publish
    monkeypatch.setattr("fabricated_cluster.publish", lambda config, name: None if name == "expert-1" else make(config, name))
    assert not both.run()
    assert f"expert-1: the cluster eu was told that /mnt/run is this run; see that it is the same store as {tmp_path}" in capsys.readouterr().out


# -- no room, and money -------------------------------------------------------------------------------------------------


def say(config, stage, state, **more):
    event = {"stage": stage, "state": state, "done": 8, "total": 320, "unit": "images", "rate": 1.0, "eta": None, "loss": None, "message": ""}
    (Folder(config.run_dir) / "events").write_json(f"{stage}.json", {**event, "updated": time.time() + 1, **more})


def test_without_room_the_fallback_is_asked_for(tmp_path, monkeypatch, capsys):
    both = Both(
        tmp_path, "experts.1.resources={labels: {market: spot}, fallback: {cpus: 2, labels: {}}}", "experts.2.resources.labels={market: spot}"
    )
    for name in ("embed", "partition"):
        publish(both.config, name)
    both.eu.polls = 10**9
    submit, shown = both.eu.submit_job, []

    def queued(**options):
        name = options["metadata"]["stage"]
        if "--fallback" not in options["entrypoint"]:
            say(both.config, name, QUEUED, message="no room for 15 min")
        submit(**options)
        if "--fallback" in options["entrypoint"]:
            say(both.config, name, "running")
            both.eu.jobs[options["submission_id"]].left = 2

    def look(*_):
        shown.append(True)
        if len(shown) == 20:  # at last a machine for expert 2
            next(job for job in both.eu.jobs.values() if job.metadata["stage"] == "expert-2").left = 1

    monkeypatch.setattr(both.eu, "submit_job", queued)
    one = both.runner()
    monkeypatch.setattr(one.board, "show", look)
    assert one.run(stages.names(both.config))
    assert both.eu.order.count("expert-1") == 2
    assert both.eu.order.count("expert-2") == 1
    second = both.eu.jobs[f"{one.prefix}-expert-1-a2"]
    assert second.entrypoint.endswith("--set run_dir=/mnt/run --fallback")
    assert both.eu.jobs[f"{one.prefix}-expert-1-a1"].status == "STOPPED"
    out = capsys.readouterr().out
    assert "expert-1: no room for 15 min; now its fallback: a worker asks for 2 CPU" in out
    assert out.count("expert-2: no room for 15 min; it goes on waiting") == 1


def test_at_the_limit_of_cost_all_stop_in_order_and_more_money_goes_on(tmp_path, monkeypatch, capsys):
    both = Both(tmp_path, "expert.resources.price_per_hour=2", "router.resources.price_per_hour=0")
    for name in ("embed", "partition"):
        publish(both.config, name)
    events = Folder(tmp_path) / "events"
    both.here.polls = both.eu.polls = 10**9
    submit = both.eu.submit_job

    def training(**options):
        submit(**options)
        name = options["metadata"]["stage"]
        if name == "expert-1":
            say(both.config, name, "running")
            events.write_json("machines/expert-1.json", {"hours": 1.5, "cost": 3.0, "node": "A100"})

    monkeypatch.setattr(both.eu, "submit_job", training)
    asked = stopping.wish

    def heard(folder, stage):
        asked(folder, stage)
        if stage == "expert-1":  # the one that has begun
            job = next(job for job in both.eu.jobs.values() if job.metadata["stage"] == stage)
            job.status, job.driver_exit_code = "FAILED", cli.STOPPED

    monkeypatch.setattr(stopping, "wish", heard)
    with pytest.raises(CostReachedError, match=r"3\.00 is spent, and --max-cost is 3\. The same command with a higher one goes on"):
        both.run(max_cost=3)
    assert events.exists("expert-1.stop")
    assert "expert-1: stopped in order, with a checkpoint" in capsys.readouterr().out
    assert {job.status for client in (both.here, both.eu) for job in client.list_jobs()} == {"FAILED", "STOPPED"}
    before = len(both.eu.order)
    with pytest.raises(CostReachedError):
        both.run(max_cost=3)
    assert len(both.eu.order) == before
    both.here.polls = both.eu.polls = 2
    assert both.run(max_cost=4)


def test_at_the_limit_of_cost_they_also_stop_where_nobody_answers(tmp_path, monkeypatch):
    """Started anew while a cluster does not answer, it follows none of the jobs there; their wishes lie in the store."""
    both = Both(tmp_path, "expert.resources.price_per_hour=2", "router.resources.price_per_hour=0")
    for name in ("embed", "partition", "expert-2"):
        publish(both.config, name)
    events = Folder(tmp_path) / "events"
    events.write_json("machines/expert-1.json", {"hours": 1.5, "cost": 3.0, "node": "A100"})
    away(both.eu, monkeypatch)
    with pytest.raises(CostReachedError):
        both.run(max_cost=3)
    assert events.exists("expert-1.stop")
    assert not events.exists("expert-2.stop")  # done


def test_a_bill_that_cannot_be_read_counts_as_what_it_last_said(tmp_path):
    events = Folder(tmp_path) / "events"
    machines = events / "machines"
    machines.write_json("expert-1.json", {"hours": 1.5, "cost": 3.0, "node": "A100"})
    machines.write_json("expert-2.json", {"hours": 1.0, "cost": 2.0, "node": "A100"})
    one = Spending(tiny(tmp_path), events)
    assert one.total() == 5.0
    machines.delete("expert-1.json")
    (tmp_path / "events/machines/expert-1.json").mkdir()  # no file: the store does not say
    machines.write_json("expert-2.json", {"hours": 1.5, "cost": 3.0, "node": "A100"})
    assert one.total() == 6.0


def test_a_limit_of_cost_needs_prices():
    with pytest.raises(
        ConfigError, match=r"--max-cost: what experts\.1\.resources\.price_per_hour, router\.resources\.price_per_hour is must be known"
    ):
        run_all.check_prices(configs.load("demo", ["experts.1.resources.price_per_hour=null", *PRICED]))


PRICED = [f"experts.{k}.resources.price_per_hour=2" for k in range(8) if k != 1]


# -- what is sent -------------------------------------------------------------------------------------------------------


@pytest.fixture
def dashboard():
    """Somebody who answers as a dashboard does, and keeps the headers."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            server.seen.append(self.headers.get("Authorization"))
            if self.path.startswith("/api/jobs"):
                server.go.wait(20)
            good = server.token is None or self.headers.get("Authorization") == f"Bearer {server.token}"
            body = b"[]" if self.path.startswith("/api/jobs") else json.dumps({"ray_version": "2.60.0", "version": "4"}).encode()
            self.send_response(server.code if good else 403)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.seen, server.token, server.code, server.go = [], None, 200, threading.Event()
    server.go.set()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.go.set()
    server.shutdown()
    server.server_close()


def cluster(server, tmp_path, token=None):
    (tmp_path / "token").write_text(token or "")
    spec = {"address": f"http://127.0.0.1:{server.server_port}", **({"token_file": str(tmp_path / "token")} if token is not None else {})}
    config = configs.load("tiny", [f"clusters.eu={json.dumps(spec)}"])
    return clusters.other(config, "eu")


def test_what_is_sent_along_holds_no_token(tmp_path, monkeypatch):
    both = {"jobs/secrets/eu": None, "jobs/secrets/us": None}
    assert sent_along(tmp_path, monkeypatch, both) == ["jobs/code.py", "pyproject.toml"]


def test_what_people_keep_beside_the_project_is_not_sent_along(tmp_path, monkeypatch):
    kept = dict.fromkeys(["api_keys", ".env", "my_aws.yaml", "mine/keys", "keys/jobs/code.py", "runs/demo/config.yaml", "jobs/__pycache__/code.pyc"])
    assert sent_along(tmp_path, monkeypatch, kept, ["other"]) == ["jobs/code.py", "pyproject.toml"]


def test_all_that_git_has_of_what_jobs_need_is_sent_along(tmp_path):
    sent = clusters.other(configs.load("tiny", ["clusters.eu={address: 'http://h:1'}"]), "eu").runtime_env
    create_package(str(clusters.PROJECT), tmp_path / "out.zip", include_gitignore=True, excludes=sent["excludes"])
    with zipfile.ZipFile(tmp_path / "out.zip") as package:
        found = {name for name in package.namelist() if not name.endswith("/")}
    listed = subprocess.run(["git", "ls-files", *clusters.SENT], cwd=clusters.PROJECT, capture_output=True, text=True, check=True).stdout.split("\n")
    assert found >= {name for name in listed if name and (clusters.PROJECT / name).exists()}


@pytest.mark.parametrize("name", ["eu [old]", "#eu!", "eu*", "back\\slash", "last "])
def test_a_token_with_an_odd_name_is_not_sent_along(tmp_path, monkeypatch, name):
    assert sent_along(tmp_path, monkeypatch, {f"jobs/{name}": None}) == ["jobs/code.py", "pyproject.toml"]


def test_a_token_behind_a_link_is_not_sent_along(tmp_path, monkeypatch):
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "token").write_text("sekret")
    links = {"jobs/link": outside / "token", "jobs/folder": outside, "jobs/inner": "../pyproject.toml"}
    tokens = ["jobs/link", "jobs/folder/token", "../also/jobs/link"]
    assert sent_along(tmp_path, monkeypatch, links, tokens) == ["jobs/code.py", "jobs/inner", "pyproject.toml"]


def sent_along(tmp_path, monkeypatch, files, tokens=None):
    """What of a project is sent along with a job that has some files, or links if it is said where to, and of them some tokens, or all."""
    project = tmp_path / "project"
    project.mkdir()
    (tmp_path / "also").symlink_to(project)
    for name in ("jobs/code.py", "pyproject.toml", *(name for name, to in files.items() if to is None)):
        (project / name).parent.mkdir(parents=True, exist_ok=True)
        (project / name).write_text(name)
    for name, to in files.items():
        if to is not None:
            (project / name).symlink_to(to)
    monkeypatch.setattr(clusters, "PROJECT", project)
    spec = {f"c{k}": {"address": "http://h:1", "token_file": f"{project}/{name}"} for k, name in enumerate(tokens or files)}
    sent = clusters.other(configs.load("tiny", [f"clusters={json.dumps(spec)}"]), "c0").runtime_env
    create_package(str(project), tmp_path / "out.zip", include_gitignore=True, excludes=sent["excludes"])
    with zipfile.ZipFile(tmp_path / "out.zip") as package:
        return sorted(name for name in package.namelist() if not name.endswith("/"))


def test_with_an_image_nothing_is_sent_along():
    config = configs.load("tiny", ["clusters.eu={address: 'http://h:1', image: example.org/paris}"])
    assert clusters.other(config, "eu").runtime_env == {"image_uri": "example.org/paris"}


def test_a_cluster_gets_its_own_token_and_no_other(dashboard, tmp_path, monkeypatch):
    monkeypatch.setenv("RAY_ADDRESS", "http://127.0.0.1:9")
    assert cluster(dashboard, tmp_path, "abc\n").call("list_jobs") == []
    assert set(dashboard.seen) == {"Bearer abc"}
    dashboard.seen.clear()
    # This process has a token in its environment (tests/conftest.py), for the cluster here.
    assert cluster(dashboard, tmp_path).call("list_jobs") == []
    assert set(dashboard.seen) == {None}


def test_a_token_is_read_again_when_it_is_refused(dashboard, tmp_path):
    dashboard.token = "old"
    one = cluster(dashboard, tmp_path, "old")
    one.check()
    dashboard.token = "new"
    with pytest.raises(AwayError, match="Authentication failed"):
        one.call("list_jobs")
    (tmp_path / "token").write_text("new")
    assert one.call("list_jobs") == []


@pytest.mark.parametrize(
    ("token", "said"),
    [
        ("wrong", r"clusters\.eu\.token_file: http://127.0.0.1:\d+ refuses the token in .*/token; put that cluster's own there"),
        (None, r"clusters\.eu\.token_file: http://127.0.0.1:\d+ wants a token, and none is given; name the file"),
        ("first sekret\nsecond sekret", r"clusters\.eu\.token_file: .*/token must hold one word, the token"),
    ],
)
def test_a_wrong_token_is_said_and_not_shown(dashboard, tmp_path, token, said):
    dashboard.token = "right"
    with pytest.raises(ConfigError, match=said) as caught:
        cluster(dashboard, tmp_path, token).check()
    assert "sekret" not in str(caught.value)


@pytest.mark.parametrize("code", [404, 408, 425, 429, 500, 503])
def test_a_gateway_without_its_cluster_is_away(dashboard, tmp_path, code):
    one = cluster(dashboard, tmp_path)
    one.check()
    dashboard.code = code
    with pytest.raises(AwayError):
        one.call("list_jobs")
    dashboard.code = 200
    assert one.call("list_jobs") == []


def test_a_cluster_that_takes_long_to_say_how_a_job_does_is_away(dashboard, tmp_path, monkeypatch):
    monkeypatch.setattr(clusters, "STATUS_TIMEOUT_SECONDS", (0.2, 0.2))
    one = cluster(dashboard, tmp_path)
    one.check()
    dashboard.go.clear()
    with pytest.raises(AwayError, match="timed out"):
        one.call("list_jobs")


@pytest.mark.parametrize(
    ("function", "code", "away"),
    [
        ("get_job_status", 404, False),
        ("get_job_status", 429, True),
        ("submit_job", 400, False),
        ("submit_job", 500, False),
        ("submit_job", 408, True),
    ],
)
def test_what_a_dashboard_says_of_a_job_is_an_answer(function, code, away):
    assert clusters._is_away(RuntimeError(f"Request failed with status code {code}: no."), function) == away
