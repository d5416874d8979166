"""The command: the text that the target would write, statistics beside it, one line for every mistake."""

import io
import re

import pytest
from tokenizers.processors import TemplateProcessing

from graft_inference.cli import encode, main

from .tiny import tiny_model
from .tiny_bundle import tiny_tokenizer, write_bundle, write_target

PROMPT = "lorem ipsum\n"


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    root = tmp_path_factory.mktemp("pair")
    target = write_target(root / "target")
    return str(write_bundle(root / "bundle", target)), str(target)


def command(pair, *arguments, prompt=PROMPT):
    bundle, target = pair
    return [bundle, "--target", target, "--device", "cpu", "--dtype", "float32", *arguments, prompt]


def expected_text(prompt, count):
    model, tokenizer = tiny_model("llama"), tiny_tokenizer()
    ids = tokenizer(prompt, return_tensors="pt").input_ids
    return tokenizer.decode(model.generate(ids, max_new_tokens=count)[0, ids.shape[1] :], skip_special_tokens=True)


@pytest.mark.parametrize("method", ["graft", "autoregressive"])
def test_prints_what_the_target_writes_and_the_statistics(pair, capsys, method):
    assert main(command(pair, "--max-new-tokens", "40", "--method", method)) == 0
    printed = capsys.readouterr()
    assert printed.out == expected_text(PROMPT, 40) + "\n"
    statistics = printed.err.splitlines()[-2:]
    assert statistics[0].startswith("40 tokens, ")
    assert re.search(r"tokens/s, acceptance length \d\.\d\d, prefill \d+ ms$", statistics[0])
    fallback = r"; by plan: .*autoregressive, measured \d+.*" if method == "graft" else ""
    assert re.search(rf"drafted \d+, matrix \d+, lookup \d+, bonus \d+{fallback}$", statistics[1])
    if method == "autoregressive":
        assert "39 rounds stopped at: none 39; accepted: drafted 0, matrix 0, lookup 0, bonus 39" in statistics[1]


def test_reads_the_prompt_from_stdin(pair, capsys, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO(PROMPT))
    assert main(command(pair, "--max-new-tokens", "12", prompt="-")) == 0
    assert capsys.readouterr().out == expected_text(PROMPT, 12) + "\n"


def test_a_stop_string_ends_the_text(pair, capsys):
    whole = expected_text(PROMPT, 40)
    stop = whole[-10:-7]
    assert main(command(pair, "--max-new-tokens", "40", "--stop", "never said", "--stop", stop)) == 0
    printed = capsys.readouterr().out.removesuffix("\n")
    assert whole.startswith(printed)
    assert stop in printed
    assert len(printed) < len(whole)


@pytest.mark.parametrize("filters", [["--top-k", "1"], ["--top-p", "1e-6"]])
def test_filters_that_leave_one_token_make_sampling_greedy(pair, capsys, filters):
    assert main(command(pair, "--max-new-tokens", "20", "--temperature", "5", *filters)) == 0
    assert capsys.readouterr().out == expected_text(PROMPT, 20) + "\n"


def test_the_seed_decides_a_sample(pair, capsys):
    def sample(seed):
        assert main(command(pair, "--max-new-tokens", "30", "--temperature", "5", "--seed", seed)) == 0
        return capsys.readouterr().out

    assert sample("1") == sample("1")
    assert len({sample("1"), sample("2"), sample("3")}) > 1


def test_the_text_comes_while_tokens_come(pair, capsys, monkeypatch):
    """Whole words are out before the last token, and characters of two tokens never show halves."""
    tokenizer = tiny_tokenizer()
    ids = tokenizer("caf\u00e9 au lait\n").input_ids
    seen = []

    def stream(self, *args, **options):
        for token in ids:
            seen.append(capsys.readouterr().out)
            yield token

    monkeypatch.setattr("graft_inference.engine.GraftEngine.stream", stream)
    assert main(command(pair)) == 0
    assert "".join(seen).startswith("caf\u00e9 au ")
    assert "".join(seen) + capsys.readouterr().out == "caf\u00e9 au lait\n\n"


def test_chat_wraps_the_prompt_in_the_template(tmp_path, capsys):
    target = write_target(tmp_path / "target")
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}<assistant>"
    tokenizer.save_pretrained(target)
    pair = str(write_bundle(tmp_path / "bundle", target)), str(target)
    assert main(command(pair, "--chat", "--max-new-tokens", "12", prompt="why not")) == 0
    assert capsys.readouterr().out == expected_text("<user>why not<assistant>", 12) + "\n"


TEMPLATE = (
    "{% for m in messages %}{% if m.content == 'odd' %}{{ raise_exception('no odd ones') }}{% endif %}"
    "<{{ m.role }}>{{ m.content }}{% endfor %}<assistant>"
    "{% if enable_thinking is defined and enable_thinking is false %}nothink{% endif %}"
    "{% if effort is defined %}{{ effort }}{% endif %}"
)


@pytest.fixture(scope="module")
def chat_pair(tmp_path_factory):
    root = tmp_path_factory.mktemp("chat")
    target = write_target(root / "target")
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(target)
    return str(write_bundle(root / "bundle", target)), str(target)


@pytest.mark.parametrize(
    ("arguments", "prompt"),
    [
        (["--template-variable", "enable_thinking=false"], "<user>why not<assistant>nothink"),
        (["--template-variable", "enable_thinking=true"], "<user>why not<assistant>"),
        (
            ["--template-variable", 'effort="high"', "--template-variable", "enable_thinking=false"],
            "<user>why not<assistant>nothinkhigh",
        ),
        (["--system", "be terse"], "<system>be terse<user>why not<assistant>"),
        (["--system", ""], "<system><user>why not<assistant>"),
    ],
)
def test_the_template_is_told_what_training_told_it(chat_pair, capsys, arguments, prompt):
    assert main(command(chat_pair, "--chat", "--max-new-tokens", "12", *arguments, prompt="why not")) == 0
    assert capsys.readouterr().out == expected_text(prompt, 12) + "\n"


@pytest.mark.parametrize(
    ("arguments", "prompt", "message"),
    [
        (["--chat", "--template-variable", "thinking_budget=3"], "hi", "chat template does not know thinking_budget"),
        (["--chat", "--template-variable", "effort=high"], "hi", "write NAME=VALUE, the value in JSON"),
        (["--chat", "--template-variable", "effort"], "hi", "write NAME=VALUE"),
        (["--chat", "--template-variable", "messages=[]"], "hi", "messages is not the setting's to give"),
        (["--chat", "--template-variable", "thinking=false"], "hi", "chat template does not know thinking;"),
        (["--chat", "--template-variable", "m=1"], "hi", "chat template does not know m;"),
        (["--chat", "--system", "odd"], "hi", "refuses the prompt: no odd ones"),
        (["--system", "be terse"], "hi", "add --chat"),
        (["--template-variable", "effort=3"], "hi", "add --chat"),
        (["--chat"], "half a \udcff", "the prompt is no utf-8 text"),
        ([], "half a \udcff", "the prompt is no utf-8 text"),
        (["--stop", ""], "hi", "stop_strings has ''"),
        (["--seed", "1", "--temperature", "nan"], "hi", "temperature=nan"),
    ],
)
def test_what_the_template_or_the_tokenizer_refuses_is_one_line(chat_pair, capsys, arguments, prompt, message):
    assert main(command(chat_pair, *arguments, prompt=prompt)) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.splitlines()[-1].startswith("graft-generate: ")
    assert message in printed.err.splitlines()[-1]


def test_stdin_that_is_no_text_is_one_line(pair, capsys, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"half \xff"), encoding="utf-8"))
    assert main(command(pair, prompt="-")) == 2
    assert "graft-generate: stdin is no utf-8 text" in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize(
    ("arguments", "prompt", "name"),
    [
        ((), "half \udcff", "the prompt"),
        ((), "-", "stdin"),
        (("--chat", "--system", "\udcff"), "why not", "--system"),
        (("--stop", "a", "--stop", "\udcff"), "why not", "--stop"),
        (("--chat", "--template-variable", 'terse="\udcff"'), "why not", "--template-variable"),
    ],
)
def test_bytes_that_are_no_text_are_named_before_the_target_is_loaded(
    pair, capsys, monkeypatch, arguments, prompt, name
):
    """Python keeps them as half characters, in arguments and where the locale is C."""
    piped = io.TextIOWrapper(io.BytesIO(b"half \xff"), encoding="utf-8", errors="surrogateescape")
    monkeypatch.setattr("sys.stdin", piped)
    assert main(command(pair, *arguments, prompt=prompt)) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"graft-generate: {name} is no utf-8 text: ")


def test_the_text_ends_where_the_tokenizer_says_a_turn_does(pair, tmp_path, capsys):
    """The target's generation_config names no end."""
    target = write_target(tmp_path / "target")
    tokenizer = tiny_tokenizer()
    tokenizer.eos_token = "9"
    tokenizer.save_pretrained(target)
    assert main(command((pair[0], str(target)), "--max-new-tokens", "40", prompt="def run(x):\n")) == 0
    printed = capsys.readouterr()
    assert printed.out == expected_text("def run(x):\n", 10) + "\n"
    assert "11 tokens, " in printed.err


def test_a_stop_string_that_no_token_spells_never_comes(pair, capsys):
    assert main(command(pair, "--max-new-tokens", "12", "--stop", "\u273f", "--stop", "END\u273f")) == 0
    assert capsys.readouterr().out == expected_text(PROMPT, 12) + "\n"


def test_a_token_that_the_target_has_no_embedding_for_is_named(pair, tmp_path, capsys):
    """The tokenizer got a token that the model was never resized for."""
    target = write_target(tmp_path / "target")
    longer = tiny_tokenizer()
    longer.add_tokens(["<tool>"])
    longer.save_pretrained(target)
    head = write_bundle(tmp_path / "bundle", target)
    for name in ("graft.json", "successors.safetensors"):
        (head / name).unlink()
    assert main(command((str(head), str(target)), prompt="call <tool> now")) == 2
    assert "prompt 0 has the token 61 ('<tool>') outside the vocabulary of 61" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--max-new-tokens", "0"], "max_new_tokens=0: ask for at least 1"),
        (["--max-new-tokens", "400"], "exceed the target's limit of 256 positions"),
        (["--temperature", "-1"], "temperature=-1.0"),
        (["--dtype", "float33"], "dtype 'float33' does not exist"),
        (["--device", "gpu"], "device 'gpu' cannot be used here"),
        (["--chat"], "no chat template: use graft-generate, without --chat"),
    ],
)
def test_mistakes_end_with_2_and_one_line(pair, capsys, arguments, message):
    assert main(command(pair, *arguments)) == 2
    printed = capsys.readouterr()
    lines = [line for line in printed.err.splitlines() if "graft-generate: " in line]
    assert printed.out == ""
    assert len(lines) == 1
    assert printed.err.splitlines()[-1] == lines[0]
    assert message in lines[0]


def test_an_empty_prompt_is_named(pair, capsys):
    assert main(command(pair, prompt="")) == 2
    assert "pass one non-empty prompt" in capsys.readouterr().err


def test_missing_directories_are_named(pair, tmp_path, capsys):
    assert main(["", PROMPT, "--target", pair[1]]) == 2
    assert "the name of the bundle is empty" in capsys.readouterr().err
    bundle, target = pair
    assert main([str(tmp_path / "nowhere"), "--target", target, "hi"]) == 2
    assert "nowhere is neither a directory nor" in capsys.readouterr().err
    assert main([bundle, "--target", str(tmp_path / "nowhere"), "hi"]) == 2
    assert "no target can be loaded from" in capsys.readouterr().err


def test_a_target_without_tokenizer_is_named(pair, tmp_path, capsys):
    tiny_model("llama").save_pretrained(tmp_path / "bare")
    assert main([pair[0], "--target", str(tmp_path / "bare"), "hi"]) == 2
    assert "bare has no tokenizer" in capsys.readouterr().err


def test_unknown_methods_are_refused_by_the_parser(pair, capsys):
    with pytest.raises(SystemExit) as exit:
        main(command(pair, "--method", "grafted"))
    assert exit.value.code == 2
    assert "invalid choice: 'grafted'" in capsys.readouterr().err


@pytest.mark.parametrize("single", ["$A z", "b $A z", "b $A"])
def test_what_a_tokenizer_puts_behind_a_text_is_not_gone_on_from(single):
    """An end token there would end the text that is to be continued; a beginning stays, once."""
    tokenizer = tiny_tokenizer()
    ids = tokenizer.get_vocab()
    tokenizer.bos_token = "b"
    tokenizer._tokenizer.post_processor = TemplateProcessing(single=single, special_tokens=[(t, ids[t]) for t in "bz"])
    begun = [ids["b"]] * single.startswith("b")
    assert encode(tokenizer, "x1", False).tolist() == [*begun, ids["x"], ids["1"]]
    assert encode(tokenizer, "bx", False).tolist() == [ids["b"], ids["x"]]
