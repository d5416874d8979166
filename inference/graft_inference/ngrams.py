"""Retrieval by longer contexts: what followed the last two and three tokens, backing off to the matrix."""

import hashlib
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

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


COEFFICIENTS_OC = torch.tensor(
    [[_coefficient(o, c) if c >= LONGEST - o else 0 for c in range(LONGEST)] for o in ORDERS]
)
"""Odd random multipliers; a context of o tokens reads the last o columns."""
SALTS_O = torch.tensor([_coefficient(o, LONGEST) for o in ORDERS])


def context_keys(windows_MC: Tensor) -> Tensor:
    """Keys of KEY_BITS bits of the contexts that end each window, by ORDERS: [M, O] int64.

    The top bits of an inner product modulo 2**64 (multiply-shift hashing, Dietzfelbinger 1996): two contexts
    of an order share a key with probability 2**-KEY_BITS.

    Args:
        windows_MC: the last LONGEST tokens, int64; -1 before the first.
    """
    products_MOC = windows_MC[:, None] * COEFFICIENTS_OC.to(windows_MC.device)
    sums_MO = products_MOC.sum(dim=-1) + SALTS_O.to(windows_MC.device)
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
        entries = (self.successors_RSK, self.counts_RSK, self.totals_RS[..., None])
        entries_XP = torch.cat(entries, dim=-1).flatten(0, 1)
        # What is not found is found in the row past the end.
        self._entries_XP = torch.cat((entries_XP, torch.zeros_like(entries_XP[:1])))
        self._entries_XP[-1, : self.k] = -1
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
        """Successors [Q, k], their counts [Q, k], and the contexts' totals [Q], all int32; -1 and 0 if not found."""
        bucket_Q = keys_Q >> self._shift
        tag_Q = (keys_Q & ((1 << TAG_BITS) - 1)).to(torch.int32)
        hit_Q, slot_Q = (self.tags_RS[bucket_Q] == tag_Q[:, None]).to(torch.uint8).max(dim=1)
        entry_QP = self._entries_XP[torch.where(hit_Q > 0, bucket_Q * SLOTS + slot_Q, len(self._entries_XP) - 1)]
        return entry_QP[:, : self.k], entry_QP[:, self.k : -1], entry_QP[:, -1]


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
        self.recent_C = text[-LONGEST:].clone()
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
        return torch.where(self.keys_X[place_MO] == keys_MO, self.successors_X[place_MO], -1)


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
        count, orders = len(windows_MC), len(ORDERS)
        keys_MO = context_keys(windows_MC)
        own_MO1 = self.request.find(keys_MO)[..., None]
        ids_QK, counts_QK, totals_Q = self.corpus.find(keys_MO.flatten())
        ids_MOK, counts_MOK = ids_QK.view(count, orders, -1), counts_QK.view(count, orders, -1)
        assert self.successors.probs_VK is not None
        last_M = windows_MC[:, -1]
        matrix_ids_MK = self.successors.ids_VK[last_M.clamp(min=0)]
        matrix_probs_MK = self.successors.probs_VK[last_M.clamp(min=0)].float()

        # In order of priority: own and corpus of three, own and corpus of two, each [M, O, 2] here.
        seen_MO2 = torch.stack((own_MO1[..., 0] >= 0, totals_Q.view(count, orders)), dim=-1)
        distinct_MO2 = torch.stack((own_MO1[..., 0] >= 0, (ids_MOK >= 0).sum(dim=-1)), dim=-1)
        weight_MJ = (seen_MO2 + distinct_MO2).clamp(min=1).float().flatten(1)
        passed_MJ = torch.where(seen_MO2 > 0, distinct_MO2, 1).flatten(1) / weight_MJ
        mass_MJ = torch.cat((torch.ones_like(passed_MJ[:, :1]), passed_MJ), dim=1).cumprod(dim=1)
        share_MO2 = (mass_MJ[:, :-1] / weight_MJ).view(count, orders, 2)

        ids_MC = torch.cat((torch.cat((own_MO1, ids_MOK), dim=-1).flatten(1), matrix_ids_MK), dim=1)
        shares_MOK = torch.cat((share_MO2[..., :1], counts_MOK * share_MO2[..., 1:]), dim=-1)
        probs_MC = torch.cat((shares_MOK.flatten(1), matrix_probs_MK * mass_MJ[:, -1:]), dim=1)
        return self._likeliest(ids_MC.where(last_M[:, None] >= 0, -1), probs_MC)

    def _likeliest(self, ids_MC: Tensor, probs_MC: Tensor) -> tuple[Tensor, Tensor]:
        """The k successors of greatest summed probability."""
        same_MCC = ids_MC[:, :, None] == ids_MC[:, None]
        summed_MC = (same_MCC * probs_MC[:, None]).sum(dim=2)
        repeated_MC = (same_MCC & self._earlier_CC).any(dim=2)
        best = summed_MC.masked_fill(repeated_MC | (ids_MC < 0), -1.0).topk(self.k, dim=1)
        logp_MK = torch.where(best.values < 0, -torch.inf, best.values.clamp(min=LEAST).log())
        return ids_MC.gather(1, best.indices).where(best.values >= 0, -1).long(), logp_MK
