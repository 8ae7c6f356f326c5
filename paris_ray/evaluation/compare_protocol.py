"""How a comparison was measured, in headed lines, with what, and what of that limits what it says. No torch, no Ray."""

from __future__ import annotations

from collections import defaultdict

from paris_ray.config import ConfigError
from paris_ray.evaluation import compare_captions, compare_looks, compare_rows
from paris_ray.evaluation.compare_claims import PRIMARY, PUBLISHED_EXPERTS
from paris_ray.evaluation.compare_config import InceptionJudge
from paris_ray.evaluation.compare_plan import GRADED
from paris_ray.evaluation.compare_results import GROUNDED, Results
from paris_ray.evaluation.compare_rows import BLIND, MAIN, ROWS
from paris_ray.evaluation.compare_verdicts import EQUAL, LEAST_SEEDS, TRAINED, UNDERTRAINED, WHOLLY, Findings
from paris_ray.manifest import published
from paris_ray.storage import Folder


def protocol(results: Results, findings: Findings) -> list[tuple[str, str]]:
    """How it was measured: (what of it, in words)."""
    compare, k = results.compare, results.compare.base.num_experts
    pairs = len(findings.papers) + len(findings.reading) + len(findings.asked)
    said = [
        (
            "Captions like those of training",
            f"{compare.seen_captions} validation rows, the first by hash of those whose caption no choice was made by, then of other rows that no "
            "choice was made by; one picture each under each seed of training and noise "
            f"({', '.join(map(str, compare.seeds))}), the same for all rows; {compare.base.sampling.solver}.{_repeated(results)}",
        ),
        (
            "Unseen combinations",
            f"{compare.held_out_captions} captions of held-out rows; intervals count captions with the same one as one; what decides is {GROUNDED}, "
            "the share of named things at their place, none where the ground has another colour than the named one.",
        ),
        (
            "Choices",
            f"Learning rate by the loss on {compare.loss_rows} validation rows, for each row alone ({BLIND} has the main row's experts). Guidance, "
            f"for each way to draw alone, by {compare.validation_captions} validation captions and the mean of {', '.join(GRADED)}: the least within "
            "a standard error of the best. Both under the first seed, which is judged as well; clusters, codec and what is held out are one draw: "
            "what is said is conditional on these.",
        ),
        (
            "Monolith",
            "Papers' comparisons are with the one whose batch is that of all experts together. Of those with an equal training the better one on "
            f"validation captions, {results.monolith or 'not known yet'}, has a line of its own.",
        ),
        (
            "Scores",
            f"{WHOLLY}: whether all that the caption says is in the picture and nothing else; objects: the share of named things at their place; "
            "both read from the picture (scenes). By chance: the same pictures under shuffled captions, exactly.",
        ),
        ("Distances", " ".join(_distances(results)) or "Not measured yet."),
        (
            "Verdicts",
            "Intervals of 95 %: of captions and of trainings, each with Student's t, added as squares. Nothing is decided by fewer than "
            f"{LEAST_SEEDS} trainings, nor before all {len(compare.seeds)} that are planned are there, so by none that has lost one; nor where "
            "objects or the distance of an independent judge say the contrary, where neither side is above chance, or where costs that are called "
            f"equal differ by more than {EQUAL:.0%}. Where neither side has {TRAINED:g} of the named things at their place on captions like those "
            f"of training, both are {UNDERTRAINED}: neither is the better one of two that have not learnt.",
        ),
        (
            "Errors",
            f"Named in advance is one comparison, {PRIMARY.text}, with the papers' router and with one that reads; the others are looked at beside "
            "it. Of differences that are none at most one in twenty is told (in simulation, 256 captions and three trainings, 1 to 5 %, the "
            f"more the more trainings differ); nothing is corrected for {pairs} lines, of which many share their sides. "
            "With few trainings more is there than is told: hence the half-width.",
        ),
        (
            "Routers",
            "What papers compare is tested with a router that does not read the caption, as theirs, where both of its sides can be, and beside it "
            "with one that does." + ("" if k == PUBLISHED_EXPERTS else f" Theirs are of {PUBLISHED_EXPERTS} experts, these of {k}."),
        ),
    ]
    if any(ROWS[row].student for row in compare.rows):
        words = "The main row's mixture of the same seed, of averaged weights at the rate chosen there, without guidance."
        said.append(("A student's teacher", words))
    if looks := compare_looks.said(results, findings):
        said.append(("Earlier looks", " ".join(looks)))
    if results.made_otherwise:
        said.append(("Left out, as made with other settings", f"{', '.join(results.made_otherwise)}."))
    return said


def repeated(results: Results) -> dict[str, float] | None:
    """Which share of the judged captions stands in other rows as well; ``None`` while they are not cut."""
    cut = Folder(compare_rows.partition_config(results.compare, MAIN).run_dir)
    if published(cut / "corpus") is None or published(cut / "clusters") is None:
        return None
    try:
        return compare_captions.repeated(results.compare, cut, "seen", results.compare.seen_captions)
    except ConfigError:  # the plan is of more rows than there are
        return None


def _repeated(results: Results) -> str:
    shares = repeated(results)
    if shares is None:
        return ""
    each = ", ".join(f"{share:.0%} stand in rows that {what} as well" for what, share in shares.items())
    return f" Rows are apart, captions are not: of these {each}."


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
