"""Where a batch's target states come from: the target itself, host memory, or shards on disk.

On disk: `index.json` and `shard-NNNNN.safetensors` with `aux`, `choice`, and either `final` or `top_ids` and
`top_logits` of some samples, one behind the other, read memory-mapped. The index names the target (its tokenizer
included) and the samples they are of, and each one's shard and place; it is written last, so that what has an
index is whole.
"""

import hashlib
import os
import shutil
from collections.abc import Callable
from itertools import chain
from pathlib import Path
from typing import Any

import psutil
import torch
from accelerate import Accelerator
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

from graft_inference.errors import GraftError
from graft_inference.files import read_json, replace_file
from graft_train.data.states import PackedTarget, TargetStates
from graft_train.distill.batches import PackedBatch, TokenSample, pack
from graft_train.distill.shards import Place, Shards, shard_path, widths_of
from graft_train.files import remove, sweep, sync_tree, told, write_json
from graft_train.processes import say

StateSource = Callable[[PackedBatch], TargetStates]
INDEX = "index.json"
LARGEST_INDEX = 1 << 30
"""Bytes."""
SHARD_TOKENS = 1 << 15
PARTS = {
    "aux": "aux_SE",
    "choice": "choice_S",
    "final": "final_SH",
    "top_ids": "top_ids_SM",
    "top_logits": "top_logits_SM",
}
"""Of a shard, and of `TargetStates`."""


def online_states(target: PackedTarget) -> StateSource:
    """Runs the target over every batch."""
    return lambda batch: target.states(batch.tokens_S, batch.lengths)


def memory_states(target: PackedTarget, samples: list[TokenSample], batch_tokens: int) -> StateSource:
    """Runs the target once over all samples and keeps what it made of them in host memory.

    The batches of this pass are fixed, so that the states are the same to the bit when training resumes.

    Raises:
        GraftError: more than the memory holds.
    """
    needed = _stored_bytes(target, samples, target.model.dtype) * int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    free = psutil.virtual_memory().available
    if needed > free:
        raise GraftError(
            f"the target's states need {needed / 2**30:.1f} GiB of memory, all processes of this machine together, and "
            f"{free / 2**30:.1f} are free: set head.states=disk or online"
        )
    memory = torch.device("cpu")
    cache: dict[int, TargetStates] = {}
    for chosen in tqdm(_packs(samples, range(len(samples)), batch_tokens), desc="states", unit="batch", leave=False):
        states, start = _run(target, samples, chosen).to(memory), 0
        for number in chosen:
            cache[number] = states.slice(start, start + len(samples[number].tokens_S))
            start += len(samples[number].tokens_S)
    return lambda batch: TargetStates.cat([cache[number] for number in batch.samples]).to(batch.tokens_S.device)


def disk_states(
    target: PackedTarget,
    samples: list[TokenSample],
    batch_tokens: int,
    directory: Path,
    fingerprint: str,
    dtype: str | None,
    accelerator: Accelerator,
    top: int | None = None,
) -> StateSource:
    """Writes what the target makes of all samples to `directory`, unless it is there, and reads it from there.

    Every process writes its share of the shards; one that is there whole is not written again. Any number of
    processes reads them.

    Args:
        fingerprint: of the target's directory.
        dtype: of what is stored; None: the target's.
        top: so many best logits are stored in place of the final states.

    Raises:
        GraftError: the states there are of another target, tokenizer or samples, the disk is too small, or `top` is
            more than there is.
    """
    stored, known = stored_dtype(dtype, target.model.dtype), target.config.vocab_size
    check_top(top, known)
    identity = identity_of(fingerprint, samples, target.aux_layer_ids, stored, top)
    partial = directory.with_name(f"{directory.name}.partial")
    if not (directory / INDEX).exists():
        if directory.exists() and any(directory.iterdir()):  # nothing can be put in its place once it is made
            raise GraftError(f"{directory} has no {INDEX}, so it is damaged; delete it to make the states anew")
        with told(partial):
            _write(target, samples, batch_tokens, partial, identity, stored, accelerator, top)
        if accelerator.is_main_process:
            sync_tree(partial)
            partial.rename(directory)
        accelerator.wait_for_everyone()
    places = _read_index(directory, identity, samples)
    shards = Shards(directory, places, stored, widths_of(target.config.hidden_size, len(target.aux_layer_ids), top))

    def read(number: int) -> TargetStates:
        parts = {PARTS[name]: part for name, part in shards.read(places[number], known).items()}
        return TargetStates(**parts).map(lambda tensor: _as(tensor, target.model.dtype, torch.long))

    return lambda batch: TargetStates.cat([read(number) for number in batch.samples]).to(batch.tokens_S.device)


def states_directory(run_dir: str) -> Path:
    """Where a run's states are: beside the samples, where `regenerate.states` kept them, else `{run_dir}/states`."""
    kept = Path(run_dir) / "data" / "states"
    return kept if (kept / INDEX).is_file() else Path(run_dir) / "states"


def stored_dtype(name: str | None, of_target: torch.dtype) -> torch.dtype:
    return getattr(torch, name) if name else of_target


def check_top(top: int | None, known: int) -> None:
    """Raises GraftError for more logits than the target has."""
    if top is not None and top > known:
        raise GraftError(f"head.states_top_k={top} is more than the {known} tokens of the target; lower it")


def identity_of(
    fingerprint: str, samples: list[TokenSample], aux_layer_ids: tuple[int, ...], dtype: torch.dtype, top: int | None
) -> dict[str, Any]:
    """What states are of, as their index says it. Arguments as `disk_states`."""
    return {
        "target": fingerprint,
        "samples": hash_of(samples),
        "aux_layer_ids": list(aux_layer_ids),
        "dtype": str(dtype).removeprefix("torch."),
        "top_k": top,
    }


def _packs(samples: list[TokenSample], chosen: Any, batch_tokens: int) -> list[list[int]]:
    return pack([len(sample.tokens_S) for sample in samples], list(chosen), batch_tokens)


def _run(target: PackedTarget, samples: list[TokenSample], chosen: list[int], top: int | None = None) -> TargetStates:
    tokens_S = torch.cat([samples[number].tokens_S for number in chosen]).to(target.model.device)
    return target.states(tokens_S, [len(samples[number].tokens_S) for number in chosen], top)


def _as(tensor: Tensor, real: torch.dtype, whole: torch.dtype) -> Tensor:
    return tensor.to(real if tensor.is_floating_point() else whole)


def _write(
    target: PackedTarget,
    samples: list[TokenSample],
    batch_tokens: int,
    partial: Path,
    identity: dict[str, Any],
    dtype: torch.dtype,
    accelerator: Accelerator,
    top: int | None,
) -> None:
    shards = _packs(samples, range(len(samples)), max(SHARD_TOKENS, batch_tokens))
    if accelerator.is_main_process:
        _check_disk(target, samples, partial, dtype, top)
        begun, cut = partial / "identity.json", identity | {"shards": shards}
        if not begun.exists() or read_json(begun, f"delete {partial}", LARGEST_INDEX) != cut:
            remove(partial)  # a kill may have left shards of another cut without what says so
        partial.mkdir(parents=True, exist_ok=True)
        sweep(partial)
        write_json(begun, cut)
    accelerator.wait_for_everyone()
    missing = [number for number in range(len(shards)) if not shard_path(partial, number).exists()]
    accelerator.wait_for_everyone()
    mine = missing[accelerator.process_index :: accelerator.num_processes]
    passes = {number: _cut(samples, shards[number], batch_tokens) for number in missing}
    read = missing if target.is_parallel else mine
    for number in tqdm(read, desc="states", unit="shard", disable=not accelerator.is_main_process):
        states = [_run(target, samples, chosen, top) for chosen in passes[number]]
        if number not in mine:
            continue
        save_shard(partial, number, TargetStates.cat([one.to(torch.device("cpu")) for one in states]), dtype)
    if target.is_shared and not target.is_parallel:  # all must run it equally often
        times = [
            sum(len(passes[number]) for number in missing[process :: accelerator.num_processes])
            for process in range(accelerator.num_processes)
        ]
        target.run_idly(max(times) - times[accelerator.process_index])
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        lengths = [len(sample.tokens_S) for sample in samples]
        write_json(partial / INDEX, identity | {"shards": shards, "lengths": lengths})
    accelerator.wait_for_everyone()


def save_shard(directory: Path, number: int, states: TargetStates, dtype: torch.dtype) -> None:
    """Raises GraftError for states that are not finite in this dtype."""
    path = shard_path(directory, number)
    stored = vars(states.map(lambda tensor: _as(tensor, dtype, torch.int32)))
    tensors = {name: stored[part] for name, part in PARTS.items() if stored[part] is not None}
    if not all(bool(tensor.isfinite().all()) for tensor in tensors.values()):
        raise GraftError(
            f"the target's states of {path.stem} are not finite in {str(dtype).removeprefix('torch.')}: set "
            "head.states_dtype=bfloat16 or float32"
        )
    _save(path, tensors)


def _save(path: Path, tensors: dict[str, Tensor]) -> None:
    replace_file(path, lambda aside: save_file(tensors, str(aside)))


def _cut(samples: list[TokenSample], chosen: list[int], batch_tokens: int) -> list[list[int]]:
    """The samples of a shard in their order, cut into what the target reads at a time."""
    batches: list[list[int]] = [[]]
    used = 0
    for number in chosen:
        used += len(samples[number].tokens_S)
        if batches[-1] and used > batch_tokens:
            batches.append([])
            used = len(samples[number].tokens_S)
        batches[-1].append(number)
    return batches


def _check_disk(
    target: PackedTarget, samples: list[TokenSample], partial: Path, dtype: torch.dtype, top: int | None
) -> None:
    tokens, needed = sum(len(sample.tokens_S) for sample in samples), _stored_bytes(target, samples, dtype, top)
    done = sum(path.stat().st_size for path in partial.glob("*.safetensors"))
    partial.parent.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(partial.parent).free
    say(
        f"distill: target states of {tokens:,} tokens need {needed / 2**30:.2f} GiB on disk; "
        f"{free / 2**30:.1f} are free"
    )
    if needed - done > free:
        raise GraftError(
            f"{partial.parent} has {free / 2**30:.1f} GiB free, but the target states need "
            f"{(needed - done) / 2**30:.1f}: set head.states=online, head.states_dtype=bfloat16, or another run_dir"
        )


def _stored_bytes(target: PackedTarget, samples: list[TokenSample], dtype: torch.dtype, top: int | None = None) -> int:
    """Of the states of all samples, token ids as int32."""
    per_token = bytes_of_token(target.config.hidden_size, len(target.aux_layer_ids), dtype, top)
    return per_token * sum(len(sample.tokens_S) for sample in samples)


def bytes_of_token(hidden: int, aux_layers: int, dtype: torch.dtype, top: int | None) -> int:
    """On disk."""
    predicted = hidden * dtype.itemsize if top is None else top * (dtype.itemsize + 4)
    return aux_layers * hidden * dtype.itemsize + predicted + 4


def _read_index(directory: Path, identity: dict[str, Any], samples: list[TokenSample]) -> list[Place]:
    index = read_index(directory)
    try:
        differing = [f"{name}: {index[name]} -> {identity[name]}" for name in identity if index[name] != identity[name]]
        places = [] if differing else places_of(index, [len(sample.tokens_S) for sample in samples])
    except (ValueError, LookupError, TypeError) as error:
        raise GraftError(f"{directory / INDEX} is damaged ({error}); delete {directory}") from error
    if differing:
        raise GraftError(
            f"the target states in {directory} are stale ({', '.join(differing)}); delete {directory} to make them anew"
        )
    return places


def read_index(directory: Path) -> dict[str, Any]:
    """What a directory of states says of itself. Raises GraftError for a damaged index."""
    return read_json(directory / INDEX, f"delete {directory} to make it anew", LARGEST_INDEX)


def places_of(index: dict[str, Any], lengths: list[int]) -> list[Place]:
    """Each sample's shard, start and end, from an index.

    Args:
        lengths: tokens of the samples.

    Raises:
        ValueError, LookupError, TypeError: an index of other samples, or one that is none.
    """
    shards = index["shards"]
    if index["lengths"] != lengths or sorted(chain.from_iterable(shards)) != list(range(len(lengths))):
        raise ValueError("its samples are others")
    places = [(0, 0, 0)] * len(lengths)
    for shard, chosen in enumerate(shards):
        start = 0
        for number in chosen:
            places[number] = (shard, start, start + lengths[number])
            start += lengths[number]
    return places


def hash_of(samples: list[TokenSample]) -> str:
    digest = hashlib.sha256()
    for sample in samples:
        digest.update(len(sample.tokens_S).to_bytes(8, "little") + sample.tokens_S.numpy().tobytes())
    return digest.hexdigest()[:16]
