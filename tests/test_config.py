"""The schema, its presets and what its errors say."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import fsspec
import pytest
import yaml
from fsspec.implementations.memory import MemoryFileSystem

from cluster_configs.demand import demands, fits, selects
from paris_ray import config
from paris_ray.config import ConfigError, RunConfig
from paris_ray.opening import open_folder
from paris_ray.storage import Folder


@pytest.mark.parametrize("name", sorted(config.PRESETS))
def test_presets_are_whole_and_survive_the_round_trip(name: str, tmp_path: Path) -> None:
    loaded = config.load(name)
    (tmp_path / "config.yaml").write_text(config.dump(loaded))
    again = config.load(str(tmp_path / "config.yaml"))
    assert again == loaded
    assert config.dump(again) == config.dump(loaded)
    assert loaded.name == name


def test_a_saved_config_still_has_defaults_of_its_experts(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text(config.dump(config.load("tiny", ["experts.1.train.learning_rate=0.5"])))
    changed = config.load(str(tmp_path / "config.yaml"), ["expert.train.learning_rate=0.25"])
    assert [one.train.learning_rate for one in changed.experts] == [0.25, 0.5, 0.25]
    assert [one.objective for one in changed.experts] == ["flow", "ddpm", "flow"]


def test_presets_say_what_they_promise() -> None:
    demo, tiny = config.load("demo"), config.load("tiny")
    assert (demo.num_experts, demo.partition.fine, demo.partition.max_share, demo.data.image_size) == (8, 64, 1.1, 32)
    assert [e.objective for e in tiny.experts] == ["flow", "ddpm", "flow"]
    assert [e.model.hidden_size for e in tiny.experts] == [32, 32, 48]
    xl = config.load("paris_xl2").experts[0].model
    assert (xl.hidden_size, xl.num_layers, xl.num_heads, xl.patch_size) == (1152, 28, 16, 2)
    b = config.load("paris_b2").router.model
    assert (b.hidden_size, b.num_layers, b.num_heads) == (768, 12, 12)
    assert config.load("demo").router.caption_dropout == 0.1


def test_sets_files_and_presets_overlay(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("preset: demo\nseed: 3\nexpert:\n  train:\n    batch_size: 64\n")
    one = config.load(str(path), ["experts=4", "expert.train.learning_rate=0.5", "data.source.emoji=null", "partition.max_share=2"])
    assert (one.seed, one.num_experts) == (3, 4)
    assert {e.train.batch_size for e in one.experts} == {64}
    assert {e.train.learning_rate for e in one.experts} == {0.5}
    assert one.data.source.emoji is None  # type: ignore[union-attr]


def test_one_expert_can_differ_in_anything() -> None:
    one = config.load(
        "demo", ["experts.3.objective=ddpm", "experts.3.model.size=S/2", "experts.5.model.num_layers=2", "experts.5.train.batch_size=8"]
    )
    assert [e.objective for e in one.experts].count("ddpm") == 1
    assert (one.experts[3].model.hidden_size, one.experts[3].model.num_layers) == (384, 12)
    assert (one.experts[5].model.hidden_size, one.experts[5].model.num_layers) == (128, 2)
    assert one.experts[5].train.batch_size == 8
    assert one.experts[4] == one.experts[0] == one.expert


def test_one_expert_alone_learns_the_whole_corpus() -> None:
    assert config.load("demo", ["experts=1", "partition.method=random"]).num_experts == 1


def test_naming_another_source_drops_the_old_ones_keys() -> None:
    one = config.load("demo", ["data.source={kind: folder, uri: /pictures}", "data.codec={kind: vae}"])
    assert one.data.source.kind == "folder"
    assert one.data.codec.kind == "vae"
    assert one.data.image_size == 32


def fails(*sets: str, source: str = "demo") -> str:
    with pytest.raises(ConfigError) as caught:
        config.load(source, list(sets))
    return str(caught.value)


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ("partition.finee=3", ["partition.finee: no such key", "Did you mean 'fine'?"]),
        ("expert.train.batchsize=3", ["expert.train.batchsize: no such key", "'batch_size'"]),
        ("data.codec.chanels=3", ["chanels: no such key", "'channels'"]),
        ("zzz=3", ["zzz: no such key", "Known here", "partition"]),
        ("expert.train.batch_size=0", ["expert.train.batch_size: ", "greater than or equal to 1", "got 0"]),
        ("expert.model.hidden_size=33", ["expert.model: hidden_size 33 must be even and a multiple of num_heads 4"]),
        ("expert.model.size=Q/9", ["expert.model: 'Q/9' is not a size; known are XL/2"]),
        ("experts.1.objective=foo", ["experts.1.objective: ", "'flow' or 'ddpm'", "got 'foo'"]),
        ("experts.9.objective=flow", ["experts.9: there are experts 0…7"]),
        ("experts=1", ["experts: there must be at least 2, and there are 1; raise"]),
        ("data.source={kind: folder, uri: /p, image: a}", ["data.source.image: no such key for kind folder; parquet, hf_dataset have it."]),
        ("data.source={kind: folder, uri: /p, url: a}", ["data.source.url: no such key. Did you mean 'uri'?"]),
        ("data.source.kind=zip", ["data.source.kind: 'zip' is none of openmoji, scenes, folder, parquet, webdataset, hf_dataset."]),
        ("data.source.kind=foldr", ["data.source.kind: 'foldr' is none of", "Did you mean 'folder'?"]),
        ("data.source=/pictures", ["data.source: it has keys of its own; write them as YAML, such as {kind: folder, uri: ", "(got '/pictures')"]),
        ("data.codec=vae", ["data.codec: it has keys of its own; write them as YAML, such as {kind: vae} (got 'vae')"]),
        ("data.split.held_out_rows=0.9", ["data.split.held_out_rows: ", "less than 0.5 (got 0.9); lower it"]),
        ("expert.train.passes=0", ["expert.train.passes: ", "greater than 0 (got 0); raise it"]),
        ("experts=x", ["experts must be a number of experts or a list"]),
        ("partition.fine=4", ["partition.fine is 4, below the 8 experts that have clusters; raise it"]),
        ("data.image_size=36", ["data.image_size 36 must be a multiple of 8", "codec downsampling 4"]),
        ("serve.placement=[[0,1],[2]]", ["serve.placement", "each expert 0…7 once"]),
        ("name=No Good", ["name: "]),
        ("sampling.steps=300", ["sampling.steps is 300, above serve.max_steps 200; raise serve.max_steps"]),
        (
            "data.filter.max_caption_chars=5000",
            ["data.filter.max_caption_chars is 5000, above serve.max_prompt_chars 4000", "raise serve.max_prompt_chars"],
        ),
        ("expert.resources.num_workers=3", ["expert: train.batch_size 16 must be a multiple of resources.num_workers 3"]),
        ("expert.train.micro_batch=3", ["expert: train.micro_batch 3 must divide the 16 rows of a worker's share", "set it to a divisor, to null"]),
        ("experts.2.train.micro_batch=0", ["experts.2.train.micro_batch: ", "greater than or equal to 1"]),
        ("expert.train.micro_batch=most", ["expert.train.micro_batch: Input should be 'auto' (got 'most')"]),
        ("partition.max_share=1.0", ["partition.max_share: ", "greater than 1"]),
        ("experts.1.cluster=eu", ["experts.1.cluster is 'eu', which is not under clusters", "Known: here"]),
        ("clusters.eu={adress: 'http://h:1'}", ["clusters.eu.adress: no such key", "'address'"]),
        ("clusters.eu={address: 'h:8265'}", ["clusters.eu.address: it must be the URL of a Ray dashboard: http://HOST:8265"]),
        ("clusters.eu={address: 'http://me:secret@h:1'}", ["clusters.eu.address: ", "name a token_file instead"]),
        ("run_dir='s3://b/run?region=x&scheme=http'", ["run_dir: it has options (?region=x&scheme=http)", "by the environment", "AWS_ENDPOINT_URL"]),
        ("clusters.eu={address: 'http://h:1', storage: 's3://b/run?region=x'}", ["clusters.eu.storage: it has options (?region=x)"]),
        ("clusters.eu={address: 'http://h:1', storage: run}", ["clusters.eu.storage: it must be a URI or an absolute path"]),
        ("clusters.here={address: 'http://h:1'}", ["clusters.here: that name is taken"]),
        ("expert.resources.fallback={gpus: 1}", ["expert.resources: fallback.gpus is 1 and gpus 0", "both are 0 or neither is"]),
        ("seed", ["--set 'seed' has no '='"]),
        ("seed=[", ["--set 'seed=['", "not valid YAML"]),
        ("experts.2=5", ["experts.2: ", "valid dictionary", "got 5"]),
        ("experts=[{}, null]", ["experts.1: ", "valid dictionary", "got None"]),
        ("expert.model.size=[1]", ["expert.model: [1] is not a size"]),
    ],
)
def test_errors_name_key_value_rule_and_remedy(setting: str, said: list[str]) -> None:
    text = fails(setting)
    for words in said:
        assert words in text


@pytest.mark.parametrize("setting", ["partition.fine=4", "data.image_size=36", "experts=x"])
def test_what_is_wrong_with_the_whole_is_said_without_the_whole(setting: str) -> None:
    text = fails(setting)
    assert text.count("config:") == 1
    assert "got" not in text.replace("got 'x'", "")
    assert len(text) < 200


def test_a_fallback_says_only_where_it_differs(tmp_path: Path) -> None:
    sets = ["expert.resources={cpus: 3, labels: {market: spot}, fallback: {labels: {}, price_per_hour: 2}}", "experts.1.resources.cpus=5"]
    (tmp_path / "config.yaml").write_text(config.dump(config.load("tiny", sets)))
    one = config.load(str(tmp_path / "config.yaml"))
    taken = one.on_fallback("expert-1").experts
    assert (taken[1].resources.cpus, taken[1].resources.labels, taken[1].resources.price_per_hour) == (5, {}, 2)
    assert (one.experts[1].resources.labels, one.experts[1].resources.price_per_hour) == ({"market": "spot"}, None)
    assert (taken[0], taken[2]) == (one.experts[0], one.experts[2])
    with pytest.raises(ConfigError, match=r"router: there is no resources\.fallback"):
        one.on_fallback("router")


def test_a_fallback_changes_the_labels_that_it_names(tmp_path: Path) -> None:
    """A fallback that is on demand is no smaller GPU."""
    sets = ["expert.resources={labels: {market: spot}, fallback: {labels: {market: on-demand}}}"]
    (tmp_path / "config.yaml").write_text(config.dump(config.load("paris_xl2", sets)))
    one = config.load(str(tmp_path / "config.yaml"))
    taken = one.on_fallback("expert-3").experts[3].resources.labels
    assert taken == {**one.experts[3].resources.labels, "market": "on-demand"}
    assert taken.keys() == {"gpu_memory", "market"}


def test_a_password_in_an_address_is_not_shown() -> None:
    assert "secret" not in fails("clusters.eu={address: 'http://me:secret@h:1'}")


PLACES = (
    "run_dir",
    "data.source={kind: folder, uri: URI}",
    "data.source={kind: parquet, uri: p, images: URI}",
    "data.codec={kind: vae, source: URI}",
    "data.text={kind: clip, source: URI}",
    "data.embedding={kind: timm, weights: URI}",
    "expert.init_from",
    "router.init_from",
    "clusters.eu={address: 'http://h:1', storage: URI}",
)


@pytest.mark.parametrize("key", PLACES)
@pytest.mark.parametrize(
    "uri", ["s3://ACCESS:SECRET@bucket/run", "abfs://:SECRET@account/run", "s3://bucket/run?secret_key=SECRET", "az://c/run?sv=1&sig=SECRET",
            "az://c/run?account_key=SECRET", "gs://b/run?token=SECRET", "simplecache::s3://me:SECRET@bucket/run"],
)  # fmt: skip
def test_a_place_that_holds_a_key_is_refused_and_not_shown(key: str, uri: str) -> None:
    setting = key.replace("URI", f"'{uri}'") if "URI" in key else f"{key}='{uri}'"
    text = fails(setting)
    assert "the URI holds a password or a key" in text
    assert "give it by a role of the machine or by environment" in text
    assert "SECRET" not in text


def test_a_place_without_a_key_is_taken() -> None:
    for uri in ("s3://bucket/a:b@c", "abfs://container@account.dfs.core.windows.net/run", "a:b@c"):
        assert config.load("tiny", [f"run_dir='{uri}'"]).run_dir == uri
    asked = "s3://b/run?region=eu-west-1&endpoint_override=h%3A9000"  # not for a run directory
    assert config.load("tiny", [f"data.source={{kind: folder, uri: '{asked}'}}"]).data.source.uri == asked


def test_arguments_that_name_a_place_are_refused_and_not_shown() -> None:
    """A model, a folder for pictures, a contributor's run, a config."""
    for act in (Folder, lambda uri: open_folder("out", uri), lambda uri: config.load(f"{uri}/config.yaml")):
        with pytest.raises(ConfigError, match="the URI holds a password or a key") as caught:
            act("s3://ACCESS:SECRET@bucket/run")
        assert "SECRET" not in str(caught.value)


def test_routing_by_caption_needs_a_router_that_reads_it() -> None:
    assert "sampling.routing is caption, but router.text is none" in fails("sampling.routing=caption", "router.text=none")


@pytest.mark.parametrize("setting", ["expert.train.batch_size=0", "expert.model.hidden_size=33", "expert.objective=foo", "expert.trainn=1"])
def test_a_fault_in_the_default_is_one_line(setting: str) -> None:
    assert fails(setting).count("\n") == 0


def test_two_faults_are_two_lines() -> None:
    text = fails("expert.train.batch_size=0", "seed=-1")
    assert text.count("\n") == 1
    assert "seed: " in text


def test_files_that_are_not_configs(tmp_path: Path) -> None:
    assert "Did you mean 'demo'?" in fails(source="deno")
    (tmp_path / "a.yaml").write_text("- 1\n")
    assert "must hold keys and values, not list" in fails(source=str(tmp_path / "a.yaml"))
    (tmp_path / "b.yaml").write_text("a: [")
    assert fails(source=str(tmp_path / "b.yaml")).startswith(f"config: {tmp_path}/b.yaml is not valid YAML: line 1, column ")
    (tmp_path / "j.json").write_text('{\n "seed": 3,\n "name" "x"}')
    broken = fails(source=str(tmp_path / "j.json"))
    assert f"{tmp_path}/j.json is not valid YAML: line 3, column 9" in broken
    assert "\n" not in broken
    (tmp_path / "c.yaml").write_text("preset: demmo\n")
    assert "preset 'demmo' does not exist. Did you mean 'demo'?" in fails(source=str(tmp_path / "c.yaml"))
    assert "neither a preset" in fails(source=str(tmp_path / "none.yaml"))


class Refusing(MemoryFileSystem):
    """A store that says no."""

    protocol = "refusing"
    said = ""

    def isfile(self, path: str) -> bool:
        return True

    def _open(self, path: str, mode: str = "rb", **options: Any) -> Any:
        raise OSError(self.said)


@pytest.mark.parametrize(
    ("said", "remedy"),
    [
        ("AWS Error NO_SUCH_BUCKET during HeadBucket operation: no such bucket", "make the bucket first"),
        ("AWS Error NETWORK_CONNECTION during HeadObject operation: curlCode: 7, Could not connect", "look at the network"),
        ("AWS Error ACCESS_DENIED during GetObject operation: Access Denied", "look at the credentials"),
    ],
)
def test_what_a_store_says_of_a_config_is_passed_on(monkeypatch: pytest.MonkeyPatch, said: str, remedy: str) -> None:
    fsspec.register_implementation("refusing", Refusing, clobber=True)
    monkeypatch.setattr(Refusing, "said", said)
    text = fails(source="refusing://bucket/config.yaml")
    assert f"config: 'refusing://bucket/config.yaml' cannot be read: {said}; {remedy}" in text
    assert "neither a preset" not in text


def test_a_store_that_is_none() -> None:
    assert "config: 'gss://bucket' cannot be opened: Protocol not known: gss; write s3://" in fails(source="gss://bucket/config.yaml")
    assert "config: 'memory://nowhere/config.yaml' does not exist" in fails(source="memory://nowhere/config.yaml")


def test_merge_is_by_key_and_kind() -> None:
    base: dict[str, Any] = {"a": {"b": 1, "c": [1, 2]}, "s": {"kind": "x", "n": 1}}
    assert config.merge(base, {"a": {"c": [3]}}) == {"a": {"b": 1, "c": [3]}, "s": {"kind": "x", "n": 1}}
    assert config.merge(base, {"s": {"kind": "y"}})["s"] == {"kind": "y"}
    assert config.merge(base, {"s": {"kind": "x", "m": 2}})["s"] == {"kind": "x", "n": 1, "m": 2}


def test_the_dump_is_plain_yaml_of_the_whole_schema() -> None:
    tree = yaml.safe_load(config.dump(config.load("tiny")))
    assert tree.keys() == RunConfig.model_fields.keys()
    assert tree["expert"]["train"]["batch_size"] == 8
    assert tree["experts"] == [{}, {"objective": "ddpm"}, {"model": {"hidden_size": 48, "num_layers": 1, "num_heads": 4}}]


# Of each size: weights in billions, whose gradients, moments and averages are in float32 too; activations in GB an image, counted in eager bfloat16
# (docs/notebook.md).
COUNTED = {"XL/2": (0.606, 0.462), "B/2": (0.129, 0.134)}


@pytest.mark.parametrize("preset", ["paris_b2", "paris_xl2"])
def test_the_papers_sizes_land_on_gpus_that_hold_them(preset: str) -> None:
    """On any node type of any cloud that has such a label, and on nodes without it, as selectors of Ray are."""
    one = config.load(preset)
    for part in (*one.experts, one.router):
        assert part.train.compile
        assert not part.train.gradient_checkpointing
        parameters, activations = COUNTED[str(part.model.size)]
        assert isinstance(part.train.micro_batch, int)
        needs = 20 * parameters + part.train.micro_batch * activations
        taken = [gb for gb in (16, 24, 32, 40, 48, 80, 94, 141) if selects(part.resources.labels["gpu_memory"], str(gb))]
        assert min(taken) > needs
        assert 80 in taken
        assert selects(part.resources.labels["gpu_memory"], None)


@pytest.mark.parametrize("file", ["aws.yaml", "gcp.yaml", "azure.yaml"])
@pytest.mark.parametrize(("preset", "least"), [("paris_b2", 24), ("paris_xl2", 80)])
def test_each_cloud_has_gpus_for_the_papers_sizes_and_no_small_one_is_taken(file: str, preset: str, least: int) -> None:
    types = yaml.safe_load((Path(__file__).parents[1] / "cluster_configs" / file).read_text())["available_node_types"]
    gpus = {name: int(one["labels"]["gpu_memory"]) for name, one in types.items() if "gpu_memory" in one["labels"]}
    for demand in demands(config.load(preset)):
        if demand.name.startswith("experts"):
            taken = {gpus[name] for name, one in types.items() if fits(demand, one)}
            assert taken
            assert min(taken) >= least
