"""What the methods are to continue: held-out prompts, those of another data set, or a suite's questions."""

import hashlib
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from graft_inference import GraftError
from graft_inference.files import read_json
from graft_inference.prompts import is_plain
from graft_inference.target.model import max_positions
from graft_train.config import Config
from graft_train.config.data import DataConfig
from graft_train.config.evaluation import SUITES, EvaluateConfig
from graft_train.data.bad_records import BadRecord, BadRecords
from graft_train.data.chat import Chat
from graft_train.data.documents import Document, read_documents
from graft_train.data.prompts import build_prompts, prompt_settings, refuse_changed, room_for_prompts
from graft_train.data.records import Conversation, Message
from graft_train.data.samples import Sample, check_room, read_samples
from graft_train.data.sources import is_local
from graft_train.data.suites import Question, read_questions
from graft_train.data.target import load_tokenizer, text_config
from graft_train.evaluate.timing import new_engine
from graft_train.files import write_json
from graft_train.processes import is_main, say

ANSWERS = "answers.json"
"""The target's own answers to the turns that others follow, token ids by the turn's id."""


@dataclass
class Asked:
    """Attributes:
    samples: the prompts.
    categories: of each of them; empty where they are not of a suite.
    """

    samples: list[Sample] = field(default_factory=list)
    categories: list[str] = field(default_factory=list)


def directory_of(asked: EvaluateConfig) -> str:
    """Where the results go: suites, data sets, their subsets and splits each have a directory of their own."""
    parts = ["evaluation", asked.suite]
    if asked.path is not None and is_local(asked.path):
        path = Path(asked.path).expanduser().resolve()
        parts += [path.stem, hashlib.sha256(str(path).encode()).hexdigest()[:6]]
    elif not asked.is_own:
        split = asked.hub_split if asked.hub_split != "test" else None
        parts += [asked.path and asked.path.replace("/", "-"), asked.hub_subset, split]
    if asked.servers():
        parts += ["server", *map(_as_name, asked.servers())]
    return "-".join(filter(None, parts))


def _as_name(url: str) -> str:
    """Of a server: its host, its port, and what tells it from others there."""
    return re.sub(r"[^\w.]+", "-", url.split("://")[1].removesuffix("/v1"))


def shown_path(path: str | None) -> str | None:
    """A local file's name alone: what is pushed to the Hub leads nowhere on this machine."""
    return Path(path).name if path and is_local(path) else path


def data_of(config: Config) -> DataConfig:
    """How the suite, or the data set of `evaluation.path`, is read."""
    asked = config.evaluation
    suite = SUITES[asked.suite] if asked.suite is not None and asked.path is None else None
    return replace(
        config.data,
        path=suite.path if suite else asked.path,
        hub_split=asked.hub_split or (suite.split if suite else "test"),
        hub_subset=asked.hub_subset or (suite.subset if suite else None),
        sources=[],
        limit=None,
        streaming=False,
    )


def made_of(config: Config) -> tuple[list[str], dict[str, Any]]:
    """The stage, or the settings, that decide which prompts are measured."""
    if config.evaluation.is_own:
        return ["data"], {}
    with naming(config.evaluation):
        return [], prompt_settings(data_of(config))


def check_unchanged(config: Config, chosen: dict[str, Any], out: Path) -> None:
    """Raises GraftError if other prompts may have been read than those that `made_of` chose."""
    if not config.evaluation.is_own:
        with naming(config.evaluation):
            refuse_changed(data_of(config), chosen, out)


@contextmanager
def naming(asked: EvaluateConfig) -> Iterator[None]:
    """Errors of reading data name the settings of other stages: here they are these."""
    try:
        yield
    except GraftError as error:
        values = {name: getattr(asked, name) for name in ("suite", "path", "hub_split", "hub_subset", "max_new_tokens")}
        named = ", ".join(f"evaluation.{name}={value}" for name, value in values.items() if value is not None)
        reason = re.sub(r"\bdata\.(path|hub_split|hub_subset)\b", r"evaluation.\1", str(error))
        raise GraftError(f"no prompts by {named}: {reason}") from error


Answerer = Callable[[Sample], list[int]]
"""Gives the target's greedy answer to a prompt, as token ids."""


def asked_of(config: Config, out: Path, answer: Answerer | None = None, limit: int | None = None) -> Asked:
    """What is measured.

    Args:
        out: keeps a suite's answers, which an interrupted stage goes on from.
        answer: answers the turns that others follow; None is the run's bundle on its target.
        limit: most tokens of prompt and answer, where something else than the target bounds them.
    """
    settings, target_config = config.evaluation, text_config(config.target)
    own = max_positions(target_config)
    positions = min(own, limit or own)
    if settings.is_own:
        held_out = read_samples(Path(config.run_dir) / "data" / "samples.jsonl", "evaluation")[: settings.prompts]
        bound = "target's" if positions == own else "server's"
        check_room(held_out, settings.max_new_tokens, positions, "evaluation.max_new_tokens", bound)
        return Asked(held_out)
    room = room_for_prompts(positions, settings.max_new_tokens, "evaluation.max_new_tokens")
    data, tokenizer = data_of(config), load_tokenizer(config.target)
    with naming(settings):
        chat = Chat(tokenizer, set(), data.chat_template_kwargs, target_config.vocab_size)
        if settings.suite is not None:
            _check_template(settings.suite, tokenizer)
            return _of_suite(config, chat, room, Answers(tokenizer, out / ANSWERS, answer or by_engine(config)))
        documents = read_documents(data)
        prompts = build_prompts(documents, chat, data, count=settings.prompts, max_tokens=room, seed=config.seed)
    return Asked([Sample(prompt.id, "evaluation", prompt.ids) for prompt in prompts])


def _check_template(suite: str, tokenizer: PreTrainedTokenizerBase) -> None:
    if tokenizer.chat_template is None and not SUITES[suite].continues:
        texts = ", ".join(name for name, one in SUITES.items() if one.continues)
        raise GraftError(
            f"{suite} is asked in chats, and the target's tokenizer has no chat template: use an instruction-tuned "
            f"target, or evaluation.suite={texts}, which a text is enough for"
        )


class Answers:
    """The target's own greedy answers, each made once and kept.

    Args:
        path: where they are kept.
        answer: makes them.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, path: Path, answer: Answerer) -> None:
        self.tokenizer = tokenizer
        self.path = path
        self.answer = answer
        self.kept: dict[str, list[int]] = read_json(path) if path.exists() else {}

    def __call__(self, prompt: Sample) -> str:
        """What the target says to a prompt, as the next turn's prompt has it.

        Raises:
            BadRecord: no text says it, as it has special tokens within.
        """
        if prompt.id not in self.kept:
            self.kept[prompt.id] = self.answer(prompt)
            if is_main():
                write_json(self.path, self.kept)
        answer = self.kept[prompt.id]
        if not is_plain(self.tokenizer, answer):
            raise BadRecord(
                f"the target's answer to {prompt.id} has special tokens within, as of channels or tool calls, so that "
                "its text alone is no turn to go on from; use a suite whose questions have one turn"
            )
        return str(self.tokenizer.decode(answer, skip_special_tokens=True))


def by_engine(config: Config) -> Answerer:
    """Answers of the run's bundle, whose engine is made for the first of them."""
    engine = cache(lambda: new_engine(config, config.target.dtype, fallback=False))

    def answer(prompt: Sample) -> list[int]:
        ids, tokens = torch.tensor(prompt.prompt_ids), config.evaluation.max_new_tokens
        out = engine().generate(ids, tokens, method="autoregressive")
        found: list[int] = out.sequences[0, len(ids) :].tolist()
        return found

    return answer


def _of_suite(config: Config, chat: Chat, room: int, answer: Callable[[Sample], str]) -> Asked:
    """The first questions that fit, each with all its turns that do.

    Raises:
        GraftError: none fits.
    """
    settings, data = config.evaluation, data_of(config)
    questions = read_questions(str(settings.suite), data, config.seed)
    asked, taken, left_out, bad = Asked(), 0, 0, BadRecords.of(data)
    for question in questions:
        if taken == settings.prompts:
            break
        try:
            turns = list(_turns(question, chat, room, answer))
        except BadRecord as error:
            bad.add(error)
            continue
        taken += bool(turns)
        left_out += len(question.turns) - len(turns)
        asked.samples += turns
        asked.categories += [question.category] * len(turns)
    bad.report(f"{len(questions)} questions")
    if left_out:
        say(f"evaluate: left out {left_out} turns of questions, whose prompts are longer than {room} tokens")
    if not taken:
        raise GraftError(
            f"no question has a prompt of at most {room} tokens, which the target's length or its server allows"
        )
    return asked


def _turns(question: Question, chat: Chat, room: int, answer: Callable[[Sample], str]) -> Iterator[Sample]:
    """The prompts of a question's turns, up to the first that is too long; the target's answers stand between."""
    messages: tuple[Message, ...] = ()
    for number, turn in enumerate(question.turns, start=1):
        messages += ({"role": "user", "content": turn},)
        prompt = Sample(f"{question.id}/{number}", "evaluation", _ids(question, messages, chat))
        if len(prompt.ids) > room:
            return
        yield prompt
        if number < len(question.turns):
            messages += ({"role": "assistant", "content": answer(prompt)},)


def _ids(question: Question, messages: tuple[Message, ...], chat: Chat) -> list[int]:
    """Of a conversation; without a chat template, of the text of its first turn."""
    conversation = Document(question.id, "evaluation", conversation=Conversation(messages), place=question.place)
    if chat.tokenizer.chat_template is not None:
        return next(chat.prompts(conversation))
    text = question.turns[0]
    return chat.opened(replace(conversation, text=text, conversation=None), text, len(text) + 1)
