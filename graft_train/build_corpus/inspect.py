"""What a corpus holds, and how well it foresees samples that it has not seen."""

from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from graft_inference.bundle import load_successors, read_safetensors
from graft_inference.retrieval.successor_matrix import SuccessorMatrix
from graft_train.build_corpus.counts import Pairs
from graft_train.build_corpus.pairs import counted, is_held_out, samples_of, text_pairs, windows
from graft_train.config.corpus import CorpusConfig
from graft_train.data.samples import Sample

HELD_OUT_TOKENS = 1 << 16
"""Enough to measure on."""
EXAMPLES = 8


def inspect_corpus(
    settings: CorpusConfig, samples: Path, corpus: Path, vocab_size: int, tokenizer: Any
) -> dict[str, Any]:
    """The corpus's size, its hit rate and recall on held-out samples, and a few of its rows."""
    matrix = load_successors(corpus / "successors.safetensors", vocab_size)
    held_out = _held_out(samples, settings.held_out, vocab_size)
    followed = text_pairs(counted(held_out, settings.prompts)) if held_out else None
    return {
        "rows_filled": int((matrix.ids_VK[:, 0] >= 0).sum()),
        "rows": vocab_size,
        "bytes": {path.name: path.stat().st_size for path in sorted(corpus.glob("*.safetensors"))},
        "held_out_tokens": len(followed.contexts_P) if followed else 0,
        "recall": _recall(matrix, followed) if followed and len(followed.contexts_P) else None,
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


def _recall(matrix: SuccessorMatrix, followed: Pairs) -> dict[str, Any]:
    """How often there is any successor, and of those hits the share with the true one first, or among the k."""
    ids_PK = matrix.ids_VK.numpy()[followed.contexts_P]
    hit_P, same_PK = ids_PK[:, 0] >= 0, ids_PK == followed.successors_P[:, None]
    hits = max(int(hit_P.sum()), 1)
    return {
        "hit_rate": float(hit_P.mean()),
        "top_1": int(same_PK[:, 0].sum()) / hits,
        "top_k": int(same_PK.sum()) / hits,
        "k": ids_PK.shape[1],
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
    """Two lines and a table for the terminal."""
    console = Console()
    sizes = ", ".join(f"{name} {size / 1e6:.1f} MB" for name, size in inspection["bytes"].items())
    filled = f"{inspection['rows_filled']:,} of {inspection['rows']:,} rows filled"
    recall = inspection["recall"]
    foresight = "no held-out sample to measure on (corpus.held_out)"
    if recall:
        foresight = (
            f"of {inspection['held_out_tokens']:,} held-out tokens {recall['hit_rate']:.1%} had successors listed; the "
            f"true one came first in {recall['top_1']:.1%} of these, and among {recall['k']} in {recall['top_k']:.1%}"
        )
    for line in (f"{filled}; {sizes}", foresight):
        console.print(f"corpus: {line}", highlight=False, soft_wrap=True)
    examples = Table(title="successors of the most frequent tokens", box=SIMPLE_HEAD)
    examples.add_column("token")
    examples.add_column("successors, likeliest first")
    for row in inspection["examples"]:
        listed = "  ".join(f"{text!r} {probability:.2f}" for text, probability in row["successors"])
        examples.add_row(escape(repr(row["token"])), escape(listed))
    console.print(examples)
