"""`distill`: trains the EAGLE-3 draft head on the target's own answers.

Shape suffixes: B batch, S sequence, C columns in which drafts start, K unroll steps, N taught positions,
V target vocabulary, D draft vocabulary, H hidden size, E tapped states concatenated; in attention
Q query heads, K key/value heads, D head size, J later steps.
"""

import shutil
import time
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs
from accelerate.state import AcceleratorState
from accelerate.utils import set_seed

from graft_inference.head_checkpoint import save_head
from graft_train.data.samples import read_samples
from graft_train.data.states import TappedTarget
from graft_train.data.target import load_target, resolve_device, target_path
from graft_train.distill.batches import cached_states, online_states, to_rows
from graft_train.distill.draft_vocabulary import choose_draft_vocabulary
from graft_train.distill.head import head_config, new_head
from graft_train.distill.loop import start_training, train, validate
from graft_train.distill.progress import Progress
from graft_train.stage import run_stage, say, write_json

if TYPE_CHECKING:
    from graft_train.config import Config

__all__ = ["distill"]


def distill(config: "Config") -> Path:
    """Writes `head/`: the checkpoint, metrics.jsonl and training.json.

    Raises:
        GraftError: no samples or none to train on, or a head that this target cannot have.
    """
    target, data = target_path(config), Path(config.run_dir) / "data"
    settings = {"head": config.head.decisive(), "dtype": config.target.dtype, "seed": config.seed}
    return run_stage(config, "distill", "head", settings, [target, data], lambda out: _build(config, data, out))


def _build(config: "Config", data: Path, out: Path) -> None:
    started, settings = time.perf_counter(), config.head
    samples = read_samples(data / "samples.jsonl", "train")
    # An earlier stage of this process may have run in another precision, which accelerate keeps for good.
    AcceleratorState._reset_state()
    accelerator = Accelerator(
        cpu=resolve_device(config.target.device).type == "cpu",
        mixed_precision=settings.mixed_precision,
        kwargs_handlers=[DistributedDataParallelKwargs(broadcast_buffers=False)],
    )
    set_seed(config.seed)
    model = load_target(config)
    shape = head_config(model, settings)
    rows = to_rows(samples, settings.max_length, shape.vocab_size)
    held_out = min(settings.validation_samples, len(rows) // 10)
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(config.seed)).tolist()
    validation, training_rows = order[:held_out], order[held_out:]

    vocabulary = choose_draft_vocabulary(
        [samples[row] for row in training_rows], shape.vocab_size, shape.draft_vocab_size
    )
    target = TappedTarget(model, shape.tapped_layers)
    head = new_head(shape, vocabulary.token_ids_D, target.lm_head_VH)
    say(
        f"distill: {len(training_rows)} samples, head of {sum(p.numel() for p in head.parameters()):,} "
        f"parameters on layers {list(shape.tapped_layers)}, "
        f"draft vocabulary {len(vocabulary.token_ids_D)} ({vocabulary.coverage:.2%} of the answers' tokens)"
    )
    cached = settings.cache_states
    source = cached_states(target, rows, settings.batch_tokens) if cached else online_states(target)

    training = start_training(accelerator, head, target, source, rows, settings)
    progress = Progress(settings, out, accelerator.is_main_process)
    try:
        steps = train(training, training_rows, config.seed, out, progress)
        result = validate(training, validation).metrics() if validation else None
    finally:
        progress.end()
    if result is not None:
        say(
            f"distill: {held_out} held-out answers: tau {result.tau:.2f} as a chain of "
            f"{settings.unroll_steps}, acceptance by step " + " ".join(f"{a:.2f}" for a in result.acceptance)
        )
    if accelerator.is_main_process:
        save_head(training.head, out)
        summary = {
            "steps": steps,
            "samples": len(training_rows),
            "coverage": vocabulary.coverage,
            "validation_samples": held_out,
            "validation": asdict(result) if result else None,
            "seconds": round(time.perf_counter() - started, 1),
        }
        write_json(out / "training.json", summary)
        shutil.rmtree(out / "checkpoints", ignore_errors=True)
    accelerator.wait_for_everyone()
