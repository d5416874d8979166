"""The shape of a block head."""

from dataclasses import asdict, dataclass, field
from typing import Any

from transformers import Qwen3Config
from transformers.models.qwen3.modeling_qwen3 import Qwen3RotaryEmbedding

from ...errors import GraftError
from ..base import LARGEST, check_aux_layers, check_layer, check_whole, sound_rotary
from .view import SlidingWindow, View

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
MOST_LAYERS = 1024
OWN = frozenset({
    "aux_layer_ids", "draft_vocab_size", "num_target_layers", "block_size", "mask_token_id", "causal",
    "sample_from_anchor", "markov_rank", "sliding",
})  # fmt: skip
"""What a Qwen3 configuration does not have."""


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
        mask_token_id: the input of every slot except the anchor's; a token that the target never emits.
        causal: whether a slot sees only itself and the slots before it, so that a shorter block may be asked for. None:
            in layers with a sliding window, but not in the others.
        sample_from_anchor: next-token slots in place of fill-in ones.
        markov_rank: of the bias by the token before, r; 0 for none.
        sliding: the layers that do not see all of the context; None where all do.

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
    causal: bool | None = False
    sample_from_anchor: bool = False
    markov_rank: int = 0
    sliding: SlidingWindow | None = None
    rms_norm_eps: float = 1e-6
    rope_parameters: dict[str, Any] = field(default_factory=lambda: {"rope_type": "default", "rope_theta": 10000.0})

    def __post_init__(self) -> None:
        for name in SIZES:
            check_whole(name, getattr(self, name), 1, LARGEST)
        check_whole("num_hidden_layers", self.num_hidden_layers, 1, MOST_LAYERS)
        check_whole("block_size", self.block_size, 2, 1024)
        check_whole("draft_vocab_size", self.draft_vocab_size, 1, self.vocab_size)
        check_whole("mask_token_id", self.mask_token_id, 0, self.vocab_size - 1)
        check_whole("markov_rank", self.markov_rank, 0, LARGEST)
        for name in ("causal", "sample_from_anchor"):
            if type(getattr(self, name)) is not bool and not (name == "causal" and self.causal is None):
                raise GraftError(f"{name}={getattr(self, name)!r} must be true or false")
        if self.sliding is not None:
            self.sliding.check(self.num_hidden_layers, self.block_size)
        elif self.causal is None:
            raise GraftError("causal=None needs layers with a sliding window")
        check_layer(self.num_attention_heads, self.num_key_value_heads, self.head_dim, self.rms_norm_eps)
        check_aux_layers(self.aux_layer_ids)
        last = self.num_target_layers - 1
        if self.aux_layer_ids[-1] >= last:
            raise GraftError(
                f"aux_layer_ids={self.aux_layer_ids} must lie before the target's last layer, {last}: "
                "engines differ in whether that one's output is normed"
            )
        self.rotary()

    @property
    def first_slot(self) -> int:
        """The slot that predicts the token after the anchor."""
        return 0 if self.sample_from_anchor else 1

    @property
    def drafts(self) -> int:
        """Tokens that a whole block proposes."""
        return self.block_size - self.first_slot

    def view(self, layer: int) -> View:
        """What the slots see in a layer of the head."""
        slides = self.sliding is not None and layer in self.sliding.layers
        causal = slides if self.causal is None else self.causal
        if not slides:
            return View(causal)
        assert self.sliding is not None
        return View(causal, self.sliding.size, self.sliding.from_anchor)

    def rotary(self) -> Qwen3RotaryEmbedding:
        """The head's RoPE; arguments and errors as `sound_rotary`."""
        return sound_rotary(lambda: Qwen3RotaryEmbedding(self.qwen3_config()), self.rope_parameters)

    def qwen3_config(self) -> Qwen3Config:
        """The configuration of the head's layers, as transformers knows it."""
        shape = {name: value for name, value in vars(self).items() if name not in OWN}
        return Qwen3Config(**shape, tie_word_embeddings=False)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self) | {"aux_layer_ids": list(self.aux_layer_ids)}


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
