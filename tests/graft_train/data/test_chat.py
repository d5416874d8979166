"""Which tokens are answers, on conversations whose tokens are written out."""

import pytest
from tokenizers import ByteLevelBPETokenizer
from transformers import PreTrainedTokenizerFast

from graft_inference.errors import GraftError
from graft_train.data.bad_records import BadRecord
from graft_train.data.chat import Chat, spans
from graft_train.data.documents import Document
from graft_train.data.records import to_content
from tests.graft_train.tiny_chat import LAST_THOUGHT, MARKED, PLAIN, THINKING, word_tokenizer, words

END = 1


def chat(template):
    return Chat(word_tokenizer(template), {END})


def document(*turns, tools=None, **extra):
    """Turns in turn the user's and the assistant's, unless they say "role: text"."""
    messages = []
    for place, turn in enumerate(turns):
        role, _, text = turn.rpartition(": ")
        messages.append({"role": role or ("user", "assistant")[place % 2], "content": text})
    messages[-1] |= extra
    return Document("doc", "train", conversation=to_content({"messages": messages, "tools": tools}, "row"))


def shown(sample):
    """The tokens, answers in brackets."""
    text, place = [], 0
    for start, end in sample.answers:
        text += [words(sample.ids[place:start]), f"[{words(sample.ids[start:end])}]"]
        place = end
    return " ".join([*text, words(sample.ids[place:])]).strip()


def test_a_template_with_spans_gives_one_row_with_every_answer():
    (row,) = chat(MARKED).answered(document("a b", "c", "d", "e f"))
    assert row.id == "doc#0"
    assert shown(row) == ("<user> a b <end> gap <assistant> [c <end>] gap <user> d <end> gap <assistant> [e f <end>]")


def test_a_marked_answer_ends_with_its_end_wherever_the_marks_are():
    """Templates leave the end of a turn out of their marks, or mark the newline behind it too."""
    end = "{% endgeneration %} gap"
    assert MARKED.count(f" <end>{end}") == 1
    for template in (MARKED.replace(f" <end>{end}", f"{end[:-4]} <end> gap"), MARKED.replace(end, f" gap{end[:-4]}")):
        (row,) = chat(template).answered(document("a b", "c", "d", "e f"))
        assert shown(row) == (
            "<user> a b <end> gap <assistant> [c <end>] gap <user> d <end> gap <assistant> [e f <end>]"
        )


def test_an_answer_has_all_tokens_of_its_last_character():
    bytes_ = ByteLevelBPETokenizer()
    bytes_.train_from_iterator(["nothing"], vocab_size=257, special_tokens=["<end>"], show_progress=False)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bytes_._tokenizer, eos_token="<end>")
    tokenizer.chat_template = (
        "{% for m in messages %}{% if m.role == 'user' %}{{ m.content }}?"
        "{% else %}{% generation %}{{ m.content }}{% endgeneration %}<end>{% endif %}{% endfor %}"
    )
    (row,) = Chat(tokenizer, {END}).answered(document("é", "n🙂", "n", "ü"))
    assert [tokenizer.decode(row.ids[start:end]) for start, end in row.answers] == ["n🙂", "ü"]
    assert row.answers == [[3, 8], [11, 13]]


def test_a_template_without_spans_gives_one_row_an_answer():
    rows = chat(PLAIN).answered(document("a b", "c", "d", "e f"))
    assert [row.id for row in rows] == ["doc#1", "doc#3"]
    assert [shown(row) for row in rows] == [
        "<user> a b <end> gap <assistant> [c <end>]",
        "<user> a b <end> gap <assistant> c <end> gap <user> d <end> gap <assistant> [e f <end>]",
    ]


def test_prompts_end_where_the_answer_begins():
    last = document("a", "b", "c", "d")
    prompt, earlier = chat(PLAIN).prompts(last)
    assert words(prompt) == "<user> a <end> gap <assistant> b <end> gap <user> c <end> gap <assistant>"
    assert words(earlier) == "<user> a <end> gap <assistant>"
    assert [row.prompt_ids for row in chat(PLAIN).answered(last)] == [earlier, prompt]


@pytest.mark.parametrize("template", [PLAIN, MARKED])
def test_tools_and_thoughts_reach_the_template_and_thoughts_are_trained(template):
    doc = document("system: s", "user: a", "assistant: b", tools=[{"name": "t"}], reasoning_content="x y")
    (row,) = chat(template).answered(doc)
    assert shown(row) == (
        "<system> t <end> gap <system> s <end> gap <user> a <end> gap <assistant> [<think> x y </think> b <end>]"
    )


def test_answers_after_a_tools_result_are_answers_too():
    rows = chat(PLAIN).answered(document("user: a", "assistant: b", "tool: c", "assistant: d"))
    assert shown(rows[1]).endswith("<tool> c <end> gap <assistant> [d <end>]")
    assert words(next(chat(PLAIN).prompts(document("user: a", "assistant: b", "tool: c")))).endswith(
        "c <end> gap <assistant>"
    )


def test_every_row_shows_its_own_thought_as_when_the_target_wrote_it():
    turns = [("user", "a", None), ("assistant", "b", "x"), ("user", "c", None), ("assistant", "d", "y")]
    messages = [{"role": role, "content": text, "reasoning_content": thought} for role, text, thought in turns]
    doc = Document("doc", "train", conversation=to_content({"messages": messages}, "row"))
    assert [shown(row).partition("[")[2] for row in chat(LAST_THOUGHT).answered(doc)] == [
        "<think> x </think> b <end>]",
        "<think> y </think> d <end>]",
    ]
    assert "x" not in shown(chat(LAST_THOUGHT).answered(doc)[1])


@pytest.mark.parametrize("template", [PLAIN, MARKED])
def test_what_comes_before_the_first_question_is_no_answer(template):
    greeted = document("system: s", "assistant: h", "user: a", "assistant: b")
    (row,) = chat(template).answered(greeted)
    assert shown(row).endswith("<assistant> h <end> gap <user> a <end> gap <assistant> [b <end>]")
    assert len(list(chat(template).prompts(greeted))) == 1


def test_of_prompts_without_an_answer_between_the_last_asks():
    doubled = document("user: a", "user: b", "assistant: c", "assistant: d")
    assert [words(ids) for ids in chat(PLAIN).prompts(doubled)] == ["<user> a <end> gap <user> b <end> gap <assistant>"]


def test_without_an_end_token_the_answer_runs_to_the_end():
    assert shown(Chat(word_tokenizer(PLAIN), set()).answered(document("a", "b"))[0]).endswith("[b <end> gap]")


def test_answers_that_cannot_be_told_are_an_error_that_names_the_sample():
    with pytest.raises(BadRecord, match=r"answers of doc .* turn 2 .* '.*<think>' against '.*<assistant> b"):
        chat(THINKING).answered(document("a", "b"))
    thought = document("a", "b", reasoning_content="x")
    assert shown(chat(THINKING).answered(thought)[0]).endswith("<assistant> <think> [x </think> b <end>]")


def test_a_token_across_the_border_of_prompt_and_answer_is_an_error():
    glued = PLAIN.replace("<{{ m.role }}> ", "<{{ m.role }}>")  # "<assistant>b" is one token, and not the prompt's
    with pytest.raises(BadRecord, match="answers of doc cannot be told"):
        chat(glued).answered(document("a", "b"))


@pytest.mark.parametrize("template", [PLAIN, MARKED])
def test_the_template_is_told_what_the_settings_say(template):
    told = {"enable_thinking": False}
    quiet = Chat(word_tokenizer(template + "{% if enable_thinking is false %}x {% endif %}"), {END}, told)
    assert words(next(quiet.prompts(document("a")))).endswith("<user> a <end> gap <assistant> x")
    with pytest.raises(GraftError, match=r"data\.chat_template_kwargs.* does not know enable_thinking"):
        Chat(word_tokenizer(template), {END}, told)


@pytest.mark.parametrize("template", [PLAIN, MARKED])
def test_a_zero_mask_is_an_error_that_names_the_sample(template):
    with pytest.raises(BadRecord, match=r"doc.*nothing to train on \(a zero mask\)"):
        chat(template).answered(document("a"))


def test_an_answer_that_the_template_swallows_is_a_zero_mask():
    silent = PLAIN.replace("{% for m in messages %}", "{% for m in messages if m.role == 'user' %}")
    with pytest.raises(BadRecord, match=r"doc"):
        chat(silent).answered(document("a", "b"))


def test_refusals_of_the_template_and_missing_ones_are_named():
    strict = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(BadRecord, match="conversation doc: roles must alternate"):
        next(chat(strict).prompts(document("a")))
    with pytest.raises(GraftError, match="no chat template"):
        chat(None).answered(document("a", "b"))
    with pytest.raises(BadRecord, match="doc is plain text"):
        chat(PLAIN).answered(Document("doc", "train", text="a"))


def test_spans_of_a_mask():
    assert spans([0, 1, 1, 0, 0, 1]) == [[1, 3], [5, 6]]
    assert spans([1]) == [[0, 1]]
    assert spans([0, 0]) == spans([]) == []
