"""When to stop drafting, and which nodes of each source make the tree: `graft.json`."""

from dataclasses import asdict, dataclass, field, fields, replace
from itertools import pairwise, repeat
from typing import Any, Self, get_args, get_origin

from ..errors import GraftError
from ..retrieval.prompt_lookup import LONGEST

METHODS = ("graft", "eagle3", "prune", "retrieve", "autoregressive")
RankPaths = tuple[tuple[int, ...], ...]
MAX_ROWS = 1024
"""Of a verification, and paths of a template: memory grows with their square. Devices pay for 8 to 64."""
MAX_CANDIDATES = 1 << 16
"""Nodes that the head may propose in a round."""
LARGEST_FLOAT = 1e30
"""Thresholds and offsets beyond it are damage; sums of them stay finite in float32."""


def check_template(template: RankPaths, what: str) -> None:
    """Raises GraftError unless the rank paths are closed under parents, each there once, and not too many."""
    seen: set[tuple[int, ...]] = {()}
    for path in template:
        if not path or path[:-1] not in seen or path in seen or path[-1] < 0:
            raise GraftError(f"{what} needs ranks from 0, and the parent of {list(path)} before it, each path once")
        seen.add(path)
    if len(template) >= MAX_ROWS:
        raise GraftError(f"{what} has {len(template)} paths, over the limit of {MAX_ROWS - 1}")


@dataclass(frozen=True)
class Scale:
    """One scale for all sources: P(accepted) of a node is the product along its path of

        P(accepted | parent accepted) = sigmoid(slope * logit(q) + offset),  q the source's probability of the step.

    No node is worth more than its parent, so the best nodes are closed under parents, whatever was fitted.

    Attributes:
        drafted: (slope, offset) of drafted nodes at depth 1, 2, ...
        retrieved: the same of retrieved nodes.
        ranks: added to a retrieved node's offset, by its rank among its parent's successors.
        template: rank paths that are looked up below the root and may compete.
        echo: log P(accepted) at depth 1, 2, ... of what the request's own text repeats, by matched tokens from 1
            to `echo.LONGEST`; empty: its text is not searched.

    Raises:
        GraftError: slopes that are not positive, or a table that is too short.
    """

    drafted: tuple[tuple[float, float], ...] = ()
    retrieved: tuple[tuple[float, float], ...] = ()
    ranks: tuple[float, ...] = ()
    template: RankPaths = ()
    echo: tuple[tuple[float, ...], ...] = ()

    def __post_init__(self) -> None:
        _check_types(self)
        check_template(self.template, "a scale's template")
        if any(slope <= 0 for slope, _ in (*self.drafted, *self.retrieved)):
            raise GraftError("a scale's slopes must be positive: calibrate again")
        if any(path[-1] >= len(self.ranks) for path in self.template):
            raise GraftError(f"the scale knows {len(self.ranks)} ranks, its template uses more: calibrate again")
        if self.depth > len(self.retrieved):
            raise GraftError(f"the scale knows {len(self.retrieved)} depths, its template has {self.depth}")
        if self.echo and (len(self.echo) != LONGEST or len({*map(len, self.echo)}) != 1):
            raise GraftError(f"the scale of the request's own text needs {LONGEST} rows of one length: calibrate again")
        if self.echo_depth >= MAX_ROWS:
            raise GraftError(f"the scale of the request's own text is {self.echo_depth} tokens deep: calibrate again")
        if any(not below <= above for row in self.echo for above, below in pairwise((0.0, *row))):
            raise GraftError("the scale of the request's own text must fall with depth, from 0: calibrate again")

    @property
    def depth(self) -> int:
        """Length of the longest rank path."""
        return max(map(len, self.template), default=0)

    @property
    def echo_depth(self) -> int:
        """Tokens that the request's own text may add."""
        return len(self.echo[0]) if self.echo else 0

    @property
    def candidates(self) -> int:
        """Nodes that retrieval may add to what the head proposes."""
        return len(self.template) + self.echo_depth


@dataclass(frozen=True)
class Stage:
    """Where drafting may stop, and the tree that is verified when it does (Graft table 1).

    Attributes:
        passes: head passes run when this stage is reached; the paper's checkpoint d is passes - 1.
            0 means that the head does not run.
        threshold: drafting stops here if the confidence is at most this (Graft Eq. 7). The last stage
            of a plan has no choice and ignores it. A first stage of 0 passes that is not the last is the
            other way round: the head is not even asked if the retrieved nodes promise more tokens than this.
        drafted: nodes kept from the head, best first.
        retrieved: rows for retrieved nodes.
        template: rank paths of retrieved nodes by priority. More paths than `retrieved` rows refill the
            rows that duplicates of drafted nodes free.
        width: where both sources compete (`Plan.scale`), in place of the three above: rows of the
            verification, root included.
    """

    passes: int
    threshold: float = 0.0
    drafted: int = 0
    retrieved: int = 0
    template: RankPaths = ()
    width: int = 0

    def __post_init__(self) -> None:
        _check_types(self)
        for name in ("passes", "drafted", "retrieved", "width"):
            if getattr(self, name) < 0:
                raise GraftError(f"a stage's {name} must be a count, not {getattr(self, name)}")
        check_template(self.template, f"the template of stage {self.name}")
        if self.width and (self.drafted or self.retrieved or self.template):
            raise GraftError("a stage has either a width or rows for each source, not both")

    @property
    def name(self) -> str:
        return f"d{self.passes - 1}" if self.passes else "none"

    @property
    def rows(self) -> int:
        """Rows of one verification, the root included."""
        return self.width or 1 + self.drafted + self.retrieved


@dataclass(frozen=True)
class Plan:
    """What one method does: stages by rising passes, drafted with one beam width.

    Attributes:
        scale: what makes the sources compete for rows; None: each stage has rows for either (the paper's way).
        drafted_only: the retrieved nodes of every tree are left out again, their rows empty.
        learns_accepted: the matrix learns from accepted tokens alone, not from every verified node.
        ngrams: retrieved nodes follow the last three tokens (`NgramSource`), not the last one alone.
        shares_noise: where tokens are drawn by chance, head and retrieval are told the noise of the draws (`Noise`).

    Raises:
        GraftError: stages out of order, more nodes than a beam can give, a budget exceeded.
    """

    stages: tuple[Stage, ...]
    topk: int = 10
    budget: int = 64
    scale: Scale | None = None
    drafted_only: bool = False
    learns_accepted: bool = False
    ngrams: bool = False
    shares_noise: bool = False

    def __post_init__(self) -> None:
        _check_types(self)
        passes = [stage.passes for stage in self.stages]
        if not passes or passes != sorted(set(passes)):
            raise GraftError(f"a plan's stages need rising passes, not {passes}")
        if passes[0] == 0 and len(passes) > 1 and not (self.scale and self.retrieves):
            raise GraftError("only a plan that scores retrieved nodes can begin with a stage of 0 passes")
        if self.topk < 1 or self.candidates(passes[-1]) > MAX_CANDIDATES or passes[-1] > MAX_ROWS:
            raise GraftError(
                f"{passes[-1]} passes with topk={self.topk} propose no nodes, or over {MAX_CANDIDATES}: lower either"
            )
        if not 0 < self.budget <= MAX_ROWS:
            raise GraftError(f"a budget of {self.budget} rows must lie in 1..{MAX_ROWS}")
        for stage in self.stages:
            candidates = self.candidates(stage.passes)
            if stage.drafted > candidates:
                raise GraftError(
                    f"stage {stage.name} keeps {stage.drafted} drafted nodes, but {stage.passes} passes with "
                    f"topk={self.topk} give {candidates}: lower drafted"
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
            if bool(stage.width) != (self.scale is not None):
                raise GraftError(f"stage {stage.name}: a width and a plan's scale belong together")
            retrieved = self.scale.candidates if self.scale else 0
            if self.scale and stage.rows > 1 + candidates + retrieved:
                raise GraftError(
                    f"stage {stage.name} has {stage.rows} rows, but only {candidates} drafted and "
                    f"{retrieved} retrieved candidates: lower its width"
                )
        if self.ngrams and not self.expands:
            raise GraftError("a plan that follows n-grams needs a template of retrieved nodes")
        if self.scale and self.num_steps > len(self.scale.drafted):
            raise GraftError(f"the scale knows {len(self.scale.drafted)} drafted depths, the plan {self.num_steps}")

    def candidates(self, passes: int) -> int:
        """Nodes that so many head passes propose."""
        return self.topk + (passes - 1) * self.topk**2 if passes else 0

    @property
    def drafts(self) -> bool:
        return self.stages[-1].passes > 0

    @property
    def expands(self) -> bool:
        """Whether the matrix, or a source in its place, is asked."""
        return bool(self.scale and self.scale.template) or any(stage.retrieved for stage in self.stages)

    @property
    def echoes(self) -> bool:
        """Whether the request's own text is searched."""
        return bool(self.scale and self.scale.echo)

    @property
    def retrieves(self) -> bool:
        return self.expands or self.echoes

    @property
    def num_steps(self) -> int:
        return self.stages[-1].passes

    @property
    def max_rows(self) -> int:
        """Rows of the widest verification, the root included."""
        return max(stage.rows for stage in self.stages)

    @property
    def max_rank(self) -> int:
        """Greatest successor rank any template uses; -1 for none."""
        templates = [stage.template for stage in self.stages] + ([self.scale.template] if self.scale else [])
        return max((path[-1] for template in templates for path in template), default=-1)

    def depth(self, stage: Stage) -> int:
        """Bound on the depth of this stage's trees."""
        retrieved = (self.scale.depth, self.scale.echo_depth) if self.scale else ()
        return max(stage.passes, *retrieved, *map(len, stage.template), 0)

    def without_retrieval(self) -> Self:
        """The same pruning without the retrieved nodes: the drafted nodes of this plan's own trees."""
        if self.scale:
            return replace(self, drafted_only=True) if self.retrieves else self
        stages = tuple(replace(stage, retrieved=0, template=()) for stage in self.stages)
        return replace(self, stages=stages, ngrams=False)

    def narrowed(self) -> Self | None:
        """Half the rows and half the head passes; None where there is no half."""
        if self.max_rows < 3:
            return None
        passes = -(-self.num_steps // 2)
        stages = [stage for stage in self.stages if stage.passes < passes]
        stages.append(replace(self.stages[-1], passes=passes))
        return replace(self, stages=tuple(map(self._halved, stages)))

    def _halved(self, stage: Stage) -> Stage:
        candidates = self.candidates(stage.passes)
        if self.scale is None:
            drafted = min(-(-stage.drafted // 2), candidates)
            return replace(stage, drafted=drafted, retrieved=-(-stage.retrieved // 2))
        return replace(stage, width=min(-(-stage.rows // 2), 1 + candidates + self.scale.candidates))

    def without_drafting(self) -> Self:
        """The retrieved nodes alone, of the stage that has most of them."""
        if self.scale is None:
            stage = max(self.stages, key=lambda stage: stage.retrieved)
            stage = replace(stage, passes=0, drafted=0)
        else:
            stage = self.stages[0] if not self.stages[0].passes else max(self.stages, key=lambda stage: stage.rows)
            stage = replace(stage, passes=0, width=min(stage.rows, 1 + self.scale.candidates))
        return replace(self, stages=(stage,))

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Self:
        try:
            stages = tuple(_exactly(Stage, stage) for stage in values["stages"])
            scale = None if values["scale"] is None else _exactly(Scale, values["scale"])
            return _exactly(cls, {**values, "stages": stages, "scale": scale})
        except (KeyError, TypeError, AttributeError) as error:
            raise GraftError(f"not a plan of a graft.json ({error}): calibrate again") from error


def _exactly(cls: type, values: dict[str, Any]) -> Any:
    """A dataclass from JSON that has every field of it and no other; lists become tuples."""

    def frozen(value: Any) -> Any:
        return tuple(map(frozen, value)) if isinstance(value, list | tuple) else value

    if missing := [one.name for one in fields(cls) if one.name not in values]:
        raise TypeError(f"a {cls.__name__.lower()} lacks {', '.join(missing)}")
    return cls(**{name: frozen(value) for name, value in values.items()})


def _check_types(part: Any) -> None:
    """Raises GraftError for the first field of a dataclass that is not of its type."""
    for one in fields(part):
        value = getattr(part, one.name)
        if not is_a(value, one.type):
            raise GraftError(f"{one.name}={value!r} of a {type(part).__name__.lower()} must be {_words(one.type)}")


def _words(kind: Any) -> str:
    return {int: "a whole number", float: "a finite number", bool: "true or false"}.get(kind, f"of the type {kind}")


def is_a(value: Any, kind: Any) -> bool:
    """Whether a value is of a type as dataclasses are annotated; a float is any finite number."""
    options = get_args(kind)
    if get_origin(kind) is tuple:
        if not isinstance(value, tuple) or (options[-1] is not Ellipsis and len(value) != len(options)):
            return False
        kinds = repeat(options[0]) if options[-1] is Ellipsis else options
        return all(map(is_a, value, kinds))
    if options:
        return any(is_a(value, option) for option in options)
    if kind is float:
        return isinstance(value, int | float) and type(value) is not bool and abs(value) <= LARGEST_FLOAT
    return type(value) is kind if kind in (int, bool) else isinstance(value, kind)


AUTOREGRESSIVE = Plan((Stage(passes=0),), topk=1, budget=1)


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

    @property
    def needs_ngrams(self) -> bool:
        return any(plan.ngrams for plan in (self.graft, self.eagle3, self.retrieve))

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
        measured_on = values["measured_on"]
        if not isinstance(measured_on, dict) or not isinstance(measured_on.get("device"), dict | None):
            raise GraftError(f"measured_on={measured_on!r} must be an object, and its device one or null")
        return cls(**plans, measured_on=measured_on)


def paper_policy(topk: int = 10, rows: int = 64, num_steps: int = 9, max_rank: int = 7) -> Policy:
    """The paper's settings for Qwen3-8B (thresholds in the middle of its ranges).

    It gives only how many retrieved nodes stand at each depth; the paths are ours: the rank-0 chain runs
    to the full depth and lower ranks get fewer descendants. Fewer rows than 64 scale both sources' shares,
    and a template is then its prefix.

    Args:
        num_steps: of the last stage; stages that would come after it are left out.
        max_rank: greatest successor rank that the matrix keeps.
    """
    counts = {
        1: (0.135, 8, (8, 10, 8, 6, 5, 4, 4, 4, 3)),
        2: (0.14, 24, (6, 7, 5, 4, 4, 3, 3, 2, 2)),
        6: (0.485, 40, (4, 3, 3, 2, 2, 2, 2, 1, 1)),
    }
    stages = []
    for passes, (threshold, drafted, depths) in counts.items():
        template = depth_template(depths, max_rank)
        kept = round(drafted * min(rows - 1, 60) / 60)
        retrieved = min(min(rows - 1, 60) - kept, len(template))
        if passes < num_steps:
            kept = min(kept, topk + (passes - 1) * topk**2)
            stages.append(Stage(passes, threshold, kept, retrieved, template))
    full = Stage(num_steps, drafted=min(rows - 1, 60, topk + (num_steps - 1) * topk**2))
    template = depth_template(counts[1][2], max_rank)
    retrieved = min(rows - 1, round(52 * min(rows - 1, 60) / 60), len(template))
    return Policy(
        graft=Plan((*stages, full), topk, max(rows, 2)),
        eagle3=Plan((full,), topk, max(rows, 2)),
        retrieve=Plan((Stage(0, 0.0, 0, retrieved, template),), topk, max(rows, 2)),
        measured_on={"source": "arXiv 2605.20104, not calibrated on this device"},
    )


def depth_template(counts: tuple[int, ...], max_rank: int = 7) -> RankPaths:
    """Rank paths with the given number of nodes at each depth, the likeliest first.

    At each depth the paths of least total rank (ties: lowest ranks first) whose parents are in.
    """
    template: list[tuple[int, ...]] = []
    parents: list[tuple[int, ...]] = [()]
    for count in counts:
        children = [(*parent, rank) for parent in parents for rank in range(max_rank + 1)]
        parents = sorted(children, key=lambda path: (sum(path), path))[:count]
        template += parents
    return tuple(sorted(template, key=lambda path: (len(path) + sum(path), path)))
