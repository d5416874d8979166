"""One reading of some answers by the target, which all checks share, and what the head makes of it.

Shape suffixes as in `distill`; A tokens of answers, L layers.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm
from transformers import PreTrainedModel

from graft_inference.errors import GraftError
from graft_inference.heads.block.model import BlockHead
from graft_inference.heads.eagle3.model import DraftHead
from graft_inference.heads.families import Head, drop_copies, possible_copies
from graft_train.config.head import HeadTrainConfig
from graft_train.data.samples import Sample
from graft_train.data.states import PackedTarget, TargetStates
from graft_train.distill.batches import TokenSample, collate
from graft_train.distill.block.strategy import BlockStrategy
from graft_train.distill.eagle3.strategy import Eagle3Strategy
from graft_train.distill.metrics import StepMetrics, StepSums
from graft_train.distill.strategy import Strategy

CHUNK = 256
"""Positions whose logits over the whole vocabulary exist at a time."""
FAR = 2048
"""Tokens of the long text at most."""
LEAST_STEPS, MOST_STEPS = 3, 7
"""Draft steps that are looked at; so many as plans draft, between these."""


@dataclass
class Predicted:
    """What the target says of the tokens of an answer, from the text before each.

    Attributes:
        agrees_A: whether the token is its likeliest one.
        likeliest_A: the probability of that one at the temperature that drew the answer: how often its own draws agree.
        best_A, gap_A: its best logit, and by how much the second is less.
    """

    agrees_A: Tensor
    likeliest_A: Tensor
    best_A: Tensor
    gap_A: Tensor


@dataclass
class Read:
    """An answer, as the target reads it.

    Attributes:
        states: the aux hidden states of all layers that any check asks for, and what lm_head reads; on the CPU.
        temperature: that drew the answer; None where nobody says so.
    """

    sample: TokenSample
    states: TargetStates
    temperature: float | None
    predicted: Predicted


@dataclass
class Evidence:
    """Attributes:
    trained, held_out, yours: answers that the head was trained on, others of the same kind, and those to the
        user's own prompts.
    layers: of the target, whose outputs were kept.
    steps: draft steps that are looked at.
    """

    target: PackedTarget
    head: Head
    layers: tuple[int, ...]
    steps: int
    trained: list[Read] = field(default_factory=list)
    held_out: list[Read] = field(default_factory=list)
    yours: list[Read] = field(default_factory=list)

    @property
    def usual(self) -> list[Read]:
        """What most checks look at: answers that it has not seen, where there are any."""
        return self.held_out or self.trained or self.yours

    def acceptance(self, reads: Sequence[Read], head: Head | None = None) -> StepMetrics:
        """Of the head, or another that reads layers of `layers`, as a greedy chain behind every token of the answers.

        Returns:
            See `StepMetrics`; of all answers together.
        """
        return self.sums(reads, head).metrics()

    @torch.no_grad()
    def sums(self, reads: Sequence[Read], head: Head | None = None) -> StepSums:
        """What `acceptance` is made of."""
        head = head or self.head
        strategy = strategy_of(head, self.target, self.steps).to(self.target.device).eval()
        embed = getattr(head, "embed_tokens", None) or self.target.embed
        places = [self.layers.index(layer) for layer in head.config.aux_layer_ids]
        sums_6K = torch.zeros(6, strategy.steps, dtype=torch.float64, device=self.target.device)
        for read in reads:
            batch = collate([read.sample], [0], self.target.device)
            aux_SLH = read.states.aux_SE.unflatten(1, (len(self.layers), -1))
            states = replace(read.states, aux_SE=aux_SLH[:, places].flatten(1)).to(self.target.device)
            prepared = strategy.prepare(batch, states, seed=0)
            embedding_SH = embed(batch.tokens_S[None])[0]
            sums_6K += strategy(prepared, embedding_SH, torch.ones(strategy.steps, device=embedding_SH.device))[1]
        return StepSums.unstack(sums_6K)

    def read(self, samples: Sequence[Sample], what: str) -> list[Read]:
        """The target's reading of these answers; those of one token, which no draft foretells, are left out."""
        found = []
        for sample in tqdm(samples, desc=f"doctor: {what}", unit="answer", leave=False):
            one = TokenSample(torch.tensor(sample.ids, dtype=torch.long), sample.loss_mask_S)
            if (one.loss_mask_S[1:-1] & one.loss_mask_S[2:]).any():
                temperature = sample.sampling.get("temperature")
                found.append(self.read_one(one, None if temperature is None else float(temperature)))
        return found

    def read_one(self, sample: TokenSample, temperature: float | None) -> Read:
        states = self.target.states(sample.tokens_S.to(self.target.device), [len(sample.tokens_S)])
        return Read(sample, states.to(torch.device("cpu")), temperature, self._predicted(sample, states, temperature))

    @torch.no_grad()
    def _predicted(self, sample: TokenSample, states: TargetStates, temperature: float | None) -> Predicted:
        assert states.final_SH is not None
        lm_head_VH, rows = self.target.lm_head_VH, []
        places_A = sample.loss_mask_S[1:].nonzero().flatten()
        for chunk_A in places_A.split(CHUNK):
            logits_AV = F.linear(states.final_SH[chunk_A.to(lm_head_VH.device)], lm_head_VH).float()
            token_A1 = sample.tokens_S[chunk_A + 1].to(logits_AV.device)[:, None]
            top_A2 = logits_AV.topk(2, dim=-1)
            rows.append(
                (
                    top_A2.indices[:, 0] == token_A1[:, 0],
                    _likeliest(logits_AV, temperature),
                    top_A2.values[:, 0],
                    top_A2.values[:, 0] - top_A2.values[:, 1],
                )
            )
        return Predicted(*(torch.cat(column).cpu() for column in zip(*rows, strict=True)))

    def far(self, reads: Sequence[Read], limit: int) -> tuple[list[Read], Read | None]:
        """Answers far behind the beginning of one long text, and the text: some conversations one behind the other.

        Args:
            limit: positions that target and head can have.

        Returns:
            The answers as they stand alone, and the text, whose trained tokens are these answers'. None where there
            is too little text.
        """
        chosen: list[Read] = []
        room = min(limit, FAR)
        for read in sorted(reads, key=lambda read: len(read.sample.tokens_S)):
            if len(read.sample.tokens_S) <= room:
                chosen.append(read)
                room -= len(read.sample.tokens_S)
        chosen.reverse()  # the shortest at the end: alone, their answers stand near the beginning
        lengths = [len(read.sample.tokens_S) for read in chosen]
        starts = [sum(lengths[:place]) for place in range(len(lengths))]
        half = sum(lengths) / 2
        behind = [read for start, read in zip(starts, chosen, strict=True) if start >= half]
        if len(behind) < 2 or half < 2 * len(behind[0].sample.tokens_S):
            return [], None
        tokens_S = torch.cat([read.sample.tokens_S for read in chosen])
        masks = [read.sample.loss_mask_S & (start >= half) for start, read in zip(starts, chosen, strict=True)]
        return behind, self.read_one(TokenSample(tokens_S, torch.cat(masks)), 0.0)


@contextmanager
def evidence_of(model: PreTrainedModel, head: Head, layers: tuple[int, ...], steps: int) -> Iterator[Evidence]:
    """Reads with this model while the block runs; it is given back as it was.

    Args:
        layers: of the target, whose outputs any check asks for; ascending.
        steps: draft steps.

    Raises:
        GraftError: a family that cannot be read so, or a head that cannot be run beside its target's embeddings.
    """
    target = PackedTarget(model, layers)
    try:
        head = head.float()
        if possible_copies(head):
            ids_V = torch.arange(head.config.vocab_size, device=target.device)
            drop_copies(head, target.embed(ids_V[None])[0].cpu(), target.lm_head_VH.cpu())
        if isinstance(head, BlockHead) and (own := possible_copies(head)):
            raise GraftError(f"a block head with {' and '.join(own)} of its own cannot be examined: only EAGLE-3 heads")
        yield Evidence(target, head.to(target.device), layers, steps)
    finally:
        target.release()


def _likeliest(logits_AV: Tensor, temperature: float | None) -> Tensor:
    """Of each position, how often a draw is the likeliest token; nobody's temperature is taken to be 1."""
    if temperature == 0:
        return torch.ones_like(logits_AV[:, 0])
    scaled_AV = logits_AV / (temperature or 1.0)
    return (scaled_AV.amax(dim=-1) - scaled_AV.logsumexp(dim=-1)).exp()


def strategy_of(head: Head, target: PackedTarget, steps: int) -> Strategy:
    """What `distill` measures a head with."""
    settings = HeadTrainConfig(ttt_steps=steps)
    if isinstance(head, DraftHead):
        return Eagle3Strategy(head, target, settings)
    return BlockStrategy(head, target, settings)


def accepted(metrics: StepMetrics) -> float:
    """Drafted tokens that a round of a chain is expected to keep."""
    return metrics.acceptance_length - 1


def positions(reads: Sequence[Read]) -> int:
    """Tokens of the answers."""
    return sum(len(read.predicted.gap_A) for read in reads)
