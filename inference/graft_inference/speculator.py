"""From proposers and a policy to the next tree: what an engine embeds. There is no target in it."""

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
        builder: of the plan of this round.
        head: the head's part; None where no plan of the request drafts.
        sources: that the plan asks, by name.
        root_1: the last emitted token, which the target has not read yet; of a prompt that is not read yet, its own
            last.
        fresh_tokens_A, fresh_aux_AE: what the head has not been told: the tokens after the positions that the last
            round committed (or the last piece of the prompt), and the target's auxiliary states there.
        noise: of this round's draws; None for greedy decoding.
        retrieved: this round's candidates by source, once looked up.
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
        """The noise, where the plan shares it with head and sources; else None."""
        return self.noise if self.builder.plan.shares_noise else None

    @property
    def learns(self) -> bool:
        """Whether a source looks at the target's logits."""
        return any(source.learns for source in self.sources.values())

    def read(self, tokens_S: Tensor, logits_SV: Tensor) -> None:
        """The target has read a piece of the prompt."""
        for source in self.sources.values():
            if source.learns:
                source.learn(tokens_S, logits_SV)

    def observe(
        self, tree: DraftTree, logits_NV: Tensor, aux_NE: Tensor, acceptance: Acceptance, count: int | None = None
    ) -> None:
        """What the target says of a tree: teaches the sources, and is kept for the head.

        Args:
            count: accepted nodes, where the host knows; else all shapes are those of the greatest depth, and all
                tensors stay where they are.
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
    """Makes the next trees of several requests; those that draft share the passes of the head.

    Every decision is one host read for all requests that face it.

    Args:
        head: None where no plan drafts.
    """

    def __init__(self, head: HeadProposer | None) -> None:
        self._head = head

    @property
    def head(self) -> HeadProposer:
        """Raises GraftError where there is none, and a plan drafts."""
        if self._head is None:
            raise GraftError(
                "this engine has no draft head, and the plan drafts: choose another method, or load a bundle"
            )
        return self._head

    def draft(self, requests: Sequence[Speculation]) -> list[Chosen]:
        """Drafts from checkpoint to checkpoint until the head is unsure; the steps after that never run.

        Returns:
            Of each request, the checkpoint at which it stopped, and the root with every node that the head proposed.
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
        """Drafts up to a checkpoint. Nothing waits for the device.

        Args:
            requests: of one plan.
            drafts: of each, at one depth; None for what is not begun.
        """
        heads = [one.head for one in requests]
        if drafts[0] is None:
            fresh, roots = [one.fresh for one in requests], [one.root_1 for one in requests]
            drafts = self.head.begin(heads, fresh, roots, [one.shared_noise for one in requests])
        while drafts[0].steps < checkpoint.steps:
            drafts = self.head.deepen(heads, drafts)
        return drafts

    def build(self, requests: Sequence[Speculation], drafts: Sequence[Chosen]) -> list[Chosen]:
        """The best nodes of head and sources."""
        trees = []
        for one, (checkpoint, drafted) in zip(requests, drafts, strict=True):
            if one.retrieved is None:
                one.retrieved = retrieve(one, checkpoint)
            trees.append((checkpoint, one.builder.build(checkpoint, drafted, one.retrieved)))
        return trees

    def _asked(self, requests: Sequence[Speculation]) -> list[int]:
        """Which requests' heads are to draft. What the others committed waits until theirs is asked again."""
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
    """What the sources propose."""
    return request.builder.retrieve(checkpoint, request.sources, request.root_1, request.shared_noise)


def is_unsure(draft: Any, checkpoint: Any) -> Tensor:
    """Whether drafting stops here (Graft Eq. 7), [1] bool."""
    return (draft.confidence <= checkpoint.threshold)[None]


def read_records(records: list[Tensor]) -> list[list[Any]]:
    """Records of one dimension, in one host read; none where there is no record."""
    if not records:
        return []
    values = iter((records[0] if len(records) == 1 else torch.cat(records)).tolist())
    return [list(islice(values, len(record))) for record in records]
