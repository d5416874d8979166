"""Chat: conversations as token ids, and which of these are answers, both by the tokenizer's own template."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import groupby
from typing import Any

from transformers import PreTrainedTokenizerBase

from graft_inference.chat_template import check_variables, names_read, variables_read
from graft_inference.errors import GraftError
from graft_inference.prompts import text_ids
from graft_train.data.bad_records import BadRecord
from graft_train.data.documents import Document
from graft_train.data.marks import ANSWER, GENERATION, Rendered, enclosed, marking, read_marks
from graft_train.data.records import UNASKING, Conversation, Message
from graft_train.data.samples import Sample
from graft_train.data.turns import THOUGHT, as_template_reads

TRAINED = ("weight", "train", "training", "trainable", "loss")
"""What sets call whether, or how much, a turn is trained on: 1 or true where it is like all others."""


class Chat:
    """Renders conversations, and text.

    Args:
        end_ids: tokens after which the target stops; what a template puts behind one is not the target's.
        told: variables of the template, such as enable_thinking.
        vocab_size: rows of the target's embedding matrix; None where no target will read the tokens.

    Raises:
        GraftError: the template does not read one of them, and would ignore it without a word.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        end_ids: set[int],
        told: dict[str, Any] | None = None,
        vocab_size: int | None = None,
    ) -> None:
        self.tokenizer = tokenizer
        self.end_ids = end_ids
        self.told = told or {}
        self.vocab_size = vocab_size
        check_variables(tokenizer, self.told, "data.chat_template_kwargs")

    def prompts(self, document: Document) -> Iterator[list[int]]:
        """The turns up to the last that asks for an answer, and that answer's beginning; then up to the one
        before, and so on, shorter each time.

        Raises:
            GraftError: no chat template; a BadRecord: one that refuses this conversation, or tokens that the target
                lacks.
        """
        messages = _conversation(document).messages
        first, roles = _first_asked(messages), [message["role"] for message in messages]
        for asked in range(len(messages) - 1, first - 1, -1):
            if roles[asked] != "assistant" and roles[asked + 1 : asked + 2] in ([], ["assistant"]):
                prompt = self._ids(document, messages[: asked + 1], add_generation_prompt=True)
                self.check_known(prompt, f"the prompt of {named(document)}")
                yield prompt

    def answered(self, document: Document) -> list[Sample]:
        """The conversation with its own answers marked: one row, where the template marks them (generation
        spans); else one row for each answer, which is what stands behind the prompt for it.

        Raises:
            GraftError: no chat template; a BadRecord, which names the document: the template refuses it or leaves
                something of it out, its answers cannot be told from its prompts, it has none, or one that is not
                to be trained on, or tokens that the target lacks.
        """
        _check_trained(document)
        spanned = self._by_spans(document) if self.marks_answers(document) else None
        rows = self._by_prefixes(document) if spanned is None else [spanned]
        for row in rows:
            if not row.answers:
                raise BadRecord(
                    f"the chat template finds no answer in {named(document)}: nothing to train on (a zero mask)"
                )
            self.check_known(row.ids, f"the conversation {named(document)}")
        return rows

    def opened(self, document: Document, text: str, length: int) -> list[int]:
        """The first tokens of a text that the target is to go on with, see `text_ids`.

        Raises:
            BadRecord: the tokenizer cannot read it, or gives tokens that the target lacks.
        """
        with _refusing("tokenizer", document):
            ids = text_ids(self.tokenizer, text)[:length]
        self.check_known(ids, f"the text {named(document)}")
        return ids

    def check_known(self, ids: Sequence[int], what: str) -> None:
        """Raises BadRecord for a token that the target's embedding matrix has no row for."""
        if self.vocab_size is None or not ids or max(ids) < self.vocab_size:
            return
        token = next(token for token in ids if token >= self.vocab_size)
        text = self.tokenizer.convert_ids_to_tokens(token)
        raise BadRecord(
            f"{what} has the token {text!r} ({token}), but the target's embedding matrix has {self.vocab_size} rows; "
            "the tokenizer must be the one that the target was trained with, or the data do without such text"
        )

    def marks_answers(self, document: Document) -> bool:
        """Whether the template has generation spans, and the tokenizer knows which characters a token stands for."""
        return self.tokenizer.is_fast and GENERATION.search(self._template(document)) is not None

    def _by_spans(self, document: Document) -> Sample | None:
        """None where the template writes another text with marks in it, or no mark."""
        rendered = self._marked(document)
        if rendered is None:
            return None
        encoded = self._encode(document, rendered.text, return_offsets_mapping=True)
        ids, offsets = list(encoded.input_ids), encoded.offset_mapping
        mask = _in_answers(document, rendered, offsets)
        for end in (end for _, end in spans(mask)):
            if end < len(ids) and ids[end] in self.end_ids:
                mask[end] = True  # a template may leave the token that ends an answer unmarked
        answers = [self._ended(ids, *span) for span in spans(mask)]
        return Sample(f"{document.id}#0", "train", ids[: answers[-1][1] if answers else 0], answers)

    def _marked(self, document: Document) -> Rendered | None:
        """The conversation as text, its answers, and what other turns say; None where the marks change the text."""
        messages = _conversation(document).messages
        text = self._text(document, messages)
        template = marking(self._template(document))
        try:
            marked = self._render(document, list(map(enclosed, messages)), chat_template=template)
        except Exception:  # a template that looks at its turns' beginnings may refuse the marks
            return None
        rendered = read_marks(marked)
        if rendered.text != text or rendered.asked is None or ANSWER not in marked:
            return None
        _check_said(document, rendered)
        # Nobody asked for what comes before the first question.
        answers = [(start, end) for start, end in rendered.answers if start >= rendered.asked]
        return Rendered(text, answers, rendered.said, rendered.asked)

    def _ended(self, ids: Sequence[int], start: int, end: int) -> list[int]:
        """An answer up to the first token that ends it: the target would not go on, whatever the data do."""
        return [start, next((place + 1 for place in range(start, end) if ids[place] in self.end_ids), end)]

    def _by_prefixes(self, document: Document) -> list[Sample]:
        messages = _conversation(document).messages
        first = _first_asked(messages)
        turns = [turn for turn, message in enumerate(messages) if message["role"] == "assistant" and turn > first]
        if not turns:
            raise BadRecord(f"the conversation {named(document)} has no answer: nothing to train on (a zero mask)")
        return [self._by_prefix(document, messages, turn) for turn in turns]

    def _by_prefix(self, document: Document, messages: Sequence[Message], turn: int) -> Sample:
        prompt = self._ids(document, messages[:turn], add_generation_prompt=True)
        ids = self._ids(document, messages[: turn + 1])
        if ids[: len(prompt)] != prompt:
            parted = next((n for n, pair in enumerate(zip(prompt, ids, strict=False)) if pair[0] != pair[1]), len(ids))
            seen, found = (str(self.tokenizer.decode(row[max(0, parted - 5) : parted + 5])) for row in (prompt, ids))
            raise BadRecord(
                f"the answers of {named(document)} cannot be told from its prompts: the prompt for turn {turn + 1} and "
                f"the conversation up to that turn part at token {parted}, {seen!r} against {found!r}; use a chat "
                "template with generation spans, or regenerate.answers=target"
            )
        start, end = self._ended(ids, len(prompt), len(ids))
        return Sample(f"{document.id}#{turn}", "train", ids[:end], [[start, end]] if end > start else [])

    def _ids(self, document: Document, messages: Sequence[Message], **options: Any) -> list[int]:
        return list(self._encode(document, self._text(document, messages, **options)).input_ids)

    def _encode(self, document: Document, text: str, **options: Any) -> Any:
        with _refusing("tokenizer", document):
            return self.tokenizer(text, add_special_tokens=False, **options)  # the template has its own

    def _text(self, document: Document, messages: Sequence[Message], **options: Any) -> str:
        _check_read(document, messages, self._template(document))
        with _refusing("chat template", document):
            return self._render(document, messages, **options)

    def _render(self, document: Document, messages: Sequence[Message], **options: Any) -> str:
        tools: Any = _conversation(document).tools
        schemas, template = list(tools) if tools else None, self._template(document)
        read = [as_template_reads(message, template) for message in messages]
        rendered: Any = self.tokenizer.apply_chat_template(read, tools=schemas, tokenize=False, **self.told, **options)
        return rendered

    def _template(self, document: Document) -> str:
        tools: Any = _conversation(document).tools
        if self.tokenizer.chat_template is None:
            raise GraftError(
                f"document {named(document)} is a conversation, but the target's tokenizer has no chat template; "
                "use an instruction-tuned target, or records with the field text"
            )
        try:
            return self.tokenizer.get_chat_template(tools=list(tools) if tools else None)
        except ValueError as error:  # it has several, by name
            raise GraftError(f"the target's tokenizer has no chat template for {named(document)}: {error}") from error


def _check_read(document: Document, messages: Sequence[Message], template: str) -> None:
    """Raises BadRecord for what the chat template would leave out without a word.

    Templates drop the thoughts of earlier turns on purpose, but not all that a turn says.
    """
    remedy = "leave the record out, or use another template"
    if _conversation(document).tools and "tools" not in variables_read(template):
        raise BadRecord(f"the chat template reads no tools, which {named(document)} has: {remedy}")
    names = names_read(template)
    for number, message in enumerate(messages, start=1):
        what = f"which turn {number} of {named(document)} has"
        if "tool_calls" in message and "tool_calls" not in names:
            raise BadRecord(f"the chat template reads no tool_calls, {what}: {remedy}")
        if THOUGHT[0] in message and _says_nothing(message) and names.isdisjoint(THOUGHT):
            raise BadRecord(f"the chat template reads no {THOUGHT[0]}, {what}, and nothing else: {remedy}")


def _says_nothing(message: Message) -> bool:
    return not message["content"].strip() and "tool_calls" not in message


def _check_said(document: Document, rendered: Rendered) -> None:
    """Raises BadRecord where an answer covers what another turn says."""
    for start, end in rendered.answers:
        for said_start, said_end in rendered.said:
            if start < said_end and said_start < end:
                raise BadRecord(
                    f"the chat template's generation spans mark what another turn of {named(document)} says, "
                    f"{rendered.text[max(start, said_start) : min(end, said_end)][:40]!r}: mend the template, or use "
                    "regenerate.answers=target"
                )


def _check_trained(document: Document) -> None:
    """Raises BadRecord for an answer that its turn says not to train on."""
    for number, message in enumerate(_conversation(document).messages, start=1):
        for name in TRAINED:
            if message["role"] == "assistant" and message.get(name, 1) != 1:
                raise BadRecord(
                    f"turn {number} of {named(document)} has {name}={message[name]}, but every answer is trained on "
                    "alike: leave the record out, or use regenerate.answers=target"
                )


def _in_answers(document: Document, rendered: Rendered, offsets: Sequence[tuple[int, int]]) -> list[bool]:
    """Which tokens stand for a part of an answer.

    Every token of a character that takes several is at the same place; a blank alone may be at the place behind it.

    Args:
        offsets: [start, end) of every token in the text.

    Raises:
        BadRecord: one stands for something else as well, or none for an answer.
    """
    text, inside = rendered.text, bytearray(len(rendered.text))
    for start, end in rendered.answers:
        inside[start:end] = b"\1" * (end - start)
        if text[start:end].strip() and not any(start < last and first < end for first, last in offsets):
            raise BadRecord(
                f"no token of {named(document)} stands for its answer {text[start:end][:40]!r}; leave it out"
            )
    mask = [1 in inside[min(first, max(last - 1, 0)) : last] for first, last in offsets]
    for (first, last), marked in zip(offsets, mask, strict=True):
        if marked and any(not inside[place] and not text[place].isspace() for place in range(first, last)):
            raise BadRecord(
                f"the answers of {named(document)} cannot be told from its prompts: one token stands for "
                f"{text[first:last]!r}, which is only in part an answer; use another chat template, or "
                "regenerate.answers=target"
            )
    return mask


def spans(mask: Sequence[int]) -> list[list[int]]:
    """[start, end) of every run of ones."""
    found, place = [], 0
    for marked, run in groupby(mask):
        length = len(list(run))
        if marked:
            found.append([place, place + length])
        place += length
    return found


def named(document: Document) -> str:
    """A document's id and where it was read, for errors."""
    return f"{document.id} ({document.place})" if document.place else document.id


@contextmanager
def _refusing(what: str, document: Document) -> Iterator[None]:
    """Whatever a template or a tokenizer raises, as a bad record."""
    try:
        yield
    except Exception as error:
        kind = "text" if document.conversation is None else "conversation"
        raise BadRecord(f"the {what} refuses {kind} {named(document)}: {error}") from error


def _first_asked(messages: Sequence[Message]) -> int:
    return next(turn for turn, message in enumerate(messages) if message["role"] not in UNASKING)


def _conversation(document: Document) -> Conversation:
    if document.conversation is None:
        raise BadRecord(
            f"document {named(document)} is plain text, which holds no answers; use records with conversations, "
            "or regenerate.answers=target"
        )
    return document.conversation
