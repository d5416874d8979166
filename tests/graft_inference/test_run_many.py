"""A batch that is refilled gives each prompt what it gets alone, never has more under way, and loses none."""

import pytest
import torch

from graft_inference import GraftEngine, GraftError, Policy, Request
from graft_inference.policy.plan import AUTOREGRESSIVE
from graft_inference.retrieval.successor_matrix import SuccessorMatrix
from graft_inference.target.model import Target

from .families import family_model
from .test_batch import uneven_ends
from .test_engine import SMALL, greedy_reference, prompt, small_engine
from .tiny import tiny_engine, tiny_head, tiny_model, tiny_policy

PROMPTS = [prompt(length, seed, SMALL)[0] for seed, length in enumerate((9, 24, 1, 10, 3, 17, 5))]


def asked(count=16, method="autoregressive", temperatures=(0.0,), seed=5):
    temperatures = [temperatures[number % len(temperatures)] for number in range(len(PROMPTS))]
    return [
        (ids, Request(max_new_tokens=count, method=method, temperature=temperature, seed=seed + number))
        for number, (ids, temperature) in enumerate(zip(PROMPTS, temperatures, strict=True))
    ]


def headless(model, aux_layer_ids=()) -> GraftEngine:
    plan = AUTOREGRESSIVE
    nothing = SuccessorMatrix.empty(1, 1, torch.device("cpu"))
    return GraftEngine(Target(model, aux_layer_ids), Policy(plan, plan, plan), None, nothing)


def alone(engine, ids, request):
    return engine.run(request, ids).sequences[0, len(ids) :].tolist()


@pytest.mark.parametrize("method", ["autoregressive", "retrieve", "graft"])
@pytest.mark.parametrize("at_most", [1, 3, 20])
def test_each_gets_what_it_gets_alone(method, at_most):
    engine = small_engine("llama", tiny_policy(0.5))
    engine.eos_token_ids = uneven_ends(engine, PROMPTS, 16)
    requests = asked(method=method, temperatures=(0.0, 0.8))
    found = {one.number: one for one in engine.run_many(requests, at_most)}
    assert sorted(found) == list(range(len(PROMPTS)))
    for number, (ids, request) in enumerate(requests):
        assert found[number].tokens == alone(engine, ids, request), number
        assert found[number].stats.emitted == len(found[number].tokens)


@pytest.mark.parametrize("family", ["mistral-window", "gemma3", "gpt-oss"])
def test_other_families(family):
    model = family_model(family, seed=3, vocab_size=SMALL)
    engine = tiny_engine(model, tiny_policy(0.5), tiny_head(model, draft_vocab_size=SMALL - 1))
    for one in engine.run_many(asked(), 3):
        assert one.tokens == alone(engine, *asked()[one.number])


def test_a_place_is_filled_as_soon_as_it_is_free(monkeypatch):
    """Prompts are read as places become free, and passes are as full as they can be."""
    engine = small_engine()
    engine.eos_token_ids = uneven_ends(engine, PROMPTS, 16)
    widths, taken, verify = [], [], engine.target.verify_all

    def counted(trees, *rest):
        widths.append(len(trees))
        return verify(trees, *rest)

    def reading():
        for one in asked():
            taken.append(one)
            yield one

    monkeypatch.setattr(engine.target, "verify_all", counted)
    ended = 0
    for _ in engine.run_many(reading(), 3):
        ended += 1
        assert len(taken) <= ended + 2  # those that ended, with this one, and two others under way
    last_full = max(index for index, width in enumerate(widths) if width == 3)
    assert ended == len(PROMPTS)
    assert set(widths[: last_full + 1]) == {3}
    assert sum(widths) == sum(len(alone(engine, *one)) - 1 for one in asked())


@pytest.mark.parametrize("method", ["autoregressive", "graft"])
def test_aux_states_are_those_of_one_pass_over_the_whole_text(method):
    engine = small_engine("llama", tiny_policy(0.5))
    engine.prefill_chunk = 8  # the longest prompt is read in three pieces
    for one in engine.run_many(asked(method=method), 3, keep_aux=True):
        whole_S = torch.cat((PROMPTS[one.number], torch.tensor(one.tokens)))
        with torch.inference_mode():
            expected = engine.target.prefill(whole_S, engine.target.new_cache(len(whole_S))).aux_NE
        torch.testing.assert_close(one.aux_SE, expected, atol=1e-4, rtol=1e-4)
        assert one.tokens == alone(engine, *asked(method=method)[one.number])


def test_the_last_position_of_a_target_needs_no_room_beyond_it():
    model = tiny_model("llama")
    engine = headless(model, (0, 1))
    ids = prompt(model.config.max_position_embeddings - 4)[0]
    (one,) = engine.run_many([(ids, Request(max_new_tokens=4, method="autoregressive"))], 2, keep_aux=True)
    assert one.aux_SE.shape == (model.config.max_position_embeddings, 2 * model.config.hidden_size)


def test_an_engine_without_a_head_answers_and_refuses_to_draft():
    model = tiny_model("llama", vocab_size=SMALL)
    expected = [greedy_reference(model, ids[None], 16)[0, len(ids) :].tolist() for ids in PROMPTS]
    engine = headless(model)
    found = {one.number: one.tokens for one in engine.run_many(asked(), 4)}
    assert [found[number] for number in range(len(PROMPTS))] == expected
    drafting = small_engine().policy.eagle3
    with pytest.raises(GraftError, match="no draft head"):
        engine.generate(PROMPTS[0], plan=drafting)


def test_bad_requests_are_named():
    engine = small_engine()
    good = asked()[0]
    with pytest.raises(GraftError, match=r"prompt 1: .*token"):
        list(engine.run_many([good, (torch.tensor([SMALL]), good[1])], 1))
    with pytest.raises(GraftError, match="prompt 1: it is a batch of 2"):
        list(engine.run_many([good, (torch.zeros((2, 3), dtype=torch.long), good[1])], 1))
    with pytest.raises(GraftError, match="another plan"):
        list(engine.run_many([good, (good[0], Request(method="retrieve"))], 1))
    with pytest.raises(GraftError, match="return_logprobs"):
        list(engine.run_many([(good[0], Request(return_logprobs=True))], 1))
    with pytest.raises(GraftError, match="at_most=0"):
        list(engine.run_many([good], 0))
