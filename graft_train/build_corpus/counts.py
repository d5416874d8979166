"""Sums of (context, successor) weights over more data than memory holds: a Parquet file per window, summed by DuckDB.

Weights are integers, so their sums do not depend on the order in which they are added.
"""

import glob
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from graft_inference.errors import GraftError
from graft_inference.files import replace_file

OTHER = -1
"""Stands for all successors of a context that are not listed one by one."""
ONE = 1 << 20
"""The weight of probability 1, or of one occurrence: probabilities are summed in fixed point."""

# The k heaviest successors of each context, ties by the lower id, filled up to k; `negated` is -id, so padding is -1.
HEAVIEST = """
SELECT context, sum(weight)::BIGINT AS total, list_resize(
    coalesce(max({{'weight': weight, 'negated': -successor}}, {k}) FILTER (successor != {other}), []),
    {k}, {{'weight': 0::BIGINT, 'negated': 1}}) AS heaviest
FROM (
    SELECT context, successor, sum(weight)::BIGINT AS weight
    FROM read_parquet($files) GROUP BY context, successor)
GROUP BY context
"""


class Pairs(NamedTuple):
    """P pairs in any order, int64: what was seen, what followed, and with which weight."""

    contexts_P: np.ndarray
    successors_P: np.ndarray
    weights_P: np.ndarray


def write_counts(path: Path, pairs: Iterable[Pairs]) -> None:
    """Sums the pairs of one window of the data and writes them as a Parquet file, aside and renamed."""
    import pyarrow as pa
    from pyarrow import parquet

    schema = pa.schema([("context", pa.int32()), ("successor", pa.int32()), ("weight", pa.int64())])
    tables = [pa.table(list(map(pa.array, part)), names=schema.names).cast(schema) for part in pairs]
    table = pa.concat_tables(tables) if tables else schema.empty_table()
    summed = table.group_by(["context", "successor"], use_threads=False).aggregate([("weight", "sum")])
    replace_file(path, lambda aside: parquet.write_table(summed.rename_columns(schema.names), aside))


def successor_matrix(directory: Path, vocab_size: int, k: int, memory_mb: int) -> dict[str, Tensor]:
    """The summed counts of a directory's files as a successor matrix.

    Args:
        k: successors kept per token.
        memory_mb: for DuckDB, which spills into the directory what does not fit.

    Returns:
        ids [V, k] int32 (-1 none), probs [V, k] fp16, counts [V] int64: how often each token was seen.

    Raises:
        GraftError: a file is damaged, or memory or disk do not suffice; says which.
    """
    import duckdb

    settings: dict[str, str | bool | int | float | list[str]] = {
        "memory_limit": f"{memory_mb}MB",
        "temp_directory": str(directory / "spill"),
        "threads": 1,  # each takes memory of its own
        "preserve_insertion_order": False,
    }
    try:
        with duckdb.connect(config=settings) as database:
            database.execute("SET enable_progress_bar = true")
            query = HEAVIEST.format(k=k, other=OTHER)
            found = database.sql(query, params={"files": f"{glob.escape(str(directory))}/*.parquet"}).to_arrow_table()
    except duckdb.Error as error:
        raise GraftError(
            f"{directory}: {str(error).splitlines()[0]}; raise corpus.memory_mb if memory is short, free some space if "
            "the disk is full, delete a file that is damaged, and run graft build_corpus again"
        ) from error
    contexts_C, totals_C = found["context"].to_numpy(), found["total"].to_numpy()
    heaviest = found["heaviest"].combine_chunks().flatten()
    ids_CK = -heaviest.field("negated").to_numpy().reshape(-1, k)
    weights_CK = heaviest.field("weight").to_numpy().reshape(-1, k)
    ids_VK = np.full((vocab_size, k), -1, dtype=np.int32)
    probs_VK = np.zeros((vocab_size, k), dtype=np.float16)
    counts_V = np.zeros(vocab_size, dtype=np.int64)
    ids_VK[contexts_C] = ids_CK
    probs_VK[contexts_C] = weights_CK / totals_C[:, None]
    counts_V[contexts_C] = totals_C // ONE
    return {"ids": torch.from_numpy(ids_VK), "probs": torch.from_numpy(probs_VK), "counts": torch.from_numpy(counts_V)}
