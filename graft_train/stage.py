"""A stage: one directory of the run, built once, resumed when interrupted, reused while nothing changed."""

import hashlib
import json
import os
import platform
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import transformers

from graft_inference.errors import GraftError
from graft_train.data.target import target_path

if TYPE_CHECKING:
    from graft_train.config import Config

RECIPE_OF = {
    "target": "pretrain_target",
    "data": "regenerate",
    "head": "distill",
    "corpus": "build_corpus",
    "policy": "calibrate",
    "bundle": "export",
    "evaluation": "evaluate",
}
RECORD = "stage.json"
SMALL_FILES = (".json", ".jinja", ".model", ".txt")
"""Of a checkpoint: its shape, its tokenizer with chat template, its generation settings."""
SAMPLED, SAMPLE_BYTES = 16, 1 << 16
"""Places of a file of weights that are read, and how far."""


def run_stage(
    config: "Config",
    name: str,
    directory: str,
    settings: dict[str, Any],
    inputs: Sequence[str],
    build: Callable[[Path], None],
) -> Path:
    """Builds `{run_dir}/{directory}`, or reuses it when it was built from the same settings and inputs.

    `build` works in `{run_dir}/{directory}.partial`, which outlives an interruption, so that a stage can
    resume inside it; the directory gets its name only when it is complete.

    Args:
        settings: everything that decides the result, as JSON values.
        inputs: directories of earlier stages of this run, by name; `target` is whichever the configuration names.

    Raises:
        GraftError: an input is missing, or the directory was made from other settings or inputs. Nothing
            is touched then.
    """
    final = Path(config.run_dir) / directory
    partial = final.with_name(f"{directory}.partial")
    record = _record(name, settings, fingerprints_of(config, inputs))
    if _matches(final, record):
        say(f"{name}: reusing {final}")
        return final
    if is_main():
        _matches(partial, record)
        partial.mkdir(parents=True, exist_ok=True)
        write_json(partial / RECORD, record)
    else:
        _await(partial / RECORD, record["fingerprint"])
    say(f"{name}: building {final}")
    started = time.perf_counter()
    build(partial)
    barrier()
    if is_main():
        seconds = round(time.perf_counter() - started, 1)
        write_json(partial / RECORD, record | {"seconds": seconds, "versions": _versions()})
        sync_tree(partial)
        partial.rename(final)
        _sync(final.parent)
        say(f"{name}: finished {final} in {seconds} s")
    barrier()
    return final


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


def write_json(path: Path, value: Any) -> None:
    """Writes aside and renames, so that a reader sees the old file or the new one, never half of one."""
    aside = path.with_name(f"{path.name}.new")
    with aside.open("w", encoding="utf-8") as file:
        json.dump(value, file, indent=2, sort_keys=True)
        file.write("\n")
        file.flush()
        os.fsync(file.fileno())
    aside.replace(path)


def fingerprints_of(config: "Config", inputs: Sequence[str]) -> dict[str, str]:
    """Of inputs by name, see `run_stage`. A missing stage is told before a target is downloaded."""
    found = {name: fingerprint_of(Path(config.run_dir) / name) for name in inputs if name != "target"}
    return found | ({"target": fingerprint_of(target_path(config))} if "target" in inputs else {})


def fingerprint_of(directory: Path) -> str:
    """Identity of an input: of a stage its record's, of a user's own target one made from its files.

    Raises:
        GraftError: the directory is missing; names the recipe that makes it.
    """
    if (directory / RECORD).is_file():
        return _read_record(directory / RECORD)["fingerprint"]
    if (directory / "config.json").is_file():
        return _fingerprint_of_model(directory)
    recipe = RECIPE_OF.get(directory.name, "pretrain_target")
    or_else = ", or set target.name_or_path" if recipe == "pretrain_target" else ""
    raise GraftError(f"{directory} is missing; run recipes/{recipe}.py with the same run_dir first{or_else}")


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
    if not directory.exists():
        return False
    if directory.suffix == ".partial" and {path.name for path in directory.iterdir()} <= {RECORD}:
        return False  # interrupted, or stopped by a mistake that other settings mend, before its first write
    if not (directory / RECORD).is_file():
        raise GraftError(f"{directory} was not made by a stage (no {RECORD}); move it away or use another run_dir")
    found = _read_record(directory / RECORD)
    if found["fingerprint"] == record["fingerprint"]:
        return True
    raise GraftError(
        f"{directory} was made with other settings: {_difference(found, record)}. Use another run_dir, or "
        f"delete {directory} (and what was built from it) to build it anew"
    )


def _difference(found: dict[str, Any], wanted: dict[str, Any]) -> str:
    old = _flat({"settings": found.get("settings"), "input": found.get("inputs")})
    new = _flat({"settings": wanted["settings"], "input": wanted["inputs"]})
    keys = sorted(key for key in old.keys() | new.keys() if old.get(key) != new.get(key))
    pairs = (f"{key.removeprefix('settings.')}: {old.get(key)} -> {new.get(key)}" for key in keys)
    return ", ".join(pairs) or "another stage"


def _flat(value: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(value, dict):
        return {prefix: value}
    nested = (_flat(item, f"{prefix}.{key}" if prefix else key) for key, item in value.items())
    return {key: item for part in nested for key, item in part.items()}


def _read_record(path: Path) -> dict[str, Any]:
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        return record | {"fingerprint": str(record["fingerprint"])}
    except (ValueError, KeyError, TypeError) as error:
        raise GraftError(f"{path} is damaged ({error}); delete {path.parent} and build it anew") from error


def _fingerprint_of_model(directory: Path) -> str:
    """Hash of a checkpoint's small files and of samples of its weights; reading 100 GB to be sure is not worth it."""
    digest = hashlib.sha256()
    weights = "*.safetensors" if any(directory.glob("*.safetensors")) else "*.bin"
    for path in sorted(directory.iterdir()):
        if path.suffix in SMALL_FILES:
            digest.update(path.name.encode() + path.read_bytes())
        elif path.match(weights) and not path.match("consolidated*"):  # a second copy, which a cache may hold or not
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


def _await(path: Path, fingerprint: str) -> None:
    """Until the main process has written this record: it alone judges what is there, and may be at it."""
    for _ in range(6000):
        if path.exists() and _read_record(path)["fingerprint"] == fingerprint:
            return
        time.sleep(0.1)
    raise GraftError(f"the main process did not make {path} within ten minutes; see its output")


def barrier() -> None:
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.barrier()


def sync_tree(directory: Path) -> None:
    for path in directory.rglob("*"):
        _sync(path)
    _sync(directory)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)
