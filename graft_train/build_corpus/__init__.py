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
from graft_train.build_corpus.captured import CapturedStates, find_captured
from graft_train.build_corpus.inspect import inspect_corpus, print_inspection
from graft_train.build_corpus.pairs import (
    NGRAM,
    Window,
    counted,
    is_held_out,
    join_samples,
    matrix_pairs,
    ngram_pairs,
    predicted_pairs,
    samples_of,
    text_pairs,
    windows,
)
from graft_train.build_corpus.runs import (
    BYTES_PER_PAIR,
    SUCCESSOR_BITS,
    RunWriter,
    merge_runs,
    split_blocks,
    units_of,
)
from graft_train.build_corpus.tables import ngram_table, successor_matrix
from graft_train.config import Config
from graft_train.config.corpus import CorpusConfig
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
RUNS = "runs"
"""Sorted pairs of the samples, until they are merged."""


def build_corpus(config: Config) -> Path:
    """Writes `corpus/` and prints what it holds, newly made or reused.

    successors.safetensors   ids [V, k] int32 (-1 none), probs [V, k] fp16, counts [V] int64
    ngrams.safetensors       tags, successors, counts, totals of longer contexts, see `NgramTable`
    inspection.json          what is printed

    Where `distill` has kept this target's states of these samples (`{run_dir}/states`), they are read and the target
    does not run. On several processes each reads its share of the samples; the result is the same for any number.

    Raises:
        GraftError: damaged samples, or something to merge that belongs to another target; names the file.
    """
    settings = config.corpus.decisive() | {"merge": [_hash(Path(path)) for path in config.corpus.merge]}
    inputs = ["target", "data"]
    corpus = run_stage(config, "build_corpus", "corpus", settings, inputs, lambda out: _build(config, out), [RUNS])
    if is_main():
        print_inspection(read_json(corpus / "inspection.json"))
    return corpus


def describe_corpus(config: Config) -> dict[str, Any]:
    """What a corpus records of its target, and what is compared when one is loaded."""
    described = describe_target("", text_config(config), load_tokenizer(config))
    described |= {"fingerprint": fingerprint_of(target_path(config))}
    return {name: value for name, value in described.items() if name != "name_or_path"}


def _build(config: Config, out: Path) -> None:
    cpu = resolve_device(config.target.device).type == "cpu"
    processes = PartialState(cpu=cpu, timeout=timedelta(days=7))  # the main process merges while others wait
    if not config.corpus.text_only:
        refuse_several_spread(config, processes.num_processes)
    made_for = describe_corpus(config)
    samples = Path(config.run_dir) / "data" / "samples.jsonl"
    runs = out / RUNS
    runs.mkdir(exist_ok=True)
    gather_runs(config, samples, runs, made_for, processes.process_index, processes.num_processes)
    processes.wait_for_everyone()
    if processes.is_main_process:
        write_tables(config.corpus, runs, out, made_for)
        inspection = inspect_corpus(config.corpus, samples, out, made_for["vocab_size"], load_tokenizer(config))
        write_json(out / "inspection.json", inspection)


def gather_runs(
    config: Config, samples: Path, runs: Path, made_for: dict[str, Any], process: int, processes: int
) -> None:
    """Writes this process's pairs as sorted runs; what an earlier attempt finished is not read again.

    The samples' windows are dealt by their number, whichever were finished before, by however many processes.
    """
    settings, vocab_size = config.corpus, made_for["vocab_size"]
    done = {unit for path in runs.glob("*.arrow") for unit in units_of(path)}
    model = None if settings.text_only else load_target(config)
    captured = None if model is None else find_captured(config, model)
    writer = RunWriter(runs, rows=max((settings.memory_mb << 20) // BYTES_PER_PAIR, 1))
    with tqdm(
        total=samples.stat().st_size if samples.exists() else 0,
        desc="build_corpus",
        unit="B",
        unit_scale=True,
        disable=process > 0,
    ) as bar:
        for window in windows(samples):
            bar.update(window.size)
            if window.number % processes != process or window.number in done:
                continue
            for keys, weights in window_pairs(settings, model, captured, window, samples, vocab_size):
                writer.add(keys, weights)
            writer.finish_unit(window.number)
    if process == 0:
        for number, path in enumerate(settings.merge, start=1):
            if -number not in done:
                learned = load_successors(Path(path), vocab_size, made_for)
                writer.add(*matrix_pairs(learned, read_safetensors(Path(path))["counts"]))
                writer.finish_unit(-number)
    writer.flush()


def window_pairs(
    settings: CorpusConfig, model: Any, captured: CapturedStates | None, window: Window, path: Path, vocab_size: int
) -> Iterator[tuple[Any, Any]]:
    samples = samples_of(window, path, vocab_size)
    samples = [sample for sample in samples if not is_held_out(sample, settings.held_out)]
    if not samples:
        return
    learned = counted(samples, settings.prompts)
    text = join_samples(learned)
    if settings.ngrams:
        yield ngram_pairs(text), None
    if model is None:
        yield text_pairs(text), None
    else:
        k = min(settings.successors, vocab_size)
        if captured:
            yield from captured.pairs([one for one in learned if captured.holds(one.sample)], k)
        others = [one for one in learned if not captured or not captured.holds(one.sample)]
        yield from predicted_pairs(model, others, k, settings.batch_tokens)


def write_tables(settings: CorpusConfig, runs: Path, out: Path, made_for: dict[str, Any]) -> None:
    """Merges all runs into what is served.

    Raises:
        GraftError: the samples hold no pair.
    """
    matrix_blocks, ngram_blocks = split_blocks(merge_runs(runs), NGRAM << SUCCESSOR_BITS)
    k = min(settings.successors, made_for["vocab_size"])
    matrix = successor_matrix(matrix_blocks, made_for["vocab_size"], k)
    if not int(matrix["counts"].sum()):
        raise GraftError("no training sample has two tokens to count: run graft regenerate on more data")
    save_table(out / "successors.safetensors", matrix, made_for)
    if settings.ngrams:
        table = ngram_table(ngram_blocks, settings.ngram_successors, settings.ngram_mb)
        save_table(out / "ngrams.safetensors", table, made_for)
    say(f"build_corpus: {int(matrix['counts'].sum()):,} tokens counted")


def _hash(path: Path) -> str:
    if not path.is_file():
        raise GraftError(f"corpus.merge: {path} does not exist; name files that SuccessorMatrix.save wrote")
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:16]
