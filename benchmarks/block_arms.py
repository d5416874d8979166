"""One optimizer step of a block head, ours and the `speculators` trainer's: the block arms of `train_step.py`."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from graft_inference.heads.block.config import BlockHeadConfig
from graft_inference.heads.block.model import BlockHead
from graft_train.config.block import BlockHeadTrainConfig
from graft_train.config.head import HeadTrainConfig
from graft_train.distill.batches import PackedBatch
from graft_train.distill.block.strategy import BlockStrategy
from graft_train.distill.optimizer import make_optimizers

Step = tuple[list[Tensor], list[torch.optim.Optimizer], Callable[[], Tensor]]
"""What is trained, by what, and its loss."""
THEIRS = {"forward_kl": "kl_div", "cross_entropy": "ce"}


def block_step(shapes: Any) -> Step:
    """Ours, bidirectional within blocks as DFlash is."""
    head, args = BlockHead(block_config(shapes)), shapes.args
    head.set_draft_vocabulary(shapes.kept_D)
    block = BlockHeadTrainConfig(block_size=args.block_size, anchors=args.anchors, loss=args.block_loss, causal=False)
    settings = HeadTrainConfig(family="block", block=block)
    target = SimpleNamespace(
        lm_head_VH=shapes.lm_head_VH, device=shapes.device, embed=lambda tokens: shapes.embedding_VH[tokens]
    )
    strategy = BlockStrategy(head, target, settings).to(shapes.device)
    batch = PackedBatch(list(range(len(shapes.lengths))), shapes.lengths, shapes.tokens_S, shapes.loss_mask_S)
    precision = torch.autocast(shapes.device.type, torch.bfloat16, enabled=shapes.device.type == "cuda")

    def loss() -> Tensor:
        with precision:
            prepared = strategy.prepare(batch, shapes.states, seed=0)
            embedding_SH = shapes.embedding_VH[shapes.tokens_S]
            return strategy(prepared, embedding_SH, strategy.coefficients(prepared.trained_K))[0]

    return list(head.parameters()), make_optimizers(head, settings), loss


def block_config(shapes: Any) -> BlockHeadConfig:
    args = shapes.args
    return BlockHeadConfig(
        hidden_size=args.width,
        intermediate_size=3 * args.width,
        num_hidden_layers=args.layers,
        num_attention_heads=args.width // 64,
        num_key_value_heads=args.width // 64,
        head_dim=64,
        vocab_size=args.vocab,
        draft_vocab_size=args.draft_vocab,
        aux_layer_ids=(0, 1, 2),
        num_target_layers=9,
        block_size=args.block_size,
        mask_token_id=args.vocab - 1,
        max_position_embeddings=args.tokens + 16,
    )


def block_speculators_step(shapes: Any) -> Step:
    """The package's DFlash model with full attention, which is bidirectional in its blocks, and its own loss."""
    from speculators.config import SpeculatorsConfig, VerifierConfig
    from speculators.losses import resolve_loss_config
    from speculators.models.dflash import DFlashSpeculatorConfig
    from speculators.models.dflash.core import DFlashDraftModel
    from speculators.proposals.greedy import GreedyTokenProposalConfig

    args, cuda, config = shapes.args, shapes.device.type == "cuda", block_config(shapes)
    layer = config.qwen3_config()
    layer._attn_implementation = "simple_flex_attention" if cuda else "eager"
    proposal = GreedyTokenProposalConfig(speculative_tokens=config.drafts)
    model = DFlashDraftModel(
        DFlashSpeculatorConfig(
            transformer_layer_config=layer,
            draft_vocab_size=args.draft_vocab,
            block_size=args.block_size,
            aux_hidden_state_layer_ids=[1, 2, 3],
            mask_token_id=config.mask_token_id,
            speculators_config=SpeculatorsConfig(
                algorithm="dflash",
                proposal_methods=[proposal],
                default_proposal_method="greedy",
                verifier=VerifierConfig.from_config(layer, name_or_path=None),
            ),
        )
    )
    with torch.no_grad():
        for weight in (model.lm_head.weight, model.verifier_lm_head.weight):
            weight.copy_(shapes.lm_head_VH[shapes.kept_D].cpu())
        model.embed_tokens.weight.copy_(shapes.embedding_VH.cpu())
    model = model.to(shapes.device).train()
    losses = resolve_loss_config(THEIRS[args.block_loss], "fused" if cuda else "eager")
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)
    precision = torch.autocast(shapes.device.type, torch.bfloat16, enabled=cuda)

    def loss() -> Tensor:
        with precision:
            return model(
                hidden_states=shapes.states.aux_SE[None],
                input_ids=shapes.tokens_S[None],
                document_ids=shapes.layout.document_S[None],
                loss_mask=shapes.loss_mask_S[None].to(shapes.device).float(),
                position_ids=shapes.layout.positions_S[None],
                verifier_last_hidden_states=shapes.states.final_SH[None],
                max_anchors=args.anchors,
                loss_config=losses,
            )[1]

    return list(model.parameters()), [optimizer], loss
