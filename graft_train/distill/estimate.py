"""Before the first step: what the training will take, and which setting to lower if it does not fit."""

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from graft_inference.errors import GraftError
from graft_train.config.head import HeadTrainConfig
from graft_train.data.sharded import count_parameters, held_bytes
from graft_train.distill.strategy import Strategy

OOM_ADVICE = "lower head.batch_tokens or head.max_length, then head.draft_vocab_size or head.ttt_steps"


@dataclass
class Estimate:
    """Bytes by what holds them on one device, and arithmetic of one optimizer step on it.

    Attributes:
        states: of all the micro-batches that a device takes per step, which are held together.
        activations: of the head's passes over one of them.
    """

    target: int
    head: int
    states: int
    activations: int
    loss: int
    flops: float

    @property
    def total(self) -> int:
        return self.target + self.head + self.states + self.activations + self.loss

    def __str__(self) -> str:
        parts = ("target", "head", "states", "activations", "loss")
        return ", ".join(f"{name} {getattr(self, name) / 2**30:.2f}" for name in parts)


def estimate_training(strategy: Strategy, settings: HeadTrainConfig, batches: int, answered: float) -> Estimate:
    """From shapes alone.

    Args:
        batches: micro-batches of an optimizer step on one device.
        answered: share of the tokens that are answers.
    """
    target, tokens = strategy.target, settings.batch_tokens
    cost = strategy.cost(tokens, answered)
    compute = 2 if settings.mixed_precision == "bf16" else 4
    width = (len(target.aux_layer_ids) + 1) * target.config.hidden_size
    reading = 2 * count_parameters(target.model) * tokens if settings.states == "online" else 0
    return Estimate(
        target=held_bytes(target.model),
        head=16 * sum(parameter.numel() for parameter in strategy.head.parameters()),  # and gradients, AdamW's moments
        states=int(batches * tokens * width * compute),
        activations=int(cost.activations * compute),
        loss=int(4 * cost.loss),
        flops=float(batches * (cost.flops + reading)),
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
