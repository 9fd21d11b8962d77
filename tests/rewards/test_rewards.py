"""Reward functions: the contract, 22 bad returns, weights, loading, checking."""

import asyncio
import functools
import math
import subprocess
import sys
import textwrap
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hmpo.config import TaskConfig
from hmpo.errors import RewardError
from hmpo.rewards import LIMIT, Rewards, check_reward_fn, load_reward
from hmpo.tasks import make_task

ROOT = Path(__file__).parents[2]
N = 8
PROMPTS = [f"prompt {i}" for i in range(N)]
COMPLETIONS = ["x" * i for i in range(N)]
IDS = [list(range(i)) for i in range(N)]
ONES = [1.0] * N


def run(functions, weights=(), columns=None, **settings):
    with Rewards(functions, weights, **settings) as rewards:
        return rewards(PROMPTS, COMPLETIONS, IDS, columns or {}, step=7)


def returning(value):
    def reward(prompts, completions, completion_ids, **columns):
        return value() if callable(value) else value

    return reward


def boom():
    raise ValueError("boom\nwith a second line")


def cancel():
    raise asyncio.CancelledError


class Unreadable(np.ndarray):
    def __new__(cls):
        return np.ones(N).view(cls)

    def tolist(self):
        raise RuntimeError("device lost")


def one(value):
    return [1.0] * 3 + [value] + [1.0] * (N - 4)


BAD_RETURNS = {
    "one too few": (ONES[1:], "got 7 rewards, expected a list of 8", "reward_length", None),
    "one too many": ([*ONES, 1.0], "got 9 rewards, expected a list of 8", "reward_length", None),
    "length one": ([1.0], "got 1 rewards", "reward_length", None),
    "empty list": ([], "got 0 rewards", "reward_length", None),
    "raises": (boom, "raised ValueError: boom with a second line", "reward_exception", None),
    "None": (None, "got None, expected a list", "reward_type", None),
    "scalar": (1.0, "got a float (1.0), expected a list of 8", "reward_type", None),
    "words": (["good"] * N, "got a str ('good'), expected a number", "reward_type", 0),
    "number words": (["1.0"] * N, "got a str ('1.0')", "reward_type", 0),
    "complex": ([1j] * N, "got a complex (1j)", "reward_type", 0),
    "nested": ([[1.0]] * N, "got a list ([1.0]), expected a number", "reward_type", 0),
    "all nan": ([math.nan] * N, "got nan, expected a finite", "reward_nonfinite", 0),
    "one nan": (one(math.nan), "got nan, expected a finite", "reward_nonfinite", 3),
    "one inf": (one(math.inf), "got inf, expected a finite", "reward_nonfinite", 3),
    "all inf": ([math.inf] * N, "got inf, expected a finite", "reward_nonfinite", 0),
    "one -inf": (one(-math.inf), "got -inf", "reward_nonfinite", 3),
    "outlier": (one(1e38), "got 1e+38, expected at most 1e+09", "reward_out_of_range", 3),
    "huge int": (one(10**400), "expected at most 1e+09", "reward_out_of_range", 3),
    "dict": (dict.fromkeys(range(N), 1.0), "got a dict ({0: 1.0", "reward_type", None),
    "text": ("12345678", "got a str ('12345678')", "reward_type", None),
    "set": ({1.0}, "got a set", "reward_type", None),
    "generator": (lambda: (x for x in ONES), "got a generator", "reward_type", None),
    "column vector": (torch.ones(N, 1), "got an array of 2 dimensions", "reward_type", None),
    "0-d tensor": (torch.tensor(1.0), "got an array of 0 dimensions", "reward_type", None),
    "complex tensor": (torch.ones(N) * 1j, "got a complex", "reward_type", 0),
    "exit": (lambda: sys.exit(3), "raised SystemExit: 3", "reward_exception", None),
    "cancelled": (cancel, "raised CancelledError (test_rewards.py", "reward_exception", None),
    "unreadable": (Unreadable(), "raised RuntimeError: device lost", "reward_exception", None),
}
GOOD_RETURNS = {
    "one None": one(None),
    "bools": [True] * N,
    "all equal": ONES,
    "requires grad": torch.ones(N, requires_grad=True),
    "tensors": [torch.tensor(1.0, requires_grad=True)] * N,
    "bfloat16": torch.ones(N, dtype=torch.bfloat16),
    "array": np.ones(N, dtype=np.float32),
    "array scalars": [np.float32(1)] * (N - 1) + [np.bool_(True)],
    "ints": (1,) * N,
    "largest": [LIMIT, *ONES[1:]],
}


@pytest.mark.parametrize("timeout", [None, 20.0], ids=["here", "in a process"])
@pytest.mark.parametrize("case", BAD_RETURNS)
def test_reward_contract_bad_return_gives_one_line_naming_function_step_sample_and_remedy(
    case, timeout
):
    value, words, _, sample = BAD_RETURNS[case]
    with pytest.raises(RewardError) as caught:
        run({"r": returning(value)}, timeout=timeout)
    line = str(caught.value)
    assert words in line
    assert line.startswith("reward 'r' at step 7")
    assert "\n" not in line
    assert "on_reward_error = 'skip'" in line
    if sample is not None:
        assert f"sample {sample} (prompt 'prompt {sample}')" in line


@pytest.mark.parametrize("timeout", [None, 20.0], ids=["here", "in a process"])
@pytest.mark.parametrize("case", BAD_RETURNS)
def test_reward_contract_bad_return_is_dropped_and_counted_when_skipping(case, timeout):
    value, words, kind, sample = BAD_RETURNS[case]
    result = run({"r": returning(value), "good": returning(ONES)}, on_error="skip", timeout=timeout)
    first = result.events[0]
    assert (first.name, first.function, first.step, first.sample) == (kind, "r", 7, sample)
    assert words in first.detail
    everything = sample is None or case.startswith("all") or sample == 0
    assert result.dropped == (N if everything else 1)
    assert len(result.events) == (1 if sample is None else result.dropped)
    for i, total in enumerate(result.total):
        assert math.isnan(total) == (everything or i == sample)
        assert math.isnan(result.by_function["good"][i]) == math.isnan(total)


@pytest.mark.parametrize("timeout", [None, 20.0], ids=["here", "in a process"])
@pytest.mark.parametrize("case", GOOD_RETURNS)
def test_reward_contract_usable_returns_become_plain_floats(case, timeout):
    result = run(
        {"r": returning(GOOD_RETURNS[case]), "zero": returning([0.0] * N)}, timeout=timeout
    )
    assert not result.events
    assert result.dropped == 0
    assert all(type(x) is float for x in result.total + result.by_function["r"])
    expected = {"one None": one(0.0), "largest": [LIMIT, *ONES[1:]]}.get(case, ONES)
    assert result.total == expected


def test_reward_contract_function_gets_texts_ids_without_padding_and_columns_by_keyword():
    seen = {}

    def reward(prompts, completions, completion_ids, **columns):
        seen.update(columns, prompts=prompts, completions=completions, ids=completion_ids)
        return [float(a) for a in columns["answer"]]

    result = run(reward, columns={"answer": list(range(N)), "extra": [None] * N})
    assert seen["prompts"] == PROMPTS
    assert seen["completions"] == COMPLETIONS
    assert seen["ids"] == IDS
    assert seen["extra"] == [None] * N
    assert result.total == [float(i) for i in range(N)]
    assert list(result.by_function) == ["reward"]


def test_a_sample_to_which_no_function_applies_is_dropped_with_an_event_not_an_error():
    result = run({"a": returning(one(None)), "b": returning([None] * N)})
    assert result.dropped == 1
    assert math.isnan(result.total[3])
    (event,) = result.events
    assert (event.name, event.function, event.sample) == ("reward_none", "a, b", 3)


@given(
    st.lists(
        st.lists(st.none() | st.floats(-1e6, 1e6), min_size=N, max_size=N), min_size=1, max_size=4
    ),
    st.data(),
)
def test_total_is_the_weighted_sum_of_the_functions_that_apply(returns, data):
    weights = data.draw(st.lists(st.floats(-10, 10), min_size=len(returns), max_size=len(returns)))
    functions = {str(i): returning(values) for i, values in enumerate(returns)}
    result = run(functions, weights)
    for i in range(N):
        terms = [w * r[i] for w, r in zip(weights, returns) if r[i] is not None]
        if terms:
            assert result.total[i] == pytest.approx(sum(terms), rel=1e-12, abs=1e-8)
        else:
            assert math.isnan(result.total[i])
    assert result.dropped == sum(map(math.isnan, result.total)) == len(result.events)


def test_weights_that_carry_a_value_out_of_range_are_a_fault():
    with pytest.raises(RewardError, match=r"sample 0 .*with weight 1000"):
        run(returning([1e7] * N), [1000.0])


@pytest.mark.parametrize("timeout", [None, 20.0])
def test_async_functions_and_callables_that_return_awaitables_are_awaited(timeout):
    async def slow(prompts, completions, completion_ids, **columns):
        await asyncio.sleep(0.001)
        return ONES

    def wrapped(**columns):
        return slow([], [], [])

    result = run([slow, wrapped], timeout=timeout)
    assert result.total == [2.0] * N


@pytest.mark.parametrize("timeout", [None, 20.0])
def test_async_functions_work_inside_a_running_loop_and_keep_one_loop(timeout):
    """As in a notebook: ours runs beside it, the same for all calls."""
    loops = []

    async def reward(**columns):
        await asyncio.sleep(0)
        loops.append(asyncio.get_running_loop())
        return [float(len(set(map(id, loops))))] * N

    async def outer(rewards):
        return [rewards(PROMPTS, COMPLETIONS, IDS, {}).total for _ in range(2)]

    with Rewards(reward, timeout=timeout) as rewards:
        assert asyncio.run(outer(rewards)) == [ONES, ONES]
        again = rewards(PROMPTS, COMPLETIONS, IDS, {}).total
    assert again == ONES
    assert not any(thread.name.startswith("hmpo rewards") for thread in threading.enumerate())


def test_a_loop_that_begins_to_run_later_is_not_entered_and_ours_stays():
    loops = []

    async def reward(**columns):
        loops.append(asyncio.get_running_loop())
        return ONES

    async def outer():
        return rewards(PROMPTS, COMPLETIONS, IDS, {}).total

    with Rewards(reward) as rewards:
        assert rewards(PROMPTS, COMPLETIONS, IDS, {}).total == ONES
        assert asyncio.run(outer()) == ONES
        assert rewards(PROMPTS, COMPLETIONS, IDS, {}).total == ONES
    assert len(set(map(id, loops))) == 1


def test_a_fault_of_an_async_function_inside_a_running_loop_is_one_line():
    async def reward(**columns):
        boom()

    async def outer():
        return run(reward)

    with pytest.raises(RewardError, match="raised ValueError: boom with a second line"):
        asyncio.run(outer())


@pytest.mark.parametrize("timeout", [None, 20.0])
def test_functions_without_columns_parameter_get_only_what_they_name(timeout):
    result = run(
        {"few": lambda completions, answer: [float(a) for a in answer], "all": returning(ONES)},
        columns={"answer": ["1"] * N, "other": ["2"] * N},
        timeout=timeout,
    )
    assert result.total == [2.0] * N


def test_a_function_that_changes_its_arguments_cannot_touch_the_rollout_or_the_next_function():
    def vandal(prompts, completions, completion_ids, **columns):
        prompts.clear()
        completion_ids[0].append(99)
        return ONES

    def honest(prompts, completion_ids, **columns):
        return [float(prompts == PROMPTS and completion_ids == IDS)] * N

    assert run([vandal, honest]).total == [2.0] * N
    assert IDS[0] == []


def test_token_id_lists_instead_of_texts_are_passed_through():
    rewards = Rewards(lambda prompts, completions, **_: [float(len(c)) for c in completions])
    assert rewards([[1], [2]], [[3, 4], []], [[3, 4], []], {}).total == [2.0, 0.0]
    assert rewards([], [], [], {}).total == []


def test_methods_partials_and_callable_objects_have_usable_names():
    class Judge:
        def __call__(self, **columns):
            return ONES

    task = make_task(TaskConfig(name="sort"))
    partial = functools.partial(returning(ONES))
    assert list(Rewards([Judge(), task.reward, partial]).functions) == [
        "Judge",
        "reward",
        "partial",
    ]


@pytest.mark.parametrize(
    ("build", "words"),
    [
        (lambda: Rewards([]), "got none"),
        (lambda: Rewards([returning(1), returning(2)]), "given twice; pass a mapping"),
        (lambda: Rewards(returning(1), [1.0, 2.0]), "weights: got 2 numbers, expected 1"),
        (lambda: Rewards(returning(1), [math.nan]), "expected finite numbers"),
        (lambda: Rewards(returning(1), timeout=0.0), "expected seconds > 0"),
        (lambda: run(lambda p, c, i: ONES), "its parameter 'p' is none of prompts"),
        (lambda: run(returning(ONES), columns={"prompts": PROMPTS}), "the name is taken"),
        (lambda: run(returning(ONES), columns={"answer": ["1"]}), "answer: got 1 values"),
        (
            lambda: run(returning(ONES), columns={"x": [{1, 2}] * N}, timeout=20.0),
            "'x' cannot be passed to the process",
        ),
    ],
)
def test_wrong_use_gives_one_clear_line_whatever_the_policy_on_faults(build, words):
    with pytest.raises(RewardError) as caught:
        build()
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_wrong_types_give_one_clear_line_without_the_type_checks_of_the_tests():
    code = """
        from hmpo.errors import RewardError
        from hmpo.rewards import Rewards, check_reward_fn

        def fine(**columns):
            return []

        for build, words in [
            (lambda: Rewards(["x"]), "got 'x', expected a function"),
            (lambda: check_reward_fn(None), "got None, expected a function"),
            (lambda: Rewards(fine, on_error="ignore"), "expected 'raise' or 'skip'"),
        ]:
            try:
                build()
            except RewardError as error:
                assert words in str(error), error
            else:
                raise SystemExit(words)
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(code)], check=True, cwd=ROOT)


def test_importing_rewards_and_tasks_costs_no_torch_and_no_numpy():
    code = (
        "import sys, hmpo.rewards, hmpo.tasks; "
        "assert not {'torch', 'numpy', 'reasoning_gym'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


# ---- loading and checking -------------------------------------------------------------------


def test_load_reward_finds_modules_in_the_current_folder_and_files(tmp_path, monkeypatch):
    (tmp_path / "my_rewards_1.py").write_text(
        "import my_helper_1\n"
        "def length(completions, **_):\n    return [my_helper_1.half(c) for c in completions]\n"
        "value = 3\n"
        "def bad(completions, /):\n    return []\n"
    )
    (tmp_path / "my_helper_1.py").write_text("def half(c):\n    return len(c) / 2\n")
    (tmp_path / "broken_1.py").write_text("import no_such_module_1\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", sys.path[:])
    for spec in (
        "my_rewards_1:length",
        "my_rewards_1.py:length",
        f"{tmp_path}/my_rewards_1.py:length",
    ):
        assert Rewards(load_reward(spec))(["p"], ["abcd"], [[]], {}).total == [2.0]
    for spec, words in {
        "my_rewards_1": "expected 'module:name' or 'path/to/file.py:name'",
        ":length": "expected 'module:name'",
        "my_rewards_1:lenght": "did you mean length?",
        "my_rewards_2.py:length": "did you mean my_rewards_1.py?",
        "no_such_module_1:length": "cannot import no_such_module_1 (ModuleNotFoundError",
        "broken_1.py:f": "cannot import broken_1.py (ModuleNotFoundError: No module named",
        "my_rewards_1:value": "got 3",
        "my_rewards_1:bad": "positional-only",
    }.items():
        with pytest.raises(RewardError) as caught:
            load_reward(spec)
        assert words in str(caught.value)
        assert "\n" not in str(caught.value)


def test_check_reward_fn_accepts_a_good_function_and_names_what_is_wrong_with_bad_ones():
    check_reward_fn(lambda completions, **_: [float(len(c)) for c in completions])
    task = make_task(TaskConfig(name="sort"))
    check_reward_fn(task.reward, columns={"answer": ["4", "5"]})

    def vandal(completions, **columns):
        completions[0] = "!"
        return [0.0, 0.0]

    for fn, words in [
        (task.reward, "give check_reward_fn(columns=...)"),
        (lambda completions, **_: 1.0, "got a float (1.0), expected a list of 2 numbers"),
        (lambda x, **_: [0.0, 0.0], "its parameter 'x' is none of"),
        (vandal, "changes its arguments"),
    ]:
        with pytest.raises(RewardError) as caught:
            check_reward_fn(fn)
        assert words in str(caught.value)
        assert "\n" not in str(caught.value)
