"""Optimizers of the head and the course of their learning rate."""

import math

import torch
from torch import nn

from graft_train.config.head import HeadTrainConfig


def make_optimizers(head: nn.Module, settings: HeadTrainConfig) -> list[torch.optim.Optimizer]:
    """AdamW for everything, or Muon for the matrices within and AdamW for lm_head and norms.

    Muon's updates are scaled to AdamW's size, so that one learning rate serves both.
    """
    named = [(name, parameter) for name, parameter in head.named_parameters() if parameter.requires_grad]
    inner = [p for name, p in named if settings.optimizer == "muon" and p.dim() == 2 and "lm_head" not in name]
    chosen = set(map(id, inner))
    rest = [parameter for _, parameter in named if id(parameter) not in chosen]
    rate = settings.learning_rate
    adamw = torch.optim.AdamW(rest, lr=rate, betas=(0.9, 0.95), weight_decay=0.0, fused=True)
    if not inner:
        return [adamw]
    return [torch.optim.Muon(inner, lr=rate, weight_decay=0.0, adjust_lr_fn="match_rms_adamw"), adamw]


def learning_rate(step: int, total: int, settings: HeadTrainConfig) -> float:
    """Linear warm-up, then a course that would reach zero at step `total`."""
    warmup = max(1, round(settings.warmup_share * total))
    if step < warmup:
        return settings.learning_rate * (step + 1) / warmup
    progress = (step - warmup) / max(1, total - warmup)
    match settings.schedule:
        case "cosine":
            share = 0.5 * (1 + math.cos(math.pi * progress))
        case "linear":
            share = 1 - progress
        case _:  # wsd: warm-up, stable, decay
            decay = max(1, round(settings.decay_share * total))
            share = min(1.0, (total - step) / decay)
    return settings.learning_rate * share
