"""A vLLM server of the user's own installation that lives as long as the run.

The policy is written into a folder that the server reads once, in float32 as it is trained or in
16 bits where the rollouts are drawn so. Requests go through a socket file that no other user can
open, since vLLM guards neither its weights nor its calls by a key. A watcher process ends the
server's whole session when the run ends, also by SIGKILL (`hmpo.engines.watcher`).
"""

import contextlib
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from hmpo.engines import watcher
from hmpo.engines.client import Client, Unreachable
from hmpo.engines.server import OLDEST, usable_length
from hmpo.engines.weights import FILE, refuse_unservable, remove_folder, write_weights
from hmpo.errors import EngineError
from hmpo.models.loading import LoadedPolicy
from hmpo.models.policy import unwrap
from hmpo.models.probe import longest_row
from hmpo.models.saving import save_policy

MODULE = "vllm.entrypoints.openai.api_server"
VERSION = (
    "import importlib.metadata as m, importlib.util as u\n"
    "names = m.packages_distributions().get('vllm', []) if u.find_spec('vllm') else []\n"
    "print(*(m.version(name) for name in names[:1]))\n"
)
"""Prints the version of vLLM that is installed, or nothing; does not import it."""
LOOK_S = 0.1
END_S = 20.0
KEPT = 256 << 20
"""Bytes for keys and values on a processor, at least."""
LONGEST = 4096
"""Tokens of prompt and response that a server is started for, where the policy reads more."""


class StartedServer:
    """Starts, waits for and ends a server.

    Args:
        loaded: the policy and its tokenizer.
        folder: for the policy, the socket and, without `log`, what the server says.
        python: of the environment that has vLLM; empty for this one.
        arguments: further ones for the server.
        timeout: seconds until it answers, and until an answer.
        dtype: float32 or bfloat16, that it computes in.
        max_length: longest response, in tokens.
        log: file for what the server says, in a folder that is there when it starts.

    Raises:
        EngineError: one line: no such Python, or one without a vLLM that can be used.
    """

    def __init__(
        self,
        loaded: LoadedPolicy,
        folder: Path,
        *,
        python: str,
        arguments: Sequence[str],
        timeout: float,
        dtype: str,
        max_length: int,
        log: Path | None = None,
    ) -> None:
        refuse_unservable(loaded.model)
        self.python = _python_with_vllm(python)
        self.loaded, self.folder, self.arguments = loaded, folder, tuple(arguments)
        self.timeout, self.dtype, self.max_length = timeout, dtype, max_length
        self.client = Client(str(folder / "socket"), timeout)
        self.longest: int | None = None
        self.log = log
        self.process: subprocess.Popen[str] | None = None
        """The watcher; it writes the server's process id, and its exit code."""
        self.group = 0
        """Process id of the server, which is also that of its session."""

    def start(self) -> None:
        """Write the policy and start the server, without waiting."""
        if self.process is not None:
            return
        model = self.folder / "model"
        save_policy(self.loaded.model, self.loaded.tokenizer, model)
        for path in model.glob("*.safetensors*"):  # perhaps in other pieces, or another precision
            path.unlink()
        write_weights(self.loaded.model, model)
        if self.log is None or not self.log.parent.is_dir():
            self.log = self.folder / "engine.log"
        command = [self.python, "-m", MODULE, *self._arguments(model)]
        watch = [sys.executable, "-I", "-S", str(watcher.__file__), str(self.log), str(self.folder)]
        self.process = subprocess.Popen(
            [*watch, *command],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=self._environment(),
            start_new_session=True,
            text=True,
        )
        assert self.process.stdout is not None
        self.group = int(self.process.stdout.readline() or 0)

    def wait(self) -> None:
        """Wait until the server answers.

        Raises:
            EngineError: one line: it ended, took too long, or cannot be used.
        """
        assert self.process is not None, "start comes first"
        until = time.monotonic() + self.timeout
        while True:
            with contextlib.suppress(Unreachable):
                self.client.get("/health", timeout=self.timeout)
                break
            if self.process.poll() is not None:
                line = f"rollout.engine: vLLM ended while it started; {self.remedy()}"
                raise EngineError(line)
            if time.monotonic() > until:
                late = f"not ready after rollout.timeout = {self.timeout:g} s"
                raise EngineError(f"rollout.engine: vLLM is {late}; {self.remedy()}")
            time.sleep(LOOK_S)
        self.longest = usable_length(self.client)
        (self.folder / "model" / FILE).unlink(missing_ok=True)  # it has read them

    def remedy(self) -> str:
        """What the server said last, and where the rest stands."""
        said = _last_error(self.log) if self.log is not None else ""
        place = f"its log is {self.log}" if self._kept else "start a server by hand for its log"
        return f"{place}, which has: {said}" if said and self._kept else said or place

    def close(self) -> None:
        """End the server with all its processes, and wait for that."""
        process, self.process = self.process, None
        if process is None:
            return
        assert process.stdin is not None and process.stdout is not None
        with contextlib.suppress(OSError):
            process.stdin.close()
        try:
            process.wait(END_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        process.stdout.close()
        if process.returncode and self.group:  # the watcher itself was killed
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self.group, 9)
        remove_folder(self.folder)

    @property
    def _kept(self) -> bool:
        """Whether the log outlives the server."""
        return self.log is not None and self.folder not in self.log.parents

    def _environment(self) -> dict[str, str]:
        """Ours, less what another Python would misread; nothing is reported to anybody."""
        environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PYTHONHOME")}
        return environment | {
            "VLLM_SERVER_DEV_MODE": "1",
            "VLLM_NO_USAGE_STATS": "1",
            "DO_NOT_TRACK": "1",
            "HF_HUB_OFFLINE": "1",
            "TOKENIZERS_PARALLELISM": "false",
        }

    def _arguments(self, model: Path) -> list[str]:
        """The server's command line; the user's own arguments come last and win."""
        policy = self.loaded.model
        context = longest_row(policy) or LONGEST
        length = min(context, max(LONGEST, 2 * self.max_length))
        chosen = [
            *("--model", str(model), "--dtype", self.dtype, "--uds", self.client.address),
            *("--logprobs-mode", "processed_logprobs", "--generation-config", "vllm"),
            *("--max-model-len", str(length)),
            *("--enable-scale-out", "--skip-tokenizer-init"),
        ]
        if next(policy.parameters()).device.type == "cpu":
            cache = max(KEPT, 4 * length * _cached_bytes(policy))
            chosen += ["--enforce-eager", "--no-enable-chunked-prefill", "--block-size", "32"]
            chosen += ["--kv-cache-memory-bytes", str(cache)]
        else:
            chosen += ["--gpu-memory-utilization", "0.4"]  # the trainer is on that device too
        return [*chosen, *self.arguments]


def _cached_bytes(policy: torch.nn.Module) -> int:
    """Bytes of one token's keys and values, at most: as many heads as queries have."""
    config: Any = unwrap(policy).config
    layers = getattr(config, "num_hidden_layers", 1)
    heads = getattr(config, "num_attention_heads", 1)
    shared = getattr(config, "num_key_value_heads", None) or heads
    width = getattr(config, "head_dim", None) or getattr(config, "hidden_size", 1) // heads
    return 2 * 4 * layers * shared * width


def _python_with_vllm(python: str) -> str:
    """The path of a Python that has a vLLM which can be used.

    Raises:
        EngineError: one line.
    """
    got = f"rollout.python: got {python!r}"
    path = shutil.which(str(Path(python).expanduser())) if python else sys.executable
    if path is None:
        raise EngineError(f"{got}, which is no program; expected .../bin/python")
    environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PYTHONHOME")}
    try:
        found = subprocess.run(
            [path, "-c", VERSION],
            capture_output=True,
            text=True,
            timeout=120,
            env=environment,
            check=True,
        ).stdout.strip()
    except (OSError, subprocess.SubprocessError) as error:
        raise EngineError(f"{got}, which does not run ({type(error).__name__})") from None
    oldest = ".".join(map(str, OLDEST))
    if not found:
        raise EngineError(
            f"{got}, an environment without vLLM; install it there (vllm>={oldest}) or name another"
        )
    if tuple(int(part) for part in re.findall(r"\d+", found)[:2]) < OLDEST:
        raise EngineError(f"{got} with vLLM {found}, expected {oldest} or newer")
    return path


def _last_error(log: Path) -> str:
    """The last line of a log that names an error, or else the last one, without its prefix."""
    try:
        with log.open("rb") as file:
            file.seek(max(0, log.stat().st_size - (64 << 10)))
            lines = file.read().decode("utf-8", "replace").splitlines()
    except OSError:
        return ""
    texts = [" ".join(line.split()) for line in lines if line.strip()]
    errors = [text for text in texts if re.search(r"\b\w*(Error|Exception)\b: \S", text)]
    said = (errors or texts)[-1:] or [""]
    return re.sub(r"^\([^)]*\) ", "", said[0])[:300]
