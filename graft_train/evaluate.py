"""`evaluate`: every method on the same held-out prompts, in one interleaved run, against one engine."""

import gc
import hashlib
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from tqdm import tqdm
from transformers import GenerationConfig

from graft_inference import METHODS, GenerationStats, GraftEngine, GraftError
from graft_inference.bundle import load_target_model, read_json
from graft_inference.request import end_ids
from graft_inference.target import max_positions
from graft_train.bounds import check_least
from graft_train.data.chat import Chat
from graft_train.data.documents import DataConfig, read_documents
from graft_train.data.prompts import build_prompts, prompt_settings, room_for_prompts
from graft_train.data.samples import Sample, check_room, read_samples
from graft_train.data.sources import is_local
from graft_train.data.target import load_tokenizer, resolve_device, target_path, text_config
from graft_train.device import describe_device
from graft_train.export import write_card
from graft_train.files import write_json, write_text
from graft_train.report import draw, print_table, to_markdown
from graft_train.stage import barrier, is_main, run_stage, say

if TYPE_CHECKING:
    from graft_train.config import Config

BOOTSTRAP = 2000
TIMED = "timed.json"
"""What was timed, from which a check of losslessness that fails goes on."""


@dataclass(slots=True, kw_only=True)
class EvaluateConfig:
    """What is measured.

    Attributes:
        path: a data set that prompts are taken from, as data.path has it, in place of the run's own held-out ones;
            what is found goes to {run_dir}/evaluation-NAME, and onto the bundle's card beside them.
        hub_split: which split of it is read, where it is from the Hub.
        hub_subset: which subset, where it has several.
        prompts: as many as are measured; all of them are checked for losslessness.
        max_new_tokens: per prompt and method.
        temperature: of the timed runs; losslessness is checked greedily.
        repeats: timed runs of every prompt with every method; the median counts.
        governed: graft may narrow its tree or stop speculating where it does not pay, as it does by default.
        check_lossless: compare every method's greedy tokens in fp32, which takes a target of that size, with
            transformers' own.
    """

    path: str | None = None
    hub_split: str = "test"
    hub_subset: str | None = None
    prompts: int = 80
    max_new_tokens: int = 512
    temperature: float = 0.0
    repeats: int = 5
    governed: bool = True
    check_lossless: bool = True

    def __post_init__(self) -> None:
        # The prefill gives the first token.
        check_least("evaluation", self, {"prompts": 1, "max_new_tokens": 2, "repeats": 1})
        if self.temperature < 0:
            raise GraftError(f"evaluation.temperature={self.temperature}: 0 is greedy, more samples")

    @property
    def directory(self) -> str:
        """Where the results go: data sets, their subsets and splits each have a directory of their own."""
        if self.path is None:
            return "evaluation"
        if is_local(self.path):
            path = Path(self.path).expanduser().resolve()
            return f"evaluation-{path.stem}-{hashlib.sha256(str(path).encode()).hexdigest()[:6]}"
        parts = (self.path.replace("/", "-"), self.hub_subset, self.hub_split if self.hub_split != "test" else None)
        return "-".join(["evaluation", *filter(None, parts)])


@dataclass
class Run:
    """One timed generation: its new tokens, its statistics, and the wall time around it."""

    tokens: list[int]
    stats: GenerationStats
    wall_seconds: float


def evaluate(config: "Config") -> Path:
    """Writes `evaluation/` (evaluation.json, report.md, report.png) and renews the bundle's model card.

    Raises:
        GraftError: no prompts, or prompts that the target cannot take; no memory to check losslessness.
    """
    asked = config.evaluation
    settings = {**asdict(asked), "seed": config.seed, "dtype": config.target.dtype}
    del settings["check_lossless"]  # or runs that were timed could not be kept where the check does not fit
    inputs = ["target", "bundle"]
    if asked.path is None:
        inputs.append("data")
    else:
        with _naming(asked):
            settings |= prompt_settings(_data(config))
    directory = run_stage(
        config, "evaluate", asked.directory, settings, inputs, lambda out: _build(config, out), [TIMED]
    )
    if is_main():
        evaluation = read_json(directory / "evaluation.json")
        write_card(Path(config.run_dir) / "bundle", {asked.directory: evaluation})
        print_table(evaluation)
        if config.evaluation.check_lossless and None in evaluation["lossless"].values():
            say(f"evaluate: made with evaluation.check_lossless=false; delete {directory} to have it checked")
    return directory


def _build(config: "Config", out: Path) -> None:
    samples, path = _samples(config), out / TIMED
    if not path.exists():  # else an interrupted check left it
        timed = _timed(config, samples)
        if is_main():
            write_json(path, timed)
        barrier()
    gc.collect()  # hooks and their target hold each other, and a large one is held once at a time
    lossless = _losslessness(config, samples)
    if not is_main():
        return
    timed = read_json(path)
    runs = {name: [[_run_of(run) for run in prompt] for prompt in timed["runs"][name]] for name in METHODS}
    evaluation = {
        "methods": {name: _summary(runs[name], runs["autoregressive"]) for name in METHODS},
        **lossless,
        "device": timed["device"],
        "settings": {
            **settings_facts(config, samples),
            "graphs": timed["graphs"],
            "attention": timed["attention"],
            "repetition": _repetition(samples, runs["autoregressive"]),
            "plans": timed["plans"],
        },
    }
    write_json(out / "evaluation.json", evaluation)
    write_text(out / "report.md", to_markdown(evaluation))
    draw(evaluation, out / "report.png")


def _samples(config: "Config") -> list[Sample]:
    """What the methods are to continue."""
    settings, target_config = config.evaluation, text_config(config)
    positions = max_positions(target_config)
    if settings.path is None:
        held_out = read_samples(Path(config.run_dir) / "data" / "samples.jsonl", "evaluation")[: settings.prompts]
        check_room(held_out, settings.max_new_tokens, positions, "evaluation.max_new_tokens")
        return held_out
    room = room_for_prompts(positions, settings.max_new_tokens, "evaluation.max_new_tokens")
    data, tokenizer = _data(config), load_tokenizer(config)
    with _naming(settings):
        chat = Chat(tokenizer, set(), data.chat_template_kwargs, target_config.vocab_size)
        documents = read_documents(data)
        prompts = build_prompts(documents, chat, data, count=settings.prompts, max_tokens=room, seed=config.seed)
    return [Sample(prompt.id, "evaluation", prompt.ids) for prompt in prompts]


@contextmanager
def _naming(settings: EvaluateConfig) -> Iterator[None]:
    """Errors of reading data name the settings of other stages: here they are these."""
    try:
        yield
    except GraftError as error:
        asked = {name: getattr(settings, name) for name in ("path", "hub_split", "hub_subset", "max_new_tokens")}
        named = ", ".join(f"evaluation.{name}={value}" for name, value in asked.items())
        raise GraftError(f"no prompts by {named}: {error}") from error


def _data(config: "Config") -> DataConfig:
    """How the data set of `evaluation.path` is read."""
    asked = config.evaluation
    return replace(
        config.data,
        path=asked.path,
        hub_split=asked.hub_split,
        hub_subset=asked.hub_subset,
        sources=[],
        limit=None,
        streaming=False,
    )


def _timed(config: "Config", samples: list[Sample]) -> dict[str, Any]:
    """The timed runs, by what and where, as JSON values."""
    settings = config.evaluation
    engine = _engine(config, config.target.dtype, settings.governed)
    runs = _interleaved(engine, samples, settings, config.seed)
    return {
        "device": describe_device(engine.target.device),
        "graphs": engine.captured is not None,
        "attention": engine.target.attention,
        "plans": {name: asdict(engine.policy.plan(name)) for name in METHODS},
        "runs": {name: [[_values_of(run) for run in prompt] for prompt in runs[name]] for name in METHODS},
    }


def _values_of(run: Run) -> dict[str, Any]:
    """As JSON values; `asdict` would count a counter's items."""
    return vars(run) | {"stats": vars(run.stats)}


def _run_of(values: dict[str, Any]) -> Run:
    stats = values["stats"]
    counters = {name: Counter(stats[name]) for name in ("stages", "governed")}
    return Run(values["tokens"], GenerationStats(**(stats | counters)), values["wall_seconds"])


def _engine(config: "Config", dtype: str, governed: bool) -> GraftEngine:
    device = str(resolve_device(config.target.device))
    bundle = Path(config.run_dir) / "bundle"
    engine = GraftEngine.from_pretrained(
        bundle,
        target_path(config),
        device,
        dtype,
        device_map=config.target.device_map,
        tp_plan=config.target.tp_plan,
        governed=governed,
    )
    # A checkpoint's penalties are not its law; where a sequence ends, the engine knows by now.
    engine.target.model.generation_config = GenerationConfig()
    return engine


def settings_facts(config: "Config", samples: list[Sample]) -> dict[str, Any]:
    """What a fair table states beside its figures."""
    lengths = [len(sample.prompt_ids) for sample in samples]
    return {
        **asdict(config.evaluation),
        "path": _shown(config.evaluation.path),
        "prompts": len(samples),
        "prompt_tokens": [min(lengths), max(lengths)],
        "dtype": config.target.dtype,
        "batch": 1,
        "matrix": "built from the training split; every request starts from it anew and updates its own copy",
    }


def _shown(path: str | None) -> str | None:
    """A local file's name alone: what is pushed to the Hub leads nowhere on this machine."""
    return Path(path).name if path and is_local(path) else path


def _repetition(samples: list[Sample], runs: list[list[Run]], length: int = 8) -> float:
    """Share of the answers' windows of `length` tokens that repeat earlier text of the same request.

    Retrieval thrives on repetition, and small targets are prone to it: a reader must know.
    """
    repeats = windows = 0
    for sample, prompt_runs in zip(samples, runs, strict=True):
        text = sample.prompt_ids + prompt_runs[0].tokens
        seen: set[tuple[int, ...]] = set()
        for end in range(length, len(text) + 1):
            window = tuple(text[end - length : end])
            if end - length >= len(sample.prompt_ids):
                windows += 1
                repeats += window in seen
            seen.add(window)
    return repeats / windows if windows else 0.0


def _interleaved(
    engine: GraftEngine, samples: list[Sample], settings: EvaluateConfig, seed: int
) -> dict[str, list[list[Run]]]:
    """Timed runs by method, prompt and repeat. The order of methods turns with every prompt and repeat."""
    runs: dict[str, list[list[Run]]] = {name: [[] for _ in samples] for name in METHODS}
    prompts = [torch.tensor(sample.prompt_ids) for sample in samples]
    for prompt in (min(prompts, key=len), max(prompts, key=len)):  # warms up, the governor too
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


def _summary(runs: list[list[Run]], baseline: list[list[Run]]) -> dict[str, Any]:
    """Sum of tokens over sum of each prompt's median decode time; ratios with a bootstrap over prompts.

    Raises:
        GraftError: the target ended every prompt with its first token.
    """
    typical = [_typical(prompt).stats for prompt in runs]
    rounds = sum(stats.rounds for stats in typical)
    if not rounds:
        raise GraftError("the target ended every evaluation prompt at once: evaluate on other data")
    tokens, seconds = _tokens(runs), _seconds(runs)
    speed = tokens.sum() / seconds.sum()
    ratios = _speedups(runs, baseline)
    phases: Counter[str] = Counter()
    accepted: Counter[str] = Counter()
    stages: Counter[str] = Counter()
    governed: Counter[str] = Counter()
    for stats in typical:
        phases.update(stats.seconds)
        accepted.update(stats.accepted)
        stages.update(stats.stages)
        governed.update(stats.governed)
    prefill = phases.pop("prefill")
    every = [run for prompt in runs for run in prompt]
    wall = sum(run.wall_seconds for run in every)
    same = [ours[0].tokens == theirs[0].tokens for ours, theirs in zip(runs, baseline, strict=True)]
    return {
        "tokens_per_second": float(speed),
        "speedup": float(speed / (_tokens(baseline).sum() / _seconds(baseline).sum())),
        "speedup_interval": [float(bound) for bound in np.nanpercentile(ratios, [2.5, 97.5])],
        "tau": sum(stats.emitted - 1 for stats in typical) / rounds,
        "ms_per_round": {name: 1e3 * seconds / rounds for name, seconds in phases.items()},
        "prefill_ms": 1e3 * prefill / len(typical),
        "accepted_per_round": {name: count / rounds for name, count in accepted.items()},
        "stages": dict(sorted(stages.items())),
        "governed": dict(sorted(governed.items())),
        "same_tokens_as_autoregressive": sum(same) / len(same),
        "time_outside_phases": 1 - sum(sum(run.stats.seconds.values()) for run in every) / wall,
    }


def _typical(repeats: list[Run]) -> Run:
    """The (lower) median by decode time: a real run, so its phases add up to its time."""
    return sorted(repeats, key=lambda run: run.stats.decode_seconds)[(len(repeats) - 1) // 2]


def _tokens(runs: list[list[Run]]) -> np.ndarray:
    """Decoded tokens per prompt; the prefill's own token is not among them."""
    return np.array([_typical(prompt).stats.emitted - 1 for prompt in runs], dtype=float)


def _seconds(runs: list[list[Run]]) -> np.ndarray:
    """Median decode time per prompt."""
    return np.array([_typical(prompt).stats.decode_seconds for prompt in runs])


def _speedups(runs: list[list[Run]], baseline: list[list[Run]]) -> np.ndarray:
    """Bootstrap sample of the speed-up: prompts drawn anew, the same ones for both sides."""
    columns = [_tokens(runs), _seconds(runs), _tokens(baseline), _seconds(baseline)]
    chosen = np.random.default_rng(0).integers(len(runs), size=(BOOTSTRAP, len(runs)))
    tokens, seconds, base_tokens, base_seconds = (column[chosen].sum(axis=1) for column in columns)
    # A prompt that ends at once has no decode time: a resample of such prompts alone says nothing.
    with np.errstate(invalid="ignore", divide="ignore"):
        return (tokens / seconds) / (base_tokens / base_seconds)


def _losslessness(config: "Config", samples: list[Sample]) -> dict[str, Any]:
    """Greedy fp32 output of every method against transformers' own `generate` on an untouched model.

    Raises:
        GraftError: in fp32 the target does not fit the device.
    """
    if not config.evaluation.check_lossless:
        return {"lossless": dict.fromkeys(METHODS), "divergences": {}}
    try:
        return _compared(config, samples)
    except torch.OutOfMemoryError as error:
        raise GraftError(
            f"there is no memory to check losslessness with the target in fp32 ({str(error).partition('. ')[0]}): set "
            "evaluation.check_lossless=false, or target.device_map=auto; the timed runs are kept"
        ) from error


def _compared(config: "Config", samples: list[Sample]) -> dict[str, Any]:
    tokens = config.evaluation.max_new_tokens
    torch.set_float32_matmul_precision("highest")  # TensorFloat-32 parts passes of other widths on near ties
    references = _references(config, samples)
    gc.collect()
    # Not governed: each method's own plan is to be checked, whether it pays in fp32 or not.
    engine = _engine(config, "float32", governed=False)
    divergences: dict[str, list[dict[str, Any]]] = {name: [] for name in METHODS}
    checked = zip(samples, references, strict=True)
    for sample, expected in tqdm(checked, "evaluate: losslessness", len(samples), unit="prompt", disable=not is_main()):
        for name in METHODS:
            found = engine.generate(torch.tensor([sample.prompt_ids]), tokens, method=name).sequences[0].cpu()
            if found.tolist() != expected.tolist():
                divergences[name].append(_divergence(engine, sample.id, expected, found))
    return {
        "lossless": {name: not found for name, found in divergences.items()},
        "divergences": {name: found for name, found in divergences.items() if found},
    }


def _references(config: "Config", samples: list[Sample]) -> list[torch.Tensor]:
    """Greedy fp32 continuations by transformers alone, with their prompts."""
    model, tokenizer = load_target_model(
        target_path(config),
        str(resolve_device(config.target.device)),
        "float32",
        config.target.device_map,
        config.target.tp_plan,
    )
    # generate fills what a call leaves unsaid from the model's own settings: penalties, for instance.
    ends = sorted(end_ids(model, tokenizer))
    model.generation_config = GenerationConfig(eos_token_id=ends or None, pad_token_id=0)
    found = []
    for sample in tqdm(samples, "evaluate: references", unit="prompt", disable=not is_main()):
        prompt = torch.tensor([sample.prompt_ids], device=model.device)
        found.append(
            model.generate(
                prompt,
                attention_mask=torch.ones_like(prompt),
                max_new_tokens=config.evaluation.max_new_tokens,
                do_sample=False,
            )[0].cpu()
        )
    return found


@torch.inference_mode()
def _divergence(engine: GraftEngine, identity: str, expected: torch.Tensor, found: torch.Tensor) -> dict[str, Any]:
    """Where two outputs part, and by how much the target preferred its choice there."""
    shared = min(len(expected), len(found))
    differs = (expected[:shared] != found[:shared]).nonzero()
    position = int(differs[0]) if len(differs) else shared
    with engine.target.own_attention() as model:
        top = model(expected[None, :position].to(engine.target.device)).logits[0, -1].topk(2).values
    return {"prompt": identity, "position": position, "top2_margin": float(top[0] - top[1])}
