"""A stage: one directory of the run, built once, resumed when interrupted, reused while nothing changed."""

import hashlib
import json
import os
import platform
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers

from graft_inference.errors import GraftError
from graft_inference.files import read_json
from graft_train.config import Config
from graft_train.data.target import target_path
from graft_train.files import IDENTITY, only_one, remove, sweep, sync, sync_tree, told, write_json
from graft_train.processes import barrier, is_main, naming_lost_processes, say

RECIPE_OF = {
    "data": "regenerate",
    "head": "distill, or graft adopt,",
    "corpus": "build_corpus",
    "policy": "calibrate",
    "bundle": "export",
    "evaluation": "evaluate",
}
RECORD = "stage.json"
SMALL_FILES = (".json", ".jinja", ".model", ".txt")
"""Of a checkpoint: its shape, its tokenizer with chat template, its generation settings."""
LONGEST = 120
"""Minutes that a stage of the main process alone may take."""
SAMPLED, SAMPLE_BYTES = 16, 1 << 16
"""Places of a file of weights that are read, and how far."""


def run_stage(
    config: Config,
    name: str,
    directory: str,
    settings: dict[str, Any],
    inputs: Sequence[str],
    build: Callable[[Path], None],
    scratch: Sequence[str] = (),
    alone: bool = False,
) -> Path:
    """Builds `{run_dir}/{directory}`, or reuses it when it was built from the same settings and inputs.

    `build` works in `{run_dir}/{directory}.partial`, which outlives an interruption, so that a stage can
    resume inside it; the directory gets its name only when it is complete. One process (or one launch of several)
    builds a directory at a time.

    Args:
        settings: everything that decides the result, as JSON values.
        inputs: directories of earlier stages of this run, by name; `target` is whichever the configuration names.
        scratch: what `build` may leave in its directory to resume from; removed once nothing is to be built.
        alone: the main process builds it, and the others of its launch wait: of what comes before they know each other.

    Raises:
        GraftError: an input is missing, the directory was made from other settings or inputs, or another process
            builds it; nothing is touched then. Or the disk refuses what is written, or another process of the launch
            has ended.
    """
    final = Path(config.run_dir) / directory
    with naming_lost_processes(), told(_partial(final)):
        record = _record(name, settings, fingerprints_of(config, inputs))
        if _matches(final, record):
            say(f"{name}: reusing {final}")
        elif is_main():
            with only_one(final):
                _lead(final, record, build, scratch)
        elif alone:
            _wait_for(lambda: _matches(final, record), f"finish {final}", LONGEST)
        elif _is_begun(final, record):
            build(_partial(final))
            barrier()
            barrier()
    return final


def _lead(final: Path, record: dict[str, Any], build: Callable[[Path], None], scratch: Sequence[str]) -> None:
    """What the main process does for a stage; the others of its launch build, and meet it at two barriers."""
    name, partial = record["stage"], _partial(final)
    if _matches(final, record):  # another process has just finished it
        return
    if _matches(partial, record) and "seconds" in _read_record(partial / RECORD):
        _finish(final, scratch)  # that alone was interrupted
        say(f"{name}: finished {final}")
        return
    partial.mkdir(exist_ok=True)
    sweep(partial)
    write_json(partial / RECORD, record)
    say(f"{name}: building {final}")
    started = time.perf_counter()
    build(partial)
    barrier()
    seconds = round(time.perf_counter() - started, 1)
    write_json(partial / RECORD, record | {"seconds": seconds, "versions": _versions()})
    _finish(final, scratch)
    say(f"{name}: finished {final} in {seconds} s")
    barrier()


def _finish(final: Path, scratch: Sequence[str]) -> None:
    for path in scratch:
        remove(_partial(final) / path)
    sync_tree(_partial(final))
    _partial(final).rename(final)
    sync(final.parent)


def _partial(final: Path) -> Path:
    return final.with_name(f"{final.name}.partial")


def fingerprints_of(config: Config, inputs: Sequence[str]) -> dict[str, str]:
    """Of inputs by name, see `run_stage`. A missing stage is told before a target is downloaded."""
    found = {name: _fingerprint_of_stage(Path(config.run_dir) / name) for name in inputs if name != "target"}
    return found | ({"target": fingerprint_of(target_path(config.target))} if "target" in inputs else {})


def _fingerprint_of_stage(directory: Path) -> str:
    """What the record of an earlier stage says. A head or a bundle without one is none of this run's."""
    recipe = f"run graft {RECIPE_OF[directory.name]} with the same run_dir first"
    if not directory.exists():
        raise GraftError(f"{directory} is missing; {recipe}")
    if not (directory / RECORD).is_file():
        raise GraftError(
            f"{directory} was not made by a stage (no {RECORD}): put that back, or move it away and {recipe}"
        )
    return str(_read_record(directory / RECORD)["fingerprint"])


def fingerprint_of(directory: Path) -> str:
    """Identity of a model: where a stage made it its record's, of a user's own one made from its files.

    Raises:
        GraftError: there is none.
    """
    if (directory / RECORD).is_file():
        return str(_read_record(directory / RECORD)["fingerprint"])
    if (directory / "config.json").is_file() or (directory / IDENTITY).is_file():
        return _fingerprint_of_model(directory)
    raise GraftError(f"there is no model in {directory} (no config.json)")


def _record(name: str, settings: dict[str, Any], fingerprints: dict[str, str]) -> dict[str, Any]:
    # Through JSON and back, so that it compares equal to what is read from a file.
    settings = json.loads(json.dumps(settings))
    canonical = json.dumps([name, settings, fingerprints], sort_keys=True)
    return {
        "stage": name,
        "settings": settings,
        "inputs": fingerprints,
        "fingerprint": hashlib.sha256(canonical.encode()).hexdigest()[:16],
    }


def _matches(directory: Path, record: dict[str, Any]) -> bool:
    """Whether `directory` is there and was made for `record`; an error if it was made for another."""
    if not os.path.lexists(directory):
        return False
    if directory.suffix == ".partial" and _is_blank(directory):
        return False
    if not (directory / RECORD).is_file():
        raise GraftError(f"{directory} was not made by a stage (no {RECORD}); move it away or use another run_dir")
    found = _read_record(directory / RECORD)
    if found["fingerprint"] == record["fingerprint"]:
        return True
    raise GraftError(
        f"{directory} was made with other settings: {_difference(found, record)}. Use another run_dir, or "
        f"delete {directory} (and what was built from it) to build it anew"
    )


def _is_blank(partial: Path) -> bool:
    """Whether it was interrupted, or stopped by a mistake that other settings mend, before its first write."""
    return all(path.name == RECORD or path.name.startswith(".") for path in partial.iterdir())


def _difference(found: dict[str, Any], wanted: dict[str, Any]) -> str:
    if found.get("stage") != wanted["stage"]:
        return f"by graft {found.get('stage')}, not by graft {wanted['stage']}"
    old = _flat({"settings": found.get("settings"), "input": found.get("inputs")})
    new = _flat({"settings": wanted["settings"], "input": wanted["inputs"]})
    keys = sorted(key for key in old.keys() | new.keys() if old.get(key) != new.get(key))
    pairs = (f"{key.removeprefix('settings.')}: {old.get(key)} -> {new.get(key)}" for key in keys)
    return ", ".join(pairs)


def _flat(value: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(value, dict):
        return {prefix: value}
    nested = (_flat(item, f"{prefix}.{key}" if prefix else key) for key, item in value.items())
    return {key: item for part in nested for key, item in part.items()}


def _read_record(path: Path) -> dict[str, Any]:
    remedy = f"delete {path.parent} and build it anew"
    record = read_json(path, remedy)
    if not isinstance(record.get("fingerprint"), str):
        raise GraftError(f"{path} is damaged: it has no fingerprint; {remedy}")
    return record


def _fingerprint_of_model(directory: Path) -> str:
    """Hash of a checkpoint's small files and of samples of its weights; reading 100 GB to be sure is not worth it.

    A training's checkpoint may have its weights in a directory of their own, as DeepSpeed writes them.
    """
    digest = hashlib.sha256()
    weights = "*.safetensors" if any(directory.glob("*.safetensors")) else "*.bin"
    shares = set(directory.glob("*/*.pt") if (directory / IDENTITY).is_file() else ())
    for path in sorted([*directory.iterdir(), *shares]):
        if path.suffix in SMALL_FILES:
            digest.update(path.name.encode() + path.read_bytes())
        # Of what is consolidated there is a second copy, which a cache may hold or not.
        elif path in shares or (path.match(weights) and not path.match("consolidated*")):
            size = path.stat().st_size
            digest.update(f"{path.name}{size}".encode())
            with path.open("rb") as file:
                for place in range(SAMPLED):
                    file.seek(place * size // SAMPLED)
                    digest.update(file.read(SAMPLE_BYTES))
    return digest.hexdigest()[:16]


def _versions() -> dict[str, str]:
    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    return {"python": platform.python_version(), **versions}


def _is_begun(final: Path, record: dict[str, Any]) -> bool:
    """Waits for the main process, which alone judges what is there: whether there is something to build with it."""

    def is_building() -> bool:
        path = _partial(final) / RECORD
        found = _read_record(path) if path.exists() else {}
        return found.get("fingerprint") == record["fingerprint"] and "seconds" not in found

    _wait_for(lambda: _matches(final, record) or is_building(), f"begin {final}", 10)
    return not _matches(final, record)


def _wait_for(happens: Callable[[], bool], what: str, minutes: int) -> None:
    """Raises GraftError unless the main process does that in time."""
    for _ in range(600 * minutes):
        if happens():
            return
        time.sleep(0.1)
    raise GraftError(f"the main process did not {what} within {minutes} minutes; see its output")
