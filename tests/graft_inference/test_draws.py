"""Draws at the nodes of a tree and the noise in them, against plain loops over Python numbers."""

import math
from dataclasses import fields

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import (
    LogitsProcessor,
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    SuppressTokensLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from graft_inference import GraftError
from graft_inference.decode.sampling import AHEAD, Sampler
from graft_inference.noise import LEFT_OUT, Noise, gumbel
from graft_inference.tree import DraftTree
from graft_inference.verification import accept

from .trees import CPU, VOCAB, random_tree, tree_of, trees

SEEDS = st.one_of(st.integers(-(2**63), 2**63 - 1), st.integers(2**63, 2**64 - 1))
CONTEXT_FREE = {
    "temperature": lambda: TemperatureLogitsWarper(0.6),
    "top_k": lambda: TopKLogitsWarper(2),
    "top_p": lambda: TopPLogitsWarper(0.7),
    "min_p": lambda: MinPLogitsWarper(0.3),
    "suppress": lambda: SuppressTokensLogitsProcessor([1], device="cpu"),
}
HISTORY = {"penalty": lambda: RepetitionPenaltyLogitsProcessor(2.5)}
WAYS = CONTEXT_FREE | HISTORY


def mixed(bits: int) -> int:
    """The finaliser of SplitMix64."""
    bits = (bits ^ (bits >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
    bits = (bits ^ (bits >> 27)) * 0x94D049BB133111EB % 2**64
    return bits ^ (bits >> 31)


def plain_gumbel(seed: int, place: int, token: int) -> float:
    key = mixed((place * 0x9E3779B97F4A7C15 + seed) % 2**64)
    bits = mixed((key + token * 0xD1342543DE82EF95) % 2**64)
    top = ((bits >> 32) + 2**31) % 2**32  # of the bits as a signed number, from the smallest on
    return -math.log(-math.log1p(-(top + 0.5) / 2**32))


@given(SEEDS, st.integers(0, 2**40), st.integers(1, 4), st.integers(1, 6))
def test_noise_is_that_of_its_seed_place_and_token(seed, place, places, vocab):
    noise_PV = gumbel(seed, place, places, vocab, CPU)
    expected = [[plain_gumbel(seed, place + ahead, token) for token in range(vocab)] for ahead in range(places)]
    torch.testing.assert_close(noise_PV, torch.tensor(expected), atol=2e-3, rtol=1e-5)
    signed = (seed + 2**63) % 2**64 - 2**63
    assert torch.equal(noise_PV, gumbel(torch.tensor([signed]), torch.tensor([place]), places, vocab, CPU))


@given(st.lists(st.tuples(st.integers(0, 90), st.integers(1, 20)), min_size=1, max_size=8))
def test_a_place_has_its_noise_in_whatever_order_places_are_asked_for(asked):
    sampler = Sampler.of(0.5, seed=3)
    for place, places in asked:
        noise = sampler.noise(place, places, VOCAB, CPU)
        assert torch.equal(noise.gumbel_PV, gumbel(3, place, places, VOCAB, CPU))
        assert (noise.temperature, noise.warpers) == (0.5, None)
        captured = sampler.noise(torch.tensor([place]), places, VOCAB, CPU)
        assert torch.equal(captured.gumbel_PV, noise.gumbel_PV)


def test_noise_is_made_ahead_once():
    """Of the places behind it, too, as far as rounds soon come."""
    sampler = Sampler.of(1.0, seed=3)
    made = sampler.noise(7, 3, VOCAB, CPU).gumbel_PV
    assert sampler.noise(7 + AHEAD, 3, VOCAB, CPU).gumbel_PV.data_ptr() == made.data_ptr() + AHEAD * VOCAB * 4
    assert sampler.noise(8 + AHEAD, 3, VOCAB, CPU).gumbel_PV.untyped_storage().data_ptr() != made.data_ptr()
    assert Sampler.of(0, seed=3).noise(7, 3, VOCAB, CPU) is None


@st.composite
def requests(draw) -> tuple[list[str], bool, set[int], int | None]:
    """Processors by name, whether it is greedy, and where its output ends: at a token, at a length."""
    names = draw(st.lists(st.sampled_from(list(WAYS)), unique=True, max_size=3))
    names.sort(key=lambda name: name != "suppress")  # behind a filter it might leave nothing to draw
    ends = draw(st.sets(st.integers(0, VOCAB - 1), max_size=1))
    return names, draw(st.booleans()), ends, draw(st.one_of(st.none(), st.integers(4, 8)))


def plainly_drawn(tree: DraftTree, logits_NV, processors, history, seed):
    """Token after token along the output, as far as the tree has it: rows, tokens, log-probabilities."""
    rows, tokens, logps = [0], [], []
    while True:
        ids = torch.tensor([[*history, *tokens]])
        scores = processors(ids, logits_NV[rows[-1]][None].float())[0]
        noisy = scores if seed is None else scores + gumbel(seed, len(tokens), 1, VOCAB, CPU)[0]
        tokens.append(int(noisy.argmax()))
        logps.append(float(scores.log_softmax(-1)[tokens[-1]]))
        children = ((tree.parents_N == rows[-1]) & (tree.tokens_N == tokens[-1])).tolist()
        children[0] = False
        if not any(children):
            return rows, tokens, logps
        rows.append(children.index(True))


@given(trees(), requests(), st.integers(0, 2**32), st.integers(0, 3))
def test_what_is_drawn_along_the_path_is_what_plain_sampling_draws(tree, request, seed, more):
    """Also where processors read the text so far: then nothing is asked behind the output's end."""
    names, greedy, ends, length = request
    processors = LogitsProcessorList([WAYS[name]() for name in names])
    logits_NV = 2 * torch.randn(len(tree), VOCAB, generator=torch.Generator().manual_seed(seed))
    history = [4, int(tree.tokens_N[0])]
    max_depth = int(tree.depths_N.max()) + more
    sampler = Sampler(processors, greedy, seed, ends, length)
    assert sampler.needs_history == ("penalty" in names)
    noise = sampler.noise(0, 1 + max_depth, VOCAB, CPU)
    for logprobs in (False, True):
        drawn_N, logp_N = sampler.draw(tree, logits_NV, noise, max_depth, torch.tensor(history), logprobs)
        result = accept(tree, tree.ancestors(max_depth), drawn_N, max_depth)
        rows, tokens, logps = plainly_drawn(tree, logits_NV, processors, history, None if greedy else seed)
        if sampler.needs_history:
            lengths = range(len(history) + 1, len(history) + 1 + len(tokens))
            last = [token in ends or size == length for token, size in zip(tokens, lengths, strict=True)]
            rows, tokens = rows[: [*last, True].index(True) + 1], tokens[: [*last, True].index(True) + 1]
        looked_at = sorted(rows) if sampler.needs_history else list(range(len(tree)))
        assert (drawn_N != -1).nonzero().flatten().tolist() == looked_at
        assert drawn_N[rows].tolist() == tokens
        assert result.path_D[: len(rows)].tolist() == rows
        assert (logp_N is not None) == logprobs
        if logprobs:
            assert logp_N[rows].tolist() == pytest.approx(logps[: len(rows)], abs=1e-5)


@pytest.mark.parametrize(
    ("ends", "length", "lengths"),
    [((), None, [2, 3, 4, 5]), ((2,), None, [2, 3]), ((9,), 4, [2, 3]), ((2,), 9, [2, 3]), ((3,), 4, [2, 3])],
)
def test_a_processor_is_asked_for_each_token_up_to_the_outputs_end(ends, length, lengths):
    """Of a text of two tokens, and a tree whose path the target follows to its end."""
    asked = Answering(lambda scores: scores)
    sampler = Sampler(LogitsProcessorList([asked]), True, 0, set(ends), length)
    tree = tree_of([0, 1, 2, 3], [0, 0, 1, 2])
    sampler.draw(tree, torch.eye(5)[1:], None, 3, torch.tensor([4, 0]), False)
    assert asked.lengths == lengths


@given(st.data(), st.sampled_from([0.0, 0.6, 1.0, 2.0]))
def test_a_request_of_a_temperature_alone_divides_by_it(data, temperature):
    sampler = Sampler.of(temperature, seed=1)
    logits_1V = torch.tensor([data.draw(st.lists(st.integers(-4, 4), min_size=VOCAB, max_size=VOCAB))]).float()
    noise = sampler.noise(0, 1, VOCAB, CPU)
    (token,), _ = sampler.draw(random_tree(0, 1), logits_1V, noise, 0, None, False)
    scores = [
        score / (temperature or 1) + (plain_gumbel(1, 0, token) if temperature else 0)
        for token, score in enumerate(logits_1V[0].tolist())
    ]
    assert int(token) == scores.index(max(scores))
    assert sampler.greedy == (temperature == 0)


ORDERS = st.permutations([2, 0, 4, 1, 3])


@given(ORDERS, st.integers(1, 5), st.lists(st.sampled_from(list(CONTEXT_FREE)), unique=True, max_size=4), SEEDS)
def test_a_head_foresees_what_is_drawn_if_it_is_the_target(order, depth, names, seed):
    """Over a draft vocabulary in its own order; what the settings leave out comes LEFT_OUT nats later."""
    processors = [CONTEXT_FREE[name]() for name in names]
    noise = Sampler(LogitsProcessorList(processors), False, seed).noise(6, 5, VOCAB, CPU)
    generator = torch.Generator().manual_seed(abs(seed) % 2**32)
    logits_BD, ids_D = 2 * torch.randn(3, VOCAB, generator=generator), torch.tensor(order)
    found_BD = noise.foreseen(logits_BD, ids_D, depth)
    temperature = 0.6 if "temperature" in names else 1.0
    truncating = any(name in names for name in ("top_k", "top_p", "min_p"))
    warpers = LogitsProcessorList([one for one, name in zip(processors, names, strict=True) if name != "suppress"])
    for row, logits_D in enumerate(logits_BD):
        kept_D = warpers(ids_D[None], logits_D[None])[0] if truncating else logits_D
        for place, token in enumerate(order):
            expected = float(logits_D[place]) / temperature + plain_gumbel(seed, 6 + depth - 1, token)
            expected -= LEFT_OUT * (float(kept_D[place]) == -math.inf)
            assert float(found_BD[row, place]) == pytest.approx(expected, abs=2e-3)


class Answering(LogitsProcessor):
    """Makes this of scores, and notes how long each text was."""

    def __init__(self, answer):
        self.answer, self.lengths = answer, []

    def __call__(self, input_ids, scores):
        self.lengths.append(input_ids.shape[1])
        return self.answer(scores)


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (lambda scores: scores[:, :-1], r"made \[4, 4\] of scores of \[4, 5\]: return one for every token"),
        (lambda scores: scores.tolist(), r"made list of scores of \[4, 5\]: return one for every token"),
    ],
)
def test_a_processor_that_does_not_score_every_token_is_named(answer, message):
    sampler = Sampler(LogitsProcessorList([Answering(answer)]), True, 0)
    with pytest.raises(GraftError, match=message):
        sampler.draw(random_tree(0, 4), torch.zeros(4, VOCAB), None, 3, None, False)


@pytest.mark.parametrize("temperature", [0, 0.6])
def test_draws_make_no_tensor_on_another_device(temperature):
    """Shown on the device without memory, which refuses what lies on the CPU, as a GPU does."""
    tree, device = random_tree(0, 4), torch.device("meta")
    moved = DraftTree(*(getattr(tree, column.name).to(device) for column in fields(tree)))
    sampler = Sampler.of(temperature, 1)
    noise = sampler.noise(0, 5, VOCAB, device)
    tokens_N, logp_N = sampler.draw(moved, torch.zeros(4, VOCAB, device=device), noise, 4, None, True)
    assert tokens_N.is_meta
    assert logp_N.is_meta
    assert noise is None or Noise(noise.gumbel_PV, 0.6).told(logp_N[:, None], tokens_N[:1], 2).is_meta
