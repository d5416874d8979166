"""What the processes of a launch do together, and what the main one does alone."""

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from graft_inference.errors import GraftError

LOST = re.compile(
    r"gloo/transport.*(closed by peer|reset by peer|broken pipe)|ncclRemoteError|remote process exit"
    r"|\d/\d+ clients joined|time(d )?out after \d+ms|connection was likely closed",
    re.IGNORECASE | re.DOTALL,
)
"""What gloo and NCCL say when the process at the other end is gone, and PyTorch's rendezvous when it never came."""


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


def is_of_lost_process(error: BaseException) -> bool:
    """Whether what processes do together failed because one of them has ended."""
    return LOST.search(str(error)) is not None


@contextmanager
def naming_lost_processes() -> Iterator[None]:
    """Tells in one line that another process has ended, or never came: no process can go on without all others.

    Raises:
        GraftError: says what to do.
    """
    try:
        yield
    except RuntimeError as error:
        if not is_of_lost_process(error):
            raise
        raise GraftError(
            "another process of this launch has ended or never came, and this one cannot go on without it: its output "
            "says why. End those that are left, and run the same command again: it goes on from what is finished"
        ) from error
