"""A run in two clouds: its experts find their machines in their clusters' files, and Google's machines a token for AWS."""

from __future__ import annotations

import http.server
import os
import subprocess
import threading
from pathlib import Path

import pytest
import yaml

from cluster_configs import check, check_run, render
from paris_ray import config as configs
from paris_ray import stages

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "cluster_configs/multi_cloud"
RUN = str(FOLDER / "run.yaml")


def cluster_file(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict:
    assert render.main([str(ROOT / "cluster_configs" / arguments[0]), "--size", "paris_xl2", *arguments[1:]]) == 0
    return yaml.safe_load(capsys.readouterr().out)


def test_experts_are_divided_over_two_clusters_and_the_rest_is_here():
    config = configs.load(RUN)
    where = {name: config.cluster_of(name) for name in stages.names(config)}
    assert [where[f"expert-{k}"] for k in range(8)] == ["here"] * 4 + ["gcp"] * 4
    assert {cluster for name, cluster in where.items() if not name.startswith("expert-")} == {"here"}
    assert [one.resources.preemption for one in config.experts] == ["aws"] * 4 + ["gcp"] * 4  # each heeds its own cloud
    assert all(one.resources.price_per_hour is not None for one in (*config.experts, config.router))  # so that --max-cost can be said


def test_each_cluster_has_what_its_experts_ask_for(capsys):
    config = configs.load(RUN)
    here = cluster_file(capsys, "aws.yaml")
    there = cluster_file(capsys, "gcp.yaml", "--more", str(FOLDER / "gcp_overlay.yaml"))
    for tree, name in ((here, "here"), (there, "gcp")):
        assert list(check.problems(tree, ROOT)) == []
        assert list(check_run.unmet_demands(tree, config, name)) == []
    assert "~/paris_ray/s3_from_gcp.sh" in there["file_mounts"]
    assert there["file_mounts"].items() > here["file_mounts"].items()  # laid over, not in place of


def test_a_cluster_that_lacks_something_is_named(capsys):
    tree = cluster_file(capsys, "gcp.yaml")
    del tree["available_node_types"]["a100"]
    assert list(check.problems(tree, ROOT)) == []
    found = list(check_run.unmet_demands(tree, configs.load(RUN), "gcp"))
    assert [one.split()[0] for one in found] == ["experts.6.resources", "experts.7.resources"]


class Metadata(http.server.BaseHTTPRequestHandler):
    """Google's metadata server: a new token each time, to who says that he means it."""

    asked: list[str]

    def do_GET(self) -> None:
        good = self.headers.get("Metadata-Flavor") == "Google" and self.path.startswith(
            "/computeMetadata/v1/instance/service-accounts/default/identity?"
        )
        self.asked.append(self.path.partition("?")[2])
        self.send_response(200 if good else 403)
        self.end_headers()
        self.wfile.write(f"token-{len(self.asked)}".encode())

    def log_message(self, *args: object) -> None:
        pass


def test_a_machine_of_google_gets_a_token_for_aws(tmp_path):
    Metadata.asked = []
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Metadata) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        # Tools by name, so that nobody's crontab is touched.
        tools = tmp_path / "bin"
        tools.mkdir()
        for name in ("bash", "curl", "mkdir", "chmod", "mv", "cat", "grep"):
            (tools / name).symlink_to(next(p for one in os.environ["PATH"].split(":") if (p := Path(one) / name).exists()))
        (tools / "crontab").write_text(f'#!/bin/bash\nif [ "$1" = -l ]; then cat {tmp_path}/cron; else cat >{tmp_path}/cron; fi\n')
        (tools / "crontab").chmod(0o755)
        env = {"HOME": str(tmp_path), "PATH": str(tools), "GCE_METADATA_HOST": f"127.0.0.1:{server.server_port}"}
        command = ["bash", str(FOLDER / "s3_from_gcp.sh"), "arn:aws:iam::1:role/paris-gcp", "us-west-2"]
        (tools / "pgrep").write_text('#!/bin/bash\n[ "$*" = "-x cron" ]\n')
        (tools / "pgrep").chmod(0o755)
        for _ in range(2):
            subprocess.run(command, env=env, check=True)
        (tools / "pgrep").write_text("#!/bin/bash\nfalse\n")  # installed, and not started
        stopped = subprocess.run(command, env=env, check=False, capture_output=True, text=True)
        (tools / "pgrep").write_text("#!/bin/bash\ntrue\n")
        (tools / "crontab").rename(tools / "away")
        without = subprocess.run(command, env=env, check=False, capture_output=True, text=True)
        server.shutdown()
    for one in (stopped, without):
        assert one.returncode == 1  # after an hour nothing would reach the store
        assert "install and start it" in one.stderr
    assert (tmp_path / "cron").read_text() == f"*/20 * * * * bash {tmp_path}/.aws_from_gcp/refresh.sh\n"
    token = tmp_path / ".aws_from_gcp/token"
    assert token.read_text() == "token-4"
    assert token.stat().st_mode & 0o777 == 0o600
    assert set(Metadata.asked) == {"audience=sts.amazonaws.com&format=full"}
    # node.env hands it on.
    said = subprocess.run(
        ["bash", "-c", f". {ROOT}/cluster_configs/node.env; echo $AWS_ROLE_ARN $AWS_WEB_IDENTITY_TOKEN_FILE $AWS_REGION $RAY_AUTH_MODE"],
        env={"HOME": str(tmp_path), "PATH": "/usr/bin:/bin"},
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert said.split() == ["arn:aws:iam::1:role/paris-gcp", str(token), "us-west-2", "token"]
