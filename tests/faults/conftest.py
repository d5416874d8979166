"""The run that is disturbed, and a table of what was done to it: `make faults` prints it."""

from collections import Counter
from collections.abc import Callable

import pytest

from graft_train.tables import markdown_table

from .road import DIRECTORIES, Road

OTHER = "other"
"""Where a fault is no stage's."""


@pytest.fixture(scope="package")
def road(tmp_path_factory) -> Road:
    return Road.made(tmp_path_factory.mktemp("road"))


@pytest.fixture
def tally(record_property) -> Callable[..., None]:
    """Counts a fault that was met as it should be: by what it was, the stage's directory, and how often."""

    def count(fault: str, directory: str = OTHER, times: int = 1) -> None:
        record_property("fault", (fault, directory, times))

    return count


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    counts: Counter[tuple[str, str]] = Counter()
    for report in terminalreporter.stats.get("passed", []):
        for name, value in report.user_properties:
            if name == "fault":
                counts[value[0], value[1]] += value[2]
    if not counts:
        return
    columns = [name for name in (*DIRECTORIES, OTHER) if any(where == name for _, where in counts)]
    faults = dict.fromkeys(fault for fault, _ in counts)
    rows = [(fault, *(str(counts.get((fault, name), "")) for name in columns)) for fault in faults]
    terminalreporter.section("faults that were met, by stage")
    for line in markdown_table(("fault", *columns), rows):
        terminalreporter.line(line)
