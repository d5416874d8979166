"""The runtime needs nothing of this project's training side: installed alone, it decodes."""

import contextlib
import json
import os
import shutil
import subprocess
import sys
import tomllib
from importlib import metadata
from importlib.metadata import PackageNotFoundError
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from .graft_inference.test_engine import prompt
from .graft_inference.tiny import tiny_model
from .graft_inference.tiny_bundle import write_bundle, write_target

ROOT = Path(__file__).parents[1]

# Hidden names are neither found nor importable, as if they had never been installed.
ALONE = """
import sys
from importlib.machinery import BuiltinImporter, FrozenImporter, PathFinder

site, hidden = sys.argv[1], set(sys.argv[2].split(","))

class Hidden(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        return None if name.split(".")[0] in hidden else super().find_spec(name, path, target)

sys.meta_path[:] = [BuiltinImporter, FrozenImporter, Hidden]
sys.path.insert(0, site)
"""

GENERATE = """
import json
import torch
import graft_inference
from graft_inference import GraftEngine

assert graft_inference.__file__.startswith(site), graft_inference.__file__
bundle, target, ids = sys.argv[3:]
engine = GraftEngine.from_pretrained(bundle, target, "cpu", "float32")
outputs = {
    method: engine.generate(torch.tensor(json.loads(ids)), max_new_tokens=24, method=method).sequences.tolist()
    for method in graft_inference.METHODS
}
assert not hidden & set(sys.modules), hidden & set(sys.modules)
print(json.dumps(outputs))
"""

COMMAND = """
from importlib.metadata import distribution

[script] = distribution("graft-inference").entry_points.select(name=sys.argv[3])
sys.argv = sys.argv[3:]
sys.exit(script.load()())
"""


def closure(requirements: list[str]) -> set[str]:
    """Distributions that pip would install for these requirements, themselves included."""
    found: set[str] = set()
    waiting = [Requirement(requirement) for requirement in requirements]
    while waiting:
        requirement = waiting.pop()
        name = canonicalize_name(requirement.name)
        if name in found or not (requirement.marker is None or requirement.marker.evaluate({"extra": ""})):
            continue
        found.add(name)
        # Not installed here: pip had no reason to, so nothing can depend on it.
        with contextlib.suppress(PackageNotFoundError):
            waiting += map(Requirement, metadata.requires(name) or [])
    return found


@pytest.fixture(scope="module")
def hidden():
    """Importable names that an environment with the runtime alone would not have."""
    project = tomllib.loads((ROOT / "inference" / "pyproject.toml").read_text())["project"]
    there = closure(project["dependencies"])
    names = {
        name
        for name, distributions in metadata.packages_distributions().items()
        if not there & set(map(canonicalize_name, distributions))
    }
    assert {"hydra", "omegaconf", "datasets", "accelerate", "deepspeed", "wandb", "pytest"} <= names
    # Where the runtime is installed for development too, `site` still comes first on the path.
    return (names - {"graft_inference"}) | {"graft_train", "recipes", "tests"}


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """A directory into which pip installed `inference/` and nothing else."""
    root = tmp_path_factory.mktemp("alone")
    ignored = shutil.ignore_patterns("build", "*.egg-info", "__pycache__")
    # Building writes beside the sources.
    source = shutil.copytree(ROOT / "inference", root / "inference", ignore=ignored)
    options = ["--quiet", "--no-deps", "--no-build-isolation", "--no-index", "--target", str(root / "site")]
    subprocess.run([sys.executable, "-m", "pip", "install", *options, str(source)], check=True)
    return root / "site"


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    root = tmp_path_factory.mktemp("pair")
    target = write_target(root / "target")
    return write_bundle(root / "bundle", target), target


def run_alone(code, site, hidden, *arguments, tmp_path):
    return subprocess.run(
        [sys.executable, "-I", "-c", ALONE + code, str(site), ",".join(hidden), *map(str, arguments)],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env=os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
        check=False,
    )


def test_every_module_is_installed(site):
    sources = {path.name for path in (ROOT / "inference" / "graft_inference").glob("*.py")}
    assert {path.name for path in (site / "graft_inference").glob("*.py")} == sources


def test_every_method_decodes_without_the_training_side(site, hidden, pair, tmp_path):
    finished = run_alone(GENERATE, site, hidden, *pair, json.dumps(prompt(9).tolist()), tmp_path=tmp_path)
    assert finished.returncode == 0, finished.stderr
    expected = tiny_model("llama").generate(prompt(9), max_new_tokens=24).tolist()
    assert set(map(str, json.loads(finished.stdout).values())) == {str(expected)}


def test_the_command_is_installed_and_streams(site, hidden, pair, tmp_path):
    bundle, target = pair
    arguments = ["graft-generate", bundle, "--target", target, "--device", "cpu", "--max-new-tokens", 9, "return self"]
    finished = run_alone(COMMAND, site, hidden, *arguments, tmp_path=tmp_path)
    assert finished.returncode == 0, finished.stderr
    assert finished.stdout.endswith("\n")
    assert "9 tokens, " in finished.stderr


def test_the_server_says_what_it_lacks(site, hidden, pair, tmp_path):
    finished = run_alone(COMMAND, site, hidden, "graft-serve", pair[0], tmp_path=tmp_path)
    assert finished.returncode == 2
    assert finished.stderr.splitlines()[-1].endswith("is not installed: pip install 'graft-inference[serve]'")
