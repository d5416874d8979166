"""The tally of successors against plain dictionaries."""

from collections import defaultdict

import pytest
import torch

from graft_train.build_corpus import SuccessorTally, _batches, _pad
from graft_train.data.samples import answered

VOCAB, K = 11, 3


def positions(count: int, seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    tokens_M = torch.randint(0, VOCAB - 2, (count,), generator=generator)  # the last two never occur
    probs_MV = torch.rand(count, VOCAB, generator=generator).pow(4)
    return tokens_M, probs_MV / probs_MV.sum(-1, keepdim=True)


def plain_tally(tokens_M, probs_MV):
    weights = defaultdict(float)
    for token, probs in zip(tokens_M.tolist(), probs_MV, strict=True):
        for successor in probs.topk(K).indices.tolist():
            weights[token, successor] += float(probs[successor])
    return weights


def test_matrix_equals_plain_sums():
    tokens_M, probs_MV = positions(300)
    tally = SuccessorTally(VOCAB, K)
    for part in range(0, 300, 70):
        tally.add(tokens_M[part : part + 70], probs_MV[part : part + 70])
    matrix = tally.matrix()
    weights = plain_tally(tokens_M, probs_MV)
    counts = tokens_M.bincount(minlength=VOCAB)
    assert torch.equal(matrix["counts"], counts)
    for token in range(VOCAB):
        ranked = sorted((s for t, s in weights if t == token), key=lambda s: -weights[token, s])[:K]
        assert matrix["ids"][token].tolist() == ranked + [-1] * (K - len(ranked))
        for rank, successor in enumerate(ranked):
            expected = weights[token, successor] / int(counts[token])
            assert float(matrix["probs"][token, rank]) == pytest.approx(expected, rel=2e-3)


def test_order_and_batching_do_not_matter():
    tokens_M, probs_MV = positions(200)
    order = torch.randperm(200, generator=torch.Generator().manual_seed(9))
    forward, shuffled = SuccessorTally(VOCAB, K), SuccessorTally(VOCAB, K)
    forward.add(tokens_M, probs_MV)
    for rows in order.split(13):
        shuffled.add(tokens_M[rows], probs_MV[rows])
    one, other = forward.matrix(), shuffled.matrix()
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_batches_hold_every_sequence_within_the_padded_budget():
    samples = [answered(str(n), [1] * n, [2] * 3, {}) for n in (9, 1, 4, 2, 7, 30)]
    batches = list(_batches(samples, batch_tokens=24))
    assert sorted(len(row) for batch in batches for row in batch) == [4, 5, 7, 10, 12, 33]
    assert all(len(batch) == 1 or max(map(len, batch)) * len(batch) <= 24 for batch in batches)
    ids_BS, mask_BS = _pad(batches[0], torch.device("cpu"))
    assert [ids_BS[i][mask_BS[i]].tolist() for i in range(len(batches[0]))] == batches[0]
