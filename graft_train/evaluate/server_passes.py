"""One pass: every prompt is sent to a server once, so many at a time, and what came back is timed."""

import asyncio
import hashlib
import json
import math
import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from http.client import HTTPException
from operator import index
from typing import Any
from urllib.request import urlopen

import openai
from prometheus_client.parser import text_string_to_metric_families

from graft_inference.errors import GraftError
from graft_train.data.samples import Sample
from graft_train.servers import EXTENSIONS, MALFORMED, TIMEOUT, options, trouble

BUSY = {429, 503}
"""What a server says that takes no more requests at the moment."""


@dataclass(frozen=True)
class Asking:
    """What every request asks.

    Attributes:
        extensions: send what vLLM, SGLang and our own server know beyond OpenAI's fields.
        seed: of the first prompt; the next ones have the next.
    """

    max_tokens: int
    temperature: float
    seed: int
    extensions: bool

    def fields(self, number: int) -> dict[str, Any]:
        drawn = {
            "temperature": self.temperature,
            "top_p": 1.0,
            "seed": self.seed + number,
            "max_tokens": self.max_tokens,
        }
        return {**(EXTENSIONS if self.extensions else {}), **drawn}


@dataclass
class Timed:
    """What one request took, seen from here.

    Attributes:
        tokens: of the answer, by the server's own count.
        first_tokens: of these, how many came with the first piece.
        first_seconds: from the request to the first piece.
        seconds: from the request to the last piece.
        answer: a hash of the answer's token ids; None where the server does not tell them.
    """

    tokens: int
    first_tokens: int
    first_seconds: float
    seconds: float
    answer: str | None

    @property
    def decoded(self) -> int:
        """Tokens behind the first piece."""
        return self.tokens - self.first_tokens

    @property
    def decode_seconds(self) -> float:
        return self.seconds - self.first_seconds


@dataclass(frozen=True)
class Server:
    """Attributes:
    url: of the API, which ends in /v1 as a rule.
    model: its name there.
    """

    url: str
    model: str

    @classmethod
    def at(cls, url: str) -> "Server":
        """Raises GraftError where no OpenAI-compatible server answers."""
        with failures(url), openai.OpenAI(**options(url), timeout=10.0, max_retries=0) as client:
            try:
                return cls(url, str(client.models.list().data[0].id))
            except MALFORMED as error:
                raise GraftError(f"{url}/models names no model; is this an OpenAI-compatible server?") from error

    def counts(self) -> dict[str, float] | None:
        """Rounds, the tokens they emitted, and those of them by proposal's place, since the server started.

        None where it has no `/metrics`, or no figures of speculation there that can be read.
        """
        try:  # the address is one of http or https: the settings see to it
            with urlopen(f"{self.url.removesuffix('/v1')}/metrics", timeout=10.0) as response:  # nosec B310
                return counts_of(response.read().decode())
        except (OSError, HTTPException, *MALFORMED):
            return None

    def answer(self, sample: Sample, asking: Asking, tokenizer: Any) -> list[int]:
        """The whole answer to a prompt, as token ids. Raises GraftError where the server fails."""
        with failures(self.url), openai.OpenAI(**options(self.url), timeout=TIMEOUT, max_retries=0) as client:
            said = client.completions.create(
                model=self.model, prompt=sample.prompt_ids, extra_body=asking.fields(0)
            ).choices[0]
            return _ids_of(said) or list(tokenizer(said.text, add_special_tokens=False).input_ids)

    def run(self, samples: Sequence[Sample], concurrency: int, asking: Asking) -> dict[str, Any]:
        """A pass, as JSON values: its seconds, its requests, and what `/metrics` gained. Raises GraftError."""
        before = self.counts()
        start = time.perf_counter()
        with failures(self.url):
            requests = asyncio.run(self._all(samples, concurrency, asking))
        seconds, after = time.perf_counter() - start, self.counts()
        counts = gained(before, after) if before and after else None
        return {"seconds": seconds, "requests": [vars(one) for one in requests], "counts": counts}

    async def _all(self, samples: Sequence[Sample], concurrency: int, asking: Asking) -> list[Timed]:
        pending, found = deque(enumerate(samples)), {}

        async def work(client: openai.AsyncOpenAI) -> None:
            while pending:
                number, sample = pending.popleft()
                found[number] = await self._ask(client, sample, asking.fields(number))

        async with openai.AsyncOpenAI(**options(self.url), timeout=TIMEOUT, max_retries=0) as client:
            try:
                async with asyncio.TaskGroup() as group:
                    for _ in range(concurrency):
                        group.create_task(work(client))
            except ExceptionGroup as failed:
                raise failed.exceptions[0] from None
        return [found[number] for number in range(len(samples))]

    async def _ask(self, client: openai.AsyncOpenAI, sample: Sample, fields: dict[str, Any]) -> Timed:
        tokens, finish, first, last = None, None, None, 0.0
        ids: list[int] = []
        start = time.perf_counter()
        stream = await client.completions.create(
            model=self.model,
            prompt=sample.prompt_ids,
            stream=True,
            stream_options={"include_usage": True},
            extra_body=fields,
        )
        async for chunk in stream:
            tokens = chunk.usage.completion_tokens if chunk.usage else tokens
            for choice in chunk.choices:
                new = _ids_of(choice)
                ids += new
                finish = choice.finish_reason or finish
                if choice.text or new or choice.finish_reason:
                    last = time.perf_counter() - start
                    first = first or (last, len(new) or 1)
        if first is None or finish is None or tokens is None:
            raise GraftError(f"{self.url} broke off its answer to {sample.id}, or did not say how many tokens it has")
        _check_count(self.url, tokens, fields["max_tokens"], len(ids) or None)
        digest = hashlib.sha256(json.dumps(ids).encode()).hexdigest()[:16] if ids else None
        return Timed(tokens, min(first[1], tokens), first[0], last, digest)


def _ids_of(choice: Any) -> list[int]:
    """What a server tells beyond OpenAI's fields; empty where it does not. Raises TypeError for other than integers."""
    return [index(one) for one in getattr(choice, "token_ids", None) or []]


def _check_count(url: str, tokens: Any, most: int, told: int | None) -> None:
    """Raises GraftError for a count of tokens that cannot be true.

    Args:
        most: how many were asked for.
        told: how many token ids came; None: the server tells none.
    """
    if not isinstance(tokens, int) or not 0 <= tokens <= most or told not in (None, tokens):
        came = "" if told is None else f", and {told} token ids came"
        raise GraftError(
            f"{url} counts completion_tokens={tokens!r} in an answer of at most {most}{came}: its speed cannot be told"
        )


def gained(before: dict[str, float], after: dict[str, float]) -> dict[str, float] | None:
    """What counters gained; None where one fell, as in a server that started anew, or is no number."""
    found = {name: after.get(name, 0.0) - before.get(name, 0.0) for name in before | after}
    return found if all(0 <= value < math.inf for value in found.values()) else None


def counts_of(page: str) -> dict[str, float] | None:
    """The figures of speculation on a `/metrics` page: `rounds`, `tokens`, and `accepted N` by place from 1.

    Ours count the tokens that rounds emit. vLLM counts drafts and accepted tokens; each draft gives one token more.
    """
    found: dict[str, float] = {}
    names = {
        "graft_rounds_total": ("rounds",),
        "graft_decoded_tokens_total": ("tokens",),
        "vllm:spec_decode_num_drafts_total": ("rounds", "tokens"),
        "vllm:spec_decode_num_accepted_tokens_total": ("tokens",),
    }
    places = {"graft_accepted_tokens_total": 0, "vllm:spec_decode_num_accepted_tokens_per_pos_total": 1}
    for family in text_string_to_metric_families(page):
        for sample in family.samples:
            into = names.get(sample.name, ())
            if sample.name in places:  # vLLM counts places from 0
                into = (f"accepted {int(sample.labels['position']) + places[sample.name]}",)
            for name in into:
                found[name] = found.get(name, 0.0) + sample.value
    return found if {"rounds", "tokens"} <= found.keys() else None


@contextmanager
def failures(url: str) -> Iterator[None]:
    """Tells in one line what a server does not do, or does in no form that can be read.

    Raises:
        GraftError: names the server and the remedy.
    """
    try:
        yield
    except openai.APIStatusError as error:
        if error.status_code in BUSY:
            remedy = "it takes no more at a time: lower evaluation.concurrency, or let more requests wait there"
        else:
            remedy = "regenerate.server_extensions=false sends it OpenAI's fields alone"
        raise GraftError(f"{url} refuses: {trouble(error)} ({remedy})") from error
    except openai.APIError as error:
        raise GraftError(f"{url} does not answer, or not to the end: {trouble(error)}") from error
    except GraftError:
        raise
    except MALFORMED as error:
        raise GraftError(
            f"{url} does not answer as an OpenAI-compatible server does: {type(error).__name__} {error}"
        ) from error
