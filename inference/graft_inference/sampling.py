"""The distribution a request wants of the target, and draws from it at every node of a tree.

The tree is fixed before the draws. At each node the target's own token is drawn; the emitted path follows the
draws (verification.py), so that it is an ancestral sample of the target. The noise of a draw depends on the seed
and on the token's place in the output alone. Nodes of one depth therefore share it, which is exact, because
only one of them is on the path; and the same seed gives the same text whatever tree found it.

For the same reason the noise may be told to whoever proposes tokens. A draft head that adds it to its own scores
meets the draw wherever both agree, though neither knows what the other will say (Gumbel coupling: Daliri, Musco and
Suresh, arXiv 2408.07978): a draw from a flat distribution is foreseen as well as its likeliest token.
"""

from collections.abc import Set
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor
from transformers import (
    EpsilonLogitsWarper,
    EtaLogitsWarper,
    LogitsProcessorList,
    MinPLogitsWarper,
    SuppressTokensLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
    TypicalLogitsWarper,
)

from .errors import GraftError
from .tree import DraftTree, Source

TRUNCATING = {
    TopKLogitsWarper,
    TopPLogitsWarper,
    MinPLogitsWarper,
    TypicalLogitsWarper,
    EpsilonLogitsWarper,
    EtaLogitsWarper,
}
"""Processors that leave unlikely tokens out."""
WARPERS = {TemperatureLogitsWarper, *TRUNCATING}
CONTEXT_FREE = {SuppressTokensLogitsProcessor, *WARPERS}
"""Processors that read nothing but the scores, so that all nodes can go through them at once."""

AHEAD = 16
"""Places whose noise is made before they are reached."""
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
        gumbel_PV: by place, from that of the root's child on.
        temperature: that the scores are divided by.
        warpers: what else unlikely tokens go through, temperature included, in the order of the request; None where no
            token is left out.
    """

    gumbel_PV: Tensor
    temperature: float
    warpers: LogitsProcessorList | None = None

    def told(self, scores_MN: Tensor, ids_N: Tensor, depth: int) -> Tensor:
        """Scores of tokens at that depth of a tree as they will be drawn, if they are the target's.

        Args:
            scores_MN: log-probabilities, but for a constant of each row.
            ids_N: the tokens, of all rows or of each.
        """
        place_N = ids_N + (depth - 1) * self.gumbel_PV.shape[1]
        return scores_MN / self.temperature + self.gumbel_PV.view(-1).take(place_N)

    def foreseen(self, logits_BD: Tensor, ids_D: Tensor, depth: int) -> Tensor:
        """A head's scores as they will be drawn. What top-k, top-p or the like would leave out comes behind the rest.

        Args:
            logits_BD: over the draft vocabulary.
            ids_D: that vocabulary.
        """
        scores_BD = self.told(logits_BD, ids_D, depth)
        if self.warpers is None:
            return scores_BD
        kept_BD = self.warpers(ids_D[None], logits_BD)  # type: ignore[arg-type]
        return scores_BD - LEFT_OUT * kept_BD.isneginf()

    def ranked(self, ids_MK: Tensor, probs_MK: Tensor, depth: int, count: int) -> tuple[Tensor, Tensor]:
        """The `count` of these successors that are likeliest to be drawn, and their log-probabilities of it.

        Args:
            ids_MK: -1 where there is none.
            probs_MK: of each; what they leave to 1 belongs to tokens that are not named.
            depth: at which they stand.
        """
        none_MK = ids_MK < 0
        scores_MK = self.told(probs_MK.clamp(min=LEAST).log(), ids_MK.clamp(min=0).long(), depth)
        rest_M1 = (1 - probs_MK.masked_fill(none_MK, 0.0).sum(dim=1, keepdim=True)).clamp(min=LEAST).log() + MEAN_GUMBEL
        scores_MK = torch.cat((scores_MK.masked_fill(none_MK, -torch.inf), rest_M1), dim=1)
        best = scores_MK.log_softmax(dim=1)[:, :-1].topk(count, dim=1)
        return ids_MK.gather(1, best.indices), best.values


class Sampler:
    """Draws the target's token after every node of one request's trees.

    Args:
        processors: transformers' logits processors, applied in order.
        greedy: take the likeliest token.
        seed: of the noise, any 64-bit integer.
        ends: tokens behind which no processor is asked; the output ends there.
        length: of prompt and output together, where it ends at the latest.
    """

    def __init__(
        self,
        processors: LogitsProcessorList,
        greedy: bool,
        seed: int | Tensor,
        ends: Set[int] = frozenset(),
        length: int | None = None,
    ) -> None:
        self.processors: Any = processors  # whose annotations ask for legacy tensor types
        self.greedy = greedy
        self.seed = seed
        self.ends = ends
        self.length = length
        self.needs_history = any(type(processor) not in CONTEXT_FREE for processor in processors)
        warpers = [one for one in processors if type(one) in WARPERS]
        temperatures = [one.temperature for one in warpers if type(one) is TemperatureLogitsWarper]
        self.temperature = temperatures[-1] if temperatures else 1.0
        self.warpers = LogitsProcessorList(warpers) if len(warpers) > len(temperatures) else None
        self._made_from, self._made_PV = 0, torch.empty(0, 0)

    @classmethod
    def of(cls, temperature: float, seed: int) -> Self:
        """Of a request that says nothing else."""
        warpers = [TemperatureLogitsWarper(float(temperature))] if temperature not in (0, 1) else []
        return cls(LogitsProcessorList(warpers), temperature == 0, seed)

    def noise(self, place: int | Tensor, places: int, vocab_size: int, device: torch.device) -> Noise | None:
        """Noise of so many places; None where nothing is drawn by chance.

        Trees of successive rounds reach the same places. Their noise is made once, some places ahead; a captured
        graph, which learns the place when it is replayed, makes its own.

        Args:
            place: number of tokens emitted so far: where the token after the root will stand.
        """
        if self.greedy:
            return None
        if isinstance(place, Tensor):
            return self.adding(gumbel(self.seed, place, places, vocab_size, device))
        first = place - self._made_from
        if not 0 <= first <= len(self._made_PV) - places:
            self._made_PV = gumbel(self.seed, place, places + AHEAD, vocab_size, device)
            self._made_from, first = place, 0
        return self.adding(self._made_PV[first : first + places])

    def adding(self, gumbel_PV: Tensor) -> Noise:
        """The noise of these draws, with what the scores go through before."""
        return Noise(gumbel_PV, self.temperature, self.warpers)

    def draw(
        self,
        tree: DraftTree,
        logits_NV: Tensor,
        noise: Noise | None,
        max_depth: int,
        history_S: Tensor | None,
        logprobs: bool,
    ) -> tuple[Tensor, Tensor | None]:
        """The target's token after every node that the output may reach.

        Args:
            noise: of the places that the tree reaches, and of one more.
            history_S: prompt and emitted tokens, the root last; needed if `needs_history`.
            logprobs: whether log-probabilities are wanted.

        Returns:
            tokens [N] int64, -1 where a node is off the path and was not looked at; and their
            log-probabilities [N] float32, or None.
        """
        if self.greedy and not self.processors:
            tokens_N = logits_NV.argmax(dim=-1)
            return tokens_N, _logprobs(logits_NV, tokens_N) if logprobs else None
        if self.needs_history and history_S is not None:
            return self._walk(tree, logits_NV, noise, max_depth, history_S, logprobs)
        scores_NV = self._scores(tree.tokens_N[:, None], logits_NV)
        tokens_N = _choose(scores_NV, noise, tree.depths_N)
        return tokens_N, _logprobs(scores_NV, tokens_N) if logprobs else None

    def _scores(self, ids_NS: Tensor, logits_NV: Tensor) -> Tensor:
        """Raises GraftError where a processor answers with something else than scores of the vocabulary."""
        scores_NV: Tensor = self.processors(ids_NS, logits_NV.float())
        if not isinstance(scores_NV, Tensor) or scores_NV.shape != logits_NV.shape:
            found = list(scores_NV.shape) if isinstance(scores_NV, Tensor) else type(scores_NV).__name__
            raise GraftError(
                f"logits_processor made {found} of scores of {list(logits_NV.shape)}: return one for every token"
            )
        return scores_NV

    def _walk(
        self,
        tree: DraftTree,
        logits_NV: Tensor,
        noise: Noise | None,
        max_depth: int,
        history_S: Tensor,
        logprobs: bool,
    ) -> tuple[Tensor, Tensor | None]:
        """Draws node by node along the emitted path, as far as the tree has it.

        A processor sees each prefix of the output once and in order, as in plain decoding, and none beyond its end, so
        even one that keeps state of its own works. That costs a host read per accepted node, paid by such alone.
        """
        tokens_N = torch.full_like(tree.tokens_N, -1)
        logp_N = torch.zeros_like(tree.logp_N)
        ids_1S, row_1 = history_S[None], torch.zeros_like(tree.tokens_N[:1])
        for _ in range(max_depth + 1):
            scores_1V = self._scores(ids_1S, logits_NV[row_1])
            token_1 = _choose(scores_1V, noise, tree.depths_N[row_1])
            tokens_N[row_1] = token_1
            if logprobs:
                logp_N[row_1] = _logprobs(scores_1V, token_1)
            child_N = (tree.parents_N == row_1) & (tree.tokens_N == token_1) & (tree.sources_N > Source.ROOT)
            ids_1S = torch.cat((ids_1S, token_1[None]), dim=1)
            token, is_there = torch.cat((token_1, child_N.any()[None])).tolist()
            if not is_there or token in self.ends or ids_1S.shape[1] == self.length:
                break
            row_1 = child_N.to(torch.uint8).argmax(dim=0, keepdim=True)
        return tokens_N, logp_N if logprobs else None


def _choose(scores_NV: Tensor, noise: Noise | None, depths_N: Tensor) -> Tensor:
    if noise is None:
        return scores_NV.argmax(dim=-1)
    return noise.gumbel_PV.index_select(0, depths_N).add_(scores_NV).argmax(dim=-1)


def _logprobs(scores_NV: Tensor, tokens_N: Tensor) -> Tensor:
    return scores_NV.float().log_softmax(dim=-1).gather(1, tokens_N[:, None])[:, 0]


def gumbel(seed: int | Tensor, place: int | Tensor, places: int, vocab_size: int, device: torch.device) -> Tensor:
    """Standard Gumbel noise for consecutive places of the output, [places, V] float32.

    Seed and first place may be int64 tensors of one element, which a captured graph reads anew.

    A pure function of seed, place and token id (counters through the finaliser of SplitMix64, Steele et al.
    2014), so that a place keeps its noise however the rounds fall. argmax(score + noise) samples
    softmax(score).
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
