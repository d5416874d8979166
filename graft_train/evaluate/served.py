"""`evaluate` with `evaluation.server`: servers are timed from outside, in turns, on the prompts of the evaluation."""

from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tqdm import tqdm

from graft_inference.errors import GraftError
from graft_inference.files import read_json
from graft_train.config import Config
from graft_train.data.samples import Sample
from graft_train.data.target import load_tokenizer
from graft_train.evaluate.prompts import ANSWERS, Asked, asked_of, check_unchanged, directory_of, made_of, shown_path
from graft_train.evaluate.server_figures import figures_of, variation_of
from graft_train.evaluate.server_passes import Asking, Server
from graft_train.files import write_json, write_text
from graft_train.processes import say
from graft_train.server_tables import show, to_markdown
from graft_train.servers import context_limit
from graft_train.stage import run_stage

PASSES, SERVERS = "passes", "servers.json"
"""What was measured so far, a file for each pass, and of which servers: an interrupted stage goes on from there."""
OF_ENGINE = ("check_lossless", "fallback")
"""Settings that decide nothing about servers."""


def evaluate_servers(config: Config) -> Path:
    """Writes `evaluation-...-server-HOST-PORT/` (evaluation.json, report.md).

    Raises:
        GraftError: no prompts, or a server that fails; the passes that it ended are kept, and not repeated.
    """
    asked = config.evaluation
    settings = {name: value for name, value in asdict(asked).items() if name not in OF_ENGINE}
    settings |= {
        "server": asked.servers(),
        "seed": config.seed,
        "server_extensions": config.regenerate.server_extensions,
    }
    stages, chosen = made_of(config)
    name, scratch = directory_of(asked), [PASSES, SERVERS, ANSWERS]
    inputs = ["target", *stages]
    settings |= chosen
    directory = run_stage(config, "evaluate", name, settings, inputs, lambda out: _build(config, out, chosen), scratch)
    show(read_json(directory / "evaluation.json"))
    return directory


def _build(config: Config, out: Path, chosen: dict[str, Any]) -> None:
    settings = config.evaluation
    servers = [Server.at(url) for url in settings.servers()]
    _check_same(out / SERVERS, servers)
    asking = Asking(settings.max_new_tokens, settings.temperature, config.seed, config.regenerate.server_extensions)
    asked = _prompts(config, out, servers[0], asking)
    check_unchanged(config, chosen, out)
    levels = _levels(settings.concurrency, len(asked.samples))
    passes = _measure(servers, asked.samples, levels, settings.repeats, asking, out / PASSES)
    last = len(servers) - 1
    evaluation = {
        "levels": [
            {
                "concurrency": level,
                "servers": [
                    figures_of(passes[place, level], passes[last, level] if place < last else None)
                    for place in range(len(servers))
                ],
            }
            for level in levels
        ],
        # Of the server that others are compared with.
        "variation": variation_of([passes[last, level] for level in levels]),
        "servers": [asdict(server) for server in servers],
        "settings": _facts(config, asked),
    }
    write_json(out / "evaluation.json", evaluation)
    write_text(out / "report.md", to_markdown(evaluation))


def _prompts(config: Config, out: Path, server: Server, asking: Asking) -> Asked:
    """Those of the evaluation, which fit every server; the first one answers the turns that others follow."""
    greedy = Asking(asking.max_tokens, 0.0, asking.seed, asking.extensions)

    def answer(prompt: Sample) -> list[int]:
        return server.answer(prompt, greedy, load_tokenizer(config.target))

    return asked_of(config, out, answer, context_limit(config.evaluation.servers()))


def _check_same(path: Path, servers: list[Server]) -> None:
    """Raises GraftError where an interrupted run measured other models."""
    found = {server.url: server.model for server in servers}
    if path.exists() and (before := read_json(path)) != found:
        raise GraftError(
            f"{path.parent} has passes of {before}, and now the servers have {found}: start those again, or delete "
            f"{path.parent} to measure these"
        )
    write_json(path, found)


def _levels(concurrency: list[int], prompts: int) -> list[int]:
    levels = sorted({min(level, prompts) for level in concurrency})
    if max(concurrency) > prompts:
        say(f"evaluate: {prompts} prompts are at most {prompts} requests at a time; evaluation.prompts gives more")
    return levels


def _measure(
    servers: list[Server], samples: list[Sample], levels: list[int], repeats: int, asking: Asking, directory: Path
) -> dict[tuple[int, int], list[dict[str, Any]]]:
    """The passes by server and level; those that are there already are not repeated."""
    directory.mkdir(exist_ok=True)
    order = list(_turns(len(servers), levels, repeats))
    paths = {turn: directory / f"{'-'.join(map(str, turn))}.json" for turn in order}
    missing = [turn for turn in order if not paths[turn].exists()]
    if missing:
        shortest, longest = min(samples, key=_length), max(samples, key=_length)
        for server in servers:
            server.run([shortest, longest], 1, asking)  # warms up
    for repeat, level, place in tqdm(missing, "evaluate: passes", unit="pass"):
        try:
            found = servers[place].run(samples, level, asking)
        except GraftError as error:
            done = sum(path.exists() for path in paths.values())
            raise GraftError(
                f"{error}. It was asked {level} at a time; {done} of {len(order)} passes are kept in {directory}: "
                "start it again, and run the same command"
            ) from error
        write_json(paths[repeat, level, place], found)
    return {
        (place, level): [read_json(paths[repeat, level, place]) for repeat in range(repeats)]
        for place in range(len(servers))
        for level in levels
    }


def _turns(servers: int, levels: list[int], repeats: int) -> Iterator[tuple[int, int, int]]:
    """Repeat, level and server of every pass: servers take turns, and who begins turns with repeat and level."""
    for repeat in range(repeats):
        for number, level in enumerate(levels):
            for place in range(servers):
                yield repeat, level, (place + repeat + number) % servers


def _length(sample: Sample) -> int:
    return len(sample.prompt_ids)


def _facts(config: Config, asked: Asked) -> dict[str, Any]:
    lengths = list(map(_length, asked.samples))
    asked_for = {name: value for name, value in asdict(config.evaluation).items() if name not in OF_ENGINE}
    return asked_for | {
        "server": config.evaluation.servers(),
        "path": shown_path(config.evaluation.path),
        "prompts": len(asked.samples),
        "prompt_tokens": [min(lengths), max(lengths)],
    }
