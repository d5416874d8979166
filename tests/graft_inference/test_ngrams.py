"""The n-gram source against dictionaries that do the same token by token."""

import math
from collections import Counter, defaultdict

import numpy as np
import pytest
import torch

from graft_inference import GraftError
from graft_inference.policy.plan import depth_template
from graft_inference.retrieval.ngrams import LONGEST, ORDERS, NgramSource, NgramTable, RequestNgrams, context_keys
from graft_inference.retrieval.successor_matrix import SuccessorMatrix, Template
from graft_inference.tree import Source
from graft_train.build_corpus.pairs import NGRAM
from graft_train.build_corpus.runs import SUCCESSOR_BITS, sum_pairs
from graft_train.build_corpus.tables import ngram_table

CPU = torch.device("cpu")
VOCAB, K = 9, 2


def key_of(context):
    """The key of one context of two or three tokens."""
    window = torch.tensor([[-1] * (LONGEST - len(context)) + list(context)])
    return int(context_keys(window)[0, ORDERS.index(len(context))])


def table_of(counts, k=K, megabytes=1) -> NgramTable:
    """The table of {context: {successor: count}}."""
    keys = [
        (key_of(context) + NGRAM) << SUCCESSOR_BITS | successor
        for context, row in counts.items()
        for successor in Counter(row).elements()
    ]
    tensors = ngram_table(iter([sum_pairs([(np.array(keys, dtype=np.int64), None)])]), k, megabytes)
    return NgramTable(tensors["tags"], tensors["successors"], tensors["counts"], tensors["totals"])


def counts_of(text):
    counts = defaultdict(Counter)
    for order in ORDERS:
        for end in range(order, len(text)):
            counts[tuple(text[end - order : end])][text[end]] += 1
    return counts


def matrix_of(seed=0, k=4) -> SuccessorMatrix:
    generator = torch.Generator().manual_seed(seed)
    ids_VK = torch.rand(VOCAB, VOCAB, generator=generator).argsort(dim=1)[:, :k].to(torch.int32)
    ids_VK[-2:] = -1  # two tokens the matrix has never seen
    probs_VK = (torch.rand(VOCAB, k, generator=generator).sort(descending=True).values / k).half()
    return SuccessorMatrix(ids_VK, probs_VK.masked_fill(ids_VK < 0, 0))


def text_of(seed, length):
    return torch.randint(0, VOCAB, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


def plain_successors(counts, own, matrix, path, k):
    """{token: probability} after a path: every source in turn, passing on what it keeps for the unseen."""
    probs, mass = defaultdict(float), 1.0
    for order in ORDERS:
        context = tuple(path[-order:])
        if len(context) == order and context in own:
            probs[own[context]] += mass / 2
            mass /= 2
        row = counts.get(context, {}) if len(context) == order else {}
        if row:
            kept = sorted(row, key=lambda token: (-row[token], token))[:K]
            weight = sum(row.values()) + len(kept)
            for token in kept:
                probs[token] += mass * row[token] / weight
            mass *= len(kept) / weight
    for token, prob in zip(matrix.ids_VK[path[-1]].tolist(), matrix.probs_VK[path[-1]].tolist(), strict=True):
        if token >= 0:
            probs[token] += mass * prob
    return sorted(probs.items(), key=lambda item: -item[1])[:k]


@pytest.mark.parametrize("seed", range(5))
def test_expand_equals_plain_dictionaries(seed):
    corpus, request = text_of(seed, 150), text_of(seed + 100, 60)
    counts, matrix = counts_of(corpus), matrix_of(seed)
    source = NgramSource(table_of(counts), matrix)
    for part in (request[:1], request[1:2], request[2:40], request[40:]):  # a prompt may be a single token
        source.read(torch.tensor(part))
    own = {}
    for end in range(2, len(request)):
        for order in ORDERS:
            if end >= order:
                own[tuple(request[end - order : end])] = request[end]
    paths = [path for path in depth_template((4, 4, 3, 2, 1)) if max(path) < 4]
    tree = source.expand(torch.tensor(request[-1:]), Template(paths, CPU))
    for row, ranks in enumerate(paths, start=1):
        path, logp = list(request), 0.0
        for rank in ranks:
            found = plain_successors(counts, own, matrix, path, 4)
            # Equal probabilities may stand in any order: follow the tree's own choice among them.
            node = paths.index(ranks[: len(path) - len(request) + 1]) + 1
            if rank >= len(found):
                assert tree.sources_N[node] == Source.EMPTY
                assert tree.logp_N[node] == -torch.inf
                break
            token = int(tree.tokens_N[node])
            assert dict(found)[token] == pytest.approx(found[rank][1], rel=1e-3)
            logp += math.log(found[rank][1])
            path.append(token)
        else:
            assert tree.sources_N[row] == Source.MATRIX
            assert float(tree.logp_N[row]) == pytest.approx(logp, abs=1e-2)


def test_siblings_differ():
    """Exact acceptance relies on it."""
    source = NgramSource(table_of(counts_of(text_of(1, 300))), matrix_of())
    source.read(torch.tensor(text_of(2, 200)))
    windows_MC = torch.cartesian_prod(*[torch.arange(VOCAB)] * LONGEST)
    ids_MK, logp_MK = source.successors_of(windows_MC, source.k)
    for ids, logps in zip(ids_MK.tolist(), logp_MK.tolist(), strict=True):
        found = [token for token in ids if token >= 0]
        assert len(set(found)) == len(found)
        assert ids == found + [-1] * (len(ids) - len(found))
        assert logps == sorted(logps, reverse=True)


def test_nothing_follows_an_unknown_token():
    source = NgramSource(table_of(counts_of(text_of(1, 300))), matrix_of())
    source.read(torch.tensor([3]))
    ids_MK, _ = source.successors_of(torch.tensor([[-1, -1, -1], [3, 4, -1]]), source.k)
    assert (ids_MK == -1).all()
    fresh = NgramSource(source.corpus, matrix_of())
    fresh.read(torch.tensor([VOCAB - 1]))
    tree = fresh.expand(torch.tensor([VOCAB - 1]), Template([(0,), (0, 0), (0, 0, 0), (0, 0, 0, 0)], CPU))
    assert tree.sources_N.tolist() == [Source.ROOT] + [Source.EMPTY] * 4


@pytest.mark.parametrize("parts", [[1] * 80, [80], [1, 2, 77], [40, 40]])
def test_request_ngrams_keep_the_last_successor_of_every_context(parts):
    text = text_of(4, 80)
    source, start = NgramSource(table_of(counts_of(text_of(1, 20))), matrix_of()), 0
    for part in parts:
        source.read(torch.tensor(text[start : start + part]))
        start += part
    last = {}
    for end in range(2, len(text)):
        for order in ORDERS:
            if end >= order:
                last[tuple(text[end - order : end])] = text[end]
    for window in torch.cartesian_prod(*[torch.arange(VOCAB)] * LONGEST):
        found = source.request.find(context_keys(window[None]))[0].tolist()
        assert found == [last.get(tuple(window[-order:].tolist()), -1) for order in ORDERS]


def test_a_full_request_forgets_its_oldest_contexts():
    request = RequestNgrams(CPU, capacity=8)
    text = torch.arange(50)
    request.learn(text[:-1].unfold(0, LONGEST, 1), text[LONGEST:])
    assert int(request.find(context_keys(torch.tensor([[46, 47, 48]])))[0, 0]) == 49
    found = request.find(context_keys(text.unfold(0, LONGEST, 1)))
    assert int((found >= 0).sum()) <= 8


def test_a_small_table_keeps_the_contexts_seen_most():
    """One bucket of eight: the smallest that 0 MB allow."""
    counts = {(n % VOCAB, n // VOCAB): {5: n + 1, 3: 1} for n in range(20)}
    table = table_of(counts, megabytes=0)
    assert table.buckets == 1
    for number, context in enumerate(counts):
        ids_QJ, ratios_QJ, passed_Q = table.find(torch.tensor([key_of(context)]))
        kept = number >= 12
        # Two distinct successors, seen number + 2 times together.
        assert ids_QJ.tolist() == [[-1, 5, 3] if kept else [-1, -1, -1]]
        assert ratios_QJ[:, 1:].tolist() == [[(number + 1) / 2, 1 / 2] if kept else [0, 0]]
        assert passed_Q.tolist() == pytest.approx([2 / (number + 4) if kept else 1])


def test_a_table_is_as_large_as_its_contexts_need():
    counts = {(a, b, c): {(a + b) % VOCAB: 1} for a in range(VOCAB) for b in range(VOCAB) for c in range(VOCAB)}
    table = table_of(counts)
    assert table.tags_RS.numel() <= 4 * len(counts)
    found = table.find(torch.tensor([key_of(context) for context in counts]))[0][:, 1]
    kept = int((found >= 0).sum())
    assert kept == int((table.tags_RS >= 0).sum())
    assert kept > 0.98 * len(counts)
    expected = torch.tensor([a_b for row in counts.values() for a_b in row])
    assert torch.equal(found[found >= 0].long(), expected[found >= 0])


def test_keys_of_different_contexts_differ():
    windows_MC = torch.cartesian_prod(*[torch.arange(-1, 40)] * LONGEST)
    keys_MO = context_keys(windows_MC)
    assert len(keys_MO[:, 0].unique()) == 41**3
    assert len(keys_MO[:, 1].unique()) == 41**2  # the first token is no part of a context of two
    assert len(keys_MO.unique()) == 41**3 + 41**2


def test_sources_of_one_store_share_what_was_read_and_not_where_they_stand():
    corpus = table_of(counts_of(text_of(1, 100)))
    one = NgramSource(corpus, matrix_of())
    two = NgramSource(corpus, matrix_of(), one.request)
    one.read(torch.tensor([1, 2, 3, 4]))
    assert two.recent_C.tolist() == [-1] * LONGEST
    two.read(torch.tensor([8, 1, 2]))
    keys = context_keys(torch.tensor([[1, 2, 3], [-1, 8, 1], [8, 1, 2]]))
    assert two.request.find(keys).tolist() == [[4, 4], [2, 2], [-1, 3]]


def test_bad_use_is_refused():
    table, matrix = table_of(counts_of(text_of(1, 100))), matrix_of()
    with pytest.raises(GraftError, match="rank 4, but the corpus keeps 4 successors"):
        NgramSource(table, matrix).expand(torch.tensor([1]), Template([(4,)], CPU))
    with pytest.raises(GraftError, match="matrix with probabilities"):
        NgramSource(table, SuccessorMatrix(matrix.ids_VK))
    with pytest.raises(GraftError, match="power of two of buckets, not 3"):
        NgramTable(*(torch.zeros(3, 8, *shape, dtype=torch.int32) for shape in ((), (2,), (2,), ())))
