"""A server that a run starts: found, waited for, and ended with the run, however that ends."""

import contextlib
import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from hmpo.engines.started import StartedServer
from hmpo.errors import EngineError
from hmpo.models import LoadedPolicy
from hmpo.run import loop as run
from hmpo.run.engine import make_engine
from tests.faults.micro import micro_config

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.skipif(not hasattr(os, "killpg"), reason="no process groups here")


def fake_python(folder: Path, serve: str, *, version: str = "echo 0.32.1") -> Path:
    """A program that says which vLLM it has, and serves by a command of the shell."""
    path = folder / "python"
    path.write_text(
        f'#!/bin/sh\nif [ "$1" = -c ]; then {version}; exit; fi\n'
        f"cd {ROOT}; export PYTHONPATH={ROOT} HF_HUB_OFFLINE=1\n{serve}\n"
    )
    path.chmod(0o755)
    return path


STAND_IN = f'exec {sys.executable} -m tests.engines.stand_in "$@"'
BARE = f'sleep 1000 & exec {sys.executable} -S tests/engines/bare_server.py "$@"'
"""A server with a second process, as vLLM has."""


@pytest.fixture
def python(tmp_path: Path) -> Path:
    return fake_python(tmp_path, BARE)


@pytest.fixture
def started(loaded: LoadedPolicy, tmp_path: Path) -> Iterator:
    """Makes servers, which are closed afterwards."""
    with contextlib.ExitStack() as stack:

        def make(python: Path, timeout: float = 60.0, **changes) -> StartedServer:
            shared = tmp_path / "shared"
            shared.mkdir()
            given = {"arguments": (), "dtype": "float32", "max_length": 4} | changes
            log = tmp_path / "engine.log"
            server = StartedServer(
                loaded, shared, python=str(python), timeout=timeout, log=log, **given
            )
            stack.callback(server.close)
            return server

        yield make


def alive(group: int) -> bool:
    """Whether any process of a group is more than a corpse that nobody has collected."""
    if not Path("/proc/self/stat").exists():
        with contextlib.suppress(ProcessLookupError):
            os.killpg(group, 0)
            return True
        return False
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            state, _, own = stat.read_text().rpartition(") ")[2].split()[:3]
            if int(own) == group and state != "Z":
                return True
    return False


def gone(group: int, within: float = 30.0) -> bool:
    until = time.monotonic() + within
    while alive(group) and time.monotonic() < until:
        time.sleep(0.05)
    return not alive(group)


def test_a_run_starts_a_server_and_ends_it(folder, tmp_path) -> None:
    python = fake_python(tmp_path, STAND_IN)
    settings = {
        "rollout__engine": "vllm",
        "rollout__python": str(python),
        "rollout__arguments": ["--seed", "77"],
    }
    result = run.train(micro_config(folder, tmp_path / "runs", updates=4, **settings))
    assert result.status == "completed"
    said = (result.folder / "engine.log").read_text()
    assert "--seed 77" in said and "--logprobs-mode processed_logprobs" in said
    assert "--dtype float32" in said and "--enable-scale-out" in said


def test_closing_ends_all_processes_and_leaves_no_file(started, python) -> None:
    server = started(python)
    server.start()
    server.start()  # nothing more
    server.wait()
    assert server.longest == 512 and alive(server.group)
    assert not list((server.folder / "model").glob("*.safetensors")), "it has read them"
    server.close()
    server.close()
    assert not alive(server.group) and not server.folder.exists()


@pytest.mark.parametrize("number", [signal.SIGKILL])
def test_a_trainer_that_is_killed_takes_the_server_with_it(
    folder, tmp_path, python, number
) -> None:
    code = f"""
        from pathlib import Path
        from hmpo.config import PolicyConfig
        from hmpo.engines.started import StartedServer
        from hmpo.models import load_policy
        shared = Path({str(tmp_path / "shared")!r})
        shared.mkdir()
        server = StartedServer(
            load_policy(PolicyConfig(path={str(folder)!r})), shared, python={str(python)!r},
            arguments=(), timeout=60.0, dtype="float32", max_length=4,
        )
        server.start()
        server.wait()
        print(server.group, flush=True)
        input()
    """
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    with subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(code)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment, text=True,
    ) as trainer:  # fmt: skip
        assert trainer.stdout is not None
        group = int(trainer.stdout.readline())
        assert alive(group)
        trainer.send_signal(number)
        assert trainer.wait(30) == -number
    assert gone(group)
    until = time.monotonic() + 10
    while (tmp_path / "shared").exists() and time.monotonic() < until:
        time.sleep(0.05)
    assert not (tmp_path / "shared").exists(), "neither weights nor socket are left"


def test_a_watcher_that_is_killed_does_not_keep_the_server(started, python) -> None:
    server = started(python)
    server.start()
    server.wait()
    server.process.kill()
    server.close()
    assert gone(server.group)


def test_a_server_that_ends_takes_the_rest_with_it(started, python) -> None:
    """As where its first process is killed and its workers are not."""
    server = started(python)
    server.start()
    server.wait()
    os.kill(server.group, signal.SIGKILL)
    assert server.process.wait(30) == 0 and gone(server.group)


def test_a_server_that_dies_at_start_is_quoted(started, tmp_path) -> None:
    says = "echo '(APIServer pid=7) ValueError: no such architecture'; echo later; exit 3"
    server = started(fake_python(tmp_path, says))
    server.start()
    with pytest.raises(
        EngineError, match=r"vLLM ended while it started; its log is .*engine.log, "
    ) as caught:
        server.wait()
    assert str(caught.value).endswith("which has: ValueError: no such architecture")


def test_a_server_that_never_answers_is_given_up(started, tmp_path) -> None:
    server = started(fake_python(tmp_path, "exec sleep 1000"), timeout=1.0)
    server.start()
    with pytest.raises(EngineError, match=r"not ready after rollout\.timeout = 1 s"):
        server.wait()
    server.close()
    assert not alive(server.group)


@pytest.mark.parametrize(
    ("version", "pattern"),
    [
        ("true", r"got '.*python', an environment without vLLM; install it there \(vllm>=0\.32\)"),
        ("echo 0.9.1", r"with vLLM 0\.9\.1, expected 0\.32 or newer"),
        ("exit 1", "which does not run"),
    ],
)
def test_an_environment_without_a_vllm_that_fits(started, tmp_path, version, pattern) -> None:
    with pytest.raises(EngineError, match=pattern) as caught:
        started(fake_python(tmp_path, "exit 1", version=version))
    assert "\n" not in str(caught.value)


def test_no_such_python(folder, loaded, tmp_path) -> None:
    settings = {"rollout__engine": "vllm", "rollout__python": "nowhere/python"}
    config = micro_config(folder, tmp_path, **settings)
    from hmpo.ranks.world import Ranks

    with pytest.raises(
        EngineError, match=r"^rollout\.python: got 'nowhere/python', which is no pro"
    ):
        make_engine(config, loaded, None, Ranks())
