"""A run of all stages that reaches no network beyond the loopback, unpickles no code, and keeps no secret."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.hub import serve

ROOT = Path(__file__).parents[2]
SECRETS = {
    "HF_TOKEN": "hf_planted0secret1of2the3hub4",
    "OPENAI_API_KEY": "sk-planted0secret1of2servers3",
    "WANDB_API_KEY": "0123456789abcdef0123456789abcdef01234567",
}
PICKLED = ("collections.OrderedDict", "torch.", "numpy.", "_codecs.encode", "builtins.")
"""What optimizers' and random numbers' states are made of, which accelerate keeps."""


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    root = tmp_path_factory.mktemp("road")
    with serve() as hub:
        hub.token = SECRETS["HF_TOKEN"]
        homes = {name: str(root / "home") for name in ("HOME", "HF_HOME", "XDG_CACHE_HOME", "XDG_CONFIG_HOME")}
        environment = os.environ | SECRETS | homes | {"HF_ENDPOINT": hub.url, "HF_HUB_DISABLE_XET": "1"}
        environment |= {"WANDB_MODE": "offline", "NO_PROXY": "127.0.0.1", "PYTHONPATH": f"{ROOT}:{ROOT / 'inference'}"}
        # Nothing tells the libraries to stay at home.
        environment.pop("HF_HUB_OFFLINE", None)
        done = subprocess.run(
            [sys.executable, "-m", "tests.security.road", str(root)],
            cwd=ROOT,
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )
    assert done.returncode == 0, done.stderr[-4000:]
    return root, done, hub


def test_no_address_beyond_the_loopback_is_asked_for(ran):
    assert json.loads(ran[1].stdout.splitlines()[-1])["elsewhere"] == []


def test_nothing_listens_beyond_the_loopback(ran):
    assert json.loads(ran[1].stdout.splitlines()[-1])["listening"] == []


def test_pickles_name_no_code(ran):
    named = json.loads(ran[1].stdout.splitlines()[-1])["pickled"]
    assert [name for name in named if not name.startswith(PICKLED)] == []


@pytest.mark.parametrize("name", SECRETS)
def test_a_secret_is_in_no_file_and_in_no_word(ran, name):
    root, done, hub = ran
    secret = SECRETS[name].encode()
    files = [path for path in root.rglob("*") if path.is_file() and not path.is_symlink()]
    assert [path for path in files if path.suffix == ".wandb"], "wandb was there"
    assert [path for path in files if secret in path.read_bytes()] == []
    assert secret not in done.stdout.encode() + done.stderr.encode()
    repository = hub.repositories["someone/tiny"]
    assert "README.md" in repository.commits[repository.head]
    pushed = {path: content for files in repository.commits.values() for path, content in files.items()}
    assert [path for path, content in pushed.items() if secret in content] == []
