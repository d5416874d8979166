"""Runs a stage in a process of its own, in which a file operation of the run is the last, or is refused.

Operations are those that Python announces (opening to write, renaming, removing, making directories, truncating).
What libraries in Rust and C++ write themselves (safetensors, torch.save, Arrow, tokenizers) is not announced: a limit
on the size of files stops them in the middle.
"""

import errno
import gc
import importlib
import itertools
import json
import os
import resource
import select
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from graft_inference.errors import GraftError
from graft_train.config import Config

WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC
PATHS = {"open": 1, "os.rename": 2, "os.remove": 1, "os.rmdir": 1, "os.mkdir": 1, "os.truncate": 1}
"""How many paths an announced operation has."""
BASES = {"os.rename": 3, "os.remove": 1, "os.rmdir": 1, "os.mkdir": 2}
"""Where it says which open directory they are relative to; -1 is none."""
FREEING = ("os.remove", "os.rmdir", "os.truncate")
"""What a full disk does not refuse."""

for name in ("duckdb", "matplotlib.pyplot", "pandas"):
    importlib.import_module(name)  # once, or every process would, as stages do it at first need

Fault = Callable[[int, str, str], None]
"""Takes the number of an operation from 0, its name and its path, before it is done."""


@dataclass
class Ran:
    """How a stage ended.

    Attributes:
        operations: what it did to files of the run; empty where it was killed.
        refused: the message of the GraftError that ended it.
        crashed: the traceback of any other error that did.
    """

    killed: bool
    operations: list[str]
    refused: str | None = None
    crashed: str | None = None


def kill(at: int) -> Fault:
    """SIGKILL before an operation."""

    def fault(number: int, event: str, path: str) -> None:
        if number == at:
            os.kill(os.getpid(), signal.SIGKILL)

    return fault


def refuse(at: int, code: int) -> Fault:
    """This operation and all after it fail, but for those that free space on a full disk."""

    def fault(number: int, event: str, path: str) -> None:
        if number >= at and not (code == errno.ENOSPC and event in FREEING):
            raise OSError(code, os.strerror(code), path)

    return fault


def run(
    stage: Callable[[Config], Path],
    config: Config,
    fault: Fault | None = None,
    *,
    largest: int = -1,
    torn: bool = False,
    kill_after: float | None = None,
    backwards: bool = False,
) -> Ran:
    """Runs a stage in a forked process, whose clock only counts: what is measured then is the same every time.

    Args:
        largest: bytes that a file may have; -1: any number.
        torn: the first file that grows larger ends the process instead of being refused.
        kill_after: seconds after which this process sends SIGKILL, whatever the other one does just then.
        backwards: the time of day falls by an hour whenever it is asked for.
    """
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(reading)
        if backwards:
            _turn_back()
        _child(stage, config, fault, largest, torn, writing)
    os.close(writing)
    if kill_after is not None and not select.select([reading], [], [], kill_after)[0]:
        os.kill(pid, signal.SIGKILL)
    with os.fdopen(reading, encoding="utf-8") as pipe:
        said = pipe.read()
    _, status = os.waitpid(pid, 0)
    return Ran(**json.loads(said)) if said else Ran(os.WIFSIGNALED(status), [])


def _child(
    stage: Callable[[Config], Path], config: Config, fault: Fault | None, largest: int, torn: bool, pipe: int
) -> None:
    said: dict[str, Any] = {"killed": False, "operations": []}
    try:
        sys.stdout = sys.stderr = open(os.devnull, "w")  # noqa: SIM115
        gc.freeze()  # stages collect, and all that the tests have loaded would be gone through, and copied, each time
        _own_bars()
        ticks = itertools.count()
        time.perf_counter = lambda: next(ticks) / 1024  # type: ignore[assignment]
        _watch(Path(config.run_dir), fault, said["operations"])
        if largest >= 0:
            resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
            resource.setrlimit(resource.RLIMIT_FSIZE, (largest, largest))
            signal.signal(signal.SIGXFSZ, signal.SIG_DFL if torn else signal.SIG_IGN)
        stage(config)
    except GraftError as error:
        said["refused"] = str(error)
    except BaseException:
        said["crashed"] = traceback.format_exc()
    os.write(pipe, json.dumps(said).encode())
    os._exit(0)


def _own_bars() -> None:
    """Every class of progress bars gets a lock of this process's: a killed one may hold that which all share."""
    lock, classes = threading.RLock(), [tqdm]
    for one in classes:
        one.set_lock(lock)
        classes += one.__subclasses__()


def _turn_back() -> None:
    now, hours = time.time(), itertools.count()
    time.time = lambda: now - 3600 * next(hours)  # type: ignore[assignment]
    time.time_ns = lambda: int(time.time() * 1e9)  # type: ignore[assignment]


def _watch(run_dir: Path, fault: Fault | None, operations: list[str]) -> None:
    """Has every operation on a path of the run noted, and met by the fault."""
    within = f"{run_dir.parent}/"

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if event not in PATHS or (event == "open" and not arguments[2] & WRITES):
            return
        base = arguments[BASES[event]] if event in BASES else -1
        paths = [_path(value, base) for value in arguments[: PATHS[event]]]
        if any(path.startswith(within) for path in paths):
            operations.append(" ".join([event, *(path.removeprefix(within) for path in paths)]))
            if fault:
                fault(len(operations) - 1, event, paths[0])

    sys.addaudithook(hook)


def _path(value: Any, base: int) -> str:
    """Absolute; empty for an open file."""
    if not isinstance(value, str | bytes | os.PathLike):
        return ""
    return os.path.join(os.getcwd() if base < 0 else os.readlink(f"/proc/self/fd/{base}"), os.fsdecode(value))


def contents(directory: Path) -> dict[str, bytes]:
    """All files below a directory, but for locks, which the dead leave, and the durations that stages record."""
    paths = (path for path in directory.rglob("*") if path.is_file() and path.suffix != ".lock")
    files = {str(path.relative_to(directory)): path.read_bytes() for path in paths}
    for name in files:
        if name.endswith(("stage.json", "training.json")):
            files[name] = json.dumps(json.loads(files[name]) | {"seconds": None}).encode()
    return files
