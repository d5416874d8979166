"""Before the first step: what the training will take, and which setting to lower if it does not fit."""

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from graft_inference import GraftError
from graft_inference.heads.eagle3.model import DraftHead
from graft_train.config.head import HeadTrainConfig
from graft_train.distill.loss import CHUNK

OOM_ADVICE = "lower head.batch_tokens or head.max_length, then head.ttt_steps or head.draft_vocab_size"


@dataclass
class Estimate:
    """Bytes by what holds them on one device, and arithmetic of one optimizer step on it.

    Attributes:
        states: of all the batches that a device takes per step, which are held together.
    """

    target: int
    head: int
    states: int
    unroll: int
    loss: int
    flops: float

    @property
    def total(self) -> int:
        return self.target + self.head + self.states + self.unroll + self.loss

    def __str__(self) -> str:
        parts = ("target", "head", "states", "unroll", "loss")
        return ", ".join(f"{name} {getattr(self, name) / 2**30:.2f}" for name in parts)


def estimate_training(
    head: DraftHead, target_parameters: int, target_bytes: int, settings: HeadTrainConfig, batches: int, answered: float
) -> Estimate:
    """From shapes alone.

    Args:
        answered: share of the columns in which a draft starts.
    """
    config, steps = head.config, settings.ttt_steps
    parameters = sum(parameter.numel() for parameter in head.parameters())
    tokens, columns = settings.batch_tokens, settings.batch_tokens * answered
    compute = 2 if settings.mixed_precision == "bf16" else 4
    hidden, queries = config.hidden_size, config.num_attention_heads * config.head_dim
    kept = 12 * hidden + 4 * queries + 3 * config.intermediate_size  # activations of one column, by their widths
    width = (len(config.aux_layer_ids) + 1) * hidden
    outside = config.draft_vocab_size * hidden + len(config.aux_layer_ids) * hidden**2
    layer = parameters - outside
    per_batch = 6 * (layer * (tokens + (steps - 1) * columns) + len(config.aux_layer_ids) * hidden**2 * tokens)
    per_batch += 6 * config.draft_vocab_size * hidden * columns * steps
    if settings.states == "online":
        per_batch += 2 * target_parameters * tokens
    return Estimate(
        target=target_bytes,
        head=16 * parameters,  # weights, gradients and AdamW's two moments in fp32
        states=int(batches * tokens * width * compute),
        unroll=int(kept * compute * (tokens + (steps - 1) * columns)),
        loss=4 * (4 * CHUNK * steps * config.draft_vocab_size + 2 * config.draft_vocab_size * hidden),
        flops=float(batches * per_batch),
    )


def memory_of(device: torch.device) -> int:
    """Bytes of the device."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def speed_of(device: torch.device, dtype: torch.dtype) -> float:
    """Arithmetic operations per second of a matrix product, which training reaches about half of."""
    size = 4096 if device.type == "cuda" else 512
    left = torch.randn(size, size, device=device, dtype=dtype)
    times = []
    for _ in range(4):
        started = time.perf_counter()
        (left @ left).sum().item()
        times.append(time.perf_counter() - started)
    return 2 * size**3 / min(times)


def describe(estimated: Estimate, device: torch.device, speed: float, steps: int) -> str:
    """One line for people; says what to lower when it looks too large."""
    memory = memory_of(device)
    hours = steps * estimated.flops / (0.5 * speed) / 3600
    line = (
        f"distill: about {estimated.total / 2**30:.1f} GiB of {memory / 2**30:.0f} on {device} ({estimated}) and "
        f"{hours:.1f} hours for {steps} steps"
    )
    if estimated.total > 0.9 * memory:
        line += f"; this may not fit: {OOM_ADVICE}"
    return line


@contextmanager
def naming_what_to_lower(settings: HeadTrainConfig) -> Iterator[None]:
    """Turns running out of memory into a GraftError."""
    try:
        yield
    except RuntimeError as error:
        if not isinstance(error, torch.OutOfMemoryError) and "can't allocate memory" not in str(error):
            raise
        raise GraftError(
            f"out of memory with head.batch_tokens={settings.batch_tokens} and "
            f"head.ttt_steps={settings.ttt_steps}: {OOM_ADVICE}. {str(error).splitlines()[0]}"
        ) from error
