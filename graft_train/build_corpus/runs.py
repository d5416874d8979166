"""Sorted runs on disk: sums of (context, successor) weights over more data than memory holds.

A pair is one int64 key, context << SUCCESSOR_BITS | successor, and an int64 weight. Integer sums do not depend on
their order, so neither does what is built from them.
"""

import time
from collections.abc import Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from graft_inference.errors import GraftError
from graft_inference.files import replace_file

SUCCESSOR_BITS = 20
OTHER = (1 << SUCCESSOR_BITS) - 1
"""Stands for all successors of a context that are not listed one by one."""
ONE = 1 << 20
"""The weight of probability 1, or of one occurrence: probabilities are summed in fixed point."""
BLOCK = 1 << 14
"""Pairs of a run that are in memory at a time while runs are merged."""
FAN_IN = 128
"""Runs merged at a time."""
BYTES_PER_PAIR = 64
"""What a pair takes at most while a run is sorted and summed."""
FLUSH_SECONDS = 120
"""A kill loses no more work than this, and the unit it meets."""

Block = tuple[np.ndarray, np.ndarray]
"""Ascending keys, each once, and their weights."""
Pairs = tuple[np.ndarray, np.ndarray | None]
"""Keys in any order and their weights; None: each counts ONE."""


class RunWriter:
    """Collects pairs and writes them as sorted, summed runs.

    Args:
        rows: pairs kept in memory.
    """

    def __init__(self, directory: Path, rows: int) -> None:
        self.directory = directory
        self.rows = rows
        self.pairs: list[Pairs] = []
        self.units: list[int] = []
        self.held = 0
        self.since = time.monotonic()

    def add(self, keys_P: np.ndarray, weights_P: np.ndarray | None = None) -> None:
        """Adds pairs in any order; without weights each counts ONE."""
        self.pairs.append((keys_P, weights_P))
        self.held += len(keys_P)
        if self.held > self.rows:
            summed = sum_pairs(self.pairs)
            self.pairs, self.held = [summed], len(summed[0])

    def finish_unit(self, unit: int) -> None:
        """Notes that all pairs of a unit of the data have been added; only now may they reach the disk."""
        self.units.append(unit)
        if self.held > self.rows // 2 or time.monotonic() - self.since > FLUSH_SECONDS:
            self.flush()

    def flush(self) -> None:
        if self.units:
            path = self.directory / f"{self.units[0]:08d}.arrow"
            write_run(path, iter([sum_pairs(self.pairs)]), self.units)
        self.pairs, self.units, self.held, self.since = [], [], 0, time.monotonic()


def sum_pairs(pairs: Sequence[Pairs]) -> Block:
    """All pairs, ascending, the weights of equal keys summed."""
    ones = [keys for keys, weights in pairs if weights is None]
    weighted = [(keys, weights) for keys, weights in pairs if weights is not None]
    if ones:
        keys_P = np.concatenate(ones)
        keys_P.sort()
        first_U = _firsts(keys_P)
        counts_U = np.diff(first_U, append=len(keys_P))
        weighted.append((keys_P[first_U], counts_U * ONE))
    if not weighted:
        return np.empty(0, np.int64), np.empty(0, np.int64)
    keys_P = np.concatenate([keys for keys, _ in weighted])
    weights_P = np.concatenate([weights for _, weights in weighted])
    order_P = keys_P.argsort(kind="stable")  # merges what is sorted already
    keys_P = keys_P[order_P]
    first_U = _firsts(keys_P)
    return keys_P[first_U], np.add.reduceat(weights_P[order_P], first_U) if len(first_U) else weights_P


def _firsts(keys_P: np.ndarray) -> np.ndarray:
    """Places where a new key begins."""
    new_P = np.ones(len(keys_P), dtype=bool)
    np.not_equal(keys_P[1:], keys_P[:-1], out=new_P[1:])
    return np.flatnonzero(new_P)


def write_run(path: Path, blocks: Iterator[Block], units: list[int]) -> None:
    """Writes ascending blocks to an Arrow file, aside and renamed; its metadata says which units it holds."""
    import pyarrow as pa

    metadata = {"units": np.array(units, dtype=np.int64).tobytes()}
    schema = pa.schema([("key", pa.int64()), ("weight", pa.int64())], metadata)

    def write(aside: Path) -> None:
        with pa.OSFile(str(aside), "wb") as file, pa.ipc.new_file(file, schema) as writer:
            for keys_U, weights_U in blocks:
                table = pa.table([keys_U, weights_U], schema=schema)
                writer.write_table(table, max_chunksize=BLOCK)

    replace_file(path, write)


def read_run(path: Path, bar: Any) -> Iterator[Block]:
    """The blocks of a run, one in memory at a time (a mapped file would stay resident); `bar` counts their bytes."""
    import pyarrow as pa

    with pa.OSFile(str(path)) as file:
        reader = pa.ipc.open_file(file)
        for index in range(reader.num_record_batches):
            batch = reader.get_batch(index)
            bar.update(batch.nbytes)
            yield batch.column("key").to_numpy(), batch.column("weight").to_numpy()


def units_of(path: Path) -> list[int]:
    """The units of the data whose pairs a run holds.

    Raises:
        GraftError: the file is damaged.
    """
    import pyarrow as pa

    try:
        with pa.OSFile(str(path)) as file:
            return np.frombuffer(pa.ipc.open_file(file).schema.metadata[b"units"], dtype=np.int64).tolist()
    except (OSError, KeyError, TypeError, pa.ArrowInvalid) as error:
        raise GraftError(f"{path} is damaged ({error}); delete it and run graft build_corpus again") from error


def merge_runs(directory: Path) -> Iterator[Block]:
    """The sum of a directory's runs as ascending blocks. Memory: FAN_IN * BLOCK pairs, however many runs there are.

    While there are more than FAN_IN, the smallest are replaced by their sum, so that the disk holds little more than
    the runs themselves and an interrupted merge goes on where it was.
    """
    paths = sorted(_current(directory), key=lambda path: path.stat().st_size)
    while len(paths) > FAN_IN:
        count = min(FAN_IN, len(paths) - FAN_IN + 1)
        paths = [*paths[count:], _replace(paths[:count])]
    yield from _merge(paths)


def _replace(paths: list[Path]) -> Path:
    """One run in the place of several; until they are gone, `_current` tells it from them by its units."""
    whole, *rest = paths
    write_run(whole, _merge(paths), [unit for path in paths for unit in units_of(path)])
    for path in rest:
        path.unlink()
    return whole


def _current(directory: Path) -> list[Path]:
    """The runs that no other holds the units of; others are removed."""
    current: list[Path] = []
    held: set[int] = set()
    units = {path: units_of(path) for path in sorted(directory.glob("*.arrow"))}
    for path in sorted(units, key=lambda path: -len(units[path])):
        if held.isdisjoint(units[path]):
            current.append(path)
            held.update(units[path])
        else:
            path.unlink()
    return current


def _merge(paths: list[Path]) -> Iterator[Block]:
    """Takes from every run what lies up to the least of their blocks' last keys: the rest is still to come."""
    size = sum(path.stat().st_size for path in paths)
    with tqdm(total=size, desc="build_corpus: merge", unit="B", unit_scale=True, leave=False) as bar:
        runs = [read_run(path, bar) for path in paths]
        heads = [next(run, None) for run in runs]
        while any(head is not None for head in heads):
            last = min(int(keys[-1]) for keys, _ in filter(None, heads))
            ready = []
            for index, head in enumerate(heads):
                if head is None:
                    continue
                keys, weights = head
                cut = int(np.searchsorted(keys, last, side="right"))
                ready.append((keys[:cut], weights[:cut]))
                heads[index] = (keys[cut:], weights[cut:]) if cut < len(keys) else next(runs[index], None)
            yield sum_pairs(ready)


def split_blocks(blocks: Iterator[Block], key: int) -> tuple[Iterator[Block], Iterator[Block]]:
    """The blocks below `key`, and those from it on; the first must be read to its end before the second."""
    rest: list[Block] = []

    def below() -> Iterator[Block]:
        for keys, weights in blocks:
            cut = int(np.searchsorted(keys, key))
            if cut:
                yield keys[:cut], weights[:cut]
            if cut < len(keys):
                rest.append((keys[cut:], weights[cut:]))
                return

    return below(), chain(rest, blocks)


def whole_groups(blocks: Iterator[Block], shift: int) -> Iterator[Block]:
    """The same pairs in blocks that never part keys with equal `key >> shift`."""
    held: list[Block] = []
    for keys, weights in blocks:
        if len(keys) == 0:
            continue
        group = keys[-1] >> shift
        cut = int(np.searchsorted(keys, group << shift))
        if held and (cut or held[-1][0][-1] >> shift != group):
            yield _join([*held, (keys[:cut], weights[:cut])])
            held = []
        elif cut:
            yield keys[:cut], weights[:cut]
        held.append((keys[cut:], weights[cut:]))
    if held:
        yield _join(held)


def _join(blocks: list[Block]) -> Block:
    keys, weights = zip(*blocks, strict=True)
    return np.concatenate(keys), np.concatenate(weights)
