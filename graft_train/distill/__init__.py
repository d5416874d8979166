"""`distill`: trains the EAGLE-3 draft head on the target's own answers.

Shape suffixes: S tokens of a packed row, C columns in which drafts start, K unroll steps, N taught
positions, V target vocabulary, D draft vocabulary, H hidden size, E tapped states concatenated; in attention
B batch (always 1), Q query heads, K key/value heads, G queries per key head, D head size, P softmax parts.
"""

import time
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils import set_seed

from graft_inference.errors import GraftError
from graft_inference.heads.eagle3.checkpoint import save_head
from graft_inference.target.model import max_positions
from graft_train.data.samples import Sample, read_samples
from graft_train.data.sharded import count_parameters, held_bytes, whole
from graft_train.data.states import TappedTarget
from graft_train.data.target import load_target, refuse_several_spread, resolve_device, target_path, text_config
from graft_train.distill.batches import Row, hold_out, to_rows, with_room
from graft_train.distill.checkpoint import vocabulary_hash
from graft_train.distill.draft_vocabulary import choose_draft_vocabulary, coverage
from graft_train.distill.estimate import describe, estimate_training, naming_what_to_lower, speed_of
from graft_train.distill.head import head_config, new_head, published_head, share_embeddings
from graft_train.distill.loop import Training, plan_training, start_training, train, validate
from graft_train.distill.measure import held_out_prompts, measure_tau
from graft_train.distill.parallel import make_accelerator
from graft_train.distill.progress import Progress
from graft_train.distill.state_source import StateSource, disk_states, memory_states, online_states
from graft_train.files import write_json
from graft_train.processes import say
from graft_train.stage import fingerprint_of, run_stage

if TYPE_CHECKING:
    from accelerate import Accelerator
    from transformers import PreTrainedModel

    from graft_inference.heads.eagle3.model import DraftHead, DraftHeadConfig
    from graft_train.config import Config

__all__ = ["distill"]


def distill(config: "Config") -> Path:
    """Writes `head/`: the checkpoint, metrics.jsonl and training.json.

    Raises:
        GraftError: no samples or none to train on, a head that this target cannot have, or what stopped the
            training: no memory, no disk, a checkpoint of another head.
    """
    settings = {"head": config.head.decisive(), "dtype": config.target.dtype, "seed": config.seed}
    if config.head.init_from and Path(config.head.init_from).expanduser().is_dir():
        settings["init_from"] = fingerprint_of(Path(config.head.init_from).expanduser())

    def build(out: Path) -> None:
        with naming_what_to_lower(config.head):
            _build(config, out)

    return run_stage(config, "distill", "head", settings, ["target", "data"], build, ["checkpoints"])


def _build(config: "Config", out: Path) -> None:
    started, settings = time.perf_counter(), config.head
    accelerator = make_accelerator(settings, resolve_device(config.target.device), out)
    refuse_several_spread(config, accelerator.num_processes)
    target_config = text_config(config)
    samples = read_samples(Path(config.run_dir) / "data" / "samples.jsonl", "train")
    samples = with_room(samples, settings.max_length)
    rows = to_rows(samples, settings.max_length, target_config.vocab_size)
    validation, training_rows = hold_out(samples, min(settings.validation_samples, len(rows) // 10), config.seed)
    _check_positions(rows, max_positions(target_config))
    plan, steps = plan_training(rows, training_rows, settings, config.seed)
    model = load_target(config, settings.shard_target)
    set_seed(config.seed)

    published = published_head(settings.init_from, model) if settings.init_from else None
    shape = published.config if published else head_config(model, settings)
    target = TappedTarget(model, shape.aux_layer_ids)
    head, covered = _head(published, shape, target, [samples[row] for row in training_rows])
    say(
        f"distill: {len(training_rows)} samples, head of {sum(p.numel() for p in head.parameters()):,} "
        f"parameters on layers {list(head.config.aux_layer_ids)}, "
        f"draft vocabulary {len(head.target_ids)} ({covered:.2%} of the answers' tokens)"
    )
    _announce(config, accelerator, head, model, rows, plan, steps)
    source = _source(config, target, rows, accelerator)
    training = start_training(accelerator, head, target, source, rows, settings, config.seed)
    prompts = held_out_prompts(target, rows, validation, settings.measure_prompts, settings.measure_tokens)
    if prompts:
        training.measure = partial(
            measure_tau, accelerator, target, head, prompts, settings.ttt_steps, settings.measure_tokens
        )
    progress = Progress(accelerator, settings, out)
    try:
        train(training, plan, steps, out, progress)
        result = validate(training, validation).metrics() if validation else None
        measured = training.measure() if training.measure else None
    finally:
        progress.end()
    if result is not None:
        say(
            f"distill: {len(validation)} held-out rows: acceptance length {result.acceptance_length:.2f} as a chain of "
            f"{settings.ttt_steps}, acceptance by step " + " ".join(f"{a:.2f}" for a in result.acceptance)
        )
    if measured is not None:
        say(f"distill: {len(prompts)} held-out prompts decoded with chains: acceptance length {measured:.2f}")
    summary = {
        "steps": steps,
        "samples": len(training_rows),
        "coverage": covered,
        "draft_vocabulary": vocabulary_hash(head),
        "validation_samples": len(validation),
        "validation": asdict(result) if result else None,
        "measured_acceptance_length": measured,
        "seconds": round(time.perf_counter() - started, 1),
    }
    _finish(training, out, summary)


def _check_positions(rows: list[Row], limit: int) -> None:
    """Raises GraftError where a sample is longer than the target is served with: there its RoPE may change."""
    longest = max(len(row.tokens_S) for row in rows)
    if longest > limit:
        raise GraftError(
            f"the longest sample has {longest} tokens, and the target {limit} positions: set head.max_length={limit}"
        )


def _head(
    published: "DraftHead | None", shape: "DraftHeadConfig", target: TappedTarget, samples: list[Sample]
) -> tuple["DraftHead", float]:
    """The head to train, and the share of the answers' tokens that it can propose."""
    if published is not None:
        share_embeddings(published, target)
        return published, coverage(samples, published.target_ids, shape.vocab_size)
    vocabulary = choose_draft_vocabulary(samples, shape.vocab_size, shape.draft_vocab_size)
    return new_head(shape, vocabulary.token_ids_D, target.lm_head_VH), vocabulary.coverage


def _source(config: "Config", target: TappedTarget, rows: list[Row], accelerator: "Accelerator") -> StateSource:
    settings = config.head
    match settings.states:
        case "memory":
            return memory_states(target, rows, settings.batch_tokens)
        case "disk":
            directory, fingerprint = Path(config.run_dir) / "states", fingerprint_of(target_path(config))
            dtype, top = settings.states_dtype, settings.states_top_k
            return disk_states(target, rows, settings.batch_tokens, directory, fingerprint, dtype, accelerator, top)
    return online_states(target)


def _announce(
    config: "Config",
    accelerator: "Accelerator",
    head: "DraftHead",
    model: "PreTrainedModel",
    rows: list[Row],
    plan: list[list[int]],
    steps: int,
) -> None:
    """How full the batches are, and what the training will take."""
    settings = config.head
    tokens = sum(len(rows[row].tokens_S) for batch in plan for row in batch)
    answered = sum(int(rows[row].loss_mask_S.sum()) for batch in plan for row in batch)
    say(
        f"distill: {len(plan)} packed rows of {tokens / len(plan):.0f} tokens on average "
        f"({tokens / len(plan) / settings.batch_tokens:.1%} of head.batch_tokens), 0 % padding"
    )
    estimated = estimate_training(
        head,
        count_parameters(model),
        held_bytes(model),
        settings,
        settings.batches_per_step // accelerator.num_processes,
        answered / tokens,
    )
    dtype = torch.bfloat16 if settings.mixed_precision == "bf16" else torch.float32
    say(describe(estimated, accelerator.device, speed_of(accelerator.device, dtype), steps))


def _finish(training: Training, out: Path, summary: dict[str, Any]) -> None:
    accelerator = training.accelerator
    with whole(training.head.parameters()):
        if accelerator.is_main_process:
            save_head(training.head, out)
    if accelerator.is_main_process:
        write_json(out / "training.json", summary)
    accelerator.wait_for_everyone()
