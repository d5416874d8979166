"""The noise of a request's draws, which may be shared with head and sources.

The noise of a draw depends only on the seed and on the token's position in the output. A draft head that adds it to its
own scores proposes the drawn token wherever it agrees with the target, though it does not know the target's scores
(Gumbel coupling: Daliri, Musco and Suresh, arXiv 2408.07978). So even a draw from a flat distribution can be predicted.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import LogitsProcessorList

LEAST = 2.0**-24
"""What is known to be possible is at least so likely; fp16 rounds smaller numbers to zero."""
MEAN_GUMBEL = 0.5772156649
"""Of the noise of a token that nobody names."""
LEFT_OUT = 3.0
"""Nats taken off a token that the settings would leave out if the head were the target, which may see it otherwise."""


@dataclass
class Noise:
    """What a round's draws add to the target's scores.

    Attributes:
        gumbel_PV: standard Gumbel noise by position in the output, from that of the root's child on.
        temperature: by which scores are divided.
        warpers: the request's temperature and filters (top-k, top-p and the like), in order; None without a filter.
    """

    gumbel_PV: Tensor
    temperature: float
    warpers: LogitsProcessorList | None = None

    def told(self, scores_MN: Tensor, ids_N: Tensor, depth: int) -> Tensor:
        """Scores plus noise: the argmax of a row is the token that is drawn, if the scores are the target's.

        Args:
            scores_MN: log-probabilities, up to a constant for each row.
            ids_N: ids of the tokens, [N] for all rows, or [M, N].
            depth: of the tokens in the tree.
        """
        place_N = ids_N + (depth - 1) * self.gumbel_PV.shape[1]
        return scores_MN / self.temperature + self.gumbel_PV.view(-1).take(place_N)

    def foreseen(self, logits_BD: Tensor, ids_D: Tensor, depth: int) -> Tensor:
        """A head's scores plus noise. Tokens that top-k, top-p or the like would remove rank below the others.

        Args:
            logits_BD: the head's logits over the draft vocabulary.
            ids_D: target ids of that vocabulary.
            depth: of the tokens in the tree.
        """
        scores_BD = self.told(logits_BD, ids_D, depth)
        if self.warpers is None:
            return scores_BD
        kept_BD = self.warpers(ids_D[None], logits_BD)  # type: ignore[arg-type]
        return scores_BD - LEFT_OUT * kept_BD.isneginf()

    def ranked(self, ids_MK: Tensor, probs_MK: Tensor, depth: int, count: int) -> tuple[Tensor, Tensor]:
        """The `count` successors that are likeliest to be drawn, and the log-probability of each being drawn.

        Args:
            ids_MK: candidates, -1 where there is none.
            probs_MK: their probabilities; what is missing to 1 belongs to tokens that are not listed.
            depth: of the tokens in the tree.
        """
        none_MK = ids_MK < 0
        scores_MK = self.told(probs_MK.clamp(min=LEAST).log(), ids_MK.clamp(min=0).long(), depth)
        rest_M1 = (1 - probs_MK.masked_fill(none_MK, 0.0).sum(dim=1, keepdim=True)).clamp(min=LEAST).log() + MEAN_GUMBEL
        scores_MK = torch.cat((scores_MK.masked_fill(none_MK, -torch.inf), rest_M1), dim=1)
        best = scores_MK.log_softmax(dim=1)[:, :-1].topk(count, dim=1)
        return ids_MK.gather(1, best.indices), best.values


def gumbel(seed: int | Tensor, place: int | Tensor, places: int, vocab_size: int, device: torch.device) -> Tensor:
    """Standard Gumbel noise for consecutive positions of the output, [places, V] float32.

    It is a pure function of seed, position and token id (counters through the finaliser of SplitMix64, Steele et al.
    2014). So a position has the same noise whichever round reaches it. argmax(score + noise) samples softmax(score).

    Args:
        seed, place: the seed and the first position; ints, or int64 tensors of one element that a captured graph reads.
        places: number of positions.
    """
    place_P = torch.arange(places, device=device) + place
    token_V = torch.arange(vocab_size, device=device)
    key_P = _mix(place_P * signed(0x9E3779B97F4A7C15) + (seed if isinstance(seed, Tensor) else signed(seed)))
    bits_PV = _mix(key_P[:, None] + token_V * signed(0xD1342543DE82EF95))
    # The top 32 bits as a number in (0, 1); small ones keep their relative precision in float32.
    # The largest would round to 1, whose noise is infinite.
    uniform_PV = ((bits_PV >> 32) + 2**31).float().add_(0.5).mul_(2.0**-32).clamp_(max=1 - 2.0**-24)
    # -log1p(-u) is exponential, and minus its logarithm Gumbel.
    return uniform_PV.neg_().log1p_().neg_().log_().neg_()


def _mix(bits: Tensor) -> Tensor:
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        bits = (bits ^ ((bits >> shift) & (2 ** (64 - shift) - 1))) * signed(factor)
    return bits ^ ((bits >> 31) & (2**33 - 1))


def signed(value: int) -> int:
    """The 64-bit pattern of an integer as a signed one, which is what int64 tensors hold."""
    value &= 2**64 - 1
    return value - 2**64 if value >= 2**63 else value
