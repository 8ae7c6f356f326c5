"""What each stage depends on: changing a setting makes exactly the right stages stale."""

from __future__ import annotations

from pathlib import Path

import pytest

from jobs import cli
from paris_ray import config, stages
from paris_ray.config import RunConfig
from paris_ray.manifest import Stage
from paris_ray.storage import Folder


def run(path: Path, *sets: str) -> RunConfig:
    return config.load("tiny", [f"run_dir={path}", *sets])


def order(one: RunConfig) -> list[str]:
    made = ["encoders", "embed", *(f"shard-{k}" for k in range(one.num_experts))]
    return [*made, *(name for name in stages.names(one) if name != "embed"), "evaluate"]


def make_all(one: RunConfig) -> None:
    for name in order(one):
        stage = stages.stage(one, name)
        stage.begin()
        stage.folder.write_bytes("file", name.encode())
        stage.publish({"sizes": [3] * one.num_experts} if name == "partition" else None)


def stale(one: RunConfig) -> set[str]:
    return {name for name in order(one) if stages.status(one, name).state == "stale"}


EXPERTS = {"expert-0", "expert-1", "expert-2"}


@pytest.mark.parametrize(
    ("setting", "expected"),
    [
        ("experts.1.train.batch_size=16", {"expert-1"}),
        ("expert.train.learning_rate=0.5", EXPERTS),
        ("router.train.batch_size=16", {"router", "control_router"}),
        ("router.text=none", {"router"}),
        ("router.caption_dropout=0.2", {"router", "control_router"}),
        ("partition.fine=12", {"partition", "shard-0", "shard-1", "shard-2"}),
        ("data.rows_per_part=64", {"embed"}),
        ("data.codec.channels=8", {"encoders", "embed"}),
        ("sampling.steps=9", {"assemble"}),
        ("evaluation.held_out_captions=9", {"evaluate"}),
        # Where and on how much a stage runs does not change its result …
        ("expert.resources.cpus=4", set()),
        ("expert.resources.fallback={cpus: 9}", set()),
        ("expert.cluster=eu", set()),
        ("data.max_encoders=9", set()),
        ("max_parallel=1", set()),
        ("serve.port=9000", set()),
        ("partition.backend=torch", set()),
        ("data.encoder_cpus=2", set()),
        # … nor how often it is looked at and saved, nor the size of a contact sheet …
        ("expert.train.log_images=9", set()),
        ("expert.train.checkpoint_images=9", set()),
        ("router.train.sample_images=9", set()),
        # … nor whether activations are kept or computed again …
        ("expert.train.gradient_checkpointing=true", set()),
        ("partition.contact_sheet=9", {"partition"}),
        # … but encoders round otherwise on a GPU, however large a share of one, …
        ("data.encoder_gpus=1", {"embed"}),
        ("data.encoder_gpus=0.25", {"embed"}),
        # … as does the number of threads of a matrix product, and generated code and micro-batches, which add in another order.
        ("experts.0.resources.threads=2", {"expert-0"}),
        ("router.train.compile=true", {"router", "control_router"}),
        ("experts.1.train.micro_batch=4", {"expert-1"}),
    ],
)
def test_a_setting_makes_exactly_its_stages_stale(tmp_path: Path, setting: str, expected: set[str]) -> None:
    made = run(tmp_path, "clusters.eu={address: 'http://h:1'}")
    make_all(made)
    assert stale(made) == set()
    assert stale(run(tmp_path, "clusters.eu={address: 'http://h:2'}", setting)) == expected


def test_a_share_of_a_gpu_is_a_gpu(tmp_path: Path) -> None:
    make_all(run(tmp_path, "data.encoder_gpus=1"))
    assert stale(run(tmp_path, "data.encoder_gpus=0.5")) == set()


def append(one: RunConfig, name: str) -> None:
    """A new version of a stage: another file, and the manifest."""
    made = stages.stage(one, name)
    before = made.status().manifest
    assert before is not None
    made.folder.write_bytes(f"file-{before['version']}", b"more rows")
    made.publish(after=before)


def test_appended_rows_leave_what_was_made_before_valid(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one = run(tmp_path)
    make_all(one)
    append(one, "shard-1")
    assert stale(one) == set()
    assert stages.status(one, "expert-1").notes == ("made from version 1 of 2 of shard",)
    assert stages.status(one, "router").notes == ("made from version 1 of 2 of shard-1",)
    assert stages.status(one, "expert-0").notes == stages.status(one, "shard-1").notes == ()
    append(one, "shard-1")
    append(one, "shard-0")
    assert stages.status(one, "router").notes == ("made from version 1 of 2 of shard-0", "made from version 1 of 3 of shard-1")
    assert all(stages.status(one, name).state == "valid" for name in order(one))
    cli.print_plan(one)
    assert "expert-1        valid     skip\n    made from version 1 of 3 of shard\n" in capsys.readouterr().out
    # What is trained now is of the last version, and says nothing.
    expert = stages.stage(one, "expert-1")
    expert.begin(rebuild=True)
    expert.publish()
    assert stages.status(one, "expert-1").notes == ()
    # Rows that were exchanged, not appended, are other rows.
    shard = stages.stage(one, "shard-1")
    shard.folder.write_bytes("file", b"other rows")
    shard.publish()
    assert "expert-1" in stale(one)


def test_half_a_result_is_not_finished_from_another_version(tmp_path: Path) -> None:
    one = run(tmp_path)
    make_all(one)
    expert = stages.stage(one, "expert-1")
    expert.folder.delete("_manifest.json")
    assert stages.status(one, "expert-1").state == "partial"
    append(one, "shard-1")
    assert stages.status(one, "expert-1").state == "stale"


def test_a_new_parent_makes_its_children_stale(tmp_path: Path) -> None:
    one = run(tmp_path)
    make_all(one)
    shard = stages.stage(one, "shard-1")
    shard.folder.write_bytes("file", b"other rows")
    shard.publish()
    assert stale(one) == {"expert-1", "router", "control_router"}
    expert = stages.stage(one, "expert-2")
    expert.folder.write_bytes("file", b"other weights")
    expert.publish()
    assert stale(one) == {"expert-1", "router", "control_router", "assemble"}


def test_every_stage_waits_for_its_parents_and_says_what_to_run(tmp_path: Path) -> None:
    one = run(tmp_path)
    for name in stages.names(one):
        if name != "embed":
            found = stages.status(one, name)
            assert found.state == "waiting", name
            assert "python -m jobs." in found.reasons[0]
    make_all(one)
    for name in order(one):
        assert stages.status(one, name).state == "valid"


def test_embed_makes_its_own_parent_so_it_never_waits(tmp_path: Path) -> None:
    one = run(tmp_path)
    assert stages.status(one, "embed").state == "absent"
    encoders = stages.stage(one, "encoders")
    encoders.begin()
    assert stages.status(one, "embed").state == "partial"
    assert stages.status(run(tmp_path, "data.codec.channels=8"), "embed").state == "stale"
    encoders.publish()
    assert stages.status(one, "embed").state == "absent"


def test_folders_are_the_designs(tmp_path: Path) -> None:
    one = run(tmp_path)
    root = Folder(tmp_path).path
    where = {name: stages.folder(one, name).path.removeprefix(root + "/") for name in [*order(one)]}
    assert where == {
        "encoders": "encoders", "embed": "corpus", "partition": "clusters", "assemble": "model", "evaluate": "eval",
        "shard-0": "shards/expert=0", "shard-1": "shards/expert=1", "shard-2": "shards/expert=2",
        "expert-0": "experts/0", "expert-1": "experts/1", "expert-2": "experts/2", "router": "router", "control_router": "control_router",
    }  # fmt: skip


def test_names_are_in_an_order_in_which_parents_come_first(tmp_path: Path) -> None:
    one = run(tmp_path)
    names = [*stages.names(one), "evaluate"]
    for position, name in enumerate(names):
        assert set(stages.parents(one, name)) <= set(names[:position])
    assert "control_router" not in stages.names(run(tmp_path, "evaluation.control_router=false"))


def test_unknown_stages_and_experts_are_refused(tmp_path: Path) -> None:
    one = run(tmp_path)
    with pytest.raises(ValueError, match="'tidy' is not a stage; known are embed, partition"):
        stages.parents(one, "tidy")
    with pytest.raises(ValueError, match="there are experts 0…2"):
        stages.config_part(one, "expert-7")


def test_the_same_inputs_have_the_same_fingerprint_in_another_folder(tmp_path: Path) -> None:
    a, b = run(tmp_path / "a"), run(tmp_path / "b")
    made: list[dict[str, str]] = []
    for one in (a, b):
        make_all(one)
        made.append({name: stages.stage(one, name).status().manifest["fingerprint"] for name in order(one)})  # type: ignore[index]
    assert made[0] == made[1]
    assert isinstance(stages.stage(a, "embed"), Stage)
