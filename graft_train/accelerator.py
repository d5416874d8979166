"""The accelerator of the stages that train: a launch decides how many processes there are, settings all else."""

import os
from typing import Any

from accelerate import Accelerator
from accelerate.utils import GradientAccumulationPlugin

from graft_inference.errors import GraftError

UNSUPPORTED = {
    "ACCELERATE_USE_FSDP": "FSDP",
    "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM",
    "ACCELERATE_USE_PARALLELISM_CONFIG": "a parallelism configuration",
}
"""What a launch asks for by these variables, and no stage follows."""


def new_accelerator(*, cpu: bool, mixed_precision: str = "no", **settings: Any) -> Accelerator:
    """An accelerator that says itself whatever accelerate would otherwise read from variables of the environment,
    which `accelerate launch` and its saved configuration set.

    Raises:
        GraftError: the launch asks for what no stage follows.
    """
    for name, what in UNSUPPORTED.items():
        if is_set(name):
            raise GraftError(
                f"{name}={os.environ[name]}: no stage trains with {what}; launch with one of the files in "
                "recipes/launch (accelerate launch --config_file ...), or unset the variable"
            )
    return Accelerator(
        cpu=cpu,
        mixed_precision=mixed_precision,
        # The loops count the batches of an optimizer step themselves; accelerate would divide every loss.
        gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=1),
        dynamo_backend="no",
        **settings,
    )


def is_set(name: str) -> bool:
    """Whether a variable of the environment is true, as accelerate reads it."""
    return os.environ.get(name, "false").lower() == "true"
