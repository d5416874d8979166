"""The server: the official client gets what the engine says, and no client's mistake is another's trouble."""

import json
import os
import random
import signal
import socket
import subprocess
import threading
import time
import urllib.error
import urllib.request
from contextlib import contextmanager, suppress
from functools import partial
from urllib.parse import urlsplit

import openai
import pytest
from prometheus_client.parser import text_string_to_metric_families

from graft_inference import GraftEngine, GraftError
from graft_inference.serve import cli as serve_cli
from graft_inference.serve.answer import Answer, Asked, Limits
from graft_inference.serve.metrics import Metrics, proposed
from graft_inference.serve.scheduler import Overloaded, Scheduler
from graft_inference.spelling import StopCutter

from .serving import GRAFT, TEMPLATE, served, write_pair
from .test_engine import prompt
from .tiny import tiny_engine, tiny_model
from .tiny_bundle import tiny_tokenizer

SAID = [{"role": "user", "content": "why not"}]
LONG = {"temperature": 0, "max_tokens": 9_000}
"""It would take half a minute."""


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    return write_pair(tmp_path_factory.mktemp("pair"), positions=12_000)


@pytest.fixture(scope="module")
def engine(bundle):
    return GraftEngine.from_pretrained(bundle, bundle.parent / "target", "cpu", "float32", fallback=False)


@pytest.fixture(scope="module")
def server(bundle):
    with served(bundle) as found:
        yield found


@pytest.fixture(scope="module")
def narrow(bundle):
    """One answer at a time and one that waits; rounds that do not go by time."""
    limits = ["--max-running", "1", "--max-waiting", "1", "--max-body-mib", "1", "--max-model-len", "10000"]
    with served(bundle, "--method", "eagle3", *limits) as found:
        yield found


@contextmanager
def client_of(server):
    with openai.OpenAI(base_url=server.url, api_key="sk-private", max_retries=0) as client:
        yield client


@pytest.fixture
def client(server):
    with client_of(server) as found:
        yield found


def metrics_of(server):
    """Figures by name and labels."""
    with urllib.request.urlopen(f"{server.root}/metrics") as response:
        families = list(text_string_to_metric_families(response.read().decode()))
    return {(one.name, *sorted(one.labels.values())): one.value for family in families for one in family.samples}


def until(holds):
    """Waits for what another thread or process does; the time is no part of any test."""
    for _ in range(600):
        if holds():
            return
        time.sleep(0.05)
    pytest.fail("it did not come to that")


def send(server, body, path="/v1/completions", content_type="application/json"):
    """Sends a request and reads nothing."""
    host, port = urlsplit(server.url).netloc.split(":")
    content = body if isinstance(body, bytes) else json.dumps({"model": "tiny", "prompt": "a"} | body).encode()
    head = f"POST {path} HTTP/1.1\r\nHost: {host}\r\nContent-Type: {content_type}\r\nContent-Length: {len(content)}\r\n"
    connection = socket.create_connection((host, int(port)), timeout=60)
    connection.sendall(f"{head}Connection: close\r\n\r\n".encode() + content)
    return connection


def answered(server, body, **named):
    """Status, headers and JSON of a request as raw as it is."""
    with send(server, body, **named) as connection:
        content = b"".join(iter(lambda: connection.recv(1 << 16), b""))
    head, _, text = content.decode().partition("\r\n\r\n")
    return int(head.split()[1]), head.lower(), json.loads(text)


def chat_ids(tokenizer, messages=SAID, **variables):
    tokenizer.chat_template = TEMPLATE
    text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False, **variables)
    return tokenizer(text).input_ids


def expected(engine, ids, count, **settings):
    return engine.generate(ids, count, **settings).sequences[0, len(ids) :].tolist()


SAMPLINGS = [
    ({"temperature": 0}, {}),
    ({"temperature": 1.5, "seed": 5, "top_p": 1.0}, {"temperature": 1.5, "seed": 5}),
    ({"seed": -7, "top_p": 0.9}, {"temperature": 1.0, "seed": -7, "top_p": 0.9}),
]


@pytest.mark.parametrize("streams", [False, True])
@pytest.mark.parametrize(("asked", "meant"), SAMPLINGS)
def test_a_completion_is_what_the_engine_says(client, engine, asked, meant, streams):
    ids = engine.tokenizer("return self").input_ids
    extra = {"return_token_ids": True}
    said = client.completions.create(
        model="tiny", prompt="return self", max_tokens=24, stream=streams, extra_body=extra, **asked,
        **({"stream_options": {"include_usage": True}} if streams else {}),
    )  # fmt: skip
    tokens = expected(engine, ids, 24, **meant)
    has_ended = tokens[-1] in engine.eos_token_ids
    if streams:
        *chunks, last = said
        assert last.choices == []
        usage, choices = last.usage, [chunk.choices[0] for chunk in chunks]
        assert all(choice.finish_reason is None for choice in choices[:-1])
    else:
        usage, choices = said.usage, said.choices
        assert said.choices[0].prompt_token_ids == ids
    assert [token for choice in choices for token in choice.token_ids] == tokens
    assert "".join(choice.text for choice in choices) == engine.tokenizer.decode(tokens, skip_special_tokens=True)
    assert choices[-1].finish_reason == ("stop" if has_ended else "length")
    assert (usage.prompt_tokens, usage.completion_tokens) == (len(ids), len(tokens))
    assert usage.total_tokens == len(ids) + len(tokens)


@pytest.mark.parametrize("streams", [False, True])
@pytest.mark.parametrize(("asked", "meant"), SAMPLINGS)
def test_a_chat_is_what_the_engine_says(client, engine, asked, meant, streams):
    ids = chat_ids(engine.tokenizer, terse=True)
    extra = {"chat_template_kwargs": {"terse": True}}
    said = client.chat.completions.create(
        model="tiny", messages=SAID, max_completion_tokens=20, stream=streams, extra_body=extra, **asked
    )
    text = engine.tokenizer.decode(expected(engine, ids, 20, **meant), skip_special_tokens=True)
    if streams:
        chunks = list(said)
        assert chunks[0].choices[0].delta.role == "assistant"
        assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == text
        assert all(chunk.usage is None for chunk in chunks)
    else:
        assert said.choices[0].message.content == text
        assert said.usage.prompt_tokens == len(ids)


def test_the_answer_of_a_turn_can_be_sent_back_as_it_came(narrow, engine):
    """The next turn reads only what is new."""
    with client_of(narrow) as client:
        first = (
            client.chat.completions.create(model="tiny", messages=SAID, temperature=0, max_tokens=10).choices[0].message
        )
        parts = [{"type": "text", "text": "and"}, {"type": "text", "text": "then"}]
        messages = [*SAID, first.to_dict(), {"role": "user", "content": parts}]
        second = client.chat.completions.create(model="tiny", messages=messages, temperature=0, max_tokens=10)
    told = [*SAID, {"role": "assistant", "content": first.content}, {"role": "user", "content": "and\nthen"}]
    ids = chat_ids(engine.tokenizer, told)
    assert second.choices[0].message.content == engine.tokenizer.decode(expected(engine, ids, 10))
    assert second.usage.prompt_tokens_details.cached_tokens > 0


def test_a_prompt_may_be_token_ids(client, engine):
    ids = prompt(9)[0].tolist()
    for asked in (ids, [ids]):
        said = client.completions.create(
            model="tiny", prompt=asked, temperature=0, extra_body={"return_token_ids": True, "top_k": -1}
        )
        assert said.choices[0].token_ids == expected(engine, ids, 16)


@pytest.mark.parametrize("streams", [False, True])
def test_a_stop_string_ends_the_answer_and_does_not_stand_in_it(client, engine, streams):
    ids = engine.tokenizer("return self").input_ids
    whole = engine.tokenizer.decode(expected(engine, ids, 40))
    stop = whole[7:10]
    tokens = expected(engine, ids, 40, stop_strings=[stop])
    asked = {"model": "tiny", "prompt": "return self", "temperature": 0, "max_tokens": 40, "stop": ["never", stop]}
    said = client.completions.create(stream=streams, extra_body={"return_token_ids": True}, **asked)
    choices = [chunk.choices[0] for chunk in said] if streams else said.choices
    assert "".join(choice.text for choice in choices) == whole[: whole.index(stop)]
    assert [token for choice in choices for token in choice.token_ids] == tokens
    assert choices[-1].finish_reason == "stop"


def test_stop_strings_are_found_however_the_text_is_parted():
    choose = random.Random(0)
    for _ in range(2_000):
        text = "".join(choose.choices("ab", k=choose.randrange(12)))
        stops = ["".join(choose.choices("ab", k=choose.randrange(1, 5))) for _ in range(choose.randrange(3))]
        ends = [end for end in range(len(text) + 1) if any(text[:end].endswith(stop) for stop in stops)]
        cut = min(ends[0] - len(stop) for stop in stops if text[: ends[0]].endswith(stop)) if ends else len(text)
        cutter, found, place = StopCutter(stops), "", 0
        while place < len(text):
            step = choose.randrange(1, 4)
            found += cutter.put(text[place : place + step])
            assert text[:cut].startswith(found)
            place += step
        assert (found + cutter.end(), cutter.is_cut) == (text[:cut], bool(ends))


def test_clients_take_turns_and_get_what_each_gets_alone(server, engine):
    found = {}

    def ask(text, seed):
        with client_of(server) as client:
            said = client.completions.create(
                model="tiny", prompt=text, temperature=0.9, seed=seed, max_tokens=60, stream=True,
                extra_body={"return_token_ids": True},
            )  # fmt: skip
            found[text] = [token for chunk in said for token in chunk.choices[0].token_ids]

    asked = {f"return {name}": seed for seed, name in enumerate("abcdef")}
    threads = [threading.Thread(target=ask, args=one) for one in asked.items()]
    with client_of(server) as client, client.completions.create(model="tiny", prompt="x", stream=True, **LONG) as long:
        chunks = iter(long)
        next(chunks)
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert next(chunks).choices[0].finish_reason is None, "it goes on while the others come and go"
    for text, seed in asked.items():
        ids = engine.tokenizer(text).input_ids
        assert found[text] == expected(engine, ids, 60, temperature=0.9, seed=seed)


def test_a_client_that_goes_ends_its_answer_and_no_other(server, client):
    before = metrics_of(server)
    with client.completions.create(model="tiny", prompt="x", stream=True, **LONG) as stream:
        next(iter(stream))
    send(server, LONG).close()
    cancelled = ("graft_requests_total", "cancelled")
    until(lambda: metrics_of(server).get(cancelled, 0) >= before.get(cancelled, 0) + 2)
    after = metrics_of(server)
    assert after["graft_requests_running",] == after["graft_requests_waiting",] == 0
    assert after["graft_generated_tokens_total",] < before["graft_generated_tokens_total",] + 2 * LONG["max_tokens"]
    assert client.completions.create(model="tiny", prompt="a", max_tokens=3).usage.completion_tokens


MISTAKES = [
    (b"{", 400, "the body is no JSON", None),
    (b"\xff", 400, "", None),
    (b"[" * 100_000, 400, "", None),
    (b"[]", 400, "", None),
    ({"promt": "a"}, 400, "Unrecognized request argument supplied: promt", "promt"),
    (b'{"prompt": "a", "\\ud800": 1}', 400, "", None),
    (b'{"prompt": "\\ud800"}', 400, "", None),
    (b'{"prompt": "a", "temperature": NaN}', 400, "finite", "temperature"),
    ({"prompt": None}, 400, "prompt: Field required", "prompt"),
    ({"prompt": ""}, 400, "prompt is empty", "prompt"),
    ({"prompt": []}, 400, "prompt is empty", "prompt"),
    ({"prompt": ["a", "b"]}, 400, "send one a request", "prompt"),
    ({"prompt": [999]}, 400, "outside the vocabulary", None),
    ({"prompt": [10**30]}, 400, "refuses the prompt", None),
    ({"max_tokens": 0}, 400, "greater than or equal to 1", "max_tokens"),
    ({"max_tokens": "5"}, 400, "valid integer", "max_tokens"),
    ({"max_tokens": 12_000}, 400, "maximum context length is 12000 tokens", None),
    ({"temperature": -1}, 400, "greater than or equal to 0", "temperature"),
    ({"top_p": 7.0}, 400, "top_p", None),
    ({"stop": [""]}, 400, "none of them empty", "stop"),
    ({"stop": list("abcde")}, 400, "at most 4 texts", "stop"),
    ({"seed": 2**64}, 400, "less than", "seed"),
    ({"n": 2}, 400, "n is not supported", "n"),
    ({"logprobs": 0}, 400, "logprobs is not supported", "logprobs"),
    ({"presence_penalty": 0.5}, 400, "presence_penalty is not supported", "presence_penalty"),
    ({"model": "gpt-4o"}, 404, "the model gpt-4o is not here, tiny is", "model"),
]


@pytest.mark.parametrize(("body", "status", "words", "param"), MISTAKES)
def test_a_mistake_is_told_in_openais_shape(server, body, status, words, param):
    found, _, told = answered(server, body)
    assert found == status
    assert told["error"].keys() == {"message", "type", "param", "code"}
    assert words in told["error"]["message"]
    assert told["error"]["param"] == param or param is None


CHATS = [
    ({"messages": []}, "at least 1 item"),
    ({"messages": [{"role": "user", "content": "odd"}]}, "no odd ones"),
    ({"messages": [{"role": "user", "content": [{"type": "image_url", "text": ""}]}]}, "only text is"),
    ({"messages": [{"role": "tool", "content": "1", "tool_call_id": "x"}]}, "tool_call_id"),
    ({"messages": SAID, "tools": [{"type": "function"}]}, "tools is not supported"),
    ({"messages": SAID, "chat_template_kwargs": {"thinking": True}}, "chat template does not know thinking"),
]


@pytest.mark.parametrize(("body", "words"), CHATS)
def test_chats_that_cannot_be_followed_are_refused(server, body, words):
    content = json.dumps(body).encode()
    status, _, told = answered(server, content, path="/v1/chat/completions")
    assert status == 400
    assert words in told["error"]["message"]


def test_fields_that_ask_for_nothing_are_taken(client):
    nothing = {"n": 1, "logit_bias": {}, "frequency_penalty": 0.0, "user": "me", "best_of": 1, "suffix": None}
    assert client.completions.create(model="tiny", prompt="a", max_tokens=2, **nothing).choices


def test_other_ways_in_are_closed(server):
    assert answered(server, {}, path="/v1/embeddings")[0] == 404
    assert answered(server, {}, content_type="text/plain")[0] == 400, "which any web page may send"
    host, port = urlsplit(server.url).netloc.split(":")
    with socket.create_connection((host, int(port)), timeout=60) as connection:
        connection.sendall(b"GET /v1/models HTTP/1.1\r\nHost: example.com\r\nConnection: close\r\n\r\n")
        assert b" 400 " in connection.recv(1 << 16).splitlines()[0], "a name of its own does not lead here"


def test_models_and_health(server, client):
    [model] = client.models.list().data
    assert (model.id, model.max_model_len) == ("tiny", 12_000)
    assert urllib.request.urlopen(f"{server.root}/health").status == 200


@pytest.mark.parametrize("streams", [False, True])
def test_a_prompt_over_the_limit_is_told(narrow, streams):
    with client_of(narrow) as client, pytest.raises(openai.BadRequestError) as refused:
        client.completions.create(model="tiny", prompt=[5] * 10_000, max_tokens=16, stream=streams)
    assert refused.value.code == "context_length_exceeded"
    assert "maximum context length is 10000 tokens" in refused.value.message
    assert "10000 in the prompt, 16 in the completion" in refused.value.message


def test_a_chat_without_a_number_ends_where_the_context_does(narrow, engine):
    messages = [{"role": "user", "content": "x" * 9_970}]
    room = 10_000 - len(chat_ids(engine.tokenizer, messages))
    with client_of(narrow) as client:
        said = client.chat.completions.create(model="tiny", messages=messages, temperature=0)
        assert 0 < room < 20
        assert said.usage.completion_tokens == room or said.choices[0].finish_reason == "stop"


def test_a_body_over_the_limit_is_told(narrow):
    status, _, told = answered(narrow, {"prompt": "x" * (1 << 20)})
    assert status == 413
    assert "more than 1048576 bytes" in told["error"]["message"]


def test_more_requests_than_may_wait_are_sent_away(narrow):
    running = ("graft_requests_running",)
    with send(narrow, LONG):
        until(lambda: metrics_of(narrow)[running])
        with send(narrow, LONG):
            until(lambda: metrics_of(narrow)["graft_requests_waiting",])
            status, head, told = answered(narrow, {})
            assert (status, told["error"]["type"]) == (503, "overloaded_error")
            assert "retry-after: 2" in head
    until(lambda: not metrics_of(narrow)[running])
    assert answered(narrow, {})[0] == 200


def test_metrics_add_up_to_what_the_engine_did(narrow, engine):
    """On eagle3, whose rounds do not go by time."""
    before = metrics_of(narrow)
    texts = ["return a", "return self", "for x in"]
    with client_of(narrow) as client:
        for text in texts:
            client.completions.create(model="tiny", prompt=text, temperature=0, max_tokens=50)
        with pytest.raises(openai.BadRequestError):
            client.completions.create(model="tiny", prompt="", max_tokens=50)
        with pytest.raises(openai.NotFoundError) as absent:
            client.completions.create(model="other", prompt="a")
        assert absent.value.code == "model_not_found"
    after = metrics_of(narrow)
    grown = {key: value - before.get(key, 0) for key, value in after.items()}
    outs = [engine.generate(engine.tokenizer(text).input_ids, 50, method="eagle3").stats for text in texts]
    assert grown["graft_generated_tokens_total",] == sum(out.emitted for out in outs)
    assert grown["graft_decoded_tokens_total",] == sum(out.emitted - 1 for out in outs)
    assert grown["graft_rounds_total", "eagle3"] == sum(out.rounds for out in outs)
    assert grown["graft_prompt_tokens_total",] == sum(len(engine.tokenizer(text).input_ids) for text in texts)
    assert grown["graft_checkpoint_rounds_total", "d2"] == sum(out.checkpoints["d2"] for out in outs)
    accepted = [value for key, value in grown.items() if key[0] == "graft_accepted_tokens_total"]
    assert sum(accepted) == sum(out.accepted["drafted"] for out in outs) > 0
    first = [1 for out in outs for _, position in proposed(out.sources) if position == 1]
    assert grown["graft_accepted_tokens_total", "1", "drafted"] == len(first)
    assert grown["graft_requests_total", "completed"] == grown["graft_request_seconds_count",] == 3
    assert grown["graft_requests_total", "refused"] == 2
    rounds, decoded = after["graft_rounds_total", "eagle3"], after["graft_decoded_tokens_total",]
    assert after["graft_acceptance_length",] == pytest.approx(decoded / rounds)
    assert after["graft_plan_info", "", "QuotaPlan", "eagle3"] == 1


def test_a_place_in_a_round_counts_from_its_start():
    sources = ["prefill", "drafted", "lookup", "bonus", "bonus", "matrix", "bonus", "drafted"]
    assert proposed(sources) == [("drafted", 1), ("lookup", 2), ("matrix", 1), ("drafted", 1)]


def test_logs_tell_nothing_of_what_was_said(server, client):
    with suppress(openai.BadRequestError):
        client.completions.create(model="tiny", prompt="private words", max_tokens=20_000)
    client.completions.create(model="tiny", prompt="private words", max_tokens=2)
    assert not any("private" in line for line in server.lines)


def limited(tell, count=20):
    asked = Asked(lambda tokenizer: prompt(9)[0], count, {"temperature": 0.0})
    return Answer(asked, tell)


def test_an_error_of_the_engine_is_one_requests_alone(monkeypatch, caplog):
    engine, told, round_ = tiny_engine(tiny_model("llama")), [[], [], []], []
    engine.tokenizer = tiny_tokenizer()
    real = engine._round

    def fails_once(states):
        round_.append(states)
        if len(round_) == 3:
            raise RuntimeError("out of luck")
        return real(states)

    monkeypatch.setattr(engine, "_round", fails_once)
    metrics, ended = Metrics(), threading.Event()
    scheduler = Scheduler(
        engine, "graft", Limits(256, 64), 2, 1,
        lambda answer: (metrics.ended(answer, "graft"), scheduler.unfinished == 0 and ended.set()),
    )  # fmt: skip
    for one in told:
        scheduler.submit(limited(one.append))
    with pytest.raises(Overloaded):
        scheduler.submit(limited(lambda _: None))
    scheduler.start()
    assert ended.wait(60)
    scheduler.end()
    scheduler.join()
    assert not scheduler._thread.is_alive()
    failed = [one for one in told if any(isinstance(piece, RuntimeError) for piece in one)]
    assert len(failed) == 1
    tokens = expected(tiny_engine(tiny_model("llama")), prompt(9)[0], 20)
    for one in told:
        assert one[-1] is None
        if one not in failed:
            assert [token for piece in one[:-1] for token in piece.ids] == tokens
            assert one[-2].finish == "length"
    assert "out of luck" in caplog.text
    assert 'outcome="failed"} 1.0' in metrics.text().decode()
    assert 'outcome="completed"} 2.0' in metrics.text().decode()


class Interrupted:
    """A scheduler's arrivals, into which a signal comes between the count of an answer and its arrival."""

    def __init__(self, scheduler):
        self.scheduler, self.real = scheduler, scheduler._arrivals

    def put(self, one):
        if one is not None:
            self.scheduler.end()
            self.scheduler._thread.join(0.5)
        self.real.put(one)

    def __getattr__(self, name):
        return getattr(self.real, name)


def test_an_answer_that_comes_while_the_server_ends_is_told_so():
    told, limits = [], Limits(256, 64)
    scheduler = Scheduler(tiny_engine(tiny_model("llama")), "graft", limits, 1, 1, lambda answer: None)
    scheduler._arrivals = Interrupted(scheduler)
    scheduler.start()
    scheduler.submit(Answer(Asked(lambda tokenizer: prompt(9)[0], 20, {}), told.append))
    scheduler.join()
    assert not scheduler._thread.is_alive()
    assert scheduler.unfinished == 0
    assert [str(one) for one in told] == ["the server ends", "None"]
    with pytest.raises(Overloaded, match="the server ends"):
        scheduler.submit(Answer(Asked(lambda tokenizer: prompt(9)[0], 20, {}), told.append))


@pytest.mark.parametrize("host", ["127.0.0.1", "127.0.0.2", "localhost", "::1", "0.0.0.0", "::", ""])
def test_only_what_others_reach_is_told(host, capsys):
    """An address of this machine's own needs no note, and has requests by its own names alone."""
    serve_cli._check(serve_cli._parser("graft serve").parse_args(["bundle", "--host", host]))
    told = capsys.readouterr().err
    assert ("can use this server" in told) == (host in ("0.0.0.0", "::", ""))


@pytest.mark.skipif(not socket.has_ipv6, reason="needs IPv6")
def test_the_loopback_of_ipv6_is_one_too(bundle):
    with served(bundle, "--host", "::1") as server:
        with urllib.request.urlopen(f"{server.url}/models", timeout=60) as found:
            assert found.status == 200
        elsewhere = urllib.request.Request(f"{server.url}/models", headers={"Host": "example.com"})
        with pytest.raises(urllib.error.HTTPError, match="400"):
            urllib.request.urlopen(elsewhere, timeout=60)
        assert not any("can use this server" in line for line in server.lines)


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_it_in_good_order_while_it_answers(bundle, how):
    with served(bundle) as server, send(server, LONG | {"stream": True}) as connection:
        begun = connection.recv(1 << 16)
        assert server.end(how) == 0
        rest = b"".join(iter(lambda: connection.recv(1 << 16), b""))
        assert b"the server ends" in begun + rest
        assert not any("Traceback" in line for line in server.lines)


def test_an_address_that_is_taken_and_bad_numbers_are_told_before_the_target_is_loaded(bundle, server):
    port = str(urlsplit(server.url).port)
    run = partial(
        subprocess.run, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"}, check=False
    )
    done = run([*GRAFT, str(bundle), "--port", port])
    assert done.returncode == 2
    assert f"graft serve: cannot listen on 127.0.0.1, port {port}" in done.stderr.splitlines()[-1]
    assert "Loading" not in done.stderr
    for arguments, words in {
        ("--max-running", "0"): "--max-running 0: give at least 1",
        ("--max-model-len", "20000"): "the target's limit is 12000",
    }.items():
        with pytest.raises(GraftError, match=words), served(bundle, *arguments):
            pass
