"""Settings of the `distill` stage."""

from dataclasses import asdict, dataclass, field
from typing import Any

from graft_inference.errors import GraftError
from graft_train.config.block import BlockHeadTrainConfig

FAMILIES = ("eagle3", "block")
LOSSES = ("forward_kl", "reverse_kl", "total_variation", "survival")
POSITIVE = (
    "intermediate_size",
    "draft_vocab_size",
    "ttt_steps",
    "step_decay",
    "epochs",
    "max_steps",
    "batch_tokens",
    "batches_per_step",
    "learning_rate",
    "clip",
    "checkpoint_every",
    "keep_checkpoints",
    "push_every",
    "log_every",
    "measure_every",
    "measure_prompts",
    "measure_tokens",
    "states_top_k",
)
CHOICES = {
    "family": FAMILIES,
    "loss": LOSSES,
    "optimizer": ("adamw", "muon"),
    "schedule": ("cosine", "linear", "wsd"),
    "states": ("online", "memory", "disk"),
    "states_dtype": (None, "float32", "bfloat16", "float16"),
    "mixed_precision": ("bf16", "no"),
    "shard_target": (None, "zero3", "tp"),
    "resume": ("auto", "never"),
}
BOOKKEEPING = (
    "shard_target",
    "resume",
    "checkpoint_every",
    "keep_checkpoints",
    "push_every",
    "log_every",
    "trackers",
    "measure_every",
    "measure_prompts",
    "measure_tokens",
)


@dataclass(slots=True, kw_only=True)
class HeadTrainConfig:
    """The draft head and its training; what is not set here (width, heads, RoPE) is the target's.

    Many fields: each is set as `head.NAME=VALUE`, and one level of names is easier to type and to remember than two.

    Attributes:
        family: of the head: eagle3, which drafts one token a pass, or block, which drafts all in one.
        block: what a block head has of its own.
        init_from: directory or Hub id of a published head, or a checkpoint of a training, which `adopt` takes as it is
            and `distill` goes on from; its shape and draft vocabulary then stand.
        aux_layer_ids: target layers whose outputs feed the head; None: the family's choice for its depth.
        intermediate_size: of the head's MLP; None: the target's.
        draft_vocab_size: most frequent answer tokens that can be drafted; at most the target's vocabulary.
        norm_before_residual: the residual of the head's layer is the normed hidden state and not the raw one.
        ttt_steps: draft steps trained at every position. This, the steps' weights, loss and skip_out_of_vocabulary are
            an EAGLE-3 head's.
        step_decay: step k of a draft weighs step_decay**k in the loss.
        step_weights: weights of the steps in the loss, one each, in place of step_decay.
        loss: forward_kl, reverse_kl, total_variation, or survival: the forward KL weighted by the probability
            that the draft's earlier tokens survive.
        skip_out_of_vocabulary: leave positions whose target choice cannot be drafted out of the loss.
        feature_noise: uniform noise on the aux hidden states, up to this share of their root mean square.
        max_length: longer samples lose the end of their answer; those whose prompt fills it are left out.
        epochs: passes over the samples.
        max_steps: optimizer steps after which training ends, if it has not by then.
        batch_tokens: samples are packed into micro-batches of at most so many tokens; one a device at a time.
        batches_per_step: micro-batches of an optimizer step, over all devices: a multiple of their number.
        optimizer: adamw, or muon for the layers' matrices and AdamW for the rest.
        learning_rate: at the end of the warm-up.
        schedule: what follows: cosine or linear to zero, or wsd: constant, then linear to zero.
        warmup_share: part of the optimizer steps over which the learning rate rises.
        decay_share: part of the optimizer steps over which it falls at the end; for wsd.
        clip: most that the norm of a step's gradient may be.
        mixed_precision: "bf16" or "no".
        states: "online" runs the target over every batch; "memory" once over all samples, whose states stay
            in host memory; "disk" writes them once to {run_dir}/states, for any number of processes and runs.
        states_dtype: of the states on disk; None: the target's.
        states_top_k: on disk, store so many best logits and their ids in place of the final state. The head then
            learns a distribution cut off there and normalised; all of the vocabulary is exact.
        shard_target: share the target out over the processes: "zero3" (a DeepSpeed ZeRO-3 launch) or "tp"
            (transformers' tensor parallelism); None: each holds all of it, or what target.device_map says.
        validation_samples: held out of training (at most a tenth), measured at the end.
        measure_every: optimizer steps between measurements of the acceptance length with the engine that serves the
            head; None: only at the end.
        measure_prompts: held-out prompts that a measurement decodes.
        measure_tokens: tokens decoded of each.
        resume: "auto" continues from the last checkpoint, "never" starts again.
        checkpoint_every: optimizer steps between checkpoints.
        keep_checkpoints: older ones are deleted.
        push_every: optimizer steps between pushes of the head to export.repo_id, in the background; the last head is
            pushed, too. A push that fails gives a warning and does not stop the training. None: nothing is pushed.
        log_every: optimizer steps between lines of metrics.jsonl.
        trackers: accelerate's trackers that are sent the metrics too, such as wandb (offline unless WANDB_MODE says
            otherwise), tensorboard or trackio; each must be installed.
    """

    family: str = "eagle3"
    block: BlockHeadTrainConfig = field(default_factory=BlockHeadTrainConfig)
    init_from: str | None = None
    aux_layer_ids: list[int] | None = None
    intermediate_size: int | None = None
    draft_vocab_size: int = 32000
    norm_before_residual: bool = False
    ttt_steps: int = 7
    step_decay: float = 0.8
    step_weights: list[float] | None = None
    loss: str = "forward_kl"
    skip_out_of_vocabulary: bool = True
    feature_noise: float = 0.0
    max_length: int = 2048
    epochs: int = 2
    max_steps: int | None = None
    batch_tokens: int = 4096
    batches_per_step: int = 8
    optimizer: str = "adamw"
    learning_rate: float = 1e-4
    schedule: str = "cosine"
    warmup_share: float = 0.015
    decay_share: float = 0.2
    clip: float = 0.5
    mixed_precision: str = "bf16"
    states: str = "online"
    states_dtype: str | None = None
    states_top_k: int | None = None
    shard_target: str | None = None
    validation_samples: int = 64
    measure_every: int | None = 500
    measure_prompts: int = 8
    measure_tokens: int = 64
    resume: str = "auto"
    checkpoint_every: int = 500
    keep_checkpoints: int = 2
    push_every: int | None = None
    log_every: int = 10
    trackers: list[str] = field(default_factory=lambda: ["wandb"])

    def __post_init__(self) -> None:
        for name in POSITIVE:
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise GraftError(f"head.{name}={value} must be positive")
        for name, choices in CHOICES.items():
            if getattr(self, name) not in choices:
                known = ", ".join("null" if choice is None else choice for choice in choices)
                raise GraftError(f"head.{name}={getattr(self, name)} must be one of {known}")
        if self.max_length < 3:
            raise GraftError(f"head.max_length={self.max_length} leaves nothing to train on; set at least 3")
        if self.states_top_k is not None:
            self._check_top_k()
        for name in ("feature_noise", "validation_samples"):
            if getattr(self, name) < 0:
                raise GraftError(f"head.{name}={getattr(self, name)} must not be negative")
        for name in ("warmup_share", "decay_share"):
            if not 0 <= getattr(self, name) <= 1:
                raise GraftError(f"head.{name}={getattr(self, name)} is a share of the steps, from 0 to 1")
        if self.aux_layer_ids == []:
            raise GraftError("head.aux_layer_ids=[] would feed the head nothing; name layers, or leave it null")
        if self.states_dtype is not None and self.states != "disk":
            raise GraftError(f"head.states_dtype={self.states_dtype} is for head.states=disk")
        weights = self.weights()
        if len(weights) != self.ttt_steps or min(weights) < 0 or not any(weights):
            raise GraftError(
                f"head.step_weights={weights} must be head.ttt_steps={self.ttt_steps} weights, "
                "none negative and not all zero"
            )

    def _check_top_k(self) -> None:
        if self.states != "disk":
            raise GraftError(f"head.states_top_k={self.states_top_k} is for head.states=disk")
        place, loss = ("head.block.loss", self.block.loss) if self.family == "block" else ("head.loss", self.loss)
        if loss == "reverse_kl":
            raise GraftError(f"{place}=reverse_kl is infinite where head.states_top_k cuts; choose another loss")
        if not self.skip_out_of_vocabulary:
            raise GraftError(
                "head.states_top_k may leave nothing of a position whose choice cannot be drafted; "
                "set head.skip_out_of_vocabulary=true"
            )

    def weights(self) -> list[float]:
        """Of the draft steps in the loss."""
        return (
            self.step_weights
            if self.step_weights is not None
            else [self.step_decay**step for step in range(self.ttt_steps)]
        )

    def decisive(self) -> dict[str, Any]:
        """The settings that decide which head comes out."""
        return {name: value for name, value in asdict(self).items() if name not in BOOKKEEPING}
