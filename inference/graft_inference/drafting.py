"""From draft head to scored candidate nodes, one pass at a time."""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from .draft_head import DraftHead
from .kv_cache import allocate
from .target import Target
from .tree import DraftTree, Source, child_paths, root_tree


@dataclass
class Draft:
    """A tree that grows by one depth a pass.

    Attributes:
        candidates: the root and every node proposed so far.
        passes: head passes run.
        confidence: exp of the best cumulative log-probability at the deepest layer (Graft Eq. 6), 0-d.
        beam_k: rows of `candidates` that the next pass expands, best first.
        features_kH: the head's outputs at their parents.
        lineage_kR: bool, which rows that earlier passes wrote each beam node sees.
    """

    candidates: DraftTree
    passes: int
    confidence: Tensor
    beam_k: Tensor
    features_kH: Tensor
    lineage_kR: Tensor


class Drafter:
    """A draft head with its own key/value cache.

    The head's row for position t reads the embedding of token t+1 beside the target's state at t, so its
    cache lags the target's tokens by one.

    Args:
        beam_width: children proposed per node, and nodes expanded per pass (EAGLE's top-k).
        capacity: rows of the cache: committed tokens plus beam_width rows per pass.
    """

    def __init__(self, head: DraftHead, target: Target, beam_width: int, capacity: int) -> None:
        self.head = head
        self.target = target
        self.beam_width = beam_width
        config = head.config
        shape = (1, config.num_key_value_heads, capacity, config.head_dim)
        self.keys, self.values = (allocate(shape, head.fc.weight, 2) for _ in range(2))
        self.groups = config.num_attention_heads // config.num_key_value_heads
        self.length = 0
        self._deferred: list[tuple[Tensor, Tensor]] = []

    def defer(self, tokens_A: Tensor, taps_AE: Tensor) -> None:
        """Keeps newly committed positions for the next `begin`: a round that does not draft."""
        self._deferred.append((tokens_A, taps_AE))

    def resume(self, length: int, beam_width: int, capacity: int) -> None:
        """Forgets what was read after the first `length` positions, and makes room for another request."""
        self.length = length
        self._deferred = []
        self.beam_width = beam_width
        keys, values = self.keys, self.values
        if capacity > keys.shape[2]:
            shape = (1, keys.shape[1], capacity, keys.shape[3])
            self.keys, self.values = allocate(shape, keys, 2), allocate(shape, values, 2)
            self.keys[:, :, :length] = keys[:, :, :length]
            self.values[:, :, :length] = values[:, :, :length]

    def read(self, tokens_A: Tensor, taps_AE: Tensor) -> Tensor:
        """Catches up with newly committed positions; returns the head's outputs there, [A, H].

        Args:
            tokens_A: the token after each position.
            taps_AE: the target's tapped states at these positions.
        """
        if self._deferred:
            self.defer(tokens_A, taps_AE)
            tokens_A, taps_AE = map(torch.cat, zip(*self._deferred, strict=True))
            self._deferred = []
        count = len(tokens_A)
        positions_A = torch.arange(self.length, self.length + count, device=tokens_A.device)
        causal_AK = None
        if count > 1 and self.length:
            causal_AK = positions_A[:, None] >= torch.arange(self.length + count, device=tokens_A.device)
        feature_AH = self.head.fuse(taps_AE)
        hidden_AH = self._pass(tokens_A, feature_AH, positions_A, self.length, causal_AK)
        self.length += count
        return hidden_AH

    def begin(self, tokens_A: Tensor, taps_AE: Tensor) -> Draft:
        """Catches up as `read` does and proposes the children of the root, which is the last of the tokens."""
        hidden_AH = self.read(tokens_A, taps_AE)
        logp_k, tokens_k = self._propose(hidden_AH[-1:])
        logp_k, tokens_k = logp_k[0], tokens_k[0]
        root = root_tree(tokens_A[-1:])
        zero_k = torch.zeros_like(tokens_k)
        candidates = _append(root, tokens_k, zero_k, logp_k, depth=1)
        beam_k = torch.arange(1, self.beam_width + 1, device=tokens_k.device)
        lineage_kR = torch.ones((self.beam_width, 0), dtype=torch.bool, device=tokens_k.device)
        features_kH = hidden_AH[-1:].expand(self.beam_width, -1)
        return Draft(candidates, 1, logp_k[0].exp(), beam_k, features_kH, lineage_kR)

    def deepen(self, draft: Draft) -> Draft:
        """One more pass: expands the beam, proposes its children, keeps the best as the next beam."""
        k, pool = self.beam_width, draft.candidates
        written = draft.lineage_kR.shape[1]
        own_kk = torch.eye(k, dtype=torch.bool, device=draft.beam_k.device)
        lineage_kR = torch.cat((draft.lineage_kR, own_kk), dim=1)
        prefix_kL = lineage_kR.new_ones((k, self.length))
        positions_k = torch.full_like(draft.beam_k, self.length + draft.passes - 1)
        hidden_kH = self._pass(
            pool.tokens_N[draft.beam_k],
            draft.features_kH,
            positions_k,
            self.length + written,
            torch.cat((prefix_kL, lineage_kR), dim=1),
        )
        logp_kk, tokens_kk = self._propose(hidden_kH)
        logp_C = (pool.logp_N[draft.beam_k, None] + logp_kk).flatten()
        parents_C = draft.beam_k.repeat_interleave(k, output_size=k * k)
        candidates = _append(pool, tokens_kk.flatten(), parents_C, logp_C, depth=draft.passes + 1)
        best = logp_C.topk(k)
        parent_k = best.indices // k
        return Draft(
            candidates,
            draft.passes + 1,
            best.values[0].exp(),
            len(pool) + best.indices,
            hidden_kH[parent_k],
            lineage_kR[parent_k],
        )

    def _propose(self, hidden_BH: Tensor) -> tuple[Tensor, Tensor]:
        """Log-probabilities and target ids of the beam_width likeliest children, [B, k] each."""
        logp_BD = self.head.logits(hidden_BH).float().log_softmax(dim=-1)
        logp_Bk, draft_ids_Bk = logp_BD.topk(self.beam_width, dim=-1)
        return logp_Bk, self.head.target_ids[draft_ids_Bk]

    def _pass(
        self, tokens_A: Tensor, feature_AH: Tensor, positions_A: Tensor, start: int, mask_AK: Tensor | None
    ) -> Tensor:
        """Runs the layer over A rows, writing their keys and values at `start`."""
        end = start + len(tokens_A)

        def attend(query_BQSD: Tensor, key_BKSD: Tensor, value_BKSD: Tensor) -> Tensor:
            self.keys[:, :, start:end] = key_BKSD
            self.values[:, :, start:end] = value_BKSD
            return F.scaled_dot_product_attention(
                query_BQSD,
                self.keys[:, :, :end],
                self.values[:, :, :end],
                attn_mask=mask_AK,
                is_causal=mask_AK is None and len(tokens_A) > 1,
                enable_gqa=self.groups > 1,
            )

        embed = self.head.embed_tokens or self.target.embed
        embedding_BSH = embed(tokens_A[None]).to(feature_AH.dtype)
        return self.head(embedding_BSH, feature_AH[None], positions_A[None], attend)[0]


def _append(tree: DraftTree, tokens_C: Tensor, parents_C: Tensor, logp_C: Tensor, depth: int) -> DraftTree:
    """The tree with C drafted nodes of one depth behind its rows."""
    return DraftTree(
        torch.cat((tree.tokens_N, tokens_C)),
        torch.cat((tree.parents_N, parents_C)),
        torch.cat((tree.depths_N, torch.full_like(tokens_C, depth))),
        torch.cat((tree.logp_N, logp_C)),
        torch.cat((tree.sources_N, torch.full_like(tokens_C, Source.DRAFTED))),
        torch.cat((tree.paths_N, child_paths(tree.paths_N[parents_C], tokens_C))),
    )
