"""What is pushed to the Hub: a repository is named before any work, and heads go there while training goes on."""

import tempfile
import time
from collections.abc import Callable
from concurrent.futures import Future, wait
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from graft_inference.errors import GraftError
from graft_inference.files import read_json
from graft_train.config.export import ExportConfig
from graft_train.files import write_json
from graft_train.processes import is_main, say

PUSHED = "pushed.json"
"""Beside a head: which repository has it, after how many steps, in which commit."""
PATIENCE_S = 300
"""How long the end of a training waits for pushes: other processes wait with it, and NCCL ends them after 600."""


def check_repo_id(repo_id: str | None, asked: str) -> None:
    """Raises GraftError unless the id is one of the Hub's.

    Args:
        asked: the setting that needs it.
    """
    if not repo_id:
        raise GraftError(f"{asked} needs export.repo_id=you/name")
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise GraftError(f"export.repo_id={repo_id} is not a Hub id such as you/name: {error}") from error


class HeadPusher:
    """Pushes heads in a thread of the Hub's client, one at a time. What fails is told, and training goes on.

    Of several processes the main one pushes.

    Args:
        out: the stage's directory, which keeps what was pushed, so that a resumed training does not push it again.
        settings: which repository, and whether a new one is private.
        write: writes a head's files into a directory.
    """

    def __init__(self, out: Path, settings: ExportConfig, write: Callable[[Any, Path], None]) -> None:
        self._record = out / PUSHED
        self._settings = settings
        self._write = write
        self._api = HfApi()
        self._going: Future[None] | None = None

    def offer(self, step: int, head: Any) -> None:
        """Begins to push a head, unless it is there already or the one before it is still on its way.

        Args:
            head: on the CPU, and nobody else's.
        """
        if not is_main() or step <= self._pushed().get("step", 0):
            return
        if self._going is not None and not self._going.done():
            say(f"distill: the head of step {step} is not pushed, as the one before is still on its way")
            return
        self._going = self._api.run_as_future(self._push, step, head)

    def finish(self, step: int, head: Any) -> dict[str, Any] | None:
        """Pushes the last head, and waits for that. Returns what the Hub has; None: nothing of this training."""
        if not is_main():
            return None
        end = time.monotonic() + PATIENCE_S
        if self._is_done(end):
            self.offer(step, head)
            self._is_done(end)
        pushed = self._pushed()
        last = f"step {pushed['step']} in {pushed['repo_id']}, commit {pushed['commit']}" if pushed else "none"
        say(f"distill: newest head on the Hub: {last}")
        return pushed or None

    def _is_done(self, end: float) -> bool:
        """Whether nothing is on its way any more, for which it waits until then."""
        if self._going is None or not wait([self._going], max(0.0, end - time.monotonic())).not_done:
            return True
        say(f"distill: warning: a push is not done after {PATIENCE_S} s, and is left to itself")
        return False

    def _pushed(self) -> dict[str, Any]:
        try:
            found = read_json(self._record)
        except GraftError:  # nothing yet, or nothing that can be read: what is there is pushed again
            return {}
        return found if found.get("asked") == self._settings.repo_id else {}

    def _push(self, step: int, head: Any) -> None:
        asked = str(self._settings.repo_id)
        try:
            repo_id = self._api.create_repo(asked, private=self._settings.private, exist_ok=True).repo_id
            if self._api.file_exists(repo_id, "graft.json"):
                raise GraftError("it holds a bundle, whose head would no longer be the one its policy is for")
            with tempfile.TemporaryDirectory() as directory:
                self._write(head, Path(directory))
                message = f"Draft head after {step} steps"
                done = self._api.upload_folder(repo_id=repo_id, folder_path=directory, commit_message=message)
            write_json(self._record, {"asked": asked, "repo_id": repo_id, "step": step, "commit": done.oid})
        except Exception as error:  # the client's own kinds, those of the HTTP library under it, and a full disk
            say(f"distill: warning: the head of step {step} could not be pushed to {asked}: {error}")
