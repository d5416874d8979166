"""`graft-serve BUNDLE`: the server as a process."""

import argparse
import signal
import socket
import sys
from collections.abc import Sequence
from functools import partial
from ipaddress import ip_address

from ..bundle import recorded_target
from ..cli import BUNDLE_HELP, check_method, load_engine
from ..engine import GraftEngine
from ..errors import GraftError
from ..policy.policy import METHODS

HELP = """Serve the target of BUNDLE, a directory or a Hub id, through OpenAI's API: /v1/models, /v1/completions and
/v1/chat/completions, with /metrics (Prometheus) and /health. It is meant for one user on one machine: requests take
turns on one engine, round by round. Serve more than one user with vLLM or SGLang, which read the bundle's EAGLE-3
head too."""
LOOPBACK = ("127.0.0.1", "localhost", "[::1]")
"""Names of this machine for itself, as requests have them."""
MIB = 1 << 20


def main(arguments: Sequence[str] | None = None, prog: str = "graft-serve") -> int:
    """Runs the command until SIGINT or SIGTERM; 2 on bad input, with one line on stderr that says what to do."""
    options = _parser(prog).parse_args(arguments)
    try:
        serve(options, prog)
    except GraftError as error:
        print(f"{prog}: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    return 0


def serve(options: argparse.Namespace, prog: str) -> None:
    """Loads the engine and serves until a signal ends it.

    Raises:
        GraftError: what cannot be served, an address that is taken, or libraries that are missing.
    """
    try:
        from fastapi.middleware.trustedhost import TrustedHostMiddleware

        from .answer import Limits
        from .app import Server, make_app
        from .metrics import Metrics
        from .scheduler import Scheduler
    except ImportError as error:
        raise GraftError(f"{error.name} is not installed: pip install 'graft-inference[serve]'") from error

    _check(options)
    check_method(options.bundle, options.method)
    with _bound(options.host, options.port) as listening:  # before the target is loaded, which may take minutes
        target = options.target or recorded_target(options.bundle)
        engine = load_engine(options.bundle, target, options.device, options.dtype, keep_prefix=True)
        length, name = _length(engine, options.max_model_len), options.served_model_name or target
        metrics, limits = Metrics(), Limits(length, options.max_new_tokens)
        scheduler = Scheduler(
            engine, options.method, limits, options.max_running, options.max_waiting,
            partial(metrics.ended, method=options.method),
        )  # fmt: skip
        metrics.follow(engine.policy, options.method, lambda: scheduler.running, lambda: scheduler.unfinished)
        host, port = listening.getsockname()[:2]
        host = f"[{host}]" if ":" in host else host
        url = f"http://{host}:{port}/v1"
        app = make_app(scheduler, metrics, name, options.max_body_mib * MIB)
        if _is_loopback(options.host):  # or a page that is open in a browser could reach it by a name of its own
            app.add_middleware(TrustedHostMiddleware, allowed_hosts=[*LOOPBACK, host])
        server = Server(app, scheduler, lambda: print(f"{prog}: {url} serves {name}", file=sys.stderr, flush=True))
        # uvicorn ends the server in good order, and then has these hear of the signal.
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, lambda *_: None)
        server.run(sockets=[listening])


def _check(options: argparse.Namespace) -> None:
    """Raises GraftError for a number that is out of its range, and warns of an address that others reach."""
    for name, least in {"max_new_tokens": 1, "max_running": 1, "max_waiting": 0, "max_body_mib": 1}.items():
        if getattr(options, name) < least:
            raise GraftError(f"--{name.replace('_', '-')} {getattr(options, name)}: give at least {least}")
    if options.max_model_len is not None and options.max_model_len < 2:
        raise GraftError(f"--max-model-len {options.max_model_len}: a prompt and an answer have 2 tokens at least")
    if not _is_loopback(options.host):
        print(f"note: whoever reaches {options.host} can use this server; it asks for no key", file=sys.stderr)


def _is_loopback(host: str) -> bool:
    """Whether nobody but this machine reaches an address."""
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _bound(host: str, port: int) -> socket.socket:
    """Raises GraftError for an address that cannot be had."""
    listening = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listening.bind((host, port))
    except (OSError, OverflowError) as error:
        listening.close()
        raise GraftError(f"cannot listen on {host}, port {port} ({error}): choose another --host or --port") from error
    return listening


def _length(engine: GraftEngine, asked: int | None) -> int:
    """Most tokens of prompt and answer together. Raises GraftError for more than the target takes."""
    most = engine.target.max_positions
    if asked is not None and asked > most:
        raise GraftError(f"--max-model-len {asked}: the target's limit is {most}")
    return asked or most


def _parser(prog: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog=prog, description=HELP)
    parser.add_argument("bundle", nargs="?", help=BUNDLE_HELP)
    parser.add_argument("--target", help="directory or Hub id of the model; else the one the bundle names")
    parser.add_argument("--method", choices=METHODS, default="graft")
    parser.add_argument("--host", default="127.0.0.1", help="default: this machine alone can reach it")
    parser.add_argument("--port", type=int, default=8000, help="default: 8000; 0 is any that is free")
    parser.add_argument("--served-model-name", metavar="NAME", help="what requests call the model; default: the target")
    parser.add_argument("--max-model-len", type=int, help="most tokens of prompt and answer; default: the target's")
    parser.add_argument(
        "--max-new-tokens", type=int, default=1024, help="of a chat's answer that names no number (default: 1024)"
    )
    parser.add_argument("--max-running", type=int, default=4, help="answers under way, in turns (default: 4)")
    parser.add_argument("--max-waiting", type=int, default=32, help="requests beside them, or 503 (default: 32)")
    parser.add_argument("--max-body-mib", type=int, default=4, help="size of a request, or 413 (default: 4)")
    parser.add_argument("--device", default="auto", help="default: cuda where there is one, else cpu")
    parser.add_argument(
        "--dtype", default="auto", help="default: bfloat16 on cuda; on a CPU the policy's own, else float32"
    )
    return parser


if __name__ == "__main__":
    sys.exit(main())
