"""What a corpus holds, and how well it foresees samples that it has not seen."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from torch import Tensor

from graft_inference.bundle import load_ngrams, load_successors, read_safetensors
from graft_inference.retrieval.ngrams import LONGEST, ORDERS, NgramSource, NgramTable, context_keys
from graft_inference.retrieval.successor_matrix import SuccessorMatrix
from graft_train.build_corpus.pairs import counted, is_held_out, join_samples, samples_of, windows
from graft_train.config.corpus import CorpusConfig
from graft_train.data.samples import Sample

HELD_OUT_TOKENS = 1 << 16
"""Enough to measure on."""
EXAMPLES = 8
CHUNK = 4096


@dataclass
class Positions:
    """windows_MC: the last tokens before each place, int64, -1 before the sample's first; truth_M: what came."""

    windows_MC: Tensor
    truth_M: Tensor


def inspect_corpus(
    settings: CorpusConfig, samples: Path, corpus: Path, vocab_size: int, tokenizer: Any
) -> dict[str, Any]:
    """The corpus's size, its hit rate and recall by order on held-out samples, and a few of its rows.

    A source's recall is its share of true next tokens among its first 1 or k successors, where it has any.
    """
    matrix = load_successors(corpus / "successors.safetensors", vocab_size)
    table = load_ngrams(corpus / "ngrams.safetensors", vocab_size) if settings.ngrams else None
    held_out = _held_out(samples, settings.held_out, vocab_size)
    positions = _positions(held_out, settings.prompts) if held_out else None
    return {
        "rows_filled": int((matrix.ids_VK[:, 0] >= 0).sum()),
        "rows": vocab_size,
        "contexts": int((table.tags_RS >= 0).sum()) if table else 0,
        "slots": table.tags_RS.numel() if table else 0,
        "bytes": {path.name: path.stat().st_size for path in sorted(corpus.glob("*.safetensors"))},
        "held_out_tokens": len(positions.truth_M) if positions else 0,
        "recall": _recall(matrix, table, positions) if positions and len(positions.truth_M) else [],
        "examples": _examples(corpus, matrix, tokenizer),
    }


def _held_out(path: Path, share: float, vocab_size: int) -> list[Sample]:
    chosen: list[Sample] = []
    tokens = 0
    for window in windows(path) if share else ():
        for sample in samples_of(window, path, vocab_size):
            if tokens < HELD_OUT_TOKENS and is_held_out(sample, share):
                chosen.append(sample)
                tokens += len(sample.ids)
        if tokens >= HELD_OUT_TOKENS:
            break
    return chosen


def _positions(samples: list[Sample], prompts: bool) -> Positions:
    text = join_samples(counted(samples, prompts))
    tokens_P, place_P = torch.from_numpy(text.tokens_P), torch.from_numpy(text.place_P)
    back_C = torch.arange(LONGEST - 1, -1, -1)
    windows_PC = tokens_P[(torch.arange(len(tokens_P))[:, None] - back_C).clamp(min=0)]
    windows_PC = windows_PC.where(place_P[:, None] >= back_C, -1)
    real_P = torch.from_numpy((text.left_P > 0) & text.counted_P)
    return Positions(windows_PC[real_P], tokens_P.roll(-1)[real_P])


def _recall(matrix: SuccessorMatrix, table: NgramTable | None, positions: Positions) -> list[dict[str, Any]]:
    """Hits and recalls of the matrix, of each order of n-grams, and of all together."""
    found: dict[str, list[Tensor]] = {}
    source = NgramSource(table, matrix) if table else None
    for windows_MC, truth_M in zip(positions.windows_MC.split(CHUNK), positions.truth_M.split(CHUNK), strict=True):
        found.setdefault("matrix", []).append(_places(matrix.ids_VK[windows_MC[:, -1]], truth_M))
        if table and source:
            keys_MO = context_keys(windows_MC)
            for order, keys_M in zip(ORDERS, keys_MO.unbind(dim=1), strict=True):
                found.setdefault(f"{order} tokens", []).append(_places(table.find(keys_M)[0][:, 1:], truth_M))
            found.setdefault("together", []).append(_places(source.successors_of(windows_MC, source.k)[0], truth_M))
    return [_summary(name, torch.cat(places)) for name, places in found.items()]


def _places(ids_MK: Tensor, truth_M: Tensor) -> Tensor:
    """[M, 2]: whether there was any successor, and the place of the true one, k where it is missing."""
    same_MK = ids_MK == truth_M[:, None]
    place_M = torch.where(same_MK.any(dim=1), same_MK.to(torch.uint8).argmax(dim=1), ids_MK.shape[1])
    return torch.stack((ids_MK[:, 0] >= 0, place_M, torch.full_like(place_M, ids_MK.shape[1])), dim=1)


def _summary(name: str, places_M3: Tensor) -> dict[str, Any]:
    hit_M, place_M, k = places_M3[:, 0] > 0, places_M3[:, 1], int(places_M3[0, 2])
    hits = max(int(hit_M.sum()), 1)
    return {
        "source": name,
        "hit_rate": float(hit_M.float().mean()),
        "top_1": float((place_M[hit_M] == 0).sum() / hits),
        "top_k": float((place_M[hit_M] < k).sum() / hits),
        "k": k,
    }


def _examples(corpus: Path, matrix: SuccessorMatrix, tokenizer: Any) -> list[dict[str, Any]]:
    """The rows of the tokens seen most."""
    assert matrix.probs_VK is not None
    counts_V = read_safetensors(corpus / "successors.safetensors")["counts"]
    tokens = counts_V.topk(min(EXAMPLES, len(counts_V))).indices.tolist()
    return [
        {
            "token": tokenizer.decode([token]),
            "successors": [
                [tokenizer.decode([successor]), probability]
                for successor, probability in zip(
                    matrix.ids_VK[token].tolist(), matrix.probs_VK[token].tolist(), strict=True
                )
                if successor >= 0
            ],
        }
        for token in tokens
    ]


def print_inspection(inspection: dict[str, Any]) -> None:
    """Tables for the terminal."""
    console = Console()
    sizes = ", ".join(f"{name} {size / 1e6:.1f} MB" for name, size in inspection["bytes"].items())
    console.print(
        f"corpus: {inspection['rows_filled']:,} of {inspection['rows']:,} rows filled; "
        f"{inspection['contexts']:,} longer contexts in {inspection['slots']:,} slots; {sizes}",
        highlight=False,
        soft_wrap=True,
    )
    if inspection["recall"]:
        recall = Table(title=f"foresight on {inspection['held_out_tokens']:,} held-out tokens", box=SIMPLE_HEAD)
        for column in ("source", "hit rate", "top 1 of hits", "top k of hits", "k"):
            recall.add_column(column, justify="left" if column == "source" else "right")
        for row in inspection["recall"]:
            shares = (f"{row[name]:.1%}" for name in ("hit_rate", "top_1", "top_k"))
            recall.add_row(row["source"], *shares, str(row["k"]))
        console.print(recall)
    else:
        console.print("corpus: no held-out sample to measure on (corpus.held_out)", highlight=False)
    examples = Table(title="successors of the most frequent tokens", box=SIMPLE_HEAD)
    examples.add_column("token")
    examples.add_column("successors, likeliest first")
    for row in inspection["examples"]:
        listed = "  ".join(f"{text!r} {probability:.2f}" for text, probability in row["successors"])
        examples.add_row(escape(repr(row["token"])), escape(listed))
    console.print(examples)
