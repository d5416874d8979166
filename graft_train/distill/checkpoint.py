"""Checkpoints of the training: written aside and renamed, the newest few kept, only one's own resumed from."""

import shutil
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from safetensors import SafetensorError

from graft_inference.errors import GraftError
from graft_inference.files import read_json
from graft_train.distill.parallel import zero_stage
from graft_train.files import DENIED, IDENTITY, sync_tree, write_json
from graft_train.processes import is_of_lost_process


def save_checkpoint(accelerator: Accelerator, identity: dict[str, Any], directory: Path, step: int, keep: int) -> None:
    """Writes what accelerate saves (weights, optimizers, each rank's RNG); the step is in the directory's name.

    Args:
        identity: of the head, see `Strategy.identity`.

    Raises:
        GraftError: it could not be written, as on a full disk. The checkpoints before it are as they were.
    """
    final = directory / f"step-{step:08d}"
    aside = directory / f"{final.name}.partial"
    try:
        accelerator.save_state(str(aside))
        accelerator.wait_for_everyone()
        if accelerator.is_main_process:
            write_json(aside / IDENTITY, identity | _launch(accelerator))
            sync_tree(aside)
    except (OSError, RuntimeError, SafetensorError) as error:
        shutil.rmtree(aside, ignore_errors=True)
        if getattr(error, "errno", None) in DENIED or is_of_lost_process(error):
            raise  # `run_stage` knows what helps
        found = checkpoints(directory)
        kept = f"{found[-1].name} is intact" if found else "there was none before it"
        raise GraftError(
            f"cannot save the checkpoint {final} ({error}); {kept}. Free some space, or lower "
            "head.keep_checkpoints, and run the same command again: it goes on from there"
        ) from error
    if accelerator.is_main_process:
        aside.replace(final)
        for old in checkpoints(directory)[:-keep]:
            shutil.rmtree(old)
    accelerator.wait_for_everyone()


def resume_checkpoint(accelerator: Accelerator, identity: dict[str, Any], directory: Path, resume: str) -> int:
    """Loads the last whole checkpoint. Returns the steps it had done; 0 without one.

    Raises:
        GraftError: it is another head's, or of a DeepSpeed launch that this one cannot take over.
    """
    if accelerator.is_main_process and directory.exists():
        if resume == "never":  # hidden first, so that a kill leaves no half of a checkpoint to resume from
            shutil.rmtree(directory.replace(directory.with_name(f".{directory.name}")))
        for torn in directory.glob("*.partial"):
            shutil.rmtree(torn)
    accelerator.wait_for_everyone()
    found = checkpoints(directory)
    if not found:
        return 0
    _check(found[-1], identity, _launch(accelerator))
    accelerator.load_state(str(found[-1]))
    return int(found[-1].name.removeprefix("step-"))


def checkpoints(directory: Path) -> list[Path]:
    """Whole checkpoints, oldest first."""
    return sorted(path for path in directory.glob("step-*") if path.suffix != ".partial")


def _launch(accelerator: Accelerator) -> dict[str, Any]:
    return {"zero_stage": zero_stage(accelerator), "processes": accelerator.num_processes}


def _check(checkpoint: Path, identity: dict[str, Any], launch: dict[str, Any]) -> None:
    own = identity | launch
    found = read_json(checkpoint / IDENTITY, f"{checkpoint} is no checkpoint of a head: delete it")
    if missing := own.keys() - found.keys():
        raise GraftError(f"{checkpoint} is no checkpoint of a head (it lacks {', '.join(sorted(missing))}); delete it")
    differing = [name for name in own if found[name] != own[name]]
    for name in identity:
        if name in differing:
            raise GraftError(
                f"{checkpoint} belongs to another head: its {name} is {found[name]}, not {own[name]}. Use another "
                "run_dir, or head.resume=never to start again"
            )
    if differing == ["processes"] and not own["zero_stage"]:
        return
    if differing:
        raise GraftError(
            f"{checkpoint} was written by {found['processes']} processes at ZeRO stage {found['zero_stage']}; this is "
            f"{own['processes']} at stage {own['zero_stage']}. Under ZeRO each process holds its own share of the "
            "optimizer, which fits the same launch only: use it, or head.resume=never to start again"
        )
