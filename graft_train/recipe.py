"""What every recipe does before its stage: the schema for Hydra, threads, and errors people can read."""

import sys

import torch
from omegaconf import DictConfig

from graft_inference import GraftError
from graft_train.config import Config, register, to_config

register()


def prepare(composed: DictConfig) -> Config:
    """The configuration, as dataclasses, applied to this process."""
    # A user's mistake is told in one line; a bug keeps its traceback.
    sys.excepthook = _print_error
    config = to_config(composed)
    if config.threads:
        torch.set_num_threads(config.threads)
    return config


def _print_error(kind: type[BaseException], error: BaseException, trace: object) -> None:
    if issubclass(kind, GraftError):
        print(f"error: {error}", file=sys.stderr)
    else:
        sys.__excepthook__(kind, error, trace)  # type: ignore[arg-type]
