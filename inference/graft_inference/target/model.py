"""The target: a transformers causal LM, run over prompts (prefill) and trees (verification)."""

import inspect
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..device import without_plans
from ..errors import GraftError
from ..tree import DraftTree
from .attention import ATTENTION, Visibility
from .kv_cache import PackedCaches, TreeCache

LAYER_KINDS = {"full_attention", "sliding_attention"}
SWITCHING_ROPE = {"dynamic", "longrope"}
"""RoPE whose frequencies for all rows change once any position passes the original length."""


@dataclass
class TargetOutput:
    """Output of one pass over N tokens: logits, and the aux hidden states, concatenated (E=0 without aux layers)."""

    logits_NV: Tensor
    aux_NE: Tensor


class Target:
    """A frozen causal LM that computes tree attention, and whose aux layers' outputs are kept.

    Only this class knows which families work, how aux hidden states are captured, and how the model is restored.
    Training runs it over packed batches, with another attention (`graft_train.data.states.PackedTarget`).

    It may be spread over devices (`device_map`, tensor parallelism): inputs go to the device of its embeddings,
    and logits and aux hidden states come back there.

    Args:
        model: in eval mode; its attention implementation is switched to ours until `release`.
        aux_layer_ids: layers whose outputs are kept, 0-based; empty for none.

    Raises:
        GraftError: a family whose attention or cache cannot hold a tree, or a layer that is not there.
    """

    attention_name: ClassVar[str] = ATTENTION
    """Of what the model computes with meanwhile, as transformers knows it."""

    def __init__(self, model: PreTrainedModel, aux_layer_ids: tuple[int, ...] = ()) -> None:
        check_supported(model)
        without_plans(model.device)
        self.model = model
        self.config = model.config.get_text_config()
        self._implementation = self.config._attn_implementation
        layers = model.get_decoder().layers
        if not set(aux_layer_ids) <= set(range(len(layers))):
            raise GraftError(
                f"aux_layer_ids={list(aux_layer_ids)}: the target has layers 0..{len(layers) - 1}; "
                "a head that reads others was trained for another target"
            )
        if getattr(self.config, "attn_logit_softcapping", None) and self._implementation == "sdpa":
            warnings.warn(
                f"{type(model).__name__} was loaded with sdpa attention, which leaves out the soft-capping that it "
                "was trained with; Graft applies it, as attn_implementation='eager' does",
                stacklevel=2,
            )
            self._reference = "eager"
        else:
            self._reference = self._implementation
        self._kept: dict[int, Tensor] = {}
        self.aux_layer_ids = aux_layer_ids
        self._keeps_logits = "logits_to_keep" in inspect.signature(model.forward).parameters
        self._hooks = [layers[index].register_forward_hook(self._keep(index)) for index in aux_layer_ids]
        with self.released_on_failure():
            model.set_attn_implementation(self.attention_name)

    def _keep(self, index: int) -> Any:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            self._kept[index] = output[0] if isinstance(output, tuple) else output

        return hook

    def release(self) -> None:
        """Restores the model: its own attention, no hooks."""
        for hook in self._hooks:
            hook.remove()
        self.model.set_attn_implementation(self._implementation)

    @contextmanager
    def released_on_failure(self) -> Iterator[None]:
        """Restores the model if the code inside fails.

        Raises:
            GraftError: for any error; one that is not a GraftError gets the family's name.
        """
        try:
            yield
        except GraftError:
            self.release()
            raise
        except Exception as error:
            self.release()
            name = type(self.model).__name__
            raise GraftError(f"{name} cannot be served: {type(error).__name__}: {error}") from error
        except BaseException:  # an interrupt
            self.release()
            raise

    @contextmanager
    def own_attention(self) -> Iterator[PreTrainedModel]:
        """The model with its own attention, inside a `with` block.

        Raises:
            GraftError: the model served another engine already when this target was made.
        """
        if self._reference == self.attention_name:
            raise GraftError(
                f"this {type(self.model).__name__} serves another engine already: use that one, call its "
                "target.release() first, or load the model again"
            )
        self.model.set_attn_implementation(self._reference)
        try:
            yield self.model
        finally:
            self.model.set_attn_implementation(self.attention_name)

    @property
    def device(self) -> torch.device:
        """Where inputs are expected and logits come back."""
        device = self.embedding_weight.device
        return torch.device(self.model.device) if device.type == "meta" else device

    @property
    def is_parallel(self) -> bool:
        """Whether several processes compute it together (`tp_plan`)."""
        return is_parallel(self.model)

    @property
    def is_split(self) -> bool:
        """Whether it is spread over several devices or processes."""
        return self.is_parallel or len(set((getattr(self.model, "hf_device_map", None) or {}).values())) > 1

    def agree(self, seconds: float) -> float:
        """Seconds that all processes go by: those that the first one measured, where several compute the target."""
        if not self.is_parallel:
            return seconds
        measured_1 = torch.tensor([seconds], dtype=torch.float64, device=self.device)
        torch.distributed.broadcast(measured_1, 0)
        return float(measured_1)

    @property
    def attention(self) -> str:
        """Name of what computes the attention, for reports."""
        capped = getattr(self.config, "attn_logit_softcapping", None)
        has_sinks = any(name.endswith("sinks") for name, _ in self.model.named_parameters())
        return "explicit attention" if capped or has_sinks else "scaled_dot_product_attention"

    @property
    def max_positions(self) -> int:
        """Most tokens of prompt and output together."""
        return max_positions(self.config)

    @property
    def embedding_weight(self) -> Tensor:
        embeddings: Any = self.model.get_input_embeddings()
        return embeddings.weight

    def embed(self, tokens: Tensor) -> Tensor:
        """The rows of the embedding table, which are what heads are trained on by everybody, [..., H].

        Gemma's own module multiplies them by a scale, which heads do not.
        """
        embeddings: Any = self.model.get_input_embeddings()
        rows, scale = embeddings(tokens), getattr(embeddings, "embed_scale", None)
        return rows if scale is None else rows / scale.to(rows.dtype)

    def unembed(self, hidden: Tensor) -> Tensor:
        """Logits over the vocabulary by the target's own lm_head, of normed states, [..., H] -> [..., V]."""
        head: Any = self.model.get_output_embeddings()
        return head(hidden)

    def new_cache(self, capacity: int) -> TreeCache:
        return TreeCache(self.config.num_hidden_layers, capacity)

    def prefill(self, tokens_S: Tensor, cache: TreeCache, all_logits: bool = True) -> TargetOutput:
        """Runs the model over a prompt, or the next piece of one, and commits it to the cache.

        Args:
            tokens_S: token ids.
            all_logits: False: only those of the last token, [1, V], which are cheaper where the family supports that.
        """
        return self.prefill_all([tokens_S], [cache], all_logits)[0]

    def prefill_all(
        self, pieces: Sequence[Tensor], caches: Sequence[TreeCache], all_logits: bool = True
    ) -> list[TargetOutput]:
        """`prefill` for several prompts in one pass. None attends to another's cache or piece."""
        rows = [len(piece_S) for piece_S in pieces]
        visible = [
            Visibility(cache.span.rows(count, piece_S.device), cache.span)
            for piece_S, cache, count in zip(pieces, caches, rows, strict=True)
        ]
        last_B = None if all_logits else torch.tensor(rows).cumsum(0) - 1
        if len(pieces) == 1:
            output = self.forward(pieces[0], caches[0], visible[0], last_B)
        else:
            output = self.forward(torch.cat(list(pieces)), PackedCaches(caches, rows), visible, last_B)
        for cache, count in zip(caches, rows, strict=True):
            cache.commit(count)
        logits = output.logits_NV.split(rows if all_logits else 1)
        return list(map(TargetOutput, logits, output.aux_NE.split(rows)))

    def verify(self, tree: DraftTree, ancestors_NN: Tensor, cache: TreeCache) -> TargetOutput:
        """One pass over all nodes of a tree, which attend to the cache and to their ancestors. Commits nothing."""
        return self.forward(tree.tokens_N, cache, self._visible(tree, ancestors_NN, cache))

    def verify_all(
        self, trees: Sequence[DraftTree], ancestors: Sequence[Tensor], caches: Sequence[TreeCache]
    ) -> list[TargetOutput]:
        """`verify` for the trees of several prompts in one pass. None attends to another's cache or tree."""
        if len(trees) == 1:
            return [self.verify(trees[0], ancestors[0], caches[0])]
        rows = [len(tree) for tree in trees]
        visible = [self._visible(*one) for one in zip(trees, ancestors, caches, strict=True)]
        output = self.forward(torch.cat([tree.tokens_N for tree in trees]), PackedCaches(caches, rows), visible)
        return list(map(TargetOutput, output.logits_NV.split(rows), output.aux_NE.split(rows)))

    def _visible(self, tree: DraftTree, ancestors_NN: Tensor, cache: TreeCache) -> Visibility:
        return Visibility(self.positions(cache.span.start, tree), cache.span, ancestors_NN)

    def positions(self, length: int | Tensor, tree: DraftTree) -> Tensor:
        """Positions of a tree's nodes, [N], after `length` committed tokens, clamped to the target's limit.

        No token beyond the limit is ever emitted. But learned position embeddings end there, and some kinds of RoPE
        would change for all tokens.
        """
        return (length + tree.depths_N).clamp(max=self.max_positions - 1)

    def forward(
        self,
        tokens_N: Tensor,
        cache: TreeCache | PackedCaches,
        visible: Visibility | list[Visibility],
        logits_of: Tensor | None = None,
    ) -> TargetOutput:
        """One pass over N tokens, masked by `visible`. Commits nothing.

        Args:
            tokens_N: token ids; those of several prompts are concatenated.
            cache, visible: KV cache and mask of one prompt; or the caches of several, and a mask for each.
            logits_of: indices of the tokens whose logits are wanted, on the host; None: all.
        """
        if isinstance(visible, Visibility):
            positions_N = visible.positions_N
        else:
            positions_N = torch.cat([one.positions_N for one in visible])
        only = {} if logits_of is None or not self._keeps_logits else {"logits_to_keep": logits_of}
        output = self.model(
            input_ids=tokens_N[None],
            position_ids=positions_N[None],
            past_key_values=cache,
            use_cache=True,
            visible=visible,
            **only,
        )
        logits_NV = output.logits[0].to(tokens_N.device)
        if logits_of is not None and not only:
            logits_NV = logits_NV[logits_of]
        return TargetOutput(logits_NV, self._aux_states(tokens_N, logits_NV.dtype))

    def _aux_states(self, tokens_N: Tensor, dtype: torch.dtype) -> Tensor:
        """The aux layers' outputs of the last pass, concatenated, [N, E], on the device of its tokens."""
        kept = [self._kept[index][0].to(tokens_N.device) for index in self.aux_layer_ids]
        return torch.cat(kept, dim=-1) if kept else tokens_N.new_empty((len(tokens_N), 0), dtype=dtype)


def is_parallel(model: PreTrainedModel) -> bool:
    """Whether several processes compute it together (`tp_plan`)."""
    return (getattr(model, "tp_size", None) or 1) > 1


def check_supported(model: PreTrainedModel) -> None:
    """Refuses a model that would be computed wrongly, by name and reason.

    Raises:
        GraftError: the family keeps state other than keys and values, hides tokens by other rules than a
            sliding window, or does not let its attention be replaced.
    """
    config, name = model.config.get_text_config(), type(model).__name__
    others = set(getattr(config, "layer_types", None) or ()) - LAYER_KINDS
    if others:
        raise GraftError(
            f"{name} has layers of kind {', '.join(sorted(others))}, whose state cannot branch into a tree or be "
            f"rolled back; only {' and '.join(sorted(LAYER_KINDS))} work"
        )
    if getattr(config, "use_bidirectional_attention", False):
        raise GraftError(f"{name} attends in both directions: its next tokens cannot be verified in one pass")
    if getattr(config, "is_encoder_decoder", False):
        raise GraftError(f"{name} is an encoder-decoder; only decoder-only targets work")
    if getattr(config, "num_kv_shared_layers", 0):
        raise GraftError(f"{name} has layers that share keys and values with others, which our caches cannot hold")
    if not getattr(model, "_supports_attention_backend", False) or not hasattr(model.get_decoder(), "layers"):
        raise GraftError(f"{name} computes attention in a way of its own, which cannot be replaced by tree attention")
    if not getattr(config, "max_position_embeddings", None):
        raise GraftError(f"{name} has no max_position_embeddings: its length limit is unknown")


def rope_type(config: Any) -> str:
    """transformers' name of how RoPE is scaled; "default" for none, and where it differs by layer."""
    return (getattr(config, "rope_parameters", None) or {}).get("rope_type") or "default"


def max_positions(config: Any) -> int:
    """Positions a target can be served with; up to the switch of frequencies for RoPE that has one."""
    limit = config.max_position_embeddings
    if rope_type(config) in SWITCHING_ROPE:
        rope = config.rope_parameters
        original = rope.get("original_max_position_embeddings") or getattr(
            config, "original_max_position_embeddings", None
        )
        limit = min(limit, original or limit)
    return limit
