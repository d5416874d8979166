"""The training loop: from an untrained head to a trained one, resumable at every checkpoint."""

import math
import shutil
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from tqdm import tqdm

from graft_inference import GraftError
from graft_inference.draft_head import DraftHead
from graft_train.data.states import TappedTarget, TargetStates
from graft_train.distill.batches import Batch, Row, StateSource, collate, pack, plan_batches
from graft_train.distill.config import HeadTrainConfig
from graft_train.distill.loss import StepSums, TaughtPositions, distillation_loss, taught_positions
from graft_train.distill.progress import Progress
from graft_train.distill.unroll import unroll


class Distiller(nn.Module):
    """Head, unroll and loss behind one forward, as data-parallel wrappers want it.

    Args:
        lm_head_VH: the target's.
    """

    teacher_DH: Tensor

    def __init__(self, head: DraftHead, lm_head_VH: Tensor, steps: int) -> None:
        super().__init__()
        self.head = head
        self.steps = steps
        self.register_buffer("teacher_DH", lm_head_VH[head.target_ids.to(lm_head_VH.device)], persistent=False)

    def forward(
        self,
        embedding_BSH: Tensor,
        states: TargetStates,
        taught: TaughtPositions,
        first: int,
        coefficient_K: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """The loss and `StepSums.stack()` of one batch."""
        dtype = self.head.fc.weight.dtype
        outputs = unroll(self.head, embedding_BSH.to(dtype), states.taps_BSE.to(dtype), self.steps, first)
        loss, sums = distillation_loss(self.head, outputs, states.final_BSH, self.teacher_DH, taught, coefficient_K)
        return loss, sums.stack()


@dataclass
class Prepared:
    """A batch with the target's states, ready for the head."""

    batch: Batch
    states: TargetStates
    taught: TaughtPositions


@dataclass
class Training:
    """What training needs to go on: everything but the weights follows from the step's number."""

    accelerator: Accelerator
    distiller: nn.Module
    optimizer: torch.optim.Optimizer
    target: TappedTarget
    source: StateSource
    rows: list[Row]
    settings: HeadTrainConfig

    @property
    def head(self) -> DraftHead:
        return self.accelerator.unwrap_model(self.distiller).head

    def prepare(self, chosen: list[int]) -> Prepared:
        batch = collate(self.rows, chosen, self.accelerator.device)
        states = self.source(batch)
        kept_V = getattr(self.head, "t2d", None)
        taught = taught_positions(
            batch.answer_BS,
            states.choice_BS,
            kept_V,
            self.settings.unroll_steps,
            self.settings.skip_out_of_vocabulary,
        )
        return Prepared(batch, states, taught)

    def run(self, prepared: Prepared, coefficient_K: Tensor) -> tuple[Tensor, Tensor]:
        embedding_BSH = self.target.embed(prepared.batch.tokens_BS)
        return self.distiller(embedding_BSH, prepared.states, prepared.taught, prepared.batch.first, coefficient_K)


def start_training(
    accelerator: Accelerator,
    head: DraftHead,
    target: TappedTarget,
    source: StateSource,
    rows: list[Row],
    settings: HeadTrainConfig,
) -> Training:
    distiller = Distiller(head, target.lm_head_VH, settings.unroll_steps).to(accelerator.device)
    optimizer = torch.optim.AdamW(
        distiller.parameters(), lr=settings.learning_rate, betas=(0.9, 0.95), weight_decay=0.0
    )
    distiller, optimizer = accelerator.prepare(distiller, optimizer)
    return Training(accelerator, distiller, optimizer, target, source, rows, settings)


def train(training: Training, chosen: list[int], seed: int, out: Path, progress: Progress) -> int:
    """Trains on the chosen rows, from the last checkpoint in `out` if there is one.

    Returns:
        Optimizer steps of the whole training.

    Raises:
        GraftError: fewer batches than one optimizer step takes.
    """
    settings, accelerator = training.settings, training.accelerator
    subset = [training.rows[row] for row in chosen]
    plan = [
        [chosen[row] for row in batch] for batch in plan_batches(subset, settings.batch_tokens, settings.epochs, seed)
    ]
    per_step = settings.gradient_accumulation * accelerator.num_processes
    total = min(len(plan) // per_step, settings.max_steps or math.inf)
    if total < 1:
        raise GraftError(
            f"{len(chosen)} samples make {len(plan)} batches, fewer than the {per_step} of one optimizer "
            "step: lower head.batch_tokens or head.gradient_accumulation, or regenerate more"
        )
    total = int(total)
    first = _resume(training, out / "checkpoints")
    progress.begin(first, total)
    training.distiller.train()
    for step in range(first, total):
        started = time.perf_counter()
        batches = plan[step * per_step + accelerator.process_index : (step + 1) * per_step : accelerator.num_processes]
        rate = learning_rate(step, total, settings)
        sums, tokens = train_step(training, batches, rate)
        progress.log(step + 1, sums, rate, tokens, time.perf_counter() - started)
        if (step + 1) % settings.checkpoint_every == 0 and step + 1 < total:
            _checkpoint(training, out / "checkpoints", step + 1)
    return total


def train_step(training: Training, batches: list[list[int]], rate: float) -> tuple[StepSums, int]:
    """One optimizer step over this process's batches.

    Every position trained in the whole step, of all batches and processes, weighs the same, however
    unequal their counts: hence the counts come first.

    Returns:
        Sums over all processes, and the answer tokens behind them.
    """
    accelerator, settings = training.accelerator, training.settings
    prepared = [training.prepare(chosen) for chosen in batches]
    trained_K = torch.stack([one.taught.trained_NK.sum(0) for one in prepared]).sum(0)
    trained_K = accelerator.reduce(trained_K, "sum")
    decay_K = settings.step_decay ** torch.arange(settings.unroll_steps, device=trained_K.device)
    # Data-parallel gradients are means over the processes, and this is a sum.
    coefficient_K = decay_K / trained_K.clamp(min=1) * accelerator.num_processes

    for group in training.optimizer.param_groups:
        group["lr"] = rate
    sums_5K = torch.zeros(5, settings.unroll_steps, dtype=torch.float64, device=trained_K.device)
    for one in prepared:
        if one is prepared[-1]:
            loss, batch_sums_5K = training.run(one, coefficient_K)
            accelerator.backward(loss)
        else:
            with accelerator.no_sync(training.distiller):
                loss, batch_sums_5K = training.run(one, coefficient_K)
                accelerator.backward(loss)
        sums_5K += batch_sums_5K
    accelerator.clip_grad_norm_(training.distiller.parameters(), settings.clip)
    training.optimizer.step()
    training.optimizer.zero_grad()
    tokens = torch.tensor(float(sum(one.batch.tokens for one in prepared)), device=sums_5K.device)
    return StepSums.unstack(accelerator.reduce(sums_5K, "sum")), int(accelerator.reduce(tokens, "sum"))


def learning_rate(step: int, total: int, settings: HeadTrainConfig) -> float:
    """Linear warm-up, then a cosine that would reach zero at step `total`."""
    warmup = max(1, round(settings.warmup_share * total))
    if step < warmup:
        return settings.learning_rate * (step + 1) / warmup
    return settings.learning_rate * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, total - warmup)))


@torch.no_grad()
def validate(training: Training, chosen: list[int]) -> StepSums:
    """Teacher-forced loss and acceptance on rows that were not trained on. Every process measures all."""
    settings = training.settings
    training.distiller.eval()
    by_length = sorted(chosen, key=lambda row: len(training.rows[row].tokens_S))
    coefficient_K = torch.ones(settings.unroll_steps, device=training.accelerator.device)
    sums_5K = torch.zeros(5, settings.unroll_steps, dtype=torch.float64, device=coefficient_K.device)
    batches = pack(training.rows, by_length, settings.batch_tokens)
    for batch in tqdm(batches, desc="validate", leave=False, disable=not training.accelerator.is_main_process):
        sums_5K += training.run(training.prepare(batch), coefficient_K)[1]
    return StepSums.unstack(sums_5K)


def _checkpoint(training: Training, directory: Path, step: int) -> None:
    """What accelerate saves (weights, optimizer, RNG), aside and then renamed; the step is in the name."""
    accelerator = training.accelerator
    final = directory / f"step-{step:08d}"
    aside = directory / f"{final.name}.partial"
    accelerator.save_state(str(aside))
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        aside.replace(final)
        for old in _checkpoints(directory)[: -training.settings.keep_checkpoints]:
            shutil.rmtree(old)
    accelerator.wait_for_everyone()


def _resume(training: Training, directory: Path) -> int:
    """Loads the last whole checkpoint. Returns the steps it had done; 0 without one."""
    accelerator = training.accelerator
    if accelerator.is_main_process and directory.exists():
        if training.settings.resume == "never":
            shutil.rmtree(directory)
        for torn in directory.glob("*.partial"):
            shutil.rmtree(torn)
    accelerator.wait_for_everyone()
    found = _checkpoints(directory)
    if not found:
        return 0
    accelerator.load_state(str(found[-1]))
    return int(found[-1].name.removeprefix("step-"))


def _checkpoints(directory: Path) -> list[Path]:
    """Whole checkpoints, oldest first."""
    return sorted(path for path in directory.glob("step-*") if path.suffix != ".partial")
