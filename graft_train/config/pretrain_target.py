"""Settings of `pretrain_target`."""

from dataclasses import dataclass

from graft_inference.errors import GraftError
from graft_train.config.bounds import check_least


@dataclass(slots=True, kw_only=True)
class PretrainConfig:
    """A deep, thin Llama: its pass costs many times its one-layer head's, as with a large target.

    Attributes:
        vocab_size: tokens of its byte-pair encoding, trained on the same text.
        hidden_size, layers, heads, intermediate_size: its shape, as Llama has them.
        max_positions: longest prompt and continuation.
        length: tokens per training sequence.
        batch: sequences per step.
        steps: optimizer steps.
        muon_lr: peak rate of the layers' matrices (Muon).
        adamw_lr: peak rate of embeddings and norms (AdamW).
        warmup: steps over which the rates rise.
        cooldown: share of the steps, at the end, over which the rates fall linearly to zero.
        checkpoint_every: steps between checkpoints.
    """

    vocab_size: int = 1024
    hidden_size: int = 128
    layers: int = 12
    heads: int = 4
    intermediate_size: int = 344
    max_positions: int = 1024
    length: int = 128
    batch: int = 16
    steps: int = 800
    muon_lr: float = 0.007
    adamw_lr: float = 0.05
    warmup: int = 20
    cooldown: float = 0.4
    checkpoint_every: int = 100

    def __post_init__(self) -> None:
        names = ("vocab_size", "hidden_size", "layers", "heads", "length", "batch", "steps", "checkpoint_every")
        check_least("pretrain_target", self, dict.fromkeys(names, 1))
        if self.hidden_size % (2 * self.heads):
            raise GraftError(
                f"pretrain_target.hidden_size={self.hidden_size} must be an even multiple of "
                f"pretrain_target.heads={self.heads}"
            )
