"""What a comparison's report says, and what it does not decide, of planted figures."""

from __future__ import annotations

import re

import numpy as np
import pyarrow as pa
import pytest
from planted import CHOSEN, config, drawn, finish, plant, publish, words

from jobs import cli
from jobs import compare as job
from paris_ray.data import schema
from paris_ray.data.scenes import UNSEEN
from paris_ray.evaluation import compare, compare_captions, compare_results
from paris_ray.evaluation.alignment_figures import rank_correlation
from paris_ray.evaluation.arrays import save
from paris_ray.evaluation.compare_captions import Caption
from paris_ray.evaluation.compare_protocol import made_with
from paris_ray.evaluation.compare_report import at_end, verdict_of_fault, write_report
from paris_ray.evaluation.compare_results import Results
from paris_ray.evaluation.compare_rows import Run
from paris_ray.evaluation.compare_verdicts import UNTOLD
from paris_ray.evaluation.intervals import Interval
from paris_ray.manifest import MANIFEST
from paris_ray.storage import Folder


def test_a_report_with_other_settings_is_refused(tmp_path, capsys):
    """What is printed of counts and judges would not be of these pictures."""
    mine = config(tmp_path, "rows=[experts]")
    compare.settle(mine)
    finish(mine)
    Folder(mine.folder).write_bytes("mine.yaml", compare.compare_config.dump(mine).encode())
    before = Folder(mine.folder).read_bytes("config.yaml")
    arguments = ["--config", f"{Folder(mine.folder).path}/mine.yaml", "--report-only"]
    for other, said in (("seen_captions=20", "seen_captions: 40 → 20"), ("judge={kind: efficientnet_lite0, image_size: 64}", "judge: null →")):
        assert job.main([*arguments, "--set", other]) == cli.USER_ERROR
        assert said in capsys.readouterr().err
    assert not Folder(mine.folder).exists("table.md")
    assert job.main([*arguments, "--set", "seeds=[0, 1, 2, 3]"]) == 0  # may grow, and is not kept
    assert "under each seed of training and noise (0, 1, 2, 3)" in capsys.readouterr().out
    assert Folder(mine.folder).read_bytes("config.yaml") == before


@pytest.mark.parametrize("changed", [{"count": 41}, {"judge": "another"}])
def test_pictures_of_other_settings_are_left_out_and_named(tmp_path, changed):
    mine = config(tmp_path, "rows=[experts, monolith]")
    plan, _ = finish(mine)
    folder = drawn(mine, plan, "monolith", 1)
    made = folder.read_json(MANIFEST)
    made["inputs"]["config"] |= changed
    folder.write_json(MANIFEST, made)
    results = Results(mine)
    assert set(results.ways["monolith"].folders) == {0, 2}
    assert "Left out, as made with other settings: monolith seen seed 1." in words(results)


def look(mine, plan, row, router):
    """Four experts each of which is 1 better on its own cluster, but expert 2 better than all on cluster 0, and 3 on 1 in one training of three."""
    g, clusters = np.random.default_rng(0), np.arange(32) % 4
    for seed in mine.seeds:
        losses = 2.0 - (np.arange(4)[:, None, None] == clusters) + 0.01 * g.random((4, 2, 32))
        losses[2, :, clusters == 0] = 0.9
        losses[3, :, clusters == 1] = 0.5 if seed == 0 else 1.1
        weights = np.full((2, 32, 4), 0.01)
        weights[:, np.arange(32), (clusters + (router == "wrong")) % 4] = 0.5
        weights[:, np.arange(32), (clusters + 1 + (router == "wrong")) % 4] = 0.4
        arrays = {"experts": losses, "router": weights, "disagreement": g.random((2, 32)), "clusters": clusters, "things": np.ones(32, int)}
        for name, array in arrays.items():
            save(Folder(Run(row, seed, plan.rate(row)).folder(mine)) / "losses/seen", name, array)
        save(drawn(mine, plan, row, seed), "weights", np.full((40, 5, 4), 0.25))


def test_the_papers_line_is_of_the_papers_router_and_no_failing_cluster_is_left_out(tmp_path):
    mine = config(tmp_path / "both", "rows=[experts, blind]")
    plan, _ = finish(mine)
    look(mine, plan, "experts", "right")
    look(mine, plan, "blind", "wrong")
    write_report(mine)
    html = Folder(mine.folder).read_bytes("report.html").decode()
    results = Results(mine)
    assert results.alignment("experts").advantage.value > 0 > results.alignment("blind").advantage.value
    assert re.search(r"as the paper(&#x27;|')s, -[^:]*: does not hold with 4 experts\.", html)
    assert "own expert is the best on 2 of 4 clusters, by more than the interval over rows and trainings on 2." in html
    row = r"<tr><td>{}</td><td class=n>8</td><td class=n>{}</td><td class=n>{}</td><td class=n>{} of 3</td></tr>"
    assert re.search(row.format(0, 2, r"-0\.1\d* \(-\S+ … -[^)]*\)", 0), html)
    assert re.search(row.format(1, 3, r"-0\.1\S* \(-\S+ … \+[^)]*\)", 2), html)  # of one training: no more than the interval
    for cluster in (2, 3):
        assert re.search(row.format(cluster, r"\d", r"\+(?:0\.9\d*|1) \(\+\S+ … \+[^)]*\)", 3), html)
    alone = config(tmp_path / "alone", "rows=[experts]")
    plan, _ = finish(alone)
    look(alone, plan, "experts", "right")
    write_report(alone)
    assert "not measured: no row blind" in Folder(alone.folder).read_bytes("report.html").decode()


def test_of_two_experts_nobody_is_not_asked(tmp_path):
    mine = config(tmp_path, "rows=[experts]", "base.experts=2", "seeds=[0]")
    plan, _ = finish(mine)
    g, folder = np.random.default_rng(0), Folder(Run("experts", 0, plan.rate("experts")).folder(mine)) / "losses/seen"
    arrays = {"experts": g.random((2, 2, 8)), "router": g.dirichlet(np.ones(2), (2, 8)), "clusters": np.arange(8) % 2}
    for name, array in arrays.items():
        save(folder, name, array)
    save(drawn(mine, plan, "experts", 0), "weights", np.full((40, 5, 2), 0.5))
    write_report(mine)
    html = Folder(mine.folder).read_bytes("report.html").decode()
    assert "With the router of the main row –" in html
    assert "nan" not in re.sub(r"(?s)<svg.*?</svg>|<style.*?</style>", "", html)


def test_how_many_captions_stand_in_other_rows_too(tmp_path):
    """Twenty rows to judge by, after four that choose guidance, of which the first three choose the rate."""
    mine = config(tmp_path, "rows=[experts]", "seen_captions=20")
    run = Folder(str(tmp_path / "run"))
    ids = [f"row {i}" for i in range(24)]

    def write(captions):
        trained = {"id": ["t0", "t1", "t2"], "caption": ["a", "b", "b"], "split": ["train"] * 3}
        own = {"id": ids, "caption": [captions[name] for name in ids], "split": ["validation"] * 24}
        schema.write_table(run / "corpus", schema.part_name(0), pa.table(trained))
        schema.write_table(run / "corpus", schema.part_name(1), pa.table(own))
        schema.write_table(run / "clusters", "labels.parquet", pa.table({"id": [*trained["id"], *ids], "expert": [0] * 27}))

    write({name: name for name in ids})
    chosen = [row.id for row in compare_captions.choose(mine, run, "validation", 4)]
    judged = [row.id for row in compare_captions.choose(mine, run, "seen", 20)]
    captions = dict(zip(chosen, ["c", "d", "e", "f"], strict=True))
    captions |= dict(zip(judged, ["a"] * 3 + ["b"] * 2 + ["c"] * 4 + ["f"] * 6 + ["g", "h", "i", "j", "k"], strict=True))
    write(captions)
    assert compare_captions.repeated(mine, run, "seen", 20) == {"train": 0.25, "choose guidance": 0.5, "choose the rate": 0.2}


def test_captions_that_no_choice_was_made_by_are_judged_first(tmp_path):
    """Four rows choose; of twenty others every other one has the caption of one of these. Rows of losses are as they were."""
    mine = config(tmp_path, "rows=[experts]")
    run, ids = Folder(str(tmp_path / "run")), [f"row {i}" for i in range(24)]

    def write(captions):
        schema.write_table(run / "corpus", schema.part_name(0), pa.table({"id": ids, "caption": captions, "split": ["validation"] * 24}))
        schema.write_table(run / "clusters", "labels.parquet", pa.table({"id": ids, "expert": [0] * 24}))

    def chosen(part, count):
        return [row.id for row in compare_captions.choose(mine, run, part, count)]

    write(ids)
    first, others = chosen("validation", 4), chosen("losses", 20)
    assert chosen("seen", 20) == others
    write([first[2] if name in others[::2] else name for name in ids])
    assert (chosen("validation", 4), chosen("losses", 20)) == (first, others)
    assert chosen("seen", 20) == others[1::2] + others[::2]
    assert chosen("seen", 12) == others[1::2] + others[:4:2]
    mine = mine.model_copy(update={"seen_captions": 12})
    assert compare_captions.repeated(mine, run, "seen", 10)["choose guidance"] == 0
    assert compare_captions.repeated(mine, run, "seen", 12)["choose guidance"] == 2 / 12


def test_new_on_a_colour_is_seen(tmp_path):
    """Another row names the right things at the right places on the wrong colour, where a thing on a colour is what is new."""
    mine = config(tmp_path, "rows=[experts, random]", "held_out_captions=30")
    plan, _ = finish(mine)
    kinds = np.arange(30) % 3
    save(Folder(mine.folder) / "reference", "groups-held_out", np.stack([np.arange(30), kinds], 1))
    for row, right in (("experts", 1.0), ("random", 0.1)):
        plant(mine, plan, row, np.ones((30, 3)), "objects", "held_out")
        plant(mine, plan, row, np.where(kinds == UNSEEN.index("ground"), right, 1.0)[:, None].repeat(3, 1), "colour", "held_out")
    found = Results(mine).unseen_differences("random")
    assert [one.value for one in found] == pytest.approx([0.3, *(0.9 if kind == "ground" else 0.0 for kind in UNSEEN)])


def test_the_protocol_has_its_figures(tmp_path):
    mine = config(tmp_path, "rows=[experts]", "seeds=[5, 7, 11]")
    finish(mine)
    reference = Folder(mine.folder) / "reference"
    save(reference, "validation", np.random.default_rng(0).normal(size=(100, 24)))
    made = reference.read_json(MANIFEST)
    made["counts"] |= {"rows": 100, "independent": True, "judge": {"image_size": 96, "fingerprint": "judge-print"}}
    reference.write_json(MANIFEST, made)
    said = words(Results(mine))
    for part in (
        "(5, 7, 11)",
        "planted (pictures resized to 96 pixels, bicubic, weights judge-print)",
        "along the 16 axes of 24",
        "corpus corpus-print, originals x",
        "Theirs are of 8 experts, these of 4",
    ):
        assert part in said, part
    assert re.search(r"Of 100 originals 40 have a Fréchet distance of \S+ \(least and most of 10 draws: \S+ and \S+\) to the 60 others", said)
    assert "(95 %" not in said  # the ends of draws are no interval


def test_what_units_were_made_with_is_theirs_not_the_reports(tmp_path):
    mine = config(tmp_path, "rows=[experts]")
    _, order = finish(mine)
    for unit in order[:3]:
        publish(Folder(mine.folder) / unit.key)
        made = (Folder(mine.folder) / unit.key).read_json(MANIFEST)
        (Folder(mine.folder) / unit.key).write_json(MANIFEST, {**made, "software": {"cpu": "another", "torch": "0.1"}})
    found = dict(made_with(Results(mine)))
    assert found == {"cpu": f"another (3 units), planted ({len(order) - 3} units)", "torch": "0.1"}


def test_a_training_that_two_rows_share_has_taken_its_time_once(tmp_path):
    mine = config(tmp_path, "rows=[experts, fault-swapped]")
    _, order = finish(mine)
    for number, unit in enumerate(order):
        made = (Folder(mine.folder) / unit.key).read_json(MANIFEST)
        (Folder(mine.folder) / unit.key).write_json(MANIFEST, {**made, "seconds": 60.0, "created": f"2026-01-01T00:{number % 60:02d}:00"})
    shared = [unit.key for unit in order if unit.key.startswith("runs/fault-swapped/") and re.search("/(experts|router)", unit.key)]
    routers = [unit.key for unit in order if re.fullmatch("runs/experts/seed-0-[^/]*/router", unit.key)]  # of every rate the same
    shared += routers[1:]
    assert len(shared) > len(routers) > 1
    write_report(mine)
    minutes = len(order) - len(shared)
    taken = f"{minutes // 60} h {minutes % 60} min" if minutes >= 60 else f"{minutes} min"
    said = re.search(r"([^;]*) of its processes, taken together", Folder(mine.folder).read_bytes("report.html").decode())
    assert said
    assert said[1].strip() == taken


@pytest.mark.parametrize(
    ("means", "end"),
    [
        ({1.0: 0.3, 2.0: 0.5, 4.0: 0.4}, False),
        ({1.0: 0.3, 2.0: 0.4, 4.0: 0.5}, True),
        ({1.0: 0.5, 2.0: 0.4, 4.0: 0.3}, False),  # below 1 there is no guidance
        ({1.5: 0.5, 2.0: 0.4, 4.0: 0.3}, True),
        ({1.0: 0.5, 2.0: 0.5}, False),
        ({2.0: 0.5}, False),  # one was asked for, not tried
    ],
)
def test_the_end_of_the_scales(means, end):
    assert at_end(means) == end


def test_a_way_that_may_want_more_guidance_than_was_tried_is_named(tmp_path):
    """Of the main row the scale before the last is within an error of the last one, and has the arrow; that the best is at the end is said still."""
    mine = config(tmp_path, "rows=[experts, monolith, fault-swapped]", "routings=[]")
    near = {1.0: 0.2, 2.0: 0.5, 3.0: 0.5}
    plan, _ = finish(mine, quality=lambda unit: near if unit.arguments[0].row == "monolith" else CHOSEN)
    scores = plan.runs_folder(plan.run("experts", 0, plan.rate("experts"))) / plan.drawing("experts", 2.0, "validation").folder
    save(scores, "scores", 0.5 - np.outer([0.3, -0.1, -0.1, -0.092], np.ones(6)))  # less than at 3 by 0.002 in the mean, with an error of 0.1
    results = Results(mine)
    assert results.plan.guidance("experts") == 2.0
    write_report(mine)
    html = Folder(mine.folder).read_bytes("report.html").decode()
    assert re.search(r"<td>experts</td><td class=n>0.300</td><td class=n>0.498 ←</td><td class=n>0.500</td>", html)
    assert "one beyond might be better still (guidance_scales may grow): experts." in html
    assert "within one standard error of the best one" in html


def test_too_few_trainings_show_no_fault():
    shown = {seeds: verdict_of_fault(Interval(0.5, 0.4, 0.6, seeds)) for seeds in (1, 2, 3)}
    assert shown == {1: UNTOLD, 2: UNTOLD, 3: "yes"}
    assert (verdict_of_fault(None), verdict_of_fault(Interval(0.5, -0.1, 1.1, 3))) == (UNTOLD, "no")


def test_disagreement_is_held_against_pictures(tmp_path, monkeypatch):
    """Thirty rows have losses; they and ten others have pictures, in another order, which are the worse the more experts disagree about the row."""
    mine = config(tmp_path, "rows=[experts]")
    order = np.random.default_rng(1).permutation(40)
    lists = {"losses": np.arange(30), "seen": order}
    monkeypatch.setattr(compare_results, "choose", lambda compare, run, part, count: [Caption(str(i), "a caption", 0) for i in lists[part][:count]])
    (Folder(mine.folder) / "partitions/kmeans-4/corpus").write_json(MANIFEST, {"counts": {}})
    plan, _ = finish(mine)
    g, things = np.random.default_rng(0), np.arange(30) % 2 + 1
    apart = g.random((3, 30))
    for seed in mine.seeds:
        folder = Folder(Run("experts", seed, plan.rate("experts")).folder(mine)) / "losses/seen"
        save(folder, "disagreement", np.stack([apart[seed] - 0.1, apart[seed] + 0.1]))
        save(folder, "things", things)
    worse = np.concatenate([1 - 0.3 * apart + 0.05 * g.normal(size=(3, 30)), g.random((3, 10))], 1).T
    for name in ("sizes", "colour", "texture", "clean"):
        plant(mine, plan, "experts", worse[order], name)
    found = Results(mine).disagreement_in_pictures("experts")
    each = [rank_correlation(apart[seed], worse[:30, seed], things) for seed in mine.seeds]
    assert found.value == pytest.approx(np.mean(each))
    assert -1 < found.value < -0.6
    assert found.high < 0
    assert Results(mine).disagreement_in_pictures("blind") is None
