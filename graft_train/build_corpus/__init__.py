"""`build_corpus`: what follows what, from the training data and the target's own predictions over it."""

import hashlib
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

from accelerate import PartialState
from tqdm import tqdm

from graft_inference.bundle import describe_target, load_successors
from graft_inference.errors import GraftError
from graft_inference.files import read_json, read_safetensors
from graft_inference.retrieval.successor_matrix import save_table
from graft_train.arithmetic import with_dtype
from graft_train.build_corpus.captured import CapturedStates, find_captured
from graft_train.build_corpus.counts import Pairs, successor_matrix, write_counts
from graft_train.build_corpus.inspect import inspect_corpus, print_inspection
from graft_train.build_corpus.pairs import (
    Window,
    counted,
    is_held_out,
    matrix_pairs,
    predicted_pairs,
    samples_of,
    text_pairs,
    windows,
)
from graft_train.config import Config
from graft_train.config.corpus import CorpusConfig
from graft_train.config.target import TargetConfig
from graft_train.data.target import (
    load_target,
    load_tokenizer,
    refuse_several_spread,
    resolve_device,
    target_path,
    text_config,
)
from graft_train.files import write_json
from graft_train.processes import is_main, say
from graft_train.stage import fingerprint_of, run_stage

__all__ = ["CorpusConfig", "build_corpus", "describe_corpus"]
COUNTS = "counts"
"""The pairs of each window, until they are summed."""


def build_corpus(config: Config) -> Path:
    """Writes `corpus/` and prints what it holds, newly made or reused.

    successors.safetensors   ids [V, k] int32 (-1 none), probs [V, k] fp16, counts [V] int64
    inspection.json          what is printed

    Where `regenerate` or `distill` has kept this target's states of these samples, they are read and the target does
    not run. On several processes each reads its share of the samples; the result is the same for any number.

    Raises:
        GraftError: damaged samples, or something to merge that belongs to another target; names the file.
    """
    settings = config.corpus.decisive() | {"merge": _hashes(config)}
    inputs = ["target", "data"]
    if not config.corpus.text_only:
        config = with_dtype(config, inputs)
    merged = settings["merge"]
    corpus = run_stage(
        config, "build_corpus", "corpus", settings, inputs, lambda out: _build(config, out, merged), [COUNTS]
    )
    if is_main():
        print_inspection(read_json(corpus / "inspection.json"))
    return corpus


def describe_corpus(target: TargetConfig) -> dict[str, Any]:
    """What a corpus records of its target, and what is compared when one is loaded."""
    described = describe_target("", text_config(target), load_tokenizer(target))
    described |= {"fingerprint": fingerprint_of(target_path(target))}
    return {name: value for name, value in described.items() if name != "name_or_path"}


def _build(config: Config, out: Path, merged: list[str]) -> None:
    cpu = resolve_device(config.target.device).type == "cpu"
    processes = PartialState(cpu=cpu, timeout=timedelta(days=7))  # the main process merges while others wait
    if not config.corpus.text_only:
        refuse_several_spread(config.target, processes.num_processes)
    made_for = describe_corpus(config.target)
    samples = Path(config.run_dir) / "data" / "samples.jsonl"
    counts = out / COUNTS
    counts.mkdir(exist_ok=True)
    count_windows(config, samples, counts, made_for, processes.process_index, processes.num_processes)
    if _hashes(config) != merged:  # or the record would tell of rows that were not read
        raise GraftError(f"a file of corpus.merge changed after the stage began: put it back, or delete {out}")
    processes.wait_for_everyone()
    if processes.is_main_process:
        write_matrix(config.corpus, counts, out, made_for)
        inspection = inspect_corpus(config.corpus, samples, out, made_for["vocab_size"], load_tokenizer(config.target))
        write_json(out / "inspection.json", inspection)


def count_windows(
    config: Config, samples: Path, counts: Path, made_for: dict[str, Any], process: int, processes: int
) -> None:
    """Writes the counts of this process's windows; what an earlier attempt wrote is not read again.

    The samples' windows are dealt by their number, whichever were finished before, by however many processes.
    """
    settings, vocab_size = config.corpus, made_for["vocab_size"]
    model = None if settings.text_only else load_target(config.target)
    captured = None if model is None else find_captured(config, model)
    with tqdm(
        total=samples.stat().st_size if samples.exists() else 0,
        desc="build_corpus",
        unit="B",
        unit_scale=True,
        disable=process > 0,
    ) as bar:
        for window in windows(samples):
            bar.update(window.size)
            path = counts / f"{window.number:08d}.parquet"
            if window.number % processes == process and not path.exists():
                write_counts(path, window_pairs(settings, model, captured, window, samples, vocab_size))
    for number, learned in enumerate(settings.merge if process == 0 else []):
        matrix = load_successors(Path(learned), vocab_size, made_for)
        pairs = matrix_pairs(matrix, read_safetensors(Path(learned))["counts"])
        write_counts(counts / f"merged{number}.parquet", [pairs])


def window_pairs(
    settings: CorpusConfig, model: Any, captured: CapturedStates | None, window: Window, path: Path, vocab_size: int
) -> Iterator[Pairs]:
    samples = samples_of(window, path, vocab_size)
    samples = [sample for sample in samples if not is_held_out(sample, settings.held_out)]
    if not samples:
        return
    learned = counted(samples, settings.prompts)
    if model is None:
        yield text_pairs(learned)
    else:
        k = min(settings.successors, vocab_size)
        if captured:
            yield from captured.pairs([one for one in learned if captured.holds(one.sample)], k)
        others = [one for one in learned if not captured or not captured.holds(one.sample)]
        yield from predicted_pairs(model, others, k, settings.batch_tokens)


def write_matrix(settings: CorpusConfig, counts: Path, out: Path, made_for: dict[str, Any]) -> None:
    """Sums all counts into what is served.

    Raises:
        GraftError: the samples hold no pair.
    """
    k = min(settings.successors, made_for["vocab_size"])
    matrix = successor_matrix(counts, made_for["vocab_size"], k, settings.memory_mb)
    if not int(matrix["counts"].sum()):
        raise GraftError("no training sample has two tokens to count: run graft regenerate on more data")
    save_table(out / "successors.safetensors", matrix, made_for)
    say(f"build_corpus: {int(matrix['counts'].sum()):,} tokens counted")


def _hashes(config: Config) -> list[str]:
    """Of the files that are merged."""
    return [_hash(Path(path)) for path in config.corpus.merge]


def _hash(path: Path) -> str:
    if not path.is_file():
        raise GraftError(f"corpus.merge: {path} does not exist; name files that SuccessorMatrix.save wrote")
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:16]
