"""Counts on disk and their sums against plain dictionaries."""

from collections import Counter, defaultdict

import numpy as np
import pyarrow.parquet
import pytest

from graft_inference import GraftError
from graft_train.build_corpus.counts import ONE, OTHER, Pairs, successor_matrix, write_counts

from .test_pairs import sums_of

VOCAB, K = 30, 4


def random_pairs(seed, count=200):
    """Many ties; about one in eight successors is OTHER."""
    generator = np.random.default_rng(seed)
    successors = generator.integers(-2, VOCAB // 2, count).clip(min=OTHER)
    return Pairs(generator.integers(0, VOCAB - 2, count), successors, generator.integers(0, 4, count) * ONE)


def assert_matrix(directory, parts):
    """Each row: the heaviest successors, ties by the lower id, and their shares of all that followed."""
    rows, totals = defaultdict(list), Counter()
    for (context, successor), weight in sums_of(parts).items():
        totals[context] += weight
        if successor != OTHER:
            rows[context].append((-weight, successor))
    matrix = successor_matrix(directory, VOCAB, K, 128)
    for token in range(VOCAB):
        best = sorted(rows[token])[:K]
        blank = K - len(best)
        assert matrix["ids"][token].tolist() == [successor for _, successor in best] + [-1] * blank
        shares = np.array([-weight / max(totals[token], 1) for weight, _ in best] + [0.0] * blank)
        assert matrix["probs"][token].numpy().tobytes() == shares.astype(np.float16).tobytes()
        assert int(matrix["counts"][token]) == totals[token] // ONE


def test_a_window_is_summed_before_it_is_written(tmp_path):
    parts = [random_pairs(0), random_pairs(1)]
    write_counts(tmp_path / "a.parquet", parts)
    rows = pyarrow.parquet.read_table(tmp_path / "a.parquet").to_pylist()
    assert {(row["context"], row["successor"]): row["weight"] for row in rows} == sums_of(parts)
    assert len(rows) == len(sums_of(parts))


@pytest.mark.parametrize("windows", [1, 9])
def test_the_sums_of_all_windows_are_the_matrix(tmp_path, windows):
    parts = [random_pairs(seed) for seed in range(windows)]
    for number, part in enumerate(parts):
        write_counts(tmp_path / f"{number}.parquet", [part])
    assert_matrix(tmp_path, parts)


def test_a_path_may_hold_what_means_something_to_a_database(tmp_path):
    directory = tmp_path / "it's [a] *run*?"
    directory.mkdir()
    write_counts(directory / "0.parquet", [random_pairs(0)])
    assert_matrix(directory, [random_pairs(0)])


def test_a_window_without_pairs_counts_nothing_and_what_a_kill_left_half_written_neither(tmp_path):
    write_counts(tmp_path / "0.parquet", [])
    write_counts(tmp_path / "1.parquet", [random_pairs(0)])
    (tmp_path / ".2.parquet.partial").write_bytes(b"half of")
    assert_matrix(tmp_path, [random_pairs(0)])


def test_sums_that_memory_does_not_hold_go_to_the_disk(tmp_path):
    """Three million distinct pairs take more than the 128 MB of memory that they are given."""
    vocab, per_context, parts = 3000, 1000, 4
    contexts = np.repeat(np.arange(vocab), per_context)
    successors = np.tile(np.arange(per_context), vocab)
    for number in range(parts):
        weights = (successors[::-1] % 7 + number) * ONE
        write_counts(tmp_path / f"{number}.parquet", [Pairs(contexts, successors, weights)])
    matrix = successor_matrix(tmp_path, vocab, 2, 128)
    summed = sum((successors[:per_context][::-1] % 7 + number) for number in range(parts))
    first, second = np.argsort(-summed, kind="stable")[:2].tolist()
    assert (matrix["ids"] == matrix["ids"].new_tensor([first, second])).all()
    assert (matrix["counts"] == int(summed.sum())).all()


def test_too_little_memory_or_a_damaged_file_is_told_in_one_line(tmp_path):
    every = np.arange(VOCAB * 100_000)
    write_counts(tmp_path / "0.parquet", [Pairs(every % VOCAB, every // VOCAB, every)])
    with pytest.raises(GraftError, match=r"Out of Memory.*raise corpus\.memory_mb") as told:
        successor_matrix(tmp_path, VOCAB, K, 16)
    assert "\n" not in str(told.value)
    (tmp_path / "1.parquet").write_bytes(b"half of")
    with pytest.raises(GraftError, match=r"1\.parquet.*delete a file that is damaged"):
        successor_matrix(tmp_path, VOCAB, K, 128)
