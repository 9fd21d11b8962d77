"""A stand-in for a vLLM server: its HTTP side, over a real tiny model that it samples from.

    python -m tests.engines.stand_in -m MODULE --model FOLDER --uds PATH ...

It has a weight file of its own to read, an output head of its own even where the policy's is tied,
versions, pauses and a cache of prefixes, and can be told to do what servers were seen to do wrong.
"""

import contextlib
import itertools
import json
import socketserver
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from hmpo.config import PolicyConfig
from hmpo.models import load_policy
from hmpo.sampling import sample_responses

ROUTES = ("/inference/v1/generate", "/collective_rpc", "/pause", "/resume",
          "/update_weight_version")  # fmt: skip


class StandIn:
    """The server's state; `faults` are names of what it does wrong, and may change at any time."""

    def __init__(self, folder: Path, *faults: str) -> None:
        self.model = load_policy(PolicyConfig(path=str(folder))).model.eval()
        head = self.model.get_output_embeddings()
        head.weight = nn.Parameter(head.weight.detach().clone())  # tied no more
        self.first = self.state()
        self.faults = set(faults)
        self.version, self.label, self.length = "0.32.0", "default", 512
        self.paused, self.running = False, threading.Event()
        self.running.set()
        self.lock = threading.Lock()
        self.prefixes: dict[tuple[str, tuple[int, ...]], dict[str, Tensor]] = {}
        self.asked: list[tuple[str, Any]] = []
        """Path and body of each request."""
        self.arguments: list[str] = []

    def state(self) -> dict[str, Tensor]:
        return {name: value.detach().clone() for name, value in self.model.state_dict().items()}

    def get(self, path: str) -> tuple[int, Any]:
        if path == "/version":
            return 200, {"version": self.version}
        if path == "/health":
            return 200, None
        if path == "/is_paused":
            return 200, {"is_paused": self.paused}
        if path == "/v1/models":
            return 200, {"data": [{"max_model_len": self.length}]}
        if path in ROUTES and f"no {path}" not in self.faults:
            return 405, {"detail": "Method Not Allowed"}
        return 404, {"detail": "Not Found"}

    def post(self, path: str, query: dict[str, list[str]], body: Any) -> tuple[int, Any]:
        if path == "/pause":
            self.paused = True
            self.running.clear()
            if query.get("clear_cache", ["true"]) == ["true"] and "keeps" not in self.faults:
                self.prefixes.clear()
            return 200, {"status": "paused"}
        if path == "/resume":
            if "stays paused" not in self.faults:
                self.paused = False
                self.running.set()
            return 200, {"status": "resumed"}
        if path == "/update_weight_version":
            self.label = body["new_version"]
            return 200, {"success": True}
        if path == "/collective_rpc":
            assert body["method"] == "reload_weights"
            return self.reload(Path(body["kwargs"]["weights_path"]))
        assert path == "/inference/v1/generate"
        self.running.wait()
        with self.lock:
            return self.generate(body)

    def reload(self, folder: Path) -> tuple[int, Any]:
        """What is in the file replaces what has that name; nobody is told of the rest."""
        weights = load_file(folder / "model.safetensors")
        if "reload" in self.faults or weights.keys() - self.model.state_dict().keys():
            return 500, {"error": {"message": "EngineCore encountered an issue."}}
        if "head" in self.faults:
            weights.pop("lm_head.weight", None)
        if "missing" in self.faults:
            weights.pop("model.layers.0.mlp.down_proj.weight")
        self.model.load_state_dict(weights, strict=False)
        return 200, {"results": [None]}

    def generate(self, body: dict[str, Any]) -> tuple[int, Any]:
        if "dies" in self.faults:
            return 500, {"error": {"message": "EngineCore encountered an issue."}}
        if "restarts" in self.faults:
            self.faults.remove("restarts")
            self.model.load_state_dict(self.first)
            self.label = "default"
        asked, ids = body["sampling_params"], body["token_ids"]
        present = self.state()
        place = (body.get("cache_salt", ""), tuple(ids))
        self.model.load_state_dict(self.prefixes.setdefault(place, present))
        try:
            choices = [self.choice(asked, ids, index) for index in range(asked["n"])]
        finally:
            self.model.load_state_dict(present)
        if "drops" in self.faults:
            choices.pop()
        return 200, {"choices": choices[::-1]}

    def choice(self, asked: dict[str, Any], ids: list[int], index: int) -> dict[str, Any]:
        most = min(asked["max_tokens"], self.length - len(ids))
        rollout = sample_responses(
            self.model,
            torch.tensor([ids]),
            max_length=most,
            eos_token=tuple(asked["stop_token_ids"]),
            pad_token=0,
            temperature=asked["temperature"],
            generator=torch.Generator().manual_seed((asked["seed"] + index) % 2**32),
        )
        tokens = rollout.response_ids[0].tolist()
        logprobs = rollout.sampling_logprobs[0].tolist()
        if "raw" in self.faults:
            logprobs = [logprob * asked["temperature"] for logprob in logprobs]
        if "loses" in self.faults:
            logprobs.pop()
        label = "another.0" if "another" in self.faults else self.label
        return {
            "index": index,
            "finish_reason": "stop" if bool(rollout.finished[0]) else "length",
            "token_ids": tokens,
            "logprobs": {
                "content": [{"token_id": t, "logprob": x} for t, x in zip(tokens, logprobs)]
            },
            "weight_versions": [{"version": label, "start": 0, "end": len(tokens)}],
        } | ({"finish_reason": "abort"} if "aborts" in self.faults else {})


class _Handler(BaseHTTPRequestHandler):
    stand_in: StandIn

    def do_GET(self) -> None:
        self.reply(*self.stand_in.get(urlsplit(self.path).path))

    def do_POST(self) -> None:
        place = urlsplit(self.path)
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])) or b"{}")
        self.stand_in.asked.append((place.path, body))
        if "hangs up" in self.stand_in.faults:
            self.close_connection = True
            return
        with contextlib.suppress(BrokenPipeError):
            self.reply(*self.stand_in.post(place.path, parse_qs(place.query), body))

    def reply(self, status: int, body: Any) -> None:
        text = b"" if body is None else json.dumps(body).encode()
        if "no json" in self.stand_in.faults:
            text = b"<html>"
        self.send_response(status)
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    def log_message(self, *given: Any) -> None:
        """Say nothing."""

    def address_string(self) -> str:
        return "here"  # a socket file has no other


class _FileServer(socketserver.ThreadingMixIn, socketserver.UnixStreamServer):
    daemon_threads = True


@contextlib.contextmanager
def serving(stand_in: StandIn) -> Iterator[str]:
    """Its address, while it serves from a thread of this process."""
    handler = type("Handler", (_Handler,), {"stand_in": stand_in})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        stand_in.running.set()
        server.shutdown()
        server.server_close()
        thread.join()


def main(arguments: list[str]) -> None:
    """Serve as a process of its own, started as vLLM is."""
    given = dict(itertools.pairwise(arguments))
    torch.set_num_threads(1)
    stand_in = StandIn(Path(given["--model"]))
    sys.stdout.write(" ".join(arguments) + "\n")
    sys.stdout.flush()
    handler = type("Handler", (_Handler,), {"stand_in": stand_in})
    _FileServer(given["--uds"], handler).serve_forever()


if __name__ == "__main__":
    main(sys.argv[1:])
