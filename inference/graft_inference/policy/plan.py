"""Plans: when a round stops drafting, and which nodes are verified."""

from dataclasses import asdict, dataclass, replace
from typing import Any, Self

from ..checked import check_types, exactly
from ..errors import GraftError
from ..template import RankPaths, check_template
from ..tree import MAX_NODES, drafted_nodes
from .acceptance import AcceptanceModel

NOTHING = AcceptanceModel()
MAX_CANDIDATES = 1 << 16
"""Nodes that the head may propose in a round."""


def name_of(steps: int) -> str:
    """The paper's name of a checkpoint."""
    return f"d{steps - 1}" if steps else "none"


def _check_counts(part: Any, names: tuple[str, ...]) -> None:
    check_types(part)
    for name in names:
        if getattr(part, name) < 0:
            raise GraftError(f"a checkpoint's {name} must be a count, not {getattr(part, name)}")


@dataclass(frozen=True)
class Checkpoint:
    """Where drafting may stop (Graft table 1), and the size of the tree that is verified when it does.

    Attributes:
        steps: draft steps (passes of the head) run when it is reached; the paper's checkpoint d is steps - 1.
            0 means that the head does not run.
        threshold: drafting stops here if the head's confidence is at most this, a probability (Graft Eq. 7). The last
            checkpoint of a plan ignores it, since drafting always stops there. At a first checkpoint of 0 steps it is
            a number of tokens: the head does not run if more accepted tokens are expected of the retrieved nodes.
        num_draft_tokens: nodes of the tree, the root included.
    """

    steps: int
    threshold: float = 0.0
    num_draft_tokens: int = 1

    def __post_init__(self) -> None:
        _check_counts(self, ("steps", "num_draft_tokens"))
        if not self.num_draft_tokens:
            raise GraftError(f"checkpoint {self.name} has no node, but the root is always one: num_draft_tokens >= 1")

    @property
    def name(self) -> str:
        return name_of(self.steps)


@dataclass(frozen=True)
class QuotaCheckpoint:
    """A `Checkpoint` at which head and matrix have a quota of nodes each, as in the paper.

    Attributes:
        steps, threshold: as in `Checkpoint`.
        drafted: nodes kept from the head, best first.
        retrieved: nodes from the successor matrix.
        template: their rank paths by priority. Paths beyond `retrieved` are used where an earlier one leads to a node
            that was drafted already.
    """

    steps: int
    threshold: float = 0.0
    drafted: int = 0
    retrieved: int = 0
    template: RankPaths = ()

    def __post_init__(self) -> None:
        _check_counts(self, ("steps", "drafted", "retrieved"))
        check_template(self.template, f"the template of checkpoint {self.name}")
        if self.retrieved > len(self.template):
            raise GraftError(
                f"checkpoint {self.name} has {self.retrieved} retrieved nodes but a template of "
                f"{len(self.template)} paths: lower retrieved"
            )

    @property
    def name(self) -> str:
        return name_of(self.steps)

    @property
    def num_draft_tokens(self) -> int:
        return 1 + self.drafted + self.retrieved


@dataclass(frozen=True)
class Plan:
    """How the rounds of a method are made; a `QuotaPlan`, a `ScoredPlan` or a `ChainPlan`.

    Attributes:
        checkpoints: by rising number of draft steps.
        topk: children that the head proposes per node, and nodes that it expands per step.
        learns_accepted: the matrix learns from accepted tokens only, not from every verified node.
        shares_noise: when sampling, head and sources get the noise of the draws (`Noise`).

    Raises:
        GraftError: checkpoints out of order, or more nodes than a verification or the head can have.
    """

    checkpoints: tuple[Any, ...]
    topk: int = 10
    learns_accepted: bool = False
    shares_noise: bool = False

    def __post_init__(self) -> None:
        check_types(self)
        steps = [checkpoint.steps for checkpoint in self.checkpoints]
        if not steps or steps != sorted(set(steps)):
            raise GraftError(f"a plan's checkpoints need rising steps, not {steps}")
        if self.topk < 1 or self.candidates(steps[-1]) > MAX_CANDIDATES or steps[-1] > MAX_NODES:
            raise GraftError(
                f"{steps[-1]} steps with topk={self.topk} propose no nodes, or over {MAX_CANDIDATES}: lower either"
            )
        if self.num_draft_tokens > MAX_NODES:
            raise GraftError(f"a tree of {self.num_draft_tokens} nodes is over the limit of {MAX_NODES}")

    @property
    def drafts(self) -> bool:
        return self.num_steps > 0

    @property
    def num_steps(self) -> int:
        """Most draft steps of a round."""
        return self.checkpoints[-1].steps

    @property
    def num_draft_tokens(self) -> int:
        """Nodes of the largest tree, the root included."""
        return max(checkpoint.num_draft_tokens for checkpoint in self.checkpoints)

    @property
    def sources(self) -> tuple[str, ...]:
        """Names of the sources that are asked."""
        raise NotImplementedError

    def most_ranks(self, source: str) -> int:
        """Guesses after one token that its templates ask a source for."""
        raise NotImplementedError

    def candidates(self, steps: int) -> int:
        """Nodes that the head proposes in so many steps."""
        return drafted_nodes(self.topk, steps)

    def depth(self, checkpoint: Any) -> int:
        """Bound on the depth of the trees of a checkpoint."""
        raise NotImplementedError

    def narrowed(self) -> Self | None:
        """A plan of half the nodes and half the draft steps, for the fallback; None for a plan that is too small."""
        if self.num_draft_tokens < 3:
            return None
        steps = -(-self.num_steps // 2)
        kept = [checkpoint for checkpoint in self.checkpoints if checkpoint.steps < steps]
        kept.append(replace(self.checkpoints[-1], steps=steps))
        return replace(self, checkpoints=tuple(map(self._halved, kept)))

    def _halved(self, checkpoint: Any) -> Any:
        raise NotImplementedError

    def without_drafting(self) -> Self:
        """A plan of the retrieved nodes alone, for the fallback: those of the checkpoint that has most of them."""
        raise NotImplementedError

    def to_dict(self) -> dict[str, Any]:
        kind = next(kind for kind, cls in KINDS.items() if type(self) is cls)
        return {"kind": kind, **asdict(self)}

    @staticmethod
    def from_dict(values: dict[str, Any]) -> "Plan":
        """Raises GraftError for what `to_dict` did not write."""
        try:
            rest = dict(values)
            cls = KINDS[rest.pop("kind")]
            is_scored = issubclass(cls, ScoredPlan)
            kind_of = Checkpoint if is_scored else QuotaCheckpoint
            rest["checkpoints"] = tuple(exactly(kind_of, checkpoint) for checkpoint in values["checkpoints"])
            if is_scored:
                rest["acceptance"] = AcceptanceModel.from_dict(values["acceptance"])
            return exactly(cls, rest)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise GraftError(f"not a plan of a graft.json ({error}): calibrate again") from error


@dataclass(frozen=True)
class QuotaPlan(Plan):
    """Each source has a quota of nodes at each checkpoint (the paper's way); only the matrix is asked."""

    checkpoints: tuple[QuotaCheckpoint, ...]

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.drafts and not self.checkpoints[0].steps:
            raise GraftError("only a plan that scores retrieved nodes can begin with a checkpoint of 0 steps")
        for checkpoint in self.checkpoints:
            candidates = self.candidates(checkpoint.steps)
            if checkpoint.drafted > candidates:
                raise GraftError(
                    f"checkpoint {checkpoint.name} keeps {checkpoint.drafted} drafted nodes, but {checkpoint.steps} "
                    f"steps with topk={self.topk} give {candidates}: lower drafted"
                )

    @property
    def sources(self) -> tuple[str, ...]:
        return ("matrix",) if any(checkpoint.retrieved for checkpoint in self.checkpoints) else ()

    def most_ranks(self, source: str) -> int:
        return 1 + max((path[-1] for checkpoint in self.checkpoints for path in checkpoint.template), default=-1)

    def depth(self, checkpoint: QuotaCheckpoint) -> int:
        return max(checkpoint.steps, *map(len, checkpoint.template), 0)

    def _halved(self, checkpoint: QuotaCheckpoint) -> QuotaCheckpoint:
        drafted = min(-(-checkpoint.drafted // 2), self.candidates(checkpoint.steps))
        return replace(checkpoint, drafted=drafted, retrieved=-(-checkpoint.retrieved // 2))

    def without_drafting(self) -> Self:
        checkpoint = max(self.checkpoints, key=lambda checkpoint: checkpoint.retrieved)
        return replace(self, checkpoints=(replace(checkpoint, steps=0, drafted=0),))


@dataclass(frozen=True)
class ScoredPlan(Plan):
    """The nodes of the head and of all sources compete for the tree by their P(accepted)."""

    checkpoints: tuple[Checkpoint, ...]
    acceptance: AcceptanceModel = NOTHING

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.drafts and not self.checkpoints[0].steps and not self.sources:
            raise GraftError("only a plan that asks a source can begin with a checkpoint of 0 steps")
        if self.num_steps > len(self.acceptance.drafted):
            known = len(self.acceptance.drafted)
            raise GraftError(f"the acceptance model knows {known} drafted depths, the plan {self.num_steps}")
        for checkpoint in self.checkpoints:
            most = 1 + self.candidates(checkpoint.steps) + self.acceptance.candidates
            if checkpoint.num_draft_tokens > most:
                raise GraftError(
                    f"checkpoint {checkpoint.name} has {checkpoint.num_draft_tokens} nodes, but there are only "
                    f"{most - 1} candidates and the root: lower num_draft_tokens"
                )

    @property
    def sources(self) -> tuple[str, ...]:
        return tuple(source.name for source in self.acceptance.sources if source.template)

    def most_ranks(self, source: str) -> int:
        models = [model for model in self.acceptance.sources if model.name == source]
        return 1 + max((path[-1] for model in models for path in model.template), default=-1)

    def depth(self, checkpoint: Checkpoint) -> int:
        return max(checkpoint.steps, self.acceptance.depth)

    def _halved(self, checkpoint: Checkpoint) -> Checkpoint:
        most = 1 + self.candidates(checkpoint.steps) + self.acceptance.candidates
        return replace(checkpoint, num_draft_tokens=min(-(-checkpoint.num_draft_tokens // 2), most))

    def without_drafting(self) -> Self:
        first, most = self.checkpoints[0], max(self.checkpoints, key=lambda checkpoint: checkpoint.num_draft_tokens)
        chosen = most if first.steps else first
        nodes = min(chosen.num_draft_tokens, 1 + self.acceptance.candidates)
        return replace(self, checkpoints=(replace(chosen, steps=0, num_draft_tokens=nodes),))


@dataclass(frozen=True)
class ChainPlan(ScoredPlan):
    """Verifies one path instead of a tree, for engines that verify chains.

    Of all candidates it takes the path with the most expected accepted tokens. The head drafts one likeliest token per
    step. What the sources propose lengthens that chain, or replaces it.
    """

    topk: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.topk != 1:
            raise GraftError(f"a chain has one token after the other, so topk={self.topk} must be 1")

    @property
    def length(self) -> int:
        """Most tokens of a chain."""
        return max(min(one.num_draft_tokens - 1, self.depth(one)) for one in self.checkpoints)


KINDS: dict[str, type[Plan]] = {"quotas": QuotaPlan, "scores": ScoredPlan, "chains": ChainPlan}
"""As `graft.json` names them."""
AUTOREGRESSIVE = QuotaPlan((QuotaCheckpoint(0),), topk=1)
