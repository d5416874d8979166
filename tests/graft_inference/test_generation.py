"""Generation as callers know it: where it ends, who listens, what is kept, and who else is using the engine."""

import threading
from collections import Counter

import numpy as np
import pytest
import torch
from transformers import BatchEncoding, StoppingCriteria, TextIteratorStreamer

from graft_inference import METHODS, GenerationStats, GraftEngine, GraftError
from graft_inference.bundle import Bundle
from graft_inference.request import Request, ends_of
from graft_inference.retrieval.successor_matrix import SuccessorMatrix

from .test_custom_generate import FOLLOWED, PAD, REFUSED, UNSEEN, Recorder, as_set
from .test_engine import GREEDY, SMALL, greedy_reference, prompt, small_engine
from .tiny import VOCAB, learned_policy, prefilled, tiny_engine, tiny_head, tiny_model, tiny_policy
from .tiny_bundle import tiny_tokenizer

SAMPLED = {"temperature": 1.0, "seed": 5}
BOTH = pytest.mark.parametrize("sampling", [{}, SAMPLED], ids=["greedy", "sampled"])


def longer_tokenizer():
    """With a token that no model was resized for."""
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(["<tool>"])
    return tokenizer


def new_tokens(engine, input_ids, **options):
    return engine.generate(input_ids, **options).sequences[0, input_ids.shape[1] :].tolist()


def test_stop_strings_end_where_generate_ends():
    model = tiny_model("llama")
    tokenizer = tiny_tokenizer()
    text = tokenizer.decode(greedy_reference(model, prompt(9), 40)[0, 9:])
    for stop in (text[7:9], [text[20:23], "never said"], text[30]):
        expected = model.generate(prompt(9), max_new_tokens=40, stop_strings=stop, tokenizer=tokenizer)
        assert expected.shape[1] < 49
        engine = tiny_engine(model)
        engine.tokenizer = tokenizer
        for method in METHODS:
            out = engine.generate(prompt(9), 40, method=method, stop_strings=stop)
            assert out.sequences.tolist() == expected.tolist()
            assert out.stats.emitted == expected.shape[1] - 9
        assert engine.generate(prompt(9), 40, stop_strings=stop, tokenizer=tokenizer).sequences.tolist() == (
            expected.tolist()
        )
        engine.target.release()


@pytest.mark.parametrize("name", FOLLOWED)
def test_every_setting_of_the_models_generation_config_is_followed(name):
    model = tiny_model("llama")
    as_set(model, "model", name, FOLLOWED[name])
    lengths = {} if name in ("max_length", "max_new_tokens") else {"max_new_tokens": 25}
    expected = model.generate(prompt(9), tokenizer=tiny_tokenizer(), **lengths).tolist()
    assert (expected != greedy_reference(tiny_model("llama"), prompt(9), 25).tolist()) == (name not in UNSEEN)
    engine = tiny_engine(model)
    engine.tokenizer, engine.eos_token_ids = (
        tiny_tokenizer(),
        frozenset(ends_of(model.generation_config.eos_token_id, None)),
    )
    for method in ("graft", "autoregressive"):
        assert engine.generate(prompt(9), method=method, **lengths).sequences.tolist() == expected
    batch = engine.generate([prompt(9)[0], prompt(9)[0]], pad_token_id=0, **lengths)
    assert batch.sequences.tolist() == expected * 2


@pytest.mark.parametrize(
    "settings",
    [{"top_k": 1}, {"top_p": 1e-6}, {"min_p": 1.0}, {"epsilon_cutoff": 0.99}],
)
def test_a_sample_goes_through_the_filters_of_the_models_generation_config(settings):
    model = tiny_model("llama")
    expected = model.generate(prompt(9), max_new_tokens=25).tolist()
    model.generation_config.update(**settings, do_sample=True, temperature=9.0)
    engine = tiny_engine(model)
    assert engine.generate(prompt(9), 25).sequences.tolist() == expected, "it samples only if it is asked to"
    assert engine.generate(prompt(9), 25, temperature=5.0, seed=1).sequences.tolist() == expected


def test_what_a_request_says_counts_before_the_models_generation_config():
    model = tiny_model("llama")
    expected = model.generate(prompt(9), max_new_tokens=25).tolist()
    free = tiny_engine(model).generate(prompt(9), 25, temperature=5.0, seed=1).sequences.tolist()
    settings = {"repetition_penalty": 1.7, "max_length": 11, "stop_strings": ["a", "e"], "top_k": 1, "top_p": 1e-6}
    model.generation_config.update(**settings)
    engine = tiny_engine(model)
    off = {"repetition_penalty": 1.0, "stop_strings": ()}
    assert engine.generate(prompt(9), 25, **off).sequences.tolist() == expected
    assert engine.generate(prompt(9), max_length=34, **off).sequences.tolist() == expected
    found = engine.generate(prompt(9), 25, temperature=5.0, seed=1, top_k=0, top_p=1.0, **off)
    assert found.sequences.tolist() == free != expected


@pytest.mark.parametrize("name", sorted(REFUSED.keys() - {"return_dict_in_generate"}))
def test_settings_of_the_models_generation_config_that_cannot_be_followed_are_refused_by_name(monkeypatch, name):
    model = tiny_model("llama")
    as_set(model, "model", name, REFUSED[name])
    engine = tiny_engine(model)
    monkeypatch.setattr(engine.target, "forward", lambda *_: pytest.fail("the target ran"))
    message = (
        f"(?s)({name}=.*not supported with Graft|not supported with Graft .*{name}=).*the model's generation_config"
    )
    with pytest.raises(GraftError, match=message):
        engine.generate(prompt(9), 5)


def test_what_comes_back_from_an_engine_is_its_own():
    model = tiny_model("llama")
    model.generation_config.update(return_dict_in_generate=True, output_scores=True)
    assert tiny_engine(model).generate(prompt(9), 5).stats.emitted == 5
    model.generation_config.update(num_return_sequences=3, do_sample=True)
    with pytest.raises(GraftError, match="num_return_sequences=3 is not supported by an engine: pass the prompt"):
        tiny_engine(model).generate(prompt(9), 5, temperature=1.0)


@pytest.mark.parametrize("chat", [None, 5, [5, 6]])
def test_an_engine_ends_where_the_model_or_the_tokenizer_says(chat):
    """A chat model that was made from a base often says only where a text ends, its tokenizer where a turn does."""
    model, tokenizer = tiny_model("llama"), tiny_tokenizer()
    bundle = Bundle(tiny_head(model), tiny_policy(), SuccessorMatrix.empty(VOCAB, 4, torch.device("cpu")))
    free = model.generate(prompt(9), max_new_tokens=40)[0].tolist()
    end = next(token for token in free[15:] if token not in (5, 6, *free[9:15]))
    model.generation_config.eos_token_id = chat
    tokenizer.eos_token = tokenizer.convert_ids_to_tokens(end)
    ends = [end, *([chat] if isinstance(chat, int) else chat or [])]
    expected = model.generate(prompt(9), max_new_tokens=40, eos_token_id=ends, pad_token_id=PAD).tolist()
    of_model = model.generate(prompt(9), max_new_tokens=40, pad_token_id=PAD).tolist()
    engine = GraftEngine.from_bundle(bundle, model, packed=False, tokenizer=tokenizer)
    assert engine.generate(prompt(9), 40).sequences.tolist() == expected != of_model
    engine.target.release()
    untold = GraftEngine.from_bundle(bundle, model, packed=False)
    assert untold.generate(prompt(9), 40).sequences.tolist() == of_model


@pytest.mark.parametrize("stop", ["\u273f", ["END\u273f"], "\ud800", "never said at all", ["\u273f", "\ud800"]])
def test_a_stop_string_that_cannot_come_changes_nothing(stop):
    engine = tiny_engine(tiny_model("llama"))
    expected = engine.generate(prompt(9), 12).sequences.tolist()
    assert engine.generate(prompt(9), 12, stop_strings=stop, tokenizer=tiny_tokenizer()).sequences.tolist() == expected


ONE = [3, 1, 4, 1, 5]
TWO = [[3, 1, 4, 1, 5], [2, 7]]


@pytest.mark.parametrize(
    "given",
    [
        ONE,
        tuple(ONE),
        [ONE],
        np.array(ONE),
        np.array([ONE], dtype=np.uint16),
        torch.tensor(ONE, dtype=torch.int32),
        torch.tensor([ONE], dtype=torch.uint8),
        list(np.array(ONE)),
        BatchEncoding({"input_ids": ONE, "attention_mask": [1] * 5}),
        BatchEncoding({"input_ids": [ONE], "attention_mask": [[1] * 5], "token_type_ids": [[0] * 5]}),
        BatchEncoding({"input_ids": [ONE], "attention_mask": [[1] * 5]}, tensor_type="pt"),
        {"input_ids": torch.tensor([[0, 0, *ONE]]), "attention_mask": torch.tensor([[0, 0, 1, 1, 1, 1, 1]])},
    ],
)
def test_a_prompt_may_come_as_tokenizers_and_arrays_give_it(given):
    engine = tiny_engine(tiny_model("llama"))
    expected = engine.generate(torch.tensor(ONE), 8).sequences[0, 5:].tolist()
    out = engine.generate(given, 8)
    assert out.sequences.dtype == torch.long
    assert out.sequences[0, -8:].tolist() == expected
    assert list(engine.stream(given, 8)) == expected


@pytest.mark.parametrize(
    "given",
    [
        TWO,
        [torch.tensor(TWO[0], dtype=torch.int32), np.array(TWO[1])],
        BatchEncoding({"input_ids": TWO, "attention_mask": [[1] * 5, [1] * 2]}),
        BatchEncoding({"input_ids": [ONE, [0, 0, 0, 2, 7]], "attention_mask": [[1] * 5, [0, 0, 0, 1, 1]]}),
        {"input_ids": np.array([ONE, [2, 7, 0, 0, 0]]), "attention_mask": np.array([[1] * 5, [1, 1, 0, 0, 0]])},
    ],
)
def test_a_batch_may_come_as_tokenizers_and_arrays_give_it(given):
    engine = tiny_engine(tiny_model("llama"))
    expected = [engine.generate(torch.tensor(ids), 8).sequences[0, -8:].tolist() for ids in TWO]
    assert engine.generate(given, 8, pad_token_id=0).sequences[:, 5:].tolist() == expected


def test_a_mask_beside_the_ids_may_be_streamed():
    engine = tiny_engine(tiny_model("llama"))
    encoded = {"input_ids": torch.tensor([[0, *ONE]]), "attention_mask": torch.tensor([[0, 1, 1, 1, 1, 1]])}
    assert list(engine.stream(**encoded, max_new_tokens=8)) == list(engine.stream(ONE, 8))


def test_max_length_counts_the_prompt():
    engine = small_engine()
    expected = engine.generate(prompt(5, 0, SMALL), 12).sequences.tolist()
    assert engine.generate(prompt(5, 0, SMALL), max_length=17).sequences.tolist() == expected
    assert list(engine.stream(prompt(5, 0, SMALL), max_length=17)) == expected[0][5:]


def test_without_a_length_there_are_128_tokens():
    assert small_engine().generate(prompt(5, 0, SMALL), method="retrieve").stats.emitted == 128


def test_a_stopping_criterion_sees_the_text_so_far():
    seen = []

    class Stop(StoppingCriteria):
        def __call__(self, input_ids, scores, **kwargs):
            seen.append(input_ids[0].tolist())
            return torch.tensor([input_ids.shape[1] == 14])

    out = small_engine().generate(prompt(5, 0, SMALL), 40, stopping_criteria=[Stop()])
    whole = out.sequences[0].tolist()
    assert seen == [whole[:end] for end in range(6, 15)]
    assert out.stats.emitted == 9


@BOTH
def test_the_streamer_gets_the_prompt_then_every_token(sampling):
    recorder = Recorder()
    out = small_engine().generate(prompt(5, 0, SMALL), 12, streamer=recorder, **sampling)
    assert recorder.values == [prompt(5, 0, SMALL).tolist(), *([token] for token in out.sequences[0, 5:].tolist())]
    assert recorder.ended


def test_text_can_be_iterated_while_another_thread_generates():
    tokenizer = tiny_tokenizer()
    engine = tiny_engine(tiny_model("llama"))
    expected = tokenizer.decode(engine.generate(prompt(9), 30).sequences[0, 9:], skip_special_tokens=True)
    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, timeout=60, skip_special_tokens=True)
    thread = threading.Thread(target=engine.generate, args=(prompt(9), 30), kwargs={"streamer": streamer})
    thread.start()
    assert "".join(streamer) == expected
    thread.join()


@pytest.mark.parametrize("method", METHODS)
def test_a_prompt_read_in_pieces_changes_nothing(method):
    whole, pieces = small_engine(), small_engine()
    for length, chunk in ((17, 1), (17, 5), (17, 16), (3, 2)):
        pieces.prefill_chunk = chunk
        ours, expected = (engine.generate(prompt(length, 3, SMALL), 20, method=method) for engine in (pieces, whole))
        assert ours.sequences.tolist() == expected.sequences.tolist()
        assert (ours.stats.rounds, ours.stats.accepted, ours.stats.checkpoints) == (
            expected.stats.rounds,
            expected.stats.accepted,
            expected.stats.checkpoints,
        )


def test_a_prompt_of_32k_tokens_is_read_in_pieces():
    """Its far end is felt: what comes next is the whole text's, and not that of the last piece."""
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 1, "num_key_value_heads": 1}
    model = tiny_model("llama", **sizes, num_hidden_layers=3, max_position_embeddings=40_000, vocab_size=SMALL)
    head = tiny_head(model, SMALL - 1, aux_layer_ids=(0, 1, 2), max_position_embeddings=40_000)
    engine = tiny_engine(model, tiny_policy(0.5), head)
    engine.prefill_chunk = 4096
    ids = prompt(33_000, 1, SMALL)
    expected = model_greedy(engine, ids, 12)
    assert model_greedy(engine, ids[:, -4096:], 12)[0, -12:].tolist() != expected[0, -12:].tolist()
    lengths = count_read(engine)
    assert engine.generate(ids, 12).sequences.tolist() == expected.tolist()
    assert lengths == [4096] * 8 + [33_000 - 8 * 4096]


def model_greedy(engine, ids, count):
    """The model's own greedy text, its attention's memory linear in the prompt."""
    with engine.target.own_attention() as model:
        return model.generate(ids, max_new_tokens=count, do_sample=False)


def count_read(engine) -> list[int]:
    """Lengths of the pieces of prompts that the target reads from now on."""
    lengths, prefill_all = [], engine.target.prefill_all

    def counted(pieces, caches, all_logits):
        lengths.extend(map(len, pieces))
        return prefill_all(pieces, caches, all_logits)

    engine.target.prefill_all = counted
    return lengths


@BOTH
@pytest.mark.parametrize("method", METHODS)
def test_turns_of_a_chat_read_only_what_is_new_and_say_the_same(method, sampling):
    engine, fresh_engine = small_engine(), small_engine()
    engine.keep_prefix = True
    engine.prefill_chunk = 4
    read = count_read(engine)
    text = prompt(9, 2, SMALL)
    for turn in range(3):
        read.clear()
        out = engine.generate(text, 11, method=method, **sampling)
        fresh = fresh_engine.generate(text, 11, method=method, **sampling)
        assert out.sequences.tolist() == fresh.sequences.tolist()
        assert sum(read) == text.shape[1] - out.stats.reused
        if turn:
            assert sum(read) <= 8 + 12  # the user's words, and at most what the last rounds had not read
            assert out.stats.reused >= 9
        text = torch.cat((out.sequences, prompt(8, turn, SMALL)), dim=1)


@BOTH
def test_a_kept_prefix_is_right_wherever_the_next_prompt_leaves_it(sampling):
    engine, fresh = small_engine(), small_engine()
    engine.keep_prefix = True
    for length in (1, 6, 12, 25):
        for method in ("graft", "retrieve"):
            first = engine.generate(prompt(12, 2, SMALL), 16, **sampling)
            start = first.sequences[:, :length]
            other = torch.cat((start, (start[:, -1:] + 3) % SMALL, prompt(4, length, SMALL)), dim=1)
            for text in (other, start, first.sequences):
                expected = new_tokens(fresh, text, max_new_tokens=12, method=method, **sampling)
                assert new_tokens(engine, text, max_new_tokens=12, method=method, **sampling) == expected


def test_an_end_of_sequence_leaves_a_prefix_that_is_right():
    """The last round went past the end; what it wrote there is no part of the text."""
    engine, fresh = small_engine(), small_engine()
    engine.keep_prefix = True
    full = new_tokens(engine, prompt(4, 2, SMALL), max_new_tokens=40)
    for eos in set(full):
        engine.eos_token_ids = frozenset({eos})
        turn = engine.generate(prompt(4, 2, SMALL), 40).sequences
        engine.eos_token_ids = frozenset()
        text = torch.cat((turn, prompt(3, eos, SMALL)), dim=1)
        out = engine.generate(text, 20)
        assert out.stats.reused >= turn.shape[1] - 12
        assert out.sequences.tolist() == fresh.generate(text, 20).sequences.tolist()


@pytest.mark.parametrize("taken", [1, 7])
def test_a_stream_that_is_closed_leaves_a_prefix_that_is_right(taken):
    """Its last round emitted more than was taken; the next turn goes on from what was."""
    engine, fresh = small_engine(), small_engine()
    engine.keep_prefix = True
    stats = GenerationStats()
    stream = engine.stream(prompt(9, 2, SMALL), 40, stats=stats)
    told = [next(stream) for _ in range(taken)]
    stream.close()
    assert stats.emitted == taken
    text = torch.cat((prompt(9, 2, SMALL), torch.tensor([told]), prompt(3, 1, SMALL)), dim=1)
    out = engine.generate(text, 20)
    assert out.stats.reused >= 8 * (taken > 1)  # before the first round the head has read nothing
    assert out.sequences.tolist() == fresh.generate(text, 20).sequences.tolist()


def test_a_round_that_fails_leaves_no_prefix(monkeypatch):
    engine = small_engine()
    engine.keep_prefix = True
    stream = engine.stream(prompt(9, 2, SMALL), 40)
    next(stream)
    with monkeypatch.context() as broken:
        broken.setattr(engine.target, "verify", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            next(stream)
    assert engine.generate(prompt(9, 2, SMALL), 5).stats.reused == 0


def test_every_token_has_its_source(monkeypatch):
    """A repeating text is found by lookup, where neither head nor matrix has it."""
    engine = small_engine(policy=learned_policy())
    rounds, real = [], engine._round

    def kept(states):
        rounds.append(real(states))
        return rounds[-1]

    monkeypatch.setattr(engine, "_round", kept)
    found = set()
    for seed in range(4):
        rounds.clear()
        stats, seen = GenerationStats(), []
        for _ in engine.stream(prompt(5, seed, SMALL), 60, stats=stats):
            seen.append(stats.sources[-1])
        emitted = [source for ((_, sources),) in rounds for source in sources]
        assert seen == stats.sources == ["prefill", *emitted][: len(seen)]
        assert Counter(seen[1:]) == Counter({name: count for name, count in stats.accepted.items() if count})
        found |= set(seen)
    assert found == {"prefill", "drafted", "matrix", "lookup", "bonus"}
    both = engine.generate([prompt(5, seed, SMALL)[0] for seed in range(2)], 9)
    assert both.stats.sources == both.each[0].sources + both.each[1].sources


@pytest.mark.parametrize("scope", ["request", "frozen"])
def test_what_others_asked_for_does_not_matter(scope):
    def run(engine):
        out = engine.generate(prompt(5, 0, SMALL), 40)
        return out.sequences.tolist(), out.stats.rounds, out.stats.accepted, out.stats.checkpoints

    engine = small_engine()
    engine.retrieval_scope = scope
    matrix = engine.successors.ids_VK.clone()
    alone = run(engine)
    for seed in range(3):
        engine.generate(prompt(9, seed, SMALL), 40, temperature=1.0, seed=seed)
    assert run(engine) == alone
    assert torch.equal(engine.successors.ids_VK, matrix)


def test_the_matrix_of_an_engine_remembers_and_a_frozen_one_never_learns():
    found = {}
    for scope in ("engine", "request", "frozen"):
        engine = small_engine()
        engine.retrieval_scope = scope
        engine.successors = SuccessorMatrix.empty(SMALL, 4, engine.target.device)
        expected = greedy_reference(engine.target.model, prompt(6, 0, SMALL), 30).tolist()
        runs = [engine.generate(prompt(6, 0, SMALL), 30, method="retrieve") for _ in range(2)]
        assert all(run.sequences.tolist() == expected for run in runs)
        found[scope] = [run.stats.rounds for run in runs]
        assert bool((engine.successors.ids_VK >= 0).any()) == (scope == "engine")
    assert found["frozen"] == [29, 29]
    assert found["request"][0] == found["request"][1] == found["engine"][0] < 29
    assert found["engine"][1] <= found["engine"][0]


def test_threads_take_turns():
    engine = small_engine()
    prompts = [prompt(5 + seed, seed, SMALL) for seed in range(4)]
    expected = [engine.generate(ids, 30).sequences.tolist() for ids in prompts]
    inside, overlaps, found = [], [], {}
    forward = engine.target.forward

    def watched(*args):
        inside.append(threading.get_ident())
        overlaps.append(len(inside) > 1)
        out = forward(*args)
        inside.pop()
        return out

    engine.target.forward = watched

    def run(index):
        found[index] = [engine.generate(prompts[index], 30).sequences.tolist() for _ in range(3)]

    threads = [threading.Thread(target=run, args=(index,)) for index in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == {index: [expected[index]] * 3 for index in range(4)}
    assert not any(overlaps)


def test_the_lock_is_not_held_between_two_tokens():
    engine = small_engine()
    stream = engine.stream(prompt(5, 0, SMALL), 30)
    next(stream)
    thread = threading.Thread(target=engine.generate, args=(prompt(6, 0, SMALL), 5))
    thread.start()
    thread.join(timeout=60)
    assert not thread.is_alive()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_new_tokens": 4, "max_length": 9}, "max_new_tokens and max_length are two ways"),
        ({"max_length": 3}, "max_length=3 leaves no room after 3 prompt tokens"),
        ({"max_length": 300}, "limit of 256 positions"),
        ({"stop_strings": "a"}, "stop_strings need a tokenizer"),
        ({"stop_strings": ["a", ""], "tokenizer": tiny_tokenizer()}, "stop_strings has ''"),
        ({"stop_strings": [b"a"], "tokenizer": tiny_tokenizer()}, "stop_strings has b'a'"),
        ({"stop_strings": "a", "tokenizer": "no tokenizer"}, "tokenizer='no tokenizer': pass the target's"),
        ({"stop_strings": 5, "tokenizer": tiny_tokenizer()}, "stop_strings=5: pass a text"),
        ({"logits_processor": 3}, "logits_processor=3: pass a list"),
        ({"logits_processor": [5]}, "logits_processor has 5, which cannot be called"),
        ({"stopping_criteria": 3}, "stopping_criteria=3: pass a list"),
        ({"stopping_criteria": [None]}, "stopping_criteria has None, which cannot be called"),
        ({"plan": 5}, "plan=5: pass a Plan"),
        ({"streamer": 5}, "streamer=5: pass one with put and end"),
        ({"repetition_penalty": "high"}, "repetition_penalty='high': pass a number"),
        ({"top_p": torch.tensor([0.5])}, "top_p=.*: pass a number"),
        ({"min_p": 10**400}, "min_p=.*: pass a number"),
        ({"temperature": 1.0, "top_k": 2.5}, "top_k=2.5: pass a whole number"),
        ({"temperature": None}, "temperature=None"),
        ({"temperature": "hot"}, "temperature='hot'"),
        ({"temperature": float("nan")}, "temperature=nan"),
        ({"max_new_tokens": "8"}, "max_new_tokens='8': pass a whole number"),
        ({"max_new_tokens": torch.tensor([3])}, "max_new_tokens=.*: pass a whole number"),
        ({"max_new_tokens": torch.tensor(3.0)}, "max_new_tokens=.*: pass a whole number"),
        ({"max_new_tokens": torch.tensor(3, device="meta")}, "max_new_tokens=.*: pass a whole number"),
        ({"seed": "x"}, "seed='x': pass a whole number"),
        ({"pad_token_id": "a"}, "pad_token_id='a': pass a whole number"),
        ({"pad_token_id": 1.5}, "pad_token_id=1.5: pass a whole number"),
        ({"pad_token_id": -1}, "pad_token_id=-1: pass a token of the target, 0 to 7"),
        ({"pad_token_id": SMALL}, "pad_token_id=8: pass a token of the target, 0 to 7"),
        ({"pad_token_id": 2**70}, "pad_token_id=1180591620717411303424: pass a token"),
        ({"prepared": True}, "prepared: no such setting; there are (?!.*prepared)"),
        ({"no_repeat_ngram_size": 2}, "no_repeat_ngram_size: no such setting; .* the model's generation_config"),
        ({"generation_config": None}, "generation_config: no such setting"),
        ({"input_ids": "why is the sky"}, r"a prompt of type str holds no integers .*pass tokenizer\(text\)"),
        ({"input_ids": ["why", "is"]}, "a prompt of type str holds no integers"),
        ({"input_ids": None}, "a prompt of type NoneType"),
        ({"input_ids": [1.5, 2.0]}, "a prompt of type float|a prompt is token ids"),
        ({"input_ids": torch.tensor([1.0, 2.0])}, "a prompt is token ids, not torch.float32"),
        ({"input_ids": torch.tensor([True, False])}, "a prompt is token ids, not torch.bool"),
        ({"input_ids": torch.tensor([1, 2]).to_sparse()}, "a prompt is a meta, nested or sparse tensor"),
        ({"input_ids": torch.tensor([1, 2], device="meta")}, "a prompt is a meta, nested or sparse tensor"),
        ({"attention_mask": torch.ones(3).to_sparse()}, "attention_mask is a meta, nested or sparse tensor"),
        ({"input_ids": []}, "an empty list of prompts"),
        ({"input_ids": {"attention_mask": [1]}}, "a prompt with no input_ids"),
        ({"input_ids": {"input_ids": [1], "pixel_values": [0.5]}}, "a prompt with pixel_values"),
        ({"input_ids": {"input_ids": [1], "attention_mask": [1]}, "attention_mask": [1]}, "two attention masks"),
        ({"attention_mask": "111"}, "attention_mask of type str"),
        ({"tokenizer": longer_tokenizer(), "input_ids": [1, VOCAB]}, "token 61 .'<tool>'. outside the vocabulary of 8"),
        ({"tokenizer": longer_tokenizer(), "input_ids": [1, 2**63 - 1]}, "token 9223372036854775807 outside"),
    ],
)
def test_bad_requests_are_refused_before_any_pass(monkeypatch, options, message):
    engine = small_engine()
    monkeypatch.setattr(engine.target, "forward", lambda *_: pytest.fail("the target ran"))
    with pytest.raises(GraftError, match=message):
        engine.generate(**({"input_ids": torch.tensor([1, 2, 3])} | options))


@pytest.mark.parametrize(
    ("settings", "message"),
    [({"retrieval_scope": "session"}, "request, engine, frozen"), ({"prefill_chunk": 0}, "prefill_chunk=0")],
)
def test_bad_settings_of_an_engine_are_refused(settings, message):
    engine = small_engine()
    with pytest.raises(GraftError, match=message):
        GraftEngine(engine.target, engine.policy, engine.head, engine.successors, **settings)
    with pytest.raises(GraftError, match=message):  # before anything is looked for
        GraftEngine.from_pretrained("no bundle", "no target", **settings)


@pytest.mark.parametrize("method", ["graft", "autoregressive"])
def test_no_memory_for_the_caches_says_how_much_and_what_lowers_it(method):
    engine = tiny_engine(tiny_model("llama"))
    engine.target.config.max_position_embeddings = 2**50
    stats = GenerationStats()
    with pytest.raises(GraftError, match=r"no memory on cpu .* [\d,]{15,} bytes. Lower max_new_tokens"):
        next(engine.stream(prompt(5), 2**45, method=method, stats=stats))
    assert stats.emitted == 0
    engine.target.config.max_position_embeddings = 256
    assert engine.generate(prompt(5), 5, method=method).stats.emitted == 5


def test_the_head_drafts_from_a_kept_prefix_what_it_drafts_from_a_fresh_read():
    """What it misread would cost acceptance only, so no output would show it."""
    kept, fresh = small_engine(), small_engine()
    kept.keep_prefix = True
    for length in (6, 12, 20, 26):
        turn = kept.generate(prompt(12, 2, SMALL), 16, method="eagle3").sequences[0]
        text = torch.cat((turn[:length], (turn[length : length + 2] + 3) % SMALL))
        trees = []
        for engine in (kept, fresh):
            stats = GenerationStats()
            with torch.inference_mode():
                state, _ = prefilled(engine, text, 8, GREEDY, engine.policy.eagle3, stats)
                trees.append(engine.speculator.draft([state.speculation])[0][1])
            assert (stats.reused > 0) == (engine is kept)
        assert trees[0].tokens_N.tolist() == trees[1].tokens_N.tolist()
        torch.testing.assert_close(trees[0].logp_N, trees[1].logp_N, atol=1e-3, rtol=1e-3)


def test_numbers_of_other_libraries_are_numbers():
    engine = small_engine()
    settings = {"temperature": 0.5, "seed": 3, "top_k": 20, "top_p": 0.5, "min_p": 0.0625, "repetition_penalty": 1.5}
    expected = new_tokens(engine, prompt(5, 0, SMALL), max_new_tokens=9, **settings)
    for number, whole in ((np.float32, np.int64), (np.float16, np.uint8), (torch.tensor, torch.tensor)):
        read = {name: (whole if isinstance(value, int) else number)(value) for name, value in settings.items()}
        found = new_tokens(engine, prompt(5, 0, SMALL), max_new_tokens=whole(9), pad_token_id=whole(2), **read)
        assert found == expected
    assert Request.of(top_k=np.int64(5), repetition_penalty=2) == Request.of(top_k=5, repetition_penalty=2.0)


@pytest.mark.parametrize("answer", [lambda scores: scores[:, :5], lambda scores: None, lambda scores: scores[0]])
@BOTH
def test_a_processor_that_loses_scores_is_named(sampling, answer):
    with pytest.raises(GraftError, match=r"logits_processor made .* of scores of \[1, 8\]: return one for every token"):
        small_engine().generate(
            prompt(5, 0, SMALL), 4, logits_processor=[lambda ids, scores: answer(scores)], **sampling
        )


def test_a_stream_has_no_logprobs():
    engine = small_engine()
    with pytest.raises(GraftError, match="return_logprobs is for generate alone"):
        next(engine.stream(prompt(5, 0, SMALL), 4, return_logprobs=True))
    assert len(list(engine.stream(prompt(5, 0, SMALL), 4, return_logprobs=False))) == 4
