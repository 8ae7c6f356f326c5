"""What of a comparison is shown beside what decides: how pictures lie among originals, what they repeat, routers, losses by time. No torch."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from paris_ray.data.schema import SPLITS, read_columns
from paris_ray.data.splits import read_splits
from paris_ray.evaluation import compare_rows
from paris_ray.evaluation.classifiers import ClassifierAt, judged, prior
from paris_ray.evaluation.compare_captions import Caption, choose
from paris_ray.evaluation.compare_distances import SIDE, Space
from paris_ray.evaluation.compare_results import Results
from paris_ray.evaluation.compare_rows import MAIN, ROWS
from paris_ray.evaluation.distances import clip_score, diversity, precision_recall
from paris_ray.evaluation.intervals import Interval, mean_interval, signed
from paris_ray.evaluation.metrics import chance, nearest
from paris_ray.evaluation.times import TIMES
from paris_ray.manifest import published
from paris_ray.pages import charts
from paris_ray.storage import Folder

MOST = 4096
"""Pictures of a way that are looked at here, the first by hash: time and memory go with their square."""

TRAINING_ROWS = 100_000
"""Training rows among which copies are sought, at most, the first of the corpus."""

NEW = 0.05
"""So many of the new originals are nearer to a training row than a copy must be."""


@dataclass(frozen=True)
class Among:
    """How a way's pictures lie among the originals of the same captions, in the judge's features; means over seeds.

    Attributes:
        precision: see :class:`paris_ray.evaluation.distances.PrecisionRecall`, as ``recall``, ``density`` and ``coverage``.
        own: share of pictures whose nearest original has their caption.
        chance: what that would be under shuffled captions.
        diversity: between pictures of one caption under one seed, mean cosine distance; ``None``: no caption is there twice.
        copies: share nearer to a training row than :data:`NEW` of new originals are; ``None`` where the judge has not seen the training rows.
        clip: CLIP score; ``None`` where the judge is no CLIP.
    """

    precision: float
    recall: float
    density: float
    coverage: float
    own: float
    chance: float
    diversity: float | None
    copies: Interval | None
    clip: Interval | None


@dataclass(frozen=True)
class ByTime:
    """Held-out losses at each of some times."""

    times: Sequence[float]
    losses: Sequence[float]


class Measures:
    """These figures, from a comparison's folder.

    Args:
        results: of the comparison.
    """

    def __init__(self, results: Results):
        self.results, self.compare = results, results.compare
        self._folder = Folder(results.compare.folder)
        self._run = Folder(compare_rows.partition_config(results.compare, MAIN).run_dir)

    # -- what there is ----------------------------------------------------------------------------------------------------

    @functools.cached_property
    def _validation(self) -> NDArray[np.float32] | None:
        return self.results.array(self._folder / "reference", "validation")

    @functools.cached_property
    def _rows(self) -> list[Caption]:
        """Of the judged captions, and after them of the other rows that no choice was made by; none while there is no corpus."""
        return [] if published(self._run / "corpus") is None else choose(self.compare, self._run, "seen", None)

    @functools.cached_property
    def captions(self) -> list[str]:
        """Those that are judged."""
        return [one.caption for one in self._rows[: self.compare.seen_captions]][:MOST]

    def originals(self, after: int = 0) -> NDArray[np.float32] | None:
        """Features of the originals of these captions, or of as many others, ``after`` times as many rows later; ``None``: not so many are there."""
        n, start = len(self.captions), after * self.compare.seen_captions
        rows = self._rows[start : start + n]
        if self._validation is None or not n or len(rows) < n:
            return None
        places = {one.id: i for i, one in enumerate(choose(self.compare, self._run, "validation", None)[: len(self._validation)])}
        found = [places[one.id] for one in rows if one.id in places]
        return self._validation[found] if len(found) == n else None

    @functools.cached_property
    def training(self) -> NDArray[np.float16] | None:
        """Embeddings of training rows, where the judge is the encoder that made them."""
        made = published(self._folder / "reference")
        if made is None or made["counts"].get("independent", True) or published(self._run / "corpus") is None:
            return None
        splits = np.concatenate(list(read_splits(self._run / "corpus").values()))
        rows = np.flatnonzero(splits == SPLITS.index("train"))[:TRAINING_ROWS]
        return np.asarray(read_columns(self._run / "corpus", ["id", "embedding"])["embedding"][rows])

    @functools.cached_property
    def copy_bound(self) -> float | None:
        """Cosine distance to the nearest training row below which a picture is called a copy: what :data:`NEW` of the validation originals are.

        These are as the codec gives them back, as pictures are; the training rows are as they were.
        """
        if self.training is None or self._validation is None:
            return None
        return float(np.quantile(nearest(self._validation, self.training)[1], NEW))

    # -- pictures ---------------------------------------------------------------------------------------------------------

    @functools.lru_cache(maxsize=512)  # noqa: B019, lives as long as the report is written
    def among(self, way: str) -> Among | None:
        """Of a way by its key; ``None``: something is not there."""
        found = [self.results.array(folder, "features") for _, folder in sorted(self.results.ways[way].folders.items())]
        return self._among([one[:MOST] for one in found if one is not None])

    def others(self) -> Among | None:
        """Of as many other originals: what a perfect model would get, but for what needs pictures of these captions."""
        other = self.originals(after=1)
        return None if other is None else self._among([other])

    def _among(self, sets: Sequence[NDArray[np.floating]]) -> Among | None:
        real = self.originals()
        if real is None or not sets or any(one.shape != real.shape for one in sets):
            return None
        lie = [precision_recall(real, one) for one in sets]
        found = [[self.captions[i] for i in nearest(one, real)[0]] for one in sets]
        right = [np.mean([a == b for a, b in zip(self.captions, named, strict=True)]) for named in found]
        precision, recall, density, coverage = (
            float(np.mean([getattr(one, name) for one in lie])) for name in ("precision", "recall", "density", "coverage")
        )
        return Among(
            precision,
            recall,
            density,
            coverage,
            float(np.mean(right)),
            float(np.mean([chance(self.captions, named) for named in found])),
            self.diversity(sets),
            self._copies(sets),
            self._clip(sets),
        )

    def diversity(self, sets: Sequence[NDArray[np.floating]]) -> float | None:
        """Between pictures of one caption, the mean over such captions and over sets."""
        found = [diversity(one, self.captions) for one in sets]
        return float(np.mean(found)) if len(found[0]) else None

    def _copies(self, sets: Sequence[NDArray[np.floating]]) -> Interval | None:
        if self.training is None or self.copy_bound is None:
            return None
        training, bound = self.training, self.copy_bound
        return mean_interval(np.stack([nearest(one, training)[1] < bound for one in sets], 1))

    def _clip(self, sets: Sequence[NDArray[np.floating]]) -> Interval | None:
        texts = self.results.array(self._folder / "captions", "texts")
        return None if texts is None else mean_interval(np.stack([clip_score(one, texts[: len(one)]) for one in sets], 1))

    @functools.cached_property
    def distances(self) -> list[tuple[str, Space, dict[str, float], dict[str, Interval | None]]]:
        """In each space that there is: what it is called, the space, of each way the Fréchet distance, and by how much it is above the main row's."""
        results, found = self.results, []
        judge = str((results.originals or {"inputs": {"config": {"judge": "–"}}})["inputs"]["config"]["judge"])
        judge += "" if results.independent else " (made the clusters, decides nothing)"
        for name, space in (("pixels", results.pixels), (judge, results.space)):
            if space is None:
                continue
            far = {key: one for key, way in results.ways.items() if (one := results.distance(way, space)) is not None}
            several = [key for key in far if key != MAIN and len(results.ways[key].folders) > 1]
            more = {key: results.distance_difference(MAIN, key, space) for key in several}
            found.append((name, space, far, more))
        return found

    # -- routers and losses -----------------------------------------------------------------------------------------------

    def router(self, row: str) -> tuple[list[list[ClassifierAt]], ClassifierAt] | None:
        """A row's router on rows that training did not see: by seed and time; and what knows the clusters' sizes alone."""
        sizes = (published(Folder(compare_rows.partition_config(self.compare, row).run_dir) / "clusters") or {}).get("counts", {}).get("sizes")
        found, clusters = [], None
        for seed in self.compare.seeds:
            p, own = (self.results.losses(row, name, seed) for name in ("router", "clusters"))
            if p is not None and own is not None and len(p) == len(TIMES):
                clusters = own
                found.append([judged(np.log(np.maximum(one, 1e-30)), own.tolist()) for one in p])
        if clusters is None or sizes is None:
            return None
        return found, prior(np.repeat(np.arange(len(sizes)), sizes).tolist(), clusters.tolist(), len(sizes))

    def losses_by_time(self) -> dict[str, ByTime]:
        """Of each row, the mean over rows of the corpus and seeds."""
        found = {}
        for row in self.compare.rows:
            each = [self.results.losses(row, "routed", seed) for seed in self.compare.seeds]
            by_time = [one.mean(1) for one in each if one is not None and len(one) == len(TIMES)]
            if by_time and not ROWS[row].fault:
                found[row] = ByTime(TIMES, np.mean(by_time, 0).tolist())
        return found


@functools.lru_cache(maxsize=1)
def measures(results: Results) -> Measures:
    """The same object for all parts of a report."""
    return Measures(results)


Table = tuple[str, tuple[str, ...], list[list[str]]]
"""What it says, in words; its header; its cells."""


def tables(results: Results) -> list[Table]:
    """All of them."""
    return [among_table(results), distance_table(results), router_table(results)]


def among_table(results: Results) -> Table:
    """How pictures lie among originals, and what they repeat."""
    return AMONG_MEANING, AMONG_HEADER, among_rows(measures(results))


def distance_table(results: Results) -> Table:
    """How far pictures are from originals as a set."""
    found = measures(results).distances
    header = ["way", *(cell for name, _, _, _ in found for cell in (f"Fréchet distance, {name}", f"more than {MAIN} (95 %)"))]
    return DISTANCE_MEANING, tuple(header), distance_rows(measures(results))


def router_table(results: Results) -> Table:
    """How good routers are."""
    return ROUTER_MEANING, ROUTER_HEADER, router_rows(measures(results))


# -- cells --------------------------------------------------------------------------------------------------------------

AMONG_HEADER = (
    "way", "precision", "recall", "density", "coverage", "nearest original has its caption", "by chance", "diversity within captions",
    "copies (95 %)", "CLIP score (95 %)",
)  # fmt: skip

AMONG_MEANING = (
    f"The first {MOST} pictures of each seed among the originals of the same captions, as the codec gives them back, in the judge's features; means "
    "over seeds. Precision: pictures within reach of an original, recall: originals within reach of a picture (arXiv 1904.06991); density and "
    "coverage as arXiv 2002.09797, all with five neighbours. Other originals: as many of other rows. Diversity: mean cosine distance between "
    f"pictures of one caption. A copy is nearer to a training row than all but {NEW:.0%} of the validation originals are: of new pictures so many "
    "are called one."
)


def among_rows(of: Measures) -> list[list[str]]:
    """A row for each way, and two of originals."""
    found = [[way, *_among_cells(one)] for way in of.results.ways if (one := of.among(way)) is not None]
    if not found:
        return []
    if (other := of.others()) is not None:
        cells = _among_cells(other)
        found.append(["other originals", *cells[:4], "–", "–", "–", cells[7], "–"])
    own, spread = of.originals(), None
    if own is not None:
        spread = of.diversity([own])
    return [*found, ["their originals", *["–"] * 6, _plain(spread), "–", "–"]]


def _among_cells(one: Among) -> list[str]:
    shares = [f"{value:.3f}" for value in (one.precision, one.recall, one.density, one.coverage, one.own, one.chance)]
    copies = "–" if one.copies is None else f"{one.copies.value:.1%} ({max(0, one.copies.low):.1%} … {min(1, one.copies.high):.1%})"
    clip = "–" if one.clip is None else f"{one.clip.value:.2f} ({one.clip.low:.2f} … {one.clip.high:.2f})"
    return [*shares, _plain(one.diversity), copies, clip]


def _plain(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"


DISTANCE_MEANING = (
    "Fréchet distances of a way's pictures, as a set, to originals of other captions, along the axes along which these differ most; lower is nearer, "
    "the mean over seeds; beside it by how much it is above the main row's, paired by caption and seed, of several seeds. An encoder that made the "
    f"clusters is no independent judge, and decides nothing: beside it stand pixels, averaged to {SIDE} a side, of which no encoder knows. They see "
    "grounds, where things lie and how strongly they are drawn, not outlines. Other originals: as many as there are judged captions, drawn anew, to "
    "those that are left, which is what a perfect model would get: mean, least and most of the draws. Their originals: those of the judged captions, "
    "as the codec gives them back."
)


def distance_rows(of: Measures) -> list[list[str]]:
    """A row for each way, and two of originals."""
    ways = dict.fromkeys(way for _, _, far, _ in of.distances for way in far)
    if not ways:
        return []
    found = [[way, *(cell for _, _, far, more in of.distances for cell in (_number(far.get(way)), signed(more.get(way))))] for way in ways]
    floors = [space.floor() for _, space, _, _ in of.distances]
    other = [cell for one in floors for cell in (f"{charts.number(one.value)} ({charts.number(one.least)} … {charts.number(one.most)})", "–")]
    own = [cell for _, space, _, _ in of.distances for cell in (_number(space.of_originals()), "–")]
    return [*found, ["other originals", *other], ["their originals", *own]]


def _number(value: float | None) -> str:
    return "–" if value is None else charts.number(value)


ROUTER_HEADER = ("router of", *(f"right at t = {t:g}" for t in TIMES), "by sizes alone", "calibration error", "log loss", "by sizes alone")

ROUTER_MEANING = (
    "How often a router's first choice is the row's cluster, on rows that training did not see; beside it one that always names the largest cluster. "
    "Expected calibration error (15 bins) and log loss, in nats, are means over these times; all are means over seeds."
)


def router_rows(of: Measures) -> list[list[str]]:
    """A row for each router."""
    found = []
    for row in of.compare.rows:
        if (one := of.router(row)) is None:
            continue
        by_seed, sizes = one
        right = np.mean([[at.accuracy.value for at in each] for each in by_seed], 0)
        error, loss = (np.mean([[getattr(at, name) for at in each] for each in by_seed]) for name in ("calibration", "log_loss"))
        numbers = (*right, sizes.accuracy.value, error, loss, sizes.log_loss)
        found.append([row, *(f"{value:.3f}" for value in numbers)])
    return found
