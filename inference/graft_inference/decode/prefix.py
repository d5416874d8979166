"""What a finished request leaves behind, for the next turn of its chat."""

from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from ..heads.eagle3.drafter import Drafter
from ..policy.plan import Plan
from ..retrieval.successor_matrix import SuccessorMatrix
from ..target.kv_cache import TreeCache
from .state import DecodeState


@dataclass
class KeptPrefix:
    """The caches of one request, and the text they hold.

    Attributes:
        tokens_S: the tokens whose keys and values are in `cache`.
        prompt_length: how many of them were prompt.
    """

    tokens_S: Tensor
    prompt_length: int
    cache: TreeCache
    drafter: Drafter | None
    successors: SuccessorMatrix | None

    @classmethod
    def of(cls, prompt_S: Tensor, state: DecodeState) -> Self:
        """What the request leaves. The last token emitted is not in its caches."""
        device = state.root_1.device
        tokens_S = torch.cat((prompt_S.to(device), torch.tensor(state.tokens[:-1], dtype=torch.long, device=device)))
        return cls(tokens_S, len(prompt_S), state.cache, state.drafter, state.successors)

    def shared(self, prompt_S: Tensor, drafts: bool) -> int:
        """Tokens of a new prompt that need not be read again; its last one always is, for its logits."""
        length = min(len(self.tokens_S), len(prompt_S) - 1)
        same = int((self.tokens_S[:length] == prompt_S[:length]).cumprod(0).sum())
        if not drafts:
            return same
        # The head's row for a position embeds the token after it, which has to be shared as well.
        return max(0, min(same - 1, self.drafter.length)) if self.drafter else 0

    def continues(self, prompt_S: Tensor) -> bool:
        """Whether a new prompt is a later turn of the same text."""
        return self.shared(prompt_S, drafts=False) >= min(self.prompt_length, len(prompt_S) - 1)

    def resume(self, reused: int, plan: Plan, cache_rows: int, head_rows: int) -> tuple[TreeCache, Drafter | None]:
        """The caches, holding the first `reused` tokens and with room for another request."""
        self.cache.rewind(reused)
        self.cache.grow(cache_rows)
        if self.drafter is None or not plan.drafts:
            return self.cache, None
        self.drafter.resume(reused, plan.topk, head_rows)
        return self.cache, self.drafter
