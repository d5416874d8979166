"""A round of chains for an engine that runs head and target itself: policy and sources, and no model inside.

Nothing is kept from round to round: what is looked up is looked up in the whole text, which the engine has.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..heads.draft import Draft, Layer
from ..policy.plan import ChainPlan, Checkpoint
from ..policy.tree_builder import ChainBuilder
from ..proposer import Opening, TokenSource
from ..retrieval.sources import SOURCES
from ..speculator import is_unsure
from ..tree import Source, root_tree

CPU = torch.device("cpu")


class ChainRounds:
    """Begins the rounds of one plan.

    Args:
        tables: what a bundle holds for sources, by name. They are read and never taught: an engine that hides the
            target's logits leaves nothing to learn from.
        most: tokens that the engine verifies of a chain.
    """

    def __init__(self, plan: ChainPlan, tables: Mapping[str, Any], most: int) -> None:
        self.plan = plan
        self.most = most
        self._tables = dict(tables)
        self._builder = ChainBuilder(plan, CPU)

    def begin(self, texts: Sequence[Tensor | None]) -> "ChainRound":
        """A round of these requests.

        Args:
            texts: of each request its prompt and output so far, [S] int64 on the CPU; None for one that does not draft.
        """
        return ChainRound(self._builder, [self._sources(text_S) for text_S in texts], texts, self.most)

    def _sources(self, text_S: Tensor | None) -> dict[str, TokenSource]:
        if text_S is None:
            return {}
        opening = Opening(text_S, len(text_S), self._tables, scope="frozen")
        return {name: SOURCES[name].open(opening) for name in self.plan.sources}


class ChainRound:
    """One round of several requests, whose heads draft together, a token each a step.

    Attributes:
        drafts: of the requests that are still drafting, by index.
    """

    def __init__(
        self,
        builder: ChainBuilder,
        sources: Sequence[Mapping[str, TokenSource]],
        texts: Sequence[Tensor | None],
        most: int,
    ) -> None:
        self._builder = builder
        self._most = most
        self._sources = sources
        self._roots = [None if text_S is None else text_S[-1:] for text_S in texts]
        self._found: dict[int, tuple[Checkpoint, Draft[Layer] | None]] = {}
        self.drafts: dict[int, Draft[Layer]] = {}
        self._retrieved = {}
        plan, first = builder.plan, builder.plan.checkpoints[0]
        for index, root_1 in enumerate(self._roots):
            if root_1 is None:
                continue
            if first.steps:
                self.drafts[index] = Draft(root_1, [])
                continue
            retrieved = builder.retrieve(first, sources[index], root_1, None)
            self._retrieved[index] = retrieved
            if plan.drafts and not (retrieved and bool(builder.skips_drafting(first, retrieved))):
                self.drafts[index] = Draft(root_1, [])
            else:
                self._found[index] = (first, None)

    def deepen(self, tokens_B: Tensor, logp_B: Tensor) -> None:
        """Takes the next token that the head drafts for every request, drafting or not.

        Args:
            tokens_B: ids of the target's vocabulary, int64 on the CPU.
            logp_B: their log-probabilities after the token before, float32 on the CPU.
        """
        for index, draft in list(self.drafts.items()):
            token_11, logp_11 = tokens_B[index].view(1, 1), logp_B[index].view(1, 1)
            if draft.layers:
                above = draft.layers[-1]
                draft.layers.append(above.below(above.logp_C.topk(1), draft.first_row, logp_11, token_11))
            else:
                draft.layers.append(Layer.below_root(logp_11, token_11))
            checkpoint = self._stops(draft)
            if checkpoint is not None:
                self._found[index] = (checkpoint, self.drafts.pop(index))

    def _stops(self, draft: Draft[Layer]) -> Checkpoint | None:
        """The checkpoint at which this draft ends here."""
        *early, last = self._builder.plan.checkpoints
        if draft.steps >= min(last.steps, self._most):
            return last
        here = [one for one in early if one.steps == draft.steps]
        return here[0] if here and bool(is_unsure(draft, here[0])) else None

    def chains(self) -> list[list[int]]:
        """The tokens to verify of each request, none where it does not draft."""
        return [self._chain(index) if root_1 is not None else [] for index, root_1 in enumerate(self._roots)]

    def _chain(self, index: int) -> list[int]:
        checkpoint, draft = self._found[index]
        root_1 = self._roots[index]
        assert root_1 is not None
        retrieved = self._retrieved.get(index)
        if retrieved is None:
            retrieved = self._builder.retrieve(checkpoint, self._sources[index], root_1, None)
        tree = self._builder.build(checkpoint, draft.candidates if draft else root_tree(root_1), retrieved)
        return tree.tokens_N[tree.sources_N > Source.ROOT].tolist()[: self._most]
