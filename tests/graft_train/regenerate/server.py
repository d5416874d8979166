"""An OpenAI-compatible server on the loopback, whose target's answers follow from the prompt alone."""

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

END = 1


def answer_to(prompt: list[int], limit: int) -> list[int]:
    """Ends by itself after a number of tokens that depends on the prompt, unless the limit comes first."""
    whole = [9 + (sum(prompt) + place) % 20 for place in range(1 + sum(prompt) % 4)] + [END]
    return whole[:limit]


@dataclass
class Server:
    """Attributes:
    completion: makes a choice from the answer's ids; by default as vLLM does when asked for ids.
    model: what it says of its model besides the name.
    refuse: gives the status and the message of a refusal for the n-th request (from 0), or None; a message of bytes
        is the whole body.
    """

    completion: Callable[[list[int], list[int]], dict[str, Any]] | None = None
    refuse: Callable[[int], tuple[int, str | bytes] | None] = lambda number: None
    model: dict[str, Any] = field(default_factory=dict)
    requests: list[dict[str, Any]] = field(default_factory=list)
    answers: int = 0
    url: str = ""
    lock: threading.Lock = field(default_factory=threading.Lock)


@contextmanager
def serving(server: Server) -> Iterator[Server]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: Any) -> None:
            pass

        def send(self, status: int, body: Any) -> None:
            content = body if isinstance(body, bytes) else json.dumps(body).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def do_GET(self) -> None:
            found = self.path == "/v1/models"
            model = {"id": "tiny", "object": "model"} | server.model
            self.send(*((200, {"object": "list", "data": [model]}) if found else (404, {})))

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with server.lock:
                number = len(server.requests)
                server.requests.append(body | {"authorization": self.headers.get("Authorization")})
            if refusal := server.refuse(number):
                if refusal[0] == 0:  # hangs up in the middle
                    self.close_connection = True
                    return
                body = refusal[1] if isinstance(refusal[1], bytes) else {"error": {"message": refusal[1]}}
                self.send(refusal[0], body)
                return
            if self.path != "/v1/completions" or body["model"] != "tiny":
                self.send(404, {})
                return
            prompt, ids = body["prompt"], answer_to(body["prompt"], body["max_tokens"])
            choice = {"index": 0, "text": "", "finish_reason": "stop" if ids[-1] == END else "length"}
            made = server.completion or (lambda prompt, ids: {"token_ids": ids, "prompt_token_ids": prompt})
            self.send(200, {"object": "text_completion", "choices": [choice | made(prompt, ids)]})
            with server.lock:
                server.answers += 1

    http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    http.daemon_threads = True
    server.url = f"http://127.0.0.1:{http.server_port}/v1"
    thread = threading.Thread(target=http.serve_forever, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        http.shutdown()
        http.server_close()
