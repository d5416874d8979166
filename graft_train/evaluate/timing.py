"""The timed runs: every prompt with every method, in turns."""

import time
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm
from transformers import GenerationConfig

from graft_inference import METHODS, GenerationStats, GraftEngine
from graft_train.config import Config
from graft_train.config.evaluation import EvaluateConfig
from graft_train.data.samples import Sample
from graft_train.data.target import resolve_device, target_path
from graft_train.device import describe_device
from graft_train.processes import is_main


@dataclass
class Run:
    """One timed generation: its new tokens, its statistics, and the wall time around it."""

    tokens: list[int]
    stats: GenerationStats
    wall_seconds: float


def timed(config: Config, samples: list[Sample]) -> dict[str, Any]:
    """The timed runs, by what and where, as JSON values."""
    settings = config.evaluation
    engine = new_engine(config, config.target.dtype, settings.fallback)
    runs = interleaved(engine, samples, settings, config.seed)
    return {
        "device": describe_device(engine.target.device),
        "graphs": engine.captured is not None,
        "attention": engine.target.attention,
        "plans": {name: asdict(engine.policy.plan(name)) for name in METHODS},
        "runs": {name: [[_values_of(run) for run in prompt] for prompt in runs[name]] for name in METHODS},
    }


def interleaved(
    engine: GraftEngine, samples: list[Sample], settings: EvaluateConfig, seed: int
) -> dict[str, list[list[Run]]]:
    """Timed runs by method, prompt and repeat. The order of methods turns with every prompt and repeat."""
    runs: dict[str, list[list[Run]]] = {name: [[] for _ in samples] for name in METHODS}
    prompts = [torch.tensor(sample.prompt_ids) for sample in samples]
    for prompt in (min(prompts, key=len), max(prompts, key=len)):  # warms up, the fallback too
        for name in METHODS:
            engine.generate(prompt, settings.max_new_tokens, settings.temperature, name, seed)
    total = settings.repeats * len(samples) * len(METHODS)
    with tqdm(total=total, desc="evaluate: speed", unit="run", disable=not is_main()) as bar:
        for repeat in range(settings.repeats):
            for index, prompt in enumerate(prompts):
                turn = (index + repeat) % len(METHODS)
                order = METHODS[turn:] + METHODS[:turn]
                for name in order if repeat % 2 else reversed(order):
                    start = time.perf_counter()
                    out = engine.generate(prompt, settings.max_new_tokens, settings.temperature, name, seed + index)
                    wall_seconds = time.perf_counter() - start
                    tokens = out.sequences[0, len(prompt) :].tolist()
                    runs[name][index].append(Run(tokens, out.stats, wall_seconds))
                    bar.update()
    return runs


def new_engine(config: Config, dtype: str, fallback: bool) -> GraftEngine:
    """The run's bundle on its target."""
    return engine_of(config, Path(config.run_dir) / "bundle", dtype, fallback)


def engine_of(config: Config, bundle: Path | None, dtype: str, fallback: bool) -> GraftEngine:
    """A bundle on the run's target; None: prompt lookup alone."""
    device = str(resolve_device(config.target.device))
    engine = GraftEngine.from_pretrained(
        bundle,
        target_path(config.target),
        device,
        dtype,
        device_map=config.target.device_map,
        tp_plan=config.target.tp_plan,
        fallback=fallback,
    )
    # A checkpoint's penalties are not its law; where a sequence ends, the engine knows by now.
    engine.target.model.generation_config = GenerationConfig()
    return engine


def run_of(values: dict[str, Any]) -> Run:
    """What `timed` made JSON values of."""
    stats = values["stats"]
    counters = {name: Counter(stats[name]) for name in ("checkpoints", "fallback")}
    return Run(values["tokens"], GenerationStats(**(stats | counters)), values["wall_seconds"])


def _values_of(run: Run) -> dict[str, Any]:
    """As JSON values; `asdict` would count a counter's items."""
    return vars(run) | {"stats": vars(run.stats)}
