"""A server of ours in a process of its own, on a tiny pair."""

import json
import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from graft_inference.errors import GraftError

from .tiny import learned_policy
from .tiny_bundle import tiny_tokenizer, write_bundle, write_target

TEMPLATE = (
    "{% for m in messages %}{% if m.content == 'odd' %}{{ raise_exception('no odd ones') }}{% endif %}"
    "{{ m.role }} {{ m.content }}\n{% endfor %}assistant {% if terse %}terse {% endif %}"
)
GRAFT = [sys.executable, "-c", "from graft_train.cli import main; main()", "serve"]


def write_pair(root: Path, positions: int) -> Path:
    """A bundle with plans of every source, whose graft.json names the target beside it, which can chat."""
    target = write_target(root / "target", max_position_embeddings=positions)
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(target)
    directory = write_bundle(root / "bundle", target)
    graft = json.loads((directory / "graft.json").read_text()) | {"policy": learned_policy().to_dict()}
    (directory / "graft.json").write_text(json.dumps(graft))
    return directory


class Served:
    """Attributes:
    url: of the API, which ends in /v1.
    lines: what it wrote to stderr so far.
    """

    def __init__(self, bundle: Path, *arguments: str) -> None:
        options = ["--port", "0", "--device", "cpu", "--served-model-name", "tiny", *arguments]
        environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        self.process = subprocess.Popen(
            [*GRAFT, str(bundle), *options], stderr=subprocess.PIPE, text=True, env=environment
        )
        self.lines: list[str] = []
        self.url = ""
        is_ready = threading.Event()

        def read() -> None:
            for line in self.process.stderr:
                self.lines.append(line)
                if found := re.match(r"graft serve: (http\S+) serves tiny$", line):
                    self.url = found[1]
                    is_ready.set()
            is_ready.set()

        self.reader = threading.Thread(target=read, daemon=True)
        self.reader.start()
        is_ready.wait()
        if not self.url:
            raise GraftError("".join(self.lines))

    @property
    def root(self) -> str:
        return self.url.removesuffix("/v1")

    def end(self, how: int = signal.SIGTERM) -> int:
        self.process.send_signal(how)
        self.process.wait(60)
        self.reader.join(10)
        return self.process.returncode


@contextmanager
def served(bundle: Path, *arguments: str) -> Iterator[Served]:
    server = Served(bundle, *arguments)
    try:
        yield server
    finally:
        if server.process.poll() is None:
            server.process.kill()
            server.process.wait()
        server.process.stderr.close()
