"""Serve configs: printed, put into a RayService, checked."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from cluster_configs import check_serve, serve
from cluster_configs.check_serve import serve_problems

KUBERAY = Path(__file__).parents[2] / "cluster_configs/kuberay"


def test_the_services_config_is_in_step_with_the_application():
    service = (KUBERAY / "serving/service.yaml").read_text()
    given = yaml.safe_load((KUBERAY / "serving.yaml").read_text())
    made = serve.deploy_config(given, 8, "0.0.0.0")
    assert yaml.safe_load(yaml.safe_load(service)["spec"]["serveConfigV2"]) == made
    assert serve.in_service(service, serve.text(made)) == service


@pytest.mark.parametrize("placement", ["together", "apart", [[0, 1], {"experts": [2], "replicas": [1, 3]}]])
def test_deployments_are_those_that_serve_would_build(placement, tmp_path):
    from ray.serve._private.build_app import build_app

    from serve_app.app import Args, build

    (tmp_path / "paris.json").write_text(json.dumps({"num_experts": 3}))
    args = {"model": str(tmp_path), "placement": placement}
    theirs = {one.name for one in build_app(build(Args(**args)), name="paris").deployments}
    ours = serve.deploy_config(args, 3, "127.0.0.1")["applications"][0]["deployments"]
    assert {one["name"] for one in ours} == theirs
    assert list(serve_problems(serve.text(serve.deploy_config(args, 3, "127.0.0.1")), experts=3)) == []


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("proxy_location: EveryNode", "proxy_locations: EveryNode", "Did you mean 'proxy_location'"),
        ("proxy_location: EveryNode", "proxy_location: Everywhere", "proxy_location"),
        ("route_prefix: /", "route_prefx: /", "Did you mean 'route_prefix'"),
        ("port: 8000", "prot: 8000", "http_options.prot"),
        ("port: 8000", "port: http", "http_options.port"),
        ("min_experts: 4", "min_expert: 4", "min_expert"),
        ("- name: ExpertGroup-1", "- name: ExpertGroup-2", "Did you mean 'ExpertGroup-"),
        ("user_config:", "user_confg:", "Did you mean 'user_config'"),
        ("import_path: serve_app.app:build", "import_path: serve_app.application:build", "nothing that can be imported"),
        ("- 7\n", "- 8\n", "none twice"),
    ],
)
def test_a_mistake_in_a_serve_config_is_caught(old, new, said):
    text = serve.text(serve.deploy_config(yaml.safe_load((KUBERAY / "serving.yaml").read_text()), 8, "127.0.0.1"))
    assert old in text
    assert list(serve_problems(text)) == []
    assert any(said in one for one in serve_problems(text.replace(old, new)))


def test_a_serve_config_is_printed_from_the_words_of_serve_run(capsys, tmp_path):
    assert serve.main(["model=s3://bucket/run/model", "placement=[[0,1],[2]]", "--experts", "3"]) == 0
    made = yaml.safe_load(capsys.readouterr().out)
    assert made["http_options"]["host"] == "127.0.0.1"  # a Serve that is started so may have no keys
    assert [one["name"] for one in made["applications"][0]["deployments"]] == ["Api", "Sampler", "ExpertGroup-0", "ExpertGroup-1"]
    assert serve.main(["modle=x"]) == 2
    assert serve.main(["model"]) == 2
    (tmp_path / "list.yaml").write_text("- model\n")
    assert serve.main(["--args", str(tmp_path / "list.yaml")]) == 2
    (tmp_path / "x.yaml").write_text("spec: {}\n")
    assert serve.main(["model=x", "--service", str(tmp_path / "x.yaml")]) == 2
    capsys.readouterr()
    assert serve.main(["--args", str(tmp_path / "none.yaml")]) == 2
    assert f"--args {tmp_path}/none.yaml cannot be read (No such file or directory); name a file such as" in capsys.readouterr().err


def test_a_services_file_is_written_only_when_told(capsys, tmp_path):
    file, before = tmp_path / "service.yaml", (KUBERAY / "serving/service.yaml").read_text()
    file.write_text(before)
    arguments = ["--args", str(KUBERAY / "serving.yaml"), "--service", str(file), "model=s3://theirs/run/model"]
    assert serve.main(arguments) == 0
    assert file.read_text() == before
    assert capsys.readouterr().out == before.replace("s3://bucket/run/model", "s3://theirs/run/model")
    assert serve.main([*arguments, "--in-place"]) == 0
    assert capsys.readouterr().out == ""
    assert file.read_text() == before.replace("s3://bucket/run/model", "s3://theirs/run/model")
    assert serve.main(["model=x", "--in-place"]) == 2


def test_a_serve_config_is_checked_by_a_command(capsys, tmp_path):
    assert serve.main(["model=s3://theirs/run/model", "placement=[[0,1],[2]]", "--experts", "3"]) == 0
    (tmp_path / "serve.yaml").write_text(capsys.readouterr().out)
    assert check_serve.main([str(tmp_path / "serve.yaml"), "--experts", "3"]) == 0
    (tmp_path / "bad.yaml").write_text((tmp_path / "serve.yaml").read_text().replace("port: 8000", "prot: 8000"))
    capsys.readouterr()
    assert check_serve.main([str(tmp_path / "bad.yaml"), "--experts", "3"]) == 1
    assert capsys.readouterr().out.startswith(f"{tmp_path}/bad.yaml: http_options.prot: there is no such key.")
    assert check_serve.main([str(tmp_path / "none.yaml")]) == 2
    capsys.readouterr()
    with pytest.raises(SystemExit, match="0"):
        check_serve.main(["--help"])
    assert "serve.yaml" in capsys.readouterr().out
