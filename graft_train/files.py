"""Files of a run: never half written, made by one process at a time, and told in one line where a disk refuses."""

import errno
import fcntl
import json
import os
import re
import shutil
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from graft_inference.errors import GraftError
from graft_inference.files import replace_file

FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
DENIED = {errno.EROFS, errno.EACCES, errno.EPERM}
IDENTITY = "identity.json"
"""Of a training's checkpoint: which head it is of."""
LOCKLESS = {errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOTSUP, errno.ENOSYS}
"""What file systems that know no locks answer."""


def write_text(path: Path, text: str) -> None:
    """A reader sees the old file or the new one, never half of one."""
    replace_file(path, lambda aside: aside.write_text(text, encoding="utf-8"))


def write_json(path: Path, value: Any) -> None:
    """See `write_text`."""
    write_text(path, json.dumps(value, indent=2, sort_keys=True) + "\n")


def remove(path: Path) -> None:
    """A file, or a directory with all that is in it, where there is one."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def sweep(directory: Path) -> None:
    """Removes what a kill left half written: hidden files, as `replace_file` and safetensors make them."""
    for path in directory.glob(".*"):
        remove(path)


def sync_tree(directory: Path) -> None:
    for path in directory.rglob("*"):
        if not path.is_symlink():  # wandb's may lead nowhere
            sync(path)
    sync(directory)


def sync(path: Path) -> None:
    """Returns when a file or directory has reached the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def only_one(directory: Path, waits: bool = False) -> Iterator[None]:
    """While the block runs, no other process is in one for the same directory. Death ends it, however it comes.

    A file system without locks keeps nobody out.

    Args:
        waits: for another process to end; without it that is an error.

    Raises:
        GraftError: another process is in its block; names it.
    """
    path = directory.with_name(f".{directory.name}.lock")
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor = _locked(path, directory, waits)
    try:
        with suppress(OSError):  # the lock holds without it, and on a full disk too
            os.ftruncate(descriptor, 0)
            os.write(descriptor, f"process {os.getpid()} on {socket.gethostname()}".encode())
        yield
    finally:
        with suppress(OSError):
            path.unlink()
        os.close(descriptor)


def _locked(path: Path, directory: Path, waits: bool) -> int:
    """A descriptor of the lock file, which whoever held it may remove between its opening and its locking."""
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if waits else fcntl.LOCK_NB))
        except BlockingIOError:
            holder = os.read(descriptor, 200).decode(errors="replace") or "which has just begun"
            os.close(descriptor)
            raise GraftError(
                f"another process is at work on {directory} ({holder}): wait for it, end it, or use another run_dir"
            ) from None
        except OSError as error:
            if error.errno not in LOCKLESS:
                os.close(descriptor)
                raise
        with suppress(FileNotFoundError):
            if os.path.samestat(path.stat(), os.fstat(descriptor)):
                return descriptor
        os.close(descriptor)


@contextmanager
def told(directory: Path) -> Iterator[None]:
    """Tells in one line what a disk refuses while a stage works in `directory`.

    Raises:
        GraftError: a full or read-only disk, or whatever else is wrong with a path of the run; names path and remedy.
    """
    try:
        yield
    except GraftError:
        raise
    except Exception as error:  # torch, tokenizers and safetensors have kinds of their own
        message = _refusal(error, directory)
        if message is None:
            raise
        kept = f"; what was done is kept in {directory}" if directory.is_dir() else ""
        raise GraftError(f"{message}{kept}") from error


def _refusal(error: Exception, directory: Path) -> str | None:
    """What a disk refused and what helps; None for any other error."""
    code = _errno(error)
    if code is None:
        return None
    reason, run_dir = os.strerror(code), directory.absolute().parent
    named = getattr(error, "filename2", None) or getattr(error, "filename", None)  # where it was copied to, if it was
    path = Path(os.fsdecode(named)) if isinstance(named, str | bytes | os.PathLike) else directory
    own = path.absolute() == run_dir or run_dir in path.absolute().parents or path.absolute() in run_dir.parents
    elsewhere = ", or use another run_dir" if own else ""
    if code in FULL:
        return f"{path}: {reason}; free some space and run the same command again{elsewhere}"
    if code in DENIED:
        return f"{path}: {reason}; give this user the right to read and write it{elsewhere}"
    if named and own:
        return f"{path}: {reason}; see what is there and whether something else changed it{elsewhere}"
    return None


def _errno(error: Exception) -> int | None:
    if isinstance(error, OSError):
        return error.errno
    if re.search(r"inline_container\.cc.*(unexpected pos|failed writing)", str(error)):  # torch.save
        return errno.ENOSPC
    found = re.search(r"\(os error (\d+)\)", str(error))  # what is written in Rust
    return int(found[1]) if found else None
