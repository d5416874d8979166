"""Draws the target's token at every node of a tree, from the distribution that a request asks for.

The tree is fixed before the draws. At each node the target's own token is drawn, and the emitted path follows the draws
(verification.py). So it is an ancestral sample of the target. The noise of a draw depends only on the seed and on the
token's position in the output. Nodes of one depth therefore share it. That is exact, because only one of them is on the
emitted path. And the same seed gives the same text, whatever trees were verified.

For the same reason the noise may be shared with head and sources (noise.py).
"""

from collections.abc import Set
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

from ..errors import GraftError
from ..noise import Noise, gumbel
from ..tree import DraftTree, Source

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


class Sampler:
    """Draws the target's token after every node of one request's trees.

    Args:
        processors: transformers' logits processors, applied in order.
        greedy: take the likeliest token.
        seed: of the noise, any 64-bit integer.
        ends: tokens that end the output; no processor is called after one of them.
        length: most tokens of prompt and output together; None: no limit.
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
        """A sampler with a temperature and a seed, and no other setting."""
        warpers = [TemperatureLogitsWarper(float(temperature))] if temperature not in (0, 1) else []
        return cls(LogitsProcessorList(warpers), temperature == 0, seed)

    def noise(self, place: int | Tensor, places: int, vocab_size: int, device: torch.device) -> Noise | None:
        """Returns the noise of consecutive positions of the output; None for greedy decoding.

        Trees of successive rounds reach the same positions, so noise is made some positions ahead, and kept. A CUDA
        graph, to which the position is known only when it is replayed, makes its own.

        Args:
            place: the first position: the number of tokens emitted so far.
            places: number of positions.
            vocab_size: of the target.
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
        """The same noise, with this request's temperature and filters."""
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
        """Draws the target's token after every node that the output may reach.

        Args:
            noise: of the positions that the tree reaches, and of one more.
            history_S: prompt and emitted tokens, the root last; needed if `needs_history`.
            logprobs: whether log-probabilities are wanted.

        Returns:
            The tokens, [N] int64, -1 at nodes off the emitted path that were not looked at; and their
            log-probabilities, [N] float32, or None.
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
        """Applies the processors; raises GraftError where one does not return a score for every token."""
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
