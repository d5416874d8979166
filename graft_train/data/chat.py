"""Chat: conversations as token ids, and which of these are answers, both by the tokenizer's own template."""

from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import Any

from transformers import PreTrainedTokenizerBase
from transformers.utils import logging

from graft_inference.errors import GraftError
from graft_train.data.bad_records import BadRecord
from graft_train.data.documents import Document
from graft_train.data.records import UNASKING, Conversation, Message
from graft_train.data.samples import Sample


class Chat:
    """Renders conversations.

    Args:
        end_ids: tokens after which the target stops; what a template puts behind one is not the target's.
        told: variables of the template, such as enable_thinking.

    Raises:
        GraftError: the template does not mention one of them, and would ignore it without a word.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, end_ids: set[int], told: dict[str, Any] | None = None
    ) -> None:
        self.tokenizer = tokenizer
        self.end_ids = end_ids
        self.told = told or {}
        for name in self.told:
            if name not in str(tokenizer.chat_template):
                raise GraftError(
                    f"data.chat_template_kwargs: the target's chat template does not know {name}; leave it out"
                )
        self._marks: bool | None = None

    def prompts(self, document: Document) -> Iterator[list[int]]:
        """The turns up to the last that asks for an answer, and that answer's beginning; then up to the one
        before, and so on, shorter each time.

        Raises:
            GraftError: no chat template; a BadRecord: one that refuses this conversation.
        """
        messages = _conversation(document).messages
        first, roles = _first_asked(messages), [message["role"] for message in messages]
        for asked in range(len(messages) - 1, first - 1, -1):
            if roles[asked] != "assistant" and roles[asked + 1 : asked + 2] in ([], ["assistant"]):
                yield self._render(document, messages[: asked + 1], add_generation_prompt=True)["input_ids"]

    def answered(self, document: Document) -> list[Sample]:
        """The conversation with its own answers marked: one row, where the template marks them (generation
        spans); else one row for each answer, which is what stands behind the prompt for it.

        Raises:
            GraftError: no chat template; a BadRecord, which names the document: the template refuses it, its
                answers cannot be told from its prompts, or it has none.
        """
        rows = [self._by_spans(document)] if self.marks_answers(document) else self._by_prefixes(document)
        for row in rows:
            if not row.answers:
                raise BadRecord(f"the chat template finds no answer in {row.id}: nothing to train on (a zero mask)")
        return rows

    def marks_answers(self, document: Document) -> bool:
        """Whether the template has generation spans, tried on the shortest conversation there is."""
        if self._marks is None:
            _template(self.tokenizer, document)
            tiny: list[Message] = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
            verbosity = logging.get_verbosity()
            logging.set_verbosity_error()  # it warns where there are none, which is no fault
            try:
                marked = _render(self.tokenizer, tiny, None, **self.told, return_assistant_tokens_mask=True)
                self._marks = any(marked["assistant_masks"])
            except Exception:  # slow tokenizers cannot say which token a character is in
                self._marks = False
            finally:
                logging.set_verbosity(verbosity)
        return self._marks

    def _by_spans(self, document: Document) -> Sample:
        messages = _conversation(document).messages
        rendered = self._render(document, messages, return_assistant_tokens_mask=True)
        mask = rendered["assistant_masks"]
        for token in range(1, len(mask)):
            # Of a character that takes several tokens, the last of an answer, transformers marks the first alone.
            if mask[token - 1] and rendered.token_to_chars(token) == rendered.token_to_chars(token - 1):
                mask[token] = 1
        first = _first_asked(messages)
        if any(message["role"] == "assistant" for message in messages[:first]):
            greeted = len(self._render(document, messages[:first])["input_ids"])
            mask[:greeted] = [0] * len(mask[:greeted])  # nobody asked for what comes before the first question
        answers = [self._ended(rendered["input_ids"], *span) for span in spans(mask)]
        end = answers[-1][1] if answers else 0
        return Sample(f"{document.id}#0", "train", rendered["input_ids"][:end], answers)

    def _ended(self, ids: Sequence[int], start: int, end: int) -> list[int]:
        """A marked answer up to the token that ends it, which a template may leave unmarked, or mark more behind."""
        if end < len(ids) and ids[end] in self.end_ids:
            end += 1
        ends = [place for place in range(start, end) if ids[place] in self.end_ids]
        return [start, ends[-1] + 1 if ends else end]

    def _by_prefixes(self, document: Document) -> list[Sample]:
        messages = _conversation(document).messages
        first = _first_asked(messages)
        turns = [turn for turn, message in enumerate(messages) if message["role"] == "assistant" and turn > first]
        if not turns:
            raise BadRecord(f"the conversation {document.id} has no answer: nothing to train on (a zero mask)")
        return [self._by_prefix(document, messages, turn) for turn in turns]

    def _by_prefix(self, document: Document, messages: Sequence[Message], turn: int) -> Sample:
        prompt = self._render(document, messages[:turn], add_generation_prompt=True)["input_ids"]
        ids = self._render(document, messages[: turn + 1])["input_ids"]
        if ids[: len(prompt)] != prompt:
            parted = next((n for n, pair in enumerate(zip(prompt, ids, strict=False)) if pair[0] != pair[1]), len(ids))
            seen, found = (str(self.tokenizer.decode(row[max(0, parted - 5) : parted + 5])) for row in (prompt, ids))
            raise BadRecord(
                f"the answers of {document.id} cannot be told from its prompts: the prompt for turn {turn + 1} and the "
                f"conversation up to that turn part at token {parted}, {seen!r} against {found!r}; use a chat template "
                "with generation spans, or regenerate.answers=target"
            )
        start, end = self._ended(ids, len(prompt), len(ids))
        return Sample(f"{document.id}#{turn}", "train", ids[:end], [[start, end]] if end > start else [])

    def _render(self, document: Document, messages: Sequence[Message], **options: Any) -> Any:
        _template(self.tokenizer, document)
        try:
            return _render(self.tokenizer, messages, _conversation(document).tools, **self.told, **options)
        except Exception as error:  # whatever a template raises
            raise BadRecord(f"the chat template refuses conversation {document.id}: {error}") from error


def spans(mask: Sequence[int]) -> list[list[int]]:
    """[start, end) of every run of ones."""
    found, place = [], 0
    for marked, run in groupby(mask):
        length = len(list(run))
        if marked:
            found.append([place, place + length])
        place += length
    return found


def _first_asked(messages: Sequence[Message]) -> int:
    return next(turn for turn, message in enumerate(messages) if message["role"] not in UNASKING)


def _conversation(document: Document) -> Conversation:
    if document.conversation is None:
        raise BadRecord(
            f"document {document.id} is plain text, which holds no answers; use records with conversations, "
            "or regenerate.answers=target"
        )
    return document.conversation


def _template(tokenizer: PreTrainedTokenizerBase, document: Document) -> None:
    if tokenizer.chat_template is None:
        raise GraftError(
            f"document {document.id} is a conversation, but the target's tokenizer has no chat template; "
            "use an instruction-tuned target, or records with the field text"
        )


def _render(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], tools: Sequence[dict] | None, **options: Any
) -> Any:
    schemas: Any = list(tools) if tools else None
    return tokenizer.apply_chat_template(list(messages), tools=schemas, return_dict=True, **options)
