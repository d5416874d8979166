"""Settings of every test: one thread (tiny models only lose by more), no network, no GPU unless asked."""

import os
import shutil

os.environ["OMP_NUM_THREADS"] = "1"
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["WANDB_MODE"] = "offline"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import pytest
import torch
from hypothesis import Phase, settings

from .engines.environments import python_of

torch.set_num_threads(1)

# Property tests draw the same examples on every run; HYPOTHESIS_PROFILE=deep draws others, and many more of them.
settings.register_profile("same", derandomize=True, deadline=None, max_examples=50)
settings.register_profile("deep", deadline=None, max_examples=2000)
# `make mutants`: a mutant is dead at its first failure, so that nobody waits for the smallest one.
settings.register_profile("mutants", settings.get_profile("same"), max_examples=25, phases=[Phase.generate])
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "same"))


@pytest.fixture(autouse=True)
def on_the_cpu(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a GPU is not asked for, "auto" means the CPU on every machine."""
    if not request.node.get_closest_marker("gpu"):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


def chromium() -> str | None:
    """The browser of the tests of HTML pages."""
    return next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    asked_for_engines = "engines" in config.option.markexpr
    for item in items:
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
        # CI has one: there they fail without it.
        if item.get_closest_marker("browser") and not chromium() and os.environ.get("CI") != "true":
            item.add_marker(pytest.mark.skip(reason="needs Chromium on the PATH: apt-get install chromium"))
        engine = item.get_closest_marker("engines")
        if engine and not asked_for_engines:
            item.add_marker(pytest.mark.skip(reason="takes minutes: run make engines, then pytest -m engines"))
        elif engine and not python_of(*engine.args).exists():
            item.add_marker(pytest.mark.skip(reason=f"needs {python_of(*engine.args)}: run make engines"))
