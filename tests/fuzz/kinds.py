"""The kinds of input, and which seed is of which."""

from .gguf_files import GgufFiles
from .heads import Bundles, Heads
from .inputs import Prompts, Records, Requests, Suites
from .run_files import Calibrated, States
from .settings import Settings
from .subject import Subject

KINDS: dict[str, type[Subject]] = {
    "bundle": Bundles,
    "head": Heads,
    "gguf": GgufFiles,
    "states": States,
    "traces": Calibrated,
    "records": Records,
    "suite": Suites,
    "settings": Settings,
    "prompt": Prompts,
    "request": Requests,
}
SCHEDULE = [name for name, kind in KINDS.items() for _ in range(kind.share)]
"""Seed n is of kind n modulo its length."""
