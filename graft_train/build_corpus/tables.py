"""From summed pairs, in order, to what is served: the successor matrix and the n-gram table."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from graft_inference.retrieval.ngrams import KEY_BITS, SLOTS, TAG_BITS
from graft_train.build_corpus.pairs import NGRAM
from graft_train.build_corpus.runs import ONE, OTHER, SUCCESSOR_BITS, Block, whole_groups

INT32_MAX = np.iinfo(np.int32).max


@dataclass
class Rows:
    """C contexts, ascending, and their heaviest successors.

    Attributes:
        contexts_C: int64.
        totals_C: int64, the summed weight of all successors.
        ids_CK: int64, the heaviest first, ties by id; -1 for none.
        weights_CK: int64.
    """

    contexts_C: np.ndarray
    totals_C: np.ndarray
    ids_CK: np.ndarray
    weights_CK: np.ndarray


def rows_of(keys_P: np.ndarray, weights_P: np.ndarray, k: int) -> Rows:
    """The contexts of a block that holds all their pairs."""
    contexts_P = keys_P >> SUCCESSOR_BITS
    first_C = np.flatnonzero(np.diff(contexts_P, prepend=-1))
    row_P = np.repeat(np.arange(len(first_C)), np.diff(first_C, append=len(keys_P)))
    totals_C = np.add.reduceat(weights_P, first_C)

    listed_P = (keys_P & OTHER) != OTHER
    row_L, ids_L, weights_L = row_P[listed_P], (keys_P & OTHER)[listed_P], weights_P[listed_P]
    order_L = np.lexsort((-weights_L, row_L))  # stable: equal weights stay in the order of their ids
    rank_L = np.arange(len(row_L)) - np.searchsorted(row_L, np.arange(len(first_C)))[row_L]
    place, kept_L = (row_L[rank_L < k], rank_L[rank_L < k]), order_L[rank_L < k]
    ids_CK = np.full((len(first_C), k), -1, dtype=np.int64)
    weights_CK = np.zeros((len(first_C), k), dtype=np.int64)
    ids_CK[place], weights_CK[place] = ids_L[kept_L], weights_L[kept_L]
    return Rows(contexts_P[first_C], totals_C, ids_CK, weights_CK)


def successor_matrix(blocks: Iterator[Block], vocab_size: int, k: int) -> dict[str, Tensor]:
    """ids [V, k] int32 (-1 none), probs [V, k] fp16, counts [V] int64: how often each token was seen."""
    ids_VK = np.full((vocab_size, k), -1, dtype=np.int32)
    probs_VK = np.zeros((vocab_size, k), dtype=np.float16)
    counts_V = np.zeros(vocab_size, dtype=np.int64)
    for keys_P, weights_P in whole_groups(blocks, SUCCESSOR_BITS):
        rows = rows_of(keys_P, weights_P, k)
        ids_VK[rows.contexts_C] = rows.ids_CK
        probs_VK[rows.contexts_C] = rows.weights_CK / rows.totals_C[:, None]
        counts_V[rows.contexts_C] = rows.totals_C // ONE
    return {"ids": torch.from_numpy(ids_VK), "probs": torch.from_numpy(probs_VK), "counts": torch.from_numpy(counts_V)}


def ngram_table(blocks: Iterator[Block], k: int, megabytes: int) -> dict[str, Tensor]:
    """The n-gram table's tensors (see `NgramTable`): as large as its contexts need, at most `megabytes`.

    The blocks come in the order of the buckets, so that each bucket is filled once, by the contexts seen most
    (ties: the lower key).
    """
    bytes_per_bucket = SLOTS * 4 * (2 + 2 * k)
    bits = max((megabytes << 20) // bytes_per_bucket, 1).bit_length() - 1
    table = {
        "tags": np.full((1 << bits, SLOTS), -1, dtype=np.int32),
        "successors": np.full((1 << bits, SLOTS, k), -1, dtype=np.int32),
        "counts": np.zeros((1 << bits, SLOTS, k), dtype=np.int32),
        "totals": np.zeros((1 << bits, SLOTS), dtype=np.int32),
    }
    for keys_P, weights_P in whole_groups(blocks, KEY_BITS - bits + SUCCESSOR_BITS):
        rows = rows_of(keys_P, weights_P, k)
        keys_C = rows.contexts_C - NGRAM
        order_C = np.lexsort((-rows.totals_C, keys_C >> (KEY_BITS - bits)))
        bucket_C = keys_C[order_C] >> (KEY_BITS - bits)
        rank_C = np.arange(len(bucket_C)) - np.searchsorted(bucket_C, bucket_C)
        kept_C = order_C[rank_C < SLOTS]
        place = bucket_C[rank_C < SLOTS], rank_C[rank_C < SLOTS]
        table["tags"][place] = keys_C[kept_C] & ((1 << TAG_BITS) - 1)
        table["successors"][place] = rows.ids_CK[kept_C]
        table["counts"][place] = np.minimum(rows.weights_CK[kept_C] // ONE, INT32_MAX)
        table["totals"][place] = np.minimum(rows.totals_C[kept_C] // ONE, INT32_MAX)
    while len(table["tags"]) > 1 and (table["tags"] >= 0).sum() <= table["tags"].size // 4:
        table = _halved(table)
    return {name: torch.from_numpy(values) for name, values in table.items()}


def _halved(table: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Two neighbouring buckets become one, which keeps the contexts seen most."""
    buckets = len(table["tags"]) // 2
    joined = {name: values.reshape(buckets, 2 * SLOTS, *values.shape[2:]) for name, values in table.items()}
    order_RS = np.argsort(-joined["totals"], axis=1, kind="stable")[:, :SLOTS]
    return {name: values[np.arange(buckets)[:, None], order_RS] for name, values in joined.items()}
