"""Blocks drafted in one pass as a strategy: anchors, one pass of the head over all blocks, loss by draft."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from graft_inference.heads.block.checkpoint import save_block_head
from graft_inference.heads.block.model import BlockHead
from graft_inference.policy.plan import Plan, QuotaCheckpoint, QuotaPlan
from graft_train.config.head import HeadTrainConfig
from graft_train.data.sharded import whole
from graft_train.data.states import PackedTarget, TargetStates
from graft_train.distill.batches import PackedBatch
from graft_train.distill.block.blocks import draft_blocks
from graft_train.distill.block.layout import BlockLayout, make_block_layout
from graft_train.distill.block.loss import CHUNK, BlockLoss, TaughtDrafts, block_loss, taught_drafts
from graft_train.distill.draft_vocabulary import vocabulary_hash
from graft_train.distill.strategy import Cost, Prepared, Strategy
from graft_train.distill.teacher import teacher_of


@dataclass
class BlockBatch(Prepared):
    """A micro-batch with the anchors of its blocks and what their drafts are taught."""

    layout: BlockLayout
    taught: TaughtDrafts


class BlockStrategy(Strategy):
    """Trains a head that drafts blocks at `settings.block.anchors` anchors of a micro-batch; arguments as `Strategy`.

    Embeddings and lm_head are the target's and stay so.
    """

    lm_head_DH: Tensor
    mask_H: Tensor

    def __init__(self, head: BlockHead, target: PackedTarget, settings: HeadTrainConfig, coverage: float = 1.0) -> None:
        super().__init__(head, target, head.config.drafts, coverage)
        self.settings = settings.block
        block, lm_head_VH = settings.block, target.lm_head_VH
        self.loss = BlockLoss(block.loss, block.d_pace_share if block.weighting == "d_pace" else None)
        lm_head_DH = lm_head_VH if head.lm_head is None else lm_head_VH[head.target_ids.to(lm_head_VH.device)]
        self.register_buffer("lm_head_DH", lm_head_DH.detach(), persistent=False)
        mask_1 = torch.tensor([head.config.mask_token_id], device=target.device)
        self.register_buffer("mask_H", target.embed(mask_1[None])[0, 0], persistent=False)
        if head.lm_head is not None:
            head.lm_head.requires_grad_(False)

    def prepare(self, batch: PackedBatch, states: TargetStates, seed: int) -> BlockBatch:
        config, device = self.head.config, batch.tokens_S.device
        layout = make_block_layout(
            batch.lengths, batch.loss_mask_S, config.block_size, config.drafts, self.settings.anchors, seed
        ).to(device)
        taught = taught_drafts(layout, batch.tokens_S, states.choice_S, self.head.target_ids, config.vocab_size)
        return BlockBatch(batch, states, taught.trained_AK.sum(0), layout, taught)

    def coefficients(self, trained_K: Tensor) -> Tensor:
        """Drafts weigh by their place, and a step's weights sum to one whatever was trained in it."""
        places = range(self.steps)
        weights = [math.exp(-place / self.settings.gamma) for place in places]
        weight_K = torch.tensor(weights, device=trained_K.device)
        if self.loss.d_pace is not None:
            weight_K = torch.ones_like(weight_K)
        return weight_K / (weight_K * trained_K).sum().clamp(min=1)

    def forward(self, prepared: Prepared, embedding_SH: Tensor, coefficient_K: Tensor) -> tuple[Tensor, Tensor]:
        assert isinstance(prepared, BlockBatch)
        head, states, dtype = self.head, prepared.states, self.head.fc.weight.dtype
        embedding_SH, mask_H = embedding_SH.to(dtype), self.mask_H.to(dtype)
        hidden_AKH = draft_blocks(head, embedding_SH, mask_H, states.aux_SE.to(dtype), prepared.layout)
        teacher = teacher_of(states, self.lm_head_DH, head.target_ids, head.config.vocab_size)
        lm_head_DH = self.lm_head_DH.to(dtype)
        loss, sums = block_loss(head, hidden_AKH, lm_head_DH, teacher, prepared.taught, coefficient_K, self.loss)
        return loss, sums.stack()

    def cost(self, tokens: int, answered: float) -> Cost:
        config, hidden = self.head.config, self.head.config.hidden_size
        anchors = min(self.settings.anchors, tokens * answered)
        slots, key_values = anchors * config.block_size, 2 * config.num_key_value_heads * config.head_dim
        # Activations of one slot and of one context token, by their widths.
        of_slot = 12 * hidden + 4 * config.num_attention_heads * config.head_dim + 3 * config.intermediate_size
        layer = sum(parameter.numel() for parameter in self.head.layers.parameters())
        context = len(config.aux_layer_ids) * hidden**2 + config.num_hidden_layers * key_values * hidden
        activations = config.num_hidden_layers * (of_slot * slots + 2 * key_values * tokens) + 3 * hidden * tokens
        flops = 6 * (layer * slots + context * tokens) + 4 * config.draft_vocab_size * hidden * slots
        return Cost(activations, 4 * CHUNK * config.draft_vocab_size, flops)

    def identity(self) -> dict[str, Any]:
        return {"head": self.head.config.to_dict(), "draft_vocabulary": vocabulary_hash(self.head.target_ids)}

    def measured_plan(self) -> Plan:
        return QuotaPlan((QuotaCheckpoint(self.steps, drafted=self.steps),), topk=1)

    def served_head(self) -> BlockHead:
        with whole(self.head.parameters()):
            tensors = {name: tensor.detach().to("cpu", copy=True) for name, tensor in self.head.state_dict().items()}
        return BlockHead.of_tensors(self.head.config, tensors)

    def save(self, out: Path) -> None:
        """In the target's dtype, in which engines compute."""
        save_block_head(self.head, out, self.target.model.dtype)
