"""The interfaces of what proposes draft tokens: a draft head, and sources that run no model."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol, Self

import torch
from torch import Tensor

from .noise import Noise
from .template import Template
from .tree import DraftTree

SCOPES = ("request", "engine", "frozen")
"""How long a source keeps what a request taught it: for that request, as long as the engine, or not at all."""


@dataclass(frozen=True)
class Opening:
    """What a source is given when a request begins.

    Attributes:
        tokens_S: the prompt's token ids.
        capacity: most tokens of prompt and output together.
        tables: the bundle's tables for sources, by name, such as the successor matrix.
        scope: one of SCOPES.
        kept: this source's state of the previous request, if the prompt continues that request's text.
    """

    tokens_S: Tensor
    capacity: int
    tables: dict[str, Any]
    scope: str = "request"
    kept: "TokenSource | None" = None

    @property
    def device(self) -> torch.device:
        return self.tokens_S.device


@dataclass
class Proposal:
    """The nodes of a template that a source proposes.

    Attributes:
        tree: its `logp_N` is the source's own cumulative log-probability; 0 where it has none.
        evidence_1: the kind of evidence for the proposal, 1 to `kinds`, or 0 if nothing is proposed; [1] int64. None
            for a source that has probabilities instead.
    """

    tree: DraftTree
    evidence_1: Tensor | None = None


class TokenSource:
    """A source of draft tokens that runs no model, for one request. Nothing in it waits for the device.

    `retrieval/sources.py` lists the classes. Tracing, calibration, latency measurement and serving use these methods
    alone.

    Attributes:
        name: in plans, traces and statistics.
        kinds: number of kinds of evidence, see docs/policy.md; 0: proposals carry probabilities.
        learns: whether it learns from the target's logits (`learn`).
        is_shared: whether all requests of the engine share its tensors.
    """

    name: ClassVar[str]
    kinds: ClassVar[int] = 0
    learns: bool = False
    is_shared: bool = False

    @classmethod
    def open(cls, opening: Opening) -> Self:
        """Makes the source for one request."""
        raise NotImplementedError

    @classmethod
    def most_ranks(cls, tables: dict[str, Any]) -> int:
        """Most guesses that it can make after one token: the greatest rank of a template, plus one."""
        return 1

    @classmethod
    def can_score(cls, tables: dict[str, Any]) -> bool:
        """Whether its proposals carry the probabilities or the evidence that P(accepted) is computed from."""
        return True

    def propose(self, root_1: Tensor, template: Template, noise: Noise | None) -> Proposal:
        """Proposes what may follow the root.

        Args:
            root_1: the last emitted token.
            noise: of the draws, where the plan shares it: the tokens likeliest to be drawn are wanted then.
        """
        raise NotImplementedError

    def extend(self, tokens_A: Tensor, count_1: Tensor | None = None) -> None:
        """Appends emitted tokens to the source's copy of the request's text.

        Args:
            count_1: how many of the tokens are valid, [1] int64; None: all.
        """

    def learn(self, tokens_M: Tensor, logits_MV: Tensor, weight_M: Tensor | None = None) -> None:
        """Learns from the target's logits after some tokens. Where a token occurs twice, its later row counts.

        Args:
            tokens_M: the tokens, int64.
            logits_MV: the target's logits after each.
            weight_M: 0 for a row that only pads the shape, else 1; None: all 1.
        """

    def ranked(self, tokens_D: Tensor, noise: Noise | None) -> Tensor | None:
        """Returns its guesses after each token of a path, best first, [D, ranks]; None if it makes one guess only.

        Calibration chooses templates from it.
        """
        return None

    @property
    def tensors(self) -> list[Tensor]:
        """The tensors that `extend` and `learn` change."""
        return []

    def adopt(self, other: Self) -> None:
        """Copies the state of another source of its kind, whose buffers are at most as large."""
        for mine, theirs in zip(self.tensors, other.tensors, strict=True):
            mine[: len(theirs)].copy_(theirs)


class Draft(Protocol):
    """What a head has proposed so far in a round."""

    @property
    def steps(self) -> int:
        """Draft steps run."""

    @property
    def confidence(self) -> Tensor:
        """How sure the head is of its deepest nodes (Graft Eq. 6), 0-d."""

    @property
    def candidates(self) -> DraftTree:
        """The root and every node proposed so far; `logp_N` is cumulative."""


class HeadProposer(Protocol):
    """A draft head as the speculator uses it: several requests share a pass of the head.

    What it keeps of a request (KV cache, positions that it has not read yet) is opaque here: `open` makes that state.
    CUDA graphs need it on fixed buffers: see `fix` and `adopt` of `heads.draft.HeadState`.
    """

    most_steps: int | None
    """Draft steps that it can run; None: any number."""

    def open(self, topk: int, num_steps: int, tokens: int) -> Any:
        """Makes the state of a new request.

        Args:
            topk: children proposed per node, and nodes expanded per step.
            num_steps: most draft steps of a round.
            tokens: most tokens of prompt and output.
        """

    def resume(self, state: Any, length: int, topk: int, num_steps: int, tokens: int) -> None:
        """Reuses the state that another request left: keeps its first `length` positions, makes room for this one."""

    def begin(
        self,
        states: Sequence[Any],
        fresh: Sequence[tuple[Tensor, Tensor]],
        roots: Sequence[Tensor],
        noises: Sequence[Noise | None],
    ) -> Sequence[Any]:
        """Reads newly committed positions and proposes the children of the roots.

        Args:
            fresh: of each request the token after each position, [A], and the target's aux hidden states there, [A, E].
            roots: the last of these tokens, [1].
        """

    def deepen(self, states: Sequence[Any], drafts: Sequence[Any]) -> Sequence[Any]:
        """Adds a draft step to drafts of one depth."""

    def read(self, states: Sequence[Any], fresh: Sequence[tuple[Tensor, Tensor]]) -> Any:
        """Reads newly committed positions, without proposing anything."""

    def defer(self, states: Sequence[Any], fresh: Sequence[tuple[Tensor, Tensor]]) -> None:
        """Keeps newly committed positions for the next `begin`, where a round does not draft."""
