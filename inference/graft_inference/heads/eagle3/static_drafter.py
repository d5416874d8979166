"""Drafting with the head's lengths on the device: what `Drafter` does, in shapes that never change."""

import torch
from torch import Tensor
from torch.nn import functional as F

from ...noise import Noise
from ...target.kv_cache import allocate
from .drafter import Drafter, Eagle3Proposer, Layer, propose


class StaticDrafter:
    """A draft head over buffers at fixed addresses. Whatever stands in them past a length is masked.

    Args:
        capacity: rows of the cache.
        fresh: rows for committed positions that the head has not read.

    Attributes:
        length_1: rows read, [1] int64.
        pending_1: how many of the next two count, [1] int64.
        tokens_F, aux_FE: committed positions not yet read: the token after each, the target's states there.
    """

    def __init__(self, proposer: Eagle3Proposer, capacity: int, fresh: int) -> None:
        self.proposer = proposer
        self.head = head = proposer.head
        config, weight = head.config, head.fc.weight
        device = weight.device
        self.keys, self.values = allocate((2, 1, config.num_key_value_heads, capacity, config.head_dim), weight)
        self.groups = config.num_attention_heads // config.num_key_value_heads
        self._row_S = torch.arange(capacity, device=device)
        positions_1S = self._row_S[None].clamp(max=proposer.max_positions - 1)
        self._rope = [table[0] for table in head.rotary_emb(weight, positions_1S)]
        self.length_1 = torch.zeros(1, dtype=torch.long, device=device)
        self.pending_1 = torch.zeros(1, dtype=torch.long, device=device)
        self.tokens_F = torch.zeros(fresh, dtype=torch.long, device=device)
        self.aux_FE = weight.new_zeros(fresh, head.fc.in_features)

    def adopt(self, drafter: Drafter, tokens_A: Tensor, aux_AE: Tensor) -> None:
        """Takes over from a request's own drafter, whose caches are these buffers from now on.

        Args:
            tokens_A, aux_AE: positions that the drafter has not read; all but the last it reads now.
        """
        tokens_A, aux_AE = drafter.caught_up(tokens_A, aux_AE)
        if len(tokens_A) > 1:
            self.proposer.read([drafter], [(tokens_A[:-1], aux_AE[:-1])])
        if drafter.keys.data_ptr() != self.keys.data_ptr():
            self.keys[:, :, : drafter.length] = drafter.keys[:, :, : drafter.length]
            self.values[:, :, : drafter.length] = drafter.values[:, :, : drafter.length]
            drafter.keys, drafter.values = self.keys, self.values
        self.length_1.fill_(drafter.length)
        self.pending_1.fill_(1)
        self.tokens_F[:1] = tokens_A[-1:]
        self.aux_FE[:1] = aux_AE[-1:]

    def append(self, tokens_D: Tensor, aux_DE: Tensor, count_1: Tensor) -> None:
        """Leaves newly committed positions to the next `read`; rows past the count are overwritten later."""
        rows_D = self.pending_1 + self._row_S[: len(tokens_D)]
        self.tokens_F.index_copy_(0, rows_D, tokens_D)
        self.aux_FE.index_copy_(0, rows_D, aux_DE)
        self.pending_1 += count_1

    def read(self, size: int) -> Tensor:
        """Catches up with what is pending; returns the head's output at the last of it, [1, H].

        Args:
            size: of the bucket.
        """
        rows_F = self.length_1 + self._row_S[: len(self.tokens_F)]
        causal_FK = self._row_S[:size] <= rows_F[:, None]
        hidden_FH = self._pass(self.tokens_F, self.head.fuse(self.aux_FE), rows_F, rows_F, causal_FK)
        hidden_1H = hidden_FH.index_select(0, self.pending_1 - 1)
        self.length_1 += self.pending_1
        self.pending_1.zero_()
        return hidden_1H

    def begin(self, size: int, topk: int, noise: Noise | None) -> Layer:
        """Catches up and proposes the children of the root."""
        hidden_1H = self.read(size)
        logp_1k, tokens_1k = propose(self.head, [hidden_1H], [noise], 1, topk)
        return Layer.below_root(logp_1k, tokens_1k, hidden_1H, self._row_S[None, :size] < self.length_1)

    def deepen(self, last: Layer, steps: int, topk: int, noise: Noise | None) -> Layer:
        """Expands the best children of the layer that pass number `steps` proposed."""
        k, size = topk, last.visible_AK.shape[1]
        best = last.logp_C.topk(k)
        parent_k = best.indices // k
        rows_k = self.length_1 + (steps - 1) * k + self._row_S[:k]
        visible_kK = last.visible_AK[parent_k] | (self._row_S[:size] == rows_k[:, None])
        positions_k = (self.length_1 + steps - 1).expand(k)
        tokens_k = last.tokens_C[best.indices]
        hidden_kH = self._pass(tokens_k, last.hidden_AH[parent_k], rows_k, positions_k, visible_kK)
        logp_kk, tokens_kk = propose(self.head, [hidden_kH], [noise], steps + 1, k)
        first_row = 1 if steps == 1 else 1 + k + (steps - 2) * k**2
        return last.below(best, first_row, logp_kk, tokens_kk, hidden_kH, visible_kK)

    def _pass(
        self, tokens_A: Tensor, feature_AH: Tensor, rows_A: Tensor, positions_A: Tensor, mask_AK: Tensor
    ) -> Tensor:
        """Runs the layer over A rows, writing their keys and values at `rows_A` of the bucket."""
        size = mask_AK.shape[1]

        def attend(query_BQSD: Tensor, key_BKSD: Tensor, value_BKSD: Tensor) -> Tensor:
            keys, values = self.keys[:, :, :size], self.values[:, :, :size]
            keys.index_copy_(2, rows_A, key_BKSD)
            values.index_copy_(2, rows_A, value_BKSD)
            # Query heads that share a key head become rows, which saves repeating keys and values.
            folded = query_BQSD.reshape(1, keys.shape[1], -1, keys.shape[3])
            attended = F.scaled_dot_product_attention(folded, keys, values, mask_AK.repeat(self.groups, 1))
            return attended.reshape(query_BQSD.shape)

        embed = self.head.embed_tokens or self.proposer.embed
        embedding_BSH = embed(tokens_A[None]).to(feature_AH.dtype)
        cos_1SD, sin_1SD = (table.index_select(0, positions_A)[None] for table in self._rope)
        return self.head.midlayer(embedding_BSH, feature_AH[None], (cos_1SD, sin_1SD), attend)[0]
