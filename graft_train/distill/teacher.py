"""The target's distribution that a head is trained towards, over the draft vocabulary, from stored states."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from graft_train.data.states import TargetStates

Teacher = Callable[[Tensor, Tensor], Tensor]
"""(positions [C], out [C, D] float32) -> out, with the target's logits there over the draft vocabulary."""
ABSENT = -1e4
"""A logit whose probability is zero in fp32, and which is finite, as zero times infinity is not."""


def teacher_of(states: TargetStates, teacher_DH: Tensor, target_ids_D: Tensor, vocab_size: int) -> Teacher:
    """The teacher that these states allow.

    Args:
        teacher_DH: the target's lm_head's rows of the draft vocabulary.
        target_ids_D: the draft vocabulary.
        vocab_size: the target's.
    """
    if states.final_SH is not None:
        return final_state_teacher(states.final_SH.to(teacher_DH.dtype), teacher_DH)
    assert states.top_ids_SM is not None
    assert states.top_logits_SM is not None
    return top_logits_teacher(states.top_ids_SM, states.top_logits_SM, target_ids_D, vocab_size)


def final_state_teacher(final_SH: Tensor, teacher_DH: Tensor) -> Teacher:
    """The target's own logits.

    Args:
        final_SH: what the target's lm_head reads.
        teacher_DH: the lm_head's rows of the draft vocabulary.
    """
    return lambda index_C, out_CD: product(final_SH[index_C], teacher_DH, out_CD)


def product(states_CH: Tensor, weight_DH: Tensor, out_CD: Tensor) -> Tensor:
    """`F.linear` into memory that is there: on a CPU new memory costs more than a softmax in it."""
    device = states_CH.device.type
    rounded = torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
    if states_CH.dtype == weight_DH.dtype == out_CD.dtype and not rounded:
        return torch.mm(states_CH, weight_DH.T, out=out_CD)
    return out_CD.copy_(F.linear(states_CH, weight_DH))


def top_logits_teacher(ids_SM: Tensor, logits_SM: Tensor, target_ids_D: Tensor, vocab_size: int) -> Teacher:
    """The target's M best logits; what is not among them has no probability.

    Where the draft vocabulary has none of them, the distribution means nothing.

    Args:
        target_ids_D: the draft vocabulary.
    """
    count = len(target_ids_D)
    place_V = torch.full((vocab_size,), count, device=ids_SM.device)
    place_V[target_ids_D] = torch.arange(count, device=ids_SM.device)

    def logits(index_C: Tensor, out_CD: Tensor) -> Tensor:
        # What the draft vocabulary lacks goes to a column behind it.
        wide = torch.full((len(index_C), count + 1), ABSENT, device=ids_SM.device)
        return out_CD.copy_(wide.scatter_(1, place_V[ids_SM[index_C]], logits_SM[index_C].float())[:, :count])

    return logits
