"""The training loop: from an untrained head to a trained one, resumable at every checkpoint."""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from tqdm import tqdm

from graft_inference import GraftError
from graft_inference.heads.eagle3.model import DraftHead
from graft_train.config.head import HeadTrainConfig
from graft_train.data.states import TappedTarget, TargetStates
from graft_train.distill.batches import Batch, Row, collate, pack, plan_batches
from graft_train.distill.checkpoint import resume_checkpoint, save_checkpoint
from graft_train.distill.layout import Layout
from graft_train.distill.loss import (
    StepSums,
    TaughtPositions,
    Teacher,
    distillation_loss,
    final_state_teacher,
    taught_positions,
    top_logits_teacher,
)
from graft_train.distill.optimizer import learning_rate, make_optimizers
from graft_train.distill.progress import Progress
from graft_train.distill.state_source import StateSource
from graft_train.distill.unroll import unroll


class Distiller(nn.Module):
    """Head, unroll and loss behind one forward, as data-parallel wrappers want it.

    Args:
        lm_head_VH: the target's.
    """

    teacher_DH: Tensor

    def __init__(self, head: DraftHead, lm_head_VH: Tensor, steps: int, loss: str) -> None:
        super().__init__()
        self.head = head
        self.steps = steps
        self.loss = loss
        self.register_buffer("teacher_DH", lm_head_VH[head.target_ids.to(lm_head_VH.device)], persistent=False)

    def forward(
        self, embedding_SH: Tensor, states: TargetStates, taught: TaughtPositions, layout: Layout, coefficient_K: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The loss and `StepSums.stack()` of one batch."""
        dtype = self.head.fc.weight.dtype
        outputs = unroll(self.head, embedding_SH.to(dtype), states.aux_SE.to(dtype), layout, self.steps)
        loss, sums = distillation_loss(self.head, outputs, self._teacher(states), taught, coefficient_K, self.loss)
        return loss, sums.stack()

    def _teacher(self, states: TargetStates) -> Teacher:
        if states.final_SH is not None:
            return final_state_teacher(states.final_SH.to(self.teacher_DH.dtype), self.teacher_DH)
        assert states.top_ids_SM is not None
        assert states.top_logits_SM is not None
        vocab_size = self.head.config.vocab_size
        return top_logits_teacher(states.top_ids_SM, states.top_logits_SM, self.head.target_ids, vocab_size)


@dataclass
class Prepared:
    """A batch with the target's states, ready for the head."""

    batch: Batch
    states: TargetStates
    taught: TaughtPositions


@dataclass
class Training:
    """What training needs to go on: everything but weights and optimizers follows from the step's number.

    Attributes:
        measure: the acceptance length in the engine; None where it is not measured.
    """

    accelerator: Accelerator
    distiller: nn.Module
    optimizers: list[torch.optim.Optimizer]
    target: TappedTarget
    source: StateSource
    rows: list[Row]
    settings: HeadTrainConfig
    seed: int = 0
    measure: Callable[[], float] | None = field(default=None)

    @property
    def head(self) -> DraftHead:
        return self.accelerator.unwrap_model(self.distiller).head

    def prepare(self, chosen: list[int], number: int | None = None) -> Prepared:
        """Runs the target; a training batch's number draws its noise, on whatever process it falls."""
        batch = collate(self.rows, chosen, self.accelerator.device)
        states = self.source(batch)
        if number is not None and self.settings.feature_noise:
            states.aux_SE = noisy(states.aux_SE, self.settings.feature_noise, self.seed * 1_000_003 + number)
        kept_V = getattr(self.head, "t2d", None)
        skip, steps = self.settings.skip_out_of_vocabulary, self.settings.ttt_steps
        return Prepared(batch, states, taught_positions(batch.layout, states.choice_S, kept_V, steps, skip))

    def prepare_share(self, batches: dict[int, list[int]]) -> list[Prepared]:
        """This process's batches; a target that all processes compute together reads the others' as well."""
        share = []
        for place, (number, chosen) in enumerate(batches.items()):
            own = place % self.accelerator.num_processes == self.accelerator.process_index
            if own or self.target.is_parallel:
                prepared = self.prepare(chosen, number)
            if own:
                share.append(prepared)
        return share

    def run(self, prepared: Prepared, coefficient_K: Tensor) -> tuple[Tensor, Tensor]:
        embedding_SH = self.target.embed(prepared.batch.tokens_S).to(self.accelerator.device)
        layout = prepared.batch.layout
        return self.distiller(embedding_SH, prepared.states, prepared.taught, layout, coefficient_K)


def start_training(
    accelerator: Accelerator,
    head: DraftHead,
    target: TappedTarget,
    source: StateSource,
    rows: list[Row],
    settings: HeadTrainConfig,
    seed: int = 0,
) -> Training:
    distiller = Distiller(head, target.lm_head_VH, settings.ttt_steps, settings.loss).to(accelerator.device)
    frequencies: Any = head.rotary_emb.inv_freq.clone()
    wrapped, *optimizers = accelerator.prepare(distiller, *make_optimizers(head, settings))
    # DeepSpeed casts buffers to bf16 too, and RoPE would lose its positions.
    head.rotary_emb.inv_freq = frequencies.to(accelerator.device)
    return Training(accelerator, wrapped, optimizers, target, source, rows, settings, seed)


def plan_training(
    rows: list[Row], chosen: list[int], settings: HeadTrainConfig, seed: int
) -> tuple[list[list[int]], int]:
    """The batches of the whole training on the chosen rows, and how many optimizer steps they make.

    Raises:
        GraftError: fewer batches than one optimizer step takes.
    """
    lengths = [len(rows[row].tokens_S) for row in chosen]
    plan = plan_batches(lengths, settings.batch_tokens, settings.epochs, seed)
    total = min(len(plan) // settings.batches_per_step, settings.max_steps or math.inf)
    if total < 1:
        raise GraftError(
            f"{len(chosen)} samples make {len(plan)} batches, fewer than the {settings.batches_per_step} of one "
            "optimizer step: lower head.batch_tokens or head.batches_per_step, or regenerate more"
        )
    return [[chosen[row] for row in batch] for batch in plan], int(total)


def train(training: Training, plan: list[list[int]], total: int, out: Path, progress: Progress) -> None:
    """Takes `total` optimizer steps, from the last checkpoint in `out` if there is one."""
    settings, accelerator = training.settings, training.accelerator
    per_step = settings.batches_per_step
    first = resume_checkpoint(accelerator, training.head, out / "checkpoints", settings.resume)
    progress.begin(first, total)
    training.distiller.train()
    for step in range(first, total):
        started = time.perf_counter()
        rate = learning_rate(step, total, settings)
        batches = {number: plan[number] for number in range(step * per_step, (step + 1) * per_step)}
        sums, tokens = train_step(training, batches, rate)
        seconds = time.perf_counter() - started
        due = settings.measure_every and (step + 1) % settings.measure_every == 0
        measure = training.measure if due else None
        progress.log(step + 1, sums, rate, tokens, seconds)
        # Before what may fail: measuring, and what is done between the last step and the head's file.
        if (step + 1) % settings.checkpoint_every == 0 or measure or step + 1 == total:
            save_checkpoint(accelerator, training.head, out / "checkpoints", step + 1, settings.keep_checkpoints)
        if measure:
            progress.log_measured(step + 1, measure())


def train_step(training: Training, batches: dict[int, list[int]], rate: float) -> tuple[StepSums, int]:
    """One optimizer step over these batches, of which this process takes its share.

    Every position trained in the whole step, of all batches and processes, weighs the same, however
    unequal their counts: hence the counts come first.

    Returns:
        Sums over all processes, and the answer tokens behind them.

    Raises:
        GraftError: the loss or its gradient is not finite.
    """
    accelerator, settings = training.accelerator, training.settings
    prepared = training.prepare_share(batches)
    trained_K = torch.stack([one.taught.trained_NK.sum(0) for one in prepared]).sum(0)
    trained_K = accelerator.reduce(trained_K, "sum")
    weight_K = torch.tensor(settings.weights(), device=trained_K.device)
    # Data-parallel gradients are means over the processes, and this is a sum.
    coefficient_K = weight_K / trained_K.clamp(min=1) * accelerator.num_processes

    for optimizer in training.optimizers:
        for group in optimizer.param_groups:
            group["lr"] = rate
    sums_6K = torch.zeros(6, settings.ttt_steps, dtype=torch.float64, device=trained_K.device)
    for one in prepared:
        last = one is prepared[-1]
        # DeepSpeed takes the optimizer step within the last backward, and asks accelerate which that is.
        accelerator.gradient_state._set_sync_gradients(last)
        if last:
            loss, batch_sums_6K = training.run(one, coefficient_K)
            accelerator.backward(loss)
        else:
            with accelerator.no_sync(training.distiller):
                loss, batch_sums_6K = training.run(one, coefficient_K)
                accelerator.backward(loss)
        sums_6K += batch_sums_6K
    sums_6K = accelerator.reduce(sums_6K, "sum")
    norm = accelerator.clip_grad_norm_(training.distiller.parameters(), settings.clip)
    # DeepSpeed has clipped already, and says nothing or a number.
    if not (torch.isfinite(sums_6K).all() and (norm is None or math.isfinite(norm))):
        raise GraftError(
            f"the loss of the step with batches {min(batches)} to {max(batches)} is not finite: lower "
            "head.learning_rate, or where target states were stored in float16 set head.states_dtype=bfloat16; the "
            "last checkpoint is intact"
        )
    for optimizer in training.optimizers:
        optimizer.step()
        optimizer.zero_grad()
    tokens = torch.tensor(float(sum(one.batch.answer_tokens for one in prepared)), device=sums_6K.device)
    return StepSums.unstack(sums_6K), int(accelerator.reduce(tokens, "sum"))


def noisy(aux_SE: Tensor, share: float, seed: int) -> Tensor:
    """Uniform noise up to `share` of each position's root mean square."""
    generator = torch.Generator(aux_SE.device).manual_seed(seed)
    noise_SE = torch.rand(aux_SE.shape, generator=generator, device=aux_SE.device, dtype=aux_SE.dtype) * 2 - 1
    return aux_SE + noise_SE * share * aux_SE.float().square().mean(-1, keepdim=True).sqrt().to(aux_SE.dtype)


@torch.no_grad()
def validate(training: Training, chosen: list[int]) -> StepSums:
    """Teacher-forced loss and acceptance on rows that were not trained on. Every process measures all."""
    settings = training.settings
    training.distiller.eval()
    coefficient_K = torch.ones(settings.ttt_steps, device=training.accelerator.device)
    sums_6K = torch.zeros(6, settings.ttt_steps, dtype=torch.float64, device=coefficient_K.device)
    batches = pack([len(row.tokens_S) for row in training.rows], chosen, settings.batch_tokens)
    for batch in tqdm(batches, desc="validate", leave=False, disable=not training.accelerator.is_main_process):
        sums_6K += training.run(training.prepare(batch), coefficient_K)[1]
    return StepSums.unstack(sums_6K)
