"""The shape of a block head."""

import math
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from transformers import Qwen3Config
from transformers.models.qwen3.modeling_qwen3 import Qwen3RotaryEmbedding

from ...errors import GraftError

SIZES = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "vocab_size",
    "draft_vocab_size",
    "block_size",
    "num_target_layers",
    "max_position_embeddings",
)
OWN = frozenset({
    "aux_layer_ids", "draft_vocab_size", "num_target_layers", "block_size", "mask_token_id", "causal",
    "sample_from_anchor", "markov_rank",
})  # fmt: skip
"""What a Qwen3 configuration does not have."""
LARGEST = 2**31 - 1


@dataclass(frozen=True)
class BlockHeadConfig:
    """Shape of a block head. It is as wide as its target, whose embeddings it shares.

    Attributes:
        num_hidden_layers: of the head, each shaped as Qwen3's.
        vocab_size: the target's vocabulary, V.
        draft_vocab_size: tokens the head can propose, Vd <= V.
        aux_layer_ids: target layers whose *outputs* are the context, 0-based and ascending; the last layer is none.
        num_target_layers: of the target.
        block_size: slots of a block, the anchor's included.
        mask_token_id: what stands in all slots but the anchor's: a token that the target never emits.
        causal: whether a slot sees only itself and the slots before it, so that a shorter block may be asked for.
        sample_from_anchor: next-token slots in place of fill-in ones.
        markov_rank: of the bias by the token before, r; 0 for none. It needs next-token slots.

    Raises:
        GraftError: a value of another type or out of its range, or a RoPE that transformers cannot build.
    """

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    vocab_size: int
    draft_vocab_size: int
    aux_layer_ids: tuple[int, ...]
    num_target_layers: int
    block_size: int
    mask_token_id: int
    max_position_embeddings: int
    causal: bool = False
    sample_from_anchor: bool = False
    markov_rank: int = 0
    rms_norm_eps: float = 1e-6
    rope_parameters: dict[str, Any] = field(default_factory=lambda: {"rope_type": "default", "rope_theta": 10000.0})

    def __post_init__(self) -> None:
        for name in SIZES:
            _check_whole(name, getattr(self, name), 1, LARGEST)
        _check_whole("num_hidden_layers", self.num_hidden_layers, 1, 1024)
        _check_whole("block_size", self.block_size, 2, 1024)
        _check_whole("draft_vocab_size", self.draft_vocab_size, 1, self.vocab_size)
        _check_whole("mask_token_id", self.mask_token_id, 0, self.vocab_size - 1)
        _check_whole("markov_rank", self.markov_rank, 0, LARGEST)
        for name in ("causal", "sample_from_anchor"):
            if type(getattr(self, name)) is not bool:
                raise GraftError(f"{name}={getattr(self, name)!r} must be true or false")
        if self.markov_rank and not self.sample_from_anchor:
            raise GraftError(f"markov_rank={self.markov_rank} needs sample_from_anchor=true: no engine has the other")
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
        self._check_aux_layers()
        self.rotary()

    def _check_aux_layers(self) -> None:
        layers, last = self.aux_layer_ids, self.num_target_layers - 1
        if not layers or not all(type(layer) is int and layer >= 0 for layer in layers):
            raise GraftError(f"aux_layer_ids={layers} must be layers of the target, counted from 0")
        if list(layers) != sorted(set(layers)):
            raise GraftError(f"aux_layer_ids={layers} must be distinct and ascending")
        if layers[-1] >= last:
            raise GraftError(
                f"aux_layer_ids={layers} must lie before the target's last layer, {last}: engines differ in whether "
                "that one's output is normed"
            )

    @property
    def first_slot(self) -> int:
        """The slot that predicts the token behind the anchor."""
        return 0 if self.sample_from_anchor else 1

    @property
    def drafts(self) -> int:
        """Tokens that a whole block proposes."""
        return self.block_size - self.first_slot

    def check_target(self, hidden_size: int, vocab_size: int, num_layers: int) -> None:
        """Raises GraftError unless the head belongs to a target of this shape."""
        wanted = {"hidden_size": hidden_size, "vocab_size": vocab_size, "num_target_layers": num_layers}
        for name, value in wanted.items():
            if getattr(self, name) != value:
                raise GraftError(
                    f"the head has {name}={getattr(self, name)}, but the target {value}: it is another target's"
                )

    def rotary(self) -> Qwen3RotaryEmbedding:
        """The head's RoPE, on the CPU.

        Raises:
            GraftError: parameters that transformers does not know or that give frequencies which are none.
        """
        try:
            with torch.device("cpu"):
                rotary = Qwen3RotaryEmbedding(self.qwen3_config())
            frequencies = torch.cat([buffer.flatten() for _, buffer in rotary.named_buffers()])
            sound = bool(frequencies.isfinite().all()) and math.isfinite(rotary.attention_scaling)
        except Exception as error:  # whatever a kind of RoPE does with parameters that it cannot use
            raise GraftError(f"rope_parameters={self.rope_parameters} cannot be used: {error!r}") from error
        if not sound:
            raise GraftError(f"rope_parameters={self.rope_parameters} give frequencies that are not finite")
        return rotary

    def qwen3_config(self) -> Qwen3Config:
        """The configuration of the head's layers, as transformers knows it."""
        shape = {name: value for name, value in vars(self).items() if name not in OWN}
        return Qwen3Config(**shape, tie_word_embeddings=False)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self) | {"aux_layer_ids": list(self.aux_layer_ids)}


def _check_whole(name: str, value: Any, least: int, most: int) -> None:
    if type(value) is not int or not least <= value <= most:
        raise GraftError(f"{name}={value!r} must be a whole number from {least} to {most}")


def default_aux_layer_ids(num_layers: int, count: int = 5) -> tuple[int, ...]:
    """DFlash's choice: this many layers, evenly spaced from the second to the third from the end.

    Raises:
        GraftError: a target of fewer than three layers.
    """
    if num_layers < 3:
        raise GraftError(f"a target of {num_layers} layers has too few states for a block head; it needs at least 3")
    if count == 1:
        return (num_layers // 2 if num_layers > 3 else 1,)
    last = num_layers - 3 if num_layers > 4 else num_layers - 2
    first = 1 if num_layers > 4 else 0
    return tuple(sorted({round(first + place * (last - first) / (count - 1)) for place in range(count)}))
