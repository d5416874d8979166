"""`graft inspect BUNDLE`: what is inside, in one screen."""

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from graft_inference import ChainPlan, GraftError, Plan, QuotaCheckpoint
from graft_inference.bundle import load_graft, load_successors, read_table, resolve
from graft_inference.files import own_file, read_json
from graft_inference.heads.families import described, load_any_head
from graft_inference.policy.policy import PLANNED, Policy
from graft_train.engines import serving
from graft_train.tables import print_speeds

SHOWN = 12
"""Characters of a hash that people compare."""


def inspect(place: str) -> None:
    """Prints what a bundle holds: target, head, policy, corpus, files, engines that serve it, and its evaluations.

    Args:
        place: directory or Hub id.

    Raises:
        GraftError: no bundle, or one that cannot be read.
    """
    directory = resolve(place)
    if not (directory / "graft.json").exists():
        raise GraftError(f"{place} has no graft.json: it is no bundle, but may be a head (graft adopt takes one)")
    grid = Table.grid(padding=(0, 2))
    grid.add_column(style="bold")
    grid.add_column(overflow="fold")
    for name, line in facts_of(directory, place):
        grid.add_row(name, Text(line))  # names may have brackets, which are markup elsewhere
    Console().print(grid)
    for path in sorted(directory.glob("evaluation*.json")):
        print()
        try:
            print_speeds(read_json(path))
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise GraftError(f"{path} is no evaluation that graft evaluate wrote ({error!r}): run it again") from error


def facts_of(directory: Path, place: str) -> Iterator[tuple[str, str]]:
    """What there is to say, line by line; a line that goes on with what the one before says has no name."""
    policy, target = load_graft(directory / "graft.json")
    layers = target["num_hidden_layers"]
    yield "bundle", place
    sizes = f"{layers} layers, {target['hidden_size']:,} wide, {target['vocab_size']:,} tokens"
    yield "target", f"{target['name_or_path']}: {sizes}, tokenizer {(target['tokenizer'] or 'not recorded')[:SHOWN]}"
    head = load_any_head(directory, layers)
    shape, dtype = head.config, str(next(head.parameters()).dtype).removeprefix("torch.")
    yield "head", described(directory)[1]
    vocabulary = f"{shape.draft_vocab_size:,} of {shape.vocab_size:,} tokens"
    size = sum(parameter.numel() for parameter in head.parameters())
    yield "", f"{size:,} parameters in {dtype}, reads layers {list(shape.aux_layer_ids)}, drafts {vocabulary}"
    for name in PLANNED:
        yield name, in_words(policy.plan(name))
    yield "measured on", _measured_on(policy)
    yield "corpus", _of_corpus(directory / "successors.safetensors", shape.vocab_size)
    for path in sorted(path for path in directory.glob("*.safetensors") if path.is_file()):
        with own_file(path).open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        yield "file", f"{path.name}, {path.stat().st_size / 2**20:.1f} MiB, sha256 {digest[:SHOWN]}"
    yield "served by", "graft serve, graft chat and GraftEngine: head, retrieval and policy"
    if (directory / "custom_generate").is_dir():
        yield "transformers", f'generate(custom_generate="{place}", trust_remote_code=True): the same'
    for engine in serving(shape, layers, target["name_or_path"], place, dtype).values():
        faults = f"not for this head: it {'; it '.join(engine.faults)}" if engine.faults else engine.seen
        yield engine.name, faults


def in_words(plan: Plan) -> str:
    """A plan as a sentence."""
    *early, last = plan.checkpoints
    ways = [_early(one) for one in early]
    ways.append(f"{'else ' if ways else ''}{_steps(last.steps)} {_nodes(last)}")
    made = "chains" if isinstance(plan, ChainPlan) else "trees"
    asked = f"asks {' and '.join(plan.sources)}" if plan.sources else "asks no source"
    return f"makes {made}: {', '.join(ways)}; {asked}"


def _early(checkpoint: Any) -> str:
    if not checkpoint.steps:
        return f"no draft where retrieval promises over {checkpoint.threshold:.2f} tokens {_nodes(checkpoint)}"
    return f"{_steps(checkpoint.steps)} where the head is at most {checkpoint.threshold:.2f} sure {_nodes(checkpoint)}"


def _steps(steps: int) -> str:
    return f"{steps} draft step{'s' if steps > 1 else ''}" if steps else "no draft"


def _nodes(checkpoint: Any) -> str:
    if isinstance(checkpoint, QuotaCheckpoint):
        return f"(1 + {checkpoint.drafted} drafted + {checkpoint.retrieved} retrieved nodes)"
    return f"({checkpoint.num_draft_tokens} node{'s' if checkpoint.num_draft_tokens > 1 else ''})"


def _measured_on(policy: Policy) -> str:
    measured = policy.measured_on
    device = measured.get("device")
    if not device:
        return str(measured.get("source", "no device"))
    facts = {name: value for name, value in device.items() if name != "name"} | {"dtype": measured.get("dtype")}
    what = ", ".join(f"{name} {value}" for name, value in facts.items() if value is not None)
    traced = f"; {measured['positions']} positions traced" if "positions" in measured else ""
    return f"{device.get('name', 'a device without a name')} ({what}){traced}"


def _of_corpus(path: Path, vocab_size: int) -> str:
    matrix = load_successors(path, vocab_size)
    known, counted = int((matrix.ids_VK >= 0).any(dim=1).sum()), int(read_table(path)[0]["counts"].sum())
    share = f"{known / len(matrix.ids_VK):.0%} of the vocabulary"
    return f"up to {matrix.k} successors of {known:,} tokens ({share}), counted at {counted:,} places"
