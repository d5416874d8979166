"""The EAGLE-3 draft head: one decoder layer over fused target states (arXiv 2503.01840).

The same module is trained and served. How a query sees earlier keys differs between the two (an unroll
over whole sequences, a tree over a cache), so the caller passes attention as a function.
"""

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, fields
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

from ...errors import GraftError

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(query_BQSD, key_BKSD, value_BKSD) of this pass -> attended values BQSD; owns cache and mask."""


SIZES = (
    "hidden_size",
    "intermediate_size",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "vocab_size",
    "draft_vocab_size",
    "max_position_embeddings",
)
LARGEST = 2**31 - 1
WEIGHT_DTYPES = {torch.float32, torch.bfloat16, torch.float16}


@dataclass(frozen=True)
class DraftHeadConfig:
    """Shape of a draft head. The head is as wide as its target, whose embeddings it shares.

    Attributes:
        aux_layer_ids: target layers whose *outputs* feed the head, 0-based and ascending.
        vocab_size: the target's vocabulary, V.
        draft_vocab_size: tokens the head can propose, Vd <= V.
        norm_before_residual: whether the residual is the normed feature (False in EAGLE and SGLang).

    Raises:
        GraftError: a value of another type or out of its range, or a RoPE that transformers cannot build.
    """

    hidden_size: int
    intermediate_size: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    vocab_size: int
    draft_vocab_size: int
    aux_layer_ids: tuple[int, ...]
    max_position_embeddings: int
    rms_norm_eps: float = 1e-5
    rope_parameters: dict[str, Any] = field(default_factory=lambda: {"rope_type": "default", "rope_theta": 10000.0})
    norm_before_residual: bool = False

    def __post_init__(self) -> None:
        for name in SIZES:
            value = getattr(self, name)
            if type(value) is not int or not 0 < value <= LARGEST:
                raise GraftError(f"{name}={value!r} must be a whole number from 1 to {LARGEST}")
        if self.draft_vocab_size > self.vocab_size:
            raise GraftError(f"draft_vocab_size={self.draft_vocab_size} must lie in 1..vocab_size={self.vocab_size}")
        if self.num_attention_heads % self.num_key_value_heads:
            raise GraftError(
                f"num_attention_heads={self.num_attention_heads} must be a multiple of "
                f"num_key_value_heads={self.num_key_value_heads}"
            )
        # RoPE's frequencies are made before any weight is looked at: their number must be a plausible one.
        if self.head_dim % 2 or self.head_dim > 65536:
            raise GraftError(f"head_dim={self.head_dim} must be even, for RoPE turns pairs, and at most 65536")
        if type(self.rms_norm_eps) not in (int, float) or not 0 < self.rms_norm_eps < 1:
            raise GraftError(f"rms_norm_eps={self.rms_norm_eps!r} must lie between 0 and 1")
        if type(self.norm_before_residual) is not bool:
            raise GraftError(f"norm_before_residual={self.norm_before_residual!r} must be true or false")
        layers = self.aux_layer_ids
        if not layers or not all(type(layer) is int and 0 <= layer <= LARGEST for layer in layers):
            raise GraftError(f"aux_layer_ids={layers} must be layers of the target, counted from 0")
        if list(layers) != sorted(set(layers)):
            raise GraftError(f"aux_layer_ids={layers} must be distinct and ascending")
        self.rotary()

    def rotary(self) -> LlamaRotaryEmbedding:
        """The head's RoPE, on the CPU.

        Raises:
            GraftError: parameters that transformers does not know or that give frequencies which are none.
        """
        try:
            with torch.device("cpu"):
                rotary = LlamaRotaryEmbedding(self.llama_config())
            frequencies = torch.cat([buffer.flatten() for _, buffer in rotary.named_buffers()])
            sound = bool(frequencies.isfinite().all()) and math.isfinite(rotary.attention_scaling)
        except Exception as error:  # whatever a kind of RoPE does with parameters that it cannot use
            raise GraftError(f"rope_parameters={self.rope_parameters} cannot be used: {error!r}") from error
        if not sound:
            raise GraftError(f"rope_parameters={self.rope_parameters} give frequencies that are not finite")
        return rotary

    def llama_config(self) -> LlamaConfig:
        """The flat Llama configuration that the SGLang dialect stores, and that RoPE is built from."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        own = ("aux_layer_ids", "draft_vocab_size", "norm_before_residual")
        return LlamaConfig(
            **{name: value for name, value in values.items() if name not in own},
            num_hidden_layers=1,
            tie_word_embeddings=False,
        )

    def to_dict(self) -> dict[str, Any]:
        return asdict(self) | {"aux_layer_ids": list(self.aux_layer_ids)}


class DraftAttention(nn.Module):
    """Self-attention whose input is twice as wide as its output."""

    def __init__(self, config: DraftHeadConfig) -> None:
        super().__init__()
        self.head_dim = config.head_dim
        width, q_width = 2 * config.hidden_size, config.num_attention_heads * config.head_dim
        kv_width = config.num_key_value_heads * config.head_dim
        self.q_proj = nn.Linear(width, q_width, bias=False)
        self.k_proj = nn.Linear(width, kv_width, bias=False)
        self.v_proj = nn.Linear(width, kv_width, bias=False)
        self.o_proj = nn.Linear(q_width, config.hidden_size, bias=False)

    def forward(self, input_BSW: Tensor, rope: tuple[Tensor, Tensor], attend: Attend) -> Tensor:
        heads = (-1, self.head_dim)
        query_BQSD = self.q_proj(input_BSW).unflatten(-1, heads).transpose(1, 2)
        key_BKSD = self.k_proj(input_BSW).unflatten(-1, heads).transpose(1, 2)
        value_BKSD = self.v_proj(input_BSW).unflatten(-1, heads).transpose(1, 2)
        query_BQSD, key_BKSD = apply_rotary_pos_emb(query_BQSD, key_BKSD, *rope)
        attended_BQSD = attend(query_BQSD, key_BKSD, value_BKSD)
        return self.o_proj(attended_BQSD.transpose(1, 2).flatten(2))


class DraftMLP(nn.Module):
    """The gated MLP of a Llama layer."""

    def __init__(self, config: DraftHeadConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, hidden_BSH: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(hidden_BSH)) * self.up_proj(hidden_BSH))


class DraftLayer(nn.Module):
    """The head's decoder layer; module names are the checkpoint's."""

    def __init__(self, config: DraftHeadConfig) -> None:
        super().__init__()
        self.norm_before_residual = config.norm_before_residual
        self.self_attn = DraftAttention(config)
        self.mlp = DraftMLP(config)
        self.input_layernorm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.hidden_norm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(
        self, embedding_BSH: Tensor, feature_BSH: Tensor, rope: tuple[Tensor, Tensor], attend: Attend
    ) -> Tensor:
        normed_BSH = self.hidden_norm(feature_BSH)
        residual_BSH = normed_BSH if self.norm_before_residual else feature_BSH
        input_BSW = torch.cat((self.input_layernorm(embedding_BSH), normed_BSH), dim=-1)
        hidden_BSH = residual_BSH + self.self_attn(input_BSW, rope, attend)
        return hidden_BSH + self.mlp(self.post_attention_layernorm(hidden_BSH))


EMBEDDINGS = "embed_tokens.weight"


class DraftHead(nn.Module):
    """An EAGLE-3 head. Its parameters and buffers are exactly the tensors of the checkpoint.

    At position t the head reads the embedding of token t+1 and the feature of position t, and predicts
    token t+2. The first feature is `fuse` of the aux hidden states; every later one is the head's own previous output.

    Args:
        own_embeddings: whether the checkpoint brings embeddings. Ours do not: they are the target's.
    """

    d2t: Tensor
    t2d: Tensor
    target_ids: Tensor

    def __init__(self, config: DraftHeadConfig, own_embeddings: bool = False) -> None:
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size) if own_embeddings else None
        self.fc = nn.Linear(len(config.aux_layer_ids) * config.hidden_size, config.hidden_size, bias=False)
        self.midlayer = DraftLayer(config)
        self.norm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.lm_head = nn.Linear(config.hidden_size, config.draft_vocab_size, bias=False)
        self.rotary_emb = config.rotary()
        kept_V = torch.arange(config.vocab_size) < config.draft_vocab_size
        if config.draft_vocab_size < config.vocab_size:
            self.register_buffer("d2t", torch.zeros(config.draft_vocab_size, dtype=torch.long))
            self.register_buffer("t2d", kept_V)
        self.register_buffer("target_ids", torch.arange(config.draft_vocab_size), persistent=False)

    def _apply(self, fn: Any, recurse: bool = True) -> Self:
        """Casts and moves everything but RoPE's frequencies, which only move: bf16 would lose the positions."""
        exact = {name: buffer for name, buffer in self.rotary_emb.named_buffers() if not buffer.is_meta}
        super()._apply(fn, recurse)
        for name, buffer in exact.items():
            setattr(self.rotary_emb, name, buffer.to(self.rotary_emb.get_buffer(name).device))
        return self

    def set_draft_vocabulary(self, token_ids_D: Tensor) -> None:
        """Fixes which target tokens the head proposes.

        Args:
            token_ids_D: ascending target ids, [Vd] int64.

        Raises:
            GraftError: wrong number of ids, not ascending, or out of range.
        """
        config = self.config
        ascending = bool((token_ids_D.diff() > 0).all())
        in_range = bool((token_ids_D >= 0).all() and (token_ids_D < config.vocab_size).all())
        if token_ids_D.shape != (config.draft_vocab_size,) or not ascending or not in_range:
            raise GraftError(
                f"a draft vocabulary is {config.draft_vocab_size} ascending ids below {config.vocab_size}; "
                "check d2t and t2d of the checkpoint"
            )
        self.target_ids = token_ids_D.to(self.target_ids.device)
        if config.draft_vocab_size < config.vocab_size:
            # EAGLE stores the *offset* from draft id to target id, not the target id.
            self.d2t = self.target_ids - torch.arange(len(token_ids_D), device=self.target_ids.device)
            kept_V = torch.zeros(config.vocab_size, dtype=torch.bool, device=self.target_ids.device)
            self.t2d = kept_V.index_fill_(0, self.target_ids, True)

    @classmethod
    def of_tensors(cls, config: DraftHeadConfig, tensors: dict[str, Tensor]) -> Self:
        """The head of a checkpoint, in its dtype, on the CPU: every tensor known, none missing, all finite.

        It keeps the tensors themselves, and makes nothing of a size that they do not have.

        Args:
            tensors: those of `state_dict()`; t2d, which follows from d2t, and embeddings may be missing.

        Raises:
            GraftError: names the tensors that are missing, unknown, misshapen or not finite, or of another dtype.
        """
        maps = {name: tensors[name] for name in ("d2t", "t2d") if name in tensors}
        if config.draft_vocab_size == config.vocab_size:
            maps = {name: tensor for name, tensor in maps.items() if not bool((tensor == (name == "t2d")).all())}
        weights = {name: tensor for name, tensor in tensors.items() if name not in ("d2t", "t2d")}
        with torch.device("meta"):
            head = cls(config, own_embeddings=EMBEDDINGS in tensors)
        _check_shapes(head, weights | maps)
        _check_numbers(weights)
        head.load_state_dict(weights, strict=False, assign=True)  # the maps are not there yet
        head.target_ids = torch.arange(config.draft_vocab_size)
        if maps:
            head.set_draft_vocabulary(head.target_ids + maps["d2t"].long())
            if "t2d" in maps and not torch.equal(head.t2d, maps["t2d"].bool()):
                raise GraftError("d2t and t2d name different draft vocabularies; the checkpoint is corrupt")
        return head.to(weights["lm_head.weight"].dtype)

    def fuse(self, aux_BSE: Tensor) -> Tensor:
        """The target's aux hidden states side by side, [B, S, E] -> feature [B, S, H]."""
        return self.fc(aux_BSE)

    def forward(self, embedding_BSH: Tensor, feature_BSH: Tensor, positions_BS: Tensor, attend: Attend) -> Tensor:
        """One draft step: the un-normed output, which is also the next step's feature. [B, S, H]"""
        rope = self.rotary_emb(embedding_BSH, positions_BS)
        return self.midlayer(embedding_BSH, feature_BSH, rope, attend)

    def logits(self, hidden_BSH: Tensor) -> Tensor:
        """Logits over the draft vocabulary. [..., H] -> [..., Vd]"""
        return self.lm_head(self.norm(hidden_BSH))


def _check_shapes(head: DraftHead, tensors: dict[str, Tensor]) -> None:
    """Raises GraftError unless the tensors are those of a head's checkpoint, which may leave out t2d."""
    own = head.state_dict()
    missing, unknown = sorted(own.keys() - tensors.keys() - {"t2d"}), sorted(tensors.keys() - own.keys())
    misshapen = [name for name in own.keys() & tensors.keys() if own[name].shape != tensors[name].shape]
    if missing or unknown or misshapen:
        raise GraftError(
            "this is not a checkpoint of the head its config describes: "
            f"missing {missing}, unknown {unknown}, of another shape {sorted(misshapen)}"
        )
    for name, kinds in {"d2t": (torch.int64, torch.int32), "t2d": (torch.bool, torch.uint8)}.items():
        if name in tensors and tensors[name].dtype not in kinds:
            raise GraftError(f"{name} must be of {' or '.join(map(str, kinds))}, not {tensors[name].dtype}")


def _check_numbers(weights: dict[str, Tensor]) -> None:
    """Raises GraftError for a weight that is no number the head could compute with."""
    for name, tensor in weights.items():
        if tensor.dtype not in WEIGHT_DTYPES:
            raise GraftError(f"{name} is of {tensor.dtype}; a head's weights are float32, bfloat16 or float16")
        if not bool(tensor.isfinite().all()):
            raise GraftError(f"{name} holds NaN or infinity")


def default_aux_layer_ids(num_layers: int) -> tuple[int, int, int]:
    """EAGLE-3's choice (outputs of layers 1, n//2-1, n-4), spread evenly where the target is too shallow.

    Raises:
        GraftError: fewer than three layers.
    """
    if num_layers < 3:
        raise GraftError(f"a target of {num_layers} layers has no three layers for a head to read; it needs at least 3")
    if num_layers >= 8:
        return 1, num_layers // 2 - 1, num_layers - 4
    return 0, num_layers // 2, num_layers - 1
