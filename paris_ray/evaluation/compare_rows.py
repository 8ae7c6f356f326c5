"""The rows of a comparison: each is a run config derived from the base, so that what trains and assembles runs makes it. Imports nothing heavy."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Literal

from paris_ray import config as configs
from paris_ray.config import RunConfig
from paris_ray.evaluation import matching
from paris_ray.training.budget import Inputs

if TYPE_CHECKING:
    from paris_ray.evaluation.compare_config import CompareConfig

MAIN = "experts"
"""The row that all others are compared with."""

BLIND = "blind"
"""The same experts, with the papers' router, which does not read the caption."""


@dataclass(frozen=True)
class Row:
    """What of the base a row changes.

    Attributes:
        title: for people.
        experts: how many; ``None``: as many as the base. One is a monolith.
        partition: ``kmeans``, or ``random``, which for one expert is the whole corpus.
        ddpm: so many of the experts, the first ones, learn by DDPM.
        shared_init: all experts start from the same weights.
        blind: the router does not read the caption.
        matched_inference: made so wide that a picture costs as much as one of the main row with top-2.
        small_batch: takes the batch of one expert of the main row, not that of all: as many more steps as there are experts.
        student: learns what the main row's mixture of the same seed says, in the place of the data's velocity.
        fault: a fault that is planted on purpose, in the main row's own trainings.
    """

    title: str
    experts: int | None = None
    partition: Literal["kmeans", "random"] = "kmeans"
    ddpm: int = 0
    shared_init: bool = False
    blind: bool = False
    matched_inference: bool = False
    small_batch: bool = False
    student: bool = False
    fault: Literal["router", "swapped", "raw"] | None = None

    @property
    def borrows(self) -> bool:
        """Whether its experts are the main row's, at that row's learning rate."""
        return self.blind or self.fault is not None


ROWS: dict[str, Row] = {
    MAIN: Row("experts of k-means clusters"),
    "monolith": Row("one model, equal training FLOPs", experts=1, partition="random"),
    "monolith-inference": Row("one model, equal training and inference FLOPs (wider)", experts=1, partition="random", matched_inference=True),
    "monolith-steps": Row("one model, equal training FLOPs, an expert's batch", experts=1, partition="random", small_batch=True),
    "distilled": Row("one model, distilled from the experts", experts=1, partition="random", student=True),
    "random": Row("experts of random parts", partition="random"),
    "experts-2": Row("2 experts", experts=2),
    "experts-4": Row("4 experts", experts=4),
    "experts-16": Row("16 experts", experts=16),
    "mixed": Row("2 DDPM experts, the others flow matching", ddpm=2),
    "shared-init": Row("experts that start from the same weights", shared_init=True),
    BLIND: Row("experts, router without text", blind=True),
    "fault-router": Row("fault: router trained on shuffled labels", fault="router"),
    "fault-swapped": Row("fault: two experts swapped", fault="swapped"),
    "fault-raw": Row("fault: raw weights in place of their average", fault="raw"),
}
"""In the table's order. The main row's experts have initial weights of their own, so ``shared-init`` is compared with it."""


@dataclass(frozen=True)
class Run:
    """One training of a row.

    Attributes:
        row: which.
        seed: of the comparison's.
        rate: learning rate of the experts.
        teacher_rate: of a student, that of its teacher's experts; ``None``: it has no teacher, or that rate is not chosen yet.
    """

    row: str
    seed: int
    rate: float
    teacher_rate: float | None = None

    @property
    def key(self) -> str:
        """Where it is below the comparison's folder."""
        taught = "" if self.teacher_rate is None else f"-teacher-{self.teacher_rate:g}"
        return f"runs/{self.row}/seed-{self.seed}-rate-{self.rate:g}{taught}"

    def folder(self, compare: CompareConfig) -> str:
        """Where it is."""
        return f"{compare.folder}/{self.key}"

    @property
    def teacher(self) -> Run | None:
        """The training of the main row whose mixture it learns."""
        return None if self.teacher_rate is None else Run(MAIN, self.seed, self.teacher_rate)


@dataclass(frozen=True)
class Drawing:
    """Pictures of one training, drawn in one way.

    Attributes:
        part: whose captions; see :func:`paris_ray.evaluation.compare_captions.choose`.
        routing: as in a request, or ``oracle``.
        guidance: scale.
        steps: of the solver.
        count: captions.
    """

    part: str
    routing: str
    guidance: float
    steps: int
    count: int

    @property
    def folder(self) -> str:
        """Below the training's."""
        return f"drawings/{self.part}/{self.routing}-guidance-{self.guidance:g}-steps-{self.steps}"

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


def num_experts(compare: CompareConfig, name: str) -> int:
    """Of a row."""
    return ROWS[name].experts or compare.base.num_experts


def routing(compare: CompareConfig, name: str) -> str:
    """What a row is drawn with."""
    return "expert-0" if num_experts(compare, name) == 1 else "top-2"


def partition_name(compare: CompareConfig, name: str) -> str:
    """Rows and seeds whose corpus is cut alike share it under this name."""
    return f"{ROWS[name].partition}-{num_experts(compare, name)}"


def partition_config(compare: CompareConfig, name: str) -> RunConfig:
    """The run in which a row's corpus is cut; all seeds have the same."""
    tree = compare.base.model_dump(mode="json")
    experts = num_experts(compare, name)
    tree |= {"run_dir": f"{compare.folder}/partitions/{partition_name(compare, name)}", "experts": experts}
    tree["partition"] |= {"method": ROWS[name].partition, "fine": max(tree["partition"]["fine"], experts)}
    tree["sampling"]["routing"] = routing(compare, name)
    return configs.build(tree)


def run_config(compare: CompareConfig, run: Run, sizes: Sequence[int] | None = None) -> RunConfig:
    """A row as a run.

    The batch counts images of all experts together: of K experts each has a K-th, and on average as many steps as a monolith. Images are shared out
    as the training rows are, so that every row is seen equally often, whoever learns it. Warm-up and half-life of the average are the same share of
    the mean training of every row; all experts of a row have the same number of images of these, so the expert of a small cluster has a larger share.

    Args:
        compare: the comparison.
        run: which training; the router has the base's learning rate.
        sizes: training rows of each expert; ``None``, before they are known: equal.
    """
    row, k = ROWS[run.row], num_experts(compare, run.row)
    tree = partition_config(compare, run.row).model_dump(mode="json")
    tree |= {"name": run.row, "run_dir": run.folder(compare), "seed": run.seed, "tracking": []}
    expert, router = tree["expert"], tree["router"]
    expert["train"] |= {"learning_rate": run.rate, "batch_size": compare.batch_size // (compare.base.num_experts if row.small_batch else k)}
    if row.blind:
        router["text"] = "none"
    if k == 1:  # a router of one expert has nothing to learn
        router["model"] = {"hidden_size": 8, "num_layers": 1, "num_heads": 1, "patch_size": router["model"]["patch_size"]}
        router["train"]["images"] = router["train"]["batch_size"]
    if row.matched_inference:
        expert["model"] |= {"size": None, "hidden_size": matched_width(compare)}
    tree["experts"] = [expert] * k
    total = images(compare, run.row, configs.build(tree))
    expert["train"] |= _in_proportion(compare, total / k)
    shares = [total / k] * k if sizes is None else [total * size / sum(sizes) for size in sizes]
    batch = expert["train"]["batch_size"]
    tree["experts"] = [
        {**expert, "train": {**expert["train"], "images": max(1, round(share / batch)) * batch}, **({"objective": "ddpm"} if i < row.ddpm else {})}
        for i, share in enumerate(shares)
    ]
    if row.shared_init:
        for spec in tree["experts"]:
            spec["init_from"] = f"{compare.folder}/initial/seed-{run.seed}"
    return configs.build(tree)


def _in_proportion(compare: CompareConfig, images: float) -> dict[str, Any]:
    """Of the settings that count images, what a training of so many has; the base's are those of the main row's experts."""
    train, whole = compare.base.expert.train, compare.images / compare.base.num_experts
    found: dict[str, Any] = {}
    for key in ("warmup_images", "ema_half_life_images", "checkpoint_images", "log_images", "sample_images"):
        value = getattr(train, key)
        found[key] = value if value is None or value == 0 else max(1, round(value * images / whole))
    return found


def images(compare: CompareConfig, name: str, run: RunConfig) -> int:
    """Images that a row's experts are trained on, all together, so that its training costs what that of the main row does, routers included.

    Of several experts the main row's: their routers differ by a head, or by the caption's projection. A student's has its teacher's forward passes in
    it, not its teacher's training, which comes on top.
    """
    if run.num_experts > 1:
        return compare.images
    inputs = matching.inputs_of(compare.base)
    each = matching.expert_training_flops(run.expert.model, inputs) + teacher_flops(compare, name, inputs)
    return round(training_flops(compare, inputs) / each)


def teacher_flops(compare: CompareConfig, name: str, inputs: Inputs) -> float:
    """What a row's teacher takes for each image that the row trains on; 0 where there is none."""
    return matching.teacher_flops(compare.base, inputs, routing(compare, MAIN)) if ROWS[name].student else 0.0


def training_flops(compare: CompareConfig, inputs: Inputs) -> float:
    """What the main row's training costs: its images and its router's."""
    base = compare.base
    return compare.images * matching.expert_training_flops(base.expert.model, inputs) + matching.router_training_flops(base, inputs)


def matched_width(compare: CompareConfig) -> int:
    """The hidden size of a single model with which a picture costs what it does with the main row's top-2, at the base's guidance for both."""
    base, inputs = compare.base, matching.inputs_of(compare.base)
    wanted = matching.picture_flops(base, inputs, "top-2")
    step = 2 * base.expert.model.num_heads
    widths = range(step, 8 * base.expert.model.hidden_size, step)

    def cost(width: int) -> float:
        model = base.expert.model.model_copy(update={"size": None, "hidden_size": width})
        spec = base.expert.model_copy(update={"model": model})
        return matching.picture_flops(base.model_copy(update={"experts": (spec,)}), inputs, "expert-0")

    return min(widths, key=lambda width: abs(cost(width) - wanted))
