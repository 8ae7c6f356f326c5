"""What is found of two ways to draw, in which words, and what a comparison's report says of it first; of planted figures."""

from __future__ import annotations

import re

import numpy as np
import pytest
from planted import CHOSEN, config, drawn, finish, plant, words

from paris_ray.data.scenes import UNSEEN
from paris_ray.evaluation import compare_clusters, compare_cost
from paris_ray.evaluation.arrays import save
from paris_ray.evaluation.compare_captions import Caption
from paris_ray.evaluation.compare_claims import ASKED, BETTER_MONOLITH, DDM, PARIS, PRIMARY, SAID, Pair, Saying
from paris_ray.evaluation.compare_lead import lead, lead_rows, tiles
from paris_ray.evaluation.compare_looks import LOOKS
from paris_ray.evaluation.compare_report import write_report
from paris_ray.evaluation.compare_results import Results
from paris_ray.evaluation.compare_tables import PAIR_HEADER, SAID_HEADER, kinds, pair_rows, said_rows, unseen_header
from paris_ray.evaluation.compare_verdicts import BETTER, FAILS, HOLDS, SPLIT, UNDERTRAINED, UNMEASURED, UNTOLD, WORSE, Finding, find, find_all
from paris_ray.evaluation.intervals import Interval
from paris_ray.manifest import MANIFEST
from paris_ray.storage import Folder

TOP2 = Pair("top-2 against a monolith", "experts/top-2", "monolith")


def cells(results, pair):
    """A pair's line with the main row's router, by column."""
    return dict(zip(PAIR_HEADER, pair_rows(results, [(find(results, pair), find(results, pair, unseen=True))])[0], strict=True))


def far_better(mine, plan, *, than="monolith", seeds=None):
    """The main row all right half of the time more often than another, but for noise."""
    g = np.random.default_rng(0)
    for row, mean in (("experts", 0.8), (than, 0.3)):
        for name in ("all", "objects"):
            plant(mine, plan, row, mean + 0.01 * g.normal(size=(mine.seen_captions, seeds or len(mine.seeds))), name)


def test_a_judge_that_made_the_clusters_has_no_say(tmp_path):
    """Its distances say the contrary of all scores: of an independent judge that leaves nothing told, of this one it is only printed."""
    mine = config(tmp_path, "rows=[experts, monolith]")
    plan, _ = finish(mine)
    far_better(mine, plan)
    g, reference = np.random.default_rng(0), Folder(mine.folder) / "reference"
    save(reference, "validation", g.normal(size=(90, 3)))
    for row, off in (("experts", 3.0), ("monolith", 0.0)):
        for seed in mine.seeds:
            save(drawn(mine, plan, row, seed), "features", off + g.normal(size=(40, 3)))
    distance, made = "distance, second minus first (95 %)", reference.read_json(MANIFEST)
    mean = np.array([float(x) for x in re.findall(r"[-+][\d.]+", cells(Results(mine), TOP2)[distance])])
    assert (mean < -10).all()  # 27 minus little
    assert find(Results(mine), TOP2).state == BETTER
    assert "no independent judge, and decide nothing" in words(Results(mine))
    made["counts"]["independent"] = True
    reference.write_json(MANIFEST, made)
    assert cells(Results(mine), TOP2)["found here"].endswith(": the distance says the contrary")
    # Pictures of no scenes: distances are all there is.
    for row in ("experts", "monolith"):
        for seed in mine.seeds:
            drawn(mine, plan, row, seed).delete("scores.npy")
    found = find(Results(mine), TOP2)
    assert (found.state, found.measure) == (WORSE, "Fréchet distance")
    assert found.values[0] > 10 > found.values[1] > 0
    made["counts"]["independent"] = False
    reference.write_json(MANIFEST, made)
    assert cells(Results(mine), TOP2)["found here"] == f"{UNTOLD}: no scenes and no independent judge"


def test_equal_costs_are_equal(tmp_path):
    """A width matched at the base's guidance, and the main row then drawn without any, in half the passes."""
    wider = next(one for one in ASKED if one.second == "monolith-inference")
    for folder, chosen, said in (("same", CHOSEN, BETTER), ("other", {1.0: 0.9, 2.0: 0.2, 3.0: 0.1}, UNTOLD)):
        mine = config(tmp_path / folder, "rows=[experts, monolith-inference]")
        plan, _ = finish(mine, quality=lambda unit, chosen=chosen: chosen if unit.arguments[0].row == "experts" else CHOSEN)
        far_better(mine, plan, than="monolith-inference")
        results = Results(mine)
        found = find(results, wider)
        assert found.state == said
        costs = [results.picture_flops(results.ways[row]) / 1e9 for row in mine.rows]
        assert found.why == (() if said == BETTER else (f"not equal: {costs[0]:.3g} and {costs[1]:.3g} GFLOP a picture",))
        assert (abs(costs[0] / costs[1] - 1) < 0.05) == (said != UNTOLD)


def test_claims_are_against_the_monolith_that_papers_have(tmp_path):
    """One that is better on validation captions has a line of its own, with its name."""
    mine = config(tmp_path, "rows=[experts, monolith, monolith-steps]")
    better = {1.0: 0.3, 2.0: 0.2, 3.0: 0.8}
    plan, _ = finish(mine, quality=lambda unit: better if unit.arguments[0].row == "monolith-steps" else CHOSEN)
    far_better(mine, plan)
    for name in ("all", "objects"):
        plant(mine, plan, "monolith-steps", np.full((40, 3), 0.9), name)
    results = Results(mine)
    assert results.monolith == "monolith-steps"
    assert cells(results, TOP2)["found here"] == "better"
    other = cells(results, next(one for one in ASKED if one.second == BETTER_MONOLITH))
    assert "(monolith-steps)" in other["comparison"]
    assert other["found here"] == "worse"


def test_nothing_is_told_before_all_planned_trainings_are_there(tmp_path):
    """Four of five, each far better."""
    mine = config(tmp_path, "rows=[experts, monolith]", "seeds=[0, 1, 2, 3, 4]")
    plan, _ = finish(mine)
    far_better(mine, plan)
    assert cells(Results(mine), TOP2)["found here"] == "better"
    drawn(mine, plan, "monolith", 4).delete(MANIFEST)
    found = find(Results(mine), TOP2)
    assert (found.state, found.why) == (UNTOLD, ("4 of 5 trainings",))


def test_looks_with_other_settings_are_named_with_what_was_told_then(tmp_path):
    mine = config(tmp_path, "rows=[experts, monolith]")
    plan, _ = finish(mine, keep=lambda unit: unit.kind != "draw" or unit.arguments[0].seed == 0)
    assert "Earlier looks" not in write_report(mine)
    assert not Folder(mine.folder).exists(LOOKS)  # two trainings are missing: nothing was decided
    finish(mine)
    far_better(mine, plan)
    for _ in range(2):
        assert "Earlier looks" not in write_report(mine)
    more = config(tmp_path, "rows=[experts, monolith]", "guidance_scales=[1.0, 2.0, 3.0, 4.0]")
    # Another scale is chosen, at which the monolith is better.
    finish(
        more,
        quality=lambda unit: {**CHOSEN, 4.0: 0.9 if unit.arguments[1].part == "validation" else 0.5 - 0.1 * (unit.arguments[0].row == "monolith")},
    )
    for _ in range(2):  # the report itself changes nothing
        text = write_report(more)
        assert "Verdicts were given before, with guidance scales 1, 2, 3; experts at rate 0.002 and guidance 3; " in text
        assert "; top-2 against a monolith, reading: better, now worse; " in text
    kept = Folder(mine.folder).read_json(LOOKS)["looks"]
    assert [one["guidance_scales"] for one in kept] == [[1, 2, 3], [1, 2, 3, 4]]
    assert [one["chosen"]["experts"] for one in kept] == [[0.002, 3.0], [0.002, 4.0]]


def test_each_comparison_is_there_once():
    """Of one interval no two lines, nor a paper that says both."""
    sides = [frozenset((one.first, one.second)) for one in (*SAID, *ASKED)]
    assert len(sides) == len({*sides})
    for pair in SAID:
        assert len({one.paper for one in pair.says}) == len(pair.says) > 0, pair.text
    # The first number is the first side's, and of FID the lower is the better.
    for says in (one for pair in SAID for one in pair.says):
        if found := re.match(r"([\d.]+) against ([\d.]+)", says.published):
            assert says.better == (float(found[1]) < float(found[2])), says


BOTH = (Saying(PARIS, True, "1 against 2"), Saying(DDM, True, "1 against 2"))


APART = (Saying(PARIS, False, "2 against 1"), Saying(DDM, True, "1 against 2"))


@pytest.mark.parametrize(
    ("says", "state", "papers", "four", "eight", "colour"),
    [
        (BOTH, BETTER, HOLDS, "better: holds with 4 experts", "better: reproduced", "right"),
        (BOTH, WORSE, FAILS, "worse: does not hold with 4 experts", "worse: not reproduced", "wrong"),
        (APART[:1], WORSE, HOLDS, "worse: holds with 4 experts", "worse: reproduced", "right"),
        (APART, WORSE, SPLIT, "worse: holds with 4 experts as Paris says, not as DDM does", "worse: reproduced as Paris says, not as DDM does", ""),
        (
            APART,
            BETTER,
            SPLIT,
            "better: holds with 4 experts as DDM says, not as Paris does",
            "better: reproduced as DDM says, not as Paris does",
            "",
        ),
        ((), WORSE, WORSE, "worse", "worse", "wrong"),
        (BOTH, UNTOLD, UNTOLD, "cannot be told (half-width 0.15)", "cannot be told (half-width 0.15)", ""),
        (BOTH, UNDERTRAINED, UNDERTRAINED, "undertrained here", "undertrained here", ""),
    ],
)
def test_words_of_a_verdict(says, state, papers, four, eight, colour):
    """A paper is reproduced with as many experts as it had, else it holds, or does not."""
    found = Finding(Pair("a against b", "a", "b", says), state, interval=Interval(0.1, -0.05, 0.25, 3))
    assert (found.papers, found.words(4), found.words(8), kinds([(found, found)])) == (papers, four, eight, [colour])


def test_the_first_screen_is_the_comparison_that_was_named_in_advance(tmp_path):
    """With the papers' router better on captions like those of training and worse on unseen ones; with the other the other way round."""
    mine = config(tmp_path, "rows=[experts, monolith, blind]", "routings=[]")
    plan, _ = finish(mine)
    save(Folder(mine.folder) / "reference", "groups-held_out", np.stack([np.arange(20) // 2, np.arange(20) // 2 % 3], 1))
    g = np.random.default_rng(0)
    for row, seen, unseen in (("blind", 0.8, 0.2), ("experts", 0.4, 0.9), ("monolith", 0.6, 0.6)):
        for name in ("all", "objects"):
            plant(mine, plan, row, seen + 0.01 * g.normal(size=(40, 3)), name)
        plant(mine, plan, row, unseen + 0.01 * g.normal(size=(20, 3)), "objects", "held_out")
        plant(mine, plan, row, np.ones((20, 3)), "colour", "held_out")
    results = Results(mine)
    findings = find_all(results)
    rows, colours = lead_rows(results, findings)
    yes, no = "better: holds with 4 experts", "worse: does not hold with 4 experts"
    assert [row[1] for row in rows] == [yes, no, no, yes]
    assert colours == ["right", "wrong", "wrong", "right"]
    assert [[round(float(value), 1) for value in row[3:5]] for row in rows] == [[0.8, 0.6], [0.4, 0.6], [0.2, 0.6], [0.9, 0.6]]
    of_training, of_unseen = lead(results, findings)[1:]
    assert re.search(
        rf"On captions like those of training: with the papers' router, .*: {yes}, wholly right 0\.\d+ against .*reads.*: {no}, ", of_training
    )
    assert re.search(rf"On unseen combinations: .*: {no}, objects on the colour 0.*half-width .*: {yes}, ", of_unseen)
    counts = {name: count for count, name in tiles(results, findings.papers, 0)}
    assert sum(map(int, counts.values())) == len(SAID) == 11
    # Both papers say that top-2 is better than a monolith: one line, counted once.
    assert counts["holds with 4 experts"] == "1"
    line = dict(zip(SAID_HEADER, said_rows(results, findings.papers)[0], strict=True))
    assert (line["Paris says"], line["DDM says"]) == ("better, 22.60 against 29.64", "better, 10.31 against 12.81")
    assert line["on unseen combinations"].startswith(f"{no}; -0.")
    page = write_report(mine) and Folder(mine.folder).read_bytes("report.html").decode()
    assert page.index("One question was named in advance") < page.index("<nav>") < page.index("What papers compare</h2>")


def test_where_no_side_has_learnt_nothing_is_said_of_which_is_better(tmp_path):
    """All far apart; objects below the notebook's half on both sides, then at it on one."""
    mine = config(tmp_path, "rows=[experts, monolith]")
    plan, _ = finish(mine)
    g = np.random.default_rng(0)
    for reached, state in ((0.45, UNDERTRAINED), (0.55, BETTER)):
        for row, all_, objects in (("experts", 0.4, reached), ("monolith", 0.1, 0.3)):
            plant(mine, plan, row, all_ + 0.01 * g.normal(size=(40, 3)))
            plant(mine, plan, row, np.full((40, 3), objects), "objects")
        found = find(Results(mine), PRIMARY)
        assert found.state == state
        assert found.why == (("objects 0.45 and 0.30, where one side must reach 0.5",) if state == UNDERTRAINED else ())
        assert cells(Results(mine), PRIMARY)["objects (95 %)"].startswith(f"{reached:.2f} and 0.30; +0.")


def test_what_has_no_row_is_not_measured_which_is_not_untold(tmp_path):
    mine = config(tmp_path, "rows=[experts, monolith]", "routings=[top-1]")
    finish(mine)
    results = Results(mine)
    found = {pair.text: find(results, pair) for pair in SAID}
    assert found["semantic clusters against random parts"].words(4) == "not measured: no row random"
    assert found["8 experts against 4"].state == UNMEASURED
    assert found["top-2 against all experts"].words(4) == "not measured: experts/full is not drawn"
    assert found["top-2 against top-1"].state == UNTOLD
    assert find(results, PRIMARY, blind=True).why == ("no row blind",)
    assert find(results, next(pair for pair in SAID if pair.first == "experts/top-1"), unseen=True).why == ("rows alone are drawn of these",)


def test_what_the_smallest_expert_was_trained_on_and_what_that_costs(tmp_path, monkeypatch):
    """Clusters of 10 to 60 rows in a hundred; pictures of the smallest one's captions are worse by 0.5, of others equal."""
    mine = config(tmp_path, "rows=[experts, monolith]", "seen_captions=40", "held_out_captions=0")
    sizes, clusters = [60, 20, 10, 10], np.arange(40) % 3
    partition = Folder(mine.folder) / "partitions/kmeans-4"
    (partition / "clusters").write_json(MANIFEST, {"counts": {"sizes": sizes}})
    (partition / "corpus").write_json(MANIFEST, {"counts": {}})
    monkeypatch.setattr(compare_clusters, "choose", lambda *_: [Caption(str(i), "a caption", int(k)) for i, k in enumerate(clusters)])
    plan, _ = finish(mine)
    plant(mine, plan, "monolith", np.full((40, 3), 0.75))
    plant(mine, plan, "experts", np.where(clusters == 2, 0.25, 0.75)[:, None].repeat(3, 1))
    found = [dict(zip(compare_clusters.HEADER, row, strict=True)) for row in compare_clusters.rows(Results(mine))]
    steps = [int(one["steps"]) for one in found]
    assert [round(step / sum(steps), 2) for step in steps] == [0.6, 0.2, 0.1, 0.1]
    assert [int(one["images"]) for one in found] == [16 * step for step in steps]  # a fourth of the batch of 64
    assert [one["captions of its cluster"] for one in found] == ["14", "13", "13", "0"]
    assert [one["wholly right, experts"] for one in found] == ["0.750", "0.750", "0.250", "–"]
    assert [one["experts minus monolith (95 %)"][:5] for one in found] == ["+0 (+", "+0 (+", "-0.5 ", "–"]
    assert found[0]["blind minus monolith (95 %)"] == "–"
    (experts, monolith) = compare_cost.matched_table(mine)
    column = compare_cost.COLUMNS.index("steps")
    assert experts[column] == f"{min(steps)} … {max(steps)}"
    assert monolith[column].isdigit()


def test_unseen_combinations_are_counted_in_the_header(tmp_path):
    mine = config(tmp_path, "rows=[experts, monolith]")
    finish(mine)
    assert "combinations" not in " ".join(unseen_header(Results(mine)))
    # Three combinations: two of the first kind, one of the second.
    save(Folder(mine.folder) / "reference", "groups-held_out", np.array([[0, 0]] * 9 + [[1, 0]] * 6 + [[2, 1]] * 5))
    header = unseen_header(Results(mine))
    assert header[-3:] == tuple(f"of kind {kind} ({count} combinations)" for kind, count in zip(UNSEEN, (2, 1, 0), strict=True))
    assert "of 3 combinations" in header[-4]
