"""A round of trees for an engine that runs head and target itself, and verifies trees of one size.

Nothing is kept from round to round: what is looked up is looked up in the whole text, which the engine has. Shape
suffixes: B requests, N nodes of a verification, C candidates of the head, G nodes that it expanded, the root first.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Self

import torch
from torch import Tensor

from ..errors import GraftError
from ..policy.plan import ChainPlan, Checkpoint, ScoredPlan
from ..policy.tree_builder import ScoredBuilder
from ..speculator import Speculation, Speculator
from ..tree import DraftTree, Source, drafted_tree
from .bundled import frozen_sources, policy_of

CPU = torch.device("cpu")
LEAST = 1e-30
"""Probabilities below this count as this."""


@dataclass(frozen=True)
class Shape:
    """The fixed shape of an engine's rounds, for which its kernels are captured.

    Attributes:
        topk: children that the head proposes for a node, and nodes that it expands in a step.
        num_steps: draft steps.
        num_draft_tokens: nodes of a verification, the root included.
    """

    topk: int
    num_steps: int
    num_draft_tokens: int


@dataclass
class VerifiedTrees:
    """Trees of N nodes each, as verifiers take them.

    A padding node has the root as its parent, but no link leads to it.

    Attributes:
        tokens_BN: ids of the target's vocabulary, the root first.
        depths_BN: the root has depth 0.
        ancestors_BNN: row i marks node i and all its ancestors, bool.
        child_BN: each node's first child, -1 without one.
        sibling_BN: the next child of each node's parent, -1 without one.
    """

    tokens_BN: Tensor
    depths_BN: Tensor
    ancestors_BNN: Tensor
    child_BN: Tensor
    sibling_BN: Tensor

    @classmethod
    def of(cls, trees: Sequence[DraftTree], max_depth: int) -> Self:
        """Args: max_depth: of any of them."""
        links = [_links(tree) for tree in trees]
        return cls(
            torch.stack([tree.tokens_N for tree in trees]),
            torch.stack([tree.depths_N.where(tree.sources_N >= Source.ROOT, 1) for tree in trees]),
            torch.stack([tree.ancestors(max_depth) for tree in trees]),
            torch.stack([child_N for child_N, _ in links]),
            torch.stack([sibling_N for _, sibling_N in links]),
        )


class TreeRounds:
    """Makes the trees of a policy in an engine of one shape.

    Drafting always runs all of its steps there. So only the plan's last checkpoint is used, with the engine's number of
    nodes.

    Args:
        tables: a bundle's tables for sources, by name. They do not learn.

    Raises:
        GraftError: steps that the policy knows nothing of, or more nodes than there are candidates.
    """

    def __init__(self, plan: ScoredPlan, tables: Mapping[str, Any], shape: Shape) -> None:
        last = Checkpoint(shape.num_steps, 0.0, shape.num_draft_tokens)
        self._plan = replace(plan, checkpoints=(last,), topk=shape.topk)
        self._tables = tables
        self._builder = ScoredBuilder(self._plan, CPU)
        self._speculator = Speculator(None)

    @classmethod
    def of_bundle(cls, bundle: str, target_config: Any, tokenizer: Any | None, shape: Shape) -> Self:
        """The rounds of a bundle's policy.

        Args:
            bundle: directory or Hub id.
            target_config: the target's (text) configuration.
            tokenizer: the target's, or None to skip that check.

        Raises:
            GraftError: no bundle, another target or tokenizer, a policy without scores or of chains, or one that does
                not fit the shape.
        """
        policy, tables = policy_of(bundle, target_config, tokenizer)
        plan = policy.graft
        if not isinstance(plan, ScoredPlan) or isinstance(plan, ChainPlan) or not plan.drafts:
            raise GraftError(
                f"the policy of {bundle} does not score the nodes of trees that the head drafts: calibrate with "
                "policy.kind=learned, and export again"
            )
        return cls(plan, tables, shape)

    def trees(self, texts: Sequence[Tensor], drafted: Sequence[DraftTree]) -> VerifiedTrees:
        """The trees of a batch, all of the engine's size.

        Args:
            texts: of each request its prompt and output so far, the root last, [S] int64 on the CPU.
            drafted: of each, the root and every node that the head proposed, on the CPU.
        """
        requests = [self._speculation(text_S) for text_S in texts]
        last = self._plan.checkpoints[-1]
        chosen = self._speculator.build(requests, [(last, tree) for tree in drafted])
        return VerifiedTrees.of([tree for _, tree in chosen], self._builder.max_depth)

    def _speculation(self, text_S: Tensor) -> Speculation:
        sources = frozen_sources(self._plan.sources, self._tables, text_S)
        nothing = text_S[:0]
        return Speculation(self._builder, None, sources, text_S[-1:], nothing, nothing.float())


def drafted_trees(
    roots_B: Tensor, tokens_BC: Tensor, probabilities_BC: Tensor, expanded_BG: Tensor, topk: int
) -> list[DraftTree]:
    """The trees that an EAGLE head drafts, from the lists that EAGLE's own code and SGLang keep.

    Candidate c is a child of what was expanded at place c // topk: the root at place 0, then the topk best of each
    step.

    Args:
        roots_B: the last token of each text.
        tokens_BC: ids of the target's vocabulary, in the order in which they were proposed.
        probabilities_BC: of each, of its whole path.
        expanded_BG: which candidates were expanded, -1 for the root.
    """
    group_C = torch.arange(tokens_BC.shape[1]) // topk
    steps = 1 + (len(group_C) - topk) // topk**2
    rows = zip(roots_B, tokens_BC, probabilities_BC, expanded_BG, strict=True)
    return [_drafted_tree(*row, group_C, steps) for row in rows]


def _drafted_tree(
    root: Tensor, tokens_C: Tensor, probabilities_C: Tensor, expanded_G: Tensor, group_C: Tensor, steps: int
) -> DraftTree:
    logp_C = probabilities_C.float().clamp(min=LEAST).log()
    return drafted_tree(root[None], tokens_C, expanded_G.long()[group_C] + 1, logp_C, steps)


def _links(tree: DraftTree) -> tuple[Tensor, Tensor]:
    """First children and next siblings, [N] each."""
    index_N = torch.arange(len(tree))
    is_child_N = tree.sources_N > Source.ROOT
    child_NN = (tree.parents_N == index_N[:, None]) & is_child_N
    later_NN = (tree.parents_N == tree.parents_N[:, None]) & is_child_N & is_child_N[:, None]
    return _first(child_NN), _first(later_NN & (index_N > index_N[:, None]))


def _first(marked_NN: Tensor) -> Tensor:
    """The first marked column of each row, -1 without one."""
    return marked_NN.to(torch.uint8).argmax(dim=1).masked_fill(~marked_NN.any(dim=1), -1)
