"""From samples to (context, successor) pairs: what followed, or what the target says should follow."""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from graft_inference.errors import GraftError
from graft_inference.retrieval.ngrams import LONGEST, ORDERS, context_keys
from graft_inference.retrieval.successor_matrix import SuccessorMatrix
from graft_train.build_corpus.runs import ONE, OTHER, SUCCESSOR_BITS
from graft_train.data.samples import Sample, parse_sample

WINDOW_BYTES = 1 << 20
"""Lines are read, dealt to the processes and resumed in windows of about this size."""
NGRAM = 1 << 42
"""Added to the key of a longer context, so that the tokens, contexts of their own, come before them."""
CHUNK = 1024
"""Positions whose logits are in fp32 at a time."""


@dataclass
class Window:
    """A unit of the data: its number, where its lines begin in the file, and the lines."""

    number: int
    line: int
    lines: list[bytes]

    @property
    def size(self) -> int:
        return sum(map(len, self.lines))


def windows(path: Path) -> Iterator[Window]:
    """The file in windows that depend on nothing but its content.

    Raises:
        GraftError: there is no such file.
    """
    if not path.is_file():
        raise GraftError(f"{path} does not exist; run graft regenerate first")
    number, line, lines, size = 0, 1, [], 0
    with path.open("rb") as file:
        for text in file:
            lines.append(text)
            size += len(text)
            if size >= WINDOW_BYTES:
                yield Window(number, line, lines)
                number, line, lines, size = number + 1, line + len(lines), [], 0
    if lines:
        yield Window(number, line, lines)


def is_held_out(sample: Sample, share: float) -> bool:
    """Chosen by a hash of its document, so that the order and number of samples do not matter."""
    place = int.from_bytes(hashlib.sha256(f"corpus:{sample.document}".encode()).digest()[:8], "big")
    return place < share * (1 << 64)


def samples_of(window: Window, path: Path, vocab_size: int) -> list[Sample]:
    """The training samples of a window.

    Raises:
        GraftError: a line that is no sample, or token ids outside the target's vocabulary; names the line.
    """
    chosen = []
    for number, text in enumerate(window.lines, start=window.line):
        sample = parse_sample(text, f"{path}, line {number}")
        if max(max(sample.prompt_ids), max(sample.answer_ids, default=0)) >= vocab_size:
            raise GraftError(
                f"{path}, line {number}: sample {sample.id} has token ids outside the target's vocabulary of "
                f"{vocab_size}; it was made with another tokenizer: run graft regenerate for this target"
            )
        if sample.split == "train":
            chosen.append(sample)
    return chosen


@dataclass
class Counted:
    """A sample, and after which of its tokens what follows counts. counted_S: bool"""

    sample: Sample
    counted_S: np.ndarray

    def __len__(self) -> int:
        return len(self.sample.ids)


def counted(samples: list[Sample], prompts: bool) -> list[Counted]:
    """Which tokens of the samples count.

    A conversation that gives one sample an answer repeats in each what came before: that counts once.

    Args:
        prompts: whether the tokens of prompts count as successors; if not, those of answers alone do, so that
            the token before an answer is the first whose successor counts.
    """
    found: list[Counted] = []
    earlier: dict[str, Counted] = {}
    for sample in samples:
        if not prompts:
            loss_mask_S = sample.loss_mask_S.numpy()
            found.append(Counted(sample, np.append(loss_mask_S[1:], loss_mask_S[-1:])))
            continue
        one = Counted(sample, np.ones(len(sample.ids), dtype=bool))
        found.append(one)
        if not sample.is_turn:
            continue
        if before := earlier.get(sample.document):
            repeated = _shared(before.sample.ids, sample.ids)
            one.counted_S[: max(repeated - 1, 0)] = False
            if repeated == len(before):
                before.counted_S[-1] = False  # it counts here, where something follows
        earlier[sample.document] = one
    return found


def _shared(first: Sequence[int], second: Sequence[int]) -> int:
    """How many tokens two sequences begin with alike."""
    length = min(len(first), len(second))
    differs = np.asarray(first[:length]) != np.asarray(second[:length])
    return int(differs.argmax()) if differs.any() else length


@dataclass
class Text:
    """Samples one behind the other.

    Attributes:
        tokens_P: int64.
        place_P: a token's place in its sample.
        left_P: tokens of the sample that follow.
        counted_P: whether what follows the token counts.
    """

    tokens_P: np.ndarray
    place_P: np.ndarray
    left_P: np.ndarray
    counted_P: np.ndarray


def join_samples(samples: list[Counted]) -> Text:
    lengths = np.array(list(map(len, samples)))
    ids = chain.from_iterable(one.sample.ids for one in samples)
    tokens_P = np.fromiter(ids, dtype=np.int64, count=int(lengths.sum()))
    place_P = np.arange(len(tokens_P)) - np.repeat(lengths.cumsum() - lengths, lengths)
    left_P = np.repeat(lengths, lengths) - place_P - 1
    return Text(tokens_P, place_P, left_P, np.concatenate([one.counted_S for one in samples]))


def text_pairs(text: Text) -> np.ndarray:
    """Keys of what follows each token."""
    context_P, successor_P = text.tokens_P[:-1], text.tokens_P[1:]
    real_P = ((text.left_P > 0) & text.counted_P)[:-1]
    return (context_P << SUCCESSOR_BITS | successor_P)[real_P]


def ngram_pairs(text: Text) -> np.ndarray:
    """Keys of what follows each longer context."""
    tokens_P = np.concatenate((np.full(LONGEST - 1, -1, dtype=np.int64), text.tokens_P))
    windows_PC = torch.from_numpy(tokens_P).unfold(0, LONGEST, 1)[:-1]
    keys_PO = context_keys(windows_PC).numpy() + NGRAM
    # A context of o tokens ends at place o - 1 or later.
    orders_O = np.array(ORDERS)
    real_PO = (text.place_P[:-1, None] >= orders_O - 1) & ((text.left_P > 0) & text.counted_P)[:-1, None]
    return (keys_PO << SUCCESSOR_BITS | text.tokens_P[1:, None])[real_PO]


@torch.inference_mode()
def predicted_pairs(
    model: Any, samples: list[Counted], k: int, batch_tokens: int
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Keys and weights of the target's top k after each token, and of all OTHER successors together.

    Batches depend on the samples alone, so that rounding does too.
    """
    for batch in batches(samples, batch_tokens):
        ids_BS, counted_BS = pad(batch, model.device)
        real_BS = ids_BS >= 0
        logits_BSV = model(input_ids=ids_BS.clamp(min=0), attention_mask=real_BS.long(), use_cache=False).logits
        for tokens_M, logits_MV in zip(
            ids_BS[counted_BS].split(CHUNK), logits_BSV[counted_BS].split(CHUNK), strict=True
        ):
            yield weigh(tokens_M, logits_MV, k)


def weigh(tokens_M: Tensor, logits_MV: Tensor, k: int) -> tuple[np.ndarray, np.ndarray]:
    """Keys and weights of M tokens; the weights of each token add up to ONE."""
    logits_MV = logits_MV.float()
    top = logits_MV.topk(k, dim=-1)
    probs_MK = (top.values - logits_MV.logsumexp(dim=-1, keepdim=True)).double().exp()
    weights_MK = (probs_MK * ONE).round().long()
    weights_MK[:, :1] -= (weights_MK.sum(dim=-1, keepdim=True) - ONE).clamp(min=0)  # rounded up too often
    others_M1 = ONE - weights_MK.sum(dim=-1, keepdim=True)
    successors_MK = torch.cat((top.indices, torch.full_like(others_M1, OTHER)), dim=1)
    keys_MK = tokens_M[:, None] << SUCCESSOR_BITS | successors_MK
    return keys_MK.flatten().cpu().numpy(), torch.cat((weights_MK, others_M1), dim=1).flatten().cpu().numpy()


def matrix_pairs(matrix: SuccessorMatrix, counts_V: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Keys and weights of a matrix whose rows have been seen `counts_V` times each."""
    assert matrix.probs_VK is not None
    seen_C = counts_V.nonzero()[:, 0]
    ids_CK, totals_C1 = matrix.ids_VK[seen_C].long(), counts_V[seen_C, None] * ONE
    weights_CK = (matrix.probs_VK[seen_C].double() * totals_C1).long().masked_fill(ids_CK < 0, 0)
    # fp16 may have rounded a row's sum above 1.
    weights_CK[:, :1] -= (weights_CK.sum(dim=1, keepdim=True) - totals_C1).clamp(min=0)
    others_C1 = totals_C1 - weights_CK.sum(dim=1, keepdim=True)
    successors_CK = torch.cat((ids_CK.where(ids_CK >= 0, OTHER), torch.full_like(others_C1, OTHER)), dim=1)
    keys_CK = seen_C[:, None] << SUCCESSOR_BITS | successors_CK
    return keys_CK.flatten().numpy(), torch.cat((weights_CK, others_C1), dim=1).flatten().numpy()


def batches(samples: list[Counted], batch_tokens: int) -> Iterator[list[Counted]]:
    """Samples by length, as many at a time as fit the padded budget (at least one)."""
    batch: list[Counted] = []
    for one in sorted(samples, key=len):
        if batch and len(one) * (len(batch) + 1) > batch_tokens:
            yield batch
            batch = []
        batch.append(one)
    if batch:
        yield batch


def pad(batch: list[Counted], device: torch.device) -> tuple[Tensor, Tensor]:
    """ids [B, S] padded right with -1, and whether what follows each counts."""
    ids_BS = torch.full((len(batch), max(map(len, batch))), -1)
    counted_BS = torch.zeros_like(ids_BS, dtype=torch.bool)
    for row, one in enumerate(batch):
        ids_BS[row, : len(one)] = torch.tensor(one.sample.ids)
        counted_BS[row, : len(one)] = torch.from_numpy(one.counted_S)
    return ids_BS.to(device), counted_BS.to(device)
