"""The EAGLE-3 draft head: one decoder layer over fused target states (arXiv 2503.01840).

The same module is trained and served. How a query sees earlier keys differs between the two (an unroll
over whole sequences, a tree over a cache), so the caller passes attention as a function.
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass, field, fields
from typing import Any, Self

import torch
from torch import Tensor, nn
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from ...errors import GraftError
from ..base import LARGEST, MAPS, GatedMLP, HeadModule, check_aux_layers, check_layer, check_whole, sound_rotary, turned

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(query_BQSD, key_BKSD, value_BKSD) of this pass -> attended values BQSD; owns cache and mask."""
Rope = tuple[Tensor, Tensor]
"""Cosines and sines of positions, [B, S, D]."""

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
SWITCHES = ("norm_before_residual", "qk_norm", "norm_before_fc", "fc_norm", "norm_output")


@dataclass(frozen=True)
class DraftHeadConfig:
    """Shape of a draft head. The head is as wide as its target, whose embeddings it shares.

    Attributes:
        aux_layer_ids: target layers whose *outputs* feed the head, 0-based and ascending.
        vocab_size: the target's vocabulary, V.
        draft_vocab_size: tokens the head can propose, Vd <= V.
        norm_before_residual: whether the residual is the normed feature (False in EAGLE and SGLang).
        qk_norm: whether queries and keys are normed by head, as in a Qwen3 layer.
        sliding_window: positions that the first draft step's query sees, its own included; None: all. Later steps see
            what the first one saw, and the draft's own positions after it.
        norm_before_fc: one norm over all aux hidden states side by side (as heads of gpt-oss have it).
        fc_norm: a norm for each aux hidden state instead (EAGLE 3.1).
        norm_output: the next draft step's feature is the normed output, which lm_head reads (EAGLE 3.1).

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
    qk_norm: bool = False
    sliding_window: int | None = None
    norm_before_fc: bool = False
    fc_norm: bool = False
    norm_output: bool = False

    def __post_init__(self) -> None:
        for name in SIZES:
            check_whole(name, getattr(self, name), 1, LARGEST)
        check_whole("draft_vocab_size", self.draft_vocab_size, 1, self.vocab_size)
        check_layer(self.num_attention_heads, self.num_key_value_heads, self.head_dim, self.rms_norm_eps)
        for name in SWITCHES:
            if type(getattr(self, name)) is not bool:
                raise GraftError(f"{name}={getattr(self, name)!r} must be true or false")
        if self.norm_before_fc and self.fc_norm:
            raise GraftError("norm_before_fc and fc_norm are two ways to norm the same states: a head has one of them")
        if self.sliding_window is not None:
            check_whole("sliding_window", self.sliding_window, 1, LARGEST)
        check_aux_layers(self.aux_layer_ids)
        self.rotary()

    def rotary(self) -> LlamaRotaryEmbedding:
        """The head's RoPE; arguments and errors as `sound_rotary`."""
        return sound_rotary(lambda: LlamaRotaryEmbedding(self.llama_config()), self.rope_parameters)

    def llama_config(self) -> LlamaConfig:
        """The Llama configuration that RoPE is built from."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        own = ("aux_layer_ids", "draft_vocab_size", "sliding_window", *SWITCHES)
        return LlamaConfig(
            **{name: value for name, value in values.items() if name not in own},
            num_hidden_layers=1,
            tie_word_embeddings=False,
        )

    def to_dict(self) -> dict[str, Any]:
        return asdict(self) | {"aux_layer_ids": list(self.aux_layer_ids)}


def first_step_sees(query: Any, key: Tensor, window: int | None) -> Tensor:
    """Which keys a query of the first draft step attends to: those up to its own position, within the window. bool

    Args:
        query, key: their positions, of shapes that broadcast.
        window: of `DraftHeadConfig.sliding_window`.
    """
    seen = key <= query
    return seen if window is None else seen & (key > query - window)


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
        self.q_norm, self.k_norm = (
            nn.RMSNorm(config.head_dim, config.rms_norm_eps) if config.qk_norm else nn.Identity() for _ in range(2)
        )

    def forward(self, input_BSW: Tensor, rope: Rope, attend: Attend) -> Tensor:
        query_BQSD = self.query(self.q_proj(input_BSW), rope)
        key_BKSD, value_BKSD = self.key_value(self.k_proj(input_BSW), self.v_proj(input_BSW), rope)
        return self.joined(attend(query_BQSD, key_BKSD, value_BKSD))

    def query(self, projected: Tensor, rope: Rope) -> Tensor:
        """[B, S, Q * D] -> normed and turned, [B, Q, S, D]"""
        return turned(self._heads(projected, self.q_norm), rope)

    def key_value(self, key: Tensor, value: Tensor, rope: Rope) -> tuple[Tensor, Tensor]:
        """[B, S, K * D] each -> [B, K, S, D]"""
        return turned(self._heads(key, self.k_norm), rope), self._heads(value, nn.Identity())

    def joined(self, attended_BQSD: Tensor) -> Tensor:
        return self.o_proj(attended_BQSD.transpose(1, 2).flatten(2))

    def _heads(self, projected: Tensor, norm: nn.Module) -> Tensor:
        return norm(projected.unflatten(-1, (-1, self.head_dim))).transpose(1, 2)


class DraftLayer(nn.Module):
    """The head's decoder layer; module names are the checkpoint's."""

    def __init__(self, config: DraftHeadConfig) -> None:
        super().__init__()
        self.norm_before_residual = config.norm_before_residual
        self.self_attn = DraftAttention(config)
        self.mlp = GatedMLP(config.hidden_size, config.intermediate_size)
        self.input_layernorm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.hidden_norm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, embedding_BSH: Tensor, feature_BSH: Tensor, rope: Rope, attend: Attend) -> Tensor:
        normed_BSH = self.hidden_norm(feature_BSH)
        input_BSW = torch.cat((self.input_layernorm(embedding_BSH), normed_BSH), dim=-1)
        return self.behind(self.self_attn(input_BSW, rope, attend), feature_BSH, normed_BSH)

    def behind(self, attended_BSH: Tensor, feature_BSH: Tensor, normed_BSH: Tensor) -> Tensor:
        """The layer behind its attention.

        Args:
            normed_BSH: of the feature, by `hidden_norm`.
        """
        hidden_BSH = attended_BSH + (normed_BSH if self.norm_before_residual else feature_BSH)
        return hidden_BSH + self.mlp(self.post_attention_layernorm(hidden_BSH))


EMBEDDINGS = "embed_tokens.weight"


class DraftHead(HeadModule):
    """An EAGLE-3 head.

    At position t the head reads the embedding of token t+1 and the feature of position t, and predicts
    token t+2. The first feature is `fuse` of the aux hidden states; every later one is the head's own previous output,
    which is the layer's, normed with `norm_output`.

    Args:
        own_embeddings: whether the checkpoint brings embeddings. Ours do not: they are the target's.
    """

    def __init__(self, config: DraftHeadConfig, own_embeddings: bool = False) -> None:
        super().__init__(config.rotary(), config.vocab_size, config.draft_vocab_size)
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size) if own_embeddings else None
        taps = len(config.aux_layer_ids)
        self.input_norm = self.fc_norm = None
        if config.norm_before_fc:
            self.input_norm = nn.RMSNorm(taps * config.hidden_size, config.rms_norm_eps)
        if config.fc_norm:
            self.fc_norm = nn.ModuleList(nn.RMSNorm(config.hidden_size, config.rms_norm_eps) for _ in range(taps))
        self.fc = nn.Linear(taps * config.hidden_size, config.hidden_size, bias=False)
        self.midlayer = DraftLayer(config)
        self.norm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.lm_head = nn.Linear(config.hidden_size, config.draft_vocab_size, bias=False)

    @classmethod
    def of_tensors(cls, config: DraftHeadConfig, tensors: dict[str, Tensor]) -> Self:
        """The head of a checkpoint, in its dtype, on the CPU: every tensor known, none missing, all finite.

        It keeps the tensors themselves, and makes nothing of a size that they do not have.

        Args:
            tensors: those of `state_dict()`; t2d, which follows from d2t, and embeddings may be missing.

        Raises:
            GraftError: names the tensors that are missing, unknown, misshapen or not finite, or of another dtype.
        """
        if config.draft_vocab_size == config.vocab_size:  # maps that map nothing
            tensors = {
                name: tensor
                for name, tensor in tensors.items()
                if name not in MAPS or not bool((tensor == (name == "t2d")).all())
            }
        with torch.device("meta"):
            head = cls(config, own_embeddings=EMBEDDINGS in tensors)
        head.assign(tensors)
        return head.to(tensors["lm_head.weight"].dtype)

    def fuse(self, aux_BSE: Tensor) -> Tensor:
        """The target's aux hidden states side by side, [B, S, E] -> feature [B, S, H]."""
        if self.input_norm is not None:
            aux_BSE = self.input_norm(aux_BSE)
        if self.fc_norm is not None:
            taps = aux_BSE.chunk(len(self.fc_norm), dim=-1)
            aux_BSE = torch.cat([norm(tap_BSH) for norm, tap_BSH in zip(self.fc_norm, taps, strict=True)], dim=-1)
        return self.fc(aux_BSE)

    def forward(self, embedding_BSH: Tensor, feature_BSH: Tensor, positions_BS: Tensor, attend: Attend) -> Tensor:
        """One draft step: its output, which is also the next step's feature. [B, S, H]"""
        return self.step(embedding_BSH, feature_BSH, self.rotary_emb(embedding_BSH, positions_BS), attend)

    def step(self, embedding_BSH: Tensor, feature_BSH: Tensor, rope: Rope, attend: Attend) -> Tensor:
        """`forward`, with RoPE's cos and sin, [B, S, D] each, in place of the positions."""
        return self.output(self.midlayer(embedding_BSH, feature_BSH, rope, attend))

    def output(self, hidden_BSH: Tensor) -> Tensor:
        """A draft step's output, from the layer's, [B, S, H]: normed where the head does that."""
        return self.norm(hidden_BSH) if self.config.norm_output else hidden_BSH

    def normed(self, hidden_BSH: Tensor) -> Tensor:
        """A draft step's output, normed as lm_head expects it. [..., H] -> [..., H]"""
        return hidden_BSH if self.config.norm_output else self.norm(hidden_BSH)

    def logits(self, hidden_BSH: Tensor) -> Tensor:
        """Logits over the draft vocabulary. [..., H] -> [..., Vd]"""
        return self.lm_head(self.normed(hidden_BSH))


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
