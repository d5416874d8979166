"""The loss of blocks: every draft against the text's token or the target's distribution, over the draft vocabulary.

Draft k of anchor a is taught by token a+k, and by the target's distribution at a+k-1. A anchors, of which a chunk of
C is taken at a time; K drafts, N taught drafts of a chunk, D draft vocabulary, R rank of the Markov head.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from graft_inference.heads.block.model import BlockHead
from graft_train.distill.block.layout import BlockLayout
from graft_train.distill.divergence import Distribution, Taught, divergence
from graft_train.distill.metrics import StepSums
from graft_train.distill.teacher import Teacher, product

CHUNK = 256
"""Drafts whose logits exist at a time."""


@dataclass
class TaughtDrafts:
    """What the drafts of a packed batch are taught.

    Attributes:
        started_AK: whether the draft is a token of its anchor's answer.
        trained_AK: of these, the ones in the loss: the draft vocabulary has the text's token and the target's choice.
        before_AK: the place of the token before the draft, where the target predicts it.
        token_AK: before the draft, int64: what a Markov head reads.
        label_AK: the draft's token, as an id of the draft vocabulary; any where it is not trained.
        choice_AK: the target's own choice there, an id of its whole vocabulary.
    """

    started_AK: Tensor
    trained_AK: Tensor
    before_AK: Tensor
    token_AK: Tensor
    label_AK: Tensor
    choice_AK: Tensor


def taught_drafts(
    layout: BlockLayout, tokens_S: Tensor, choice_S: Tensor, target_ids_D: Tensor, vocab: int
) -> TaughtDrafts:
    """Labels of every draft, in whichever layout of the slots: draft 1 is the token behind the anchor.

    Args:
        choice_S: the target's choice after each position.
        target_ids_D: the draft vocabulary.
        vocab: tokens of the target's.
    """
    drafts_K = torch.arange(1, layout.started_AK.shape[1] + 1, device=tokens_S.device)
    place_AK = (layout.anchors_A[:, None] + drafts_K).clamp(max=len(tokens_S) - 1)
    before_AK = place_AK - 1
    draft_id_V = torch.full((vocab,), -1, device=tokens_S.device)
    draft_id_V[target_ids_D] = torch.arange(len(target_ids_D), device=tokens_S.device)
    label_AK, choice_AK = draft_id_V[tokens_S[place_AK]], choice_S[before_AK]
    trained_AK = layout.started_AK & (label_AK >= 0) & (draft_id_V[choice_AK] >= 0)
    return TaughtDrafts(layout.started_AK, trained_AK, before_AK, tokens_S[before_AK], label_AK.clamp(min=0), choice_AK)


@dataclass
class BlockLoss:
    """Which loss, and how drafts weigh.

    Attributes:
        name: one of `config.block.BLOCK_LOSSES`.
        d_pace: None, or how much of a draft's weight does not depend on how well it is known, 0 to 1.
    """

    name: str
    d_pace: float | None = None

    @property
    def needs_teacher(self) -> bool:
        return self.name != "cross_entropy"

    def of(self, head: Distribution, label_N: Tensor, teacher: Taught | None) -> tuple[Tensor, Tensor]:
        """The loss of every draft, [N], and its gradient with respect to the head's logits, [N, D].

        Args:
            head, teacher: [N, D]. The head's are overwritten.
        """
        hard_N = head.norm - head.logits.gather(1, label_N[:, None])[:, 0]
        if self.name == "cross_entropy":
            return hard_N, _minus_label(head.probabilities, label_N, 1)
        assert teacher is not None
        if self.name != "dspark":
            return divergence(self.name, teacher, head)
        share_ND = head.probabilities * 0.1
        value_N, grad_ND = divergence("total_variation", teacher, head)
        # The L1 distance of two distributions is twice their total variation.
        grad_ND = _minus_label(share_ND, label_N, 0.1).add_(grad_ND, alpha=1.8)
        return 0.1 * hard_N + 1.8 * value_N, grad_ND


def _minus_label(share_ND: Tensor, label_N: Tensor, share: float) -> Tensor:
    return share_ND.scatter_add_(1, label_N[:, None], torch.full_like(share_ND[:, :1], -share))


def d_pace_weights(confidence_CK: Tensor, trained_CK: Tensor, share: float) -> Tensor:
    """What a draft contributes to the expected length: the sum, over it and all later drafts, of their survival.

    Args:
        confidence_CK: the head's probability of each draft's token.
        share: of a draft's factor that is 1 in any case.
    """
    factor_CK = ((1 - share) * confidence_CK + share).masked_fill(~trained_CK, 1)
    survival_CK = factor_CK.cumprod(1) * trained_CK
    return survival_CK.flip(1).cumsum(1).flip(1)


def block_loss(
    head: BlockHead,
    hidden_AKH: Tensor,
    lm_head_DH: Tensor,
    teacher: Teacher,
    taught: TaughtDrafts,
    coefficient_K: Tensor,
    loss: BlockLoss,
) -> tuple[Tensor, StepSums]:
    """Sum over drafts of coefficient[k] * (D-PACE's weight) * (the draft's loss); and what was summed.

    Args:
        hidden_AKH: of `draft_blocks`.
        lm_head_DH: the target's lm_head's rows of the draft vocabulary, which are not trained.
    """
    markov_AKR, markov_DR = None, None
    if head.markov_head is not None:
        markov_AKR, markov_DR = head.markov_head.markov_w1(taught.token_AK), head.markov_head.markov_w2.weight
    total, value_AK, draft_AK = _BlockLoss.apply(
        hidden_AKH, markov_AKR, markov_DR, lm_head_DH, teacher, taught, taught.trained_AK * coefficient_K, loss
    )
    matched_AK = (head.target_ids[draft_AK] == taught.choice_AK) & taught.started_AK
    chained_AK = matched_AK.cumprod(1).bool()
    reached_AK = taught.started_AK.clone()
    reached_AK[:, 1:] &= chained_AK[:, :-1]
    sums = (value_AK * taught.trained_AK, taught.trained_AK, matched_AK, chained_AK, reached_AK, taught.started_AK)
    return total, StepSums(*(one.sum(0) for one in sums))


class _BlockLoss(torch.autograd.Function):
    """lm_head, Markov bias and loss in one, chunk by chunk; gradients are taken in the forward pass.

    So neither the teacher's nor the head's logits ever exist for a whole batch, nor are they computed twice.
    """

    @staticmethod
    def forward(ctx, hidden_AKH, markov_AKR, markov_DR, lm_head_DH, teacher, taught, weight_AK, loss):
        value_AK = torch.zeros_like(weight_AK, dtype=torch.float32)
        draft_AK = torch.zeros_like(weight_AK, dtype=torch.long)
        scale_AK = torch.ones_like(value_AK)
        grad_hidden_AKH = torch.zeros_like(hidden_AKH)
        grad_markov_AKR = None if markov_AKR is None else torch.zeros_like(markov_AKR)
        grad_markov_DR = None if markov_DR is None else torch.zeros_like(markov_DR, dtype=torch.float32)
        anchors = max(1, CHUNK // max(1, weight_AK.shape[1]))
        rows = min(anchors, len(hidden_AKH)) * weight_AK.shape[1]
        memory = [value_AK.new_empty(rows, len(lm_head_DH)) for _ in range(3 if loss.needs_teacher else 2)]
        for start in range(0, len(hidden_AKH), anchors):
            chunk = slice(start, start + anchors)
            taken_CK = taught.started_AK[chunk]
            hidden_NH = hidden_AKH[chunk][taken_CK]
            label_N = taught.label_AK[chunk][taken_CK]
            logits_ND, more_ND = (one[: len(hidden_NH)] for one in memory[:2])
            teacher_ND = None
            if loss.needs_teacher:
                # Blocks of neighbouring anchors share places.
                place_U, of_N = taught.before_AK[chunk][taken_CK].unique(return_inverse=True)
                teacher_UD = teacher(place_U, logits_ND[: len(place_U)])
                teacher_UD = Taught.of(loss.name, teacher_UD, more_ND[: len(place_U)])
                teacher_ND = teacher_UD.rows(of_N, memory[2][: len(hidden_NH)])
            product(hidden_NH, lm_head_DH, logits_ND)
            if markov_AKR is not None:
                markov_NR = markov_AKR[chunk][taken_CK]
                logits_ND += F.linear(markov_NR, markov_DR)
            draft_AK[chunk][taken_CK] = logits_ND.argmax(dim=-1)
            head_ND = Distribution.of(logits_ND, more_ND)
            if loss.d_pace is not None:
                confidence_CK = torch.zeros_like(scale_AK[chunk])
                confidence_CK[taken_CK] = head_ND.probabilities.gather(1, label_N[:, None])[:, 0]
                scale_AK[chunk] = d_pace_weights(confidence_CK, taught.trained_AK[chunk], loss.d_pace)
            value_AK[chunk][taken_CK], grad_ND = loss.of(head_ND, label_N, teacher_ND)
            # DeepSpeed trains a head that is bf16 itself; under autocast only the products are.
            grad_ND = grad_ND.to(hidden_AKH.dtype)
            scale_N1 = (weight_AK[chunk] * scale_AK[chunk])[taken_CK][:, None].to(hidden_AKH.dtype)
            # A draft's weight is that of all its logits, so the narrower factor takes it.
            grad_hidden_AKH[chunk][taken_CK] = (grad_ND @ lm_head_DH.to(grad_ND.dtype)) * scale_N1
            if grad_markov_AKR is not None:
                grad_markov_AKR[chunk][taken_CK] = ((grad_ND @ markov_DR.to(grad_ND.dtype)) * scale_N1).to(
                    markov_AKR.dtype
                )
                grad_markov_DR += grad_ND.T @ (markov_NR.to(grad_ND.dtype) * scale_N1)
        if grad_markov_DR is not None:
            grad_markov_DR = grad_markov_DR.to(markov_DR.dtype)
        ctx.save_for_backward(grad_hidden_AKH, grad_markov_AKR, grad_markov_DR)
        ctx.mark_non_differentiable(value_AK, draft_AK)
        return (value_AK * scale_AK * weight_AK).sum(), value_AK, draft_AK

    @staticmethod
    def backward(ctx, grad, *unused):
        grads = [None if one is None else one.mul_(grad) for one in ctx.saved_tensors]
        return *grads, None, None, None, None, None
