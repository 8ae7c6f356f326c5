"""What a user sees who got something wrong, and the dry run. No Ray: a fake one that breaks stands in its place."""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import fsspec
import pytest
from fabricated_cluster import publish, tiny
from fsspec.implementations.memory import MemoryFileSystem

from jobs import append, cli, demo, embed, evaluate, partition, run_all, serve, status
from paris_ray import config as configs
from paris_ray import stages
from paris_ray.lock import Lock
from paris_ray.progress import Progress
from paris_ray.storage import Folder
from paris_ray.training.budget import Inputs, expert_flops

PROJECT = Path(__file__).parent.parent.parent


def arguments(folder, *more):
    return ["--config", "tiny", "--set", f"run_dir={folder}", *more]


def fails(capsys, main, argv):
    """The message of a run that ends with 2, in one block without a traceback."""
    assert main(argv) == 2
    found = capsys.readouterr()
    assert "Traceback" not in found.err
    return found.err


@pytest.mark.parametrize("main", [run_all.main, demo.main])
def test_unknown_key(capsys, tmp_path, main):
    message = fails(capsys, main, arguments(tmp_path, "--set", "expert.train.batchsize=3"))
    assert "expert.train.batchsize" in message
    assert "batch_size" in message
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ("sampling.routing=top-9", "sampling.routing: 'top-9' is not one of top-1 … top-3"),
        ("run_dir=nowhere://x", "run_dir: 'nowhere://x' cannot be opened"),
        ("run_dir=/proc/nowrite", "run_dir: /proc/nowrite cannot be made"),
        ("data.source={kind: folder, uri: 'foo://bucket/x'}", "data.source.uri: 'foo://bucket/x' cannot be opened: Protocol not known"),
        (f"data.source={{kind: folder, uri: {__file__}}}", "test_cli.py is a file; name the folder that holds it"),
        (f"data.source={{kind: parquet, uri: {__file__}, images: 'foo://x'}}", "data.source.images: 'foo://x' cannot be opened"),
    ],
)
def test_what_would_fail_only_much_later_is_said_at_once(capsys, tmp_path, setting, said):
    for main in (run_all.main, embed.main):
        assert said in fails(capsys, main, arguments(tmp_path, "--set", setting))


class Refusing(MemoryFileSystem):
    """A store that says no to whoever reads."""

    protocol = "refusing"

    def isfile(self, path):
        return True

    def _open(self, path, mode="rb", **options):
        raise OSError("AWS Error NO_SUCH_BUCKET during HeadObject operation: no such bucket")


@pytest.mark.parametrize(
    ("main", "more"),
    [(run_all.main, []), (run_all.main, ["--dry-run"]), (embed.main, []), (embed.main, ["--dry-run"]), (status.main, []), (demo.main, [])],
)
def test_what_the_runs_store_says_is_passed_on(capsys, main, more):
    fsspec.register_implementation("refusing", Refusing, clobber=True)
    said = fails(capsys, main, arguments("refusing://bucket/run", *more))
    assert "run_dir: refusing://bucket/run cannot be read: AWS Error NO_SUCH_BUCKET" in said
    assert "make the bucket first" in said


def test_another_cluster_leaves_the_config_to_who_follows_the_run(tmp_path):
    (tmp_path / "there").symlink_to(tmp_path / "here")
    (tmp_path / "here").mkdir()
    eu = f"clusters.eu={{address: 'http://h:1', storage: {tmp_path}/there}}"
    cli.write_config(tiny(tmp_path / "here", eu))
    before = (tmp_path / "here/config.yaml").read_text()
    cli.write_config(configs.load(str(tmp_path / "there/config.yaml"), [f"run_dir={tmp_path}/there"]))
    assert (tmp_path / "here/config.yaml").read_text() == before
    # So where its storage was given as a URI: there the folder's name is a path.
    cli.write_config(tiny(tmp_path / "here", f"clusters.eu={{address: 'http://h:1', storage: 'file://{tmp_path}/there/'}}"))
    before = (tmp_path / "here/config.yaml").read_text()
    cli.write_config(configs.load(str(tmp_path / "there/config.yaml"), [f"run_dir={tmp_path}/there"]))
    assert (tmp_path / "here/config.yaml").read_text() == before
    # The owner may change it.
    cli.write_config(tiny(tmp_path / "here", eu, "max_parallel=1"))
    changed = (tmp_path / "here/config.yaml").read_text()
    assert changed != before
    # Also where that cluster sees the run as it is seen here.
    cli.write_config(tiny(tmp_path / "here", f"clusters.eu={{address: 'http://h:1', storage: {tmp_path}/here}}"))
    assert (tmp_path / "here/config.yaml").read_text() != changed


def test_missing_folder_of_images(capsys, tmp_path):
    message = fails(
        capsys, run_all.main, arguments(tmp_path / "run", "--set", "data.source={kind: folder, uri: /no/such/folder}")
    )  # fmt: skip
    assert "data.source.uri: /no/such/folder does not exist" in message
    assert "--set data.source.uri=" in message
    assert fails(capsys, embed.main, arguments(tmp_path / "run", "--set", "data.source={kind: folder, uri: /no/such/folder}")).startswith("embed: ")
    assert not (tmp_path / "run").exists()


def test_a_run_that_is_being_written(capsys, tmp_path):
    with Lock(Folder(tmp_path), "another run_all"):
        message = fails(capsys, run_all.main, arguments(tmp_path))
    assert "another run_all" in message


def test_a_stale_stage_is_refused_before_anything_starts(capsys, tmp_path):
    config = tiny(tmp_path)
    for name in ("embed", "partition", "expert-0"):
        publish(config, name)
    cli.write_config(config)
    before = (tmp_path / "config.yaml").read_bytes()
    message = fails(capsys, run_all.main, arguments(tmp_path, "--set", "experts.0.train.learning_rate=0.5"))
    assert "expert-0" in message
    assert "config.train.learning_rate: 0.001 → 0.5" in message
    assert "--rebuild expert-0" in message
    assert "expert-1" not in message
    assert (tmp_path / "config.yaml").read_bytes() == before


def test_a_rebuild_that_would_orphan_others_is_refused(capsys, tmp_path):
    config = tiny(tmp_path)
    for name in ("embed", "partition", "expert-0"):
        publish(config, name)
    message = fails(capsys, run_all.main, arguments(tmp_path, "--rebuild", "partition"))
    assert "--rebuild partition --rebuild expert-0" in message
    assert "--rebuild embed" not in message


def test_a_stage_that_does_not_exist(capsys, tmp_path):
    message = fails(capsys, run_all.main, arguments(tmp_path, "--rebuild", "expert-3"))
    assert "'expert-3' is not a stage of this run" in message


def test_nothing_to_serve(capsys, tmp_path):
    message = fails(capsys, serve.main, arguments(tmp_path))
    assert "make demo" in message
    assert f"{tmp_path}/model" in message


@pytest.mark.parametrize("main", [serve.main, evaluate.main])
def test_dry_runs_do_nothing_anywhere(capsys, tmp_path, main):
    more = ["--report-only"] if main is evaluate.main else []
    assert main(arguments(tmp_path, "--dry-run", *more)) == 0
    assert "would" in capsys.readouterr().out
    assert not list(tmp_path.iterdir())
    assert "--rebuild" in fails(capsys, main, arguments(tmp_path, "--rebuild", "embed", *more))


def test_a_missing_parent(capsys, tmp_path):
    parser = argparse.ArgumentParser(prog="job")
    ran = []
    code = cli.run(parser, lambda config, args: ran.append(1), arguments(tmp_path), stage="partition")
    assert code == 2
    assert not ran
    assert "run the stage 'embed' first" in capsys.readouterr().err


def test_what_changed_is_said_once(capsys, tmp_path):
    publish(tiny(tmp_path), "embed")
    cli.write_config(tiny(tmp_path))
    message = fails(capsys, embed.main, arguments(tmp_path, "--set", "data.embedding.image_size=64"))
    assert message.count("config.embedding.image_size") == 1
    publish(tiny(tmp_path), "partition")
    assert fails(capsys, partition.main, arguments(tmp_path, "--set", "partition.fine=4")).count("config.fine") == 1


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("/pictures", "--source: '/pictures' does not say of which kind it is; write it as data.source of a config, '{kind: folder, uri:"),
        ("{kind", "--source: '{kind' is not valid YAML; write it as '{kind: folder, uri:"),
        ("{kind: zip, uri: /pictures}", "data.source.kind: 'zip' is none of openmoji, scenes, folder"),
        ("{kind: folder, uri: /no/such}", "data.source.uri: /no/such does not exist; name what holds the images and captions, --source=…"),
    ],
)
def test_a_source_that_is_none(capsys, tmp_path, source, said):
    for name in ("embed", "partition"):
        publish(tiny(tmp_path), name)
    message = fails(capsys, append.main, arguments(tmp_path, "--source", source))
    assert said in message
    assert "--set" not in message


def test_an_append_needs_clusters(capsys, tmp_path):
    publish(tiny(tmp_path), "embed")
    assert "run the stage 'partition' first" in fails(capsys, append.main, arguments(tmp_path))


def test_dry_run_says_what_each_stage_would_do(capsys, tmp_path):
    config = tiny(tmp_path)
    for name in ("embed", "partition", "expert-0"):
        publish(config, name)
    stages.stage(config, "expert-1").begin()
    changed = arguments(tmp_path, "--set", "experts.0.train.learning_rate=0.5", "--dry-run")
    before = sorted(str(path) for path in tmp_path.rglob("*"))
    assert run_all.main(changed) == 0
    out = capsys.readouterr().out
    text, table = out.split("stage           found")
    assert "learning_rate: 0.5" in text
    rows = {line.split()[0]: line.split(maxsplit=2)[1:] for line in table.splitlines()[1:] if line and not line.startswith(" ")}
    assert rows["embed"] == ["valid", "skip"]
    assert rows["expert-0"] == ["stale", "refuse"]
    assert rows["expert-1"] == ["partial", "resume"]
    assert rows["expert-2"] == ["absent", "run"]
    assert rows["assemble"] == ["waiting", "run after its parents"]
    assert "config.train.learning_rate: 0.001 → 0.5" in table
    assert sorted(str(path) for path in tmp_path.rglob("*")) == before


def test_dry_run_counts_what_training_would_cost(capsys, tmp_path):
    config = tiny(tmp_path)
    assert run_all.main(arguments(tmp_path, "--dry-run")) == 0
    assert "PFLOP" not in capsys.readouterr().out  # nobody knows the clusters yet
    for name in ("embed", "partition"):
        publish(config, name)
    encoders = {"codec": {"channels": 4, "latent_size": 8}, "text": {"max_length": 16, "width": 384}}
    (Folder(tmp_path) / "encoders").write_json("encoders.json", encoders)
    assert run_all.main(arguments(tmp_path, "--set", "experts.1.train.images=4000000", "--dry-run")) == 0
    rows = {line.split()[0]: line.split() for line in capsys.readouterr().out.split("PFLOP")[1].split("Times")[0].splitlines()[1:]}
    assert rows["expert-0"][1:3] == ["320", "32.0"]  # 320 images over 10 rows
    assert rows["expert-1"][1:3] == ["4000000", "200000.0"]
    flops = 3 * expert_flops(config.experts[1].model, Inputs(4, 8, 16, 384)) * 4_000_000
    assert float(rows["expert-1"][3]) == pytest.approx(flops / 1e15, rel=1e-3)
    assert rows["router"][1:3] == ["320", "5.3"]


def test_config_yaml_is_replaced_only_while_nothing_depends_on_what_differs(tmp_path):
    config = tiny(tmp_path)
    publish(config, "embed")
    cli.write_config(config)
    other = tiny(tmp_path, "serve.port=8123", "experts.1.objective=flow")
    cli.write_config(other)
    assert configs.load(str(tmp_path / "config.yaml")) == other
    with pytest.raises(cli.StaleError, match=r"data|seed"):
        cli.write_config(tiny(tmp_path, "seed=7"))
    assert configs.load(str(tmp_path / "config.yaml")) == other


def test_rebuild_clears_the_stage_and_keeps_its_lock(tmp_path):
    config = tiny(tmp_path)
    publish(config, "embed")
    seen = []

    def action(config, args):
        seen.append([entry.name for entry in stages.folder(config, "embed").files(recursive=True)])

    assert cli.run(argparse.ArgumentParser(), action, arguments(tmp_path, "--rebuild", "embed"), stage="embed") == 0
    assert seen == [["_lock.json"]]
    assert cli.status(config, "embed").state == "absent"


def tree(folder):
    """All files below a folder but logs of events and locks, with their content."""
    found = {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    return {name: content for name, content in found.items() if not name.startswith("events/") and not name.endswith("_lock.json")}


def test_a_config_from_before_an_expert_was_added_is_refused(capsys, tmp_path):
    more = tiny(tmp_path, "experts=4", "partition.added=1")
    for name in ("embed", "partition"):
        publish(more, name)
    cli.write_config(more)
    before = tree(tmp_path)
    for job in (embed.main, partition.main, run_all.main):
        message = fails(capsys, job, arguments(tmp_path))
        assert "shards/expert=3 is of an expert that this config, with 3, does not have" in message
        assert f"{tmp_path}/config.yaml: use that config" in message
    assert run_all.main(arguments(tmp_path, "--dry-run")) == 0
    assert re.search(r"partition +stale +refuse\n +partition: shards/expert=3", capsys.readouterr().out)
    assert status.main(arguments(tmp_path)) == 0
    assert re.search(r"partition +stale", capsys.readouterr().out)
    assert tree(tmp_path) == before
    assert cli.status(more, "partition").state == "valid"
    cli.clear(tiny(tmp_path), "partition")  # --rebuild partition
    assert cli.status(tiny(tmp_path), "partition").state == "absent"


@pytest.mark.parametrize("job", ["partition", "run_all"])
def test_a_rebuild_that_would_be_refused_deletes_nothing(capsys, tmp_path, job):
    config = tiny(tmp_path)
    publish(config, "embed", counts={"rows": 100, "splits": {"train": 90}})
    publish(config, "partition")
    cli.write_config(config)
    before = tree(tmp_path)
    wrong = arguments(tmp_path, "--rebuild", "partition", "--set", "partition.fine=400")
    main = {"partition": partition.main, "run_all": run_all.main}[job]
    assert "400 fine clusters need at least as many training rows, and the corpus has 90" in fails(capsys, main, wrong)
    assert tree(tmp_path) == before
    assert main([*wrong, "--dry-run"]) == 0
    assert re.search(r"partition +stale +refuse\n    partition.fine: 400 fine clusters", capsys.readouterr().out)
    assert main([*arguments(tmp_path, "--rebuild", "partition"), "--dry-run"]) == 0
    assert re.search(r"partition +valid +delete it, make it anew", capsys.readouterr().out)
    # With another corpus there may be rows enough.
    run_all.prepare(tiny(tmp_path, "partition.fine=400"), ["embed", "partition"])
    cli.write_config(config)
    missing = arguments(tmp_path, "--rebuild", "embed", "--set", f"data.source={{kind: folder, uri: {tmp_path}/experts}}")
    (tmp_path / "experts").mkdir()
    assert "no image" in fails(capsys, embed.main, missing)
    assert tree(tmp_path) == before


def test_settings_that_the_work_refuses_leave_no_mark(capsys, tmp_path):
    config = tiny(tmp_path)
    cli.write_config(config)
    before, seen = tree(tmp_path), []

    def refuse(config, args):
        first = stages.stage(config, "encoders")
        first.begin()
        with first.attempt():
            seen.append(configs.load(str(tmp_path / "config.yaml")).seed)
            raise configs.ConfigError("no picture")

    assert cli.run(argparse.ArgumentParser(), refuse, arguments(tmp_path, "--set", "seed=7"), stage="embed") == 2
    assert seen == [7]
    assert tree(tmp_path) == before

    def leave_something(config, args):
        first = stages.stage(config, "encoders")
        first.begin()
        with first.attempt():
            first.folder.write_bytes("text/weights", b"some")
            raise configs.ConfigError("no picture")

    assert cli.run(argparse.ArgumentParser(), leave_something, arguments(tmp_path, "--set", "seed=7"), stage="embed") == 2
    assert configs.load(str(tmp_path / "config.yaml")).seed == 7
    assert "made from other inputs" in fails(capsys, embed.main, arguments(tmp_path))


def test_a_dashboard_is_no_cluster_to_join(capsys, tmp_path, monkeypatch):
    """Somebody exported the address for `ray job submit`, and later runs a job on this machine."""
    monkeypatch.setenv("RAY_ADDRESS", "http://head:8265")
    said = fails(capsys, embed.main, arguments(tmp_path))
    assert said.startswith("embed: RAY_ADDRESS is http://head:8265, a dashboard, which takes jobs")
    assert "unset RAY_ADDRESS" in said
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_ctrl_c_is_no_failure(capsys, tmp_path):
    def interrupted(config, args):
        with Progress(Folder(config.run_dir) / "events", "embed", 153, "rows") as progress:
            progress.update(120)
            raise KeyboardInterrupt

    capsys.readouterr()
    assert cli.run(argparse.ArgumentParser(), interrupted, arguments(tmp_path), stage="embed") == 130
    assert capsys.readouterr().err.splitlines()[-1] == "embed: stopped at 120 of 153 rows; the same command goes on"
    assert status.main(arguments(tmp_path)) == 0
    assert re.search(r"embed +stopped +120 / 153 rows", capsys.readouterr().out)


def test_what_embed_says_of_the_rows(capsys, tmp_path):
    """In one order, whether the counts are new or were read back from a manifest, whose keys are sorted."""
    counts = {
        "listed": 160, "rows": 146, "rejected": 14, "reasons": {"duplicate": 1, "no caption": 12, "not an image": 1}, "groups": 142,
        "examples": {"duplicate": ["d.png"], "no caption": ["a.png", "b.png", "c.png"], "not an image": ["x.png"]}, "near_duplicates": 8,
        "splits": {"held_out": 6, "train": 140, "unused": 0, "validation": 0}, "split_changed": 2, "unchecked": 0, "captions_cut": 0, "enlarged": 3,
    }  # fmt: skip
    embed.report(tiny(tmp_path, "data.source={kind: folder, uri: /pictures}"), counts)
    out = capsys.readouterr().out
    assert "146 rows (140 train, 6 held_out)" in out
    assert "142 different ones to the look-alike hash, which ignores colour; 8 rows look nearly like another, 2 changed" in out
    assert "No row is for validation" in out
    assert "Smaller than data.image_size, 32, and enlarged: 3" in out
    lines = [line.split("%  ")[1] for line in out.splitlines()[-3:]]
    assert lines == ["no caption: 'a.png', 'b.png', 'c.png' …", "duplicate: 'd.png'", "not an image: 'x.png'"]
    embed.report(tiny(tmp_path), {**counts, "splits": {"train": 140, "validation": 6}, "enlarged": 0})
    out = capsys.readouterr().out
    assert "\n142 emoji; " in out
    assert "No row is for validation" not in out
    assert "Smaller" not in out


def test_what_is_done_needs_no_ray_and_says_so(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(cli, "connect", lambda: pytest.fail("connected"))
    config = tiny(tmp_path)
    zero = dict.fromkeys(("unchecked", "captions_cut", "rejected", "split_changed", "near_duplicates"), 0)
    publish(config, "embed", counts={**zero, "rows": 60, "listed": 60, "groups": 50, "splits": {"train": 60}})
    publish(config, "partition")
    assert embed.main(arguments(tmp_path)) == 0
    out = capsys.readouterr().out
    assert "nothing to do" in out
    assert "60 rows (60 train)" in out
    assert partition.main(arguments(tmp_path)) == 0
    out = capsys.readouterr().out
    assert "nothing to do" in out
    assert "expert 0 10, expert 1 20, expert 2 30" in out
    Folder(tmp_path).write_json("corpus/_append.json", {"source": {"kind": "folder"}})
    for job in (embed.main, partition.main):
        assert "is half appended" in fails(capsys, job, arguments(tmp_path))


def test_errors_of_the_work_keep_their_traceback(tmp_path):
    def action(config, args):
        raise ValueError("a fault of ours")

    with pytest.raises(ValueError, match="a fault of ours"):
        cli.run(argparse.ArgumentParser(), action, arguments(tmp_path), stage="embed")


@pytest.mark.parametrize("script", ["jobs.run_all", "jobs.demo"])
def test_a_finished_run_needs_no_ray_and_no_time(tmp_path, script):
    config = tiny(tmp_path / "run")
    for name in [*stages.names(config), "evaluate"]:
        publish(config, name)
    (tmp_path / "run" / "report.html").write_text("<html>")
    broken = tmp_path / "broken"
    for package in ("ray", "torch"):
        (broken / package).mkdir(parents=True)
        (broken / package / "__init__.py").write_text("raise RuntimeError('imported where it must not be')")
    env = {**os.environ, "PYTHONPATH": f"{broken}:{PROJECT}"}
    began = time.monotonic()
    done = subprocess.run([sys.executable, "-m", script, *arguments(tmp_path / "run")], env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert str(tmp_path / "run") in done.stdout
    assert time.monotonic() - began < 20
