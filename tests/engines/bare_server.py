"""A process that answers as a vLLM server that is ready, and draws nothing; standard library only.

python bare_server.py -m MODULE ... --uds PATH ...
"""

import json
import socketserver
import sys
from http.server import BaseHTTPRequestHandler
from typing import Any

ANSWERS: dict[str, Any] = {
    "/health": {},
    "/version": {"version": "0.32.0"},
    "/v1/models": {"data": [{"max_model_len": 512}]},
}


class Handler(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        answer = ANSWERS.get(self.path)
        text = json.dumps(answer).encode()
        self.send_response(405 if answer is None else 200)
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    def log_message(self, *given: Any) -> None:
        """Say nothing."""

    def address_string(self) -> str:
        return "here"


if __name__ == "__main__":
    path = sys.argv[sys.argv.index("--uds") + 1]
    socketserver.ThreadingUnixStreamServer(path, Handler).serve_forever()
