"""Which tokens a draft head can propose: the most frequent ones of the target's own answers."""

import hashlib
from dataclasses import dataclass

import torch
from torch import Tensor

from graft_train.data.samples import Sample


@dataclass
class DraftVocabulary:
    """Attributes:
    token_ids_D: ascending target ids, int64.
    coverage: share of the answers' tokens that are among them.
    """

    token_ids_D: Tensor
    coverage: float


def choose_draft_vocabulary(samples: list[Sample], vocab_size: int, size: int) -> DraftVocabulary:
    """Counts answer tokens only (prompts are never drafted); ties go to the lower id.

    Args:
        size: tokens wanted; a smaller target vocabulary is taken whole.
    """
    counts_V = _counts(samples, vocab_size)
    kept_D = counts_V.argsort(descending=True, stable=True)[: min(size, vocab_size)].sort().values
    return DraftVocabulary(kept_D, coverage(samples, kept_D, vocab_size))


def coverage(samples: list[Sample], token_ids_D: Tensor, vocab_size: int) -> float:
    """Share of the answers' tokens that are among `token_ids_D`."""
    counts_V = _counts(samples, vocab_size)
    return counts_V[token_ids_D.cpu()].sum().item() / max(1, counts_V.sum().item())


def vocabulary_hash(token_ids_D: Tensor) -> str:
    return hashlib.sha256(token_ids_D.cpu().numpy().tobytes()).hexdigest()[:16]


def _counts(samples: list[Sample], vocab_size: int) -> Tensor:
    counts_V = torch.zeros(vocab_size, dtype=torch.long)
    for sample in samples:
        counts_V += torch.bincount(torch.tensor(sample.answer_ids), minlength=vocab_size)
    return counts_V
