"""What the heads of every family are made of: a sound shape, RoPE that stays exact, and a draft vocabulary."""

import math
from collections.abc import Callable
from typing import Any, Self, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, rotate_half
from transformers.models.qwen3.modeling_qwen3 import Qwen3RotaryEmbedding

from ..errors import GraftError

Rotary = TypeVar("Rotary", LlamaRotaryEmbedding, Qwen3RotaryEmbedding)

LARGEST = 2**31 - 1
WEIGHT_DTYPES = {torch.float32, torch.bfloat16, torch.float16}
MAPS = {"d2t": (torch.int64, torch.int32), "t2d": (torch.bool, torch.uint8)}
"""The tensors of a checkpoint that say which target tokens a head proposes, with their dtypes."""


def check_whole(name: str, value: Any, least: int, most: int) -> None:
    """Raises GraftError unless the value is a whole number from `least` to `most`."""
    if type(value) is not int or not least <= value <= most:
        raise GraftError(f"{name}={value!r} must be a whole number from {least} to {most}")


def check_layer(num_attention_heads: int, num_key_value_heads: int, head_dim: int, rms_norm_eps: float) -> None:
    """Raises GraftError unless a decoder layer can have this shape."""
    if num_attention_heads % num_key_value_heads:
        raise GraftError(
            f"num_attention_heads={num_attention_heads} must be a multiple of num_key_value_heads={num_key_value_heads}"
        )
    # RoPE's frequencies are made before any weight is looked at: their number must be a plausible one.
    if head_dim % 2 or head_dim > 65536:
        raise GraftError(f"head_dim={head_dim} must be even, for RoPE turns pairs, and at most 65536")
    if type(rms_norm_eps) not in (int, float) or not 0 < rms_norm_eps < 1:
        raise GraftError(f"rms_norm_eps={rms_norm_eps!r} must lie between 0 and 1")


def check_aux_layers(layers: tuple[int, ...]) -> None:
    """Raises GraftError unless these can be layers of a target, each once and in order."""
    if not layers or not all(type(layer) is int and 0 <= layer <= LARGEST for layer in layers):
        raise GraftError(f"aux_layer_ids={layers} must be layers of the target, counted from 0")
    if list(layers) != sorted(set(layers)):
        raise GraftError(f"aux_layer_ids={layers} must be distinct and ascending")


def sound_rotary(make: Callable[[], Rotary], rope_parameters: dict[str, Any]) -> Rotary:
    """A head's RoPE, on the CPU.

    Args:
        make: builds transformers' module from `rope_parameters`, which errors name.

    Raises:
        GraftError: parameters that transformers does not know or that give frequencies which are none.
    """
    try:
        with torch.device("cpu"):
            rotary = make()
        frequencies = torch.cat([buffer.flatten() for _, buffer in rotary.named_buffers()])
        sound = bool(frequencies.isfinite().all()) and math.isfinite(rotary.attention_scaling)
    except Exception as error:  # whatever a kind of RoPE does with parameters that it cannot use
        raise GraftError(f"rope_parameters={rope_parameters} cannot be used: {error!r}") from error
    if not sound:
        raise GraftError(f"rope_parameters={rope_parameters} give frequencies that are not finite")
    return rotary


def turned(states_BQTD: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
    """RoPE; cosines and sines are [B, T, D]."""
    cos_B1TD, sin_B1TD = (part[:, None] for part in rope)
    return states_BQTD * cos_B1TD + rotate_half(states_BQTD) * sin_B1TD


class GatedMLP(nn.Module):
    """The gated MLP of a Llama or Qwen3 layer."""

    def __init__(self, hidden_size: int, intermediate_size: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.up_proj = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.down_proj = nn.Linear(intermediate_size, hidden_size, bias=False)

    def forward(self, hidden_BSH: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(hidden_BSH)) * self.up_proj(hidden_BSH))


class HeadModule(nn.Module):
    """A draft head: its parameters and buffers are exactly the tensors of its checkpoint.

    Attributes:
        target_ids: ascending target ids of the tokens that the head proposes, [Vd] int64.
        d2t, t2d: the same as checkpoints store it; a head that proposes the whole vocabulary has neither.
    """

    d2t: Tensor
    t2d: Tensor
    target_ids: Tensor

    def __init__(self, rotary_emb: nn.Module, vocab_size: int, draft_vocab_size: int) -> None:
        super().__init__()
        self.rotary_emb = rotary_emb
        self.vocab_size, self.draft_vocab_size = vocab_size, draft_vocab_size
        if draft_vocab_size < vocab_size:
            self.register_buffer("d2t", torch.zeros(draft_vocab_size, dtype=torch.long))
            self.register_buffer("t2d", torch.arange(vocab_size) < draft_vocab_size)
        self.register_buffer("target_ids", torch.arange(draft_vocab_size), persistent=False)

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
        ascending = bool((token_ids_D.diff() > 0).all())
        in_range = bool((token_ids_D >= 0).all() and (token_ids_D < self.vocab_size).all())
        if token_ids_D.shape != (self.draft_vocab_size,) or not ascending or not in_range:
            raise GraftError(
                f"a draft vocabulary is {self.draft_vocab_size} ascending ids below {self.vocab_size}; "
                "check d2t and t2d of the checkpoint"
            )
        self.target_ids = token_ids_D.to(self.target_ids.device)
        if self.draft_vocab_size < self.vocab_size:
            # Stored is the *offset* from draft id to target id, not the target id.
            self.d2t = self.target_ids - torch.arange(len(token_ids_D), device=self.target_ids.device)
            kept_V = torch.zeros(self.vocab_size, dtype=torch.bool, device=self.target_ids.device)
            self.t2d = kept_V.index_fill_(0, self.target_ids, True)

    def assign(self, tensors: dict[str, Tensor]) -> None:
        """Takes the tensors of a checkpoint as the head's own: every one known, none missing, all finite.

        A head made on the meta device holds nothing of a size that the tensors do not have.

        Args:
            tensors: those of `state_dict()`; t2d, which follows from d2t, may be missing.

        Raises:
            GraftError: names the tensors that are missing, unknown, misshapen or not finite, or of another dtype.
        """
        maps = {name: tensors[name] for name in MAPS if name in tensors}
        weights = {name: tensor for name, tensor in tensors.items() if name not in maps}
        _check_names_and_shapes(self, tensors)
        _check_dtypes_and_numbers(weights, maps)
        self.load_state_dict(weights, strict=False, assign=True)  # the maps are not there yet
        self.target_ids = torch.arange(self.draft_vocab_size)
        if maps:
            self.set_draft_vocabulary(self.target_ids + maps["d2t"].long())
            if "t2d" in maps and not torch.equal(self.t2d, maps["t2d"].bool()):
                raise GraftError("d2t and t2d name different draft vocabularies; the checkpoint is corrupt")


def _check_names_and_shapes(head: HeadModule, tensors: dict[str, Tensor]) -> None:
    own = head.state_dict()
    missing, unknown = sorted(own.keys() - tensors.keys() - {"t2d"}), sorted(tensors.keys() - own.keys())
    misshapen = [name for name in own.keys() & tensors.keys() if own[name].shape != tensors[name].shape]
    if missing or unknown or misshapen:
        raise GraftError(
            "this is not a checkpoint of the head its config describes: "
            f"missing {missing}, unknown {unknown}, of another shape {sorted(misshapen)}"
        )


def _check_dtypes_and_numbers(weights: dict[str, Tensor], maps: dict[str, Tensor]) -> None:
    for name, tensor in maps.items():
        if tensor.dtype not in MAPS[name]:
            raise GraftError(f"{name} must be of {' or '.join(map(str, MAPS[name]))}, not {tensor.dtype}")
    for name, tensor in weights.items():
        if tensor.dtype not in WEIGHT_DTYPES:
            raise GraftError(f"{name} is of {tensor.dtype}; a head's weights are float32, bfloat16 or float16")
        if not bool(tensor.isfinite().all()):
            raise GraftError(f"{name} holds NaN or infinity")
