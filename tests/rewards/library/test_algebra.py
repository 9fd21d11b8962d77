"""math: a table of answers, and its child process wherever it is called and whatever comes."""

import os
import pickle
import select
import signal
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest

from hmpo import errors
from hmpo.errors import ConfigError, MissingDependencyError, RewardError
from hmpo.rewards import Rewards
from hmpo.rewards.library import algebra, math
from tests.rewards.library.cases import HARD, Told, as_trl

ENDLESS = "$9^{9^{9^9}}$"
"""A power that Python computes in C, where no signal is heard."""


@pytest.fixture(scope="module")
def function():
    return math(timeout=20.0)


@pytest.fixture(scope="module")
def patient():
    return math(timeout=3600.0)


def score(function, text, answer):
    return function(completions=[text], answer=[answer])[0]


@pytest.mark.parametrize(
    ("answer", "text", "reward"),
    [
        ("1/2", "so \\boxed{\\frac{1}{2}}", 1.0),
        ("0.5", "the answer is 1/2", 1.0),
        ("\\frac{3}{4}", "$0.75$", 1.0),
        ("$\\frac34$", "0.75", 1.0),
        ("1,234", "1234", 1.0),
        ("x^2+1", "$1+x^2$", 1.0),
        ("(1,2)", "$(1,2)$", 1.0),
        ("[1,2)", "$[1,2)$", 1.0),
        ("[1,2)", "$[1,2]$", 0.0),
        ("\\{1,2\\}", "$\\{2,1\\}$", 1.0),
        ("x=3", "\\boxed{3}", 1.0),
        ("50\\%", "0.5", 1.0),
        (72, "= 72", 1.0),
        (1.5, "\\boxed{3/2}", 1.0),
        ("2", "answer: 3", 0.0),
        ("3", "\\boxed{2} and then 3", 0.0),
        ("7", "", 0.0),
        ("7", None, 0.0),
        ("7", "<script>alert(1)</script>", 0.0),
        ("7", "\ud800 $7$", 1.0),
        (["6", "7"], "$7$", 1.0),
        ("thus \\boxed{7}.", "$7$", 1.0),
        ("", "7", None),
        (None, "7", None),
        (float("nan"), "7", None),
        ([], "7", None),
        ([None, ""], "7", None),
        (np.array(["6", "7"]), "$7$", 1.0),
        (np.int64(7), "$7$", 1.0),
        (np.float32("nan"), "7", None),
    ],
)
def test_math_compares_values(answer, text, reward, function):
    assert score(function, text, answer) == reward


@pytest.mark.parametrize("hard", HARD)
def test_no_text_is_too_hard(hard, patient):
    """Each is compared whole: what would hang runs into the limit of the tests."""
    told = Told()
    assert patient(**as_trl([HARD[hard]], told, answer=["72"])) in ([0.0], [1.0])
    assert told.metrics == {"math/timeouts": [0]}


def test_what_never_ends_is_wrong_and_counted_and_the_next_is_right():
    told = Told()
    function = math(timeout=1.0)
    given = as_trl([ENDLESS, "$2$", ENDLESS], told, answer=["1", "2", "1"])
    assert function(**given) == [0.0, 1.0, 0.0]
    assert told.metrics == {"math/timeouts": [1]}, "equal pairs are compared once"


class Interrupt(BaseException):
    """As Ctrl-C, at a moment that the test chooses."""


@pytest.mark.parametrize("place", ["while it waits", "when the answer is there"])
def test_after_an_interrupt_the_next_comparison_is_right(place, patient, monkeypatch):
    """The child still works on the question that was given up, or has its answer in the pipe."""
    assert score(patient, "$2$", "2") == 1.0
    before = patient.child._process

    class Received:
        close = before.stdout.close

        def readline(self):
            if place != "while it waits":
                select.select([before.stdout], [], [])
            raise Interrupt

    with monkeypatch.context() as patch:
        patch.setattr(algebra, "_pipes", lambda process: (process.stdin, Received()))
        with pytest.raises(Interrupt):
            score(patient, ENDLESS if place == "while it waits" else "$3$", "1")
    assert before.returncode is not None, "it is gone, and not only told to go"
    told = Told()
    assert patient(**as_trl(["$3$"], told, answer=["3"])) == [1.0]
    assert told.metrics == {"math/timeouts": [0]}


def test_a_time_out_that_comes_with_the_answer_does_not_spoil_the_next_one(monkeypatch):
    """The timer has run out and the answer is there: the child is killed, or about to be."""
    function = math(timeout=3600.0)
    assert score(function, "$2$", "2") == 1.0
    timers = []

    class Timer(threading.Timer):
        def __init__(self, seconds, stop):
            super().__init__(seconds, stop)
            timers.append(stop)

        def cancel(self):
            super().cancel()
            if len(timers) == 1:
                self.function()

    monkeypatch.setattr(algebra.threading, "Timer", Timer)
    told = Told()
    given = as_trl(["$3$", "$4$"], told, answer=["3", "4"])
    assert function(**given) == [1.0, 1.0]
    assert told.metrics == {"math/timeouts": [0]}


def test_it_works_in_a_thread_beside_others(function):
    found = {}

    def ask(i):
        found[i] = score(function, f"${i}$", str(i))

    threads = [threading.Thread(target=ask, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == dict.fromkeys(range(4), 1.0)


def test_the_callers_alarm_and_its_handler_stay(function):
    before = signal.getsignal(signal.SIGALRM)
    left = signal.setitimer(signal.ITIMER_REAL, 250.0)
    try:
        assert score(function, "$2$", "2") == 1.0
        assert 200 < signal.getitimer(signal.ITIMER_REAL)[0] <= 250
        assert signal.getsignal(signal.SIGALRM) is before
    finally:
        signal.setitimer(signal.ITIMER_REAL, *left)


def test_it_works_in_the_reward_process_also_after_it_was_used_here(function):
    assert score(function, "$2$", "2") == 1.0
    given = (["?"], ["$1/2$"], [[1]], {"answer": ["0.5"]})
    with Rewards(function, timeout=100.0) as rewards:
        assert rewards(*given).total == [1.0]
        assert score(function, "$2$", "2") == 1.0, "each process has a child of its own"
        assert rewards(*given).total == [1.0]


def test_a_child_that_was_killed_is_replaced(function):
    assert score(function, "$2$", "2") == 1.0
    os.kill(function.child._process.pid, signal.SIGKILL)
    function.child._process.wait()
    assert score(function, "$3$", "3") == 1.0


def test_the_child_ends_with_its_parent():
    code = (
        "from hmpo.rewards.library import math\nimport os, signal\n"
        "f = math()\nf.prepare()\nprint(f.child._process.pid, flush=True)\n"
        "os.kill(os.getpid(), signal.SIGKILL)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    path = Path(f"/proc/{done.stdout.strip()}/stat")
    waits = 0
    while path.exists() and path.read_text().rsplit(")", 1)[1].split()[0] != "Z":
        assert (waits := waits + 1) < 1000
        threading.Event().wait(0.02)


def test_a_pickle_is_the_same_function(function):
    copy = pickle.loads(pickle.dumps(function))
    assert copy.__name__ == "math" and score(copy, "$2$", "2") == 1.0


def test_a_child_that_cannot_start_is_one_line(monkeypatch):
    monkeypatch.setattr(algebra, "script", lambda name: [sys.executable, "-c", "raise SystemExit"])
    with pytest.raises(RewardError, match="its process ended while it started"):
        math().prepare()


def test_wrong_options_and_a_missing_package_are_one_line(monkeypatch):
    with pytest.raises(ConfigError, match=r"math\.timeout: got 0\.0"):
        math(timeout=0.0)
    monkeypatch.setattr(errors.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MissingDependencyError, match=r"math_verify: pip install 'hmpo\[rewards\]'"):
        math()
