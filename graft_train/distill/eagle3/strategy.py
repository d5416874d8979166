"""EAGLE-3's training-time test as a strategy: unroll, divergence by step, and a chain as the measured plan."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from graft_inference.heads.eagle3.checkpoint import save_head
from graft_inference.heads.eagle3.model import DraftHead
from graft_inference.policy.plan import Plan, QuotaCheckpoint, QuotaPlan
from graft_train.config.head import HeadTrainConfig
from graft_train.data.sharded import whole
from graft_train.data.states import PackedTarget, TargetStates
from graft_train.distill.batches import PackedBatch
from graft_train.distill.draft_vocabulary import vocabulary_hash
from graft_train.distill.eagle3.layout import Layout, make_layout
from graft_train.distill.eagle3.loss import CHUNK, TaughtPositions, distillation_loss, taught_positions
from graft_train.distill.eagle3.unroll import unroll
from graft_train.distill.strategy import Cost, Prepared, Strategy
from graft_train.distill.teacher import teacher_of


@dataclass
class UnrollBatch(Prepared):
    """A micro-batch with the columns in which drafts start and the positions that teach them."""

    layout: Layout
    taught: TaughtPositions


class Eagle3Strategy(Strategy):
    """Trains an EAGLE-3 head `settings.ttt_steps` drafts ahead at every position; arguments as `Strategy`."""

    teacher_DH: Tensor

    def __init__(self, head: DraftHead, target: PackedTarget, settings: HeadTrainConfig, coverage: float = 1.0) -> None:
        super().__init__(head, target, settings.ttt_steps, coverage)
        self.settings = settings
        lm_head_VH = target.lm_head_VH
        self.register_buffer("teacher_DH", lm_head_VH[head.target_ids.to(lm_head_VH.device)], persistent=False)

    def prepare(self, batch: PackedBatch, states: TargetStates, seed: int) -> UnrollBatch:
        layout = make_layout(batch.lengths, batch.loss_mask_S, self.head.config.sliding_window)
        layout = layout.to(batch.tokens_S.device)
        kept_V, skip = getattr(self.head, "t2d", None), self.settings.skip_out_of_vocabulary
        taught = taught_positions(layout, states.choice_S, kept_V, self.steps, skip)
        return UnrollBatch(batch, states, taught.trained_NK.sum(0), layout, taught)

    def coefficients(self, trained_K: Tensor) -> Tensor:
        """Every position of a step weighs the same, and the steps as the settings say."""
        return torch.tensor(self.settings.weights(), device=trained_K.device) / trained_K.clamp(min=1)

    def forward(self, prepared: Prepared, embedding_SH: Tensor, coefficient_K: Tensor) -> tuple[Tensor, Tensor]:
        assert isinstance(prepared, UnrollBatch)
        head, states, dtype = self.head, prepared.states, self.head.fc.weight.dtype
        outputs = unroll(head, embedding_SH.to(dtype), states.aux_SE.to(dtype), prepared.layout, self.steps)
        teacher = teacher_of(states, self.teacher_DH, head.target_ids, head.config.vocab_size)
        loss, sums = distillation_loss(head, outputs, teacher, prepared.taught, coefficient_K, self.settings.loss)
        return loss, sums.stack()

    def cost(self, tokens: int, answered: float) -> Cost:
        config, steps, columns = self.head.config, self.steps, tokens * answered
        hidden, width = config.hidden_size, config.draft_vocab_size
        # Activations of one column, by their widths.
        kept = 12 * hidden + 4 * config.num_attention_heads * config.head_dim + 3 * config.intermediate_size
        fused = len(config.aux_layer_ids) * hidden**2
        layer = sum(parameter.numel() for parameter in self.head.parameters()) - width * hidden - fused
        flops = 6 * (layer * (tokens + (steps - 1) * columns) + fused * tokens) + 6 * width * hidden * columns * steps
        activations = kept * (tokens + (steps - 1) * columns)
        return Cost(activations, 4 * CHUNK * steps * width + 2 * width * hidden, flops)

    def identity(self) -> dict[str, Any]:
        return {"head": self.head.config.to_dict(), "draft_vocabulary": vocabulary_hash(self.head.target_ids)}

    def measured_plan(self) -> Plan:
        return QuotaPlan((QuotaCheckpoint(self.steps, drafted=self.steps),), topk=1)

    def served_head(self) -> DraftHead:
        with whole(self.head.parameters()):
            # Not a copy of the module, which DeepSpeed has put its hooks on.
            tensors = {name: tensor.detach().to("cpu", copy=True) for name, tensor in self.head.state_dict().items()}
        return DraftHead.of_tensors(self.head.config, tensors)

    def save(self, out: Path) -> None:
        save_head(self.head, out)
