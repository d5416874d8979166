"""The divergence of every draft step from the target, over the draft vocabulary.

The teacher of the draft that starts in column t is, at step k, the target's distribution at position
j = t+1+k. So the loss goes by j: one teacher row serves all K steps, whose outputs stand at columns j-1-k.
The taught positions j are the layout's columns plus one, and so the output of step k for position n of
them is that of column n-k, in the same run.

N taught positions = C columns, of which a chunk of C is taken at a time; K steps, D draft vocabulary.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from graft_inference.heads.eagle3.model import DraftHead
from graft_train.distill.divergence import Distribution, Taught, acceptance, divergence, reference_divergence
from graft_train.distill.eagle3.layout import Layout
from graft_train.distill.metrics import StepSums
from graft_train.distill.teacher import Teacher, product

CHUNK = 256
"""Positions whose logits exist at a time; each brings K rows of the draft vocabulary."""


@dataclass
class TaughtPositions:
    """Where a packed batch is taught.

    Attributes:
        index_N: the teacher's position j.
        started_NK: whether step k's draft of position j starts within j's answer or right before it.
        trained_NK: of these, the ones in the loss.
        choice_N: the target's own choice after position j, an id of its whole vocabulary.
        drafted_N: whether the draft vocabulary has that choice.
    """

    index_N: Tensor
    started_NK: Tensor
    trained_NK: Tensor
    choice_N: Tensor
    drafted_N: Tensor


def taught_positions(
    layout: Layout, choice_S: Tensor, kept_V: Tensor | None, steps: int, skip_out_of_vocabulary: bool = True
) -> TaughtPositions:
    """Applies the answer mask m: step k of the draft from t counts where m holds from t+1 to t+2+k.

    With s the first answer token, the server's first draft starts at t = s-1: it reads token s, which the
    target chose, and predicts s+1. In terms of j = t+1+k: from m[j-k] to m[j+1], all of one document.

    Args:
        choice_S: the target's choice after each position.
        kept_V: bool, the draft vocabulary; None for the whole one.
        skip_out_of_vocabulary: leave positions whose choice no draft can match out of the loss.
    """
    index_N = layout.columns_C + 1
    started_NK = layout.depth_C[:, None] >= torch.arange(steps, device=index_N.device)
    choice_N = choice_S[index_N]
    drafted_N = torch.ones_like(choice_N, dtype=torch.bool) if kept_V is None else kept_V[choice_N]
    trained_NK = started_NK & drafted_N[:, None] if skip_out_of_vocabulary else started_NK
    return TaughtPositions(index_N, started_NK, trained_NK, choice_N, drafted_N)


def distillation_loss(
    head: DraftHead,
    outputs: list[Tensor],
    teacher: Teacher,
    taught: TaughtPositions,
    coefficient_K: Tensor,
    name: str = "forward_kl",
) -> tuple[Tensor, StepSums]:
    """Sum over steps of coefficient[k] * (sum of step k's divergences).

    Args:
        outputs: of `unroll`, K of [C, H].
        teacher: of the batch's states.
        coefficient_K: weight[k] / (trained positions of step k in the whole optimizer step).
        name: one of `divergence.LOSSES`. "survival" weighs step k by the probability that steps 0..k-1 of
            the draft survive verification: what stands behind a rejection is never emitted.

    Returns:
        The loss, 0-d, and what was summed.
    """
    # A position that is not trained has a choice that no draft can match. Survival goes on over it.
    kept_N = torch.ones_like(taught.drafted_N) if name == "survival" else taught.trained_NK.any(1)
    kept_P = kept_N.nonzero().flatten()
    # Where the draft did not start (not `started`) this is another draft's output; any will do.
    hidden = [output.roll(step, 0).index_select(0, kept_P) for step, output in enumerate(outputs)]
    weight_PK = (taught.trained_NK * coefficient_K)[kept_P]
    loss, value_PK, draft_PK = _LinearDivergence.apply(
        head.normed(torch.stack(hidden, dim=1)),
        head.lm_head.weight,
        teacher,
        taught.index_N[kept_P],
        weight_PK,
        taught.drafted_N[kept_P],
        name,
    )
    value_NK, draft_NK = (
        part.new_zeros(taught.started_NK.shape).index_copy(0, kept_P, part) for part in (value_PK, draft_PK)
    )
    matched_NK = (head.target_ids[draft_NK] == taught.choice_N[:, None]) & taught.started_NK
    # Step k at position n and step k-1 at n-1 belong to one draft; `started` is false where n-1 would
    # belong to another run.
    chained_NK, reached_NK = matched_NK.clone(), taught.started_NK.clone()
    for step in range(1, len(outputs)):
        reached_NK[:, step] &= chained_NK[:, step - 1].roll(1)
        chained_NK[:, step] &= reached_NK[:, step]
    sums = StepSums(
        (value_NK * taught.trained_NK).sum(0),
        taught.trained_NK.sum(0),
        matched_NK.sum(0),
        chained_NK.sum(0),
        reached_NK.sum(0),
        taught.started_NK.sum(0),
    )
    return loss, sums


class _LinearDivergence(torch.autograd.Function):
    """lm_head and divergence in one, chunk by chunk; gradients are taken in the forward pass.

    So neither the teacher's nor the head's logits ever exist for a whole batch, nor are they computed twice.
    """

    @staticmethod
    def forward(ctx, hidden_NKH, weight_DH, teacher, index_N, weight_NK, drafted_N, name):
        value_NK = torch.empty_like(weight_NK, dtype=torch.float32)
        draft_NK = torch.empty_like(weight_NK, dtype=torch.long)
        survived_NK = torch.ones_like(value_NK)
        grad_hidden_NKH = torch.empty_like(hidden_NKH)
        grad_weight_DH = torch.zeros_like(weight_DH, dtype=torch.float32)
        last_K = torch.zeros_like(value_NK[:1])  # of the chunk before: survived, this step included
        steps, rows, width = hidden_NKH.shape[1], min(CHUNK, len(hidden_NKH)), len(weight_DH)
        memory_MD, more_MD = (value_NK.new_empty(rows * steps, width) for _ in range(2))
        teacher_memory_CD = value_NK.new_empty(rows, width)
        for start in range(0, len(hidden_NKH), CHUNK):
            chunk = slice(start, start + CHUNK)
            hidden_CKH = hidden_NKH[chunk]
            count, shape = len(hidden_CKH), (len(hidden_CKH), steps, width)
            logits_CD = teacher(index_N[chunk], memory_MD[:count])
            teacher_C1D = Taught.of(name, logits_CD[:, None], teacher_memory_CD[:count, None])
            logits_MD = product(hidden_CKH.flatten(0, 1), weight_DH, memory_MD[: count * steps])
            head_CKD = Distribution.of(logits_MD.view(shape), more_MD[: count * steps].view(shape))
            draft_NK[chunk] = head_CKD.logits.argmax(dim=-1)
            if name == "survival":
                accepted_CK = acceptance(teacher_C1D, head_CKD) * drafted_N[chunk, None]
                survived_NK[chunk], last_K = _survival(accepted_CK, last_K)
            value_NK[chunk], grad_CKD = divergence(name, teacher_C1D, head_CKD)
            # DeepSpeed trains a head that is bf16 itself; under autocast only the products are.
            grad_CKD = grad_CKD.to(hidden_NKH.dtype)
            # A position's weight is that of all its logits, so the narrower factor takes it.
            scale_CK1 = (weight_NK[chunk] * survived_NK[chunk])[..., None].to(hidden_NKH.dtype)
            grad_hidden_NKH[chunk] = (grad_CKD @ weight_DH) * scale_CK1
            grad_weight_DH += grad_CKD.flatten(0, 1).T @ (hidden_CKH * scale_CK1).flatten(0, 1)
        ctx.save_for_backward(grad_hidden_NKH, grad_weight_DH.to(weight_DH.dtype))
        ctx.mark_non_differentiable(value_NK, draft_NK)
        return (value_NK * survived_NK * weight_NK).sum(), value_NK, draft_NK

    @staticmethod
    def backward(ctx, grad, *unused):
        grad_hidden_NKH, grad_weight_DH = ctx.saved_tensors
        return grad_hidden_NKH.mul_(grad), grad_weight_DH.mul_(grad), None, None, None, None, None


def _survival(accepted_CK: Tensor, before_1K: Tensor) -> tuple[Tensor, Tensor]:
    """The probability that steps 0..k-1 of the draft behind (n, k) are accepted.

    Args:
        before_1K: of position n = -1, with its own step k counted in.

    Returns:
        [C, K], and the last position's with its own step counted in, [1, K].
    """
    survived_CK = torch.ones_like(accepted_CK)
    through: list[Tensor] = []
    for step in range(accepted_CK.shape[1]):
        if step:
            survived_CK[:, step] = through[-1].roll(1)
            survived_CK[0, step] = before_1K[0, step - 1]
        through.append(survived_CK[:, step] * accepted_CK[:, step])
    return survived_CK, torch.stack(through, dim=1)[-1:]


def reference_loss(
    head: DraftHead,
    outputs: list[Tensor],
    teacher_logits_SV: Tensor,
    layout: Layout,
    loss_mask_S: Tensor,
    coefficient_K: list[float],
    name: str = "forward_kl",
    skip_out_of_vocabulary: bool = True,
) -> Tensor:
    """The definition, draft by draft, with every logit of every step written out."""
    total = outputs[0].new_zeros(())
    column_C, document_S = layout.columns_C, layout.document_S
    inside_C = torch.ones_like(column_C, dtype=torch.bool)
    survived_C = torch.ones_like(column_C, dtype=torch.float32)
    for step, output_CH in enumerate(outputs):
        next_C = (column_C + 2 + step).clamp(max=len(loss_mask_S) - 1)
        inside_C = inside_C & (column_C + 2 + step < len(loss_mask_S))
        inside_C = inside_C & (document_S[next_C] == document_S[column_C]) & loss_mask_S[next_C]
        logits_CV = teacher_logits_SV[next_C - 1]
        teacher_CD = logits_CV[:, head.target_ids].log_softmax(dim=-1)
        logp_CD = head.logits(output_CH).log_softmax(dim=-1)
        drafted_C = torch.isin(logits_CV.argmax(dim=-1), head.target_ids)
        value_C = reference_divergence(name, teacher_CD, logp_CD) * (
            inside_C & drafted_C if skip_out_of_vocabulary else inside_C
        )
        if name == "survival":
            value_C = value_C * survived_C
            survived_C = survived_C * (1 - reference_divergence("total_variation", teacher_CD, logp_CD)).detach()
            survived_C = survived_C * drafted_C
        total = total + coefficient_K[step] * value_C.sum()
    return total
