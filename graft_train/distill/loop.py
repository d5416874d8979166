"""The training loop: from an untrained head to a trained one, resumable at every checkpoint."""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from tqdm import tqdm

from graft_inference.errors import GraftError
from graft_train.config.head import HeadTrainConfig
from graft_train.distill.batches import TokenSample, collate, pack, plan_batches
from graft_train.distill.checkpoint import resume_checkpoint, save_checkpoint
from graft_train.distill.metrics import StepSums
from graft_train.distill.optimizer import learning_rate, make_optimizers
from graft_train.distill.progress import Progress
from graft_train.distill.state_source import StateSource
from graft_train.distill.strategy import Prepared, Strategy


@dataclass
class Training:
    """What training needs to go on: everything but weights and optimizers follows from the step's number.

    Attributes:
        strategy: of the head's family.
        wrapped: the same, as data-parallel training calls it.
        measure: the acceptance length in the engine; None where it is not measured.
        push: begins to push the head of a step to the Hub; None where it is not pushed. All processes call it together.
    """

    accelerator: Accelerator
    strategy: Strategy
    wrapped: nn.Module
    optimizers: list[torch.optim.Optimizer]
    source: StateSource
    samples: list[TokenSample]
    settings: HeadTrainConfig
    seed: int = 0
    measure: Callable[[], float] | None = field(default=None)
    push: Callable[[int], None] | None = field(default=None)

    def prepare(self, chosen: list[int], number: int, noise: float = 0.0) -> Prepared:
        """Runs the target; a micro-batch's number draws what is drawn for it, on whatever process it falls."""
        batch, seed = collate(self.samples, chosen, self.accelerator.device), self.seed * 1_000_003 + number
        states = self.source(batch)
        if noise:
            states.aux_SE = noisy(states.aux_SE, noise, seed)
        return self.strategy.prepare(batch, states, seed)

    def prepare_share(self, batches: dict[int, list[int]]) -> list[Prepared]:
        """This process's micro-batches; a target that all processes compute together reads the others' as well."""
        share = []
        for place, (number, chosen) in enumerate(batches.items()):
            own = place % self.accelerator.num_processes == self.accelerator.process_index
            if own or self.strategy.target.is_parallel:
                prepared = self.prepare(chosen, number, self.settings.feature_noise)
            if own:
                share.append(prepared)
        return share

    def run(self, prepared: Prepared, coefficient_K: Tensor) -> tuple[Tensor, Tensor]:
        """The loss of a micro-batch, 0-d, and its `StepSums.stack()`."""
        embedding_SH = self.strategy.target.embed(prepared.batch.tokens_S[None])[0]
        return self.wrapped(prepared, embedding_SH.to(self.accelerator.device), coefficient_K)


def start_training(
    accelerator: Accelerator,
    strategy: Strategy,
    source: StateSource,
    samples: list[TokenSample],
    settings: HeadTrainConfig,
    seed: int = 0,
) -> Training:
    strategy = strategy.to(accelerator.device)
    exact = {name: buffer.clone() for name, buffer in strategy.head.named_buffers() if buffer.is_floating_point()}
    wrapped, *optimizers = accelerator.prepare(strategy, *make_optimizers(strategy.head, settings))
    # DeepSpeed casts buffers to bf16 too, and RoPE would lose its positions.
    for name, buffer in exact.items():
        owner, _, own = name.rpartition(".")
        setattr(strategy.head.get_submodule(owner), own, buffer)
    return Training(accelerator, strategy, wrapped, optimizers, source, samples, settings, seed)


def plan_training(
    samples: list[TokenSample], chosen: list[int], settings: HeadTrainConfig, seed: int
) -> tuple[list[list[int]], int]:
    """The batches of the whole training on the chosen samples, and how many optimizer steps they make.

    Raises:
        GraftError: fewer batches than one optimizer step takes.
    """
    lengths = [len(samples[number].tokens_S) for number in chosen]
    plan = plan_batches(lengths, settings.batch_tokens, settings.epochs, seed)
    total = min(len(plan) // settings.batches_per_step, settings.max_steps or math.inf)
    if total < 1:
        raise GraftError(
            f"{len(chosen)} samples make {len(plan)} batches, fewer than the {settings.batches_per_step} of one "
            "optimizer step: lower head.batch_tokens or head.batches_per_step, or regenerate more"
        )
    return [[chosen[place] for place in batch] for batch in plan], int(total)


def train(training: Training, plan: list[list[int]], total: int, out: Path, progress: Progress) -> None:
    """Takes `total` optimizer steps, from the last checkpoint in `out` if there is one."""
    settings, accelerator = training.settings, training.accelerator
    per_step = settings.batches_per_step
    identity, checkpoints = training.strategy.identity(), out / "checkpoints"
    first = resume_checkpoint(accelerator, identity, checkpoints, settings.resume)
    progress.begin(first, total)
    training.wrapped.train()
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
            save_checkpoint(accelerator, identity, checkpoints, step + 1, settings.keep_checkpoints)
        if training.push and settings.push_every and (step + 1) % settings.push_every == 0:
            training.push(step + 1)
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
    trained_K = accelerator.reduce(torch.stack([one.trained_K for one in prepared]).sum(0), "sum")
    # Data-parallel gradients are means over the processes, and this is a sum.
    coefficient_K = training.strategy.coefficients(trained_K) * accelerator.num_processes

    for optimizer in training.optimizers:
        for group in optimizer.param_groups:
            group["lr"] = rate
    sums_6K = torch.zeros(6, training.strategy.steps, dtype=torch.float64, device=trained_K.device)
    for one in prepared:
        last = one is prepared[-1]
        # DeepSpeed takes the optimizer step within the last backward, and asks accelerate which that is.
        accelerator.gradient_state._set_sync_gradients(last)
        if last:
            loss, batch_sums_6K = training.run(one, coefficient_K)
            accelerator.backward(loss)
        else:
            with accelerator.no_sync(training.wrapped):
                loss, batch_sums_6K = training.run(one, coefficient_K)
                accelerator.backward(loss)
        sums_6K += batch_sums_6K
    sums_6K = accelerator.reduce(sums_6K, "sum")
    norm = accelerator.clip_grad_norm_(training.wrapped.parameters(), settings.clip)
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
    tokens = torch.tensor(float(sum(int(one.batch.loss_mask_S.sum()) for one in prepared)), device=sums_6K.device)
    return StepSums.unstack(sums_6K), int(accelerator.reduce(tokens, "sum"))


def noisy(aux_SE: Tensor, share: float, seed: int) -> Tensor:
    """Uniform noise up to `share` of each position's root mean square."""
    generator = torch.Generator(aux_SE.device).manual_seed(seed)
    noise_SE = torch.rand(aux_SE.shape, generator=generator, device=aux_SE.device, dtype=aux_SE.dtype) * 2 - 1
    return aux_SE + noise_SE * share * aux_SE.float().square().mean(-1, keepdim=True).sqrt().to(aux_SE.dtype)


@torch.no_grad()
def validate(training: Training, chosen: list[int]) -> StepSums:
    """Teacher-forced loss and acceptance on samples that were not trained on. Every process measures all."""
    training.wrapped.eval()
    steps, device = training.strategy.steps, training.accelerator.device
    coefficient_K = torch.ones(steps, device=device)
    sums_6K = torch.zeros(6, steps, dtype=torch.float64, device=device)
    batches = pack([len(sample.tokens_S) for sample in training.samples], chosen, training.settings.batch_tokens)
    shown = tqdm(batches, desc="validate", leave=False, disable=not training.accelerator.is_main_process)
    for number, batch in enumerate(shown):
        sums_6K += training.run(training.prepare(batch, number), coefficient_K)[1]
    return StepSums.unstack(sums_6K)
