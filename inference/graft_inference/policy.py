"""When to stop drafting, and how many nodes of each source make the tree: `graft.json`."""

from dataclasses import asdict, dataclass, field, replace
from typing import Any, Self

from .errors import GraftError

METHODS = ("graft", "eagle3", "prune", "retrieve", "autoregressive")


@dataclass(frozen=True)
class Stage:
    """Where drafting may stop, and the tree that is verified when it does (Graft table 1).

    Attributes:
        passes: head passes run when this stage is reached; the paper's checkpoint d is passes - 1.
            0 means that the head does not run.
        threshold: drafting stops here if the confidence is at most this (Graft Eq. 7). The last stage
            of a plan has no choice and ignores it.
        drafted: nodes kept from the head, best first.
        retrieved: rows for retrieved nodes.
        template: rank paths of retrieved nodes by priority. More paths than `retrieved` rows refill the
            rows that duplicates of drafted nodes free.
    """

    passes: int
    threshold: float = 0.0
    drafted: int = 0
    retrieved: int = 0
    template: tuple[tuple[int, ...], ...] = ()

    def __post_init__(self) -> None:
        for name in ("passes", "drafted", "retrieved"):
            value = getattr(self, name)
            if type(value) is not int or value < 0:
                raise GraftError(f"a stage's {name} must be a count, not {value!r}")
        if not isinstance(self.threshold, int | float):
            raise GraftError(f"a stage's threshold must be a number, not {self.threshold!r}")

    @property
    def name(self) -> str:
        return f"d{self.passes - 1}" if self.passes else "none"

    @property
    def rows(self) -> int:
        """Rows of one verification, the root included."""
        return 1 + self.drafted + self.retrieved

    @property
    def max_depth(self) -> int:
        return max([self.passes, *map(len, self.template)])


@dataclass(frozen=True)
class Plan:
    """What one method does: stages by rising passes, drafted with one beam width.

    Raises:
        GraftError: stages out of order, more nodes than a beam can give, a budget exceeded.
    """

    stages: tuple[Stage, ...]
    beam_width: int = 10
    budget: int = 64

    def __post_init__(self) -> None:
        passes = [stage.passes for stage in self.stages]
        if not passes or passes != sorted(set(passes)):
            raise GraftError(f"a plan's stages need rising passes, not {passes}")
        for stage in self.stages:
            candidates = self.beam_width + max(stage.passes - 1, 0) * self.beam_width**2
            if stage.drafted > (candidates if stage.passes else 0):
                raise GraftError(
                    f"stage {stage.name} keeps {stage.drafted} drafted nodes, but {stage.passes} passes with "
                    f"beam_width={self.beam_width} give {candidates if stage.passes else 0}: lower drafted"
                )
            if stage.rows > self.budget:
                raise GraftError(
                    f"stage {stage.name} has {stage.rows} rows, over the budget of {self.budget}: "
                    "lower drafted or retrieved"
                )
            if stage.retrieved > len(stage.template):
                raise GraftError(
                    f"stage {stage.name} has {stage.retrieved} retrieved rows but a template of "
                    f"{len(stage.template)} paths: lower retrieved"
                )

    @property
    def drafts(self) -> bool:
        return self.stages[-1].passes > 0

    @property
    def retrieves(self) -> bool:
        return any(stage.retrieved for stage in self.stages)

    @property
    def max_passes(self) -> int:
        return self.stages[-1].passes

    @property
    def max_rank(self) -> int:
        """Greatest successor rank any template uses; -1 for none."""
        return max((path[-1] for stage in self.stages for path in stage.template), default=-1)

    def without_retrieval(self) -> Self:
        """The same pruning with the retrieved rows left empty."""
        stages = tuple(replace(stage, retrieved=0, template=()) for stage in self.stages)
        return replace(self, stages=stages)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Self:
        try:
            stages = tuple(
                Stage(**{**stage, "template": tuple(tuple(path) for path in stage["template"])})
                for stage in values["stages"]
            )
            return cls(**{**values, "stages": stages})
        except (KeyError, TypeError) as error:
            raise GraftError(f"not a plan of a graft.json: {error}") from error


AUTOREGRESSIVE = Plan((Stage(passes=0),), beam_width=1, budget=1)


@dataclass(frozen=True)
class Policy:
    """Plans for the methods that need one, and what they were measured on.

    Attributes:
        measured_on: device, versions, latencies and data behind the plans; for people.
    """

    graft: Plan
    eagle3: Plan
    retrieve: Plan
    measured_on: dict[str, Any] = field(default_factory=dict)

    def plan(self, method: str) -> Plan:
        """The plan of one of METHODS."""
        match method:
            case "graft":
                return self.graft
            case "prune":
                return self.graft.without_retrieval()
            case "eagle3":
                return self.eagle3
            case "retrieve":
                return self.retrieve
            case "autoregressive":
                return AUTOREGRESSIVE
        raise GraftError(f"unknown method {method!r}: choose one of {', '.join(METHODS)}")

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Self:
        known = {"graft", "eagle3", "retrieve", "measured_on"}
        if set(values) != known:
            raise GraftError(f"graft.json must hold exactly {sorted(known)}, not {sorted(values)}")
        plans = {name: Plan.from_dict(values[name]) for name in ("graft", "eagle3", "retrieve")}
        return cls(**plans, measured_on=values["measured_on"])


def paper_policy(beam_width: int = 10) -> Policy:
    """The paper's settings for Qwen3-8B (thresholds in the middle of its ranges), 64 rows.

    It gives only how many retrieved nodes stand at each depth; the paths are ours: the rank-0 chain runs
    to the full depth and lower ranks get fewer descendants.
    """
    counts = {
        1: (0.135, 8, (8, 10, 8, 6, 5, 4, 4, 4, 3)),
        2: (0.14, 24, (6, 7, 5, 4, 4, 3, 3, 2, 2)),
        6: (0.485, 40, (4, 3, 3, 2, 2, 2, 2, 1, 1)),
    }
    stages = [
        Stage(passes, threshold, drafted, sum(depths), depth_template(depths))
        for passes, (threshold, drafted, depths) in counts.items()
    ]
    full = Stage(passes=9, drafted=60)
    first = stages[0]
    return Policy(
        graft=Plan((*stages, full), beam_width),
        eagle3=Plan((full,), beam_width),
        retrieve=Plan((Stage(0, 0.0, 0, first.retrieved, first.template),), beam_width),
        measured_on={"source": "arXiv 2605.20104, not calibrated on this device"},
    )


def depth_template(counts: tuple[int, ...]) -> tuple[tuple[int, ...], ...]:
    """Rank paths with the given number of nodes at each depth, the likeliest first.

    At each depth the paths of least total rank (ties: lowest ranks first) whose parents are in.
    """
    template: list[tuple[int, ...]] = []
    parents: list[tuple[int, ...]] = [()]
    for count in counts:
        children = [(*parent, rank) for parent in parents for rank in range(8)]
        parents = sorted(children, key=lambda path: (sum(path), path))[:count]
        template += parents
    return tuple(sorted(template, key=lambda path: (len(path) + sum(path), path)))
