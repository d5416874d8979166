"""Servers timed from outside: every prompt is asked, figures are what was asked for, and nothing measured is lost."""

import json
import threading
from collections.abc import Callable
from contextlib import ExitStack, contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from click.testing import CliRunner

from graft_inference import GraftEngine, GraftError
from graft_train.cli import main
from graft_train.config.evaluation import EvaluateConfig
from graft_train.data.samples import Sample, read_samples
from graft_train.evaluate import evaluate, served
from graft_train.evaluate.prompts import ANSWERS, asked_of, directory_of
from graft_train.evaluate.server_figures import figures_of, variation_of
from graft_train.evaluate.server_passes import Asking, Server, counts_of
from graft_train.files import write_json
from graft_train.server_tables import rows_of
from graft_train.servers import context_limit
from tests.graft_inference.serving import served as serving

from .test_evaluate import config_for, write_run
from .test_evaluate_suites import IDS, QUESTIONS, TEMPLATE, of_suite

pytestmark = pytest.mark.usefixtures("keyless")


@pytest.fixture
def keyless(monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)


@pytest.fixture
def run_dir(tmp_path):
    return write_run(tmp_path)


class Fake:
    """An OpenAI-compatible server whose answer to a prompt is the prompt's own tokens, two at a time.

    Attributes:
        prompts: of all requests so far.
        together: those of these numbers, counted from 0, are answered once all of them are there.
        at_once: of each request, how many were under way when it came.
        dies_at: the request that it breaks off after the first piece; and all after it.
        tells_ids: whether it knows vLLM's return_token_ids.
        spoils: changes the lines of an answer's stream.
        pages: `/metrics`, call by call, and then the last one again; bytes are all that comes, headers included.
        limit: its max_model_len.
    """

    def __init__(self) -> None:
        self.prompts: list[list[int]] = []
        self.bodies: list[dict] = []
        self.keys: list[str] = []
        self.dies_at: int | None = None
        self.status = 200
        self.tells_ids = True
        self.spoils: Callable[[list], list] = list
        self.model = "tiny"
        self.limit: object = None
        self.pages: list[str | bytes] = [""]
        self.lock = threading.Lock()
        self.together: list[set[int]] = []
        self.barriers: list[threading.Barrier] = []
        self.at_once: list[int] = []
        self.now = 0


@contextmanager
def faking(fake: Fake):
    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *_):
            pass

        def do_GET(self):
            page = ""
            if self.path == "/metrics":
                page = fake.pages.pop(0) if len(fake.pages) > 1 else fake.pages[0]
            elif self.path == "/v1/models":
                page = json.dumps({"data": [{"id": fake.model, "max_model_len": fake.limit}]})
            if isinstance(page, bytes):
                self.wfile.write(page)
                return
            content = page.encode()
            self.send_response(200 if content else 404)
            self.send_header("Content-Length", str(len(content)))
            self.send_header("Content-Type", "application/json")
            self.end_headers()
            self.wfile.write(content)

        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with fake.lock:
                number = len(fake.prompts)
                fake.prompts.append(body["prompt"])
                fake.bodies.append(body)
                fake.keys.append(self.headers["Authorization"])
                fake.now += 1
                fake.at_once.append(fake.now)
            for numbers, barrier in zip(fake.together, fake.barriers, strict=True):
                if number in numbers:
                    barrier.wait(60)
            try:
                with suppress(BrokenPipeError, ConnectionResetError):  # who asked has given up
                    self.answer(body, fake.dies_at is not None and number >= fake.dies_at)
            finally:
                with fake.lock:
                    fake.now -= 1

        def answer(self, body, dies):
            self.send_response(fake.status)
            self.send_header("Content-Type", "text/event-stream")
            self.end_headers()
            ids, lines = body["prompt"][: body["max_tokens"]], []
            for start in range(0, len(ids), 2):
                choice = {"index": 0, "text": "x", "finish_reason": "length" if start + 2 >= len(ids) else None}
                known = {"token_ids": ids[start : start + 2]} if fake.tells_ids else {}
                lines.append({"choices": [choice | known]})
            usage = {"prompt_tokens": 1, "completion_tokens": len(ids), "total_tokens": 1}
            lines.append({"choices": [], "usage": usage})
            for line in lines[:1] if dies else [*fake.spoils(lines), "[DONE]"]:
                said = line if isinstance(line, str) else json.dumps(line)
                self.wfile.write(f"data: {said}\n\n".encode())

    fake.barriers = [threading.Barrier(len(numbers)) for numbers in fake.together]
    http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    http.daemon_threads = True
    threading.Thread(target=http.serve_forever, daemon=True).start()
    fake.url = f"http://127.0.0.1:{http.server_port}/v1"
    try:
        yield fake
    finally:
        http.shutdown()
        http.server_close()


def of_servers(run_dir, *servers, **settings):
    return config_for(run_dir, server=[server.url for server in servers], **settings)


def held_out(run_dir):
    return [sample.prompt_ids for sample in read_samples(run_dir / "data" / "samples.jsonl", "evaluation")]


def found_in(directory):
    return json.loads((directory / "evaluation.json").read_text())


def test_two_servers_of_ours_are_compared(run_dir, capsys):
    """Rounds of both are known from the engine, and the tokens are the same."""
    with ExitStack() as opened:
        servers = [
            opened.enter_context(serving(run_dir / "bundle", "--method", method))
            for method in ("eagle3", "autoregressive")
        ]
        directory = evaluate(of_servers(run_dir, *servers, concurrency=[1, 2], repeats=2))
    evaluation = found_in(directory)
    engine = GraftEngine.from_pretrained(run_dir / "bundle", run_dir / "target", fallback=False)
    outs = [engine.generate(ids, 16, method="eagle3").stats for ids in held_out(run_dir)]
    tokens, rounds = sum(out.emitted for out in outs), sum(out.rounds for out in outs)
    assert [level["concurrency"] for level in evaluation["levels"]] == [1, 2]
    for level in evaluation["levels"]:
        ours, plain = level["servers"]
        for found in (ours, plain):
            assert (found["requests"], found["tokens"]) == (3 * 2, 2 * tokens)
            assert found["tokens_per_second"] > 0 < found["tokens_per_second_in_all"]
            assert found["first_token_ms"]["p95"] >= found["first_token_ms"]["median"] > 0
        assert ours["acceptance_length"] == pytest.approx((tokens - len(outs)) / rounds)
        assert sum(ours["accepted_by_position"]) == pytest.approx(sum(out.accepted["drafted"] for out in outs) / rounds)
        assert (plain["acceptance_length"], plain["accepted_by_position"]) == (1.0, [])
        assert ours["same_answers"] == 1.0
        assert ours["speedup"] == pytest.approx(ours["tokens_per_second"] / plain["tokens_per_second"])
        for name in ("speedup", "speedup_in_all"):
            assert ours[f"{name}_interval"][0] <= ours[f"{name}_interval"][1]
        assert "speedup" not in plain
    report, told = (directory / "report.md").read_text(), capsys.readouterr().out
    assert len([line for line in report.splitlines() if line.startswith("| 127.0.0.1:")]) == 4
    assert f"{servers[0].url}, 1 at a time: the tokens of {servers[1].url} on 100% of the prompts" in report
    assert "3 held-out prompts of the run's own data, of 5-9 tokens" in report
    for row in rows_of(evaluation):
        assert f"| {' | '.join(row)} |" in report
        assert row[2] in told
    assert not (directory / "passes").exists()
    assert not list((run_dir / "bundle").glob("evaluation*")), "the card is of the bundle's own engine"


def test_a_finished_evaluation_asks_nothing(run_dir):
    with faking(Fake()) as fake:
        config = of_servers(run_dir, fake, concurrency=[1], repeats=1)
        first = found_in(evaluate(config))
    assert found_in(evaluate(config)) == first
    assert len(fake.prompts) == 2 + 3, "two warm it up"


def test_every_prompt_is_asked_in_every_pass_as_many_at_a_time_as_said(run_dir):
    fake = Fake()
    fake.together = [{5, 6, 7}, {11, 12, 13}]  # behind two that warm it up, and three of a pass one by one
    with faking(fake):
        evaluation = found_in(evaluate(of_servers(run_dir, fake, concurrency=[3, 1], repeats=2, temperature=0.5)))
    assert [level["concurrency"] for level in evaluation["levels"]] == [1, 3]
    assert all(level["servers"][0]["tokens"] == 2 * (5 + 9 + 7) for level in evaluation["levels"])
    assert fake.at_once == [1, 1, *[1, 1, 1, 1, 2, 3] * 2]
    assert sorted(fake.prompts[2:]) == sorted(4 * held_out(run_dir))
    seeds = {tuple(body["prompt"]): body["seed"] for body in fake.bodies[2:]}
    assert seeds == {tuple(ids): number for number, ids in enumerate(held_out(run_dir))}
    assert {(body["temperature"], body["top_k"], body["stream"]) for body in fake.bodies} == {(0.5, -1, True)}


def test_fewer_prompts_than_requests_at_a_time_are_told(run_dir, capsys):
    with faking(Fake()) as fake:
        evaluation = found_in(evaluate(of_servers(run_dir, fake, repeats=1)))
    assert [level["concurrency"] for level in evaluation["levels"]] == [1, 3]
    assert "3 prompts are at most 3 requests at a time" in capsys.readouterr().out


@pytest.mark.parametrize("dies_at", [2, 6, 13])
def test_a_server_that_dies_is_told_and_no_pass_is_measured_twice(run_dir, dies_at, monkeypatch):
    with faking(Fake()) as fake, faking(Fake()) as other:
        config = of_servers(run_dir, fake, other, concurrency=[1, 2], repeats=2)
        fake.dies_at = dies_at
        with pytest.raises(GraftError, match=rf"{fake.url} .*of 8 passes are kept in .*run the same command") as told:
            evaluate(config)
        [partial] = run_dir.glob("evaluation-*.partial")
        kept = {path.name: path.read_bytes() for path in (partial / "passes").iterdir()}
        assert f" {len(kept)} of 8 passes" in str(told.value)
        assert not (run_dir / partial.stem).exists()
        fake.dies_at, seen = None, {}
        monkeypatch.setenv("OPENAI_API_KEY", "second")  # what was given up may still arrive
        write = served.write_json

        def noting(path, value):
            seen[path.name] = value
            write(path, value)

        monkeypatch.setattr(served, "write_json", noting)
        evaluation = found_in(evaluate(config))
        assert not kept.keys() & seen.keys()
        assert len(kept.keys() | {name for name in seen if name[0].isdigit()}) == 8
        missing = [name for name in seen if name[0].isdigit()]
        assert fake.keys.count("Bearer second") == 2 + 3 * sum(name.endswith("-0.json") for name in missing)
    assert all(server["requests"] == 6 for level in evaluation["levels"] for server in level["servers"])


def test_what_a_server_refuses_names_the_remedy(run_dir):
    for status, words in ((503, "lower evaluation.concurrency"), (400, "regenerate.server_extensions=false")):
        with faking(Fake()) as fake, pytest.raises(GraftError, match=words):
            fake.status = status
            evaluate(of_servers(run_dir, fake))
    with pytest.raises(GraftError, match=r"http://127.0.0.1:9/v1 does not answer"):
        evaluate(config_for(run_dir, server="http://127.0.0.1:9/v1"))


def test_passes_of_another_model_are_not_gone_on_with(run_dir):
    with faking(Fake()) as fake:
        fake.dies_at = 6
        config = of_servers(run_dir, fake, concurrency=[1])
        with pytest.raises(GraftError, match="passes are kept"):
            evaluate(config)
        fake.dies_at, fake.model = None, "other"
        with pytest.raises(GraftError, match=r"has passes of .*tiny.*now the servers have .*other"):
            evaluate(config)


def test_a_server_without_extensions_is_timed_by_its_own_count(run_dir):
    with faking(Fake()) as fake, faking(Fake()) as other:
        fake.tells_ids = False
        config = of_servers(run_dir, fake, other, concurrency=[1], repeats=1)
        config.regenerate.server_extensions = False
        [level] = found_in(evaluate(config))["levels"]
    assert not any("top_k" in body or "return_token_ids" in body for body in fake.bodies)
    assert level["servers"][0]["tokens"] == 5 + 9 + 7
    assert level["servers"][0]["same_answers"] is None
    assert level["servers"][0]["acceptance_length"] is None


def test_later_turns_of_a_suite_stand_behind_the_servers_own_answers(tmp_path):
    from transformers import AutoTokenizer

    run_dir = write_run(tmp_path / "run")
    tokenizer = AutoTokenizer.from_pretrained(run_dir / "target")
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(run_dir / "target")
    (tmp_path / "question.jsonl").write_text("".join(json.dumps(row) + "\n" for row in QUESTIONS))
    expected = asked_of(of_suite(run_dir), tmp_path)
    (tmp_path / ANSWERS).unlink()
    with serving(run_dir / "bundle") as server:
        config = of_suite(run_dir, server=server.url)
        found = served._prompts(config, tmp_path, Server.at(server.url), Asking(12, 0.9, 0, True))
        assert found == expected
        assert sorted(sample.id for sample in found.samples) == IDS
        config = of_suite(run_dir, server=server.url, concurrency=[2])
        assert [level["servers"][0]["requests"] for level in found_in(evaluate(config))["levels"]] == [len(IDS)]


def test_a_server_that_takes_less_than_the_target_bounds_the_prompts(run_dir):
    server = serving(run_dir / "bundle", "--max-model-len", "20")
    with (
        server as there,
        pytest.raises(GraftError, match=r"9 tokens of prompt file1.py@0 exceeds the server's 20 positions"),
    ):
        evaluate(of_servers(run_dir, there))


def timed(tokens, seconds, first=1.0, answer="a"):
    return {
        "tokens": tokens,
        "first_tokens": 1,
        "first_seconds": first,
        "seconds": first + seconds,
        "answer": answer,
    }


def a_pass(*requests, seconds=10.0, counts=None):
    return {"seconds": seconds, "requests": list(requests), "counts": counts}


def test_figures_by_hand():
    """10 and 20 tokens behind the first, in 1 and 2 s where the slow pass does not count; twice as fast."""
    counts = {"rounds": 10.0, "tokens": 25.0, "accepted 1": 10.0, "accepted 2": 5.0}
    ours = [
        a_pass(timed(11, 1.0), timed(21, 2.0, first=3.0), seconds=5.0, counts=counts),
        a_pass(timed(11, 1.0), timed(21, 50.0), seconds=5.0, counts=counts),
    ]
    theirs = [a_pass(timed(11, 2.0), timed(21, 4.0, answer="b"), seconds=16.0)] * 2
    found = figures_of(ours, theirs)
    assert (found["requests"], found["tokens"]) == (4, 64)
    assert found["tokens_per_second_in_all"] == pytest.approx(6.4)
    assert found["tokens_per_second"] == pytest.approx(10.0)
    assert found["first_token_ms"]["median"] == pytest.approx(1000)
    assert found["between_tokens_ms"]["median"] == pytest.approx(100)
    assert found["acceptance_length"] == pytest.approx(2.5)
    assert found["accepted_by_position"] == pytest.approx([1.0, 0.5])
    assert found["speedup"] == pytest.approx(2.0)
    assert found["speedup_interval"] == pytest.approx([2.0, 2.0])
    assert found["speedup_in_all"] == pytest.approx(3.2)
    assert found["speedup_in_all_interval"] == pytest.approx([3.2, 3.2])
    assert found["same_answers"] == 0.5
    assert figures_of(theirs, None)["acceptance_length"] is None
    assert figures_of(ours[:1], theirs[:1])["speedup_in_all_interval"] is None
    with pytest.raises(GraftError, match="every answer ended with its first piece"):
        figures_of([a_pass(timed(1, 0.0))], None)


def test_passes_vary_as_those_of_one_level_do_against_each_other():
    slow, usual, quick = (a_pass(timed(10, 1.0), seconds=seconds) for seconds in (12.0, 10.0, 8.0))
    assert variation_of([[slow, usual, quick], [usual, usual, usual]]) == pytest.approx(0.0)
    assert variation_of([[slow, usual, quick]]) == pytest.approx(0.2)
    assert variation_of([[slow]]) is None


def test_servers_that_were_not_steady_are_told_beside_the_figures(run_dir, capsys, monkeypatch):
    monkeypatch.setattr(served, "variation_of", lambda *_: 0.23)
    with faking(Fake()) as fake:
        directory = evaluate(of_servers(run_dir, fake, concurrency=[1], repeats=2))
    assert "the same passes varied by 23%" in capsys.readouterr().out.replace("\n", " ")
    assert "evaluation.repeats=4" in (directory / "report.md").read_text().partition("## How")[0]


def test_the_figures_of_vllm_are_read():
    page = """# TYPE vllm:spec_decode_num_drafts counter
vllm:spec_decode_num_drafts_total{engine="0",model_name="m"} 100.0
vllm:spec_decode_num_drafts_total{engine="1",model_name="m"} 20.0
# TYPE vllm:spec_decode_num_accepted_tokens counter
vllm:spec_decode_num_accepted_tokens_total{engine="0",model_name="m"} 150.0
# TYPE vllm:spec_decode_num_accepted_tokens_per_pos counter
vllm:spec_decode_num_accepted_tokens_per_pos_total{engine="0",model_name="m",position="0"} 90.0
vllm:spec_decode_num_accepted_tokens_per_pos_total{engine="0",model_name="m",position="1"} 60.0
"""
    assert counts_of(page) == {"rounds": 120.0, "tokens": 270.0, "accepted 1": 90.0, "accepted 2": 60.0}
    assert counts_of("# TYPE up gauge\nup 1.0\n") is None


def counters(rounds, tokens, more=""):
    return (
        f"# TYPE graft_rounds counter\ngraft_rounds_total {rounds}\n"
        f"# TYPE graft_decoded_tokens counter\ngraft_decoded_tokens_total {tokens}\n{more}"
    )


def test_what_a_pass_gains_is_counted_and_not_what_was_there(run_dir):
    with faking(Fake()) as fake:
        fake.pages = [counters(7, 20)]
        found = Server.at(fake.url).run(
            read_samples(run_dir / "data" / "samples.jsonl", "evaluation"), 2, Asking(4, 0.0, 0, True)
        )
    assert found["counts"] == {"rounds": 0.0, "tokens": 0.0}
    assert [one["tokens"] for one in found["requests"]] == [4, 4, 4]
    assert [one["first_tokens"] for one in found["requests"]] == [2, 2, 2]


def within_a_choice(name, value):
    """Spoils the first piece of an answer."""
    return lambda lines: [{"choices": [lines[0]["choices"][0] | {name: value}]}, *lines[1:]]


def counting(value):
    """Spoils the count at the end of an answer."""
    return lambda lines: [*lines[:-1], {"choices": [], "usage": {"completion_tokens": value}}]


@pytest.mark.parametrize(
    ("spoils", "words"),
    [
        pytest.param(lambda lines: [*lines, "{oops"], "JSONDecodeError", id="no JSON"),
        pytest.param(lambda lines: [lines[0], {"choices": None}, *lines[1:]], "TypeError", id="no choices"),
        pytest.param(lambda lines: [{"choices": [None]}, *lines], "AttributeError", id="an empty choice"),
        pytest.param(within_a_choice("token_ids", 5), "TypeError", id="ids that are no list"),
        pytest.param(within_a_choice("token_ids", ["a", "b"]), "TypeError", id="ids that are no numbers"),
        pytest.param(counting("three"), "completion_tokens='three'", id="a count in words"),
        pytest.param(counting(-7), "completion_tokens=-7 in", id="a count below 0"),
        pytest.param(
            counting(1_000_000), "completion_tokens=1000000 in an answer of at most 16", id="a count too high"
        ),
        pytest.param(counting(4), "completion_tokens=4 .* and 5 token ids came", id="a count other than the ids"),
    ],
)
def test_an_answer_that_cannot_be_read_or_be_true_names_the_server(run_dir, spoils, words):
    with faking(Fake()) as fake, pytest.raises(GraftError, match=rf"{fake.url} (does not answer as|counts) .*{words}"):
        fake.spoils = spoils
        evaluate(of_servers(run_dir, fake, concurrency=[1]))


def test_a_whole_answer_that_cannot_be_read_names_the_server():
    """It streams to who asked for no stream."""
    with faking(Fake()) as fake, pytest.raises(GraftError, match=f"{fake.url} does not answer as"):
        Server.at(fake.url).answer(Sample("one", "evaluation", [1, 2]), Asking(4, 0.0, 0, True), None)


def test_a_count_too_high_is_not_believed_without_ids_either(run_dir):
    with faking(Fake()) as fake, pytest.raises(GraftError, match="completion_tokens=17 in an answer of at most 16: "):
        fake.tells_ids, fake.spoils = False, counting(17)
        evaluate(of_servers(run_dir, fake))


@pytest.mark.parametrize(
    "pages",
    [
        pytest.param([b"HTTP/1.0 200 OK\r\nContent-Length: 1000\r\n\r\nabc"], id="broken off"),
        pytest.param([b"junk\r\n\r\n"], id="no HTTP"),
        pytest.param([counters("seven", 20)], id="no number"),
        pytest.param([counters(7, 20), counters("NaN", 40)], id="not a number"),
        pytest.param([counters(7, 20, "graft_accepted_tokens_total 5\n")], id="no position"),
        pytest.param(["# TYPE graft_rounds counter\ngraft_rounds_total 7\n"], id="rounds alone"),
        pytest.param([counters(7, 20), counters(3, 40)], id="fewer rounds"),
        pytest.param([counters(7, 20), counters(9, 10)], id="fewer tokens"),
    ],
)
def test_metrics_that_cannot_be_read_or_be_true_are_as_none(run_dir, pages):
    samples = read_samples(run_dir / "data" / "samples.jsonl", "evaluation")
    with faking(Fake()) as fake:
        fake.pages = [counters(7, 20), counters(9, 24)]
        good = Server.at(fake.url).run(samples, 1, Asking(16, 0.0, 0, True))
        fake.pages = list(pages)
        bad = Server.at(fake.url).run(samples, 1, Asking(16, 0.0, 0, True))
    assert (good["counts"], bad["counts"]) == ({"rounds": 2.0, "tokens": 4.0}, None)
    assert figures_of([good], None)["acceptance_length"] == 2.0
    assert figures_of([bad], None)["acceptance_length"] is None


@pytest.mark.parametrize(("limit", "found"), [(20, 20), (0, None), (-5, None), ("20", None), (None, None)])
def test_a_limit_that_cannot_be_true_is_none(limit, found):
    with faking(Fake()) as fake:
        fake.limit = limit
        assert context_limit([fake.url]) == found


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"server": "localhost:8000"}, "must be one http"),
        ({"server": []}, "must be one http"),
        ({"server": "http://me:key@host/v1"}, "OPENAI_API_KEY"),
        ({"server": ["http://a/v1", "http://a/v1/"]}, "names a server twice"),
        ({"concurrency": [0]}, "each at least 1"),
        ({"concurrency": []}, "must be a list"),
        ({"concurrency": [8, 8]}, "there once"),
    ],
)
def test_impossible_settings_are_refused(settings, words):
    with pytest.raises(GraftError, match=words):
        EvaluateConfig(**settings)


def test_servers_have_directories_of_their_own():
    urls = ["http://localhost:8000/v1", "https://host/b/v1"]
    assert directory_of(EvaluateConfig(server=urls[0])) == "evaluation-server-localhost-8000"
    assert directory_of(EvaluateConfig(server=urls, suite="gsm8k")) == "evaluation-gsm8k-server-localhost-8000-host-b"


def test_the_command_takes_one_address_or_several(run_dir):
    """As Hydra reads them."""
    with faking(Fake()) as fake, faking(Fake()) as other:
        for given in (fake.url, f"[{fake.url},{other.url}]"):
            done = CliRunner().invoke(
                main,
                ["evaluate", f"run_dir={run_dir}", f"target.name_or_path={run_dir / 'target'}",
                 f"evaluation.server={given}", "evaluation.concurrency=[1]", "evaluation.repeats=1",
                 "evaluation.max_new_tokens=4"],
            )  # fmt: skip
            assert done.exit_code == 0, done.output
    assert len(list(run_dir.glob("evaluation-server-*"))) == 2


def test_an_evaluation_of_the_engine_is_the_same_as_before_there_were_servers(run_dir):
    """Or finished ones would have been made with other settings."""
    record = json.loads((evaluate(config_for(run_dir, prompts=1, repeats=1)) / "stage.json").read_text())
    assert not {"server", "concurrency"} & record["settings"].keys()
    write_json(run_dir / "evaluation" / "stage.json", record)
