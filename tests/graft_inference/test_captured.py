"""Captured rounds give what eager ones give. The graphs are recordings (`recorded.py`); test_cuda.py has real ones."""

import gc
import weakref
from dataclasses import replace
from unittest import mock

import pytest
import torch
from torch import Tensor
from transformers import LogitsProcessor, NoBadWordsLogitsProcessor

from graft_inference import METHODS, GenerationStats, GraftError
from graft_inference.decode import captured as captured_module
from graft_inference.decode.captured import CapturedRounds
from graft_inference.policy.fallback import Fallback
from graft_inference.target import kv_cache as bucket_cache
from graft_inference.target.kv_cache import bucket

from .families import FAMILIES, WINDOW, family_model
from .plain_head import VARIANTS, varied
from .recorded import RecordedGraphs
from .test_block_drafter import LAYOUTS, tiny_block_head
from .test_engine import prompt
from .test_host_reads import HostReads
from .tiny import learned_policy, tiny_engine, tiny_head, tiny_model, tiny_policy, told_policy

SMALL = 8


@pytest.fixture(autouse=True)
def _small_buckets(monkeypatch):
    """Short texts cross the edges of several buckets."""
    monkeypatch.setattr(bucket_cache, "SMALLEST", 32)


def pair(policy=None, model=None, graphs=None, device="cpu", head=None, **settings):
    """Two engines on one model, the second with captured rounds."""
    model = (model or tiny_model("llama", vocab_size=SMALL)).to(device)
    head = (head or tiny_head(model, draft_vocab_size=SMALL - 1)).to(device, model.dtype)
    eager, captured = (tiny_engine(model, policy or tiny_policy(0.5), head) for _ in range(2))
    captured.target = eager.target
    for engine in (eager, captured):
        engine.captured = None
        engine.successors = engine.successors.to(torch.device(device))
        for name, value in settings.items():
            setattr(engine, name, value)
    captured.captured = CapturedRounds(captured.target, captured.speculator, graphs or RecordedGraphs())
    return eager, captured


def same(eager, captured, ids, new_tokens, *args, is_captured=True, **options):
    """Whether both engines give the same, in the same rounds."""
    expected = eager.generate(ids, new_tokens, *args, **options)
    out = captured.generate(ids, new_tokens, *args, **options)
    assert out.sequences.tolist() == expected.sequences.tolist()
    for name in ("rounds", "checkpoints", "accepted", "reused"):
        assert getattr(out.stats, name) == getattr(expected.stats, name), name
    assert out.stats.captured == (out.stats.rounds if is_captured else 0), out.stats.uncaptured
    assert expected.stats.captured == 0
    return expected, out


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("policy", [tiny_policy, learned_policy, told_policy])
def test_captured_rounds_equal_eager_ones(policy, method, temperature):
    eager, captured = pair(policy(0.5))
    graphs = captured.captured.graphs
    for length in (30, 3, 30):
        captures = graphs.captures
        same(eager, captured, prompt(length, length, SMALL), 24, temperature, method, seed=length)
    assert graphs.captures == captures  # what the last request needs is there


@pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS)
def test_captured_rounds_of_every_kind_of_head(changes):
    model, ids = tiny_model("llama", vocab_size=SMALL), prompt(30, 1, SMALL)
    alone = model.generate(ids, max_new_tokens=24, do_sample=False)
    eager, captured = pair(model=model, head=varied(tiny_head(model, draft_vocab_size=SMALL - 1, **changes)))
    expected, _ = same(eager, captured, ids, 24)
    assert expected.sequences.tolist() == alone.tolist()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_captured_rounds_of_every_kind_of_block_head(layout):
    """Its context is read by whole buckets, and ends where the anchor stands; windows reach less far than the text."""
    model, ids = tiny_model("llama", vocab_size=SMALL), prompt(30, 1, SMALL)
    alone = model.generate(ids, max_new_tokens=24, do_sample=False)
    eager, captured = pair(model=model, head=tiny_block_head(model, **LAYOUTS[layout]))
    expected, out = same(eager, captured, ids, 24)
    assert expected.sequences.tolist() == alone.tolist()
    drafted = out.stats.accepted["drafted"]
    for length in (3, 30):
        _, out = same(eager, captured, prompt(length, length, SMALL), 24, method="eagle3")
        drafted += out.stats.accepted["drafted"]
    assert drafted


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("policy", [tiny_policy, learned_policy, told_policy])
def test_captured_rounds_of_a_block_head_under_every_plan(policy, method, temperature):
    model = tiny_model("llama", vocab_size=SMALL)
    eager, captured = pair(policy(0.5), model, head=tiny_block_head(model, **LAYOUTS["markov"]))
    for length in (30, 3):
        same(eager, captured, prompt(length, length, SMALL), 24, temperature, method, seed=length)


STOPS = {
    (tiny_policy, 0.0): {"d3"},
    (tiny_policy, 0.3): {"d1", "d3"},
    (tiny_policy, 1.0): {"d0"},
    (learned_policy, 0.3): {"none", "d1", "d3"},
}


@pytest.mark.parametrize(("policy", "threshold"), STOPS)
def test_they_stop_where_eager_ones_stop(policy, threshold):
    eager, captured = pair(policy(threshold))
    checkpoints = set()
    for seed in range(2):
        _, out = same(eager, captured, prompt(9, seed, SMALL), 24)
        checkpoints |= set(out.stats.checkpoints)
    assert checkpoints == STOPS[policy, threshold]


@pytest.mark.parametrize("scope", ["request", "engine", "frozen"])
@pytest.mark.parametrize("policy", [tiny_policy, learned_policy])
def test_the_matrix_learns_the_same(policy, scope):
    eager, captured = pair(policy(0.5), retrieval_scope=scope)
    before = captured.successors.clone()
    for seed in range(2):
        same(eager, captured, prompt(6, seed, SMALL), 20)
    assert torch.equal(captured.successors.ids_VK, before.ids_VK) == (scope != "engine")
    assert torch.equal(captured.successors.ids_VK, eager.successors.ids_VK)
    assert torch.equal(captured.successors.learned_V, eager.successors.learned_V)
    torch.testing.assert_close(captured.successors.probs_VK, eager.successors.probs_VK)


@pytest.mark.parametrize("scope", ["request", "engine"])
def test_another_matrix_may_be_put_in(scope):
    eager, captured = pair(retrieval_scope=scope)
    for _ in range(2):
        same(eager, captured, prompt(6, 0, SMALL), 20)
        assert torch.equal(captured.successors.ids_VK, eager.successors.ids_VK)
        for engine in (eager, captured):
            ids_VK = engine.successors.ids_VK.flip(0).clone()
            engine.successors = replace(engine.successors, ids_VK=ids_VK)


@pytest.mark.parametrize(("policy", "temperature"), [(tiny_policy, 0.0), (tiny_policy, 0.7), (told_policy, 0.7)])
@pytest.mark.parametrize("method", METHODS)
def test_requests_with_settings_of_their_own_take_turns_on_the_same_graphs(method, policy, temperature):
    eager, captured = pair(policy(0.5))
    for seed in (3, 2**63 + 5):
        options = {"top_k": 6, "top_p": 0.95, "min_p": 0.01, "seed": seed, "return_logprobs": True}
        expected, out = same(eager, captured, prompt(8, 0, SMALL), 12, temperature, method, **options)
        torch.testing.assert_close(out.logprobs, expected.logprobs, atol=1e-4, rtol=1e-4)
    for other in (temperature / 3, 2.0):  # on graphs that differ in nothing else
        same(eager, captured, prompt(8, 0, SMALL), 12, other, method, seed=3, return_logprobs=True)
    for top_k in (1, 4):
        same(eager, captured, prompt(8, 0, SMALL), 12, temperature, method, seed=3, top_k=top_k)


@pytest.mark.parametrize("layout", [None, "fill-in"])
@pytest.mark.parametrize("scope", ["request", "engine"])
def test_the_turns_of_a_chat_keep_their_prefix(scope, layout):
    model = tiny_model("llama", vocab_size=SMALL)
    head = None if layout is None else tiny_block_head(model, **LAYOUTS[layout])
    eager, captured = pair(model=model, head=head, retrieval_scope=scope, keep_prefix=True)
    ids = prompt(9, 0, SMALL)
    for turn in range(3):
        _, out = same(eager, captured, ids, 12, method="eagle3" if turn == 1 else "graft")
        assert (out.stats.reused > 0) == (turn > 0)
        ids = torch.cat((out.sequences, prompt(4, turn, SMALL)), dim=1)
    same(eager, captured, prompt(5, 7, SMALL), 40)


@pytest.mark.parametrize(("temperature", "policy"), [(0.0, learned_policy), (1.0, tiny_policy)])
@pytest.mark.parametrize("method", METHODS)
def test_a_round_reads_once_and_at_each_checkpoint_after_the_first(policy, method, temperature):
    _, engine = pair(policy(0.5))
    plan, graphs = engine.policy.plan(method), engine.captured.graphs
    decided = {}
    for place, checkpoint in enumerate(plan.checkpoints):
        decided[checkpoint.name] = place + (checkpoint is not plan.checkpoints[-1])
    rounds, run = [], engine.captured.round

    def counted(state, shared):
        before, checkpoints = (graphs.reads, reads.count, graphs.captures), state.stats.checkpoints.copy()
        emitted = run(state, shared)
        (checkpoint,) = (state.stats.checkpoints - checkpoints).elements()
        assert graphs.captures == before[2]
        rounds.append((graphs.reads - before[0], reads.count - before[1], checkpoint))
        return emitted

    engine.generate(prompt(9, 0, SMALL), 100, temperature, method, seed=1)  # captures
    engine.captured.round = counted
    with HostReads() as reads, mock.patch.object(Tensor, "tolist", lambda tensor: reads.tolist(tensor)):
        engine.generate(prompt(9, 0, SMALL), 100, temperature, method, seed=1)
    assert len(rounds) > 5
    for index, (waits, values, checkpoint) in enumerate(rounds):
        # The first decision comes with the record of the round before, if there is one.
        assert waits == values == 1 + max(0, decided[checkpoint] - (index > 0))


def test_a_recording_is_what_a_graph_is():
    """Baked numbers stay, memory is read anew, host reads are refused, scratch memory is lost."""
    value, length = torch.zeros(4), 2
    graphs = RecordedGraphs()
    scratch = []

    def function():
        scratch[:] = [value * 2]
        value[:length] += 1
        return [scratch[0][1:] + length]

    captured = graphs.capture(function, [value])
    assert value.tolist() == [0, 0, 0, 0]
    length, value[3] = 4, 5.0
    captured.replay()
    assert value.tolist() == [1, 1, 0, 5]
    assert captured.outputs[0].tolist() == [2, 2, 12]
    assert scratch[0].isnan().all()
    for read in (
        lambda: value.sum().item(),
        lambda: value[value > 0],
        lambda: value.tolist(),
        lambda: bool(value[0] > 0),
    ):
        with pytest.raises(Exception, match="waits for the device"):
            graphs.capture(lambda read=read: [torch.zeros(1), read()][:1], [])


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_is_captured(family):
    """No family's forward reads on the host or bakes a length in."""
    eager, captured = pair(model=family_model(family, seed=5 if "qwen2" in family else 3, vocab_size=SMALL))
    for length in (WINDOW - 3, 24):
        _, out = same(eager, captured, prompt(length, length, SMALL), 20)
        assert 0 < out.stats.accepted["bonus"] < 19  # some branch was kept


class Favours(LogitsProcessor):
    def __call__(self, input_ids, scores):
        return scores + torch.arange(scores.shape[-1]) / 4


def test_what_cannot_be_captured_runs_eagerly_and_says_so():
    eager, captured = pair()
    for reason, options in {
        "processor": {"logits_processor": [Favours(), NoBadWordsLogitsProcessor([[5]], eos_token_id=7)]},
        "a logits": {"repetition_penalty": 1.3},
    }.items():
        _, out = same(eager, captured, prompt(6, 0, SMALL), 20, is_captured=False, **options)
        assert reason in out.stats.uncaptured
    same(eager, captured, prompt(6, 0, SMALL), 20)


def test_a_model_that_reads_on_the_host_runs_eagerly_from_the_round_where_that_shows():
    eager, captured = pair()
    layer = captured.target.model.model.layers[2]
    hook = layer.register_forward_hook(lambda module, args, output: output * int(output.sum() == output.sum()))
    for _ in range(2):
        captures = captured.captured.graphs.captures
        _, out = same(eager, captured, prompt(6, 0, SMALL), 20, is_captured=False)
        assert "waits for the device" in out.stats.uncaptured
    assert captured.captured.graphs.captures == captures  # it is not tried again
    hook.remove()


def test_of_two_streams_at_once_one_is_captured():
    eager, captured = pair()
    texts = [prompt(6, seed, SMALL) for seed in range(2)]
    expected = [eager.generate(text, 30).sequences[0, 6:].tolist() for text in texts]
    stats = [GenerationStats() for _ in texts]
    streams = [captured.stream(text, 30, stats=one) for text, one in zip(texts, stats, strict=True)]
    turns = [list(turn) for turn in zip(*streams, strict=True)]
    assert [list(tokens) for tokens in zip(*turns, strict=True)] == expected
    assert (stats[0].captured, stats[1].captured) == (stats[0].rounds, 0)
    assert "another request" in stats[1].uncaptured
    same(eager, captured, texts[1], 30)


def test_captured_and_eager_rounds_may_alternate():
    eager, captured = pair()
    run, turn = captured.captured.round, iter(range(10**6))
    captured.captured.round = lambda *args: run(*args) if next(turn) % 5 < 3 else None
    expected = eager.generate(prompt(6, 1, SMALL), 40)
    out = captured.generate(prompt(6, 1, SMALL), 40)
    assert out.sequences.tolist() == expected.sequences.tolist()
    assert out.stats.checkpoints == expected.stats.checkpoints
    assert 0 < out.stats.captured < out.stats.rounds


PLANS = {
    "another method": [tiny_policy(0.5).plan(method) for method in ("graft", "eagle3", "retrieve")],
    "a head left out for long": [learned_policy(0.5, gate).graft for gate in (0.0, 0.0, 0.0, 99.0)],
}


@pytest.mark.parametrize("plans", PLANS.values(), ids=PLANS)
def test_the_plan_may_change_between_rounds(plans):
    eager, captured = pair()

    def change(holder, name, engine):
        run = getattr(holder, name)

        def changing(states, *shared):
            state = states[0] if isinstance(states, list) else states
            state.speculation.builder = engine._builder(plans[state.stats.rounds // 2 % len(plans)])
            return run(states, *shared)

        setattr(holder, name, changing)

    change(eager, "_round", eager)
    change(captured.captured, "round", captured)
    same(eager, captured, prompt(6, 1, SMALL), 40)


def test_graphs_are_kept_for_so_many_samplings(monkeypatch):
    monkeypatch.setattr(captured_module, "MOST_SAMPLINGS", 3)
    eager, captured = pair()
    graphs, kept = captured.captured.graphs, []
    for turn in range(8):
        same(eager, captured, prompt(6, 1, SMALL), 12, 0.5 + turn / 10, seed=1)
        kept.append(len(captured.captured._captured))
    assert kept[3] < kept[2], "the fourth found no room"
    assert kept[6] < kept[5]
    captures = graphs.captures
    same(eager, captured, prompt(6, 1, SMALL), 12, 0.5 + 7 / 10, seed=1)
    assert graphs.captures == captures


def test_a_round_that_captures_is_no_phases():
    _, engine = pair()
    seconds = engine.generate(prompt(9, 0, SMALL), 2).stats.seconds
    assert seconds["draft"] == seconds["graft"] == seconds["verify"] == 0
    assert seconds["commit"] > 0
    again = engine.generate(prompt(9, 0, SMALL), 2).stats.seconds
    assert min(again.values()) > 0


def test_buffers_go_with_the_last_that_uses_them():
    """Not when Python next looks for cycles: a device's memory does not make it do so."""
    _, engine = pair()
    engine.generate(prompt(9, 0, SMALL), 12)
    buffer = weakref.ref(engine.captured._buffers.cache.buffers[0])
    gc.collect()
    gc.disable()
    try:
        del engine.captured
        assert buffer() is None
    finally:
        gc.enable()


def test_buckets_hold_what_they_are_asked_for_and_are_few():
    sizes = {bucket(rows) for rows in range(1, 1500)}
    assert sizes == {32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024, 1536}
    assert all(rows <= bucket(rows) < max(33, 1.5 * rows) for rows in range(1, 1500))


def test_without_cuda_there_is_nothing_to_capture_with():
    engine, _ = pair()
    assert engine.captured is None
    if not torch.cuda.is_available():
        with pytest.raises(GraftError, match="captured=True needs a CUDA device, and the target is on cpu"):
            type(engine)(engine.target, engine.policy, engine.head, engine.successors, captured=True)


def test_a_batch_runs_eagerly_and_says_so():
    eager, captured = pair()
    texts = [prompt(6, 1, SMALL)[0], prompt(9, 2, SMALL)[0]]
    out = captured.generate(texts, 8, pad_token_id=0)
    assert out.sequences.tolist() == eager.generate(texts, 8, pad_token_id=0).sequences.tolist()
    assert all("several prompts" in one.uncaptured for one in out.each)


def test_the_fallback_does_not_judge_rounds_that_capture(monkeypatch):
    _, engine = pair()
    engine.fallback, judged, record = True, [], Fallback.record

    def counted(fallback, seconds, tokens):
        judged.append(tokens)
        record(fallback, seconds, tokens)

    monkeypatch.setattr(Fallback, "record", counted)
    stats = engine.generate(prompt(9, 0, SMALL), 60).stats
    assert 0 < len(judged) < stats.rounds == stats.captured
    before = len(judged)
    plain = engine.generate(prompt(9, 0, SMALL), 60, method="autoregressive").stats
    assert plain.captured
    assert len(judged) == before
