"""What the figures were measured on."""

import platform

import torch
import transformers

from graft_inference.device import device_name


def describe_device(device: torch.device) -> dict[str, str | int]:
    """Name, thread count and versions, for reports."""
    return {
        "type": device.type,
        "name": device_name(device),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
