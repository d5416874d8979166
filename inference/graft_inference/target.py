"""The target: any transformers causal LM of a supported kind, run over a prompt or a tree."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AttentionInterface, PreTrainedModel

from .errors import GraftError
from .kv_cache import TreeCache
from .tree import DraftTree

ATTENTION = "graft_tree"


@dataclass
class TargetOutput:
    """What one pass over N tokens yields: logits, and the tapped states concatenated (width 0 without taps)."""

    logits_NV: Tensor
    taps_NE: Tensor


def tree_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    tree_mask_NK: Tensor | None = None,
    **unsupported: Any,
) -> tuple[Tensor, None]:
    """Attention of N queries over cache and tree, registered with transformers as `graft_tree`.

    Without a mask the queries are causal over themselves (a prompt into an empty cache, or one token).
    With one, grouped query heads are folded into query rows, which is exact and saves repeating K and V.

    Args:
        query: [1, q_heads, N, D]; key, value: [1, kv_heads, K, D].
        tree_mask_NK: bool, True where a query may look.
    """
    for name in ("softcap", "s_aux", "sliding_window"):
        if unsupported.get(name) is not None:
            raise GraftError(f"this target's attention uses {name}, which graft_inference does not support yet")
    rows, queries = query.shape[1], query.shape[2]
    groups = rows // key.shape[1]
    if tree_mask_NK is None:
        out = F.scaled_dot_product_attention(
            query, key, value, is_causal=queries > 1, scale=scaling, enable_gqa=groups > 1
        )
    else:
        folded = query.reshape(1, key.shape[1], groups * queries, -1)
        mask = tree_mask_NK.repeat(groups, 1)
        out = F.scaled_dot_product_attention(folded, key, value, attn_mask=mask, scale=scaling)
        out = out.reshape(1, rows, queries, -1)
    return out.transpose(1, 2), None


AttentionInterface.register(ATTENTION, tree_attention)


class Target:
    """A frozen causal LM with tree attention under it and taps on its layers.

    Args:
        model: in eval mode; its attention implementation is switched to ours until `release`.
        tapped_layers: layers whose outputs are kept, 0-based; empty for none.

    Raises:
        GraftError: a family whose attention or cache cannot hold a tree.
    """

    def __init__(self, model: PreTrainedModel, tapped_layers: tuple[int, ...] = ()) -> None:
        check_supported(model)
        self.model = model
        self.config = model.config.get_text_config()
        self._implementation = self.config._attn_implementation
        layers = model.get_decoder().layers
        if tapped_layers and tapped_layers[-1] >= len(layers):
            raise GraftError(
                f"the head taps layer {tapped_layers[-1]}, but the target has {len(layers)} layers: "
                "this head was trained for another target"
            )
        model.set_attn_implementation(ATTENTION)
        self._taps: dict[int, Tensor] = {}
        self._tapped_layers = tapped_layers
        self._hooks = [layers[index].register_forward_hook(self._keep(index)) for index in tapped_layers]

    def _keep(self, index: int) -> Any:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            self._taps[index] = output[0] if isinstance(output, tuple) else output

        return hook

    def release(self) -> None:
        """Gives the model back as it was: its own attention, no hooks."""
        for hook in self._hooks:
            hook.remove()
        self.model.set_attn_implementation(self._implementation)

    @property
    def device(self) -> torch.device:
        return self.model.device

    @property
    def max_positions(self) -> int:
        return self.config.max_position_embeddings

    def embed(self, tokens: Tensor) -> Tensor:
        return self.model.get_input_embeddings()(tokens)

    def new_cache(self, capacity: int) -> TreeCache:
        return TreeCache(self.config.num_hidden_layers, capacity)

    def prefill(self, tokens_S: Tensor, cache: TreeCache) -> TargetOutput:
        """Reads a prompt into an empty cache and commits it."""
        positions_S = torch.arange(len(tokens_S), device=tokens_S.device)
        output = self._forward(tokens_S, positions_S, cache, None)
        cache.commit(len(tokens_S))
        return output

    def verify(self, tree: DraftTree, ancestors_NN: Tensor, cache: TreeCache) -> TargetOutput:
        """One pass over all rows of a tree, each seeing the cache and its own ancestors. Commits nothing."""
        positions_N = cache.length + tree.depths_N
        mask_NK = None
        if len(tree) > 1:
            prefix_NL = ancestors_NN.new_ones((len(tree), cache.length))
            mask_NK = torch.cat((prefix_NL, ancestors_NN), dim=1)
        return self._forward(tree.tokens_N, positions_N, cache, mask_NK)

    def _forward(self, tokens_N: Tensor, positions_N: Tensor, cache: TreeCache, mask_NK: Tensor | None) -> TargetOutput:
        output = self.model(
            input_ids=tokens_N[None],
            position_ids=positions_N[None],
            past_key_values=cache,
            use_cache=True,
            tree_mask_NK=mask_NK,
        )
        taps = [self._taps[index][0] for index in self._tapped_layers]
        return TargetOutput(output.logits[0], torch.cat(taps, dim=-1) if taps else output.logits[0, :, :0])


def check_supported(model: PreTrainedModel) -> None:
    """Refuses, by name and reason, what would run wrong."""
    config = model.config.get_text_config()
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    if kinds != {"full_attention"}:
        raise GraftError(f"{type(model).__name__} has layers of kind {sorted(kinds)}; only full_attention works yet")
    if getattr(config, "sliding_window", None) and getattr(config, "use_sliding_window", True):
        raise GraftError(f"{type(model).__name__} has a sliding_window of {config.sliding_window}, unsupported yet")
    if not getattr(config, "max_position_embeddings", None):
        raise GraftError(f"{type(model).__name__} has no max_position_embeddings: its length limit is unknown")
