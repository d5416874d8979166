"""`build_corpus`: the successor matrix, from the target's own predictions over the training data."""

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

from graft_train.data.samples import Sample, read_samples
from graft_train.data.target import load_target, target_path
from graft_train.stage import run_stage

if TYPE_CHECKING:
    from graft_train.config import Config

FIXED_POINT = 1 << 20
"""Probabilities are summed as integers, so that the result does not depend on the order of the data."""


@dataclass(slots=True, kw_only=True)
class CorpusConfig:
    """Attributes:
    successors: successors kept per token, k.
    batch_tokens: padded tokens per pass of the target.
    """

    successors: int = 8
    batch_tokens: int = 8192


def build_corpus(config: "Config") -> Path:
    """Writes `corpus/successors.safetensors`: ids [V, k] int32 (-1 none), probs [V, k] fp16, counts [V]."""
    inputs = [target_path(config), Path(config.run_dir) / "data"]
    return run_stage(config, "build_corpus", "corpus", asdict(config.corpus), inputs, lambda out: _build(config, out))


def _build(config: "Config", out: Path) -> None:
    settings = config.corpus
    samples = read_samples(Path(config.run_dir) / "data" / "samples.jsonl", "train")
    model = load_target(config)
    vocab_size = model.config.get_text_config().vocab_size
    tally = SuccessorTally(vocab_size, min(settings.successors, vocab_size))
    with torch.inference_mode(), tqdm(total=len(samples), desc="build_corpus", unit="sample") as bar:
        for rows in _batches(samples, settings.batch_tokens):
            ids_BS, mask_BS = _pad(rows, model.device)
            logits_BSV = model(input_ids=ids_BS, attention_mask=mask_BS.long()).logits
            tally.add(ids_BS[mask_BS], logits_BSV[mask_BS].float().softmax(dim=-1))
            bar.update(len(rows))
    tensors = tally.matrix()
    filled = int((tensors["ids"][:, 0] >= 0).sum())
    print(f"build_corpus: {int(tensors['counts'].sum()):,} tokens fill {filled:,} of {vocab_size:,} rows")
    save_file(tensors, out / "successors.safetensors")


class SuccessorTally:
    """Sums the target's top-k next-token probabilities by (token, successor).

    Only pairs that occur take memory.

    Args:
        k: successors noted at each position, and kept per token.
    """

    def __init__(self, vocab_size: int, k: int) -> None:
        self.vocab_size = vocab_size
        self.k = k
        self.counts_V = torch.zeros(vocab_size, dtype=torch.long)
        self.pairs_P = torch.empty(0, dtype=torch.long)  # token * vocab_size + successor, ascending
        self.weights_P = torch.empty(0, dtype=torch.long)

    def add(self, tokens_M: Tensor, probs_MV: Tensor) -> None:
        """Adds M positions: a token and the distribution the target predicts after it."""
        top = probs_MV.topk(self.k, dim=-1)
        tokens_M = tokens_M.cpu()
        self.counts_V += tokens_M.bincount(minlength=self.vocab_size)
        pairs = (tokens_M[:, None] * self.vocab_size + top.indices.cpu()).flatten()
        weights = (top.values.double().cpu() * FIXED_POINT).round().long().flatten()
        self.pairs_P, inverse = torch.cat((self.pairs_P, pairs)).unique(return_inverse=True)
        weights = torch.cat((self.weights_P, weights))
        self.weights_P = torch.zeros_like(self.pairs_P).index_add_(0, inverse, weights)

    def matrix(self) -> dict[str, Tensor]:
        """The k heaviest successors of every token (ties: lowest id), with their mean probability."""
        order = self.weights_P.argsort(descending=True, stable=True)
        tokens = self.pairs_P[order] // self.vocab_size
        order = order[tokens.argsort(stable=True)]
        tokens, successors = self.pairs_P[order] // self.vocab_size, self.pairs_P[order] % self.vocab_size
        first_V = torch.searchsorted(tokens, torch.arange(self.vocab_size))
        rank = torch.arange(len(tokens)) - first_V[tokens]
        kept = rank < self.k
        place = (tokens[kept], rank[kept])
        ids_VK = torch.full((self.vocab_size, self.k), -1, dtype=torch.int32)
        ids_VK[place] = successors[kept].to(torch.int32)
        probs_VK = torch.zeros((self.vocab_size, self.k), dtype=torch.float64)
        probs_VK[place] = self.weights_P[order][kept].double() / FIXED_POINT / self.counts_V[tokens[kept]]
        return {"ids": ids_VK, "probs": probs_VK.to(torch.float16), "counts": self.counts_V}


def _batches(samples: list[Sample], batch_tokens: int) -> Iterator[list[list[int]]]:
    """Sequences by length, as many at a time as fit the padded budget (at least one)."""
    rows = sorted((list(sample.ids) for sample in samples), key=len)
    batch: list[list[int]] = []
    for row in rows:
        if batch and len(row) * (len(batch) + 1) > batch_tokens:
            yield batch
            batch = []
        batch.append(row)
    if batch:
        yield batch


def _pad(rows: list[list[int]], device: torch.device) -> tuple[Tensor, Tensor]:
    """ids [B, S] padded right with 0, and which of them are real."""
    length = max(map(len, rows))
    ids_BS = torch.tensor([row + [0] * (length - len(row)) for row in rows], device=device)
    real = torch.tensor([[1] * len(row) + [0] * (length - len(row)) for row in rows], device=device)
    return ids_BS, real.bool()
