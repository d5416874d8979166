"""Sampling: token for token a plain loop's with the same noise, and as a distribution exact."""

import math
from collections import Counter
from itertools import product

import pytest
import torch
from scipy.stats import chi2, kstest
from transformers import (
    EncoderNoRepeatNGramLogitsProcessor,
    LogitsProcessor,
    LogitsProcessorList,
    MinNewTokensLengthLogitsProcessor,
    MinPLogitsWarper,
    NoRepeatNGramLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    SuppressTokensLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)
from transformers.generation import EosTokenCriteria

from graft_inference import METHODS, GenerationStats, GraftError, Policy, QuotaCheckpoint, QuotaPlan, noise
from graft_inference.decode.sampling import Sampler
from graft_inference.noise import LEFT_OUT, Noise, gumbel
from graft_inference.policy import tree_builder as grafting
from graft_inference.tree import root_tree
from graft_inference.verification import accept

from .test_engine import SMALL, prompt, small_engine
from .tiny import TEMPLATE, learned_policy, prefilled, told_policy

CPU = torch.device("cpu")


class Alternating(LogitsProcessor):
    """Counts its own calls, and wants every prefix once and in order: even tokens, then odd ones, in turn."""

    def __init__(self):
        self.lengths = []

    def __call__(self, input_ids, scores):
        self.lengths.append(input_ids.shape[1])
        return scores.masked_fill(torch.arange(scores.shape[1]) % 2 != len(self.lengths) % 2, float("-inf"))


class Counting(Alternating):
    """Counts alone."""

    def __call__(self, input_ids, scores):
        self.lengths.append(input_ids.shape[1])
        return scores


def plain_sampling(model, input_ids, count, processors, seed, greedy=False):
    """One token at a time with the model's own attention: tokens, and their log-probabilities."""
    implementation = model.config._attn_implementation
    model.set_attn_implementation("sdpa")
    ids, logprobs = input_ids, []
    for place in range(count):
        scores = processors(ids, model(ids).logits[:, -1].float())
        noise = 0 if greedy else gumbel(seed, place, 1, scores.shape[-1], CPU)
        token = (scores + noise).argmax(dim=-1)
        logprobs.append(scores.log_softmax(-1)[0, token])
        ids = torch.cat((ids, token[None]), dim=1)
    model.set_attn_implementation(implementation)
    return ids.tolist(), torch.cat(logprobs)


SETTINGS = {
    "temperature": ({"temperature": 0.7}, lambda length: [TemperatureLogitsWarper(0.7)]),
    "top_k": ({"temperature": 1.0, "top_k": 3}, lambda length: [TopKLogitsWarper(3)]),
    "top_p": (
        {"temperature": 2.0, "top_p": 0.8},
        lambda length: [TemperatureLogitsWarper(2.0), TopPLogitsWarper(0.8)],
    ),
    "min_p": (
        {"temperature": 1.5, "min_p": 0.2},
        lambda length: [TemperatureLogitsWarper(1.5), MinPLogitsWarper(0.2)],
    ),
    "penalty": (
        {"temperature": 1.0, "repetition_penalty": 1.3, "top_k": 6},
        lambda length: [RepetitionPenaltyLogitsProcessor(1.3), TopKLogitsWarper(6)],
    ),
    "no-repeat": (
        {"temperature": 1.0, "logits_processor": [NoRepeatNGramLogitsProcessor(3)]},
        lambda length: [NoRepeatNGramLogitsProcessor(3)],
    ),
    "encoder": (
        {"temperature": 1.0, "logits_processor": [EncoderNoRepeatNGramLogitsProcessor(2, prompt(5, 0, SMALL))]},
        lambda length: [EncoderNoRepeatNGramLogitsProcessor(2, prompt(5, 0, SMALL))],
    ),
    "minimum": (
        {"temperature": 1.0, "min_new_tokens": 16},
        lambda length: [MinNewTokensLengthLogitsProcessor(length, 16, [2])],
    ),
    "greedy-penalty": (
        {"repetition_penalty": 1.5, "top_k": 2},
        lambda length: [RepetitionPenaltyLogitsProcessor(1.5)],
    ),
}


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("policy", [None, told_policy])
def test_a_seed_gives_the_text_of_plain_sampling_whatever_the_method(policy, setting):
    options, processors = SETTINGS[setting]
    engine = small_engine(policy=policy and policy(0.5))
    engine.eos_token_ids = frozenset({2} if setting == "minimum" else ())
    input_ids = prompt(5, 0, SMALL)
    expected, logprobs = plain_sampling(
        engine.target.model, input_ids, 16, LogitsProcessorList(processors(5)), 1, "temperature" not in options
    )
    for method in METHODS:
        out = engine.generate(input_ids, 16, method=method, seed=1, return_logprobs=True, **options)
        assert out.sequences.tolist() == expected, method
        torch.testing.assert_close(out.logprobs, logprobs, atol=2e-3, rtol=1e-3)


@pytest.mark.parametrize("policy", [learned_policy, told_policy])
def test_a_learned_plan_gives_the_text_of_plain_sampling_too(policy):
    """Draws belong to places, not to trees: whatever competes, and however wide, no choice can bend the text.

    Not even one that knows the noise of the draws.
    """
    engine = small_engine(policy=policy(0.5, gate=3.0))
    rounds, tokens, checkpoints = 0, 0, Counter()
    for seed in range(12):
        input_ids = prompt(5, seed, SMALL)
        expected, _ = plain_sampling(
            engine.target.model, input_ids, 24, LogitsProcessorList([TemperatureLogitsWarper(0.3)]), seed
        )
        out = engine.generate(input_ids, 24, 0.3, seed=seed)
        assert out.sequences.tolist() == expected
        rounds, tokens, checkpoints = rounds + out.stats.rounds, tokens + 24, checkpoints + out.stats.checkpoints
    assert rounds < 0.8 * tokens
    assert len(checkpoints) >= 3


def test_who_knows_the_noise_and_the_targets_scores_foresees_every_draw():
    logits_NV = torch.randn(4, 30, generator=torch.Generator().manual_seed(0))
    sampler = Sampler(LogitsProcessorList([TemperatureLogitsWarper(0.7)]), False, 5)
    for place in (0, 3, 40):
        noise = sampler.noise(place, 4, 30, CPU)
        assert noise.temperature == 0.7
        for depth in range(4):
            row = root_tree(torch.tensor([1]))
            row.depths_N = torch.tensor([depth])
            drawn, _ = sampler.draw(row, logits_NV[depth : depth + 1], noise, 3, None, False)
            ids = torch.randperm(30)  # a draft vocabulary in its own order
            told = noise.told(logits_NV[depth : depth + 1, ids], ids, depth + 1)
            assert ids[told.argmax()] == drawn[0]
            probs = (logits_NV[depth : depth + 1]).softmax(-1)
            best, logp = noise.ranked(torch.arange(30)[None], probs, depth + 1, 5)
            assert best[0, 0] == drawn[0]
            assert (logp.diff() <= 0).all()


def test_a_head_puts_last_what_the_settings_leave_out():
    """At temperature 2 the nucleus of 0.8 has three tokens, and at 1 it would have two."""
    ways = [TemperatureLogitsWarper(2.0), TopPLogitsWarper(0.8), SuppressTokensLogitsProcessor([0], device="cpu")]
    noise = Sampler(LogitsProcessorList(ways), False, 5).noise(3, 4, 9, CPU)
    logits, ids = torch.tensor([[3.0, 2.0, 1.0, -1.0]]), torch.tensor([7, 0, 4, 2])
    assert logits.softmax(-1).cumsum(-1)[0, 1] > 0.8
    expected = logits[0] / 2 + noise.gumbel_PV[1, ids] - torch.tensor([0.0, 0.0, 0.0, LEFT_OUT])
    torch.testing.assert_close(noise.foreseen(logits, ids, 2)[0], expected)


def test_nothing_is_left_out_by_a_temperature():
    ways = [TemperatureLogitsWarper(0.7), SuppressTokensLogitsProcessor([0], device="cpu")]
    noise = Sampler(LogitsProcessorList(ways), False, 5).noise(0, 2, 9, CPU)
    logits, ids = torch.tensor([[9.0, -9.0]]), torch.tensor([3, 8])
    torch.testing.assert_close(noise.foreseen(logits, ids, 1)[0], logits[0] / 0.7 + noise.gumbel_PV[0, ids])


def test_ranked_successors_leave_out_what_is_none_and_know_of_the_rest():
    noise = Noise(torch.tensor([[0.0] * 6, [0.0, 9.0, 0.0, 0.0, 5.0, 0.0]]), 0.5)
    ids, probs = torch.tensor([[3, 4, -1, 1]]), torch.tensor([[0.5, 0.25, 0.9, 0.05]])
    best, logp = noise.ranked(ids, probs, 1, 4)
    assert best.tolist() == [[3, 4, 1, -1]]
    rest = 0.2 * math.exp(0.5772156649)  # as the mean of noise has it
    weights = torch.tensor([[0.25, 0.0625, 0.0025, 0.0]])
    torch.testing.assert_close(logp.exp(), weights / (weights.sum() + rest))
    best, _ = noise.ranked(ids, probs, 2, 2)
    assert best.tolist() == [[1, 4]]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_processor_with_state_sees_every_prefix_once_and_in_order(temperature):
    engine = small_engine()
    input_ids = prompt(5, 0, SMALL)
    expected, _ = plain_sampling(
        engine.target.model, input_ids, 16, LogitsProcessorList([Alternating()]), 3, greedy=not temperature
    )
    for method in METHODS:
        ours = Alternating()
        out = engine.generate(input_ids, 16, temperature, method, seed=3, logits_processor=[ours])
        assert out.sequences.tolist() == expected, method
        assert ours.lengths == list(range(5, 21))
        assert out.logprobs is None


@pytest.mark.parametrize("criterion", [False, True])
def test_no_processor_is_asked_for_what_comes_behind_the_end(criterion):
    """A grammar has nothing to say there. The end is a token, or so many of them."""
    engine = small_engine()
    input_ids = prompt(5, 0, SMALL)
    whole = engine.generate(input_ids, 24).sequences[0].tolist()
    for end in {*whole[8:20]}:
        engine.eos_token_ids = frozenset(() if criterion else (end,))
        options = {"stopping_criteria": [EosTokenCriteria(end)]} if criterion else {}
        for method in METHODS:
            asked = Counting()
            out = engine.generate(input_ids, 20, method=method, logits_processor=[asked], **options)
            assert out.sequences[0].tolist() == whole[: min(whole.index(end, 5) + 1, 25)]
            assert asked.lengths == list(range(5, out.sequences.shape[1]))


def test_the_text_does_not_depend_on_where_rounds_end():
    """A place of the output keeps its noise, however many of its tokens came in one round."""
    engine = small_engine()
    runs = []
    for drafted in (1, 3, 9):
        plan = QuotaPlan((QuotaCheckpoint(3, drafted=drafted),), topk=3)
        runs.append(engine.generate(prompt(5, 0, SMALL), 40, temperature=1.0, seed=4, plan=plan))
    assert len({str(run.sequences.tolist()) for run in runs}) == 1
    assert len({run.stats.rounds for run in runs}) > 1


def test_noise_is_gumbel_and_independent_over_places_tokens_and_seeds():
    noise = torch.stack([gumbel(seed, 0, 40, 50, CPU) for seed in range(40)]).double()
    assert kstest(noise.flatten().numpy(), "gumbel_r").pvalue > 1e-3
    for axis in range(3):
        rows = noise.movedim(axis, 0).flatten(1)
        correlations = torch.corrcoef(rows)[torch.triu_indices(len(rows), len(rows), 1).unbind()]
        assert correlations.abs().max() < 5 / rows.shape[1] ** 0.5
    # Large vocabularies: neighbouring rows are no shifted copies of each other.
    wide = gumbel(1, 0, 2, 5000, CPU).double()
    spectrum = torch.fft.ifft(torch.fft.fft(wide[0]) * torch.fft.fft(wide[1]).conj()).real
    spread = wide.std(dim=1).prod() * 5000**0.5
    assert ((spectrum - wide.mean(dim=1).prod() * 5000).abs() < 6 * spread).all()


def test_noise_is_finite_for_the_greatest_number_too(monkeypatch):
    for bits in (-1, 2**63 - 1, -(2**63), 0):
        monkeypatch.setattr(noise, "_mix", lambda values, bits=bits: torch.full_like(values, bits))
        assert gumbel(0, 0, 1, 3, CPU).isfinite().all()


def test_noise_is_a_function_of_seed_and_place_alone():
    whole = gumbel(2**63 + 5, 0, 9, 11, CPU)
    assert torch.equal(whole[4:7], gumbel(2**63 + 5, 4, 3, 11, CPU))
    assert torch.equal(whole[:, :7], gumbel(2**63 + 5, 0, 9, 7, CPU))
    assert not torch.equal(whole, gumbel(2**63 + 6, 0, 9, 11, CPU))
    assert not torch.equal(gumbel(-1, 0, 9, 11, CPU), gumbel(1, 0, 9, 11, CPU))


# The law of the first three tokens, 20,000 samples of it. Rounds are the engine's own; where many samples
# stand in the same state, one round serves them all, each with the draws that its own noise gives it.

SAMPLES, VOCAB_OF_LAW, PLACES = 20_000, 6, 8


@pytest.fixture(scope="module")
def noise_SPV():
    # Places as far apart as samples are many stand in for seeds: one call instead of 20,000.
    return gumbel(7, 0, SAMPLES * PLACES, VOCAB_OF_LAW, CPU).view(SAMPLES, PLACES, VOCAB_OF_LAW)


class Replay(Sampler):
    """Repeats recorded draws, then notes what the next draw is asked for."""

    def __init__(self, processors, recorded):
        super().__init__(processors, greedy=False, seed=0)
        self.recorded = list(recorded)
        self.asked = None

    def noise(self, place, places, vocab_size, device):
        self.place = place
        return super().noise(place, places, vocab_size, device)

    def draw(self, tree, logits_NV, noise, max_depth, history_S, logprobs):
        if self.recorded:
            return self.recorded.pop(0), None
        self.asked = (tree, logits_NV, self.place, max_depth)
        return logits_NV.argmax(dim=-1), None


def first_three_tokens(engine, input_ids, method, processors, noise_SPV, monkeypatch):
    """Counts of the first three tokens over all samples, and the checkpoints that were visited."""
    counts, checkpoints = Counter(), Counter()
    waiting = [((), (), torch.arange(len(noise_SPV)))]
    while waiting:
        recorded, emitted, samples_S = waiting.pop()
        sampler, stats = Replay(processors, recorded), GenerationStats()
        with torch.inference_mode():
            state, _ = prefilled(engine, input_ids[0], 12, sampler, engine.policy.plan(method), stats)
            for _ in recorded:
                engine._round([state])
        checkpoints[str(dict(stats.checkpoints))] += len(samples_S)
        tree, logits_NV, place, max_depth = sampler.asked
        assert place == len(emitted)
        ancestors_NN = tree.ancestors(max_depth)

        def one(noise_PV, tree=tree, logits_NV=logits_NV, place=place, max_depth=max_depth, ancestors=ancestors_NN):
            noise = Noise(noise_PV[place : place + max_depth + 1], 1.0)
            drawn_N, _ = Sampler(processors, False, 0).draw(tree, logits_NV, noise, max_depth, None, False)
            result = accept(tree, ancestors, drawn_N, max_depth)
            return drawn_N, result.count, result.emitted_D

        drawn_SN, count_S, emitted_SD = torch.vmap(one)(noise_SPV[samples_S])
        keys = torch.cat((count_S[:, None], emitted_SD), dim=1)
        keys[:, 1:][torch.arange(keys.shape[1] - 1) >= count_S[:, None]] = -1
        outcomes, which_S = keys.unique(dim=0, return_inverse=True)
        for index, outcome in enumerate(outcomes.tolist()):
            here_S = (which_S == index).nonzero()[:, 0]
            tokens = (*emitted, *outcome[1 : 1 + outcome[0]])
            if len(tokens) >= 3:
                counts[tokens[:3]] += len(here_S)
            else:
                waiting.append(((*recorded, drawn_SN[here_S[0]]), tokens, samples_S[here_S]))
    monkeypatch.undo()
    return counts, checkpoints


def exact_law(model, input_ids, processors):
    """P(a, b, c) of every triple, from plain forward passes."""
    vocab_size = model.config.vocab_size
    implementation = model.config._attn_implementation
    model.set_attn_implementation("sdpa")
    law = {(): 1.0}
    for _ in range(3):
        prefixes = list(law)
        ids = torch.tensor([[*input_ids[0].tolist(), *prefix] for prefix in prefixes])
        probs = processors(ids, model(ids).logits[:, -1].float()).double().softmax(dim=-1).tolist()
        law = {
            (*prefix, token): law[prefix] * row[token]
            for prefix, row in zip(prefixes, probs, strict=True)
            for token in range(vocab_size)
            if row[token]
        }
    model.set_attn_implementation(implementation)
    return law


def check_law(counts, law):
    """Chi-square (rare outcomes share a cell), and total variation against what sampling alone makes of it."""
    assert counts.keys() <= law.keys()
    samples = counts.total()
    observed, expected = [0], [0.0]
    for outcome in sorted(law, key=law.__getitem__):
        if expected[-1] >= 5:
            observed.append(0)
            expected.append(0.0)
        observed[-1] += counts[outcome]
        expected[-1] += law[outcome] * samples
    assert len(expected) >= 10
    statistic = sum((o - e) ** 2 / max(e, 1e-9) for o, e in zip(observed, expected, strict=True))
    assert chi2.sf(statistic, len(expected) - 1) > 1e-3
    variation = sum(abs(counts[outcome] / samples - p) for outcome, p in law.items()) / 2
    noise = sum((p * (1 - p) / samples) ** 0.5 for p in law.values()) * (2 / torch.pi) ** 0.5 / 2
    assert variation < 1.4 * noise


PRUNED = Policy(
    graft=QuotaPlan(
        (
            QuotaCheckpoint(1, 0.45, drafted=3, retrieved=6, template=TEMPLATE),
            QuotaCheckpoint(2, 0.4, drafted=5, retrieved=4, template=TEMPLATE),
            QuotaCheckpoint(4, drafted=8, retrieved=2, template=TEMPLATE[:4]),
        ),
        topk=3,
    ),
    eagle3=QuotaPlan((QuotaCheckpoint(3, drafted=9),), topk=3),
    retrieve=QuotaPlan((QuotaCheckpoint(0, retrieved=8, template=TEMPLATE),)),
)
LAWS = [
    *product(METHODS, ["plain"]),
    ("graft", "top_k"),
    ("graft", "top_p"),
    ("graft", "min_p"),
    ("retrieve", "temperature"),
]


@pytest.mark.parametrize(("method", "setting"), LAWS)
def test_the_joint_law_of_three_tokens_is_the_targets(method, setting, noise_SPV, monkeypatch):
    engine = small_engine(policy=PRUNED, vocab_size=VOCAB_OF_LAW)
    processors = LogitsProcessorList(SETTINGS[setting][1](4) if setting != "plain" else [])
    twins = []
    merge = grafting.merge

    def merged(drafted, retrieved, rows):
        twins.append(len(set(drafted.paths_N.tolist()) & set(retrieved.paths_N.tolist())) - 1)
        return merge(drafted, retrieved, rows)

    input_ids = prompt(4, 1, VOCAB_OF_LAW)
    law = exact_law(engine.target.model, input_ids, processors)
    assert sum(law.values()) == pytest.approx(1)
    with monkeypatch.context() as patch:
        patch.setattr(grafting, "merge", merged)
        counts, checkpoints = first_three_tokens(engine, input_ids, method, processors, noise_SPV, patch)
    assert counts.total() == SAMPLES
    check_law(counts, law)
    if (method, setting) == ("graft", "plain"):
        assert sum(twins) > len(twins) / 2  # drafted and retrieved nodes overlap
        visited = set("".join(checkpoints).replace("'", " ").split())
        assert {"d0", "d1", "d3"} <= visited


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"top_k": -1}, "top_k"),
        ({"top_p": -0.1}, "top_p"),
        ({"min_p": 1.5}, "min_p"),
        ({"repetition_penalty": 0.0}, "penalty"),
        ({"temperature": -0.5}, "temperature=-0.5"),
    ],
)
def test_settings_out_of_range_are_named(options, message):
    with pytest.raises(GraftError, match=message):
        small_engine().generate(prompt(4, 0, SMALL), 4, **({"temperature": 1.0} | options))
