"""Time limits of reward functions: hanging ones are killed, nothing is left behind."""

import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
import torch

from hmpo.errors import RewardError
from hmpo.rewards import Rewards

ROOT = Path(__file__).parents[2]
N = 8
PROMPTS = [f"prompt {i}" for i in range(N)]
COMPLETIONS = ["x" * i for i in range(N)]
IDS = [list(range(i)) for i in range(N)]
ONES = [1.0] * N


def run(function, **settings):
    with Rewards(function, **settings) as rewards:
        return rewards(PROMPTS, COMPLETIONS, IDS, {}, step=7)


def returning(call):
    def reward(**columns):
        return call()

    return reward


def gone(pid):
    """True once the process exists no more (a zombie counts as gone)."""
    for _ in range(50):
        try:
            state = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
        except (FileNotFoundError, ProcessLookupError):
            return True
        if state == "Z":
            return True
        time.sleep(0.02)
    return False


def sleeps():
    time.sleep(60)


def loops():
    while True:
        pass


def ignores_sigterm():
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    while True:
        time.sleep(1)


def hangs_in_c_code():
    return 3 ** (10**9)


def stops_itself():
    os.kill(os.getpid(), signal.SIGSTOP)


HANGS = [sleeps, loops, ignores_sigterm, hangs_in_c_code, stops_itself]


@pytest.mark.parametrize("hang", HANGS)
def test_hanging_reward_is_killed_within_a_second_of_its_deadline_and_leaves_no_orphan(
    hang, tmp_path
):
    def reward(completions, **columns):
        if (calls := tmp_path / "calls").exists():
            return ONES
        calls.write_text(str(os.getpid()))
        hang()

    with Rewards(reward, on_error="skip", timeout=0.3) as rewards:
        start = time.monotonic()
        result = rewards(PROMPTS, COMPLETIONS, IDS, {}, step=2)
        assert 0.3 <= time.monotonic() - start < 1.3
        assert gone(int((tmp_path / "calls").read_text()))
        assert result.dropped == N
        (event,) = result.events
        assert (event.name, event.step, event.sample) == ("reward_timeout", 2, None)
        assert "no answer in 0.3 s, killed; raise reward_timeout" in event.detail
        assert rewards(PROMPTS, COMPLETIONS, IDS, {}).total == ONES


def test_hanging_reward_raises_one_line_when_errors_raise():
    with pytest.raises(RewardError, match=r"reward 'reward' at step 7: no answer in 0\.2 s"):
        run(returning(sleeps), timeout=0.2)


def test_children_of_a_hanging_reward_die_with_it(tmp_path):
    def reward(**columns):
        child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
        (tmp_path / "pid").write_text(str(child.pid))
        time.sleep(60)

    run(reward, timeout=1.0, on_error="skip")
    assert gone(int((tmp_path / "pid").read_text()))


@pytest.mark.parametrize(
    ("crash", "words"),
    [
        (lambda: os.kill(os.getpid(), signal.SIGKILL), "its process ended (SIGKILL)"),
        (lambda: os._exit(5), "its process ended (exit status 5)"),
    ],
)
def test_crashing_reward_is_a_fault_not_a_hang(crash, words):
    result = run(returning(crash), timeout=20.0, on_error="skip")
    assert result.events[0].name == "reward_crash"
    assert words in result.events[0].detail
    assert result.dropped == N


def test_one_child_serves_many_calls_and_ends_with_close_or_with_its_owner():
    rewards = Rewards(lambda **_: [float(os.getpid())] * N, timeout=20.0)
    pids = {rewards(PROMPTS, COMPLETIONS, IDS, {}).total[0] for _ in range(5)}
    assert len(pids) == 1
    assert pids != {float(os.getpid())}
    rewards.close()
    assert gone(int(pids.pop()))
    again = int(rewards(PROMPTS, COMPLETIONS, IDS, {}).total[0])
    assert not gone_now(again)
    del rewards
    assert gone(again)


def test_a_child_that_died_between_two_calls_is_replaced_without_blame():
    with Rewards(lambda **_: [float(os.getpid())] * N, timeout=20.0) as rewards:
        first = int(rewards(PROMPTS, COMPLETIONS, IDS, {}).total[0])
        os.kill(first, signal.SIGKILL)
        assert gone(first)
        second = rewards(PROMPTS, COMPLETIONS, IDS, {})
        assert not second.events
        assert int(second.total[0]) != first


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux kills a busy child with its parent")
def test_child_dies_when_its_parent_is_killed_even_while_it_hangs(tmp_path):
    script = tmp_path / "run.py"
    script.write_text(
        textwrap.dedent(
            """
            import os, sys, time
            from hmpo.rewards import Rewards

            def reward(**columns):
                print(os.getpid(), flush=True)
                while True:
                    pass

            Rewards(reward, timeout=60.0)(["p"], ["c"], [[1]], {})
            """
        )
    )
    with subprocess.Popen(
        [sys.executable, str(script)],
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    ) as parent:
        child = int(parent.stdout.readline())
        assert not gone_now(child)
        parent.kill()
        parent.wait()
        assert gone(child)


def gone_now(pid):
    return not Path(f"/proc/{pid}").exists()


def test_large_rollouts_cross_the_process_border_unchanged():
    prompts = ["\u00e9\ud800" * 5000] * 64

    def reward(prompts, completions, completion_ids, numbers, **columns):
        return [
            float(len(p) + sum(i) + n["a"][0]) for p, i, n in zip(prompts, completion_ids, numbers)
        ]

    arguments = (prompts, prompts, [list(range(500))] * 64, {"numbers": [{"a": [0.1]}] * 64})
    with Rewards(reward, timeout=20.0) as rewards:
        assert rewards(*arguments).total == Rewards(reward)(*arguments).total


def test_torch_inside_the_child_does_not_hang_after_threads_in_the_parent():
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        matrix = torch.ones(300, 300)
        matrix @ matrix

        def reward(**columns):
            return (torch.ones(300, 300) @ torch.ones(300, 300))[0, :N] / 300

        assert run(reward, timeout=20.0).total == ONES
    finally:
        torch.set_num_threads(threads)
