"""A conversation as the target's chat template writes it."""

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor

from .errors import GraftError


def template_variables(given: Sequence[str]) -> dict[str, Any]:
    """What a template is told beside the messages, by name.

    Args:
        given: NAME=VALUE each, the value in JSON.

    Raises:
        GraftError: a value that is not JSON.
    """
    variables = {}
    for one in given:
        name, _, value = one.partition("=")
        try:
            variables[name] = json.loads(value)
        except ValueError as error:
            raise GraftError(
                f"--template-variable {one}: write NAME=VALUE, the value in JSON: false, 3 or '\"high\"' ({error})"
            ) from error
    return variables


def opening(system: str | None) -> list[dict[str, str]]:
    """What a conversation begins with: the system prompt, if there is one."""
    return [] if system is None else [{"role": "system", "content": system}]


def check_template(tokenizer: Any, variables: dict[str, Any]) -> None:
    """Raises GraftError where there is no template, or one that does not mention a variable and would ignore it."""
    if not tokenizer.chat_template:
        raise GraftError("the target's tokenizer has no chat template: use graft-generate, without --chat")
    for name in variables:
        if name not in str(tokenizer.chat_template):
            raise GraftError(f"--template-variable: the target's chat template does not know {name}; leave it out")


def encode_chat(tokenizer: Any, messages: list[dict[str, str]], variables: dict[str, Any]) -> Tensor:
    """Ids of the conversation up to where the answer begins, [S] int64.

    Args:
        messages: of the template's roles, each with its content.
        variables: what the template is told beside, such as enable_thinking.

    Raises:
        GraftError: a text that the template or the tokenizer refuses.
    """
    with naming_refusals():
        text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False, **variables)
        return tokenizer(text, return_tensors="pt", add_special_tokens=False).input_ids[0].long()


@contextmanager
def naming_refusals() -> Iterator[None]:
    """Makes what a template or a tokenizer raises, which is of many kinds, a GraftError."""
    try:
        yield
    except Exception as error:
        raise GraftError(f"the target's tokenizer refuses the prompt: {error}") from error
