"""Soft cross-entropy of every unroll step against the target, over the draft vocabulary.

The teacher of the draft that starts at t is, at step k, the target's distribution at position j = t+1+k.
So the loss goes by j: one teacher row serves all K steps, whose outputs stand at columns j-1-k.

N taught positions (j, flattened over the batch), C of them in a chunk, K steps, D draft vocabulary.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from graft_inference.draft_head import DraftHead

CHUNK = 512
"""Positions whose logits exist at a time; each brings K rows of the draft vocabulary."""


@dataclass
class TaughtPositions:
    """Where a batch is taught.

    Attributes:
        index_N: flat index (row * S + j) of the teacher.
        started_NK: whether step k's draft of position j starts within the answer or right before it.
        trained_NK: of these, the ones in the loss.
        choice_N: the target's own choice after position j, an id of its whole vocabulary.
    """

    index_N: Tensor
    started_NK: Tensor
    trained_NK: Tensor
    choice_N: Tensor


@dataclass
class StepSums:
    """Sums over the positions of one batch, per unroll step; batches add up.

    Attributes:
        loss_K: cross-entropy in nats over `trained_K` positions.
        matched_K: positions where the head's choice is the target's, of `started_K`. A choice that the
            draft vocabulary lacks cannot match.
        chained_K: positions where this step and all earlier ones of the same draft match.
    """

    loss_K: Tensor
    trained_K: Tensor
    matched_K: Tensor
    chained_K: Tensor
    started_K: Tensor

    def stack(self) -> Tensor:
        return torch.stack((self.loss_K, self.trained_K, self.matched_K, self.chained_K, self.started_K)).double()

    @classmethod
    def unstack(cls, sums_5K: Tensor) -> "StepSums":
        return cls(*sums_5K)

    def metrics(self) -> "StepMetrics":
        chain_K = self.chained_K / self.started_K.clamp(min=1)
        return StepMetrics(
            loss=(self.loss_K / self.trained_K.clamp(min=1)).tolist(),
            acceptance=(self.matched_K / self.started_K.clamp(min=1)).tolist(),
            tau=1 + chain_K.sum().item(),
        )


@dataclass
class StepMetrics:
    """Attributes:
    loss: nats per trained position, by unroll step.
    acceptance: share of positions where the head's choice is the target's, by unroll step.
    tau: estimated acceptance length of a greedy chain of K drafts, the bonus token included.
    """

    loss: list[float]
    acceptance: list[float]
    tau: float


def taught_positions(
    answer_BS: Tensor,
    choice_BS: Tensor,
    kept_V: Tensor | None,
    steps: int,
    skip_out_of_vocabulary: bool = True,
) -> TaughtPositions:
    """Applies the answer mask m: step k of the draft from t counts where m[t+1] and m[t+2+k].

    With s the first answer token, the server's first draft starts at t = s-1: it reads token s, which the
    target chose, and predicts s+1. In terms of j = t+1+k this is m[j-k] and m[j+1]. The answer of a row is
    one run of tokens, so that j = s is the first position taught.

    Args:
        answer_BS: bool, the tokens of the answer, the end-of-sequence token included.
        choice_BS: the target's choice after each position.
        kept_V: bool, the draft vocabulary; None for the whole one.
        skip_out_of_vocabulary: leave positions whose choice no draft can match out of the loss.
    """
    length = answer_BS.shape[1]
    taught_BS = answer_BS & F.pad(answer_BS[:, 1:], (0, 1))
    started_BSK = torch.stack([F.pad(answer_BS, (step, 0))[:, :length] for step in range(steps)], dim=-1)
    # A draft needs a position before the token it reads: with an empty prompt the first one has none.
    column_S1 = torch.arange(length, device=answer_BS.device)[:, None]
    started_BSK = started_BSK & (column_S1 > torch.arange(steps, device=answer_BS.device))
    index_N = taught_BS.flatten().nonzero().flatten()
    started_NK, choice_N = started_BSK.flatten(0, 1)[index_N], choice_BS.flatten()[index_N]
    trained_NK = started_NK
    if skip_out_of_vocabulary and kept_V is not None:
        trained_NK = started_NK & kept_V[choice_N, None]
    return TaughtPositions(index_N, started_NK, trained_NK, choice_N)


def distillation_loss(
    head: DraftHead,
    outputs: list[Tensor],
    final_BSH: Tensor,
    teacher_DH: Tensor,
    taught: TaughtPositions,
    coefficient_K: Tensor,
) -> tuple[Tensor, StepSums]:
    """Sum over steps of coefficient[k] * (sum of step k's cross-entropies).

    Args:
        outputs: of `unroll`, K of [B, C, H], its columns the last C of S.
        final_BSH: what the target's lm_head reads.
        teacher_DH: the lm_head's rows of the draft vocabulary.
        coefficient_K: decay[k] / (trained positions of step k in the whole optimizer step).

    Returns:
        The loss, 0-d, and what was summed.
    """
    length, steps, columns = final_BSH.shape[1], len(outputs), outputs[0].shape[1]
    row_N, column_N = taught.index_N // length, taught.index_N % length
    hidden = []
    for step, output_BCH in enumerate(outputs):
        # Where the draft did not start (not `started`) the column may lie outside; any row will do.
        place_N = (column_N - 1 - step - (length - columns)).clamp(min=0)
        hidden.append(output_BCH[row_N, place_N])
    hidden_NKH = head.norm(torch.stack(hidden, dim=1))
    weight_NK = taught.trained_NK * coefficient_K
    loss, entropy_NK, draft_NK = _LinearSoftCrossEntropy.apply(
        hidden_NKH, head.lm_head.weight, final_BSH.flatten(0, 1)[taught.index_N], teacher_DH, weight_NK
    )
    matched_NK = (head.target_ids[draft_NK] == taught.choice_N[:, None]) & taught.started_NK
    # Step k at position j and step k-1 at j-1 belong to one draft; consecutive j are neighbours in N, and
    # `started` is false where the neighbour would belong to another row.
    chained_NK = matched_NK.clone()
    for step in range(1, steps):
        chained_NK[1:, step] &= chained_NK[:-1, step - 1]
        chained_NK[:1, step] = False
    sums = StepSums(
        (entropy_NK * taught.trained_NK).sum(0),
        taught.trained_NK.sum(0),
        matched_NK.sum(0),
        chained_NK.sum(0),
        taught.started_NK.sum(0),
    )
    return loss, sums


class _LinearSoftCrossEntropy(torch.autograd.Function):
    """lm_head and soft cross-entropy in one, chunk by chunk; gradients are taken in the forward pass.

    So neither the teacher's nor the head's logits ever exist for a whole batch, nor are they computed twice.
    """

    @staticmethod
    def forward(ctx, hidden_NKH, weight_DH, final_NH, teacher_DH, weight_NK):
        entropy_NK = torch.empty_like(weight_NK, dtype=torch.float32)
        draft_NK = torch.empty_like(weight_NK, dtype=torch.long)
        grad_hidden_NKH = torch.empty_like(hidden_NKH)
        grad_weight_DH = torch.zeros_like(weight_DH)
        for start in range(0, len(hidden_NKH), CHUNK):
            chunk = slice(start, start + CHUNK)
            teacher_CD = F.linear(final_NH[chunk], teacher_DH).float().softmax(dim=-1)
            logits_CKD = F.linear(hidden_NKH[chunk], weight_DH).float()
            draft_NK[chunk] = logits_CKD.argmax(dim=-1)
            logp_CKD = logits_CKD.log_softmax(dim=-1)
            entropy_NK[chunk] = -(logp_CKD @ teacher_CD[:, :, None]).squeeze(-1)
            grad_CKD = (logp_CKD.exp_() - teacher_CD[:, None]) * weight_NK[chunk, :, None]
            grad_hidden_NKH[chunk] = grad_CKD @ weight_DH
            grad_weight_DH += grad_CKD.flatten(0, 1).T @ hidden_NKH[chunk].flatten(0, 1)
        ctx.save_for_backward(grad_hidden_NKH, grad_weight_DH)
        ctx.mark_non_differentiable(entropy_NK, draft_NK)
        return (entropy_NK * weight_NK).sum(), entropy_NK, draft_NK

    @staticmethod
    def backward(ctx, grad, *unused):
        grad_hidden_NKH, grad_weight_DH = ctx.saved_tensors
        return grad * grad_hidden_NKH, grad * grad_weight_DH, None, None, None


def reference_loss(
    head: DraftHead,
    outputs: list[Tensor],
    teacher_logits_BSV: Tensor,
    answer_BS: Tensor,
    coefficient_K: list[float],
    skip_out_of_vocabulary: bool = True,
) -> Tensor:
    """The definition, step by step, with every logit written out. Outputs are of all S columns."""
    total = outputs[0].new_zeros(())
    for step, output_BSH in enumerate(outputs):
        reach = output_BSH.shape[1] - 2 - step
        logp_BTD = head.logits(output_BSH[:, :reach]).log_softmax(dim=-1)
        logits_BTV = teacher_logits_BSV[:, 1 + step : 1 + step + reach]
        teacher_BTD = logits_BTV[..., head.target_ids].softmax(dim=-1)
        mask_BT = answer_BS[:, 1 : 1 + reach] & answer_BS[:, 2 + step : 2 + step + reach]
        if skip_out_of_vocabulary:
            mask_BT = mask_BT & torch.isin(logits_BTV.argmax(dim=-1), head.target_ids)
        total = total - coefficient_K[step] * ((teacher_BTD * logp_BTD).sum(-1) * mask_BT).sum()
    return total
