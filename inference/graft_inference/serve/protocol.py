"""Request and response bodies, with OpenAI's fields and some of vLLM's.

A field that would change the answer and is not supported is refused by name, and so is an unknown one. null means that
a field is absent.
"""

import json
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import Tensor

from ..chat_template import check_variables, encode_chat, naming_refusals
from ..errors import GraftError
from ..prompts import text_ids
from .answer import Asked, Piece

NEUTRAL: dict[str, Any] = {
    "n": 1,
    "best_of": 1,
    "echo": False,
    "suffix": "",
    "logprobs": False,
    "top_logprobs": 0,
    "frequency_penalty": 0,
    "presence_penalty": 0,
    "logit_bias": {},
    "response_format": {"type": "text"},
    "modalities": ["text"],
    "tools": [],
    "tool_choice": "none",
    "functions": [],
}
"""What is not followed, with the value that asks for nothing."""
SAYING_NOTHING = ("user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key")
"""Known to OpenAI, and of no account for the answer."""
MOST_STOPS = 4
DEFAULT_COMPLETION = 16
"""Tokens of a completion whose request names no number, as OpenAI has it."""


class Refused(GraftError):
    """A request that cannot be followed, and the field that is the reason."""

    def __init__(self, message: str, param: str) -> None:
        super().__init__(message)
        self.param = param


class _Body(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _without_nulls(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        return {name: value for name, value in values.items() if value is not None}


class StreamOptions(_Body):
    include_usage: bool = False
    include_obfuscation: bool = False


class Generating(_Body):
    """What completions and chats have in common.

    Attributes:
        top_k, min_p, repetition_penalty, return_token_ids, skip_special_tokens: as vLLM has them; a top_k of -1 or 0
            keeps all tokens.
    """

    model: str | None = None
    max_tokens: int | None = Field(None, ge=1)
    temperature: float = Field(1.0, ge=0)
    top_p: float | None = Field(None, gt=0, le=1)
    top_k: int | None = Field(None, ge=-1)
    min_p: float | None = Field(None, ge=0, le=1)
    repetition_penalty: float | None = Field(None, gt=0)
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    stop: str | list[str] = []
    stream: bool = False
    stream_options: StreamOptions = StreamOptions()
    return_token_ids: bool = False
    skip_special_tokens: bool = True

    @model_validator(mode="before")
    @classmethod
    def _only_what_is_followed(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        for name in NEUTRAL.keys() & values.keys():
            if values[name] is not None and not _is_neutral(name, values[name]):
                raise Refused(f"{name} is not supported: leave it out", name)
        left_out = (*NEUTRAL, *SAYING_NOTHING)
        return {name: value for name, value in values.items() if name not in left_out}

    def asked(self, encode: Callable[[Any], Tensor], max_tokens: int | None) -> Asked:
        """Raises Refused for stop strings that are empty, or too many."""
        stops = [self.stop] if isinstance(self.stop, str) else self.stop
        if len(stops) > MOST_STOPS or "" in stops:
            raise Refused(f"stop: give at most {MOST_STOPS} texts, none of them empty", "stop")
        named = {name: getattr(self, name) for name in ("top_p", "min_p", "repetition_penalty")}
        top_k = None if self.top_k is None else max(self.top_k, 0)
        sampling = {"temperature": self.temperature, "seed": self.seed, "top_k": top_k, **named}
        return Asked(encode, max_tokens, sampling, tuple(stops), self.skip_special_tokens)


class CompletionBody(Generating):
    """/v1/completions: a text, or its token ids, to go on with."""

    prompt: str | list[int] | list[str] | list[list[int]]

    def to_asked(self) -> Asked:
        """Raises Refused for several prompts at once."""
        prompt = self.prompt
        if isinstance(prompt, list) and prompt and not isinstance(prompt[0], int):
            if len(prompt) > 1:
                raise Refused(f"prompt has {len(prompt)} prompts: send one a request", "prompt")
            prompt = prompt[0]

        def encode(tokenizer: Any) -> Tensor:
            with naming_refusals():
                ids = text_ids(tokenizer, prompt) if isinstance(prompt, str) else prompt
                found = torch.tensor(ids, dtype=torch.long)
            if not len(found):
                raise Refused("prompt is empty: give some text, or token ids", "prompt")
            return found

        return self.asked(encode, self.max_tokens or DEFAULT_COMPLETION)


class Part(_Body):
    type: str
    text: str


class Message(_Body):
    """Attributes:
    refusal, tool_calls, annotations, audio, function_call: what OpenAI's answers may have; accepted empty.
    """

    role: str
    content: str | list[Part]
    name: str | None = None

    @model_validator(mode="before")
    @classmethod
    def _as_answered(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        empty = [name for name in ("tool_calls", "annotations") if values.get(name) == []]
        return {name: value for name, value in values.items() if name not in empty}

    def to_template(self) -> dict[str, str]:
        """Raises Refused for anything but text."""
        parts = [] if isinstance(self.content, str) else self.content
        if other := next((part.type for part in parts if part.type != "text"), None):
            raise Refused(f"messages: a part of type {other} is not supported, only text is", "messages")
        text = self.content if isinstance(self.content, str) else "\n".join(part.text for part in parts)
        return {"role": self.role, "content": text} | ({"name": self.name} if self.name else {})


class ChatBody(Generating):
    """/v1/chat/completions: a conversation to answer.

    Attributes:
        chat_template_kwargs: variables of the chat template, such as enable_thinking.
    """

    messages: list[Message] = Field(min_length=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    chat_template_kwargs: dict[str, Any] = {}

    def to_asked(self) -> Asked:
        """Raises Refused for anything but text."""
        messages = [message.to_template() for message in self.messages]
        variables = self.chat_template_kwargs

        def encode(tokenizer: Any) -> Tensor:
            if not tokenizer.chat_template:
                raise GraftError("the target's tokenizer has no chat template: use /v1/completions")
            check_variables(tokenizer, variables, "chat_template_kwargs")
            return encode_chat(tokenizer, messages, variables)

        return self.asked(encode, self.max_completion_tokens or self.max_tokens)


def _is_neutral(name: str, value: Any) -> bool:
    neutral = NEUTRAL[name]
    return bool(value == neutral) and isinstance(value, bool) == isinstance(neutral, bool)


@dataclass
class Reply:
    """The response to one request, whole or streamed.

    Attributes:
        is_chat: whether it has the form of a chat completion, and not of a completion.
    """

    body: Generating
    model: str
    is_chat: bool
    created: int = field(default_factory=lambda: int(time.time()))
    id: str = field(init=False)

    def __post_init__(self) -> None:
        self.id = f"{'chatcmpl' if self.is_chat else 'cmpl'}-{uuid.uuid4().hex}"

    def whole(self, prompt_ids: list[int], pieces: list[Piece], usage: dict[str, Any]) -> dict[str, Any]:
        """The body of a response that is not streamed."""
        text = "".join(piece.text for piece in pieces)
        said = {"message": {"role": "assistant", "content": text, "refusal": None}} if self.is_chat else {"text": text}
        choice = self._choice(said, pieces[-1].finish, [token for piece in pieces for token in piece.ids])
        if self.body.return_token_ids:
            choice["prompt_token_ids"] = prompt_ids
        kind = "chat.completion" if self.is_chat else "text_completion"
        return self._around(kind, [choice]) | {"usage": usage}

    def opening(self) -> list[str]:
        """The events before the first piece."""
        delta = {"delta": {"role": "assistant", "content": ""}}
        return [self._event([self._choice(delta, None, [])])] if self.is_chat else []

    def piece(self, piece: Piece) -> list[str]:
        """The events of a piece; none while it has no text yet."""
        if not (piece.text or piece.finish or (piece.ids and self.body.return_token_ids)):
            return []
        said = {"delta": {"content": piece.text} if piece.text else {}} if self.is_chat else {"text": piece.text}
        return [self._event([self._choice(said, piece.finish, piece.ids)])]

    def closing(self, usage: dict[str, Any]) -> list[str]:
        """The events after the last piece."""
        wanted = self.body.stream_options.include_usage
        return [*([self._event([], usage=usage)] if wanted else []), "data: [DONE]\n\n"]

    def _choice(self, said: dict[str, Any], finish: str | None, ids: list[int]) -> dict[str, Any]:
        choice = {"index": 0, **said, "logprobs": None, "finish_reason": finish}
        return choice | ({"token_ids": ids} if self.body.return_token_ids else {})

    def _event(self, choices: list[dict[str, Any]], **more: Any) -> str:
        kind = "chat.completion.chunk" if self.is_chat else "text_completion"
        return event(self._around(kind, choices) | more)

    def _around(self, kind: str, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return {"id": self.id, "object": kind, "created": self.created, "model": self.model, "choices": choices}


def event(value: dict[str, Any]) -> str:
    """A server-sent event."""
    return f"data: {json.dumps(value)}\n\n"


def usage_of(prompt: int, emitted: int, reused: int) -> dict[str, Any]:
    """Tokens of a request, those of the prompt that were kept from the request before among them."""
    return {
        "prompt_tokens": prompt,
        "completion_tokens": emitted,
        "total_tokens": prompt + emitted,
        "prompt_tokens_details": {"cached_tokens": reused},
    }


def error_of(message: str, kind: str, param: str | None = None, code: str | None = None) -> dict[str, Any]:
    """An error as OpenAI has it."""
    # What cannot be encoded came from the request.
    said = message.encode(errors="replace").decode()
    named = param and param.encode(errors="replace").decode()
    return {"error": {"message": said, "type": kind, "param": named, "code": code}}
