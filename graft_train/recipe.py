"""What every recipe does before its stage: the schema for Hydra, threads, and errors people can read."""

import sys
from collections.abc import Callable
from pathlib import Path

import torch
from omegaconf import DictConfig

from graft_inference import GraftError
from graft_train.config import Config, register, to_config

register()


def prepare(composed: DictConfig) -> Config:
    """The configuration, as dataclasses, applied to this process."""
    config = to_config(composed)
    if config.threads:
        torch.set_num_threads(config.threads)
    return config


def run_recipe(composed: DictConfig, *stages: Callable[[Config], Path]) -> None:
    """Runs stages one after the other. A user's mistake is told in one line; a bug keeps its traceback."""
    try:
        config = prepare(composed)
        for stage in stages:
            stage(config)
    except GraftError as error:
        # Hydra would add advice about its own traces to anything but an exit.
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
