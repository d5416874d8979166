"""A round of chains for an engine that runs head and target itself: policy and sources, and no model inside.

Nothing is kept from round to round: what is looked up is looked up in the whole text, which the engine has.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Self

import torch
from torch import Tensor

from ..errors import GraftError
from ..heads.draft import Draft, Layer
from ..policy.plan import ChainPlan, Checkpoint
from ..policy.tree_builder import ChainBuilder
from ..proposer import TokenSource
from ..speculator import is_unsure
from ..tree import DraftTree, Source, root_tree
from .bundled import frozen_sources, policy_of

CPU = torch.device("cpu")


class ChainRounds:
    """Begins the rounds of one plan.

    Args:
        tables: a bundle's tables for sources, by name. They do not learn, since the engine hides the target's logits.
    """

    def __init__(self, plan: ChainPlan, tables: Mapping[str, Any]) -> None:
        self.plan = plan
        self._tables = tables
        self._builder = ChainBuilder(plan, CPU)

    @classmethod
    def of_bundle(cls, bundle: str, target_config: Any, tokenizer: Any | None, most: int) -> Self:
        """The rounds of a bundle's policy.

        Args:
            bundle: directory or Hub id.
            target_config: the target's (text) configuration.
            tokenizer: the target's, or None to skip that check.
            most: most draft tokens of a chain, as the engine is configured.

        Raises:
            GraftError: no bundle, another target or tokenizer, a policy of trees, or of shorter chains.
        """
        policy, tables = policy_of(bundle, target_config, tokenizer)
        plan = policy.graft
        if not isinstance(plan, ChainPlan):
            raise GraftError(
                f"the policy of {bundle} makes trees, and this engine verifies chains: calibrate with "
                "policy.kind=chain policy.topk=1, and export again"
            )
        if not plan.length:
            raise GraftError(
                f"the policy of {bundle} is plain decoding, as nothing else pays: start the engine without speculation"
            )
        if most > plan.length:
            raise GraftError(
                f"num_speculative_tokens={most}, but the policy of {bundle} makes chains of at most {plan.length} "
                "tokens: lower it"
            )
        return cls(plan, tables)

    def without_drafting(self) -> Self:
        """The same rounds without the head: sources alone."""
        return type(self)(self.plan.without_drafting(), self._tables)

    def begin(self, texts: Sequence[Tensor | None], most: int) -> "ChainRound":
        """A round of these requests.

        Args:
            texts: of each request its prompt and output so far, [S] int64 on the CPU; None for one that does not draft.
            most: most draft tokens of a chain.
        """
        return ChainRound([None if text_S is None else self._draft(text_S, most) for text_S in texts])

    def _draft(self, text_S: Tensor, most: int) -> "ChainDraft":
        sources = frozen_sources(self.plan.sources, self._tables, text_S)
        return ChainDraft(self._builder, sources, text_S[-1:], most)


class ChainDraft:
    """What one request drafts in a round.

    Attributes:
        checkpoint: at which drafting stopped; None while it goes on.
    """

    def __init__(self, builder: ChainBuilder, sources: Mapping[str, TokenSource], root_1: Tensor, most: int) -> None:
        self.checkpoint: Checkpoint | None = None
        self._builder = builder
        self._sources = sources
        self._most = most
        self._drafted: Draft[Layer] = Draft(root_1, [])
        self._retrieved: list[DraftTree] | None = None
        plan, first = builder.plan, builder.plan.checkpoints[0]
        if not plan.drafts or not most or (not first.steps and self._skips_drafting(first)):
            self.checkpoint = first

    def deepen(self, token_1: Tensor, logp_1: Tensor) -> None:
        """Takes the token that the head drafts next, and its log-probability after the one before, [1] each."""
        layers, draft = self._drafted.layers, self._drafted
        logp_11, token_11 = logp_1[None], token_1[None]
        if layers:
            layers.append(layers[-1].below(layers[-1].logp_C.topk(1), draft.first_row, logp_11, token_11))
        else:
            layers.append(Layer.below_root(logp_11, token_11))
        *early, last = self._builder.plan.checkpoints
        if draft.steps >= min(last.steps, self._most):
            self.checkpoint = last
        for one in early:
            if one.steps == draft.steps and bool(is_unsure(draft, one)):
                self.checkpoint = one

    def chain(self) -> list[int]:
        """The tokens to verify."""
        assert self.checkpoint is not None
        drafted = self._drafted.candidates if self._drafted.layers else root_tree(self._drafted.root_1)
        tree = self._builder.build(self.checkpoint, drafted, self._retrieve(self.checkpoint))
        return tree.tokens_N[tree.sources_N > Source.ROOT].tolist()[: self._most]

    def _skips_drafting(self, checkpoint: Checkpoint) -> bool:
        retrieved = self._retrieve(checkpoint)
        return bool(retrieved) and bool(self._builder.skips_drafting(checkpoint, retrieved))

    def _retrieve(self, checkpoint: Checkpoint) -> list[DraftTree]:
        """Looked up once a round; what is found is the same at every checkpoint."""
        if self._retrieved is None:
            self._retrieved = self._builder.retrieve(checkpoint, self._sources, self._drafted.root_1, None)
        return self._retrieved


class ChainRound:
    """One round of several requests, whose heads draft together, a token each a step."""

    def __init__(self, drafts: Sequence[ChainDraft | None]) -> None:
        self._drafts = drafts

    @property
    def is_drafting(self) -> bool:
        """Whether a request waits for another token of the head."""
        return any(draft is not None and draft.checkpoint is None for draft in self._drafts)

    def deepen(self, tokens_B: Tensor, logp_B: Tensor) -> None:
        """Takes the next token that the head drafts for every request, whether that still drafts or not.

        Args:
            tokens_B: ids of the target's vocabulary, int64 on the CPU.
            logp_B: their log-probabilities after the token before, float32 on the CPU.
        """
        for draft, token_1, logp_1 in zip(self._drafts, tokens_B.split(1), logp_B.split(1), strict=True):
            if draft is not None and draft.checkpoint is None:
                draft.deepen(token_1, logp_1)

    def chains(self) -> list[list[int]]:
        """The tokens to verify of each request, none where it does not draft."""
        return [[] if draft is None else draft.chain() for draft in self._drafts]
