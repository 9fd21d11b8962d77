"""What a reward function keeps, draws, changes and starts, from one call to the next."""

import asyncio
import os
import random
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from hmpo.errors import RewardError
from hmpo.rewards import Rewards
from tests.rewards.test_reward_limits import COMPLETIONS, IDS, ONES, PROMPTS, ROOT, N, gone


def call(rewards, columns=None, **options):
    return rewards(PROMPTS, COMPLETIONS, IDS, columns or {}, **options)


@pytest.mark.parametrize("timeout", [None, 20.0])
def test_an_async_function_keeps_its_clients_from_call_to_call(timeout) -> None:
    gate = asyncio.Semaphore(2)
    held = []

    async def one(text: str) -> float:
        async with gate:  # contended, so that it is bound to the loop of the first call
            await asyncio.sleep(0.0001)
            held.append(asyncio.get_running_loop())
            return float(len(held))

    async def reward(completions, **columns):
        return list(await asyncio.gather(*map(one, completions)))

    with Rewards(reward, timeout=timeout) as rewards:
        totals = [sorted(call(rewards).total) for _ in range(3)]
    assert totals == [[float(n) for n in range(k * N + 1, k * N + N + 1)] for k in range(3)]
    assert len(set(map(id, held))) <= 1


def test_an_event_loop_ends_with_the_rewards_and_a_new_one_begins() -> None:
    loops = []

    async def reward(**columns):
        loops.append(asyncio.get_running_loop())
        return ONES

    rewards = Rewards(reward)
    call(rewards)
    rewards.close()
    assert loops[0].is_closed()
    assert call(rewards).total == ONES and loops[1] is not loops[0]
    rewards.close()


def draws(**columns):
    numbers = [random.random(), float(np.random.rand()), float(torch.rand(()))]
    return [*numbers, *[0.0] * (N - 3)]


def test_random_rewards_of_a_child_depend_on_the_seed_and_on_nothing_else() -> None:
    with Rewards(draws, timeout=20.0) as one, Rewards(draws, timeout=20.0) as other:
        first = [call(one, seed=seed).total for seed in (3, 4, 5)]
        random.random(), torch.rand(3)  # what the parent draws changes nothing
        call(other, seed=99)  # nor what the child was asked before
        assert [call(other, seed=seed).total for seed in (3, 4, 5)] == first
        assert len({tuple(total) for total in first}) == 3
        assert call(one, step=7).total == call(other, seed=7).total


@pytest.mark.parametrize("timeout", [None, 20.0])
def test_nested_columns_are_the_functions_own(timeout) -> None:
    row = {"truth": [1], "deep": {"list": [[2]]}}

    def reward(info, **columns):
        found = []
        for item in info:
            item["deep"]["list"][0].append(3)
            found.append(float(item.pop("truth").pop()) + len(item["deep"]["list"][0]))
        return found

    with Rewards(reward, timeout=timeout) as rewards:
        for _ in range(2):
            assert call(rewards, {"info": [row] * N}).total == [3.0] * N
    assert row == {"truth": [1], "deep": {"list": [[2]]}}


class Unspeakable(Exception):
    def __str__(self) -> str:
        raise RuntimeError("no words")

    __repr__ = __str__


def raises(error):
    def reward(**columns):
        raise error

    return reward


@pytest.mark.parametrize("timeout", [None, 20.0])
@pytest.mark.parametrize("error", [GeneratorExit(), Unspeakable(), BaseException("bare")])
def test_whatever_a_function_raises_is_a_fault_in_one_line(error, timeout) -> None:
    with Rewards(raises(error), on_error="skip", timeout=timeout) as rewards:
        result = call(rewards)
    assert result.dropped == N
    assert type(error).__name__ in result.events[0].detail and "\n" not in result.events[0].detail
    with Rewards(raises(error)) as rewards, pytest.raises(RewardError, match="expected a list"):
        call(rewards)


def test_a_value_whose_repr_raises_is_a_fault() -> None:
    with Rewards(lambda **columns: [Unspeakable()] * N, on_error="skip") as rewards:
        result = call(rewards)
    assert result.dropped == N and "its repr raises" in result.events[0].detail


def test_missing_columns_are_refused_before_anything_is_sampled() -> None:
    def needs(completions, answer, difficulty, **columns):
        return ONES

    rewards = Rewards({"needs": needs})
    rewards.refuse_missing(["answer", "difficulty"])
    with pytest.raises(RewardError, match=r"parameter .difficulty. is none of .*answer"):
        rewards.refuse_missing(["answer"])


STARTS = {
    "a process": "subprocess.Popen(['sleep', '60'])",
    "one in a session of its own": "subprocess.Popen(['sleep', '60'], start_new_session=True)",
    "one that left its parent": (
        "subprocess.Popen(['sh', '-c', 'setsid sleep 60 & echo $!'], stdout=subprocess.PIPE)"
    ),
}


def starting(how: str, place: Path):
    def reward(**columns):
        started = eval(how)
        pid = int(started.stdout.readline()) if started.stdout else started.pid
        place.write_text(str(pid))
        time.sleep(60)

    return reward


@pytest.mark.skipif(sys.platform != "linux", reason="reapers are Linux's")
@pytest.mark.parametrize("how", STARTS)
def test_what_a_reward_started_ends_with_its_time_limit(how: str, tmp_path: Path) -> None:
    place = tmp_path / "pid"
    with Rewards(starting(STARTS[how], place), on_error="skip", timeout=1.0) as rewards:
        assert call(rewards).dropped == N
    assert gone(int(place.read_text()))


@pytest.mark.skipif(sys.platform != "linux", reason="reapers are Linux's")
def test_what_a_reward_started_ends_when_the_trainer_is_killed(tmp_path: Path) -> None:
    script = textwrap.dedent(
        f"""
        from pathlib import Path
        from tests.rewards.test_reward_state import STARTS, call, starting
        from hmpo.rewards import Rewards
        how = STARTS["one in a session of its own"]
        with Rewards(starting(how, Path({str(tmp_path / "pid")!r})), timeout=50.0) as rewards:
            Rewards(lambda **c: [0.0] * 8, timeout=50.0)
            call(rewards)
        """
    )
    trainer = subprocess.Popen([sys.executable, "-c", script], cwd=ROOT)
    place = tmp_path / "pid"
    for _ in range(600):
        if place.exists() and place.read_text():
            break
        time.sleep(0.05)
    os.kill(trainer.pid, signal.SIGKILL)
    trainer.wait()
    time.sleep(0.5)
    assert gone(int(place.read_text()))
