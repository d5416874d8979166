"""What people give: records, suites, prompts and requests to the server."""

import contextlib
import gzip
import json
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from random import Random
from typing import Any

import datasets
import numpy as np
import pyarrow
import torch
from pyarrow import parquet

from graft_inference import GraftEngine, GraftError
from graft_train.config.data import DataConfig
from graft_train.data.chat import Chat
from graft_train.data.documents import read_documents
from graft_train.data.prompts import build_prompts
from graft_train.data.suites import read_questions
from tests.graft_inference.tiny import VOCAB, learned_policy, tiny_engine, tiny_model
from tests.graft_inference.tiny_bundle import tiny_tokenizer
from tests.graft_train.data.test_suites import EAGLE, OWN
from tests.graft_train.tiny_chat import MARKED, VOCABULARY, word_tokenizer

from .mutate import NUMBERS, VALUES, damage_bytes, damaged_value
from .subject import Directories, Subject

TURNS = [{"role": "user", "content": "a b"}, {"role": "assistant", "content": "c d"}, {"role": "user", "content": "e"}]
RECORDS: list[dict[str, Any]] = [
    {"id": "m", "messages": TURNS},
    {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]},
    {"text": "a b c d e f g h a b c d e f g h", "id": 7},
    {"prompt": "a b c", "response": "d", "system": "s"},
    {"question": "a", "answer": "b"},
    {"turns": ["a", "b"], "category": "c"},
    {"data": ["a", "b", "c", "d"]},
    {"messages": TURNS, "tools": [{"name": "f", "parameters": {"type": "object"}}]},
    {"messages": [*TURNS, {"role": "assistant", "content": "", "tool_calls": [{"name": "f", "arguments": "{}"}]}]},
]


class Records(Directories):
    """Data sets: with bad records left out, those that were not damaged give the documents that they gave before."""

    share = 1

    def __init__(self, root: Path) -> None:
        lines = [json.dumps(record, ensure_ascii=False) for record in RECORDS]
        written = {
            "lines": {"data.jsonl": "\n".join(lines).encode()},
            "array": {"data.json": f"[{', '.join(lines)}]".encode()},
            "packed": {"data.jsonl.gz": gzip.compress("\n".join(lines).encode())},
            "texts": {f"{name}.py": b"a b c d\n" * 9 for name in "ab"},
        }
        for name, files in written.items():
            (root / name).mkdir(parents=True)
            for file, content in files.items():
                (root / name / file).write_bytes(content)
        (root / "table").mkdir()
        table = pyarrow.Table.from_pylist([{"id": str(number), "text": f"a b c {number}"} for number in range(6)])
        parquet.write_table(table, root / "table" / "data.parquet")
        super().__init__(root, {name: root / name for name in [*written, "table"]})
        self.chat = Chat(word_tokenizer(MARKED), {1}, None, len(VOCABULARY))
        self.known = dict(zip(lines, map(self._documents_of, lines), strict=True))
        self.own = {".jsonl": damage_record}

    def open(self) -> None:
        datasets.config.HF_DATASETS_CACHE = self.damaged.parent / "cache"

    def use(self) -> str:
        config = DataConfig(path=str(self.damaged), prompt_tokens=4, on_error="skip")
        documents = read_documents(config)
        found = [(one.text, one.conversation) for one in documents]
        for line in self._sound_lines():
            if any(document not in found for document in self.known.get(line, ())):
                return f"a record was lost or changed: {line[:100]}"
        try:
            prompts = build_prompts(documents, self.chat, config, count=20, max_tokens=32, seed=0)
        except GraftError:
            return "right"  # none of what is left can be asked
        fine = all(0 < len(one.ids) <= 32 and 0 <= min(one.ids) <= max(one.ids) < len(VOCABULARY) for one in prompts)
        return "right" if fine else "a prompt that is none"

    def _sound_lines(self) -> list[str]:
        """Those that stand in the damaged file as they were, where each stands for itself."""
        file = self.damaged / "data.jsonl"
        if not file.is_file():
            return []
        lines = file.read_bytes().removeprefix(b"\xef\xbb\xbf").split(b"\n")
        return [line.decode() for line in lines if line.decode(errors="replace") in self.known]

    def _documents_of(self, line: str) -> list[Any]:
        """Of a record that stands alone."""
        self._copy("lines")
        (self.damaged / "data.jsonl").write_text(line, encoding="utf-8")
        documents = read_documents(DataConfig(path=str(self.damaged)))
        return [(one.text, one.conversation) for one in documents]


def damage_record(path: Path, rng: Random) -> str:
    """One value of one record."""
    lines = path.read_text(encoding="utf-8").split("\n")
    place = rng.choice([number for number, line in enumerate(lines) if line])
    lines[place], said = damaged_value(json.loads(lines[place]), rng)
    path.write_text("\n".join(lines), encoding="utf-8", errors="surrogatepass")
    return f"line {place + 1}, {said}"


class Suites(Subject):
    """Question sets: a record that was not damaged is asked as it was."""

    share = 1

    def __init__(self, root: Path) -> None:
        self.path = root / "suite.jsonl"
        root.mkdir()
        self.names = sorted(OWN)
        self.name = ""

    def damage(self, rng: Random) -> str:
        self.restore(rng.randrange(len(self.names)))
        said = (damage_record if rng.random() < 0.8 else damage_bytes)(self.path, rng)
        return f"{self.name}, {said}"

    def restore(self, number: int) -> bool:
        if number >= len(self.names):
            return False
        self.name = self.names[number]
        rows = [OWN[self.name], EAGLE | {"question_id": 5}, EAGLE | {"question_id": "last", "turns": ["c"]}]
        self.path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return True

    def use(self) -> str:
        questions = {
            one.turns for one in read_questions(self.name, DataConfig(path=str(self.path), on_error="skip"), 0)
        }
        last = json.dumps(EAGLE | {"question_id": "last", "turns": ["c"]}).encode()
        if last in self.path.read_bytes().split(b"\n") and ("c",) not in questions:
            return "a question was lost"
        strings = all(isinstance(turn, str) and turn.strip() for turns in questions for turn in turns)
        return "right" if questions and strings else f"no question: {questions}"

    @property
    def size(self) -> int:
        return self.path.stat().st_size


class Prompts(Subject):
    """Token ids of any kind and settings of a generation: what comes is what the target alone says behind them."""

    share = 1
    SOUND: tuple[Any, ...] = ([5, 9, 5, 9, 5, 7], [[5, 9, 5], [7, 5, 9]], [[5], [7, 5, 9]])

    def __init__(self, root: Path) -> None:
        self.prompt: Any = None
        self.settings: dict[str, Any] = {}

    def open(self) -> None:
        self.engine = tiny_engine(tiny_model("llama"), learned_policy())
        self.engine.tokenizer = tiny_tokenizer()

    def restore(self, number: int) -> bool:
        self.settings = {"max_new_tokens": 4, "pad_token_id": 0}
        if number < len(self.SOUND):
            self.prompt = deepcopy(self.SOUND[number])
        return number < len(self.SOUND)

    def damage(self, rng: Random) -> str:
        self.restore(rng.randrange(len(self.SOUND)))
        if rng.random() < 0.6:
            value, shown = _damaged_ids(self.prompt, rng)
            self.prompt = value
            return f"prompt {shown}"
        name = rng.choice(["max_new_tokens", "temperature", "seed", "top_k", "top_p", "min_p", "repetition_penalty",
                           "max_length", "min_new_tokens", "stop_strings", "attention_mask", "method", "pad_token_id",
                           "streamer", "plan", "extra"])  # fmt: skip
        self.settings[name] = rng.choice([*VALUES, torch.nan, torch.inf, "graft", ["a", 1], torch.tensor([1])])
        return f"{name}={str(self.settings[name])[:60]}"

    def use(self) -> str:
        found = self.engine.generate(self.prompt, **self.settings).sequences.tolist()
        others = self.settings | {"method": "autoregressive"}
        if self.settings.get("temperature") and "seed" not in self.settings:
            return "right"  # other draws each time
        plain = self.engine.generate(self.prompt, **others).sequences.tolist()
        return "right" if found == plain and max(map(max, found)) < VOCAB else f"wrong tokens: {found}, not {plain}"

    @property
    def size(self) -> int:
        return len(str(self.prompt))


def _damaged_ids(ids: Any, rng: Random) -> tuple[Any, str]:
    makers: list[Callable[[Any], Any]] = [
        torch.tensor, np.array, tuple, str, lambda x: {"input_ids": x}, lambda x: [x], lambda x: [[x]],
        lambda x: torch.tensor(x, dtype=rng.choice([torch.float32, torch.bool, torch.int8, torch.bfloat16])),
        lambda x: torch.tensor(x).to_sparse(), lambda x: torch.tensor(x, device="meta"),
        lambda x: np.array(x, dtype=rng.choice([object, "U3", "f8", "u8", "M8[s]"])), lambda x: iter(x), lambda x: None,
        lambda x: (token for token in x), lambda x: x * 200, lambda x: {"input_ids": x, "pixel_values": x},
        lambda x: {"input_ids": x, "attention_mask": rng.choice(VALUES)},
    ]  # fmt: skip
    text, said = damaged_value(ids, rng)
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        value = text
    if rng.random() < 0.5:
        with contextlib.suppress(Exception):  # a kind that cannot be made of this value
            value = rng.choice(makers)(ids if rng.random() < 0.5 else value)
    if rng.random() < 0.2 and isinstance(value, list):
        value = [*value, rng.choice([*NUMBERS, 60, 61, -1, "x", None, True])]
    return value, f"{said}: {type(value).__name__} {str(value)[:80]}"


class Requests(Subject):
    """Bodies of requests: the answer is the target's, or an error of the client's in OpenAI's form."""

    share = 1

    def __init__(self, root: Path) -> None:
        self.path, self.body = "", b""

    def open(self) -> None:
        from functools import partial

        from starlette.testclient import TestClient

        from graft_inference.serve.answer import Limits
        from graft_inference.serve.app import make_app
        from graft_inference.serve.metrics import Metrics
        from graft_inference.serve.scheduler import Scheduler
        from tests.graft_inference.serving import TEMPLATE

        model, tokenizer = tiny_model("llama"), tiny_tokenizer()
        tokenizer.chat_template = TEMPLATE
        engine: GraftEngine = tiny_engine(model, learned_policy())
        engine.tokenizer = tokenizer
        metrics = Metrics()
        scheduler = Scheduler(engine, "graft", Limits(128, 4), 2, 2, partial(metrics.ended, method="graft"))
        metrics.follow(engine.policy, "graft", lambda: scheduler.running, lambda: scheduler.unfinished)
        self.client = TestClient(make_app(scheduler, metrics, "tiny", 1 << 16), raise_server_exceptions=False)
        self.client.__enter__()
        self.plain = tiny_engine(tiny_model("llama"), learned_policy())

    def restore(self, number: int) -> bool:
        asked = {"model": "tiny", "temperature": 0, "max_tokens": 4, "return_token_ids": True}
        bodies = [
            ("/v1/completions", asked | {"prompt": "for it in"}),
            ("/v1/completions", asked | {"prompt": [5, 9, 5, 7], "stop": ["q"]}),
            ("/v1/chat/completions", asked | {"messages": [{"role": "user", "content": "why"}], "seed": 3}),
        ]
        if number < len(bodies):
            self.path, values = bodies[number]
            self.body = json.dumps(values).encode()
        return number < len(bodies)

    def damage(self, rng: Random) -> str:
        self.restore(rng.randrange(3))
        if rng.random() < 0.8:
            text, said = damaged_value(json.loads(self.body), rng)
            self.body = text.encode(errors="surrogatepass")
            return f"{self.path}, {said}"
        content = bytearray(self.body)
        place = rng.randrange(len(content))
        content[place : place + rng.choice([0, 1, 9])] = rng.choice([b"", b"\xff", b"}", b"\0", b"9" * 30])
        self.body = bytes(content)
        return f"{self.path}, bytes at {place}: {self.body[:100]!r}"

    def use(self) -> str:
        response = self.client.post(self.path, content=self.body, headers={"content-type": "application/json"})
        if 400 <= response.status_code < 500:
            raise GraftError(response.json()["error"]["message"])
        if response.status_code != 200:
            return f"status {response.status_code}: {response.text[:200]}"
        asked = json.loads(self.body)
        if asked.get("stream") or not asked.get("return_token_ids") or asked.get("temperature", 1) != 0:
            return "right"
        choice = response.json()["choices"][0]
        prompt, ids = choice["prompt_token_ids"], choice["token_ids"]
        plain = self.plain.generate(
            torch.tensor(prompt), len(ids), method="autoregressive", repetition_penalty=asked.get("repetition_penalty")
        )
        return "right" if plain.sequences[0].tolist() == prompt + ids else f"wrong tokens: {ids}"

    @property
    def size(self) -> int:
        return len(self.body)
