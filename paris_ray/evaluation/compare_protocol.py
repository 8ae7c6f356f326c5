"""How a comparison was measured, in words, with what, and what of that limits what it says. No torch, no Ray."""

from __future__ import annotations

from collections import defaultdict

from paris_ray.config import ConfigError
from paris_ray.evaluation import compare_captions, compare_rows
from paris_ray.evaluation.compare_claims import LEAST_SEEDS, PUBLISHED_EXPERTS
from paris_ray.evaluation.compare_config import InceptionJudge
from paris_ray.evaluation.compare_plan import GRADED, QUALITY
from paris_ray.evaluation.compare_results import EQUAL, GROUNDED, Results
from paris_ray.evaluation.compare_rows import BLIND, MAIN, ROWS
from paris_ray.manifest import published
from paris_ray.storage import Folder


def protocol(results: Results) -> str:
    """How it was measured, in words."""
    compare = results.compare
    seeds = ", ".join(map(str, compare.seeds))
    said = [
        f"Claims: the captions of {compare.seen_captions} validation rows, the first by hash of those that no choice was made by, one picture each "
        f"under each seed of training and noise ({seeds}), the same for all rows; {compare.base.sampling.solver}.",
        *_repeated(results, "seen", compare.seen_captions),
        f"Unseen combinations: {compare.held_out_captions} captions of held-out rows; intervals count captions with the same one as one; differences "
        f"are of {GROUNDED}, the share of named things at their place, none where the ground has another colour than the named one.",
        f"Learning rate by the loss on {compare.loss_rows} validation rows, for each row alone ({BLIND} has the main row's experts). Guidance, for "
        f"each way to draw alone, by {compare.validation_captions} validation captions and the mean of {', '.join(GRADED)}: the least within a "
        "standard error of the best. Both under the first seed, which is judged as well; clusters, codec and what is held out are one draw: what is "
        "said is conditional on these.",
        "Claims are against the monolith whose batch is that of all experts together. Of those with an equal training the better one on validation "
        f"captions, {results.monolith or 'not known yet'}, has a line of its own.",
        f"{QUALITY}: whether all that the caption says is in the picture and nothing else; objects: the share of named things at their place; both "
        "read from the picture (scenes). By chance: the same pictures under shuffled captions, exactly.",
        *_distances(results),
        "Intervals: of captions and of trainings, each with Student's t, added as squares. Nothing is decided by fewer than "
        f"{LEAST_SEEDS} trainings, nor before all {len(compare.seeds)} that are planned are there, so by none that has lost one; nor where objects "
        "or the distance of an independent judge say the contrary, where neither side is above chance, or where costs that are called equal differ "
        f"by more than {EQUAL:.0%}. Each verdict is at 95 %: of twenty, one is wrong by chance.",
        *_looks(results),
        "A claim of a paper is tested with a router that does not read the caption, as theirs, where all of its sides can be, and beside it with "
        "one that does."
        + (
            ""
            if compare.base.num_experts == PUBLISHED_EXPERTS
            else f" Theirs are of {PUBLISHED_EXPERTS} experts, these of {compare.base.num_experts}."
        ),
    ]
    if any(ROWS[row].student for row in compare.rows):
        said.append("A student's teacher is the main row's mixture of the same seed, of averaged weights at the rate chosen there, without guidance.")
    if results.made_otherwise:
        said.append(f"Left out, as made with other settings: {', '.join(results.made_otherwise)}.")
    return " ".join(said)


def _repeated(results: Results, part: str, count: int) -> list[str]:
    """How many of the captions stand in other rows as well."""
    cut = Folder(compare_rows.partition_config(results.compare, MAIN).run_dir)
    if published(cut / "corpus") is None or published(cut / "clusters") is None:
        return []
    try:
        shares = compare_captions.repeated(results.compare, cut, part, count)
    except ConfigError:  # the plan is of more rows than there are
        return []
    return [
        "Rows are apart, captions are not: of these "
        + ", ".join(f"{share:.0%} stand in rows that {what} as well" for what, share in shares.items())
        + "."
    ]


def _distances(results: Results) -> list[str]:
    """In whose features, along how many axes, to what, and what they are by chance."""
    made = results.originals
    if made is None:
        return []
    said = [f"Distances are in the features of {_judge(results)}, to validation originals of other captions as the codec gives them back"]
    if (space := results.space) is not None and space.axes[0] < space.axes[1]:
        said.append(f", the Fréchet distance along the {space.axes[0]} axes of {space.axes[1]} along which these differ most")
    said.append(f"; corpus {made['inputs']['parents']['corpus']}, originals {made['fingerprint']}.")
    found = ["".join(said)]
    if space is not None:
        floor = space.floor()
        found.append(f"Of {made['counts']['rows']} originals {floor.rows} have a Fréchet distance of {floor} to the {floor.others} others.")
    if not results.independent:
        found.append("That encoder also made the clusters: its distances are no independent judge, and decide nothing.")
    return found


def _judge(results: Results) -> str:
    """The encoder that judges: its name, what it reads, its fingerprint."""
    compare, made = results.compare, results.originals
    assert made is not None
    cut = Folder(compare_rows.partition_config(compare, MAIN).run_dir) / "encoders"
    encoders = cut.read_json("encoders.json") if cut.exists("encoders.json") else {}
    known = made["counts"].get("judge") or ({} if results.independent else encoders.get("embedding", {}))
    said = [str(made["inputs"]["config"]["judge"])]
    if isinstance(compare.judge, InceptionJudge):
        said.append("pictures resized as torch-fidelity does")
    elif known.get("image_size") is not None:
        said.append(f"pictures resized to {known['image_size']} pixels, bicubic")
    if "fingerprint" in known:
        said.append(f"weights {known['fingerprint']}")
    return said[0] + (f" ({', '.join(said[1:])})" if said[1:] else "")


def _looks(results: Results) -> list[str]:
    earlier = [str(count) for count in results.looks() if count != len(results.compare.seeds)]
    if not earlier:
        return []
    return [
        f"Verdicts were given before, at {', '.join(earlier)} trainings: who adds some until something is told is told it by chance more often than "
        "once in twenty."
    ]


def made_with(results: Results) -> list[list[str]]:
    """Cells of versions and hardware of all units that are done, as their manifests have them, and how many units have each."""
    found: dict[str, dict[str, int]] = defaultdict(lambda: defaultdict(int))
    for unit in results.plan.units():
        if results.plan.done(unit.key) and (manifest := published(results.plan.folder / unit.key)) is not None:
            for name, value in manifest.get("software", {}).items():
                found[name][value] += 1
    return [
        [name, ", ".join(f"{value} ({count} units)" if len(values) > 1 else value for value, count in sorted(values.items()))]
        for name, values in found.items()
    ]
