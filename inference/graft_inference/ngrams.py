"""Retrieval by longer contexts: what followed the last two and three tokens, backing off to the matrix."""

import hashlib
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from .errors import GraftError
from .retrieval import LEAST, SuccessorMatrix, Template
from .tree import DraftTree

ORDERS = (3, 2)
"""Lengths of the contexts that are looked up, the longest first."""
LONGEST = ORDERS[0]
KEY_BITS = 42
TAG_BITS = 31
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
        counts_XK = self.counts_RSK.flatten(0, 1).float()
        distinct_X1 = (counts_XK > 0).sum(dim=1, keepdim=True)
        passed_X1 = distinct_X1 / (self.totals_RS.flatten()[:, None] + distinct_X1).clamp(min=1)
        ids_XJ = torch.cat((self.successors_RSK.flatten(0, 1)[:, :1] * 0 - 1, self.successors_RSK.flatten(0, 1)), dim=1)
        ratios_XJ = torch.cat((1 / passed_X1.clamp(min=LEAST), counts_XK / distinct_X1.clamp(min=1)), dim=1)
        # What is not found is found in the row past the end.
        self._ids_XJ = F.pad(ids_XJ.long(), (0, 0, 0, 1), value=-1)
        self._ratios_XJ = F.pad(ratios_XJ, (0, 0, 0, 1), value=1.0)
        self._passed_X = F.pad(passed_X1[:, 0], (0, 1), value=1.0)
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
            ids_QJ: successors, int64, -1 for none. Place 0 is left for what the request's own text says.
            ratios_QJ: their probabilities over `passed_Q`, where the request has said 1 of 2: place 0
                as 1 / `passed_Q`, the others count / distinct.
            passed_Q: what is left for the unseen, distinct / (total + distinct); 1 if not found.
        """
        bucket_Q = keys_Q >> self._shift
        tag_Q = (keys_Q & ((1 << TAG_BITS) - 1)).to(torch.int32)
        same_QS = self.tags_RS.index_select(0, bucket_Q) == tag_Q[:, None]
        hit_Q, slot_Q = same_QS.to(torch.uint8).max(dim=1)
        entry_Q = torch.where(hit_Q > 0, bucket_Q * SLOTS + slot_Q, len(self._passed_X) - 1)
        tables = (self._ids_XJ, self._ratios_XJ, self._passed_X)
        ids_QJ, ratios_QJ, passed_Q = (table.index_select(0, entry_Q) for table in tables)
        return ids_QJ, ratios_QJ, passed_Q


class RequestNgrams:
    """What followed each longer context the last time, in this request's own text.

    Directly mapped: of two contexts in one place the later stays.

    Args:
        capacity: contexts kept, a power of two.
    """

    def __init__(self, device: torch.device, capacity: int = 1 << 14) -> None:
        self.keys_X = torch.full((capacity,), -1, dtype=torch.long, device=device)
        self.successors_X = torch.full((capacity,), -1, dtype=torch.long, device=device)
        self.recent_C = torch.full((LONGEST,), -1, dtype=torch.long, device=device)

    def read(self, tokens_A: Tensor) -> None:
        """Continues the request's text. tokens_A: int64, behind those of the last call."""
        text = torch.cat((self.recent_C, tokens_A))
        self.recent_C.copy_(text[-LONGEST:])
        windows_AC = text[:-1].unfold(0, LONGEST, 1)
        keys_Q = context_keys(windows_AC).flatten()
        place_Q = keys_Q % len(self.keys_X)
        row_Q = torch.arange(len(keys_Q), device=keys_Q.device)
        last_X = torch.zeros_like(self.keys_X).scatter_reduce_(0, place_Q, row_Q, "amax")
        last_Q = last_X[place_Q]
        self.keys_X[place_Q] = keys_Q[last_Q]
        self.successors_X[place_Q] = tokens_A[last_Q // len(ORDERS)]

    def find(self, keys_MO: Tensor) -> Tensor:
        """The successor of each context, -1 for none; int64 of the keys' shape."""
        place_MO = keys_MO % len(self.keys_X)
        return self.successors_X[place_MO].where(self.keys_X[place_MO] == keys_MO, -1)


class NgramSource:
    """Retrieval that knows longer contexts: takes the matrix's place, and is told the request's text besides.

    A node's successors are those of its own path's last tokens: of three and of two, in the request's text and in
    the corpus, and of the last one in the matrix. Each source passes on the share of probability that it keeps for
    what it has not seen (Witten and Bell 1991: distinct / (seen + distinct)) to the next.

    Args:
        corpus: shared by all requests, never changed.
        successors: this request's own matrix.
    """

    def __init__(self, corpus: NgramTable, successors: SuccessorMatrix) -> None:
        if successors.probs_VK is None:
            raise GraftError("n-grams back off to a matrix with probabilities: build the corpus again")
        self.corpus = corpus
        self.successors = successors
        device = successors.ids_VK.device
        self.request = RequestNgrams(device)
        width = len(ORDERS) * (1 + corpus.k) + successors.k
        self._earlier_CC = torch.ones((width, width), dtype=torch.bool, device=device).tril(-1)

    @property
    def k(self) -> int:
        return self.successors.k

    def clone(self) -> "NgramSource":
        """For a new request: an own copy of the matrix, and no text yet."""
        return NgramSource(self.corpus, self.successors.clone())

    def read(self, tokens_A: Tensor) -> None:
        """Tells the request's text: first the whole prompt, then the tokens each round emitted; int64."""
        self.request.read(tokens_A)

    def update(self, tokens_M: Tensor, logits_MV: Tensor) -> None:
        """As `SuccessorMatrix.update`."""
        self.successors.update(tokens_M, logits_MV)

    def expand(self, root_1: Tensor, template: Template) -> DraftTree:
        """Retrieved nodes below the root, scored as by `SuccessorMatrix.expand`.

        Args:
            root_1: the root's token, [1] int64, the last one that `read` was told.

        Raises:
            GraftError: the template uses more successors than are kept.
        """
        if template.max_rank >= self.k:
            raise GraftError(
                f"the template uses successor rank {template.max_rank}, but the corpus keeps {self.k} successors: "
                "calibrate again with this corpus"
            )
        tokens_T = root_1.expand(len(template)).clone()
        step_T = torch.zeros(len(template), device=tokens_T.device)
        windows_TC = self.request.recent_C.expand(len(template), LONGEST).clone()
        for level in template.levels:
            ids_MK, logp_MK = self.successors_of(windows_TC[level.inner])
            tokens_T[level.rows] = ids_MK[level.places, level.ranks]
            step_T[level.rows] = logp_MK[level.places, level.ranks]
            windows_TC[level.rows, :-1] = windows_TC[level.parents, 1:]
            windows_TC[level.rows, -1] = tokens_T[level.rows]
        return template.tree(tokens_T, step_T)

    def successors_of(self, windows_MC: Tensor) -> tuple[Tensor, Tensor]:
        """The k likeliest successors and their log-probabilities, [M, k]; -1 and -inf where there are fewer.

        Args:
            windows_MC: the last LONGEST tokens of M paths, int64; a path that ends with -1 has no successor.
        """
        assert self.successors.probs_VK is not None
        keys_MO = context_keys(windows_MC)
        own_MO = self.request.find(keys_MO)
        ids_QJ, ratios_QJ, passed_Q = self.corpus.find(keys_MO.flatten())
        ids_MOJ, ratios_MOJ = ids_QJ.view(*keys_MO.shape, -1), ratios_QJ.view(*keys_MO.shape, -1)
        ids_MOJ[..., 0] = own_MO
        # What the request has seen once gets a half, before the corpus of the same order.
        passed_MO = passed_Q.view_as(keys_MO) * ((own_MO < 0) * 0.5 + 0.5)
        mass_MO = passed_MO.cumprod(dim=1)

        last_M = windows_MC[:, -1]
        row_M = last_M.clamp(min=0)
        matrix_probs_MK = self.successors.probs_VK.index_select(0, row_M) * mass_MO[:, -1:]
        ids_MC = torch.cat((ids_MOJ.flatten(1), self.successors.ids_VK.index_select(0, row_M)), dim=1)
        probs_MC = torch.cat(((ratios_MOJ * mass_MO[..., None]).flatten(1), matrix_probs_MK), dim=1)
        return self._likeliest(ids_MC.where(last_M[:, None] >= 0, -1), probs_MC)

    def _likeliest(self, ids_MC: Tensor, probs_MC: Tensor) -> tuple[Tensor, Tensor]:
        """The k successors of greatest summed probability."""
        same_MCC = ids_MC[:, :, None] == ids_MC[:, None]
        summed_MC = (same_MCC * probs_MC[:, None]).sum(dim=2)
        repeated_MC = (same_MCC & self._earlier_CC).any(dim=2)
        best = summed_MC.masked_fill_(repeated_MC | (ids_MC < 0), 0.0).topk(self.k, dim=1)
        found_MK = best.values > 0
        logp_MK = best.values.clamp(min=LEAST).log().where(found_MK, -torch.inf)
        return ids_MC.gather(1, best.indices).where(found_MK, -1), logp_MK
