"""Which tokens are answers, on conversations whose tokens are written out."""

import unicodedata

import pytest
from tokenizers import ByteLevelBPETokenizer, normalizers, processors
from transformers import ByT5Tokenizer, PreTrainedTokenizerFast

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


BYTES = "{% for m in messages %}{% if m.role == 'user' %}{{ m.content }}?{% else %}MARKED<end>{% endif %}{% endfor %}"
SPAN = "{% generation %}{{ m.content }}{% endgeneration %}"
BYTES_MARKED = BYTES.replace("MARKED", SPAN)
LOOSE = unicodedata.normalize("NFD", "é")


def byte_tokenizer(template=BYTES_MARKED, normalizer=None, post_processor=None):
    """A tokenizer whose tokens are bytes, but for <end>."""
    bytes_ = ByteLevelBPETokenizer()
    bytes_.train_from_iterator(["nothing"], vocab_size=257, special_tokens=["<end>"], show_progress=False)
    if normalizer:
        bytes_._tokenizer.normalizer = normalizer
    if post_processor:
        bytes_._tokenizer.post_processor = post_processor
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bytes_._tokenizer, eos_token="<end>")
    tokenizer.chat_template = template
    return tokenizer


def trained(tokenizer, *turns, **changes):
    """What is trained on, as text."""
    rows = Chat(tokenizer, {tokenizer.eos_token_id}).answered(document(*turns, **changes))
    return [tokenizer.decode(row.ids[start:end]) for row in rows for start, end in row.answers]


def test_an_answer_has_all_tokens_of_its_last_character():
    tokenizer = byte_tokenizer()
    (row,) = Chat(tokenizer, {tokenizer.eos_token_id}).answered(document("é", "n🙂", "n", "ü"))
    assert [tokenizer.decode(row.ids[start:end]) for start, end in row.answers] == ["n🙂<end>", "ü<end>"]
    assert row.answers == [[3, 9], [11, 14]]


@pytest.mark.parametrize(
    ("first", "second"),
    [
        (f"caf{LOOSE}", f"th{LOOSE}"),
        (f"{LOOSE}t{LOOSE}", LOOSE),
        ("각".join(unicodedata.normalize("NFD", "각각")), "ok"),
    ],
)
def test_a_character_that_a_normalizer_merges_costs_no_answer_and_trains_no_question(first, second):
    expected = [unicodedata.normalize("NFC", answer) + "<end>" for answer in (first, second, "z")]
    turns = (LOOSE, first, f"q{LOOSE}", second, "q", "z")
    assert trained(byte_tokenizer(normalizer=normalizers.NFC()), *turns) == expected


@pytest.mark.parametrize("post_processor", [processors.ByteLevel(trim_offsets=trim) for trim in (True, False)])
def test_blanks_at_an_answers_ends_are_its_own_however_the_tokenizer_places_them(post_processor):
    tokenizer = byte_tokenizer(post_processor=post_processor)
    assert trained(tokenizer, "a ", " b ", " c", "  d\n\n") == [" b <end>", "  d\n\n<end>"]


@pytest.mark.parametrize(
    "marked",
    [
        "<assistant>{% generation %} {{ m.content }} <end>{% endgeneration %} gap ",
        "<assistant> {% generation %}{{ m.content }} {% endgeneration %}<end> gap ",
        "<assistant>{%- generation -%} {{ m.content }} {%- endgeneration -%} <end> gap ",
    ],
)
def test_blanks_that_no_token_stands_for_do_not_move_an_answer(marked):
    start, end = MARKED.index("<assistant> {% generation"), MARKED.index("{% else %}<{{ m.role")
    template = MARKED[:start] + marked + MARKED[end:]
    if "{%-" in marked:
        template = template.replace("<assistant>{%-", "<assistant> {{ '' }}{%-").replace("-%} {{ m.c", "-%}{{ m.c")
        template = template.replace("{%- endgeneration -%} <end>", "{%- endgeneration -%}{{ ' <end>' }}")
    (row,) = chat(template).answered(document("a b", "c", "d", "e f"))
    assert shown(row) == ("<user> a b <end> gap <assistant> [c <end>] gap <user> d <end> gap <assistant> [e f <end>]")


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("{% macro say(m) %}{{ m.role }}:", "{% endmacro %}{{ say(m) }}"),
        ("{% set body %}{{ m.role }}:", "{% endset %}{{ body }}"),
        ("{% filter replace('x', 'yy') %}{{ m.role }}:", "{% endfilter %}"),
    ],
)
def test_spans_are_found_where_a_template_collects_its_text_first(before, after):
    """transformers counts the characters before a span without those that were collected."""
    tokenizer = byte_tokenizer(BYTES.replace("MARKED", f"{before}{SPAN}{after}"))
    assert trained(tokenizer, "ax", "bx", "c", "d") == [answer + "<end>" for answer in (
        ("byy" if "filter" in before else "bx"), "d")]  # fmt: skip


def test_several_spans_of_one_answer_are_one():
    thought = "{% generation %}{{ m.reasoning_content }}{% endgeneration %}"
    tokenizer = byte_tokenizer(BYTES.replace("MARKED", f"{thought}{SPAN}"))
    assert trained(tokenizer, "a", "b", reasoning_content="why") == ["whyb<end>"]


@pytest.mark.parametrize("span", [SPAN, SPAN[16:-19]])
def test_an_answer_ends_at_the_first_end_within_it(span):
    """The target stops there, and what the data say behind is not its own."""
    assert trained(byte_tokenizer(BYTES.replace("MARKED", span)), "a", "b<end>c", "d", "e") == ["b<end>", "e<end>"]


@pytest.mark.parametrize("span", [SPAN, SPAN[16:-19]])
@pytest.mark.parametrize("behind", ["<end>", "\n<end>", " \n <end><end>\n"])
def test_a_second_end_that_a_template_puts_behind_the_first_is_not_the_answers(span, behind):
    template = BYTES.replace("MARKED", span) + f"{{% if not add_generation_prompt %}}{behind}{{% endif %}}"
    assert trained(byte_tokenizer(template), "a", "b", "c", "d") == ["b<end>", "d<end>"]


@pytest.mark.parametrize("role", ["user", "tool", "system"])
def test_a_template_that_marks_another_turn_is_refused(role):
    everything = BYTES[: BYTES.index("{% if")] + f"{SPAN}<end>{{% endfor %}}"
    only_some = everything.replace(
        SPAN, f"{{% if m.role in ['assistant', '{role}'] %}}{SPAN}{{% else %}}{SPAN[16:-19]}{{% endif %}}"
    )
    turns = ("system: s", "user: a", "assistant: b", "tool: t", "assistant: c")
    for template in (everything, only_some):
        with pytest.raises(BadRecord, match=r"generation spans mark what another turn of doc says, '[sat]'"):
            trained(byte_tokenizer(template), *turns)
    unmarked = everything.replace(
        SPAN, f"{{% if m.role == 'assistant' %}}{SPAN}{{% else %}}{{{{ m.content }}}}{{% endif %}}"
    )
    assert trained(byte_tokenizer(unmarked), *turns) == ["b<end>", "c<end>"]


def test_a_template_that_looks_at_how_a_turn_begins_is_read_without_its_marks():
    """Qwen3's tells tools' results among the user's turns by it."""
    results = MARKED.replace(
        "{% for m in", "{% for m in messages if m.content.startswith('x') %}gap {% endfor %}{% for m in"
    )
    tokenizer = word_tokenizer(results)
    rows = Chat(tokenizer, {END}).answered(document("x a", "c", "d", "e f"))
    assert [row.id for row in rows] == ["doc#1", "doc#3"]
    assert [shown(row).rpartition("[")[2] for row in rows] == ["c <end>]", "e f <end>]"]
    (row,) = Chat(tokenizer, {END}).answered(document("a", "c", "d", "e f"))
    assert row.id == "doc#0"


def test_a_token_that_is_only_in_part_an_answer_is_an_error():
    for glued in (
        MARKED.replace("<assistant> {% gen", "<assistant>{% gen"),
        MARKED.replace(" <end>{% endgeneration %} gap", "{% endgeneration %}gap <end>"),
    ):
        with pytest.raises(
            BadRecord, match=r"answers of doc cannot be told .* one token stands for '.*(<assistant>|gap)"
        ):
            chat(glued).answered(document("a", "b"))


def test_an_answer_that_no_token_stands_for_is_an_error():
    tokenizer = byte_tokenizer(normalizer=normalizers.Replace("\u00ad", ""))
    with pytest.raises(BadRecord, match=r"no token of doc stands for its answer '\\xad'"):
        trained(tokenizer, "a", "\u00ad", "b", "c")


@pytest.mark.parametrize("template", [PLAIN, MARKED])
def test_a_tokenizer_that_was_saved_to_cut_and_pad_does_neither(template):
    expected = Chat(word_tokenizer(template), {END}).answered(document("a b", "c", "d", "e f"))
    tokenizer = word_tokenizer(template)
    tokenizer.backend_tokenizer.enable_truncation(3, direction="left")
    tokenizer.backend_tokenizer.enable_padding(length=40)
    tokenizer.truncation_side, tokenizer.model_max_length = "left", 3
    assert Chat(tokenizer, {END}).answered(document("a b", "c", "d", "e f")) == expected


def framing_tokenizer(template):
    """It puts <user> before every text and <end> behind it."""
    tokenizer = word_tokenizer(template)
    special = [("<user>", 3), ("<end>", 1)]
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        "<user> $A <end>", special_tokens=special
    )
    tokenizer.bos_token = "<user>"
    return tokenizer


@pytest.mark.parametrize("template", [PLAIN, MARKED])
def test_a_template_decides_the_special_tokens_alone(template):
    doc = document("a b", "c", "d", "e f")
    framing, plain = (Chat(make(template), {END}) for make in (framing_tokenizer, word_tokenizer))
    assert framing.answered(doc) == plain.answered(doc)
    assert list(framing.prompts(doc)) == list(plain.prompts(doc))


def test_a_text_that_goes_on_begins_as_the_tokenizer_has_it_and_does_not_end():
    framing, text = Chat(framing_tokenizer(None), {END}), Document("doc", "train", text="a")
    assert words(framing.opened(text, "a b c", 9)) == "<user> a b c"
    assert words(framing.opened(text, "a b c", 2)) == "<user> a"
    assert words(framing.opened(text, "<user> a", 9)) == "<user> a"  # it has the first token itself
    assert words(framing.opened(text, "<user> <user> a <end>", 9)) == "<user> <user> a <end>"
    assert framing.opened(text, " ", 9) == []
    assert words(Chat(word_tokenizer(None), {END}).opened(text, "a b", 9)) == "a b"


def test_a_slow_tokenizer_is_asked_by_prefixes_and_reads_text_alike():
    tokenizer = ByT5Tokenizer()  # it ends every text with </s>
    assert tokenizer.decode(Chat(tokenizer, {1}).opened(Document("doc", "train", text="ab"), "ab", 9)) == "ab"
    tokenizer.chat_template = BYTES_MARKED.replace("<end>", "</s>")
    assert not Chat(tokenizer, {1}).marks_answers(document("a", "b"))
    assert trained(tokenizer, "a", "b", "c", "d") == ["b</s>", "d</s>"]


def test_tokens_that_the_target_lacks_are_named_with_their_text():
    tokenizer = word_tokenizer(PLAIN)
    tokenizer.add_tokens("<call>")
    narrow, wide = (Chat(tokenizer, {END}, vocab_size=size) for size in (35, 36))
    doc = Document("doc", "train", conversation=document("a", "<call>").conversation, place="a.jsonl, line 3")
    with pytest.raises(BadRecord, match=r"doc \(a.jsonl, line 3\) has the token '<call>' \(35\), .* has 35 rows"):
        narrow.answered(doc)
    assert shown(next(iter(wide.answered(document("a", "b"))))).endswith("[b <end>]")
    assert list(narrow.prompts(doc)) == list(wide.prompts(doc))  # the answer alone has it
    assert narrow.opened(doc, "a b <call>", 2) == wide.opened(doc, "a b", 2)
    with pytest.raises(BadRecord, match="<call>"):
        narrow.opened(doc, "a b <call>", 3)


class Refusing(PreTrainedTokenizerFast):
    def __call__(self, text, *args, **kwargs):
        if "z" in text:
            raise OverflowError("too much")
        return super().__call__(text, *args, **kwargs)


@pytest.mark.parametrize("template", [PLAIN, MARKED])
def test_whatever_a_tokenizer_raises_names_the_record(template):
    tokenizer = Refusing(tokenizer_object=word_tokenizer(None).backend_tokenizer, eos_token="<end>")
    tokenizer.chat_template = template
    refusing = Chat(tokenizer, {END})
    for ask in (refusing.answered, lambda doc: next(refusing.prompts(doc))):
        with pytest.raises(BadRecord, match="the tokenizer refuses conversation doc: too much"):
            ask(document("z", "b"))
    with pytest.raises(BadRecord, match="the tokenizer refuses text doc: too much"):
        refusing.opened(Document("doc", "train", text="z"), "z", 9)


def test_of_several_templates_the_right_one_is_taken_or_none():
    tokenizer = word_tokenizer({"default": MARKED, "tool_use": PLAIN})
    assert Chat(tokenizer, {END}).marks_answers(document("a", "b"))
    assert not Chat(tokenizer, {END}).marks_answers(document("a", "b", tools=[{"name": "t"}]))
    with pytest.raises(GraftError, match="no chat template for doc"):
        Chat(word_tokenizer({"rag": PLAIN}), {END}).answered(document("a", "b"))


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


READING = (
    PLAIN
    + "{# date_string #}{% macro effort() %}{% if effort_ is not defined %}{% set effort_ = 'low' %}{% endif %}"
    + "{{ effort_ }}{% endmacro %}{{ effort() }}{% if enable_thinking is false %}x{% endif %}"
)


@pytest.mark.parametrize("name", ["enable_thinking", "effort_", "bos_token"])
def test_a_variable_that_the_template_reads_may_be_told(name):
    Chat(word_tokenizer("{{ bos_token }}" + READING), {END}, {name: False})


@pytest.mark.parametrize(
    ("name", "complaint"),
    [
        *((name, "does not know") for name in ("thinking", "enable_thinkin", "e", "", "m", "role", "date_string")),
        *((name, "transformers gives it") for name in ("messages", "tools", "add_generation_prompt", "tokenize")),
    ],
)
def test_a_variable_that_would_be_ignored_or_is_taken_is_an_error(name, complaint):
    """A part of another's name, a variable of a loop, a word of a comment."""
    for template in (READING, {"default": READING, "tool_use": READING}):
        with pytest.raises(GraftError, match=rf"data\.chat_template_kwargs: .*{complaint}"):
            Chat(word_tokenizer(template), {END}, {name: False})


def test_a_broken_template_is_named():
    with pytest.raises(GraftError, match=r"chat template is no template of Jinja: .*endfor"):
        chat("{% for m in messages %}").answered(document("a", "b"))


CALL = [{"function": {"name": "f", "arguments": {}}}]
DEAF = "{% for m in messages %}<{{ m.role }}> {{ m.content }} <end> gap {% endfor %}" + PLAIN[PLAIN.rindex("{% if") :]


@pytest.mark.parametrize(
    ("turns", "changes", "complaint"),
    [
        (("a", "b"), {"tools": [{"name": "t"}]}, "reads no tools, which doc has"),
        (("a", "b"), {"tool_calls": CALL}, "reads no tool_calls, which turn 2 of doc has"),
        (("a", ""), {"reasoning_content": "x"}, "reads no reasoning_content, which turn 2 of doc has, and nothing"),
    ],
)
def test_what_the_template_would_leave_out_is_an_error(turns, changes, complaint):
    with pytest.raises(BadRecord, match=complaint):
        chat(DEAF + "{# tools, tool_calls, m.thinking #}").answered(document(*turns, **changes))
    reading = DEAF.replace("{{ m.content }}", "{{ m['content'] ~ m.get('tool_calls') ~ m.thinking }}")
    assert chat(reading + "{% if tools %}{% endif %}").answered(document(*turns, **changes))


def test_a_thought_beside_an_answer_may_be_left_out():
    """As templates of reasoning models do with those of earlier turns."""
    (row,) = chat(DEAF).answered(document("a", "b", reasoning_content="x"))
    assert shown(row).endswith("<assistant> [b <end>]")


def test_tools_that_the_template_does_not_read_are_an_error_of_prompts_too():
    with pytest.raises(BadRecord, match="reads no tools, which doc has"):
        next(chat(DEAF).prompts(document("a", tools=[{"name": "t"}])))


@pytest.mark.parametrize("setting", [{"weight": 0}, {"weight": 0.5}, {"train": False}, {"trainable": False}])
def test_an_answer_that_is_not_to_be_trained_on_is_an_error(setting):
    (name,) = setting
    with pytest.raises(BadRecord, match=f"turn 2 of doc has {name}=.*regenerate.answers=target"):
        chat(PLAIN).answered(document("a", "b", **setting))
    assert next(chat(PLAIN).prompts(document("a", "b", **setting)))
    assert chat(PLAIN).answered(document("a", "b", "c", "d", **{name: 1.0 if name == "weight" else True}))
    asked = [{"role": "user", "content": "a"} | setting, {"role": "assistant", "content": "b"}]
    assert chat(PLAIN).answered(Document("doc", "train", conversation=to_content({"messages": asked}, "row")))


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
