"""Settings of the `distill` stage."""

from dataclasses import asdict, dataclass
from typing import Any

from graft_inference import GraftError

POSITIVE = (
    "intermediate_size",
    "draft_vocab_size",
    "unroll_steps",
    "step_decay",
    "epochs",
    "max_steps",
    "batch_tokens",
    "gradient_accumulation",
    "learning_rate",
    "clip",
    "checkpoint_every",
    "keep_checkpoints",
    "log_every",
)


@dataclass(slots=True, kw_only=True)
class HeadTrainConfig:
    """The draft head and its training; what is not set here (width, heads, RoPE) is the target's.

    Attributes:
        tapped_layers: target layers whose outputs feed the head; None: EAGLE-3's choice for its depth.
        intermediate_size: of the head's MLP; None: the target's.
        draft_vocab_size: most frequent answer tokens that can be drafted; at most the target's vocabulary.
        unroll_steps: draft steps trained at every position.
        step_decay: step k weighs step_decay**k in the loss.
        skip_out_of_vocabulary: leave positions whose target choice cannot be drafted out of the loss.
        max_length: longer samples lose the end of their answer.
        epochs: passes over the samples, unless max_steps ends training earlier.
        batch_tokens: padded tokens of a batch, on each device.
        gradient_accumulation: batches per optimizer step, on each device.
        learning_rate: at the end of the warm-up; then a cosine to zero.
        warmup_share: of all optimizer steps.
        mixed_precision: "bf16" or "no".
        cache_states: run the target once over all samples and keep its states in host memory (taps + 1
            vectors of the hidden size a token), instead of once per batch and epoch.
        validation_samples: held out of training (at most a tenth), measured at the end.
        resume: "auto" continues from the last checkpoint, "never" starts again.
        keep_checkpoints: older ones are deleted.
        wandb: also log to wandb, offline unless WANDB_MODE says otherwise.
    """

    tapped_layers: list[int] | None = None
    intermediate_size: int | None = None
    draft_vocab_size: int = 32000
    norm_before_residual: bool = False
    unroll_steps: int = 7
    step_decay: float = 0.8
    skip_out_of_vocabulary: bool = True
    max_length: int = 2048
    epochs: int = 2
    max_steps: int | None = None
    batch_tokens: int = 4096
    gradient_accumulation: int = 4
    learning_rate: float = 1e-4
    warmup_share: float = 0.015
    clip: float = 0.5
    mixed_precision: str = "bf16"
    cache_states: bool = False
    validation_samples: int = 64
    resume: str = "auto"
    checkpoint_every: int = 500
    keep_checkpoints: int = 2
    log_every: int = 10
    wandb: bool = True

    def __post_init__(self) -> None:
        for name in POSITIVE:
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise GraftError(f"head.{name}={value} must be positive")
        if self.max_length < 3:
            raise GraftError(f"head.max_length={self.max_length} leaves nothing to train on; set at least 3")
        if self.mixed_precision not in ("bf16", "no"):
            raise GraftError(f"head.mixed_precision={self.mixed_precision} must be bf16 or no")
        if self.resume not in ("auto", "never"):
            raise GraftError(f"head.resume={self.resume} must be auto or never")

    def decisive(self) -> dict[str, Any]:
        """The settings that decide which head comes out."""
        bookkeeping = ("resume", "checkpoint_every", "keep_checkpoints", "log_every", "wandb")
        return {name: value for name, value in asdict(self).items() if name not in bookkeeping}
