"""Pairs from samples against loops over their tokens."""

from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from graft_inference import GraftError
from graft_inference.retrieval.successor_matrix import SuccessorMatrix
from graft_train.build_corpus import pairs
from graft_train.build_corpus.counts import ONE, OTHER, successor_matrix, write_counts
from graft_train.build_corpus.pairs import (
    Window,
    batches,
    counted,
    is_held_out,
    matrix_pairs,
    pad,
    predicted_pairs,
    samples_of,
    text_pairs,
    windows,
)
from graft_train.data.samples import Sample, answered, append_samples

VOCAB, K = 11, 3


def samples(count=12, seed=0, shortest=1):
    generator = np.random.default_rng(seed)
    lengths = [(int(a), int(b)) for a, b in generator.integers(shortest, 9, (count, 2))]
    return [
        answered(str(n), generator.integers(0, VOCAB, a).tolist(), generator.integers(0, VOCAB, b).tolist(), {})
        for n, (a, b) in enumerate(lengths)
    ]


def sums_of(parts):
    """The weight of each (context, successor)."""
    sums = Counter()
    for part in parts:
        for context, successor, weight in zip(*(column.tolist() for column in part), strict=True):
            sums[context, successor] += weight
    return sums


def follows(sample, prompts):
    """(tokens up to here, the next one) wherever the next one counts."""
    text = sample.prompt_ids + sample.answer_ids
    for end in range(1, len(text)):
        if prompts or end >= len(sample.prompt_ids):
            yield text[:end], text[end]


def test_of_a_conversation_only_what_becomes_an_answer_counts():
    chat = Sample("chat", "train", [1, 2, 3, 4, 5, 6, 7], [[2, 4], [6, 7]])
    (one,) = counted([chat], prompts=False)
    assert one.counted_S.tolist() == [False, True, True, False, False, True, True]


def conversation(*rows):
    """One sample an answer, each with what came before it, as templates without generation spans give them."""
    return [Sample(f"doc#{n}", "train", ids, [[start, len(ids)]]) for n, (ids, start) in enumerate(rows)]


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        # The whole first row stands before the second answer.
        ([([1, 2, 3, 4], 2), ([1, 2, 3, 4, 5, 6], 5)], [[1, 1, 1, 0], [0, 0, 0, 1, 1, 1]]),
        # The template leaves the first answer's thought, 9, out of the second row.
        ([([1, 2, 9, 3], 2), ([1, 2, 3, 5, 6], 4)], [[1, 1, 1, 1], [0, 1, 1, 1, 1]]),
        # It parts from the first row within that one's prompt, which ended in a thought left empty, 8 9.
        ([([1, 2, 8, 9, 3], 4), ([1, 2, 3, 5, 6], 4)], [[1, 1, 1, 1, 1], [0, 1, 1, 1, 1]]),
        # Another beginning.
        ([([1, 2, 3], 2), ([4, 2, 3], 2)], [[1, 1, 1], [1, 1, 1]]),
    ],
)
def test_what_a_conversations_samples_repeat_counts_once(rows, expected):
    samples = conversation(*rows)
    assert [one.counted_S.astype(int).tolist() for one in counted(samples, prompts=True)] == expected
    others = [Sample(str(n), "train", one.ids, one.answers) for n, one in enumerate(samples)]
    assert all(one.counted_S.all() for one in counted(others, prompts=True))


def test_conversations_of_several_sources_may_take_turns():
    mine, other = (conversation(([1, 2, 3], 2), ([1, 2, 3, 4, 5], 4)) for _ in range(2))
    other = [Sample(f"1:{one.id}", "train", one.ids, one.answers) for one in other]
    dealt = counted([mine[0], other[0], mine[1], other[1]], prompts=True)
    assert [one.counted_S.astype(int).tolist() for one in dealt] == [[1, 1, 0]] * 2 + [[0, 0, 1, 1, 1]] * 2


def test_windows_of_one_text_share_no_place():
    """Though they may begin alike, as with a licence."""
    windows_ = [Sample(f"doc@{n}", "train", [1, 2, 3, n], [[3, 4]]) for n in (5, 6)]
    assert all(one.counted_S.all() for one in counted(windows_, prompts=True))


def test_a_conversation_counts_the_same_in_one_sample_and_in_several():
    several = counted(conversation(([1, 2, 3, 4], 2), ([1, 2, 3, 4, 5, 6], 5)), prompts=True)
    one = counted([Sample("doc", "train", [1, 2, 3, 4, 5, 6], [[2, 4], [5, 6]])], prompts=True)
    assert sums_of([text_pairs(several)]) == sums_of([text_pairs(one)])
    assert sums_of(predicted_pairs(Oracle(), several, K, 40)) == sums_of(predicted_pairs(Oracle(), one, K, 40))


class Oracle(torch.nn.Module):
    """A model whose logits after a token are a fixed row, so that rounding cannot differ."""

    def __init__(self):
        super().__init__()
        self.logits_VV = torch.randn(VOCAB, VOCAB, generator=torch.Generator().manual_seed(1)) * 2
        self.device = torch.device("cpu")

    def forward(self, input_ids, attention_mask, use_cache):
        assert input_ids.shape == attention_mask.shape
        return SimpleNamespace(logits=self.logits_VV[input_ids])


@pytest.mark.parametrize("prompts", [True, False])
def test_text_pairs_equal_a_loop(prompts):
    data = samples()
    expected = Counter((before[-1], after) for sample in data for before, after in follows(sample, prompts))
    assert sums_of([text_pairs(counted(data, prompts))]) == {pair: count * ONE for pair, count in expected.items()}


@pytest.mark.parametrize("prompts", [True, False])
def test_predictions_equal_a_loop(prompts, monkeypatch):
    """Every counted position weighs ONE: the model's top k, and all others together."""
    monkeypatch.setattr(pairs, "CHUNK", 5)
    data, model = samples(), Oracle()
    found = sums_of(predicted_pairs(model, counted(data, prompts), K, 40))
    probs_VV = model.logits_VV.double().softmax(dim=-1)
    expected, seen, totals = Counter(), Counter(), Counter()
    for sample in data:
        text = sample.prompt_ids + sample.answer_ids
        for token in text[0 if prompts else len(sample.prompt_ids) - 1 :]:
            seen[token] += ONE
            for successor in probs_VV[token].topk(K).indices.tolist():
                expected[token, successor] += float(probs_VV[token, successor])
    for (context, successor), weight in found.items():
        totals[context] += weight
        if successor != OTHER:
            assert weight / ONE == pytest.approx(expected.pop((context, successor)), rel=1e-4)
    assert not expected
    assert totals == seen


def test_a_saved_matrix_gives_back_its_rows(tmp_path):
    ids_VK = torch.tensor([[3, 1], [2, -1], [0, 4], [1, 2], [-1, -1]], dtype=torch.int32)
    probs_VK = torch.tensor([[0.5, 0.25], [1, 0], [0.3, 0.3], [0.6, 0.4], [0, 0]]).half()
    counts_V = torch.tensor([5, 2, 1, 0, 0])
    write_counts(tmp_path / "0.parquet", [matrix_pairs(SuccessorMatrix(ids_VK, probs_VK), counts_V)])
    matrix = successor_matrix(tmp_path, 5, 2, 128)
    assert matrix["counts"].tolist() == counts_V.tolist()
    assert matrix["ids"].tolist() == [[3, 1], [2, -1], [0, 4], [-1, -1], [-1, -1]]
    torch.testing.assert_close(matrix["probs"][:3], probs_VK[:3], atol=1e-3, rtol=0)


def test_batches_hold_every_sample_within_the_padded_budget():
    data = samples(20)
    dealt = list(batches(counted(data, prompts=False), 40))
    assert sorted(one.sample.id for batch in dealt for one in batch) == sorted(sample.id for sample in data)
    for batch in dealt:
        ids_BS, counted_BS = pad(batch, torch.device("cpu"))
        assert len(batch) == 1 or ids_BS.numel() <= 40
        for row, sample in enumerate(one.sample for one in batch):
            assert ids_BS[row][ids_BS[row] >= 0].tolist() == sample.prompt_ids + sample.answer_ids
            assert ids_BS[row][counted_BS[row]].tolist() == [sample.prompt_ids[-1], *sample.answer_ids]


def test_windows_hold_every_line_once(tmp_path, monkeypatch):
    monkeypatch.setattr(pairs, "WINDOW_BYTES", 300)
    path, data = tmp_path / "samples.jsonl", samples(30)
    with path.open("wb") as file:
        append_samples(file, data)
    dealt = list(windows(path))
    assert len(dealt) > 3
    assert [window.number for window in dealt] == list(range(len(dealt)))
    assert [sample for window in dealt for sample in samples_of(window, path, VOCAB)] == data
    for window in dealt:
        assert window.line == 1 + sum(len(earlier.lines) for earlier in dealt[: window.number])


def test_bad_samples_are_named(tmp_path):
    path = tmp_path / "samples.jsonl"
    with pytest.raises(GraftError, match=r"does not exist; run graft regenerate"):
        list(windows(path))
    with path.open("wb") as file:
        append_samples(file, [answered("s", [1], [VOCAB], {})])
    window = next(windows(path))
    with pytest.raises(GraftError, match=r"line 1: sample s has token ids outside .* of 11"):
        samples_of(window, path, VOCAB)
    with pytest.raises(GraftError, match="line 8 is not a JSON object"):
        samples_of(Window(0, 7, [*window.lines, b"torn"]), path, VOCAB + 1)


def test_held_out_is_a_share_of_all():
    def of(identity):
        return Sample(identity, "train", [1, 2], [[1, 2]])

    chosen = [number for number in range(2000) if is_held_out(of(str(number)), 0.1)]
    assert 150 < len(chosen) < 250
    assert not any(is_held_out(of(str(number)), 0.0) for number in range(50))
    assert all(is_held_out(of(f"{number}{part}"), 0.1) for number in chosen for part in ("#1", "#3", "@0", "@512"))
