"""``python -m jobs.evaluate``: exit codes and what it says."""

from __future__ import annotations

import fabricated
import httpx
import pytest

from jobs.evaluate import main
from paris_ray import config as configs
from paris_ray.storage import Folder


@pytest.fixture
def written(run, tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text(configs.dump(run))
    return run, str(path)


def test_measures_and_reports(written, monkeypatch, capsys):
    run, path = written
    server = fabricated.Server()
    real = httpx.Client
    monkeypatch.setattr(httpx, "Client", lambda **options: real(**{**options, "transport": server.transport()}))
    assert main(["--config", path, "--endpoint", "http://server:8000"]) == 0
    assert "| top-2: the deployed model | HTTP | 100% (6 of 6) |" in capsys.readouterr().out
    assert Folder(run.run_dir).exists("report.html")
    assert not Folder(run.run_dir).exists("eval/_lock.json")


def test_without_an_endpoint_it_says_so_in_one_line(written, capsys):
    assert main(["--config", written[1]]) == 2
    said = capsys.readouterr().err.strip().splitlines()
    assert len(said) == 1
    assert "--endpoint" in said[0]


def test_nobody_there_is_worth_another_try(written, capsys):
    assert main(["--config", written[1], "--endpoint", "http://127.0.0.1:9"]) == 1
    assert "does not answer" in capsys.readouterr().err


def test_report_only_needs_no_stage(tmp_path, capsys):
    assert main(["--report-only", "--config", "tiny", "--set", f"run_dir={tmp_path}/new"]) == 0
    assert (tmp_path / "new" / "report.html").exists()
    assert main(["--report-only", "--config", "nowhere.yaml"]) == 2


def test_a_missing_parent_is_named(tmp_path, capsys):
    assert main(["--config", "tiny", "--set", f"run_dir={tmp_path}/new", "--endpoint", "http://127.0.0.1:9"]) == 2
    assert "assemble" in capsys.readouterr().err
