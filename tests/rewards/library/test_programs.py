"""unit_tests: programs that pass, fail, hang, eat, fork and hide; nothing of them is left."""

import itertools
import logging
import os
import pickle
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from hmpo.errors import ConfigError, RewardError
from hmpo.rewards import Rewards
from hmpo.rewards.library import programs, programs_child, unit_tests
from hmpo.rewards.library.programs import program_in
from tests.rewards.library.cases import HARD, Told, as_trl

TESTS = "assert f(2) == 4"
RIGHT = "def f(x): return 4\n"


def block(code: str) -> str:
    return f"Here it is:\n```python\n{code}\n```\nIt works. <script>"


@pytest.fixture(autouse=True)
def nothing_is_left(tmp_path, monkeypatch):
    monkeypatch.setattr(programs.tempfile, "tempdir", str(tmp_path))
    yield
    assert list(tmp_path.iterdir()) == []


@pytest.fixture(scope="module")
def function():
    return unit_tests(timeout=600.0, memory_mb=512)


def child_that(tmp_path_factory, old: str, new: str):
    """The script of a child whose text has `new` in the place of `old`."""
    text = Path(programs_child.__file__).read_text(encoding="utf-8")
    assert text.count(old) == 1
    path = tmp_path_factory.mktemp("child") / "child.py"
    path.write_text(text.replace(old, new), encoding="utf-8")
    return lambda *_, **__: [sys.executable, "-I", str(path)]


def score(function, text, tests=TESTS):
    return function(completions=[text], tests=[tests])[0]


@pytest.mark.parametrize(
    ("code", "reward"),
    [
        ("def f(x): return x * 2", 1.0),
        ("def f(x): return x", 0.0),
        ("def f(x: return", 0.0),
        ("import sys; sys.exit(0)", 0.0),
        ("import os; os._exit(0)", 0.0),
        (RIGHT + "if __name__ == '__main__': raise SystemExit", 1.0),
        (RIGHT + "print('x' * 10**6)", 1.0),
        (RIGHT + "input()", 0.0),
        ("def g(): g()\ng()\n" + RIGHT, 0.0),
        ("x = bytearray(10**9)\n" + RIGHT, 0.0),
        ("open('x', 'wb').write(b'a' * 10**8)\n" + RIGHT, 0.0),
        ("open('x', 'wb').write(b'a')\n" + RIGHT, 1.0),
        ("import os\nassert os.listdir() == []\n" + RIGHT, 1.0),
        ("import os\nassert 'MY_SECRET' not in os.environ\n" + RIGHT, 1.0),
        ("import os\nos.makedirs('a/b'); os.chmod('a', 0)\n" + RIGHT, 1.0),
        ("import os, signal\nos.kill(os.getppid(), signal.SIGKILL)\n" + RIGHT, 0.0),
        ("\0", 0.0),
        ("#" + "a" * 2_000_000 + "\n" + RIGHT, 0.0),
        ("", 0.0),
    ],
    ids=range(19),
)
def test_a_program_is_run_with_its_tests(code, reward, function, monkeypatch):
    monkeypatch.setenv("MY_SECRET", "1")
    assert score(function, block(code)) == reward


@pytest.mark.parametrize(
    ("text", "code"),
    [
        (block("x") + "\n" + block("y"), "y\n"),
        (block("x") + "\n```sh\nls\n```", "x\n"),
        ("```\nx\n```", "x\n"),
        ("```py title=a\nx\n```", "x\n"),
        ("```python\nx", "x"),
        ("x", ""),
        ("```json\n{}\n```", ""),
        ("", ""),
    ],
)
def test_the_program_is_the_last_block_of_python(text, code):
    assert program_in(text) == code


def test_tests_may_be_a_list_and_missing_ones_are_none(function):
    texts = [block("def f(x): return x * 2")] * 4
    tests = [["assert f(1) == 2", "assert f(2) == 4"], ["assert f(1) == 2", "assert 0"], None, ""]
    assert function(completions=texts, tests=tests) == [1.0, 0.0, None, None]
    tests = [np.array(["assert f(1) == 2", "assert f(2) == 4"]), np.array([]), [None], " \n"]
    assert function(completions=texts, tests=tests) == [1.0, None, None, None]
    tests = [np.array(["assert f(1) == 2", "assert 0"]), [], ["", ""], ["", None, TESTS]]
    assert function(completions=texts, tests=tests) == [0.0, None, None, 1.0]


@pytest.mark.parametrize("code", ["while True: pass", "import time; time.sleep(100)"])
def test_a_program_that_hangs_is_ended_and_counted(code):
    told = Told()
    given = as_trl([block(code)], told, tests=[TESTS])
    assert unit_tests(timeout=2.0)(**given) == [0.0]
    assert told.metrics == {"unit_tests/timeouts": [1], "unit_tests/failed": [0]}


HOLDS = """
import os, time
read, write = os.pipe()
if os.fork() == 0:
    os.setsid()
    if os.fork() == 0:
        os.write(os.open('PIPE', os.O_WRONLY), b'alive')
        os.write(write, b'x')
        time.sleep(1000)
    os._exit(0)
os.close(write)
os.read(read, 1)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="needs a reaper of orphans")
def test_processes_in_sessions_of_their_own_are_ended_too(function, tmp_path_factory):
    path = tmp_path_factory.mktemp("pipe") / "pipe"
    os.mkfifo(path)
    reader = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    assert score(function, block(HOLDS.replace("PIPE", str(path)) + RIGHT)) == 1.0
    assert os.read(reader, 9) == b"alive"
    assert os.read(reader, 9) == b"", "the end, which is there once no process holds it open"
    os.close(reader)


CONNECTS = """
import socket
try:
    socket.create_connection(('127.0.0.1', PORT), 5).close()
    connected = True
except OSError:
    connected = False
"""


def connected(caplog) -> tuple[list[float | None], int]:
    """Rewards of a program for having no network and for having one; lines that tell of it."""
    function = unit_tests(timeout=600.0)
    with socket.create_server(("127.0.0.1", 0)) as server, caplog.at_level(logging.WARNING):
        text = block(CONNECTS.replace("PORT", str(server.getsockname()[1])))
        tests = ["assert not connected", "assert connected"]
        rewards = function(completions=[text, text], tests=tests)
        assert function(completions=[text, text], tests=tests) == rewards
    return rewards, caplog.text.count("can use the network")


def test_programs_have_no_network_where_the_kernel_allows_it(caplog):
    ask = "import ctypes, sys\nsys.exit(ctypes.CDLL(None).unshare(0x50000000) != 0)"
    if sys.platform != "linux" or subprocess.run([sys.executable, "-c", ask]).returncode:
        pytest.skip("this kernel gives no namespace")
    assert connected(caplog) == ([1.0, 0.0], 0)


def test_where_the_kernel_gives_no_namespace_one_line_says_so(
    caplog, tmp_path_factory, monkeypatch
):
    other = child_that(tmp_path_factory, "network = without_network()", "network = False")
    monkeypatch.setattr(programs, "script", other)
    assert connected(caplog) == ([0.0, 1.0], 1)


def no_fork(tmp_path_factory):
    return child_that(tmp_path_factory, "child = os.fork()", "raise BlockingIOError")


@pytest.mark.parametrize(
    "broken",
    [
        no_fork,
        lambda _: lambda *_, **__: [sys.executable, "-c", "raise MemoryError"],
        lambda _: lambda *_, **__: ["/no/such/python"],
    ],
    ids=["no fork", "no memory", "no python"],
)
def test_a_machine_that_fails_is_no_fault_of_the_program(broken, tmp_path_factory, monkeypatch):
    """None for what could not be started, and an error where nothing could."""
    works, fails = programs.script, broken(tmp_path_factory)
    turns = itertools.cycle([works, fails])
    function = unit_tests(timeout=600.0, processes=1)
    texts = [block(RIGHT), block(RIGHT + "#")]
    told = Told()
    monkeypatch.setattr(programs, "script", lambda *a, **k: next(turns)(*a, **k))
    assert function(**as_trl(texts, told, tests=[TESTS, TESTS])) == [1.0, None]
    assert told.metrics == {"unit_tests/timeouts": [0], "unit_tests/failed": [1]}
    monkeypatch.setattr(programs, "script", fails)
    with pytest.raises(RewardError, match="no program could be started") as caught:
        function(**as_trl(texts[:1], tests=[TESTS]))
    assert "\n" not in str(caught.value)


def test_a_child_that_never_starts_the_program_is_a_failure_too(tmp_path_factory, monkeypatch):
    stuck = child_that(tmp_path_factory, "child = os.fork()", "time.sleep(1000)")
    monkeypatch.setattr(programs, "script", stuck)
    monkeypatch.setattr(programs, "GRACE", 0.1)
    with pytest.raises(RewardError, match="no program could be started"):
        score(unit_tests(timeout=0.1), block(RIGHT))


@pytest.mark.parametrize("timeout", [None, 60.0])
def test_it_works_here_and_in_the_reward_process(timeout, function):
    copy = pickle.loads(pickle.dumps(function))
    texts = [block("def f(x): return x * 2"), block("def f(x): return x")]
    with Rewards(copy, timeout=timeout) as rewards:
        result = rewards(["?", "?"], texts, [[1], [1]], {"tests": [TESTS, TESTS]})
    assert result.total == [1.0, 0.0]
    assert result.metrics == {"unit_tests/timeouts": 0, "unit_tests/failed": 0}


@pytest.mark.parametrize("hard", ["empty", "nul", "lone surrogate", "fences", "fences that go on"])
def test_no_text_is_too_hard(hard, function):
    told = Told()
    texts = [HARD[hard], block(HARD[hard])]
    assert function(**as_trl(texts, told, tests=[TESTS] * 2)) == [0.0, 0.0]
    assert told.metrics == {"unit_tests/timeouts": [0], "unit_tests/failed": [0]}


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"timeout": 0.0}, "unit_tests.timeout: got 0.0"),
        ({"memory_mb": 1}, "unit_tests.memory_mb: got 1"),
        ({"file_mb": -1}, "unit_tests.file_mb: got -1"),
        ({"processes": -1}, "unit_tests.processes: got -1"),
    ],
)
def test_a_wrong_option_is_one_line(options, words):
    with pytest.raises(ConfigError, match=words):
        unit_tests(**options)


def test_it_is_refused_where_there_is_no_fork(monkeypatch):
    monkeypatch.setattr(programs.sys, "platform", "win32")
    with pytest.raises(ConfigError, match="Windows"):
        unit_tests()
