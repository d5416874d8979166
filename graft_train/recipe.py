"""What every recipe does: composes the configuration, runs its stages, and tells a user's mistake in one line."""

import os
import sys
from importlib import import_module
from pathlib import Path
from typing import Any, NoReturn

import hydra
import torch
from hydra.core.config_store import ConfigStore
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from graft_inference.errors import GraftError
from graft_train.config import Config
from graft_train.gguf import with_directory
from graft_train.processes import say
from graft_train.road import ROAD, WHOLE_ROAD

_HERE = Path(__file__).parent
CONF = next(conf for conf in (_HERE / "conf", _HERE.parent / "conf") if conf.is_dir())
"""Settings by recipe and experiment: in a wheel within the package, in a clone beside it."""
UNTOLD = ("To append to your config", "See https://", "reference_type=", "object_type=")
"""Beginnings of lines in Hydra's errors that help nobody here: a setting that + adds does not exist either."""


def run(name: str, overrides: list[str] | None = None) -> None:
    """One stage, or all of them.

    Args:
        name: of a recipe.
        overrides: settings as Hydra reads them; None takes those of the command line.
    """
    if overrides is not None:
        sys.argv[1:] = overrides
    names = list(ROAD) if name == WHOLE_ROAD else [name]
    register()
    os.environ["HYDRA_FULL_ERROR"] = "1"  # its errors come to us, and not at length to the user
    composes = True

    def begin(composed: DictConfig) -> None:
        nonlocal composes
        composes = False
        run_stages(composed, names)

    try:
        hydra.main(version_base=None, config_path=str(CONF), config_name=name)(begin)()
    except Exception as error:
        # A file of settings that is damaged fails in whatever way YAML has for it; what fails later is a bug.
        if not composes and not isinstance(error, HydraException | OmegaConfBaseException):
            raise
        _end(_in_one_line(error))


def _end(message: str) -> NoReturn:
    print(f"error: {message}", file=sys.stderr)
    raise SystemExit(2)


def _in_one_line(error: Exception) -> str:
    """What is wrong with the settings, and not what Hydra advises."""
    text = f"{error}\n{error.__cause__ or ''}".split("Config search path:")[0]
    lines = [line.strip() for line in text.splitlines()]
    told = " ".join(line for line in lines if line and not line.startswith(UNTOLD)).rstrip(".")
    return f"{told}; --help shows what there is to set"


def prepare(composed: DictConfig) -> Config:
    """The configuration, as dataclasses, applied to this process."""
    config = to_config(composed)
    if config.threads:
        torch.set_num_threads(config.threads)
    return config


def run_stages(composed: DictConfig, names: list[str]) -> None:
    """Runs stages one after the other. A user's mistake is told in one line; a bug keeps its traceback."""
    try:
        config = prepare(composed)
        config = with_directory(config)
        for number, name in enumerate(names, start=1):
            if len(names) > 1:
                say(f"\n[{number}/{len(names)}] {name}: {ROAD[name]}")
            getattr(import_module(f"graft_train.{name}"), name)(config)
    except GraftError as error:
        _end(str(error))
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def register() -> None:
    """Makes the schema known to Hydra, before anything is composed."""
    ConfigStore.instance().store(name="schema", node=Config)


def to_config(composed: DictConfig) -> Config:
    """The composed values as dataclasses, once, at the edge.

    Raises:
        GraftError: a setting that does not exist, or has no value.
    """
    try:
        values: Any = OmegaConf.to_object(composed)
    except OmegaConfBaseException as error:
        raise GraftError(_in_one_line(error)) from error
    except (AttributeError, TypeError) as error:  # what `+key=value` added
        raise GraftError(f"a setting that does not exist was added with +: {error}") from error
    return values
