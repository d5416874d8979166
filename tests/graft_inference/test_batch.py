"""A batch gives each prompt what it gets alone, in as few passes and host reads as the longest of them needs."""

import threading
from collections import Counter
from dataclasses import replace

import pytest
import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import StoppingCriteria

from graft_inference import METHODS, GraftError
from graft_inference.decode.prefill import passes
from graft_inference.heads.eagle3.drafter import Eagle3Proposer
from graft_inference.noise import Noise, gumbel
from graft_inference.policy.plan import AUTOREGRESSIVE
from graft_inference.target.model import Target

from .families import FAMILIES, WINDOW, family_model
from .test_custom_generate import Recorder
from .test_engine import SMALL, chi_square_p, prompt, small_engine, three_token_law
from .test_kv_cache import commit_branch
from .test_sampling import Alternating
from .tiny import VOCAB, learned_policy, tiny_engine, tiny_head, tiny_model, tiny_policy, without_lookup
from .tiny_bundle import tiny_tokenizer
from .trees import random_tree

PROMPTS = [prompt(length, seed, SMALL)[0] for seed, length in enumerate((WINDOW - 3, 24, 1, 10))]
PAD = 7


def done(out, index=0):
    """All that a generation tells of one prompt, but for the time it took."""
    stats = out.each[index]
    return stats.emitted, stats.rounds, stats.accepted, stats.checkpoints


def check_each_as_alone(engine, prompts, seed=None, **options):
    """Runs a batch, then each prompt alone; returns the batch's generation."""
    out = engine.generate(prompts, seed=seed, pad_token_id=PAD, **options)
    start = max(map(len, prompts))
    for index, ids in enumerate(prompts):
        alone = engine.generate(ids, seed=None if seed is None else seed + index, **options)
        new = alone.sequences[0, len(ids) :].tolist()
        row = out.sequences[index].tolist()
        assert row[start - len(ids) : start] == ids.tolist()
        assert row[start:] == new + [PAD] * (out.sequences.shape[1] - start - len(new)), (index, options)
        assert done(out, index) == done(alone)
        if alone.logprobs is not None:
            torch.testing.assert_close(out.logprobs[index, : len(new)], alone.logprobs, atol=2e-3, rtol=1e-3)
            assert not out.logprobs[index, len(new) :].any()
    return out


def uneven_ends(engine, prompts, count) -> frozenset[int]:
    """The token that ends these prompts' greedy texts at the most different places."""
    texts = [engine.generate(ids, count).sequences[0, len(ids) :].tolist() for ids in prompts]
    ends = {token: {text.index(token) if token in text else count for text in texts} for token in range(SMALL)}
    token = max(ends, key=lambda one: (len(ends[one]), sum(ends[one])))
    assert len(ends[token]) >= 3
    return frozenset({token})


@pytest.mark.parametrize("family", ["llama", "mistral-window", "gemma2", "gemma3", "gpt-oss", "mixtral", "qwen3-moe"])
def test_greedy_output_of_every_family_is_that_of_each_prompt_alone(family):
    model = family_model(family, seed=3, vocab_size=SMALL)
    engine = tiny_engine(model, tiny_policy(0.5), tiny_head(model, draft_vocab_size=SMALL - 1))
    rounds = 0
    for method in METHODS:
        rounds += check_each_as_alone(engine, PROMPTS, max_new_tokens=16, method=method).stats.rounds
    assert rounds < 0.95 * len(METHODS) * len(PROMPTS) * 15  # or no branch of any tree was ever kept


@pytest.mark.parametrize("policy", [tiny_policy, learned_policy])
@pytest.mark.parametrize("method", METHODS)
def test_prompts_that_end_leave_the_batch_and_the_others_go_on(monkeypatch, policy, method):
    engine = small_engine("llama", policy(0.5))
    engine.eos_token_ids = uneven_ends(engine, PROMPTS, 40)
    widths, verify = [], engine.target.verify_all

    def counted(trees, *rest):
        widths.append(len(trees))
        return verify(trees, *rest)

    monkeypatch.setattr(engine.target, "verify_all", counted)
    out = engine.generate(PROMPTS, 40, method=method)
    assert widths == sorted(widths, reverse=True)
    assert len(set(widths)) >= 3
    rounds = [stats.rounds for stats in out.each]
    assert len(widths) == max(rounds)
    assert sum(widths) == sum(rounds) == out.stats.rounds
    check_each_as_alone(engine, PROMPTS, max_new_tokens=40, method=method)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    "options",
    [
        {"temperature": 1.0},
        {"temperature": 1.0, "return_logprobs": True, "top_k": 5},
        {"temperature": 1.3, "repetition_penalty": 1.3, "return_logprobs": True},
        {"return_logprobs": True, "min_new_tokens": 9},
    ],
    ids=["plain", "top-k", "penalty", "greedy"],
)
def test_prompt_i_is_sampled_as_alone_with_the_ith_seed(method, options):
    engine = small_engine("llama", learned_policy(0.5))
    engine.eos_token_ids = frozenset({2})
    out = check_each_as_alone(engine, PROMPTS, seed=11, max_new_tokens=14, method=method, **options)
    assert len({stats.emitted for stats in out.each}) > 1


def test_each_prompt_has_its_own_processors():
    engine = small_engine()
    expected = [
        engine.generate(ids, 12, 1.0, seed=3 + index, logits_processor=[Alternating()]).sequences[0, len(ids) :]
        for index, ids in enumerate(PROMPTS)
    ]
    out = engine.generate(PROMPTS, 12, 1.0, seed=3, logits_processor=[Alternating()], pad_token_id=PAD)
    assert out.sequences[:, 24:].tolist() == torch.stack(expected).tolist()
    once = (one for one in [Alternating()])
    out = engine.generate(PROMPTS, 12, 1.0, seed=3, logits_processor=once, stopping_criteria=None, pad_token_id=PAD)
    assert out.sequences[:, 24:].tolist() == torch.stack(expected).tolist()
    engine.generate(PROMPTS, 2, logits_processor=None, pad_token_id=PAD)
    uncopied = Alternating()
    uncopied.lock = threading.Lock()
    with pytest.raises(GraftError, match=r"cannot be copied .* one by one"):
        engine.generate(PROMPTS, 12, logits_processor=[uncopied], pad_token_id=PAD)


def test_samples_of_a_batch_follow_the_targets_own_law():
    engine = small_engine(vocab_size=6)
    batch = prompt(4, 1, 6).expand(16, -1)
    counts: Counter[tuple[int, ...]] = Counter()
    for first in range(0, 480, 16):
        out = engine.generate(batch, 3, temperature=1.0, seed=first, pad_token_id=0, attention_mask=batch >= 0)
        counts.update(map(tuple, out.sequences[:, 4:].tolist()))
    assert chi_square_p(counts, three_token_law(engine.target.model, batch[:1]), 480) > 1e-3


class LongEnough(StoppingCriteria):
    def __call__(self, input_ids, scores, **kwargs):
        assert input_ids.shape[0] == 1
        return torch.tensor([input_ids.shape[1] >= 20])


@pytest.mark.parametrize(
    "options",
    [
        {"stop_strings": ["a", "e", "y"], "max_new_tokens": 30},
        {"stopping_criteria": [LongEnough()], "max_new_tokens": 30},
        {"max_length": 26},
    ],
)
def test_every_kind_of_end_is_each_prompts_own(options):
    model = tiny_model("llama")
    engine = tiny_engine(model)
    engine.tokenizer = tiny_tokenizer()
    prompts = [prompt(length, length)[0] for length in (3, 17, 8)]
    for method in ("graft", "autoregressive"):
        out = check_each_as_alone(engine, prompts, method=method, **options)
        assert len({stats.emitted for stats in out.each}) > 1


@pytest.mark.parametrize("scope", ["request", "frozen", "engine"])
def test_what_a_matrix_learns_goes_where_its_scope_says(scope):
    engine = small_engine()
    engine.retrieval_scope = scope
    matrix = engine.successors.ids_VK.clone()
    if scope == "engine":
        out = engine.generate(PROMPTS, 20, method="retrieve", pad_token_id=PAD)
        alone = small_engine().generate(PROMPTS, 20, method="autoregressive", pad_token_id=PAD)
        assert out.sequences.tolist() == alone.sequences.tolist()
    else:
        for companions in (PROMPTS, PROMPTS[2:], PROMPTS[::-1]):
            check_each_as_alone(engine, companions, max_new_tokens=20, method="retrieve")
    assert torch.equal(engine.successors.ids_VK, matrix) == (scope != "engine")


def test_a_batch_whose_plans_differ_and_change_stays_right():
    """One prompt's tree may narrow, or its speculation stop, while the others go on."""
    policy = learned_policy(0.3)
    engine = small_engine("llama", replace(policy, graft=without_lookup(policy.graft)))
    expected = engine.generate(PROMPTS, 30, pad_token_id=PAD)
    run, rounds = engine._round, Counter()

    def changing(states):
        for place, state in enumerate(states):
            rounds[id(state)] += 1
            plain = place % 2 == 1 and rounds[id(state)] % 3 == 1
            state.speculation.builder = engine._builder(AUTOREGRESSIVE if plain else engine.policy.graft)
        return run(states)

    engine._round = changing
    out = engine.generate(PROMPTS, 30, pad_token_id=PAD)
    assert out.sequences.tolist() == expected.sequences.tolist()
    assert any(stats.accepted["drafted"] for stats in out.each[1::2])
    assert out.stats.rounds > expected.stats.rounds


def test_prompts_read_in_pieces_change_nothing():
    whole, pieces = small_engine(), small_engine()
    pieces.prefill_chunk = 3
    for method in METHODS:
        ours, expected = (one.generate(PROMPTS, 12, method=method, pad_token_id=PAD) for one in (pieces, whole))
        assert ours.sequences.tolist() == expected.sequences.tolist()
        assert [done(ours, index) for index in range(4)] == [done(expected, index) for index in range(4)]


@pytest.mark.parametrize(
    ("spans", "expected"),
    [
        ([(0, 3), (0, 2)], [[(0, 0, 3), (1, 0, 2)]]),
        # Cut at 5 and 10 as if alone; what is short goes wherever there is room.
        (
            [(0, 12), (0, 3), (2, 4), (0, 1)],
            [[(0, 0, 5)], [(0, 5, 10)], [(0, 10, 12), (1, 0, 3)], [(2, 2, 4), (3, 0, 1)]],
        ),
        ([(0, 3), (0, 7), (4, 6)], [[(0, 0, 3), (2, 4, 6)], [(1, 0, 5)], [(1, 5, 7)]]),
    ],
)
def test_pieces_of_prompts_are_those_of_each_alone_and_share_passes(spans, expected):
    assert list(passes(spans, 5)) == expected


@pytest.mark.parametrize(("chunk", "expected"), [(1024, [[4, 24, 1, 10]]), (24, [[4, 1, 10], [24]])])
def test_prompts_are_read_together(chunk, expected):
    engine, read = small_engine(), []
    engine.prefill_chunk = chunk
    prefill_all = engine.target.prefill_all
    engine.target.prefill_all = lambda pieces, *rest: read.append(list(map(len, pieces))) or prefill_all(pieces, *rest)
    engine.generate(PROMPTS, 2, pad_token_id=PAD)
    assert read == expected


@pytest.mark.parametrize(("chunk", "expected"), [(1024, [3 + 23 + 9, 4]), (24, [3 + 9, 23, 4])])
def test_the_head_reads_a_batch_in_passes_no_larger_than_the_targets(chunk, expected):
    """And leaves one position of each prompt to the first draft."""
    engine, read = small_engine(), []
    engine.prefill_chunk = chunk
    fuse = engine.head.fuse
    engine.head.fuse = lambda aux_AE: read.append(len(aux_AE)) or fuse(aux_AE)
    engine.generate(PROMPTS, 2, pad_token_id=PAD)
    assert read == expected


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("all_logits", [True, False])
def test_prompts_read_together_are_those_read_alone(family, all_logits):
    """Two passes: the second pieces stand on different numbers of committed rows."""
    target = Target(family_model(family), (0, 1, 3))
    texts = [prompt(length, length)[0] for length in (3, 20, WINDOW + 5)]
    packed, alone = ([target.new_cache(40) for _ in texts] for _ in range(2))
    for cut in (slice(0, 2), slice(2, None)):
        pieces = [text[cut] for text in texts]
        for text, cache, output in zip(pieces, alone, target.prefill_all(pieces, packed, all_logits), strict=True):
            expected = target.prefill(text, cache, all_logits)
            assert len(output.logits_NV) == (len(text) if all_logits else 1)
            torch.testing.assert_close(output.logits_NV, expected.logits_NV, atol=2e-4, rtol=2e-4)
            torch.testing.assert_close(output.aux_NE, expected.aux_NE, atol=2e-4, rtol=2e-4)
    assert [cache.length for cache in packed] == list(map(len, texts))


def test_prompts_may_be_lists_of_ids():
    engine = small_engine()
    expected = engine.generate(PROMPTS, 4, pad_token_id=PAD).sequences
    assert (
        engine.generate([line.tolist() for line in PROMPTS], 4, pad_token_id=PAD).sequences.tolist()
        == expected.tolist()
    )


def test_padding_on_either_side_is_no_part_of_a_prompt():
    engine = small_engine()
    listed = engine.generate(PROMPTS, 12, pad_token_id=PAD).sequences[:, 24:].tolist()
    for side in ("left", "right"):
        padded = pad_sequence(PROMPTS, batch_first=True, padding_value=PAD, padding_side=side)
        ones = [torch.ones_like(ids) for ids in PROMPTS]
        mask = pad_sequence(ones, batch_first=True, padding_side=side)
        out = engine.generate(padded, 12, attention_mask=mask, pad_token_id=PAD)
        assert torch.equal(out.sequences[:, :24], padded)
        assert out.sequences[:, 24:].tolist() == listed
        one = engine.generate(padded[:1], 12, attention_mask=mask[:1])
        assert one.sequences.tolist() == [[*padded[0].tolist(), *listed[0]]]


def test_the_pad_token_is_the_callers_the_tokenizers_the_models_or_the_end():
    engine = small_engine()
    pair = [PROMPTS[0], PROMPTS[3]]

    def found(**options):
        return int(engine.generate(pair, 3, **options).sequences[0, 0])

    with pytest.raises(GraftError, match="no pad token is known: pass pad_token_id="):
        found()
    same = torch.stack((PROMPTS[3], PROMPTS[1][:10]))
    assert engine.generate(same, 3).sequences.shape == (2, 13)  # nothing to fill up
    with pytest.raises(GraftError, match="no pad token is known"):
        engine.generate(same, 3, stopping_criteria=[LongEnough()])
    engine.eos_token_ids = frozenset({6, 5})
    assert found() == 5
    engine.target.model.generation_config.pad_token_id = -1  # as old Llamas have it, which is no token
    assert found() == 5
    engine.target.model.generation_config.pad_token_id = 4
    assert found() == 4
    engine.tokenizer = tiny_tokenizer()
    engine.tokenizer.pad_token = engine.tokenizer.convert_ids_to_tokens(3)
    assert found() == 3
    assert found(pad_token_id=2) == 2


def test_a_kept_prefix_is_neither_used_nor_lost():
    engine = small_engine()
    engine.keep_prefix = True
    first = engine.generate(PROMPTS[3], 12).sequences[0]
    text = torch.cat((first, PROMPTS[0]))
    out = engine.generate([text, PROMPTS[1]], 8, pad_token_id=PAD)
    assert [stats.reused for stats in out.each] == [0, 0]
    after = engine.generate(text, 8)
    assert after.stats.reused > 10
    assert after.sequences[0, -8:].tolist() == out.sequences[0, -8:].tolist()


def test_statistics_of_a_batch_are_the_sum_and_its_time_that_of_the_longest():
    out = small_engine().generate(PROMPTS, 20, pad_token_id=PAD)
    each, stats = out.each, out.stats
    assert (stats.prompts, stats.emitted) == (4, 80)
    assert stats.acceptance_length == 76 / sum(one.rounds for one in each)
    # Prompts that are decoded together are under way at the same time: their seconds do not add up.
    assert stats.seconds == {phase: max(one.seconds[phase] for one in each) for phase in stats.seconds}
    assert stats.tokens_per_second == 76 / stats.decode_seconds


def test_the_head_runs_once_for_all_that_draft():
    engine = small_engine("llama", tiny_policy(0.5))
    calls, rounds, run = [0], [], engine._round
    engine.head.midlayer.register_forward_hook(lambda *_: calls.__setitem__(0, calls[0] + 1))
    passes = {checkpoint.name: checkpoint.steps for checkpoint in engine.policy.graft.checkpoints}

    def counted(states):
        before, checkpoints = calls[0], [state.stats.checkpoints.copy() for state in states]
        emitted = run(states)
        reached = [passes[next((s.stats.checkpoints - b).elements())] for s, b in zip(states, checkpoints, strict=True)]
        rounds.append((calls[0] - before, reached))
        return emitted

    engine._round = counted
    engine.generate(PROMPTS, 30, pad_token_id=PAD)
    assert all(count == max(reached) for count, reached in rounds)
    assert any(len(set(reached)) > 1 for _, reached in rounds)


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_of_packed_trees_are_those_of_each_tree_alone(family):
    target = Target(family_model(family), (0, 1, 3))
    texts = [prompt(length, length)[0] for length in (1, 20, WINDOW)]
    trees = [random_tree(seed, nodes=nodes) for seed, nodes in ((1, 12), (2, 5), (3, 9))]
    ancestors = [tree.ancestors(8) for tree in trees]

    def caches():
        made = [target.new_cache(64) for _ in texts]
        for text, cache in zip(texts, made, strict=True):
            target.prefill(text, cache)
        return made

    packed, alone = caches(), caches()
    found = target.verify_all(trees, ancestors, packed)
    expected = [target.verify(*one) for one in zip(trees, ancestors, alone, strict=True)]
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours.logits_NV, theirs.logits_NV, atol=2e-3, rtol=1e-3)
        torch.testing.assert_close(ours.aux_NE, theirs.aux_NE, atol=2e-3, rtol=1e-3)
    for ours, theirs in zip(packed, alone, strict=True):
        commit_branch(ours, [0, 2])
        commit_branch(theirs, [0, 2])
        for mine, other in zip(ours.tree_layers, theirs.tree_layers, strict=True):
            end = ours.length
            assert theirs.length == end
            torch.testing.assert_close(mine.keys[:, :, :end], other.keys[:, :, :end], atol=2e-3, rtol=1e-3)
            torch.testing.assert_close(mine.values[:, :, :end], other.values[:, :, :end], atol=2e-3, rtol=1e-3)


def test_drafts_of_several_prompts_are_those_of_each_alone():
    model = tiny_model("llama")
    head, target = tiny_head(model), Target(model, (0, 1, 3))
    generator = torch.Generator().manual_seed(0)
    pieces = [
        [(prompt(n, n + turn)[0], torch.randn(n, 96, generator=generator)) for n in lengths]
        for turn, lengths in enumerate(((9, 1, 4), (2, 3, 1)))
    ]
    proposer = Eagle3Proposer(head, target.embed, target.max_positions)
    together, alone = ([proposer.open(3, 0, 40) for _ in range(3)] for _ in range(2))
    proposer.defer(alone[1:2], [pieces[0][1]])
    proposer.defer(together[1:2], [pieces[0][1]])
    noises = [None, *(Noise(gumbel(seed, 0, 4, 61, torch.device("cpu")), 0.6) for seed in (1, 2))]
    for fresh in pieces:
        drafts = proposer.begin(together, fresh, [tokens_A[-1:] for tokens_A, _ in fresh], noises)
        expected = [
            proposer.begin([one], [part], [part[0][-1:]], [noise])[0]
            for one, part, noise in zip(alone, fresh, noises, strict=True)
        ]
        for _ in range(3):
            drafts = proposer.deepen(together, drafts)
            expected = [proposer.deepen([one], [draft])[0] for one, draft in zip(alone, expected, strict=True)]
        for ours, theirs in zip(drafts, expected, strict=True):
            assert ours.candidates.tokens_N.tolist() == theirs.candidates.tokens_N.tolist()
            assert ours.candidates.parents_N.tolist() == theirs.candidates.parents_N.tolist()
            torch.testing.assert_close(ours.candidates.logp_N, theirs.candidates.logp_N, atol=1e-4, rtol=1e-4)


HOLES = torch.tensor([[1, 1, 0, 1], [1, 1, 1, 1]])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"input_ids": []}, "an empty list of prompts"),
        ({"input_ids": torch.zeros((0, 3), dtype=torch.long)}, r"shape \[0, 3\]"),
        ({"input_ids": [PROMPTS[0], torch.empty(0, dtype=torch.long)]}, r"prompt 1 of the list has shape \[0\]"),
        (
            {"input_ids": [PROMPTS[0], torch.zeros((2, 2), dtype=torch.long)]},
            r"prompt 1 of the list has shape \[2, 2\]",
        ),
        ({"input_ids": PROMPTS, "attention_mask": HOLES}, "pass it without attention_mask"),
        ({"input_ids": PROMPTS, "attention_mask": [1] * len(PROMPTS)}, "pass it without attention_mask"),
        ({"input_ids": PROMPTS, "attention_mask": [None] * len(PROMPTS)}, "pass it without attention_mask"),
        ({"input_ids": PROMPTS, "attention_mask": 5}, "pass it without attention_mask"),
        ({"input_ids": PROMPTS, "attention_mask": torch.tensor(1)}, "pass it without attention_mask"),
        ({"attention_mask": HOLES}, "holes in prompt 0"),
        ({"attention_mask": HOLES * 0}, "hides all of prompt 0: leave empty prompts out"),
        ({"attention_mask": HOLES[:, :3]}, r"attention_mask of shape \[2, 3\] for input_ids of \[2, 4\]"),
        ({"pad_token_id": 4}, "prompt 1 of the batch begins or ends with the pad token 4: pass attention_mask"),
        ({"streamer": Recorder()}, "a streamer follows one prompt"),
        ({"input_ids": [PROMPTS[0], torch.tensor([VOCAB])]}, "outside the vocabulary"),
        ({"input_ids": [PROMPTS[0], torch.zeros(250, dtype=torch.long)]}, "prompt of 250 tokens .* limit of 256"),
        ({"max_length": 6, "max_new_tokens": None, "input_ids": PROMPTS}, "max_length=6 leaves no room after 24"),
    ],
)
def test_batches_that_cannot_be_served_are_refused_before_any_pass(monkeypatch, arguments, message):
    engine = small_engine()
    monkeypatch.setattr(engine.target, "forward", lambda *_: pytest.fail("the target ran"))
    batch = torch.tensor([[1, 2, 3, 1], [1, 2, 3, 4]])
    with pytest.raises(GraftError, match=message):
        engine.generate(**({"input_ids": batch, "max_new_tokens": 8, "pad_token_id": PAD} | arguments))


def test_a_batch_cannot_be_streamed():
    engine = small_engine()
    with pytest.raises(GraftError, match="batch of 2 prompts cannot be streamed: stream them one by one"):
        next(engine.stream(torch.tensor([[1, 2], [3, 4]]), 8))


def test_the_plan_of_a_request_is_that_of_each_prompt():
    engine = small_engine()
    plan = replace(engine.policy.eagle3, learns_accepted=True)
    out = check_each_as_alone(engine, PROMPTS, max_new_tokens=12, plan=plan)
    assert set(out.stats.checkpoints) == {"d2"}
