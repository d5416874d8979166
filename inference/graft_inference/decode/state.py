"""What a request carries from round to round."""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..policy.fallback import Fallback
from ..policy.tree_builder import TreeBuilder
from ..speculator import Speculation
from ..stats import GenerationStats, PhaseClock
from ..target.kv_cache import TreeCache
from .sampling import Sampler


@dataclass
class DecodeState:
    """Everything that changes while one prompt is decoded.

    Attributes:
        speculation: what the speculator keeps of the request.
        cache: the target's KV cache.
        place: number of tokens emitted so far, those that were accepted beyond the request's end included.
        history_S: prompt and emitted tokens, where a logits processor reads them.
        logprobs: of the emitted tokens, where wanted.
        tokens: emitted tokens, where the prefix is kept.
        aux: the target's aux hidden states of all committed tokens, piece by piece, where they are kept.
        levels: the tree builders that the engine's fallback chooses from in each round; empty without fallback.
        fallbacks: the fallbacks themselves, by the bit length of the number of prompts that are decoded together.
    """

    speculation: Speculation
    cache: TreeCache
    sampler: Sampler
    history_S: Tensor | None
    logprobs: list[Tensor] | None
    stats: GenerationStats
    clock: PhaseClock
    place: int = 0
    tokens: list[int] = field(default_factory=list)
    aux: list[Tensor] | None = None
    levels: tuple[TreeBuilder, ...] = ()
    fallbacks: dict[int, Fallback] = field(default_factory=dict)

    def emit(self, tokens_A: Tensor, logp_A: Tensor | None) -> None:
        """Notes new tokens of the output, and their log-probabilities, on the device."""
        self.place += len(tokens_A)
        if self.history_S is not None:
            self.history_S = torch.cat((self.history_S, tokens_A))
        if self.logprobs is not None and logp_A is not None:
            self.logprobs.append(logp_A)

    def note(self, tokens: list[int], checkpoint: Any) -> None:
        """Notes a round: its tokens, and where its drafting stopped."""
        self.tokens += tokens
        self.stats.rounds += 1
        self.stats.checkpoints[checkpoint.name] += 1
