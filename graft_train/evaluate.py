"""`evaluate`: every method on the same held-out prompts, in one interleaved run, against one engine."""

import time
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from tqdm import tqdm
from transformers import AutoModelForCausalLM

from graft_inference import METHODS, GenerationStats, GraftEngine
from graft_train.data.samples import Sample, read_samples
from graft_train.data.target import DTYPES, resolve_device, target_path
from graft_train.device import describe_device
from graft_train.export import write_card
from graft_train.report import draw, print_table, to_markdown
from graft_train.stage import run_stage, write_json

if TYPE_CHECKING:
    from graft_train.config import Config

BOOTSTRAP = 2000


@dataclass(slots=True, kw_only=True)
class EvaluateConfig:
    """What is measured.

    Attributes:
        prompts: held-out prompts; all of them are checked for losslessness.
        max_new_tokens: per prompt and method.
        temperature: of the timed runs; losslessness is checked greedily.
        repeats: timed runs of every prompt with every method; the median counts.
    """

    prompts: int = 80
    max_new_tokens: int = 512
    temperature: float = 0.0
    repeats: int = 5


@dataclass
class Run:
    """One timed generation: its statistics, and the wall time around it."""

    stats: GenerationStats
    wall_seconds: float


def evaluate(config: "Config") -> Path:
    """Writes `evaluation/` (evaluation.json, report.md, report.png) and renews the bundle's model card."""
    run_dir = Path(config.run_dir)
    inputs = [target_path(config), run_dir / "data", run_dir / "bundle"]
    settings = {**asdict(config.evaluation), "seed": config.seed, "dtype": config.target.dtype}
    directory = run_stage(config, "evaluate", "evaluation", settings, inputs, lambda out: _build(config, out))
    print((directory / "report.md").read_text(encoding="utf-8").split("\n## ")[0])
    return directory


def _build(config: "Config", out: Path) -> None:
    settings, run_dir = config.evaluation, Path(config.run_dir)
    samples = read_samples(run_dir / "data" / "samples.jsonl", "evaluation")[: settings.prompts]
    engine = GraftEngine.from_pretrained(
        run_dir / "bundle", target_path(config), str(resolve_device(config.target.device)), config.target.dtype
    )
    runs = _interleaved(engine, samples, settings, config.seed)
    evaluation = {
        "methods": {name: _summary(runs[name], runs["autoregressive"]) for name in METHODS},
        **_losslessness(config, samples),
        "device": describe_device(engine.target.device),
        "settings": {
            **settings_facts(config, samples),
            "plans": {name: asdict(engine.policy.plan(name)) for name in METHODS},
        },
    }
    write_json(out / "evaluation.json", evaluation)
    (out / "report.md").write_text(to_markdown(evaluation), encoding="utf-8")
    draw(evaluation, out / "report.png")
    print_table(evaluation)
    write_card(run_dir / "bundle", evaluation)


def settings_facts(config: "Config", samples: list[Sample]) -> dict[str, Any]:
    """What a fair table states beside its figures."""
    lengths = [len(sample.prompt_ids) for sample in samples]
    return {
        **asdict(config.evaluation),
        "prompts": len(samples),
        "prompt_tokens": [min(lengths), max(lengths)],
        "dtype": config.target.dtype,
        "batch": 1,
        "attention": "scaled_dot_product_attention",
        "graphs": False,
        "matrix": "built from the training split; every request starts from it anew and updates its own copy",
    }


def _interleaved(
    engine: GraftEngine, samples: list[Sample], settings: EvaluateConfig, seed: int
) -> dict[str, list[list[Run]]]:
    """Timed runs by method, prompt and repeat. The order of methods turns with every prompt and repeat."""
    runs: dict[str, list[list[Run]]] = {name: [[] for _ in samples] for name in METHODS}
    prompts = [torch.tensor(sample.prompt_ids) for sample in samples]
    for name in METHODS:  # warm-up
        engine.generate(prompts[0], settings.max_new_tokens, settings.temperature, name, seed)
    total = settings.repeats * len(samples) * len(METHODS)
    with tqdm(total=total, desc="evaluate: speed", unit="run") as bar:
        for repeat in range(settings.repeats):
            for index, prompt in enumerate(prompts):
                turn = (index + repeat) % len(METHODS)
                order = METHODS[turn:] + METHODS[:turn]
                for name in order if repeat % 2 else reversed(order):
                    start = time.perf_counter()
                    out = engine.generate(prompt, settings.max_new_tokens, settings.temperature, name, seed + index)
                    runs[name][index].append(Run(out.stats, time.perf_counter() - start))
                    bar.update()
    return runs


def _summary(runs: list[list[Run]], baseline: list[list[Run]]) -> dict[str, Any]:
    """Sum of tokens over sum of each prompt's median decode time; ratios with a bootstrap over prompts."""
    tokens, seconds = _tokens(runs), _seconds(runs)
    speed = tokens.sum() / seconds.sum()
    ratios = _speedups(runs, baseline)
    every = [run.stats for prompt in runs for run in prompt]
    rounds = sum(stats.rounds for stats in every)
    phases: Counter[str] = Counter()
    accepted: Counter[str] = Counter()
    stages: Counter[str] = Counter()
    for stats in every:
        phases.update(stats.seconds)
        accepted.update(stats.accepted)
        stages.update(stats.stages)
    prefill = phases.pop("prefill")
    wall = sum(run.wall_seconds for prompt in runs for run in prompt)
    return {
        "tokens_per_second": float(speed),
        "speedup": float(speed / (_tokens(baseline).sum() / _seconds(baseline).sum())),
        "speedup_interval": [float(bound) for bound in np.percentile(ratios, [2.5, 97.5])],
        "tau": sum(stats.emitted - 1 for stats in every) / max(rounds, 1),
        "ms_per_round": {name: 1e3 * seconds / max(rounds, 1) for name, seconds in phases.items()},
        "prefill_ms": 1e3 * prefill / len(every),
        "accepted_per_round": {name: count / max(rounds, 1) for name, count in accepted.items()},
        "stages": dict(sorted(stages.items())),
        "time_outside_phases": float(1 - (sum(phases.values()) + prefill) / wall),
    }


def _tokens(runs: list[list[Run]]) -> np.ndarray:
    """Decoded tokens per prompt; the prefill's own token is not among them."""
    return np.array([prompt[0].stats.emitted - 1 for prompt in runs], dtype=float)


def _seconds(runs: list[list[Run]]) -> np.ndarray:
    """Median decode time per prompt."""
    return np.array([np.median([run.stats.decode_seconds for run in prompt]) for prompt in runs])


def _speedups(runs: list[list[Run]], baseline: list[list[Run]]) -> np.ndarray:
    """Bootstrap sample of the speed-up: prompts drawn anew, the same ones for both sides."""
    columns = [_tokens(runs), _seconds(runs), _tokens(baseline), _seconds(baseline)]
    chosen = np.random.default_rng(0).integers(len(runs), size=(BOOTSTRAP, len(runs)))
    tokens, seconds, base_tokens, base_seconds = (column[chosen].sum(axis=1) for column in columns)
    return (tokens / seconds) / (base_tokens / base_seconds)


def _losslessness(config: "Config", samples: list[Sample]) -> dict[str, Any]:
    """Greedy fp32 output of every method against transformers' own `generate` on an untouched model."""
    settings, device = config.evaluation, resolve_device(config.target.device)
    path = target_path(config)
    reference = AutoModelForCausalLM.from_pretrained(path, dtype=DTYPES["float32"]).to(device).eval()
    engine = GraftEngine.from_pretrained(Path(config.run_dir) / "bundle", path, str(device), "float32")
    divergences: dict[str, list[dict[str, Any]]] = {name: [] for name in METHODS}
    for sample in tqdm(samples, desc="evaluate: losslessness", unit="prompt"):
        prompt = torch.tensor([sample.prompt_ids], device=device)
        expected = reference.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=settings.max_new_tokens,
            do_sample=False,
            pad_token_id=0,
        )[0]
        for name in METHODS:
            found = engine.generate(prompt, settings.max_new_tokens, method=name).sequences[0]
            if found.tolist() != expected.tolist():
                divergences[name].append(_divergence(reference, sample.id, expected, found))
    return {
        "lossless": {name: not found for name, found in divergences.items()},
        "divergences": {name: found for name, found in divergences.items() if found},
    }


@torch.inference_mode()
def _divergence(reference: Any, identity: str, expected: torch.Tensor, found: torch.Tensor) -> dict[str, Any]:
    """Where two outputs part, and by how much the target preferred its choice there."""
    shared = min(len(expected), len(found))
    differs = (expected[:shared] != found[:shared]).nonzero()
    position = int(differs[0]) if len(differs) else shared
    top = reference(expected[None, :position]).logits[0, -1].topk(2).values
    return {"prompt": identity, "position": position, "top2_margin": float(top[0] - top[1])}
