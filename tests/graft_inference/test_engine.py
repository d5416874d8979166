"""Losslessness: whatever is proposed, the target's own output comes out; and drafting costs what it should."""

from collections import Counter
from copy import copy
from dataclasses import replace
from itertools import product

import pytest
import torch
from scipy.stats import chi2
from transformers import LogitsProcessorList

from graft_inference import METHODS, GenerationStats, GraftError, Policy, QuotaCheckpoint, QuotaPlan
from graft_inference.decode.round import commit, judge
from graft_inference.decode.sampling import Sampler
from graft_inference.engine import GraftEngine
from graft_inference.retrieval.prompt_lookup import PromptLookup
from graft_inference.retrieval.successor_matrix import SuccessorMatrix
from graft_inference.tree import Source

from .tiny import (
    VOCAB,
    learned_plan,
    learned_policy,
    prefilled,
    tiny_engine,
    tiny_head,
    tiny_model,
    tiny_policy,
    without_lookup,
)

SMALL = 8
GREEDY = Sampler(LogitsProcessorList(), greedy=True, seed=0)
FAMILIES = ("llama", "qwen3")
SEEDS = {"llama": 9, "qwen3": 11}  # these models' greedy text does not soon repeat one token


def prompt(length: int, seed: int = 0, vocab_size: int = VOCAB) -> torch.Tensor:
    return torch.randint(0, vocab_size, (1, length), generator=torch.Generator().manual_seed(seed))


def greedy_reference(model, input_ids, max_new_tokens):
    """What transformers' own loop and attention make of it."""
    implementation = model.config._attn_implementation
    model.set_attn_implementation("sdpa")
    out = model.generate(input_ids, max_new_tokens=max_new_tokens, do_sample=False)
    model.set_attn_implementation(implementation)
    return out


def small_engine(family: str = "llama", policy: Policy | None = None, vocab_size: int = SMALL) -> GraftEngine:
    """So few tokens that proposals are often right by chance: a wrong commit or mask cannot hide."""
    model = tiny_model(family, SEEDS[family], vocab_size=vocab_size)
    return tiny_engine(model, policy or tiny_policy(0.5), tiny_head(model, draft_vocab_size=vocab_size - 1))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("length", [1, 2, 17])
def test_greedy_output_equals_generate(model, method, length):
    engine = tiny_engine(model)
    input_ids = prompt(length, seed=length)
    expected = greedy_reference(model, input_ids, 40)
    out = engine.generate(input_ids, max_new_tokens=40, method=method)
    assert out.sequences.tolist() == expected.tolist()
    assert out.stats.emitted == 40


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("threshold", [0.0, 0.3, 0.5, 1.0])
def test_greedy_output_equals_generate_where_proposals_are_often_right(family, threshold):
    engine = small_engine(family, tiny_policy(threshold))
    checkpoints: Counter[str] = Counter()
    rounds = 0
    for seed in range(4):
        input_ids = prompt(3 + seed, seed, SMALL)
        expected = greedy_reference(engine.target.model, input_ids, 60)
        for method in METHODS:
            out = engine.generate(input_ids, max_new_tokens=60, method=method)
            assert out.sequences.tolist() == expected.tolist(), method
            if method == "graft":
                checkpoints += out.stats.checkpoints
                rounds += out.stats.rounds
    assert 4 * 59 / rounds > 1.2
    visited = {0.0: {"d3"}, 0.3: {"d1", "d3"}, 0.5: {"d0", "d1", "d3"}, 1.0: {"d0"}}
    assert visited[threshold] <= set(checkpoints)


def three_token_law(model, input_ids: torch.Tensor) -> dict[tuple[int, ...], float]:
    """P(a, b, c) for every triple of tokens, from plain forward passes."""
    vocab_size = model.config.vocab_size
    pairs = torch.tensor(list(product(range(vocab_size), repeat=2)))
    rows = torch.cat((input_ids.expand(len(pairs), -1), pairs), dim=1)
    implementation = model.config._attn_implementation
    model.set_attn_implementation("sdpa")
    probs = model(rows).logits[:, -3:].double().softmax(dim=-1)
    model.set_attn_implementation(implementation)
    first, second = probs[0, 0], probs[torch.arange(len(pairs)), 1]
    both = first[pairs[:, 0]] * second[torch.arange(len(pairs)), pairs[:, 1]]
    triples = (both[:, None] * probs[:, 2]).flatten().tolist()
    return dict(zip(product(range(vocab_size), repeat=3), triples, strict=True))


def chi_square_p(counts: Counter, law: dict, samples: int) -> float:
    """Goodness of fit; the rarest outcomes share a cell until it expects at least five."""
    observed, expected = [0], [0.0]
    for outcome in sorted(law, key=law.__getitem__):
        if expected[-1] >= 5:
            observed.append(0)
            expected.append(0.0)
        observed[-1] += counts[outcome]
        expected[-1] += law[outcome] * samples
    if expected[-1] < 5:
        observed[-2:], expected[-2:] = [sum(observed[-2:])], [sum(expected[-2:])]
    assert len(expected) >= 10
    statistic = sum((o - e) ** 2 / e for o, e in zip(observed, expected, strict=True))
    return float(chi2.sf(statistic, len(expected) - 1))


def sampled(engine, input_ids, samples, method="graft"):
    """Counts of the first three tokens, rounds by checkpoint, and all rounds."""
    counts: Counter[tuple[int, ...]] = Counter()
    checkpoints: Counter[str] = Counter()
    rounds = 0
    for seed in range(samples):
        out = engine.generate(input_ids, max_new_tokens=3, temperature=1.0, method=method, seed=seed)
        counts[tuple(out.sequences[0, input_ids.shape[1] :].tolist())] += 1
        checkpoints += out.stats.checkpoints
        rounds += out.stats.rounds
    return counts, checkpoints, rounds


@pytest.mark.parametrize("method", METHODS)
def test_sampled_output_follows_the_targets_own_law(method):
    engine = small_engine(vocab_size=6)
    input_ids = prompt(4, 1, 6)
    samples = 800
    counts, _, rounds = sampled(engine, input_ids, samples, method)
    law = three_token_law(engine.target.model, input_ids)
    assert sum(law.values()) == pytest.approx(1)
    assert chi_square_p(counts, law, samples) > 1e-3
    if method != "autoregressive":
        assert rounds < 1.8 * samples  # or acceptance would be left untested


def test_samples_of_a_learned_plan_follow_the_targets_own_law():
    """Every choice a plan can make is made: to draft at all, to go on, how wide, and which nodes."""
    engine = small_engine(policy=learned_policy(0.5, gate=2.57), vocab_size=6)
    input_ids = prompt(4, 1, 6)
    samples = 800
    counts, checkpoints, rounds = sampled(engine, input_ids, samples)
    assert chi_square_p(counts, three_token_law(engine.target.model, input_ids), samples) > 1e-3
    assert rounds < 1.8 * samples
    assert len(checkpoints) >= 3


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("threshold", [0.0, 0.3, 1.0])
def test_greedy_output_of_a_learned_plan_equals_generate(family, threshold):
    engine = small_engine(family, replace(tiny_policy(), graft=learned_plan(threshold)))
    checkpoints: Counter[str] = Counter()
    for seed in range(4):
        input_ids = prompt(3 + seed, seed, SMALL)
        expected = greedy_reference(engine.target.model, input_ids, 60)
        for method in ("graft", "eagle3"):
            out = engine.generate(input_ids, max_new_tokens=60, method=method)
            assert out.sequences.tolist() == expected.tolist(), method
            checkpoints += out.stats.checkpoints if method == "graft" else Counter()
    assert "none" in checkpoints, "some rounds left drafting out, and the head caught up afterwards"
    assert len(checkpoints) >= 2


def told(monkeypatch) -> list[list[int]]:
    """The text each source is told, source by source."""
    texts: dict[int, list[int]] = {}
    sources = []
    extend = PromptLookup.extend

    def kept(source, tokens_A, count_1=None):
        sources.append(source)  # or its id would be given again
        texts.setdefault(id(source), []).extend(tokens_A.tolist())
        extend(source, tokens_A, count_1)

    monkeypatch.setattr(PromptLookup, "extend", kept)
    return texts.values()  # type: ignore[return-value]


@pytest.mark.parametrize("keep_prefix", [False, True])
def test_a_lookup_is_told_the_requests_own_text(monkeypatch, keep_prefix):
    engine = small_engine(policy=learned_policy())
    engine.keep_prefix = keep_prefix
    texts = told(monkeypatch)
    first = engine.generate(prompt(5, 0, SMALL), 30).sequences
    second = engine.generate(torch.cat((first[:, :-1], prompt(3, 1, SMALL)), dim=1), 30)
    assert (second.stats.reused > 0) == keep_prefix
    for text, sequence in zip(texts, (first[0], second.sequences[0]), strict=True):
        # The last round may have gone past the end of the request.
        assert text[: len(sequence)] == sequence.tolist()[: len(text)]
        assert len(text) >= len(sequence)


@pytest.mark.parametrize("method", METHODS)
def test_the_seed_decides_what_is_sampled(method):
    engine = small_engine()
    input_ids = prompt(5, 0, SMALL)
    runs = [
        engine.generate(input_ids, 40, temperature=1.0, method=method, seed=seed).sequences.tolist()
        for seed in (7, 7, 8)
    ]
    assert runs[0] == runs[1]
    assert runs[0] != runs[2]


def test_without_a_seed_every_call_samples_anew():
    engine = small_engine()
    input_ids = prompt(5, 0, SMALL)
    first, second = (engine.generate(input_ids, 40, temperature=1.0).sequences.tolist() for _ in range(2))
    assert first != second


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_stream_yields_what_generate_returns(method, temperature):
    engine = small_engine()
    input_ids = prompt(5, 0, SMALL)
    expected = engine.generate(input_ids, 30, temperature=temperature, method=method, seed=3)
    stats = GenerationStats()
    streamed = []
    for token in engine.stream(input_ids[0], 30, temperature=temperature, method=method, seed=3, stats=stats):
        assert not torch.is_inference_mode_enabled()
        streamed.append(token)
        assert stats.emitted == len(streamed)
    assert streamed == expected.sequences[0, 5:].tolist()
    assert (stats.rounds, stats.accepted, stats.checkpoints) == (
        expected.stats.rounds,
        expected.stats.accepted,
        expected.stats.checkpoints,
    )


@pytest.mark.parametrize("method", METHODS)
def test_nothing_after_the_end_of_sequence_is_emitted_or_counted(method):
    engine = small_engine()
    input_ids = prompt(4, 2, SMALL)
    full = engine.generate(input_ids, 60, method=method).sequences[0, 4:].tolist()
    committed = count_committed(engine)
    overshot = False
    for eos in sorted(set(full)):
        engine.eos_token_ids = frozenset({eos})
        committed.clear()
        out = engine.generate(input_ids, 60, method=method)
        expected = full[: full.index(eos) + 1]
        assert out.sequences[0, 4:].tolist() == expected
        assert list(engine.stream(input_ids, 60, method=method)) == expected
        assert out.stats.emitted == len(expected)
        assert sum(out.stats.accepted.values()) == len(expected) - 1
        assert sum(out.stats.checkpoints.values()) == out.stats.rounds
        overshot |= sum(committed[: out.stats.rounds]) > len(expected) - 1
    if method != "autoregressive":
        assert overshot  # some round went past the end, and it did not show


def count_committed(engine: GraftEngine) -> list[int]:
    """Tokens that each round found, before the end of the sequence cuts them."""
    counts: list[int] = []
    inner = engine._round

    def counted(states):
        emitted = inner(states)
        counts.extend(len(tokens) for tokens, _ in emitted)
        return emitted

    engine._round = counted
    return counts


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_max_new_tokens_is_exact(method, temperature):
    engine = small_engine()
    input_ids = prompt(4, 2, SMALL)
    full = engine.generate(input_ids, 12, temperature=temperature, method=method, seed=0).sequences
    for count in range(1, 12):
        out = engine.generate(input_ids, count, temperature=temperature, method=method, seed=0)
        assert out.sequences.tolist() == full[:, : 4 + count].tolist()
        assert out.stats.emitted == count
        assert sum(out.stats.accepted.values()) == count - 1


def test_generation_may_fill_the_last_position():
    engine = small_engine()
    limit = engine.target.max_positions
    input_ids = prompt(limit - 20, 0, SMALL)
    expected = greedy_reference(engine.target.model, input_ids, 20).tolist()
    for method in METHODS:
        assert engine.generate(input_ids, 20, method=method).sequences.tolist() == expected


def drafted_alone(builder):
    """The same builder, but that the rows of retrieved nodes stay empty."""
    alone = copy(builder)

    def build(*arguments):
        tree = builder.build(*arguments)
        return replace(tree, sources_N=tree.sources_N.masked_fill(tree.sources_N > Source.DRAFTED, Source.EMPTY))

    alone.build = build
    return alone


@pytest.mark.parametrize("policy", [tiny_policy(0.5), learned_policy(0.5)], ids=["quotas", "learned"])
@pytest.mark.parametrize("family", FAMILIES)
def test_at_the_same_prefix_retrieval_only_adds_accepted_tokens(family, policy):
    """Warm matrix and all: both read the same tokens, only one may fill its retrieved rows."""
    engine = small_engine(family, policy)
    more = 0
    for seed in range(3):
        full = engine.generate(prompt(6, seed, SMALL), 40).sequences[0]
        for end in range(6, 45):
            tokens = {}
            checkpoints = {}
            for method in ("graft", "drafted"):
                stats = GenerationStats()
                with torch.inference_mode():
                    state, first = prefilled(engine, full[:end], 20, GREEDY, engine.policy.graft, stats)
                    if method == "drafted":
                        state.speculation.builder = drafted_alone(state.speculation.builder)
                    ((tokens[method], _),) = engine._round([state])
                assert first == int(full[end])
                checkpoints[method] = stats.checkpoints
            assert checkpoints["graft"] == checkpoints["drafted"]
            shared = len(tokens["drafted"])
            assert tokens["graft"][:shared] == tokens["drafted"]
            more += len(tokens["graft"]) - shared
    assert more > 10


@pytest.mark.parametrize("family", FAMILIES)
def test_every_round_drafts_what_a_fresh_read_of_the_same_text_would(monkeypatch, family):
    """The head got the right states and tokens of the accepted branch, at the right positions."""
    engine = small_engine(family)
    draft = engine.speculator.draft
    drafted, stats = [], GenerationStats()

    def kept(requests):
        ((checkpoint, tree),) = draft(requests)
        drafted.append((stats.emitted, tree))
        return [(checkpoint, tree)]

    monkeypatch.setattr(engine.speculator, "draft", kept)
    new = list(engine.stream(prompt(5, 1, SMALL), 40, method="eagle3", stats=stats))
    full = torch.cat((prompt(5, 1, SMALL)[0], torch.tensor(new)))
    monkeypatch.undo()
    assert len(drafted) < 35  # of 39, had no branch been kept
    for emitted, tree in drafted:
        with torch.inference_mode():
            before_root = full[: 5 + emitted - 1]
            state, _ = prefilled(engine, before_root, 20, GREEDY, engine.policy.eagle3)
            ((_, fresh),) = engine.speculator.draft([state.speculation])
        assert tree.tokens_N.tolist() == fresh.tokens_N.tolist()
        assert tree.parents_N.tolist() == fresh.parents_N.tolist()
        torch.testing.assert_close(tree.logp_N, fresh.logp_N, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("threshold", [0.0, 0.3, 1.0])
def test_no_verification_is_wider_than_its_checkpoint_or_the_plan(monkeypatch, method, threshold):
    engine = small_engine(policy=tiny_policy(threshold))
    plan = engine.policy.plan(method)
    widths: list[int] = []
    verify = engine.target.verify

    def counted(tree, ancestors_NN, cache):
        assert ancestors_NN.shape == (len(tree), len(tree))
        widths.append(len(tree))
        return verify(tree, ancestors_NN, cache)

    monkeypatch.setattr(engine.target, "verify", counted)
    out = engine.generate(prompt(5, 0, SMALL), 40, method=method)
    assert len(widths) == out.stats.rounds
    assert max(widths) <= plan.num_draft_tokens
    rows = {checkpoint.name: checkpoint.num_draft_tokens for checkpoint in plan.checkpoints}
    assert Counter(widths) == sum(
        (Counter({rows[name]: count}) for name, count in out.stats.checkpoints.items()), Counter()
    )


@pytest.mark.parametrize("method", ["graft", "eagle3"])
def test_a_round_that_stops_never_runs_the_later_draft_steps(method):
    engine = small_engine()
    passes = {checkpoint.name: checkpoint.steps for checkpoint in engine.policy.plan(method).checkpoints}
    calls = 0

    def count(*_):
        nonlocal calls
        calls += 1

    engine.head.midlayer.register_forward_hook(count)
    seen = set()
    stats = GenerationStats()
    before, checkpoints_before = 0, Counter()
    for _ in engine.stream(prompt(5, 0, SMALL), 60, method=method, stats=stats):
        for name in (stats.checkpoints - checkpoints_before).elements():
            assert calls - before == passes[name]
            seen.add(name)
            before = calls
        checkpoints_before = stats.checkpoints.copy()
    assert seen == set(passes)


@pytest.mark.parametrize("method", ["retrieve", "autoregressive"])
def test_methods_without_a_head_never_run_it(method):
    engine = small_engine()
    engine.head.midlayer.register_forward_hook(lambda *_: pytest.fail("the head ran"))
    assert engine.generate(prompt(5, 0, SMALL), 20, method=method).stats.checkpoints.keys() == {"none"}


@pytest.mark.parametrize("family", FAMILIES)
def test_a_head_that_was_left_out_catches_up(family):
    """After rounds without it, the head drafts what a fresh read of the same text would."""
    engine = small_engine(family, learned_policy(0.0))
    plan = without_lookup(engine.policy.graft)  # the text repeats itself, and would never draft again
    input_ids = prompt(5, 1, SMALL)
    with torch.inference_mode():
        state, _ = prefilled(engine, input_ids[0], 40, GREEDY, plan)
        text = [*input_ids[0].tolist(), int(state.speculation.root_1)]
        left_out = 0
        for _ in range(12):
            drafts = engine.speculator.draft([state.speculation])
            ((checkpoint, drafted),) = drafts
            if checkpoint.steps == 0:
                left_out += 1
            elif left_out:
                fresh_state, _ = prefilled(engine, torch.tensor(text[:-1]), 20, GREEDY, plan)
                fresh, head = fresh_state.speculation, engine.speculator.head
                (draft,) = head.begin([fresh.head], [fresh.fresh], [fresh.root_1], [None])
                while draft.steps < checkpoint.steps:
                    (draft,) = head.deepen([fresh.head], [draft])
                assert draft.candidates.tokens_N.tolist() == drafted.tokens_N.tolist()
                return
            ((_, tree),) = chosen = engine.speculator.build([state.speculation], drafts)
            depth = state.speculation.builder.depths[checkpoint.steps]
            ancestors_NN = tree.ancestors(depth)
            output = engine.target.verify(tree, ancestors_NN, state.cache)
            verified = judge(state, tree, output, ancestors_NN, depth)
            ((tokens, _),) = commit([state], chosen, [verified])
            text += tokens
    pytest.fail("no round drafted after one that did not")


def test_checkpoints_follow_the_heads_confidence():
    """A threshold that every confidence exceeds never stops; one that none exceeds always does."""
    for threshold, checkpoint in ((0.0, "d3"), (1.0, "d0")):
        engine = small_engine(policy=tiny_policy(threshold))
        stats = engine.generate(prompt(5, 0, SMALL), 30).stats
        assert stats.checkpoints == {checkpoint: stats.rounds}


@pytest.mark.parametrize("method", METHODS)
def test_requests_are_independent(method):
    engine = small_engine()
    matrix = engine.successors.ids_VK.clone()
    runs = []
    for _ in range(2):
        out = engine.generate(prompt(5, 0, SMALL), 40, method=method)
        runs.append((out.sequences.tolist(), out.stats.rounds, out.stats.accepted, out.stats.checkpoints))
        engine.generate(prompt(9, 1, SMALL), 40, method=method)
        next(engine.stream(prompt(9, 1, SMALL), 40, method=method))  # and one that is given up
    assert runs[0] == runs[1]
    assert torch.equal(engine.successors.ids_VK, matrix)


def test_two_streams_may_run_at_once():
    engine = small_engine()
    prompts = [prompt(5, 0, SMALL), prompt(8, 1, SMALL)]
    alone = [list(engine.stream(ids, 30)) for ids in prompts]
    together = list(zip(*(engine.stream(ids, 30) for ids in prompts), strict=True))
    assert [list(tokens) for tokens in zip(*together, strict=True)] == alone


def test_the_matrix_learns_within_a_request():
    """An empty matrix proposes nothing at first, yet retrieval comes to pay on repetitive text."""
    engine = small_engine()
    engine.successors = SuccessorMatrix.empty(SMALL, 4, engine.target.device)
    stats = engine.generate(prompt(6, 0, SMALL), 60, method="retrieve").stats
    assert stats.accepted["matrix"] > 0
    assert stats.accepted["drafted"] == 0


@pytest.mark.parametrize("method", METHODS)
def test_accepted_tokens_add_up(method):
    stats = small_engine().generate(prompt(5, 0, SMALL), 41, method=method).stats
    assert sum(stats.accepted.values()) == 40
    assert stats.rounds - 1 <= stats.accepted["bonus"] <= stats.rounds
    assert stats.acceptance_length == 40 / stats.rounds
    if method == "autoregressive":
        assert stats.rounds == 40


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"input_ids": torch.empty((1, 0), dtype=torch.long)}, "pass one non-empty prompt"),
        ({"input_ids": torch.empty(0, dtype=torch.long)}, "pass one non-empty prompt"),
        ({"input_ids": torch.zeros((1, 2, 3), dtype=torch.long)}, "pass one non-empty prompt"),
        ({"input_ids": torch.zeros(250, dtype=torch.long), "max_new_tokens": 7}, "limit of 256 positions: shorten"),
        ({"input_ids": torch.tensor([0, VOCAB])}, "outside the vocabulary of 61"),
        ({"input_ids": torch.tensor([0, -1])}, "outside the vocabulary of 61"),
        ({"method": "medusa"}, "unknown method 'medusa': choose one of graft, eagle3"),
        ({"max_new_tokens": 0}, "ask for at least 1"),
        ({"temperature": -0.5}, "temperature=-0.5"),
        ({"temperature": 1e-38}, "temperature=1e-38: 0 is greedy, 1e-05 or more samples"),
        (
            {"plan": QuotaPlan((QuotaCheckpoint(0, retrieved=1, template=((4,),)),))},
            "the source matrix for 5 guesses after a token, but it keeps 4",
        ),
    ],
)
def test_bad_input_is_refused_before_any_pass(monkeypatch, arguments, message):
    engine = tiny_engine(tiny_model("llama"))
    monkeypatch.setattr(engine.target, "prefill_all", lambda *_: pytest.fail("the target ran"))
    with pytest.raises(GraftError, match=message):
        engine.generate(**({"input_ids": torch.tensor([0, 1, 2])} | arguments))
