"""How far the head's distribution is from the target's, by name; each with its gradient written out.

p is the target's distribution over the draft vocabulary, q the head's. C positions, K steps, D tokens.
"""

import torch
from torch import Tensor

from graft_inference.errors import GraftError
from graft_train.config.head import LOSSES


def divergence(name: str, teacher_CD: Tensor, logp_CKD: Tensor) -> tuple[Tensor, Tensor]:
    """The divergence of every position, and its gradient with respect to the head's logits.

    Args:
        name: one of LOSSES. "survival" is the forward KL; its weights are the caller's.
        teacher_CD, logp_CKD: log-probabilities of target and head.

    Returns:
        Nats (total variation: 0 to 1), [C, K], and the gradient [C, K, D].
    """
    match name:
        case "forward_kl" | "survival":  # sum p (log p - log q)
            p_CD = teacher_CD.exp()
            entropy_C1 = (p_CD * teacher_CD).sum(-1, keepdim=True)
            return entropy_C1 - (logp_CKD @ p_CD[:, :, None]).squeeze(-1), logp_CKD.exp().sub_(p_CD[:, None])
        case "reverse_kl":  # sum q (log q - log p)
            ratio_CKD = logp_CKD - teacher_CD[:, None]
            q_CKD = logp_CKD.exp()
            value_CK = (q_CKD * ratio_CKD).sum(-1)
            return value_CK, q_CKD.mul_(ratio_CKD.sub_(value_CK[..., None]))
        case "total_variation":  # sum max(p - q, 0)
            q_CKD = logp_CKD.exp()
            gap_CKD = teacher_CD.exp()[:, None] - q_CKD
            short_CKD = (gap_CKD > 0).to(q_CKD.dtype)
            pull_CK1 = (q_CKD * short_CKD).sum(-1, keepdim=True)
            return gap_CKD.clamp_(min=0).sum(-1), q_CKD.mul_(pull_CK1 - short_CKD)
    raise GraftError(f"head.loss={name} is unknown; choose one of {', '.join(LOSSES)}")


def reference_divergence(name: str, teacher_TD: Tensor, logp_TD: Tensor) -> Tensor:
    """The same by its textbook formula, differentiated by autograd. [T]"""
    p_TD, q_TD = teacher_TD.exp(), logp_TD.exp()
    match name:
        case "forward_kl" | "survival":
            return (p_TD * (teacher_TD - logp_TD)).sum(-1)
        case "reverse_kl":
            return (q_TD * (logp_TD - teacher_TD)).sum(-1)
        case "total_variation":
            return 0.5 * (p_TD - q_TD).abs().sum(-1)
    raise GraftError(f"head.loss={name} is unknown; choose one of {', '.join(LOSSES)}")


def acceptance(teacher: Tensor, logp: Tensor) -> Tensor:
    """The probability that a token drawn from q survives verification, sum min(p, q), from log-probabilities."""
    return torch.minimum(teacher, logp).exp().sum(-1)
