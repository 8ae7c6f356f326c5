"""A whole comparison, seconds long: cut off, gone on, done; and what it leaves."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from jobs import cli
from jobs import compare as job
from paris_ray.config import ConfigError
from paris_ray.data.scenes import Scene, Scenes
from paris_ray.evaluation import compare_captions, compare_config, compare_rows
from paris_ray.evaluation.arrays import load
from paris_ray.evaluation.compare_plan import Plan
from paris_ray.evaluation.compare_results import Results
from paris_ray.evaluation.compare_rows import MAIN, Run
from paris_ray.evaluation.scene_scorer import SceneScorer, score
from paris_ray.manifest import published
from paris_ray.storage import Folder

pytestmark = pytest.mark.timeout(1500)

ROWS = ["experts", "monolith", "distilled", "blind", "shared-init", "fault-router", "fault-swapped", "fault-raw"]


def settings(folder):
    shape = {"hidden_size": 16, "num_layers": 1, "num_heads": 2}
    train = {"batch_size": 4, "warmup_images": 8, "ema_half_life_images": 16, "checkpoint_images": 16, "log_images": 8}
    return {
        "preset": "compare_tiny",
        "folder": str(folder / "comparison"),
        "base": {
            "name": "minute",
            "data": {
                "source": {"kind": "scenes", "seen": 160, "unseen": 24, "objects": 8, "textures": ["plain", "striped"]},
                "embedding": {"kind": "efficientnet_lite0", "image_size": 32},
                "codec": {"kind": "patch_pca", "channels": 8},
                "rows_per_part": 60,
                "max_encoders": 1,
                "split": {"validation_rows": 0.3},
            },
            "partition": {"fine": 6, "max_share": None, "contact_sheet": 4},
            "expert": {"model": shape, "train": train},
            "experts": 2,
            "router": {"model": shape, "train": {**train, "images": 32}},
            "sampling": {"steps": 2},
        },
        "rows": ROWS,
        "images": 128,
        "seeds": [0, 1],
        "learning_rates": [1e-3, 1e-2],
        "guidance_scales": [1.0, 2.0],
        "routings": ["top-1", "full", "oracle", "experts"],
        "validation_captions": 4,
        "seen_captions": 8,
        "held_out_captions": 6,
        "loss_rows": 8,
        "workers": 2,
    }


def interrupt(arguments):
    """Ctrl-C, to all of its processes as a terminal does, once something is trained; returns what it said."""
    command = [sys.executable, "-m", "jobs.compare", *arguments]
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # tests in the background of a shell ignore it, and so would what they start
    process = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True, start_new_session=True)
    signal.signal(signal.SIGINT, before)
    said = []
    for line in process.stderr:
        said.append(line)
        if "runs/" in line and " done" in line and "stopped" not in said[-1]:
            os.killpg(process.pid, signal.SIGINT)
            break
    said += process.stderr.readlines()
    assert process.wait(120) == cli.INTERRUPTED, said
    deadline = time.monotonic() + 60
    while anybody(process.pid):  # multiprocessing's own helper goes a moment later
        assert time.monotonic() < deadline
        time.sleep(0.1)
    return said


def anybody(group):
    """Whether a process group has a process."""
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    """A comparison that was cut off twice, and then came to its end."""
    folder = tmp_path_factory.mktemp("compare")
    (folder / "minute.yaml").write_text(yaml.safe_dump(settings(folder)))
    arguments = ["--config", str(folder / "minute.yaml")]
    assert interrupt(arguments)[-1] == "compare: stopped; the same command goes on\n"
    compare = job.load(str(folder / "minute.yaml"), [])
    before = stamps(Folder(compare.folder) / "runs", "_manifest.json")
    assert before
    assert job.main([*arguments, "--minutes", "0"]) == cli.STOPPED
    assert job.main(arguments) == 0
    after = stamps(Folder(compare.folder) / "runs", "_manifest.json")
    assert {name: after[name] for name in before} == before
    return arguments, compare


def stamps(folder, ending=""):
    return {e.name: os.stat(f"{folder.path}/{e.name}").st_mtime_ns for e in folder.files(recursive=True) if e.name.endswith(ending)}


def test_again_it_has_nothing_to_do(ran):
    arguments, compare = ran
    assert all(Plan(compare).done(unit.key) for unit in Plan(compare).units())
    before = stamps(Folder(compare.folder) / "runs")
    assert job.main(arguments) == 0
    assert stamps(Folder(compare.folder) / "runs") == before


def test_all_rows_have_the_same_corpus_and_equal_trainings_are_made_once(ran):
    _, compare = ran

    def inode(path):
        return os.stat(f"{compare.folder}/{path}").st_ino

    assert inode("base/corpus/part-0000000.parquet") == inode("partitions/kmeans-2/corpus/part-0000000.parquet")
    plan = Plan(compare)
    rate = plan.rate(MAIN)
    mine, other = (f"runs/{row}/seed-1-rate-{plan.rate(row):g}" for row in (MAIN, "blind"))
    assert inode(f"{mine}/shards/expert=0/_manifest.json") == inode(f"runs/{MAIN}/seed-0-rate-{rate:g}/shards/expert=0/_manifest.json")
    assert plan.rate("blind") == rate
    weights = "experts/0/export/diffusion_pytorch_model.safetensors"
    assert inode(f"{mine}/{weights}") == inode(f"{other}/{weights}")
    assert inode(f"{mine}/router/_manifest.json") != inode(f"{other}/router/_manifest.json")


def test_captions_and_noise_are_paired(ran):
    """The swapped fault's single experts draw what the other's do: same captions, same noise, weights exchanged."""
    _, compare = ran
    results = Results(compare)
    assert set(results.ways) == {
        *ROWS,
        "experts/top-1",
        "experts/full",
        "experts/oracle",
        "experts/expert-0",
        "experts/expert-1",
        "monolith/more-steps",
        "blind/top-1",
        "blind/full",
    }
    assert set(results.unseen) == {*ROWS}
    swapped, main = (load(results.ways[key].folders[0], "weights") for key in ("fault-swapped", "experts"))
    assert np.allclose(swapped[:, 0], main[:, 0], atol=1e-6)  # the first step's router sees nothing but noise and caption
    assert load(results.ways["experts"].folders[0], "pictures").shape == (8, 32, 32, 3)
    # Of two experts top-2 asks both, as full does: with the same captions and noise it is the same picture, at any guidance.
    plan = results.plan
    run = Folder(Run(MAIN, 0, plan.rate(MAIN)).folder(compare))
    for scale in compare.guidance_scales:
        both, full = (load(run / plan.drawing(key, scale, "validation").folder, "pictures") for key in ("experts", "experts/full"))
        assert np.array_equal(both, full)
    assert all(set(way.folders) == ({0} if "expert-" in key else {0, 1}) for key, way in results.ways.items())


def test_raw_weights_are_others_and_swapped_experts_are_swapped(ran):
    """Of a router that knows nothing and of swapped experts there is little to see after some steps; that each is worse is shown where they learn."""
    _, compare = ran
    found = {row: loss for row, _, loss in Results(compare).faults()}
    assert found.keys() == {"fault-router", "fault-swapped", "fault-raw"}
    assert found["fault-raw"].value != 0
    assert found["fault-raw"].seeds == 2
    rate = Plan(compare).rate(MAIN)
    folders = [Folder(Run(row, 0, rate).folder(compare)) for row in ("fault-swapped", MAIN)]
    files = [folder.sha256(f"model/expert_{k}/diffusion_pytorch_model.safetensors") for folder, k in zip(folders, (0, 1), strict=True)]
    assert files[0] == files[1]


def test_the_report_stands_alone_and_says_what_is_claimed(ran):
    _, compare = ran
    folder = Folder(compare.folder)
    html, table = folder.read_bytes("report.html").decode(), folder.read_bytes("table.md").decode()
    assert not re.search(r'(?:src|href)="(?!data:|#)', html)
    said = ("22.60 against 29.64", "cannot be told", "monolith/more-steps", "router that reads the caption", " of 2", "no independent judge")
    for words in (*said, "OpenMoji"):
        assert words in html, words
    assert "| experts |" in table
    header, row = (next(line for line in table.splitlines() if line.startswith(f"| {first} |")).split(" | ") for first in ("way", "experts"))
    assert float(row[header.index("loss")]) == pytest.approx(Results(compare).loss(MAIN), abs=1e-4)
    judge = (Folder(compare_rows.partition_config(compare, MAIN).run_dir) / "encoders").read_json("encoders.json")["embedding"]["fingerprint"]
    assert f"bicubic, weights {judge}" in table
    assert published(folder / "reference")["counts"]["judge"] == {"fingerprint": judge, "image_size": 32}
    assert published(folder / "reference")["software"]["torch"] in html


def test_the_originals_are_the_ceiling_and_shuffled_captions_the_floor(ran):
    """By the scorer's own permutations of the pictures that are there."""
    _, compare = ran
    results = Results(compare)
    way, folder = results.ways[MAIN], Folder(compare_rows.partition_config(compare, MAIN).run_dir)
    asked = [Scene.parse(one.caption) for one in compare_captions.choose(compare, folder, "seen", 8)]
    scorer = SceneScorer(Scenes(compare.base.data.source, 32).names)
    by_chance = []
    for pictures in (load(one, "pictures") for one in way.folders.values()):
        readings = scorer.read(pictures)
        pairs = [score([scene], [seen]).objects[0] for scene in asked for seen in readings]
        by_chance.append(np.mean(pairs))
    assert results.chance(way, "objects") == pytest.approx(np.mean(by_chance))
    assert results.ceiling("seen", "objects") > 0.7  # eight channels of the codec lose some
    choices = {one.id for one in compare_captions.choose(compare, folder, "validation", compare.choice_rows)}
    assert not choices & {one.id for one in compare_captions.choose(compare, folder, "seen", None)}
    with pytest.raises(ConfigError, match="seen: 1000 captions or rows are asked for"):
        compare_captions.choose(compare, folder, "seen", 1000)


def test_the_plan_says_what_is_matched(ran, capsys):
    arguments, _ = ran
    assert job.main([*arguments, "--dry-run"]) == 0
    said = capsys.readouterr().out
    assert re.search(r"monolith +1 × 16 × 1 +1\d\d +", said)
    assert "one H100" in said


def test_what_cannot_be_is_one_line(tmp_path, capsys):
    assert job.main(["--config", "compare_tiny", "--set", "rows=[monolith]"]) == cli.USER_ERROR
    assert "compared with experts" in capsys.readouterr().err
    assert job.main(["--config", "demo"]) == cli.USER_ERROR
    said = capsys.readouterr().err
    assert "demo is a preset of a run, and a comparison has compare_tiny" in said
    assert said.strip().endswith("--config compare_tiny --set base.preset=demo")
    assert compare_config.load("compare_tiny", ["base.preset=demo"]).base.name == "demo"
    assert job.main(["--config", "compare_tiny", "--set", "folder=gss://x/y"]) == cli.USER_ERROR
    assert "folder: 'gss://x/y' cannot be opened: Protocol not known: gss; write s3://" in capsys.readouterr().err


def pictures(folder, count):
    """Parquet files as somebody would bring them."""
    folder.mkdir()
    pq.write_table(pa.table({"image": [b"not looked at"] * count, "caption": [f"caption {i}" for i in range(count)]}), folder / "part.parquet")
    return folder


@pytest.mark.parametrize(
    ("rows", "code", "said"),
    [
        (None, 2, "data.source.uri: {there} does not exist; name what holds the images and captions, --set base.data.source.uri=…"),
        (100, 2, "base.data.split.validation_rows is 0.25, of 100 rows about 24, and 30 are asked for; raise it"),
        (200, 0, "The source lists 200 rows, of which about 48 are for validation (base.data.split.validation_rows 0.25)."),
    ],
)
def test_the_plan_looks_at_the_data(tmp_path, capsys, rows, code, said):
    there = tmp_path / "pictures" if rows is None else pictures(tmp_path / "pictures", rows)
    asked = ["validation_captions=12", "loss_rows=8", "seen_captions=18", "held_out_captions=5", "base.data.split.validation_rows=0.25"]
    sets = [f"base.data.source={{kind: parquet, uri: {there}}}", f"folder={tmp_path}/compare", *asked]
    assert job.main(["--config", "compare_tiny", "--dry-run", *(word for one in sets for word in ("--set", one))]) == code
    told = capsys.readouterr()
    assert "Rows asked for: 30 for validation, 12 to choose by and 18 to judge by; 5 held out." in told.out  # the first of both, the larger ones
    assert "one H100" in told.out
    assert "What that is in money: --set base.expert.resources.price_per_hour=…" in told.out
    assert said.format(there=there) in told.out + told.err
    assert not (tmp_path / "compare").exists()
