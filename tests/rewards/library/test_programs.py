"""unit_tests: programs that pass, fail, hang, eat, fork and hide; nothing of them is left."""

import logging
import pickle
import socket
from pathlib import Path

import pytest

from hmpo.errors import ConfigError
from hmpo.rewards import Rewards
from hmpo.rewards.library import programs, unit_tests
from hmpo.rewards.library.programs import program_in
from tests.rewards.library.cases import HARD, Told, as_trl

TESTS = "assert f(2) == 4"
RIGHT = "def f(x): return 4\n"


def block(code: str) -> str:
    return f"Here it is:\n```python\n{code}\n```\nIt works. <script>"


def left() -> list[str]:
    """What programs left behind: folders, and processes that still run one."""
    found = [str(path) for path in Path("/tmp").glob("hmpo-tests-*")]
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            found += [str(path)] * (b"programs_child" in path.read_bytes())
        except OSError:
            continue
    return found


@pytest.fixture(autouse=True)
def nothing_is_left(tmp_path, monkeypatch):
    monkeypatch.setattr(programs.tempfile, "tempdir", str(tmp_path))
    yield
    assert list(tmp_path.iterdir()) == []


@pytest.fixture(scope="module")
def function():
    return unit_tests(timeout=20.0, memory_mb=512)


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
    assert function(completions=texts, tests=tests) == [1.0, 0.0, None, 1.0]


@pytest.mark.parametrize("code", ["while True: pass", "import time; time.sleep(100)"])
def test_a_program_that_hangs_is_ended_and_counted(code):
    told = Told()
    given = as_trl([block(code)], told, tests=[TESTS])
    assert unit_tests(timeout=0.5)(**given) == [0.0]
    assert told.metrics == {"unit_tests/timeouts": [1]}


@pytest.mark.skipif(not Path("/proc").exists(), reason="needs /proc")
def test_processes_in_sessions_of_their_own_are_ended_too(function, tmp_path):
    code = (
        "import os, time\n"
        "if os.fork() == 0:\n    os.setsid()\n"
        "    if os.fork() == 0:\n        time.sleep(1000)\n    os._exit(0)\n"
    )
    assert score(function, block(code + RIGHT)) == 1.0
    assert left() == []


def test_programs_have_no_network_or_one_line_says_so(caplog):
    function = unit_tests(timeout=20.0)
    code = (
        "import socket\nsocket.create_connection(('127.0.0.1', {}), 5).close()\n".format("PORT")
        + RIGHT
    )
    with socket.create_server(("127.0.0.1", 0)) as server, caplog.at_level(logging.WARNING):
        text = block(code.replace("PORT", str(server.getsockname()[1])))
        rewards = function(completions=[text, text + " "], tests=[TESTS, TESTS])
        function(completions=[text], tests=[TESTS])
    assert (rewards, caplog.text.count("can use the network")) in (([0.0, 0.0], 0), ([1.0, 1.0], 1))


@pytest.mark.parametrize("timeout", [None, 60.0])
def test_it_works_here_and_in_the_reward_process(timeout, function):
    copy = pickle.loads(pickle.dumps(function))
    texts = [block("def f(x): return x * 2"), block("def f(x): return x")]
    with Rewards(copy, timeout=timeout) as rewards:
        result = rewards(["?", "?"], texts, [[1], [1]], {"tests": [TESTS, TESTS]})
    assert result.total == [1.0, 0.0] and result.metrics == {"unit_tests/timeouts": 0}


@pytest.mark.parametrize("hard", ["empty", "nul", "lone surrogate", "fences", "fences that go on"])
def test_no_text_is_too_hard(hard, function):
    for text in (HARD[hard], block(HARD[hard])):
        assert score(function, text) == 0.0


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
