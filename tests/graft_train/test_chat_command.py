"""`graft chat`: each turn is what the target would answer to the whole conversation; who proposed a token is shown."""

import io
import json
import re
import signal
import sys
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import pytest
from click.testing import CliRunner
from rich.color import Color
from rich.console import Console
from rich.text import Text
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from graft_inference import METHODS, GenerationStats, GraftError
from graft_train import chat, cli
from tests.graft_inference.tiny import VOCAB, learned_policy, tiny_model
from tests.graft_inference.tiny_bundle import tiny_tokenizer, write_bundle, write_target

TEMPLATE = (
    "{% for m in messages %}{% if m.content == 'odd' %}{{ raise_exception('no odd ones') }}{% endif %}"
    "{{ m.role }} {{ m.content }}\n{% endfor %}assistant {% if terse %}terse {% endif %}"
)
OPTIONS = ("--device", "cpu", "--dtype", "float32")
COLOURS = {"drafted": "green", "lookup": "magenta", "matrix": "cyan", "bonus": "default", "prefill": "default"}


def templated(template=TEMPLATE):
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = template
    return tokenizer


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    """With plans of every source; graft.json names the target beside it."""
    root = tmp_path_factory.mktemp("pair")
    target = write_target(root / "target")
    templated().save_pretrained(target)
    directory = write_bundle(root / "bundle", target)
    graft = json.loads((directory / "graft.json").read_text()) | {"policy": learned_policy().to_dict()}
    (directory / "graft.json").write_text(json.dumps(graft))
    return str(directory)


def piped(bundle, text, *arguments):
    return CliRunner().invoke(cli.main, ["chat", bundle, *OPTIONS, *arguments], input=text)


def conversation(bundle, *arguments):
    options = chat.ChatOptions(**cli.main.commands["chat"].make_context("chat", [bundle, *OPTIONS, *arguments]).params)
    return chat._conversation(options)


@pytest.fixture(scope="module")
def talk(bundle):
    """One conversation, begun anew by each test; so small a target would soon be left to itself."""
    found = conversation(bundle, "--max-new-tokens", "30")
    found.engine.fallback = False
    return found


def expected(turns, count, before=(), **told):
    """The target's own greedy answers, each to all that was said before."""
    model, tokenizer, messages, answers = tiny_model("llama"), templated(), list(before), []
    for text in turns:
        messages.append({"role": "user", "content": text})
        prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False, **told)
        ids = tokenizer(prompt, return_tensors="pt").input_ids
        out = model.generate(ids, max_new_tokens=count)[0, ids.shape[1] :]
        answers.append(tokenizer.decode(out, skip_special_tokens=True))
        messages.append({"role": "assistant", "content": answers[-1]})
    return answers


@contextmanager
def recording(stats, pieces, then=lambda: None):
    def show(piece, source):
        pieces.append((piece, source))
        then()

    yield show


@pytest.mark.parametrize("method", METHODS)
def test_every_line_of_a_pipe_is_a_turn_answered_in_plain_text(bundle, monkeypatch, method):
    monkeypatch.setattr(chat, "load_engine", partial(chat.load_engine, fallback=False))  # which goes by time
    turns = ["why not", "and then", "go on"]
    done = piped(bundle, "\n".join(turns), "--method", method, "--max-new-tokens", "20")
    assert done.exit_code == 0
    assert done.stdout == "".join(answer + "\n" for answer in expected(turns, 20))
    figures = [line for line in done.stderr.splitlines() if "acceptance length" in line]
    counts = [sum(map(int, re.findall(r"(?:head|lookup|matrix|target) (\d+)", line))) for line in figures]
    assert counts == [20] * 3
    kept = [int(line.split("|")[-1].removesuffix(" kept")) for line in figures]
    assert kept[0] == 0
    assert kept[2] > kept[1] > len("user why not\nassistant ")
    assert "\x1b" not in done.output


def test_without_a_bundle_the_target_alone_answers(bundle):
    done = CliRunner().invoke(cli.main, ["chat", *OPTIONS, "--max-new-tokens", "20"], input="why not\n")
    assert (done.exit_code, done.stdout) == (2, "")
    assert "without a bundle nothing says which model to run: pass --target" in done.stderr

    done = CliRunner().invoke(cli.main, ["chat", "--target", "no/such/target", "--method", "eagle3"], input="why not\n")
    assert (done.exit_code, done.stdout) == (2, "")
    assert "--method eagle3 drafts, and without a bundle there is no head" in done.stderr

    target = str(Path(bundle).parent / "target")
    done = CliRunner().invoke(
        cli.main, ["chat", "--target", target, *OPTIONS, "--max-new-tokens", "20"], input="why not\n"
    )
    assert done.stdout == expected(["why not"], 20)[0] + "\n"
    assert "head 0 matrix 0 lookup" in done.stderr


def test_the_system_prompt_and_variables_reach_the_template(bundle):
    arguments = ["--system", "be good", "--template-variable", "terse=true", "--max-new-tokens", "15"]
    done = piped(bundle, "why not\n", *arguments)
    said = [{"role": "system", "content": "be good"}]
    assert done.stdout == expected(["why not"], 15, said, terse=True)[0] + "\n"


def test_new_forgets_all_but_the_system_prompt_and_exit_leaves(bundle):
    done = piped(
        bundle, "why not\n\n/new\nwhy not\n/exit\nnever asked\n", "--max-new-tokens", "12", "--system", "be good"
    )
    said = [{"role": "system", "content": "be good"}]
    assert done.stdout == 2 * (expected(["why not"], 12, said)[0] + "\n")


def test_the_seed_decides_a_sample(bundle):
    def sample(seed):
        return piped(bundle, "why not\n", "--temperature", "5", "--max-new-tokens", "20", "--seed", seed).stdout

    assert sample("1") == sample("1") != sample("2")


def test_each_piece_comes_with_the_source_that_its_round_says(talk, monkeypatch):
    talk.begin()
    rounds, real = [], talk.engine._round

    def kept(states):
        rounds.append(real(states))
        return rounds[-1]

    monkeypatch.setattr(talk.engine, "_round", kept)
    found = set()
    for text in ("why not", "and then", "on and on"):
        rounds.clear()
        pieces = []
        talk.answer(text, lambda stats, pieces=pieces: recording(stats, pieces))
        *pieces, (rest, _) = pieces
        sources = ["prefill", *(source for ((_, sources),) in rounds for source in sources)]
        assert [source for _, source in pieces] == sources[: len(pieces)]
        assert "".join(piece for piece, _ in pieces) + rest == talk.messages[-1]["content"]
        found |= set(sources)
    assert found == set(COLOURS)


def test_tokens_have_the_colour_of_their_source_and_lines_break_between_words():
    pieces = [("alpha ", "prefill"), ("beta ", "drafted"), ("gam", "lookup"), ("ma ", "matrix"), ("delta\n", "bonus")]
    pieces += [
        ("\n", "drafted"),
        ("  x = [1]\n", "lookup"),
        ("omega ", "drafted"),
        ("e" * 45, "matrix"),
        ("end", "bonus"),
    ]
    console = Console(file=io.StringIO(), record=True, width=20, color_system="standard")
    stats = GenerationStats()
    with chat.coloured(console)(stats) as show:
        for piece, source in pieces:
            stats.count(source)
            show(piece, source)
    lines = Text.from_ansi(console.export_text(styles=True)).split("\n")[3:-1]  # between legend and figures
    assert [line.plain.rstrip() for line in lines] == [
        "alpha beta gamma", "delta", "", "  x = [1]", "omega", "e" * 20, "e" * 20, "eeeeeend",
    ]  # fmt: skip
    shown = [
        (character, line.get_style_at_offset(console, place).color)
        for line in lines
        for place, character in enumerate(line.plain)
        if not character.isspace()
    ]
    shown = [(character, color.number if color else None) for character, color in shown]
    assert shown == [
        (character, Color.parse(COLOURS[source]).number)
        for piece, source in pieces
        for character in piece
        if not character.isspace()
    ]


def test_an_interrupt_stops_the_answer_and_keeps_the_chat(talk):
    talk.begin()
    before, pieces = signal.getsignal(signal.SIGINT), []

    def interrupt():
        if len(pieces) == 7:
            signal.raise_signal(signal.SIGINT)

    assert talk.answer("why not", lambda stats: recording(stats, pieces, interrupt))
    assert signal.getsignal(signal.SIGINT) is before
    said = "".join(piece for piece, _ in pieces)
    assert len(pieces) == 8, "seven tokens, and what was held back"
    assert expected(["why not"], 30)[0].startswith(said)
    assert talk.messages[-1] == {"role": "assistant", "content": said}

    seen = []

    @contextmanager
    def screen(stats):
        seen.append(stats)
        yield lambda piece, source: None

    assert not talk.answer("and then", screen)
    assert seen[0].reused >= len(templated()("user why not\nassistant ").input_ids)
    assert talk.messages[-1]["content"] == expected(["and then"], 30, talk.messages[:-2])[0]


def test_a_second_interrupt_is_none_of_the_answers_business():
    with chat._interruptible() as interrupted:
        signal.raise_signal(signal.SIGINT)
        assert interrupted.is_set()
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)


def test_an_interrupt_ends_a_pipe(bundle, monkeypatch):
    screen = lambda stats: recording(stats, [], lambda: signal.raise_signal(signal.SIGINT))  # noqa: E731
    monkeypatch.setattr(chat, "plain", screen)
    assert piped(bundle, "why not\nand then\n").exit_code == 130


def test_a_terminal_asks_on_after_a_mistake_and_a_line_that_was_given_up(bundle, monkeypatch, capsys):
    typed = iter([KeyboardInterrupt, "odd", "why not", "x" * 300, "/new", "why not", EOFError])

    def ask(prompt):
        assert prompt == "> "
        line = next(typed)
        if isinstance(line, str):
            return line
        raise line

    monkeypatch.setattr("builtins.input", ask)
    for stream in (sys.stdin, sys.stdout):
        monkeypatch.setattr(stream, "isatty", lambda: True, raising=False)
    cli.main(["chat", bundle, *OPTIONS, "--plain", "--max-new-tokens", "9"], standalone_mode=False)
    printed = capsys.readouterr()
    answer = expected(["why not"], 9)[0]
    assert printed.out.split("\n") == ["", answer, answer, "", ""]
    assert "error: the target's tokenizer refuses the prompt: no odd ones" in printed.err
    assert "the target's limit is 256: /new begins a new one" in printed.err


def test_an_answer_that_was_cut_is_told(bundle, talk, monkeypatch, capsys):
    talk.begin()
    ignore = lambda stats: recording(stats, [])  # noqa: E731
    talk.answer("why not", ignore)
    assert capsys.readouterr().err == "cut: --max-new-tokens 30\n"
    talk.begin()
    talk.answer("x" * 220, ignore)
    assert capsys.readouterr().err == "the target's limit is reached: /new\n"
    monkeypatch.setattr(talk.engine, "eos_token_ids", frozenset(range(VOCAB)))
    talk.begin()
    talk.answer("why not", ignore)
    assert capsys.readouterr().err == ""


def pieces_of(tokenizer, ids):
    spelling = chat.Spelling(tokenizer)
    pieces = [*map(spelling.put, ids), spelling.end()]
    assert spelling.text == "".join(pieces)
    return pieces


def test_characters_of_several_tokens_come_whole():
    tokenizer = tiny_tokenizer()
    ids = tokenizer("a\u00e9 b").input_ids
    assert pieces_of(tokenizer, ids) == ["a", "", "\u00e9", " ", "b", ""]
    assert pieces_of(tokenizer, ids[:2]) == ["a", "", "\ufffd"], "a half is told in the end"
    assert pieces_of(tokenizer, [*ids[:1], tokenizer.eos_token_id, *ids[1:]]) == ["a", "", "", "\u00e9", " ", "b", ""]


def test_spaces_that_a_decoder_strips_at_a_texts_beginning_are_kept():
    vocabulary = {"\u2581the": 0, "\u2581cat": 1, "s": 2, "<end>": 3, "\u2581.": 4}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<end>"))
    tokenizer.decoder = decoders.Metaspace()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<end>", unk_token="<end>", clean_up_tokenization_spaces=True
    )
    assert pieces_of(fast, [0, 1, 2, 3, 1, 4]) == ["the", " cat", "s", "", " cat", " .", ""]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--max-new-tokens", "0"], "max_new_tokens=0: ask for at least 1"),
        (["--temperature", "nan"], "temperature=nan"),
        (["--template-variable", "terse"], "write NAME=VALUE, the value in JSON"),
        (["--template-variable", "thinking=true"], "chat template does not know thinking"),
        (["--system", "odd"], "tokenizer refuses the prompt: no odd ones"),
        (["--target", "no/where/at/all"], "no target can be loaded from no/where/at/all"),
        (["--system", "half \udcff"], "--system or --template-variable is no utf-8 text"),
        (["--system", "x" * 250], "the target's limit is 256: /new begins a new one"),
    ],
)
def test_mistakes_end_a_pipe_with_2_and_one_line(bundle, arguments, message):
    done = piped(bundle, "why not\nand then\n", *arguments)
    assert done.exit_code == 2
    assert done.stdout == ""
    assert [line for line in done.stderr.splitlines() if "error: " in line] == done.stderr.splitlines()[-1:]
    assert message in done.stderr.splitlines()[-1]


def test_a_bundle_that_is_missing_or_names_no_target_is_told(bundle, tmp_path):
    assert "error: the name of the bundle is empty: give a directory or a Hub id" in piped("", "hi").stderr
    assert "nowhere is neither a directory nor" in piped(str(tmp_path / "nowhere"), "hi").stderr
    assert "graft.json to say which target it was made for: pass --target" in piped(str(tmp_path), "hi").stderr


def test_what_a_bundles_recorded_target_lacks_is_told_with_the_way_out(tmp_path):
    target = write_target(tmp_path / "target")
    directory = str(write_bundle(tmp_path / "bundle", target))
    assert "the target's tokenizer has no chat template" in piped(directory, "hi").stderr
    target.rename(tmp_path / "moved")
    done = piped(directory, "hi")
    assert done.exit_code == 2
    assert done.stderr.splitlines()[-1].endswith("the bundle names this target, --target names another")


def test_stdin_that_is_no_text_is_told(bundle):
    done = piped(bundle, b"half \xff\n")
    assert done.exit_code == 2
    assert "error: stdin is no utf-8 text" in done.stderr


def test_a_line_that_is_half_text_ends_a_pipe_and_not_a_talk(bundle, talk):
    talk.begin()
    with pytest.raises(GraftError, match="this line is no utf-8 text"):
        talk.answer("half \udcff", lambda stats: recording(stats, []))
    assert talk.messages == []


def test_an_answer_whose_text_does_not_say_it_all_is_told_once(bundle, capsys):
    """Of a model that speaks in channels the text alone is what no template would write."""
    talk = conversation(bundle, "--max-new-tokens", "20")
    ignore = lambda stats: recording(stats, [])  # noqa: E731
    talk.answer("why not", ignore)
    said = talk.messages[-1]["content"]
    assert "special tokens" not in capsys.readouterr().err
    inside = next(one for one in said[1:-2] if one not in "why not user assistant" + said[-2:])
    talk.engine.tokenizer.add_special_tokens({"additional_special_tokens": [inside]})
    talk.begin()
    talk.answer("why not", ignore)
    assert talk.messages[-1]["content"] == said.replace(inside, "")
    talk.answer("why not", ignore)
    assert capsys.readouterr().err.count("special tokens within") == 1


def test_the_choice_of_methods_is_the_engines():
    assert list(cli.METHODS) == list(METHODS)
