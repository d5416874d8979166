"""What a finished request leaves behind, for the next turn of its chat."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor

from ..policy.plan import Plan
from ..proposer import TokenSource
from ..speculator import Speculator
from ..target.kv_cache import TreeCache
from .state import DecodeState


@dataclass
class KeptPrefix:
    """The caches of one request, and the text they hold.

    Attributes:
        tokens_S: the tokens whose keys and values are in `cache`.
        prompt_length: how many of them were prompt.
        head: the head's part.
    """

    tokens_S: Tensor
    prompt_length: int
    cache: TreeCache
    head: Any | None
    sources: Mapping[str, TokenSource]

    @classmethod
    def of(cls, prompt_S: Tensor, state: DecodeState) -> Self:
        """What the request leaves. The last token emitted is not in its caches."""
        request, device = state.speculation, state.speculation.root_1.device
        tokens_S = torch.cat((prompt_S.to(device), torch.tensor(state.tokens[:-1], dtype=torch.long, device=device)))
        return cls(tokens_S, len(prompt_S), state.cache, request.head, request.sources)

    def shared(self, prompt_S: Tensor, drafts: bool) -> int:
        """Tokens of a new prompt that need not be read again; its last one always is, for its logits."""
        length = min(len(self.tokens_S), len(prompt_S) - 1)
        same = int((self.tokens_S[:length] == prompt_S[:length]).cumprod(0).sum())
        if not drafts:
            return same
        # The head's row for a position embeds the token after it, which has to be shared as well.
        return max(0, min(same - 1, self.head.length)) if self.head else 0

    def continues(self, prompt_S: Tensor) -> bool:
        """Whether a new prompt is a later turn of the same text."""
        return self.shared(prompt_S, drafts=False) >= min(self.prompt_length, len(prompt_S) - 1)

    def resume(self, speculator: Speculator, reused: int, plan: Plan, tokens: int) -> tuple[TreeCache, Any | None]:
        """The caches, holding the first `reused` tokens and with room for a request of so many."""
        self.cache.rewind(reused)
        self.cache.grow(tokens + plan.num_draft_tokens)
        if self.head is None or not plan.drafts:
            return self.cache, None
        speculator.head.resume(self.head, reused, plan.topk, plan.num_steps, tokens)
        return self.cache, self.head
