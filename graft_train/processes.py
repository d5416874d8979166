"""What the processes of a launch do together, and what the main one does alone."""

import os
from typing import Any

import torch


def is_main() -> bool:
    """Whether this process is the one that writes."""
    return int(os.environ.get("RANK", "0")) == 0


def of_main(value: Any) -> Any:
    """The main process's value, on every process: what was measured differs, and all must decide alike."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return value
    values = [value]
    torch.distributed.broadcast_object_list(values, 0)
    return values[0]


def say(message: str) -> None:
    """Prints once, however many processes there are."""
    if is_main():
        print(message, flush=True)


def barrier() -> None:
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.barrier()
