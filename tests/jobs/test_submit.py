"""docs/submit.md: its commands are complete, its environment is pinned, and on a real cluster they do what it says, word for word."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from jobs.head import free_ports
from jobs.local_cluster import PROJECT, LocalCluster
from paris_ray import config as configs
from paris_ray import stages

DOC = (PROJECT / "docs/submit.md").read_text()
ADDRESS, STORAGE, ENDPOINT = "http://head:8265", "s3://bucket/run", "http://127.0.0.1:8000"


def commands() -> str:
    return "\n".join(re.findall(r"^```sh\n(.*?)^```", DOC, re.MULTILINE | re.DOTALL))


def test_every_stage_is_there_with_an_id_of_its_own():
    text = commands()
    for k in (0, 1, 2):
        text += text[text.index("for k in") :].replace("$k", str(k))
    for name in [*stages.names(configs.load("tiny")), "evaluate"]:
        assert f"--submission-id run-{name}-a1 " in text, name
    for submit in re.findall(r"ray job submit(.*)", commands()):
        assert "--working-dir . --runtime-env docs/runtime_env.yaml --submission-id run-" in submit
    # What is to be replaced is said, and nothing else looks like somebody's.
    table = DOC[: DOC.index("## Who may")]
    for one in (ADDRESS, STORAGE, ENDPOINT):
        assert f"| `{one}` |" in table
    assert set(re.findall(r"\w+://[^\s/]+", commands())) == {ADDRESS, "s3://bucket", ENDPOINT}


def test_the_runtime_environment_is_one_that_ray_takes_and_pins_what_it_says(monkeypatch):
    from ray.runtime_env import RuntimeEnv

    text = (PROJECT / "docs/runtime_env.yaml").read_text()
    RuntimeEnv(**yaml.safe_load(text))
    monkeypatch.chdir(PROJECT)
    installing = RuntimeEnv(**yaml.safe_load(text.replace("# pip:", "pip:")))
    packages = installing["pip"]["packages"]
    assert {one.split("==")[0] for one in packages} > {"ray", "torch", "diffusers", "open-clip-torch"}
    assert all("==" in one for one in packages)


class Remote(LocalCluster):
    """One that knows nothing of this copy of the project but what is sent."""

    def _server_env(self) -> dict[str, str]:
        return {**super()._server_env(), "PYTHONPATH": ""}


@pytest.mark.chaos
@pytest.mark.timeout(1500)
def test_its_commands_make_a_model(tmp_path):
    run, home = tmp_path / "run", tmp_path / "home"
    (port,) = free_ports(1)
    with Remote(tmp_path / "cluster", num_cpus=4) as cluster:
        (home / ".ray").mkdir(parents=True)
        shutil.copy(cluster.temp_dir / "token", home / ".ray/auth_token")
        http = {"proxy_location": "HeadOnly", "http_options": {"host": "127.0.0.1", "port": port}, "applications": []}
        cluster.request("/api/serve/applications/", http, method="PUT", timeout=120.0)
        env = {key: value for key, value in os.environ.items() if not key.startswith(("RAY_", "PYTHON"))}
        env |= {"HOME": str(home), "PATH": f"{Path(sys.executable).parent}{os.pathsep}{env['PATH']}"}
        text = commands().replace(ADDRESS, cluster.address).replace(STORAGE, str(run)).replace(ENDPOINT, f"http://127.0.0.1:{port}")

        def bash(script: str) -> subprocess.CompletedProcess[str]:
            return subprocess.run(["bash", "-euc", script], cwd=PROJECT, env=env, capture_output=True, text=True, check=False, timeout=1200)

        # Without the token, or with another, nothing is done.
        submit = next(block for block in text.split("\n\n") if "ray job submit" in block)
        first = submit[submit.index("ray job submit") :].split("\n")
        for said in ("RAY_AUTH_MODE=disabled", "RAY_AUTH_MODE=token RAY_AUTH_TOKEN=wrong"):
            refused = bash(f"export RAY_ADDRESS={cluster.address} {said}\n" + "\n".join(first[:2]))
            assert refused.returncode != 0
            assert re.search("(?i)authenticat|token", refused.stdout + refused.stderr)
        assert cluster.request("/api/jobs/") == []

        done = bash(text)
        assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-5000:]
        config = configs.load(str(run / "config.yaml"))
        for name in [*stages.names(config), "evaluate"]:
            assert stages.stage(config, name).status(verify=True).state == "valid", name
        assert (run / "report.html").exists()
        # What ran was what was sent.
        jobs = {job["submission_id"]: job for job in cluster.request("/api/jobs/") if job["submission_id"]}
        assert all(job["runtime_env"]["working_dir"].startswith("gcs://") for job in jobs.values())
        # The same command again is refused.
        again = bash(text[: text.index("\nray job list")] + "\n" + "\n".join(first[:2]))
        assert again.returncode != 0
        assert "already exists" in again.stdout + again.stderr
