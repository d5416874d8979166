"""`distill`: trains a draft head on the target's own answers.

What a family of heads has of its own (shape, loss, metrics) is a folder with a `Strategy`; everything else here
works for any of them. Shape suffixes: S tokens of a packed batch, C columns in which drafts start, K draft steps,
N taught positions, V target vocabulary, D draft vocabulary, H hidden size, E aux hidden states concatenated; in
attention B batch (always 1), Q query heads, K key/value heads, G queries per key head, D head size, P softmax parts.
"""

import time
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils import set_seed

from graft_inference.errors import GraftError
from graft_inference.target.model import max_positions
from graft_train.arithmetic import with_dtype
from graft_train.data.samples import read_samples
from graft_train.data.sharded import whole
from graft_train.data.states import PackedTarget
from graft_train.data.target import load_target, refuse_several_spread, resolve_device, target_path, text_config
from graft_train.distill.batches import TokenSample, hold_out, to_tensors, with_room
from graft_train.distill.estimate import describe, estimate_training, naming_what_to_lower, speed_of
from graft_train.distill.families import FAMILIES
from graft_train.distill.loop import Training, plan_training, start_training, train, validate
from graft_train.distill.measure import held_out_prompts, measure_acceptance
from graft_train.distill.parallel import make_accelerator
from graft_train.distill.progress import Progress
from graft_train.distill.state_source import StateSource, disk_states, memory_states, online_states, states_directory
from graft_train.files import write_json
from graft_train.head_files import head_writer
from graft_train.hub import PUSHED, HeadPusher, check_repo_id
from graft_train.processes import is_main, say
from graft_train.stage import fingerprint_of, run_stage

if TYPE_CHECKING:
    from accelerate import Accelerator

    from graft_train.config import Config

__all__ = ["distill"]


def distill(config: "Config") -> Path:
    """Writes `head/`: the checkpoint, metrics.jsonl and training.json.

    Raises:
        GraftError: no samples or none to train on, a head that this target cannot have, or what stopped the
            training: no memory, no disk, a checkpoint of another head.
    """
    if config.head.push_every:
        check_repo_id(config.export.repo_id, f"head.push_every={config.head.push_every}")
    inputs = ["target", "data"]
    config = with_dtype(config, inputs)
    settings = {"head": config.head.decisive(), "dtype": config.target.dtype, "seed": config.seed}
    if config.head.init_from and Path(config.head.init_from).expanduser().is_dir():
        settings["init_from"] = fingerprint_of(Path(config.head.init_from).expanduser())

    def build(out: Path) -> None:
        with naming_what_to_lower(config.head):
            _build(config, out)

    return run_stage(config, "distill", "head", settings, inputs, build, ["checkpoints"])


def _build(config: "Config", out: Path) -> None:
    started, settings = time.perf_counter(), config.head
    accelerator = make_accelerator(settings, resolve_device(config.target.device), out)
    refuse_several_spread(config.target, accelerator.num_processes)
    target_config = text_config(config.target)
    texts = read_samples(Path(config.run_dir) / "data" / "samples.jsonl", "train")
    texts = with_room(texts, settings.max_length)
    samples = to_tensors(texts, settings.max_length, target_config.vocab_size)
    held_out, chosen = hold_out(texts, min(settings.validation_samples, len(samples) // 10), config.seed)
    _check_positions(samples, max_positions(target_config))
    plan, steps = plan_training(samples, chosen, settings, config.seed)
    model = load_target(config.target, settings.shard_target)
    set_seed(config.seed)

    strategy = FAMILIES[settings.family](model, [texts[number] for number in chosen], settings)
    size = sum(parameter.numel() for parameter in strategy.head.parameters())
    say(
        f"distill: {len(chosen)} samples, {settings.family} head of {size:,} parameters on layers "
        f"{list(strategy.target.aux_layer_ids)}, draft vocabulary {len(strategy.head.target_ids)} "
        f"({strategy.coverage:.2%} of the answers' tokens)"
    )
    source = _source(config, strategy.target, samples, accelerator)
    training = start_training(accelerator, strategy, source, samples, settings, config.seed)
    _announce(training, plan, steps)
    prompts = _measure(training, [samples[number] for number in held_out])
    pusher = _pusher(config, out) if settings.push_every else None
    if pusher is not None:
        training.push = lambda step: pusher.offer(step, strategy.served_head())
    progress = Progress(accelerator, settings, out)
    try:
        train(training, plan, steps, out, progress)
        pushed = pusher.finish(steps, strategy.served_head()) if pusher is not None else None
        result = validate(training, held_out).metrics() if held_out else None
        measured = training.measure() if training.measure else None
    finally:
        progress.end()
    if result is not None:
        say(
            f"distill: {len(held_out)} held-out samples: acceptance length {result.acceptance_length:.2f} as a chain "
            f"of {strategy.steps}, acceptance by step " + " ".join(f"{a:.2f}" for a in result.acceptance)
        )
    if measured is not None:
        say(f"distill: {prompts} held-out prompts decoded with chains: acceptance length {measured:.2f}")
    summary = {
        "steps": steps,
        "samples": len(chosen),
        "coverage": strategy.coverage,
        "draft_vocabulary": strategy.identity()["draft_vocabulary"],
        "validation_samples": len(held_out),
        "validation": asdict(result) if result else None,
        "measured_acceptance_length": measured,
        "pushed": pushed,
        "seconds": round(time.perf_counter() - started, 1),
    }
    _finish(training, out, summary)


def _check_positions(samples: list[TokenSample], limit: int) -> None:
    """Raises GraftError where a sample is longer than the target is served with: there its RoPE may change."""
    longest = max(len(sample.tokens_S) for sample in samples)
    if longest > limit:
        raise GraftError(
            f"the longest sample has {longest} tokens, and the target {limit} positions: set head.max_length={limit}"
        )


def _source(
    config: "Config", target: PackedTarget, samples: list[TokenSample], accelerator: "Accelerator"
) -> StateSource:
    """Where the states come from. Takes the whole configuration: the run, the target's place and the head's section."""
    settings = config.head
    match settings.states:
        case "memory":
            return memory_states(target, samples, settings.batch_tokens)
        case "disk":
            directory, fingerprint = states_directory(config.run_dir), fingerprint_of(target_path(config.target))
            dtype, top = settings.states_dtype, settings.states_top_k
            return disk_states(target, samples, settings.batch_tokens, directory, fingerprint, dtype, accelerator, top)
    return online_states(target)


def _measure(training: Training, held_out: list[TokenSample]) -> int:
    """Sets the measurement in the engine; the number of prompts."""
    settings, strategy, plan = training.settings, training.strategy, training.strategy.measured_plan()
    tokens = settings.measure_tokens
    prompts = held_out_prompts(strategy.target, held_out, settings.measure_prompts, tokens)
    if prompts:
        training.measure = partial(measure_acceptance, training.accelerator, strategy, plan, prompts, tokens)
    return len(prompts)


def _pusher(config: "Config", out: Path) -> HeadPusher:
    """Takes the whole configuration: the target's place, and the repository in the bundle's section."""
    if config.head.resume == "never" and is_main():
        (out / PUSHED).unlink(missing_ok=True)
    return HeadPusher(out, config.export, head_writer(config.target))


def _announce(training: Training, plan: list[list[int]], steps: int) -> None:
    """How full the micro-batches are, and what the training will take."""
    settings, samples, accelerator = training.settings, training.samples, training.accelerator
    tokens = sum(len(samples[number].tokens_S) for batch in plan for number in batch)
    answered = sum(int(samples[number].loss_mask_S.sum()) for batch in plan for number in batch)
    say(
        f"distill: {len(plan)} packed batches of {tokens / len(plan):.0f} tokens on average "
        f"({tokens / len(plan) / settings.batch_tokens:.1%} of head.batch_tokens), 0 % padding"
    )
    per_device = settings.batches_per_step // accelerator.num_processes
    estimated = estimate_training(training.strategy, settings, per_device, answered / tokens)
    dtype = torch.bfloat16 if settings.mixed_precision == "bf16" else torch.float32
    say(describe(estimated, accelerator.device, speed_of(accelerator.device, dtype), steps))


def _finish(training: Training, out: Path, summary: dict[str, Any]) -> None:
    accelerator = training.accelerator
    with whole(training.strategy.head.parameters()):
        if accelerator.is_main_process:
            training.strategy.save(out)
    if accelerator.is_main_process:
        write_json(out / "training.json", summary)
    accelerator.wait_for_everyone()
