"""The pair of the replay's tests and its traces; a run and its page."""

import pytest

from graft_train.report import report

from ..calibrate.test_calibrate import chain_traces, engine, prompts, told, traces  # noqa: F401
from .page_run import write_run


@pytest.fixture(scope="module")
def finished_run(tmp_path_factory):
    """Not to be changed."""
    return write_run(tmp_path_factory.mktemp("runs") / "tiny")


@pytest.fixture(scope="module")
def finished_page(finished_run, tmp_path_factory):
    return report(finished_run, tmp_path_factory.mktemp("page") / "page.html")
