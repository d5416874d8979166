"""In which dtype, and with how many threads, a CPU runs the target fastest: measured once for each run."""

import gc
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from graft_inference.errors import GraftError
from graft_inference.files import read_json
from graft_inference.target.kv_cache import TreeCache
from graft_inference.target.model import Target
from graft_inference.target.packed_linear import pack_target
from graft_train.config import Config
from graft_train.config.target import MEASURED, TargetConfig
from graft_train.data.target import load_target, resolve_device
from graft_train.device import describe_device
from graft_train.files import write_json
from graft_train.processes import say
from graft_train.stage import fingerprints_of, run_stage

DIRECTORY = "arithmetic"
FILE = "arithmetic.json"
DTYPES = ("float32", "bfloat16")
ROWS = (1, 8)
"""Of a pass of plain decoding, and of one that verifies a small tree."""
PROMPT = 64
"""Tokens that a pass sees."""
REPEATS, SECONDS = 15, 5.0
"""Most passes of a kind, and most of the time that they get."""


def with_dtype(config: Config, inputs: Sequence[str] = ()) -> Config:
    """The same configuration, with a dtype where it was left to be measured, and that many threads in this process.

    Every stage that loads the target begins with it.

    Args:
        inputs: of the stage; one that is missing is told before the target is loaded.

    Raises:
        GraftError: a stage is missing, no target, no such device, or what was measured is damaged.
    """
    if config.target.dtype != MEASURED:
        return config
    if resolve_device(config.target.device).type != "cpu":
        return replace(config, target=replace(config.target, dtype="bfloat16"))
    fingerprints_of(config, [name for name in inputs if name != "target"])
    given = {"threads": config.threads}
    made = run_stage(
        config,
        "measure",
        DIRECTORY,
        given,
        ["target"],
        lambda out: _build(config.target, config.threads, out),
        alone=True,
    )
    found = _read(made / FILE)
    torch.set_num_threads(found["threads"])
    return replace(config, target=replace(config.target, dtype=found["dtype"]))


def measured_arithmetic(run_dir: Path) -> dict[str, Any]:
    """What was measured for a run, for reports; empty where its dtype was not left to be."""
    file = run_dir / DIRECTORY / FILE
    return _read(file) if file.exists() else {}


def _read(file: Path) -> dict[str, Any]:
    remedy = f"delete {file.parent} to have it measured again"
    found = read_json(file, remedy)
    threads = found.get("threads")
    if found.get("dtype") not in DTYPES or type(threads) is not int or threads < 1 or "measured" not in found:
        raise GraftError(f"{file} is damaged: {remedy}")
    return found


def _build(settings: TargetConfig, threads: int | None, out: Path) -> None:
    before = torch.get_num_threads()
    counts = [threads] if threads else _thread_counts()
    times: list[dict[str, Any]] = []
    try:
        for dtype in DTYPES:
            times += _passes(replace(settings, dtype=dtype, tp_plan=None), counts)
            gc.collect()  # a large target is held once at a time
    finally:
        torch.set_num_threads(before)
    best = fastest(times)
    say(f"measure: {best['dtype']} with {best['threads']} threads: {_in_words(best['milliseconds'])} for a pass")
    device = {name: value for name, value in describe_device(torch.device("cpu")).items() if name != "threads"}
    write_json(out / FILE, {"dtype": best["dtype"], "threads": best["threads"], "device": device, "measured": times})


def fastest(times: list[dict[str, Any]]) -> dict[str, Any]:
    """The kind whose passes take least together; float32 and more threads where there is nothing between them."""
    return min(times, key=lambda one: sum(one["milliseconds"].values()))


def _thread_counts() -> list[int]:
    """What torch would choose, half of it and a quarter: memory may be slow for more, and hyperthreads share a core."""
    most = torch.get_num_threads()
    return sorted({max(1, most // part) for part in (1, 2, 4)}, reverse=True)


def _passes(settings: TargetConfig, thread_counts: list[int]) -> Iterator[dict[str, Any]]:
    """Milliseconds of a pass by its rows, for each number of threads, of the target, packed as served."""
    model = load_target(settings)
    target = Target(model)
    pack_target(target)
    cache = target.new_cache(PROMPT + max(ROWS))
    with torch.inference_mode():
        target.prefill(torch.zeros(PROMPT, dtype=torch.long), cache)
        for threads in thread_counts:
            torch.set_num_threads(threads)
            milliseconds = {str(rows): least_milliseconds(partial(_pass, target, cache, rows)) for rows in ROWS}
            yield {"dtype": settings.dtype, "threads": threads, "milliseconds": milliseconds}


def _pass(target: Target, cache: TreeCache, rows: int) -> None:
    target.prefill(torch.zeros(rows, dtype=torch.long), cache)
    cache.rewind(PROMPT)


def least_milliseconds(run: Callable[[], None], clock: Callable[[], float] = time.perf_counter) -> float:
    """The least time of several runs: other work only ever adds to it. The first one warms up."""
    run()
    times: list[float] = []
    started = clock()
    while len(times) < REPEATS and (not times or clock() - started < SECONDS):
        before = clock()
        run()
        times.append(clock() - before)
    return round(1e3 * min(times), 3)


def _in_words(milliseconds: dict[str, float]) -> str:
    return ", ".join(f"{value:.1f} ms of {rows} rows" for rows, value in milliseconds.items())
