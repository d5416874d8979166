"""Prompts and answers in the proportion of the sources, and what does not fit."""

import json

import pytest
from tokenizers import processors

from graft_inference.errors import GraftError
from graft_train.config.data import DataConfig, Source
from graft_train.data.chat import Chat
from graft_train.data.documents import read_documents
from graft_train.data.prompts import answered_samples, build_prompts, in_proportion, room_for_prompts
from tests.graft_train.tiny_chat import MARKED, PLAIN, word_tokenizer, words


def chats(path, *conversations, **settings):
    """Conversations as lists of turns, the user's first."""
    path.write_text("".join(json.dumps({"id": n, "data": turns}) + "\n" for n, turns in enumerate(conversations)))
    return DataConfig(path=str(path), **settings)


def chat(template=PLAIN):
    return Chat(word_tokenizer(template), {1})


def made(make, config, template=PLAIN, count=100, max_tokens=50):
    documents = read_documents(config)
    return list(make(documents, chat(template), config, count=count, max_tokens=max_tokens, seed=0))


def test_items_come_in_proportion_until_a_stream_runs_out():
    mixed = list(in_proportion([iter("a" * 8), iter("b" * 2)], [1.0, 1.0]))
    assert mixed == list("ababaaaaaa")
    thrice = list(in_proportion([iter("a" * 100), iter("b" * 100)], [3.0, 1.0]))[:40]
    assert thrice.count("a") == 30


def test_prompts_of_several_sources_follow_the_weights(tmp_path):
    for name, words_ in {"x": "abcdefgh", "y": "ijklmnop"}.items():
        chats(tmp_path / f"{name}.jsonl", *[[word] for word in words_])
    sources = [Source(path=str(tmp_path / "x.jsonl"), weight=3), Source(path=str(tmp_path / "y.jsonl"))]
    prompts = made(build_prompts, DataConfig(sources=sources), count=8)
    assert len({prompt.id for prompt in prompts}) == 8
    asked = [words(prompt.ids).split()[1] for prompt in prompts]
    assert sum(word in "abcdefgh" for word in asked) == 6
    everything = made(build_prompts, DataConfig(sources=sources))
    assert len(everything) == 16


def test_long_conversations_ask_with_fewer_turns_or_are_left_out_and_counted(tmp_path, capsys):
    config = chats(tmp_path / "a.jsonl", ["a"], ["b c d e f"], ["g", "h", "i j", "k"])
    prompts = made(build_prompts, config, max_tokens=6)
    assert {words(prompt.ids) for prompt in prompts} == {
        "<user> a <end> gap <assistant>",
        "<user> g <end> gap <assistant>",
    }
    said = capsys.readouterr().out
    assert "2 conversations ask with more than 6 tokens: 1 were cut at an earlier turn's end, 1 left out" in said
    with pytest.raises(GraftError, match="none of 3 documents gives a prompt"):
        made(build_prompts, config, max_tokens=4)


def test_windows_of_text_start_at_lines_and_do_not_overlap(tmp_path):
    lines = [" ".join("abcdefgh") for _ in range(40)]
    (tmp_path / "a.txt").write_text("\n".join(lines))
    config = DataConfig(path=str(tmp_path), glob="*.txt", prompt_tokens=8)
    prompts = made(build_prompts, config)
    assert len(prompts) > 3
    assert {words(prompt.ids) for prompt in prompts} == {" ".join("abcdefgh")}


def test_a_window_of_text_never_ends_as_a_text_does(tmp_path):
    (tmp_path / "a.txt").write_text(" ".join("abcdef"))
    tokenizer = word_tokenizer(None)
    special = [("<user>", 3), ("<end>", 1)]
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        "<user> $A <end>", special_tokens=special
    )
    config = DataConfig(path=str(tmp_path), glob="*.txt", prompt_tokens=9)
    (prompt,) = build_prompts(read_documents(config), Chat(tokenizer, {1}), config, count=9, max_tokens=9, seed=0)
    assert words(prompt.ids) == "<user> a b c d e f"


@pytest.mark.parametrize("kind", ["text", "conversation"])
def test_a_record_with_a_token_that_the_target_lacks_is_named_and_costs_no_other(tmp_path, kind, capsys):
    texts = ["a b c d", "e f <call> g", "h i j k"]
    rows = [{"text": text} if kind == "text" else {"data": [text]} for text in texts]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    tokenizer = word_tokenizer(PLAIN)
    tokenizer.add_tokens("<call>")
    config = DataConfig(path=str(tmp_path / "a.jsonl"), prompt_tokens=4)

    def asked():
        chat = Chat(tokenizer, {1}, vocab_size=35)
        return build_prompts(read_documents(config), chat, config, count=9, max_tokens=20, seed=0)

    with pytest.raises(GraftError, match=r"a.jsonl, line 2\) has the token '<call>' \(35\).*on_error=skip"):
        asked()
    config.on_error = "skip"
    assert len(asked()) == 2
    said = capsys.readouterr().out
    assert "left out 1 of 3 documents" in said
    assert "line 2) has the token '<call>'" in said


def test_a_prompt_knows_where_its_document_was_read(tmp_path):
    prompts = made(build_prompts, chats(tmp_path / "a.jsonl", ["a"], ["b"]))
    assert sorted(prompt.place for prompt in prompts) == [f"{tmp_path / 'a.jsonl'}, line {n}" for n in (1, 2)]


def test_answers_as_long_as_the_target_leave_no_room_for_a_prompt():
    assert room_for_prompts(512, 511, "a.b") == 1
    for new in (512, 1024):
        with pytest.raises(GraftError, match=rf"a\.b={new} leaves no room for a prompt.* 512 tokens"):
            room_for_prompts(512, new, "a.b")


@pytest.mark.parametrize("template", [PLAIN, MARKED])
def test_conversations_too_long_are_cut_at_a_turns_end_and_counted(tmp_path, template, capsys):
    config = chats(tmp_path / "a.jsonl", ["a", "b", "c", "d e f"], ["a", "b"])
    samples = made(answered_samples, config, template, max_tokens=12)
    assert sorted(words(sample.ids) for sample in samples) == ["<user> a <end> gap <assistant> b <end>"] * 2
    assert all(sample.answers == [[5, 7]] for sample in samples)
    assert "1 conversations are longer than 12 tokens" in capsys.readouterr().out


def test_an_answer_too_long_loses_its_end_and_a_prompt_too_long_everything(tmp_path):
    (sample,) = made(answered_samples, chats(tmp_path / "a.jsonl", ["a", "b c d e"]), max_tokens=7)
    assert words(sample.answer_ids) == "b c"
    with pytest.raises(GraftError, match="none of 1 documents has an answer to train on within 5 tokens"):
        made(answered_samples, chats(tmp_path / "a.jsonl", ["a", "b"]), max_tokens=5)


def test_a_sample_without_answer_is_an_error_or_left_out_and_counted(tmp_path, capsys):
    config = chats(tmp_path / "a.jsonl", ["a"], ["b", "c"])
    with pytest.raises(GraftError, match=r"conversation 0 .*zero mask.*on_error=skip"):
        made(answered_samples, config)
    config.on_error = "skip"
    assert [words(sample.answer_ids) for sample in made(answered_samples, config)] == ["c <end>"]
    assert "left out 1 of 2 documents" in capsys.readouterr().out
    with pytest.raises(GraftError, match="none of 1 documents has an answer"):
        made(answered_samples, chats(tmp_path / "a.jsonl", ["a"], on_error="skip"))
