"""Servers: the target answers through OpenAI-compatible servers, many requests at a time.

Prompts go out as token ids and answers come back as such where the server can (vLLM, SGLang): a text that is
tokenised again may give other tokens than the target drew.
"""

import asyncio
from collections import Counter, deque
from collections.abc import Iterator
from contextlib import AsyncExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import openai
from tqdm import tqdm

from graft_inference.errors import GraftError
from graft_train.config.regenerate import RegenerateConfig
from graft_train.data.bad_records import BadRecord
from graft_train.data.chat import Chat
from graft_train.data.prompts import Prompt
from graft_train.data.samples import answered, to_line
from graft_train.processes import say
from graft_train.regenerate.in_process import keep_whole_answers, until_end
from graft_train.servers import EXTENSIONS, TIMEOUT, options, trouble, without_key

PASSING = {408, 409, 429}
"""Refusals that the client asks again after, as after all of 500 and above."""
OF_PROMPT = {400, 413, 422}
"""Refusals that may be one prompt's alone."""
IN_A_ROW = 8
"""Prompts that a server may refuse one after another, or a hundredth of all, until it counts as refusing all."""
SHOWN = 3
"""Refused prompts that are named."""


class Refused(GraftError):
    """A prompt that a server does not answer, or not so that it can be used."""


def ask_servers(prompts: list[Prompt], path: Path, settings: RegenerateConfig, seed: int, chat: Chat) -> None:
    """Appends an answer to every prompt that has none in `path` yet, in the order in which they come.

    A prompt that is refused twice is left out, and reported in the end.

    Raises:
        GraftError: a server refuses one prompt after another, or whatever is asked, or none is left that answers.
            What was answered is kept.
    """
    done = keep_whole_answers(path)
    pending = deque((number, prompt) for number, prompt in enumerate(prompts) if prompt.id not in done)
    with (
        path.open("ab") as file,
        tqdm(total=len(prompts), initial=len(prompts) - len(pending), desc="regenerate", unit="answer") as bar,
    ):
        asyncio.run(_Questions(pending, file, bar, settings, seed, chat, len(prompts)).ask_all())


@dataclass
class _Questions:
    """What is still to be asked, and where the answers go.

    Attributes:
        total: prompts, those answered in earlier runs included.
        refused: why a prompt has no answer, by its id.
        in_a_row: prompts that each server has refused since its last answer.
        answers: how many each server has given.
    """

    pending: deque[tuple[int, Prompt]]
    file: BinaryIO
    bar: Any
    settings: RegenerateConfig
    seed: int
    chat: Chat
    total: int
    retokenised: int = 0
    refused: dict[str, str] = field(default_factory=dict)
    in_a_row: Counter[str] = field(default_factory=Counter)
    answers: Counter[str] = field(default_factory=Counter)

    async def ask_all(self) -> None:
        async with AsyncExitStack() as opened:
            clients = {}
            for url in (url.rstrip("/") for url in self.settings.servers()):
                client = openai.AsyncOpenAI(**options(url), timeout=TIMEOUT, max_retries=self.settings.retries)
                clients[url] = await opened.enter_async_context(client)
            while self.pending:
                before = len(self.pending)
                troubles = await self._round(clients)
                if len(self.pending) >= before:
                    raise GraftError(
                        f"no server answers ({'; '.join(troubles)}); {before} prompts are left. Start one, set "
                        "regenerate.base_url to it, and run again: what was answered is kept"
                    )
        self._report_refused()
        if self.retokenised:
            say(
                f"regenerate: {self.retokenised} answers came back as text and were tokenised again, which may not "
                "give the tokens that the target drew; a server that knows return_token_ids is better"
            )

    async def _round(self, clients: dict[str, openai.AsyncOpenAI]) -> list[str]:
        """Until nothing is pending, or every server has failed; what went wrong with those that did.

        A worker whose request fails hands its prompt back, for another server's to take, and stops.
        """
        troubles: dict[str, str] = {}
        models = await asyncio.gather(*(self._model(client, url, troubles) for url, client in clients.items()))
        try:
            async with asyncio.TaskGroup() as group:
                for (url, client), model in zip(clients.items(), models, strict=True):
                    for _ in range(self.settings.batch if model else 0):
                        group.create_task(self._work(client, url, str(model), troubles))
        except ExceptionGroup as failed:
            raise failed.exceptions[0] from None
        return [f"{url}: {trouble}" for url, trouble in troubles.items()]

    async def _model(self, client: openai.AsyncOpenAI, url: str, troubles: dict[str, str]) -> str | None:
        """The name under which the server knows its (first) model; None if it does not answer."""
        try:
            with _refusals(f"{url}/models"):
                return str((await client.models.list()).data[0].id)
        except openai.APIError as error:
            troubles[url] = trouble(error)
            return None
        except (IndexError, TypeError, AttributeError) as error:
            raise GraftError(f"{url}/models names no model; is this an OpenAI-compatible server?") from error

    async def _work(self, client: openai.AsyncOpenAI, url: str, model: str, troubles: dict[str, str]) -> None:
        while self.pending:
            number, prompt = self.pending.popleft()
            temperatures = self.settings.temperatures
            drawn = {
                **(EXTENSIONS if self.settings.server_extensions else {}),
                "temperature": temperatures[number % len(temperatures)],
                "top_p": 1.0,
                "seed": self.seed + number,
                "max_tokens": self.settings.max_new_tokens,
            }
            answers = self.answers[url]
            try:
                with _refusals(f"{url}/completions"):
                    completion = await client.completions.create(model=model, prompt=prompt.ids, extra_body=drawn)
                ids = self._answer(url, prompt, completion)
            except openai.APIError as error:
                # An error of its own may be this prompt's doing: a server that answers others meanwhile is there.
                there = self.answers[url] > answers or prompt.id in self.refused
                if there and isinstance(error, openai.APIStatusError) and error.status_code == 500:
                    self._refuse(url, number, prompt, trouble(error))
                    continue
                self.pending.append((number, prompt))
                troubles[url] = trouble(error)
                return
            except (Refused, BadRecord) as error:
                self._refuse(url, number, prompt, str(error))
                continue
            self.in_a_row[url] = 0
            self.answers[url] += 1
            self.refused.pop(prompt.id, None)
            sample = answered(prompt.id, prompt.ids, ids, drawn)
            # Flushed, a line outlives this process; should the machine fail, what is lost is asked again.
            self.file.write(to_line(sample))
            self.file.flush()
            self.bar.update(1)

    def _refuse(self, url: str, number: int, prompt: Prompt, why: str) -> None:
        """Leaves the prompt for the end, where it is asked once more, or else out.

        Raises:
            GraftError: this was one refusal after another.
        """
        reason = f"prompt {prompt.id}{f' ({prompt.place})' if prompt.place else ''}: {why}"
        if prompt.id not in self.refused:
            self.in_a_row[url] += 1
            if self.in_a_row[url] >= max(IN_A_ROW, self.total // 100):
                raise GraftError(f"{reason}. So it went with {self.in_a_row[url]} prompts in a row")
            self.pending.append((number, prompt))
        self.refused[prompt.id] = reason

    def _report_refused(self) -> None:
        """Says which prompts have no answer. Raises GraftError where none has one."""
        refusals = list(self.refused.values())
        if refusals and len(refusals) == self.total:
            raise GraftError(f"none of {self.total} prompts was answered; {refusals[0]}")
        if refusals:
            rest = len(refusals) - SHOWN
            lines = [*refusals[:SHOWN], *([f"... {rest} more"] if rest > 0 else [])]
            say("\n  ".join([f"regenerate: {len(refusals)} of {self.total} prompts have no answer:", *lines]))

    def _answer(self, url: str, prompt: Prompt, completion: Any) -> list[int]:
        """The tokens of the answer, the one that ended it included, once.

        Raises:
            Refused: the response is no answer to this prompt.
        """
        try:
            choice = completion.to_dict()["choices"][0]
            ids, finish = choice.get("token_ids"), choice["finish_reason"]
            if ids is None:
                ids = self._tokenise(url, choice["text"])
                self.retokenised += 1
        except (KeyError, IndexError, TypeError, AttributeError) as error:
            raise Refused(f"{url} sent no completion: {without_key(str(completion))[:300]}") from error
        if choice.get("prompt_token_ids") not in (None, prompt.ids):
            raise Refused(f"{url} changed the tokens of the prompt; it must take them as they are")
        stop = choice.get("matched_stop", choice.get("stop_reason"))  # SGLang's and vLLM's names for it
        ends = self.chat.end_ids | ({stop} if isinstance(stop, int) else set())
        ids = until_end(ids, ends)
        if finish == "stop" and (not ids or ids[-1] not in ends):
            ids = [*ids, stop if isinstance(stop, int) else self.chat.tokenizer.eos_token_id]
        self.chat.check_known(ids, f"the answer of {url}")
        if not ids or finish not in ("stop", "length"):
            raise Refused(f"{url} did not finish the answer: finish_reason {finish}, {len(ids)} tokens")
        return ids

    def _tokenise(self, url: str, text: str) -> list[int]:
        text = text.rstrip("\N{REPLACEMENT CHARACTER}")  # a character that the limit cut in two
        try:
            ids = self.chat.tokenizer(text, add_special_tokens=False).input_ids
        except Exception as error:  # whatever a tokenizer raises
            raise Refused(f"{url} sends text that the target's tokenizer refuses: {error}") from error
        if self.chat.tokenizer.decode(ids, clean_up_tokenization_spaces=False) != text:
            raise Refused(
                f"{url} sends text, which the target's tokenizer cannot give back: {text[:80]!r}; use a server that "
                "knows return_token_ids, and the same target on both sides"
            )
        return ids


@contextmanager
def _refusals(url: str) -> Iterator[None]:
    """Tells refusals that would repeat themselves from those that pass.

    Raises:
        Refused: what may be one request's alone.
        GraftError: what meets whoever asks.
        openai.APIError: the server failed every attempt, or cannot be reached.
    """
    try:
        yield
    except openai.APIStatusError as error:
        if error.status_code in PASSING or error.status_code >= 500:
            raise
        refusal = Refused if error.status_code in OF_PROMPT else GraftError
        raise refusal(
            f"{url} refuses: {trouble(error)}. See regenerate.base_url (it ends in /v1 as a rule) and "
            "regenerate.server_extensions (false sends OpenAI's fields alone)"
        ) from error
    except ValueError as error:
        raise Refused(f"{url} sent something else than JSON: {error}") from error
