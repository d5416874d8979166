"""Retrieval by longer contexts: what followed the last two and three tokens, backing off to the matrix."""

import hashlib
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ..errors import GraftError
from ..noise import LEAST, Noise
from ..tree import DraftTree
from .successor_matrix import SuccessorMatrix, Template

ORDERS = (3, 2)
"""Lengths of the contexts that are looked up, the longest first."""
LONGEST = ORDERS[0]
KEY_BITS = 42
TAG_BITS = 31
ID_BITS = 21
"""Of a token's id where it stands below a key."""
SLOTS = 8
"""Contexts that share a bucket."""


def _coefficient(order: int, place: int) -> int:
    digest = hashlib.sha256(f"graft ngram {order} {place}".encode()).digest()
    return int.from_bytes(digest[:8], "little", signed=True) | 1


@cache
def _multipliers(device: torch.device) -> tuple[Tensor, Tensor]:
    """Odd random multipliers [O, C], of which a context of o tokens has the last o columns, and salts [O]."""
    rows = [[_coefficient(o, c) if c >= LONGEST - o else 0 for c in range(LONGEST)] for o in ORDERS]
    salts = [_coefficient(o, LONGEST) for o in ORDERS]
    return torch.tensor(rows, device=device), torch.tensor(salts, device=device)


def context_keys(windows_MC: Tensor) -> Tensor:
    """Keys of KEY_BITS bits of the contexts that end each window, by ORDERS: [M, O] int64.

    The top bits of an inner product modulo 2**64 (multiply-shift hashing, Dietzfelbinger 1996): two contexts
    of an order share a key with probability 2**-KEY_BITS.

    Args:
        windows_MC: the last LONGEST tokens, int64; -1 before the first.
    """
    coefficients_OC, salts_O = _multipliers(windows_MC.device)
    sums_MO = (windows_MC[:, None] * coefficients_OC).sum(dim=-1) + salts_O
    return sums_MO >> (64 - KEY_BITS) & ((1 << KEY_BITS) - 1)


@dataclass
class NgramTable:
    """A corpus's longer contexts and their likeliest successors, in buckets of fixed size.

    A context lies in the bucket that the top bits of its key name, under the low bits as its tag; buckets that
    were too small kept the contexts seen most.

    Attributes:
        tags_RS: int32 [R, SLOTS], -1 for an empty slot; R, the number of buckets, is a power of two.
        successors_RSK: int32 [R, SLOTS, k], the most frequent first; -1 for none.
        counts_RSK: int32, how often each followed.
        totals_RS: int32, how often the context was seen.
        made_for: the target it belongs to, as its file says it.
    """

    tags_RS: Tensor
    successors_RSK: Tensor
    counts_RSK: Tensor
    totals_RS: Tensor
    made_for: dict[str, Any] | None = None

    def __post_init__(self) -> None:
        if not (0 < self.buckets <= 1 << KEY_BITS and self.buckets & (self.buckets - 1) == 0):
            raise GraftError(f"an n-gram table needs a power of two of buckets, not {self.buckets}")
        counts_RSK = self.counts_RSK.float()
        distinct_RS1 = (counts_RSK > 0).sum(dim=2, keepdim=True)
        passed_RS1 = distinct_RS1 / (self.totals_RS[..., None] + distinct_RS1).clamp(min=1)
        ratios_RSJ = torch.cat((1 / passed_RS1.clamp(min=LEAST), counts_RSK / distinct_RS1.clamp(min=1)), dim=2)
        ids_RSJ = F.pad(self.successors_RSK, (1, 0), value=-1)
        rows_RSW = torch.cat((ids_RSJ, ratios_RSJ.view(torch.int32), passed_RS1.view(torch.int32)), dim=2)
        # One row to gather per context; that of what is not found stands before each bucket's own.
        absent_W = torch.tensor([-1] * (1 + self.k) + [0] * (2 + self.k), dtype=torch.int32, device=rows_RSW.device)
        absent_W.view(torch.float32)[[1 + self.k, -1]] = 1.0
        self._rows_XW = torch.cat((absent_W.expand(self.buckets, 1, -1), rows_RSW), dim=1).flatten(0, 1)
        self._tags_RS = self.tags_RS.long()
        self._places_S = torch.arange(1, SLOTS + 1, device=rows_RSW.device)
        self._shift = KEY_BITS - (self.buckets.bit_length() - 1)

    @property
    def buckets(self) -> int:
        return len(self.tags_RS)

    @property
    def k(self) -> int:
        return self.successors_RSK.shape[2]

    def to(self, device: torch.device) -> "NgramTable":
        names = ("tags_RS", "successors_RSK", "counts_RSK", "totals_RS")
        return replace(self, **{name: getattr(self, name).to(device) for name in names})

    def find(self, keys_Q: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """What follows contexts, with the parts of Witten and Bell's estimate. J is 1 + k.

        Returns:
            ids_QJ: successors, int32, -1 for none. Place 0 is left for what the request's own text says.
            ratios_QJ: their probabilities over `passed_Q`, where the request has said 1 of 2: place 0
                as 1 / `passed_Q`, the others count / distinct.
            passed_Q: what is left for the unseen, distinct / (total + distinct); 1 if not found.
        """
        bucket_Q = keys_Q >> self._shift
        same_QS = self._tags_RS.index_select(0, bucket_Q) == (keys_Q & ((1 << TAG_BITS) - 1))[:, None]
        place_Q = (same_QS * self._places_S).amax(dim=1)  # 0: not found
        rows_QW = self._rows_XW.index_select(0, place_Q.add_(bucket_Q, alpha=1 + SLOTS))
        ratios_QJ = rows_QW.view(torch.float32)[:, 1 + self.k : -1]
        return rows_QW[:, : 1 + self.k], ratios_QJ, rows_QW.view(torch.float32)[:, -1]


class RequestNgrams:
    """What followed each longer context the last time, in a request's own text.

    Directly mapped: of two contexts in one place the later stays.

    Args:
        capacity: contexts kept, a power of two.
    """

    def __init__(self, device: torch.device, capacity: int = 1 << 14) -> None:
        # A key above its successor's id: both are written at once.
        self.entries_X = torch.full((capacity,), -1, dtype=torch.long, device=device)
        self._stamps_X = torch.full((capacity,), -1, dtype=torch.long, device=device)
        self._written = 0

    def learn(self, windows_AC: Tensor, successors_A: Tensor) -> None:
        """What follows the last tokens of each window, in the order of the text."""
        keys_Q = context_keys(windows_AC).flatten()
        place_Q = keys_Q & (len(self.entries_X) - 1)
        stamp_Q = torch.arange(self._written, self._written + len(keys_Q), device=keys_Q.device)
        last_Q = self._stamps_X.scatter_reduce_(0, place_Q, stamp_Q, "amax")[place_Q] - self._written
        entry_AO = (keys_Q.view(-1, len(ORDERS)) << ID_BITS) + successors_A[:, None]
        self.entries_X[place_Q] = entry_AO.flatten()[last_Q]
        self._written += len(keys_Q)

    def find(self, keys_MO: Tensor) -> Tensor:
        """The successor of each context, -1 for none; int64 of the keys' shape."""
        entry_MO = self.entries_X.take(keys_MO & (len(self.entries_X) - 1))
        return (entry_MO & ((1 << ID_BITS) - 1)).where(entry_MO >> ID_BITS == keys_MO, -1)


class NgramSource:
    """Retrieval that knows longer contexts: takes the matrix's place, and is told the request's text besides.

    A node's successors are those of its own path's last tokens: of three and of two, in the request's text and in
    the corpus, and of the last one in the matrix. Each source passes on the share of probability that it keeps for
    what it has not seen (Witten and Bell 1991: distinct / (seen + distinct)) to the next.

    Args:
        corpus: shared by all requests, never changed.
        successors: this request's matrix; whoever teaches it need not tell the source.
        request: where this request's own text is kept, None: nowhere yet.
    """

    def __init__(self, corpus: NgramTable, successors: SuccessorMatrix, request: RequestNgrams | None = None) -> None:
        if successors.probs_VK is None:
            raise GraftError("n-grams back off to a matrix with probabilities: build the corpus again")
        self.corpus = corpus
        self.successors = successors
        device = successors.ids_VK.device
        self.request = request or RequestNgrams(device)
        self.recent_C = torch.full((LONGEST,), -1, dtype=torch.long, device=device)
        # Whose mass a column shares out: the matrix's has what the last order passed on.
        orders = torch.arange(len(ORDERS), device=device).repeat_interleave(1 + corpus.k)
        self._order_C = torch.cat((orders, orders[-1].expand(successors.k)))
        width = len(self._order_C)
        self._earlier_CC = torch.ones((width, width), dtype=torch.bool, device=device).tril(-1)
        self._zero, self._half, self._one = torch.tensor([0.0, 0.5, 1.0], device=device).unbind()

    @property
    def k(self) -> int:
        return self.successors.k

    def read(self, tokens_A: Tensor) -> None:
        """Tells the request's text: first the whole prompt, then the tokens each round emitted; int64."""
        text = torch.cat((self.recent_C, tokens_A))
        self.recent_C = text[-LONGEST:]
        self.request.learn(text[:-1].unfold(0, LONGEST, 1), tokens_A)

    def expand(self, root_1: Tensor, template: Template, noise: Noise | None = None) -> DraftTree:
        """Retrieved nodes below the root, scored as by `SuccessorMatrix.expand`.

        Args:
            root_1: the root's token, [1] int64, the last one that `read` was told.
            noise: of the draws; ranks are then those of what will be drawn.

        Raises:
            GraftError: the template uses more successors than are kept.
        """
        if template.max_rank >= self.k:
            raise GraftError(
                f"the template uses successor rank {template.max_rank}, but the corpus keeps {self.k} successors: "
                "calibrate again with this corpus"
            )
        windows_MC = self.recent_C[None]
        tokens, steps = [root_1], [torch.zeros_like(root_1, dtype=torch.float32)]
        for depth, level in enumerate(template.levels, 1):
            if len(tokens) > 1:
                last_M1 = tokens[-1].index_select(0, level.above)[:, None]
                windows_MC = torch.cat((windows_MC.index_select(0, level.parents_above)[:, 1:], last_M1), dim=1)
            ids_MK, logp_MK = self.successors_of(windows_MC, template.max_rank + 1, noise, depth)
            tokens.append(ids_MK.take(level.flat))
            steps.append(logp_MK.take(level.flat))
        return template.found(torch.cat(tokens), torch.cat(steps))

    def successors_of(
        self, windows_MC: Tensor, count: int, noise: Noise | None = None, depth: int = 1
    ) -> tuple[Tensor, Tensor]:
        """The likeliest successors and their log-probabilities, [M, count]; -1 and -inf where there are fewer.

        Args:
            windows_MC: the last LONGEST tokens of M paths, int64; a path that ends with -1 has no successor.
            noise: of the draws, where the likeliest to be drawn at that depth are wanted.
        """
        ids_MC, probs_MC = self._summed(windows_MC)
        probs_MC = probs_MC.masked_fill_((windows_MC[:, -1:] < 0) | (ids_MC < 0), 0.0)
        ids_MC = ids_MC.masked_fill(probs_MC <= 0, -1)
        if noise is not None:
            return noise.ranked(ids_MC, probs_MC, depth, count)
        best = probs_MC.topk(count, dim=1)
        return ids_MC.gather(1, best.indices), best.values.log()

    def _summed(self, windows_MC: Tensor) -> tuple[Tensor, Tensor]:
        """What all sources name, and the probability that they give it together; 0 where it was named before."""
        assert self.successors.probs_VK is not None
        keys_MO = context_keys(windows_MC)
        own_MO = self.request.find(keys_MO)
        ids_QJ, ratios_QJ, passed_Q = self.corpus.find(keys_MO.flatten())
        ids_MOJ, ratios_MOJ = ids_QJ.view(*keys_MO.shape, -1), ratios_QJ.view(*keys_MO.shape, -1)
        ids_MOJ[..., 0] = own_MO
        # What the request has seen once gets a half, before the corpus of the same order.
        missing_MO = own_MO < 0
        ratios_MOJ[..., 0].masked_fill_(missing_MO, 0.0)
        mass_MO = (passed_Q.view_as(keys_MO) * torch.where(missing_MO, self._one, self._half)).cumprod(dim=1)

        row_M = windows_MC[:, -1].clamp(min=0)
        matrix_ids_MK = self.successors.ids_VK.index_select(0, row_M)
        matrix_MK = self.successors.probs_VK.index_select(0, row_M)
        ids_MC = torch.cat((ids_MOJ.flatten(1), matrix_ids_MK), dim=1)
        probs_MC = torch.cat((ratios_MOJ.flatten(1), matrix_MK.float()), dim=1)
        probs_MC *= mass_MO.index_select(1, self._order_C)

        same_MCC = ids_MC[:, :, None] == ids_MC[:, None]
        summed_MC = torch.where(same_MCC, probs_MC[:, None], self._zero).sum(dim=2)
        repeated_MC = (same_MCC & self._earlier_CC).any(dim=2)
        return ids_MC, summed_MC.masked_fill_(repeated_MC, 0.0)
