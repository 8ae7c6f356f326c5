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


def yours() -> str:
    """The first block: what is to be replaced."""
    return commands().partition("\n\n")[0]


def test_every_stage_is_there_with_an_id_of_its_own():
    text = commands()
    for k in (0, 1, 2):
        text += text[text.index("for k in $EXPERTS") :].replace("$k", str(k))
    for name in [*stages.names(configs.load("tiny")), "evaluate"]:
        assert f"--submission-id $NAME-{name}-a$ATTEMPT " in text, name
    for submit in re.findall(r"ray job submit(.*)", commands()):
        assert "--working-dir . --runtime-env docs/runtime_env.yaml --submission-id $NAME-" in submit


def test_what_is_somebodys_stands_in_the_first_block_alone():
    for one in (f"RAY_ADDRESS={ADDRESS}", f"RUN_DIR={STORAGE}", f"ENDPOINT={ENDPOINT}", "CONFIG=tiny"):
        assert re.search(rf"^(export )?{one}\s", yours(), re.M), one
    after = commands().removeprefix(yours())
    assert after.startswith("\n\nray job list")
    assert not re.search(r"://|tiny|for k in [^$]|\ba1\b", after)
    set_there = set(re.findall(r"^(?:export )?([A-Z_]+)=", yours(), re.M))
    assert set(re.findall(r"\$([A-Z_]+)", after)) == set_there - {"RAY_ADDRESS", "RAY_AUTH_MODE"}
    assert set_there > set(re.findall(r"`\$([A-Z_]+)", DOC))


def test_experts_are_those_of_the_config_and_ids_those_of_the_run(tmp_path):
    """Eight for the paper's runs, whatever a file says; runs of one name in two places do not meet."""
    (tmp_path / "run.yaml").write_text("preset: demo\nname: two\nrun_dir: s3://elsewhere/x\nexperts: 2\n")
    env = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}
    env["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{env['PATH']}"
    found = []
    for config, run in (("paris_xl2", "s3://bucket/run"), (str(tmp_path / "run.yaml"), "s3://other/run")):
        script = yours().replace("CONFIG=tiny", f"CONFIG={config}").replace(STORAGE, run) + '\necho "$EXPERTS|$NAME"'
        done = subprocess.run(["bash", "-euc", script], cwd=PROJECT, env=env, capture_output=True, text=True, check=True)
        found.append(done.stdout.strip().split("|"))
    assert [experts for experts, _ in found] == ["0 1 2 3 4 5 6 7", "0 1"]
    assert found[0][1] != found[1][1]
    assert all(re.fullmatch(r"run-\d+", name) for _, name in found)


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
        settings = text.partition("\n\n")[0]
        submit = next(block for block in text.split("\n\n") if "ray job submit" in block)
        first = submit[submit.index("ray job submit") :].split("\n")
        for said in ("RAY_AUTH_MODE=disabled", "RAY_AUTH_MODE=token RAY_AUTH_TOKEN=wrong"):
            refused = bash(f"{settings}\nunset RAY_AUTH_TOKEN_PATH\nexport {said}\n" + "\n".join(first[:2]))
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
