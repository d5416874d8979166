"""Sorted runs against plain dictionaries."""

from collections import Counter
from itertools import pairwise

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


@pytest.mark.parametrize(("rows", "units"), [(1, 25), (60, 25), (10_000, 25), (10_000, 1)])
def test_merged_runs_equal_plain_sums(tmp_path, small_blocks, rows, units):
    """25 runs, merged three at a time: two levels of intermediate runs; or one run."""
    (tmp_path / "runs").mkdir()
    writer, expected = RunWriter(tmp_path / "runs", rows), Counter()
    for unit in range(units):
        keys, weights = random_pairs(unit, 30, keys=300)
        writer.add(keys, weights)
        writer.finish_unit(unit)
        for key, weight in zip(keys, weights, strict=True):
            expected[int(key)] += int(weight)
    writer.flush()
    paths = sorted((tmp_path / "runs").iterdir())
    assert (len(paths) == units) == (rows == 1 or units == 1)
    assert sorted(unit for path in paths for unit in units_of(path)) == list(range(units))
    assert as_dict(list(merge_runs(paths, tmp_path / "merged"))) == expected
    assert sorted((tmp_path / "runs").iterdir()) == paths
    assert not (tmp_path / "merged").exists()


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
