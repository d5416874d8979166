"""Answers from OpenAI-compatible servers: exact tokens, and none lost or doubled whatever fails."""

import multiprocessing
import os
import signal
import time

import pytest

import graft_train.regenerate.servers as module
from graft_inference.errors import GraftError
from graft_train.data.chat import Chat
from graft_train.data.prompts import Prompt
from graft_train.data.samples import read_samples
from graft_train.regenerate import RegenerateConfig
from graft_train.regenerate.servers import ask_servers
from tests.graft_train.regenerate.server import END, Server, answer_to, serving
from tests.graft_train.tiny_chat import VOCABULARY, word_tokenizer, words

PROMPTS = [Prompt(f"p{n}", [3, 9 + n % 20, 1, 4 + n // 20]) for n in range(24)]
LIMIT = 4


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch):
    monkeypatch.setattr("openai._base_client.INITIAL_RETRY_DELAY", 0.001)
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)


def settings(*servers, **changes):
    urls = [server.url for server in servers]
    return RegenerateConfig(base_url=urls, max_new_tokens=LIMIT, batch=4, temperatures=[0.0, 0.7], **changes)


def ask(path, *servers, prompts=PROMPTS, **changes):
    ask_servers(
        prompts, path, settings(*servers, **changes), 100, Chat(word_tokenizer(None), {END}, None, len(VOCABULARY))
    )


def assert_complete(path, prompts=PROMPTS):
    samples = read_samples(path, "train")
    assert sorted(sample.id for sample in samples) == sorted(prompt.id for prompt in prompts)
    by_id = {prompt.id: prompt for prompt in prompts}
    for sample in samples:
        assert sample.prompt_ids == by_id[sample.id].ids
        assert sample.answer_ids == answer_to(sample.prompt_ids, LIMIT)


def test_exact_tokens_come_back_and_sampling_parameters_are_sent_and_kept(tmp_path, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    with serving(Server()) as server:
        ask(tmp_path / "s", server)
    assert_complete(tmp_path / "s")
    sent = {tuple(request["prompt"]): request for request in server.requests}
    for number, prompt in enumerate(PROMPTS):
        request = sent[tuple(prompt.ids)]
        assert request["temperature"] == [0.0, 0.7][number % 2]
        assert request["seed"] == 100 + number
        assert (request["top_p"], request["top_k"], request["return_token_ids"]) == (1.0, -1, True)
        assert request["authorization"] == "Bearer secret"
    for sample in read_samples(tmp_path / "s", "train"):
        assert sample.sampling.items() <= sent[tuple(sample.prompt_ids)].items()
        assert sample.sampling["max_tokens"] == LIMIT


def test_failing_requests_are_repeated(tmp_path):
    def refuse(number):
        return {0: (503, "loading"), 1: (429, "busy"), 5: (0, ""), 9: (500, "oops"), 10: (500, "oops")}.get(number)

    with serving(Server(refuse=refuse)) as server:
        ask(tmp_path / "s", server)
    assert_complete(tmp_path / "s")
    assert len(server.requests) == len(PROMPTS) + 5


def test_many_servers_share_the_prompts_and_take_over_from_one_that_fails(tmp_path):
    failing = Server(refuse=lambda number: (503, "gone") if number >= 5 else None)
    with serving(Server()) as one, serving(failing) as two:
        ask(tmp_path / "s", one, two, retries=1)
    assert_complete(tmp_path / "s")
    assert (one.answers, two.answers) == (len(PROMPTS) - 5, 5)


def test_without_a_server_that_answers_the_error_says_why_and_what_was_answered_is_kept(tmp_path):
    path = tmp_path / "s"
    with (
        serving(Server(refuse=lambda number: (503, "out of memory") if number >= 7 else None)) as server,
        pytest.raises(GraftError, match=r"no server answers .*503 .*out of memory.* 17 prompts are left"),
    ):
        ask(path, server, retries=1)
    assert len(read_samples(path, "train")) == 7
    with serving(Server()) as server:
        ask(path, server)
    assert_complete(path)
    assert server.answers == 17


def test_a_closed_port_is_no_server(tmp_path):
    with serving(Server()) as server:
        pass
    with pytest.raises(GraftError, match=r"no server answers .*Connect"):
        ask(tmp_path / "s", server, retries=1)


def test_refusals_that_would_repeat_themselves_end_it_at_once(tmp_path):
    with (
        serving(Server(refuse=lambda number: (400, "unknown field top_k"))) as server,
        pytest.raises(GraftError, match=r"refuses: 400 .*unknown field top_k.*regenerate\.server_extensions"),
    ):
        ask(tmp_path / "s", server)
    assert len(server.requests) <= module.IN_A_ROW + 3  # and what was in flight
    server.url = server.url.removesuffix("/v1")
    with serving(Server()) as live, pytest.raises(GraftError, match=r"/models refuses: 404.*ends in /v1"):
        live.url = live.url.removesuffix("/v1")
        ask(tmp_path / "s", live)


def test_a_kill_in_the_middle_loses_and_doubles_nothing(tmp_path):
    path = tmp_path / "s"

    def slow(number):
        time.sleep(0.01)

    with serving(Server(refuse=slow)) as server:
        killed = multiprocessing.get_context("fork").Process(target=ask, args=(path, server))
        killed.start()
        deadline = time.monotonic() + 60
        while (not path.exists() or path.read_bytes().count(b"\n") < 7) and time.monotonic() < deadline:
            time.sleep(0.002)
        os.kill(killed.pid, signal.SIGKILL)
        killed.join()
    kept = len(read_samples(path, "train"))
    assert 7 <= kept < len(PROMPTS)
    with path.open("ab") as file:  # what a kill in the middle of a write leaves
        file.write(path.read_bytes().splitlines()[0][:50])
    with serving(Server()) as server:
        ask(path, server)
    assert_complete(path)
    assert server.answers == len(PROMPTS) - kept


@pytest.mark.parametrize("stop", ["matched_stop", "stop_reason", None])
def test_text_is_tokenised_again_where_no_tokens_come(tmp_path, stop, capsys):
    def as_text(prompt, ids):
        text = words([token for token in ids if token != END])
        return {"text": text} | ({stop: END} if stop and ids[-1] == END else {})

    with serving(Server(completion=as_text)) as server:
        ask(tmp_path / "s", server)
    assert_complete(tmp_path / "s")
    assert f"{len(PROMPTS)} answers came back as text" in capsys.readouterr().out


def test_a_plain_server_is_sent_openais_fields_alone(tmp_path):
    with serving(Server()) as server:
        ask(tmp_path / "s", server, prompts=PROMPTS[:1], server_extensions=False)
    assert server.requests[0].keys() - {"authorization"} == {
        "model", "prompt", "temperature", "top_p", "seed", "max_tokens",
    }  # fmt: skip


def test_an_end_that_is_not_among_the_tokens_is_added(tmp_path):
    with serving(Server(completion=lambda prompt, ids: {"token_ids": [t for t in ids if t != END]})) as server:
        ask(tmp_path / "s", server)
    assert_complete(tmp_path / "s")


@pytest.mark.parametrize(
    ("completion", "complaint"),
    [
        (lambda prompt, ids: {"text": "no such word"}, "cannot give back: 'no such word'"),
        (lambda prompt, ids: {"token_ids": ids, "prompt_token_ids": [0, *prompt]}, "prompt p.*changed the tokens"),
        (lambda prompt, ids: {"token_ids": ids, "finish_reason": "abort"}, "did not finish .* abort"),
        (lambda prompt, ids: {"token_ids": [], "finish_reason": "length"}, "did not finish .* 0 tokens"),
        (lambda prompt, ids: {"text": None, "finish_reason": None}, "sent no completion"),
    ],
)
def test_what_is_no_answer_is_named(tmp_path, completion, complaint):
    with serving(Server(completion=completion)) as server, pytest.raises(GraftError, match=complaint):
        ask(tmp_path / "s", server)
    assert (tmp_path / "s").read_bytes() == b""


def refusing(wrong, choice):
    """Gives this choice to these prompts, and answers to all others."""

    def completion(prompt, ids):
        return choice if prompt in [one.ids for one in wrong] else {"token_ids": ids}

    return Server(completion=completion)


@pytest.mark.parametrize(
    ("choice", "complaint"),
    [
        ({"token_ids": [9], "finish_reason": "abort"}, "finish_reason abort"),
        ({"token_ids": [9], "finish_reason": "content_filter"}, "finish_reason content_filter"),
        ({"token_ids": [99, END]}, "None (99), but the target's embedding matrix has 35 rows"),
        ({"text": "half \ud83d of it"}, "tokenizer refuses"),
        ({"text": None, "token_ids": None}, "sent no completion"),
    ],
)
def test_a_prompt_without_a_usable_answer_is_named_and_costs_no_other(tmp_path, choice, complaint, capsys):
    wrong = [Prompt("bad", [3, 9, 9, 4], "chats.jsonl, line 7"), Prompt("worse", [3, 9, 9, 5], "chats.jsonl, line 8")]
    with serving(refusing(wrong, choice)) as server:
        ask(tmp_path / "s", server, prompts=[wrong[0], *PROMPTS, wrong[1]])
    assert_complete(tmp_path / "s")
    said = capsys.readouterr().out
    assert "2 of 26 prompts have no answer" in said
    assert "prompt bad (chats.jsonl, line 7): " in said
    assert complaint in said


@pytest.mark.parametrize("status", [400, 413, 422])
def test_a_prompt_that_a_server_refuses_is_asked_once_more_and_left_out(tmp_path, status, capsys):
    server = Server()
    server.refuse = lambda number: (status, "a filter") if server.requests[number]["prompt"] == PROMPTS[5].ids else None
    with serving(server):
        ask(tmp_path / "s", server)
    assert_complete(tmp_path / "s", PROMPTS[:5] + PROMPTS[6:])
    said = capsys.readouterr().out
    assert "1 of 24 prompts have no answer" in said
    assert f"prompt p5: {server.url}/completions refuses: {status}" in said
    assert "a filter" in said
    assert [request["prompt"] for request in server.requests].count(PROMPTS[5].ids) == 2


def test_a_prompt_that_a_server_fails_at_while_it_answers_others_is_left_out(tmp_path, capsys):
    def fail(number):
        if server.requests[number]["prompt"] != PROMPTS[5].ids:
            return None
        deadline = time.monotonic() + 60
        while server.answers < 15 and time.monotonic() < deadline:  # the others' answers come first
            time.sleep(0.001)
        return 500, "an assertion"

    server = Server(refuse=fail)
    with serving(server):
        ask(tmp_path / "s", server, retries=1)
    assert_complete(tmp_path / "s", PROMPTS[:5] + PROMPTS[6:])
    assert "prompt p5: 500" in capsys.readouterr().out


def test_a_server_that_only_fails_is_no_server(tmp_path):
    with (
        serving(Server(refuse=lambda number: (500, "an assertion") if number >= 8 else None)) as server,
        pytest.raises(GraftError, match=r"no server answers .*500 .*an assertion"),
    ):
        ask(tmp_path / "s", server, retries=1)
    assert len(read_samples(tmp_path / "s", "train")) == 8


@pytest.mark.parametrize("body", [b'{"choices": [', b"<html>log in</html>", b"[1]", b"{}", b"\xff"])
def test_a_body_that_is_no_completion_is_a_refusal_of_one_prompt(tmp_path, capsys, body):
    with serving(Server(refuse=lambda number: (200, body) if number in (0, 3) else None)) as server:
        ask(tmp_path / "s", server)
    assert_complete(tmp_path / "s")
    server.refuse = lambda number: (200, body)
    with serving(server), pytest.raises(GraftError, match=r"/completions sent something else|sent no completion"):
        ask(tmp_path / "all", server)


def test_a_refusal_that_passes_costs_nothing(tmp_path, capsys):
    with serving(Server(refuse=lambda number: (400, "not yet") if number in (0, 3) else None)) as server:
        ask(tmp_path / "s", server)
    assert_complete(tmp_path / "s")
    assert "no answer" not in capsys.readouterr().out


def test_a_server_that_begins_to_refuse_everything_ends_the_run_and_loses_nothing(tmp_path):
    path = tmp_path / "s"
    with (
        serving(Server(refuse=lambda number: (400, "another model") if number >= 10 else None)) as server,
        pytest.raises(GraftError, match=r"prompt p.* refuses: 400 .*another model.* with 8 prompts in a row"),
    ):
        ask(path, server)
    assert len(read_samples(path, "train")) == 10
    with serving(Server()) as server:
        ask(path, server)
    assert_complete(path)


def test_few_prompts_all_refused_are_no_finished_run(tmp_path):
    with (
        serving(Server(refuse=lambda number: (400, "unknown field"))) as server,
        pytest.raises(GraftError, match=r"none of 3 prompts was answered; prompt p.* 400 .*unknown field"),
    ):
        ask(tmp_path / "s", server, prompts=PROMPTS[:3])


@pytest.mark.parametrize("status", [401, 403, 404])
def test_a_refusal_of_whoever_asks_ends_it_at_once(tmp_path, status):
    with (
        serving(Server(refuse=lambda number: (status, "who are you"))) as server,
        pytest.raises(GraftError, match=f"refuses: {status}"),
    ):
        ask(tmp_path / "s", server)
    assert len(server.requests) <= 4  # what was in flight


@pytest.mark.parametrize(
    "completion",
    [
        lambda ids: {"token_ids": [*ids, END]},
        lambda ids: {"token_ids": [*ids, END, END, 9]},
        lambda ids: {"token_ids": ids, "stop_reason": None},
        lambda ids: {"token_ids": ids, "matched_stop": END},
        lambda ids: {"token_ids": [*ids, 8], "stop_reason": 8},  # one that the target's files do not tell
        lambda ids: {"token_ids": ids, "stop_reason": 8},
    ],
)
def test_a_finished_answer_has_its_end_exactly_once(tmp_path, completion):
    def finished(prompt, ids):
        return completion([token for token in ids if token != END]) | {"finish_reason": "stop"}

    with serving(Server(completion=finished)) as server:
        ask(tmp_path / "s", server)
    for sample in read_samples(tmp_path / "s", "train"):
        written = [token for token in answer_to(sample.prompt_ids, LIMIT) if token != END]
        assert sample.answer_ids[:-1] == written
        assert sample.answer_ids[-1] in (END, 8)


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"base_url": "localhost:8000"}, "must be one http"),
        ({"answers": "mine"}, "choose target or data"),
        ({"temperatures": []}, "must be a list of numbers"),
        ({"batch": 0}, "at least 1"),
    ],
)
def test_bad_settings_are_named(changes, complaint):
    with pytest.raises(GraftError, match=complaint):
        RegenerateConfig(**changes)
