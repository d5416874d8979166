"""Sorted runs against plain dictionaries."""

from collections import Counter
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from graft_inference import GraftError
from graft_train.build_corpus import runs
from graft_train.build_corpus.runs import ONE, RunWriter, merge_runs, split_blocks, sum_pairs, units_of, whole_groups


def as_dict(blocks):
    """Pairs of ascending blocks; fails where a key comes twice or out of order."""
    keys = np.concatenate([keys for keys, _ in blocks]) if blocks else np.empty(0, np.int64)
    assert (np.diff(keys) > 0).all()
    return {int(key): int(weight) for keys, weights in blocks for key, weight in zip(keys, weights, strict=True)}


def random_pairs(seed, count, keys=50):
    generator = np.random.default_rng(seed)
    return generator.integers(0, keys, count), generator.integers(1, 9, count)


@pytest.fixture
def small_blocks(monkeypatch):
    monkeypatch.setattr(runs, "BLOCK", 7)
    monkeypatch.setattr(runs, "FAN_IN", 3)


def test_sum_pairs_counts_and_weighs():
    counted, (keys, weights) = np.array([5, 3, 5]), random_pairs(0, 40)
    expected = Counter({5: 2 * ONE, 3: ONE})
    for key, weight in zip(keys, weights, strict=True):
        expected[int(key)] += int(weight)
    assert as_dict([sum_pairs([(counted, None), (keys, weights)])]) == expected
    assert as_dict([sum_pairs([])]) == {}


def write_runs(directory, rows, units):
    """Random pairs of so many units as runs; the sums they should give."""
    writer, expected = RunWriter(directory, rows), Counter()
    for unit in range(units):
        keys, weights = random_pairs(unit, 30, keys=300)
        writer.add(keys, weights)
        writer.finish_unit(unit)
        for key, weight in zip(keys, weights, strict=True):
            expected[int(key)] += int(weight)
    writer.flush()
    return expected


def units_in(directory):
    return sorted(unit for path in directory.iterdir() for unit in units_of(path))


@pytest.mark.parametrize(("rows", "units"), [(1, 25), (60, 25), (10_000, 25), (10_000, 1), (1, 4), (1, 3)])
def test_merged_runs_equal_plain_sums(tmp_path, small_blocks, rows, units):
    """25 runs, at most three merged at a time, or as few as one; sums take the places of what they sum."""
    expected = write_runs(tmp_path, rows, units)
    written = len(list(tmp_path.iterdir()))
    assert (written == units) == (rows == 1 or units == 1)
    assert units_in(tmp_path) == list(range(units))
    assert as_dict(list(merge_runs(tmp_path))) == expected
    assert len(list(tmp_path.iterdir())) == min(written, 3)
    assert units_in(tmp_path) == list(range(units))
    assert as_dict(list(merge_runs(tmp_path))) == expected


@pytest.mark.parametrize("removed", range(4))
def test_a_merge_killed_while_it_drops_what_it_summed_counts_nothing_twice(
    tmp_path, small_blocks, monkeypatch, removed
):
    expected = write_runs(tmp_path, 1, 9)
    unlink, left = Path.unlink, iter(range(removed))

    def dies(path, **options):
        if next(left, None) is None:
            raise KeyboardInterrupt
        unlink(path, **options)

    monkeypatch.setattr(Path, "unlink", dies)
    with pytest.raises(KeyboardInterrupt):
        list(merge_runs(tmp_path))
    monkeypatch.undo()
    assert len(units_in(tmp_path)) > 9
    monkeypatch.setattr(runs, "FAN_IN", 3)
    assert as_dict(list(merge_runs(tmp_path))) == expected
    assert units_in(tmp_path) == list(range(9))


def test_an_unfinished_unit_never_reaches_the_disk(tmp_path):
    writer = RunWriter(tmp_path, rows=1)
    writer.add(*random_pairs(0, 30))
    assert list(tmp_path.iterdir()) == []
    writer.finish_unit(4)
    assert units_of(tmp_path / "00000004.arrow") == [4]


def test_split_and_regrouped_blocks_hold_the_same_pairs(tmp_path, small_blocks):
    keys = np.unique(random_pairs(1, 200, keys=400)[0])
    blocks = [(part, part * 2) for part in np.array_split(keys, 23)]
    below, above = split_blocks(iter(blocks), 128)
    low, high = list(below), list(above)
    assert max(low[-1][0]) < 128 <= min(high[0][0])
    assert as_dict(low + high) == {int(key): 2 * int(key) for key in keys}
    for shift in (0, 2, 4, 7, 10):
        grouped = list(whole_groups(iter(blocks), shift))
        assert as_dict(grouped) == as_dict(blocks)
        groups = [set((part >> shift).tolist()) for part, _ in grouped]
        assert all(not one & other for one, other in pairwise(groups))
    assert len(list(whole_groups(iter(blocks), 4))) > 1
    assert len(list(whole_groups(iter(blocks), 10))) == 1


def test_a_damaged_run_is_named(tmp_path):
    path = tmp_path / "00000000.arrow"
    path.write_bytes(b"half of")
    with pytest.raises(GraftError, match=r"00000000\.arrow is damaged"):
        units_of(path)
