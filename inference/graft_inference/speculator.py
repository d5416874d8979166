"""From proposers and a plan to the next tree. The target is not needed here."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from .errors import GraftError
from .noise import Noise
from .policy.tree_builder import ScoredBuilder, TreeBuilder
from .proposer import HeadProposer, TokenSource
from .tree import DraftTree, root_tree
from .verification import Acceptance, accepted_rows, every_row

Chosen = tuple[Any, DraftTree]
"""The checkpoint at which drafting stopped, and a tree."""


@dataclass
class Speculation:
    """What the speculator keeps of one request from round to round.

    Attributes:
        builder: makes the trees of this round's plan.
        head: what the head keeps of the request; None where no plan of the request drafts.
        sources: the sources that the plan asks, by name.
        root_1: the last emitted token, [1], which the target has not read yet. During the prefill it is the prompt's
            last token.
        fresh_tokens_A, fresh_aux_AE: input that the head has not read yet. For each position that the last round (or
            the last piece of the prompt) committed: the token after it, and the target's aux hidden states at it.
        noise: of this round's draws; None for greedy decoding.
        retrieved: this round's candidates, one tree for each source; None until they are looked up.
    """

    builder: TreeBuilder
    head: Any | None
    sources: Mapping[str, TokenSource]
    root_1: Tensor
    fresh_tokens_A: Tensor
    fresh_aux_AE: Tensor
    noise: Noise | None = None
    retrieved: list[DraftTree] | None = field(default=None)

    @property
    def shared_noise(self) -> Noise | None:
        """The noise, if the plan shares it with head and sources; else None."""
        return self.noise if self.builder.plan.shares_noise else None

    @property
    def learns(self) -> bool:
        """Whether a source learns from the target's logits."""
        return any(source.learns for source in self.sources.values())

    def read(self, tokens_S: Tensor, logits_SV: Tensor) -> None:
        """Lets the sources learn from a piece of the prompt.

        Args:
            tokens_S: the piece.
            logits_SV: the target's logits after each token.
        """
        for source in self.sources.values():
            if source.learns:
                source.learn(tokens_S, logits_SV)

    def observe(
        self, tree: DraftTree, logits_NV: Tensor, aux_NE: Tensor, acceptance: Acceptance, count: int | None = None
    ) -> None:
        """Passes a verified tree on: sources learn and extend their text, the head's next input is kept.

        Args:
            tree: the tree that was verified.
            logits_NV, aux_NE: the target's logits and aux hidden states at its nodes.
            count: number of accepted nodes, if the host knows it; else, in a CUDA graph, tensors have the greatest
                depth's shape and are changed in place.
        """
        if self.learns:
            taught = accepted_rows if self.builder.plan.learns_accepted else every_row
            rows_M, tokens_M, weight_M = taught(tree, acceptance, count)
            for source in self.sources.values():
                if source.learns:
                    source.learn(tokens_M, logits_NV[rows_M], weight_M)
        emitted_A, aux_AE = acceptance.emitted_D[:count], aux_NE[acceptance.path_D[:count]]
        count_1 = acceptance.count[None] if count is None else None
        for source in self.sources.values():
            source.extend(emitted_A, count_1)
        if count_1 is None:
            self.fresh_tokens_A, self.fresh_aux_AE, self.root_1 = emitted_A, aux_AE, emitted_A[-1:]
            return
        self.root_1.copy_(emitted_A.index_select(0, count_1 - 1))
        if self.head is not None:
            self.head.fixed.append(emitted_A, aux_AE, count_1)

    @property
    def fresh(self) -> tuple[Tensor, Tensor]:
        return self.fresh_tokens_A, self.fresh_aux_AE


class Speculator:
    """Makes the next trees of several requests, which share the passes of the head.

    Each decision whether to go on drafting is one host read, for all requests that are at that checkpoint.

    Args:
        head: None where no plan drafts.
    """

    def __init__(self, head: HeadProposer | None) -> None:
        self._head = head

    @property
    def head(self) -> HeadProposer:
        """The head's proposer; raises GraftError where there is none."""
        if self._head is None:
            raise GraftError(
                "this engine has no draft head, and the plan drafts: choose another method, or load a bundle"
            )
        return self._head

    def draft(self, requests: Sequence[Speculation]) -> list[Chosen]:
        """Drafts from checkpoint to checkpoint until the head is unsure. Later steps are not run.

        Returns:
            For each request the checkpoint at which drafting stopped, and a tree of the root and all drafted nodes.
        """
        found: list[Chosen] = [(one.builder.plan.checkpoints[0], root_tree(one.root_1)) for one in requests]
        asked = self._asked(requests)
        if not asked:
            return found
        drafts: dict[int, Any] = dict.fromkeys(asked)
        plan = requests[asked[0]].builder.plan
        for checkpoint in plan.checkpoints[not plan.checkpoints[0].steps :]:
            grown = self.advance([requests[index] for index in drafts], list(drafts.values()), checkpoint)
            drafts = dict(zip(drafts, grown, strict=True))
            stops = [[True]] * len(drafts)
            if checkpoint is not plan.checkpoints[-1]:
                stops = read_records([is_unsure(draft, checkpoint) for draft in grown])
            for index, (stop,) in zip(list(drafts), stops, strict=True):
                if stop:
                    found[index] = (checkpoint, drafts.pop(index).candidates)
            if not drafts:
                break
        return found

    def advance(self, requests: Sequence[Speculation], drafts: Sequence[Any], checkpoint: Any) -> Sequence[Any]:
        """Runs the draft steps up to a checkpoint. Nothing waits for the device.

        Args:
            requests: all with the same plan.
            drafts: of each request its draft so far, all at the same depth; None before the first step.
        """
        heads = [one.head for one in requests]
        if drafts[0] is None:
            fresh, roots = [one.fresh for one in requests], [one.root_1 for one in requests]
            drafts = self.head.begin(heads, fresh, roots, [one.shared_noise for one in requests])
        while drafts[0].steps < checkpoint.steps:
            drafts = self.head.deepen(heads, drafts)
        return drafts

    def build(self, requests: Sequence[Speculation], drafts: Sequence[Chosen]) -> list[Chosen]:
        """Chooses the nodes that are verified from those of head and sources.

        Returns:
            For each request the checkpoint, and the tree to verify.
        """
        trees = []
        for one, (checkpoint, drafted) in zip(requests, drafts, strict=True):
            if one.retrieved is None:
                one.retrieved = retrieve(one, checkpoint)
            trees.append((checkpoint, one.builder.build(checkpoint, drafted, one.retrieved)))
        return trees

    def _asked(self, requests: Sequence[Speculation]) -> list[int]:
        """Indices of the requests that draft in this round. For the others the head's new input is kept for later."""
        asked: list[int] = []
        waiting: list[int] = []
        skips = {}
        for index, one in enumerate(requests):
            plan, one.retrieved = one.builder.plan, None
            if one.head is None:
                continue
            if plan.drafts and not plan.checkpoints[0].steps:
                one.retrieved = retrieve(one, plan.checkpoints[0])
                if one.retrieved:
                    assert isinstance(one.builder, ScoredBuilder)
                    skips[index] = one.builder.skips_drafting(plan.checkpoints[0], one.retrieved)
            (asked if plan.drafts else waiting).append(index)
        for index, (skip,) in zip(skips, read_records(list(skips.values())), strict=True):
            if skip:
                asked.remove(index)
                waiting.append(index)
        if waiting:
            self.head.defer([requests[index].head for index in waiting], [requests[index].fresh for index in waiting])
        return asked


def retrieve(request: Speculation, checkpoint: Any) -> list[DraftTree]:
    """What the sources propose, one tree each."""
    return request.builder.retrieve(checkpoint, request.sources, request.root_1, request.shared_noise)


def is_unsure(draft: Any, checkpoint: Any) -> Tensor:
    """Whether drafting stops at this checkpoint (Graft Eq. 7), [1] bool."""
    return (draft.confidence <= checkpoint.threshold)[None]


def read_records(records: list[Tensor]) -> list[list[Any]]:
    """Copies one-dimensional tensors to the host in one read, and returns them as lists."""
    if not records:
        return []
    values = iter((records[0] if len(records) == 1 else torch.cat(records)).tolist())
    return [list(islice(values, len(record))) for record in records]
