"""Other engines, each in a virtual environment of its own that `make engines` makes."""

import json
import os
import subprocess
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
ROOT = Path(os.environ.get("GRAFT_ENGINES") or HERE.parents[1] / ".engines")


def python_of(engine: str) -> Path:
    """The interpreter of an engine's environment, which need not exist."""
    return ROOT / engine / "bin" / "python"


def run_vllm(directory: Path, **job: Any) -> dict[str, Any]:
    """What vLLM makes of a job; `vllm_driver.py` says what both hold.

    Args:
        directory: where the job's files go.
    """
    return run_driver("vllm", HERE / "vllm_driver.py", directory, job)


def run_driver(engine: str, driver: Path, directory: Path, job: dict[str, Any]) -> Any:
    """What a driver writes for a job, run by its engine's interpreter."""
    paths = directory / "job.json", directory / "result.json"
    paths[0].write_text(json.dumps(job))
    paths[1].unlink(missing_ok=True)
    finished = subprocess.run(
        [python_of(engine), driver, *paths], capture_output=True, text=True, cwd=directory, check=False
    )
    assert finished.returncode == 0, (finished.stdout + finished.stderr)[-8000:]
    return json.loads(paths[1].read_text())
