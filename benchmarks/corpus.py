"""Speed and peak memory of `build_corpus` from ids alone, at one and at ten times the data.

    python benchmarks/corpus.py [--tokens 2000000] [--processes 2] [--memory-mb 256]

The data is made up: Zipf-distributed tokens of a 32,000 vocabulary, so that new pairs keep coming however long it
is. Reading and counting run in `--processes` processes, summing in one, each measured apart.
"""

import argparse
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from graft_train.build_corpus import count_windows, write_matrix
from graft_train.config import Config
from graft_train.config.corpus import CorpusConfig
from graft_train.data.samples import answered, append_samples

VOCAB = 32_000
SAMPLE = 512
PER_WRITE = 1000


def write_samples(path: Path, tokens: int) -> None:
    generator = np.random.default_rng(0)
    with path.open("wb") as file:
        for start in range(0, tokens // SAMPLE, PER_WRITE):
            count = min(PER_WRITE, tokens // SAMPLE - start)
            ids = generator.zipf(1.2, (count, SAMPLE)) % VOCAB
            rows = enumerate(ids.tolist(), start=start)
            append_samples(file, [answered(str(n), row[:64], row[64:], {}) for n, row in rows])


def work(directory: Path, settings: CorpusConfig, process: int, processes: int) -> None:
    """One measured process: a share of the reading, or (process -1) the summing. Prints seconds and MiB."""
    made_for = {"vocab_size": VOCAB}
    before, start = peak_mib(), time.perf_counter()
    if process >= 0:
        config = Config(run_dir=str(directory), corpus=settings)
        count_windows(config, directory / "samples.jsonl", directory / "counts", made_for, process, processes)
    else:
        write_matrix(settings, directory / "counts", directory, made_for)
    print(f"measured {time.perf_counter() - start} {peak_mib()} {before}")


def peak_mib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def measure(arguments: argparse.Namespace, tokens: int) -> list[str]:
    """One row of the table."""
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        (directory / "counts").mkdir()
        write_samples(directory / "samples.jsonl", tokens)
        command = [sys.executable, __file__, "--memory-mb", str(arguments.memory_mb), "--directory", name]
        command += ["--processes", str(arguments.processes)]

        def start(process: int) -> subprocess.Popen[str]:
            return subprocess.Popen(
                [*command, "--process", str(process)], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
            )

        def finish(child: subprocess.Popen[str]) -> tuple[float, float, float]:
            said = child.communicate()[0]
            if child.returncode:
                raise SystemExit(f"a measured process failed:\n{said}")
            seconds, peak, before = map(float, said.splitlines()[-1].split()[1:])
            return seconds, peak, before

        gathered = [finish(child) for child in [start(process) for process in range(arguments.processes)]]
        megabytes = sum(path.stat().st_size for path in (directory / "counts").iterdir()) / 1e6
        summed = finish(start(-1))
    gathering = max(seconds for seconds, _, _ in gathered)
    return [
        f"{tokens:,}",
        f"{tokens / (gathering + summed[0]):,.0f}",
        f"{gathering:.1f}",
        f"{summed[0]:.1f}",
        f"{megabytes:.0f}",
        f"{max(peak for _, peak, _ in gathered):.0f}",
        f"{summed[1]:.0f}",
        f"{summed[2]:.0f}",
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--tokens", type=int, default=2_000_000)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--memory-mb", type=int, default=256)
    parser.add_argument("--directory", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--process", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.directory:
        settings = CorpusConfig(text_only=True, held_out=0.0, memory_mb=arguments.memory_mb)
        work(arguments.directory, settings, arguments.process, arguments.processes)
        return
    table = Table(title=f"{arguments.processes} processes, corpus.memory_mb={arguments.memory_mb}", box=SIMPLE_HEAD)
    for column in ("tokens", "tokens/s", "read s", "sum s", "MB on disk", "peak MiB read", "sum", "at start"):
        table.add_column(column, justify="right")
    for tokens in (arguments.tokens, 10 * arguments.tokens):
        table.add_row(*measure(arguments, tokens))
    Console().print(table)


if __name__ == "__main__":
    main()
