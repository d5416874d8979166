"""From draft head to scored candidate nodes, one pass at a time."""

from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor
from torch.nn import functional as F

from .draft_head import DraftHead
from .kv_cache import allocate
from .target import Target
from .tree import DraftTree, Source, child_paths, root_tree

DEFERRED = 64
"""Positions that the head leaves unread at most: they hold memory, and the next draft waits for them."""


@dataclass
class Layer:
    """What one head pass proposed: beam_width children of every row it expanded, best first.

    Attributes:
        tokens_C, logp_C, paths_C: the children's columns of the tree, by parent.
        parents_A: rows of their parents in the tree.
        hidden_AH: the head's outputs at their parents.
        visible_AK: bool, which rows of the head's cache their parents see.
    """

    tokens_C: Tensor
    logp_C: Tensor
    paths_C: Tensor
    parents_A: Tensor
    hidden_AH: Tensor
    visible_AK: Tensor


@dataclass
class Draft:
    """A tree that grows by one depth a pass; root_1 is its root's token."""

    root_1: Tensor
    layers: list[Layer]

    @property
    def passes(self) -> int:
        """Head passes run."""
        return len(self.layers)

    @property
    def confidence(self) -> Tensor:
        """exp of the best cumulative log-probability at the deepest layer (Graft Eq. 6), 0-d."""
        return self.layers[-1].logp_C.max().exp()

    @property
    def candidates(self) -> DraftTree:
        """The root and every node proposed so far."""
        root = root_tree(self.root_1)
        width = len(self.layers[0].tokens_C)
        depths_N, sources_N = _depths_and_sources(width, self.passes, self.root_1.device)
        # The root is its own parent once, not `width` times.
        parents_A = torch.cat([root.parents_N, *(layer.parents_A for layer in self.layers)])
        return DraftTree(
            torch.cat([root.tokens_N, *(layer.tokens_C for layer in self.layers)]),
            parents_A.repeat_interleave(width)[width - 1 :],
            depths_N,
            torch.cat([root.logp_N, *(layer.logp_C for layer in self.layers)]),
            sources_N,
            torch.cat([root.paths_N, *(layer.paths_C for layer in self.layers)]),
        )


@cache
def _depths_and_sources(width: int, passes: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Of the candidates that so many passes propose; the same for every draft."""
    depths = [0] + [1] * width + [depth for depth in range(2, passes + 1) for _ in range(width**2)]
    sources = [Source.ROOT] + [Source.DRAFTED] * (len(depths) - 1)
    return torch.tensor(depths, device=device), torch.tensor(sources, device=device)


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
        config = head.config
        self.keys, self.values = allocate((2, 1, config.num_key_value_heads, capacity, config.head_dim), head.fc.weight)
        self._prepare(beam_width, capacity)
        self.groups = config.num_attention_heads // config.num_key_value_heads
        self.length = 0
        self._deferred: list[tuple[Tensor, Tensor]] = []

    def _prepare(self, beam_width: int, capacity: int) -> None:
        """What is the same in every pass: cos and sin of all positions, and that a row sees itself."""
        weight = self.head.fc.weight
        # No token beyond the limit is ever emitted, and its position must not change the others' frequencies.
        positions_1S = torch.arange(capacity, device=weight.device)[None].clamp(max=self.target.max_positions - 1)
        self._rope = self.head.rotary_emb(weight, positions_1S)
        self._own_kk = torch.eye(beam_width, dtype=torch.bool, device=weight.device)
        self.beam_width = beam_width

    def defer(self, tokens_A: Tensor, taps_AE: Tensor) -> None:
        """Keeps newly committed positions for the next `begin`: a round that does not draft."""
        self._deferred.append((tokens_A, taps_AE))
        if sum(len(tokens_A) for tokens_A, _ in self._deferred) >= DEFERRED:
            self.read(*self._deferred.pop())

    def resume(self, length: int, beam_width: int, capacity: int) -> None:
        """Forgets what was read after the first `length` positions, and makes room for another request."""
        self.length = length
        self._deferred = []
        self._prepare(beam_width, max(capacity, self.keys.shape[2]))
        keys, values = self.keys, self.values
        if capacity > keys.shape[2]:
            self.keys, self.values = allocate((2, 1, keys.shape[1], capacity, keys.shape[3]), keys)
            self.keys[:, :, :length] = keys[:, :, :length]
            self.values[:, :, :length] = values[:, :, :length]

    def read(self, tokens_A: Tensor, taps_AE: Tensor) -> Tensor:
        """Catches up with newly committed positions; returns the head's outputs there, [A, H].

        Args:
            tokens_A: the token after each position.
            taps_AE: the target's tapped states at these positions.
        """
        if self._deferred:
            self._deferred.append((tokens_A, taps_AE))
            tokens_A, taps_AE = map(torch.cat, zip(*self._deferred, strict=True))
            self._deferred = []
        count = len(tokens_A)
        causal_AK = None
        if count > 1 and self.length:
            shape = (count, self.length + count)
            causal_AK = torch.ones(shape, dtype=torch.bool, device=tokens_A.device).tril_(self.length)
        feature_AH = self.head.fuse(taps_AE)
        hidden_AH = self._pass(tokens_A, feature_AH, self.length, count, self.length, causal_AK)
        self.length += count
        return hidden_AH

    def begin(self, tokens_A: Tensor, taps_AE: Tensor) -> Draft:
        """Catches up as `read` does and proposes the children of the root, which is the last of the tokens."""
        hidden_1H = self.read(tokens_A, taps_AE)[-1:]
        root_1 = tokens_A[-1:]
        logp_1k, tokens_1k = self._propose(hidden_1H)
        zero_1 = torch.zeros_like(root_1)
        visible_1K = torch.ones((1, self.length), dtype=torch.bool, device=root_1.device)
        paths_k = child_paths(zero_1, tokens_1k[0])
        return Draft(root_1, [Layer(tokens_1k[0], logp_1k[0], paths_k, zero_1, hidden_1H, visible_1K)])

    def deepen(self, draft: Draft) -> Draft:
        """One more pass: expands the best of the last one's children."""
        k, last = self.beam_width, draft.layers[-1]
        best = last.logp_C.topk(k)
        parent_k = best.indices // k
        visible_kK = torch.cat((last.visible_AK[parent_k], self._own_kk), dim=1)
        start = visible_kK.shape[1] - k
        position = self.length + draft.passes - 1
        hidden_kH = self._pass(last.tokens_C[best.indices], last.hidden_AH[parent_k], position, 1, start, visible_kK)
        logp_kk, tokens_kk = self._propose(hidden_kH)
        layer = Layer(
            tokens_kk.flatten(),
            (best.values[:, None] + logp_kk).flatten(),
            child_paths(last.paths_C[best.indices, None], tokens_kk).flatten(),
            best.indices + (1 + sum(len(layer.tokens_C) for layer in draft.layers[:-1])),
            hidden_kH,
            visible_kK,
        )
        return Draft(draft.root_1, [*draft.layers, layer])

    def _propose(self, hidden_BH: Tensor) -> tuple[Tensor, Tensor]:
        """Log-probabilities and target ids of the beam_width likeliest children, [B, k] each."""
        logp_BD = self.head.logits(hidden_BH).float().log_softmax(dim=-1)
        logp_Bk, draft_ids_Bk = logp_BD.topk(self.beam_width, dim=-1)
        return logp_Bk, self.head.target_ids[draft_ids_Bk]

    def _pass(
        self, tokens_A: Tensor, feature_AH: Tensor, position: int, positions: int, start: int, mask_AK: Tensor | None
    ) -> Tensor:
        """Runs the layer over A rows, writing their keys and values at `start`.

        Args:
            position, positions: the rows stand at so many consecutive positions; at one, all of them.
        """
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
        cos_1SD, sin_1SD = (table[:, position : position + positions] for table in self._rope)
        return self.head.midlayer(embedding_BSH, feature_AH[None], (cos_1SD, sin_1SD), attend)[0]
