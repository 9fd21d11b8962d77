"""A stub of an OpenAI-compatible endpoint on the loopback address, told what to answer."""

import json
import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Answer = tuple[int, Any]
"""Status, and the body (a text stands for a whole completion with that content)."""


class Stub:
    """The server, as a context manager.

    Args:
        answer: number of the request from 0, and its body -> what is answered.
        pause: seconds before each answer.
    """

    def __init__(self, answer: Callable[[int, dict], Answer], pause: float = 0.0) -> None:
        self.requests: list[dict] = []
        self.keys: list[str | None] = []
        self.most = self.now = 0
        lock = threading.Lock()
        stub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with lock:
                    number = len(stub.requests)
                    stub.requests.append(body)
                    stub.keys.append(self.headers["Authorization"])
                    stub.now += 1
                    stub.most = max(stub.most, stub.now)
                time.sleep(pause)
                status, said = answer(number, body)
                with lock:
                    stub.now -= 1
                data = json.dumps(completion(said) if isinstance(said, str) else said).encode()
                self.send_response(status)
                self.send_header("Content-Type", "application/json")
                self.send_header("Retry-After-Ms", "1")
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, *_: Any) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}/v1"

    def __enter__(self) -> "Stub":
        self.thread = threading.Thread(target=self.server.serve_forever, daemon=True)
        self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.server.shutdown()
        self.server.server_close()
        self.thread.join()


def completion(text: str | None, reason: str = "stop", refusal: str | None = None) -> dict:
    """A chat completion of the protocol, 10 tokens."""
    message = {"role": "assistant", "content": text, "refusal": refusal}
    return {
        "id": "1",
        "object": "chat.completion",
        "created": 0,
        "model": "m",
        "choices": [{"index": 0, "message": message, "finish_reason": reason}],
        "usage": {"prompt_tokens": 8, "completion_tokens": 2, "total_tokens": 10},
    }
