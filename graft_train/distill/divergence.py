"""How far the head's distribution is from the target's, by name; each with its gradient written out.

p is the target's distribution over the draft vocabulary, q the head's. C positions, K steps, D tokens.
"""

from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from graft_inference.errors import GraftError
from graft_train.config.head import LOSSES


@dataclass
class Distribution:
    """What logits say, with one exponential for each of them.

    Attributes:
        logits, probabilities: [..., D] float32.
        norm: log of the sum of exp(logits), [...]: log-probabilities are `logits - norm`.
    """

    logits: Tensor
    probabilities: Tensor
    norm: Tensor

    @classmethod
    def of(cls, logits: Tensor, probabilities: Tensor) -> Self:
        """
        Args:
            probabilities: memory for them.
        """
        torch.softmax(logits, dim=-1, out=probabilities)
        # The likeliest token's probability is at least 1 / D, which its logarithm loses nothing of.
        return cls(logits, probabilities, logits.amax(-1) - probabilities.amax(-1).log())


@dataclass
class Taught:
    """What a divergence needs of the target's distribution.

    Attributes:
        probabilities: [..., D] float32.
        certainty: sum p log p, [...].
        logp: the logarithms, for a divergence that has a use for them.
    """

    probabilities: Tensor
    certainty: Tensor
    logp: Tensor | None

    @classmethod
    def of(cls, name: str, logits: Tensor, probabilities: Tensor) -> Self:
        """
        Args:
            name: of the divergence.
            logits: which are overwritten.
            probabilities: memory for them.
        """
        found = Distribution.of(logits, probabilities)
        logp = logits - found.norm[..., None] if name == "reverse_kl" else None
        return cls(probabilities, logits.mul_(probabilities).sum(-1) - found.norm, logp)

    def rows(self, index: Tensor, probabilities: Tensor) -> Self:
        """
        Args:
            probabilities: memory for those of these rows.
        """
        torch.index_select(self.probabilities, 0, index, out=probabilities)
        return type(self)(probabilities, self.certainty[index], None if self.logp is None else self.logp[index])


def divergence(name: str, teacher: Taught, head: Distribution) -> tuple[Tensor, Tensor]:
    """The divergence of every position, and its gradient with respect to the head's logits.

    Args:
        name: one of LOSSES. "survival" is the forward KL; its weights are the caller's.
        teacher, head: of shapes that broadcast. The head's are overwritten.

    Returns:
        Nats (total variation: 0 to 1), [C, K], and the gradient [C, K, D].
    """
    p, q = teacher.probabilities, head.probabilities
    match name:
        case "forward_kl" | "survival":  # sum p (log p - log q)
            return teacher.certainty - head.logits.mul_(p).sum(-1) + head.norm, q.sub_(p)
        case "reverse_kl":  # sum q (log q - log p)
            assert teacher.logp is not None
            ratio = head.logits.sub_(head.norm[..., None]).sub_(teacher.logp)
            value = (q * ratio).sum(-1)
            return value, q.mul_(ratio.sub_(value[..., None]))
        case "total_variation":  # sum max(p - q, 0)
            gap = torch.sub(p, q, out=head.logits)
            short = (gap > 0).to(q.dtype)
            pull = (q * short).sum(-1, keepdim=True)
            return gap.clamp_(min=0).sum(-1), q.mul_(pull - short)
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


def acceptance(teacher: Taught, head: Distribution) -> Tensor:
    """The probability that a token drawn from q survives verification, sum min(p, q)."""
    return torch.minimum(teacher.probabilities, head.probabilities).sum(-1)
