"""A conversation as the target's chat template writes it."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from inspect import signature
from typing import Any

from jinja2 import TemplateError, meta, nodes
from torch import Tensor
from transformers import PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import _compile_jinja_template

from .errors import GraftError
from .files import parse_json

GIVEN = {"messages", *signature(PreTrainedTokenizerBase.apply_chat_template).parameters}
"""Variables that transformers gives a template itself, or options of its own."""


def template_variables(given: Sequence[str]) -> dict[str, Any]:
    """Variables of a chat template, by name.

    Args:
        given: NAME=VALUE each, the value in JSON.

    Raises:
        GraftError: a value that is not JSON.
    """
    variables = {}
    for one in given:
        name, _, value = one.partition("=")
        try:
            variables[name] = parse_json(value)
        except ValueError as error:
            raise GraftError(
                f"--template-variable {one}: write NAME=VALUE, the value in JSON: false, 3 or '\"high\"' ({error})"
            ) from error
    return variables


def opening(system: str | None) -> list[dict[str, str]]:
    """What a conversation begins with: the system prompt, if there is one."""
    return [] if system is None else [{"role": "system", "content": system}]


def check_template(tokenizer: Any, variables: dict[str, Any]) -> None:
    """Raises GraftError where there is no template, or what `check_variables` raises."""
    if not tokenizer.chat_template:
        raise GraftError("the target's tokenizer has no chat template: use graft-generate, without --chat")
    check_variables(tokenizer, variables, "--template-variable")


def check_variables(tokenizer: Any, names: Iterable[str], setting: str) -> None:
    """Whether the chat template, or one of several, reads these variables.

    Args:
        setting: the setting that gives them, for errors.

    Raises:
        GraftError: it does not, and would ignore one without a word, or transformers gives that one itself.
    """
    templates = tokenizer.chat_template or {}
    templates = [templates] if isinstance(templates, str) else templates.values()
    for name in names:
        if name in GIVEN:
            raise GraftError(f"{setting}: {name} is not the setting's to give, transformers gives it; leave it out")
        if not any(name in variables_read(template) for template in templates):
            raise GraftError(f"{setting}: the target's chat template does not know {name}; leave it out")


def variables_read(template: str) -> frozenset[str]:
    """Names of the variables that a chat template reads; raises GraftError if it is no template."""
    return _read(template)[0]


def names_read(template: str) -> frozenset[str]:
    """Names that a chat template looks up in its variables, such as content in a message, and its other strings.

    Raises:
        GraftError: it is no template.
    """
    return _read(template)[1]


@lru_cache(maxsize=16)
def _read(template: str) -> tuple[frozenset[str], frozenset[str]]:
    try:
        # The same extensions as where it is rendered: generation is no tag of Jinja's own.
        parsed = _compile_jinja_template(template).environment.parse(template)
        variables = meta.find_undeclared_variables(parsed)
    except TemplateError as error:
        raise GraftError(f"the target's chat template is no template of Jinja: {error}") from error
    attributes = {node.attr for node in parsed.find_all(nodes.Getattr)}
    strings = {node.value for node in parsed.find_all(nodes.Const) if isinstance(node.value, str)}
    return frozenset(variables), frozenset(attributes | strings)


def encode_chat(tokenizer: Any, messages: list[dict[str, str]], variables: dict[str, Any]) -> Tensor:
    """Ids of the conversation up to where the answer begins, [S] int64.

    Args:
        messages: of the template's roles, each with its content.
        variables: of the template, such as enable_thinking.

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
