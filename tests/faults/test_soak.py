"""Thousands of requests on one engine and one server: nothing piles up, and every answer is plain decoding's."""

import gc
import random
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing

import openai
import psutil
import pytest
import torch

from graft_inference import METHODS, GraftEngine
from tests.graft_inference.serving import served, write_pair
from tests.graft_inference.tiny import VOCAB, learned_policy, tiny_engine, tiny_model

from .road import ALL

MEGABYTE = 1 << 20
ON_ENGINE, ON_SERVER, SETTLED = (2000, 1000, 200) if ALL else (80, 64, 48)
"""Requests; after so many, with all that is imported at first need, memory has to be flat."""
MOST_OBJECTS = 200
"""Objects known to the collector that may be gained: far less than one a request."""
MOST_BYTES = 8 * MEGABYTE
"""The same of memory that is a process's alone, as allocators keep some; a request takes hundreds of kilobytes."""


def soak(
    count: int, at_once: int, ask: Callable[[random.Random], None], size: Callable[[], dict[str, int]]
) -> dict[str, int]:
    """What sizes gained after SETTLED requests: the least of the last third over the least of the first.

    Peaks come and go with long requests; what piles up stays.
    """
    requests, sizes = random.Random(0), []
    every = max(1, (count - SETTLED) // at_once // 30)
    for number in range(at_once, count + 1, at_once):
        ask(requests)
        if number > SETTLED and not number // at_once % every:
            sizes.append(size())
    third = max(1, len(sizes) // 3)
    return {
        name: min(one[name] for one in sizes[-third:]) - min(one[name] for one in sizes[:third]) for name in sizes[0]
    }


def own_size() -> dict[str, int]:
    gc.collect()
    return {"objects": len(gc.get_objects()), "bytes": psutil.Process().memory_full_info().uss}


def settings_of(requests: random.Random) -> dict:
    temperature = requests.choice([0.0, 0.7, 1.3])
    return {"temperature": temperature, "seed": requests.randrange(1000), "method": requests.choice(METHODS)}


def prompts_of(requests: random.Random, count: int) -> list[torch.Tensor]:
    return [torch.tensor(requests.choices(range(VOCAB), k=requests.randint(1, 60))) for _ in range(count)]


@torch.inference_mode()
def test_an_engine_stays_as_it_is_over_thousands_of_requests(tally):
    """Of mixed lengths, methods and temperatures; alone, in batches, and streams that are left."""
    engine = tiny_engine(tiny_model("llama"), learned_policy())

    def ask(requests: random.Random) -> None:
        settings, tokens = settings_of(requests) | {"pad_token_id": 0}, requests.randint(1, 30)
        kind = requests.choice(["alone", "alone", "batch", "left"])
        prompts = prompts_of(requests, requests.randint(2, 4) if kind == "batch" else 1)
        plain = engine.generate(prompts, tokens, **settings | {"method": "autoregressive"})
        if kind == "left":
            with closing(engine.stream(prompts[0], tokens, **settings)) as stream:
                said = [next(stream) for _ in range(requests.randint(1, tokens))]
            expected = plain.sequences[0, len(prompts[0]) :].tolist()
            assert said == expected[: len(said)]
        else:
            found = engine.generate(prompts, tokens, **settings)
            assert found.sequences.tolist() == plain.sequences.tolist()
        tally(f"request on one engine, {kind}")

    gained = soak(ON_ENGINE, 1, ask, own_size)
    print(f"an engine gained {gained} from request {SETTLED} to {ON_ENGINE}")
    assert gained["objects"] < MOST_OBJECTS
    assert not ALL or gained["bytes"] < MOST_BYTES


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    return write_pair(tmp_path_factory.mktemp("pair"), positions=512)


def pieces_of(client: openai.OpenAI, ids: list[int], tokens: int, settings: dict) -> Iterator[list[int]]:
    """Token ids as they come; the client goes where the caller stops."""
    with client.completions.create(
        model="tiny", prompt=ids, max_tokens=tokens, stream=True, extra_body={"return_token_ids": True}, **settings
    ) as stream:
        for chunk in stream:
            yield chunk.choices[0].token_ids


def test_a_server_stays_as_it_is_over_a_thousand_requests_of_clients_that_come_and_go(tally, bundle):
    engine = GraftEngine.from_pretrained(bundle, bundle.parent / "target", "cpu", "float32", fallback=False)
    with (
        served(bundle) as server,
        openai.OpenAI(base_url=server.url, api_key="none", max_retries=0) as client,
        ThreadPoolExecutor(4) as threads,
    ):
        process = psutil.Process(server.process.pid)

        def ask(requests: random.Random) -> None:
            """Four at a time."""
            asked = []
            for prompt in prompts_of(requests, 4):
                settings = settings_of(requests)
                del settings["method"]
                tokens, leaves = requests.randint(1, 30), requests.random() < 0.25
                said = threads.submit(answer, prompt, tokens, settings, leaves)
                asked.append((prompt, tokens, settings, leaves, said))
            for prompt, tokens, settings, leaves, said in asked:
                plain = engine.generate(prompt, tokens, method="autoregressive", **settings)
                expected = plain.sequences[0, len(prompt) :].tolist()
                assert said.result() == expected[: len(said.result()) if leaves else None]
                tally("request on one server, left by its client" if leaves else "request on one server")

        def answer(prompt: torch.Tensor, tokens: int, settings: dict, leaves: bool) -> list[int]:
            with closing(pieces_of(client, prompt.tolist(), tokens, settings)) as pieces:
                return next(pieces) if leaves else [token for piece in pieces for token in piece]

        gained = soak(ON_SERVER, 4, ask, lambda: {"bytes": process.memory_full_info().uss})
        print(f"a server gained {gained} over {ON_SERVER} requests")
        assert not ALL or gained["bytes"] < MOST_BYTES
        assert server.process.poll() is None
