"""The whole road of a tiny run in this process, which may speak to itself alone and holds secrets.

    python -m tests.security.road ROOT

Prints JSON: addresses that were asked for beyond the loopback, those where something listened for others, and classes
that pickles named. The environment holds the secrets, and the address of a Hub on the loopback.
"""

import contextlib
import json
import os
import sys
import threading
import traceback
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil

ASKING = {"socket.connect": 1, "socket.bind": 1, "socket.sendto": 1, "socket.getaddrinfo": 0, "socket.gethostbyname": 0}
"""Which argument of an event is the address."""
OWN = ("127.0.0.1", "::1", "localhost", "", None)


def listened(found: set[str], ended: threading.Event) -> None:
    """Notes, until it has ended, where this process and those that it started listen for others."""
    own = psutil.Process()
    while not ended.wait(0.2):
        for process in [own, *own.children(recursive=True)]:
            with contextlib.suppress(psutil.Error):
                open_ones = process.net_connections("inet")
                found |= {str(one.laddr) for one in open_ones if one.status == "LISTEN" and one.laddr.ip not in OWN}


def watch() -> tuple[list[str], set[str]]:
    """What is asked for elsewhere, which is refused, and what pickles name; filled from now on."""
    elsewhere, pickled = list[str](), set[str]()

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if event in ASKING:
            address = arguments[ASKING[event]]
            host = address[0] if isinstance(address, tuple) else address
            # A path or a name is an address of a Unix socket.
            unix = event not in ("socket.getaddrinfo", "socket.gethostbyname") and isinstance(address, str | bytes)
            if not unix and host not in OWN:
                elsewhere.append(f"{event} {address}")
                raise PermissionError(f"no network: {address}")
        elif event == "pickle.find_class":
            pickled.add(f"{arguments[0]}.{arguments[1]}")

    sys.addaudithook(hook)
    return elsewhere, pickled


def main(root: Path) -> None:
    elsewhere, pickled = watch()
    listening, ended = set[str](), threading.Event()
    watcher = threading.Thread(target=listened, args=(listening, ended))
    watcher.start()
    try:
        go(root)
    finally:
        ended.set()
        watcher.join()
    print(json.dumps({"elsewhere": elsewhere, "pickled": sorted(pickled), "listening": sorted(listening)}))


def go(root: Path) -> None:
    """All stages, with those that fail."""
    from graft_inference.errors import GraftError
    from graft_train.build_corpus import build_corpus
    from graft_train.calibrate import calibrate
    from graft_train.config.export import ExportConfig
    from graft_train.distill import distill
    from graft_train.evaluate import evaluate
    from graft_train.export import export
    from graft_train.inspect import inspect
    from graft_train.regenerate import regenerate
    from tests.graft_inference.tiny_bundle import write_target
    from tests.graft_train.regenerate.server import Server, serving
    from tests.graft_train.test_evaluate_servers import Fake, faking
    from tests.graft_train.tiny_run import tiny_config, write_sources

    def failing(stage: Any, config: Any, whole: bool = True) -> None:
        """Its error as the command prints it, and, if all of it is wanted, with what led to it."""
        try:
            stage(config)
        except GraftError as error:
            print(f"error: {error}", file=sys.stderr)
            if whole:
                traceback.print_exc()
        else:
            raise AssertionError("it did not fail")

    write_sources(root / "sources")
    write_target(root / "run" / "target")
    config = tiny_config(root / "run", root / "sources")
    config.head = replace(config.head, trackers=["wandb"])
    echoing = Server(refuse=lambda number: (401, json.dumps({"sent": server.requests[-1]["authorization"]})))
    with serving(echoing) as server:
        refused = replace(config.regenerate, base_url=server.url, retries=0)
        failing(regenerate, replace(config, run_dir=str(root / "refused"), regenerate=refused), whole=False)
    with serving(Server()) as server:
        asked = replace(config.regenerate, base_url=server.url)
        regenerate(replace(config, regenerate=asked))
        assert {one["authorization"] for one in server.requests} == {f"Bearer {os.environ['OPENAI_API_KEY']}"}
    config.regenerate = asked
    for stage in (distill, build_corpus, calibrate):
        stage(config)
    pushed = replace(config, export=ExportConfig(push_to_hub=True, repo_id="someone/tiny", private=True))
    export(pushed)
    with faking(Fake()) as fake:
        served = replace(config.evaluation, server=fake.url, concurrency=[1], prompts=2, repeats=1)
        evaluate(replace(config, evaluation=served))
        assert set(fake.keys) == {f"Bearer {os.environ['OPENAI_API_KEY']}"}
    evaluate(config)
    export(pushed)  # its card has the evaluation now
    inspect(str(root / "run" / "bundle"))
    failing(export, replace(pushed, export=replace(pushed.export, repo_id="closed/tiny")))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
