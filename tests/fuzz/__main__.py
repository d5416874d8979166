"""Damages inputs at random and uses them: each is refused with our error, or what comes of it is right.

    python -m tests.fuzz --mutations 12640 --seed 0

prints what became of them by kind. It ends with status 1 where one gave a wrong answer or another exception, crashed,
did not end within a minute, or took more memory than twice its files beyond what a sound one takes. A seed that it
prints makes the same damage again: `--seed N --mutations 1`.
"""

import argparse
import sys
import tempfile
import warnings
from pathlib import Path

import torch

from .driver import Fuzz, tell
from .kinds import KINDS


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__.splitlines()[0])
    parser.add_argument("--mutations", type=int, default=12_640, help="seeds, each of which is one mutation")
    parser.add_argument("--seed", type=int, default=0, help="the first of them")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS), help="pass over seeds of others")
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as root:
        fuzz = Fuzz({name: KINDS[name](Path(root, name)) for name in options.kinds})
        return int(tell(fuzz, options.seed, options.mutations) > 0)


if __name__ == "__main__":
    sys.exit(main())
